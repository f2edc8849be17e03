"""What a search found: :class:`PredictiveFit`, and the curve it measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tfb.plain import typed
from tfb.sampling.config import SamplingConfig


class SearchError(ValueError):
    """The search has no answer to give; the message says why and what to change."""


@dataclass(frozen=True)
class CurvePoint:
    """One measured sigma.

    Attributes:
        loss: mean over the anchors measured; on a part of them, its change from the adapter there
            plus the adapter's loss on all.
        standard_error: of that change, over anchors; None of a single one.
        temperature: T of the loss.
        accuracy: share of these anchors that is right; None without labels.
        anchors: rows measured; None: all.
    """

    sigma: float
    loss: float
    standard_error: float | None
    temperature: float = 1.0
    accuracy: float | None = None
    anchors: int | None = None

    def __repr__(self) -> str:
        at = f"sigma={self.sigma:.3g}, temperature={self.temperature:.3g}"
        return f"CurvePoint({at}, loss={self.loss:.3g})"


@dataclass(frozen=True)
class PredictiveFit:
    """A fit of the predictive: sigma, T, and how they were found; plain JSON through ``to_dict``.

    Attributes:
        sigma: the posterior's scale.
        temperature: T of the likelihood; 1 unless fitted.
        metric: as given to :func:`tfb.fit_sigma`, a loss function by its name; so are objective,
            tolerance, relative, search, mode, tail, draws and seed.
        anchors: number of rows.
        anchor_hash: SHA-256 of their content.
        baseline: the adapter's loss.
        limit: the largest accepted loss of max_variance.
        curve: every measured point, ascending, the adapter first.
        passes: deterministic passes over the anchors that the search cost.
        stopped: how the answer was found; a verdict in words.
        length_normalization: how choices of several tokens were scored.
        interval: 95 % limits of sigma over anchors; an upper None: beyond what was measured.
        change: 95 % limits over anchors of the change of the loss, from the adapter to the best
            point; None for max_variance.
        notes: doubts worth reading.
        untempered_sigma: the sigma of the same rule at T = 1, where T was fitted.
        kl_weight: lambda of gvi.
        prior_sigma: the prior's scale.
        kl: KL(q || p) in nats at sigma.
        implied_lambda: -l'(sigma) / KL'(sigma), for which this sigma solves gvi (Theorem 4.2).
    """

    sigma: float
    metric: str
    objective: str
    tolerance: float
    relative: bool
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
    temperature: float = 1.0
    tail: int | None = None
    length_normalization: str = "none"
    interval: tuple[float, float | None] | None = None
    change: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    untempered_sigma: float | None = None
    kl_weight: float | None = None
    prior_sigma: float | None = None
    kl: float | None = None
    implied_lambda: float | None = None

    @property
    def config(self) -> SamplingConfig:
        """How to sample at the answer."""
        names = [f.name for f in fields(SamplingConfig)]
        return SamplingConfig(**{name: getattr(self, name) for name in names})

    @property
    def methods(self) -> dict[str, SamplingConfig]:
        """Ways to predict that were measured, by name; the last one is the answer.

        "temperature": T alone, at sigma = 0. "TFB": sigma alone, at T = 1. "TFB + T": both.
        """
        config, curve, sigma = self.config, self.curve, self.untempered_sigma
        if all(p.sigma == 0 for p in curve):
            return {"temperature": config}
        if sigma is None and all(p.temperature == 1 for p in curve):
            return {"TFB": config}
        alone = [p.temperature for p in curve if p.sigma == 0][-1]
        found = {"temperature": replace(config, sigma=0.0, temperature=alone)}
        if sigma is not None:  # older records do not tell
            found["TFB"] = replace(config, sigma=sigma, temperature=1.0)
        return {**found, "TFB + T": config}

    def __str__(self) -> str:
        """Return a verdict of at most five lines."""
        tail = "" if self.tail is None else f"tail={self.tail}, "
        lines = [
            f"sigma = {self.sigma:.3g}, T = {self.temperature:.3g}: {self.stopped}",
            f"fitted by {self.objective} of {self.metric} on {self.anchors} anchors "
            f"({self.draws} draws a sigma, {tail}passes: {self.passes:.0f})",
            self._effect(),
        ]
        if self.interval is not None:
            low, high = self.interval
            upper = "or more" if high is None else f"to {high:.3g}"
            lines.append(f"95 % interval of sigma: {low:.3g} {upper}")
        if self.notes:
            more = f" ({len(self.notes) - 1} more in fit.notes)" if len(self.notes) > 1 else ""
            lines.append(f"note: {self.notes[0]}{more}")
        return "\n".join(lines)

    def _effect(self) -> str:
        """Say what the loss and the accuracy were, and are at the answer."""
        answer = (self.sigma, self.temperature)
        measured = [p for p in self.curve if (p.sigma, p.temperature) == answer]
        points = list(dict.fromkeys([self.curve[0], *measured]))
        text = "loss " + " -> ".join(f"{p.loss:.3g}" for p in points)
        if self.change is not None and len(points) > 1:
            text += " (95 % interval of the change: {:.3g} to {:.3g})".format(*self.change)
        if self.limit is not None:
            text += f" (accepted: up to {self.limit:.3g})"
        right = [f"{100 * p.accuracy:.3g}" for p in points if p.accuracy is not None]
        return text + (f"; accuracy {' -> '.join(right)} %" if right else "")

    def __repr__(self) -> str:
        return (
            f"PredictiveFit(sigma={self.sigma:.3g}, temperature={self.temperature:.3g}, "
            f"metric={self.metric!r}, objective={self.objective!r}, anchors={self.anchors})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return found

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PredictiveFit:
        """Undo ``to_dict``, also of 0.1.0, whose other fields are ignored.

        Raises:
            ValueError: a field that is missing, or a value that cannot be.
        """
        found: PredictiveFit = typed(cls, data, "fit")
        if not found.curve or found.curve[0].sigma != 0:
            raise ValueError("fit.curve: expected the adapter first, at sigma=0")
        typed(SamplingConfig, data, "fit")
        return found
