"""Two methods on the same rows: how much each metric changed, and whether chance explains it.

Accuracy: McNemar's exact test, with Clopper and Pearson's limits. Everything else: percentile
bootstrap over paired rows (Efron and Tibshirani 1993), too narrow below about 30 rows. The ECE of a
resample is too high on average, most so where it is small: an improvement's limits lie nearer to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap

from tfb.evaluation.metrics import (
    Evaluation,
    auroc,
    aurocs,
    brier_of_rows,
    confidence_bins,
    nll_of_rows,
    risk_coverage,
    risks,
)

LEVEL = 0.95
RESAMPLES, SEED = 2000, 0
FEWEST = 6  # rows: with fewer even a sign test, all rows alike, reaches no 95 %
ROUNDING = 1e-6  # of metrics of float32 probabilities
BLOCK = 1_000_000  # resampled rows in memory at a time


@dataclass(frozen=True)
class Change:
    """A metric of two methods on the same rows, and 95 % limits of its change (NaN: too few)."""

    before: float
    after: float
    low: float
    high: float
    rows: int

    @property
    def change(self) -> float:
        """The change, after - before."""
        return self.after - self.before

    @property
    def significant(self) -> bool:
        """Whether the limits exclude 0 and the change is more than rounding."""
        if self.rows < FEWEST or abs(self.change) <= ROUNDING:
            return False
        return self.low > 0 if self.change > 0 else self.high < 0

    def text(self, factor: float = 1, places: int = 3) -> str:
        """Return the change and its limits, with * where it is significant."""
        change, low, high = (
            f"{factor * v:+.{places}f}" for v in (self.change, self.low, self.high)
        )
        return f"{change} [{low}, {high}]{'*' if self.significant else ' '}"


def compare(before: Evaluation, after: Evaluation) -> dict[str, Change]:
    """Return changes of "accuracy", "nll", "ece", "brier", and "aurc" if both have a total.

    Args:
        before: one method on N labelled rows.
        after: another one on the same rows.

    Raises:
        ValueError: no labels, or other ones.
    """
    if not torch.equal(before.known_labels, after.known_labels):
        raise ValueError(f"{before.name} and {after.name}: other labels, so not the same rows")
    N = len(before.probs)
    was, now = (_values(e) for e in (before, after))
    then, later = (_of_resamples(e) for e in (before, after))
    names = [name for name in then if name in later]

    def changes(rows: np.ndarray, axis: int) -> np.ndarray:
        return np.stack([later[name](rows) - then[name](rows) for name in names])

    known = (
        [(0.0, 0.0)] * len(names) if before is after and N > 1 else percentile_limits(changes, N)
    )
    found = {"accuracy": _accuracy_limits(before, after)}
    found |= dict(zip(names, known, strict=True))
    return {name: Change(was[name], now[name], *limits, N) for name, limits in found.items()}


def compare_all(evaluations: Sequence[Evaluation]) -> list[dict[str, Change]]:
    """Return the changes of each against the first of its data set, which changes nothing."""
    first = {e.dataset: e for e in reversed(evaluations)}
    return [compare(first[e.dataset], e) for e in evaluations]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods on the same labelled rows, simplest first, and the one to use; prints as a table.

    Attributes:
        evaluations: one of each method; the first is the adapter.
        changes: what each changed of the adapter's metrics.
        recommended: the simplest method than which none has a significantly lower NLL, among
            those that are not significantly less accurate than the adapter.
        reason: why, in words.
    """

    evaluations: tuple[Evaluation, ...]
    changes: tuple[Mapping[str, Change], ...]
    recommended: str
    reason: str

    @classmethod
    def of(cls, evaluations: Sequence[Evaluation]) -> Comparison:
        """Compare methods of one data set.

        Args:
            evaluations: the adapter first, then the others, simplest first.

        Raises:
            ValueError: none, two of one name, no labels, or not the same rows.
        """
        names = [e.name for e in evaluations]
        sets = {e.dataset for e in evaluations}
        if not names or len(set(names)) < len(names) or len(sets) > 1:
            raise ValueError(
                f"expected one evaluation of each method, of one data set, got {names}"
            )
        changes = [compare(evaluations[0], e) for e in evaluations]
        usable = [
            e
            for e, c in zip(evaluations, changes, strict=True)
            if c["accuracy"].change >= 0 or not c["accuracy"].significant
        ]
        # The one of least NLL is beaten by none.
        chosen = next(e for e in usable if not any(_beats(other, e) for other in usable))
        reason = "no other method has a significantly lower NLL"
        if chosen is not usable[0]:
            reason += ", and every simpler one is beaten"
        return cls(tuple(evaluations), tuple(changes), chosen.name, reason)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types: metrics and changes by method, and the recommendation."""
        methods: dict[str, Any] = {}
        for e, changes in zip(self.evaluations, self.changes, strict=True):
            methods[e.name] = {**e.metrics.to_dict(), "draws": e.draws, "passes": e.passes}
            if e is not self.evaluations[0]:
                limits = {
                    name: [None if v != v else v for v in (c.change, c.low, c.high)]  # NaN
                    for name, c in changes.items()
                }
                methods[e.name]["changes"] = limits
        return {"methods": methods, "recommended": self.recommended, "reason": self.reason}

    def __str__(self) -> str:
        head = ["method", "accuracy %", "NLL", "change [95 %]", "ECE %", "change [95 %]", "passes"]
        table = [head]
        for e, changes in zip(self.evaluations, self.changes, strict=True):
            m = e.metrics
            nll, ece = ("", "")
            if e is not self.evaluations[0]:
                nll, ece = changes["nll"].text(), changes["ece"].text(100, 1)
            figures = [f"{100 * m.accuracy:.1f}", f"{m.nll:.3f}", nll, f"{100 * m.ece:.1f}", ece]
            table.append([e.name, *figures, "" if e.passes is None else f"{e.passes:.3g}"])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in table
        ]
        rows = f"{self.evaluations[0].dataset}, {self.changes[0]['nll'].rows} rows"
        said = f"use {self.recommended}: {self.reason}"
        return "\n".join([rows, *lines, said, "* significant: the interval excludes 0"])

    def __repr__(self) -> str:
        names = ", ".join(e.name for e in self.evaluations)
        return f"Comparison({names}; recommended: {self.recommended})"


def _beats(other: Evaluation, e: Evaluation) -> bool:
    """Tell whether another method's NLL is significantly lower."""
    was, now = (nll_of_rows(x.probs.double(), x.known_labels).numpy() for x in (e, other))
    before, after = float(was.mean()), float(now.mean())
    if after >= before:
        return False
    return Change(before, after, *mean_limits(now - was), len(was)).significant


def compare_auroc(
    before: tuple[Evaluation, Evaluation], after: tuple[Evaluation, Evaluation]
) -> Change:
    """Return the change of the AUROC of OOD against test rows (a pair), by total uncertainty."""
    totals = [e.total for e in (*before, *after) if e.total is not None]
    sizes = [len(total) for total in totals]
    if len(totals) < 4 or sizes[:2] != sizes[2:]:
        raise ValueError("an AUROC's change needs the total uncertainty of the same rows")
    u, v, x, y = (total.numpy() for total in totals)

    def change(ood: np.ndarray, rows: np.ndarray, axis: int) -> np.ndarray:
        return np.stack([aurocs(x[ood], y[rows]) - aurocs(u[ood], v[rows])])

    [limits] = percentile_limits(change, *sizes[:2])
    return Change(auroc(*totals[:2]), auroc(*totals[2:]), *limits, min(sizes))


def percentile_limits(
    statistic: Callable[..., np.ndarray], *sizes: int
) -> list[tuple[float, float]]:
    """Return percentile limits of a statistic over resampled rows.

    Args:
        statistic: takes row numbers [..., N] of each sample, and returns F values, [F, ...].
        sizes: rows of each sample.
    """
    samples = [np.arange(n) for n in sizes]
    if min(sizes) < 2:
        return [(np.nan, np.nan)] * len(statistic(*samples, axis=-1))
    found = bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, BLOCK // sum(sizes)),
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        random_state=np.random.default_rng(SEED),
    ).confidence_interval
    return list(zip(found.low.tolist(), found.high.tolist(), strict=True))


def mean_limits(values: np.ndarray) -> tuple[float, float]:
    """Return percentile limits of the mean of values [N]."""
    [limits] = percentile_limits(lambda rows, axis: values[rows].mean(-1)[None], len(values))
    return limits


def _values(e: Evaluation) -> dict[str, float]:
    m = e.metrics
    found = {"accuracy": m.accuracy, "nll": m.nll, "ece": m.ece, "brier": m.brier}
    return found if e.total is None else found | {"aurc": risk_coverage(e.total, e.correct).aurc}


def _of_resamples(e: Evaluation) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Metrics of resamples, from row numbers [..., N] to [...]."""
    p, labels = e.probs.double(), e.known_labels
    nll, brier = nll_of_rows(p, labels).numpy(), brier_of_rows(p, labels).numpy()
    confidence, wrong = p.amax(-1), ~e.correct.numpy()
    bins, gap = confidence_bins(confidence).numpy(), confidence.numpy() - ~wrong
    gaps = [np.where(bins == b, gap, 0.0) for b in np.unique(bins)]
    found = {
        "nll": lambda rows: nll[rows].mean(-1),
        "ece": lambda rows: sum(abs(g[rows].mean(-1)) for g in gaps),
        "brier": lambda rows: brier[rows].mean(-1),
    }
    if e.total is not None:
        total = e.total.numpy()
        found["aurc"] = lambda rows: risks(total[rows], wrong[rows]).mean(-1)
    return found


def _accuracy_limits(before: Evaluation, after: Evaluation) -> tuple[float, float]:
    gained = int((~before.correct & after.correct).sum())
    lost = int((before.correct & ~after.correct).sum())
    if gained + lost == 0:
        return 0.0, 0.0
    share = binomtest(gained, gained + lost).proportion_ci(LEVEL, method="exact")
    scale = (gained + lost) / len(before.probs)
    return (2 * share.low - 1) * scale, (2 * share.high - 1) * scale
