"""Every format gives the same rows, from files and from Python; every fault has its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from support.tables import COLUMNS, DATA, FILES, IN_MEMORY, NAMES, as_pandas, written

from tfb.data import readers
from tfb.data.readers import (
    Record,
    count_records,
    find_sources,
    iter_records,
    read,
    read_rows,
    schema_of,
)
from tfb.data.rows import Row, RowError, RowFormat

ROWS: list[dict[str, Any]] = [
    {"id": f"r{i}", "prompt": f'say "{i}",\nplease — ü', "label": i % 2} for i in range(7)
]


def records(*paths: object, columns: list[str] | None = None) -> list[Record]:
    """The records of files; each file has as many as are counted, from any record on the same."""
    found: list[Record] = []
    for source in find_sources([str(p) for p in paths]):
        here = list(read(source, columns))
        assert count_records(source) == len(here)
        for start in range(len(here) + 2):
            assert list(read(source, columns, start=start)) == here[start:]
        found += here
    return found


def lines(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def as_csv(delimiter: str = ",") -> bytes:
    text = io.StringIO()
    out = csv.DictWriter(text, ROWS[0], delimiter=delimiter)
    out.writeheader()
    out.writerows(ROWS)
    return text.getvalue().encode()


def write_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=3)


def compressed(codec: str, data: bytes = lines()) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with pa.CompressedOutputStream(str(path), codec) as file:
            file.write(data)

    return write


BOM = b"\xef\xbb\xbf"
WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda p: p.write_bytes(BOM + lines().replace(b"\n", b"\r\n")),
    "a.ndjson": lambda p: p.write_bytes(b"\n" + lines() + b"\n  \n"),
    "a.json": lambda p: p.write_text(json.dumps(ROWS, indent=1)),
    "a.jsonl.gz": lambda p: p.write_bytes(b"".join(gzip.compress(lines([r])) for r in ROWS)),
    "a.json.bz2": lambda p: p.write_bytes(bz2.compress(lines())),
    "a.jsonl.zst": compressed("zstd"),
    "a.jsonl.lz4": compressed("lz4"),
    "a.csv": lambda p: p.write_bytes(BOM + as_csv()),
    "a.csv.zst": compressed("zstd", as_csv().replace(b"\r\nr4", b"\r\n\r\n\r\nr4")),
    "a.tsv": lambda p: p.write_bytes(as_csv("\t").replace(b"\r\n", b"\r")),
    "a.parquet": lambda p: pq.write_table(pa.Table.from_pylist(ROWS), p, row_group_size=2),
    "a.feather": lambda p: pyarrow.feather.write_feather(
        pa.Table.from_pylist(ROWS), p, chunksize=3
    ),
    "a.arrow": write_stream,
}


@pytest.mark.parametrize("name", WRITERS)
def test_all_formats_give_the_same_records(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    found = records(path)
    text = "sv" in name
    assert [r.fields for r in found] == [
        r | {"label": str(r["label"])} if text else r for r in ROWS
    ]
    assert len({r.place for r in found}) == len(ROWS)
    assert all(r.place.startswith(f"{path}:") and r.fault is None for r in found)
    schema = schema_of(find_sources([path])[0])
    assert ("json" in name) == (schema is None)
    assert schema is None or schema.names == ["id", "prompt", "label"]


def test_files_without_records(tmp_path: Path) -> None:
    empty = pa.Table.from_pylist(ROWS)[:0]
    (tmp_path / "a.jsonl").write_bytes(b"\n")
    (tmp_path / "b.json").write_bytes(b"[]")
    (tmp_path / "c.csv").write_bytes(b"id,text\n")
    pq.write_table(empty, tmp_path / "d.parquet")
    pyarrow.feather.write_feather(empty, tmp_path / "e.feather")
    assert records(tmp_path) == []


def test_columnar_files_read_only_what_is_asked_for(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow"):
        WRITERS[name](tmp_path / name)
        found = records(tmp_path / name, columns=["id", "nothing"])
        assert [r.fields for r in found] == [{"id": r["id"]} for r in ROWS]


def test_small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK", 2)
    for name in ("a.jsonl", "b.parquet", "c.arrow", "d.csv", "e.feather"):
        WRITERS[f"a.{name[2:]}"](tmp_path / name)
    sources = find_sources([tmp_path])
    assert [s.suffix for s in sources] == [".jsonl", ".parquet", ".arrow", ".csv", ".feather"]
    assert [r.fields["id"] for r in records(tmp_path) if r.fields] == 5 * [r["id"] for r in ROWS]


# --- finding --------------------------------------------------------------------------------------


def test_patterns_folders_and_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "c.parquet", "deep/d.jsonl", ".hidden.jsonl", "notes.txt"):
        (tmp_path / name).write_bytes(b"")

    def names(*inputs: object) -> list[str]:
        return [str(s.relative_to(tmp_path)) for s in find_sources([str(x) for x in inputs])]

    assert names(tmp_path / "b.jsonl", tmp_path / "a.jsonl") == ["b.jsonl", "a.jsonl"]
    assert names(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(tmp_path / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl", "deep/d.jsonl"]
    assert names(tmp_path) == ["a.jsonl", "b.jsonl", "c.parquet"]
    (tmp_path / "odd[1].jsonl").write_bytes(b"")
    assert names(tmp_path / "odd[1].jsonl") == ["odd[1].jsonl"]


def test_a_saved_dataset(tmp_path: Path) -> None:
    """What ``Dataset.save_to_disk`` wrote last; caches and earlier shards are none of its rows."""
    write_stream(tmp_path / "data-00000-of-00001.arrow")
    write_stream(tmp_path / "cache-1.arrow")
    write_stream(tmp_path / "data-00001-of-00002.arrow")  # of an earlier save
    (tmp_path / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert [r.fields for r in records(tmp_path)] == ROWS
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(RowError, match=r"its state\.json is no saved Dataset's; save it again"):
        records(tmp_path)


def test_compression_is_told_by_the_name_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "rows.JSONL.GZ").write_bytes(gzip.compress(lines()))
    assert [r.fields for r in records(tmp_path / "rows.JSONL.GZ")] == ROWS
    (tmp_path / "rows.parquet.gz").write_bytes(b"")
    with pytest.raises(RowError, match="the format is told by the name"):
        records(tmp_path / "rows.parquet.gz")


def test_a_row_of_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    """And what csv itself refuses is one faulty record among good ones."""
    file = tmp_path / "rows.csv"
    file.write_text('text,label\n"a\nb",0\n' + "x" * 101 + ",1\nc,2\n")
    before = csv.field_size_limit(100)
    try:
        first, second, third = records(file)
    finally:
        csv.field_size_limit(before)
    assert first.place == f"{file}:2" and first.fields == {"text": "a\nb", "label": "0"}
    assert second.fields is None and "not valid CSV" in str(second.fault)
    assert third.fields == {"text": "c", "label": "2"}


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    file, both = tmp_path / "a.jsonl", tmp_path / "both"
    file.write_bytes(lines())
    (tmp_path / "x.pdf").write_bytes(b"")
    both.mkdir()
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "empty").mkdir()
    for inputs, message in (
        ([], "no input files were given"),
        (["no.jsonl"], r"no\.jsonl: there is no such file; check the path"),
        (["no*.jsonl"], r"no\*\.jsonl: matches no file; check the pattern"),
        (["x.pdf"], r"x\.pdf: the format is told by the name.*\.jsonl"),
        (["a.jsonl", "*.jsonl"], r"a\.jsonl: is named twice"),
        (["both"], "both: holds several splits; name the folder of one"),
        (["empty"], "empty: a folder without input files"),
    ):
        with pytest.raises(RowError, match=message):
            find_sources([tmp_path / name for name in inputs])


# --- faults ---------------------------------------------------------------------------------------


def test_a_faulty_line_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"id": 1}\n'
    path.write_bytes(good + b"{oops\n\n" + b"\xff\n" + b"[" * 99999 + b"\n3\n" + good + b"3")
    found = records(path)
    assert [r.fields for r in found] == [{"id": 1}, None, None, None, None, {"id": 1}, None]
    assert [r.place for r in found] == [f"{path}:{n}" for n in (1, 2, *range(4, 9))]
    faults = [str(r.fault) for r in found if r.fields is None]
    assert all(r.fault is None or r.fault.startswith(r.place) for r in found)
    wanted = ("not valid JSON", "not UTF-8", "not valid JSON", "found 3", "found 3")
    assert all(part in fault for part, fault in zip(wanted, faults, strict=True))


def test_a_faulty_csv_line_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,a\n2\n3,b,c\n\n4,"x\ny"\n5,\xff\n')
    found = records(path)
    assert [r.fields for r in found] == [
        {"id": "1", "text": "a"},
        None,
        None,
        {"id": "4", "text": "x\ny"},
        {"id": "5", "text": "\udcff"},
    ]
    assert found[1].fault == (
        f"{path}:3: 1 values, but the header names 2 columns; quote values with separators"
    )


@pytest.mark.parametrize("header", [b"id,,text\n", b"id,id\n", b""])
def test_a_csv_header_names_every_column_once(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(header)
    with pytest.raises(RowError, match=r"a\.csv: the first line must name every column once; it"):
        schema_of(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather", "a.jsonl.gz", "a.jsonl.zst"])
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    """Whole files of another kind, and files that break off."""
    path = tmp_path / name
    path.write_bytes(b"this is not what the name says, whatever it may be")
    with pytest.raises(RowError, match=rf"{name}: cannot be read .*; check the file"):
        records(path)
    WRITERS[name](path)
    path.write_bytes(path.read_bytes()[:-20])
    for use in (records, lambda p: count_records(find_sources([p])[0])):
        with pytest.raises(RowError, match=rf"{name}: cannot be read"):
            use(path)


# --- rows of anything -----------------------------------------------------------------------------

FORM = RowFormat(COLUMNS, NAMES, "SEQ_CLS")
EXPECTED = [(str(i), row["sentence"], i % 3) for i, row in enumerate(DATA)]


def told(rows: list[Row]) -> list[tuple[str, str | None, int | None]]:
    return [(row.id, row.text, row.label) for row in rows]


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_rows_in_memory(kind: str) -> None:
    rows = read_rows(IN_MEMORY[kind](), FORM)
    assert told(rows) == EXPECTED
    assert [row.source for row in rows] == [f"row {i}" for i in range(9)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("as_path", [str, Path])
def test_rows_of_files(tmp_path: Path, name: str, as_path: Callable[[Path], Any]) -> None:
    path = written(tmp_path / name)
    rows = read_rows(as_path(path), FORM, limit=5)
    assert told(rows) == EXPECTED[:5]
    assert all(row.source.startswith(f"{path}:") for row in rows)


def test_several_files_folders_and_patterns(tmp_path: Path) -> None:
    both = [written(tmp_path / name) for name in ("a.csv", "b.parquet")]
    for data in (both, tmp_path, str(tmp_path / "*")):
        rows = read_rows(data, FORM)
        assert [row.text for row in rows] == 2 * [row["sentence"] for row in DATA]
        assert [row.id for row in rows] == [str(i) for i in range(18)]


def test_strings_are_texts_or_prompts() -> None:
    texts = ["book a table", "see notes.csv, please"]
    assert [row.text for row in read_rows(texts)] == texts
    prompts = read_rows(texts, RowFormat(labels=["yes", "no"], task="CAUSAL_LM"))
    assert [(row.prompt, row.choices) for row in prompts] == [(t, ("yes", "no")) for t in texts]
    with pytest.raises(RowError, match=r"row 0: no column 'choices'.* the same by labels"):
        read_rows(texts, RowFormat(task="CAUSAL_LM"))


def test_rows_by_hand_pass_through() -> None:
    rows = [Row("1", text="a"), Row("2", text="b")]
    assert read_rows(iter(rows), FORM) == rows


def test_rows_are_read_when_they_are_asked_for() -> None:
    def stream() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise AssertionError("read ahead")

    assert next(iter_records(stream(), FORM)) == Record("row 0", {"text": "a"})


def test_json_lists_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('[{"text": "a"}, 3]')
    with pytest.raises(RowError, match=r"list\.json:2: expected a JSON object"):
        read_rows(tmp_path / "list.json")
    (tmp_path / "list.json").write_text('[{"text": "a"}')
    with pytest.raises(RowError, match=r"list\.json: not a JSON list .*; write one object a line"):
        read_rows(tmp_path / "list.json")


def test_ids_that_stand_twice() -> None:
    with pytest.raises(RowError, match="row 1: the id 'x' was already used at row 0; give every"):
        read_rows([{"id": "x", "text": "a"}, {"id": "x", "text": "b"}])


def test_classes_of_a_dataset_are_mapped_by_name(tmp_path: Path) -> None:
    """Its indices count its own names, which need not stand in the model's order."""
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["good", "bad", "fair"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    rows = {"text": ["x", "y", "z"], "label": [0, 1, None]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(tmp_path / "saved")
    files = (tmp_path / "rows.parquet", tmp_path / "saved")
    for given in (data, data.to_iterable_dataset(), data.with_format("numpy"), *files):
        named = read_rows(given, RowFormat(labels=NAMES, task="SEQ_CLS"))
        assert [row.label for row in named] == [2, 0, None]
        assert [row.label for row in read_rows(given)] == [0, 1, None]
    with pytest.raises(RowError, match=r"'good' is none of the 3 classes \['a', 'b', 'c'\]"):
        read_rows(data, RowFormat(labels=["a", "b", "c"], task="SEQ_CLS"))


def test_tables_that_are_none() -> None:
    pandas = pytest.importorskip("pandas", "2.2")
    assert [r.text for r in read_rows(pandas.Series(["a", "b"]))] == ["a", "b"]
    mixed = pandas.DataFrame({"text": ["a", 1]})
    with pytest.raises(TypeError, match="Conversion failed for column text"):
        read_rows(mixed)
    with pytest.raises(RowError, match="the DataFrame: no column 'gld'; there are 'sentence'"):
        read_rows(as_pandas(), RowFormat({"text": "sentence", "label": "gld"}))
