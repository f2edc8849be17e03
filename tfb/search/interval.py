"""How well sigma is known: confidence limits over anchors and over draws, from what was measured.

max_variance: the sigmas whose degradation does not differ from the tolerance (a test inverted,
Fieller's way). With e(sigma) the mean excess, its standard error over anchors (each anchor's own
difference and its own part of the allowance) and over draws (jackknife over streams), the interval
holds every sigma around the answer with |e| <= t * sqrt(SE_anchors^2 + SE_draws^2). In between the
measured sigmas e and the anchors' rows are linear in sigma^2. t has the degrees of freedom of
Welch and Satterthwaite: few streams count for little. With one antithetic pair the error over draws
is unknown and left out.

min_nll, gvi: the sigmas whose objective is not worse than the answer's by a paired one-sided test;
the test's margin is linear in sigma^2 between measured sigmas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from scipy import optimize, stats

from tfb.search.curve import LossCurve
from tfb.search.loss import jackknife_error

LEVEL = 0.95
REACH = 32.0  # times sigma, in both directions
APART = 1.05  # neighbours closer than this give no slope to extrapolate by


def crossing_interval(curve: LossCurve, sigma: float) -> tuple[float, float | None]:
    """Confidence limits of the largest accepted sigma; the upper one is None if out of reach."""
    sign = curve.sign(sigma)
    nodes = [0.0, *sorted(curve.points)]
    # Beyond the last node goes the slope of the last two that are some way apart.
    last = max(s for s in nodes if s * APART <= nodes[-1])
    whole = [s for s in nodes if curve.complete(s)]
    last_whole = max(s for s in whole if s * APART <= whole[-1])
    allowance = curve.excess_rows(0.0)  # [N], minus what is allowed
    rows = {s: sign * curve.differences(s) + allowance for s in whole}
    draws = {s: curve.draw_standard_error(s) for s in whole}
    excess = {s: (sign * curve.change(s) - curve.allowed, curve.part_error(s)) for s in nodes}
    N, U = curve.N, curve.streams

    def distance(at: float, direction: int) -> float:
        """Positive where ``at`` is outside, on the side of ``direction``."""
        mine = _between(nodes, last, at)
        mean = sum(w * excess[s][0] for s, w in mine)
        part = sum(w * excess[s][1] for s, w in mine)
        full = _between(whole, last_whole, at)
        mixed = torch.stack([w * rows[s] for s, w in full]).sum(0)
        anchors = math.hypot(float(mixed.std()) / N**0.5 if N > 1 else 0.0, part)
        over_draws = abs(sum(w * draws[s] for s, w in full)) if U > 1 else 0.0
        return direction * mean - _quantile(anchors, N - 1, over_draws, U - 1, (1 + LEVEL) / 2)

    limits: list[float | None] = []
    for direction in (-1, 1):
        steps = np.geomspace(sigma, sigma * REACH**direction, 200)
        found = None
        for near, far in pairwise(steps.tolist()):
            if distance(far, direction) > 0:
                inside = distance(near, direction) <= 0
                found = optimize.brentq(distance, near, far, args=(direction,)) if inside else near
                break
        limits.append(found)
    return limits[0] or 0.0, limits[1]


def _between(known: list[float], before: float, at: float) -> list[tuple[float, float]]:
    """(node, weight) of linear interpolation in sigma^2; beyond the last node, from ``before``."""
    right = min((s for s in known if s >= at), default=known[-1])
    left = before if right < at else max((s for s in known if s < at), default=0.0)
    if right == left:
        return [(right, 1.0)]
    share = (at * at - left * left) / (right * right - left * left)
    return [(left, 1 - share), (right, share)]


def minimum_interval(
    curve: LossCurve, sigma: float, value: Callable[[float], float]
) -> tuple[float, float | None]:
    """Confidence limits of the sigma of least ``value``; ``sigma`` is measured on all anchors."""
    U, N = curve.streams, curve.N

    def distance(other: float) -> float:
        """Positive where ``other`` is worse."""
        if other == sigma:
            return 0.0
        count = N if other == 0.0 else curve.points[other].count
        paired = curve.differences(other) - curve.differences(sigma, count)
        anchors = float(paired.std()) / N**0.5 if N > 1 else 0.0
        # A constant between parts of the anchors does not change the jackknife.
        spread = curve.left_out(other) - curve.left_out(sigma)
        draws = float(jackknife_error(spread)) if U > 1 else 0.0
        anchors = math.hypot(anchors, curve.part_error(other))
        return value(other) - value(sigma) - _quantile(anchors, N - 1, draws, U - 1, LEVEL)

    order = [0.0, *sorted(curve.points)]
    limits: list[float | None] = []
    for nodes in ([s for s in reversed(order) if s <= sigma], [s for s in order if s >= sigma]):
        found = None
        for near, far in pairwise(nodes):
            inside, outside = distance(near), distance(far)
            if outside > 0:
                # Next to the answer the test says nothing of the shape: out to the neighbour.
                far_out = near == sigma or not math.isfinite(outside)
                share = 1.0 if far_out else inside / (inside - outside)
                found = math.sqrt(near**2 + share * (far**2 - near**2))
                break
        limits.append(found)
    return limits[0] or 0.0, limits[1]


def point_margin(anchors: float, n: int, draws: float, streams: int) -> float:
    """Half the 95 % interval of a curve point's loss, from its standard errors over n anchors and
    over independent streams (NaN: unknown, left out)."""
    over_draws = draws if streams > 1 and math.isfinite(draws) else 0.0
    return _quantile(anchors, n - 1, over_draws, streams - 1, (1 + LEVEL) / 2)


def _quantile(a: float, df_a: int, b: float, df_b: int, level: float) -> float:
    """t * sqrt(a^2 + b^2) with Welch and Satterthwaite's degrees of freedom."""
    total = a * a + b * b
    if total == 0.0:
        return 0.0
    parts = sum(e**4 / df for e, df in ((a, df_a), (b, df_b)) if df > 0 and e > 0)
    df = total * total / parts if parts > 0 else math.inf
    return float(stats.t.ppf(level, df)) * math.sqrt(total)
