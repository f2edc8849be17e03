"""What tests and benchmarks of the kernels share: a float64 truth and an error budget."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tfb_kernels.noise import weight_noise


def exact_weight_samples(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    inv_d: Tensor,
    sigmas: Tensor,
    streams: Tensor,
    *,
    seed: int,
    layer_id: int,
    scaling: float,
) -> Tensor:
    """Return y [S, T, m] in float64 by the definition: A' + noise of one draw after another.

    The oracle is written another way: it has no loop over draws and never forms a sampled weight.
    """
    x, base, A, B, inv_d = (t.double() for t in (x, base, A, B, inv_d))
    return eager_weight_samples(
        x, base, A, B, inv_d, sigmas, streams, seed=seed, layer_id=layer_id, scaling=scaling
    )


def error_budget(exact: Tensor, eager: Tensor) -> float:
    """Return twice the largest error of an eager computation in the working precision.

    A kernel that stays inside it is no worse than twice what plain torch gives for the same work
    (attention-gym's rule). ``exact`` is the float64 truth, ``eager`` the same in low precision.
    """
    return 2.0 * float((eager.double() - exact).abs().max())


def eager_weight_samples(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    inv_d: Tensor,
    sigmas: Tensor,
    streams: Tensor,
    *,
    seed: int,
    layer_id: int,
    scaling: float,
) -> Tensor:
    """Return y [S, T, m] as eager PyTorch gives it in the dtype of x: the naive loop over draws.

    Its error is the yardstick of :func:`error_budget`.
    """
    out = []
    for s, sampled in enumerate(_sampled(A, inv_d, sigmas, streams, seed, layer_id, x.dtype)):
        x_s, base_s = (x, base) if x.dim() == 2 else (x[s], base[s])
        out.append(base_s + scaling * ((x_s @ sampled.mT) @ B.to(x.dtype).mT).to(base.dtype))
    return torch.stack(out)


def _sampled(
    A: Tensor,
    inv_d: Tensor,
    sigmas: Tensor,
    streams: Tensor,
    seed: int,
    layer_id: int,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """Yield A' + (sigma / d) o E of each draw [r, n], materialised and rounded to ``dtype``."""
    for sigma, stream in zip(sigmas.tolist(), streams.tolist(), strict=True):
        E = weight_noise(torch.tensor(seed), layer_id, torch.tensor([stream]), *A.shape)[0]
        yield (A + sigma * inv_d[:, None] * E.to(A.device)).to(dtype)


def rounding_allowance(exact: Tensor, base: Tensor, dtype: torch.dtype) -> float:
    """Return what any computation in ``dtype`` may err by, if not an eager one that has luck.

    That is half a unit of the result, and of noise (or A'), z and B in the update.
    """
    update = float((exact - base.to(exact)).abs().max())
    return torch.finfo(dtype).eps / 2 * (float(exact.abs().max()) + 3 * update)


def noise_allowance(
    x: Tensor, B: Tensor, inv_d: Tensor, sigmas: Tensor, scaling: float, rms: float = 1e-6
) -> float:
    """Return what the noise contract allows implementations to differ by: normals, by ``rms``.

    e = E x then differs by about rms |x|, and y by scaling |B (sigma / d)| times that; eight
    standard deviations of it, for the largest token, row and draw.
    """
    gain = (sigmas.abs().max() * inv_d).double().cpu()
    width = (B.double().cpu() * gain).norm(dim=1).max()
    tokens = x.double().cpu().reshape(-1, x.shape[-1]).norm(dim=1)
    return 8 * rms * abs(scaling) * float(width) * float(tokens.max() if len(tokens) else 0)


def merged_weights(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    inv_d: Tensor,
    sigmas: Tensor,
    streams: Tensor,
    *,
    seed: int,
    layer_id: int,
    scaling: float,
) -> Tensor:
    """Return W + scaling B' (A' + noise) [S, m, n] in the dtype of ``weight``.

    These are the exact weights if all is float64, else the yardstick of :func:`error_budget`.
    """
    found = _sampled(A, inv_d, sigmas, streams, seed, layer_id, weight.dtype)
    return torch.stack([weight + scaling * (B.to(weight.dtype) @ sampled) for sampled in found])
