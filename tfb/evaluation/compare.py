"""Two methods on the same rows: how much a figure changed, and whether chance explains it.

Rows are the units and stay paired. NLL, ECE, Brier and AURC: percentile bootstrap over rows (Efron
and Tibshirani 1993); accuracy: McNemar's exact test, with Clopper and Pearson's limits on the rows
on which one method alone is right. Below about 30 rows a bootstrap's limits are too narrow. The ECE
of a resample is too high on average, and most so where it is small, which moves the limits of an
improvement towards 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.stats import binomtest

from tfb.evaluation.metrics import (
    NLL_PROBABILITY_FLOOR,
    Evaluation,
    bin_of_confidence,
    risk_coverage,
)

LEVEL = 0.95
RESAMPLES = 2000
FEWEST = 6  # rows: with fewer even a sign test, all rows alike, reaches no 95 %
ROUNDING = 1e-6  # of figures made of float32 probabilities
_BLOCK = 4_000_000  # resampled rows in memory at a time


@dataclass(frozen=True)
class Change:
    """``after`` - ``before`` of one figure on ``rows`` rows, with its 95 % limits. Fractions or
    nats."""

    before: float
    after: float
    low: float
    high: float
    rows: int

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def beyond_noise(self) -> bool:
        """Whether the limits leave 0 out, on the side that the change is on, by more than
        probabilities are rounded. Of fewer than ``FEWEST`` rows nothing is."""
        if self.rows < FEWEST or abs(self.change) <= ROUNDING:
            return False
        return (self.low > 0 and self.change > 0) or (self.high < 0 and self.change < 0)


def compare(
    before: Evaluation, after: Evaluation, *, n_bins: int = 15, seed: int = 0
) -> dict[str, Change]:
    """Changes of "accuracy", "nll", "ece" and "brier" from ``before`` to ``after``, and of "aurc"
    by total uncertainty where both have one.

    Raises:
        ValueError: no labels, or not the same rows (as far as labels tell).
    """
    if before.labels is None or after.labels is None:
        raise ValueError(f"{before.name} and {after.name}: a comparison needs labels on both")
    if not torch.equal(before.labels, after.labels):
        raise ValueError(f"{before.name} and {after.name}: other labels, so not the same rows")
    was, now = ({**asdict(e.metrics), "aurc": _aurc_of(e)} for e in (before, after))
    samples = _bootstrap(before, after, n_bins=n_bins, seed=seed)
    limits = _accuracy_limits(before, after)
    N = len(before.labels)
    found = {"accuracy": Change(was["accuracy"], now["accuracy"], *limits, N)}
    edge = (1 - LEVEL) / 2
    for name, values in samples.items():
        low, high = np.quantile(values, (edge, 1 - edge))
        found[name] = Change(was[name], now[name], float(low), float(high), N)
    return found


@dataclass(frozen=True, eq=False)
class RowLosses:
    """What figures of N rows are made of: the figure of any weighting of the rows, weights [N] of
    sum 1, is ``weights @ nll``, ``weights @ brier``, ``weights @ correct``, and for the ECE
    ``abs(weights @ gaps).sum()``.

    Attributes:
        nll, brier, correct: [N]. gaps: [N, M], correct - confidence in the row's bin, 0 elsewhere.
    """

    nll: np.ndarray
    brier: np.ndarray
    correct: np.ndarray
    gaps: np.ndarray

    @classmethod
    def of(cls, probs: torch.Tensor, labels: torch.Tensor, n_bins: int) -> RowLosses:
        """From probabilities [N, K] and labels [N]."""
        p = probs.double()
        confidence, prediction = p.max(-1)
        correct = (prediction == labels).double()
        bins = torch.nn.functional.one_hot(bin_of_confidence(confidence, n_bins), n_bins)
        truth = torch.nn.functional.one_hot(labels, p.shape[1])
        label = p.gather(1, labels[:, None])[:, 0]
        return cls(
            nll=-label.clamp_min(NLL_PROBABILITY_FLOOR).log().numpy(),
            brier=(p - truth).square().sum(-1).numpy(),
            correct=correct.numpy(),
            gaps=(bins * (correct - confidence)[:, None]).numpy(),
        )


def change_of_ece(weights: np.ndarray, before: RowLosses, after: RowLosses) -> np.ndarray:
    """[R] from weights [R, N]."""
    eces = [np.abs(weights @ e.gaps.astype(weights.dtype)).sum(-1) for e in (before, after)]
    return eces[1] - eces[0]


class Ranking:
    """The AURC of resampled rows, by the definition of :func:`tfb.evaluation.metrics.risk_coverage`.

    A group of n equally sure rows, w of them wrong, after c rows with e errors adds the sum over
    j = 1..n of (e + j w/n) / (c + j), which is w + (e - c w/n) (H(c + n) - H(c)).
    """

    def __init__(self, uncertainty: np.ndarray, wrong: np.ndarray) -> None:
        """uncertainty [N]; wrong [N] bool."""
        self._order = np.argsort(uncertainty, kind="stable")
        ranked = uncertainty[self._order]
        self._starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        self._wrong = wrong[self._order]
        self._harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, len(wrong) + 1))]

    def aurc(self, counts: np.ndarray) -> np.ndarray:
        """[R] from how often each row was drawn, counts [R, N], N in all."""
        ranked = counts[:, self._order]
        n = np.add.reduceat(ranked, self._starts, axis=1)
        w = np.add.reduceat(ranked * self._wrong, self._starts, axis=1)
        c, e = np.cumsum(n, axis=1) - n, np.cumsum(w, axis=1) - w
        share = w / np.maximum(n, 1)
        steps = self._harmonic[c + n] - self._harmonic[c]
        mean: np.ndarray = (w + (e - c * share) * steps).sum(-1) / counts.shape[1]
        return mean


def _aurc_of(e: Evaluation) -> float | None:
    return None if e.total is None else risk_coverage(e.total, e.correct).aurc


def _ranking(e: Evaluation) -> Ranking | None:
    return None if e.total is None else Ranking(e.total.numpy(), ~e.correct.numpy())


def _bootstrap(
    before: Evaluation, after: Evaluation, *, n_bins: int, seed: int
) -> dict[str, np.ndarray]:
    """[RESAMPLES] changes of each figure."""
    assert before.labels is not None and after.labels is not None
    was, now = (RowLosses.of(e.probs, before.labels, n_bins) for e in (before, after))
    rankings = _ranking(before), _ranking(after)
    N, generator = len(was.nll), np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {"nll": [], "ece": [], "brier": []}
    if rankings[0] and rankings[1]:
        found["aurc"] = []
    at_once = max(1, _BLOCK // N)
    for start in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - start)
        counts = generator.multinomial(N, np.full(N, 1 / N), size=count)
        weights = counts / N
        found["nll"].append(weights @ (now.nll - was.nll))
        found["brier"].append(weights @ (now.brier - was.brier))
        found["ece"].append(change_of_ece(weights, was, now))
        if rankings[0] and rankings[1]:
            found["aurc"].append(rankings[1].aurc(counts) - rankings[0].aurc(counts))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _accuracy_limits(before: Evaluation, after: Evaluation) -> tuple[float, float]:
    gained = int((~before.correct & after.correct).sum())
    lost = int((before.correct & ~after.correct).sum())
    if gained + lost == 0:
        return 0.0, 0.0
    share = binomtest(gained, gained + lost).proportion_ci(LEVEL, method="exact")
    scale = (gained + lost) / len(before.probs)
    return (2 * share.low - 1) * scale, (2 * share.high - 1) * scale
