"""The posterior of one layer: exact reparameterization, Theorem 4.1, rank, KL, clear refusals.

Rounding bounds: a chain of k roundings is off by at most k eps times the same formula of absolute
values or norms; LAPACK's SVD is off by a modest multiple of max(m, r) eps d_max.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from tfb.draws import Draws
from tfb.linear import BayesLoRALinear
from tfb.posterior import AdapterError, LowRankPosterior, default_prior_sigma

EPS = torch.finfo(torch.float64).eps
F64 = torch.float64
LOW = (torch.float32, torch.bfloat16, torch.float16)


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def orthogonal(k: int, seed: int = 0) -> Tensor:
    q: Tensor = torch.linalg.qr(randn(k, k, seed=seed))[0]
    return q


def adapter(
    m: int, r: int, n: int, rank: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(A, B) in float64 with a dense V; ``rank`` below r makes B deficient."""
    B = randn(m, r, seed=seed + 1)
    if rank is not None:
        B = randn(m, rank, seed=seed + 1) @ randn(rank, r, seed=seed + 2)
    return randn(r, n, seed=seed + 3) / n**0.5, B


def svd_slack(B: Tensor) -> float:
    """What a backward-stable SVD in float64, and a product before it, may move of B."""
    return 10 * max(B.shape) * EPS * float(torch.linalg.matrix_norm(B.double(), 2))


# --- factors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "r", "n"), [(40, 8, 24), (6, 6, 5), (3, 8, 7), (1, 1, 1), (9, 1, 4)])
@pytest.mark.parametrize("dtype", [F64, *LOW])
def test_factors_multiply_to_the_adapter(m: int, r: int, n: int, dtype: torch.dtype) -> None:
    """B'A' = BA, stored in float32 at least; rounding counts against |B'| |A'|."""
    A, B = (t.to(dtype) for t in adapter(m, r, n))
    p = LowRankPosterior.from_lora(A, B, 0.5)
    assert p.A.dtype == p.B.dtype == (F64 if dtype == F64 else torch.float32)
    assert (p.rank, p.in_features, p.out_features) == (r, n, m)
    exact, made = B.double() @ A.double(), p.B.double() @ p.A.double()
    stored = torch.finfo(p.A.dtype).eps
    norms = float(p.B.double().norm() * p.A.double().norm())
    assert float((made - exact).norm()) <= (stored + 4 * r * max(m, r) * EPS) * norms
    assert torch.equal(p.mean(), 0.5 * made)


def test_factors_multiply_to_the_adapter_within_a_millionth() -> None:
    A, B = (t.float() for t in adapter(200, 16, 100))
    p = LowRankPosterior.from_lora(A, B, 1.0)
    exact = B.double() @ A.double()
    assert float((p.mean() - exact).norm()) <= 1e-6 * float(exact.norm())
    assert not torch.allclose(p.A, A, atol=0.1)  # V is not trivial here


@pytest.mark.parametrize(("m", "r"), [(40, 8), (3, 8), (8, 8)])
def test_singular_basis(m: int, r: int) -> None:
    """B' = U diag(d): orthogonal columns, d descending, the largest entry of each positive."""
    A, B = adapter(m, r, 10)
    p = LowRankPosterior.from_lora(A, B, 1.0)
    k, slack = min(m, r), svd_slack(B)
    assert p.d.dtype == F64 and p.d.shape == (r,) and p.effective_rank == k
    assert bool((p.d[:-1] >= p.d[1:]).all())
    assert float((p.d[:k] - torch.linalg.svdvals(B)).abs().max()) <= 2 * slack
    gram = p.B.mT @ p.B
    assert float((gram - torch.diag(p.d**2)).abs().max()) <= 2 * float(p.d[0]) * slack
    largest = p.B[:, :k].gather(0, p.B[:, :k].abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    assert torch.equal(p.inv_d[:k], 1 / p.d[:k]) and bool((p.inv_d[k:] == 0).all())


def test_signs_do_not_depend_on_the_adapters_basis() -> None:
    """Flipping B's columns and A's rows together leaves B' and A' as they are."""
    A, B = adapter(12, 4, 6)
    flip = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=F64)
    a, b = (
        LowRankPosterior.from_lora(s[:, None] * A, B * s, 1.0)
        for s in (flip, torch.ones_like(flip))
    )
    d = torch.cat([a.d, torch.zeros(1, dtype=F64)])
    gap = float((d[:-1] - d[1:]).min())  # singular vectors move by slack / gap
    limit = 4 * svd_slack(B) / gap * float(d[0])
    assert float((a.B - b.B).abs().max()) <= limit
    assert float((a.A - b.A).abs().max()) <= limit / float(d[0]) * float(A.norm())


@pytest.mark.parametrize("kind", ["orthogonal", "any"])
def test_same_update_same_posterior(kind: str) -> None:
    """(RA, B R^-1) is the same adapter: mean and covariance agree; d too for orthogonal R."""
    A, B = adapter(30, 5, 12)
    R = (
        orthogonal(5)
        if kind == "orthogonal"
        else orthogonal(5)
        @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25], dtype=F64))
        @ orthogonal(5, seed=7)
    )
    other_B = torch.linalg.solve(R, B, left=False)
    a = LowRankPosterior.from_lora(A, B, 2.0)
    b = LowRankPosterior.from_lora(R @ A, other_B, 2.0)
    growth = float(torch.linalg.cond(R))  # of B's rounding through the solve
    slack = growth * (svd_slack(B) + svd_slack(other_B))
    scale = 2.0 * float((B.norm() + other_B.norm()) * (A.norm() + (R @ A).norm()))
    assert float((a.mean() - b.mean()).abs().max()) <= 50 * growth * EPS * scale
    # A projector moves by no more than the perturbation over the least singular value.
    tilt = 2 * slack / min(float(a.d[-1]), float(b.d[-1]))
    assert float((a.column_covariance(0.5) - b.column_covariance(0.5)).abs().max()) <= tilt
    if kind == "orthogonal":
        assert float((a.d - b.d).abs().max()) <= slack
    else:
        assert float((a.d - b.d).abs().max()) > 0.1


# --- rank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, *LOW])
@pytest.mark.parametrize(("m", "r", "rank"), [(40, 8, 3), (300, 16, 15), (5, 8, 2), (8, 4, 1)])
def test_rank_deficient(m: int, r: int, rank: int, dtype: torch.dtype) -> None:
    """Directions that are only the rounding of the stored B have d = 0 and stay noiseless."""
    A, B = adapter(m, r, 9, rank=rank)
    p = LowRankPosterior.from_lora(A.to(dtype), B.to(dtype), 1.5)
    assert p.effective_rank == rank
    assert bool((p.d[:rank] > 0).all()) and bool((p.d[rank:] == 0).all())
    assert bool((p.inv_d[rank:] == 0).all())
    noise = p.sample(0.3, stream=4) - p.mean()
    U = p.B.double()[:, :rank] * p.inv_d[:rank]
    outside = noise - U @ (torch.linalg.pinv(U) @ noise)
    # Each entry of the noise is a difference of two sums of r products.
    terms = p.B.double().abs() @ (p.A.double().abs() + noise.abs().max() * p.inv_d[:, None])
    assert float(outside.norm()) <= 20 * (m + r) * EPS * 1.5 * float(terms.norm())
    exact = 1.5 * B.to(dtype).double() @ A.to(dtype).double()
    norms = 1.5 * float(p.B.double().norm() * p.A.double().norm())
    stored = torch.finfo(p.A.dtype).eps
    assert float((p.mean() - exact).norm()) <= (stored + 4 * r * max(m, r) * EPS) * norms


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("m", "r"), [(1024, 16), (4096, 8)])
def test_wide_low_precision_adapters_keep_every_direction(
    m: int, r: int, dtype: torch.dtype
) -> None:
    A, B = adapter(m, r, 4)
    assert LowRankPosterior.from_lora(A.to(dtype), B.to(dtype), 1.0).effective_rank == r


def test_a_direction_well_above_the_rounding_is_kept() -> None:
    """bfloat16, 1024 x 16, singular values from 1 to 1/20: the least is ten times the rounding."""
    U = torch.linalg.qr(randn(1024, 16))[0]
    d = torch.logspace(0, -math.log10(20), 16, dtype=F64)
    B = (U * d) @ orthogonal(16)
    rounding = torch.linalg.matrix_norm(B.bfloat16().double() - B, 2)
    assert float(d[-1]) > 10 * float(rounding)
    assert LowRankPosterior.from_lora(randn(16, 4), B.bfloat16(), 1.0).effective_rank == 16


def test_more_rank_than_outputs() -> None:
    A, B = adapter(3, 8, 5)
    p = LowRankPosterior.from_lora(A, B, 1.0)
    assert p.A.shape == (8, 5) and p.B.shape == (3, 8) and p.effective_rank == 3
    covariance = p.column_covariance(2.0)  # U is a whole basis of R^3
    assert float((covariance - 4 * torch.eye(3)).abs().max()) <= 8 * svd_slack(B) / float(p.d[2])


# --- refusals -----------------------------------------------------------------------------------

NAME = "model.layers.3.self_attn.q_proj"
A_FINE, B_FINE = adapter(4, 2, 3)


def damaged(t: Tensor, value: float) -> Tensor:
    t = t.clone()
    t[1, 1] = value
    return t


REFUSED = [
    (A_FINE, torch.zeros(4, 2), "lora_B is zero.*never trained, or its weights were not loaded"),
    (damaged(A_FINE, math.nan), B_FINE, "lora_A holds NaN or Inf"),
    (damaged(A_FINE, -math.inf), B_FINE, "lora_A holds NaN or Inf"),
    (A_FINE, damaged(B_FINE, math.nan), "lora_B holds NaN or Inf"),
    (A_FINE, damaged(B_FINE, math.inf), "lora_B holds NaN or Inf"),
    (A_FINE, torch.ones(4, 3), r"expected A \[r, n\] and B \[m, r\], got \[2, 3\] and \[4, 3\]"),
    (A_FINE[0], B_FINE, r"got \[3\] and \[4, 2\]"),
    (A_FINE, B_FINE[None], r"got \[2, 3\] and \[1, 4, 2\]"),
    (torch.ones(0, 3), torch.ones(4, 0), r"got \[0, 3\] and \[4, 0\]"),
    (torch.ones(2, 0), B_FINE, r"got \[2, 0\] and \[4, 2\]"),
    (A_FINE, torch.ones(0, 2), r"got \[2, 3\] and \[0, 2\]"),
]


@pytest.mark.parametrize(("A", "B", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusal_names_the_module(A: Tensor, B: Tensor, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        LowRankPosterior.from_lora(A, B, 1.0, name=NAME)
    assert str(caught.value).startswith(f"adapter of '{NAME}': ")
    with pytest.raises(AdapterError, match=f"^adapter: .*{message}"):
        LowRankPosterior.from_lora(A, B, 1.0)


def test_parameters_are_not_part_of_the_graph() -> None:
    A, B = adapter(4, 2, 3)
    p = LowRankPosterior.from_lora(nn.Parameter(A), nn.Parameter(B), 1.0)
    assert not (p.A.requires_grad or p.B.requires_grad or p.d.requires_grad)


# --- the distribution ---------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "r", "rank"), [(5, 3, 3), (5, 4, 2), (2, 3, 2)])
@pytest.mark.parametrize("antithetic", [False, True])
def test_theorem_4_1(m: int, r: int, rank: int, antithetic: bool) -> None:
    """Sampled updates have mean s BA and covariance s^2 sigma^2 (U U^T (x) I), d cancelling.

    With the mean known, an empirical covariance of N samples has variance
    (C_ii C_jj + C_ij^2) / N; an antithetic pair is one sample as far as squares are concerned.
    """
    n, N, sigma, scaling = 3, 20_000, 0.7, -1.3
    A, B = adapter(m, r, n, rank=rank)
    layer = BayesLoRALinear.from_weights(zero_linear(n, m), A, B, scaling, layer_id=3)
    make = Draws.antithetic if antithetic else Draws.iid
    draws = make(2 * N if antithetic else N, sigma, seed=1)
    updates = layer(torch.eye(n, dtype=F64), draws).mT  # y = x dW^T for each unit vector x
    noise = (updates - layer.posterior.mean()).reshape(len(draws), m * n)
    C = torch.kron(layer.posterior.column_covariance(sigma), torch.eye(n, dtype=F64))
    variance = C.diag()[:, None] * C.diag()
    rounding = 100 * (m + r + n) * EPS * float(updates.abs().max()) ** 2
    error = (noise.mT @ noise / len(draws) - C).abs()
    assert bool((error <= 5 * ((variance + C**2) / N).sqrt() + rounding).all())
    mean = noise.mean(0).abs()
    standard_error = torch.zeros_like(mean) if antithetic else (C.diag() / N).sqrt()
    assert bool((mean <= 5 * standard_error + rounding).all())


def zero_linear(n: int, m: int) -> nn.Linear:
    base = nn.Linear(n, m, bias=False, dtype=F64)
    nn.init.zeros_(base.weight)
    return base.requires_grad_(False)


def test_covariance_is_a_scaled_projector() -> None:
    A, B = adapter(9, 4, 3, rank=2)
    p = LowRankPosterior.from_lora(A, B, 3.0)
    P = p.column_covariance(0.5) / (3.0 * 0.5) ** 2
    limit = 10 * svd_slack(B) / float(p.d[1])
    assert float((P @ P - P).abs().max()) <= limit and torch.equal(P, P.mT)
    assert abs(float(P.trace()) - 2) <= 9 * limit
    assert float((P @ B - B).abs().max()) <= limit * 9 * float(B.norm())


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_sample_is_the_layers_draw(dtype: torch.dtype) -> None:
    """Same (sigma, stream, seed), same weights: B'(A' + noise) against the layer's arithmetic."""
    A, B = (t.to(dtype) for t in adapter(6, 4, 5, rank=3))
    layer = BayesLoRALinear.from_weights(zero_linear(5, 6), A, B, 0.8, layer_id=77)
    p = layer.posterior
    draws = Draws((0.4, -0.4, 2.0), (8, 8, 2**32 - 1), seed=-5)
    updates = layer(torch.eye(5, dtype=F64), draws).mT
    for update, sigma, stream in zip(updates, draws.sigmas, draws.streams, strict=True):
        # |E| <= 6.77 by the noise contract
        terms = p.A.double().abs() + 6.77 * abs(sigma) * p.inv_d[:, None]
        limit = 0.8 * (5 + 4 + 8) * EPS * (p.B.double().abs() @ terms)
        assert bool(((update - p.sample(sigma, stream, seed=-5)).abs() <= 2 * limit).all())
    assert torch.equal(p.sample(0.0, 3), p.mean())


# --- KL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "r", "rank"), [(7, 3, 3), (7, 5, 2), (2, 5, 2)])
@pytest.mark.parametrize(("sigma", "prior"), [(0.01, 0.2), (0.2, 0.2), (1.5, 0.3)])
def test_kl_is_that_of_the_explicit_gaussians(
    m: int, r: int, rank: int, sigma: float, prior: float
) -> None:
    A, B = adapter(m, r, 6, rank=rank)
    p = LowRankPosterior.from_lora(A, B, 1.0)
    noisy = slice(None, rank)
    d = p.d[noisy, None].expand(-1, 6)
    q = Normal(p.A[noisy], sigma / d)
    explicit = float(kl_divergence(q, Normal(torch.zeros_like(d), prior / d)).sum())
    ratio = sigma / prior
    terms = rank * 6 * (ratio**2 / 2 + 0.5 + abs(math.log(ratio))) + p.mean_square() / prior**2
    assert abs(p.kl(sigma, prior) - explicit) <= (rank * 6 + 20) * EPS * terms
    assert explicit > 0


def test_mean_square_is_the_update_itself() -> None:
    """sum (d_i A'_ij)^2 = |BA|^2: U is orthonormal, so the SVD's basis does not show."""
    A, B = adapter(20, 5, 8)
    p = LowRankPosterior.from_lora(A, B, 7.0)
    size = float((p.B.abs() @ p.A.abs()).norm()) ** 2
    limit = 4 * (svd_slack(B) / float(p.d[-1]) + 40 * EPS) * size
    assert abs(p.mean_square() - float((B @ A).norm()) ** 2) <= limit


def test_kl_is_least_where_sigma_is_the_priors() -> None:
    """In t = log(sigma / prior), KL = N (e^2t / 2 - 1/2 - t) + const: slope 0 at t = 0.

    A central difference of step h then leaves N (2 h^2 / 3)(1 + O(h^2)), and rounding / h.
    """
    A, B = adapter(7, 4, 6, rank=3)
    p, prior, h = LowRankPosterior.from_lora(A, B, 1.0), 0.3, 1e-4
    N, centre = 3 * 6, p.kl(prior, prior)
    slope = (p.kl(prior * math.exp(h), prior) - p.kl(prior * math.exp(-h), prior)) / (2 * h)
    assert abs(slope) <= N * h**2 + 20 * EPS * (N + centre) / h
    assert all(p.kl(prior * f, prior) > centre for f in (0.5, 0.99, 1.01, 2.0))


@pytest.mark.parametrize(
    ("sigma", "prior"), [(0.0, 1.0), (-0.1, 1.0), (1.0, 0.0), (1.0, -1.0), (math.nan, 1.0)]
)
def test_kl_needs_positive_widths(sigma: float, prior: float) -> None:
    p = LowRankPosterior.from_lora(A_FINE, B_FINE, 1.0)
    with pytest.raises(ValueError, match="KL needs sigma > 0 and prior_sigma > 0"):
        p.kl(sigma, prior)


def test_default_prior_fits_the_adapters_best() -> None:
    """It is where the summed KL of vanishing sigma, so the means' log density, is stationary.

    KL(sigma, e^t prior) as a function of t has slope N (1 - (sigma / prior)^2) - M e^-2t / prior^2
    with M = sum (d A')^2 = N prior^2.
    """
    shapes = [(7, 4, 6, 3), (5, 2, 9, None), (3, 5, 2, None)]
    many = [
        LowRankPosterior.from_lora(*adapter(m, r, n, rank, seed=i), 1.0)
        for i, (m, r, n, rank) in enumerate(shapes)
    ]
    prior = default_prior_sigma(many)
    entries = torch.cat([(p.d[:, None] * p.A)[p.d > 0].flatten() for p in many])
    assert len(entries) == 3 * 6 + 2 * 9 + 3 * 2
    rms = float(entries.square().mean().sqrt())
    assert abs(prior - rms) <= len(entries) * EPS * rms
    sigma, h = 1e-9 * prior, 1e-4
    total = {t: sum(p.kl(sigma, prior * math.exp(t)) for p in many) for t in (-0.1, -h, 0, h, 0.1)}
    N = len(entries)
    assert abs(total[h] - total[-h]) / (2 * h) <= N * h**2 + 20 * EPS * total[0] / h
    assert total[-0.1] > total[0] < total[0.1]
    doubled = [LowRankPosterior.from_lora(2 * p.A, p.B, 1.0) for p in many]
    assert abs(default_prior_sigma(doubled) - 2 * prior) <= 100 * EPS * prior


def test_prior_follows_the_update_not_its_factors() -> None:
    """Large B with small A is the same adapter, so the same prior and the same KL."""
    A, B = adapter(7, 3, 6)
    a, b = (LowRankPosterior.from_lora(A / c, B * c, 1.0) for c in (1.0, 64.0))
    assert default_prior_sigma([a]) == default_prior_sigma([b])  # a power of two: exact
    assert a.kl(0.1, 0.2) == b.kl(0.1, 0.2)
