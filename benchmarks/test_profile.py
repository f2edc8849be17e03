"""Time in each kernel of one layer, at the points of ``test_linear.py``, by torch.profiler.

In a file of its own, to be run last: the profiler stays attached to the process and slows what is
launched after it.
"""

from __future__ import annotations

from typing import Any

from benchmarks import baselines, test_linear
from benchmarks.harness import Bench, profile
from benchmarks.test_linear import Point, operands, pytest_generate_tests, sizes

__all__ = ["pytest_generate_tests"]  # pytest's hook: all points


def test_kernels(benchmark: Any, bench: Bench, point: Point) -> None:
    bench = bench.for_kernels()
    benchmark.pedantic(lambda: None)
    test_linear.refuse(bench, point, "kernels", {})
    nbytes = sizes(bench, point)
    copies = bench.copies(nbytes.weight + nbytes.x)
    case = operands(bench, point, copies, copies)
    step = case.step(baselines.ours)
    profile(bench, "linear", case.description, step, copies=copies, graphs=True)
