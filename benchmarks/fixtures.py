"""Models to time: random ones of a given shape and small real ones, each with a plain twin."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import tfb
from benchmarks.environment import minilm_folder
from benchmarks.timing import Bench, Step
from tfb.data.batching import batches
from tfb.data.readers import read_rows
from tfb.draws import Draws
from tfb.model import BayesianModel
from tfb.scoring.evaluate import encode

ROWS, CLASSES = 50, 150  # of the real models' batch; of MiniLM's head
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
ADAPTERS = {"r8-q,v,head": (8, ("q_proj", "v_proj", "lm_head")), "r16-all": (16, ALL)}


@dataclass(frozen=True, eq=False)
class Case:
    """A model in both forms and one batch.

    Attributes:
        name: The model's.
        bayes: Ours.
        twin: The same PEFT model, never Bayesianized, with A' and B' in its LoRA weights: the same
            function, and noise goes straight into A'.
        batch: A tokenizer's tensors [B, T].
        label_ids: Tokens of the choices [B, K]; None of a classifier.
    """

    name: str
    bayes: BayesianModel
    twin: Any
    batch: dict[str, Tensor]
    label_ids: Tensor | None

    def description(self, draws: int) -> dict[str, Any]:
        """Return the configuration of a point."""
        B, T = self.batch["input_ids"].shape
        return {
            "model": self.name,
            "parameters": sum(p.numel() for p in self.bayes.base.parameters()),
            "bayesian_layers": len(self.bayes.samplers),
            "draws": draws,
            "rows": B,
            "tokens": T,
            "dtype": str(next(self.bayes.base.parameters()).dtype).removeprefix("torch."),
        }

    def sampling(self, bayes: BayesianModel, draws: Draws, **mode: Any) -> Step:
        """Return a step in which ``bayes``, this one or another on the same base, predicts."""
        return lambda i: bayes.predict(self.batch, draws, label_ids=self.label_ids, **mode)

    def small(self, rows: int) -> Case:
        """Keep the first rows of the batch."""
        batch = {k: v[:rows] for k, v in self.batch.items()}
        labels = None if self.label_ids is None else self.label_ids[:rows]
        return replace(self, batch=batch, label_ids=labels)

    def parts(self, rows: int) -> list[Case]:
        """Split into batches of at most ``rows`` rows, the longest first.

        Padding that all rows of a batch have is left out.
        """
        found = []
        for chosen in self.by_length.split(rows):
            real = self.batch["attention_mask"][chosen].any(0)
            batch = {k: v[chosen][:, real] for k, v in self.batch.items()}
            labels = None if self.label_ids is None else self.label_ids[chosen]
            found.append(replace(self, batch=batch, label_ids=labels))
        return found

    @property
    def by_length(self) -> Tensor:
        """The rows' numbers in the order of ``parts``."""
        lengths = self.batch["attention_mask"].sum(-1)
        return lengths.argsort(descending=True, stable=True)


def reparameterized(twin: Any, bayes: BayesianModel) -> Any:
    """Put A' and B' into the twin in place of A and B, and return it."""
    for name, p in bayes.posteriors.items():
        layer = twin.get_base_model().get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(p.A)
        layer.lora_B["default"].weight.data.copy_(p.B)
    return twin


def add_lora(base: nn.Module, rank: int, targets: tuple[str, ...], task: str, **how: Any) -> Any:
    """Return a PEFT model whose LoRA is random, of a trained adapter's size (B at 0.02)."""
    config = LoraConfig(task_type=task, r=rank, lora_alpha=2 * rank, target_modules=list(targets))
    model: Any = get_peft_model(base, config, **how)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.02)
    return model.eval()


# --- random models of a given shape ---------------------------------------------------------------


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


def description(shape: Shape, adapter: str, bench: Bench) -> dict[str, Any]:
    """Return the configuration of a point."""
    rank, targets = ADAPTERS[adapter]
    return {
        "model": shape.name,
        "adapter": adapter,
        "rank": rank,
        "targets": list(targets),
        "rows": shape.rows,
        "tokens": shape.tokens,
        "hidden": shape.hidden,
        "layers": shape.layers,
        "vocabulary": shape.vocabulary,
        "dtype": bench.dtype_name,
    }


def random_model(shape: Shape, adapter: str, bench: Bench) -> Any:
    """Return a PEFT model with random weights, the same at every call.

    LoRA has the dtype of the base, which is cheaper for a plain loop than PEFT's default, float32.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2 * shape.tokens,
        pad_token_id=0,
        dtype=bench.dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)  # 8B parameters in float32 would be made first
    try:
        with torch.device(bench.device):
            base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return add_lora(base, *ADAPTERS[adapter], "CAUSAL_LM", autocast_adapter_dtype=False)


def copy_of(source: Any) -> Any:
    """Copy a PEFT model but for the base's tensors: several of 8B parameters do not fit."""
    shared = {id(p): p for name, p in source.named_parameters() if "lora_" not in name}
    return deepcopy(source, shared)


def random_case(shape: Shape, adapter: str, bench: Bench) -> tuple[Case, Any]:
    """Return a random Llama with noise in all layers, on prompts with no prefix in common.

    Beside it its PEFT model, not Bayesianized, whose base tensors both forms hold.
    """
    source = random_model(shape, adapter, bench)
    bayes = tfb.bayesianize(copy_of(source))
    ids = torch.randint(1, shape.vocabulary, (shape.rows, shape.tokens), device=bench.device)
    ids[:, 0] = torch.arange(1, shape.rows + 1, device=bench.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.arange(10, 14, device=bench.device).expand(shape.rows, 4)
    return Case(shape.name, bayes, reparameterized(copy_of(source), bayes), batch, labels), source


# --- real models ----------------------------------------------------------------------------------


STORIES, STORIES_ADAPTER = "models/stories260K", "adapters/stories260K-clinc-domain"


def stories_model(shared: Path) -> nn.Module:
    """Return a trained Llama of 260K parameters; its task is the next token among 10 choices.

    The adapter has r = 8 on six layers a block, and was trained on the labels' last tokens.
    """
    base, adapter = shared / STORIES, shared / STORIES_ADAPTER
    return tfb.load_adapter(tfb.load_base(base, adapter), adapter)


def stories(shared: Path, device: torch.device) -> Case:
    """Return that Llama on the first rows of its validation set."""
    model, plain = (stories_model(shared).to(device) for _ in range(2))
    bayes = tfb.bayesianize(model, label_tokens="last", source=shared / STORIES_ADAPTER)
    tokenizer = AutoTokenizer.from_pretrained(str(shared / STORIES))
    rows = read_rows(shared / "data/clinc-domain/validation.jsonl", limit=ROWS)
    encoded = encode(bayes, rows, tokenizer)
    batch = next(iter(batches(encoded, batch_size=ROWS, pad_token_id=bayes.pad_token_id)))
    assert batch.label_ids is not None
    inputs = {name: tensor.to(device) for name, tensor in batch.model_inputs().items()}
    twin = reparameterized(plain, bayes)
    return Case("stories260K", bayes, twin, inputs, batch.label_ids.to(device))


def minilm(shared: Path, device: torch.device, targets: tuple[str, ...], name: str) -> Case:
    """Return MiniLM with a head of 150 classes, and r = 8 on ``targets``.

    LoRA and head are random: times do not depend on their values.
    """
    try:
        folder = str(minilm_folder())
    except FileNotFoundError as error:
        pytest.skip(str(error))

    def model() -> Any:
        torch.manual_seed(0)  # both forms alike
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
        return add_lora(base, 8, targets, "SEQ_CLS").to(device)

    bayes = tfb.bayesianize(model())
    data = json.loads((shared / "data/clinc150/data_small.json").read_text(encoding="utf-8"))
    texts = [text for text, _intent in data["test"][:ROWS]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt").to(device))
    return Case(name, bayes, reparameterized(model(), bayes), batch, None)


DENSE = ("query", "key", "value", "dense")
CASES: dict[str, Callable[[Path, torch.device], Case]] = {
    "stories260K": stories,
    "minilm-qv": partial(minilm, targets=("query", "value"), name="MiniLM q,v"),
    "minilm-all": partial(minilm, targets=DENSE, name="MiniLM q,k,v,dense"),
}
