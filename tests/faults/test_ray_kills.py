"""Ray's workers and its driver may be killed too."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults.cases import promised
from faults.test_kills import KILLS
from support.scoring import DONE, files, needs_ray, scoring

from tfb.data.rows import Row
from tfb.scoring import ray as ray_engine
from tfb.scoring.job import Job
from tfb.scoring.ray import EngineError, Worker
from tfb.scoring.run import run

pytestmark = needs_ray


class Mortal(Worker):
    """Dies by SIGKILL at a random call of tfb, once for each file "die-*" in the job's folder."""

    def __init__(self, job: Job, threads: int) -> None:
        super().__init__(job, threads)
        self.deaths = Path(job.output).parent

    def score(self, rows: Sequence[Row], expected: dict[str, Any]) -> Any:
        for death in self.deaths.glob("die-*"):
            left = random.Random(death.name).randrange(1, 100)

            def count(frame: Any, event: str, _: Any, death: Path = death) -> None:
                nonlocal left
                if os.sep + "tfb" + os.sep in frame.f_code.co_filename:
                    left -= 1
                    if left == 0:
                        death.unlink(missing_ok=True)
                        os.kill(os.getpid(), signal.SIGKILL)

            threading.setprofile(count)
            sys.setprofile(count)
            break
        try:
            return super().score(rows, expected)
        finally:
            sys.setprofile(None)


@pytest.fixture
def doom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Lets so many workers die, of which a shard may have so many."""

    def call(deaths: int, retries: int) -> None:
        monkeypatch.setattr(ray_engine, "Worker", Mortal)
        monkeypatch.setattr(ray_engine, "RETRIES", retries)
        for n in range(deaths):
            (tmp_path / f"die-{n}").touch()

    return call


@promised(
    "a worker of Ray is killed",
    "its rows go to the worker that takes its place; parts are those of the local engine, byte for "
    "byte",
    ["SIGKILL at random moments (30, or TFB_KILLS)"],
)
@pytest.mark.usefixtures("cluster")
def test_killed_workers_lose_nothing(
    job: Job, whole: dict[str, bytes], doom: Callable[[int, int], None], tmp_path: Path
) -> None:
    doom(KILLS, KILLS)
    assert run(replace(job, workers=2), engine="ray") == DONE
    assert files(job) == whole and not list(tmp_path.glob("die-*"))


@promised(
    "a worker of Ray is killed",
    "a shard that ends too many of them ends the run; what was finished is kept and gone on with",
    ["SIGKILL of every worker that gets the shard"],
)
@pytest.mark.usefixtures("cluster")
def test_killed_too_often(
    job: Job, whole: dict[str, bytes], doom: Callable[[int, int], None], tmp_path: Path
) -> None:
    doom(2, 1)
    with pytest.raises(EngineError, match=r"a Ray worker failed for good .*continue with resume="):
        run(replace(job, workers=1), engine="ray")
    assert files(job).items() < whole.items()
    for left in tmp_path.glob("die-*"):
        left.unlink()
    assert run(job, resume=True) == DONE and files(job) == whole


@promised(
    "the driver of Ray is killed",
    "each part is whole or absent; resumed by any engine, all are byte for byte the same",
    ["SIGKILL of `tfb score --engine ray`"],
)
def test_killed_driver(job: Job, whole: dict[str, bytes], cluster: str) -> None:
    words = f"{job.artifact} {job.inputs[0]} --output {job.output} --draws 2 --part-rows 6 "
    words += f"--format jsonl --engine ray --workers 1 --ray-address {cluster}"
    with scoring(job, words) as process:
        process.kill()
        assert process.stderr is not None
        assert files(job), process.stderr.read()
    assert files(job).items() <= whole.items()
    assert run(job, resume=True) == DONE and files(job) == whole
