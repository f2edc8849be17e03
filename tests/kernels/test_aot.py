"""Ahead-of-time compilation: every kernel builds for every architecture within its resources."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import triton

from tfb_kernels import aot


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python without the interpreter of Triton, which this process may have on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


def compile_in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line of ``aot``."""
    return in_a_process("-m", "tfb_kernels.aot", "--check", *arguments)


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_every_configuration_compiles_without_stack_and_spills(arch: str) -> None:
    """Every kernel and configuration at rank 16 and the largest, in bfloat16 and TF32."""
    dtypes = ["bf16", "tf32"]
    done = compile_in_a_process("--arch", arch, "--dtype", *dtypes, "--rank", "16", "256")
    assert done.returncode == 0, done.stderr
    built = len(list(aot.cases(arch, dtypes=dtypes, ranks=[16, 256])))
    assert sum(line.startswith(arch + " ") for line in done.stdout.splitlines()) == built
    if arch == "sm_90":
        lines = [x.partition(": ")[2] for x in done.stdout.splitlines() if x.startswith("sm_90:")]
        costs = {
            what: float(x) for x, _, what in (x.partition(" SASS instructions ") for x in lines)
        }
        for what, bound in BOUNDS.items():
            assert costs[what] <= bound, what
        assert costs.keys() == BOUNDS.keys()


# SASS instructions on sm_90 at rank 16, ten antithetic draws; a little above what was counted.
BOUNDS = {
    "a normal": 15,
    "a block of shrink, shared x": 1500,
    "a block of shrink, per-draw x": 650,
    "an output of expand, shared x": 12,
    "an output of expand, per-draw x": 12,
}


def test_the_loop_of_shrink() -> None:
    """On sm_90: x comes by asynchronous loads of 16 bytes, nothing moves in 16 bits, and a step has
    at most three barriers."""
    script = """
from tfb_kernels import aot, launch
config = launch.choose_config("shrink", rows=4096, rank=16, arch="sm_90")
for case in aot.kernel_cases("sm_90", "shrink", "bf16", 16, config):
    print(*aot.loop(aot.compile_case(case, "sm_90").asm["cubin"])[1])
"""
    done = in_a_process("-c", script)
    assert done.returncode == 0, done.stderr
    loops = [line.split() for line in done.stdout.splitlines()]
    assert len(loops) == 2
    for opcodes in loops:
        moves = [x for x in opcodes if x.startswith(("LD", "ST"))]
        assert not [x for x in moves if ".U16" in x or ".S16" in x], moves
        assert not [x for x in moves if x.startswith("LDG.")], moves
        assert any(x.startswith("LDGSTS") and x.endswith(".128") for x in moves)
        assert sum(x.startswith("BAR") for x in opcodes) <= 3


def test_the_committed_table_is_complete_and_within_the_gate() -> None:
    """resources.json has a row for every case of its ranks and dtypes, each accepted."""
    header, *rows = json.loads(aot.RESOURCES.read_text())
    assert header["triton"] == triton.__version__
    found = [aot.Resources(**r) for r in rows]
    expected = [
        (arch, c) for arch in aot.ARCHITECTURES for c in aot.cases(arch, aot.KERNELS, *aot.WRITTEN)
    ]
    for row, (arch, case) in zip(found, expected, strict=True):
        assert (row.arch, row.case) == (arch, case.label)
        assert aot.problems(case, row) == []


def test_opcodes_of_the_longest_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch back to a label closes a loop; the jump to itself that fills a line does not."""
    listing = "MOV .L_x_0: LDG FFMA BRA>.L_x_0 STG EXIT .L_x_1: BRA>.L_x_1 NOP NOP"
    monkeypatch.setattr(aot, "sass", lambda _: [w.replace(">", " ") for w in listing.split()])
    every, inside = aot.loop(b"")
    assert len(every) == 7 and inside == ["LDG", "FFMA", "BRA"]
    forward = "ISETP BRA>.L_x_0 LDG .L_x_0: EXIT"
    monkeypatch.setattr(aot, "sass", lambda _: [w.replace(">", " ") for w in forward.split()])
    assert aot.loop(b"")[1] == []


def test_the_gate_refuses() -> None:
    """Stack, spills and too much shared memory are each named."""
    case = next(aot.cases("sm_90", ["shrink"], ["bf16"]))
    good = aot.Resources(case.label, "sm_90", 100, 1000, 0, 0)
    assert aot.problems(case, good) == []
    for field, value, word in (
        ("stack_bytes", 8, "stack 8"),
        ("spills", 1, "spills 1"),
        ("shared_bytes", 1 << 20, "shared memory"),
    ):
        bad = aot.Resources(**{**good.__dict__, field: value})
        (message,) = aot.problems(case, bad)
        assert word in message and case.label in message
