"""What a search found: :class:`SigmaFit`, and the curve it measured."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from tfb.sampling.config import SamplingConfig


class SearchError(ValueError):
    """The search has no answer to give; the message says why and what to change."""


@dataclass(frozen=True)
class CurvePoint:
    """One measured sigma.

    Attributes:
        loss: mean over all anchors; an estimate where part of them was measured.
        standard_error: of the paired difference to sigma = 0, over anchors.
        draw_standard_error: jackknife over streams; NaN of one.
        anchors: rows measured; None in records of 0.1.0: all.
    """

    sigma: float
    loss: float
    standard_error: float
    draw_standard_error: float
    anchors: int | None = None


@dataclass(frozen=True)
class SigmaFit:
    """What a search found and how; plain JSON through ``to_dict``.

    Attributes:
        sigma: the answer.
        metric: as given to :func:`tfb.fit_sigma`; so are objective, tolerance, relative, two_sided,
            search, mode, draws, seed and tail.
        anchors: number of rows.
        anchor_hash: SHA-256 of their content.
        baseline: l(0).
        limit: the largest accepted loss of max_variance.
        curve: every measured point, ascending, sigma = 0 first.
        passes: deterministic passes over the anchors that the search cost.
        stopped: why the search stopped.
        length_normalization: how choices of several tokens were scored.
        temperature: T of the likelihood.
        kl_weight: lambda of gvi.
        prior_sigma: the prior's scale.
        kl: KL(q || p) in nats at sigma.
        implied_lambda: -l'(sigma) / KL'(sigma), for which this sigma solves gvi (Theorem 4.2).
        notes: doubts worth reading.
        interval: 95 % limits of sigma over anchors and draws; an upper None: not shown.
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
    tail: int | None = None
    length_normalization: str = "none"
    temperature: float = 1.0
    kl_weight: float | None = None
    prior_sigma: float | None = None
    kl: float | None = None
    implied_lambda: float | None = None
    notes: tuple[str, ...] = ()
    interval: tuple[float, float | None] | None = None

    @property
    def config(self) -> SamplingConfig:
        """How to sample at the answer."""
        names = [f.name for f in fields(SamplingConfig)]
        return SamplingConfig(**{name: getattr(self, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; NaN becomes None."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)
        return found

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SigmaFit:
        """Undo ``to_dict``, also of earlier versions, whose other fields are ignored."""

        def point(p: dict[str, Any]) -> CurvePoint:
            numbers = {k: math.nan if v is None else v for k, v in p.items() if k != "anchors"}
            return CurvePoint(**numbers, anchors=p.get("anchors"))

        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        known["curve"] = tuple(map(point, data["curve"]))
        known["notes"] = tuple(data.get("notes", ()))
        if known.get("interval") is not None:
            known["interval"] = tuple(data["interval"])
        return cls(**known)
