"""Layer-adaptive sigma: sensitivities that were measured, the multipliers they imply, and what is
sampled and saved with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from support.models import CASES, exact, naive, randomize, relative, run, sampled

import tfb
from tfb import Draws
from tfb.search.layer_scale import WIDEST, multipliers
from tfb.search.minimum import Divergence

# PEFT 0.21's own advice while saving; see test_adapters.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* invalid shape:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


def built() -> tfb.BayesianModel:
    return tfb.bayesianize(exact(CASES["llama"].build()), seed=3)


def anchors() -> list[dict[str, Any]]:
    batch: dict[str, Any] = CASES["llama"].batch(5, 2, 4, 3, 6, 4, 3, 2)
    return [batch | {"label_ids": torch.tensor([10, 11, 12])}]


def test_multipliers_maximise_the_entropy_under_the_total() -> None:
    """Against SciPy's constrained maximum of sum n log m with sum a m^2 = sum a (m of one)."""
    a, n = {"x": 1.0, "y": 4.0, "z": 0.5}, {"x": 10, "y": 30, "z": 20}
    found = multipliers(a, n)
    A, E = np.array(list(a.values())), np.array(list(n.values()))
    m = np.array(list(found.values()))
    best = optimize.minimize(
        lambda v: -(E * np.log(v)).sum(), np.ones(3), bounds=[(0.01, 10)] * 3,
        constraints={"type": "eq", "fun": lambda v: (A * v**2).sum() - (A * m**2).sum()},
    )  # fmt: skip
    assert best.success
    np.testing.assert_allclose(best.x, m, rtol=1e-3)
    assert (E * np.log(m)).sum() == pytest.approx(0.0, abs=1e-9)


def test_multipliers_stay_within_limits() -> None:
    """Before the mean is set to 1: no two differ by more than WIDEST squared."""
    found = multipliers({"x": 1e-9, "y": 1.0, "z": 1e9, "w": -1.0}, dict.fromkeys("xyzw", 5))
    assert max(found.values()) / min(found.values()) <= WIDEST**2 * (1 + 1e-12)
    assert found["w"] == found["x"] > found["y"] > found["z"]
    assert multipliers({"x": 0.0, "y": -1.0}, {"x": 1, "y": 2}) == {"x": 1.0, "y": 1.0}


def test_sensitivity_is_the_loss_of_noise_in_that_module_alone() -> None:
    bayes, sigma = built(), 0.05
    found = tfb.fit_layer_scales(bayes, anchors(), sigma=sigma)
    assert bayes.layer_scales == found.multipliers
    assert found.passes == pytest.approx(1 + 4 * len(bayes.samplers))  # all eight rows each
    name = "model.layers.1.mlp.up_proj"
    alone = tfb.bayesianize(exact(CASES["llama"].build()), layers=lambda n: n == name, seed=3)
    batch = dict(anchors()[0])
    ids = batch.pop("label_ids")
    draws = Draws.antithetic(4, sigma, seed=3)
    p, plain = (alone.predict(batch, d, label_ids=ids).probs for d in (draws, Draws.mean()))
    own = plain.argmax(-1)[:, None]
    change = float((plain.gather(1, own).log() - p.gather(1, own).log()).mean())
    assert found.sensitivities[name] == pytest.approx(change / sigma**2, rel=1e-8)


def test_draws_have_the_multiplied_noise() -> None:
    """Against a loop over posteriors whose d were divided."""
    bayes, case = built(), CASES["llama"]
    scales = {n: 0.5 + i / 7 for i, n in enumerate(bayes.samplers)}
    batch, draws = case.batch(), Draws.antithetic(4, 0.1, seed=3)
    sampled(bayes, draws, batch)  # factors are on the device already
    bayes.set_layer_scales(scales)
    posteriors = {n: replace(p, d=p.d / scales[n]) for n, p in bayes.posteriors.items()}
    wanted = naive(exact(case.build()), posteriors, draws, lambda m: run(m, batch))
    assert relative(sampled(bayes, draws, batch), wanted) < 1e-10


def test_blocks_share_a_multiplier_for_fewer_passes() -> None:
    bayes = built()
    found = tfb.fit_layer_scales(bayes, anchors(), sigma=0.3, group="block")
    assert found.passes == pytest.approx(1 + 4 * 2)
    for block in "01":
        mine = {m for n, m in found.multipliers.items() if f"layers.{block}." in n}
        assert len(mine) == 1
    assert len(set(found.multipliers.values())) == 2


def test_search_on_top_and_artifact(tmp_path: Path) -> None:
    bayes = tfb.bayesianize(CASES["llama"].build(), seed=3)
    tfb.fit_layer_scales(bayes, anchors(), sigma=0.05)
    fit = tfb.fit_sigma(bayes, anchors(), "pseudo_nll")
    kl = Divergence(bayes.posteriors, bayes.layer_scales, fit.prior_sigma or 0.0)
    assert fit.kl == pytest.approx(kl(fit.sigma), rel=1e-12)
    step = 1e-5 * fit.sigma
    quotient = (kl(fit.sigma + step) - kl(fit.sigma - step)) / (2 * step)
    assert kl.slope(fit.sigma) == pytest.approx(quotient, rel=1e-5)
    before = bayes.predict({k: v for k, v in anchors()[0].items() if k != "label_ids"}, 4).probs
    folder = bayes.save(tmp_path / "artifact", fit=fit)
    assert json.loads((folder / "tfb.json").read_text())["layer_scales"] == bayes.layer_scales
    again = tfb.load(randomize(CASES["llama"].base(), 0).eval(), folder)
    assert again.layer_scales == bayes.layer_scales
    after = again.predict({k: v for k, v in anchors()[0].items() if k != "label_ids"}, 4).probs
    assert torch.equal(after, before)


def test_refusals() -> None:
    bayes = built()
    with pytest.raises(ValueError, match="sigma=None: sensitivities are measured at a positive"):
        tfb.fit_layer_scales(bayes, anchors())
    with pytest.raises(ValueError, match="group='head': expected module or block"):
        tfb.fit_layer_scales(bayes, anchors(), sigma=0.1, group="head")
    with pytest.raises(ValueError, match="need one for every Bayesian module"):
        bayes.set_layer_scales({"model": 1.0})
    with pytest.raises(ValueError, match="expected finite numbers >= 0"):
        bayes.set_layer_scales(dict.fromkeys(bayes.samplers, -1.0))
    assert set(bayes.layer_scales.values()) == {1.0}
