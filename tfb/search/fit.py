"""The sigma search: how much posterior scale the anchors tolerate (TFB, section 3.3).

    objective      answer                                           use it
    min_nll        the sigma of least loss                          the default with metric nll:
                                                                    labelled, held-out anchors
    max_variance   the largest sigma, connected to 0, with          the paper's rule, taken where a
                   l(sigma) - l(0) <= tolerance                     tolerance is given, and by other
                                                                    metrics and searches
    gvi            the sigma of least l(sigma) + lambda KL(q || p)  for study: a prior you mean
                   (Theorem 4.2)

On held-out rows of an over-confident adapter the loss first falls, and max_variance goes past its
least value until all of the improvement is used up; where the adapter's NLL is above that of a
guess, to predictions that are one (benchmarks/calibration). Hence the default.

    metric          anchors                     use it
    nll             labelled, held out          the default: calibration on rows like these
    accuracy        labelled, held out          only decisions count; needs many rows, since the
                                                error rate moves in steps of 1 / N
    expected_nll    labelled                    with gvi: the likelihood of an ELBO
    pseudo_nll      unlabelled                  how much predictions may move away from the
                                                adapter's own; it rises whether or not variance
                                                helps, so it says nothing of calibration and has
                                                no minimum worth finding
    embedding_norm  unlabelled, without choices the last hidden state's norm; two-sided

On training rows nll rises at once: min_nll returns 0 and max_variance a sigma far too small; a note
says so. gvi pushes back by its KL, with the default prior up to a sigma that ruins the adapter on
one of the tasks measured: judge its answer on held-out rows.

Only a worse loss counts as degradation unless ``two_sided``. All sigmas share antithetic streams
(common random numbers), without which the curve is not even monotone. The crossing is found on
few anchors first and on all of them in the end (:mod:`tfb.search.curve`, :mod:`tfb.search.crossing`). Two
precisions are told apart: that of the crossing of the curve measured with these streams on these
anchors (``resolution``, ``SigmaFit.stopped``), and how well that curve is known at all
(``SigmaFit.interval``, :mod:`tfb.search.interval`), which is usually the wider by far.

``gvi`` with metric="expected_nll" and lambda = 1 / |D|, D the rows of the likelihood, is ordinary
variational inference over sigma: l + KL / |D| = -ELBO / |D|. With metric="nll" the likelihood is
that of the averaged prediction, which by Jensen's inequality is never the worse one.

To add an objective: :mod:`tfb.search.minimum`; a search: :mod:`tfb.search.crossing`; a metric: :mod:`tfb.search.loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tfb.model import BayesianModel
from tfb.posterior import default_prior_sigma
from tfb.scoring.rows import pad_token
from tfb.search.crossing import Bisection, GridSearch, RootSearch, Search, find_crossing
from tfb.search.curve import LIKELIHOODS, LossCurve
from tfb.search.doubts import compare_held_out, doubts
from tfb.search.interval import crossing_interval, minimum_interval
from tfb.search.loss import METRICS, AnchorLoss, AnchorSet
from tfb.search.minimum import Divergence, Objective, find_minimum
from tfb.search.reference_rule import REFERENCE_BOUNDS, reference_rule
from tfb.search.result import CurvePoint, SearchError, SigmaFit

__all__ = [
    "CurvePoint",
    "SearchError",
    "SigmaFit",
    "check_arguments",
    "default_objective",
    "fit_sigma",
]

OBJECTIVES = ("max_variance", "min_nll", "gvi")
SEARCHES = ("grid", "root", "bisection")
MIN_RESOLUTION = 1e-9  # a bracket cannot be narrower than a few ulp
DEFAULT_BOUNDS = (1e-3, 0.1)
SEARCH_DRAWS = 4
TOLERANCE = 0.003


def fit_sigma(
    bayes: BayesianModel,
    anchors: Any,
    metric: str = "nll",
    tolerance: float | None = None,
    search: str = "grid",
    *,
    objective: str | None = None,
    relative: bool = True,
    two_sided: bool | None = None,
    draws: int | None = None,
    bounds: tuple[float, float] | None = None,
    points: int = 6,
    resolution: float = 0.01,
    steps: int = 12,
    prior_sigma: float | None = None,
    kl_weight: float | None = None,
    seed: int | None = None,
    batch_size: int = 50,
    mode: str | None = None,
    tail: int | None = None,
    compat: str | None = None,
    held_out: Any = None,
    progress: Callable[[int], None] | None = None,
) -> SigmaFit:
    """Search sigma on anchors and set ``bayes.sigma``, ``bayes.mode`` and ``bayes.tail``.

    Args:
        bayes: the model. anchors: an :class:`AnchorSet`, encoded rows, or batches (dicts of
            tokenizer tensors with "labels" and, for causal LMs, "label_ids").
        metric, objective: what degrades, and what is looked for; see the head of this file.
            objective None: "min_nll" with metric "nll", search "grid" and no tolerance given;
            else "max_variance".
        tolerance: accepted degradation of max_variance, default 0.003; ``relative`` to l(0) (for
            accuracy: to the accuracy), with a floor of 0.01 nats under a relative NLL, or absolute
            in the loss's units.
        search: "grid", "root" or "bisection" (:mod:`tfb.search.crossing`; max_variance only).
        two_sided: also count an improved loss as change (default: for embedding_norm).
        draws: antithetic draws at each sigma, default 4 (compat: 10, as in the scripts).
        bounds: the first range of sigma, default (0.001, 0.1), extended by itself (compat: the
            scripts' fixed range, default (0.001, 0.015)). points: grid size. resolution:
            relative precision of the crossing. steps: most bisection steps.
        prior_sigma: the prior's scale for KL; default: the adapter's own scale
            (:func:`tfb.posterior.default_prior_sigma`). kl_weight: lambda of gvi, default
            1 / anchors; 1 / training rows where the anchors are a sample of those.
        mode, tail: how draws reach the model, in the search as in later predictions ("full";
            "tail" with k positions, see :meth:`BayesianModel.predict`); default: the model's own.
        seed: of the noise and of the anchors' order, default ``bayes.seed``.
        compat: "reference" follows the authors' scripts to the letter, mistakes included (see
            :func:`tfb.search.reference_rule.reference_rule`), for differential tests.
        held_out: labelled rows in any form that anchors have, known not to be training rows: a
            note says if the anchors' NLL lies far below theirs. One pass over them, not counted.
        progress: called with finished rows x draws.

    Returns:
        :class:`SigmaFit`.

    Raises:
        ValueError: arguments out of range, empty, unlabelled or one-class anchors.
        SearchError: nothing brackets the tolerance, also in the extended range.
    """
    reference = compat == "reference"
    objective = default_objective(objective, metric, tolerance, search, compat)
    tolerance = TOLERANCE if tolerance is None else tolerance
    if bounds is None:
        bounds = REFERENCE_BOUNDS if reference else DEFAULT_BOUNDS
    if draws is None:
        draws = 10 if reference else SEARCH_DRAWS
    check_arguments(metric, tolerance, search, objective, draws, bounds, points, compat)
    if not MIN_RESOLUTION <= resolution < 1:
        raise ValueError(f"resolution={resolution}: expected {MIN_RESOLUTION:g} to 1")
    for name, value in (("steps", steps), ("prior_sigma", prior_sigma), ("kl_weight", kl_weight)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: expected a positive number")
    pad = pad_token(bayes)
    anchor_set = AnchorSet.of(anchors, pad_token_id=pad, batch_size=batch_size)
    others = None
    if held_out is not None:
        others = AnchorSet.of(held_out, pad_token_id=pad, batch_size=batch_size)
        for rows in (others, anchor_set):
            rows.check("nll")
    seed = bayes.seed if seed is None else seed
    before = bayes.mode, bayes.tail
    if mode is not None or tail is not None:
        bayes.set_mode(bayes.mode if mode is None else mode, tail)
    try:
        if metric == "embedding_norm" and bayes.mode != "full":
            raise ValueError(f"metric='embedding_norm' needs mode='full', not {bayes.mode!r}")
        if reference:
            loss = AnchorLoss(
                bayes, anchor_set, "pseudo_nll", draws=draws, seed=seed, noise="token",
                progress=progress, additive_floor=True,
            )  # fmt: skip
            fit = reference_rule(loss, bayes, tolerance=tolerance, lower=bounds[0], upper=bounds[1])
            if others is not None:
                fit = replace(fit, notes=tuple(compare_held_out(loss, others)))
        else:
            loss = AnchorLoss(bayes, anchor_set, metric, draws=draws, seed=seed, progress=progress)
            curve = LossCurve(
                loss=loss,
                metric=metric,
                tolerance=tolerance,
                relative=relative,
                two_sided=metric == "embedding_norm" if two_sided is None else two_sided,
            )
            searches: dict[str, Search] = {
                "grid": GridSearch(bounds, points, resolution),
                "root": RootSearch(bounds, points, resolution),
                "bisection": Bisection(bounds, points, resolution, steps),
            }
            prior = prior_sigma or default_prior_sigma(list(bayes.posteriors.values()))
            weight = kl_weight if kl_weight is not None else 1.0 / len(anchor_set)
            kl = Divergence(bayes.posteriors, bayes.layer_scales, prior)
            if objective == "max_variance":
                sigma, stopped = find_crossing(searches[search], curve)
                limits = crossing_interval(curve, sigma)
            else:
                least = Objective(curve, kl if objective == "gvi" else None, weight)
                sigma, stopped = find_minimum(
                    least, bounds=bounds, points=points, resolution=resolution
                )
                limits = minimum_interval(curve, sigma, least)
            notes = doubts(curve, objective, sigma, limits)
            if others is not None:
                notes += compare_held_out(loss, others)
            fit = SigmaFit(
                sigma=sigma,
                metric=metric,
                objective=objective,
                tolerance=tolerance,
                relative=relative,
                two_sided=curve.two_sided,
                search=search,
                mode=bayes.mode,
                tail=bayes.tail,
                draws=draws,
                seed=seed,
                anchors=len(anchor_set),
                anchor_hash=anchor_set.content_hash,
                baseline=curve.baseline,
                limit=curve.baseline + curve.allowed if objective == "max_variance" else None,
                curve=curve.reported(),
                passes=loss.passes,
                stopped=stopped,
                interval=limits,
                notes=tuple(notes),
                family=bayes.family,
                kl_weight=weight if objective == "gvi" else None,
                **_variational(curve, sigma, kl),
            )
    except BaseException:
        bayes.mode, bayes.tail = before  # a sigma of an earlier search belongs to that mode
        raise
    bayes.sigma = fit.sigma
    return fit


def default_objective(
    objective: str | None,
    metric: str,
    tolerance: float | None,
    search: str,
    compat: str | None = None,
) -> str:
    """The objective itself, or the one that is meant where none is named."""
    if objective is not None:
        return objective
    plain = metric == "nll" and search == "grid" and tolerance is None and compat is None
    return "min_nll" if plain else "max_variance"


def check_arguments(
    metric: str,
    tolerance: float,
    search: str,
    objective: str,
    draws: int,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    points: int = 6,
    compat: str | None = None,
) -> None:
    """Refuse what no search can work with; needs no model, so the CLI asks before it loads one."""
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: expected one of {', '.join(METRICS)}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}: expected one of {', '.join(OBJECTIVES)}")
    if search not in SEARCHES:
        raise ValueError(f"search={search!r}: expected one of {', '.join(SEARCHES)}")
    if compat not in (None, "reference"):
        raise ValueError(f"compat={compat!r}: expected None or 'reference'")
    if objective != "max_variance" and search != "grid":
        raise ValueError(f"objective={objective!r} is a minimisation: use search='grid'")
    if objective in ("min_nll", "gvi") and metric not in LIKELIHOODS:
        raise ValueError(f"objective={objective!r} needs metric='nll' (or another likelihood)")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance={tolerance}: expected a positive number")
    if draws < 2 or draws % 2:
        raise ValueError(f"draws={draws}: the search uses antithetic pairs, pass an even number")
    if not 0 < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"bounds={bounds}: expected 0 < lower < upper")
    if points < 3:
        raise ValueError(f"points={points}: a grid needs at least 3")


def _variational(curve: LossCurve, sigma: float, kl: Divergence) -> dict[str, Any]:
    """KL and implied lambda at the answer (Theorem 4.2)."""
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
