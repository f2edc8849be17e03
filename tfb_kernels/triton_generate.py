"""generate: fill stacked factors [A'; E_1 .. E_Q] once, for a library matrix product to read.

    out[g, 0, i, j]     = A'[i, j]             (left out without A)
    out[g, 1 + q, i, j] = E_{streams[g, q]}[i, j]

in the dtype of ``out``. With no A and float32 it is ``gaussian_noise`` on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfb_kernels.launch import LaunchConfig, math_kind, signed_word
from tfb_kernels.triton_noise import layer_words, noise_tile, seed_words

# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["layer", "Q", "rows"])
def generate_kernel(
    a,
    out,
    streams,
    seed,
    layer,
    n,
    Q,
    rows,
    R: tl.constexpr,
    WITH_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATH: tl.constexpr,
):
    """Fill BLOCK_R of a group's rows = (WITH_A + Q) * R rows, BLOCK_K columns of them."""
    k0, k1 = seed_words(seed)
    group = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot = p // R - WITH_A
    stream = tl.load(streams + group * Q + slot, mask=(slot >= 0) & (p < rows), other=0)
    first = tl.program_id(1) * BLOCK_K
    row, stream, word = (p % R).to(tl.uint32), stream.to(tl.uint32), layer_words(layer)
    tile = noise_tile(first, row, stream, word, k0, k1, BLOCK_K, MATH)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (p < rows)[:, None] & (j < n)[None, :]
    if WITH_A:
        mean = tl.load(
            a + p.to(tl.int64)[:, None] * n + j[None, :], mask=mask & (p < R)[:, None], other=0.0
        )
        tile = tl.where((p < R)[:, None], mean.to(tl.float32), tile)
    offset = (group * rows + p[:, None]) * n + j[None, :]
    tl.store(out + offset, tile.to(out.dtype.element_ty), mask=mask)


# --- launchers ------------------------------------------------------------------------------------


def generate(
    A: Tensor | None,
    streams: Tensor,
    seed: Tensor,
    layer_id: int,
    R: int,
    n: int,
    dtype: torch.dtype,
    config: LaunchConfig,
) -> Tensor:
    """Return the stacked factors [G, (1 or 0) + Q, R, n] of A [R, n] or None, streams [G, Q]."""
    G, Q = streams.shape
    with_a = A is not None
    out = torch.empty((G, with_a + Q, R, n), dtype=dtype, device=streams.device)
    if out.numel() == 0:
        return out
    rows = (with_a + Q) * R
    grid = (triton.cdiv(rows, config.block_p), triton.cdiv(n, config.block_k), G)
    mean = out if A is None else A
    tiles = {"BLOCK_R": config.block_p, "BLOCK_K": config.block_k, "num_warps": config.num_warps}
    constants = {"R": R, "WITH_A": int(with_a), "MATH": math_kind(), **tiles}
    sizes = (signed_word(layer_id), n, Q, rows)
    generate_kernel[grid](mean, out, streams, seed, *sizes, **constants)
    return out
