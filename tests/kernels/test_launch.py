"""How launches are chosen: for which device, with how many programs, at what cost on the host."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.calls import functions_entered

from tfb_kernels import launch, triton_expand, triton_linear, triton_merge, triton_shrink, tuning
from tfb_kernels.samples import Samples

PROCESSORS = 132  # of an H100 or H200
# out_features, in_features of Llama 3.1 8B
LLAMA = {"q": (4096, 4096), "k": (1024, 4096), "gate": (14336, 4096), "down": (4096, 14336)}
BF16 = torch.bfloat16


# --- devices --------------------------------------------------------------------------------------


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H200 and an A100 in one process, seen as torch would show them."""
    cards = [((9, 0), 132), ((8, 0), 108)]
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: cards[i][0])
    properties = [SimpleNamespace(multi_processor_count=card[1]) for card in cards]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties[i])
    tuning.reload()
    yield
    tuning.reload()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A data file in which sm_90 has a shrink of its own, whatever was measured."""
    data = json.loads(tuning.LAUNCH_FILE.read_text())
    own = {"kernels": {"shrink": [{"block_t": 128, "block_p": 64}]}}
    data["architectures"] = {"default": data["architectures"]["default"], "sm_90": own}
    (tmp_path / "launch.json").write_text(json.dumps(data))
    monkeypatch.setattr(tuning, "LAUNCH_FILE", tmp_path / "launch.json")
    tuning.reload()
    yield
    tuning.reload()


def test_each_device_has_its_own_entry(
    two_cards: None, table: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert [tuning.architecture(d) for d in (first, second)] == ["sm_90", "sm_80"]
    assert [tuning.processors(d) for d in (first, second)] == [132, 108]
    assert tuning.architecture(torch.device("cuda")) == "sm_80"  # the current one
    assert tuning.architecture(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(launch, "INTERPRET", False)
    shape = (1, 4096, 4096, 5, 16, 10, 4096, 4096, BF16, "ieee", "fused")
    plans = [triton_linear._plan(d, *shape, shared=True, bias=False) for d in (first, second)]
    for plan, arch in zip(plans, ("sm_90", "sm_80"), strict=True):
        config = launch.choose_config("shrink", rows=4096, rank=16, arch=arch)
        assert plan.shrink is not None
        assert plan.shrink.constants["BLOCK_P"] == config.block_p
    assert plans[0].shrink != plans[1].shrink


def test_tuning_needs_no_triton() -> None:
    script = "import sys, tfb_kernels.tuning; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_rows_from_which_merging_pays() -> None:
    """The bytes of the weight, read and written, over those of a row of x and two of the output."""
    device = torch.device("cpu")
    found = tuning.merge_min_rows(4096, 4096, device)
    assert found == tuning.paths("cpu").merge_rows * 2 * 4096 / 3
    assert tuning.merge_min_rows(4096, 14336, device) > found


# --- the table ------------------------------------------------------------------------------------


def test_unknown_gpus_have_configurations() -> None:
    """A card that has no entry uses the default, whatever the rank or number of rows."""
    for kernel in launch.KERNELS:
        for rows in (0, 1, 17, 1 << 40):
            for rank in (0, 1, 33, 256):
                config = launch.choose_config(kernel, rows=rows, rank=rank, arch="sm_999")
                assert isinstance(config, launch.LaunchConfig)
    assert tuning.paths("sm_999") == tuning.paths("default")


def test_an_entry_overrides_by_kernel(table: None) -> None:
    """An architecture's entry replaces the kernels that it names and keeps the others."""
    shrink, expand = (
        [launch.configurations(arch, kernel) for arch in ("sm_90", "default")]
        for kernel in ("shrink", "expand")
    )
    assert shrink[0] != shrink[1] and expand[0] == expand[1]


# --- programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("layer", LLAMA)
@pytest.mark.parametrize("shared", [True, False])
def test_every_multiprocessor_has_a_program(layer: str, shared: bool, arch: str) -> None:
    """16 to 511 rows a draw, ten antithetic draws at rank 16."""
    m, n = LLAMA[layer]
    for T in (*range(16, 511, 15), 128, 256, 511):
        G, rows, Q = (1, T, 5) if shared else (5, 2 * T, 1)
        config = launch.choose_config("shrink", rows=rows, rank=16, arch=arch)
        shrink = triton_shrink.plan(G, rows, n, Q, 16, BF16, "ieee", config, PROCESSORS)
        config = launch.choose_config("expand", rows=10 * T, rank=16, arch=arch)
        expand = triton_expand.plan(
            10, T, m, 16, BF16, "ieee", config, PROCESSORS, shared=shared, bias=False
        )
        config = launch.choose_config("merge", rows=0, rank=16, arch=arch)
        merge = triton_merge.plan(10, 2, m, n, 16, BF16, "ieee", config)
        for grid in (shrink.grid, expand.grid, merge.grid):
            assert prod(grid) >= PROCESSORS, (T, grid)


def test_the_blocks_of_a_plan_cover_all_rows_and_columns_once() -> None:
    """Whatever is left over: the last block of rows is smaller, and so is the last split."""
    config = launch.LaunchConfig()
    for Q, R, n, wave in ((5, 16, 4096, 132), (5, 8, 4096, 132), (1, 1, 33, 4), (9, 40, 700, 132)):
        plan = triton_shrink.plan(1, 100, n, Q, R, BF16, "ieee", config, wave)
        c: dict[str, Any] = plan.constants
        rows, last = (1 + Q) * R, c["TAIL"] or c["BLOCK_P"]
        assert 0 <= (plan.p_blocks - 1) * c["BLOCK_P"] + last - rows < max(16, last // 2 + 1)
        assert plan.split_size % c["BLOCK_K"] == 0
        assert 0 <= plan.grid[2] * plan.split_size - n < plan.split_size


# --- the host -------------------------------------------------------------------------------------


class Launches:
    """In place of a kernel: remembers that it was launched."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: object) -> Any:
        return self

    def __call__(self, *arguments: object, **constants: object) -> None:
        self.count += 1


@pytest.mark.parametrize("shared", [True, False])
def test_a_call_costs_few_calls_of_python(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a shape is known, the way to three launches is at most 60 calls of functions."""
    kernels = Launches()
    monkeypatch.setattr(triton_shrink, "shrink_kernel", kernels)
    monkeypatch.setattr(triton_expand, "finalise_kernel", kernels)
    monkeypatch.setattr(triton_expand, "expand_kernel", kernels)
    rows = (16,) if shared else (10, 16)
    x, base, A, B = (
        torch.zeros(*size, dtype=BF16) for size in ((*rows, 64), (*rows, 48), (16, 64), (48, 16))
    )
    if launch.INTERPRET:
        B = B.float()  # the dtype of products there
    numbered = (torch.arange(5), torch.arange(5).repeat_interleave(2), 2)
    of_layer = (torch.tensor(0), 7, 2.0)

    def call() -> None:
        samples = Samples(A, B, torch.zeros(16), torch.zeros(10), *numbered, *of_layer)
        triton_linear.bayes_lora_linear_triton(x, base, samples, path="fused")

    call()
    assert kernels.count == 3
    calls = functions_entered(call)
    assert kernels.count == 6
    assert calls["call"] + calls["c_call"] <= 60, calls
