"""What a search found: :class:`SigmaFit`, and the curve it measured."""

from __future__ import annotations

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
        sigma: where it was measured.
        loss: mean over anchors. Measured on part of them: l(0) plus the mean paired difference on
            that part, corrected by the sigmas that were measured on all anchors.
        standard_error: of the paired difference to sigma = 0, over anchors.
        draw_standard_error: jackknife over streams. NaN: one stream only.
        anchors: rows measured. None: all of them, in a record of an earlier version.
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
        sigma: the answer. 0: no variance is best (min_nll).
        metric: what degrades; see :func:`tfb.fit_sigma`, as for objective, tolerance, relative,
            two_sided and search.
        mode: how draws reached the model, "full" or "tail".
        draws: at each sigma, antithetic.
        seed: of the noise and of the anchors' order.
        anchors: number of rows.
        anchor_hash: SHA-256 of their content.
        baseline: l(0).
        limit: the largest accepted loss (max_variance), else None.
        curve: every measured point, sigma = 0 first, ascending.
        passes: deterministic passes over the anchors that the search cost, the pass at sigma = 0
            included; see :class:`tfb.search.loss.PassCounter`.
        stopped: why the search stopped, and how well it knows the *measured* curve's answer.
        tail: positions with noise in tail mode, else None.
        length_normalization: how choices of several tokens were scored.
        temperature: T of the likelihood.
        kl_weight: lambda of gvi, None for other objectives.
        prior_sigma: the prior's scale.
        kl: KL(q || p) in nats at sigma; None at sigma = 0.
        implied_lambda: -l'(sigma) / KL'(sigma), the lambda for which this sigma solves GVI
            (Theorem 4.2; 1 / training rows is ordinary variational inference).
        notes: doubts worth reading.
        interval: 95 % confidence limits of sigma over anchors and draws: how well the measured
            curve is known. The upper one is None where no measured sigma shows it.
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
        """How to sample at the answer, as the search did."""
        names = [f.name for f in fields(SamplingConfig)]
        return SamplingConfig(**{name: getattr(self, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; NaN becomes None."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(v) for v in value]
            return None if isinstance(value, float) and math.isnan(value) else value

        return {str(k): plain(v) for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SigmaFit:
        """Undo ``to_dict``; reads records of earlier versions, whose other fields it ignores."""

        def point(p: dict[str, Any]) -> CurvePoint:
            numbers = {k: math.nan if v is None else v for k, v in p.items() if k != "anchors"}
            return CurvePoint(**numbers, anchors=p.get("anchors"))

        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        interval = data.get("interval")
        changed = {
            "curve": tuple(point(p) for p in data["curve"]),
            "notes": tuple(data.get("notes", ())),
            "interval": None if interval is None else tuple(interval),
        }
        return cls(**{**known, **changed})
