"""Readers of the multiple-choice data sets: every row of every file, and files that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.calibration.questions import Question, arc, mmlu, openbookqa, winogrande

Reader = Callable[[Path], list[Question]]
FILES: dict[str, tuple[Reader, int]] = {
    "winogrande/train_s.jsonl": (winogrande, 640),
    "winogrande/dev.jsonl": (winogrande, 1267),
    "arc/ARC-Challenge/train.json": (arc, 1119),
    "arc/ARC-Challenge/test.json": (arc, 1172),
    "arc/ARC-Easy/train.json": (arc, 2251),
    "arc/ARC-Easy/test.json": (arc, 2376),
    "openbookqa/train.tsv": (openbookqa, 4957),
    "openbookqa/dev.tsv": (openbookqa, 500),
    "openbookqa/test.tsv": (openbookqa, 500),
    "mmlu/test/college_chemistry_test.csv": (mmlu, 100),
    "mmlu/test/college_physics_test.csv": (mmlu, 102),
    "mmlu/test/high_school_chemistry_test.csv": (mmlu, 203),
    "mmlu/test/high_school_physics_test.csv": (mmlu, 151),
}


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_read(shared: Path, name: str) -> None:
    """As many as the data's README says; ids differ, labels are choices, texts are not empty."""
    reader, count = FILES[name]
    found = reader(shared / "data" / name)
    assert len(found) == len({q.id for q in found}) == count
    assert all(0 <= q.label < len(q.choices) for q in found)
    assert all(text.strip() for q in found for text in (q.stem, *q.choices))
    assert {len(q.choices) for q in found} <= {2, 3, 4, 5}


def test_first_rows(shared: Path) -> None:
    data = shared / "data"
    first = winogrande(data / "winogrande/dev.jsonl")[0]
    assert first.stem.startswith("Sarah was") and first.choices == ("Sarah", "Maria")
    assert first.label == 1
    first = arc(data / "arc/ARC-Challenge/train.json")[0]
    assert first.stem.endswith("Which skin surface will produce the most heat?")
    assert first.choices[first.label] == "dry palms" and first.choices[3].startswith("palms")
    first = openbookqa(data / "openbookqa/dev.tsv")[0]
    assert first.id == "8-376" and first.choices[first.label] == "Deep sea animals"
    first = mmlu(data / "mmlu/test/college_chemistry_test.csv")[0]
    assert first.choices[first.label] == "r = k"


def test_a_marker_inside_a_choice_stays_in_it(shared: Path) -> None:
    """One row of OpenBookQA holds "(D)" twice; the four choices come out all the same."""
    rows = openbookqa(shared / "data/openbookqa/train.tsv")
    row = next(q for q in rows if q.id == "12-1145")
    assert row.choices[3] == "baby birds chewing worms (D) mother dogs nursing their pups"


@pytest.mark.parametrize("reader", [winogrande, arc, openbookqa, mmlu])
def test_another_file_is_named(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "other.txt"
    with pytest.raises(ValueError, match=r"other\.txt: cannot be read"):
        reader(path)
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"other\.txt.*own files"):
        reader(path)


def test_a_faulty_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    instruction = (
        "Please choose the correct answer to the question: Q?\n\nAnswer1: a Answer2: b\n\n"
        "Answer format: answer1/answer2"
    )
    good = {"instruction": instruction, "answer": "answer2"}
    path.write_text(json.dumps([good, good | {"answer": "answer3"}]))
    with pytest.raises(ValueError, match=r"row 2: expected 2 answers"):
        arc(path)
    path.write_text(json.dumps([good]))
    assert arc(path)[0].choices == ("a", "b") and arc(path)[0].label == 1
