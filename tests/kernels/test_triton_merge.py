"""Merged weights against the float64 formula: on a GPU where there is one, else interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tfb_kernels.launch import LaunchConfig
from tfb_kernels.samples import Samples
from tfb_kernels.testing import (
    error_budget,
    merged_weights,
    noise_allowance,
    rounding_allowance,
)
from tfb_kernels.triton_merge import merge

# NumPy's view of the interpreter's one-element ranges; the kernel is not concerned.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0 to a scalar is deprecated:DeprecationWarning"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = LaunchConfig(block_m=16, block_n=32, block_k=16)  # several tiles and steps of the rank
OPTIONS: dict[str, Any] = {"seed": -12345, "layer_id": (1 << 32) - 5, "scaling": 1.75}


def operands(m: int, n: int, r: int, sigmas: list[float], dtype: torch.dtype) -> list[Tensor]:
    """weight, A, B, inv_d, sigmas: every term of order one."""
    g = torch.Generator().manual_seed(m * n + r)
    inv_d = torch.rand(r, generator=g) + 0.5
    if r > 1:
        inv_d[-1] = 0.0  # a direction that B does not span
    weight = torch.randn(m, n, generator=g).to(dtype)
    A, B = torch.randn(r, n, generator=g), torch.randn(m, r, generator=g) / r**0.5
    return [t.to(DEVICE) for t in (weight, A, B, inv_d, torch.tensor(sigmas))]


def merged(p: list[Tensor], streams: list[int], run: int, config: LaunchConfig | None) -> Tensor:
    """By the kernel, into an output of the weight's layout that shows what is left unwritten."""
    weight, *rest = p
    order = list(dict.fromkeys(streams))
    index = torch.tensor([order.index(q) for q in streams], device=DEVICE)
    turned = weight.stride(0) == 1 != weight.stride(1)
    out = torch.full((len(streams), *(weight.mT if turned else weight).shape), float("nan"))
    out = out.to(weight)
    out = out.mT if turned else out
    numbered = (torch.tensor(order, device=DEVICE), index, run)
    seed = torch.tensor(OPTIONS["seed"], device=DEVICE)
    samples = Samples(*rest, *numbered, seed, OPTIONS["layer_id"], OPTIONS["scaling"])
    merge(weight, samples, out, config=config)
    return out


def check(p: list[Tensor], streams: list[int], found: Tensor) -> None:
    """Within twice the error of an ordinary merging in the weight's dtype."""
    cpu = [t.cpu() for t in p]
    exact = merged_weights(*(t.double() for t in cpu), torch.tensor(streams), **OPTIONS)
    eager = merged_weights(*cpu, torch.tensor(streams), **OPTIONS)
    weight, _, B, inv_d, sigmas = cpu
    allowed = error_budget(exact, eager) + rounding_allowance(exact, weight, weight.dtype)
    allowed += noise_allowance(torch.ones(1, 1), B, inv_d, sigmas, OPTIONS["scaling"])
    assert found.shape == exact.shape and found.dtype == weight.dtype
    assert float((found.cpu().double() - exact).abs().max()) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "r", "run"), [(1, 1, 1, 1), (19, 37, 3, 2), (40, 70, 40, 2), (33, 64, 16, 1)]
)
def test_ragged_shapes(m: int, n: int, r: int, run: int, dtype: torch.dtype) -> None:
    """No size needs to be a multiple of anything; draws of one stream in runs, or in any order."""
    streams = [2**32 - 1, 2**32 - 1, 7, 7] if run == 2 else [7, 3, 7]
    p = operands(m, n, r, [0.5, -0.5, 0.25, -2.0][: len(streams)], dtype)
    check(p, streams, merged(p, streams, run, SMALL))


def test_the_configured_tiles() -> None:
    """Those of launch.json."""
    p = operands(20, 30, 8, [0.5, -0.5], torch.float32)
    check(p, [4, 4], merged(p, [4, 4], 2, None))


def test_a_transposed_weight() -> None:
    """The layout of transformers' Conv1D: the same numbers, in the layout of the weight."""
    p = operands(19, 37, 3, [0.5, -0.5], torch.float32)
    turned = [p[0].mT.contiguous().mT, *p[1:]]
    assert turned[0].stride() == (1, 19)
    found = merged(turned, [4, 4], 2, SMALL)
    assert found.stride()[1:] == (1, 19)
    assert found.equal(merged(p, [4, 4], 2, SMALL))


def test_pairs_equal_single_draws_to_the_bit() -> None:
    """And every draw its own, whatever is merged beside it."""
    p = operands(19, 37, 8, [0.5, -0.5, 1.0, -1.0], torch.float16)
    pairs = merged(p, [4, 4, 9, 9], 2, SMALL)
    assert pairs.equal(merged(p, [4, 4, 9, 9], 1, SMALL))
    assert merged([*p[:4], p[4][3:]], [9], 1, SMALL).equal(pairs[3:])


def test_sigma_zero_is_the_merged_adapter() -> None:
    """To the bit, whatever the stream."""
    p = operands(19, 37, 8, [0.0, -0.0], torch.float32)
    mean = merged(p, [4, 9], 1, SMALL)
    assert mean[0].equal(mean[1])
    check(p, [4, 9], mean)
