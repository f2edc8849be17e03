"""Arguments of the operators, and what their tests ask of results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

Problem = dict[str, Any]
SIGMAS = (0.5, -0.5, 0.02, -2.0, 0.0, 0.5)
STREAMS = (4, 4, 2**32 - 1, 0, 4, 0)
LOW = (torch.float32, torch.bfloat16, torch.float16)


def problem(
    *,
    shared: bool,
    T: int = 5,
    n: int = 24,
    m: int = 20,
    r: int = 4,
    sigmas: tuple[float, ...] = SIGMAS,
    streams: tuple[int, ...] = STREAMS,
    dtype: torch.dtype = torch.float64,
    factors: torch.dtype | None = None,
    seed: int = -7,
) -> Problem:
    """Arguments of bayes_lora_linear; numbers near 1, so that noise, mean and base all count."""
    g = torch.Generator().manual_seed(T * 1000 + n * 100 + m * 10 + r)
    lead = (T,) if shared else (len(sigmas), T)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    factors = factors or dtype
    return {
        "x": randn(*lead, n).to(dtype),
        "base": randn(*lead, m).to(dtype),
        "A": (randn(r, n) / n**0.5).to(factors),
        "B": randn(m, r).to(factors),
        "inv_d": torch.linspace(0.2, 1.0, r, dtype=torch.float64),
        "sigmas": torch.tensor(sigmas, dtype=torch.float64),
        "streams": torch.tensor(streams),
        "seed": seed,
        "layer_id": 2**32 - 5,
        "scaling": -1.75,
    }


def indexed(order: list[int], streams: tuple[int, ...]) -> Problem:
    """The streams once each, in ``order``, and each draw's index into them."""
    return {
        "streams": torch.tensor(order),
        "stream_index": torch.tensor([order.index(q) for q in streams]),
    }


def within(error: Tensor, limit: Tensor) -> None:
    assert error.shape == limit.shape
    assert bool((error.abs() <= limit).all()), f"{float((error.abs() / limit).max())} x the bound"


def compiled_once(function: Callable[[Tensor], Tensor]) -> None:
    """fullgraph, the eager bits, and a new seed that gives new noise from the same graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    results = [compiled(torch.tensor(seed)) for seed in (1, 2, -1)]
    for seed, result in zip((1, 2, -1), results, strict=True):
        assert torch.equal(result, function(torch.tensor(seed)))
    assert not torch.equal(results[0], results[1])
    assert counter.frame_count == 1
    torch._dynamo.reset()
