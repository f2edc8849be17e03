"""``fit_sigma``: how much posterior scale the anchors tolerate (TFB, section 3.3).

All sigmas share antithetic streams (common random numbers), without which the loss is not even
monotone. Two precisions are told apart: that of the answer on the curve measured with these
streams on these anchors (``resolution``, ``SigmaFit.stopped``), and how well that curve is known at
all (``SigmaFit.interval``), which is usually the wider by far. To add an objective or a search:
:mod:`tfb.search.select`; a metric: :mod:`tfb.search.loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

from tfb.data.batching import EncodedRows
from tfb.draws import check_even
from tfb.posterior import default_prior_sigma
from tfb.sampling.config import SamplingConfig
from tfb.search.confidence import compare_held_out, crossing_interval, doubts, minimum_interval
from tfb.search.curve import LIKELIHOODS, LossCurve
from tfb.search.loss import METRICS, AnchorLoss, AnchorSet, Batch, SearchedModel
from tfb.search.result import SigmaFit
from tfb.search.select import Divergence, Objective, by_bisection, by_grid, find_minimum

OBJECTIVES = ("max_variance", "min_nll", "gvi")
SEARCHES = ("grid", "bisection")
MIN_RESOLUTION = 1e-9  # a bracket cannot be narrower than a few ulp
DEFAULT_BOUNDS = (1e-3, 0.1)
SEARCH_DRAWS = 4
TOLERANCE = 0.003

Anchors = AnchorSet | EncodedRows | Iterable[Batch]


def fit_sigma(
    bayes: SearchedModel,
    anchors: Anchors,
    metric: str = "nll",
    tolerance: float | None = None,
    search: str = "grid",
    *,
    objective: str | None = None,
    relative: bool = True,
    two_sided: bool | None = None,
    draws: int = SEARCH_DRAWS,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    points: int = 6,
    resolution: float = 0.01,
    steps: int = 12,
    prior_sigma: float | None = None,
    kl_weight: float | None = None,
    seed: int | None = None,
    batch_size: int = 50,
    mode: str | None = None,
    tail: int | None = None,
    held_out: Anchors | None = None,
    progress: Callable[[int], None] | None = None,
) -> SigmaFit:
    """Search sigma on anchors; configure the model with it, and with the mode it was found in.

    Args:
        bayes: the model. Nothing on it changes before the answer is there.
        anchors: an :class:`AnchorSet`, encoded rows, or batches (dicts of tokenizer tensors with
            "labels" and, for causal LMs, "label_ids").
        metric: what degrades: "nll", "accuracy", "expected_nll" (labelled anchors), "pseudo_nll"
            or "embedding_norm" (unlabelled ones).
        tolerance: accepted degradation of max_variance, default 0.003.
        search: "grid", or "bisection" for max_variance.
        objective: "min_nll", the sigma of least loss; "max_variance", the paper's rule: the largest
            sigma connected to 0 with l(sigma) - l(0) <= tolerance; or "gvi", the sigma of least
            l(sigma) + lambda KL(q || p). None: "min_nll" with metric "nll", search "grid" and no
            tolerance given, else "max_variance".
        relative: the tolerance is relative to l(0), for accuracy to the accuracy, with a floor of
            0.01 nats under an NLL. Or absolute, in the loss's units.
        two_sided: an improved loss counts as degradation too. Default: for embedding_norm.
        draws: antithetic draws at each sigma.
        bounds: the first range of sigma; it is extended where it does not hold the answer.
        points: size of the grid.
        resolution: relative precision of the crossing.
        steps: most steps of a bisection.
        prior_sigma: the prior's scale for KL. Default: the adapter's own
            (:func:`tfb.posterior.default_prior_sigma`).
        kl_weight: lambda of gvi. Default: 1 / anchors; take 1 / training rows where the anchors are
            a sample of those.
        seed: of the noise and of the anchors' order. Default: the model's.
        batch_size: of encoded rows.
        mode: how draws reach the model, here and in later predictions, "full" or "tail". Default:
            the model's own.
        tail: positions with noise in tail mode.
        held_out: labelled rows that are known not to be training rows, in any form that anchors
            have. A note says if the anchors' NLL lies far below theirs. One pass, not counted.
        progress: called with finished rows x draws.

    Returns:
        The answer, with its record.

    Raises:
        ValueError: arguments out of range, or empty, unlabelled or one-class anchors.
        SearchError: the objective has no answer on these anchors, also in the extended range.
    """
    objective = default_objective(objective, metric, tolerance, search)
    check_arguments(metric, tolerance, search, objective, draws, bounds, points)
    tolerance = TOLERANCE if tolerance is None else tolerance
    _check_positive(resolution, steps=steps, prior_sigma=prior_sigma, kl_weight=kl_weight)
    form = {"pad_token_id": bayes.pad_token_id, "batch_size": batch_size}
    anchor_set = AnchorSet.of(anchors, **form)
    others = None
    if held_out is not None:
        others = AnchorSet.of(held_out, **form)
        for rows in (others, anchor_set):
            rows.check("nll")
    config = _config(bayes, metric, mode, tail, seed)
    loss = AnchorLoss(bayes, anchor_set, metric, draws=draws, config=config, progress=progress)
    if two_sided is None:
        two_sided = metric == "embedding_norm"
    curve = LossCurve(loss, metric, tolerance, relative, two_sided)
    prior = prior_sigma or default_prior_sigma(list(bayes.posteriors.values()))
    weight = kl_weight if kl_weight is not None else 1.0 / len(anchor_set)
    kl = Divergence(bayes.posteriors, prior)
    if objective != "max_variance":
        least = Objective(curve, kl if objective == "gvi" else None, weight)
        sigma, stopped = find_minimum(least, bounds=bounds, points=points, resolution=resolution)
        limits = minimum_interval(curve, sigma, least)
    elif search == "grid":
        sigma, stopped = by_grid(curve, bounds=bounds, points=points, resolution=resolution)
        limits = crossing_interval(curve, sigma)
    else:
        sigma, stopped = by_bisection(curve, bounds=bounds, resolution=resolution, steps=steps)
        limits = crossing_interval(curve, sigma)
    notes = doubts(curve, objective, sigma, limits)
    if others is not None:
        notes += compare_held_out(loss, others)
    fit = SigmaFit(
        **asdict(replace(config, sigma=sigma)),
        metric=metric,
        objective=objective,
        tolerance=tolerance,
        relative=relative,
        two_sided=two_sided,
        search=search,
        draws=draws,
        anchors=len(anchor_set),
        anchor_hash=anchor_set.content_hash,
        baseline=curve.baseline,
        limit=curve.baseline + curve.allowed if objective == "max_variance" else None,
        curve=curve.reported(),
        passes=loss.passes,
        stopped=stopped,
        interval=limits,
        notes=tuple(notes),
        kl_weight=weight if objective == "gvi" else None,
        **_variational(curve, sigma, kl),
    )
    bayes.configure(sigma=sigma, mode=fit.mode, tail=fit.tail)
    return fit


def default_objective(
    objective: str | None, metric: str, tolerance: float | None, search: str
) -> str:
    """Return the objective itself, or the one that is meant where none is named."""
    if objective is not None:
        return objective
    plain = metric == "nll" and search == "grid" and tolerance is None
    return "min_nll" if plain else "max_variance"


def check_arguments(
    metric: str,
    tolerance: float | None,
    search: str,
    objective: str,
    draws: int,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    points: int = 6,
) -> None:
    """Refuse what no search can work with; needs no model, so it can be asked before one loads.

    Raises:
        ValueError: an argument of :func:`fit_sigma` is out of range.
    """
    for name, value, known in (
        ("metric", metric, METRICS),
        ("objective", objective, OBJECTIVES),
        ("search", search, SEARCHES),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
    if objective != "max_variance" and search != "grid":
        raise ValueError(f"objective={objective!r} is a minimisation: use search='grid'")
    if objective != "max_variance" and metric not in LIKELIHOODS:
        raise ValueError(f"objective={objective!r} needs metric='nll' (or another likelihood)")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance}: expected a positive number")
    check_even(draws)
    if not 0 < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"bounds={bounds}: expected 0 < lower < upper")
    if points < 3:
        raise ValueError(f"points={points}: a grid needs at least 3")


def _check_positive(resolution: float, **numbers: float | None) -> None:
    """Refuse other arguments out of range; None is a default."""
    if not MIN_RESOLUTION <= resolution < 1:
        raise ValueError(f"resolution={resolution}: expected {MIN_RESOLUTION:g} to 1")
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: expected a positive number")


def _config(
    bayes: SearchedModel, metric: str, mode: str | None, tail: int | None, seed: int | None
) -> SamplingConfig:
    """Return how to sample during the search."""
    config = bayes.config
    if mode is not None or tail is not None:
        config = replace(config, mode=config.mode if mode is None else mode, tail=tail)
    if metric == "embedding_norm" and config.mode != "full":
        raise ValueError(f"metric='embedding_norm' needs mode='full', not {config.mode!r}")
    return config if seed is None else replace(config, seed=seed)


def _variational(curve: LossCurve, sigma: float, kl: Divergence) -> dict[str, Any]:
    """Return KL and implied lambda at the answer (Theorem 4.2)."""
    if sigma <= 0.0:
        return {"prior_sigma": kl.prior_sigma}
    # The answer's neighbours on the curve: a difference across it, not to one side, in sigma^2.
    # Objectives all end with a measured point beyond the answer.
    a = max(s for s in (0.0, *curve.points) if s < sigma)
    b = min(s for s in curve.points if s > sigma)
    slope_loss = 2 * sigma * (curve.change(b) - curve.change(a)) / (b * b - a * a)
    slope_kl = kl.slope(sigma)
    return {
        "prior_sigma": kl.prior_sigma,
        "kl": kl(sigma),
        "implied_lambda": -slope_loss / slope_kl if slope_kl != 0.0 else None,
    }
