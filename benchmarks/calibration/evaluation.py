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
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.calibration.setting import Predicted
from tfb.metrics import BELOW_ONE, NLL_PROBABILITY_FLOOR, evaluate

BINS = 15
RESAMPLES = 10_000
LEVEL = 0.95
COMPARED = ("nll", "ece", "accuracy")


def figures(predicted: Mapping[str, Predicted], labels: Tensor) -> dict[str, Any]:
    """accuracy, nll (nats), ece, brier, miscalibration, aurc, and auroc by what is to be found
    ("errors", then each shift) and kind of uncertainty; None where a method has no such.

    Args:
        predicted: "test" and shifts. labels: [N] of the test rows.
    """
    test = predicted["test"]
    m = evaluate(test.probs, labels, n_bins=BINS)
    wrong = (test.probs.argmax(-1) != labels).numpy()
    found = {"errors": {
        kind: auroc(u[~wrong], u[wrong]) for kind, u in _uncertainties(test).items()
    }}  # fmt: skip
    for name, shifted in predicted.items():
        if name != "test":
            inside, outside = _uncertainties(test), _uncertainties(shifted)
            found[name] = {kind: auroc(inside[kind], outside[kind]) for kind in inside}
    return {
        "accuracy": m.accuracy, "nll": m.nll, "ece": m.ece, "brier": m.brier,
        "miscalibration": m.miscalibration, "aurc": aurc(test.total.numpy(), wrong), "auroc": found,
    }  # fmt: skip


def auroc(low: np.ndarray, high: np.ndarray) -> float | None:
    """Chance that a row of ``high`` has the higher uncertainty (ties count a half); None where
    either is empty."""
    if not len(low) or not len(high):
        return None
    truth = np.r_[np.zeros(len(low)), np.ones(len(high))]
    return float(roc_auc_score(truth, np.r_[low, high]))


def aurc(uncertainty: np.ndarray, wrong: np.ndarray) -> float:
    """Mean error rate of the k most certain rows over k = 1 .. N (Geifman and El-Yaniv 2017).

    Rows of equal uncertainty come in random order; their expectation is taken.
    """
    _values, group, size = np.unique(uncertainty, return_inverse=True, return_counts=True)
    risk = (np.bincount(group, weights=wrong) / size)[np.sort(group)]
    return float((risk.cumsum() / np.arange(1, len(risk) + 1)).mean())


def _uncertainties(p: Predicted) -> dict[str, Any]:
    found = {"total": p.total.numpy()}
    return found if p.epistemic is None else found | {"epistemic": p.epistemic.numpy()}


# --- bootstrap ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of N test rows, the same for every method, so that differences are paired."""

    labels: Tensor
    seed: int = 0
    resamples: int = RESAMPLES

    @cached_property
    def weights(self) -> Tensor:
        """[R, N] float32: how often each row is in a resample, over N."""
        N = len(self.labels)
        counts = np.random.default_rng(self.seed).multinomial(
            N, np.full(N, 1 / N), size=self.resamples
        )
        return torch.from_numpy((counts / N).astype(np.float32))

    def compare(self, method: Tensor, other: Tensor) -> dict[str, dict[str, float | bool]]:
        """Differences method - other of NLL, ECE and accuracy, from probabilities [N, K].

        Returns:
            by figure: difference, low, high (percentile interval of ``LEVEL``), significant
            (the interval leaves out 0).
        """
        once = torch.full((1, len(self.labels)), 1 / len(self.labels), dtype=torch.float64)
        found = {}
        for name in COMPARED:
            at, spread = (
                self._figure(name, method, w) - self._figure(name, other, w)
                for w in (once, self.weights)
            )
            low, high = np.quantile(spread.numpy(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            found[name] = {
                "difference": float(at), "low": float(low), "high": float(high),
                "significant": bool(low > 0 or high < 0),
            }  # fmt: skip
        return found

    def _figure(self, name: str, probs: Tensor, weights: Tensor) -> Tensor:
        """[R] one figure under each row of weights."""
        p = probs.double()
        if name == "nll":
            rows = -p.gather(1, self.labels[:, None])[:, 0].clamp_min(NLL_PROBABILITY_FLOOR).log()
            return weights @ rows.to(weights.dtype)
        confidence, prediction = p.clamp_max(BELOW_ONE).max(-1)
        correct = (prediction == self.labels).double()
        if name == "accuracy":
            return weights @ correct.to(weights.dtype)
        # The ECE is the sum over bins of |mean of (correct - confidence) in the bin|.
        edges = torch.linspace(0, 1, BINS + 1)
        index = (torch.bucketize(confidence.float(), edges, right=True) - 1).clamp(0, BINS - 1)
        gaps = torch.nn.functional.one_hot(index, BINS) * (correct - confidence)[:, None]
        return (weights @ gaps.to(weights.dtype)).abs().sum(-1)
