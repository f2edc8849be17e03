"""The README's tables are those of the committed rows, and rows carry what a reader needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, reference_data, report
from benchmarks.energy import EnergyMeter, integral

RESULTS = report.FOLDER / "results"


@pytest.mark.parametrize("name", report.TABLES)
def test_readme_tables_are_generated_from_the_rows(name: str) -> None:
    """Filling them in again changes nothing."""
    text = report.PAGES.get(name, report.README).read_text(encoding="utf-8")
    made = report.TABLES[name](report.read(report.SUITES.get(name, name), RESULTS))
    assert report.fill(text, name, made) == text


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda p: p.stem)
def test_rows_say_where_they_come_from(path: Path) -> None:
    """Hardware, versions, commit and configuration on every row; no path of a machine."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        e = row["environment"]
        assert e["cpu"]["model"] and e["commit"] and row["date"] and row["point"]
        assert {"torch", "transformers", "peft", "triton"} <= set(e["versions"])
        assert "/home/" not in line and "/tmp/" not in line and "/root/" not in line


def test_markers_are_needed() -> None:
    with pytest.raises(ValueError, match="has no markers <!-- benchmarks:x -->"):
        report.fill("nothing here", "x", "table")
    text = "a\n<!-- benchmarks:x -->\nold\n<!-- /benchmarks:x -->\nb"
    assert "new" in report.fill(text, "x", "new") and "old" not in report.fill(text, "x", "new")


def test_the_newest_row_of_a_point_counts(tmp_path: Path) -> None:
    """Later lines replace earlier ones of the same point and device; toy sizes never count."""
    base = {"device": "cpu", "measure": "m", "point": {"S": 2}, "toy": False}
    rows = [
        base | {"value": 1},
        base | {"value": 2},
        base | {"value": 3, "toy": True},
        base | {"value": 4, "device": "cuda"},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [r["value"] for r in report.read("x", tmp_path)] == [2, 4]
    assert report.read("none", tmp_path) == []


def test_kernels_without_gpu_rows_claim_nothing() -> None:
    assert "Not measured on a GPU yet" in report.linear_table([])
    assert report.model_table([]) == ""


def test_model_table_has_a_line_for_every_way() -> None:
    """In passes of the adapter, milliseconds, rows a second and GiB; the units once, though every
    row has them; what is missed."""
    point = {"model": "8B", "rank": 16, "rows": 50, "tokens": 300}
    made = {
        way: {
            "device": "cuda", "toy": False, "date": "2026-01-01", "measure": "predict",
            "point": point | {"way": way}, "environment": score_rows()[0]["environment"],
            "contenders": {
                k: {"median": s, "peak_bytes": 3 << 30}
                for k, s in {"ours": seconds, "mean": 0.5, "base": 0.4}.items()
            },
            "in_units_of": {"ratios": {"ours": ratio(2 * seconds), "base": ratio(0.8)}},
            "targets": [{"name": "tail S=10, in passes", "value": 1.3, "bound": 1.15,
                         "at_least": False, "met": way != "tail"}],
        }
        for way, seconds in (("full", 5.0), ("tail", 0.65))
    }  # fmt: skip
    text = report.model_table(list(made.values()))
    assert "| full, S = 10 | 10.00 [10.00, 10.00] | 5000 | 10.0 | 3.0 |" in text
    assert "| tail k = 1, S = 10 | 1.30 [1.30, 1.30] | 650 | 76.9 | 3.0 |" in text
    assert text.count("the adapter, one pass") == text.count("no adapter, one pass") == 1
    assert text.count("is 1.3, the target 1.15") == 1


@pytest.mark.parametrize("part", ["half", "a column in four", "the last columns"])
def test_wrong_noise_is_seen(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is timed in bfloat16: too little noise, or none in some columns, is told from
    rounding, and right noise is not."""

    def spoiled(layer: Any, x: Tensor, base: Tensor, draws: Any) -> Tensor:
        pool = layer.sampler.pool(draws, x.device).clone()
        if part == "half":
            pool *= 0.5
        else:
            pool[..., slice(3, None, 4) if part == "a column in four" else slice(192, None)] = 0
        return baselines.op(layer, x, base, draws, pool=pool)

    where = torch.device("cpu"), torch.bfloat16
    assert baselines.errors("auto", *where) is None
    monkeypatch.setitem(baselines.PATHS, "auto", spoiled)
    assert "over the budget" in (baselines.errors("auto", *where) or "")


def test_reference_data_may_travel_with_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the repository, then beside it; TFB_SHARED alone where it is set."""
    monkeypatch.setattr(reference_data, "REPOSITORY", tmp_path / "repository")
    monkeypatch.delenv("TFB_SHARED", raising=False)
    with pytest.raises(FileNotFoundError, match="in or beside the repository"):
        reference_data.shared_folder()
    for folder in (tmp_path / "shared", tmp_path / "repository" / "shared"):
        (folder / "data").mkdir(parents=True)
        assert reference_data.shared_folder() == folder
    monkeypatch.setenv("TFB_SHARED", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="TFB_SHARED has no folder 'data'"):
        reference_data.shared_folder()


def ratio(value: float) -> dict[str, float]:
    return {"median": value, "q25": value, "q75": value}


def score_rows() -> list[dict[str, Any]]:
    """One made-up row of each measure of the score suite."""
    environment = {
        "cpu": {"model": "a CPU", "cores": 2}, "gpu": None,
        "commit": {"id": "0" * 40, "dirty": False},
        "versions": {"torch": "1", "transformers": "2", "peft": "3"},
    }  # fmt: skip
    common = {"device": "cpu", "environment": environment, "date": "2026-01-01", "targets": []}
    missed = {"name": "plain script / full job", "value": 1.5, "bound": 2, "met": False}
    units = {"ours": 1.02, "plain": 1.53, "sorted": 1.25, "tail": 0.25, "tail_engine": 0.2}
    run = {"prompts": 7, "prompts_per_second": 50.0, "hours_a_million": 5.56, "kwh_a_million": 3.9}
    return [
        common | {
            "measure": "throughput", "targets": [missed],
            "point": {"model": "m", "data": "skewed", "rows": 10, "tokens": 1000},
            "ratios": {"plain": ratio(1.5), "sorted": ratio(1.2)},
            "in_units_of": {"ratios": {k: ratio(v) for k, v in units.items()}},
            "contenders": {"ours": {"rounds": 7}},
        },
        common | {
            "measure": "ray workers", "point": {"model": "m", "data": "d", "rows": 20},
            "ratios": {"one_worker": ratio(1.8)}, "timed": "after the start",
        },
        *(
            common | {
                "measure": "million", "run": {**run, "kwh_a_million": energy},
                "point": {"way": way, "model": "8B", "rows": 30, "tokens": 9000, "dtype": "b"},
            }
            for way, energy in (("tail", 3.9), ("full", None))
        ),
        common | {
            "measure": "resident memory", "growth": 1.02, "seconds": 600.0,
            "point": {"model": "m", "rows": 40, "mode": "tail", "tail": 1, "draws": 10},
            "bytes": {"after_first_minute": 100 << 20, "most": 102 << 20, "last": 99 << 20},
        },
    ]  # fmt: skip


def test_score_table_shows_what_there_is() -> None:
    """Ratios of jobs over scripts and engines, each part alone or together, and what is missed."""
    rows = score_rows()
    text = report.score_table(rows)
    cells = "| 1.50 [1.50, 1.50] | 1.20 [1.20, 1.20] | 6.1 | 5.0 | 1.02 [1.02, 1.02] | 1.25 |"
    workers = "Two single-threaded Ray workers score 1.80 [1.80, 1.80] times"
    assert "m, skewed, 10 rows (cpu), 100 tokens a row " + cells in text
    assert workers in text
    assert "| tail k = 1, S = 10 | 50.0 | 5.6 | 3.9 | 7 |" in text
    assert "| full, S = 10 | 50.0 | 5.6 |  | 7 |" in text  # no energy known
    assert "held 100 MiB after the first minute, at most 102 MiB (+2.0 %) in the 10 min" in text
    assert "- m, skewed, 10 rows (cpu): plain script / full job is 1.50, the target 2.00" in text
    assert workers in report.score_table(rows[1:2]) and "missed" not in report.score_table(rows[1:])
    assert "Not measured yet" in report.score_table([])


def test_energy_is_the_integral_of_power() -> None:
    """Trapezoids between samples; unknown without a GPU."""
    assert integral([(0.0, 100.0), (2.0, 300.0), (3.0, 300.0)]) == 2 * 200 + 300
    assert integral([(0.0, 100.0)]) == 0
    if not torch.cuda.is_available():
        with EnergyMeter() as meter:
            pass
        assert meter.joules is None
