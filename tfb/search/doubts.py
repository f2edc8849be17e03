"""Doubts that a fit's numbers raise, as sentences."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from tfb.search.curve import LossCurve
from tfb.search.loss import AnchorLoss, AnchorSet

SIGNIFICANT = 3.0  # standard errors
NEAR_ZERO = 0.1  # of log K, the NLL of a guess among K choices


def doubts(
    curve: LossCurve,
    objective: str,
    sigma: float,
    limits: tuple[float, float | None] | None = None,
) -> list[str]:
    """What the curve makes one doubt about its answer ``sigma`` with its confidence limits."""
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
    found += _missing_labels(curve)
    if _no_better_than_a_guess(curve):
        found.append(
            "the adapter's NLL is no better than a guess's on these anchors: check that the base "
            "model, the rows' format and their labels are those it was trained with"
        )
    if _like_training_rows(curve):
        found.append(
            "the anchors look like rows that the adapter was trained on: it knows nearly every "
            "label, their NLL is no higher than it expects itself, and any variance makes it "
            "worse; sigma will come out too small, so use held-out rows (or pass held_out= to "
            "have it checked)"
        )
    return found


def _wide(limits: tuple[float, float | None]) -> list[str]:
    """Limits that tell next to nothing."""
    low, high = limits
    remedy = "use more anchors, or more draws in the search"
    if low == 0.0:
        return [f"the 95 % interval reaches 0, so it is not shown that noise helps: {remedy}"]
    if high is None:
        return [f"the 95 % interval has no upper end among the sigmas measured: {remedy}"]
    return []


def _labelled(curve: LossCurve) -> tuple[Tensor, Tensor] | None:
    """Probabilities at sigma = 0 [N, K] and labels [N]; None where one of them is not there."""
    probs, labels = curve.loss.probabilities, curve.loss.anchors.labels
    return None if probs is None or labels is None else (probs, labels)


def _missing_labels(curve: LossCurve) -> list[str]:
    """A note where so many anchors lack labels that only a sorted file explains it: with ten rows a
    label, a sample of evenly frequent labels misses one with a probability of about K e^-10."""
    known = _labelled(curve)
    if known is None or not bool((known[0] > 0).all()):
        return []  # rows with fewer choices are padded with zeros
    K, there = known[0].shape[1], len(known[1].unique())
    if there == K or curve.N < 10 * K:
        return []
    return [
        f"only {there} of {K} labels occur among the {curve.N} anchors: if their file is sorted, "
        "shuffle it before its first rows are taken"
    ]


def _no_better_than_a_guess(curve: LossCurve) -> bool:
    """Not by two standard errors below log K."""
    known = _labelled(curve)
    if known is None or curve.N < 2 or curve.metric == "pseudo_nll":
        return False
    probs, labels = known
    choices = (probs > 0).sum(-1).clamp_min(2).to(probs.dtype)
    lead = choices.log() - label_nll(probs, labels)
    return float(lead.mean()) < 2 * float(lead.std()) / curve.N**0.5


def _precision(curve: LossCurve, sigma: float) -> list[str]:
    """The tolerance beside the noise at the answer."""
    found = []
    n = curve.N
    anchors = float(curve.differences(sigma).std()) / n**0.5 if n > 1 else math.nan
    if anchors > curve.allowed:
        found.append(
            f"the tolerance ({curve.allowed:.3g}) is below one standard error over anchors "
            f"({anchors:.3g}) at sigma: use more anchors for a sharper answer"
        )
    draws = curve.draw_standard_error(sigma)
    if draws > curve.allowed:
        found.append(
            f"the tolerance ({curve.allowed:.3g}) is below one standard error over draws "
            f"({draws:.3g}) at sigma: use more draws for a sharper answer"
        )
    return found


def _fall(curve: LossCurve) -> tuple[float, float] | None:
    """Neighbours between which a loss that had risen above l(0) falls, beyond noise: the paired
    difference on the anchors that both were measured on."""
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


def _like_training_rows(curve: LossCurve) -> bool:
    """A test for anchors on which the adapter is too good to be held out.

    An over-fitted adapter is over-confident on held-out rows: their NLL exceeds the entropy of its
    predictions (the NLL it expects), and falls as variance is added. On its own training rows
    neither holds, and the NLL is near 0. All three are asked for: NLL below a tenth of a guess's,
    not significantly above the entropy, and no fall at the smallest sigma. An adapter that truly is
    nearly perfect and calibrated looks the same; variance cannot improve it either.
    """
    known = _labelled(curve)
    if known is None or curve.metric == "pseudo_nll" or not curve.points:
        return False
    probs, labels = known
    nll = label_nll(probs, labels)
    surprise = nll - torch.special.entr(probs).sum(-1)
    first = curve.differences(min(curve.points))
    return (
        float(nll.mean()) < NEAR_ZERO * math.log(probs.shape[1])
        and float(surprise.mean()) < 2 * float(surprise.std()) / curve.N**0.5
        and float(first.mean()) > -2 * float(first.std()) / len(first) ** 0.5
    )


def label_nll(probs: Tensor, labels: Tensor) -> Tensor:
    """[N] -log of the labels' probabilities [N, K]."""
    return -probs.gather(-1, labels[:, None])[:, 0].clamp_min(1e-12).log()


def compare_held_out(loss: AnchorLoss, held_out: AnchorSet) -> list[str]:
    """The anchors' NLL beside that of rows known to be held out (both labelled): a two-sample test
    of their means, for one pass over the latter (and one over the anchors, if the metric keeps no
    probabilities)."""
    probs, labels = loss.probabilities, loss.anchors.labels
    assert labels is not None

    def nll(anchors: AnchorSet) -> Tensor:
        return AnchorLoss(loss.bayes, anchors, "nll", draws=2, seed=loss.seed).baseline

    mine = nll(loss.anchors) if probs is None else label_nll(probs, labels)
    other = nll(held_out)
    error = float((mine.var() / len(mine) + other.var() / len(other)).sqrt())
    if not float(other.mean() - mine.mean()) > SIGNIFICANT * error:
        return []
    return [
        f"the anchors' NLL ({float(mine.mean()):.3g}) lies far below that of the held-out rows "
        f"({float(other.mean()):.3g}), as on the adapter's own training rows: sigma will come out "
        "too small, use held-out rows as anchors"
    ]
