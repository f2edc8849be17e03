"""Made-up records of fits, for pages and figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tfb.search.result import CurvePoint, PredictiveFit

LOSSES = [(0.0, 0.8), (0.001, 0.79), (0.01, 0.7), (0.02, 0.8), (0.1, 3.0)]
FIT = PredictiveFit(
    sigma=0.02,
    metric="nll",
    objective="max_variance",
    tolerance=0.003,
    relative=True,
    search="grid",
    mode="full",
    draws=10,
    seed=0,
    anchors=60,
    anchor_hash="0" * 64,
    baseline=0.8,
    limit=0.8024,
    curve=tuple(CurvePoint(sigma, loss, 0.01, anchors=60) for sigma, loss in LOSSES),
    passes=141.0,
    stopped="crossing found",
    interval=(0.01, 0.03),
    notes=("the loss first falls",),
)
# The same with a fitted temperature: the adapter, (0, 1), and then every sigma at its own T.
POINTS = [
    (0.0, 1.0, 1.1, 60),
    (0.0, 1.6, 0.8, 60),
    (0.001, 1.6, 0.9, 20),
    (0.01, 1.5, 0.7, 60),
    (0.02, 1.3, 0.75, 60),
]
TEMPERED = replace(
    FIT,
    sigma=0.01,
    temperature=1.5,
    objective="min_nll",
    baseline=1.1,
    limit=None,
    curve=tuple(
        CurvePoint(sigma, loss, 0.01, T, accuracy=0.75, anchors=n) for sigma, T, loss, n in POINTS
    ),
    stopped="the loss falls",
    change=(-0.5, -0.3),
)


def fit(**changes: Any) -> dict[str, Any]:
    """A search's record, with ``changes``."""
    return replace(FIT, **changes).to_dict()
