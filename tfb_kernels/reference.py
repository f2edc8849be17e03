"""The oracles of the operators in plain torch, and the path that CPUs take.

    y_s = base + scaling * B' (A' x + (sigma_s / d) o e_s),   e_s = E_{q(s)} x  (weight noise)
                                                              e_s = |x| Xi_{q(s)} (token noise)

Updates are added without a loop over draws, and sigma / d is applied to r numbers after the dot
product: A' + noise is formed for merging alone.

Dimensions: S draws, Q distinct streams, T tokens, n in_features, m out_features, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfb_kernels.noise import token_noise, weight_noise
from tfb_kernels.samples import Samples


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 input, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bayes_lora_linear_reference(
    x: Tensor,
    base: Tensor,
    samples: Samples,
    noise: str,
    pool: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute :func:`tfb_kernels.bayes_lora_linear`, which has checked the arguments.

    ``out`` [S, T, m] may be ``base``; without it the result is a new tensor.
    """
    A, B, inv_d, sigmas, streams, stream_index, run, seed, layer_id, scaling = samples
    dtype = compute_dtype(x.dtype)
    x_, A_, B_ = x.to(dtype), A.to(dtype), B.to(dtype)
    gain = sigmas.to(dtype)[:, None] * inv_d.to(dtype)  # [S, r]: sigma_s / d_i
    z0 = x_ @ A_.mT
    if noise == "token":
        xi = token_noise(seed, layer_id, streams, x.shape[-2], A.shape[0]).to(dtype)
        e = torch.linalg.vector_norm(x_, dim=-1, keepdim=True) * xi[stream_index]
    else:
        if pool is None:
            pool = weight_noise(seed, layer_id, streams, A.shape[0], A.shape[1])
        E = pool.to(dtype)
        if x.dim() == 2:  # all streams in one product
            products = (x_ @ E.flatten(0, 1).mT).unflatten(-1, E.shape[:2])
            e = products.transpose(0, 1)[stream_index]
        elif run > 1:  # a stream's draws in one product
            e = torch.bmm(x_.reshape(len(E), -1, x.shape[-1]), E.mT).view(z0.shape)
        else:
            e = torch.bmm(x_, E[stream_index].mT)
    return _expand(torch.addcmul(z0, gain[:, None, :], e), base, B_, scaling, bias, out)


def _expand(
    z: Tensor, base: Tensor, B: Tensor, scaling: float, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    """Add scaling * z B^T [+ bias], z [S, T, r], to base [T, m] or [S, T, m], in base's dtype."""
    start = base.to(z.dtype)
    if bias is not None:
        start = start + bias.to(z.dtype)
    if (start is base and out is None) or start.dim() == 2:
        start = start.expand(len(z), *start.shape[-2:]).clone(memory_format=torch.contiguous_format)
    start = start.contiguous()
    start.view(-1, len(B)).addmm_(z.flatten(0, 1), B.mT, alpha=scaling)
    if out is None:
        return start.to(base.dtype)
    return out if start is out else out.copy_(start)


def bayes_lora_merge_reference(
    weight: Tensor, samples: Samples, pool: Tensor | None, out: Tensor
) -> None:
    """Compute :func:`tfb_kernels.bayes_lora_merge`, which has checked the arguments."""
    A, B, inv_d, sigmas, streams, stream_index, run, seed, layer_id, scaling = samples
    dtype = compute_dtype(weight.dtype)
    if pool is not None:
        noise = pool if len(pool) == 1 else pool[stream_index]  # one stream needs no copy
    elif run > 1:
        noise = weight_noise(seed, layer_id, streams, *A.shape)[stream_index]
    else:  # ``streams`` may be those of many more draws than these
        noise = weight_noise(seed, layer_id, streams[stream_index], *A.shape)
    gain = sigmas.to(dtype)[:, None] * inv_d.to(dtype)
    sampled = torch.addcmul(A.to(dtype), gain[:, :, None], noise.to(dtype))  # [S, r, n]
    weight_, B_ = weight.to(dtype), B.to(dtype)
    for s, A_s in enumerate(sampled):  # one after another: W_s is still in a core's cache
        if out.dtype == dtype:
            torch.addmm(weight_, B_, A_s, alpha=scaling, out=out[s])
        else:
            out[s] = torch.addmm(weight_, B_, A_s, alpha=scaling)


def predictive_reduction_reference(
    logits: Tensor, units: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute ``predictive_reduction`` of logits [S, B, V] and units [U, D]."""
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
    """Return the standard error of the mean of p [S, ...]: std of the units' means / sqrt(U).

    ``units`` are [U, D] draw numbers; with one unit alone the error is NaN.
    """
    U = len(units)
    if U == 1 or p[0].numel() == 0:
        return torch.full_like(p[0], float("nan"))
    return p[units].mean(1).std(0) / U**0.5
