"""One LoRA layer, our sampling of it by each path (``OURS``), and what people would do instead.

Rivals make their noise with ``torch.randn`` (``KEPT``: once for all calls) and so agree in
distribution alone: ``check_rivals`` compares moments, ``errors`` ours with float64. Each returns
the S outputs [T, m], as a list or as [S, T, m]: nothing is spent on stacking them.

Dimensions: S draws, T tokens, n in_features, m out_features, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import tfb
from benchmarks.timing import first_line
from tfb.draws import Draws
from tfb.linear import LowRankSampler
from tfb_kernels import bayes_lora_linear, bayes_lora_merge
from tfb_kernels.ops import why_not_triton
from tfb_kernels.samples import Samples
from tfb_kernels.testing import (
    eager_weight_samples,
    error_budget,
    exact_weight_samples,
    merged_weights,
    noise_allowance,
    rounding_allowance,
)

SIGMA, SCALING, LAYER_ID = 0.01, 2.0, 7
VISIBLE = 0.2  # at which noise that is wrong exceeds the rounding of bfloat16 tenfold
Outputs = Tensor | list[Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """A frozen weight W [m, n] with a low-rank posterior.

    Factors of the contenders are A' [r, n], B' [m, r] and std = sigma / d [r, 1], in the dtype of
    W; ours keeps its own in float32.
    """

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
    """Return a layer with tensors of its own; layers of one shape have equal adapters."""
    W = torch.randn(m, n, dtype=dtype, device=device) / math.sqrt(n)
    posterior = _posterior(m, n, r)
    return Layer(W, posterior, LowRankSampler(posterior))


Contender = Callable[[Layer, Tensor, Draws], Outputs]


# --- ours -----------------------------------------------------------------------------------------


def ours(layer: Layer, x: Tensor, draws: Draws) -> Tensor:
    """Run the layer as the PEFT bridge does: merged where that costs less."""
    if x.dim() == 3 and layer.sampler.merges(x, x.shape[1], draws, layer.W):
        return ours_merged(layer, x, draws)
    return ours_added(layer, x, draws)


def on_path(layer: Layer, x: Tensor, draws: Draws, path: str) -> Tensor:
    """Run the whole layer by one of the Triton paths."""
    return op_on_path(layer, x, F.linear(x, layer.W), draws, path)


def op(layer: Layer, x: Tensor, base: Tensor, draws: Draws, **options: Any) -> Tensor:
    """Run the operation alone, as the public operator chooses."""
    return bayes_lora_linear(x, base, **_arguments(layer, draws, x), **options)


def _samples(layer: Layer, draws: Draws, like: Tensor) -> Samples:
    A, B, inv_d, *_ = layer.sampler.factors(like.device, like.dtype)
    t = draws.tensors(like.device)
    drawn = (t.sigmas, t.streams, t.stream_index, t.draws_per_stream, t.seed)
    return Samples(A, B, inv_d, *drawn, LAYER_ID, SCALING)


def _arguments(layer: Layer, draws: Draws, like: Tensor) -> dict[str, Any]:
    """Return the same by the names of the public operators."""
    found = _samples(layer, draws, like)._asdict()
    return found | {"draws_per_stream": found.pop("run")}


def op_on_path(layer: Layer, x: Tensor, base: Tensor, draws: Draws, path: str) -> Tensor:
    """Run the operation alone by one of the Triton paths, "fused" or "generate".

    Where no kernel can run both are the reference, which generates its noise in the call.
    """
    if why_not_triton(x.device, x.dtype) is not None:
        return op(layer, x, base, draws, inplace=x.dim() == 3)
    from tfb_kernels.triton_linear import bayes_lora_linear_triton

    out = base if x.dim() == 3 else None
    return bayes_lora_linear_triton(x, base, _samples(layer, draws, x), out=out, path=path)


def ours_added(layer: Layer, x: Tensor, draws: Draws) -> Tensor:
    """Run the whole layer, base product and update added."""
    return layer.sampler(x, F.linear(x, layer.W), draws, inplace=x.dim() == 3)


def ours_merged(layer: Layer, x: Tensor, draws: Draws) -> Tensor:
    """Run it by products with the weights that draws are merged into."""
    return layer.sampler.merged(x, layer.W, None, draws)


def merged_by_us(layer: Layer, draws: Draws) -> Tensor:
    """Return W_s [S, m, n]."""
    return bayes_lora_merge(layer.W, **_arguments(layer, draws, layer.W))


# --- what people would do instead -----------------------------------------------------------------


def forward(x: Tensor, W: Tensor, sampled: Tensor, B: Tensor) -> Tensor:
    """Map x [T, n] to [T, m] with a sampled A."""
    return F.linear(x, W) + F.linear(F.linear(x, sampled), B) * SCALING


def one_draw(x: Tensor, W: Tensor, A: Tensor, B: Tensor, std: Tensor) -> Tensor:
    """Map x [T, n] to [T, m] with a sampled A that is materialised."""
    return forward(x, W, A + std * torch.randn_like(A), B)


def one_merged_draw(x: Tensor, W: Tensor, A: Tensor, B: Tensor, std: Tensor) -> Tensor:
    """Map x [T, n] to [T, m] by one product with W + Delta-W."""
    sampled = A + std * torch.randn_like(A)
    return F.linear(x, torch.addmm(W, B, sampled, alpha=SCALING))


def _loop(one: Callable[..., Tensor], layer: Layer, x: Tensor, draws: Draws) -> list[Tensor]:
    factors = layer.W, layer.A, layer.B, layer.std
    return [one(x if x.dim() == 2 else x[s], *factors) for s in range(len(draws))]


def naive(layer: Layer, x: Tensor, draws: Draws) -> Outputs:
    return _loop(one_draw, layer, x, draws)


def merged(layer: Layer, x: Tensor, draws: Draws) -> Outputs:
    return _loop(one_merged_draw, layer, x, draws)


def stream_noise(layer: Layer, draws: Draws) -> Tensor:
    """Return fresh noise sigma / d o E [Q, r, n]."""
    A = layer.A
    E = torch.randn(len(draws.distinct_streams), *A.shape, dtype=A.dtype, device=A.device)
    return layer.std * E


def baddbmm(layer: Layer, x: Tensor, draws: Draws, noise: Tensor | None = None) -> Outputs:
    """Run the layer without a kernel of ours: every product is the vendor's.

    Each stream's noise is made once; like ours in place where the base output is a draw's own.

    Args:
        layer: Weight and posterior.
        x: [T, n] or [S, T, n].
        draws: S antithetic or independent draws.
        noise: That of :func:`stream_noise`; None: fresh.
    """
    t, R = draws.tensors(x.device), len(layer.A)
    base, B = F.linear(x, layer.W), layer.B.mT.expand(len(draws), -1, -1)
    noise = stream_noise(layer, draws) if noise is None else noise
    signs = t.sigmas.sign().to(x.dtype)[:, None, None]
    if x.dim() == 3:
        z = torch.bmm(x, (layer.A + signs * noise[t.stream_index]).mT)
        return base.baddbmm_(z, B, alpha=SCALING)
    z = (x @ torch.cat([layer.A[None], noise]).flatten(0, 1).mT).unflatten(-1, (-1, R))
    z = z[:, :1].transpose(0, 1) + signs * z[:, 1:].transpose(0, 1)[t.stream_index]
    return torch.baddbmm(base.expand(len(draws), -1, -1), z, B, alpha=SCALING)


def naive_kept(layer: Layer, draws: Draws) -> Contender:
    """Return the loop over sampled A that are made here, once, and not in a call; shared x."""
    t, A = draws.tensors(layer.A.device), layer.A
    signs = t.sigmas.sign().to(A)[:, None, None]
    sampled = A + signs * stream_noise(layer, draws)[t.stream_index]
    return lambda layer, x, draws: [forward(x, layer.W, A, layer.B) for A in sampled]


def baddbmm_kept(layer: Layer, draws: Draws) -> Contender:
    """Return ``baddbmm`` with noise that is made here, once."""
    return partial(baddbmm, noise=stream_noise(layer, draws))


OURS: dict[str, Contender] = {
    "fused": partial(on_path, path="fused"),  # noise in registers while x is read
    "generate": partial(on_path, path="generate"),  # noise written once, the vendor's product
    "merge": ours_merged,  # for x of each draw's own
}
RIVALS: dict[str, Contender] = {
    "baddbmm": baddbmm,  # all draws at once
    "merged": merged,  # Delta-W added to the weight, then one product for each draw
    "naive": naive,  # S eager forwards, each with A' + (sigma / d) o E materialised
}
# With the noise of fixed draws kept from call to call, as ours keeps it on a CPU.
KEPT: dict[str, Callable[[Layer, Draws], Contender]] = {
    "baddbmm_kept": baddbmm_kept,
    "naive_kept": naive_kept,
}


# --- are they right -------------------------------------------------------------------------------

Call = Callable[[Layer, Tensor, Tensor, Draws], Tensor]
"""layer, x, base, draws -> y [S, T, m]: the operation alone."""


PATHS: dict[str, Call] = {
    "auto": op,
    "fused": partial(op_on_path, path="fused"),
    "generate": partial(op_on_path, path="generate"),
    "token": partial(op, noise="token"),
}


@torch.no_grad()
def errors(
    path: str, device: torch.device, dtype: torch.dtype, tokens: Sequence[int] = (16, 80)
) -> str | None:
    """Return what is wrong with one of ``PATHS``, or None.

    It is compared with float64 on the CPU, with few and with many tokens (which have tiles of their
    own), shared and per-draw x: at most twice the error of eager torch in ``dtype``.
    """
    layer = make_layer(192, 256, 16, dtype, device)
    draws = Draws.antithetic(4, VISIBLE)
    for T, shared in product(tokens, (True, False)):
        x = torch.randn(*(() if shared else (4,)), T, 256, dtype=dtype, device=device)
        base = F.linear(x, layer.W)
        exact, eager = _exact_and_eager(path, layer, x.cpu(), base.cpu(), draws)
        p = layer.posterior
        allowed = error_budget(exact, eager) + rounding_allowance(exact, base.cpu(), dtype)
        allowed += noise_allowance(x, p.B, p.inv_d, torch.tensor(draws.sigmas), SCALING)
        try:
            y = PATHS[path](layer, x, base.clone(), draws).cpu()
        except Exception as error:  # of the compiler or the driver: a finding, not our end
            return first_line(error)
        found = float((y.double() - exact).abs().max())
        if not found <= allowed:  # NaN is wrong too
            kind = "shared" if shared else "per-draw"
            return f"T={T}, {kind} x: error {found:.3g} over the budget of {allowed:.3g}"
    return None


def _exact_and_eager(
    path: str, layer: Layer, x: Tensor, base: Tensor, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Return the float64 truth on a CPU, and the same in the dtype of x."""
    if path == "token":  # no weight sample: the reference itself, in float64
        how: dict[str, Any] = {"noise": "token", "impl": "reference"}
        return op(layer, x.double(), base.double(), draws, **how), op(layer, x, base, draws, **how)
    p = layer.posterior
    sigmas, streams = torch.tensor(draws.sigmas), torch.tensor(draws.streams)
    operands = (x, base, p.A, p.B, p.inv_d.float(), sigmas, streams)
    options: dict[str, Any] = {"seed": draws.seed, "layer_id": LAYER_ID, "scaling": SCALING}
    return exact_weight_samples(*operands, **options), eager_weight_samples(*operands, **options)


@torch.no_grad()
def merge_errors(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what is wrong with ``merge``, as ``errors`` does; eager is an ordinary merging."""
    layer, draws = make_layer(192, 256, 16, dtype, device), Draws.antithetic(4, VISIBLE)
    p, W = layer.posterior, layer.W.cpu()
    rest = (p.inv_d, torch.tensor(draws.sigmas), torch.tensor(draws.streams))
    options: dict[str, Any] = {"seed": draws.seed, "layer_id": LAYER_ID, "scaling": SCALING}
    exact = merged_weights(W.double(), p.A.double(), p.B.double(), *rest, **options)
    eager = merged_weights(W, p.A, p.B, *rest, **options)
    allowed = error_budget(exact, eager) + rounding_allowance(exact, W, dtype)
    allowed += noise_allowance(torch.ones(1, 1), p.B, p.inv_d, rest[1], SCALING)
    try:
        found = float((merged_by_us(layer, draws).cpu().double() - exact).abs().max())
    except Exception as error:  # of the compiler or the driver: a finding, not our end
        return first_line(error)
    return None if found <= allowed else f"error {found:.3g} over the budget of {allowed:.3g}"


MOMENTS = Draws.iid(2000, SIGMA)  # of ``check_rivals``


@torch.no_grad()
def check_rivals(device: torch.device) -> None:
    """Check in float32 that the rivals' draws are those of the posterior, by their moments.

    The mean is within six standard errors, and the variance within 5 % of s^2 sigma^2 |x|^2
    (U U^T)_ii summed over outputs (its sampling error is below 1 %).

    Raises:
        AssertionError: A rival's are not.
    """
    layer = make_layer(192, 256, 8, torch.float32, device)
    for shared in (True, False):
        for name, contender in {"ours": ours, **RIVALS}.items():
            _check_moments(name, layer, shared, contender)
    for name, keep in KEPT.items():
        _check_moments(name, layer, True, keep(layer, MOMENTS))


def _check_moments(name: str, layer: Layer, shared: bool, contender: Contender) -> None:
    draws, p, device = MOMENTS, layer.posterior, layer.W.device
    S = len(draws)
    rows = torch.randn(4, 256, device=device)
    x = rows if shared else rows.expand(S, 4, 256).contiguous()
    # One call of T tokens would do for fresh weights; S calls also see what a call reuses.
    y = torch.stack(list(contender(layer, x, draws))).double().cpu()
    cpu = rows.double().cpu()
    mean = cpu @ (layer.W.double().cpu() + p.mean()).mT
    variance = p.column_covariance(SIGMA).diagonal() * cpu.square().sum(-1)[:, None]
    # The standard deviation plus what float32 rounds away.
    z = (y.mean(0) - mean).abs() / (variance.sqrt() / math.sqrt(S) + 1e-6)
    ratio = float(y.var(0).sum() / variance.sum())
    assert float(z.max()) <= 6, f"{name}: mean off by {float(z.max()):.1f} standard errors"
    assert abs(ratio - 1) <= 0.05, f"{name}: variance is {ratio:.3f} of the posterior's"
