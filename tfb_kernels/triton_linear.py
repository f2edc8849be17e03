"""``bayes_lora_linear`` on Triton: shrink (or generate and a library product), then expand.

    fused      noise in registers while x is read; no stored noise            few rows to a stream
    generate   [A'; E_1 .. E_Q] written once, then the vendor's product       many rows to a stream
    token      z0 and row norms in one pass, r normals for each token         noise="token"

``choose_path`` decides between the first two from the thresholds of ``data/launch.json``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfb_kernels.launch import PATHS, choose_config, choose_path
from tfb_kernels.triton_expand import expand
from tfb_kernels.triton_generate import generate
from tfb_kernels.triton_shrink import shrink, token_shrink

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def bayes_lora_linear_triton(
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
    *,
    path: str = "auto",
) -> Tensor:
    """Shapes and meaning as in :func:`tfb_kernels.bayes_lora_linear`, whose checks came before.

    Args:
        run: consecutive draws that share a stream, S = Q * run; 1: ``stream_index`` is arbitrary.
        pool: kept noise [Q, r, n]; its owner has already paid for the memory, so it is multiplied
            as it is. out: [S, T, m] contiguous; may be ``base``.
        path: "fused" or "generate" by name, for benchmarks and tests.
    """
    S, T = len(sigmas), x.shape[-2]
    R, n = A.shape
    A, B = A.contiguous(), B.contiguous()
    if base.stride(-1) != 1:
        base = base.contiguous()
    if out is None:
        out = torch.empty((S, T, B.shape[0]), dtype=base.dtype, device=base.device)
    if x.dim() == 2:
        grouped, grouped_streams = x[None], streams[None]
    elif run > 1:
        grouped, grouped_streams = x.reshape(S // run, run * T, n), streams[:, None]
    else:
        grouped, grouped_streams = x, streams[stream_index][:, None]
    rows = grouped.shape[1]
    if noise == "token":
        z = token_shrink(
            x.reshape(-1, n), A, streams, stream_index, seed, layer_id, T,
            choose_config("token_shrink", rows=rows, rank=R), shared=x.dim() == 2,
        )  # fmt: skip
    elif pool is not None:
        E = pool[None] if x.dim() == 2 else (pool if run > 1 else pool[stream_index])[:, None]
        mean = A.expand(len(grouped), 1, R, n)
        z = _library_product(grouped, torch.cat([mean, E], dim=1).to(x.dtype))
    elif (path if path in PATHS else choose_path(rows)) == "generate":
        z = _library_product(
            grouped,
            generate(
                A, grouped_streams, seed, layer_id, R, n, x.dtype,
                choose_config("generate", rows=rows, rank=R),
            ),
        )  # fmt: skip
    else:
        z = shrink(
            grouped, A, grouped_streams, seed, layer_id,
            choose_config("shrink", rows=rows, rank=R),
        )  # fmt: skip
    expand(
        z, B, base, bias, out, sigmas, inv_d, stream_index, scaling, x.dtype,
        choose_config("expand", rows=z.shape[1], rank=R),
    )  # fmt: skip
    return out


def _library_product(x: Tensor, factors: Tensor) -> Tensor:
    """x [G, T, n], factors [G, slots, R, n] -> z [1, G * T, slots, R] float32."""
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
