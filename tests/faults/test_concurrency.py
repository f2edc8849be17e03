"""Processes on one folder, threads on one model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.cases import promised
from support.children import Children
from support.models import CASES
from support.scoring import DONE, files, small_job, stopping

import tfb
from tfb.adapters.loading import load_tokenizer
from tfb.demo import digits
from tfb.scoring.job import Job
from tfb.scoring.output import OutputError
from tfb.scoring.run import run

HOLD = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print(); sys.stdin.read()"


@promised(
    "a second process takes the output",
    "it is refused while the first is alive, and goes on where a killed one was",
    ["a lock held by another process, then killed"],
)
def test_a_second_process_is_refused(job: Job, whole: dict[str, bytes]) -> None:
    run(job, report=stopping(1, 15))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, f"{job.output}/.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(OutputError, match="out: another run is writing to it; wait for it"):
            run(job, resume=True)
        other.kill()
    assert run(job, resume=True) == DONE and files(job) == whole


def together(count: int, call: Any) -> list[str]:
    """What ``call`` returns or raises in so many forks that begin at once."""
    start, children = time.monotonic() + 0.2, []
    for _ in range(count):
        reading, writing = os.pipe()
        if not (child := os.fork()):
            os.close(reading)
            while time.monotonic() < start:
                pass
            try:
                text = str(call())
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writing, text.encode()[:4000])
            os._exit(0)
        os.close(writing)
        children.append((child, reading))
    found = []
    for child, reading in children:
        with os.fdopen(reading) as pipe:
            found.append(pipe.read())
        os.waitpid(child, 0)
    return found


def runs_together(artifact: str, folder: str, count: int) -> list[str]:
    loaded = tfb.load(str(digits.BASE), artifact), load_tokenizer(str(digits.BASE))
    Job.load = lambda _: loaded  # type: ignore[method-assign]
    job = small_job(artifact, Path(folder))
    return together(count, lambda: run(job, resume=True).status)


def saves_together(artifact: str, folder: str, count: int) -> list[str]:
    bayes = tfb.load(str(digits.BASE), artifact)
    return together(count, lambda: tfb.save(bayes, folder))


@promised(
    "several processes take the output",
    "one runs and the others are refused, or follow; the parts are those of one run",
    {"2 processes": 2, "4 processes": 4, "8 processes": 8},
)
def test_runs_together(
    artifact: str, whole: dict[str, bytes], tmp_path: Path, in_child: Children, fault: int
) -> None:
    job = small_job(artifact, tmp_path)
    answer = in_child("faults.test_concurrency:runs_together", artifact, str(tmp_path), fault)
    assert answer.value is not None, answer
    assert "complete" in answer.value and files(job) == whole
    for said in answer.value:
        assert said == "complete" or (said.startswith("OutputError: ") and "run" in said)


@promised(
    "several processes save one artifact",
    "one does, the others are refused; the folder is whole",
    {"2 processes": 2, "4 processes": 4},
)
def test_saves_together(artifact: str, tmp_path: Path, in_child: Children, fault: int) -> None:
    folder = tmp_path / "saved"
    answer = in_child("faults.test_concurrency:saves_together", artifact, str(folder), fault)
    assert answer.value is not None, answer
    saved = [said for said in answer.value if said == str(folder)]
    others = [said for said in answer.value if said != str(folder)]
    assert len(saved) == 1 and all("Error: " in s and str(folder) in s for s in others), others
    assert tfb.load(str(digits.BASE), folder).sigma == 0.008
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.fixture
def bayes() -> tfb.BayesianModel:
    """A model whose dropout tells training from evaluation."""
    made = tfb.bayesianize(CASES["rslora"].build(), seed=3)
    made.configure(sigma=0.1)
    return made


@promised(
    "threads predict with one model",
    "each gets the probabilities of evaluation, bit for bit, or a refusal that says what to do; "
    "the model's mode stays as it was",
    {
        "4 threads, in eval()": (False, 4),
        "1 thread, in train()": (True, 1),
        "4 threads, in train()": (True, 4),
    },
)
def test_threads_on_one_model(bayes: tfb.BayesianModel, fault: tuple[bool, int]) -> None:
    training, threads = fault
    batch = CASES["rslora"].batch()
    label_ids = torch.tensor([4, 5, 6])
    expected = bayes.predict(batch, 4, label_ids=label_ids).probs
    bayes.model.train(training)
    modes = [module.training for module in bayes.model.modules()]

    def call(_: int) -> Any:
        try:
            return bayes.predict(batch, 4, label_ids=label_ids).probs
        except (RuntimeError, ValueError) as error:
            return str(error)

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(call, range(40)))
    refused = [answer for answer in found if isinstance(answer, str)]
    same = [answer for answer in found if isinstance(answer, torch.Tensor)]
    assert all(torch.equal(answer, expected) for answer in same) and (training or not refused)
    assert all("train" in answer or "thread" in answer for answer in refused), refused
    assert [module.training for module in bayes.model.modules()] == modes
