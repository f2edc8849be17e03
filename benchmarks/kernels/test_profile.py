"""Time in each kernel of one layer, at the points of ``test_linear.py``, by torch.profiler.

A file of its own, to be run last: the profiler stays attached to the process and slows what is
launched after it.
"""

from __future__ import annotations

from typing import Any

from benchmarks.kernels import contenders
from benchmarks.kernels.test_linear import Point, layer_operands, pytest_generate_tests, refuse
from benchmarks.timing import Bench, profile

__all__ = ["pytest_generate_tests"]  # pytest's hook: all points


def test_kernels(benchmark: Any, kernels: Bench, point: Point) -> None:
    benchmark.pedantic(lambda: None)
    refuse(kernels, point, "kernels", {})
    case = layer_operands(kernels, point)
    step = case.step(contenders.ours)
    profile(kernels, "linear", case.description, step, copies=len(case.x), graphs=True)
