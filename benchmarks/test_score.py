"""Whole ``tfb score`` jobs with 10 antithetic draws against the scripts that they replace.

    ours        the job in full mode       tail         the job in tail mode, k = 1
    plain       the script of ``benchmarks.scripts``, batches in the order of the file
    sorted      the same, sorted by length first: the strongest script
    engine      ``predict`` on the batches of the job in full mode: the unit
    tail_engine the same in tail mode

Models are loaded beforehand; everything else of a job or script is timed, from the file of rows to
the file of results. A script's number of rows in a batch is the fastest of ``SIZES``, each script's
own. Tail mode is another predictive than the scripts': targets compare it with their 10 full passes.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import offline
from benchmarks.harness import (
    Bench,
    Row,
    compare,
    target,
)
from benchmarks.models import stories
from benchmarks.offline import Task, run_engine, run_job
from benchmarks.scripts import best_batch_size, run_script
from tfb.draws import Draws
from tfb.linear import LowRankSampler
from tfb.scoring import load_tokenizer
from tfb_kernels.testing import error_budget

DRAWS, SIGMA, TAIL = 10, 0.01, 1
ROWS = {"clinc-domain": 400, "skewed": 300}
SIZES = (8, 16, 32, 64, 128)
TOY_ROWS = 24
SETTINGS = Draws.antithetic(DRAWS, SIGMA)


@pytest.fixture(scope="module")
def stories_task(bench: Bench, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """stories260K with the clinc-domain adapter; no rows yet."""
    if bench.device.type != "cpu":
        pytest.skip("a small model: on a CPU")
    case = stories(shared, bench.device)
    model, adapter = shared / "models/stories260K", shared / "adapters/stories260K-clinc-domain"
    case.bayes.sigma, case.bayes.source = SIGMA, adapter
    folder = tmp_path_factory.mktemp("score")
    artifact = case.bayes.save(folder / "artifact")
    tokenizer = load_tokenizer(str(model))
    return Task(str(model), case.bayes, case.twin, tokenizer, artifact, folder / "none.jsonl")


def with_rows(task: Task, shared: Path, name: str, count: int) -> Task:
    source = shared / "data/clinc-domain/test.jsonl"
    if name == "skewed":
        rows = offline.skewed_rows(source, count, task.tokenizer)
    else:
        rows = offline.shuffled_rows(source, count)
    return replace(
        task, rows=offline.write_rows(task.rows.with_name(f"{name}-{count}.jsonl"), rows)
    )


def check(task: Task, folder: Path) -> None:
    """With the same noise a job and both scripts give the same probabilities: each within the
    budget of float32, told by the plain script against itself in float64."""
    pools = {
        n: LowRankSampler(p).pool(SETTINGS, task.bayes.device)
        for n, p in task.bayes.posteriors.items()
    }
    index = SETTINGS.tensors().stream_index.tolist()

    def noise(name: str, draw: int) -> torch.Tensor:
        return pools[name][index[draw]]

    def script(which: Task, name: str, size: int, by_length: bool) -> torch.Tensor:
        path = folder / f"{name}.parquet"
        run_script(which, size, SETTINGS, by_length=by_length, noise=noise, output=path)
        return offline.read_probs([path])

    exact = script(replace(task, twin=deepcopy(task.twin).double()), "exact", 16, False)
    plain = script(task, "plain", 16, False)
    with offline.preloaded(task):
        job = task.job(folder / "job", draws=DRAWS)
        offline.finish(job)
    parts = sorted((folder / "job").glob("part-*.parquet"))
    budget = error_budget(exact, plain)
    for name, found in (
        ("the job", offline.read_probs(parts)), ("sorted", script(task, "sorted", 8, True)),
    ):  # fmt: skip
        error = float((found - exact).abs().max())
        assert error <= budget, f"{name}: error {error:.3g} over the budget of {budget:.3g}"


def judge(row: Row) -> list[Row]:
    """Speed against the plain script, and what a job costs beside its engine."""
    units = {k: r["median"] for k, r in row["in_units_of"]["ratios"].items()}
    found = [
        target("plain script / tail job", units["plain"] / units["tail"], 12, at_least=True),
        target("full job / engine", units["ours"], 1.05, at_least=False),
        target("tail job / engine", units["tail"] / units["tail_engine"], 1.05, at_least=False),
    ]
    if row["point"]["data"] == "skewed":
        ratio = row["ratios"]["plain"]["median"]
        found.insert(0, target("plain script / full job", ratio, 2, at_least=True))
    return found


@pytest.mark.parametrize("data", ROWS)
def test_score(
    benchmark: Any, bench: Bench, stories_task: Task, shared: Path, tmp_path: Path, data: str
) -> None:
    torch.manual_seed(0)
    check(with_rows(stories_task, shared, data, TOY_ROWS), tmp_path)
    task = with_rows(stories_task, shared, data, TOY_ROWS if bench.toy else ROWS[data])
    made = offline.engine_batches(task)
    best = partial(best_batch_size, task, (8, 16) if bench.toy else SIZES)
    sizes = {"plain": best(by_length=False), "sorted": best(by_length=True)}
    lengths = np.array(task.lengths())
    point = {
        "model": "stories260K", "data": data, "rows": len(lengths), "draws": DRAWS,
        "tokens": int(lengths.sum()), "longest": int(lengths.max()),
        "batch_tokens": offline.Job.batch_tokens,
    }  # fmt: skip
    with offline.preloaded(task):
        compare(
            benchmark, bench, "score", "throughput", point,
            {
                "ours": lambda i: run_job(task, draws=DRAWS),
                "plain": lambda i: run_script(task, sizes["plain"], SETTINGS, by_length=False),
                "sorted": lambda i: run_script(task, sizes["sorted"], SETTINGS, by_length=True),
                "engine": lambda i: run_engine(task, made, DRAWS),
                "tail": lambda i: run_job(task, draws=DRAWS, tail=TAIL),
                "tail_engine": lambda i: run_engine(task, made, DRAWS, TAIL),
            },
            unit="engine", parts=("tail", "tail_engine"), judge=judge, rounds=(7, 20),
            details={"script_batch_rows": sizes, "model_loading": "not timed"},
        )  # fmt: skip
