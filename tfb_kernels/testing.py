"""What tests and benchmarks of the kernels share: a float64 truth and an error budget."""

from __future__ import annotations

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
    """y [S, T, m] in float64 by the definition: materialise A' + noise, one draw after another.

    Deliberately written another way than the oracle: it forms each sampled weight, which the
    library never does, and loops over the draws.
    """
    A, B, inv_d = A.double(), B.double(), inv_d.double()
    out = []
    for s, (sigma, stream) in enumerate(zip(sigmas.tolist(), streams.tolist(), strict=True)):
        E = weight_noise(torch.tensor(seed), layer_id, torch.tensor([stream]), *A.shape)[0]
        sampled = A + sigma * inv_d[:, None] * E.double()
        x_s = (x if x.dim() == 2 else x[s]).double()
        base_s = (base if base.dim() == 2 else base[s]).double()
        out.append(base_s + scaling * (x_s @ sampled.mT @ B.mT))
    return torch.stack(out)


def error_budget(exact: Tensor, eager: Tensor) -> float:
    """2 x the largest error of an eager computation in the working precision.

    A kernel that stays inside it is no worse than twice what plain torch gives for the same work
    (attention-gym's rule). ``exact``: float64 truth. ``eager``: the same in the low precision.
    """
    return 2.0 * float((eager.double() - exact).abs().max())
