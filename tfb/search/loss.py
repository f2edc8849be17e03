"""Anchor sets: the labelled (or unlabelled) rows on which a loss is traced as sigma grows.

``AnchorLoss`` evaluates many sigmas at once on common antithetic streams, and keeps per-row
losses, so that every difference to sigma = 0 is a paired one.

    nll             -log of the averaged probability of the label
    accuracy        error rate of the averaged prediction
    expected_nll    the draws' mean of -log probability of the label (the likelihood of an ELBO)
    pseudo_nll      nll with the deterministic prediction as label
    embedding_norm  norm of the last hidden state, no labels and no head

When to use which: :func:`tfb.search.fit.fit_sigma`. To add one: a branch in ``_outputs`` or
``_losses``.
"""

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
from tfb.model import BayesianModel
from tfb.search.cost import PassCounter
from tfb.search.result import SearchError

METRICS = ("nll", "accuracy", "pseudo_nll", "embedding_norm", "expected_nll")
SUPERVISED = ("nll", "accuracy", "expected_nll")
PER_ROW = ("expected_nll", "embedding_norm")  # a draw's output is the row's loss already
PROBABILITY_FLOOR = 1e-12  # as in the authors' scripts; keeps log finite
ROWS_PER_PASS = 1024  # rows x draws in one forward pass


@dataclass(frozen=True)
class AnchorSet:
    """Anchor rows as ready batches.

    Attributes:
        batches: dicts of tokenizer tensors [B, T], with "labels" [B] (class index) and, for
            causal LMs, "label_ids" ([K], [B, K] or [B, K, L], the vocabulary ids of the classes).
        content_hash: SHA-256 of the content, kept in the artifact.
    """

    batches: tuple[Mapping[str, Any], ...]
    content_hash: str

    @classmethod
    def of(
        cls,
        anchors: AnchorSet | EncodedRows | Iterable[Mapping[str, Any]],
        *,
        pad_token_id: int = 0,
        batch_size: int = 50,
    ) -> AnchorSet:
        """From encoded rows, or from an iterable of batches.

        Raises:
            ValueError: no anchors at all. TypeError: neither batches nor encoded rows.
        """
        if isinstance(anchors, AnchorSet):
            return anchors
        if isinstance(anchors, EncodedRows):
            made: list[Mapping[str, Any]] = []
            for b in batches(
                anchors, batch_size=batch_size, pad_token_id=pad_token_id, sort_by_length=True
            ):
                extra = {"labels": b.labels, "label_ids": b.label_ids}
                made.append(b.model_inputs() | {k: v for k, v in extra.items() if v is not None})
            digest = anchors.content_hash
        else:
            made = [_with_tensors(batch) for batch in anchors]
            sha = hashlib.sha256()
            for batch in made:
                for key in sorted(batch):
                    if isinstance(value := batch[key], Tensor):
                        # Shape and type too: the same bytes as other rows are other content.
                        sha.update(f"{key} {list(value.shape)} {value.dtype} ".encode())
                        sha.update(value.cpu().flatten().view(torch.uint8).numpy().tobytes())
            digest = sha.hexdigest()
        if not made:
            raise ValueError("anchors: empty; a search needs rows to measure a loss on")
        return cls(tuple(made), digest)

    def __len__(self) -> int:
        return sum(int(b["input_ids"].shape[0]) for b in self.batches)

    @cached_property
    def labels(self) -> Tensor | None:
        """[N] int64 in batch order, or None if any row is unlabelled."""
        found = [b.get("labels") for b in self.batches]
        if any(y is None for y in found):
            return None
        labels = torch.cat([torch.as_tensor(y).cpu().long() for y in found])
        return None if bool((labels == NO_LABEL).any()) else labels

    def check(self, metric: str) -> None:
        """Refuse what cannot be searched on, before any forward pass.

        Raises:
            ValueError: an unknown metric, missing labels, one class only.
        """
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r}: expected one of {', '.join(METRICS)}")
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


@dataclass(frozen=True)
class LossTable:
    """Losses of N anchors at G sigmas.

    Attributes:
        rows: [G, N] float64, each anchor's loss.
        left_out: [G, U] float64, mean loss without each of the U streams (U = 1: with it).
    """

    rows: Tensor
    left_out: Tensor

    @property
    def draw_standard_error(self) -> Tensor:
        """[G] float64, jackknife over streams of the mean loss; NaN if there is one only."""
        return jackknife_error(self.left_out)


def jackknife_error(left_out: Tensor) -> Tensor:
    """[...] standard error of a mean over U units, from its values without each, [..., U]; NaN for
    one unit."""
    U = left_out.shape[-1]
    if U == 1:
        return torch.full(left_out.shape[:-1], float("nan"), dtype=left_out.dtype)
    return ((U - 1) * left_out.var(-1, unbiased=False)).sqrt()


class AnchorLoss:
    """The anchors' loss as a function of sigma; counts the passes it spends."""

    def __init__(
        self,
        bayes: BayesianModel,
        anchors: AnchorSet,
        metric: str,
        *,
        draws: int,
        seed: int,
        noise: str = "weight",
        progress: Callable[[int], None] | None = None,
        additive_floor: bool = False,
    ) -> None:
        """``progress`` is called with the rows finished (rows x draws) after each pass.

        ``additive_floor``: the loss is -log(p + floor), as in the authors' scripts, where
        -log(max(p, floor)) is the default.
        """
        anchors.check(metric)
        self.bayes, self.anchors, self.metric = bayes, anchors, metric
        self.n, self.seed, self.noise = draws, seed, noise
        self.progress, self.additive_floor = progress, additive_floor
        self.cost = PassCounter(anchors.batches, bayes.tail)
        self._mean: Tensor | None = None  # [N, K] probabilities (widest K), or [N] losses
        self._known = torch.zeros(len(anchors), dtype=torch.bool)
        if bayes.mode == "full":
            self._measure_baseline()

    @property
    def passes(self) -> float:
        """Deterministic passes spent so far; see :mod:`tfb.search.cost`."""
        return self.cost.passes

    @property
    def baseline(self) -> Tensor:
        """[N] float64, losses at sigma = 0."""
        self._measure_baseline()
        return self.baseline_of(torch.arange(len(self.anchors)))

    def baseline_of(self, rows: Tensor) -> Tensor:
        """Losses at sigma = 0 of rows that have been measured at some sigma."""
        assert self._mean is not None
        return self._losses(self._mean[rows], rows)

    @property
    def measured(self) -> Tensor:
        """[N] bool, the rows whose loss at sigma = 0 is known."""
        return self._known

    @property
    def probabilities(self) -> Tensor | None:
        """[N, K] probabilities at sigma = 0, None for metrics without."""
        return None if self.metric in PER_ROW else self._mean

    def __call__(
        self,
        sigmas: Sequence[float],
        *,
        antithetic: bool = True,
        first_stream: int = 0,
        rows: Tensor | None = None,
    ) -> LossTable:
        """Losses at ``sigmas`` (> 0), all on the same streams.

        Args:
            rows: which anchors, ascending [N'] int64; None: all. Where their loss at sigma = 0 is
                not known (tail mode), sigma = 0 joins the sweep.
        """
        k = 2 if antithetic else 1
        units = self.n // k
        G = len(sigmas)
        found, left_out = [], torch.zeros(G, units, dtype=torch.float64)
        rows = torch.arange(len(self.anchors)) if rows is None else rows
        for batch, at in self._pieces(rows):
            first = [] if bool(self._known[at].all()) else [0.0]
            wanted = [*first, *sigmas]
            per_pass = len(wanted)
            if self.bayes.mode == "full":  # in tail mode each part would run the prompt again
                per_pass = max(1, ROWS_PER_PASS // (self.n * len(at)))
            parts = []
            for g in range(0, len(wanted), per_pass):
                draws = Draws.grid(
                    wanted[g : g + per_pass],
                    self.n,
                    antithetic=antithetic,
                    seed=self.seed,
                    noise=self.noise,
                    first_stream=first_stream,
                )
                out = self._outputs(batch, draws, at)  # [units * g * k, B, ...]
                parts.append(out.unflatten(0, (units, -1, k)).mean(2))
                if self.progress is not None:
                    self.progress(len(draws) * len(at))
            self.cost.spend(at, len(wanted) * self.n)
            per_unit = torch.cat(parts, dim=1)  # [units, G, B, ...]
            if first:
                self._remember(at, per_unit[0, 0])
                per_unit = per_unit[:, 1:]
            mean = per_unit.mean(0)
            found.append(self._losses(mean, at))
            for u in range(units):
                without = (mean * units - per_unit[u]) / (units - 1) if units > 1 else mean
                left_out[:, u] += self._losses(without, at).sum(-1)
        return LossTable(torch.cat(found, dim=1), left_out / len(rows))

    def _pieces(self, rows: Tensor) -> Iterator[tuple[Mapping[str, Any], Tensor]]:
        """Each batch's share of ``rows``, and their places among all anchors."""
        start = 0
        for batch in self.anchors.batches:
            B = int(batch["input_ids"].shape[0])
            at = rows[(rows >= start) & (rows < start + B)]
            if len(at):
                yield (batch if len(at) == B else _take(batch, at - start, B)), at
            start += B

    def _measure_baseline(self) -> None:
        """Losses at sigma = 0 of all rows that lack it."""
        for batch, at in self._pieces((~self._known).nonzero()[:, 0]):
            self._remember(at, self._outputs(batch, Draws.mean(), at)[0])
            self.cost.spend(at, 1)

    def _remember(self, at: Tensor, out: Tensor) -> None:
        """Outputs at sigma = 0 of the rows ``at``: [B, K] or [B]."""
        if self._mean is None:
            self._mean = torch.zeros(len(self.anchors), *out.shape[1:], dtype=torch.float64)
        if out.dim() == 2:
            K = max(self._mean.shape[1], out.shape[1])
            self._mean, out = (
                torch.nn.functional.pad(t, (0, K - t.shape[1])) for t in (self._mean, out)
            )
        self._mean[at] = out
        self._known[at] = True

    def _outputs(self, batch: Mapping[str, Any], draws: Draws, at: Tensor) -> Tensor:
        """Each draw's probabilities [S, B, K], or losses [S, B], in float64 on CPU."""
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "label_ids")}
        if self.metric == "embedding_norm":
            out = self.bayes.hidden_norms(inputs, draws).double().cpu()
        else:
            logits = self.bayes.logits(inputs, draws, batch.get("label_ids"))
            out = logits.double().softmax(-1).cpu()
        _check_finite(out, draws)
        return self._label_loss(out, at) if self.metric == "expected_nll" else out

    def _losses(self, out: Tensor, at: Tensor) -> Tensor:
        """[..., N'] losses from averaged outputs [..., N', K] of the rows ``at``."""
        return out if self.metric in PER_ROW else self._label_loss(out, at)

    def _label_loss(self, out: Tensor, at: Tensor) -> Tensor:
        """[..., N'] losses from probabilities [..., N', K] of the rows ``at``."""
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
        index = target.expand(out.shape[:-1])[..., None]
        p = out.gather(-1, index)[..., 0]
        if self.additive_floor:
            return -(p + PROBABILITY_FLOOR).log()
        return -p.clamp_min(PROBABILITY_FLOOR).log()


def _with_tensors(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Labels and choices may come as lists.

    Raises:
        TypeError: not a batch.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise TypeError(
            "anchors: expected encoded rows, or batches (dicts with input_ids and other tensors), "
            f"got {type(batch).__name__}; write anchors = tfb.scoring.rows.encode(bayes, data, "
            "tokenizer) for files, DataFrames, Datasets and lists of rows"
        )
    names = [n for n in ("labels", "label_ids") if isinstance(batch.get(n), list)]
    return {**batch, **{n: torch.tensor(batch[n]) for n in names}} if names else batch


def _check_finite(out: Tensor, draws: Draws) -> None:
    """Refuse NaN and Inf in each draw's outputs [S, ...]; sigma = 0 is always seen first, so what
    fails with noise alone is the noise's doing.

    Raises:
        ValueError: at sigma = 0. SearchError: at a larger sigma.
    """
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


def _take(batch: Mapping[str, Any], rows: Tensor, B: int) -> dict[str, Any]:
    """Some of a batch's B rows; label_ids [K] hold for all rows."""
    return {
        name: value[rows.to(value.device)]
        if isinstance(value, Tensor) and value.dim() and len(value) == B
        and not (name == "label_ids" and value.dim() == 1)
        else value
        for name, value in batch.items()
    }  # fmt: skip
