"""The sigma search on losses known in closed form, and on a small model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.losses import ENTRIES, POSTERIORS, PRIOR, Curve, N, WavyLoss, anchor_set, find, power
from support.models import CASES, exact, make_batch

import tfb
from tfb import Draws, SearchError, SigmaFit
from tfb.search import fit as search
from tfb.search.fit import SEARCHES
from tfb.search.loss import AnchorSet
from tfb.search.select import CLOSE

# --- max_variance: the crossing -----------------------------------------------------------------


@pytest.mark.parametrize("resolution", [0.01, 0.001])
@pytest.mark.parametrize("crossing", [2e-5, 1.0e-3, 0.017, 0.1, 3.0, 300.0])
@pytest.mark.parametrize("how", SEARCHES)
def test_known_crossing_is_found_to_resolution(
    how: str, crossing: float, resolution: float
) -> None:
    """Also far outside the first range, in both directions."""
    fit, loss, _ = find(power(crossing), search=how, resolution=resolution, steps=60)
    assert crossing * (1 - resolution) <= fit.sigma <= crossing
    assert fit.baseline == 1.0 and fit.limit == pytest.approx(1.003, abs=1e-15)
    assert fit.passes == loss.passes == 1 + 4 * len(loss.asked)


@given(
    crossing=st.floats(1e-6, 100.0),
    exponent=st.floats(0.3, 4.0),
    how=st.sampled_from(SEARCHES),
)
def test_answer_was_measured_and_never_violates(crossing: float, exponent: float, how: str) -> None:
    """Concave curves too, where a chord overshoots the crossing. The chord of a bracket of
    relative width w <= 8 % falls short by at most (exponent - 1) w^2 / 8 < resolution."""
    curve = power(crossing, exponent)
    fit, loss, _ = find(curve, search=how, steps=60)
    assert curve(fit.sigma) - 1.0 <= 0.003
    assert crossing * 0.99 <= fit.sigma <= crossing * (1 + 1e-12)
    assert fit.sigma in loss.asked
    assert len(set(loss.asked)) == len(loss.asked)  # nothing is measured twice
    assert [p.sigma for p in fit.curve] == sorted([0.0, *loss.asked])


@pytest.mark.parametrize("how", SEARCHES)
@given(edge=st.floats(1e-5, 10.0))
def test_answer_of_a_step_lies_below_it(how: str, edge: float) -> None:
    """An error rate is a step function: the last point below the step, to resolution."""
    fit, _, _ = find(lambda s: 0.1 if s <= edge else 0.2, search=how, metric="accuracy", steps=60)
    assert edge / 1.01 <= fit.sigma <= edge


@pytest.mark.parametrize("how", SEARCHES)
@given(edge=st.floats(1e-4, 1.0))
def test_a_cliff_after_a_gentle_rise(how: str, edge: float) -> None:
    """Interpolation puts the crossing just above the last accepted sigma, again and again, with
    enough anchors for parts of them to decide. The grid takes such a curve for a smooth one and
    stops early, at an accepted sigma; its record says how wide the bracket was."""

    def curve(sigma: float) -> float:
        return 1.0 + 0.0029 * (sigma / edge) ** 2 if sigma <= edge else 1.5

    fit, _, _ = find(curve, search=how, rows=400, steps=60)
    violating = min(p.sigma for p in fit.curve if p.loss > 1.003)
    assert fit.sigma <= edge < violating <= fit.sigma * (2 * CLOSE if how == "grid" else 1.01)
    assert f"[{fit.sigma:.6g}, {violating:.6g}]" in fit.stopped


@pytest.mark.parametrize("resolution", [1e-6, 0.1, 0.5, 0.9])
def test_any_resolution_is_kept(resolution: float) -> None:
    fit, _, _ = find(power(0.0175), resolution=resolution)
    assert 0.0175 / (1 + resolution) <= fit.sigma <= 0.0175


def test_a_search_repeats_to_the_bit() -> None:
    first, again = (find(power(5.0, 1.2), spread=0.02)[0] for _ in range(2))
    assert first == again


@pytest.mark.parametrize("crossing", [0.0011, 0.0072, 0.02, 0.099])
def test_grid_brackets_in_few_passes(crossing: float) -> None:
    """Six sigmas of the grid; linear in sigma^2, a line hits, and the next confirms."""
    _, loss, _ = find(power(crossing))
    assert len(loss.asked) <= 6 + 2


DIP = 0.01  # sigma of the least loss of the curve below


def dip(sigma: float) -> float:
    """Falls to 0.8 at DIP, is back at 1 at sqrt(2) DIP, and rises: 1 - 0.4 u + 0.2 u^2."""
    u = (sigma / DIP) ** 2
    return 1.0 - 0.4 * u + 0.2 * u * u


@pytest.mark.parametrize("how", SEARCHES)
def test_one_sided_passes_a_dip_and_two_sided_stops_at_its_edge(how: str) -> None:
    u = (0.4 + (0.16 + 4 * 0.2 * 0.003) ** 0.5) / 0.4  # 0.2 u^2 - 0.4 u = 0.003
    fit, _, _ = find(dip, search=how, steps=60)
    assert DIP * u**0.5 * 0.99 <= fit.sigma <= DIP * u**0.5 and not fit.two_sided
    assert any("first falls below the deterministic one" in note for note in fit.notes)
    edge = DIP * ((0.4 - (0.16 - 4 * 0.2 * 0.003) ** 0.5) / 0.4) ** 0.5  # 0.4 u - 0.2 u^2 = 0.003
    if how == "grid":  # halving cannot see that the curve came back to l(0) further out
        fit, _, _ = find(dip, two_sided=True, search=how)
        assert edge * 0.99 <= fit.sigma <= edge and fit.two_sided


def test_feasible_set_is_connected_to_zero() -> None:
    """Violates between .003 and .02, is fine again up to .06: the answer lies below .003."""

    def hump(sigma: float) -> float:
        return 1.0 if sigma <= 0.003 or 0.02 <= sigma <= 0.06 else 1.5

    fit, _, _ = find(hump)
    assert 0.003 / 1.08 <= fit.sigma <= 0.003
    accepted_beyond = [p for p in fit.curve if p.sigma > 0.003 and p.loss < 1.1]
    assert accepted_beyond  # it was seen, and not taken
    assert any(note.startswith("the loss is not monotone in sigma: it falls") for note in fit.notes)


@pytest.mark.parametrize("how", SEARCHES)
@given(cuts=st.lists(st.floats(-4, 0.5), min_size=1, max_size=5, unique=True))
def test_answer_is_connected_among_what_was_measured(how: str, cuts: list[float]) -> None:
    """Curves that jump between fine and too bad at 1 to 5 places: no measured violation lies below
    the answer."""
    edges = sorted(10**c for c in cuts)

    def jumps(sigma: float) -> float:
        crossed = sum(sigma > e for e in edges)
        return 1.0 if crossed % 2 == 0 and crossed < len(edges) else 2.0 * (crossed > 0) or 1.0

    fit, _, _ = find(jumps, search=how, steps=60)
    assert all(p.loss == 1.0 for p in fit.curve if p.sigma <= fit.sigma)
    assert any(p.loss > 1.003 for p in fit.curve if p.sigma > fit.sigma)


@pytest.mark.parametrize("how", SEARCHES)
def test_unbracketed_is_an_error_that_says_so(how: str) -> None:
    with pytest.raises(SearchError, match=r"unbracketed: even sigma=.* less than the tolerance"):
        find(lambda s: 1.0, search=how)
    with pytest.raises(SearchError, match=r"unbracketed: .*raise (the|steps or the) tolerance"):
        find(lambda s: 1.0 if s == 0 else 2.0, search=how)


def test_bisection_reaches_as_far_as_the_grid() -> None:
    """Its own doubling ends at bounds[1] * 4^4; the grid's range goes on, and so does it."""
    for how in SEARCHES:
        fit, _, _ = find(power(1000.0), search=how, steps=60)
        assert 990 <= fit.sigma <= 1000


def test_bisection_stops_after_its_steps_with_an_accepted_sigma() -> None:
    fit, loss, _ = find(power(0.02), search="bisection", steps=4)
    assert len(loss.asked) == 5 and "4 steps; largest accepted" in fit.stopped
    assert fit.sigma == 0.1 / 16 * 3
    with pytest.raises(SearchError, match=r"no sigma down to 0.0125 was accepted in 3 steps"):
        find(power(1e-3), search="bisection", steps=3)


# --- tolerance ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "baseline", "options", "allowed"),
    [
        ("nll", 0.5, {}, 0.003 * 0.5),
        ("nll", 0.5, {"relative": False}, 0.003),
        ("nll", 0.001, {}, 0.003 * 0.01),  # never relative to less than 0.01 nats
        ("nll", 0.001, {"relative": False, "tolerance": 1e-5}, 1e-5),
        ("pseudo_nll", 0.5, {"tolerance": 0.1}, 0.05),
        ("pseudo_nll", 0.0, {}, 0.003 * 0.01),
        ("accuracy", 0.2, {"tolerance": 0.01}, 0.01 * 0.8),  # the loss is the error rate
        ("accuracy", 0.2, {"tolerance": 0.01, "relative": False}, 0.01),
        ("embedding_norm", 40.0, {}, 0.003 * 40.0),
    ],
)
def test_what_a_tolerance_allows(
    metric: str, baseline: float, options: dict[str, Any], allowed: float
) -> None:
    """The curve is worse by ``allowed`` exactly at sigma = 0.02."""
    fit, _, _ = find(lambda s: baseline + allowed * (s / 0.02) ** 2, metric=metric, **options)
    assert fit.limit == pytest.approx(baseline + allowed, rel=1e-12)
    # Rounding of l(0) + allowed moves the crossing by eps * l(0) / allowed.
    assert 0.02 * 0.99 <= fit.sigma <= 0.02 * (1 + 1e-9)


def test_embedding_norm_counts_both_directions_unless_told() -> None:
    def falling(s: float) -> float:
        return 1.0 - 0.003 * (s / 0.02) ** 2

    fit, _, _ = find(falling, metric="embedding_norm")
    assert fit.two_sided and 0.0198 <= fit.sigma <= 0.02 * (1 + 1e-9)
    with pytest.raises(SearchError, match="unbracketed"):
        find(falling, metric="embedding_norm", two_sided=False)


# --- notes --------------------------------------------------------------------------------------


def test_standard_error_of_the_paired_difference_and_the_note_about_noise() -> None:
    fit, _, _ = find(power(0.02), spread=0.02)
    for point in fit.curve[1:]:
        assert point.standard_error == pytest.approx(0.02 / (N - 1) ** 0.5, rel=1e-9)
    assert fit.curve[0].standard_error == 0.0
    below = "the tolerance (0.003) is below one standard error over anchors (0.00756) at sigma"
    assert any(note.startswith(below) for note in fit.notes)
    quiet, _, _ = find(power(0.02), spread=0.003)  # 0.003 / sqrt(7) < 0.003
    assert quiet.notes == ()


# --- min_nll ------------------------------------------------------------------------------------


def well(best: float, baseline: float = 1.0) -> Curve:
    """Least at ``best``, where it is 0.8 of the baseline; back at it at sqrt(2) best."""
    return lambda s: baseline * (1.0 - 0.4 * (s / best) ** 2 + 0.2 * (s / best) ** 4)


@pytest.mark.parametrize("best", [2e-5, 3e-4, 1e-3, 0.013, 0.09, 2.0])
def test_min_nll_finds_the_least_loss(best: float) -> None:
    """Between the answer's neighbours, each within a factor of 1.4; also outside the first range,
    below which the loss may be worse everywhere. At five times the resolution from the polynomial's
    least; that of a cubic through 0 and points at l, b, r is off by R' / l'', R = .2 s (s - l)
    (s - b) (s - r) in units of ``best``: below .05 for b from .8 to 1.2 and neighbours in reach."""
    fit, loss, _ = find(well(best), objective="min_nll")
    order = [p.sigma for p in fit.curve]
    i = order.index(fit.sigma)
    assert order[i - 1] <= best <= order[i + 1]
    assert order[i + 1] <= 1.4 * order[i] * (1 + 1e-9) <= 1.4**2 * order[i - 1] * (1 + 1e-8)
    assert abs(math.log(fit.sigma / best)) <= 0.1
    assert min(p.loss for p in fit.curve) == fit.curve[i].loss
    assert fit.limit is None and fit.passes == 1 + 4 * len(loss.asked)


@pytest.mark.parametrize(("cost", "most"), [(1.0, 20.0), (1 / 30, 4.0)])
@pytest.mark.parametrize("best", [2e-3, 0.013, 0.06])
def test_min_nll_begins_on_part_of_the_anchors(best: float, cost: float, most: float) -> None:
    """On 400 rows: a grid on an eighth of them (tail mode: a quarter), then the answer, its
    neighbours and few others on all; the design's budget of 20 passes (tail mode: 4)."""
    fit, _, _ = find(well(best), objective="min_nll", rows=400, cost=cost)
    assert abs(math.log(fit.sigma / best)) <= 0.1
    assert fit.passes <= most
    counts = {p.sigma: p.anchors for p in fit.curve}
    order = [s for s in counts if counts[s] == 400]
    i = order.index(fit.sigma)
    assert order[i - 1] <= best <= order[i + 1]
    assert set(counts.values()) == {400, 50 if cost == 1.0 else 100}


@pytest.mark.parametrize("cost", [1.0, 0.05])
def test_min_nll_is_not_misled_by_part_of_the_anchors(cost: float) -> None:
    """No sigma that was measured, if only on part of the rows, is better on all of them than the
    answer, its close neighbours aside. The mean of an eighth has a standard error of
    30 x / sqrt(2 * 50) = 3 x, and the fall that is looked for is about 1/4."""
    for seed in range(40):
        fit, loss, _ = find(
            lambda _: 1.0,
            spread=30.0,
            rows=400,
            make=WavyLoss,
            seed=seed,
            cost=cost,
            objective="min_nll",
        )
        tried = torch.tensor([fit.sigma, *(p.sigma for p in fit.curve)], dtype=torch.float64)
        answer, *losses = loss.at(tried, torch.arange(400)).mean(1).tolist()
        for sigma, on_all in zip(tried[1:].tolist(), losses, strict=True):
            near = fit.sigma / 1.4 < sigma < fit.sigma * 1.4
            assert near or sigma == 0.0 or on_all >= answer - 1e-12


def test_min_nll_is_zero_where_variance_never_helps() -> None:
    for curve in (power(0.02), power(1e-4), power(0.02, 1.0), lambda s: 1.0):
        fit, _, _ = find(curve, objective="min_nll")
        assert fit.sigma == 0.0 and fit.kl is None and fit.implied_lambda is None
        assert "variance does not help on these anchors" in fit.notes
        assert SigmaFit.from_dict(fit.to_dict()) == fit


def test_min_nll_of_a_loss_that_falls_for_ever_is_an_error() -> None:
    with pytest.raises(SearchError, match=r"the objective still falls at sigma=.*; widen bounds"):
        find(lambda s: 1.0 / (1.0 + s), objective="min_nll")


# --- gvi, KL, lambda ----------------------------------------------------------------------------


def kl_slope(sigma: float, prior: float = PRIOR) -> float:
    """d KL / d sigma = entries * (sigma / prior^2 - 1 / sigma)."""
    return ENTRIES * (sigma / prior**2 - 1.0 / sigma)


@pytest.mark.parametrize(("a", "weight"), [(3e4, 1 / N), (1e5, 1 / N), (30.0, 1e-4), (1e4, 1e-6)])
def test_gvi_against_its_closed_form(a: float, weight: float) -> None:
    """a sigma^2 + weight KL is least where 2 a sigma = -weight KL'(sigma):
    sigma^2 = weight E / (2 a + weight E / prior^2)."""
    options = {} if weight == 1 / N else {"kl_weight": weight}  # 1 / anchors is the default
    fit, _, _ = find(lambda s: 1.0 + a * s * s, objective="gvi", **options)
    assert fit.kl_weight == weight
    best = (weight * ENTRIES / (2 * a + weight * ENTRIES / PRIOR**2)) ** 0.5
    order = [p.sigma for p in fit.curve]
    i = order.index(fit.sigma)
    left, right = order[i - 1], order[i + 1]
    assert left <= best <= right <= 1.4**2 * left * (1 + 1e-8)
    # Five times the resolution; a parabola is interpolated exactly, on a grid of 1.4^2 / 1000.
    assert abs(math.log(fit.sigma / best)) <= 0.051
    # The difference quotient in sigma^2 is a parabola's own slope; lambda = -l' / KL'.
    assert fit.implied_lambda == pytest.approx(-2 * a * fit.sigma / kl_slope(fit.sigma), rel=1e-6)
    # The lambda for which a sigma below the prior's is optimal grows with it, so the grid step
    # bounds its error.
    assert right < PRIOR
    bounds = [-2 * a * s / kl_slope(s) for s in (left, right)]
    assert bounds[0] <= weight <= bounds[1] and bounds[0] <= fit.implied_lambda <= bounds[1]


def test_gvi_with_a_given_prior() -> None:
    fit, _, _ = find(lambda s: 1.0 + 100 * s * s, objective="gvi", prior_sigma=0.02, kl_weight=0.01)
    best = (0.01 * ENTRIES / (200 + 0.01 * ENTRIES / 0.02**2)) ** 0.5
    assert (fit.prior_sigma, fit.kl_weight) == (0.02, 0.01) and abs(
        math.log(fit.sigma / best)
    ) <= 0.051


def test_implied_lambda_of_the_largest_accepted_sigma() -> None:
    """l' = 2 rise sigma / crossing^2, from a quotient in sigma^2."""
    fit, _, _ = find(power(0.02))
    assert fit.kl_weight is None
    wanted = -(2 * 0.003 * fit.sigma / 0.02**2) / kl_slope(fit.sigma)
    assert fit.implied_lambda == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"objective": "gvi"}, {"prior_sigma": 0.3}])
def test_kl_is_the_sum_over_layers(options: dict[str, Any]) -> None:
    fit, _, _ = find(power(0.02), **options)
    prior = options.get("prior_sigma", PRIOR)
    assert fit.prior_sigma == prior
    wanted = sum(p.kl(fit.sigma, prior) for p in POSTERIORS.values())
    assert fit.kl == pytest.approx(wanted, rel=1e-12)


# --- the default objective ----------------------------------------------------------------------


def test_the_objective_that_is_meant() -> None:
    """The least loss, unless something is said that only a crossing can answer."""
    assert search.default_objective(None, "nll", None, "grid") == "min_nll"
    assert search.default_objective(None, "nll", 0.003, "grid") == "max_variance"
    assert search.default_objective(None, "nll", None, "bisection") == "max_variance"
    assert search.default_objective(None, "pseudo_nll", None, "grid") == "max_variance"
    assert search.default_objective("gvi", "nll", 0.003, "grid") == "gvi"


def test_default_stops_at_the_least_loss() -> None:
    """An adapter whose loss is above that of a guess has nothing that stops max_variance: the loss
    falls to its least, rises, and stays below l(0) up to a guess."""

    def over_confident(s: float) -> float:
        return 1.0 - 0.5 * s / 0.02 * math.exp(1 - s / 0.02) - 0.2 * s / (s + 0.02)

    fit, _, _ = find(over_confident, objective=None)
    assert fit.objective == "min_nll" and fit.limit is None
    least = min((s / 1e4 for s in range(1, 1000)), key=over_confident)
    assert abs(math.log(fit.sigma / least)) <= 0.1
    with pytest.raises(SearchError, match="unbracketed"):
        find(over_confident)
    asked, _, _ = find(power(0.02), objective=None, tolerance=0.003)
    assert asked.objective == "max_variance"


# --- records and arguments ----------------------------------------------------------------------


@pytest.mark.parametrize("draws", [2, 4])
def test_round_trip_through_json(draws: int) -> None:
    """One stream has no jackknife: its NaN becomes null and comes back."""
    fit, _, _ = find(power(0.02), draws=draws, spread=0.02, seed=7)
    assert (fit.draws, fit.seed, fit.anchors, fit.mode) == (draws, 7, N, "full")
    assert fit.anchor_hash == anchor_set().content_hash
    text = json.dumps(fit.to_dict(), allow_nan=False)
    again = SigmaFit.from_dict(json.loads(text))
    assert math.isnan(again.curve[1].draw_standard_error) == (draws == 2)
    assert repr(again) == repr(fit)
    if draws == 4:
        assert again == fit


def test_records_of_earlier_versions_are_read() -> None:
    """0.1.0 knew ``compat`` and ``family``, and neither temperature nor length normalization."""
    fit, _, _ = find(power(0.02), spread=0.02)
    old = {
        k: v for k, v in fit.to_dict().items() if k not in ("temperature", "length_normalization")
    }
    old |= {"compat": None, "family": "low_rank"}
    for point in old["curve"]:
        del point["anchors"]
    again = SigmaFit.from_dict(json.loads(json.dumps(old)))
    assert again.config == fit.config and again.interval == fit.interval
    assert again.curve == tuple(replace(p, anchors=None) for p in fit.curve)


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"metric": "ece"}, "metric='ece': expected one of nll, accuracy, pseudo_nll, embedding_norm"),
    ({"objective": "elbo"}, "objective='elbo': expected one of max_variance, min_nll, gvi"),
    ({"search": "random"}, "search='random': expected one of grid, bisection"),
    ({"objective": "gvi", "search": "bisection"}, "is a minimisation: use search='grid'"),
    ({"objective": "min_nll", "metric": "accuracy"}, "needs metric='nll'"),
    ({"objective": "gvi", "metric": "embedding_norm"}, "needs metric='nll'"),
    ({"tolerance": 0.0}, "tolerance=0.0: expected a positive number"),
    ({"tolerance": math.nan}, "tolerance=nan"),
    ({"tolerance": math.inf}, "tolerance=inf"),
    ({"draws": 0}, "draws=0: "),
    ({"draws": 7}, "draws=7: antithetic draws come in pairs"),
    ({"bounds": (0.1, 0.01)}, r"bounds=\(0.1, 0.01\): expected 0 < lower < upper"),
    ({"bounds": (0.0, 0.1)}, "expected 0 < lower < upper"),
    ({"bounds": (0.1, math.inf)}, "expected 0 < lower < upper"),
    ({"bounds": (math.nan, 0.1)}, "expected 0 < lower < upper"),
    ({"points": 2}, "points=2: a grid needs at least 3"),
    ({"resolution": 0.0}, "resolution=0.0: expected 1e-09 to 1"),
    ({"resolution": math.nan}, "resolution=nan"),
    ({"steps": 0}, "steps=0: expected a positive number"),
    ({"prior_sigma": 0.0}, "prior_sigma=0.0: expected a positive number"),
    ({"prior_sigma": -1.0}, "prior_sigma=-1.0"),
    ({"kl_weight": -1.0}, "kl_weight=-1.0"),
    ({"kl_weight": math.nan}, "kl_weight=nan"),
]


@pytest.mark.parametrize(("options", "message"), ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_bad_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find(power(0.02), **options)


# --- a small model ------------------------------------------------------------------------------


def small() -> tfb.BayesianModel:
    return tfb.bayesianize(exact(CASES["llama"].build()), seed=3)


def small_anchors() -> AnchorSet:
    """Two batches of four rows, three choices, labels that the model cannot know."""
    ids = torch.tensor([10, 11, 12])
    return AnchorSet.of(
        [
            make_batch(4, 3, 5, 2, seed=i)
            | {"labels": torch.tensor([0, 1, 2, i]), "label_ids": ids}
            for i in (0, 1)
        ]
    )


@pytest.fixture(scope="module")
def model() -> tfb.BayesianModel:
    return small()


def test_fit_sets_sigma_and_repeats_by_seed(model: tfb.BayesianModel) -> None:
    first = tfb.fit_sigma(model, small_anchors(), "pseudo_nll", draws=4)
    assert model.sigma == first.sigma > 0 and first.seed == 3
    assert tfb.fit_sigma(small(), small_anchors(), "pseudo_nll", draws=4) == first
    other = tfb.fit_sigma(model, small_anchors(), "pseudo_nll", draws=4, seed=4)
    assert other.seed == 4 and other.sigma != first.sigma and model.sigma == other.sigma
    assert replace(other, seed=3) != first


def test_mode_is_the_fits_own_and_a_failure_leaves_the_models() -> None:
    """``tail`` alone changes k of a model that is sampled so; sigma and mode go together."""
    bayes = small()
    common: dict[str, Any] = {"metric": "pseudo_nll", "draws": 4}
    fit = tfb.fit_sigma(bayes, small_anchors(), mode="tail", tail=2, **common)
    assert fit.config == bayes.config and (fit.mode, fit.tail) == ("tail", 2)
    again = tfb.fit_sigma(bayes, small_anchors(), tail=1, **common)
    assert again.config == bayes.config and (again.mode, again.tail) == ("tail", 1)
    assert bayes.sigma == again.sigma != fit.sigma
    failures: list[tuple[dict[str, Any], str]] = [
        ({"mode": "full", "tolerance": 1e9}, "unbracketed"),
        ({"metric": "embedding_norm", "tail": 3}, "'embedding_norm' needs mode='full', not 'tail'"),
        ({"metric": "embedding_norm"}, "'embedding_norm' needs mode='full', not 'tail'"),
        ({"mode": "half"}, "mode='half'"),
    ]
    for options, message in failures:
        with pytest.raises(ValueError, match=message):
            tfb.fit_sigma(bayes, small_anchors(), **common | options)
        assert bayes.config == again.config


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        (("full", None), {"metric": "pseudo_nll", "mode": "tail", "tail": 1, "seed": 5}),
        (("tail", 1), {"metric": "embedding_norm", "mode": "full"}),
    ],
)
def test_nothing_on_the_model_changes_before_the_answer(
    mode: tuple[str, int | None], options: dict[str, Any]
) -> None:
    """It is configured as it was at every pass; then as the fit, but for the seed."""
    bayes = small().configure(mode=mode[0], tail=mode[1], length_normalization="tokens")
    before, seen = bayes.config, []
    fit = tfb.fit_sigma(
        bayes, small_anchors(), draws=4, progress=lambda _: seen.append(bayes.config), **options
    )
    assert seen and all(config is before for config in seen)
    assert bayes.config == replace(fit.config, seed=before.seed) != before
    assert bayes.config.length_normalization == "tokens"


def test_search_accepts_batches_and_reports_the_models_own_losses(
    model: tfb.BayesianModel,
) -> None:
    seen: list[int] = []
    fit = tfb.fit_sigma(model, small_anchors().batches, "pseudo_nll", draws=4, progress=seen.append)
    assert sum(seen) == 8 * (fit.passes - 1)
    assert fit.limit is not None
    found = []
    for batch in small_anchors().batches:
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        p = model.predict(inputs, 4, label_ids=batch["label_ids"]).probs  # at the fitted sigma
        own = model.predict(inputs, Draws.mean(), label_ids=batch["label_ids"]).probs.argmax(-1)
        found += p[torch.arange(4), own].log().neg().tolist()
    at = next(p for p in fit.curve if p.sigma == fit.sigma)
    assert sum(found) / 8 == pytest.approx(at.loss, rel=1e-10)
    assert at.loss <= fit.limit


def test_gvi_with_expected_nll_and_one_over_rows_is_variational_inference() -> None:
    """-ELBO / N from draws and torch's own KL, at every measured sigma; the answer has the least.
    The averaged prediction's likelihood is the smaller one (Jensen), so it is another objective."""
    bayes, batch = small(), dict(small_anchors().batches[0])
    ids = batch.pop("label_ids")
    labels = batch.pop("labels")
    rows = [batch | {"labels": labels, "label_ids": ids}]
    fit = tfb.fit_sigma(bayes, rows, "expected_nll", objective="gvi", draws=4)
    assert fit.prior_sigma is not None
    elbos = {}
    for point in fit.curve[1:]:
        p = bayes.predict(
            batch, Draws.antithetic(4, point.sigma, seed=3), label_ids=ids, keep_draws=True
        )
        assert p.draw_probs is not None
        each = p.draw_probs[:, torch.arange(4), labels].log()
        assert point.loss == pytest.approx(-float(each.mean()), abs=1e-10)
        assert -float(p.probs[torch.arange(4), labels].log().mean()) < point.loss
        kl = 0.0
        for q in bayes.posteriors.values():
            scale = q.inv_d[:, None].expand(q.A.shape)
            normal = torch.distributions.Normal
            kl += float(
                torch.distributions.kl_divergence(
                    normal(q.A.double(), point.sigma * scale), normal(0.0, fit.prior_sigma * scale)
                ).sum()
            )
        elbos[point.sigma] = float(each.mean()) * 4 - kl
    assert fit.sigma == max(elbos, key=lambda s: elbos[s])
    at = next(p.loss for p in fit.curve if p.sigma == fit.sigma)
    assert fit.kl is not None
    assert at + fit.kl / 4 == pytest.approx(-elbos[fit.sigma] / 4, rel=1e-9)
