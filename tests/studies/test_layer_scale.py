"""Layer-adaptive sigma: sensitivities, the multipliers they imply, and what is then sampled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import optimize
from support.models import CASES, exact, naive, relative, run, sampled

import tfb
from benchmarks.calibration.layer_scale import WIDEST, multipliers, scale_layers
from tfb import Draws
from tfb.data.batching import EncodedRows

BATCH = CASES["llama"].batch(5, 2, 4, 3, 6, 4, 3, 2)


def built() -> tfb.BayesianModel:
    return tfb.bayesianize(exact(CASES["llama"].build()), seed=3)


def anchors() -> EncodedRows:
    rows = zip(BATCH["input_ids"], BATCH["attention_mask"].bool(), strict=True)
    ids = [row[mask].tolist() for row, mask in rows]
    n = len(ids)
    return EncodedRows(
        [str(i) for i in range(n)], ids, [(10, 11, 12)] * n, [None] * n, [("a", "b", "c")] * n
    )


def test_multipliers_maximise_the_entropy_under_the_total() -> None:
    """Against SciPy's constrained maximum of sum n log m with sum a m^2 = sum a (m of one)."""
    a, n = {"x": 1.0, "y": 4.0, "z": 0.5}, {"x": 10, "y": 30, "z": 20}
    found = multipliers(a, n)
    A, E = np.array(list(a.values())), np.array(list(n.values()))
    m = np.array(list(found.values()))
    best = optimize.minimize(
        lambda v: -(E * np.log(v)).sum(),
        np.ones(3),
        bounds=[(0.01, 10)] * 3,
        constraints={"type": "eq", "fun": lambda v: (A * v**2).sum() - (A * m**2).sum()},
    )
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
    sigma, plain = 0.05, built()
    bayes, found = scale_layers(plain, anchors(), sigma=sigma)
    assert set(found.multipliers) == set(bayes.posteriors)
    assert found.passes == pytest.approx(5 * len(bayes.samplers))  # all eight rows each
    name = "model.layers.1.mlp.up_proj"
    alone = tfb.bayesianize(exact(CASES["llama"].build()), layers=lambda n: n == name, seed=3)
    ids = torch.tensor([10, 11, 12])
    draws = Draws.antithetic(4, sigma, seed=3)
    p, plain_p = (alone.predict(BATCH, d, label_ids=ids).probs for d in (draws, Draws.mean()))
    own = plain_p.argmax(-1)[:, None]
    change = float((plain_p.gather(1, own).log() - p.gather(1, own).log()).mean())
    assert found.sensitivities[name] == pytest.approx(change / sigma**2, rel=1e-8)


def test_draws_have_the_multiplied_noise() -> None:
    """Sigma in each module is the multiplied one: its posterior's own sample at m sigma."""
    bayes, found = scale_layers(built(), anchors(), sigma=0.05)
    case, plain = CASES["llama"], built()
    for name, p in plain.posteriors.items():
        sigma = 0.1 * found.multipliers[name]
        scaled = bayes.posteriors[name].sample(0.1, 7, 3)
        torch.testing.assert_close(scaled, p.sample(sigma, 7, 3), rtol=1e-12, atol=1e-14)
    batch, draws = case.batch(), Draws.antithetic(4, 0.1, seed=3)
    wanted = naive(exact(case.build()), bayes.posteriors, draws, lambda m: run(m, batch))
    assert relative(sampled(bayes, draws, batch), wanted) < 1e-10


def test_blocks_share_a_multiplier_for_fewer_passes() -> None:
    _bayes, found = scale_layers(built(), anchors(), sigma=0.3, group="block")
    assert found.passes == pytest.approx(5 * 2)
    for block in "01":
        mine = {m for n, m in found.multipliers.items() if f"layers.{block}." in n}
        assert len(mine) == 1
    assert len(set(found.multipliers.values())) == 2


def test_refusals() -> None:
    bayes = built()
    with pytest.raises(ValueError, match=r"sigma=0\.0: sensitivities are measured at a positive"):
        scale_layers(bayes, anchors(), sigma=0.0)
    with pytest.raises(ValueError, match="group='head': expected module or block"):
        scale_layers(bayes, anchors(), sigma=0.1, group="head")
