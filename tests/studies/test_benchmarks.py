"""The README's tables are those of the committed rows, and rows carry what a reader needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, reference_data, report, test_layer
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


def test_predict_table_says_how_each_contender_ran() -> None:
    """Batches and draws a pass beside the ratios; a target that is missed. A row from before they
    were chosen says that all had one batch."""
    old = {
        "device": "cpu", "measure": "predict", "date": "2026-01-01",
        "point": {"model": "m", "rows": 50, "tokens": 17},
        "environment": score_rows()[0]["environment"] | {"torch_threads": 2},
        "ratios": {"naive": ratio(1.04), "flipout": ratio(1.5)},
        "in_units_of": {"ratios": {k: ratio(9.0) for k in ("ours", "naive", "noise")}},
        "contenders": {"ours": {"rounds": 15}},
        "targets": [{"name": "naive / ours", "value": 1.04, "bound": 1.05, "met": False}],
    }  # fmt: skip
    loops = {k: {"rows": 50, "draws_per_pass": None} for k in ("naive", "flipout")}
    new = old | {
        "chosen": {"ours": {"rows": 10, "draws_per_pass": 2}, **loops}, "targets": [],
        "in_units_of": {"ratios": old["in_units_of"]["ratios"] | {"ours_default": ratio(9.5)}},
    }  # fmt: skip
    text = report.predict_table([new])
    assert "| 9.50 [9.50, 9.50] | ours 10 (draws a pass: 2), naive 50, flipout 50 |" in text
    assert "missed" not in text
    text = report.predict_table([old])
    assert "|  | 50 for all |" in text
    assert "- m, 50 rows x 17 tokens (cpu, threads: 2): naive / ours is 1.04, the target 1" in text


def test_passes_table_puts_rows_of_one_model_into_one_column() -> None:
    """Full mode and cheaper ways are two rows; ours of the second is the tail."""
    common = {
        "device": "cpu", "date": "2026-01-01", "environment": score_rows()[0]["environment"],
        "point": {"model": "m", "adapter": "a", "rows": 8, "tokens": 256},
    }  # fmt: skip
    missed = {"name": "tail S=10", "value": 1.2, "bound": 1.15, "met": False}
    rows = [
        common | {
            "measure": measure, "targets": targets,
            "in_units_of": {"ratios": {k: ratio(v) for k, v in units.items()}},
        }
        for measure, units, targets in (
            ("predict", {"ours": 9.0, "naive": 10.0}, []),
            ("ways", {"ours": 1.2, "quarter_10": 3.3}, [missed]),
        )
    ]  # fmt: skip
    text = report.passes_table(rows)
    assert text.count("m, a, 8 x 256 (cpu) |") == 1
    assert "| full, S = 10 | 9.00 [9.00, 9.00] |" in text
    assert "| tail k = 1, S = 10 | 1.20 [1.20, 1.20] |" in text
    assert "- m, a, 8 x 256 (cpu): tail S=10 is 1.20, the target 1.15" in text


def layer_row(S: int, ratios: dict[str, float], losses: list[str]) -> dict[str, Any]:
    """One made-up row of the layer suite."""
    return {
        "device": "cpu", "measure": "layer", "date": "2026-01-01", "losses": losses,
        "point": {"n": 8, "m": 9, "r": 2, "T": 3, "S": S, "dtype": "float32"},
        "environment": score_rows()[0]["environment"] | {"torch_threads": 2},
        "ratios": {k: ratio(v) for k, v in ratios.items()},
        "in_units_of": {"ratios": {"ours": ratio(1.25)}}, "contenders": {"ours": {"rounds": 15}},
    }  # fmt: skip


def test_layer_table_names_the_best_rival_and_what_is_lost() -> None:
    """Ours, the unit and ours a second time are no rivals; a point without a row stays empty, one
    that is lost is listed."""
    others = {"base": 0.5, "ours_again": 0.9}
    won = layer_row(10, {"naive": 7.0, "naive_kept": 6.0, "baddbmm": 1.5} | others, [])
    lost = ["baddbmm_kept is 1.25x faster"]
    behind = layer_row(32, {"naive": 9.0, "baddbmm_kept": 0.8} | others, lost)
    same = "[1.25, 1.25]"
    text = report.layer_table([won, behind])
    first = f"7.00 [7.00, 7.00] | 1.50 [1.50, 1.50] baddbmm | 1.25 {same}"
    second = f"9.00 [9.00, 9.00] | 0.80 [0.80, 0.80] baddbmm, kept noise | 1.25 {same}"
    assert f"| 8 → 9 | 2 | 3 | {first} | {second} |" in text
    assert "- 8 → 9, r = 2, T = 3, S = 32: baddbmm_kept is 1.25x faster" in text
    assert "15 or more interleaved rounds" in text
    other = behind | {"point": behind["point"] | {"r": 4}}
    assert f"| 8 → 9 | 2 | 3 | {first} |  |  |  |" in report.layer_table([won, other])
    assert report.layer_table([won]).count("none") == 1
    assert "Not measured yet" in report.layer_table([])


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
