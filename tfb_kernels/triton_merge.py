"""merge: W_s = W + scaling B'(A' + (sigma_s / d) o E_{q(s)}), a merged weight for each draw.

A program takes a tile of W for all draws of one stream: W is read once, B'A' and (B' / d) E are
multiplied once, with the noise made in registers, and each draw's tile is rounded once. 1/d stands
at B', whose columns have the norms d, so that both operands are of order one in any dtype.

Dimensions: S draws, Q streams, m out_features, n in_features, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfb_kernels import launch, tuning
from tfb_kernels.launch import operand_dtype
from tfb_kernels.samples import Samples
from tfb_kernels.triton_noise import layer_words, noise_tile, seed_words

# --- kernel ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["layer", "run", "n_blocks", "scaling"])
def merge_kernel(
    weight,
    a,
    b,
    inv_d,
    sigmas,
    streams,
    stream_index,
    seed,
    out,
    layer,
    m,
    n,
    run,
    n_blocks,
    scaling,
    stride_wm,
    stride_wn,
    stride_os,
    stride_om,
    stride_on,
    R: tl.constexpr,
    RB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MATH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Make one tile of W_s, for all draws of one stream."""
    c = (tl.program_id(0) // n_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) % n_blocks) * BLOCK_N
    j = first + tl.arange(0, BLOCK_N)
    c_mask, j_mask = c < m, j < n
    draw = tl.program_id(1) * run
    k0, k1 = seed_words(seed)
    word = layer_words(layer)
    stream = tl.load(streams + tl.load(stream_index + draw)).to(tl.uint32)
    mean = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    noise = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r0 in range(0, R, RB):
        i = r0 + tl.arange(0, RB)
        b_mask, a_mask = c_mask[:, None], j_mask[None, :]
        if R % RB != 0:
            b_mask, a_mask = b_mask & (i < R)[None, :], a_mask & (i < R)[:, None]
        b_tile = tl.load(b + (c[:, None] * R + i[None, :]), mask=b_mask, other=0.0)
        a_tile = tl.load(a + (i[:, None] * n + j[None, :]), mask=a_mask, other=0.0)
        width = tl.load(inv_d + i, mask=i < R, other=0.0).to(tl.float32)
        u_tile = (b_tile.to(tl.float32) * width[None, :]).to(b_tile.dtype)
        each = tl.full((RB,), 0, tl.uint32) + stream
        e = noise_tile(first, i.to(tl.uint32), each, word, k0, k1, BLOCK_N, MATH).to(a_tile.dtype)
        if UPCAST:
            a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
            e, u_tile = e.to(tl.float32), u_tile.to(tl.float32)
        mean = tl.dot(b_tile, a_tile, mean, input_precision=PRECISION)
        noise = tl.dot(u_tile, e, noise, input_precision=PRECISION)
    c, j = c.to(tl.int64)[:, None], j.to(tl.int64)[None, :]
    mask = c_mask[:, None] & j_mask[None, :]
    start = tl.load(weight + c * stride_wm + j * stride_wn, mask=mask, other=0.0).to(tl.float32)
    start += scaling * mean
    target = out + draw.to(tl.int64) * stride_os + c * stride_om + j * stride_on
    for s in range(draw, draw + run):
        gain = scaling * tl.load(sigmas + s).to(tl.float32)
        found = tl.where(gain == 0.0, start, start + gain * noise)
        tl.store(target, found.to(out.dtype.element_ty), mask=mask)
        target += stride_os


# --- launcher -------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """One launch."""

    grid: tuple[int, int]
    n_blocks: int
    constants: dict[str, object]


def plan(
    S: int,
    run: int,
    m: int,
    n: int,
    R: int,
    dtype: torch.dtype,
    precision: str,
    config: launch.LaunchConfig,
) -> Plan:
    """Plan a launch with block_m, block_n and block_k (of R) of ``config``."""
    if dtype == torch.float32:  # whose products, where not TF32, take registers for both operands
        config = config._replace(block_m=min(config.block_m, 64), block_k=16)
        if precision == "tf32":  # of which Triton 3.6 lays out no larger tile on Hopper
            config = config._replace(block_m=32, block_n=128, num_warps=4)
    n_blocks = triton.cdiv(n, config.block_n)
    constants: dict[str, object] = {
        "R": R,
        "RB": min(launch.padded_rank(R), config.block_k),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "MATH": launch.math_kind(),
        "PRECISION": precision,
        "UPCAST": operand_dtype(dtype) != dtype,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Plan((triton.cdiv(m, config.block_m) * n_blocks, S // run), n_blocks, constants)


@tuning.cached
def _plan(
    device: torch.device,
    S: int,
    run: int,
    m: int,
    n: int,
    R: int,
    dtype: torch.dtype,
    precision: str,
) -> Plan:
    arch = launch.architecture(device)
    config = launch.choose_config("merge", rows=0, rank=R, arch=arch)
    return plan(S, run, m, n, R, dtype, precision, config)


def merge(
    weight: Tensor,
    samples: Samples,
    out: Tensor,
    *,
    config: launch.LaunchConfig | None = None,
) -> None:
    """Fill out [S, m, n] from weight [m, n], both of any strides.

    ``config`` takes the place of the tiles of ``data/launch.json``, for the sweep and tests.
    """
    A, B, inv_d, sigmas, streams, stream_index, run, seed, layer_id, scaling = samples
    (S, m, n), R, dtype = out.shape, A.shape[0], weight.dtype
    if out.numel() == 0:
        return
    precision = launch.dot_precision(dtype)
    if config is None:
        made = _plan(weight.device, S, run, m, n, R, dtype, precision)
    else:
        made = plan(S, run, m, n, R, dtype, precision, config)
    factors = (A.to(dtype).contiguous(), B.to(dtype).contiguous(), inv_d)
    noise = (sigmas, streams, stream_index, seed)
    sizes = (launch.signed_word(layer_id), m, n, run, made.n_blocks, scaling)
    strides = (*weight.stride(), *out.stride())
    merge_kernel[made.grid](weight, *factors, *noise, out, *sizes, *strides, **made.constants)
