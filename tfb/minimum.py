"""Searches for the sigma of least loss (min_nll), or of least loss + lambda KL (gvi)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tfb.bracket import MAX_EXTENSIONS, SIGMA_LIMITS, geometric
from tfb.curve import LossCurve
from tfb.posterior import LowRankPosterior
from tfb.sigma_fit import SearchError

APART = 1.25  # neighbours of the answer are at most this far from each other
Objective = Callable[[float], float]


@dataclass(frozen=True)
class Divergence:
    """KL(q || p) in nats of all layers as a function of sigma, for one isotropic prior.

    scales: multipliers of sigma by layer; layers without noise (0) have no part in it.
    """

    posteriors: Mapping[str, LowRankPosterior]
    scales: Mapping[str, float]
    prior_sigma: float

    def __call__(self, sigma: float) -> float:
        return sum(
            p.kl(sigma * self.scales[n], self.prior_sigma)
            for n, p in self.posteriors.items()
            if self.scales[n] > 0
        )

    def slope(self, sigma: float) -> float:
        """d KL / d sigma."""
        return sum(
            p.effective_rank * p.in_features
            * (self.scales[n] ** 2 * sigma / self.prior_sigma**2 - 1.0 / sigma)
            for n, p in self.posteriors.items()
            if self.scales[n] > 0
        )  # fmt: skip


def objective_of(curve: LossCurve, objective: str, kl: Divergence, kl_weight: float) -> Objective:
    """What is minimised, for measured sigmas."""

    def loss(sigma: float) -> float:
        return curve.baseline + curve.change(sigma)

    def gvi(sigma: float) -> float:
        if sigma == 0.0:
            return math.inf  # KL diverges
        return loss(sigma) + kl_weight * kl(sigma)

    return loss if objective == "min_nll" else gvi


def find_minimum(
    curve: LossCurve,
    value: Objective,
    *,
    bounds: tuple[float, float],
    points: int,
    resolution: float,
) -> tuple[float, str]:
    """(sigma of least ``value``, why the search stopped); every sigma is measured on all anchors.

    Raises:
        SearchError: the objective still falls at the end of the extended range.
    """
    curve.measure(geometric(*bounds, points))
    for _ in range(MAX_EXTENSIONS):
        best, lowest = _least(curve, value), min(curve.points)
        if best == max(curve.points):
            curve.measure([best * f for f in (2.0, 4.0)])
        elif best == 0.0 and curve.excess(lowest) > 0:
            # Already past the tolerance at the lower end: an improvement may lie below it.
            curve.measure([lowest / 8])
        else:
            break
    best = _least(curve, value)
    if best == max(curve.points):
        raise SearchError(f"unbracketed: the objective still falls at sigma={best:g}; widen bounds")
    while best > 0.0:
        order = [0.0, *sorted(curve.points)]
        i = order.index(best)
        left, right = order[i - 1], order[i + 1]
        if left > 0.0 and right / left <= max(1 + resolution * 8, APART):
            return best, f"least measured value, neighbours {left:.6g} and {right:.6g}"
        if left == 0.0 and best / 8 < SIGMA_LIMITS[0]:
            return best, "least measured value"
        inner = [best / 2, best * 0.75**0.5] if left == 0.0 else [(left * best) ** 0.5]
        curve.measure([*inner, (best * right) ** 0.5])
        best = _least(curve, value)
    return 0.0, "no sigma measured has a lower loss than the deterministic adapter"


def _least(curve: LossCurve, value: Objective) -> float:
    return min((0.0, *sorted(curve.points)), key=value)
