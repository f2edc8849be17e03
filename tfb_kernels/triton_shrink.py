"""shrink: z0 = A'x and e_q = E_q x for every stream, in one pass over x.

    out[k, row, 0, i]     = sum_{j in split k} x[row, j] A'[i, j]
    out[k, row, 1 + q, i] = sum_{j in split k} x[row, j] E_q[i, j]        float32

The noise is made in registers, tile by tile, and never stored; sigma does not enter. Noise rows
of all streams of a group are numbered p = q R + i and tiled together, so that many small ranks
fill one tensor-core tile. Philox yields columns 4g .. 4g+3 of one call in four registers blocks;
multiplying each of them with its own quarter of x's columns needs no data movement, where joining
them into one tile does.

Dimensions: G groups (1 where all draws share x, else one for each run of draws of one stream),
T rows of a group, Q streams of a group, R rank, n in_features, K splits of n.

``token_shrink`` is the same for token noise: z0, row norms in the same pass, and
out[row, 1 + q, i] = |x_row| Xi_q[t, i].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfb_kernels.launch import INTERPRET, LaunchConfig, dot_precision, math_kind, signed_word
from tfb_kernels.triton_noise import TOKEN_DOMAIN, layer_words, normals4, seed_words

# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["layer", "T", "Q", "p_blocks", "split_size"])
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
    stride_xn,
    R: tl.constexpr,
    RP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Blocks of noise rows vary fastest: the programs that read one x tile run side by side.
    pid_t = tl.program_id(0) // p_blocks
    pid_p = tl.program_id(0) % p_blocks
    group = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    k0, k1 = seed_words(seed)

    t = pid_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = t < T
    p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    p_mask = p < Q * R
    row = (p % R).to(tl.uint32)
    stream = tl.load(streams + group * Q + p // R, mask=p_mask, other=0).to(tl.uint32)
    layer_word = layer_words(layer)
    i = tl.arange(0, RP)
    # The mean's part is computed by the first block alone; elsewhere its loads are masked off.
    i_mask = (i < R) & (pid_p == 0)

    x_row = x + group * stride_xg + t[:, None] * stride_xt
    acc_mean = tl.zeros((BLOCK_T, RP), tl.float32)
    acc_noise = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    quarter = tl.arange(0, BLOCK_K // 4)
    start = split * split_size
    for k in range(start, tl.minimum(start + split_size, n), BLOCK_K):
        g = k // 4 + quarter
        words = normals4(
            g.to(tl.uint32)[:, None], row[None, :], stream[None, :], layer_word, k0, k1, MATH
        )
        for c in tl.static_range(4):
            j = g * 4 + c
            j_mask = j < n
            x_tile = tl.load(
                x_row + j.to(tl.int64)[None, :] * stride_xn,
                mask=t_mask[:, None] & j_mask[None, :],
                other=0.0,
            )
            a_tile = tl.load(
                a + i.to(tl.int64)[None, :] * n + j[:, None],
                mask=i_mask[None, :] & j_mask[:, None],
                other=0.0,
            ).to(x_tile.dtype)
            e_tile = words[c].to(x_tile.dtype)
            if UPCAST:
                x_tile, a_tile = x_tile.to(tl.float32), a_tile.to(tl.float32)
                e_tile = e_tile.to(tl.float32)
            acc_mean = tl.dot(x_tile, a_tile, acc_mean, input_precision=PRECISION)
            acc_noise = tl.dot(x_tile, e_tile, acc_noise, input_precision=PRECISION)

    rows = tl.num_programs(1).to(tl.int64) * T
    out_row = (split.to(tl.int64) * rows + group * T + t[:, None]) * ((1 + Q) * R)
    tl.store(out + out_row + i[None, :], acc_mean, mask=t_mask[:, None] & i_mask[None, :])
    tl.store(out + out_row + R + p[None, :], acc_noise, mask=t_mask[:, None] & p_mask[None, :])


@triton.jit(do_not_specialize=["layer", "rows", "T", "Q"])
def token_shrink_kernel(
    x,
    a,
    out,
    streams,
    stream_slot,
    seed,
    layer,
    rows,
    T,
    n,
    Q,
    stride_xt,
    stride_xn,
    R: tl.constexpr,
    RP: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MATH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    k0, k1 = seed_words(seed)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = t < rows
    i = tl.arange(0, RP)
    i_mask = i < R
    acc = tl.zeros((BLOCK_T, RP), tl.float32)
    square = tl.zeros((BLOCK_T,), tl.float32)
    for k in range(0, n, BLOCK_K):
        j = k + tl.arange(0, BLOCK_K)
        j_mask = j < n
        x_tile = tl.load(
            x + t[:, None] * stride_xt + j.to(tl.int64)[None, :] * stride_xn,
            mask=t_mask[:, None] & j_mask[None, :],
            other=0.0,
        )
        a_tile = tl.load(
            a + i.to(tl.int64)[None, :] * n + j[:, None],
            mask=i_mask[None, :] & j_mask[:, None],
            other=0.0,
        ).to(x_tile.dtype)
        wide = x_tile.to(tl.float32)
        square += tl.sum(wide * wide, 1)
        if UPCAST:
            x_tile, a_tile = wide, a_tile.to(tl.float32)
        acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION)

    mask = t_mask[:, None] & i_mask[None, :]
    out_row = t[:, None] * ((1 + Q) * R) + i[None, :]
    tl.store(out + out_row, acc, mask=mask)
    norm = tl.sqrt(square)[:, None]
    token = (t % T).to(tl.uint32)[:, None]
    column = (i // 4).to(tl.uint32)[None, :] + TOKEN_DOMAIN
    word = (i % 4)[None, :]
    layer_word = layer_words(layer)
    for q in range(0, Q):
        if SHARED:
            stream = tl.load(streams + q + tl.zeros((1, 1), tl.int64))
        else:
            slot = tl.load(stream_slot + t // T, mask=t_mask, other=0)
            stream = tl.load(streams + slot)[:, None]
        n0, n1, n2, n3 = normals4(column, token, stream.to(tl.uint32), layer_word, k0, k1, MATH)
        xi = tl.where(word < 2, tl.where(word == 0, n0, n1), tl.where(word == 2, n2, n3))
        tl.store(out + out_row + (1 + q) * R, norm * xi, mask=mask)


# --- launchers ------------------------------------------------------------------------------------


def shrink(
    x: Tensor, A: Tensor, streams: Tensor, seed: Tensor, layer_id: int, config: LaunchConfig
) -> Tensor:
    """x [G, T, n], A [R, n] contiguous, streams [G, Q] -> z [K, G * T, 1 + Q, R] float32."""
    G, T, n = x.shape
    R, Q = A.shape[0], streams.shape[1]
    step = config.block_k
    split_size = triton.cdiv(triton.cdiv(n, config.splits), step) * step
    splits = max(1, triton.cdiv(n, split_size))
    out = torch.empty((splits, G * T, 1 + Q, R), dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    p_blocks = triton.cdiv(Q * R, config.block_p)
    grid = (triton.cdiv(T, config.block_t) * p_blocks, G, splits)
    shrink_kernel[grid](
        x, A, out, streams, seed, signed_word(layer_id), T, n, Q, p_blocks, split_size,
        x.stride(0), x.stride(1), x.stride(2),
        R=R, RP=padded_rank(R), SPLITS=splits,
        BLOCK_T=config.block_t, BLOCK_P=config.block_p, BLOCK_K=step,
        MATH=math_kind(), PRECISION=dot_precision(x.dtype), UPCAST=upcast(x.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def token_shrink(
    x: Tensor,
    A: Tensor,
    streams: Tensor,
    stream_index: Tensor,
    seed: Tensor,
    layer_id: int,
    tokens: int,
    config: LaunchConfig,
    *,
    shared: bool,
) -> Tensor:
    """x [rows, n], A [R, n], streams [Q] -> z [1, rows, slots, R] float32.

    shared: rows = tokens, and there is a slot for the mean and for each of the Q streams.
    Otherwise rows = S * tokens, and of two slots the second has the noise of the row's own draw.
    """
    rows, n = x.shape
    R = A.shape[0]
    Q = streams.shape[0] if shared else 1
    out = torch.empty((1, rows, 1 + Q, R), dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    token_shrink_kernel[(triton.cdiv(rows, config.block_t),)](
        x, A, out, streams, stream_index, seed, signed_word(layer_id), rows, tokens, n, Q,
        x.stride(0), x.stride(1),
        R=R, RP=padded_rank(R), SHARED=shared,
        BLOCK_T=config.block_t, BLOCK_K=config.block_k,
        MATH=math_kind(), PRECISION=dot_precision(x.dtype), UPCAST=upcast(x.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def padded_rank(R: int) -> int:
    """The rank as tl.arange and tl.dot take it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(R))


def upcast(dtype: torch.dtype) -> bool:
    """The interpreter's bfloat16 dot product is wrong (triton #11584): it gets float32."""
    return INTERPRET and dtype == torch.bfloat16
