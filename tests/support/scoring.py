"""A small scoring job, what is in its folder, and ways to stop it."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.artifacts import digits_artifact
from support.command import environment

import tfb
from tfb.adapters.loading import load_tokenizer
from tfb.demo import digits
from tfb.scoring import ray as ray_engine
from tfb.scoring.job import Job
from tfb.scoring.output import Counts
from tfb.scoring.run import Outcome, run

DRAWS = 2  # of the job
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra tfb[ray] is not installed"
)


def cut(i: int, row: Any) -> dict[str, Any]:
    """A digit of which some lines are gone, with 4 or 10 choices."""
    lines = row["prompt"].split("\n")[i % 4 :]
    choices = row["choices"][: 10 if i % 2 else 4]
    return {**row, "prompt": "\n".join(lines), "choices": choices, "label": None, "tag": i}


ROWS = [cut(i, row) for i, row in enumerate(digits.rows("test")[:21])]


def small_job(artifact: str, folder: Path) -> Job:
    """A job on 21 digits in parts of 6."""
    inputs = (str(write(folder / "rows.jsonl", ROWS)),)
    output = str(folder / "out")
    return Job(artifact, inputs, output, draws=DRAWS, part_rows=6, format="jsonl")


@contextmanager
def scoring(job: Job, words: str) -> Iterator[subprocess.Popen[str]]:
    """``tfb score`` with these arguments in a process of its own, once its first part is there."""
    with subprocess.Popen(
        [sys.executable, "-m", "tfb", "score", *words.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        while not files(job) and process.poll() is None:
            time.sleep(0.001)
        yield process


def write(path: Path, rows: list[Any]) -> Path:
    """Write rows, or lines as they are, as JSONL."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def counted(rows: int, errors: int = 0, truncated: int = 0) -> Counts:
    """What parts of the job hold."""
    return Counts(rows, errors, truncated, DRAWS * (rows - errors))


DONE = Outcome("complete", counted(21))


def files(job: Job) -> dict[str, bytes]:
    """The part files of a job and what is in them."""
    return {p.name: p.read_bytes() for p in sorted(Path(job.output).glob("part-*"))}


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(digits_artifact(tmp_path_factory.mktemp("made")))


@pytest.fixture(scope="session")
def loaded(artifact: str) -> tuple[tfb.BayesianModel, Any]:
    return tfb.load(str(digits.BASE), artifact), load_tokenizer(str(digits.BASE))


@pytest.fixture
def job(
    artifact: str, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Job:
    """A job on 21 digits in parts of 6, with a model that is loaded once for all tests."""
    monkeypatch.setattr(Job, "load", lambda _: loaded)
    return small_job(artifact, tmp_path)


@pytest.fixture(scope="session")
def whole(artifact: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The parts of an uninterrupted run of ``job``, from a model of its own."""
    job = small_job(artifact, tmp_path_factory.mktemp("whole"))
    assert run(job) == DONE
    return files(job)


def results(job: Job) -> list[dict[str, Any]]:
    """All rows, part by part."""
    found: list[dict[str, Any]] = []
    for path in sorted(Path(job.output).glob("part-*")):
        if path.suffix == ".parquet":
            found += pq.read_table(path).to_pylist()
        else:
            found += map(json.loads, path.read_bytes().splitlines())
    return found


def manifest(job: Job) -> dict[str, Any]:
    return dict(json.loads((Path(job.output) / "manifest.json").read_text()))


def stopping(after: int, number: int) -> Callable[[Counts, int], None]:
    """A report that sends a signal to this process after so many parts."""
    seen: list[Any] = []

    def report(counts: Counts, _: int) -> None:
        seen.append(counts)
        if len(seen) == after:
            os.kill(os.getpid(), number)

    return report


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray of two CPUs; its address."""
    ray = ray_engine.import_ray()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:  # Ray's processes take the environment of here
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=200 << 20,
        )
    signal.signal(signal.SIGTERM, handler)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
