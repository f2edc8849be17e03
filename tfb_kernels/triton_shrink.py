"""shrink: z0 = A'x and e_q = E_q x for every stream of a group of rows, in one pass over x.

    out[k, row, slot, i] = sum_{j in split k} x[row, j] F[slot, i, j]     float32
    F[0] = A',  F[1 + q] = E_q

F's rows p = slot R + i make tiles [BLOCK_P, BLOCK_K] that are the left operand of F x^T: noise in
registers, never stored, the mean's rows selected into the tile of the same program. The last tile
is as small as what is left. ``plan`` chooses tiles and splits of n so that every multiprocessor
has a program; ``finalise`` adds the splits in order. sigma does not enter.

Dimensions: G groups (1 where all draws share x, else one for each run of draws of one stream),
T rows of a group, Q streams of a group, R rank, n in_features, K splits of n.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfb_kernels.launch import (
    LaunchConfig,
    math_kind,
    operand_dtype,
    power_of_2,
    signed_word,
)
from tfb_kernels.triton_noise import layer_words, noise_tile, seed_words

# --- kernel ---------------------------------------------------------------------------------------


@triton.jit
def _tile(
    x,
    a,
    out,
    streams,
    t,
    first,
    start,
    stop,
    T,
    n,
    Q,
    stride_xt,
    layer,
    k0,
    k1,
    R: tl.constexpr,
    EVEN: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Multiply F's rows from ``first`` on, those below R being A' if MEAN, by a tile of x^T.

    Pointers are those of the group.
    """
    p = first + tl.arange(0, BLOCK_P)
    i = p % R
    slot = p // R
    p_mask = slot <= Q
    stream = tl.load(streams + slot - 1, mask=(slot > 0) & p_mask, other=0).to(tl.uint32)
    j = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one, which costs no mask; they are not stored.
    x_tile = x + tl.minimum(t, T - 1).to(tl.int64)[:, None] * stride_xt + (start + j)[None, :]
    a_row = i * n + start
    if EVEN:
        # Vectors of 4, as wide as a call of Philox: A' then has the layout of the noise.
        a_row = tl.multiple_of(a_row, 4)
    a_tile = a + a_row[:, None] + j[None, :]
    is_mean = (p < R)[:, None]
    acc = tl.zeros((BLOCK_P, t.shape[0]), tl.float32)
    for k in range(start, stop, BLOCK_K):
        xs = tl.load(x_tile) if EVEN else tl.load(x_tile, mask=(k + j < n)[None, :], other=0.0)
        f = noise_tile(k, i.to(tl.uint32), stream, layer, k0, k1, BLOCK_K, MATH).to(xs.dtype)
        if MEAN:
            mask = is_mean if EVEN else is_mean & (k + j < n)[None, :]
            f = tl.where(is_mean, tl.load(a_tile, mask=mask, other=0.0), f)
            a_tile += BLOCK_K
        if UPCAST:
            f, xs = f.to(tl.float32), xs.to(tl.float32)
        acc = tl.dot(f, xs.T, acc, input_precision=PRECISION)
        x_tile += BLOCK_K
    at = t.to(tl.int64)[None, :] * ((1 + Q) * R) + p[:, None]
    tl.store(out + at, acc, mask=p_mask[:, None] & (t < T)[None, :])


@triton.jit(do_not_specialize=["layer", "T", "Q", "p_blocks"])
def shrink_kernel(
    x,
    a,
    out,
    streams,
    seed,
    layer,
    T,
    n,
    Q,
    p_blocks,
    split_size,
    stride_xg,
    stride_xt,
    R: tl.constexpr,
    EVEN: tl.constexpr,
    MIDDLE: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute one tile of one group's z, over one split of n."""
    # Blocks of F's rows vary fastest: the programs that read one x tile run side by side.
    t = tl.program_id(0) // p_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    block = tl.program_id(0) % p_blocks
    group = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    k0, k1 = seed_words(seed)
    word = layer_words(layer)
    start = split * split_size
    stop = tl.minimum(start + split_size, n)
    x += group * stride_xg
    streams += group * Q
    out += (split * tl.num_programs(1) + group) * T * ((1 + Q) * R)
    first = block * BLOCK_P
    # ``plan`` says which kinds of block there are: with the mean, between, and a smaller last one.
    place = (x, a, out, streams, t, first, start, stop, T, n, Q, stride_xt, word, k0, k1)
    if first < R or not (MIDDLE or TAIL):
        _tile(*place, R, EVEN, True, BLOCK_P, BLOCK_K, MATH, PRECISION, UPCAST)
    elif MIDDLE and (TAIL == 0 or block < p_blocks - 1):
        _tile(*place, R, EVEN, False, BLOCK_P, BLOCK_K, MATH, PRECISION, UPCAST)
    elif TAIL:
        _tile(*place, R, EVEN, False, TAIL, BLOCK_K, MATH, PRECISION, UPCAST)


# --- launcher -------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """One launch: programs, splits of n, and the kernel's constants."""

    grid: tuple[int, int, int]
    p_blocks: int
    split_size: int
    constants: dict[str, object]


def plan(
    G: int,
    T: int,
    n: int,
    Q: int,
    R: int,
    dtype: torch.dtype,
    precision: str,
    config: LaunchConfig,
    wave: int,
) -> Plan:
    """Plan tiles and splits such that there are ``wave`` programs or more, wherever n allows.

    Tiles are block_t, block_p (at most) and block_k of ``config``.
    """
    block_t, block_k, largest = config.block_t, config.block_k, config.block_p
    if dtype == torch.float32:  # whose products, where not TF32, take registers for both operands
        block_t, block_k, largest = min(block_t, 32), min(block_k, 32), min(largest, 32)
    rows, steps = (1 + Q) * R, triton.cdiv(n, block_k)
    block_p = min(largest, max(16, power_of_2(rows) if rows <= 32 else power_of_2(rows + 1) // 2))
    x_blocks = triton.cdiv(T, block_t) * G
    while block_p > 16 and x_blocks * triton.cdiv(rows, block_p) * steps < wave:
        block_p //= 2
    p_blocks = triton.cdiv(rows, block_p)
    tail = max(16, power_of_2(rows - (p_blocks - 1) * block_p)) % block_p
    with_mean = triton.cdiv(R, block_p)
    if with_mean == p_blocks or precision == "tf32":  # in which the smaller tile spills
        tail = 0
    splits = triton.cdiv(wave, x_blocks * p_blocks)
    split_size = max(1, steps // splits) * block_k
    constants: dict[str, object] = {
        "R": R,
        "EVEN": n % block_k == 0,
        "MIDDLE": p_blocks - with_mean - (tail > 0) > 0,
        "TAIL": tail,
        "BLOCK_T": block_t,
        "BLOCK_P": block_p,
        "BLOCK_K": block_k,
        "MATH": math_kind(),
        "PRECISION": precision,
        "UPCAST": operand_dtype(dtype) != dtype,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    grid = (triton.cdiv(T, block_t) * p_blocks, G, triton.cdiv(n, split_size))
    return Plan(grid, p_blocks, split_size, constants)


def shrink(
    x: Tensor, A: Tensor, streams: Tensor, seed: Tensor, layer_id: int, launch: Plan
) -> Tensor:
    """Return z [K, G * T, 1 + Q, R] float32.

    Args:
        x: [G, T, n] of unit stride in n.
        A: [R, n] contiguous, in the dtype of x.
        streams: [G, Q] int64.
        seed: int64 scalar.
        layer_id: unsigned 32 bits.
        launch: what ``plan`` gave for these shapes.
    """
    G, T, n = x.shape
    Q = streams.shape[1]
    shape = (launch.grid[2], G * T, 1 + Q, A.shape[0])
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    noise, sizes = (streams, seed, signed_word(layer_id)), (T, n, Q)
    cut = (launch.p_blocks, launch.split_size, x.stride(0), x.stride(1))
    shrink_kernel[launch.grid](x, A, out, *noise, *sizes, *cut, **launch.constants)
    return out
