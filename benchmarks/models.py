"""Whole models for the predict suite: ours, and a plain PEFT twin for the contenders' loops."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tfb
from benchmarks import minilm as minilm_package
from benchmarks.harness import Bench, Step
from benchmarks.shapes import ADAPTERS, Shape, random_model, twin
from tfb.data.batching import batches
from tfb.data.readers import read_rows
from tfb.draws import Draws
from tfb.model import BayesianModel
from tfb.scoring.rows import encode, pad_token

ROWS, CLASSES = 50, 150
Statistics = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """A model in both forms and one batch.

    bayes: ours. twin: the same PEFT model, never Bayesianized, with A' and B' in its LoRA weights
    (the same function). batch: a tokenizer's tensors [B, T]. label_ids: [B, K] or None.
    """

    name: str
    bayes: BayesianModel
    twin: Any
    batch: dict[str, Tensor]
    label_ids: Tensor | None

    def description(self, draws: int) -> dict[str, Any]:
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
        """``bayes``, this one or another on the same base, predicting this batch."""
        return lambda i: bayes.predict(self.batch, draws, label_ids=self.label_ids, **mode)

    def small(self, rows: int) -> Case:
        """The first rows of the batch."""
        batch = {k: v[:rows] for k, v in self.batch.items()}
        labels = None if self.label_ids is None else self.label_ids[:rows]
        return replace(self, batch=batch, label_ids=labels)

    def parts(self, rows: int) -> list[Case]:
        """Batches of at most ``rows`` rows, the longest first, without the padding that all rows
        of one have."""
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
    """The twin with A' and B' in place of A and B: its noise then goes straight into A'."""
    for name, p in bayes.posteriors.items():
        layer = twin.get_base_model().get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(p.A)
        layer.lora_B["default"].weight.data.copy_(p.B)
    return twin


# --- the contenders -------------------------------------------------------------------------------


def forward(case: Case, model: Any) -> Tensor:
    """Probabilities [B, K] of one plain pass, asked for as cheaply as ours asks."""
    inputs: dict[str, Any] = dict(case.batch)
    if case.label_ids is None:
        return model(**inputs).logits.softmax(-1)
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits.gather(-1, case.label_ids).softmax(-1)


def in_parts(parts: Sequence[Case]) -> Callable[[Case, Any], Tensor]:
    """``forward`` of a case, batch by batch."""
    return lambda case, model: torch.cat([forward(part, model) for part in parts])


def summarize(p: Tensor) -> Statistics:
    """Mean [B, K] and the two entropies [B] of p [S, B, K]."""
    probs = p.mean(0)
    return probs, torch.special.entr(probs).sum(-1), torch.special.entr(p).sum(-1).mean(0)


def naive_draws(
    case: Case, draws: int, sigma: float, call: Callable[[Case, Any], Tensor]
) -> Iterator[Tensor]:
    """``call(case, model)`` ``draws`` times, each with A' + sigma / d o E written into lora_A and
    taken back."""
    layers = lora_a(case.bayes, case.twin).values()
    means = [(weight, weight.clone(), sigma * inv_d) for weight, inv_d in layers]
    for _ in range(draws):
        for weight, mean, std in means:
            weight.copy_(mean + std * torch.randn_like(mean))
        yield call(case, case.twin)
        for weight, mean, _std in means:
            weight.copy_(mean)


def naive_loop(
    case: Case, draws: int, sigma: float, call: Callable[[Case, Any], Tensor] = forward
) -> Statistics:
    """Statistics of ``draws`` PEFT forwards (``call``) with materialised noise."""
    return summarize(torch.stack(list(naive_draws(case, draws, sigma, call))))


def flipout_loop(
    case: Case, draws: int, sigma: float, call: Callable[[Case, Any], Tensor] = forward
) -> Statistics:
    """``draws`` PEFT forwards (``call``) with Flipout noise added after lora_A.

    The authors' scripts apply B to the mean and to the noise apart; here once to their sum, which
    is in the contender's favour.
    """
    found = []
    for _ in range(draws):
        with _flipout(case, sigma):
            found.append(call(case, case.twin))
    return summarize(torch.stack(found))


@contextmanager
def _flipout(case: Case, sigma: float) -> Iterator[None]:
    def add(noise: Tensor, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        sign_in = torch.empty_like(args[0]).uniform_(-1, 1).sign_()
        sign_out = torch.empty_like(output).uniform_(-1, 1).sign_()
        return output + F.linear(args[0] * sign_in, noise) * sign_out

    handles = []
    for name, p in case.bayes.posteriors.items():
        module = case.twin.get_base_model().get_submodule(name).lora_A["default"]
        weight = module.weight
        noise = sigma * p.inv_d[:, None].to(weight) * torch.randn_like(weight)
        handles.append(module.register_forward_hook(partial(add, noise)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lora_a(bayes: BayesianModel, twin: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """By name each sampled layer's lora_A weight [r, n] of the twin, and 1 / d [r, 1]."""
    base = twin.get_base_model()
    weights = {
        name: (base.get_submodule(name).lora_A["default"].weight.data, p)
        for name, p in bayes.posteriors.items()
    }
    return {name: (w, p.inv_d[:, None].to(w)) for name, (w, p) in weights.items()}


# --- the models -----------------------------------------------------------------------------------


def random_case(shape: Shape, adapter: str, bench: Bench) -> tuple[Case, Any]:
    """A random Llama with noise in all layers, on prompts with no prefix in common; and its PEFT
    model, not Bayesianized, whose base tensors both forms hold."""
    source = random_model(shape, *ADAPTERS[adapter], bench)
    bayes = tfb.bayesianize(twin(source))
    ids = torch.randint(1, shape.vocabulary, (shape.rows, shape.tokens), device=bench.device)
    ids[:, 0] = torch.arange(1, shape.rows + 1, device=bench.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.arange(10, 14, device=bench.device).expand(shape.rows, 4)
    return Case(shape.name, bayes, reparameterized(twin(source), bayes), batch, labels), source


def stories(shared: Path, device: torch.device) -> Case:
    """A trained Llama of 260K parameters, next-token task over 10 choices, r = 8 on six layers
    a block; the first rows of the validation set."""
    from transformers import AutoTokenizer

    base, adapter = shared / "models/stories260K", shared / "adapters/stories260K-clinc-domain"
    made = [tfb.load_adapter(tfb.load_base(base, adapter), adapter).to(device) for _ in range(2)]
    bayes = tfb.bayesianize(made[0])
    bayes.label_tokens = "last"  # as the adapter was trained
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    rows = read_rows(shared / "data/clinc-domain/validation.jsonl", limit=ROWS)
    encoded = encode(bayes, rows, tokenizer)
    pad = pad_token(bayes, tokenizer)
    batch = next(iter(batches(encoded, batch_size=ROWS, pad_token_id=pad))).to(device)
    twin = reparameterized(made[1], bayes)
    return Case("stories260K", bayes, twin, batch.model_inputs(), batch.label_ids)


def minilm(shared: Path, device: torch.device, targets: tuple[str, ...], name: str) -> Case:
    """MiniLM (22.7M parameters) with r = 8 on ``targets`` and a head of 150 classes; LoRA and head
    are random, of a trained adapter's size (B at 0.02): times do not depend on their values."""
    try:
        folder = minilm_package.folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    from transformers import AutoTokenizer

    made = [_minilm_model(folder, targets).to(device) for _ in range(2)]
    bayes = tfb.bayesianize(made[0])
    data = json.loads((shared / "data/clinc150/data_small.json").read_text(encoding="utf-8"))
    texts = [text for text, _intent in data["test"][:ROWS]]
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt").to(device))
    return Case(name, bayes, reparameterized(made[1], bayes), batch, None)


def _minilm_model(folder: Path, targets: tuple[str, ...]) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)  # both forms alike
    base: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        str(folder), num_labels=CLASSES
    )
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=list(targets))
    model = get_peft_model(base, config)
    for parameter_name, p in model.named_parameters():
        if "lora_B" in parameter_name:
            p.data.normal_(0, 0.02)
    return model.eval()


CASES: dict[str, Callable[[Path, torch.device], Case]] = {
    "stories260K": stories,
    "minilm-qv": partial(minilm, targets=("query", "value"), name="MiniLM q,v"),
    "minilm-all": partial(
        minilm, targets=("query", "key", "value", "dense"), name="MiniLM q,k,v,dense"
    ),
}
