"""The predictive: probabilities averaged, uncertainty split, Monte-Carlo error by units.

Rounding: a softmax of K logits of magnitude L is off by at most (K + L + 8) eps, relative.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfb import Draws, Predictive

F64 = torch.float64
KINDS = [
    Draws.iid(6, 0.1),
    Draws.antithetic(6, 0.1),
    Draws((0.1, 0.2, -0.1, 0.3, 0.1, 0.1), (4, 8, 4, 8, 1, 1)),  # pairs that do not stand together
    Draws.grid([0.1, 0.2], 6, antithetic=False)[:6],
]


def logits_of(S: int, B: int, K: int, *, scale: float = 2.0, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(S, B, K, generator=g, dtype=F64)


def relative(logits: Tensor, dtype: torch.dtype = F64) -> float:
    K, L = logits.shape[-1], float(logits.abs().max())
    return (K + L + 8) * torch.finfo(dtype).eps


def entropy(p: list[float]) -> float:
    return -sum(v * math.log(v) for v in p if v > 0)


@pytest.mark.parametrize("keep_draws", [False, True])
@pytest.mark.parametrize("draws", KINDS, ids=["iid", "antithetic", "mixed", "grid"])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
def test_by_definition(draws: Draws, dtype: torch.dtype, keep_draws: bool) -> None:
    """Every field, one row, draw and unit after another in Python's floats."""
    logits = logits_of(6, 3, 4).to(dtype)
    result = Predictive.from_logits(logits, draws, keep_draws=keep_draws)
    kept = F64 if dtype == F64 else torch.float32
    slack = relative(logits, kept)
    for b in range(3):
        p = []
        for row in logits[:, b].double().tolist():
            total = sum(math.exp(v) for v in row)
            p.append([math.exp(v) / total for v in row])
        mean = [sum(column) / 6 for column in zip(*p, strict=True)]
        error = result.probs[b].double() - torch.tensor(mean, dtype=F64)
        assert bool((error.abs() <= slack).all())
        # |d(p log p)| <= (|log p| + 1) dp, which sums to no more than (log K + 1) relative
        entropies = slack * (math.log(4) + 1)
        aleatoric = sum(map(entropy, p)) / 6
        assert abs(float(result.total[b]) - entropy(mean)) <= entropies
        assert abs(float(result.aleatoric[b]) - aleatoric) <= entropies
        assert abs(float(result.epistemic[b]) - (entropy(mean) - aleatoric)) <= 2 * entropies
        top = mean.index(max(mean))
        votes = sum(row.index(max(row)) == top for row in p)
        assert abs(float(result.agreement[b]) - votes / 6) <= torch.finfo(kept).eps
        assert int(result.prediction[b]) == top
        assert abs(float(result.confidence[b]) - mean[top]) <= slack
        units = [[sum(p[s][k] for s in u) / len(u) for k in range(4)] for u in draws.units]
        for k in range(4):
            spread = sum((u[k] - mean[k]) ** 2 for u in units) / (len(units) - 1)
            expected = math.sqrt(spread / len(units))
            assert abs(float(result.standard_error[b, k]) - expected) <= 3 * slack
    fields = (result.probs, result.total, result.aleatoric, result.agreement)
    assert all(t.dtype == kept for t in (*fields, result.standard_error, result.epistemic))
    assert result.draws is draws
    if keep_draws:
        assert result.draw_probs is not None
        assert torch.equal(result.draw_probs, logits.to(kept).softmax(-1))
        assert torch.equal(result.draw_probs.mean(0), result.probs)
    else:
        assert result.draw_probs is None


def test_uncertainty_adds_up() -> None:
    """total = aleatoric + epistemic; all are within [0, log K]."""
    result = Predictive.from_logits(logits_of(10, 200, 5, scale=4.0), Draws.iid(10, 0.1))
    assert bool((result.epistemic >= 0).all())
    # total - aleatoric + aleatoric rounds twice
    error = (result.aleatoric + result.epistemic - result.total).abs()
    assert float(error.max()) <= 2 * torch.finfo(F64).eps * math.log(5)
    for part in (result.total, result.aleatoric, result.epistemic):
        assert bool((part >= 0).all()) and float(part.max()) <= math.log(5) * (1 + 1e-12)


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 1000), st.floats(0, 60))
def test_epistemic_is_never_negative(S: int, K: int, seed: int, scale: float) -> None:
    logits = logits_of(S, 2, K, scale=scale, seed=seed).float()
    result = Predictive.from_logits(logits, Draws.iid(S, 0.1))
    assert bool((result.epistemic >= 0).all()) and bool(result.epistemic.isfinite().all())
    assert bool((result.agreement >= 0).all()) and bool((result.agreement <= 1).all())


def test_draws_that_agree_have_no_epistemic_uncertainty() -> None:
    """Rounding alone makes some entropy of the mean less than the mean entropy of 500 rows."""
    one = logits_of(1, 500, 3)
    result = Predictive.from_logits(one.expand(6, 500, 3), Draws.iid(6, 0.1))
    assert bool((result.total < result.aleatoric).any())
    assert float(result.epistemic.min()) >= 0
    assert float(result.epistemic.max()) <= 2 * relative(one) * (math.log(3) + 1)
    assert bool((result.agreement == 1).all())
    assert float(result.standard_error.max()) <= 3 * relative(one)


def test_draws_that_contradict_each_other() -> None:
    """Two certain draws on different classes: all of log 2 is epistemic, half of them agree."""
    logits = torch.tensor([[[900.0, 0.0]], [[0.0, 900.0]]])
    result = Predictive.from_logits(logits, Draws.iid(2, 0.1))
    assert result.probs.tolist() == [[0.5, 0.5]] and result.aleatoric.tolist() == [0.0]
    assert torch.equal(result.epistemic, torch.tensor([0.5]).log().neg())
    assert result.agreement.tolist() == [0.5]


def test_probabilities_are_averaged_not_logits() -> None:
    """Logits (0, 6) and (0, -2) average to (0, 2), far more certain than the draws are."""
    logits = torch.tensor([[[0.0, 6.0]], [[0.0, -2.0]]], dtype=F64)
    result = Predictive.from_logits(logits, Draws.iid(2, 0.1))
    averaged = (1 / (1 + math.exp(-6)) + 1 / (1 + math.exp(2))) / 2
    assert abs(float(result.probs[0, 1]) - averaged) <= relative(logits)
    assert abs(averaged - 1 / (1 + math.exp(-2))) > 0.3


# --- the Monte-Carlo error ----------------------------------------------------------------------


def test_a_pair_counts_once() -> None:
    """Pairs that mirror each other leave no spread; taken as independent draws they would."""
    p = torch.tensor([[0.2, 0.8], [0.8, 0.2], [0.4, 0.6], [0.6, 0.4]], dtype=F64)[:, None]
    paired = Predictive.from_probs(p, Draws.antithetic(4, 0.1))
    assert float(paired.standard_error.max()) <= 4 * torch.finfo(F64).eps
    single = Predictive.from_probs(p, Draws.iid(4, 0.1))
    expected = math.sqrt((2 * 0.3**2 + 2 * 0.1**2) / 3 / 4)
    assert float((single.standard_error - expected).abs().max()) <= 8 * torch.finfo(F64).eps


@pytest.mark.parametrize("keep_draws", [False, True])
@pytest.mark.parametrize(
    "draws",
    [
        Draws.iid(1, 0.1),
        Draws.antithetic(2, 0.1),
        Draws((0.1, 0.2, 0.3), (5, 5, 5)),
        Draws((0.1, -0.1, 0.1), (0, 0, 1)),  # units of unequal size
    ],
)
def test_error_is_unknown_without_two_equal_units(draws: Draws, keep_draws: bool) -> None:
    logits = logits_of(len(draws), 2, 3)
    result = Predictive.from_logits(logits, draws, keep_draws=keep_draws)
    assert bool(result.standard_error.isnan().all())
    assert bool(result.probs.isfinite().all())


@pytest.mark.parametrize("keep_draws", [False, True])
@pytest.mark.parametrize("draws", [Draws.mean(), Draws.antithetic(4, 0.0), Draws.iid(3, 0.0)])
def test_sigma_zero_is_exact(draws: Draws, keep_draws: bool) -> None:
    logits = logits_of(1, 2, 3).expand(len(draws), 2, 3)
    result = Predictive.from_logits(logits, draws, keep_draws=keep_draws)
    assert bool((result.standard_error == 0).all())


def test_error_is_the_deviation_of_the_average() -> None:
    """Over 4000 averages of 8 draws: rms of the estimate against their own deviation.

    A sample variance of N numbers with kurtosis k has relative deviation sqrt((k - 1) / N), at
    most sqrt(2 / N) here; the mean of 4000 estimates from 8 draws sqrt(2 / 7 / 4000).
    """
    N, S = 4000, 8
    logits = logits_of(S, N, 2, scale=0.3)
    result = Predictive.from_logits(logits, Draws.iid(S, 0.1))
    actual, estimate = result.probs[:, 0].var(), result.standard_error[:, 0].square().mean()
    deviation = math.sqrt(2 / N) + math.sqrt(2 / (S - 1) / N)
    assert abs(float(estimate / actual) - 1) <= 5 * deviation


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 2, 4), (5, 2, 4), (4, 2), (1, 4, 2, 3)])
def test_logits_must_follow_the_draws(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"logits: expected \[S=4, B, K\], got \[{shape[0]}, "):
        Predictive.from_logits(torch.zeros(shape), Draws.iid(4, 0.1))
    with pytest.raises(ValueError, match=rf"p: expected \[S=4, B, K\], got \[{shape[0]}, "):
        Predictive.from_probs(torch.ones(shape), Draws.iid(4, 0.1))


@pytest.mark.parametrize("keep", [True, False])
def test_rows_without_finite_logits_have_no_prediction(keep: bool) -> None:
    """NaN, or logits that overflow at T: never the first class by default. Other rows are whole."""
    logits = torch.tensor([[[1.0, 2.0]], [[2.0, 0.0]]]).repeat(1, 4, 1)
    draws = Draws.antithetic(2, 0.1)
    whole = Predictive.from_logits(logits, draws, temperature=0.5).rows(torch.tensor([2]))
    logits[0, 0, 1], logits[1, 1, 0], logits[1, 3, 1] = math.nan, math.inf, 3e38
    p = Predictive.from_logits(logits, draws, keep_draws=keep, temperature=0.5)
    assert p.prediction.tolist() == [-1, -1, int(whole.prediction), -1]
    for name in ("probs", "total", "aleatoric", "epistemic", "agreement", "confidence"):
        values = getattr(p, name).view(4, -1)
        assert values.isnan().all(1).tolist() == [True, True, False, True], name
        torch.testing.assert_close(values[2:3], getattr(whole, name).view(1, -1))
