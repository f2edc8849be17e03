"""Figures of predictions, and paired bootstrap intervals of their differences.

Higher uncertainty should mean an error, or a row that is not of the test rows' kind: AUROC of
total and of epistemic uncertainty for both, and the area under the risk-coverage curve (AURC).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.calibration.setting import Predicted
from tfb.evaluation.compare import RowLosses, change_of_ece
from tfb.evaluation.metrics import auroc, evaluate, risk_coverage

BINS = 15
RESAMPLES = 10_000
LEVEL = 0.95


def figures(predicted: Mapping[str, Predicted], labels: Tensor) -> dict[str, Any]:
    """accuracy, nll (nats), ece, brier, miscalibration, aurc, and auroc by what is to be found
    ("errors", then each shift) and kind of uncertainty; None where a method has no such.

    Args:
        predicted: "test" and shifts. labels: [N] of the test rows.
    """
    test = predicted["test"]
    m = evaluate(test.probs, labels, n_bins=BINS)
    wrong = test.probs.argmax(-1) != labels
    found = {"errors": {
        kind: auroc_or_none(u[wrong], u[~wrong]) for kind, u in _uncertainties(test).items()
    }}  # fmt: skip
    for name, shifted in predicted.items():
        if name != "test":
            inside, outside = _uncertainties(test), _uncertainties(shifted)
            found[name] = {kind: auroc_or_none(outside[kind], inside[kind]) for kind in inside}
    return {
        "accuracy": m.accuracy, "nll": m.nll, "ece": m.ece, "brier": m.brier,
        "miscalibration": m.miscalibration, "aurc": risk_coverage(test.total, ~wrong).aurc,
        "auroc": found,
    }  # fmt: skip


def auroc_or_none(positive: Tensor, negative: Tensor) -> float | None:
    """:func:`tfb.evaluation.metrics.auroc`; None where either is empty."""
    return auroc(positive, negative) if len(positive) and len(negative) else None


def _uncertainties(p: Predicted) -> dict[str, Tensor]:
    found = {"total": p.total}
    return found if p.epistemic is None else found | {"epistemic": p.epistemic}


# --- bootstrap ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of N test rows, the same for every method, so that differences are paired."""

    labels: Tensor
    seed: int = 0
    resamples: int = RESAMPLES

    @cached_property
    def weights(self) -> np.ndarray:
        """[R, N] float32: how often each row is in a resample, over N."""
        N = len(self.labels)
        counts = np.random.default_rng(self.seed).multinomial(
            N, np.full(N, 1 / N), size=self.resamples
        )
        return (counts / N).astype(np.float32)

    def compare(self, method: Tensor, other: Tensor) -> dict[str, dict[str, float | bool]]:
        """Differences method - other of NLL, ECE and accuracy, from probabilities [N, K].

        Returns:
            by figure: difference, low, high (percentile interval of ``LEVEL``), significant
            (the interval leaves out 0).
        """
        a, b = (RowLosses.of(p, self.labels, BINS) for p in (other, method))
        once = np.full((1, len(self.labels)), 1 / len(self.labels))
        found: dict[str, dict[str, float | bool]] = {}
        at, spread = (
            {
                "nll": w @ (b.nll - a.nll).astype(w.dtype),
                "ece": change_of_ece(w, a, b),
                "accuracy": w @ (b.correct - a.correct).astype(w.dtype),
            }
            for w in (once, self.weights)
        )
        for name in at:
            low, high = np.quantile(spread[name], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            found[name] = {
                "difference": float(at[name][0]), "low": float(low), "high": float(high),
                "significant": bool(low > 0 or high < 0),
            }  # fmt: skip
        return found
