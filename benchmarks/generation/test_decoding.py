"""What S draws cost while text is written, in plain generations, and where the time goes.

A random Llama: of 8 layers on a CPU, of Llama-3.1-8B's shape on a GPU. Ours draws 10 times: with
noise at all tokens, at the prompt's last one and the new ones ("tail"), and in the last layer
("last"). The naive contender is ten plain generations with materialised noise, which average
nothing. On a GPU transformers compiles ours, the plain generation and the naive ones into CUDA
graphs, in a row of their own. Operators are timed last: a profiler stays attached to its process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from torch._dynamo.utils import counters
from transformers import CompileConfig

import tfb
from benchmarks.fixtures import CPU, GPU, TOY, Case, Shape, copy_of, description, random_case
from benchmarks.inference.baselines import naive_draws
from benchmarks.timing import Bench, Row, Step, compare, profile, target
from tfb.draws import Draws

SUITE, ADAPTER, SIGMA, DRAWS = "decoding", "r8-q,v,head", 0.01, 10
PROMPT, ROWS, NEW_TOKENS = 32, 8, (16, 64, 128)
ROUNDS = (5, 7)  # of up to a minute on a CPU
STEPS = 1.6  # plain generations that ten draws may take on a GPU
# What turns CUDA graphs on in transformers: a cache that stays where it is, and its compilation,
# which it leaves out on a CPU. Else a second model of the class would be compiled for all sizes.
GRAPHS: dict[str, Any] = {
    "cache_implementation": "static",
    "disable_compile": False,
    "compile_config": CompileConfig(dynamic=False),
}


@dataclass(frozen=True, eq=False)
class Writers:
    """Noise in all layers, at a tail and in the last layer, on one batch; ``graphs``: as above."""

    shape: Shape
    case: Case
    tail: tfb.BayesianModel
    last: tfb.BayesianModel
    graphs: bool

    def steps(self, new_tokens: int, *, graphs: bool) -> dict[str, Step]:
        """Return the contenders; a plain generation, "mean", is the unit."""
        case, draws = self.case, Draws.antithetic(DRAWS, SIGMA)
        options: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "min_new_tokens": new_tokens,
            "do_sample": False,
            **(GRAPHS if graphs else {}),
        }

        def plain(case: Case, model: Any) -> Any:
            return model.generate(**case.batch, **options)

        def ours(model: tfb.BayesianModel) -> Step:
            return lambda i: model.generate(case.batch, draws, **options)

        made: dict[str, Step] = {
            "ours": ours(case.bayes),
            "mean": lambda i: plain(case, case.twin),
            "naive": lambda i: list(naive_draws(case, DRAWS, SIGMA, plain)),
        }
        return made if graphs else made | {"tail": ours(self.tail), "last": ours(self.last)}


@pytest.fixture(scope="module")
def writers(bench: Bench) -> Writers:
    on_gpu = bench.device.type == "cuda"
    shape = TOY if bench.toy else replace(GPU if on_gpu else CPU, rows=ROWS, tokens=PROMPT)
    case, source = random_case(shape, ADAPTER, bench)
    tail = tfb.bayesianize(copy_of(source)).configure(mode="tail", tail=1)
    last = tfb.bayesianize(copy_of(source), layers=tfb.last_layers(0))
    return Writers(shape, case, tail, last, graphs=on_gpu or bench.toy)


def one_length(bench: Bench) -> int:
    return NEW_TOKENS[0 if bench.toy else 1]


def point_of(writers: Writers, new_tokens: int, bench: Bench, **more: Any) -> dict[str, Any]:
    point = description(writers.shape, ADAPTER, bench)
    return point | {"new_tokens": new_tokens, "draws": DRAWS} | more


def judge(row: Row) -> list[Row]:
    value = row["in_units_of"]["ratios"]["ours"]["median"]
    return [target("full S=10, in plain generations", value, STEPS, at_least=False)]


def test_decoding_in_graphs(benchmark: Any, bench: Bench, writers: Writers) -> None:
    if not writers.graphs:
        pytest.skip("CUDA graphs: on a GPU")
    new_tokens = one_length(bench)
    point = point_of(writers, new_tokens, bench, graphs=True)
    how: dict[str, Any] = {"unit": "mean", "rounds": (3, 3), "judge": judge}
    compare(benchmark, bench, SUITE, "decode", point, writers.steps(new_tokens, graphs=True), **how)
    assert not counters["inductor"]["cudagraph_skips"], "the row is of a model without CUDA graphs"


@pytest.mark.parametrize("new_tokens", NEW_TOKENS)
def test_decoding(benchmark: Any, bench: Bench, writers: Writers, new_tokens: int) -> None:
    made = writers.steps(new_tokens, graphs=False)
    if writers.graphs and new_tokens != one_length(bench):
        pytest.skip("one length, that of the graphs")
    if bench.device.type == "cuda":
        del made["naive"]  # ten plain generations, a minute or two of rounds
    rounds = (3, 3) if writers.graphs else ROUNDS
    how: dict[str, Any] = {"unit": "mean", "parts": ("tail", "last"), "rounds": rounds}
    compare(benchmark, bench, SUITE, "decode", point_of(writers, new_tokens, bench), made, **how)


@pytest.mark.parametrize("step", ["ours", "mean"])
def test_operators(benchmark: Any, bench: Bench, writers: Writers, step: str) -> None:
    benchmark.pedantic(lambda: None)
    new_tokens = one_length(bench)
    point = point_of(writers, new_tokens, bench, step=step)
    profile(bench, SUITE, point, writers.steps(new_tokens, graphs=writers.graphs)[step])
