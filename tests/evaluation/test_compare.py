"""Changes between two methods on the same rows, and their limits."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from tfb.evaluation.compare import Comparison, compare, compare_auroc
from tfb.evaluation.metrics import Evaluation, auroc, evaluate, risk_coverage

# torchmetrics returns accuracies in float32: a rounding of each of the two.
SINGLE = 2.0**-23
LABELS = torch.tensor([0, 1] * 200)


def claimed(confidence: float, right: torch.Tensor, name: str = "m") -> Evaluation:
    """Two classes, one confidence, right where it says so."""
    answer = torch.where(right, LABELS[: len(right)], 1 - LABELS[: len(right)])
    probs = torch.full((len(right), 2), 1 - confidence, dtype=torch.float64)
    probs[torch.arange(len(right)), answer] = confidence
    return Evaluation(name, "d", probs, LABELS[: len(right)])


def random_evaluation(seed: int, N: int = 400, K: int = 4) -> Evaluation:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(N, K, generator=generator, dtype=torch.float64).softmax(-1)
    labels = torch.arange(N) % K
    return Evaluation("m", "d", probs, labels, torch.special.entr(probs).sum(-1))


def test_a_method_beside_itself_has_not_changed() -> None:
    e = random_evaluation(0)
    changes = compare(e, e)
    assert set(changes) == {"accuracy", "nll", "ece", "brier", "aurc"}
    for d in changes.values():
        assert (d.change, d.low, d.high) == (0.0, 0.0, 0.0) and not d.significant


def test_ends_are_the_metrics() -> None:
    before, after = random_evaluation(0), random_evaluation(1)
    changes = compare(before, after)
    for e, side in ((before, "before"), (after, "after")):
        assert e.labels is not None and e.total is not None
        m = evaluate(e.probs, e.labels)
        for name in ("accuracy", "nll", "ece", "brier"):
            assert getattr(changes[name], side) == getattr(m, name)
        assert getattr(changes["aurc"], side) == risk_coverage(e.total, e.correct).aurc


def test_over_confidence_that_is_mended_is_significant() -> None:
    """Confidence .99 and .75 with the same 300 of 400 right: accuracy is equal on every row."""
    right = torch.arange(400) % 4 < 3
    changes = compare(claimed(0.99, right), claimed(0.75, right))
    assert changes["accuracy"].change == 0 and not changes["accuracy"].significant
    for name in ("nll", "ece", "brier"):
        assert changes[name].significant and changes[name].high < 0
    assert "aurc" not in changes  # no total uncertainty


def test_mean_differences_have_the_normal_limits() -> None:
    """A percentile bootstrap of a mean: mean ± 1.96 s / sqrt(N). Its quantiles from 2,000
    resamples have a standard error of sqrt(.025 * .975 / 2000) / phi(1.96) = 0.06 s / sqrt(N)."""
    before, after = random_evaluation(0), random_evaluation(1)
    rows = [
        -e.probs.gather(1, e.labels[:, None])[:, 0].log()
        for e in (before, after)
        if e.labels is not None
    ]
    difference = (rows[1] - rows[0]).numpy()
    error = difference.std() / len(difference) ** 0.5
    nll = compare(before, after)["nll"]
    margin = stats.norm.ppf(0.975) * error
    # Four of those errors, and the skewness that a mean of 400 keeps.
    skew = abs(stats.skew(difference)) / len(difference) ** 0.5 * error
    assert abs(nll.low - (difference.mean() - margin)) < 0.24 * error + skew
    assert abs(nll.high - (difference.mean() + margin)) < 0.24 * error + skew


@pytest.mark.parametrize(("gained", "lost"), [(4, 0), (5, 0), (6, 0), (30, 10), (20, 18), (1, 9)])
def test_accuracy_is_mcnemars_exact_test(gained: int, lost: int) -> None:
    """Beyond noise exactly where the two-sided p is below .05: of 5 and 0 it is .0625."""
    row = torch.arange(100)
    before, after = row >= gained, (row < gained) | (row >= gained + lost)
    accuracy = compare(claimed(0.8, before), claimed(0.8, after))["accuracy"]
    assert accuracy.change == pytest.approx((gained - lost) / 100, abs=SINGLE)
    p = stats.binomtest(gained, gained + lost).pvalue
    assert accuracy.significant == (p < 0.05)
    assert accuracy.low - SINGLE <= accuracy.change <= accuracy.high + SINGLE


def resampled(before: Evaluation, after: Evaluation, n: int) -> list[tuple[Evaluation, ...]]:
    """Pairs of evaluations of rows drawn with replacement, the same for both."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(n):
        rows = torch.randint(len(before.probs), (len(before.probs),), generator=generator)
        pair = []
        for e in (before, after):
            assert e.labels is not None and e.total is not None
            pair.append(replace(e, probs=e.probs[rows], labels=e.labels[rows], total=e.total[rows]))
        found.append(tuple(pair))
    return found


def test_limits_are_quantiles_of_the_metrics_of_resampled_rows() -> None:
    """By the public metrics themselves, in a loop. A quantile at .025 of R resamples has a standard
    error of sqrt(.025 * .975 / R) / phi(1.96) = 2.67 / sqrt(R) standard deviations: of 300 here and
    2,000 there 0.165 together, of which four are allowed. Totals are rounded, so that rows tie."""
    before, after = (
        replace(e, total=(4 * e.total).round())
        for e in (random_evaluation(0), random_evaluation(1))
        if e.total is not None
    )
    changes = compare(before, after)
    samples: dict[str, list[float]] = {"nll": [], "ece": [], "brier": [], "aurc": []}
    for pair in resampled(before, after, 300):
        m = [e.metrics for e in pair]
        for name in ("nll", "ece", "brier"):
            samples[name].append(getattr(m[1], name) - getattr(m[0], name))
        aurcs = [risk_coverage(e.total, e.correct).aurc for e in pair if e.total is not None]
        samples["aurc"].append(aurcs[1] - aurcs[0])
    for name, values in samples.items():
        low, high = np.quantile(values, (0.025, 0.975))
        room = 4 * 0.165 * np.std(values)
        assert abs(changes[name].low - low) < room and abs(changes[name].high - high) < room


def test_auroc_ends_and_limits() -> None:
    """Ends are the metric's; OOD rows that one method alone sets apart are significant, the same
    ones are not."""
    before = random_evaluation(0)
    assert before.total is not None
    ood = replace(before, labels=None, total=before.total.flip(0))
    apart = replace(ood, total=before.total + 1)
    change = compare_auroc((ood, before), (apart, before))
    assert change.before == auroc(ood.total, before.total)
    assert change.after == auroc(apart.total, before.total)
    assert change.significant and change.low > 0 and change.rows == 400
    same = compare_auroc((ood, before), (ood, before))
    assert (same.change, same.low, same.high) == (0.0, 0.0, 0.0) and not same.significant
    with pytest.raises(ValueError, match="total uncertainty of the same rows"):
        compare_auroc((ood, before), (replace(ood, total=None), before))


def test_a_perfect_auroc_beside_a_flat_one() -> None:
    """All pairs tie before (.5 in every resample), all are in order after (1 in every one)."""
    e = random_evaluation(0)
    flat, high = (replace(e, total=torch.full((400,), x)) for x in (1.0, 2.0))
    change = compare_auroc((flat, flat), (high, flat))
    assert (change.before, change.after, change.low, change.high) == (0.5, 1.0, 0.5, 0.5)


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_few_rows_say_nothing(rows: int) -> None:
    """All limits of identical changes coincide, however few there are; 2 * 2^-5 > 5 % > 2 * 2^-6,
    the sign test's least p-values."""
    right = torch.ones(rows, dtype=torch.bool)
    changes = compare(claimed(0.75, right), claimed(0.99, right))
    assert changes["nll"].change < -0.2
    assert math.isnan(changes["nll"].high) == (rows == 1) and not changes["nll"].high > -0.2
    assert changes["nll"].significant == (rows >= 6)


def test_rounding_is_no_change() -> None:
    """A confidence that one rounding to float32 moves, in the same direction on every row."""
    right = torch.arange(400) % 4 < 3
    changes = compare(claimed(0.75, right), claimed(0.75 * (1 + 2.0**-24), right))
    assert changes["ece"].change != 0 and not changes["ece"].significant


def test_the_same_rows_give_the_same_limits() -> None:
    before, after = random_evaluation(0), random_evaluation(1)
    assert compare(before, after) == compare(before, after)


def test_other_rows_are_refused() -> None:
    e = random_evaluation(0)
    with pytest.raises(ValueError, match="other labels, so not the same rows"):
        compare(e, random_evaluation(0, N=399))
    bare = Evaluation("bare", "d", e.probs)
    with pytest.raises(ValueError, match="bare on d: no labels"):
        compare(e, bare)


def test_the_simplest_that_nothing_beats_is_recommended() -> None:
    """300 of 400 right: confidence .75 is calibrated, and .76 as good within noise."""
    right = torch.arange(400) % 4 < 3
    adapter, near, exact, worse = (
        claimed(c, right, name)
        for c, name in ((0.99, "adapter"), (0.76, "near"), (0.75, "exact"), (0.999, "worse"))
    )
    for others, expected in (
        ((), "adapter"),
        ((worse,), "adapter"),
        ((exact,), "exact"),
        ((near, exact), "near"),  # simpler, and the interval of exact - near includes 0
        ((exact, worse), "exact"),
    ):
        found = Comparison.of([adapter, *others])
        assert found.recommended == expected
        shown = str(found)
        assert all(e.name in shown for e in found.evaluations) and f"use {expected}:" in shown
        assert json.dumps(found.to_dict(), allow_nan=False)
    for wrong in ([], [adapter, adapter], [adapter, replace(near, dataset="other")]):
        with pytest.raises(ValueError, match="expected one evaluation of each method"):
            Comparison.of(wrong)
    assert json.dumps(Comparison.of([claimed(0.9, right[:1])]).to_dict(), allow_nan=False)


def test_a_method_that_is_beaten_is_not_recommended_for_another_that_is_unsure() -> None:
    """Steady lowers the NLL of every row a little; wild lowers the mean more, but not surely."""
    N, generator = 100, torch.Generator().manual_seed(0)
    labels = torch.zeros(N, dtype=torch.int64)

    def with_loss(name: str, loss: torch.Tensor) -> Evaluation:
        p = torch.exp(-loss)
        return Evaluation(name, "d", torch.stack([p, 1 - p], 1), labels)

    base = torch.full((N,), 0.5, dtype=torch.float64)
    wild = torch.rand(N, generator=generator, dtype=torch.float64) - 0.5
    wild = 0.3 * (wild - wild.mean())  # between -.15 and .15: every row stays right
    methods = [with_loss("adapter", base), with_loss("steady", base - 0.01)]
    methods += [with_loss("wild", base - 0.012 + wild)]
    found = Comparison.of(methods)
    assert found.changes[1]["nll"].significant and not found.changes[2]["nll"].significant
    assert methods[2].metrics.nll < methods[1].metrics.nll and found.recommended == "steady"


def test_a_method_that_costs_accuracy_is_not_recommended() -> None:
    """Calibrated at 60 % against over-confident at 75 %: lower NLL, and 60 right rows are lost."""
    right = torch.arange(400) % 4 < 3
    lost = right & (torch.arange(400) % 20 >= 4)
    adapter, cautious = claimed(0.999, right, "adapter"), claimed(0.6, lost, "cautious")
    found = Comparison.of([adapter, cautious])
    assert cautious.metrics.nll < adapter.metrics.nll and found.recommended == "adapter"
