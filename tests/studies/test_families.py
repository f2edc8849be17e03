"""Posterior families: their covariances, and the same machinery on each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.losses import posteriors
from support.models import CASES, exact, naive, relative, run, sampled

import tfb
from benchmarks.calibration.families import FAMILIES, in_family, with_family
from tfb import Draws
from tfb_kernels import gaussian_noise

POSTERIOR = posteriors()["a"]  # m = 6, r = 2, n = 5
SIGMA = 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_is_the_adapter(family: str) -> None:
    found = in_family(POSTERIOR, family).mean()
    # Factors are float32: one rounding of the product's entries.
    torch.testing.assert_close(found, POSTERIOR.mean(), rtol=1e-6, atol=1e-8)


def test_covariances_are_those_named() -> None:
    """Of a column of dW, for columns are independent; s is the LoRA scaling."""
    s, B = POSTERIOR.scaling, POSTERIOR.B.double()
    U = B * POSTERIOR.inv_d
    wanted = {"low_rank": U @ U.mT, "constant": B @ B.mT, "full_rank": torch.eye(6).double()}
    for family, matrix in wanted.items():
        found = in_family(POSTERIOR, family).column_covariance(SIGMA)
        torch.testing.assert_close(found, (s * SIGMA) ** 2 * matrix, rtol=1e-12, atol=1e-14)


def test_full_rank_draws_are_every_entry_of_the_noise_contract() -> None:
    full = in_family(POSTERIOR, "full_rank")
    E = gaussian_noise(4, POSTERIOR.layer_id, (7,), 6, 5)[0].double()
    wanted = full.mean() + POSTERIOR.scaling * SIGMA * E
    torch.testing.assert_close(full.sample(SIGMA, 7, 4), wanted, rtol=1e-12, atol=1e-14)


def test_directions_without_adapter_stay_silent_in_the_constant_family() -> None:
    A, B = torch.randn(3, 5), torch.randn(6, 3)
    B[:, 2] = B[:, 0] + B[:, 1]
    constant = in_family(tfb.LowRankPosterior.from_lora(A, B, 1.0), "constant")
    assert constant.d.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_is_between_gaussians_of_that_family(family: str) -> None:
    """Against torch's own divergence of the noisy factor's entries."""
    posterior, prior = in_family(POSTERIOR, family), 0.7
    std = (SIGMA * posterior.inv_d)[:, None].expand(posterior.A.shape)
    normal = torch.distributions.Normal
    q, p = normal(posterior.A.double(), std), normal(torch.zeros(()).double(), std * prior / SIGMA)
    wanted = float(torch.distributions.kl_divergence(q, p).sum())
    assert posterior.kl(SIGMA, prior) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["llama", "llama_classifier"])
def test_a_model_samples_its_family(kind: str, family: str) -> None:
    """Against a loop that puts each draw's dW into the base weight."""
    case = CASES[kind]
    bayes = with_family(tfb.bayesianize(exact(case.build()), seed=2), family)
    assert bayes.config.seed == 2
    draws = Draws.antithetic(4, 0.1, seed=2)
    batch = case.batch()
    wanted = naive(exact(case.build()), bayes.posteriors, draws, lambda m: run(m, batch))
    assert relative(sampled(bayes, draws, batch), wanted) < 1e-10
    plain = sampled(bayes, Draws.mean(), batch)[0]
    assert relative(plain, run(exact(case.build()), batch)) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_search_runs_on_each(family: str) -> None:
    """Sigma is where the loss of all anchors, linear in sigma^2 between two of the measured ones,
    crosses the limit."""
    bayes = with_family(tfb.bayesianize(exact(CASES["llama"].build())), family)
    batch: dict[str, Any] = CASES["llama"].batch(*(10 * [5, 2, 4, 3, 6, 4, 3, 2]))
    batch["label_ids"] = torch.tensor([10, 11, 12])
    fit = tfb.fit_sigma(bayes, [batch], "pseudo_nll", draws=2)
    assert bayes.sigma == fit.sigma > 0
    whole = [p for p in fit.curve if p.anchors == 80]
    assert fit.limit is not None
    above = next(i for i, p in enumerate(whole) if p.loss > fit.limit)
    low, high = whole[above - 1 : above + 1]
    share = (fit.limit - low.loss) / (high.loss - low.loss)
    wanted = low.sigma**2 + share * (high.sigma**2 - low.sigma**2)
    # Losses near 1 are rounded at 1e-16; they differ by more than 1e-4.
    assert fit.sigma**2 == pytest.approx(wanted, rel=1e-10)


def test_unknown_family() -> None:
    with pytest.raises(ValueError, match="family='wide': expected one of low_rank, constant, full"):
        in_family(POSTERIOR, "wide")
