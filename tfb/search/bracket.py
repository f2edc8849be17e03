"""Brackets of the crossing, and where inside them it should lie.

Antithetic pairs leave the even terms of the noise, so the loss is nearly linear in sigma^2: lines
and parabolas are drawn in sigma^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import optimize
from scipy.interpolate import barycentric_interpolate

from tfb.search.curve import LossCurve
from tfb.search.result import SearchError

MAX_EXTENSIONS = 4
COARSE_SHARE = 1 / 8  # of the anchors: as many as a grid takes at most
SIGMA_LIMITS = (1e-8, 1e4)
SWEEP = 5  # most sigmas of a sweep in tail mode
CLOSE = 1.25  # widest gap from which a slope is taken for the crossing's


@dataclass(frozen=True)
class Bracket:
    """State of a search: the largest accepted sigma, a violation, and the steps made."""

    low: float
    high: float
    steps: int = 0


def geometric(low: float, high: float, points: int) -> list[float]:
    """A geometric grid whose ends are ``low`` and ``high`` to the bit, so that no end of an
    extended range is measured twice."""
    inner = torch.logspace(math.log10(low), math.log10(high), points, dtype=torch.float64)
    return [low, *inner[1:-1].tolist(), high]


def sweep(curve: LossCurve) -> int:
    """Sigmas in one sweep over all anchors: several if they cost less than the sweep itself (tail
    mode), else one."""
    sigmas = int(1 / (curve.loss.n * curve.loss.cost.draw_cost))
    return min(SWEEP, sigmas) if sigmas >= 3 else 1


def locate(curve: LossCurve, share: float = COARSE_SHARE) -> tuple[float, float]:
    """(accepted sigma > 0, violation), neighbours; the range is extended until it holds both, on
    at most a ``share`` of the anchors.

    Raises:
        SearchError: it never does.
    """
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


def line(curve: LossCurve, first: float, second: float) -> float:
    """The crossing on the line in sigma^2 through two sigmas; inf if it never comes."""
    a, b = curve.excess(first), curve.excess(second)
    x, y = first * first, second * second
    if b <= a:
        return math.inf
    return math.sqrt(max(x - a * (y - x) / (b - a), 0.0))


def interpolate(curve: LossCurve, low: float, high: float) -> float:
    """The crossing between two sigmas on the polynomial in sigma^2 that takes in up to two more,
    the nearest that are known on all anchors (0 always is). Those far off count only where they
    continue the rise."""
    straight = line(curve, low, high)
    a, b = curve.excess(low), curve.excess(high)
    if not a < 0 < b:
        return straight
    nodes = {low: a, high: b}
    others = [s for s in whole(curve) if s not in nodes]
    for s in sorted(others, key=lambda s: abs(s * s - straight * straight))[:2]:
        near = low / CLOSE**2 <= s <= high * CLOSE**2
        value = curve.excess(s)
        if near or (value < a if s < low else value > b):
            nodes[s] = value
    x, y = [s * s for s in nodes], list(nodes.values())
    root = optimize.brentq(lambda t: float(barycentric_interpolate(x, y, t)), x[0], x[1])
    return math.sqrt(root)


def whole(curve: LossCurve) -> list[float]:
    """The sigmas known on all anchors, 0 first."""
    return [0.0, *(s for s in sorted(curve.points) if curve.complete(s))]


def predict(curve: LossCurve, low: float, high: float) -> float:
    """Where the crossing of all anchors should lie, given a bracket.

    Sigmas known on all anchors say it, if they can: in between, or on the line through the last two
    accepted (0 is). Where the loss falls first, no line from there leads to the crossing, and ends
    known on part of the anchors must do.
    """
    known = whole(curve)
    above = min((s for s in known if curve.excess(s) > 0), default=None)
    below = max(s for s in known if curve.excess(s) <= 0 and (above is None or s < above))
    if above is not None:
        if below > 0 or curve.change(low) > 0:
            return interpolate(curve, below, above)
    elif below > 0:
        ahead = line(curve, known[known.index(below) - 1], below)
        if low < ahead < high:
            # Past a dip the curve bends upwards: a line ahead comes too late, a chord too early.
            dips = any(curve.change(s) < 0 for s in curve.points)
            return math.sqrt(ahead * interpolate(curve, low, high)) if dips else ahead
    return interpolate(curve, low, high)
