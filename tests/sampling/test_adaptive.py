"""Adaptive draws: a row's number of draws follows its own error, and changes nothing else."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.architectures import KINDS
from support.models import make_batch, relative
from torch import Tensor

import tfb
from tfb import Draws, Predictive
from tfb.sampling.adaptive import Adaptive

EXACT = 1e-10
LENGTHS = (11, 6, 9, 4, 8, 10)
SOME = Adaptive(tolerance=0.02, most=32)  # rows of this batch stop at different rounds
OWN = torch.tensor([[5, 9], [63, 5], [7, 8], [20, 30], [40, 41], [11, 60]])
FIELDS = ("probs", "total", "aleatoric", "agreement", "standard_error")


@functools.cache
def bayesian(kind: str = "llama") -> Any:
    bayes = tfb.bayesianize(KINDS[kind].build(), seed=3)
    bayes.configure(sigma=0.3)
    return bayes


def batch_of(*rows: int) -> dict[str, Tensor]:
    batch = make_batch(*LENGTHS)
    return {k: v[list(rows)] for k, v in batch.items()} if rows else batch


def counts(found: Predictive) -> list[int]:
    assert found.draw_counts is not None and found.draw_counts.dtype == torch.int64
    return [int(n) for n in found.draw_counts]


def error_of(found: Predictive) -> Tensor:
    """[B] standard error of the predicted class's probability."""
    error = found.standard_error.gather(-1, found.prediction[:, None])[:, 0]
    assert error.equal(found.predicted_error)
    return error


def same(found: Predictive, expected: Predictive) -> bool:
    for name in FIELDS:
        a, b = getattr(found, name), getattr(expected, name)
        # A standard error is a root: rounding of its square, near 0, is larger in it.
        if float((a - b).abs().max()) > (1e-8 if name == "standard_error" else EXACT):
            return False
    return True


WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "tail": {"mode": "tail", "tail": 2},
    "labels": {"label_ids": torch.tensor([5, 9, 63])},
}
# Three classes have larger errors than 64: the same tolerance would stop no row early.
SETTINGS = {"full": SOME, "tail": SOME, "labels": Adaptive(tolerance=0.04, most=32)}


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_row_is_itself_in_any_company(way: str) -> None:
    """Alone, in the batch, in the batch turned round, twice in a batch."""
    bayes, how, settings = bayesian(), WAYS[way], SETTINGS[way]
    whole = bayes.predict(batch_of(), settings, **how)
    assert len(set(counts(whole))) > 1
    order = (3, 0, 5, 1, 4, 2, 0, 3)
    turned = bayes.predict(batch_of(*order), settings, **how)
    assert counts(turned) == [counts(whole)[row] for row in order]
    assert same(turned, whole.rows(torch.tensor(order)))
    for row in range(len(LENGTHS)):
        alone = bayes.predict(batch_of(row), settings, **how)
        assert counts(alone) == [counts(whole)[row]]
        assert same(alone, whole.rows(torch.tensor([row])))


def test_labels_of_each_row_go_with_it() -> None:
    """[B, K] label_ids are chosen with the rows that go on."""
    bayes = bayesian()
    whole = bayes.predict(batch_of(), SOME, label_ids=OWN)
    assert whole.probs.shape == (6, 2) and len(set(counts(whole))) > 1
    for row in range(6):
        for ids in (OWN[row], OWN[row : row + 1]):
            alone = bayes.predict(batch_of(row), SOME, label_ids=ids)
            assert counts(alone) == [counts(whole)[row]]
            assert same(alone, whole.rows(torch.tensor([row])))
    with pytest.raises(ValueError, match=r"label_ids: expected .*\[6, K\] or .*, got \[5, 2\]"):
        bayes.predict(batch_of(), SOME, label_ids=OWN[:5])


@pytest.mark.parametrize("kind", ["llama-classifier", "bert"])
def test_classifiers(kind: str) -> None:
    bayes, settings = bayesian(kind), Adaptive(tolerance=0.02, most=16)
    whole = bayes.predict(batch_of(), settings)
    assert whole.probs.shape == (6, 3)
    for row, n in enumerate(counts(whole)):
        assert same(bayes.predict(batch_of(row), n), whole.rows(torch.tensor([row])))


# --- numbers of draws -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_draws_are_the_first_of_the_fixed_ones(way: str) -> None:
    """A row that stopped after n draws has the numbers of n draws given beforehand."""
    bayes, how = bayesian(), WAYS[way]
    found = bayes.predict(batch_of(), SETTINGS[way], **how)
    for row, n in enumerate(counts(found)):
        draws = Draws.antithetic(n, 0.3, seed=3)
        fixed = bayes.predict(batch_of(), draws, **how).rows(torch.tensor([row]))
        assert same(found.rows(torch.tensor([row])), fixed)
    assert found.draws == Draws.antithetic(max(counts(found)), 0.3, seed=3)


@pytest.mark.parametrize("tolerance", [0.1, 0.03, 0.01, 0.003])
def test_rows_stop_at_the_tolerance_and_not_before(tolerance: float) -> None:
    """At its number of draws a row is within the tolerance, or has the most there are; half as
    many, the round before, were not enough."""
    bayes, most = bayesian(), 64
    found = bayes.predict(batch_of(), Adaptive(tolerance, most))
    for row, n in enumerate(counts(found)):
        assert n in (4, 8, 16, 32, 64)
        assert float(error_of(found)[row]) <= tolerance or n == most
        if n > 4:
            before = bayes.predict(batch_of(), n // 2)
            assert float(error_of(before)[row]) > tolerance


def test_counts_grow_with_strictness() -> None:
    bayes = bayesian()
    found = [counts(bayes.predict(batch_of(), Adaptive(t))) for t in (1.0, 0.05, 0.02, 1e-9)]
    assert found[0] == [4] * 6 and found[-1] == [64] * 6
    for loose, strict in pairwise(found):
        assert all(a <= b for a, b in zip(loose, strict, strict=True))


@pytest.mark.parametrize(("first", "most"), [(4, 4), (4, 6), (6, 30), (10, 64)])
def test_rounds_end_with_the_most(first: int, most: int) -> None:
    """Also where doubling does not meet it."""
    bayes = bayesian()
    found = bayes.predict(batch_of(), Adaptive(1e-12, most, first))
    assert counts(found) == [most] * 6
    assert same(found, bayes.predict(batch_of(), most))


def test_no_noise_needs_no_more_draws() -> None:
    bayes = tfb.bayesianize(KINDS["llama"].build())
    bayes.configure(sigma=0.0)
    found = bayes.predict(batch_of(), Adaptive(1e-12))
    assert counts(found) == [4] * 6
    assert relative(found.probs, bayes.predict(batch_of(), Draws.mean()).probs) < EXACT


def test_only_rows_that_go_on_are_computed() -> None:
    """The embedding sees fewer rows each round: those that have not stopped yet."""
    bayes = bayesian()
    seen: list[int] = []
    embed = bayes.base.get_input_embeddings()
    handle = embed.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    n = counts(bayes.predict(batch_of(), SOME))
    handle.remove()
    ends = [d for d in (4, 8, 16, 32) if d <= max(n)]
    assert seen == [6] + [sum(x > d for x in n) for d in ends[:-1]]


# --- the argument ---------------------------------------------------------------------------------


def test_auto_stands_for_the_defaults() -> None:
    bayes = bayesian()
    assert Adaptive() == Adaptive(tolerance=0.01, most=64, first=4)
    auto, given = bayes.predict(batch_of(), "auto"), bayes.predict(batch_of(), Adaptive())
    assert counts(auto) == counts(given) and same(auto, given)
    assert bayes.predict(batch_of(), 4).draw_counts is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0.0}, "tolerance=0.0: expected a positive number"),
        ({"tolerance": -1.0}, "tolerance=-1.0: expected a positive number"),
        ({"tolerance": float("nan")}, "tolerance=nan: expected a positive number"),
        ({"first": 2}, "first=2, most=64: expected 4 <= first <= most"),
        ({"first": 5}, "first=5: antithetic draws come in pairs, use 6"),
        ({"most": 33}, "most=33: antithetic draws come in pairs, use 34"),
        ({"first": 8, "most": 6}, "first=8, most=6"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adaptive(**settings)


def test_calls_that_cannot_be() -> None:
    bayes = bayesian()
    with pytest.raises(ValueError, match=r"draws='many': expected a number, tfb\.Draws or"):
        bayes.predict(batch_of(), "many")
    with pytest.raises(ValueError, match="rows have different numbers of draws under 'auto'"):
        bayes.predict(batch_of(), "auto", keep_draws=True)
    with pytest.raises(ValueError, match="needs input_ids"):
        bayes.predict({"input_ids": [[1, 2]]}, "auto")
    unset = tfb.bayesianize(KINDS["llama"].build())
    with pytest.raises(ValueError, match="sigma is not set"):
        unset.predict(batch_of(), "auto")
