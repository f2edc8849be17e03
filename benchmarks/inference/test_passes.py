"""What S draws cost in passes on a CPU; 8B parameters on a GPU: ``test_model.py``.

A random Llama of 8 layers, and MiniLM, which has neither tails nor an adapted head. "ours" is full
mode with 10 draws; in rows of cheaper ways ("ways") it is the tail. On the Llama ten full draws
take seconds, and a round has five contenders that do: they have a row of their own, of the adapter
on all linears alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tfb
from benchmarks.fixtures import ADAPTERS, CASES, CPU, TOY, Shape, copy_of, description, random_case
from benchmarks.inference.baselines import flipout_loop, forward, naive_loop
from benchmarks.timing import Bench, Row, Step, compare, target
from tfb.draws import Draws

SIGMA = 0.01
ROUNDS = (15, 20)


def full(shape: Shape, adapter: str, bench: Bench) -> dict[str, Step]:
    """Return full mode, single passes (the unit is "mean") and the loops."""
    case, source = random_case(shape, adapter, bench)
    unadapted = source.unload()  # ``disable_adapter`` itself would be part of a pass
    return {
        "ours": case.sampling(case.bayes, Draws.antithetic(10, SIGMA), mode="full"),
        "mean": lambda i: forward(case, case.bayes.model),
        "base": lambda i: forward(case, unadapted),
        "naive": lambda i: naive_loop(case, 10, SIGMA),
        "flipout": lambda i: flipout_loop(case, 10, SIGMA),
    }


def ways(shape: Shape, adapter: str, bench: Bench) -> dict[str, Step]:
    """Return what costs less than full mode: noise in fewer layers, or at fewer positions.

    The models share the base's weights.
    """
    case, source = random_case(shape, adapter, bench)
    bayes, layers = case.bayes, tfb.last_layers(max(1, shape.layers // 4))
    quarter = tfb.bayesianize(copy_of(source), layers=layers)
    last = tfb.bayesianize(copy_of(source), layers=tfb.last_layers(0))

    def ours(which: Any, draws: int, **mode: Any) -> Step:
        return case.sampling(which, Draws.antithetic(draws, SIGMA), **mode)

    return {
        "ours": ours(bayes, 10, mode="tail", tail=1),
        "mean": lambda i: forward(case, bayes.model),
        "quarter_10": ours(quarter, 10),
        "last_10": ours(last, 10),
        "last_100": ours(last, 100),
        "tail_32": ours(bayes, 32, mode="tail", tail=1),
    }


def judge_full(row: Row) -> list[Row]:
    """Judge ten draws in passes of the un-adapted base, and by the loops that they replace."""
    units = {k: r["median"] for k, r in row["in_units_of"]["ratios"].items()}
    full = units["ours"]
    return [
        target("full S=10 of the un-adapted base", full / units["base"], 10.3, at_least=False),
        target("naive loop / full S=10", units["naive"] / full, 1.1, at_least=True),
        target("Flipout loop / full S=10", units["flipout"] / full, 1.4, at_least=True),
    ]


def judge_ways(row: Row) -> list[Row]:
    """Judge passes of the deterministic adapter."""
    units = {k: r["median"] for k, r in row["in_units_of"]["ratios"].items()}
    return [
        target("tail S=10", units["ours"], 1.15, at_least=False),
        target("last layer S=10", units["last_10"], 1.1, at_least=False),
        target("last layer S=100", units["last_100"], 1.3, at_least=False),
        target("last quarter S=10", units["quarter_10"], 3.4, at_least=False),
    ]


def shape_of(bench: Bench) -> Shape:
    if bench.device.type != "cpu":
        pytest.skip("a small model: on a CPU")
    return TOY if bench.toy else CPU


def test_full(benchmark: Any, bench: Bench) -> None:
    shape, adapter = shape_of(bench), "r16-all"
    point, steps = description(shape, adapter, bench), full(shape, adapter, bench)
    how: dict[str, Any] = {"unit": "mean", "judge": judge_full, "rounds": ROUNDS}
    compare(benchmark, bench, "passes", "predict", point, steps, parts=("base",), **how)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_ways(benchmark: Any, bench: Bench, adapter: str) -> None:
    shape = shape_of(bench)
    point, steps = description(shape, adapter, bench), ways(shape, adapter, bench)
    how: dict[str, Any] = {"unit": "mean", "judge": judge_ways, "rounds": ROUNDS}
    compare(benchmark, bench, "passes", "ways", point, steps, parts=tuple(steps), **how)


def test_passes_of_an_encoder(benchmark: Any, bench: Bench, shared: Path) -> None:
    """MiniLM on clinc150: full mode, and noise in the last quarter of the blocks."""
    case = CASES["minilm-qv"](shared, bench.device)
    layers = tfb.last_layers(max(1, case.bayes.base.config.num_hidden_layers // 4))
    quarter = tfb.bayesianize(
        CASES["minilm-qv"](shared, bench.device).bayes.remove(), layers=layers
    )
    if bench.toy:
        case = case.small(4)

    def ours(which: Any, draws: int) -> Step:
        return case.sampling(which, Draws.antithetic(draws, SIGMA))

    made: dict[str, Step] = {
        "ours": ours(case.bayes, 10),
        "mean": lambda i: forward(case, case.bayes.model),
        "naive": lambda i: naive_loop(case, 10, SIGMA),
        "flipout": lambda i: flipout_loop(case, 10, SIGMA),
        "full_2": ours(case.bayes, 2),
        "full_4": ours(case.bayes, 4),
        "quarter_10": ours(quarter, 10),
    }
    point, parts = case.description(10) | {"adapter": "r8-q,v"}, ("full_2", "full_4", "quarter_10")
    how: dict[str, Any] = {"unit": "mean", "rounds": ROUNDS}
    compare(benchmark, bench, "passes", "predict", point, made, parts=parts, **how)
