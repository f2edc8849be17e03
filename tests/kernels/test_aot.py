"""Ahead-of-time compilation: every kernel builds for every architecture within its resources."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import triton

from tfb_kernels import aot, launch


def compile_in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line without the interpreter, which this process may have on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "tfb_kernels.aot", "--check", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_every_configuration_compiles_without_stack_and_spills(arch: str) -> None:
    """Each shipped configuration at its largest rank; the gate also wants wgmma on sm_90."""
    done = compile_in_a_process("--arch", arch, "--quick", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    built = len(list(aot.cases(arch, dtypes=["bf16"], largest_only=True)))
    assert sum(line.startswith(arch + " ") for line in done.stdout.splitlines()) == built
    if arch == "sm_90":
        costs = [x for x in done.stdout.splitlines() if "SASS instructions" in x]
        assert [x.split(" instructions ")[1] for x in costs] == [
            "a normal", "an output of expand, shared x", "an output of expand, per-draw x",
        ]  # fmt: skip
        # Shared x of ten draws reads the base output once for all of them.
        normal, shared, per_draw = (float(x.split()[1]) for x in costs)
        assert normal <= 30 and shared < per_draw <= 30


def test_the_committed_table_is_complete_and_within_the_gate() -> None:
    """resources.json has a row for every case of every architecture, each accepted."""
    header, *rows = json.loads(aot.RESOURCES.read_text())
    assert header["triton"] == triton.__version__
    found = {(r["arch"], r["case"]): aot.Resources(**r) for r in rows}
    expected = {(arch, c.label): c for arch in aot.ARCHITECTURES for c in aot.cases(arch)}
    assert found.keys() == expected.keys()
    for key, case in expected.items():
        assert aot.problems(case, found[key]) == []


def test_instructions_inside_and_outside_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch back to a label closes a loop; the jump to itself that fills a line does not."""
    listing = "MOV .L_x_0: LDG FFMA BRA>.L_x_0 STG EXIT .L_x_1: BRA>.L_x_1 NOP NOP"
    monkeypatch.setattr(aot, "sass", lambda _: [w.replace(">", " ") for w in listing.split()])
    assert aot.instructions(b"") == (4, 3)
    forward = "ISETP BRA>.L_x_0 LDG .L_x_0: EXIT"
    monkeypatch.setattr(aot, "sass", lambda _: [w.replace(">", " ") for w in forward.split()])
    assert aot.instructions(b"") == (4, 0)


def test_the_gate_refuses() -> None:
    """Stack, spills, too much shared memory and a lost wgmma are each named."""
    case = next(c for c in aot.cases("sm_90", ["shrink"], ["bf16"]) if c.config.block_t >= 64)
    good = aot.Resources(case.label, "sm_90", 100, 1000, 0, 0, True)
    assert aot.problems(case, good) == []
    for field, value, word in (
        ("stack_bytes", 8, "stack 8"),
        ("spills", 1, "spills 1"),
        ("shared_bytes", 1 << 20, "shared memory"),
        ("wgmma", False, "wgmma"),
    ):
        bad = aot.Resources(**{**good.__dict__, field: value})
        (message,) = aot.problems(case, bad)
        assert word in message and case.label in message


def test_unknown_gpus_have_configurations() -> None:
    """A card that has no entry uses the default, whatever the rank or number of rows."""
    for kernel in launch.KERNELS:
        for rows in (0, 1, 17, 1 << 40):
            for rank in (0, 1, 33, 256):
                config = launch.choose_config(kernel, rows=rows, rank=rank, arch="sm_999")
                assert isinstance(config, launch.LaunchConfig)
    assert launch.paths("sm_999") == launch.paths("default")


def test_the_table_of_configurations_overrides_by_kernel() -> None:
    """An architecture's entry replaces the kernels it names and keeps the others."""
    own = launch.configurations("gfx942", "expand")
    assert own != launch.configurations("default", "expand")
    assert launch.configurations("gfx942", "shrink") == launch.configurations("default", "shrink")
