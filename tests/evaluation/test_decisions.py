"""Decisions: promises that hold exactly, and thresholds that a plain search finds too."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest
from torch import Tensor

from tfb.evaluation.decisions import LEVEL, ROOMS, SHARES, Decisions, error_bounds


def random_rows(N: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities [N, K] and labels that follow them."""
    generator = torch.Generator().manual_seed(seed)
    probs = (3 * torch.randn(N, K, generator=generator)).softmax(-1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


def binary(confidence: np.ndarray, wrong: np.ndarray) -> tuple[Tensor, Tensor]:
    """Two classes of which the first is predicted."""
    p = torch.tensor(confidence)
    return torch.stack([p, 1 - p], -1), torch.tensor(wrong).long()


# --- prediction sets ------------------------------------------------------------------------------


def test_known_quantiles() -> None:
    """The ceil((N + 1) coverage)-th smallest of 1 - p(label), in decimals."""
    p = torch.arange(1, 20, dtype=torch.float64) / 32  # 19 rows, exact in binary
    probs, labels = torch.stack([p, 1 - p], -1), torch.zeros(19, dtype=torch.int64)

    def quantile(coverage: float) -> float | None:
        return Decisions.calibrated(probs, labels, coverage=coverage).quantile

    assert quantile(0.95) == 31 / 32  # the 19th of 19
    assert quantile(0.9) == 30 / 32 and quantile(0.5) == 22 / 32
    assert quantile(0.951) == 1.0  # would be the 20th
    assert quantile(0.01) == 13 / 32


@given(st.integers(2, 40), st.floats(0.05, 0.99), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_coverage_is_exact(n: int, coverage: float, seed: int) -> None:
    """Each of n + 1 rows in turn is new: ceil((n + 1) coverage) of them are covered, or all.

    The label is never the prediction, which is in every set.
    """
    generator = torch.Generator().manual_seed(seed)
    p = 0.4 * torch.rand(n + 1, generator=generator)
    assert len(p.unique()) == n + 1
    probs, labels = torch.stack([1 - p, p], -1), torch.ones(n + 1, dtype=torch.int64)
    covered = 0
    for i in range(n + 1):
        others = torch.arange(n + 1) != i
        made = Decisions.calibrated(probs[others], labels[others], coverage=coverage)
        covered += 1 in made.apply(probs[i : i + 1])["prediction_set"][0]
    assert covered == min(math.ceil((n + 1) * coverage - 1e-9), n + 1)


@pytest.mark.parametrize(("coverage", "sizes"), [(0.6, {0, 1}), (0.95, {1, 2, 3})])
def test_sets_hold_the_likely_classes_and_the_prediction(coverage: float, sizes: set[int]) -> None:
    """Sets that would be empty hold the prediction."""
    made = Decisions.calibrated(*random_rows(300, 5), coverage=coverage)
    new, _ = random_rows(200, 5, seed=1)
    assert made.quantile is not None
    seen = set()
    for row, chosen in zip(new.double(), made.apply(new)["prediction_set"], strict=True):
        likely = {k for k in range(5) if 1 - row[k] <= made.quantile}
        assert set(chosen) == likely | {int(row.argmax())}
        assert row[chosen].tolist() == sorted(row[chosen].tolist(), reverse=True)
        seen.add(len(likely))
    assert sizes <= seen


def test_no_choice_is_in_no_set() -> None:
    """Rows with fewer choices have probability 0 where others have more."""
    probs, labels = random_rows(100, 4)
    fewer = torch.cat([probs[:, :2] / probs[:, :2].sum(-1, keepdim=True), torch.zeros(100, 2)], -1)
    made = Decisions.calibrated(
        torch.cat([probs, fewer]), torch.cat([labels, labels % 2]), coverage=0.95
    )
    assert all(max(chosen) < 2 for chosen in made.apply(fewer)["prediction_set"])


def test_too_few_rows_give_every_class() -> None:
    probs, labels = random_rows(8, 3)
    made = Decisions.calibrated(probs, labels, coverage=0.9)
    assert all(sorted(s) == [0, 1, 2] for s in made.apply(probs)["prediction_set"])
    assert "every class: 8 calibration rows allow no smaller ones for a coverage of 90 %" in str(
        made
    )
    probs, labels = random_rows(9, 3)
    assert Decisions.calibrated(probs, labels, coverage=0.9).quantile != 1.0


# --- abstention -----------------------------------------------------------------------------------


def test_bounds_are_those_of_the_binomial() -> None:
    """Clopper and Pearson's: at the limit, so few errors have exactly the risk as their chance."""
    rows, wrong = np.meshgrid([1, 7, 40, 500], [0, 1, 6, 40])
    rows, wrong = rows[wrong <= rows], wrong[wrong <= rows]
    limits = error_bounds(wrong, rows, 0.05)
    for n, k, limit in zip(rows.tolist(), wrong.tolist(), limits.tolist(), strict=True):
        known = binomtest(k, n, alternative="less").proportion_ci(0.95, method="exact").high
        assert limit == pytest.approx(known, rel=1e-9)
        if k < n:
            assert binom.cdf(k, n, limit) == pytest.approx(0.05, rel=1e-9)
    assert error_bounds(np.array([0]), np.array([29]), 0.05)[0] == pytest.approx(
        1 - 0.05 ** (1 / 29)
    )


def limit(errors: int, rows: int) -> float:
    """Upper limit of one of the sequences, by scipy; 1 where all are wrong."""
    if errors >= rows:
        return 1.0
    level = 1 - (1 - LEVEL) / len(ROOMS)
    return float(binomtest(errors, rows, alternative="less").proportion_ci(level, "exact").high)


def plain_search(confidence: list[float], wrong: list[bool], target: float) -> set[int]:
    """Accepted rows, by counting: more and more of the most confident until a limit fails."""
    N, found = len(wrong), set[int]()
    ranks = sorted({math.ceil(N * j / SHARES) for j in range(1, SHARES + 1)})
    edges = [sorted(confidence, reverse=True)[rank] if rank < N else 0.0 for rank in ranks]
    accepted = [{i for i in range(N) if confidence[i] > edge} for edge in edges]
    for room in ROOMS:
        begun = False
        for rows in accepted:
            begun = begun or limit(room, len(rows)) <= target or rows == accepted[-1]
            if begun and limit(sum(wrong[i] for i in rows), len(rows)) > target:
                break
            found = max(found, rows if begun else set(), key=len)
    return found


@pytest.mark.parametrize("target", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("N", [5, 33, 90, 400])
@pytest.mark.parametrize("ties", [False, True])
def test_accepted_rows_are_those_of_a_plain_search(N: int, target: float, ties: bool) -> None:
    for seed in range(6):
        generator = np.random.default_rng(seed)
        confidence = 1 - 0.5 * generator.random(N) ** 2
        confidence = confidence.round(1) if ties else confidence.astype(np.float32).astype(float)
        wrong = generator.random(N) < 0.8 * (1 - confidence)
        probs, labels = binary(confidence, wrong)
        made = Decisions.calibrated(probs, labels, target_error=target)
        accepted = {i for i, skip in enumerate(made.apply(probs)["abstain"]) if not skip}
        expected = plain_search(probs.float().amax(-1).tolist(), wrong.tolist(), target)
        assert accepted == expected
        assert made.accepted == len(accepted) / N
        if expected:
            assert made.error == pytest.approx(sum(wrong[i] for i in expected) / len(expected))


@pytest.mark.parametrize("shape", ["calibrated", "step"])
def test_the_true_error_is_above_the_target_as_seldom_as_promised(shape: str) -> None:
    """In 400 calibrations, within three standard errors; the truth is an integral."""

    def rate(c: np.ndarray) -> np.ndarray:
        return 1 - c if shape == "calibrated" else np.where(c > 0.8, 0.1, 0.4)

    def true_error(threshold: float) -> float:
        if shape == "calibrated":
            return (1 - threshold) / 2
        return 0.1 if threshold > 0.8 else (0.1 * 0.2 + 0.4 * (0.8 - threshold)) / (1 - threshold)

    target, runs, above, answered = 0.2, 400, 0, 0
    generator = np.random.default_rng(0)
    for _ in range(runs):
        c = 0.5 + 0.5 * generator.random(400)
        made = Decisions.calibrated(
            *binary(c, generator.random(400) < rate(c)), target_error=target
        )
        if made.threshold is not None:
            answered += 1
            above += true_error(max(made.threshold, 0.5)) > target
    risk = 1 - LEVEL
    assert above <= runs * risk + 3 * math.sqrt(runs * risk * LEVEL)
    assert answered > runs / 2


def test_equal_confidences_are_accepted_together() -> None:
    probs, labels = binary(np.full(100, 0.75), np.arange(100) < 2)
    made = Decisions.calibrated(probs, labels, target_error=0.1)
    assert (made.threshold, made.accepted, made.error) == (0.0, 1.0, 0.02)
    assert Decisions.calibrated(probs, labels, target_error=0.02).threshold is None


def test_where_nothing_can_be_promised_nothing_is_accepted() -> None:
    probs, labels = random_rows(20, 3)
    made = Decisions.calibrated(probs, labels, target_error=0.01, coverage=0.5)
    assert (made.threshold, made.accepted, made.error) == (None, 0.0, None)
    assert made.apply(probs)["abstain"] == [True] * 20
    assert str(made).startswith("abstain always: 20 calibration rows show for no share of them")


# --- the record -----------------------------------------------------------------------------------


def test_what_was_not_asked_for_is_not_there() -> None:
    probs, labels = random_rows(60, 3)
    sets = Decisions.calibrated(probs, labels, coverage=0.8)
    assert list(sets.apply(probs)) == list(sets.names) == ["prediction_set"]
    assert "abstain" not in str(sets) and "the right one for 80 % of new rows" in str(sets)
    both = Decisions.calibrated(probs, labels, coverage=0.8, target_error=0.4)
    assert list(both.apply(probs)) == list(both.names) == ["abstain", "prediction_set"]
    assert "of new ones at most 40 % (level 95 %)" in str(both)


def test_the_record_is_json() -> None:
    probs, labels = random_rows(60, 3)
    made = Decisions.calibrated(probs, labels, target_error=0.4, coverage=0.8, draws=10)
    found = Decisions(**json.loads(json.dumps(asdict(made))))
    assert found == made and found.apply(probs) == made.apply(probs)
    assert (found.rows, found.draws, found.level) == (60, 10, LEVEL)


def test_float64_is_decided_as_the_float32_of_results() -> None:
    probs, labels = random_rows(60, 3)
    exact = (probs.double() + 1e-10).clamp_max(1.0)
    made = Decisions.calibrated(exact, labels, target_error=0.4, coverage=0.8)
    assert made == Decisions.calibrated(exact.float(), labels, target_error=0.4, coverage=0.8)
    assert made.apply(exact) == made.apply(exact.float())


def test_errors() -> None:
    probs, labels = random_rows(10, 3)
    with pytest.raises(ValueError, match="give target_error, coverage or both"):
        Decisions.calibrated(probs, labels)
    with pytest.raises(ValueError, match=r"target_error=0: expected a number between 0 and 1"):
        Decisions.calibrated(probs, labels, target_error=0)
    with pytest.raises(ValueError, match=r"coverage=90: expected"):
        Decisions.calibrated(probs, labels, coverage=90)
    with pytest.raises(ValueError, match="no calibration rows"):
        Decisions.calibrated(probs[:0], labels[:0], coverage=0.9)


def test_numbers_that_are_none() -> None:
    """A row of NaN is abstained from; calibration on such, or on no labels, is refused."""
    made = Decisions(rows=9, draws=2, target_error=0.1, threshold=0.5)
    nan = torch.full((1, 3), float("nan"))
    assert made.apply(nan) == {"abstain": [True]}
    uniform = torch.full((4, 2), 0.5)
    for probs, labels, match in (
        (nan, torch.tensor([0]), "NaN or Inf"),
        (uniform, torch.tensor([0, 1, 2, 0]), "between 0 and 1"),
        (uniform, torch.tensor([0, -100, 1, 0]), "between 0 and 1"),
        (uniform, torch.tensor([0]), "expected 4"),
    ):
        with pytest.raises(ValueError, match=match):
            Decisions.calibrated(probs, labels, coverage=0.5)
