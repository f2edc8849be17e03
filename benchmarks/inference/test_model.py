"""Whole-model sampling at Llama-3.1-8B's shape on a GPU, random weights, r = 16 on every linear.

50 prompts of 300 tokens, no prefix in common. Each way is a row of its own, kept as soon as its
three rounds are done, with the most memory in use. The longest kernels of each come last, since a
profiler slows what is timed after it. Without a GPU, and with --toy, the same code runs at toy
sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from torch import Tensor

import tfb
from benchmarks.fixtures import GPU, TOY, Case, Shape, copy_of, description, random_case
from benchmarks.inference.baselines import forward, naive_loop
from benchmarks.timing import Bench, Row, Step, compare, profile, target
from tfb.draws import Draws

SIGMA, DRAWS, MANY = 0.01, 10, 100
ADAPTER = "r16-all"
# A pass that S draws may cost: of the un-adapted base (full), of the deterministic adapter.
FULL, TAIL, LAST, LAST_MANY = 10.3, 1.15, 1.02, 1.1


@dataclass(frozen=True, eq=False)
class Models:
    """Noise in all layers, in the head alone, and the model without an adapter, on one batch."""

    shape: Shape
    case: Case
    last: tfb.BayesianModel
    unadapted: Any

    def ours(self, which: tfb.BayesianModel, draws: int, **mode: Any) -> Step:
        return self.case.sampling(which, Draws.antithetic(draws, SIGMA), **mode)

    def mean(self, i: int) -> Tensor:
        return forward(self.case, self.case.bayes.model)

    def base(self, i: int) -> Tensor:
        return forward(self.case, self.unadapted)


@pytest.fixture(scope="module")
def models(bench: Bench) -> Models:
    if bench.device.type != "cuda" and not bench.toy:
        pytest.skip("8B parameters: on a GPU")
    shape = TOY if bench.toy else GPU
    case, source = random_case(shape, ADAPTER, bench)
    last = tfb.bayesianize(copy_of(source), layers=tfb.last_layers(0))
    # Unloaded, since ``disable_adapter`` itself would be part of a pass.
    return Models(shape, case, last, source.unload())


def full(m: Models) -> dict[str, Step]:
    return {
        "ours": m.ours(m.case.bayes, DRAWS, mode="full"),
        "naive": lambda i: naive_loop(m.case, DRAWS, SIGMA),
    }


def tail(m: Models) -> dict[str, Step]:
    return {"ours": m.ours(m.case.bayes, DRAWS, mode="tail", tail=1)}


def last(m: Models) -> dict[str, Step]:
    return {"ours": m.ours(m.last, DRAWS), f"last_{MANY}": m.ours(m.last, MANY)}


WAYS: dict[str, Callable[[Models], dict[str, Step]]] = {"full": full, "tail": tail, "last": last}


def judge(way: str, row: Row) -> list[Row]:
    units = {k: r["median"] for k, r in row["in_units_of"]["ratios"].items()}
    if way == "full":
        value = units["ours"] / units["base"]
        found = [target("full S=10, in un-adapted passes", value, FULL, at_least=False)]
        if "naive" in row["ratios"]:
            value = row["ratios"]["naive"]["median"]
            found.append(target("naive loop / full S=10", value, 1.0, at_least=True))
        return found
    if way == "tail":
        return [target("tail S=10, in passes", units["ours"], TAIL, at_least=False)]
    return [
        target("last layer S=10, in passes", units["ours"], LAST, at_least=False),
        target("last layer S=100, in passes", units[f"last_{MANY}"], LAST_MANY, at_least=False),
    ]


def point_of(models: Models, way: str, bench: Bench) -> dict[str, Any]:
    return description(models.shape, ADAPTER, bench) | {"way": way, "draws": DRAWS}


@pytest.mark.parametrize("way", WAYS)
def test_model(benchmark: Any, bench: Bench, models: Models, way: str) -> None:
    steps = WAYS[way](models) | {"mean": models.mean, "base": models.base}
    point, parts = point_of(models, way, bench), ("base", f"last_{MANY}")
    how: dict[str, Any] = {"unit": "mean", "judge": partial(judge, way), "rounds": (3, 3)}
    compare(benchmark, bench, "model", "predict", point, steps, parts=parts, **how)


@pytest.mark.parametrize("way", WAYS)
def test_kernels(benchmark: Any, bench: Bench, models: Models, way: str) -> None:
    """Last in this file, and the file last in its process."""
    benchmark.pedantic(lambda: None)
    profile(bench, "model", point_of(models, way, bench), WAYS[way](models)["ours"])
