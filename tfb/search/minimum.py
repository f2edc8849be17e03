"""Searches for the sigma of least loss (min_nll), or of least loss + lambda KL (gvi).

A grid on part of the anchors says where to look; three sigmas (tail mode: five, in one sweep) go
around it on all of them. Every other sigma of the grid gets more anchors until these tell that it
is worse, since a part can mislead; one that stays in doubt ends up measured on all. More follow
until the least has neighbours within a factor of ``SPREAD``.
The polynomial in sigma through these and sigma = 0 (where the change of loss is 0) then says where
the least should lie: if that is close to the least measured one, this is the answer, else it is
measured too. Between antithetic pairs the loss is even in sigma, yet near its minimum, several
per cent of the loss below l(0), polynomials in sigma were the closer ones (DESIGN.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import barycentric_interpolate

from tfb.posterior import LowRankPosterior
from tfb.search.bracket import COARSE_SHARE, MAX_EXTENSIONS, SIGMA_LIMITS, geometric, sweep, whole
from tfb.search.curve import SURE, LossCurve
from tfb.search.result import SearchError

SPREAD = 1.4  # ratio of neighbouring sigmas on all anchors
CLOSE = 5.0  # times the resolution: from the least measured sigma to where it should lie
MAX_REFINEMENTS = 4
ROUNDING = 1 + 1e-9


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


@dataclass(frozen=True)
class Objective:
    """What is minimised: l(sigma) + weight KL(q || p), nats an anchor.

    kl: None for the loss alone.
    """

    curve: LossCurve
    kl: Divergence | None = None
    weight: float = 0.0

    def penalty(self, sigma: float) -> float:
        """weight KL; it diverges at sigma = 0."""
        if self.kl is None:
            return 0.0
        return math.inf if sigma == 0.0 else self.weight * self.kl(sigma)

    def __call__(self, sigma: float) -> float:
        """For a measured sigma; corrected where it was measured on part of the anchors."""
        return self.curve.baseline + self.curve.change(sigma) + self.penalty(sigma)

    def lower_limit(self, sigma: float) -> float:
        """One standard error over anchors below the objective."""
        rows = self.curve.differences(sigma)
        error = float(rows.std()) / len(rows) ** 0.5 if len(rows) > 1 else 0.0
        return self(sigma) - error

    def between(self, low: float, high: float, nodes: list[float]) -> float:
        """Where it is least from ``low`` to ``high``, by the polynomial of the loss through 0 and
        ``nodes``, measured sigmas > 0; the penalty is known everywhere."""
        at = [0.0, *nodes]
        grid = np.geomspace(low, high, 1001)
        loss = barycentric_interpolate(at, [self.curve.change(s) for s in at], grid)
        values = [v + self.penalty(float(s)) for s, v in zip(grid, loss, strict=True)]
        return float(grid[int(np.argmin(values))])


def find_minimum(
    objective: Objective, *, bounds: tuple[float, float], points: int, resolution: float
) -> tuple[float, str]:
    """(sigma of the least objective, why the search stopped); the answer and its neighbours are
    measured on all anchors.

    Raises:
        SearchError: the objective still falls at the end of the extended range.
    """
    curve = objective.curve
    begin = _start(objective, bounds, points)
    # A sweep that costs more than its draws takes more of them.
    reach = 2 if sweep(curve) > 1 else 1
    curve.measure([begin * SPREAD**e for e in range(-reach, reach + 1)])
    refinements = 0
    while True:
        if doubtful := _doubtful(objective):
            curve.measure_further(doubtful)
            continue
        if wanted := _missing(objective, begin):
            curve.measure(wanted)
            continue
        best = _least(objective)
        if best == 0.0:
            return 0.0, "no sigma measured has a lower loss than the deterministic adapter"
        left, right = _neighbours(curve, best)
        if left == 0.0:
            return best, f"least measured value, at the smallest sigma that is tried ({best:.3g})"
        nearest = sorted(whole(curve)[1:], key=lambda s: abs(math.log(s / best)))[:4]
        wanted_at = objective.between(left, right, list({left, best, right, *nearest}))
        close = abs(math.log(wanted_at / best)) <= CLOSE * resolution
        if close or refinements == MAX_REFINEMENTS or curve.complete(wanted_at):
            return best, (
                f"least of the sigmas measured, neighbours {left:.6g} and {right:.6g}; "
                f"interpolated {wanted_at:.6g}"
            )
        refinements += 1
        curve.measure([wanted_at])


def _start(objective: Objective, bounds: tuple[float, float], points: int) -> float:
    """Where to look on all anchors, from a grid on part of them, extended until it holds it."""
    curve, share = objective.curve, COARSE_SHARE
    if sweep(curve) > 1:
        share, points = 2 * share, 2 * points - 1
    curve.measure(geometric(*bounds, points), share)

    def least() -> float:
        return min((0.0, *sorted(curve.points)), key=objective)

    for _ in range(MAX_EXTENSIONS):
        best, lowest = least(), min(curve.points)
        if best == max(curve.points):
            curve.measure([best * f for f in (2.0, 4.0)], share)
        elif best == 0.0 and curve.excess(lowest) > 0:
            # Already past the tolerance at the lower end: an improvement may lie below it.
            curve.measure([lowest / 8], share)
        elif best == lowest:
            curve.measure([lowest / f for f in (4.0, 2.0)], share)
        else:
            break
    best, known = least(), sorted(curve.points)
    if best == known[-1]:
        raise SearchError(f"unbracketed: the objective still falls at sigma={best:g}; widen bounds")
    if best == 0.0:
        # The part sees no improvement; all anchors may, where it is least excluded.
        return min(known, key=objective.lower_limit)
    i = known.index(best)
    return objective.between(known[i - 1], known[i + 1], known[i - 1 : i + 2]) if i else best


def _missing(objective: Objective, begin: float) -> list[float]:
    """What to measure on all anchors before the least of them can be the answer; [] if nothing."""
    curve, best = objective.curve, _least(objective)
    if best == 0.0:
        lowest = whole(curve)[1]
        return [] if lowest < begin / 4 or lowest / 8 < SIGMA_LIMITS[0] else [lowest / 4]
    left, right = _neighbours(curve, best)
    if best > SIGMA_LIMITS[1]:
        raise SearchError(f"unbracketed: the objective still falls at sigma={best:g}; widen bounds")
    wanted = []
    if left * SPREAD * ROUNDING < best and best / 8 >= SIGMA_LIMITS[0]:
        wanted.append(best / SPREAD)
    if best * SPREAD * ROUNDING < right:
        wanted.append(best * SPREAD)
    return wanted


def _doubtful(objective: Objective) -> list[float]:
    """Sigmas known on part of the anchors that may still be better than the least of those known
    on all: the likeliest first, as many as go into a sweep. Those next to the least are left to
    interpolation."""
    curve, best = objective.curve, _least(objective)
    limits = {
        s: objective(s) - SURE * curve.part_error(s)
        for s in curve.points
        if not curve.complete(s) and not best / SPREAD < s < best * SPREAD
    }
    least = objective(best)
    found = [s for s in limits if limits[s] < least]
    return sorted(found, key=limits.__getitem__)[: sweep(curve)]


def _least(objective: Objective) -> float:
    """The sigma of the least objective on all anchors."""
    return min(whole(objective.curve), key=objective)


def _neighbours(curve: LossCurve, sigma: float) -> tuple[float, float]:
    """The nearest sigmas on both sides that are measured on all anchors; inf: none above."""
    known = whole(curve)
    low = max(s for s in known if s < sigma)
    return low, min((s for s in known if s > sigma), default=math.inf)
