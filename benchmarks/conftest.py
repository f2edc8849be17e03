"""Options of the benchmarks, and what is measured once for all: the device's bandwidth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read once, when huggingface_hub and Triton are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("TRITON_INTERPRET", None)

import pytest
import torch

from benchmarks.environment import results_folder, shared_folder
from benchmarks.timing import Bench, measure_bandwidth
from tfb_kernels.launch import INTERPRET

_BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tfb benchmarks")
    group.addoption("--record", action="store_true", help="append rows to benchmarks/results")
    group.addoption("--toy", action="store_true", help="toy sizes, three rounds (no GPU: implied)")
    group.addoption("--threads", type=int, help="torch's threads on a CPU; 1 where it is shared")
    group.addoption("--point-seconds", type=float, help="time for the rounds of one point")


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    """Return the session's device, sizes and results; its bandwidth is measured here, once."""
    _refuse_interpreter()
    option = request.config.getoption
    if option("--threads"):
        torch.set_num_threads(option("--threads"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # cuDNN's attention makes a plan for every new shape, once, which would count as if every
    # batch of a short job and every length of a text had to pay for it.
    torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = Bench(
        device=device,
        dtype=dtype,
        toy=option("--toy"),
        seconds=option("--point-seconds") or (1.0 if device.type == "cuda" else 120.0),
        results=results_folder() if option("--record") else None,
        bandwidth=measure_bandwidth(device),
    )
    request.config.stash[_BENCH] = made
    return made


@pytest.fixture(scope="session")
def kernels(bench: Bench) -> Bench:
    """Return the session for suites whose sizes only a GPU can run."""
    return bench.for_kernels()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of reference models, adapters and data; skip where there is none."""
    try:
        return shared_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the next point may need all of the memory


def _refuse_interpreter() -> None:
    if INTERPRET:
        raise pytest.UsageError(
            "Triton interprets its kernels in this process (were tests/ collected with "
            "benchmarks/?); run pytest on benchmarks/ alone"
        )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show a line for each point: contenders' time over ours, so above 1 is slower than ours."""
    made = config.stash.get(_BENCH, None)
    if made is None or not made.rows:
        return
    terminalreporter.section("contenders' time / ours: median [quartiles]")
    for row in made.rows:
        name = " ".join(f"{k}={v}" for k, v in row["point"].items())
        terminalreporter.write_line(f"{row['suite']} {row['measure']}: {name}")
        if "skipped_point" in row:
            terminalreporter.write_line(f"    skipped: {row['skipped_point']}")
            continue
        for kernel, seconds in row.get("kernels", {}).items():
            terminalreporter.write_line(f"    {1e6 * seconds:10.2f} us  {kernel}")
        for contender, r in row["ratios"].items():
            terminalreporter.write_line(
                f"    {contender:16} {r['median']:8.3f} [{r['q25']:.3f}, {r['q75']:.3f}]"
            )
        if row["toy"]:
            continue  # targets are for real sizes
        for missed in (t for t in row["targets"] if not t["met"]):
            terminalreporter.write_line(
                f"    MISSED {missed['name']}: {missed['value']:.3g}, bound {missed['bound']:.3g}"
            )
        for loss in row["losses"]:
            terminalreporter.write_line(f"    LOSS {loss}")
