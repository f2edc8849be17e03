"""Ray's workers make the parts that the local engine makes, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.command import environment
from support.scoring import files, manifest, needs_ray, write

from tfb.data.rows import Row
from tfb.demo import digits
from tfb.scoring import ray as ray_engine
from tfb.scoring.job import Job
from tfb.scoring.output import OutputError
from tfb.scoring.ray import EngineError, RayEngine, Worker
from tfb.scoring.run import run

MODEL, ADAPTER = str(digits.BASE), str(digits.ADAPTER)
DIGITS = [{**row, "label": None} for row in digits.rows("test")[:16]]
ROWS = [*DIGITS[:9], "{broken", {"id": "x"}, *DIGITS[9:]]
COUNTS = {"rows": 18, "errors": 2, "truncated": 0, "draws": 32, "capped": 0, "total": 18}


@pytest.fixture
def job(artifact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """18 rows in five parts, two of them errors, under names in the present folder."""
    write(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    return job_of(artifact, tmp_path)


def job_of(artifact: str, folder: Path) -> Job:
    output = str(folder / "out")
    return Job(artifact, ("rows.jsonl",), output, draws=2, part_rows=4, format="jsonl")


@pytest.fixture(scope="module")
def whole(artifact: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The parts that the local engine makes of ``job``."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder / "rows.jsonl", ROWS)
    job = job_of(artifact, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(job, max_error_rate=1).counts.errors == 2
    return files(job)


@needs_ray
def test_two_workers_of_the_command(
    job: Job, whole: dict[str, bytes], cluster: str, tmp_path: Path, artifact: str
) -> None:
    """The command joins a cluster, with relative names in a folder that is not the cluster's."""
    artifact = os.path.relpath(artifact, tmp_path)
    words = f"{artifact} rows.jsonl --output out --draws 2 "
    words += "--part-rows 4 --format jsonl --max-error-rate 1 --engine ray --workers 2"
    done = subprocess.run(
        [sys.executable, "-m", "tfb", "score", *words.split(), "--ray-address", cluster],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "complete: 18 rows, 2 of them errors: out\n"
    assert files(job) == whole and manifest(job)["counts"] == COUNTS


@needs_ray
def test_stopped_and_continued_by_the_local_engine(
    job: Job, whole: dict[str, bytes], cluster: str
) -> None:
    ours = replace(job, workers=1)
    stop = iter([signal.SIGTERM])
    stopped = run(
        ours, engine="ray", max_error_rate=1, report=lambda *_: os.kill(os.getpid(), next(stop))
    )
    assert stopped.status == "stopped" and stopped.signal == signal.SIGTERM
    assert len(files(job)) == 1 and files(job).items() < whole.items()
    with pytest.raises(OutputError, match=r"another configuration \(draws: 2 -> 4\)"):
        run(replace(ours, draws=4), engine="ray", resume=True)
    assert run(job, resume=True, max_error_rate=1).status == "complete"
    assert files(job) == whole


class Moved(Worker):
    """A worker whose copy of the model is another one, from its second shard on."""

    def score(self, rows: Sequence[Row], expected: dict[str, Any]) -> Any:
        found = super().score(rows, expected)
        self._configuration = {**self._configuration, "model_sha256": "f00"}
        return found


@needs_ray
def test_a_worker_with_another_configuration_is_refused(
    job: Job, whole: dict[str, bytes], cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "Worker", Moved)
    said = (
        r"a worker on \S+ has another configuration \(model_sha256: \w+ -> f00\); give all machines"
    )
    with pytest.raises(EngineError, match=said):
        run(replace(job, workers=1), engine="ray", max_error_rate=1)
    assert len(files(job)) == 1 and files(job).items() < whole.items()


@needs_ray
def test_a_worker_that_cannot_begin(job: Job, cluster: str, tmp_path: Path) -> None:
    """The message says why; no worker is left, and its CPUs are free."""
    ray = ray_engine.import_ray()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EngineError, match=r"failed for good .*no tokenizer can be loaded"):
        run(replace(job, base=str(empty), workers=2), engine="ray")
    for _ in range(100):
        if ray.available_resources().get("CPU") == 2:
            break
        time.sleep(0.1)
    assert ray.available_resources().get("CPU") == 2


@needs_ray
def test_more_workers_than_fit(job: Job, cluster: str) -> None:
    with pytest.raises(ValueError, match=r"workers=3: each takes 1 CPUs.*so 2 fit"):
        RayEngine(replace(job, workers=3))


def test_without_ray(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read or written."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "tfb\[ray\]"'):
        run(job, engine="ray")
    assert not Path(job.output).exists()
