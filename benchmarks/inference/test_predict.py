"""``bayes.predict`` with 10 antithetic draws against loops of 10 PEFT forwards, on real models.

Ours and both loops have the fastest of several batch sizes, rows sorted by length, and ours of
several draws a pass; a few calls of each way decide before the rounds, and the row says which. The
loops' noise is fresh. On a CPU predict keeps the noise of fixed draws from call to call, as a
scoring run does; its first call costs "noise" more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from typing import Any

import pytest
import torch

from benchmarks.fixtures import CASES, Case
from benchmarks.inference.baselines import flipout_loop, forward, in_parts, naive_loop
from benchmarks.timing import Bench, Row, Step, compare, elapsed, target
from tfb.draws import Draws
from tfb.linear import LowRankSampler
from tfb.predictive import Predictive

DRAWS, SIGMA = 10, 0.01
BATCHES, TOY_BATCHES = (1, 2, 5, 10), (1, 2)  # into which the rows may be cut
PER_PASS, TOY_PER_PASS = (None, 1, 2, DRAWS), (None, 1)  # draws; None: what predict chooses
CALLS = 3  # of each way, to choose one
TARGETS = {"MiniLM q,v": 1.03, "MiniLM q,k,v,dense": 1.08, "stories260K": 1.05}  # naive / ours


@dataclass(frozen=True)
class Way:
    """At most ``rows`` in a batch, and ours' draws a pass (see ``PER_PASS``)."""

    rows: int
    draws_per_pass: int | None = None


def check(case: Case) -> None:
    """Check that the contenders compute what we compute.

    Passes without noise give our mean, batches what one batch gives, and the naive loop's average
    over 40 draws is within eight of our standard errors (six of the difference's), where it is
    above a tenth of a guess: smaller ones are the averages of a few large draws, which 40 need not
    hold. Flipout's noise is no weight sample, so its averages differ; without noise it is checked.
    """
    exact = case.bayes.predict(case.batch, Draws.mean(), label_ids=case.label_ids).probs
    plain = [forward(case, case.bayes.model), forward(case, case.twin)]
    plain += [loop(case, 1, 0.0)[0] for loop in (naive_loop, flipout_loop)]
    assert max(float((p - exact).abs().max()) for p in plain) <= 1e-4
    parts = case.parts(ceil(len(exact) / 5))
    assert float((in_parts(parts)(case, case.twin) - exact[case.by_length]).abs().max()) <= 1e-4
    draws = Draws.antithetic(4, SIGMA)
    whole = case.bayes.predict(case.batch, draws, label_ids=case.label_ids).probs
    split = torch.cat([p.probs for p in _predict(parts, draws, 1, 0)])
    assert float((split - whole[case.by_length]).abs().max()) <= 1e-4
    few = case.small(4)
    ours = few.bayes.predict(few.batch, Draws.iid(40, SIGMA), label_ids=few.label_ids)
    naive = naive_loop(few, 40, SIGMA)[0]
    off = (naive - ours.probs).abs() / (ours.standard_error + 1e-6)
    assert float(off[ours.probs > 0.1 / off.shape[-1]].max()) <= 8


def ways(case: Case, draws: Draws, toy: bool) -> dict[str, dict[Way, Step]]:
    """Return, by contender, each way that it may take."""
    found: dict[str, dict[Way, Step]] = {"ours": {}, "naive": {}, "flipout": {}}
    rows = len(case.batch["input_ids"])
    for batches in TOY_BATCHES if toy else BATCHES:
        size = ceil(rows / batches)
        parts = case.parts(size)
        for each in TOY_PER_PASS if toy else PER_PASS:
            found["ours"][Way(size, each)] = partial(_predict, parts, draws, each)
        found["naive"][Way(size)] = partial(_loop, naive_loop, case, parts)
        found["flipout"][Way(size)] = partial(_loop, flipout_loop, case, parts)
    return found


def _loop(loop: Callable[..., Any], case: Case, parts: list[Case], i: int) -> Any:
    return loop(case, DRAWS, SIGMA, in_parts(parts))


def _predict(
    parts: list[Case], draws: Draws, draws_per_pass: int | None, i: int
) -> list[Predictive]:
    return [
        part.bayes.predict(
            part.batch, draws, label_ids=part.label_ids, draws_per_pass=draws_per_pass
        )
        for part in parts
    ]


def fastest(steps: Mapping[Way, Step], calls: int, device: torch.device) -> Way:
    """Return the way of the shortest of several calls; all ways take turns."""
    seconds = dict.fromkeys(steps, float("inf"))
    for _ in range(calls):
        for way, step in steps.items():
            seconds[way] = min(seconds[way], elapsed(partial(step, 0), device))
    return min(seconds, key=lambda way: seconds[way])


def judge(name: str, row: Row) -> list[Row]:
    """Judge sampling by the loop that it replaces."""
    ratio = row["ratios"]["naive"]["median"]
    return [target("naive / ours", ratio, TARGETS[name], at_least=True)]


@pytest.mark.parametrize("name", CASES)
def test_predict(benchmark: Any, bench: Bench, shared: Any, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name](shared, bench.device)
    check(case)
    case = case.small(8) if bench.toy else case
    bayes, draws = case.bayes, Draws.antithetic(DRAWS, SIGMA)
    posteriors = list(bayes.posteriors.values())

    def noise(i: int) -> None:
        # Samplers of their own: those of the model keep their noise.
        for p in posteriors:
            LowRankSampler(p).pool(draws, bench.device)

    possible = ways(case, draws, bench.toy)
    calls = 1 if bench.toy else CALLS
    chosen = {k: fastest(steps, calls, bench.device) for k, steps in possible.items()}
    compare(
        benchmark,
        bench,
        "predict",
        "predict",
        case.description(DRAWS),
        {
            **{k: possible[k][way] for k, way in chosen.items()},
            "ours_default": case.sampling(bayes, draws),  # all rows in one batch
            "mean": lambda i: forward(case, bayes.model),
            "noise": noise,  # which predict generates for new draws and then keeps
        },
        unit="mean",
        parts=("ours_default", "noise"),
        judge=partial(judge, case.name),
        rounds=(15, 30),
        details={"chosen": {k: asdict(way) for k, way in chosen.items()}},
    )
