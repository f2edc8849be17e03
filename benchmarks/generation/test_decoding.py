"""What S draws cost while text is written, in plain generations, and where the time goes.

A random Llama of 8 layers on a CPU. Ours draws 10 times: with noise at all tokens, at the prompt's
last one and the new ones ("tail"), and in the last layer ("last"). The naive contender is ten plain
generations with materialised noise, which average nothing. Operators are timed last: a profiler
stays attached to its process.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import tfb
from benchmarks.fixtures import CPU, TOY, Shape, copy_of, description, random_case
from benchmarks.inference.baselines import naive_draws
from benchmarks.timing import Bench, Step, compare, profile
from tfb.draws import Draws

SUITE, ADAPTER, SIGMA = "decoding", "r8-q,v,head", 0.01
PROMPT, NEW_TOKENS = 32, (16, 64, 128)
ROUNDS = (5, 7)  # of up to a minute


def shape_of(bench: Bench) -> Shape:
    if bench.device.type != "cpu":
        pytest.skip("a small model: on a CPU")
    return TOY if bench.toy else replace(CPU, tokens=PROMPT)


def steps(shape: Shape, new_tokens: int, bench: Bench) -> dict[str, Step]:
    """Return the contenders; a plain generation, "mean", is the unit."""
    case, source = random_case(shape, ADAPTER, bench)
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
    }
    draws, adapted = Draws.antithetic(10, SIGMA), case.bayes.model
    tail = tfb.bayesianize(copy_of(source)).configure(mode="tail", tail=1)
    last = tfb.bayesianize(copy_of(source), layers=tfb.last_layers(0))

    def plain(model: Any) -> Any:
        return model.generate(**case.batch, **options)

    return {
        "ours": lambda i: case.bayes.generate(case.batch, draws, **options),
        "mean": lambda i: plain(adapted),
        "tail": lambda i: tail.generate(case.batch, draws, **options),
        "last": lambda i: last.generate(case.batch, draws, **options),
        "naive": lambda i: list(naive_draws(case, 10, SIGMA, lambda _, model: plain(model))),
    }


def point_of(shape: Shape, new_tokens: int, bench: Bench) -> dict[str, Any]:
    return description(shape, ADAPTER, bench) | {"new_tokens": new_tokens, "draws": 10}


@pytest.mark.parametrize("new_tokens", NEW_TOKENS)
def test_decoding(benchmark: Any, bench: Bench, new_tokens: int) -> None:
    shape = shape_of(bench)
    point, made = point_of(shape, new_tokens, bench), steps(shape, new_tokens, bench)
    how: dict[str, Any] = {"unit": "mean", "parts": ("tail", "last"), "rounds": ROUNDS}
    compare(benchmark, bench, SUITE, "decode", point, made, **how)


@pytest.mark.parametrize("step", ["ours", "mean"])
def test_operators(benchmark: Any, bench: Bench, step: str) -> None:
    benchmark.pedantic(lambda: None)
    shape, new_tokens = shape_of(bench), NEW_TOKENS[1]
    point = point_of(shape, new_tokens, bench) | {"step": step}
    profile(bench, SUITE, point, steps(shape, new_tokens, bench)[step])
