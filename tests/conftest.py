"""What all tests share: no network, reproducible property tests, the reference models."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Set before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.command import Run

# The models here are tiny: a second thread costs more than it brings, tenfold on a busy machine.
torch.set_num_threads(1)

# Read once too, when Triton is imported: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "tfb", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tfb")


# They take minutes, and run where they are named alone (`make test-faults`).
collect_ignore = ["faults"]


# What is drawn from the global generator must not depend on which tests a worker ran before.
@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the reference models, adapters and data; skips the test where there is none."""
    from benchmarks.environment import shared_folder

    try:
        return shared_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def tfb_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit status, stdout and stderr of ``tfb`` with these arguments, in this process."""
    from tfb.cli import app as cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tfb", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call
