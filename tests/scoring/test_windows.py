"""Keys, duplicates, column names and windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfb.data.readers import find_sources
from tfb.data.rows import RowError, RowFormat
from tfb.scoring import windows as windows_module
from tfb.scoring.hashset import HashSet
from tfb.scoring.windows import Item, Reading, check_unchanged, error_text, windows

HASHES = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 20), max_size=30)


def reading(path: Path, rows: list[Any], **how: Any) -> Reading:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return Reading(find_sources([path]), RowFormat(task="SEQ_CLS"), **how)


def items(read: Reading) -> list[Item]:
    return [item for block in read.blocks() for item in block]


def text(n: int, **more: Any) -> dict[str, Any]:
    return {"id": f"r{n}", "text": f"row {n}", **more}


# --- the set --------------------------------------------------------------------------------------


@given(st.lists(HASHES, max_size=8), HASHES)
def test_hash_set_is_a_set(added: list[list[int]], asked: list[int]) -> None:
    found, truth = HashSet(), set[int]()
    for hashes in added:
        found.add(hashes)
        truth.update(hashes)
    assert len(found) == len(truth)
    assert found.contains(asked) == [h in truth for h in asked]


def test_hash_set_takes_eight_bytes_a_row() -> None:
    found = HashSet()
    for start in range(0, 64 * 256, 256):
        found.add(range(start, start + 256))
    assert sum(run.nbytes for run in found._runs) == 8 * 64 * 256
    assert len(found._runs) <= np.log2(64) + 1  # few to search


# --- keys and duplicates --------------------------------------------------------------------------


def test_a_key_is_the_rows_and_the_configurations(tmp_path: Path) -> None:
    rows = [text(1), text(2, label=0), text(3, tag="x")]
    (first, *_), keys = (found := items(reading(tmp_path / "a.jsonl", rows))), None
    keys = [i.key for i in found]
    assert len(set(keys)) == 3 and first.row is not None and first.id == "r1"
    moved = items(reading(tmp_path / "b.jsonl", rows[::-1]))
    assert [i.key for i in moved] == keys[::-1]  # where a good row stands does not matter
    salted = items(reading(tmp_path / "a.jsonl", rows, salt=b"other"))
    assert not {i.key for i in salted} & set(keys)
    for changed in (text(1, label=0), {**text(1), "text": "row 1."}, {**text(1), "id": "r"}):
        assert items(reading(tmp_path / "c.jsonl", [changed]))[0].key not in keys
    kept = items(reading(tmp_path / "a.jsonl", rows, keep=("tag",)))
    assert kept[2].key != keys[2] and kept[2].kept == {"tag": "x"} and kept[0].kept == {"tag": None}


@pytest.mark.parametrize("block", [1, 3, 256])
def test_the_second_row_of_an_id_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(windows_module, "BLOCK", block)
    rows = [text(1), text(2), text(1), {"id": "r3"}, text(1), text(3)]
    found = items(reading(tmp_path / "a.jsonl", rows))
    assert [i.row is not None for i in found] == [True, True, False, False, False, True]
    assert [i.id for i in found] == ["r1", "r2", "r1", "r3", "r1", "r3"]
    assert len({i.key for i in found}) == 6
    assert found[2].error == (
        f"{tmp_path / 'a.jsonl'}:3: the id 'r1' was already used; give every row its own"
    )
    assert "no column 'text'" in str(found[3].error)


def test_faulty_rows_keep_what_can_be_told(tmp_path: Path) -> None:
    rows = ['{"id": "x\\ud800", "text": "a"}', '{"id": 7, "text": "", "tag": 1}', "{"]
    rows.append(json.dumps(text(8, tag="\ud800")))
    found = items(reading(tmp_path / "a.jsonl", rows, keep=("tag",)))
    assert [i.id for i in found] == [None, "7", None, "r8"]
    assert found[1].kept == {"tag": 1} and found[3].kept == {}
    assert "nothing in column 'text'" in str(found[1].error)
    assert "a column that is to be kept ('tag') cannot be written" in str(found[3].error)


def test_error_texts_are_bounded_and_plain() -> None:
    assert error_text("a\ud800b") == "a\\ud800b"
    assert len(error_text("x" * 10_000)) < 2100 and error_text("x" * 10_000).endswith("x ...")


# --- columns --------------------------------------------------------------------------------------


def test_rows_without_ids_have_their_number(tmp_path: Path) -> None:
    """Whatever stands in front, an error too; of what cannot be read it need not be the id."""
    rows = [{"text": "a"}, "{", {"text": ""}, {"text": "b", "id": "x"}, {"text": "c"}]
    found = items(reading(tmp_path / "a.jsonl", rows))
    assert [i.id for i in found] == ["0", None, "2", "x", "4"]
    assert [i.row is None for i in found] == [False, True, True, False, False]
    again = items(reading(tmp_path / "a.jsonl", [*rows, {"text": "d"}]))
    assert [i.key for i in again[:5]] == [i.key for i in found]


def test_csv_values_get_their_types(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        'id,prompt,choices,label\n1,p,A|B,B\n2,p,"[""A"", ""B|C""]",1\n3,p,A|B,\n4,p,1|0,1\n'
        "5,p,[A,B\n6,p,A|B,9\n7,p,A|B,x\n"
    )
    found = items(Reading(find_sources([path]), RowFormat(task="CAUSAL_LM")))
    rows = [i.row for i in found]
    assert [(r.choices, r.label) for r in rows if r is not None] == [
        (("A", "B"), 1), (("A", "B|C"), 1), (("A", "B"), None), (("1", "0"), 0),
    ]  # fmt: skip
    assert [i.row is None for i in found] == [False] * 4 + [True] * 3


def test_labels_that_pandas_made_float(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = {"id": ["1", "2", "3", "4"], "text": ["a"] * 4, "label": [1.0, float("nan"), None, 0.5]}
    pq.write_table(pa.table(table), path)
    found = items(Reading(find_sources([path]), RowFormat(task="SEQ_CLS")))
    assert [i.row.label for i in found[:3] if i.row] == [1, None, None]
    assert "'label' is the number 0.5" in str(found[3].error)


# --- windows --------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 5)), st.integers(1, 4))
def test_what_is_left_is_cut_at_the_same_places(
    tmp_path_factory: pytest.TempPathFactory, finished: set[int], size: int
) -> None:
    """Whichever windows are done, in whatever order: the others come out as before."""
    rows = [text(n) for n in range(11)] + ["{"]
    read = reading(tmp_path_factory.mktemp("w") / "a.jsonl", rows)
    whole = list(windows(read, size, HashSet()))
    assert [i for w in whole for i in w.items] == items(read)
    assert [w.number for w in whole] == list(range(len(whole)))
    assert all(len(w.items) == size for w in whole[:-1]) and whole[-1].share == 1
    done = HashSet(i.key for w in whole if w.number in finished for i in w.items)
    free = [w.number for w in whole if w.number not in finished]
    left = list(windows(read, size, done, free))
    assert [(w.number, w.items) for w in left] == [
        (w.number, w.items) for w in whole if w.number not in finished
    ]


def test_long_rows_fill_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "LONGEST_TEXT", 12)
    read = reading(tmp_path / "a.jsonl", [text(n) for n in range(5)])  # 5 characters each
    assert [len(w.items) for w in windows(read, 100, HashSet())] == [3, 2]


def test_limit(tmp_path: Path) -> None:
    read = reading(tmp_path / "a.jsonl", [text(n) for n in range(5)], limit=3)
    assert [i.id for i in items(read)] == ["r0", "r1", "r2"]


def test_finished_rows_must_be_there_unchanged(tmp_path: Path) -> None:
    rows = [text(0), "{", text(2), text(0)]
    read = reading(tmp_path / "a.jsonl", rows)
    done = HashSet(i.key for i in items(read))
    ids = HashSet(read.id_hash(n) for n in ("r0", "r2"))
    check_unchanged(read, done, ids)
    check_unchanged(reading(tmp_path / "a.jsonl", [*rows, text(4), "}"]), done, ids)
    with pytest.raises(RowError, match=r"1 finished rows are not in the input any more"):
        check_unchanged(reading(tmp_path / "a.jsonl", rows[:3]), done, ids)
    with pytest.raises(RowError, match=r"a\.jsonl:3: the row 'r2' has changed since it was scored"):
        check_unchanged(reading(tmp_path / "a.jsonl", [*rows[:2], text(2, label=1)]), done, ids)
