"""expand: y_s = base + scaling B'(z0 + (sigma_s / d) o e_s) [+ bias], one write of each output.

    SHARED       base [T, m] is read once and S outputs are written
    otherwise    base [S * T, m], one row of it for each row of y; y may be base itself

sigma / d and the scaling stay in float32; only z = z0 + (sigma / d) e is rounded to the dtype of
the product. Partial sums of a split shrink are added here, in order, so the result does not
depend on timing.

Dimensions: S draws, T tokens, m out_features, R rank, K splits, slots of z as in shrink.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfb_kernels.launch import INTERPRET, LaunchConfig, dot_precision
from tfb_kernels.triton_shrink import padded_rank

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _load_z(z, offset, mask, split_stride, SPLITS: tl.constexpr):
    """Sum of the partial results of all splits, in order."""
    total = tl.load(z + offset, mask=mask, other=0.0).to(tl.float32)
    for k in range(1, SPLITS):
        total += tl.load(z + offset + k * split_stride, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["rows", "T", "S", "m_blocks"])
def expand_kernel(
    z,
    b,
    base,
    bias,
    y,
    sigmas,
    inv_d,
    stream_index,
    scaling,
    rows,
    T,
    m,
    S,
    m_blocks,
    z_row,
    split_stride,
    stride_base,
    R: tl.constexpr,
    RB: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Blocks of columns vary fastest: programs side by side read the same z rows.
    t = (tl.program_id(0) // m_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    t_mask, c_mask = t < rows, c < m
    mask = t_mask[:, None] & c_mask[None, :]
    column = c.to(tl.int64)[None, :]
    base_tile = tl.load(base + t[:, None] * stride_base + column, mask=mask, other=0.0)
    start = base_tile.to(tl.float32)
    if HAS_BIAS:
        start += tl.load(bias + c, mask=c_mask, other=0.0).to(tl.float32)[None, :]

    repeats = S if SHARED else 1
    for s in range(0, repeats):
        acc = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
        for r0 in range(0, R, RB):  # one step up to rank RB; unrolled, larger ranks would spill
            i = r0 + tl.arange(0, RB)
            i_mask = i < R
            b_tile = tl.load(
                b + column * R + i[:, None], mask=c_mask[None, :] & i_mask[:, None], other=0.0
            ).to(DOT)
            z_mask = t_mask[:, None] & i_mask[None, :]
            offset = t[:, None] * z_row + i[None, :]
            z0 = _load_z(z, offset, z_mask, split_stride, SPLITS)
            width = tl.load(inv_d + i, mask=i_mask, other=0.0).to(tl.float32)[None, :]
            if SHARED:
                sigma = tl.load(sigmas + s).to(tl.float32)
                slot = 1 + tl.load(stream_index + s).to(tl.int64)
                gain = sigma * width
            else:
                sigma = tl.load(sigmas + t // T, mask=t_mask, other=0.0).to(tl.float32)
                slot = 1
                gain = sigma[:, None] * width
            e = _load_z(z, offset + slot * R, z_mask, split_stride, SPLITS)
            # sigma = 0 is the deterministic adapter even where e overflowed.
            noisy = tl.where(gain == 0.0, z0, z0 + gain * e)
            acc = tl.dot(noisy.to(DOT), b_tile, acc, input_precision=PRECISION)
        out = (start + scaling * acc).to(y.dtype.element_ty)
        tl.store(y + (s * rows + t[:, None]) * m + column, out, mask=mask)


# --- launchers ------------------------------------------------------------------------------------


def expand(
    z: Tensor,
    B: Tensor,
    base: Tensor,
    bias: Tensor | None,
    out: Tensor,
    sigmas: Tensor,
    inv_d: Tensor,
    stream_index: Tensor,
    scaling: float,
    dtype: torch.dtype,
    config: LaunchConfig,
) -> None:
    """Fill out [S, T, m] from z [K, rows, slots, R], B [m, R] and base [T, m] or [S, T, m].

    ``dtype``: of the product's operands. base and out have unit stride in m; out is contiguous and
    may be base.
    """
    S, T, m = out.shape
    K, rows, slots, R = z.shape
    shared = base.dim() == 2
    if out.numel() == 0:
        return
    flat = base if shared else base.reshape(S * T, m)
    m_blocks = triton.cdiv(m, config.block_m)
    operand = torch.float32 if INTERPRET and dtype == torch.bfloat16 else dtype
    expand_kernel[(triton.cdiv(rows, config.block_t) * m_blocks,)](
        z, B, flat, flat if bias is None else bias, out, sigmas, inv_d, stream_index, scaling,
        rows, T, m, S, m_blocks, slots * R, z.stride(0), flat.stride(0),
        R=R, RB=min(padded_rank(R), config.block_k), SPLITS=K, SHARED=shared,
        HAS_BIAS=bias is not None, BLOCK_T=config.block_t, BLOCK_M=config.block_m,
        DOT=TRITON_DTYPES[operand], PRECISION=dot_precision(operand),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
