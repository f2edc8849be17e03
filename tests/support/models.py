"""Tiny random models with a trained-looking LoRA, and naive sampling that knows nothing of ours.

A model is built from a seed: two calls with the same arguments give twins, one to Bayesianize and
one to compare with (a Bayesianized model carries hooks and is not to be copied).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tfb import Draws, LowRankPosterior

# Matrices this small gain nothing from a second thread, and on a busy machine threads that wait
# for each other cost ten times the work. One thread also splits sums the same way everywhere.
torch.set_num_threads(1)

VOCAB, HIDDEN, LAYERS, HEADS, LABELS = 64, 16, 2, 4, 3
FIRST_TOKEN = 4  # ids below stand for padding and other special tokens
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --- models -------------------------------------------------------------------------------------


def llama_config(**overrides: Any) -> transformers.LlamaConfig:
    """Grouped-query attention: 4 heads of queries on 2 of keys and values."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return transformers.LlamaConfig(**(sizes | overrides))


def llama(**overrides: Any) -> Any:
    return transformers.LlamaForCausalLM(llama_config(**overrides))


def llama_classifier() -> Any:
    return transformers.LlamaForSequenceClassification(llama_config(num_labels=LABELS))


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64
    )
    return transformers.GPT2LMHeadModel(config)


def encoder(name: str) -> Any:
    """A BERT or RoBERTa classifier, by the prefix of transformers' class names."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        num_labels=LABELS,
    )
    return getattr(transformers, f"{name}ForSequenceClassification")(config)


def distilbert() -> Any:
    config = transformers.DistilBertConfig(
        vocab_size=VOCAB,
        dim=HIDDEN,
        hidden_dim=2 * HIDDEN,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_position_embeddings=64,
        num_labels=LABELS,
    )
    return transformers.DistilBertForSequenceClassification(config)


def randomize(model: Any, seed: int, names: str = "") -> Any:
    """Weights of a scale at which every nonlinearity matters; only parameters with ``names``.

    transformers starts at a standard deviation of .02, where a tiny model is nearly linear.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if names not in name:
                continue
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 2:
                p.copy_(noise / p.shape[1] ** 0.5)
            elif name.endswith("weight"):  # of a norm
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(0.1 * noise)
    return model


def add_lora(base: Any, seed: int = 1, adapter: str = "default", **config: Any) -> Any:
    """The PEFT model, in eval mode; every LoRA weight random, B too."""
    model = get_peft_model(base, LoraConfig(**config), adapter_name=adapter)
    randomize(model, seed, f".{adapter}.")
    return model.eval()


class ExactNorm(nn.Module):
    """RMSNorm in its input's precision; ``offset`` is what Gemma adds to its weight.

    transformers' own work in float32, in a float64 model too.
    """

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
        return (self.weight + self.offset) * x * scale


def exact(model: Any) -> Any:
    """The model turned to float64 in place, to the last operation."""
    model.double()
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            parent, _, child = name.rpartition(".")
            eps = getattr(module, "variance_epsilon", None) or module.eps
            norm = ExactNorm(module.weight, eps, 1.0 if kind.startswith("Gemma") else 0.0)
            setattr(model.get_submodule(parent), child, norm)
    return model


@dataclass(frozen=True)
class Case:
    """One kind of adapted model; ``batch`` is what its forward pass takes."""

    base: Callable[[], Any]
    config: Mapping[str, Any]
    base_dtype: torch.dtype = torch.float32
    pad: str = "left"
    extras: tuple[str, ...] = field(default=("position_ids",))

    def build(self, seed: int = 0) -> Any:
        """The PEFT model in float32 (the base in ``base_dtype``)."""
        base = randomize(self.base(), seed).to(self.base_dtype)
        return add_lora(base, seed + 1, **self.config)

    def batch(self, *lengths: int, seed: int = 0) -> dict[str, Tensor]:
        return make_batch(*(lengths or (5, 2, 4)), seed=seed, pad=self.pad, extras=self.extras)


def causal(**config: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": LLAMA} | config


def classifier(*targets: str, **config: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "task_type": "SEQ_CLS", "target_modules": [*targets]} | config


BERT = ("query", "key", "value", "dense")
CASES: dict[str, Case] = {
    "llama": Case(llama, causal()),
    "lm_head": Case(llama, causal(target_modules=["v_proj", "lm_head"])),
    "rslora": Case(llama, causal(use_rslora=True, lora_dropout=0.3)),
    "patterns": Case(
        llama,
        causal(
            r=2,
            rank_pattern={"q_proj": 5, r"layers.1.mlp.\w+": 1},
            alpha_pattern={"v_proj": 3, "o_proj": 7},
        ),
    ),
    "bf16": Case(llama, causal(), base_dtype=torch.bfloat16),
    "gpt2": Case(gpt2, causal(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "llama_classifier": Case(llama_classifier, classifier("q_proj", "v_proj"), pad="right"),
    "bert": Case(
        lambda: encoder("Bert"), classifier(*BERT), pad="right", extras=("token_type_ids",)
    ),
    "lora_bias": Case(
        lambda: encoder("Bert"),
        classifier(*BERT, lora_bias=True),
        pad="right",
        extras=("token_type_ids",),
    ),
    "roberta": Case(lambda: encoder("Roberta"), classifier(*BERT[:3]), pad="right", extras=()),
    "distilbert": Case(distilbert, classifier("q_lin", "v_lin"), pad="right", extras=()),
}


# --- batches and outputs ------------------------------------------------------------------------


def make_batch(
    *lengths: int,
    seed: int = 0,
    pad: str = "left",
    width: int | None = None,
    extras: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Random rows of these lengths, padded with 0 to ``width``. A row depends on its own length,
    its place and the seed only, not on padding or the other rows."""
    width = width or max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        where = slice(width - length, width) if pad == "left" else slice(0, length)
        ids[row, where] = torch.randint(FIRST_TOKEN, VOCAB, (length,), generator=generator)
        types[row, where] = torch.randint(0, 2, (length,), generator=generator)
        mask[row, where] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in extras:
        batch["token_type_ids"] = types
    if "position_ids" in extras:
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return batch


def rows_of(batch: Mapping[str, Tensor], *rows: int) -> dict[str, Tensor]:
    return {name: value[list(rows)] for name, value in batch.items()}


@torch.no_grad()
def run(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Logits of a plain call; at padding they mean nothing and are set to zero."""
    logits: Tensor = model(**batch).logits
    if logits.dim() == 3:
        mask = batch["attention_mask"].repeat(len(logits) // len(batch["attention_mask"]), 1)
        logits = logits * mask[..., None]
    return logits


def sampled(bayes: Any, draws: Draws, batch: Mapping[str, Any]) -> Tensor:
    """Logits [S, B, ...] of one sampling pass."""
    with bayes.sampling(draws):
        return run(bayes.model, batch).unflatten(0, (len(draws), -1))


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over largest magnitude."""
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())


# --- naive sampling -----------------------------------------------------------------------------


@torch.no_grad()
def naive(
    twin: Any,
    posteriors: Mapping[str, LowRankPosterior],
    draws: Draws,
    call: Callable[[Any], Tensor],
    adapter: str = "default",
) -> Tensor:
    """``call(twin)`` of each draw [S, ...], with that draw's weights put into the twin's base.

    ``twin`` is a PEFT model that was never Bayesianized. Its LoRA product is silenced by B = 0 in
    the sampled modules (biases of lora_B stay) and the sampled update goes into the base weight,
    so all arithmetic is PEFT's and torch's. The twin is as before afterwards.
    """
    base = twin.get_base_model()
    layers: dict[str, Any] = {name: base.get_submodule(name) for name in posteriors}
    saved: dict[str, Any] = {}
    for name, layer in layers.items():
        up = layer.lora_B[adapter].weight
        saved[name] = (layer.base_layer.weight, up, up.detach().clone())
        up.zero_()
    outputs = []
    try:
        for sigma, stream in zip(draws.sigmas, draws.streams, strict=True):
            for name, posterior in posteriors.items():
                weight = saved[name][0]
                delta = posterior.sample(sigma, stream, draws.seed)
                delta = delta.mT if layers[name].fan_in_fan_out else delta
                # A parameter of its own: where weights are tied, the other end stays as it is.
                layers[name].base_layer.weight = nn.Parameter(weight + delta.to(weight.dtype))
            outputs.append(call(twin))
    finally:
        for name, (weight, up, values) in saved.items():
            layers[name].base_layer.weight = weight
            up.copy_(values)
    return torch.stack(outputs)
