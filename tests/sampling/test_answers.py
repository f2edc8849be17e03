"""Log-probabilities of answers, token by token, against PEFT's model on whole texts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.architectures import CAUSAL, DRAWS, KINDS, OTHERS
from support.models import CASES, make_batch, naive, relative
from torch import Tensor

import tfb
from tfb import Draws
from tfb.data.batching import pad_choices

EXACT = 1e-10
ANSWERS = [(9, 5, 8, 2), (7, 2), (2,)]
IDS = pad_choices([(answer,) for answer in ANSWERS])[:, 0]
TEMPERATURES = (0.5, 1.0, 3.0)
TAILS: list[dict[str, Any]] = [{}, {"mode": "tail", "tail": 1}, {"mode": "tail", "tail": 3}]


def batch_of(pad: str = "left") -> dict[str, Tensor]:
    return make_batch(7, 2, 5, pad=pad)


@functools.cache
def bayesian(kind: str = "llama") -> Any:
    return tfb.bayesianize(KINDS[kind].build(), seed=3)


@torch.no_grad()
def by_hand(model: Any) -> Tensor:
    """[B, L, G]: each row alone, the logits before each token of its answer."""
    batch, found = batch_of(), torch.zeros(*IDS.shape, len(TEMPERATURES), dtype=torch.float64)
    for row, answer in enumerate(ANSWERS):
        prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        ids = torch.cat([prompt, torch.tensor(answer)])[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        for g, T in enumerate(TEMPERATURES):
            log_probs = (logits / T).log_softmax(-1)
            found[row, : len(answer), g] = log_probs[range(len(answer)), list(answer)]
    return found


@pytest.mark.parametrize("kind", CAUSAL)
def test_every_token_is_given_those_before_it(kind: str) -> None:
    """By each draw's weights, at every temperature; 0 where a shorter answer has ended."""
    bayes, twin = bayesian(kind), KINDS[kind].build()
    expected = naive(twin, bayes.posteriors, DRAWS, by_hand)
    for pad in ("left", "right"):
        found = bayes.answer_log_probs(batch_of(pad), DRAWS, IDS, TEMPERATURES)
        assert found.shape == (len(DRAWS), 3, 4, 3)
        assert relative(found, expected) < EXACT
    assert relative(found[0], found[2]) > 1e-3  # the draws do differ
    plain = bayes.answer_log_probs(batch_of(), Draws.mean(), IDS, TEMPERATURES)
    assert relative(plain[0], by_hand(twin)) < EXACT


@pytest.mark.parametrize("how", TAILS)
def test_their_sum_is_the_score_of_the_answer_as_a_choice(how: dict[str, Any]) -> None:
    """So the noise of tail mode acts where it does there: at the prompt's end and behind it."""
    bayes = bayesian()
    found = bayes.answer_log_probs(batch_of(), DRAWS, IDS, **how)
    score = bayes.logits(batch_of(), DRAWS, IDS[:, None], **how)
    assert relative(found[..., 0].sum(2), score[..., 0]) < EXACT
    # A part of the draws in each pass gives the same.
    parts = [bayes.answer_log_probs(batch_of(), DRAWS[s : s + 2], IDS, **how) for s in (0, 2)]
    assert relative(torch.cat(parts), found) < EXACT


def test_other_models_and_ids_are_refused() -> None:
    for kind in (OTHERS["t5"], KINDS["llama-classifier"]):
        bayes: Any = tfb.bayesianize(kind.build(), seed=3)
        with pytest.raises(ValueError, match=f"answers: they need a causal lang.*{bayes.task}"):
            bayes.answer_log_probs(batch_of(), DRAWS, IDS)
    for ids, fault in ((IDS[:2], r"expected \[3, K, L\]"), (IDS + 64, "outside the vocabulary")):
        with pytest.raises(ValueError, match=fault):
            bayesian().answer_log_probs(batch_of(), DRAWS, ids)


def test_half_precision_is_divided_in_single() -> None:
    """bfloat16 would round the quotient once more, by 2^-9 of it."""
    bayes = tfb.bayesianize(CASES["bf16"].build(), seed=3)
    found = bayes.answer_log_probs(batch_of(), Draws.mean(), IDS[:, :1], TEMPERATURES)
    assert found.dtype == torch.float32
    logits = bayes.logits(batch_of(), Draws.mean())[0].double()  # the same pass
    for g, T in enumerate(TEMPERATURES):
        first = (logits / T).log_softmax(-1)[range(3), IDS[:, 0]]
        torch.testing.assert_close(found[0, :, 0, g].double(), first, rtol=1e-6, atol=1e-6)
