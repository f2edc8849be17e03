"""The study of written text: forced answers, scores and what is judged by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.architectures import DRAWS
from support.models import CASES, exact, make_batch, relative

import tfb
from benchmarks.generation import study

EXACT = 1e-10


def prompts() -> dict[str, Any]:
    return {k: v for k, v in make_batch(7, 4, 6).items() if k != "position_ids"}


def model(**how: Any) -> tfb.BayesianModel:
    bayes = tfb.bayesianize(exact(CASES["llama"].build())).configure(sigma=0.1, **how)
    bayes.base.generation_config.eos_token_id = None
    return bayes


def test_forced_answers_are_teacher_forced() -> None:
    """The probabilities of given tokens are those that the search averages, in both modes.

    Scores pass through float32, so a probability is off by twice their rounding, and the largest
    of the model's scores is below 64.
    """
    answers = torch.tensor([[9, 8, 7], [5, 4, -1], [3, -1, -1]])
    for how in ({}, {"mode": "tail", "tail": 2}):
        bayes, force = model(**how), study.Forced(answers)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        bayes.generate(prompts(), DRAWS, logits_processor=[force], **options)
        own, confidence, right = torch.stack(force.kept, 1).unbind(-1)
        each = bayes.answer_log_probs(prompts(), DRAWS, answers)[..., 0]
        expected = each.logsumexp(0) - np.log(len(DRAWS))
        real = answers >= 0
        assert float((own.log() - expected)[real].abs().max()) < 2 * 64 * 2.0**-24
        assert bool((confidence >= own).all())
        assert right[real].bool().equal((own == confidence)[real]) and own[real].min() > 0


def test_scores_of_a_text() -> None:
    """Information is log p - mean log p_s of the text; draws that all write it disagree by 0."""
    bayes = model()
    draws = DRAWS
    out = bayes.generate(prompts(), draws, **study.GREEDY | {"max_new_tokens": 4})
    each = bayes.answer_log_probs(prompts(), draws, out.new_tokens)[..., 0]
    found = study.information(bayes, prompts(), draws, out)
    assert relative(found, out.log_probs.sum(1) - each.sum(-1).mean(0)) < EXACT
    quiet = bayes.generate(prompts(), study.Draws.mean(), **study.GREEDY)
    scores = study.scores_of(bayes, prompts(), study.Draws.mean(), quiet)
    for name in study.OF_DRAWS:
        assert scores[name].tolist() == [0.0] * 3
    assert np.allclose(scores["mean_log_prob"] * 32, scores["log_prob"])


def test_what_a_score_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is larger wherever a text is wrong is perfect; against itself nothing changes."""
    monkeypatch.setattr(study, "RESAMPLES", 20)
    right = np.arange(40) % 4 > 0
    score, out = np.where(right, 0.0, 1.0), np.full(10, 2.0)
    perfect = study.Judged(right, {"log_prob": score}, {"log_prob": out})
    errors, aurc, shift = study.judge(perfect, "log_prob").tolist()
    assert (errors, shift) == (1.0, 1.0) and 0 < aurc < 0.25
    blind = replace(perfect, scores={"log_prob": 0 * score}, shift={"log_prob": 0 * out})
    assert study.judge(blind, "log_prob").tolist()[0] == 0.5
    by_seed = [{"adapter": blind, "ours": perfect}] * 2
    plain, ours = (study.resampled(by_seed, m, "log_prob") for m in ("adapter", "ours"))
    same = study.summary(plain, plain)["errors"]
    assert (same["change"], same["low"], same["high"]) == (0.0, 0.0, 0.0)
    better = study.summary(ours, plain)["errors"]
    assert better == {"value": 1.0, "change": 0.5, "low": 0.5, "high": 0.5}
