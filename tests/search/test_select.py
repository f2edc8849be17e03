"""Where the answer lies, on losses known in closed form: crossings, minima, guards, intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.losses import ENTRIES, POSTERIORS, PRIOR, Curve, N, find, power

from tfb import SearchError
from tfb.search.loss import LossMatrix
from tfb.search.select import COARSE, FEWEST, FINE, Crossing, Least, less_accurate, part_of

STEP = 100 ** (1 / (COARSE - 1))  # of the first grid, default bounds

# --- max_variance -------------------------------------------------------------------------------


@given(crossing=st.floats(1.001e-7, 999.0), rise=st.floats(1e-3, 10.0))
def test_the_crossing_of_a_quadratic_is_exact(crossing: float, rise: float) -> None:
    """The loss is linear in sigma^2, as interpolation has it: also far outside the first range.
    The sigmas that are tried go from 1e-7 to 1e3; a crossing at an end is on neither side of it.
    Rounding of l(0) + allowed moves sigma by eps l(0) / allowed."""
    fit, _ = find(power(crossing, rise=rise), tolerance=rise)
    assert fit.sigma == pytest.approx(crossing, rel=1e-15 / rise + 1e-12)
    assert fit.limit == pytest.approx(1 + rise, rel=1e-15) and fit.temperature == 1.0


@given(crossing=st.floats(1e-5, 10.0), exponent=st.floats(0.5, 6.0))
def test_a_crossing_of_another_power(crossing: float, exponent: float) -> None:
    """Level 2 has a ratio of STEP^(1/2), and the chord's crossing lies within the two sigmas."""
    fit, _ = find(power(crossing, exponent), rows=400)
    below = max(p.sigma for p in fit.curve if p.loss <= 1.003 and p.anchors == 400)
    above = min(p.sigma for p in fit.curve if p.loss > 1.003 and p.anchors == 400)
    assert below <= fit.sigma <= above <= below * STEP**0.5 * (1 + 1e-9)
    x, y = below**2, above**2
    a, b = (power(crossing, exponent)(s) - 1.003 for s in (below, above))
    assert fit.sigma == pytest.approx((x - a * (y - x) / (b - a)) ** 0.5, rel=1e-9)


@given(crossing=st.floats(1e-5, 10.0), exponent=st.floats(0.5, 6.0))
def test_bisection_brackets_the_crossing(crossing: float, exponent: float) -> None:
    fit, loss = find(power(crossing, exponent), search="bisection", steps=60)
    assert fit.sigma == pytest.approx(crossing, rel=0.0101)
    asked = [sigma for _, sigmas in loss.asked for sigma in sigmas]
    assert len(set(asked)) == len(asked) and {count for count, _ in loss.asked} == {N}


def test_bisection_stops_after_its_steps() -> None:
    """Halves 0.1: accepted 0.0125, violated 0.025, after three; then it interpolates."""
    fit, loss = find(power(0.02), search="bisection", steps=3)
    assert len(loss.asked) == 4 and "between 0.0125 and 0.025" in fit.stopped
    with pytest.raises(SearchError, match=r"unbracketed: from sigma=0\.0125 to 0\.1"):
        find(power(1e-3), search="bisection", steps=3)


@pytest.mark.parametrize("how", ["grid", "bisection"])
def test_unbracketed_is_an_error_that_says_so(how: str) -> None:
    for curve in (lambda s: 1.0, lambda s: 1.0 if s == 0 else 2.0):
        with pytest.raises(SearchError, match=r"unbracketed: .* change it or bounds"):
            find(curve, search=how)


def test_the_answer_is_connected_to_zero() -> None:
    """Fine again from .02 to .06: seen, and not taken."""
    fit, _ = find(lambda s: 1.0 if s <= 0.003 or 0.02 <= s <= 0.06 else 1.5)
    assert 0.003 / STEP**0.5 <= fit.sigma <= 0.003 * STEP**0.5
    assert any(p.sigma > 0.01 and p.loss == 1.0 for p in fit.curve)


def falls(s: float) -> float:
    return 1.0 - 0.4 * (s / 0.01) ** 2 + 0.2 * (s / 0.01) ** 4


def test_a_dip_is_passed_unless_improvements_count_too() -> None:
    """Of the norm both directions do: 0.4 u - 0.2 u^2 = .003 in u = (sigma / .01)^2."""
    beyond = (0.4 + (0.16 + 4 * 0.2 * 0.003) ** 0.5) / 0.4
    edge = (0.4 - (0.16 - 4 * 0.2 * 0.003) ** 0.5) / 0.4
    # A chord over a ratio r of sigma misses a parabola in u by at most (r^2 - 1)^2 / 8 l'' / l'.
    assert find(falls)[0].sigma == pytest.approx(0.01 * beyond**0.5, rel=0.05)
    norm, _ = find(falls, metric="embedding_norm")
    assert norm.sigma == pytest.approx(0.01 * edge**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("metric", "baseline", "options", "allowed"),
    [
        ("nll", 0.5, {}, 0.003 * 0.5),
        ("nll", 0.5, {"relative": False, "tolerance": 0.003}, 0.003),
        ("nll", 0.001, {}, 0.003 * 0.01),  # never relative to less than 0.01 nats
        ("pseudo_nll", 0.5, {"tolerance": 0.1}, 0.05),
        ("accuracy", 0.2, {}, 0.01 * 0.8),  # the paper's 1 %; the loss is the error rate
        ("accuracy", 0.2, {"tolerance": 0.02, "relative": False}, 0.02),
        ("embedding_norm", 40.0, {}, 0.003 * 40.0),
    ],
)
def test_what_a_tolerance_allows(
    metric: str, baseline: float, options: dict[str, float], allowed: float
) -> None:
    """The curve is worse by ``allowed`` exactly at sigma = 0.02."""
    fit, _ = find(lambda s: baseline + allowed * (s / 0.02) ** 2, metric=metric, **options)
    assert fit.limit == pytest.approx(baseline + allowed, rel=1e-12)
    assert fit.sigma == pytest.approx(0.02, rel=1e-9)


# --- min_nll and gvi ----------------------------------------------------------------------------


def well(best: float) -> Curve:
    """Least at ``best``, where it is 0.8; back at 1 at sqrt(2) best."""
    return lambda s: 1.0 - 0.4 * (s / best) ** 2 + 0.2 * (s / best) ** 4


@pytest.mark.parametrize("best", [3e-6, 3e-4, 1e-3, 0.013, 0.09, 0.5])
def test_the_least_loss_is_found(best: float) -> None:
    """Its neighbours, each within STEP^(1/2), hold the minimum; also outside the first range."""
    fit, _ = find(well(best), objective="min_nll")
    order = [p.sigma for p in fit.curve if p.anchors == N]
    i = order.index(fit.sigma)
    assert order[i - 1] <= best <= order[i + 1] <= order[i] * STEP**0.5 * (1 + 1e-9)
    assert fit.curve[0].loss == 1.0 and min(p.loss for p in fit.curve) == well(best)(fit.sigma)
    assert fit.limit is None and fit.change is not None
    assert fit.change == pytest.approx((well(best)(fit.sigma) - 1,) * 2, rel=1e-9)


def test_the_two_levels_cost_what_they_should() -> None:
    """1 + 9 x 4 / 4 + 5 x 4 passes; a part has at least FEWEST rows."""
    fit, loss = find(well(0.0135), objective="min_nll", rows=400)
    assert [(count, len(sigmas)) for count, sigmas in loss.asked] == [(100, COARSE), (400, FINE)]
    assert fit.passes == loss.passes == 1 + 9 + 20
    assert {p.anchors for p in fit.curve} == {100, 400}
    assert len(part_of(100, 0)) == FEWEST and len(part_of(10, 0)) == 10
    assert not torch.equal(part_of(400, 0), part_of(400, 1))


def test_noise_that_gains_less_than_the_tolerance_is_none() -> None:
    """It would cost its passes for nothing."""
    small, _ = find(lambda s: 1 - 0.014 * (well(0.013)(0) - well(0.013)(s)), objective="min_nll")
    assert small.sigma == 0.0 and small.stopped.startswith("keep the adapter")
    large, _ = find(lambda s: 1 - 0.016 * (well(0.013)(0) - well(0.013)(s)), objective="min_nll")
    assert large.sigma > 0.0


@pytest.mark.parametrize("curve", [power(0.02), power(1e-4), power(0.02, 1.0), lambda s: 1.0])
def test_noise_that_never_helps_is_none(curve: Curve) -> None:
    fit, _ = find(curve, objective="min_nll")
    assert fit.config.sigma == 0.0 and fit.kl is None and fit.implied_lambda is None
    assert fit.stopped == "keep the adapter: nothing that was tried lowers the loss enough"


def test_a_loss_that_falls_for_ever_is_an_error() -> None:
    with pytest.raises(SearchError, match=r"unbracketed: .* the loss goes from"):
        find(lambda s: 1.0 / (1.0 + s), objective="min_nll")


@pytest.mark.parametrize(("a", "weight"), [(3e4, 1 / N), (1e5, 1 / N), (30.0, 1e-4), (1e4, 1e-6)])
def test_gvi_against_its_closed_form(a: float, weight: float) -> None:
    """a sigma^2 + weight KL is least where sigma^2 = weight E / (2 a + weight E / prior^2)."""
    options = {} if weight == 1 / N else {"kl_weight": weight}  # 1 / anchors is the default
    fit, _ = find(lambda s: 1.0 + a * s * s, objective="gvi", **options)
    best = (weight * ENTRIES / (2 * a + weight * ENTRIES / PRIOR**2)) ** 0.5
    order = [p.sigma for p in fit.curve if p.anchors == N]
    i = order.index(fit.sigma)
    assert order[i - 1] <= best <= order[i + 1] <= STEP * order[i - 1] * (1 + 1e-9)
    assert fit.kl_weight == weight and fit.prior_sigma == PRIOR
    wanted = sum(p.kl(fit.sigma, PRIOR) for p in POSTERIORS.values())
    assert fit.kl == pytest.approx(wanted, rel=1e-12)
    # lambda = -l' / KL', the difference quotient in sigma^2 being a parabola's own slope.
    slope = ENTRIES * (fit.sigma / PRIOR**2 - 1.0 / fit.sigma)
    assert fit.implied_lambda == pytest.approx(-2 * a * fit.sigma / slope, rel=1e-6)


# --- guards -------------------------------------------------------------------------------------


def matrix(losses: list[list[float]], correct: list[list[int]] | None = None) -> LossMatrix:
    points = tuple((0.01 * g, 1.0) for g in range(len(losses)))
    right = None if correct is None else torch.tensor(correct, dtype=torch.bool)
    return LossMatrix(points, torch.tensor(losses, dtype=torch.float64), right)


@pytest.mark.parametrize(("lost", "gained"), [(4, 0), (5, 0), (9, 2), (8, 2), (30, 18), (3, 9)])
def test_accuracy_that_falls_is_mcnemars_exact_test(lost: int, gained: int) -> None:
    before = [1] * lost + [0] * gained + [1, 0]
    after = [0] * lost + [1] * gained + [1, 0]
    made = matrix([before, after], [before, after])
    n = lost + gained
    p = sum(math.comb(n, k) for k in range(lost, n + 1)) / 2**n
    assert less_accurate(made, 1) == (p < 0.05) and not less_accurate(made, 0)


def test_a_sigma_that_costs_accuracy_is_never_chosen() -> None:
    """The least loss is at .02, but there from .015 on 20 of 100 anchors are lost."""
    fit, _ = find(well(0.02), objective="min_nll", rows=100, wrong=lambda s: 20 if s > 0.015 else 5)
    assert 0.015 / STEP**0.5 <= fit.sigma <= 0.015
    [note] = [n for n in fit.notes if "has the least loss, but" in n]
    assert "from 95.0 to 80.0 % of the anchors, which is significant: not chosen" in note
    by_rule, _ = find(well(0.02), rows=100, wrong=lambda s: 20 if s > 0.015 else 5)
    assert any("at this sigma accuracy falls from 95.0 to 80.0 %" in n for n in by_rule.notes)


# --- intervals ----------------------------------------------------------------------------------


def test_limits_of_a_parabola_hold_the_truth_as_often_as_they_say() -> None:
    """Rows 1 + c_i sigma^2, c ~ N(10, 30): the expected crossing of .003 lies within the limits in
    95 % of 300 samples, within three binomial standard errors."""
    rule = Crossing(lambda loss: 0.003 * loss, two_sided=False)
    truth, inside = (0.003 / 10) ** 0.5, 0
    sigmas = np.array([0.0, *(truth * f for f in (0.25, 0.5, 0.9, 1.1, 2.0, 8.0))])
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        c = 10 + 30 * torch.randn(200, generator=generator, dtype=torch.float64)
        losses = 1 + torch.from_numpy(sigmas**2)[:, None] * c
        low, high = rule.limits(LossMatrix(tuple((s, 1.0) for s in sigmas), losses, None))
        inside += low <= truth and (high is None or truth <= high)
    error = (0.95 * 0.05 / 300) ** 0.5
    assert abs(inside / 300 - 0.95) <= 3 * error


def test_limits_of_a_minimum_are_those_of_resamples() -> None:
    """Two kinds of rows, one best at .01 and the other at .02: the answer is the kind that has the
    majority of a resample, a binomial number."""
    rule = Least(lambda _: 0.0, guarded=False, margin=0.0)
    kinds = torch.tensor([[1.0, 0.6, 0.2, 0.9, 3.0], [1.0, 0.2, 0.6, 0.9, 3.0]])
    for n, wanted in ((55, (0.01, 0.02)), (80, (0.01, 0.01))):
        rows = torch.cat([kinds[1].expand(n, -1), kinds[0].expand(100 - n, -1)])
        tail = float(stats.binom.cdf(50, 100, n / 100))
        assert (tail > 0.025) == (wanted[1] == 0.02)
        points = tuple((s, 1.0) for s in (0.0, 0.01, 0.02, 0.03, 0.04))
        found = rule.limits(LossMatrix(points, rows.double().T.contiguous(), None))
        # At the least sigma that was measured it may as well be smaller.
        assert found == (0.0, wanted[1])


def test_limits_at_the_last_sigma_are_open_unless_level_1_closes_them() -> None:
    """Both rules; .03 is worse on all rows of a part, .02 on some that are better elsewhere."""
    part = matrix([[1.0] * 4, [0.5] * 4, [0.1, 0.1, 0.9, 0.9], [3.0, 3.0, 3.1, 3.1]])
    rule = Least(lambda _: 0.0, guarded=False, margin=0.0)
    last = matrix([[1.0] * 9, [0.1] * 9])
    assert rule.limits(last, None)[1] is None and rule.limits(last, part)[1] == 0.03
    crossing = Crossing(lambda loss: loss, two_sided=False)
    last = matrix([[1.0] * 9, [1.5] * 9])
    assert crossing.limits(last, None)[1] is None and crossing.limits(last, part)[1] == 0.03
