"""``bayes_lora_merge`` on a CPU against its formula, written out in float64.

Error bound: W_s is a sum of r + 1 terms of magnitude M = |W| + |scaling B| (|A| + |sigma / d| |E|),
whose factors are rounded a few times: (r + 8) eps M; and half a unit of the dtype of W at the end.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.operators import (
    LOW,
    SIGMAS,
    STREAMS,
    Problem,
    compiled_once,
    indexed,
    problem,
    within,
)
from torch import Tensor

from tfb_kernels import bayes_lora_linear, bayes_lora_merge, gaussian_noise
from tfb_kernels.noise import weight_noise
from tfb_kernels.reference import compute_dtype


def merging(dtype: torch.dtype = torch.float64, turned: bool = False) -> Problem:
    """Arguments of bayes_lora_merge; ``turned``: a view of a weight [n, m], as Conv1D has it."""
    p = problem(shared=False, dtype=dtype)
    del p["x"], p["base"]
    weight = torch.randn(20, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {"weight": weight.mT.contiguous().mT if turned else weight, **p}


def definition(p: Problem, *, absolute: bool = False) -> Tensor:
    """W_s [S, m, n] float64, draw by draw; ``absolute`` gives M."""

    def f64(t: Tensor) -> Tensor:
        return t.double().abs() if absolute else t.double()

    out = []
    for sigma, stream in zip(p["sigmas"], p["streams"].tolist(), strict=True):
        E = weight_noise(torch.tensor(p["seed"]), p["layer_id"], torch.tensor([stream]), 4, 24)[0]
        sampled = f64(p["A"]) + f64(sigma) * p["inv_d"][:, None] * f64(E)
        scaling = abs(p["scaling"]) if absolute else p["scaling"]
        out.append(f64(p["weight"]) + scaling * f64(p["B"]) @ sampled)
    return torch.stack(out)


def bound(p: Problem) -> Tensor:
    dtype = p["weight"].dtype
    total = (4 + 8) * torch.finfo(compute_dtype(dtype)).eps * definition(p, absolute=True)
    if dtype.itemsize == 2:
        total += torch.finfo(dtype).eps / 2 * (definition(p).abs() + total)
    return total


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
def test_merged_weights_are_the_definition(dtype: torch.dtype, turned: bool) -> None:
    """In every dtype, rounded once; each weight is laid out as W."""
    p = merging(dtype, turned)
    merged = bayes_lora_merge(**p)
    assert merged.dtype == dtype
    assert merged[0].is_contiguous() is not turned and merged[0].stride() == p["weight"].stride()
    within(merged.double() - definition(p), bound(p))


def test_a_product_with_merged_weights_is_the_update_added() -> None:
    """x W_s^T is what bayes_lora_linear adds up from the same arguments."""
    p, x = merging(), torch.randn(6, 5, 24, dtype=torch.float64)
    weight = p.pop("weight")
    added = bayes_lora_linear(x, x @ weight.mT, **p)
    product = x @ bayes_lora_merge(weight, **p).mT
    assert float((product - added).abs().max()) <= 1e-12 * float(added.abs().max())


def test_sigma_zero_is_the_merged_adapter() -> None:
    """Also where the noise of a direction is not a number."""
    p = merging(torch.float32) | {"sigmas": torch.zeros(6)}
    expected = torch.addmm(p["weight"], p["B"], p["A"], alpha=p["scaling"])
    assert all(W.equal(expected) for W in bayes_lora_merge(**p))


def test_out_and_kept_noise_change_no_bit() -> None:
    """A poisoned ``out`` is filled and returned; a pool is the noise that would be made."""
    p = merging(torch.float32)
    expected = bayes_lora_merge(**p)
    out = torch.full_like(expected, float("nan"))
    assert bayes_lora_merge(**p, out=out) is out
    assert out.equal(expected)
    index = indexed([4, 0, 2**32 - 1], STREAMS)
    pool = gaussian_noise(p["seed"], p["layer_id"], index["streams"], 4, 24)
    assert bayes_lora_merge(**p | index, pool=pool).equal(expected)


def test_draws_equal_single_runs_to_the_bit() -> None:
    p = merging(torch.float32)
    together = bayes_lora_merge(**p)
    for s in range(len(SIGMAS)):
        one = p | {k: p[k][s : s + 1] for k in ("sigmas", "streams")}
        assert bayes_lora_merge(**one).equal(together[s : s + 1])


@pytest.mark.parametrize("turned", [False, True])
def test_opcheck(turned: bool) -> None:
    p = merging(torch.float32, turned)
    index = indexed([4, 0, 2**32 - 1], STREAMS)
    tensors = [p[k] for k in ("weight", "A", "B", "inv_d", "sigmas")]
    args = (*tensors, *index.values(), 1, torch.tensor(3), 1, 0.5, None, "reference")
    torch.library.opcheck(torch.ops.tfb.bayes_lora_merge.default, args)


def test_compile() -> None:
    p = merging(torch.float32) | {"streams": list(STREAMS)}
    compiled_once(lambda seed: bayes_lora_merge(**{**p, "seed": seed}).relu())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"weight": torch.ones(19, 24)}, r"weight: expected \[20, 24\], with A and B, got \[19"),
        ({"weight": torch.ones(20, 24).int()}, "weight: torch.int32 is not a supported"),
        ({"out": torch.ones(5, 20, 24)}, r"out: expected \[6, 20, 24\], got \[5, 20, 24\]"),
        ({"out": torch.ones(6, 20, 24)}, "out: expected torch.float64, the dtype of weight"),
        ({"layer_id": -1}, "layer_id=-1: expected an unsigned 32-bit number"),
        ({"A": torch.ones(24)}, r"A: expected \[r, n\], got \[24\]"),
        ({"streams": [0, 1, 2]}, r"streams: expected \[6\], one for each of sigmas, got \[3\]"),
        ({"pool": torch.ones(6, 4, 24)}, "pool: needs stream_index"),
        ({"impl": "cuda"}, "impl='cuda': expected one of auto, triton, reference"),
    ],
)
def test_bad_argument(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bayes_lora_merge(**{**merging(), **bad})
