"""The tile sweep: what it tries, what it chooses, and the file that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels import sweep, tiles
from benchmarks.kernels.sweep import NEVER
from benchmarks.kernels.tiles import Job, Sizes, Step
from tfb_kernels import launch, tuning
from tfb_kernels.launch import LaunchConfig


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """launch.json as it is, and a copy that ``launch`` reads in this test."""
    data = json.loads(tuning.LAUNCH_FILE.read_text())
    monkeypatch.setattr(tuning, "LAUNCH_FILE", tmp_path / "launch.json")
    yield data
    tuning.reload()


def test_candidates() -> None:
    """Ten to fifty a kernel and number of rows, none twice, and tiles that the kernels take:
    powers of two, products of at least 16 a side."""
    for job in tiles.jobs(Sizes(), toy=False):
        assert 10 <= len(job.candidates) == len(set(job.candidates)) <= 50, job.kernel
        for c in job.candidates:
            for size in (c.block_t, c.block_m, c.block_n, c.block_p, c.block_k, c.num_warps):
                assert size > 0 and size & (size - 1) == 0
            if job.kernel == "shrink":
                assert min(c.block_t, c.block_p, c.block_k) >= 16


def test_candidates_that_come_to_one_launch_count_once() -> None:
    """What a launcher shrinks to: the first and smallest stands for all of them."""
    sizes = [LaunchConfig(block_m=m) for m in (64, 128, 256)]
    whole = Step(lambda made: None)
    shrunk = Step(lambda made: None, lambda config: min(config.block_m, 128))
    assert tiles.distinct(sizes, {"a": whole, "b": shrunk}) == sizes
    assert tiles.distinct(sizes, {"b": shrunk}) == sizes[:2]


@pytest.mark.parametrize(
    ("times", "bound"),
    [
        ({8: (1, 3), 64: (2, 2.5), 512: (4, 3), 4096: (9, 5)}, 512),
        ({8: (3, 1), 64: (3, 2)}, 8),  # generating always wins
        ({8: (1, 2), 64: (1, 3)}, NEVER),
        # One point out of order costs less than all the others.
        ({8: (1, 3), 64: (1.1, 1), 256: (1, 2), 512: (2, 1)}, 512),
    ],
)
def test_the_threshold_that_loses_least(times: dict[int, tuple[float, float]], bound: int) -> None:
    assert sweep.best_threshold({(rows, "shared"): t for rows, t in times.items()}) == bound


def test_launch_json_is_in_the_format_that_the_sweep_writes(table: Any, tmp_path: Path) -> None:
    """So that a measured entry is all that changes."""
    committed = Path(launch.__file__).parent / "data" / "launch.json"
    sweep.write(table, tmp_path / "launch.json")
    assert (tmp_path / "launch.json").read_text() == committed.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["launch.json"]


def test_a_measured_entry_serves_every_rank_and_number_of_rows(table: Any, tmp_path: Path) -> None:
    """Rank 16's answers up to rank 32, by rows; the default's lines beyond."""
    default, kernels = table["architectures"]["default"]["kernels"], dict[str, Any]()
    sizes = Sizes()
    best = {rows: LaunchConfig(block_t=16 << i) for i, rows in enumerate(sizes.rows)}
    for rows, up_to in zip(sizes.rows, sizes.up_to, strict=True):
        sweep.add(kernels.setdefault("shrink", []), Job("shrink", rows, up_to, ()), best[rows])
    sweep.finish(kernels, "shrink", default["shrink"])
    sweep.add(kernels.setdefault("mean", []), Job("mean", 50, None, ()), LaunchConfig(block_k=64))
    sweep.finish(kernels, "mean", default["mean"])
    entry = {
        "kernels": kernels,
        "paths": {"generate_min_rows": 99, "merge_rows": 0.7},
        "measured": sweep.about(),
    }
    table["architectures"]["sm_75"] = entry
    sweep.write(table, tuning.LAUNCH_FILE)
    tuning.reload()

    def chosen(kernel: str, rows: int, rank: int, arch: str = "sm_75") -> LaunchConfig:
        return launch.choose_config(kernel, rows=rows, rank=rank, arch=arch)

    for rows in sizes.rows:
        assert chosen("shrink", rows, 16) == chosen("shrink", rows, 32) == best[rows]
        for rank in (33, 64, 500):
            assert chosen("shrink", rows, rank) == chosen("shrink", rows, rank, "default")
    assert chosen("mean", 1 << 30, 0).block_k == 64
    assert chosen("expand", 7, 16) == chosen("expand", 7, 16, "default")  # not swept
    assert tuning.paths("sm_75").generate_min_rows == 99 and tuning.paths("sm_75").merge_rows == 0.7
    assert {"device", "date", "commit"} <= entry["measured"].keys()
