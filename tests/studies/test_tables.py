"""The pages' tables are those of the committed rows, and rows carry what a reader needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.calibration.tables import methods_table
from benchmarks.environment import RESULTS
from benchmarks.front import curve, speedups
from benchmarks.generation.tables import decoding_table
from benchmarks.inference.tables import model_table, passes_table, predict_table
from benchmarks.kernels.tables import layer_table, linear_table
from benchmarks.scoring.tables import score_table

ENVIRONMENT = {
    "cpu": {"model": "a CPU", "cores": 2},
    "gpu": None,
    "commit": {"id": "0" * 40, "dirty": False},
    "versions": {"torch": "1", "transformers": "2", "peft": "3"},
    "torch_threads": 2,
}
COMMON = {"device": "cpu", "environment": ENVIRONMENT, "date": "2026-01-01", "targets": []}


def ratio(value: float) -> dict[str, float]:
    return {"median": value, "q25": value, "q75": value}


def ratios(values: dict[str, float]) -> dict[str, dict[str, float]]:
    return {k: ratio(v) for k, v in values.items()}


def missed(name: str, value: float, bound: float) -> dict[str, Any]:
    return {"name": name, "value": value, "bound": bound, "at_least": False, "met": False}


@pytest.mark.parametrize("name", tables.TABLES)
def test_pages_tables_are_generated_from_the_rows(name: str) -> None:
    """Filling them in again changes nothing."""
    text = tables.TABLES[name][2].read_text(encoding="utf-8")
    assert tables.fill(text, name, tables.make(name, RESULTS)) == text


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda p: p.stem)
def test_rows_say_where_they_come_from(path: Path) -> None:
    """Hardware, versions, commit and configuration on every row; no path of a machine."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        e = row["environment"]
        assert e["cpu"]["model"] and e["commit"] and row["date"] and row["point"]
        assert {"torch", "transformers", "peft", "triton"} <= set(e["versions"])
        assert "/home/" not in line and "/tmp/" not in line and "/root/" not in line


@pytest.mark.parametrize("name", tables.PLOTS)
def test_pages_pictures_have_rows_and_are_there(name: str) -> None:
    _draw, suites = tables.PLOTS[name]
    assert all(tables.read(suite, RESULTS) for suite in suites)
    assert (tables.FOLDER / "plots" / f"{name}.png").is_file()


def test_markers_are_needed() -> None:
    with pytest.raises(ValueError, match="has no markers <!-- benchmarks:x -->"):
        tables.fill("nothing here", "x", "table")
    text = "a\n<!-- benchmarks:x -->\nold\n<!-- /benchmarks:x -->\nb"
    assert tables.fill(text, "x", "new") == text.replace("old", "new")


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
    assert [r["value"] for r in tables.read("x", tmp_path)] == [2, 4]
    assert tables.read("none", tmp_path) == []


def test_kernels_without_gpu_rows_claim_nothing() -> None:
    assert "Not measured on a GPU yet" in linear_table([])
    assert model_table([]) == ""


def test_model_table_has_a_line_for_every_way() -> None:
    """Each line has its units, though every row holds them all; what is missed is listed."""
    point = {"model": "8B", "rank": 16, "rows": 50, "tokens": 300}
    rows: list[dict[str, Any]] = [
        COMMON
        | {
            "device": "cuda",
            "toy": False,
            "measure": "predict",
            "point": point | {"way": way},
            "contenders": {
                k: {"median": s, "peak_bytes": 3 << 30}
                for k, s in {"ours": seconds, "mean": 0.5, "base": 0.4}.items()
            },
            "in_units_of": {"ratios": ratios({"ours": 2 * seconds, "base": 0.8})},
        }
        for way, seconds in (("full", 5.0), ("tail", 0.65))
    ]
    rows[1]["targets"] = [missed("tail S=10, in passes", 1.3, 1.15)]
    text = model_table(rows)
    assert "| full, S = 10 | 10.00 [10.00, 10.00] | 5000 | 10.0 | 3.0 |" in text
    assert "| tail k = 1, S = 10 | 1.30 [1.30, 1.30] | 650 | 76.9 | 3.0 |" in text
    assert text.count("the adapter, one pass") == text.count("no adapter, one pass") == 1
    assert text.count("is 1.3, the target 1.15") == 1


def test_decoding_has_milliseconds_a_token_from_a_gpu_alone() -> None:
    """The rows of a CPU, in plain generations; those of a GPU below them, with what is missed."""
    point = {"model": "m", "rows": 8, "tokens": 32, "new_tokens": 64}
    units = {"ours": 1.5, "tail": 1.4, "last": 1.1, "naive": 10.0}
    row: dict[str, Any] = COMMON | {
        "measure": "decode",
        "point": point,
        "in_units_of": {"ratios": ratios(units)},
        "contenders": {k: {"median": 0.64 * u} for k, u in ({"mean": 1.0} | units).items()},
    }
    text = decoding_table([row])
    assert "| tail k = 1, S = 10 | 1.40 [1.40, 1.40] |" in text
    assert "ms a token" not in text and "CUDA" not in text
    lost = missed("full S=10, in plain generations", 1.7, 1.6)
    on_gpu = row | {"device": "cuda", "point": point | {"graphs": True}, "targets": [lost]}
    text = decoding_table([row, on_gpu])
    assert "| m, 8 x 32 tokens, 64 new, CUDA graphs | in plain generations | ms a token |" in text
    assert "| a plain generation | 1 | 10.00 |" in text
    assert "| full, S = 10 | 1.50 [1.50, 1.50] | 15.00 |" in text
    assert "is 1.7, the target 1.6" in text


def test_predict_table_says_how_each_contender_ran() -> None:
    """A row from before batches were chosen says that all contenders had one."""
    old = COMMON | {
        "measure": "predict",
        "point": {"model": "m", "rows": 50, "tokens": 17},
        "ratios": ratios({"naive": 1.04, "flipout": 1.5}),
        "in_units_of": {"ratios": ratios({"ours": 9.0, "naive": 9.0, "noise": 9.0})},
        "contenders": {"ours": {"rounds": 15}},
        "targets": [missed("naive / ours", 1.04, 1.05)],
    }
    loops = {k: {"rows": 50, "draws_per_pass": None} for k in ("naive", "flipout")}
    new = old | {
        "chosen": {"ours": {"rows": 10, "draws_per_pass": 2}, **loops},
        "targets": [],
        "in_units_of": {
            "ratios": ratios({"ours": 9.0, "naive": 9.0, "noise": 9.0, "ours_default": 9.5})
        },
    }
    text = predict_table([new])
    assert "| 9.50 [9.50, 9.50] | ours 10 (draws a pass: 2), naive 50, flipout 50 |" in text
    assert "missed" not in text
    text = predict_table([old])
    assert "|  | 50 for all |" in text
    assert "- m, 50 rows x 17 tokens (cpu, threads: 2): naive / ours is 1.04, the target 1" in text


def test_passes_table_puts_rows_of_one_model_into_one_column() -> None:
    """Full mode and cheaper ways are two rows; ours of the second is the tail."""
    point = {"model": "m", "adapter": "a", "rows": 8, "tokens": 256}
    full = {"ours": 9.0, "naive": 10.0}
    ways = {"ours": 1.2, "quarter_10": 3.3}
    rows = [
        COMMON
        | {"point": point, "measure": measure, "in_units_of": {"ratios": ratios(units)}}
        | {"targets": targets}
        for measure, units, targets in (
            ("predict", full, []),
            ("ways", ways, [missed("tail S=10", 1.2, 1.15)]),
        )
    ]
    text = passes_table(rows)
    assert text.count("m, a, 8 x 256 (cpu) |") == 1
    assert "| full, S = 10 | 9.00 [9.00, 9.00] |" in text
    assert "| tail k = 1, S = 10 | 1.20 [1.20, 1.20] |" in text
    assert "- m, a, 8 x 256 (cpu): tail S=10 is 1.20, the target 1.15" in text


def layer_row(S: int, rivals: dict[str, float], losses: list[str]) -> dict[str, Any]:
    """Make up a row of the layer suite."""
    return COMMON | {
        "measure": "layer",
        "losses": losses,
        "point": {"n": 8, "m": 9, "r": 2, "T": 3, "S": S, "dtype": "float32"},
        "ratios": ratios(rivals),
        "in_units_of": {"ratios": ratios({"ours": 1.25})},
        "contenders": {"ours": {"rounds": 15}},
    }


def test_layer_table_names_the_best_rival_and_what_is_lost() -> None:
    """The unit and ours a second time are no rivals; a point without a row stays empty."""
    others = {"base": 0.5, "ours_again": 0.9}
    won = layer_row(10, {"naive": 7.0, "naive_kept": 6.0, "baddbmm": 1.5} | others, [])
    lost = ["baddbmm_kept is 1.25x faster"]
    behind = layer_row(32, {"naive": 9.0, "baddbmm_kept": 0.8} | others, lost)
    same = "[1.25, 1.25]"
    text = layer_table([won, behind])
    first = f"7.00 [7.00, 7.00] | 1.50 [1.50, 1.50] baddbmm | 1.25 {same}"
    second = f"9.00 [9.00, 9.00] | 0.80 [0.80, 0.80] baddbmm, kept noise | 1.25 {same}"
    assert f"| 8 → 9 | 2 | 3 | {first} | {second} |" in text
    assert "- 8 → 9, r = 2, T = 3, S = 32: baddbmm_kept is 1.25x faster" in text
    assert "15 or more interleaved rounds" in text
    other = behind | {"point": behind["point"] | {"r": 4}}
    assert f"| 8 → 9 | 2 | 3 | {first} |  |  |  |" in layer_table([won, other])
    assert layer_table([won]).count("none") == 1
    assert "Not measured yet" in layer_table([])


def score_rows() -> list[dict[str, Any]]:
    """Make up a row of each measure of the score suite."""
    run = {"prompts": 7, "prompts_per_second": 50.0, "hours_a_million": 5.56}
    units = {"ours": 1.02, "plain": 1.53, "sorted": 1.25, "tail": 0.25, "tail_engine": 0.2}
    throughput = {
        "measure": "throughput",
        "targets": [missed("plain script / full job", 1.5, 2)],
        "point": {"model": "m", "data": "skewed", "rows": 10, "tokens": 1000},
        "ratios": ratios({"plain": 1.5, "sorted": 1.2}),
        "in_units_of": {"ratios": ratios(units)},
        "contenders": {"ours": {"rounds": 7}},
    }
    workers = {
        "measure": "ray workers",
        "point": {"model": "m", "data": "d", "rows": 20},
        "ratios": ratios({"one_worker": 1.8}),
        "timed": "after the start",
    }
    point = {"model": "8B", "rows": 30, "tokens": 9000, "dtype": "b"}
    million = [
        {
            "measure": "million",
            "run": run | {"kwh_a_million": energy},
            "point": point | {"way": way},
        }
        for way, energy in (("tail", 3.9), ("full", None))
    ]
    memory = {
        "measure": "resident memory",
        "growth": 1.02,
        "seconds": 600.0,
        "point": {"model": "m", "rows": 40, "mode": "tail", "tail": 1, "draws": 10},
        "bytes": {"after_first_minute": 100 << 20, "most": 102 << 20, "last": 99 << 20},
    }
    return [COMMON | row for row in (throughput, workers, *million, memory)]


def test_score_table_shows_what_there_is() -> None:
    """Ratios of jobs over scripts and engines, each part alone or together, and what is missed."""
    rows = score_rows()
    text = score_table(rows)
    cells = "| 1.50 [1.50, 1.50] | 1.20 [1.20, 1.20] | 6.1 | 5.0 | 1.02 [1.02, 1.02] | 1.25 |"
    workers = "Two single-threaded Ray workers score 1.80 [1.80, 1.80] times"
    assert "m, skewed, 10 rows (cpu), 100 tokens a row " + cells in text
    assert workers in text
    assert "| tail k = 1, S = 10 | 50.0 | 5.6 | 3.9 | 7 |" in text
    assert "| full, S = 10 | 50.0 | 5.6 | not measured | 7 |" in text
    assert "held 100 MiB after the first minute, at most 102 MiB (+2.0 %) in the 10 min" in text
    assert "- m, skewed, 10 rows (cpu): plain script / full job is 1.50, the target 2.00" in text
    assert workers in score_table(rows[1:2]) and "missed" not in score_table(rows[1:])
    assert "Not measured yet" in score_table([])


def fits(method: str, task: str, figures: list[tuple[float, float, int]]) -> list[dict[str, Any]]:
    """Make up a row of each seed: NLL, accuracy, and whether it is surely (1, -1) better."""
    return [
        COMMON
        | {
            "point": {"task": task, "method": method, "seed": seed},
            "nll": nll,
            "ece": nll / 10,
            "accuracy": accuracy,
            "passes": 1.0,
            "against": {
                "temperature": {"nll": {"difference": -float(sure), "significant": sure != 0}}
            },
        }
        for seed, (nll, accuracy, sure) in enumerate(figures)
    ]


def test_methods_table_averages_over_tasks_what_pairs_in_seeds() -> None:
    """The NLL's ratio is of means over the seeds that both have; tasks count alike."""
    same = [(1.0, 0.5, 0), (3.0, 0.5, 0)]
    rows = [
        row
        for task in ("exam", "subject")
        for method in ("mle", "temperature")
        for row in fits(method, task, same)
    ]
    rows += fits("tfb_joint", "exam", [(0.8, 0.51, 1), (2.4, 0.53, 1)])  # -20 %, +2 points
    rows += fits("tfb_joint", "subject", [(1.1, 0.5, -1)])  # +10 % of seed 0 alone
    text = methods_table(rows)
    ours = "| TFB, σ and T (the default) (3 of 4 fits) | -5.0 % | 13.5 (15.0) | +1.0 points | 1.0 |"
    assert f"{ours} 2 / 1 |" in text
    assert "| temperature scaling | – | 20.0 | +0.0 points | 1.0 | – |" in text
    assert methods_table(rows[:-3]).count("TFB") == 0
    assert "Mean over 2 tasks of the mean over seeds: 4 fits" in text
    assert "Not run yet" in methods_table([])


def test_reliability_is_of_all_seeds_rows_together() -> None:
    """Bins weigh by their rows, and one of few rows is not shown."""
    seeds = [
        {"counts": [10, 60, 5], "accuracy": [0.2, 0.5, 1.0], "confidence": [0.3, 0.6, 0.9]},
        {"counts": [30, 20, 5], "accuracy": [0.6, 0.9, 1.0], "confidence": [0.3, 0.8, 0.9]},
    ]
    confidence, accuracy = curve(seeds)
    assert confidence == pytest.approx([30, 65]) and accuracy == pytest.approx([50, 60])


def test_speedups_are_of_one_adapter() -> None:
    """Confined noise: the loop's passes in full mode, over its own."""
    point = {"model": "m", "adapter": "r16-all"}
    units = {"naive": 9.0, "ours": 8.0}, {"quarter_10": 3.0, "ours": 1.5, "last_10": 1.0}
    full, ways = (
        {"measure": measure, "point": point, "in_units_of": {"ratios": ratios(found)}}
        for measure, found in zip(("predict", "ways"), units, strict=True)
    )
    full["ratios"] = ratios({"naive": 1.1})
    other = {"measure": "ways", "point": {"model": "m", "adapter": "r8"}}
    predict = [{"point": {"model": "n"}, "ratios": ratios({"naive": 1.2})}]
    found = speedups(predict, [other, full, ways])
    assert found[0] == {"n": 1.2, "m": 1.1}
    assert list(found[1].values()) == [3.0, 6.0, 9.0]
