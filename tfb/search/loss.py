"""The loss that is traced as sigma grows: anchor sets, their losses, and what these cost."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tfb.data.batching import NO_LABEL, EncodedRows, batches
from tfb.draws import Draws
from tfb.evaluation.metrics import nll_of_rows
from tfb.model import BayesianModel
from tfb.sampling.config import SamplingConfig
from tfb.sampling.state import Batch
from tfb.search.result import SearchError

METRICS = ("nll", "accuracy", "pseudo_nll", "embedding_norm", "expected_nll")
SUPERVISED = ("nll", "accuracy", "expected_nll")
PER_ROW = ("expected_nll", "embedding_norm")  # a draw's output is the row's loss already
ROWS_PER_PASS = 1024  # rows x draws in one forward pass


@dataclass(frozen=True)
class AnchorSet:
    """Anchor rows as ready batches.

    Attributes:
        batches: dicts of tokenizer tensors [B, T], "labels" [B] (class indices) and, for causal
            LMs, "label_ids" [K], [B, K] or [B, K, L] (the tokens of the classes).
        content_hash: SHA-256 of the content.
    """

    batches: tuple[Batch, ...]
    content_hash: str

    @classmethod
    def of(
        cls,
        anchors: AnchorSet | EncodedRows | Iterable[Batch],
        *,
        pad_token_id: int = 0,
        batch_size: int = 50,
    ) -> AnchorSet:
        """Take encoded rows, or batches.

        Args:
            anchors: the rows.
            pad_token_id: the token that pads encoded rows.
            batch_size: of encoded rows.

        Raises:
            ValueError: no anchors at all.
            TypeError: neither batches nor encoded rows.
        """
        if isinstance(anchors, AnchorSet):
            return anchors
        made: list[Batch] = []
        if isinstance(anchors, EncodedRows):
            for b in batches(anchors, batch_size=batch_size, pad_token_id=pad_token_id):
                extra = {"labels": b.labels, "label_ids": b.label_ids}
                made.append(b.model_inputs() | {k: v for k, v in extra.items() if v is not None})
            digest = anchors.content_hash
        else:
            made = [_with_tensors(batch) for batch in anchors]
            digest = _hash(made)
        if not made:
            raise ValueError("anchors: empty; a search needs rows to measure a loss on")
        return cls(tuple(made), digest)

    def __len__(self) -> int:
        return sum(int(b["input_ids"].shape[0]) for b in self.batches)

    @cached_property
    def labels(self) -> Tensor | None:
        """All labels [N], or None if any row has none."""
        found = [b.get("labels") for b in self.batches]
        if any(y is None for y in found):
            return None
        labels = torch.cat([torch.as_tensor(y).cpu().long() for y in found])
        return None if bool((labels == NO_LABEL).any()) else labels

    def check(self, metric: str) -> None:
        """Refuse what cannot be searched on by a metric: missing labels, one class only."""
        if metric not in SUPERVISED:
            return
        if self.labels is None:
            raise ValueError(
                f"metric={metric!r} needs a label on every anchor; add labels or use pseudo_nll "
                "or embedding_norm"
            )
        # Class index alone tells nothing when each row has its own choices.
        ids = [b["label_ids"] for b in self.batches if b.get("label_ids") is not None]
        choices = {str(row) for i in ids for row in (i if i.dim() > 1 else i[None]).tolist()}
        if len(choices) <= 1 and len(self.labels.unique()) == 1:
            raise ValueError(
                f"anchors: all {len(self)} rows have label {int(self.labels[0])}; a loss on one "
                "class says nothing about calibration, add rows of other classes"
            )


def _with_tensors(batch: Batch) -> Batch:
    """Accept labels and choices that are lists."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise TypeError(
            "anchors: expected encoded rows, or batches (dicts with input_ids and other tensors), "
            f"got {type(batch).__name__}; write anchors = encode(bayes, data, tokenizer) for "
            "files, DataFrames, Datasets and lists of rows"
        )
    names = [n for n in ("labels", "label_ids") if isinstance(batch.get(n), list)]
    return {**batch, **{n: torch.tensor(batch[n]) for n in names}} if names else batch


def _hash(made: Sequence[Batch]) -> str:
    """Return the SHA-256 of all tensors, with shape and type."""
    sha = hashlib.sha256()
    for batch in made:
        for key in sorted(batch):
            if isinstance(value := batch[key], Tensor):
                sha.update(f"{key} {list(value.shape)} {value.dtype} ".encode())
                sha.update(value.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class PassCounter:
    """What a search spends, in deterministic passes over all anchors, counted in tokens.

    In full mode every draw is a pass. In tail mode a row's first T - k tokens run once in a sweep.
    """

    def __init__(self, batches: Sequence[Batch], tail: int | None) -> None:
        masks = [(b.get("attention_mask"), torch.ones_like(b["input_ids"])) for b in batches]
        lengths = [(real if mask is None else mask).sum(1) for mask, real in masks]
        tokens = torch.cat([n.long().cpu() for n in lengths])  # [N]
        self._drawn = tokens if tail is None else tokens.clamp_max(tail)
        self._common = tokens - self._drawn
        self._total = int(tokens.sum())
        self._spent = 0

    @property
    def passes(self) -> float:
        """Passes spent so far."""
        return self._spent / self._total

    def spend(self, rows: Tensor, draws: int) -> None:
        """Count a sweep of ``draws`` draws over ``rows``."""
        self._spent += int((self._common[rows] + draws * self._drawn[rows]).sum())

    @property
    def draw_cost(self) -> float:
        """One more draw in a sweep over all rows, in passes."""
        return int(self._drawn.sum()) / self._total


def passes_per_row(lengths: Sequence[int], draws: int, tail: int | None = None) -> float:
    """Return what draws of prompts of these many tokens cost, as :class:`PassCounter` counts."""
    total = sum(lengths)
    drawn = total if tail is None else sum(min(n, tail) for n in lengths)
    return (total - drawn + draws * drawn) / total


@dataclass(frozen=True)
class LossTable:
    """Losses of anchors at G sigmas [G, N], and their mean without each stream [G, U]."""

    rows: Tensor
    left_out: Tensor


def jackknife_error(left_out: Tensor) -> Tensor:
    """Return the standard error of a mean (NaN of one unit) from those without each [..., U]."""
    U = left_out.shape[-1]
    if U == 1:
        return torch.full(left_out.shape[:-1], float("nan"), dtype=left_out.dtype)
    return ((U - 1) * left_out.var(-1, unbiased=False)).sqrt()


class AnchorLoss:
    """The anchors' loss as a function of sigma; counts the passes it spends.

    All sigmas share antithetic streams, without which the loss is not even monotone. To add a
    metric: a branch in ``_outputs`` or ``_label_loss``.
    """

    def __init__(
        self,
        bayes: BayesianModel,
        anchors: AnchorSet,
        metric: str,
        *,
        draws: int,
        config: SamplingConfig | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Check the anchors; in full mode measure them at sigma = 0."""
        anchors.check(metric)
        self.bayes, self.anchors, self.metric = bayes, anchors, metric
        self.n, self.progress = draws, progress
        self.config = bayes.config if config is None else config
        self.cost = PassCounter(anchors.batches, self.config.tail)
        self._mean: Tensor | None = None  # [N, K] probabilities (widest K), or [N] losses
        self.measured = torch.zeros(len(anchors), dtype=torch.bool)  # at sigma = 0
        if self.config.mode == "full":
            self._measure_baseline()

    @property
    def passes(self) -> float:
        """Deterministic passes spent so far."""
        return self.cost.passes

    @property
    def baseline(self) -> Tensor:
        """Losses at sigma = 0, [N]."""
        self._measure_baseline()
        return self.baseline_of(torch.arange(len(self.anchors)))

    def baseline_of(self, rows: Tensor) -> Tensor:
        """Return the losses at sigma = 0 of rows that have been measured."""
        assert self._mean is not None
        return self._losses(self._mean[rows], rows)

    @property
    def probabilities(self) -> Tensor | None:
        """Probabilities at sigma = 0 [N, K], None for metrics without."""
        return None if self.metric in PER_ROW else self._mean

    def __call__(self, sigmas: Sequence[float], *, rows: Tensor | None = None) -> LossTable:
        """Return the losses at sigmas > 0 of all anchors, or of ascending ``rows``.

        Where their loss at sigma = 0 is not known (tail mode), sigma = 0 joins the sweep.
        """
        rows = torch.arange(len(self.anchors)) if rows is None else rows
        units = self.n // 2
        found, left_out = [], torch.zeros(len(sigmas), units, dtype=torch.float64)
        for batch, at in self._pieces(rows):
            first = [] if bool(self.measured[at].all()) else [0.0]
            per_unit = self._sweep(batch, at, [*first, *sigmas])
            if first:
                self._remember(at, per_unit[0, 0])
                per_unit = per_unit[:, 1:]
            mean = per_unit.mean(0)
            found.append(self._losses(mean, at))
            for u in range(units):
                without = (mean * units - per_unit[u]) / (units - 1) if units > 1 else mean
                left_out[:, u] += self._losses(without, at).sum(-1)
        return LossTable(torch.cat(found, dim=1), left_out / len(rows))

    def _sweep(self, batch: Batch, at: Tensor, sigmas: Sequence[float]) -> Tensor:
        """Return outputs [U, G, B, ...] of the rows ``at``, averaged over each antithetic pair."""
        units, per_pass, parts = self.n // 2, len(sigmas), []
        if self.config.mode == "full":  # in tail mode each part would run the prompt again
            per_pass = max(1, ROWS_PER_PASS // (self.n * len(at)))
        for g in range(0, len(sigmas), per_pass):
            draws = Draws.grid(sigmas[g : g + per_pass], self.n, seed=self.config.seed)
            out = self._outputs(batch, draws, at)
            parts.append(out.unflatten(0, (units, -1, 2)).mean(2))
            if self.progress is not None:
                self.progress(len(draws) * len(at))
        self.cost.spend(at, len(sigmas) * self.n)
        return torch.cat(parts, dim=1)

    def _pieces(self, rows: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch's share of ``rows``, and their places among all anchors."""
        start = 0
        for batch in self.anchors.batches:
            B = int(batch["input_ids"].shape[0])
            at = rows[(rows >= start) & (rows < start + B)]
            if len(at):
                yield (batch if len(at) == B else _take(batch, at - start, B)), at
            start += B

    def _measure_baseline(self) -> None:
        """Measure at sigma = 0 all rows that were not."""
        for batch, at in self._pieces((~self.measured).nonzero()[:, 0]):
            self._remember(at, self._outputs(batch, Draws.mean(), at)[0])
            self.cost.spend(at, 1)

    def _remember(self, at: Tensor, out: Tensor) -> None:
        """Keep outputs at sigma = 0 of the rows ``at``: [B, K] or [B]."""
        if self._mean is None:
            self._mean = torch.zeros(len(self.anchors), *out.shape[1:], dtype=torch.float64)
        if out.dim() == 2:
            K = max(self._mean.shape[1], out.shape[1])
            self._mean, out = (
                torch.nn.functional.pad(t, (0, K - t.shape[1])) for t in (self._mean, out)
            )
        self._mean[at] = out
        self.measured[at] = True

    def _outputs(self, batch: Batch, draws: Draws, at: Tensor) -> Tensor:
        """Return each draw's probabilities [S, B, K], or losses [S, B], in float64 on the CPU."""
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "label_ids")}
        if self.metric == "embedding_norm":
            out = self.bayes.hidden_norms(inputs, draws).double().cpu()
        else:
            form: Any = {"mode": self.config.mode, "tail": self.config.tail}
            logits = self.bayes.logits(inputs, draws, batch.get("label_ids"), **form)
            out = (logits.double() / self.config.temperature).softmax(-1).cpu()
        _check_finite(out, draws)
        return self._label_loss(out, at) if self.metric == "expected_nll" else out

    def _losses(self, out: Tensor, at: Tensor) -> Tensor:
        """Return losses from averaged outputs of the rows ``at``."""
        return out if self.metric in PER_ROW else self._label_loss(out, at)

    def _label_loss(self, out: Tensor, at: Tensor) -> Tensor:
        """Return losses [..., N'] from probabilities [..., N', K] of the rows ``at``."""
        if self.metric == "pseudo_nll":
            assert self._mean is not None
            target = self._mean[at].argmax(-1)
        else:
            labels = self.anchors.labels
            assert labels is not None  # check() said so
            target = labels[at]
            if bool(((target < 0) | (target >= out.shape[-1])).any()):
                raise ValueError(f"anchors: a label lies outside the {out.shape[-1]} choices")
        if self.metric == "accuracy":
            return (out.argmax(-1) != target).double()
        shape = out.shape[:-1]
        rows = nll_of_rows(out.flatten(0, -2), target.expand(shape).flatten())
        return rows.unflatten(0, shape)


def _check_finite(out: Tensor, draws: Draws) -> None:
    """Refuse NaN and Inf in each draw's outputs [S, ...]; sigma = 0 is always seen first."""
    broken = ~out.isfinite().flatten(1).all(1)
    if not bool(broken.any()):
        return
    least = min(abs(draws.sigmas[s]) for s in broken.nonzero()[:, 0].tolist())
    if least == 0.0:
        raise ValueError("anchors: the model returned NaN or Inf; check weights and inputs")
    raise SearchError(
        f"sigma={least:g}: with so much noise the model returns NaN or Inf, without noise it does "
        "not; lower bounds[1], or load the model in a wider dtype. Where the range was extended up "
        "to here, no smaller sigma was what the objective looks for: the anchors hardly respond "
        "to the adapter's noise, or the tolerance is too large"
    )


def _take(batch: Batch, rows: Tensor, B: int) -> dict[str, Any]:
    """Return some of a batch's B rows; label_ids [K] hold for all rows."""
    taken = dict(batch)
    for name, value in batch.items():
        least = 2 if name == "label_ids" else 1
        if isinstance(value, Tensor) and value.dim() >= least and len(value) == B:
            taken[name] = value[rows.to(value.device)]
    return taken
