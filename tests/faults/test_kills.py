"""Whatever ends a run, at any moment: what has a part's name is whole, and resume goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from faults.cases import promised
from support.command import environment
from support.scoring import DONE, files, manifest, scoring, write

from tfb.scoring.job import Job
from tfb.scoring.run import run

KILLS = int(os.environ.get("TFB_KILLS", "30"))

KILLED = """
import json, multiprocessing, os, random, resource, signal, sys, threading
import torch
torch.set_num_threads(1)
from pathlib import Path
from tfb.scoring import run as offline
from tfb.scoring.job import Job
from tfb.scoring.run import LocalEngine, run

numbers, job = [signal.Signals[name] for name in sys.argv[2:]], Job(**json.loads(sys.argv[1]))
loaded = LocalEngine(job)
offline.ENGINES["local"] = lambda _: loaded  # once: while it loads, nothing is written
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

def work(at, number, total):
    calls = 0
    def count(frame, event, _):
        nonlocal calls
        if os.sep + "tfb" + os.sep not in frame.f_code.co_filename:
            return
        calls += 1
        if calls == at:
            os.kill(os.getpid(), number)
    threading.setprofile(count)
    sys.setprofile(count)
    run(job, resume=True, max_error_rate=1)
    sys.setprofile(None)
    total.value = calls

context = multiprocessing.get_context("fork")

def attempt(at, number=None):
    total = context.Value("q", 0)
    process = context.Process(target=work, args=(at, number, total))
    process.start()
    process.join()
    return process.exitcode, total.value

def parts():
    return {p.name: p.read_bytes() for p in Path(job.output).glob("part-*")}

code, calls = attempt(0)
assert code == 0, code
whole = parts()
chance, stopped, finished = random.Random(11), 0, 0
while numbers:
    for path in Path(job.output).iterdir():
        path.unlink()
    while numbers and len(parts()) < len(whole):
        code, _ = attempt(chance.randrange(1, calls), numbers[0])
        # A signal that the run notes lets it end well, and before that is an exception.
        noted = numbers[0] in (signal.SIGINT, signal.SIGTERM)
        assert code in (0, -numbers[0]) or noted, code
        assert parts().items() <= whole.items()  # what has its name is whole
        if code != 0 or len(parts()) < len(whole):
            del numbers[0]
            stopped += 1
    code, _ = attempt(0)
    assert code == 0 and parts() == whole, code
    assert sorted(p.name for p in Path(job.output).iterdir()) == sorted(
        [*whole, ".lock", "SHA256SUMS", "manifest.json"]
    )
    finished += 1
print(stopped, finished, len(whole))
"""


@promised(
    "the process is killed",
    "at every moment each part is whole or absent; resumed, all are those of an undisturbed run, "
    "byte for byte",
    {
        "SIGKILL at random moments (30, or TFB_KILLS)": ["SIGKILL"] * KILLS,
        "SIGHUP, SIGQUIT, SIGABRT, SIGSEGV, SIGALRM, SIGUSR1, SIGXCPU likewise": [
            *("SIGHUP", "SIGQUIT", "SIGABRT", "SIGSEGV", "SIGALRM", "SIGUSR1", "SIGXCPU")
        ],
        "SIGTERM and SIGINT likewise": ["SIGTERM", "SIGINT"] * 4,
    },
)
def test_killed_at_random_moments(artifact: str, tmp_path: Path, fault: list[str]) -> None:
    """A signal at a random call inside tfb, in any thread, again and again, then resumed."""
    killed(artifact, tmp_path, fault)


@promised(
    "the process is killed while it writes text (`--generate`)",
    "as above: every part whole or absent; resumed, all texts and figures byte for byte",
    {"SIGKILL at random moments (10)": ["SIGKILL"] * 10},
)
def test_killed_while_generating(artifact: str, tmp_path: Path, fault: list[str]) -> None:
    killed(artifact, tmp_path, fault, generate=True, max_new_tokens=4)


def killed(artifact: str, tmp_path: Path, fault: list[str], **how: Any) -> None:
    """Run a job of seven rows in five parts as ``KILLED`` says."""
    rows = [{"prompt": f"{c} {c}\n=", "choices": ["0", "1"]} for c in "abcdef"]
    inputs = [str(write(tmp_path / "a.jsonl", [*rows[:2], "{broken"]))]
    inputs += [str(write(tmp_path / "b.jsonl", [*rows[2:], {"id": "x"}]))]
    job = {"artifact": artifact, "inputs": inputs, "draws": 2, "part_rows": 2, **how}
    job["output"] = str(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(job), *fault],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    stopped, finished, parts = map(int, done.stdout.split())
    assert stopped == len(fault) and finished >= 1 and parts == 5


@promised(
    "the process is asked to stop",
    "the part in flight is finished, the exit status is that of shells, and `--resume` goes on",
    {"SIGTERM to `tfb score`": signal.SIGTERM, "SIGINT to `tfb score`": signal.SIGINT},
)
def test_the_command_is_asked_to_stop(
    job: Job, whole: dict[str, bytes], fault: signal.Signals
) -> None:
    words = f"{job.artifact} {job.inputs[0]} --output {job.output} --draws 2 --part-rows 1 "
    words += "--format jsonl --device cpu"
    with scoring(job, words) as process:
        process.send_signal(fault)
        out, err = process.communicate()
    assert process.returncode == 128 + fault and out.startswith("stopped: "), (out, err)
    assert "Traceback" not in err and manifest(job)["status"] == "stopped"
    done = len(files(job))
    assert 1 <= done < 21
    assert run(replace(job, part_rows=1, device="cpu"), resume=True).counts == DONE.counts
    assert len(files(job)) == 21
