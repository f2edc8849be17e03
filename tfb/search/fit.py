"""``fit_sigma``: how much posterior scale the anchors tolerate (TFB, section 3.3; docs/search.md).

To add an objective or a search: :mod:`tfb.search.select`; a metric: :mod:`tfb.search.loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

from tfb.data.batching import EncodedRows
from tfb.draws import check_even
from tfb.model import BayesianModel
from tfb.posterior import default_prior_sigma
from tfb.sampling.config import SamplingConfig
from tfb.sampling.state import Batch
from tfb.search.confidence import compare_held_out, crossing_interval, doubts, minimum_interval
from tfb.search.curve import LIKELIHOODS, LossCurve
from tfb.search.loss import METRICS, AnchorLoss, AnchorSet
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
    bayes: BayesianModel,
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
        bayes: the model.
        anchors: held-out rows: an :class:`AnchorSet`, encoded rows, or batches as in one.
        metric: what degrades: "nll", "accuracy", "expected_nll", and without labels "pseudo_nll"
            or "embedding_norm".
        tolerance: degradation that max_variance accepts; default 0.003.
        search: "grid", or "bisection" for max_variance.
        objective: "min_nll", "max_variance" or "gvi"; by default min_nll for metric "nll" where
            neither a tolerance nor a bisection is asked for, else max_variance.
        relative: the tolerance is relative to l(0), not in the loss's units.
        two_sided: an improvement counts as degradation too; by default for embedding_norm.
        draws: antithetic draws at each sigma.
        bounds: the first range of sigma; it is extended where needed.
        points: size of the first grid.
        resolution: relative precision of the answer on the measured curve.
        steps: most steps of a bisection.
        prior_sigma: the prior's scale for KL; by default of the adapter's own scale.
        kl_weight: lambda of gvi; default 1 / anchors.
        seed: of the noise and of the anchors' order; default: the model's.
        batch_size: of encoded rows.
        mode: "full" or "tail", here and in later predictions; default: the model's.
        tail: positions with noise in tail mode.
        held_out: labelled rows, as anchors, surely not trained on: a note says if the anchors' NLL
            lies far below theirs.
        progress: called with finished rows x draws.

    Raises:
        ValueError: arguments out of range, or empty, unlabelled or one-class anchors.
        SearchError: the objective has no answer on these anchors.
    """
    objective = default_objective(objective, metric, tolerance, search)
    check_arguments(metric, tolerance, search, objective, draws, bounds, points)
    tolerance = TOLERANCE if tolerance is None else tolerance
    _check_positive(resolution, steps=steps, prior_sigma=prior_sigma, kl_weight=kl_weight)
    form = {"pad_token_id": bayes.pad_token_id, "batch_size": batch_size}
    anchor_set = AnchorSet.of(anchors, **form)
    others = None if held_out is None else AnchorSet.of(held_out, **form)
    if others is not None:
        others.check("nll")
        anchor_set.check("nll")
    config = _config(bayes, metric, mode, tail, seed)
    loss = AnchorLoss(bayes, anchor_set, metric, draws=draws, config=config, progress=progress)
    if two_sided is None:
        two_sided = metric == "embedding_norm"
    curve = LossCurve(loss, metric, tolerance, relative, two_sided)
    prior = prior_sigma or default_prior_sigma(list(bayes.posteriors.values()))
    weight = kl_weight or 1.0 / len(anchor_set)
    kl = Divergence(bayes.posteriors, prior)
    if objective != "max_variance":
        least = Objective(curve, kl if objective == "gvi" else None, weight)
        sigma, stopped = find_minimum(least, bounds=bounds, points=points, resolution=resolution)
        limits = minimum_interval(curve, sigma, least)
    else:
        if search == "grid":
            sigma, stopped = by_grid(curve, bounds=bounds, points=points, resolution=resolution)
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
    """Return the objective that is meant."""
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
    """Refuse what no search can work with, before a model loads."""
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
    bayes: BayesianModel, metric: str, mode: str | None, tail: int | None, seed: int | None
) -> SamplingConfig:
    """Return how to sample during the search."""
    config = bayes.config
    if mode is not None or tail is not None:
        config = replace(config, mode=config.mode if mode is None else mode, tail=tail)
    if metric == "embedding_norm" and config.mode != "full":
        raise ValueError(f"metric='embedding_norm' needs mode='full', not {config.mode!r}")
    return config if seed is None else replace(config, seed=seed)


def _variational(curve: LossCurve, sigma: float, kl: Divergence) -> dict[str, Any]:
    """Return KL and implied lambda at the answer (Theorem 4.2), by a difference across it."""
    if sigma == 0.0:
        return {"prior_sigma": kl.prior_sigma}
    a = max(s for s in (0.0, *curve.points) if s < sigma)
    b = min(s for s in curve.points if s > sigma)
    slope_loss = 2 * sigma * (curve.change(b) - curve.change(a)) / (b * b - a * a)
    slope_kl = kl.slope(sigma)
    return {
        "prior_sigma": kl.prior_sigma,
        "kl": kl(sigma),
        "implied_lambda": -slope_loss / slope_kl if slope_kl != 0.0 else None,
    }
