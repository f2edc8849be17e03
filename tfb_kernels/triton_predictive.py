"""Predictive reduction: from logits [S, B, V] to averaged probabilities and their entropies.

    p_s = softmax(l_s);   probs = mean_s p_s;   total = H(probs);   expected = mean_s H(p_s)

in two passes over the logits and without a tensor of S B V probabilities:

    statistics   per draw and row: max, sum exp(l - max), sum exp(l - max)(l - max), argmax,
                 for each part of V; an online softmax whose third sum gives the entropy
    mean         per row and block of V: exp(l_s - logsumexp_s) averaged over draws, its entropy's
                 partial sum, and Welford's variance over the units (antithetic pairs)

Dimensions: S draws, B rows, V classes, U units of D draws each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfb_kernels.launch import LaunchConfig

# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B"])
def statistics_kernel(
    logits,
    largest,
    exponentials,
    weighted,
    best,
    B,
    V,
    part_size,
    stride_s,
    stride_b,
    BLOCK_V: tl.constexpr,
):
    """Read a part of V of one draw's row; the launcher combines the parts."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    source = logits + (row // B) * stride_s + (row % B) * stride_b
    start = part * part_size
    stop = tl.minimum(start + part_size, V)
    high = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    moment = tl.zeros((), tl.float32)
    index = tl.zeros((), tl.int32) + start
    for v0 in range(start, stop, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        value = tl.load(source + v, mask=v < stop, other=float("-inf")).to(tl.float32)
        block_high = tl.max(value, 0)
        if block_high > high:
            index = v0 + tl.argmax(value, 0)
        new = tl.maximum(high, block_high)
        # Before anything finite was seen both are -inf, and their difference would be NaN.
        safe = tl.where(new == float("-inf"), 0.0, new)
        shift = tl.where(high == float("-inf"), 0.0, high - safe)
        scale = tl.where(high == float("-inf"), 0.0, tl.exp(shift))
        centred = value - safe
        e = tl.exp(centred)
        moment = (moment + total * shift) * scale
        # exp(-inf) (-inf) is 0 here, NaN in arithmetic.
        moment += tl.sum(e * tl.where(e > 0.0, centred, 0.0), 0)
        total = total * scale + tl.sum(e, 0)
        high = new
    at = row * tl.num_programs(1) + part
    tl.store(largest + at, high)
    tl.store(exponentials + at, total)
    tl.store(weighted + at, moment)
    tl.store(best + at, index)


@triton.jit(do_not_specialize=["U", "D"])
def mean_kernel(
    logits,
    log_normalizer,
    order,
    probs,
    error,
    entropy,
    B,
    V,
    U,
    D,
    stride_s,
    stride_b,
    BLOCK_V: tl.constexpr,
):
    """Average a block of V of one row over draws; ``order`` lists the draws unit by unit."""
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = v < V
    mean = tl.zeros((BLOCK_V,), tl.float32)
    spread = tl.zeros((BLOCK_V,), tl.float32)
    for u in range(0, U):
        unit = tl.zeros((BLOCK_V,), tl.float32)
        for d in range(0, D):
            s = tl.load(order + u * D + d)
            value = tl.load(
                logits + s * stride_s + b * stride_b + v, mask=mask, other=float("-inf")
            ).to(tl.float32)
            unit += tl.exp(value - tl.load(log_normalizer + s * B + b))
        unit = unit / D
        delta = unit - mean
        mean += delta / (u + 1)
        spread += delta * (unit - mean)
    plogp = tl.where(mean > 0.0, -mean * tl.log(tl.where(mean > 0.0, mean, 1.0)), 0.0)
    tl.store(probs + b * V + v, mean, mask=mask)
    # One unit alone has no spread to estimate an error from.
    deviation = tl.sqrt(spread / (tl.maximum(U - 1, 1) * U))
    tl.store(error + b * V + v, tl.where(U > 1, deviation, float("nan")), mask=mask)
    tl.store(entropy + b * tl.num_programs(1) + block, tl.sum(tl.where(mask, plogp, 0.0), 0))


# --- launcher -------------------------------------------------------------------------------------


def predictive_reduction_triton(
    logits: Tensor, units: Tensor, statistics: LaunchConfig, mean: LaunchConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute ``predictive_reduction`` of logits [S, B, V], contiguous in V, and units [U, D]."""
    S, B, V = logits.shape
    U, D = units.shape
    device, real = logits.device, torch.float32
    # A row alone cannot fill a GPU when there are few: split V until there are some hundreds.
    parts = max(1, min(triton.cdiv(V, statistics.block_k), 512 // max(S * B, 1)))
    part_size = triton.cdiv(triton.cdiv(V, parts), statistics.block_k) * statistics.block_k
    parts = triton.cdiv(V, part_size)
    high, total, moment = torch.empty((3, S, B, parts), dtype=real, device=device).unbind()
    best = torch.empty((S, B, parts), dtype=torch.int32, device=device)
    found, strides = (high, total, moment, best), logits.stride()[:2]
    tiles = {"BLOCK_V": statistics.block_k, "num_warps": statistics.num_warps}
    statistics_kernel[(S * B, parts)](logits, *found, B, V, part_size, *strides, **tiles)
    top, part = high.max(-1, keepdim=True)
    # A part of nothing but -inf weighs nothing; its shift would be NaN.
    shift = torch.where(high.isneginf(), 0.0, high - top)
    weight = torch.where(high.isneginf(), 0.0, shift.exp())
    normalizer = (total * weight).sum(-1)
    centred = ((moment + total * shift) * weight).sum(-1)
    draw_entropy = normalizer.log() - centred / normalizer
    log_normalizer = (top[..., 0] + normalizer.log()).contiguous()
    argmax = best.gather(-1, part)[..., 0].long()

    blocks = triton.cdiv(V, mean.block_k)
    probs = torch.empty((B, V), dtype=real, device=device)
    error = torch.empty_like(probs)
    entropy = torch.empty((B, blocks), dtype=real, device=device)
    given, averaged = (logits, log_normalizer, units.contiguous()), (probs, error, entropy)
    tiles = {"BLOCK_V": mean.block_k, "num_warps": mean.num_warps}
    mean_kernel[(B, blocks)](*given, *averaged, B, V, U, D, *strides, **tiles)
    return probs, entropy.sum(-1), draw_entropy.mean(0), argmax, error
