"""A made-up record of a search, for pages and figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tfb.search.result import CurvePoint, SigmaFit

LOSSES = [(0.0, 0.8), (0.001, 0.79), (0.01, 0.7), (0.02, 0.8), (0.1, 3.0)]
FIT = SigmaFit(
    sigma=0.02,
    metric="nll",
    objective="max_variance",
    tolerance=0.003,
    relative=True,
    two_sided=False,
    search="grid",
    mode="full",
    draws=10,
    seed=0,
    anchors=60,
    anchor_hash="0" * 64,
    baseline=0.8,
    limit=0.8024,
    curve=tuple(CurvePoint(sigma, loss, 0.01, float("nan")) for sigma, loss in LOSSES),
    passes=141.0,
    stopped="crossing bracketed",
    interval=(0.01, 0.03),
    notes=("the loss first falls",),
)


def fit(**changes: Any) -> dict[str, Any]:
    """A search's record, with ``changes``."""
    return replace(FIT, **changes).to_dict()
