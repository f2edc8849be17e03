"""How far an answer can be trusted: confidence limits of sigma, and doubts as sentences.

Limits are over anchors and draws: paired differences of rows, and the jackknife over streams, with
Welch and Satterthwaite's degrees of freedom. With one stream the latter is unknown and left out.
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
from tfb.search.curve import LossCurve, standard_error
from tfb.search.loss import AnchorLoss, AnchorSet, jackknife_error

LEVEL = 0.95
REACH = 32.0  # times sigma, in both directions
APART = 1.05  # neighbours closer than this give no slope to extrapolate by
SIGNIFICANT = 3.0  # standard errors
NEAR_ZERO = 0.1  # of log K, the NLL of a guess among K choices

Limits = tuple[float, float | None]


def crossing_interval(curve: LossCurve, sigma: float) -> Limits:
    """Return confidence limits of the largest accepted sigma; None: out of reach.

    A test that the mean excess is 0, inverted (Fieller's way); linear in sigma^2 between nodes.
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
        anchors = math.hypot(standard_error(mixed, 0.0), part)
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
    """Return (node, weight) of interpolation in sigma^2; beyond the last, of the last two apart."""
    right = min((s for s in known if s >= at), default=known[-1])
    left = max((s for s in known if s < at), default=0.0)
    if right < at:
        left = max(s for s in known if s * APART <= known[-1])
    if right == left:
        return [(right, 1.0)]
    share = (at * at - left * left) / (right * right - left * left)
    return [(left, 1 - share), (right, share)]


def minimum_interval(curve: LossCurve, sigma: float, value: Callable[[float], float]) -> Limits:
    """Return confidence limits of the sigma of least ``value``; None: no measured sigma shows it.

    They hold what a paired one-sided test does not show to be worse, by steps linear in sigma^2.
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


def doubts(curve: LossCurve, objective: str, sigma: float, limits: Limits) -> list[str]:
    """Return what the curve makes one doubt about its answer, as sentences."""
    found = _precision(curve, sigma) if objective == "max_variance" else []
    if (fall := _fall(curve)) is not None:
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
    elif objective == "min_nll" and (limits[0] == 0.0 or limits[1] is None):
        what = "has no upper end among the sigmas measured"
        if limits[0] == 0.0:
            what = "reaches 0, so it is not shown that noise helps"
        found.append(f"the 95 % interval {what}: use more anchors, or more draws in the search")
    return found + _doubtful_rows(curve)


def _precision(curve: LossCurve, sigma: float) -> list[str]:
    """Compare the tolerance with the noise at the answer."""
    anchors = standard_error(curve.differences(sigma), math.nan)
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
        error = standard_error(second - first)
        drop = float((first - second).mean())
        if float(first.mean()) >= 0 and drop > max(SIGNIFICANT * error, 1e-9 * curve.baseline):
            return a, b
    return None


def _dips(curve: LossCurve, sigma: float) -> bool:
    """Whether a smaller sigma has a loss below l(0), by two standard errors."""
    smaller = [curve.differences(s) for s in curve.points if s <= sigma]
    return any(float(rows.mean()) < -2 * standard_error(rows) for rows in smaller)


def _doubtful_rows(curve: LossCurve) -> list[str]:
    """Judge labelled anchors by the adapter's own predictions."""
    probs, labels = curve.loss.probabilities, curve.loss.anchors.labels
    if probs is None or labels is None:
        return []
    found, (N, K), there = [], probs.shape, len(labels.unique())
    # With ten rows a label, evenly frequent labels miss one with a probability of about K e^-10.
    # Rows with fewer choices are padded with zeros.
    if there < K and N >= 10 * K and bool((probs > 0).all()):
        found.append(
            f"only {there} of {K} labels occur among the {N} anchors: if their file is sorted, "
            "shuffle it before its first rows are taken"
        )
    if curve.metric == "pseudo_nll":
        return found
    choices = (probs > 0).sum(-1).clamp_min(2).to(probs.dtype)
    lead = choices.log() - nll_of_rows(probs, labels)  # over a guess
    if float(lead.mean()) < 2 * standard_error(lead, -math.inf):
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


def _like_training_rows(curve: LossCurve, probs: Tensor, labels: Tensor) -> bool:
    """Whether the adapter is too good on the anchors for held-out rows.

    On those the NLL of an over-fitted adapter exceeds the entropy of its predictions, and falls as
    variance is added. One that truly is nearly perfect and calibrated looks like training rows.
    """
    nll = nll_of_rows(probs, labels)
    surprise = nll - torch.special.entr(probs).sum(-1)
    first = curve.differences(min(curve.points))
    return (
        float(nll.mean()) < NEAR_ZERO * math.log(probs.shape[1])
        and float(surprise.mean()) < 2 * standard_error(surprise, math.nan)
        and float(first.mean()) > -2 * standard_error(first)
    )


def compare_held_out(loss: AnchorLoss, held_out: AnchorSet) -> list[str]:
    """Return a note if the anchors' NLL lies far below that of rows known to be held out."""
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
