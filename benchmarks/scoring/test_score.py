"""Whole ``tfb score`` jobs with 10 antithetic draws against the scripts that they replace.

Models are loaded beforehand; everything else of a job or script is timed, from the file of rows to
the file of results. A script's batch size in rows is the fastest of ``SIZES``, each script's own.
Tail mode is another predictive: its target compares it with the plain script's 10 full passes. On a
GPU: ``test_score_large.py``.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tfb
from benchmarks.environment import REPOSITORY
from benchmarks.fixtures import STORIES, stories
from benchmarks.scoring import jobs
from benchmarks.scoring.jobs import Task, run_engine, run_job
from benchmarks.scoring.scripts import best_batch_size, run_script
from benchmarks.timing import (
    Bench,
    Row,
    Step,
    compare,
    heading,
    quantiles,
    quartiles,
    record,
    target,
)
from tfb.adapters.loading import load_tokenizer
from tfb.draws import Draws
from tfb.linear import LowRankSampler
from tfb.scoring.output import Counts
from tfb.scoring.ray import import_ray
from tfb_kernels.testing import error_budget

DRAWS, SIGMA, TAIL = 10, 0.01, 1
ROWS = {"clinc-domain": 400, "skewed": 150}
SIZES = (8, 16, 32, 64, 128)
TOY_ROWS = 12
SETTINGS = Draws.antithetic(DRAWS, SIGMA)


@pytest.fixture(scope="module")
def stories_task(bench: Bench, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Save stories260K with its adapter; no rows yet."""
    if bench.device.type != "cpu":
        pytest.skip("a small model: on a CPU")
    case, model = stories(shared, bench.device), shared / STORIES
    case.bayes.configure(sigma=SIGMA)
    folder = tmp_path_factory.mktemp("score")
    artifact = tfb.save(case.bayes, folder / "artifact")
    tokenizer = load_tokenizer(str(model))
    return Task(str(model), case.bayes, case.twin, tokenizer, artifact, folder / "none.jsonl")


def with_rows(task: Task, shared: Path, name: str, count: int) -> Task:
    source = shared / "data/clinc-domain/test.jsonl"
    if name == "skewed":
        rows = jobs.skewed_rows(source, count, task.tokenizer)
    else:
        rows = jobs.shuffled_rows(source, count)
    return replace(task, rows=jobs.write_rows(task.rows.with_name(f"{name}-{count}.jsonl"), rows))


def check(task: Task, folder: Path) -> None:
    """Check that with the same noise a job and both scripts give the same probabilities.

    The budget is that of float32, told by the plain script against itself in float64.
    """
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
        return jobs.read_probs([path])

    exact = script(replace(task, twin=deepcopy(task.twin).double()), "exact", 16, False)
    plain = script(task, "plain", 16, False)
    with jobs.preloaded(task):
        jobs.finish(task.job(folder / "job", draws=DRAWS))
    job = jobs.read_probs(sorted((folder / "job").glob("part-*.parquet")))
    budget = error_budget(exact, plain)
    for name, found in (("the job", job), ("sorted", script(task, "sorted", 8, True))):
        error = float((found - exact).abs().max())
        assert error <= budget, f"{name}: error {error:.3g} over the budget of {budget:.3g}"


def judge(row: Row) -> list[Row]:
    """Judge the speed by the plain script, and what a job costs beside its engine."""
    units = {k: r["median"] for k, r in row["in_units_of"]["ratios"].items()}
    found = [
        target("plain script / tail job", units["plain"] / units["tail"], 8, at_least=True),
        target("full job / engine", units["ours"], 1.1, at_least=False),
        target("tail job / engine", units["tail"] / units["tail_engine"], 1.1, at_least=False),
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
    made, tail_made = (jobs.engine_batches(task, DRAWS, tail) for tail in (None, TAIL))
    best = partial(best_batch_size, task, (8, 16) if bench.toy else SIZES)
    sizes = {"plain": best(by_length=False), "sorted": best(by_length=True)}
    lengths = np.array(task.lengths())
    point = {
        "model": "stories260K",
        "data": data,
        "rows": len(lengths),
        "draws": DRAWS,
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "batch_tokens": jobs.Job.batch_tokens,
    }
    steps: dict[str, Step] = {
        "ours": lambda i: run_job(task, draws=DRAWS),
        "plain": lambda i: run_script(task, sizes["plain"], SETTINGS, by_length=False),
        "sorted": lambda i: run_script(task, sizes["sorted"], SETTINGS, by_length=True),
        "engine": lambda i: run_engine(task, made, DRAWS),  # the unit
        "tail": lambda i: run_job(task, draws=DRAWS, tail=TAIL),
        "tail_engine": lambda i: run_engine(task, tail_made, DRAWS, TAIL),
    }
    details = {"script_batch_rows": sizes, "model_loading": "not timed"}
    how: dict[str, Any] = {"unit": "engine", "judge": judge, "rounds": (7, 20), "details": details}
    with jobs.preloaded(task):
        parts = ("tail", "tail_engine")
        compare(benchmark, bench, "score", "throughput", point, steps, parts=parts, **how)


# --- workers of Ray -------------------------------------------------------------------------------

RAY_ROWS, RAY_PART, RAY_ROUNDS = 2560, 64, 3
STARTING = 0.25  # of a run's rows, left out: until then workers may be starting


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cluster(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start a Ray of two CPUs."""
    if find_spec("ray") is None:
        pytest.skip("the extra tfb[ray] is not installed")
    ray = import_ray()
    # Its processes take the environment of here.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, **quiet)
    yield
    ray.shutdown()


def seconds_a_row(task: Task, workers: int, part_rows: int) -> float:
    """Return those of a run with Ray, from the first part after ``STARTING`` to the last."""
    times: list[tuple[int, float]] = []

    def note(counts: Counts, _: int) -> None:
        times.append((counts.rows, time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        job = task.job(Path(folder) / "out", draws=DRAWS, workers=workers, part_rows=part_rows)
        jobs.finish(job, engine="ray", report=note)
    first = next(t for t in times if t[0] >= STARTING * times[-1][0])
    return (times[-1][1] - first[1]) / (times[-1][0] - first[0])


def test_ray_workers(
    benchmark: Any, bench: Bench, stories_task: Task, shared: Path, cluster: None
) -> None:
    """Two workers of one thread each ("ours") against one, without what starting them takes."""
    rows, part = (TOY_ROWS, 2) if bench.toy else (RAY_ROWS, RAY_PART)
    task = with_rows(stories_task, shared, "clinc-domain", rows)
    names = {"ours": 2, "one_worker": 1}
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def both() -> None:
        order = list(names) if len(seconds["ours"]) % 2 else list(reversed(names))
        for name in order:
            seconds[name].append(seconds_a_row(task, names[name], part))

    benchmark.pedantic(both, rounds=1 if bench.toy else RAY_ROUNDS, iterations=1)
    each = {name: np.array(values) for name, values in seconds.items()}
    ratio = quartiles(each["one_worker"] / each["ours"])
    point = {
        "model": "stories260K",
        "data": "clinc-domain",
        "rows": rows,
        "draws": DRAWS,
        "part_rows": part,
        "threads": 1,
        "workers": 2,
    }
    row = heading(bench, "score", "ray workers", point) | {
        "contenders": {k: {**quantiles(v), "rounds": len(v)} for k, v in each.items()},
        "ratios": {"one_worker": ratio},
        "timed": f"seconds a row after the first {STARTING:.0%} of the rows",
        "targets": [target("one worker / two", ratio["median"], 1.7, at_least=True)],
    }
    record(bench, row)
