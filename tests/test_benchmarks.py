"""The README's tables are those of the committed rows, and rows carry what a reader needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report

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
