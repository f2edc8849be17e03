"""finalise and expand: from shrink's sums z to the samples y.

    finalise   zf_s = scaling (z0 + (sigma_s / d) o e_{q(s)}), splits added in order, rounded once
    expand     y_s = base + zf_s B'^T [+ bias], rows (s, t) of one matrix, one write of each output

Dimensions: S draws, T tokens, m out_features, R rank, K splits, slots of z as in shrink.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfb_kernels.launch import (
    LaunchConfig,
    operand_dtype,
    padded_rank,
    power_of_2,
)

FINALISE_TILE = 2048  # numbers of z that a program of finalise holds at a time
SMALLEST_TILE = (16, 64)  # rows and columns to which expand's tiles shrink for a full wave

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _sum_splits(z, mask, K, split_stride, BLOCK_S: tl.constexpr):
    """Sum over splits of blocks z [1, rows, R], BLOCK_S splits at a time, in a fixed order."""
    k = tl.arange(0, BLOCK_S).to(tl.int64)[:, None, None]
    total = tl.sum(tl.load(z + k * split_stride, mask=mask & (k < K), other=0.0), 0)
    for k0 in range(BLOCK_S, K, BLOCK_S):
        more = tl.load(z + (k0 + k) * split_stride, mask=mask & (k0 + k < K), other=0.0)
        total += tl.sum(more, 0)
    return total


@triton.jit(do_not_specialize=["rows", "T", "K", "run", "scaling"])
def finalise_kernel(
    z,
    out,
    sigmas,
    inv_d,
    stream_index,
    scaling,
    rows,
    T,
    K,
    run,
    z_row,
    split_stride,
    R: tl.constexpr,
    RP: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Scale and round a block of rows: t, for a stream's draws, if SHARED; else (s, t)."""
    unit = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    i = tl.arange(0, RP)
    mask = (row < rows)[:, None] & (i < R)[None, :]
    slot = 1
    if SHARED:
        slot += tl.load(stream_index + unit * run).to(tl.int64)
    source = z + (row.to(tl.int64)[:, None] * z_row + i[None, :])[None]
    z0 = _sum_splits(source, mask[None], K, split_stride, BLOCK_S)
    e = _sum_splits(source + slot * R, mask[None], K, split_stride, BLOCK_S)
    width = tl.load(inv_d + i, mask=i < R, other=0.0).to(tl.float32)[None, :]
    for repeat in range(0, run):
        s = unit * run + repeat
        if SHARED:
            gain = tl.load(sigmas + s).to(tl.float32) * width
        else:
            gain = tl.load(sigmas + row // T, mask=row < rows, other=0.0).to(tl.float32)[:, None]
            gain *= width
        # sigma = 0 is the deterministic adapter even where e overflowed.
        found = scaling * tl.where(gain == 0.0, z0, z0 + gain * e)
        at = (tl.cast(s, tl.int64) * rows + row)[:, None] * R + i[None, :]
        tl.store(out + at, found.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "T", "row_blocks"])
def expand_kernel(
    z,
    b,
    base,
    bias,
    y,
    rows,
    T,
    m,
    row_blocks,
    stride_base,
    R: tl.constexpr,
    RB: tl.constexpr,
    SHARED: tl.constexpr,
    LONG: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tile of zf B'^T to base [T, m] if SHARED, read for each draw, else [S, T, m]."""
    # Blocks of rows vary fastest: all draws pass while a strip of base's columns is in the L2.
    first = (tl.program_id(0) % row_blocks) * BLOCK_T
    column = (tl.program_id(0) // row_blocks) * BLOCK_M
    # Offsets from a tile's first element fit into 32 bits.
    z += first.to(tl.int64) * R
    b += column.to(tl.int64) * R
    y += first.to(tl.int64) * m + column
    t = tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_M)
    t_mask, c_mask = first + t < rows, column + c < m
    mask = t_mask[:, None] & c_mask[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    for r0 in range(0, R, RB):  # one step up to rank RB; unrolled, larger ranks would spill
        i = r0 + tl.arange(0, RB)
        z_mask, b_mask = t_mask[:, None], c_mask[:, None]
        if R % RB != 0:
            z_mask, b_mask = z_mask & (i < R)[None, :], b_mask & (i < R)[None, :]
        z_tile = tl.load(z + t[:, None] * R + i[None, :], mask=z_mask, other=0.0)
        b_tile = tl.load(b + c[:, None] * R + i[None, :], mask=b_mask, other=0.0)
        acc = tl.dot(z_tile, b_tile.T, acc, input_precision=PRECISION)
    base += column
    if SHARED:
        at = first % T + t
        # A tile of LONG inputs meets the end of one draw's tokens at most once.
        at = tl.where(at < T, at, at - T) if LONG else at % T
        source = base + at.to(tl.int64)[:, None] * stride_base + c[None, :]
    else:
        # Rows of a wide base may be far apart: the last positions of logits [S, B, T, V].
        source = base + (first.to(tl.int64) + t)[:, None] * stride_base + c[None, :]
    acc += tl.load(source, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + column + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(y + (t[:, None] * m + c[None, :]), acc.to(y.dtype.element_ty), mask=mask)


# --- launchers ------------------------------------------------------------------------------------


def finalise(
    z: Tensor,
    sigmas: Tensor,
    inv_d: Tensor,
    stream_index: Tensor,
    scaling: float,
    T: int,
    run: int,
    dtype: torch.dtype,
    *,
    shared: bool,
) -> Tensor:
    """Return zf [S, T, R] in ``dtype`` from shrink's z [K, rows, slots, R].

    Where ``shared``, rows are T and slots those of all streams; else rows are S T, and slots two.
    """
    S, (K, rows, slots, R) = len(sigmas), z.shape
    out = torch.empty((S, T, R), dtype=operand_dtype(dtype), device=z.device)
    run = run if shared else 1
    constants = finalise_constants(R, K)
    grid = (-(-rows // constants["BLOCK_T"]), S // run if shared else 1)
    draws, sizes = (sigmas, inv_d, stream_index, scaling), (rows, T, K, run, slots * R, z.stride(0))
    finalise_kernel[grid](z, out, *draws, *sizes, SHARED=shared, **constants)
    return out


@lru_cache
def finalise_constants(R: int, K: int) -> dict[str, int]:
    """Give a program about 128 numbers of z, of as many splits at a time as registers hold."""
    RP = power_of_2(R)
    block_t = max(1, 128 // RP)
    block_s = min(power_of_2(K), max(1, FINALISE_TILE // (block_t * RP)))
    return {"R": R, "RP": RP, "BLOCK_T": block_t, "BLOCK_S": block_s}


class Plan(NamedTuple):
    """One launch of expand."""

    grid: tuple[int]
    row_blocks: int
    constants: dict[str, object]


def plan(
    S: int,
    T: int,
    m: int,
    R: int,
    dtype: torch.dtype,
    precision: str,
    config: LaunchConfig,
    wave: int,
    *,
    shared: bool,
    bias: bool,
) -> Plan:
    """Plan tiles as in ``config`` (block_t, block_m, block_k of R), smaller for few programs."""
    rows, tile, depth = S * T, [config.block_t, config.block_m], config.block_k
    if dtype == torch.float32:  # whose products, where not TF32, take registers for both operands
        tile, depth = [min(tile[0], 32), min(tile[1], 64)], 16
    for side in (0, 1):
        while (
            triton.cdiv(rows, tile[0]) * triton.cdiv(m, tile[1]) < wave
            and tile[side] > SMALLEST_TILE[side]
        ):
            tile[side] //= 2
    row_blocks = triton.cdiv(rows, tile[0])
    constants: dict[str, object] = {
        "R": R,
        "RB": min(padded_rank(R), depth),
        "SHARED": shared,
        "LONG": shared and tile[0] <= T,
        "HAS_BIAS": bias,
        "BLOCK_T": tile[0],
        "BLOCK_M": tile[1],
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Plan((row_blocks * triton.cdiv(m, tile[1]),), row_blocks, constants)


def expand(
    z: Tensor, B: Tensor, base: Tensor, bias: Tensor | None, out: Tensor, launch: Plan
) -> None:
    """Fill out [S, T, m] from z [S, T, R] and B [m, R], one dtype, and base [T, m] or [S, T, m].

    base and out have unit stride in m; out is contiguous and may be base.
    """
    S, T, m = out.shape
    flat = base if base.dim() == 2 else base.reshape(S * T, m)
    tensors = (z, B, flat, flat if bias is None else bias, out)
    sizes = (S * T, T, m, launch.row_blocks, flat.stride(0))
    expand_kernel[launch.grid](*tensors, *sizes, **launch.constants)
