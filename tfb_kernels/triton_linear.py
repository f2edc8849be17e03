"""``bayes_lora_linear`` on Triton: z by one of two paths, finalised, then expanded.

    fused      shrink: noise in registers while x is read; nothing stored     few rows to a stream
    generate   [A'; E_1 .. E_Q] written once, then the vendor's product       many rows to a stream

What depends on shapes alone is decided once for each of them (``_plan``): a call of a small layer
costs as much Python as GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tfb_kernels import launch, triton_expand, triton_shrink, tuning
from tfb_kernels.launch import LaunchConfig, choose_config, operand_dtype
from tfb_kernels.samples import Samples
from tfb_kernels.triton_expand import expand, finalise
from tfb_kernels.triton_generate import generate
from tfb_kernels.triton_shrink import shrink


class Plan(NamedTuple):
    """How one shape is computed on one device: by shrink, or where that is None by generate."""

    shrink: triton_shrink.Plan | None
    generate: LaunchConfig
    expand: triton_expand.Plan


@tuning.cached
def _plan(
    device: torch.device,
    G: int,
    rows: int,
    n: int,
    Q: int,
    R: int,
    S: int,
    T: int,
    m: int,
    dtype: torch.dtype,
    precision: str,
    path: str,
    *,
    shared: bool,
    bias: bool,
) -> Plan:
    """Plan G groups of ``rows`` rows of x and Q streams each; S draws of T tokens."""
    arch, wave = launch.architecture(device), tuning.processors(device)
    if path not in launch.PATHS:
        path = launch.choose_path(rows, arch)
    made = None
    if path == "fused":
        config = choose_config("shrink", rows=rows, rank=R, arch=arch)
        made = triton_shrink.plan(G, rows, n, Q, R, dtype, precision, config, wave)
    written = choose_config("generate", rows=rows, rank=R, arch=arch)
    config = choose_config("expand", rows=S * T, rank=R, arch=arch)
    added = triton_expand.plan(S, T, m, R, dtype, precision, config, wave, shared=shared, bias=bias)
    return Plan(made, written, added)


def bayes_lora_linear_triton(
    x: Tensor,
    base: Tensor,
    samples: Samples,
    noise: str = "weight",
    pool: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    path: str = "auto",
) -> Tensor:
    """Compute :func:`tfb_kernels.bayes_lora_linear`, which has checked the arguments.

    Args:
        x: [T, n] or [S, T, n].
        base: [T, m] or [S, T, m].
        samples: with A and B best in the dtype of x; in another they are converted at every call.
        noise: "weight" alone; all implementations have one list of arguments.
        pool: None alone, likewise.
        bias: [m], or None.
        out: [S, T, m] contiguous; may be ``base``.
        path: "fused" or "generate" by name, for benchmarks and tests.
    """
    A, B, inv_d, sigmas, streams, stream_index, run, seed, layer_id, scaling = samples
    dtype, shared = x.dtype, x.dim() == 2
    if x.stride(-1) != 1:
        x = x.contiguous()
    if base.stride(-1) != 1:
        base = base.contiguous()
    S, T, R, n = len(sigmas), x.shape[-2], A.shape[0], A.shape[1]
    m = B.shape[0]
    if out is None:
        out = torch.empty((S, T, m), dtype=base.dtype, device=base.device)
    if out.numel() == 0:
        return out
    if shared:
        grouped, grouped_streams = x[None], streams[None]
    elif run > 1:
        grouped, grouped_streams = x.reshape(S // run, run * T, n), streams[:, None]
    else:
        grouped, grouped_streams = x, streams[stream_index][:, None]
    G, rows, _ = grouped.shape
    Q, precision = grouped_streams.shape[1], launch.dot_precision(dtype)
    size = (x.device, G, rows, n, Q, R, S, T, m)
    made = _plan(*size, dtype, precision, path, shared=shared, bias=bias is not None)
    A = A.to(dtype).contiguous()
    B = B.to(operand_dtype(dtype)).contiguous()
    if made.shrink is not None:
        z = shrink(grouped, A, grouped_streams, seed, layer_id, made.shrink)
    else:
        z = _library_product(
            grouped, generate(A, grouped_streams, seed, layer_id, R, n, dtype, made.generate)
        )
    zf = finalise(z, sigmas, inv_d, stream_index, scaling, T, run, dtype, shared=shared)
    expand(zf, B, base, bias, out, made.expand)
    return out


def _library_product(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply x [G, T, n] by factors [G, slots, R, n]: z [1, G * T, slots, R] float32."""
    G, T, _ = x.shape
    slots, R = factors.shape[1:3]
    weights = factors.flatten(1, 2).mT
    if x.dtype == torch.float32:
        z = torch.bmm(x, weights)
    elif x.is_cuda and not torch.version.hip:
        z = torch.bmm(x, weights, out_dtype=torch.float32)  # sums are not rounded to half
    else:
        z = torch.bmm(x, weights).float()
    return z.view(1, G * T, slots, R)
