"""predictive_reduction against softmax, mean and entropies in torch: time, and a GPU's memory.

Ours and "torch_all" give five results (probabilities, two entropies, each draw's argmax, standard
errors), "torch" only the first three. Logits [S, B, V] at Llama-3.1's vocabulary, S = 10.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.timing import Bench, Row, Step, compare, target
from tfb.draws import Draws
from tfb_kernels import predictive_reduction

S = 10


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    toy = metafunc.config.getoption("--toy") or not torch.cuda.is_available()
    sizes = [(2, 1000), (8, 1000)] if toy else [(1, 128256), (50, 128256)]
    metafunc.parametrize("B,V", sizes, ids=[f"B{B}-V{V}" for B, V in sizes])


def torch_three(logits: Tensor, units: Tensor) -> tuple[Tensor, ...]:
    """Compute what one writes down: [S, B, V] probabilities, their mean and two entropies."""
    p = logits.float().softmax(-1)
    probs = p.mean(0)
    entropy = torch.special.entr(p).sum(-1).mean(0)
    return probs, torch.special.entr(probs).sum(-1), entropy


def torch_all(
    logits: Tensor, units: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Add each draw's argmax and the standard error over antithetic pairs."""
    p = logits.to(dtype).softmax(-1)
    probs = p.mean(0)
    entropy = torch.special.entr(p).sum(-1).mean(0)
    error = p[units].mean(1).std(0) / len(units) ** 0.5
    return probs, torch.special.entr(probs).sum(-1), entropy, p.argmax(-1), error


def check(logits: Tensor, units: Tensor) -> None:
    """Compare ours with torch in float64: within 1e-4 (entropies in nats), the argmax equal."""
    expected = torch_all(logits, units, torch.float64)
    for mine, theirs in zip(predictive_reduction(logits, units), expected, strict=True):
        assert float((mine.double() - theirs.double()).abs().max()) <= 1e-4


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the largest allocation of a call on the GPU above what was there before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_predictive_reduction(benchmark: Any, kernels: Bench, B: int, V: int) -> None:
    device, dtype = kernels.device, kernels.dtype
    found = Draws.antithetic(S, 1.0).unit_tensor(device)
    assert found is not None
    units = found
    check(4 * torch.randn(S, 2, 300, device=device), units)
    copies = kernels.copies(S * B * V * dtype.itemsize)
    logits = [4 * torch.randn(S, B, V, dtype=dtype, device=device) for _ in range(copies)]
    calls: dict[str, Callable[[Tensor, Tensor], object]] = {
        "ours": predictive_reduction,
        "torch": torch_three,
        "torch_all": torch_all,
    }
    details: dict[str, Any] = {}
    skipped = {"compiled": "torch.compile is measured on a GPU only"}
    if device.type == "cuda":
        calls["compiled"] = torch.compile(torch_three, dynamic=False)
        details["peak_bytes"] = {
            k: peak_bytes(partial(call, logits[0], units)) for k, call in calls.items()
        }
        skipped = {}

    def step(call: Callable[[Tensor, Tensor], object]) -> Step:
        return lambda i: call(logits[i], units)

    def judge(row: Row) -> list[Row]:
        return [target("torch / ours", row["ratios"]["torch"]["median"], 1.0, at_least=True)]

    compare(
        benchmark,
        kernels,
        "predictive",
        "reduction",
        {"S": S, "B": B, "V": V, "dtype": kernels.dtype_name},
        {k: step(call) for k, call in calls.items()},
        copies=copies,
        graphs=True,
        skipped=skipped,
        details=details,
        least_bytes=S * B * V * dtype.itemsize + 8 * B * V,
        judge=judge,
    )
