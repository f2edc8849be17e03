"""A task ready to predict on: encoded rows, models loaded when asked for, their predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tfb
from benchmarks.calibration.tasks import LABEL_TOKENS, Task
from tfb.adapters.loading import load_tokenizer
from tfb.data.batching import Batch, EncodedRows, batches
from tfb.data.rows import Row
from tfb.draws import Draws
from tfb.model import BayesianModel
from tfb.predictive import Predictive
from tfb.scoring.evaluate import encode, predict_rows

BATCH_SIZE = 50
GIVEN_DROPOUT = 0.1  # of the LoRA input, for adapters that were trained without dropout


@dataclass(frozen=True)
class Predicted:
    """A method's predictions on one set of rows.

    Attributes:
        probs: [N, K] float64.
        total: [N] entropy of ``probs``, nats.
        epistemic: [N] nats, None for a method of one pass.
    """

    probs: Tensor
    total: Tensor
    epistemic: Tensor | None = None

    @classmethod
    def of_probs(cls, probs: Tensor) -> Predicted:
        """Of a method of one pass."""
        probs = probs.double()
        return cls(probs, torch.special.entr(probs).sum(-1))

    @classmethod
    def of_draws(cls, p: Tensor) -> Predicted:
        """Of equally likely members or draws, p [S, N, K]."""
        mean = Predictive.from_probs(p.double(), Draws.iid(len(p), 1.0))
        return cls(mean.probs, mean.total, mean.epistemic if len(p) > 1 else None)

    @property
    def log_probs(self) -> Tensor:
        """[N, K]; a probability that was rounded to 0 becomes the least one above it."""
        return self.probs.clamp_min(torch.finfo(torch.float32).tiny).log()


@dataclass
class Setting:
    """What the methods of one (task, seed) share.

    Attributes:
        adapters: folder of an adapter by its seed.
        mle_seed: of the adapter that all methods but the ensemble take.
        members: seeds of the ensemble.
        draws: of sampling methods.
    """

    task: Task
    adapters: Callable[[int], Path]
    mle_seed: int
    members: tuple[int, ...] = (0, 1, 2)
    draws: int = 10
    _models: dict[int, BayesianModel] = field(default_factory=dict)

    def model(self, seed: int | None = None) -> Any:
        """Return the model of an adapter; it is loaded once and shared."""
        seed = self.mle_seed if seed is None else seed
        if seed not in self._models:
            folder = self.adapters(seed)
            model = tfb.load_adapter(tfb.load_base(self.task.base, folder), folder)
            self._models[seed] = tfb.bayesianize(
                model, seed=self.task.seed, label_tokens=LABEL_TOKENS
            )
        return self._models[seed]

    @cached_property
    def anchors(self) -> EncodedRows:
        return self._encode(self.task.anchors)

    @cached_property
    def train(self) -> EncodedRows:
        return self._encode(self.task.train)

    @cached_property
    def judged(self) -> dict[str, EncodedRows]:
        """The test rows and every shift's."""
        return {"test": self._encode(self.task.test)} | {
            name: self._encode(rows) for name, rows in self.task.shifts.items()
        }

    def _encode(self, rows: list[Row]) -> EncodedRows:
        return encode(self.model(), rows, load_tokenizer(str(self.task.base)))

    @property
    def labels(self) -> Tensor:
        """[N] of the test rows."""
        return labels_of(self.judged["test"])


def labels_of(rows: EncodedRows) -> Tensor:
    """[N] int64.

    Raises:
        ValueError: a row without a label.
    """
    if None in rows.labels:
        raise ValueError(f"row {rows.ids[rows.labels.index(None)]} has no label")
    return torch.tensor(rows.labels)


# --- predictions of one model ---------------------------------------------------------------------


def sampled(bayes: BayesianModel, rows: EncodedRows, draws: Draws) -> Predicted:
    """Predict all rows; ``Draws.mean()`` is the deterministic adapter."""
    found = predict_rows(bayes, rows, draws, batch_size=BATCH_SIZE)
    if len(draws) == 1:
        return Predicted.of_probs(found.probs)
    return Predicted(found.probs.double(), found.total.double(), found.epistemic.double())


@torch.no_grad()
def dropped_out(bayes: BayesianModel, rows: EncodedRows, draws: int, seed: int) -> Predicted:
    """Monte Carlo dropout (Gal and Ghahramani 2016): the model in training mode, ``draws`` times.

    All dropout that acted in training acts: LoRA's and the base model's own. An adapter without
    LoRA dropout gets ``GIVEN_DROPOUT``. Masks differ from row to row.
    """
    p = torch.zeros(draws, len(rows), max(rows.num_choices(i) for i in range(len(rows))))
    # Not torch.manual_seed: other methods' random numbers stay what they were.
    with torch.random.fork_rng(devices=[]), training(bayes):
        torch.manual_seed(seed)
        for batch in _batches(bayes, rows):
            for s in range(draws):
                p[s, batch.indices] = plain_logits(bayes, batch).softmax(-1)
    return Predicted.of_draws(p)


class training:
    """Context: the model in training mode, LoRA layers without dropout with ``GIVEN_DROPOUT``."""

    def __init__(self, bayes: BayesianModel) -> None:
        self.model = bayes.model
        modules: list[Any] = list(bayes.model.modules())
        self.slots: list[tuple[Any, str]] = [
            (m.lora_dropout, bayes.adapter)
            for m in modules
            if hasattr(m, "lora_dropout") and bayes.adapter in m.lora_dropout
        ]

    def __enter__(self) -> None:
        self.before = [slot[name] for slot, name in self.slots]
        for slot, name in self.slots:
            if isinstance(slot[name], nn.Identity):
                slot[name] = nn.Dropout(GIVEN_DROPOUT)
        self.model.train()

    def __exit__(self, *error: object) -> None:
        for (slot, name), module in zip(self.slots, self.before, strict=True):
            slot[name] = module
        self.model.eval()


def plain_logits(bayes: BayesianModel, batch: Batch) -> Tensor:
    """[B, K] of one plain pass of the PEFT model, in the mode that it is in."""
    inputs = bayes.inputs(batch.model_inputs(), "full")
    logits = bayes.model(**inputs, **bayes.last_logits).logits
    return logits if batch.label_ids is None else logits[:, -1].gather(-1, batch.label_ids)


# --- the head -------------------------------------------------------------------------------------


@torch.no_grad()
def features(bayes: BayesianModel, rows: EncodedRows) -> Tensor:
    """[N, D] what the deterministic model's head reads at the scored position."""
    found: list[Tensor] = []
    parts: list[tuple[Tensor, Tensor]] = []
    hook = head_module(bayes).register_forward_pre_hook(lambda _m, args: found.append(args[0]))
    try:
        for batch in _batches(bayes, rows):
            plain_logits(bayes, batch)
            h = found.pop()
            if h.dim() == 3:  # causal LMs: one position; decoders' classifiers: the last token
                last = torch.zeros(len(batch), dtype=torch.int64)
                if batch.label_ids is None:
                    last = batch.attention_mask.sum(-1) - 1
                h = h[torch.arange(len(batch)), last]
            parts.append((batch.indices, h))
    finally:
        hook.remove()
    made = torch.zeros(len(rows), parts[0][1].shape[-1])
    for index, h in parts:
        made[index] = h.float()
    return made


def head(bayes: BayesianModel, rows: EncodedRows) -> nn.Linear:
    """Copy the head: the classifier, or the rows of the output embedding that are labels.

    Raises:
        ValueError: choices that differ from row to row, which no one linear map scores.
    """
    weight, bias = head_module(bayes).weight, head_module(bayes).bias
    if rows.label_ids is not None:
        if len(set(rows.label_ids)) > 1:
            raise ValueError("last-layer Laplace needs the same label tokens for all rows")
        columns = torch.tensor(rows.label_ids[0])
        weight, bias = weight[columns], None if bias is None else bias[columns]
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    made.load_state_dict({name: value.detach().clone() for name, value in state.items()})
    return made


def head_module(bayes: BayesianModel) -> Any:
    """Find the linear layer that puts out logits.

    Raises:
        ValueError: the model has none that is known here.
    """
    base = bayes.base
    found: Any = base.get_output_embeddings() if bayes.task != "SEQ_CLS" else None
    for name in ("classifier", "score"):
        found = getattr(base, name, None) if found is None else found
    saved: Mapping[str, Any] | None = getattr(found, "modules_to_save", None)
    found = found if saved is None else saved[bayes.adapter]
    if not isinstance(found, nn.Linear):
        raise ValueError(f"no linear head found in {type(base).__name__}")
    return found


def _batches(bayes: BayesianModel, rows: EncodedRows) -> Any:
    side = "left" if bayes.task == "CAUSAL_LM" else "right"
    return batches(
        rows,
        batch_size=BATCH_SIZE,
        pad_token_id=bayes.pad_token_id,
        padding_side=side,
    )
