"""SamplingConfig, and the model that holds it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from support.models import CASES

import tfb
from tfb import BayesianModel, Draws, SamplingConfig

EPS = torch.finfo(torch.float32).eps


def bayesian(kind: str = "llama", **arguments: Any) -> BayesianModel:
    return tfb.bayesianize(CASES[kind].build(), **arguments).configure(sigma=0.3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma": -0.1}, "sigma=-0.1: expected a finite number >= 0"),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"sigma": float("inf")}, "sigma=inf"),
        ({"temperature": 0.0}, "temperature=0.0: expected a positive number"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1e-31}, "temperature=1e-31: expected a positive number, from 1e-30 to 1e"),
        ({"temperature": 10**400}, "temperature=1000*: expected a positive number"),
        ({"sigma": 10**400}, "sigma=1000*: expected a finite number >= 0"),
        ({"sigma": "0.1"}, "sigma='0.1': expected a finite number >= 0"),
        ({"sigma": True}, "sigma=True: expected a finite number >= 0"),
        ({"seed": 1.5}, "seed=1.5: does not fit a signed 64-bit number"),
        ({"mode": "tail", "tail": "x"}, "tail=x: mode='tail' needs k >= 1"),
        ({"mode": "half"}, "mode='half': expected one of full, tail"),
        ({"mode": "tail"}, "tail=None: mode='tail' needs k >= 1"),
        ({"mode": "tail", "tail": 0}, "tail=0: mode='tail' needs k >= 1"),
        ({"tail": 2}, "tail=2 belongs to mode='tail', not to mode='full'"),
        ({"length_normalization": "words"}, "length_normalization='words': expected one of none"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    """By the record itself, and by a model, which then keeps what it had."""
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**values)
    bayes = bayesian()
    before = bayes.config
    with pytest.raises(ValueError, match=message):
        bayes.configure(**values)
    assert bayes.config is before


def test_numbers_of_numpy() -> None:
    values = {"sigma": np.float32(0.5), "seed": np.int64(3), "mode": "tail", "tail": np.int64(2)}
    assert SamplingConfig(**values) == SamplingConfig(0.5, mode="tail", tail=2, seed=3)


def test_the_record_is_frozen_and_the_model_replaces_it() -> None:
    bayes = bayesian()
    before = bayes.config
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.sigma = 0.1  # type: ignore[misc]
    with pytest.raises(AttributeError):
        bayes.sigma = 0.1  # type: ignore[misc]
    assert bayes.configure(sigma=0.1, seed=3) is bayes
    assert bayes.config == SamplingConfig(sigma=0.1, seed=3) and before.sigma == 0.3
    assert bayes.configure(mode="tail", tail=2).config.tail == 2
    assert bayes.configure(sigma=0.2).config == SamplingConfig(0.2, mode="tail", tail=2, seed=3)
    assert bayes.configure(mode="full").config.tail is None  # k belongs to the mode


def test_a_mode_that_the_model_cannot_take() -> None:
    with pytest.raises(ValueError, match="mode='tail' is not possible: an encoder"):
        bayesian("bert").configure(mode="tail", tail=1)
    with pytest.raises(ValueError, match="mode='tail' is not possible: an encoder"):
        tfb.bayesianize(CASES["bert"].build(), config=SamplingConfig(mode="tail", tail=1))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_temperature_divides_each_draws_logits(kind: str) -> None:
    """p = mean_s softmax(z_s / T), in float64 from the logits."""
    bayes, batch = bayesian(kind), CASES[kind].batch()
    draws = Draws.antithetic(4, 0.3)
    logits = bayes.logits(batch, draws)
    for T in (0.5, 1.0, 3.0):
        bayes.configure(temperature=T)
        assert torch.equal(bayes.logits(batch, draws), logits)  # these are the model's own
        p = bayes.predict(batch, draws)
        expected = (logits.double() / T).softmax(-1).mean(0)
        # A division and a softmax in float32, of numbers below 1.
        assert float((p.probs.double() - expected).abs().max()) <= 16 * EPS
        assert torch.allclose(p.total, p.aleatoric + p.epistemic, atol=1e-5)
        auto = bayes.predict(batch, tfb.Adaptive(first=4, most=4))
        assert torch.allclose(auto.probs, p.probs, atol=1e-6)


def test_logits_in_few_bits_are_divided_in_float32() -> None:
    """As softmax is taken: rounding z / T to bfloat16 would move probabilities by a percent."""
    bayes = bayesian().configure(temperature=1.3)
    logits = (torch.randn(4, 200, 6) * 8).bfloat16()
    draws = Draws.antithetic(4, 0.3)
    expected = (logits.double() / 1.3).softmax(-1).mean(0)
    found = bayes.predictive(logits, draws).probs
    assert found.dtype == torch.float32
    assert float((found.double() - expected).abs().max()) <= 16 * EPS
