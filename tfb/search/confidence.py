"""How far an answer can be trusted: confidence limits of sigma, and doubts as sentences.

Limits are over anchors and over draws, from what was measured: paired differences of rows, and the
jackknife over streams. Their t has the degrees of freedom of Welch and Satterthwaite: few streams
count for little. With one antithetic pair the error over draws is unknown and left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

from tfb.evaluation.metrics import nll_of_rows
from tfb.search.curve import LossCurve
from tfb.search.loss import AnchorLoss, AnchorSet, jackknife_error

LEVEL = 0.95
REACH = 32.0  # times sigma, in both directions
APART = 1.05  # neighbours closer than this give no slope to extrapolate by
SIGNIFICANT = 3.0  # standard errors
NEAR_ZERO = 0.1  # of log K, the NLL of a guess among K choices

Limits = tuple[float, float | None]


# --- intervals ----------------------------------------------------------------------------------


def crossing_interval(curve: LossCurve, sigma: float) -> Limits:
    """Return confidence limits of the largest accepted sigma.

    They hold the sigmas whose mean excess e does not differ from 0 (a test inverted, Fieller's
    way): |e| <= t * sqrt(SE_anchors^2 + SE_draws^2), each anchor's own difference and its own part
    of the allowance counted. Between measured sigmas e and the rows are linear in sigma^2. The
    upper limit is None if out of reach.
    """
    sign = curve.sign(sigma)
    nodes, whole = [0.0, *sorted(curve.points)], curve.whole
    allowance = curve.excess_rows(0.0)  # [N], minus what is allowed
    rows = {s: sign * curve.differences(s) + allowance for s in whole}
    draws = {s: curve.draw_standard_error(s) for s in whole}
    excess = {s: (sign * curve.change(s) - curve.allowed, curve.part_error(s)) for s in nodes}
    N, U = curve.N, curve.streams

    def distance(at: float, direction: int) -> float:
        """Positive where ``at`` is outside, on the side of ``direction``."""
        mine, full = _between(nodes, at), _between(whole, at)
        mean = sum(w * excess[s][0] for s, w in mine)
        part = sum(w * excess[s][1] for s, w in mine)
        mixed = torch.stack([w * rows[s] for s, w in full]).sum(0)
        anchors = math.hypot(float(mixed.std()) / N**0.5 if N > 1 else 0.0, part)
        over_draws = abs(sum(w * draws[s] for s, w in full)) if U > 1 else 0.0
        return direction * mean - _quantile(anchors, N - 1, over_draws, U - 1, (1 + LEVEL) / 2)

    def limit(direction: int) -> float | None:
        steps = np.geomspace(sigma, sigma * REACH**direction, 200).tolist()
        for near, far in pairwise(steps):
            if distance(far, direction) > 0:
                inside = distance(near, direction) <= 0
                return optimize.brentq(distance, near, far, args=(direction,)) if inside else near
        return None

    return limit(-1) or 0.0, limit(1)


def _between(known: list[float], at: float) -> list[tuple[float, float]]:
    """Return (node, weight) of linear interpolation in sigma^2.

    Beyond the last node goes the slope of the last two that are some way apart.
    """
    right = min((s for s in known if s >= at), default=known[-1])
    left = max((s for s in known if s < at), default=0.0)
    if right < at:
        left = max(s for s in known if s * APART <= known[-1])
    if right == left:
        return [(right, 1.0)]
    share = (at * at - left * left) / (right * right - left * left)
    return [(left, 1 - share), (right, share)]


def minimum_interval(curve: LossCurve, sigma: float, value: Callable[[float], float]) -> Limits:
    """Return confidence limits of the sigma of least ``value``.

    They hold the sigmas that are not worse than the answer by a paired one-sided test, whose
    margin is linear in sigma^2 between measured sigmas. The upper limit is None if no measured
    sigma shows it.
    """
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

    def limit(nodes: list[float]) -> float | None:
        for near, far in pairwise(nodes):
            inside, outside = distance(near), distance(far)
            if outside > 0:
                # Next to the answer the test says nothing of the shape: out to the neighbour.
                far_out = near == sigma or not math.isfinite(outside)
                share = 1.0 if far_out else inside / (inside - outside)
                return math.sqrt(near**2 + share * (far**2 - near**2))
        return None

    order = [0.0, *sorted(curve.points)]
    low = limit([s for s in reversed(order) if s <= sigma])
    return low or 0.0, limit([s for s in order if s >= sigma])


def _quantile(a: float, df_a: int, b: float, df_b: int, level: float) -> float:
    """Return t * sqrt(a^2 + b^2) with Welch and Satterthwaite's degrees of freedom."""
    total = a * a + b * b
    if total == 0.0:
        return 0.0
    parts = sum(e**4 / df for e, df in ((a, df_a), (b, df_b)) if df > 0 and e > 0)
    df = total * total / parts if parts > 0 else math.inf
    return float(stats.t.ppf(level, df)) * math.sqrt(total)


# --- doubts -------------------------------------------------------------------------------------


def doubts(
    curve: LossCurve, objective: str, sigma: float, limits: Limits | None = None
) -> list[str]:
    """Return what the curve makes one doubt about its answer, as sentences."""
    found = []
    if objective == "max_variance":
        found += _precision(curve, sigma)
    fall = _fall(curve)
    if fall is not None:
        found.append(
            "the loss is not monotone in sigma: it falls from sigma={:.4g} to {:.4g} by more than "
            "{:g} standard errors over anchors".format(*fall, SIGNIFICANT)
        )
    if objective == "max_variance" and _dips(curve, sigma):
        found.append(
            "the loss first falls below the deterministic one: objective='min_nll' would stop at "
            "its least value"
        )
    if sigma == 0.0:
        found.append("variance does not help on these anchors")
    elif objective == "min_nll" and limits is not None:
        found += _wide(limits)
    return found + _doubtful_rows(curve)


def _wide(limits: Limits) -> list[str]:
    """Say that limits tell next to nothing."""
    low, high = limits
    remedy = "use more anchors, or more draws in the search"
    if low == 0.0:
        return [f"the 95 % interval reaches 0, so it is not shown that noise helps: {remedy}"]
    if high is None:
        return [f"the 95 % interval has no upper end among the sigmas measured: {remedy}"]
    return []


def _precision(curve: LossCurve, sigma: float) -> list[str]:
    """Compare the tolerance with the noise at the answer."""
    n = curve.N
    anchors = float(curve.differences(sigma).std()) / n**0.5 if n > 1 else math.nan
    return [
        f"the tolerance ({curve.allowed:.3g}) is below one standard error over {what} "
        f"({error:.3g}) at sigma: use more {what} for a sharper answer"
        for what, error in (("anchors", anchors), ("draws", curve.draw_standard_error(sigma)))
        if error > curve.allowed
    ]


def _fall(curve: LossCurve) -> tuple[float, float] | None:
    """Find neighbours between which a loss that had risen above l(0) falls, beyond noise."""
    for a, b in pairwise(sorted(curve.points)):
        count = min(curve.points[a].count, curve.points[b].count)
        first, second = curve.differences(a, count), curve.differences(b, count)
        error = float((second - first).std()) / count**0.5 if count > 1 else math.inf
        drop = float((first - second).mean())
        if float(first.mean()) >= 0 and drop > max(SIGNIFICANT * error, 1e-9 * curve.baseline):
            return a, b
    return None


def _dips(curve: LossCurve, sigma: float) -> bool:
    """Whether a smaller sigma has a loss below l(0), by two standard errors."""
    for s in curve.points:
        rows = curve.differences(s)
        error = float(rows.std()) / len(rows) ** 0.5 if len(rows) > 1 else math.inf
        if s <= sigma and float(rows.mean()) < -2 * error and float(rows.mean()) < 0:
            return True
    return False


def _doubtful_rows(curve: LossCurve) -> list[str]:
    """Judge labelled anchors by the adapter's own predictions."""
    probs, labels = curve.loss.probabilities, curve.loss.anchors.labels
    if probs is None or labels is None:
        return []
    found = _missing_labels(probs, labels)
    if curve.metric == "pseudo_nll":
        return found
    if _no_better_than_a_guess(probs, labels):
        found.append(
            "the adapter's NLL is no better than a guess's on these anchors: check that the base "
            "model, the rows' format and their labels are those it was trained with"
        )
    if _like_training_rows(curve, probs, labels):
        found.append(
            "the anchors look like rows that the adapter was trained on: it knows nearly every "
            "label, their NLL is no higher than it expects itself, and any variance makes it "
            "worse; sigma will come out too small, so use held-out rows (or pass held_out= to "
            "have it checked)"
        )
    return found


def _missing_labels(probs: Tensor, labels: Tensor) -> list[str]:
    """Say that so many anchors lack labels that only a sorted file explains it.

    With ten rows a label, a sample of evenly frequent labels misses one with a probability of
    about K e^-10.
    """
    (N, K), there = probs.shape, len(labels.unique())
    padded = not bool((probs > 0).all())  # rows with fewer choices are padded with zeros
    if padded or there == K or N < 10 * K:
        return []
    return [
        f"only {there} of {K} labels occur among the {N} anchors: if their file is sorted, "
        "shuffle it before its first rows are taken"
    ]


def _no_better_than_a_guess(probs: Tensor, labels: Tensor) -> bool:
    """Not by two standard errors below log K."""
    choices = (probs > 0).sum(-1).clamp_min(2).to(probs.dtype)
    lead = choices.log() - nll_of_rows(probs, labels)
    return len(lead) > 1 and float(lead.mean()) < 2 * float(lead.std()) / len(lead) ** 0.5


def _like_training_rows(curve: LossCurve, probs: Tensor, labels: Tensor) -> bool:
    """Whether the adapter is too good on the anchors for held-out rows.

    An over-fitted adapter is over-confident on held-out rows: their NLL exceeds the entropy of its
    predictions (the NLL it expects), and falls as variance is added. On its own training rows
    neither holds, and the NLL is near 0. All three are asked for. An adapter that truly is nearly
    perfect and calibrated looks the same; variance cannot improve it either.
    """
    if not curve.points:
        return False
    nll = nll_of_rows(probs, labels)
    surprise = nll - torch.special.entr(probs).sum(-1)
    first = curve.differences(min(curve.points))
    return (
        float(nll.mean()) < NEAR_ZERO * math.log(probs.shape[1])
        and float(surprise.mean()) < 2 * float(surprise.std()) / curve.N**0.5
        and float(first.mean()) > -2 * float(first.std()) / len(first) ** 0.5
    )


def compare_held_out(loss: AnchorLoss, held_out: AnchorSet) -> list[str]:
    """Return a note if the anchors' NLL lies far below that of rows known to be held out.

    A two-sample test of means. It costs one pass over the latter, and one over the anchors if the
    metric keeps no probabilities.
    """
    probs, labels = loss.probabilities, loss.anchors.labels
    assert labels is not None

    def nll(anchors: AnchorSet) -> Tensor:
        return AnchorLoss(loss.bayes, anchors, "nll", draws=2, config=loss.config).baseline

    mine = nll(loss.anchors) if probs is None else nll_of_rows(probs, labels)
    other = nll(held_out)
    error = float((mine.var() / len(mine) + other.var() / len(other)).sqrt())
    if not float(other.mean() - mine.mean()) > SIGNIFICANT * error:
        return []
    return [
        f"the anchors' NLL ({float(mine.mean()):.3g}) lies far below that of the held-out rows "
        f"({float(other.mean()):.3g}), as on the adapter's own training rows: sigma will come out "
        "too small, use held-out rows as anchors"
    ]
