"""Calibration metrics against their definitions, computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from tfb.evaluation.metrics import (
    Evaluation,
    apply_temperature,
    auroc,
    evaluate,
    fit_temperature,
    reliability,
    risk_coverage,
)

# torchmetrics returns float32: one rounding of a figure in [0, 1].
SINGLE = 2.0**-24

# Four rows of three classes; predictions 0, 1, 0, 2; labels 0, 2, 0, 1.
PROBS = torch.tensor(
    [[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.95, 0.05, 0.0], [0.2, 0.2, 0.6]], dtype=torch.float64
)
LABELS = torch.tensor([0, 2, 0, 1])


def test_figures_by_hand() -> None:
    m = evaluate(PROBS, LABELS, n_bins=2, reference_predictions=torch.tensor([0, 0, 0, 0]))
    assert m.rows == 4 and m.n_bins == 2
    assert m.accuracy == 0.5
    nll = -(math.log(0.7) + math.log(0.4) + math.log(0.95) + math.log(0.2)) / 4
    assert m.nll == pytest.approx(nll, rel=1e-14)
    brier = (0.09 + 0.04 + 0.01) + (0.01 + 0.25 + 0.36) + (0.0025 + 0.0025) + (0.04 + 0.64 + 0.36)
    assert m.brier == pytest.approx(brier / 4, rel=1e-14)
    # Confidences .7, .5, .95, .6 all lie in [.5, 1]: one bin of accuracy .5.
    assert m.ece == pytest.approx((0.7 + 0.5 + 0.95 + 0.6) / 4 - 0.5, abs=4 * SINGLE)
    assert m.miscalibration == pytest.approx(0.6875 - 0.5, abs=SINGLE)
    assert m.flip_ratio == 0.5
    assert evaluate(PROBS, LABELS).flip_ratio is None


def test_ece_of_several_bins_by_hand() -> None:
    """Fifths: .5 -> bin 2; .6 starts bin 3, with .7; .95 -> bin 4."""
    m = evaluate(PROBS, LABELS, n_bins=5)
    wanted = 1 / 4 * abs(0 - 0.5) + 2 / 4 * abs(0.5 - 0.65) + 1 / 4 * abs(1 - 0.95)
    assert m.ece == pytest.approx(wanted, abs=4 * SINGLE)
    bins = reliability(PROBS, LABELS, 5)
    assert bins.counts.tolist() == [0, 0, 1, 2, 1]
    assert bins.accuracy.tolist() == [0, 0, 0, 0.5, 1]
    assert bins.confidence.tolist() == pytest.approx([0, 0, 0.5, 0.65, 0.95])


def test_one_bin_ece_is_the_size_of_the_miscalibration() -> None:
    m = evaluate(PROBS, LABELS, n_bins=1)
    assert m.ece == pytest.approx(abs(m.miscalibration), abs=4 * SINGLE)


def test_certainty_belongs_to_the_last_bin() -> None:
    """Guo et al.: the last bin is closed. A right .95 and a wrong 1 are one bin, half right."""
    probs, labels = torch.tensor([[0.95, 0.05], [1.0, 0.0]]), torch.tensor([0, 1])
    assert evaluate(probs, labels).ece == pytest.approx(0.975 - 0.5, abs=4 * SINGLE)
    assert reliability(probs, labels).counts.tolist() == [0] * 14 + [2]


def test_rounding_above_one_changes_nothing() -> None:
    """torchmetrics would take a softmax of all rows if one probability were above 1."""
    probs, labels = torch.tensor([[0.95, 0.05], [1.0 + 1e-6, 0.0]]), torch.tensor([0, 1])
    exact = probs.clamp_max(1.0)
    over, plain = evaluate(probs, labels), evaluate(exact, labels)
    assert over.ece == plain.ece and over.accuracy == plain.accuracy


def test_calibrated_by_construction() -> None:
    """Of every 10 rows with confidence .7 exactly 7 are right, and so on: ECE 0."""
    probs, labels = [], []
    for tenths in (6, 7, 8, 9):
        probs += [[tenths / 10, 1 - tenths / 10]] * 10
        labels += [0] * tenths + [1] * (10 - tenths)
    m = evaluate(torch.tensor(probs, dtype=torch.float64), torch.tensor(labels))
    assert m.ece == pytest.approx(0.0, abs=10 * SINGLE) and m.accuracy == pytest.approx(0.75)
    assert m.miscalibration == pytest.approx(0.0, abs=SINGLE)


def test_calibrated_in_expectation() -> None:
    """Labels drawn from the probabilities: each figure is within 5 standard errors of its
    expectation."""
    generator = torch.Generator().manual_seed(0)
    N, K = 20_000, 4
    probs = torch.randn(N, K, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    labels = torch.multinomial(probs, 1, generator=generator)[:, 0]
    m = evaluate(probs, labels)
    entropy = torch.special.entr(probs).sum(-1)
    variance_nll = (probs * probs.log().square()).sum(-1) - entropy.square()
    assert abs(m.nll - float(entropy.mean())) < 5 * float(variance_nll.mean() / N) ** 0.5
    top = probs.amax(-1)
    error = float((top * (1 - top)).mean() / N) ** 0.5
    assert abs(m.miscalibration) < 5 * error
    # sum over M bins of n_m / N * (standard error in the bin) <= sqrt(M) * error (Cauchy-Schwarz).
    assert m.ece < 5 * error * 15**0.5
    # A row's Brier score lies in [0, 2], so its standard deviation is at most 1.
    assert m.brier == pytest.approx(float((1 - probs.square().sum(-1)).mean()), abs=5 * N**-0.5)


def test_miscalibration_is_positive_for_over_confidence() -> None:
    sure, unsure = torch.tensor([[0.99, 0.01]] * 4), torch.tensor([[0.6, 0.4]] * 4)
    labels = torch.tensor([0, 0, 0, 1])
    assert evaluate(sure, labels).miscalibration == pytest.approx(0.99 - 0.75, abs=2 * SINGLE)
    assert evaluate(unsure, labels).miscalibration == pytest.approx(0.6 - 0.75, abs=2 * SINGLE)


def test_a_probability_of_zero_costs_the_floor() -> None:
    m = evaluate(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert m.nll == pytest.approx(-math.log(1e-12)) and m.brier == 2.0 and m.accuracy == 0.0


def test_padded_classes_change_nothing() -> None:
    padded = evaluate(torch.nn.functional.pad(PROBS, (0, 3)), LABELS)
    plain = evaluate(PROBS, LABELS).to_dict()
    assert padded.flip_ratio is None and plain.pop("flip_ratio") is None
    assert {k: v for k, v in padded.to_dict().items() if v is not None} == pytest.approx(
        plain, rel=1e-14
    )


def test_to_dict_holds_plain_numbers() -> None:
    figures = evaluate(PROBS, LABELS).to_dict()
    assert figures["rows"] == 4 and figures["flip_ratio"] is None
    assert {type(v) for v in figures.values()} == {int, float, type(None)}


def test_evaluation_has_metrics_if_it_has_labels() -> None:
    assert Evaluation("a", "b", PROBS, LABELS).metrics == evaluate(PROBS, LABELS)
    with pytest.raises(ValueError, match="a on b: no labels, so no metrics"):
        _ = Evaluation("a", "b", PROBS).metrics


@st.composite
def predictions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rows of K classes whose probabilities like to be round numbers, edges of bins among them."""
    K = draw(st.integers(2, 5))
    weights = st.one_of(st.integers(0, 15), st.floats(0, 1, width=32))
    rows = draw(
        st.lists(st.lists(weights, min_size=K, max_size=K).filter(any), min_size=1, max_size=30)
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    p = torch.tensor(rows, dtype=torch.float64)
    labels = draw(st.lists(st.integers(0, K - 1), min_size=len(rows), max_size=len(rows)))
    return (p / p.sum(-1, keepdim=True)).to(dtype), torch.tensor(labels)


@given(predictions(), st.integers(1, 20))
def test_reliability_is_what_the_ece_sums(data: tuple[Tensor, Tensor], n_bins: int) -> None:
    """Error: float32 sums of at most 30 rows in a bin, then of the bins."""
    probs, labels = data
    bins, m = reliability(probs, labels, n_bins), evaluate(probs, labels, n_bins=n_bins)
    weight = bins.counts.double() / len(labels)
    ece = float((weight * (bins.accuracy - bins.confidence).abs()).sum())
    assert ece == pytest.approx(m.ece, abs=(30 + n_bins) * 2 * SINGLE)
    assert int(bins.counts.sum()) == len(labels)
    assert float((weight * bins.accuracy).sum()) == pytest.approx(m.accuracy, abs=2 * SINGLE)
    gap = float((weight * (bins.confidence - bins.accuracy)).sum())
    assert gap == pytest.approx(m.miscalibration, abs=2 * SINGLE)
    assert abs(m.miscalibration) <= m.ece + (30 + n_bins) * 2 * SINGLE  # triangle inequality


@given(predictions())
def test_ranges(data: tuple[Tensor, Tensor]) -> None:
    m = evaluate(*data, reference_predictions=data[0].argmax(-1))
    assert 0 <= m.accuracy <= 1 and 0 <= m.ece <= 1 and 0 <= m.brier <= 2 + SINGLE
    assert 0 <= m.nll <= 27.64 and m.flip_ratio == 0


# --- temperature --------------------------------------------------------------------------------


def drawn(temperature: float, n: int = 4000) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from softmax(logits / temperature)."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(n, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
    return logits, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_recovered(temperature: float) -> None:
    """Within 5 standard errors of a maximum-likelihood estimate of log T: the Fisher information
    of log T is N times the mean variance of the scaled logits under their softmax."""
    logits, labels = drawn(temperature)
    scaled = logits / temperature
    p = scaled.softmax(-1)
    variance = (p * scaled.square()).sum(-1) - (p * scaled).sum(-1).square()
    error = float(variance.sum()) ** -0.5
    found = fit_temperature(logits, labels)
    assert abs(math.log(found / temperature)) < 5 * error < 0.2


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_fitted_temperature_is_stationary(temperature: float) -> None:
    """No NLL is lower a thousandth to either side, and log-probabilities do as well as logits."""
    logits, labels = drawn(temperature, 500)
    found = fit_temperature(logits, labels)

    def nll(t: float) -> float:
        return evaluate(apply_temperature(logits, t), labels).nll

    assert nll(found) < min(nll(found * 1.001), nll(found / 1.001))
    again = fit_temperature(logits.log_softmax(-1), labels)
    assert again == pytest.approx(found, rel=1e-4)  # the bounded search ends within 1e-5 in log T


def test_the_temperature_of_draws_is_that_of_their_average() -> None:
    """Least NLL of mean_s softmax(z_s / T), and of draws that agree that of one of them."""
    logits, labels = drawn(2.0, 500)
    generator = torch.Generator().manual_seed(2)
    draws = logits + 2 * torch.randn(4, 500, 5, generator=generator, dtype=torch.float64)
    found = fit_temperature(draws, labels)

    def nll(t: float) -> float:
        return evaluate((draws / t).softmax(-1).mean(0), labels).nll

    assert nll(found) < min(nll(found * 1.001), nll(found / 1.001))
    alike = fit_temperature(logits.expand(4, -1, -1), labels)
    assert alike == pytest.approx(fit_temperature(logits, labels), rel=1e-4)  # as above


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_classes_that_a_row_does_not_have_stay_without(temperature: float) -> None:
    """Columns of zeros change neither the fit nor what it gives."""
    logits, labels = drawn(2.0, 200)
    probs = logits.softmax(-1)
    padded = torch.nn.functional.pad(probs, (0, 3))
    assert fit_temperature(padded.log(), labels) == fit_temperature(probs.log(), labels)
    scaled = apply_temperature(padded.log(), temperature)
    torch.testing.assert_close(scaled[:, :5], apply_temperature(probs.log(), temperature))
    assert not scaled[:, 5:].any()


def test_apply_temperature_keeps_the_prediction() -> None:
    scaled = apply_temperature(PROBS.log(), 4.0)
    torch.testing.assert_close(scaled.sum(-1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(scaled.argmax(-1), PROBS.argmax(-1))
    torch.testing.assert_close(apply_temperature(PROBS.log(), 1.0), PROBS)
    assert float(scaled.amax()) < float(PROBS.amax())


# --- errors -------------------------------------------------------------------------------------

P, Y = PROBS, LABELS
NAN = torch.tensor([[math.nan, 0.5], [0.5, 0.5]])
BAD: list[tuple[Any, Any, str]] = [
    (P[:0], Y[:0], r"expected probs \[N, K\] and labels \[N\].* got \[0, 3\] and \[0\]"),
    (P[:, :1], Y, r"K at least 2, got \[4, 1\]"),
    (P[0], Y, r"got \[3\] and \[4\]"),
    (P, Y[:3], r"got \[4, 3\] and \[3\]"),
    (P, Y[:, None], r"got \[4, 3\] and \[4, 1\]"),
    (NAN, Y[:2], "probs: hold NaN or Inf"),
    (P.log(), Y, "probs: hold NaN or Inf"),
    (P + 1, Y, "sum to 1; apply softmax first"),
    (P * torch.tensor([1.0, -1.0, 1.0]), Y, "sum to 1; apply softmax first"),
    (torch.tensor([[1.5, -0.5]]), torch.tensor([0]), "sum to 1; apply softmax first"),
    (P, torch.tensor([0, 1, 2, 3]), r"labels: must lie in \[0, 3\)"),
    (P, torch.tensor([0, 1, -100, 2]), r"labels: must lie in \[0, 3\)"),
]


@pytest.mark.parametrize(("probs", "labels", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(probs: Tensor, labels: Tensor, message: str) -> None:
    for measure in (evaluate, reliability):
        with pytest.raises(ValueError, match=message):
            measure(probs, labels)


def test_bad_reference_and_temperature() -> None:
    with pytest.raises(ValueError, match=r"reference_predictions: expected \[4\], got \[3\]"):
        evaluate(P, Y, reference_predictions=Y[:3])
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"temperature=.*: expected a positive number"):
            apply_temperature(P, temperature)
    for scores, labels, message in (
        (P.log()[:0], Y[:0], "N at least 1"),
        (P.log()[None, :0], Y[:0], "N at least 1"),
        (P.log()[0], Y, r"expected probs \[N, K\]"),
        (P.log()[None, None], Y, r"expected probs \[N, K\]"),
        (P.log(), torch.tensor([0, 1, 2, 3]), r"labels: must lie in \[0, 3\)"),
        (NAN, Y[:2], "hold NaN or Inf"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_temperature(scores, labels)


# --- selective prediction -----------------------------------------------------------------------


def test_risk_coverage_by_hand() -> None:
    """The surest of four rows is wrong, the others right: errors 1, 1, 1, 1 of 1, 2, 3, 4."""
    curve = risk_coverage(
        torch.tensor([0.9, 0.1, 0.5, 0.7]), torch.tensor([True, False, True, True])
    )
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk.tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=1e-14)
    assert curve.aurc == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, rel=1e-14)


def test_perfect_order_is_the_least_aurc() -> None:
    """N - E right rows first: risk 0, then j / (N - E + j) for j = 1..E."""
    correct = torch.arange(20) < 15
    best = risk_coverage(torch.arange(20.0), correct).aurc
    assert best == pytest.approx(sum(j / (15 + j) for j in range(1, 6)) / 20, rel=1e-12)
    worst = risk_coverage(-torch.arange(20.0), correct).aurc
    assert worst == pytest.approx((5 + sum(5 / k for k in range(6, 21))) / 20, rel=1e-12)


def test_rows_of_equal_uncertainty_are_in_no_order() -> None:
    """All equal: the error rate at every coverage. A tie: the mean over its orders."""
    correct = torch.tensor([True, False, True, True])
    flat = risk_coverage(torch.ones(4), correct)
    assert flat.risk.tolist() == [0.25] * 4 and flat.aurc == 0.25
    tied = risk_coverage(torch.tensor([0.0, 1.0, 1.0, 2.0]), correct).aurc
    first = risk_coverage(torch.tensor([0.0, 1.0, 1.5, 2.0]), correct).aurc
    second = risk_coverage(torch.tensor([0.0, 1.5, 1.0, 2.0]), correct).aurc
    assert tied == pytest.approx((first + second) / 2, rel=1e-14)


def test_risk_coverage_of_all_right_and_all_wrong() -> None:
    scores = torch.tensor([0.3, 0.1, 0.2])
    assert risk_coverage(scores, torch.ones(3, dtype=torch.bool)).aurc == 0.0
    assert risk_coverage(scores, torch.zeros(3, dtype=torch.bool)).aurc == 1.0


@pytest.mark.parametrize(
    ("uncertainty", "correct", "message"),
    [
        (torch.zeros(0), torch.zeros(0, dtype=torch.bool), "N at least 1"),
        (torch.zeros(2), torch.zeros(3, dtype=torch.bool), r"\[2\] and \[3\]"),
        (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool), "expected uncertainty"),
        (torch.tensor([math.nan]), torch.tensor([True]), "holds NaN"),
    ],
)
def test_risk_coverage_refuses(uncertainty: Tensor, correct: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        risk_coverage(uncertainty, correct)


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9), min_size=1))
def test_auroc_is_mann_and_whitneys_u(positive: list[int], negative: list[int]) -> None:
    """Ties half; of scores outside [0, 1], and so close that a sigmoid's rounding would tie them.
    torchmetrics returns float32, from sums of at most a few rectangles."""
    scores = [1000 + 2.0**-12 * torch.tensor(x, dtype=torch.float64) for x in (positive, negative)]
    u = stats.mannwhitneyu(*(x.numpy() for x in scores), method="asymptotic").statistic
    expected = u / (len(positive) * len(negative))
    assert auroc(*scores) == pytest.approx(expected, abs=16 * SINGLE)


def test_auroc_by_hand() -> None:
    """Of six pairs four are in order and one is a tie."""
    assert auroc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0, 2.5])) == 0.75
    assert auroc(torch.tensor([2.0]), torch.tensor([1.0])) == 1.0
    assert auroc(torch.ones(3), torch.ones(4)) == 0.5
    with pytest.raises(ValueError, match="negative: expected at least one score"):
        auroc(torch.ones(1), torch.ones(0))
    with pytest.raises(ValueError, match=r"positive: expected .* no NaN"):
        auroc(torch.tensor([math.nan]), torch.ones(1))
