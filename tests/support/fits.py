"""A made-up record of a search, for pages and pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tfb.search.result import CurvePoint, SigmaFit


def fit(**changes: Any) -> dict[str, Any]:
    """A search's record, with ``changes``."""
    losses = [(0.0, 0.8), (0.001, 0.79), (0.01, 0.7), (0.02, 0.8), (0.1, 3.0)]
    found = SigmaFit(
        sigma=0.02, metric="nll", objective="max_variance", tolerance=0.003, relative=True,
        two_sided=False, search="grid", mode="full", draws=10, seed=0, anchors=60,
        anchor_hash="0" * 64, baseline=0.8, limit=0.8024,
        curve=tuple(CurvePoint(s, loss, 0.01, float("nan")) for s, loss in losses),
        passes=141.0, stopped="crossing bracketed",
    )  # fmt: skip
    return replace(found, **changes).to_dict()
