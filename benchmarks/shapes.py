"""PEFT models of a given shape with random weights: times do not depend on their values."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import Bench

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@dataclass(frozen=True)
class Shape:
    """A random Llama, and the batch that runs through it."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rows: int
    tokens: int


CPU = Shape("Llama 8 x 512", 512, 1408, 8, 8, 4, 8192, 8, 256)
TOY = Shape("toy", 32, 64, 4, 4, 2, 128, 2, 16)
GPU = Shape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128256, 50, 300)

ADAPTERS = {
    "r8-q,v,head": (8, ("q_proj", "v_proj", "lm_head")),
    "r16-all": (16, ALL),
}


def description(shape: Shape, adapter: str, bench: Bench) -> dict[str, Any]:
    """The configuration of a point."""
    rank, targets = ADAPTERS[adapter]
    return {
        "model": shape.name, "adapter": adapter, "rank": rank, "targets": list(targets),
        "rows": shape.rows, "tokens": shape.tokens, "hidden": shape.hidden,
        "layers": shape.layers, "vocabulary": shape.vocabulary, "dtype": bench.dtype_name,
    }  # fmt: skip


def random_model(shape: Shape, rank: int, targets: tuple[str, ...], bench: Bench) -> Any:
    """A PEFT model with random weights, the same at every call; LoRA in the dtype of the base,
    which is cheaper for a plain loop than PEFT's default of float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=2 * shape.tokens,
        pad_token_id=0, dtype=bench.dtype,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)  # 8B parameters in float32 would be made first
    try:
        with torch.device(bench.device):
            base: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=list(targets)
    )
    made = get_peft_model(base, lora, autocast_adapter_dtype=False)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.02)
    return made.eval()


def twin(source: Any) -> Any:
    """A copy that holds the same base tensors: several copies of 8B parameters do not fit."""
    shared = {id(p): p for name, p in source.named_parameters() if "lora_" not in name}
    return deepcopy(source, shared)
