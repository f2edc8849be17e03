"""Figures of predictions, and paired intervals of their differences.

Higher uncertainty should mean an error, or a row that is not of the test rows' kind: AUROC of
total and of epistemic uncertainty for both, and the area under the risk-coverage curve (AURC).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from benchmarks.calibration.setting import Predicted
from tfb.evaluation.compare import compare
from tfb.evaluation.metrics import BINS, Evaluation, auroc, evaluate, risk_coverage

COMPARED = ("nll", "ece", "accuracy")


def figures(predicted: Mapping[str, Predicted], labels: Tensor) -> dict[str, Any]:
    """Return accuracy, nll (nats), ece, brier, miscalibration, aurc, and auroc.

    AUROC by what is to be found ("errors", then each shift) and kind of uncertainty; None where a
    method has no such.

    Args:
        predicted: "test" and shifts.
        labels: [N] of the test rows.
    """
    test = predicted["test"]
    m = evaluate(test.probs, labels, n_bins=BINS)
    wrong = test.probs.argmax(-1) != labels
    inside = _uncertainties(test)
    found = {"errors": {kind: auroc_or_none(u[wrong], u[~wrong]) for kind, u in inside.items()}}
    for name, shifted in predicted.items():
        if name != "test":
            outside = _uncertainties(shifted)
            found[name] = {kind: auroc_or_none(outside[kind], inside[kind]) for kind in inside}
    return {
        **{name: getattr(m, name) for name in ("accuracy", "nll", "ece", "brier")},
        "miscalibration": m.miscalibration,
        "aurc": risk_coverage(test.total, ~wrong).aurc,
        "auroc": found,
    }


def auroc_or_none(positive: Tensor, negative: Tensor) -> float | None:
    """Return :func:`tfb.evaluation.metrics.auroc`; None where either is empty."""
    return auroc(positive, negative) if len(positive) and len(negative) else None


def _uncertainties(p: Predicted) -> dict[str, Tensor]:
    found = {"total": p.total}
    return found if p.epistemic is None else found | {"epistemic": p.epistemic}


def differences(
    method: Tensor, other: Tensor, labels: Tensor
) -> dict[str, dict[str, float | bool]]:
    """Return differences method - other of NLL, ECE and accuracy.

    Args:
        method: probabilities [N, K].
        other: probabilities [N, K].
        labels: [N].

    Returns:
        By figure: difference, low and high (95 % limits), significant (they exclude 0).
    """
    before, after = (Evaluation("", "test", p, labels) for p in (other, method))
    found = compare(before, after)
    return {
        name: {
            "difference": found[name].change,
            "low": found[name].low,
            "high": found[name].high,
            "significant": found[name].significant,
        }
        for name in COMPARED
    }
