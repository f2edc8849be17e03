"""benchmarks/gpu.sh: stages in their order, each under its limit, whatever fails.

The dry run of every stage is part of ``make check``; here an interpreter and a ``timeout`` that
only write down how they were called stand in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.environment import REPOSITORY
from benchmarks.kernels.tables import linear_table

SCRIPT = REPOSITORY / "benchmarks" / "gpu.sh"
# In order of worth; seconds at most.
PLAN = {
    "smoke": 120,
    "sweep": 300,
    "model": 240,
    "decode": 240,
    "score": 150,
    "predict": 120,
    "tests": 150,
    "memcheck": 90,
    "racecheck": 90,
}

PYTHON = """#!/bin/sh
case "$*" in
  *is_available*) echo "$FAKE_GPU" ;;
  *"import json"*) echo "the environment" ;;
  *"import xdist"*) exit 1 ;;
  *) echo "ran $*"; exit ${FAKE_STATUS:-0} ;;
esac
"""
TIMEOUT = """#!/bin/sh
echo "limit $2" >> "$FAKE_LOG"
shift 2
"$@" || exit ${FAKE_TIMEOUT:-$?}
"""
SANITIZER = """#!/bin/sh
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 9
shift 4
exec "$@"
"""


@dataclass(frozen=True)
class Fakes:
    """Calls the script with stand-ins; ``out``: the folder of its results."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def limits(self) -> list[int]:
        lines = (self.folder / "log").read_text().splitlines()
        return [int(line.split()[1]) for line in lines]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        known = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "PYTHON": str(self.folder / "python"),
            "FAKE_GPU": "True",
            "FAKE_LOG": str(self.folder / "log"),
            "OUT": str(self.out),
        }
        return subprocess.run(
            [str(SCRIPT), *arguments],
            env=os.environ | known | environment,
            capture_output=True,
            text=True,
        )


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    for name, text in (("python", PYTHON), ("timeout", TIMEOUT), ("compute-sanitizer", SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return Fakes(tmp_path)


def planned(text: str) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in text.splitlines()}


def test_the_plan(fakes: Fakes) -> None:
    """Printed without a GPU or an interpreter; all of it fits into half an hour."""
    done = fakes.run("--plan", PYTHON="/no/such/python")
    assert done.returncode == 0 and planned(done.stdout) == PLAN
    assert list(planned(done.stdout)) == list(PLAN)
    assert sum(PLAN.values()) <= 25 * 60  # and a machine's start


def test_all_stages_in_order_each_under_its_limit(fakes: Fakes) -> None:
    done = fakes.run(FAKE_STATUS="0")
    assert done.returncode == 0, done.stdout + done.stderr
    heads = [line.split()[1].rstrip(",") for line in done.stdout.splitlines() if "===" in line]
    assert heads == list(PLAN)
    assert fakes.limits == list(PLAN.values())
    for name in PLAN:
        assert (fakes.out / f"{name}.log").read_text()
    assert "benchmarks/kernels/test_linear.py" in (fakes.out / "smoke.log").read_text()
    assert "-m benchmarks.kernels.sweep" in (fakes.out / "sweep.log").read_text()
    assert "--record" in (fakes.out / "model.log").read_text()


@pytest.mark.parametrize(
    ("how", "said"),
    [({"FAKE_STATUS": "1"}, "FAILED with status 1"), ({"FAKE_TIMEOUT": "124"}, "OUT OF TIME")],
)
def test_a_stage_that_fails_stops_no_other(fakes: Fakes, how: dict[str, str], said: str) -> None:
    done = fakes.run(**{"FAKE_STATUS": "1", **how})
    assert done.returncode == 1
    last = done.stdout.splitlines()[-len(PLAN) :]
    assert [line.partition(":")[0] for line in last] == list(PLAN)
    assert said in last[0]


@pytest.mark.parametrize("names", [["model"], ["model", "smoke"]])
def test_some_stages_alone(fakes: Fakes, names: list[str]) -> None:
    """In the order of the plan."""
    done = fakes.run(*(x for name in names for x in ("--stage", name)))
    assert done.returncode == 0
    assert fakes.limits == [limit for name, limit in PLAN.items() if name in names]
    assert {p.name for p in fakes.out.iterdir()} == {f"{name}.log" for name in names}


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--stage", "nosuch"], {}, "no stage 'nosuch': smoke sweep model"),
        (["--stage"], {}, "--stage needs a name"),
        (["--fast"], {}, "unknown argument '--fast'"),
        ([], {"FAKE_GPU": "False"}, "no GPU that torch can see"),
        ([], {"PYTHON": "/no/such/python"}, "cannot import torch; PYTHON=..."),
        ([], {"GIT_DIR": "/no/such/folder"}, "TFB_COMMIT must name the commit"),
    ],
)
def test_refused_before_anything_runs(
    fakes: Fakes, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    done = fakes.run(*arguments, **environment)
    assert done.returncode == 2 and message in done.stderr
    assert not fakes.out.exists()


def test_a_dry_run_of_one_stage_keeps_its_rows_where_it_is_told(tmp_path: Path) -> None:
    """The real interpreter: rows, marked as toy, and the whole output."""
    # pytest-benchmark measures nothing in what takes itself for a worker of pytest-xdist.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [str(SCRIPT), "--toy", "--stage", "smoke"],
        env=outside | {"OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(x) for x in (tmp_path / "linear.jsonl").read_text().splitlines()]
    assert [r["measure"] for r in rows] == 8 * ["layer"] + 6 * ["update"] + 6 * ["kernels"]
    assert all(r["toy"] and r["environment"]["commit"] for r in rows)
    assert all(min(r["kernels"].values()) > 0 for r in rows[14:])
    table = linear_table(rows)
    assert table.count("| down, S = 10, 16 rows, per draw |") == 2  # whole and the update alone
    assert table.count("| down, S = 2, 16 rows, per draw |") == 1
    assert "passed" in (tmp_path / "smoke.log").read_text()
