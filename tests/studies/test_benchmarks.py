"""What the suites rest on: contenders that are right, points, data and counters that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.kernels import contenders, test_layer
from benchmarks.scoring.energy import joules


def test_layer_suite_has_the_whole_table_at_one_rank() -> None:
    """What is left out are other ranks of large points and loops beside the naive one."""
    points = test_layer.points(toy=False)
    at = {(p.n, p.m, p.T, p.S) for p in points if p.r == test_layer.RANK}
    assert len(at) == len(test_layer.LAYERS) * len(test_layer.ROWS) * len(test_layer.DRAWS)
    largest = max(points, key=lambda p: p.work)
    assert (largest.r, largest.S) == (test_layer.RANK, 32)
    assert set(test_layer.left_out(largest)) == {"naive_kept", "merged"}


@pytest.mark.parametrize("part", ["half", "a column in four", "the last columns"])
def test_wrong_noise_is_seen(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is timed, wrong noise is told from rounding, and right noise is not."""

    def spoiled(layer: Any, x: Tensor, base: Tensor, draws: Any) -> Tensor:
        pool = layer.sampler.pool(draws, x.device).clone()
        if part == "half":
            pool *= 0.5
        else:
            pool[..., slice(3, None, 4) if part == "a column in four" else slice(192, None)] = 0
        return contenders.op(layer, x, base, draws, pool=pool)

    where = torch.device("cpu"), torch.bfloat16
    assert contenders.errors("auto", *where) is None
    monkeypatch.setitem(contenders.PATHS, "auto", spoiled)
    assert "over the budget" in (contenders.errors("auto", *where) or "")


def test_reference_data_may_travel_with_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the repository, then beside it; TFB_SHARED alone where it is set."""
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path / "repository")
    monkeypatch.delenv("TFB_SHARED", raising=False)
    with pytest.raises(FileNotFoundError, match="in or beside the repository"):
        environment.shared_folder()
    for folder in (tmp_path / "shared", tmp_path / "repository" / "shared"):
        (folder / "data").mkdir(parents=True)
        assert environment.shared_folder() == folder
    monkeypatch.setenv("TFB_SHARED", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="TFB_SHARED has no folder 'data'"):
        environment.shared_folder()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's driver may have a counter")
def test_no_energy_without_a_gpu() -> None:
    assert joules() is None
