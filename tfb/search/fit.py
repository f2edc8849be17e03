"""``fit_sigma``: the noise, and the temperature, that anchors support (docs/search.md).

To add an objective: a rule in :mod:`tfb.search.select`; a metric: :mod:`tfb.search.loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from tfb.data.batching import EncodedRows
from tfb.draws import check_even
from tfb.evaluation.metrics import nll_of_rows
from tfb.module import BayesianModule
from tfb.posterior import LowRankPosterior, default_prior_sigma
from tfb.sampling.config import SamplingConfig
from tfb.sampling.state import Batch
from tfb.search.answers import NEAR_ZERO, losses_at, surprise
from tfb.search.loss import (
    METRICS,
    AnchorLoss,
    AnchorSet,
    LossMatrix,
    MetricLike,
    SearchedModel,
    metric_of,
    name_of,
    standard_error,
)
from tfb.search.result import CurvePoint, PredictiveFit
from tfb.search.select import (
    SIGNIFICANT,
    Crossing,
    Least,
    Rule,
    by_bisection,
    by_grid,
    change_limits,
    less_accurate,
    part_of,
)

OBJECTIVES = ("min_nll", "max_variance", "gvi")
SEARCHES = ("grid", "bisection")
DEFAULT_BOUNDS = (1e-3, 0.1)
SEARCH_DRAWS = 8
NEARLY_ALL = 0.95  # on training rows: right, or an answer's loss near 0
FEW = 50  # anchors: at 10 and 20 of them, noise and T that they asked for made new rows worse
TRAINED_ON = (
    "the anchors look like rows that the adapter was trained on: it knows nearly every {}, and is "
    "as sure as it is right; use held-out rows"
)
NLL_FLOOR = 0.01  # nats: below this a relative tolerance on the NLL is ill-conditioned

Anchors = AnchorSet | EncodedRows | Iterable[Batch | Sequence[torch.Tensor]]


def fit_sigma(
    bayes: SearchedModel,
    anchors: Anchors,
    metric: MetricLike = "nll",
    tolerance: float | None = None,
    search: str = "grid",
    *,
    objective: str | None = None,
    temperature: bool = True,
    sigma: float | None = None,
    relative: bool = True,
    draws: int = SEARCH_DRAWS,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    steps: int = 12,
    prior_sigma: float | None = None,
    kl_weight: float | None = None,
    seed: int | None = None,
    batch_size: int = 50,
    mode: str | None = None,
    tail: int | None = None,
    progress: Callable[[int], None] | None = None,
    sweeps: MutableMapping[str, torch.Tensor] | None = None,
) -> PredictiveFit:
    """Fit the noise sigma and the temperature T to anchors, and configure the model with both.

    The default minimises the NLL of mean_s softmax(z_s / T) over both. Without ``temperature`` it
    is TFB at the sigma of least NLL, with ``objective="max_variance"`` TFB by the paper's rule
    (section 3.3), and at ``sigma=0`` temperature scaling (Guo et al. 2017). Of a row with an answer
    the NLL is the mean over the answer's tokens, each given those before it.

    Args:
        bayes: the model.
        anchors: held-out rows: an :class:`AnchorSet`, encoded rows, or batches as in one.
        metric: the loss: "nll", "accuracy", "expected_nll", and without labels "pseudo_nll" or
            "embedding_norm". Or a function of all draws' outputs [S, B, ...] (logits [S, B, K] of
            a PEFT model) and their batch, both on the outputs' device, that returns a loss of each
            row [B]: it also says how draws are averaged. T is not fitted to it.
        tolerance: degradation that max_variance accepts; default 0.003, of the accuracy 0.01.
        search: "grid", or "bisection" for max_variance.
        objective: "min_nll", "max_variance" or "gvi"; by default min_nll for metric "nll" and loss
            functions where neither a tolerance nor a bisection is asked for, else max_variance.
        temperature: min_nll of metric nll fits T too; everything else leaves it 1.
        sigma: fit T alone, at this sigma.
        relative: the tolerance is relative to the adapter's loss, not in the loss's units.
        draws: antithetic draws at each sigma.
        bounds: the first range of sigma; it is extended where needed.
        steps: most steps of a bisection.
        prior_sigma: the prior's scale for KL; by default of the adapter's own scale.
        kl_weight: lambda of gvi; default 1 / anchors.
        seed: of the search's noise and of the first level's anchors; default: the model's, which
            later predictions have in any case.
        batch_size: of encoded rows.
        mode: "full" or "tail", here and in later predictions; default: the model's.
        tail: positions with noise in tail mode.
        progress: called with finished rows x draws.
        sweeps: outputs of finished sweeps are put here and found here again, so that the same call
            takes an interrupted search up where it was. They hold for this very model. Not with a
            loss function, which no key can name.

    Raises:
        ValueError: arguments out of range, empty, unlabelled or one-class anchors, or outputs or
            losses of another form.
        SearchError: the objective has no answer on these anchors.
    """
    objective = default_objective(objective, metric, tolerance, search)
    check_arguments(metric, tolerance, search, objective, draws, bounds, temperature, sigma)
    _check_positive(steps=steps, prior_sigma=prior_sigma, kl_weight=kl_weight)
    if callable(metric) and sweeps is not None:
        raise ValueError("sweeps: losses of a function cannot be told apart; use a named metric")
    tolerance = metric_of(metric).tolerance if tolerance is None else tolerance
    fits_temperature = temperature and objective == "min_nll" and metric == "nll"
    anchor_set = AnchorSet.of(anchors, pad_token_id=bayes.pad_token_id, batch_size=batch_size)
    config = _config(bayes, metric, mode, tail, seed)
    loss = AnchorLoss(
        bayes,
        anchor_set,
        metric,
        draws=draws,
        config=config,
        temperature=fits_temperature,
        progress=progress,
        sweeps=sweeps,
    )
    posteriors = list(bayes.posteriors.values())
    kl = Divergence(posteriors, prior_sigma or default_prior_sigma(posteriors))
    weight = kl_weight or 1.0 / len(anchor_set)
    allowed = _allowance(metric, tolerance, relative)
    rule: Rule
    if objective == "max_variance":
        rule = Crossing(allowed, two_sided=metric == "embedding_norm")
    else:
        gvi = objective == "gvi"
        rule = Least(lambda s: weight * kl(s) if gvi else 0.0, guarded=not gvi, margin=tolerance)
    seen = None
    if sigma is not None:
        whole = loss([sigma] if sigma > 0 else [])
    elif isinstance(rule, Crossing) and search == "bisection":
        whole = by_bisection(loss, rule, bounds[1], steps)
    else:
        seen, whole = by_grid(loss, rule, part_of(len(anchor_set), config.seed), bounds)
    verdict = _verdict(rule, whole, loss, sigma)
    fit = PredictiveFit(
        **asdict(replace(config, sigma=verdict.sigma, temperature=verdict.temperature)),
        metric=name_of(metric),
        objective=objective,
        tolerance=tolerance,
        relative=relative,
        search=search,
        draws=draws,
        anchors=len(anchor_set),
        anchor_hash=anchor_set.content_hash,
        baseline=(baseline := float(whole.means[0])),
        limit=baseline + float(allowed(np.array(baseline))) if isinstance(rule, Crossing) else None,
        curve=_curve(whole, seen),
        passes=loss.passes,
        stopped=verdict.text,
        interval=rule.limits(whole, seen) if sigma is None and len(anchor_set) > 1 else None,
        change=verdict.change,
        notes=verdict.notes,
        untempered_sigma=sigma or _untempered(rule, whole, seen, loss),
        kl_weight=weight if objective == "gvi" else None,
        **_variational(whole, verdict.sigma, kl),
    )
    bayes.configure(sigma=fit.sigma, temperature=fit.temperature, mode=fit.mode, tail=fit.tail)
    if not isinstance(bayes, BayesianModule):
        bayes.decisions = None  # whatever rows they were made on, the fit is a new one
    return fit


def default_objective(
    objective: str | None, metric: MetricLike, tolerance: float | None, search: str
) -> str:
    """Return the objective that is meant."""
    if objective is not None:
        return objective
    plain = (metric == "nll" or callable(metric)) and search == "grid" and tolerance is None
    return "min_nll" if plain else "max_variance"


def check_arguments(
    metric: MetricLike,
    tolerance: float | None,
    search: str,
    objective: str,
    draws: int,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    temperature: bool = True,
    sigma: float | None = None,
) -> None:
    """Refuse what no search can work with, before a model loads."""
    for name, value, known in (
        ("metric", metric, tuple(METRICS)),
        ("objective", objective, OBJECTIVES),
        ("search", search, SEARCHES),
    ):
        if value not in known and not (name == "metric" and callable(metric)):
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
    if objective != "max_variance" and search != "grid":
        raise ValueError(f"objective={objective!r} is a minimisation: use search='grid'")
    if objective != "max_variance" and not metric_of(metric).likelihood:
        raise ValueError(f"objective={objective!r} needs metric='nll' (or another likelihood)")
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance}: expected a positive number")
    check_even(draws)
    if not 0 < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"bounds={bounds}: expected 0 < lower < upper")
    if sigma is not None:
        SamplingConfig(sigma=sigma)  # refuses what cannot be
        if not (temperature and (metric, objective) == ("nll", "min_nll")):
            raise ValueError(
                f"sigma={sigma} leaves the temperature to fit: use metric='nll', "
                "objective='min_nll' and temperature=True"
            )


def _check_positive(**numbers: float | None) -> None:
    """Refuse other arguments out of range; None is a default."""
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: expected a positive number")


def _config(
    bayes: SearchedModel, metric: MetricLike, mode: str | None, tail: int | None, seed: int | None
) -> SamplingConfig:
    """Return how to sample during the search."""
    config = bayes.config
    if mode is not None or tail is not None:
        config = replace(config, mode=config.mode if mode is None else mode, tail=tail)
    if isinstance(bayes, BayesianModule) and (metric == "embedding_norm" or config.mode != "full"):
        raise ValueError(
            f"metric={name_of(metric)!r}, mode={config.mode!r}: 'embedding_norm' and mode='tail' "
            "are for PEFT models; give a loss function, and mode='full'"
        )
    if metric == "embedding_norm" and config.mode != "full":
        raise ValueError(f"metric='embedding_norm' needs mode='full', not {config.mode!r}")
    return config if seed is None else replace(config, seed=seed)


def _allowance(
    metric: MetricLike, tolerance: float, relative: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """Return what a tolerance allows, as a function of the adapter's loss."""
    if not relative:
        return lambda loss: np.full_like(loss, tolerance)
    if metric == "accuracy":  # the loss is the error rate
        return lambda loss: tolerance * (1.0 - loss)
    floor = NLL_FLOOR if isinstance(metric, str) and METRICS[metric].likelihood else 0.0
    return lambda loss: tolerance * np.maximum(abs(loss), floor)


@dataclass(frozen=True)
class Divergence:
    """KL(q || p) in nats as a function of sigma, for one isotropic prior."""

    posteriors: Sequence[LowRankPosterior]
    prior_sigma: float

    def __call__(self, sigma: float) -> float:
        """Return KL(q || p); it diverges at sigma = 0."""
        if sigma == 0.0:
            return math.inf
        return sum(p.kl(sigma, self.prior_sigma) for p in self.posteriors)

    def slope(self, sigma: float) -> float:
        """Return d KL / d sigma."""
        entries = sum(p.effective_rank * p.in_features for p in self.posteriors)
        return entries * (sigma / self.prior_sigma**2 - 1.0 / sigma)


# --- the verdict ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """The answer, in numbers and in words; see :class:`PredictiveFit`."""

    sigma: float
    temperature: float
    text: str
    change: tuple[float, float] | None
    notes: tuple[str, ...]


def _verdict(rule: Rule, matrix: LossMatrix, loss: AnchorLoss, fixed: float | None) -> Verdict:
    """Judge what was measured on all anchors; ``fixed`` is the sigma that is not searched."""
    notes, suspicious = _doubts(loss)
    if isinstance(rule, Crossing):
        return _crossing(rule, matrix, notes)
    assert isinstance(rule, Least)
    best = rule.best(matrix) if fixed is None else len(matrix.points) - 1
    if not rule.guarded or fixed:
        text = "T of least loss at this sigma" if fixed else "the least objective measured"
        notes += _losses_of_accuracy(matrix, best)
        return Verdict(*matrix.points[best], text, change_limits(matrix, best), tuple(notes))
    if fixed is None and (free := rule.best(matrix, guarded=False)) != best:
        where = "sigma = {:.3g}, T = {:.3g}".format(*matrix.points[free])
        notes.append(f"{where} has the least loss, but there {_fall(matrix, free)}: not chosen")
    if suspicious:
        text = "keep the adapter: these anchors cannot tell how sure it should be"
        return Verdict(0.0, 1.0, text, None, tuple(notes))
    scaled = int((matrix.sigmas == 0).nonzero()[-1])  # T alone, where T is fitted
    # Noise has to be sure beside T alone, which costs one pass and never changes a prediction.
    for g, others in ((best, (scaled, 0)), (scaled, (0,))):
        if all(matrix.gain(other, g) > matrix.standard_error(g, other) for other in others):
            limits = change_limits(matrix, g)
            if limits is not None and limits[1] >= 0.0:
                notes.append(
                    "the 95 % interval of the change of the loss includes 0: more anchors would "
                    "tell whether this helps"
                )
            return Verdict(*matrix.points[g], _gain(matrix, g, best), limits, tuple(notes))
    text = "keep the adapter: nothing that was tried lowers the loss enough"
    if best != 0:
        text = (
            "keep the adapter: sigma = {:.3g}, T = {:.3g} lowers the loss by no more than its "
            "standard error over anchors".format(*matrix.points[best])
        )
    return Verdict(0.0, 1.0, text, change_limits(matrix, best), tuple(notes))


def _gain(matrix: LossMatrix, g: int, best: int) -> str:
    """Say what the answer g gains, and how that is shared by T and noise."""
    scaled = int((matrix.sigmas == 0).nonzero()[-1])
    text = f"the loss falls by {matrix.gain(0, g):.2g}"
    if g != best:
        return f"{text}; noise lowers it further by no more than the standard error of that"
    if g > scaled > 0:
        text += f", {matrix.gain(scaled, g):.2g} of it beyond T alone"
    return text


def _untempered(
    rule: Rule, whole: LossMatrix, seen: LossMatrix | None, loss: AnchorLoss
) -> float | None:
    """Return the sigma of the same rule at T = 1; None where T is not fitted."""
    if not whole.plain or not seen or not seen.plain or not isinstance(rule, Least):
        return None
    least, most = whole.plain.sigmas[[1, -1]].tolist()
    near, far = (float(m.sigmas[rule.best(m)]) for m in (whole.plain, seen.plain))
    # Level 2 lies around the answer with T; without T the least may lie elsewhere.
    beyond = not least < near < most and far > 0 and not least <= far <= most
    return _verdict(rule, seen.plain if beyond else whole.plain, loss, None).sigma


def _crossing(rule: Crossing, matrix: LossMatrix, notes: list[str]) -> Verdict:
    sigma, place = rule.crossing(matrix)
    low, high = matrix.sigmas[place - 1 : place + 1].tolist()
    notes += _losses_of_accuracy(matrix, place - 1)
    text = f"the loss crosses the tolerance between {low:.3g} and {high:.3g}"
    return Verdict(sigma, 1.0, text, None, tuple(notes))


def _losses_of_accuracy(matrix: LossMatrix, g: int) -> list[str]:
    """Return a note where accuracy is significantly lower at the answer, point g."""
    return [f"at this sigma {_fall(matrix, g)}"] if less_accurate(matrix, g) else []


def _fall(matrix: LossMatrix, g: int) -> str:
    """Say how accuracy fell at point g."""
    assert matrix.correct is not None
    was, now = (100 * float(matrix.correct[i].double().mean()) for i in (0, g))
    return f"accuracy falls from {was:.1f} to {now:.1f} % of the anchors, which is significant"


def _doubts(loss: AnchorLoss) -> tuple[list[str], bool]:
    """Return notes on the anchors, and whether they look like the adapter's training rows."""
    notes, suspicious = _doubtful_rows(loss)
    if (few := len(loss.anchors)) < FEW:
        notes.append(f"only {few} anchors: what they ask for may be chance; take 200 or more")
    return notes, suspicious


def _doubtful_rows(loss: AnchorLoss) -> tuple[list[str], bool]:
    """Judge labelled anchors by the adapter's own predictions.

    Returns:
        Notes, and whether the anchors look like the adapter's training rows.
    """
    log_probs, labels = loss.log_probs, loss.anchors.labels
    if loss.answer_losses is not None:
        return _doubtful_answers(loss.answer_losses)
    if log_probs is None or labels is None or loss.metric == "pseudo_nll":
        return [], False
    probs = log_probs.exp()
    found, (N, K), there = [], probs.shape, len(labels.unique())
    choices = log_probs.isfinite().sum(-1).clamp_min(2).double()
    # With ten rows a label, evenly frequent labels miss one with a probability of about K e^-10.
    if there < K and N >= 10 * K and bool((choices == K).all()):
        found.append(
            f"only {there} of {K} labels occur among the {N} anchors: if their file is sorted, "
            "shuffle it before its first rows are taken"
        )
    nll, right = nll_of_rows(probs, labels), int((probs.argmax(-1) == labels).sum())
    # An over-confident adapter can have a worse NLL than a guess, and be right most of the time.
    lead = choices.log() - nll
    by_chance = binomtest(right, N, float((1 / choices).mean()), alternative="greater").pvalue
    if float(lead.mean()) < 2 * standard_error(lead) and by_chance > SIGNIFICANT:
        found.append(
            "the adapter is no better than a guess on these anchors: check that the base model, "
            "the rows' format and their labels are those it was trained with"
        )
    # The NLL of an over-fitted adapter exceeds the entropy of its predictions on held-out rows.
    surprise = nll - torch.special.entr(probs).sum(-1)
    known = right >= NEARLY_ALL * N and float(nll.mean()) < NEAR_ZERO * math.log(K)
    if suspicious := known and float(surprise.mean()) < 2 * standard_error(surprise):
        found.append(TRAINED_ON.format("label"))
    return found, suspicious


def _doubtful_answers(losses: torch.Tensor) -> tuple[list[str], bool]:
    """Judge answers by the adapter's losses [n, G]; see :func:`_doubtful_rows`."""
    known = int((losses_at(losses, 1.0) < NEAR_ZERO).sum()) >= NEARLY_ALL * len(losses)
    more = surprise(losses)
    suspicious = known and float(more.mean()) < 2 * standard_error(more)
    return [TRAINED_ON.format("answer")] if suspicious else [], suspicious


# --- the record -----------------------------------------------------------------------------------


def _curve(whole: LossMatrix, seen: LossMatrix | None) -> tuple[CurvePoint, ...]:
    """Return all points; of level 1 those that all anchors have not seen."""
    base = float(whole.means[0])

    def points(matrix: LossMatrix) -> list[CurvePoint]:
        found = []
        for g, (sigma, T) in enumerate(matrix.points):
            error = matrix.standard_error(g)
            right = None if matrix.correct is None else float(matrix.correct[g].double().mean())
            loss = base + float(matrix.means[g] - matrix.means[0])
            count = matrix.losses.shape[1]
            found.append(
                CurvePoint(sigma, loss, error if math.isfinite(error) else None, T, right, count)
            )
        return found

    found = points(whole)
    if seen is not None:
        own = [p.sigma for p in found]
        found += [p for p in points(seen) if not any(math.isclose(p.sigma, s) for s in own)]
    return tuple(sorted(found, key=lambda p: p.sigma))


def _variational(matrix: LossMatrix, sigma: float, kl: Divergence) -> dict[str, Any]:
    """Return KL and implied lambda at the answer (Theorem 4.2), by a difference across it."""
    if sigma == 0.0:
        return {"prior_sigma": kl.prior_sigma}
    found: dict[str, Any] = {"prior_sigma": kl.prior_sigma, "kl": kl(sigma)}
    below = (matrix.sigmas < sigma).nonzero()[-1]
    above = (matrix.sigmas > sigma).nonzero()[:1]
    if len(above):
        a, b = float(matrix.sigmas[below]), float(matrix.sigmas[above])
        change = float(matrix.means[above] - matrix.means[below])
        slope = 2 * sigma * change / (b * b - a * a)
        found["implied_lambda"] = -slope / kl.slope(sigma) if kl.slope(sigma) else None
    return found
