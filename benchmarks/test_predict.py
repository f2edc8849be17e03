"""``bayes.predict`` with 10 antithetic draws against loops of 10 PEFT forwards, on real models.

    naive      A' + sigma / d o E written into lora_A, forward, restore        (fresh noise)
    flipout    forward hooks with fresh signs for every token                  (fresh noise)
    mean       one plain pass of the adapter: the unit of "cost in passes"
    noise      generating all layers' noise once, which predict does for new draws and then keeps

On a CPU predict keeps the noise of fixed draws from call to call, as a scoring run does; its first
call costs "noise" more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import Bench, Row, compare, target
from benchmarks.models import CASES, Case, flipout_loop, forward, naive_loop
from tfb.draws import Draws
from tfb.linear import LowRankSampler

DRAWS, SIGMA = 10, 0.01


def check(case: Case) -> None:
    """The contenders compute what we compute: passes without noise give our mean, and the naive
    loop's average over 40 draws is within eight of our standard errors (six of the difference's).

    Flipout's noise is no weight sample, so its averages differ; ``baselines.check`` has its
    marginals.
    """
    exact = case.bayes.predict(case.batch, Draws.mean(), label_ids=case.label_ids).probs
    plain = [forward(case, case.bayes.model), forward(case, case.twin)]
    plain += [loop(case, 1, 0.0)[0] for loop in (naive_loop, flipout_loop)]
    assert max(float((p - exact).abs().max()) for p in plain) <= 1e-4
    few = case.small(4)
    ours = few.bayes.predict(few.batch, Draws.iid(40, SIGMA), label_ids=few.label_ids)
    naive = naive_loop(few, 40, SIGMA)[0]
    assert float(((naive - ours.probs).abs() / (ours.standard_error + 1e-6)).max()) <= 8


def judge(row: Row) -> list[Row]:
    """Sampling must beat the loops that it replaces."""
    ratios = row["ratios"]
    best = min(("naive", "flipout"), key=lambda k: ratios[k]["median"])
    return [target(f"{best} / ours", ratios[best]["median"], 1.0, at_least=True)]


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

    def predict(i: int) -> Any:
        return bayes.predict(case.batch, draws, label_ids=case.label_ids)

    compare(
        benchmark, bench, "predict", "predict", case.description(DRAWS),
        {
            "ours": predict,
            "naive": lambda i: naive_loop(case, DRAWS, SIGMA),
            "flipout": lambda i: flipout_loop(case, DRAWS, SIGMA),
            "mean": lambda i: forward(case, bayes.model),
            "noise": noise,
        },
        unit="mean", parts=("noise",), judge=judge, rounds=(15, 30),
    )  # fmt: skip
