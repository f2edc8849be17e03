"""Where the answer lies on a curve: the crossing of the tolerance, or the least of an objective.

A crossing (max_variance) is accepted by all anchors, and violated just above by all or surely by a
part. Antithetic pairs leave the even terms of the noise: losses are nearly linear in sigma^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize
from scipy.interpolate import krogh_interpolate

from tfb.posterior import LowRankPosterior
from tfb.search.curve import SURE, LossCurve, standard_error
from tfb.search.result import SearchError

SIGMA_LIMITS = (1e-8, 1e4)
COARSE_SHARE = 1 / 8  # of the anchors: as many as a grid takes at most
CONFIRMING_SHARE = 1 / 4  # of the anchors, for a violation next to the answer
MAX_EXTENSIONS = 4
MAX_STEPS = 200
SWEEP = 5  # most sigmas of a sweep in tail mode
SPAN = 1.9  # how far such a sweep reaches in both directions, while the crossing is uncertain
CLOSE = 1.25  # widest gap from which a slope is taken for the crossing's
SPREAD = 1.4  # ratio of neighbouring sigmas around a minimum
MAX_REFINEMENTS = 4
REFINED = 5.0  # times the resolution: from the least measured sigma to where it should lie
ROUNDING = 1 + 1e-9


def geometric(low: float, high: float, points: int) -> list[float]:
    """Return a geometric grid; its ends are exact, so that they are not measured twice."""
    inner = torch.logspace(math.log10(low), math.log10(high), points, dtype=torch.float64)
    return [low, *inner[1:-1].tolist(), high]


def sweep(curve: LossCurve) -> int:
    """Return how many sigmas to measure at once: several if they cost little in a sweep (tail)."""
    sigmas = int(1 / (curve.loss.n * curve.loss.cost.draw_cost))
    return min(SWEEP, sigmas) if sigmas >= 3 else 1


def _coarse(curve: LossCurve, points: int) -> tuple[float, int]:
    """Return the share of the anchors and the points of the first grid."""
    # A sweep that costs more than its draws begins nearer.
    return (2 * COARSE_SHARE, 2 * points - 1) if sweep(curve) > 1 else (COARSE_SHARE, points)


def by_grid(
    curve: LossCurve, *, bounds: tuple[float, float], points: int, resolution: float
) -> tuple[float, str]:
    """Find the crossing by a grid on part of the anchors, then interpolation on all."""
    share, points = _coarse(curve, points)
    curve.decide(geometric(*bounds, points), share)
    low, high = _locate(curve, share)
    for step in range(MAX_STEPS):
        if stopped := _why_narrow(curve, low, high, resolution):
            return low, stopped
        _narrow(curve, low, high, resolution, step)
        low, high = _locate(curve)
    raise SearchError(f"no crossing settled in {MAX_STEPS} steps; lower the resolution")


def by_bisection(
    curve: LossCurve, *, bounds: tuple[float, float], resolution: float, steps: int
) -> tuple[float, str]:
    """Find the crossing by halving; each sigma takes as many anchors as its decision needs."""
    most, done = min(steps, MAX_STEPS), 0
    low, high = _first_violation(curve, bounds[1])
    while True:
        narrow = low > 0 and high / low - 1 <= resolution
        if not narrow and done < most:
            middle = (low + high) / 2
            curve.decide([middle])
            low, high = (middle, high) if curve.excess(middle) <= 0 else (low, middle)
            done += 1
        elif low == 0.0:
            raise SearchError(
                f"unbracketed: no sigma down to {high:.3g} was accepted in {most} steps; "
                "lower bounds[1], raise steps or the tolerance"
            )
        elif curve.complete(low) and curve.complete(high):
            if narrow:
                return low, f"bracket [{low:.6g}, {high:.6g}] within resolution, {done} steps"
            return low, f"{done} steps; largest accepted, violated at {high:.6g}"
        else:  # an end that part of the anchors decided is not an answer yet
            curve.measure([s for s in (low, high) if not curve.complete(s)])
            low, violating = curve.crossing()
            high = violating or _locate(curve)[1]


def _first_violation(curve: LossCurve, high: float) -> tuple[float, float]:
    """Return an accepted sigma or 0, and a violation: ``high``, or further out."""
    low = 0.0
    for _ in range(MAX_EXTENSIONS + 1):
        curve.decide([high])
        if curve.excess(high) > 0:
            return low, high
        low, high = high, high * 4
    return _locate(curve)


def _locate(curve: LossCurve, share: float = COARSE_SHARE) -> tuple[float, float]:
    """Return an accepted sigma > 0 and the violation next to it; extend the range to hold both."""
    for _ in range(MAX_EXTENSIONS + 1):
        accepted, violating = curve.crossing()
        if violating is None:
            low, high = accepted, min(accepted * 8, SIGMA_LIMITS[1])
        elif accepted == 0.0:
            low, high = max(violating / 32, SIGMA_LIMITS[0]), violating
        else:
            return accepted, violating
        if low >= high:  # at a limit
            break
        curve.decide(geometric(low, high, 3), share)
    accepted, violating = curve.crossing()
    if violating is None:
        raise SearchError(
            f"unbracketed: even sigma={accepted:g} changes the loss by less than the "
            f"tolerance ({curve.allowed:.3g}); the anchors do not respond to the adapter's "
            "noise, or the tolerance is too large"
        )
    if accepted == 0.0:
        raise SearchError(
            f"unbracketed: even sigma={violating:g} worsens the loss by "
            f"{curve.change(violating):.3g}, more than the {curve.allowed:.3g} allowed; raise the "
            "tolerance or use more anchors"
        )
    return accepted, violating


def _why_narrow(curve: LossCurve, low: float, high: float, resolution: float) -> str | None:
    """Say why the bracket is narrow enough; None: it is not."""
    if not (curve.complete(low) and curve.sure(high)):
        return None
    ratio = high / low
    if ratio - 1 <= resolution:
        return f"bracket [{low:.6g}, {high:.6g}] within resolution"
    # An error rate has steps, between which there is nothing to interpolate.
    widest = 2 * CLOSE if curve.complete(high) else CLOSE
    if curve.metric == "accuracy" or ratio > widest:
        return None
    near = [s for s in curve.whole if s < low <= s * CLOSE]
    ahead = _line(curve, near[-1], low) if near else math.inf
    if ratio > CLOSE and math.isinf(ahead):
        return None
    if max(_line(curve, low, high), ahead if near else 0.0) > low * (1 + 0.75 * resolution):
        return None
    return f"crossing interpolated in [{low:.6g}, {high:.6g}], measured below it"


def _narrow(curve: LossCurve, low: float, high: float, resolution: float, step: int) -> None:
    """Measure where the crossing should lie."""
    root, tight = _expected(curve, low, high), 1 + 0.99 * resolution
    if curve.complete(low) and low < root <= low * (1 + 0.75 * resolution):
        # Only the violation just above is missing. With a neighbour known on all anchors, part
        # of them tells; if it is accepted after all, it is the new lower end and needs all.
        above = low * tight
        curve.decide([above], CONFIRMING_SHARE)
        violates = curve.excess(above) > 0 and curve.sure(above)
        curve.measure([] if violates else [above])
        return
    if step % 2 and step >= (1 if curve.metric == "accuracy" else 6):
        wanted = []  # interpolation does not get there: halve now and then
    elif sweep(curve) > 1:
        wanted = _around(curve, low, high, root, tight)
    else:
        wanted = [_aim(curve, low, high, root, resolution)]
    new = [s for s in wanted if not curve.complete(s)]
    curve.measure(new or [(low * high) ** 0.5])


def _around(curve: LossCurve, low: float, high: float, root: float, tight: float) -> list[float]:
    """Return the sigmas of a sweep in tail mode."""
    if curve.complete(low) and curve.sure(high):  # one of these brackets is the last, if smooth
        return [s for e in (-1.8, -0.8, 0.2, 1.2) if low < (s := root * tight**e) < high]
    return geometric(root / SPAN, root * SPAN, sweep(curve))


def _aim(curve: LossCurve, low: float, high: float, root: float, resolution: float) -> float:
    """Return the one sigma to measure next on all anchors."""
    tight = 1 + 0.99 * resolution
    if curve.complete(high) and high > root >= high / (1 + 0.25 * resolution):
        aim = high / tight
    else:
        aim = root * (1 - resolution / 2)
    # An end that is known on part of the anchors only, and that close, is measured itself.
    for end in (low, high):
        if not curve.complete(end) and end / tight <= aim <= end * tight:
            return end
    if not (curve.complete(low) and curve.sure(high)):
        return aim
    return min(max(aim, low * (1 + resolution / 4)), high / (1 + resolution / 4))


def _expected(curve: LossCurve, low: float, high: float) -> float:
    """Return where the crossing of all anchors should lie, by sigmas known on all if they can."""
    known = curve.whole
    above = min((s for s in known if curve.excess(s) > 0), default=None)
    below = max(s for s in known if curve.excess(s) <= 0 and (above is None or s < above))
    if above is not None:
        if below > 0 or curve.change(low) > 0:
            return _interpolated(curve, below, above)
    elif below > 0:
        ahead = _line(curve, known[known.index(below) - 1], below)
        if low < ahead < high:
            # Past a dip the curve bends upwards: a line ahead comes too late, a chord too early.
            dips = any(curve.change(s) < 0 for s in curve.points)
            return math.sqrt(ahead * _interpolated(curve, low, high)) if dips else ahead
    return _interpolated(curve, low, high)


def _interpolated(curve: LossCurve, low: float, high: float) -> float:
    """Return the crossing between two sigmas on a polynomial in sigma^2 through up to two more."""
    straight = _line(curve, low, high)
    a, b = curve.excess(low), curve.excess(high)
    if not a < 0 < b:
        return straight
    nodes = {low: a, high: b}
    others = [s for s in curve.whole if s not in nodes]
    for s in sorted(others, key=lambda s: abs(s * s - straight * straight))[:2]:
        near = low / CLOSE**2 <= s <= high * CLOSE**2  # others have to continue the rise
        value = curve.excess(s)
        if near or (value < a if s < low else value > b):
            nodes[s] = value
    x, y = [s * s for s in nodes], list(nodes.values())
    root = optimize.brentq(lambda t: float(krogh_interpolate(x, y, t)), x[0], x[1])
    return math.sqrt(root)


def _line(curve: LossCurve, first: float, second: float) -> float:
    """Return the crossing on the line in sigma^2 through two sigmas; inf if it never comes."""
    a, b = curve.excess(first), curve.excess(second)
    x, y = first * first, second * second
    if b <= a:
        return math.inf
    return math.sqrt(max(x - a * (y - x) / (b - a), 0.0))


@dataclass(frozen=True)
class Divergence:
    """KL(q || p) in nats as a function of sigma, for one isotropic prior."""

    posteriors: Mapping[str, LowRankPosterior]
    prior_sigma: float

    def __call__(self, sigma: float) -> float:
        """Return KL(q || p)."""
        return sum(p.kl(sigma, self.prior_sigma) for p in self.posteriors.values())

    def slope(self, sigma: float) -> float:
        """Return d KL / d sigma."""
        entries = sum(p.effective_rank * p.in_features for p in self.posteriors.values())
        return entries * (sigma / self.prior_sigma**2 - 1.0 / sigma)


@dataclass(frozen=True)
class Objective:
    """What is minimised: l(sigma), for gvi + weight KL(q || p), nats an anchor."""

    curve: LossCurve
    kl: Divergence | None
    weight: float

    def penalty(self, sigma: float) -> float:
        """Return weight KL; it diverges at sigma = 0."""
        if self.kl is None:
            return 0.0
        return math.inf if sigma == 0.0 else self.weight * self.kl(sigma)

    def __call__(self, sigma: float) -> float:
        """Return the objective at a measured sigma, corrected where it was measured on a part."""
        return self.curve.baseline + self.curve.change(sigma) + self.penalty(sigma)

    def lower_limit(self, sigma: float) -> float:
        """Return one standard error over anchors below the objective."""
        return self(sigma) - standard_error(self.curve.differences(sigma), 0.0)

    def between(self, low: float, high: float, nodes: list[float]) -> float:
        """Return where it is least in a range, by a polynomial through 0 and ``nodes``.

        In sigma: near a minimum, several per cent below l(0), closer than one in sigma^2.
        """
        at = [0.0, *nodes]
        grid = np.geomspace(low, high, 1001)
        loss = krogh_interpolate(at, [self.curve.change(s) for s in at], grid)
        values = [v + self.penalty(float(s)) for s, v in zip(grid, loss, strict=True)]
        return float(grid[int(np.argmin(values))])


def find_minimum(
    objective: Objective, *, bounds: tuple[float, float], points: int, resolution: float
) -> tuple[float, str]:
    """Find the sigma of the least objective.

    A grid on part of the anchors says where to look. More is measured until the least on all has
    near neighbours, interpolation agrees, and no sigma known on a part may still be better.
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
        nearest = sorted(curve.whole[1:], key=lambda s: abs(math.log(s / best)))[:4]
        wanted_at = objective.between(left, right, list({left, best, right, *nearest}))
        close = abs(math.log(wanted_at / best)) <= REFINED * resolution
        if close or refinements == MAX_REFINEMENTS or curve.complete(wanted_at):
            return best, (
                f"least of the sigmas measured, neighbours {left:.6g} and {right:.6g}; "
                f"interpolated {wanted_at:.6g}"
            )
        refinements += 1
        curve.measure([wanted_at])


def _start(objective: Objective, bounds: tuple[float, float], points: int) -> float:
    """Return where to look on all anchors, from a grid on part of them that is extended."""
    curve = objective.curve
    share, points = _coarse(curve, points)
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
    """Return what to measure on all anchors before the least of them can be the answer."""
    curve, best = objective.curve, _least(objective)
    if best == 0.0:
        lowest = curve.whole[1]
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
    """Return the sigmas known on a part that may still be the least, as many as go into a sweep."""
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
    """Return the sigma of the least objective on all anchors."""
    return min(objective.curve.whole, key=objective)


def _neighbours(curve: LossCurve, sigma: float) -> tuple[float, float]:
    """Return the nearest sigmas on both sides, measured on all anchors; inf: none above."""
    known = curve.whole
    low = max(s for s in known if s < sigma)
    return low, min((s for s in known if s > sigma), default=math.inf)
