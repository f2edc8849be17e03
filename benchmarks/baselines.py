"""One LoRA layer, our sampling of it, and what people would do instead.

    naive      S eager forwards, each with A' + (sigma / d) o E materialised
    flipout    S forwards, noise with fresh random signs for every token (the authors' scripts)
    generate   base once for shared x, noise generated once, the vendor's matrix product
    merged     the sampled Delta-W added to the base weight, then one product for each draw
    compiled   torch.compile of one naive forward, called S times

The first two and the last two make their noise with ``torch.randn`` and so only agree in
distribution; ``check`` compares their moments, and ours with the float64 definition. Each returns
the S outputs [T, m], as a list or as [S, T, m]: nothing is spent on stacking them.

Dimensions: S draws, T tokens, n in_features, m out_features, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

import tfb
from tfb.draws import Draws
from tfb.linear import LowRankSampler
from tfb_kernels.ops import resolve_impl
from tfb_kernels.testing import (
    eager_weight_samples,
    error_budget,
    exact_weight_samples,
    noise_allowance,
)

SIGMA, SCALING, LAYER_ID = 0.01, 2.0, 7
Outputs = Tensor | list[Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """A frozen weight W [m, n] with a low-rank posterior. Factors of the contenders are A' [r, n],
    B' [m, r] and std = sigma / d [r, 1], in the dtype of W; ours keeps its own in float32."""

    W: Tensor
    posterior: tfb.LowRankPosterior
    sampler: LowRankSampler

    @cached_property
    def A(self) -> Tensor:
        return self.posterior.A.to(self.W)

    @cached_property
    def B(self) -> Tensor:
        return self.posterior.B.to(self.W)

    @cached_property
    def std(self) -> Tensor:
        return (SIGMA * self.posterior.inv_d[:, None]).to(self.W)


@lru_cache(maxsize=4)
def _posterior(m: int, n: int, r: int) -> tfb.LowRankPosterior:
    generator = torch.Generator().manual_seed(m + n + r)
    A = torch.randn(r, n, generator=generator) / math.sqrt(n)
    B = torch.randn(m, r, generator=generator) / math.sqrt(r)
    return tfb.LowRankPosterior.from_lora(A, B, SCALING, layer_id=LAYER_ID)


def make_layer(m: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> Layer:
    """A layer with tensors of its own; layers of one shape have equal adapters."""
    W = torch.randn(m, n, dtype=dtype, device=device) / math.sqrt(n)
    posterior = _posterior(m, n, r)
    return Layer(W, posterior, LowRankSampler(posterior))


def make_draws(S: int, *, iid: bool = False) -> Draws:
    """Antithetic, our default, where S is even and nothing else is asked for."""
    return Draws.iid(S, SIGMA) if iid or S % 2 else Draws.antithetic(S, SIGMA)


# --- ours -----------------------------------------------------------------------------------------


def ours(layer: Layer, x: Tensor, draws: Draws) -> Tensor:
    """As the PEFT bridge runs it: the base output is its own to overwrite if x is per draw."""
    base = F.linear(x, layer.W)
    return layer.sampler(x, base, draws, inplace=x.dim() == 3)


def op_on_path(layer: Layer, x: Tensor, base: Tensor, draws: Draws, path: str) -> Tensor:
    """The operation alone by one of the Triton paths, "fused" or "generate"; without a GPU both
    are the reference, noise generated in the call."""
    A, B, inv_d = layer.sampler.factors(x.device)
    t = draws.tensors(x.device)
    out = base if x.dim() == 3 else None
    arguments = (
        x, base, A, B, inv_d, t.sigmas, t.streams, t.stream_index, t.draws_per_stream, t.seed,
        LAYER_ID, SCALING, "weight", None, None, out,
    )  # fmt: skip
    if resolve_impl("auto", x.device, x.dtype) == "reference":
        from tfb_kernels.reference import bayes_lora_linear_reference

        return bayes_lora_linear_reference(*arguments)
    from tfb_kernels.triton_linear import bayes_lora_linear_triton

    return bayes_lora_linear_triton(*arguments, path=path)


# --- what people would do instead -----------------------------------------------------------------


def one_draw(x: Tensor, W: Tensor, A: Tensor, B: Tensor, std: Tensor) -> Tensor:
    """x [T, n] -> [T, m]: one forward with its sampled A materialised."""
    sampled = A + std * torch.randn_like(A)
    return F.linear(x, W) + F.linear(F.linear(x, sampled), B) * SCALING


def one_flipout_draw(x: Tensor, W: Tensor, A: Tensor, B: Tensor, std: Tensor) -> Tensor:
    """x [T, n] -> [T, m]: the mean path plus noise whose signs are fresh for every token."""
    sign_in = torch.empty_like(x).uniform_(-1, 1).sign_()
    sign_out = x.new_empty(*x.shape[:-1], len(A)).uniform_(-1, 1).sign_()
    noise = std * torch.randn_like(A)
    y = F.linear(x, W) + F.linear(F.linear(x, A), B) * SCALING
    return y + F.linear(F.linear(x * sign_in, noise) * sign_out, B) * SCALING


def one_merged_draw(x: Tensor, W: Tensor, A: Tensor, B: Tensor, std: Tensor) -> Tensor:
    """x [T, n] -> [T, m]: one product with W + Delta-W."""
    sampled = A + std * torch.randn_like(A)
    return F.linear(x, torch.addmm(W, B, sampled, alpha=SCALING))


@cache
def _compiled() -> Callable[..., Tensor]:
    # One graph for each shape, as a model of fixed batch shapes gets; more than the default eight.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(one_draw, dynamic=False)


def _loop(one: Callable[..., Tensor], layer: Layer, x: Tensor, draws: Draws) -> list[Tensor]:
    factors = layer.W, layer.A, layer.B, layer.std
    return [one(x if x.dim() == 2 else x[s], *factors) for s in range(len(draws))]


def naive(layer: Layer, x: Tensor, draws: Draws) -> Outputs:
    return _loop(one_draw, layer, x, draws)


def flipout(layer: Layer, x: Tensor, draws: Draws) -> Outputs:
    return _loop(one_flipout_draw, layer, x, draws)


def merged(layer: Layer, x: Tensor, draws: Draws) -> Outputs:
    return _loop(one_merged_draw, layer, x, draws)


def compiled(layer: Layer, x: Tensor, draws: Draws) -> Outputs:
    return _loop(_compiled(), layer, x, draws)


def generate(layer: Layer, x: Tensor, draws: Draws) -> Outputs:
    return op_on_path(layer, x, F.linear(x, layer.W), draws, "generate")


CONTENDERS: dict[str, Callable[[Layer, Tensor, Draws], Outputs]] = {
    "naive": naive,
    "flipout": flipout,
    "generate": generate,
    "merged": merged,
    "compiled": compiled,
}


# --- are they right -------------------------------------------------------------------------------


@torch.no_grad()
def check(device: torch.device, dtype: torch.dtype, *, with_compiled: bool) -> None:
    """Every contender at a small size, shared and per-draw x; raises AssertionError.

    Ours and "generate" against the float64 definition in ``dtype``: twice the error of eager
    torch. The others in float32 by their moments over 2,000 draws: the mean within six standard
    errors, and the variance within 5 % of s^2 sigma^2 |x|^2 (U U^T)_ii summed over outputs (its
    sampling error is below 1 %).
    """
    m, n, r, T = 192, 256, 8, 16
    layer = make_layer(m, n, r, dtype, device)
    for shared in (True, False):
        draws = make_draws(4)
        x = torch.randn(*(() if shared else (4,)), T, n, dtype=dtype, device=device)
        for name, call in (("ours", ours), ("generate", generate)):
            _check_exact(name, layer, x, draws, torch.as_tensor(call(layer, x, draws)))
        if device.type == "cuda":
            base = F.linear(x, layer.W)
            _check_exact("fused", layer, x, draws, op_on_path(layer, x, base, draws, "fused"))
    layer = make_layer(m, n, r, torch.float32, device)
    x = torch.randn(4, n, device=device)
    for name, contender in CONTENDERS.items():
        if name != "generate" and (name != "compiled" or with_compiled):
            _check_moments(name, layer, x, contender)


def _check_exact(name: str, layer: Layer, x: Tensor, draws: Draws, y: Tensor) -> None:
    p = layer.posterior
    cpu = x.cpu()
    base = F.linear(x, layer.W).cpu()
    sigmas, streams = torch.tensor(draws.sigmas), torch.tensor(draws.streams)
    operands = (cpu, base, p.A, p.B, p.inv_d, sigmas, streams)
    exact = exact_weight_samples(*operands, seed=0, layer_id=LAYER_ID, scaling=SCALING)
    eager = eager_weight_samples(
        cpu, base, p.A, p.B, p.inv_d.float(), sigmas, streams, seed=0, layer_id=LAYER_ID,
        scaling=SCALING,
    )  # fmt: skip
    allowed = error_budget(exact, eager) + noise_allowance(cpu, p.B, p.inv_d, sigmas, SCALING)
    error = float((y.cpu().double() - exact).abs().max())
    assert error <= allowed, f"{name}: error {error:.3g} over the budget of {allowed:.3g}"


def _check_moments(
    name: str, layer: Layer, x: Tensor, contender: Callable[[Layer, Tensor, Draws], Outputs]
) -> None:
    S, p = 2000, layer.posterior
    # One call of T tokens would do for fresh weights; S calls also see what a call reuses.
    y = torch.stack(list(contender(layer, x, make_draws(S, iid=True)))).double().cpu()
    mean = x.double().cpu() @ (layer.W.double().cpu() + p.mean()).mT
    variance = p.column_covariance(SIGMA).diagonal() * x.double().cpu().square().sum(-1)[:, None]
    # The standard deviation plus what float32 rounds away.
    z = (y.mean(0) - mean).abs() / (variance.sqrt() / math.sqrt(S) + 1e-6)
    ratio = float(y.var(0).sum() / variance.sum())
    assert float(z.max()) <= 6, f"{name}: mean off by {float(z.max()):.1f} standard errors"
    assert abs(ratio - 1) <= 0.05, f"{name}: variance is {ratio:.3f} of the posterior's"
