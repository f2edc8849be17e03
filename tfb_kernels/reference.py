"""The oracle of ``bayes_lora_linear``, and the path that CPUs take.

    y_s = base + scaling * B' (A' x + (sigma_s / d) o e_s),   e_s = E_{q(s)} x  (weight noise)
                                                              e_s = |x| Xi_{q(s)} (token noise)

Plain torch, no loop over draws. With shared x, sigma / d is applied to r numbers after the dot
product, so that sigma stays out of everything upstream. With an input for each draw,
A' + (sigma / d) o E is formed, r n numbers a draw: one product of r columns in place of two
(DESIGN.md).

Dimensions: S draws, Q distinct streams, T tokens, n in_features, m out_features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfb_kernels.noise import token_noise, weight_noise


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bayes_lora_linear_reference(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    inv_d: Tensor,
    sigmas: Tensor,
    streams: Tensor,
    stream_index: Tensor,
    run: int,
    seed: Tensor,
    layer_id: int,
    scaling: float,
    noise: str,
    pool: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Shapes and meaning as in :func:`tfb_kernels.bayes_lora_linear`, whose checks came before.

    run: not needed here, where nothing is grouped by stream; the implementations have one list of
    arguments. out: [S, T, m], may be ``base``.
    """
    dtype = compute_dtype(x.dtype)
    x_, A_, B_ = x.to(dtype), A.to(dtype), B.to(dtype)
    gain = sigmas.to(dtype)[:, None] * inv_d.to(dtype)  # [S, r]: sigma_s / d_i

    if noise == "weight":
        if pool is None:
            pool = weight_noise(seed, layer_id, streams, A.shape[0], A.shape[1])
        if x.dim() == 3:
            sampled = A_ + gain[:, :, None] * pool.to(dtype)[stream_index]  # [S, r, n]
            return _expand(torch.bmm(x_, sampled.mT), base, B_, scaling, bias, out)
        stacked = torch.cat([A_, pool.to(dtype).flatten(0, 1)])  # [(1 + Q) r, n]: one pass over x
        z = (x_ @ stacked.mT).unflatten(-1, (1 + len(pool), A.shape[0]))
        z0, e = z[:, 0], z[:, 1:].transpose(0, 1)[stream_index]
    else:
        xi = token_noise(seed, layer_id, streams, x.shape[-2], A.shape[0]).to(dtype)
        z0 = x_ @ A_.mT
        e = torch.linalg.vector_norm(x_, dim=-1, keepdim=True) * xi[stream_index]
    return _expand(z0 + gain[:, None, :] * e, base, B_, scaling, bias, out)


def _expand(
    z: Tensor, base: Tensor, B: Tensor, scaling: float, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    """base [T, m] or [S, T, m] + scaling * z B^T [+ bias] for z [S, T, r], in base's dtype."""
    S, dtype = len(z), z.dtype
    factors = B.mT.expand(S, *B.mT.shape)
    if out is not None and out.dtype == dtype and bias is None:
        return out.baddbmm_(z, factors, alpha=scaling)
    base_ = base.to(dtype)
    if bias is not None:
        base_ = base_ + bias.to(dtype)
    # One pass over the outputs: base is read (once for shared x, by broadcasting) and S outputs
    # are written, with the product added on the way.
    y = torch.baddbmm(base_.expand(S, *base_.shape[-2:]), z, factors, alpha=scaling)
    return y.to(base.dtype) if out is None else out.copy_(y)


def predictive_reduction_reference(
    logits: Tensor, units: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The oracle of ``predictive_reduction``: logits [S, B, V], units [U, D]."""
    p = logits.to(compute_dtype(logits.dtype)).softmax(-1)
    probs = p.mean(0)
    return (
        probs,
        torch.special.entr(probs).sum(-1),
        torch.special.entr(p).sum(-1).mean(0),
        logits.argmax(-1),
        unit_standard_error(p, units),
    )


def unit_standard_error(p: Tensor, units: Tensor) -> Tensor:
    """Standard error over units of the mean of p [S, ...]: std of unit means / sqrt(U).

    units: [U, D] draw numbers. NaN for U = 1.
    """
    U = len(units)
    if U == 1 or p[0].numel() == 0:
        return torch.full_like(p[0], float("nan"))
    return p[units].mean(1).std(0) / U**0.5
