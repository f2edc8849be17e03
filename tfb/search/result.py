"""What a search found: :class:`SigmaFit`, and the curve it measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


class SearchError(ValueError):
    """The search has no answer to give; the message says why and what to change."""


@dataclass(frozen=True)
class CurvePoint:
    """One measured sigma.

    Attributes:
        loss: mean over anchors. For a sigma that was decided on part of them: l(0) plus the mean
            paired difference on that part, corrected by what the sigmas measured on all anchors
            say of the part.
        standard_error: of the paired difference to sigma = 0, over anchors.
        draw_standard_error: jackknife over streams (NaN: one stream only).
        anchors: rows measured (None: a record of an earlier version, all of them).
    """

    sigma: float
    loss: float
    standard_error: float
    draw_standard_error: float
    anchors: int | None = None


@dataclass(frozen=True)
class SigmaFit:
    """What a search found and how; JSON-serialisable through ``to_dict``.

    Attributes:
        sigma: the answer (also set on the model). 0 when no variance is best (min_nll).
        curve: every measured point, sigma = 0 first, ascending.
        baseline: l(0). limit: the largest accepted loss (max_variance), else None.
        passes: deterministic-pass equivalents over the anchors, the deterministic pass included;
            how they are counted: :mod:`tfb.search.cost`.
        stopped: why it stopped: how well the crossing of the *measured* curve is known.
        interval: 95 % confidence limits of sigma over anchors and draws: how well the measured
            curve is known (:mod:`tfb.search.interval`). The upper limit is None where the measured
            sigmas do not show one.
        notes: doubts worth reading.
        kl_weight: lambda of gvi, None for other objectives.
        kl, prior_sigma: KL(q || p) in nats at sigma and the prior's scale; None at sigma = 0.
        implied_lambda: -l'(sigma) / KL'(sigma), the lambda for which this sigma solves GVI
            (Theorem 4.2; 1 / training rows is ordinary variational inference).
    """

    sigma: float
    metric: str
    objective: str
    tolerance: float
    relative: bool
    two_sided: bool
    search: str
    mode: str
    draws: int
    seed: int
    anchors: int
    anchor_hash: str
    baseline: float
    limit: float | None
    curve: tuple[CurvePoint, ...]
    passes: float
    stopped: str
    compat: str | None = None
    tail: int | None = None
    kl_weight: float | None = None
    prior_sigma: float | None = None
    kl: float | None = None
    implied_lambda: float | None = None
    notes: tuple[str, ...] = ()
    interval: tuple[float, float | None] | None = None
    family: str = "low_rank"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN becomes None."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(v) for v in value]
            return None if isinstance(value, float) and math.isnan(value) else value

        return {str(k): plain(v) for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SigmaFit:
        """The inverse of ``to_dict``; also of records of earlier versions."""

        def point(p: dict[str, Any]) -> CurvePoint:
            numbers = {k: float("nan") if v is None else v for k, v in p.items() if k != "anchors"}
            return CurvePoint(**numbers, anchors=p.get("anchors"))

        interval = data.get("interval")
        changed = {
            "curve": tuple(point(p) for p in data["curve"]),
            "notes": tuple(data.get("notes", ())),
            "interval": None if interval is None else (interval[0], interval[1]),
        }
        return cls(**{**data, **changed})
