"""Every format gives the same rows, from files and from Python; every fault has its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import datetime, time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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


def write_stream(path: Path, table: pa.Table | None = None) -> None:
    table = pa.Table.from_pylist(ROWS) if table is None else table
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


@pytest.mark.parametrize("name", ["", " ", "\t"])
def test_an_input_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(RowError, match="an input has no name; name a file, a folder or a pattern"):
        find_sources([name])


@pytest.mark.parametrize(
    "name", ["a\0b.jsonl", "a\0/*.jsonl", "\ud800.jsonl", "x" * 300, "[*" * 99]
)
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(RowError, match=r"there is no such file|matches no file|cannot be read"):
        find_sources([f"{tmp_path}/{name}"])


def test_a_pattern_goes_round_no_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two links to where they stand would be 2^40 ways to one file."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "rows.jsonl").write_bytes(lines())
    for name in ("up", "round"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "a")
    (tmp_path / "to").symlink_to("to")
    wanted = [Path("a/b/rows.jsonl")]
    monkeypatch.chdir(tmp_path)
    for pattern in ("**/*.jsonl", "**/**/b/**/*.jsonl", "a/*/rows.jsonl", "*/b/*"):
        assert find_sources([pattern]) == wanted
        assert find_sources([tmp_path / pattern]) == [tmp_path / path for path in wanted]
    assert find_sources(["to/../a/u*/b/rows.jsonl", "[a]/b"][1:]) == wanted


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe gives its rows once, a device has no end, a link to nothing would lose them."""
    for name, make in (
        ("gone.jsonl", lambda path: path.symlink_to("nothing.jsonl")),
        ("round.jsonl", lambda path: path.symlink_to("round.jsonl")),
        ("pipe.jsonl", os.mkfifo),
        ("zero.jsonl", lambda path: path.symlink_to("/dev/zero")),
    ):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(lines())
        make(folder / name)
        for path in (folder, folder / "*.jsonl", tmp_path / "**" / "*.jsonl"):
            with pytest.raises(RowError, match=r"l: is no regular file, or a link to none"):
                find_sources([path])
        with pytest.raises(RowError, match=rf"{name}: (is no regular|there is no such) file"):
            find_sources([folder / name])


@pytest.mark.parametrize("name", ["../a.arrow", "/a.arrow", "sub/a.arrow", "..", "", 3, None])
def test_a_saved_dataset_names_its_own_files(tmp_path: Path, name: Any) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(RowError, match=r"state\.json|is no regular file|the format is told by"):
        find_sources([tmp_path])


def test_deep_json_beside_rows(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("[" * 100_000)
    with pytest.raises(RowError, match=r"its state\.json is no saved Dataset's"):
        find_sources([tmp_path])
    table = pa.Table.from_pylist(ROWS)
    for value in (b"[" * 100_000, b"{", b"\xff"):
        pq.write_table(
            table.replace_schema_metadata({"huggingface": value}), tmp_path / "a.parquet"
        )
        for use in (schema_of, lambda path: list(read(path))):
            with pytest.raises(RowError, match=r"a\.parquet: cannot be read \(its metadata"):
                use(tmp_path / "a.parquet")


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


def test_a_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    good = {"text": "a", "more": {"a": 1, "b": 1}}
    bad = '{"text": "a", "text": "b"}', '{"text": "a", "more": [{"a": 1, "b": {}, "a": 2}]}'
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(good), *bad, json.dumps(good)]))
    found = records(tmp_path / "a.jsonl")
    assert [r.fields for r in found] == [good, None, None, good]
    for record, key in zip(found[1:3], ["text", "a"], strict=True):
        fault = f"{record.place}: not valid JSON (the key {key!r} stands twice)"
        assert str(record.fault).startswith(fault)
    (tmp_path / "b.json").write_text(f"[{json.dumps(good)},\n{bad[0]}]")
    with pytest.raises(RowError, match=r"b\.json: .*the key 'text' stands twice"):
        records(tmp_path / "b.json")


def csv_file(path: Path, *rows: str, end: str = "\n") -> Path:
    path.write_bytes(end.join(["id,text", *rows, ""]).encode())
    return path


def test_a_faulty_csv_line_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'id,text\n1,a\n2\n3,b,c\n\n4,"x\ny"\n5,\xff\n"6\n",\0,"\n\n"\n7,"5"" ""pipe"""\n8,5" pipe'
    )
    found = records(path)
    assert [r.fields for r in found] == [
        {"id": "1", "text": "a"},
        None,
        None,
        {"id": "4", "text": "x\ny"},
        {"id": "5", "text": "\udcff"},
        None,
        {"id": "7", "text": '5" "pipe"'},
        {"id": "8", "text": '5" pipe'},
    ]
    assert [int(r.place.split(":")[-1]) for r in found] == [2, 3, 4, 6, 8, 9, 13, 14]
    for number, what in ((1, "3: 1 values"), (5, "9: 3 values in lines 9 to 12")):
        fault = "but the header has 2 columns; quote values with separators"
        assert found[number].fault == f"{path}:{what}, {fault}"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bad", ['"never closed', '"closed" too early', '"a,b"" c', '"a"b"'])
@pytest.mark.parametrize("at", [0, 1, 6, 9])
def test_a_broken_quote_costs_one_row(tmp_path: Path, end: str, bad: str, at: int) -> None:
    rows = [f"{n},say {n}" for n in range(8)] + [f'8,"a,""b"",{end}c"', '9,"d"']
    before = records_once(csv_file(tmp_path / "a.csv", *rows, end=end))
    rows[at] = f"{at},{bad}"
    found = records(csv_file(tmp_path / "a.csv", *rows, end=end))
    assert found[:at] + found[at + 1 :] == before[:at] + before[at + 1 :] and len(found) == 10
    fault = f"{before[at].place}: not valid CSV, a quote is misplaced or never closed"
    assert found[at].fields is None and str(found[at].fault).startswith(fault)
    remedy = "quote the value whole, and write quotes inside it twice, not with a backslash"
    assert str(found[at].fault).endswith(remedy)
    for name, codec in (("a.csv.gz", "gzip"), ("a.csv.zst", "zstd")):
        compressed(codec, (tmp_path / "a.csv").read_bytes())(tmp_path / name)
        assert [r.fields for r in read(tmp_path / name)] == [r.fields for r in found]


def test_quotes_in_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(BOM + b'"id"\t"the\r\ntext"\r\n"1"\t"a\r""\t\n"\r\n')
    (record,) = records(path)
    assert record == Record(f"{path}:3", {"id": "1", "the\r\ntext": 'a\r"\t\n'})
    for header in (b'id,"text\n1,a\n', b'"id"x,text\n', b'"', b'id,"text'):
        (tmp_path / "b.csv").write_bytes(header)
        for use in (schema_of, count_records, lambda path: list(read(path))):
            with pytest.raises(RowError, match=r"b\.csv:1: the header cannot be read: .* a quote"):
                use(tmp_path / "b.csv")


def test_many_broken_quotes_take_no_quadratic_time(tmp_path: Path) -> None:
    """Each line opens a quote if none is open, and goes on in quotes if one is."""
    found = records_once(csv_file(tmp_path / "a.csv", *['a","b'] * 10_000))
    assert len(found) == 10_000 and all(r.fields is None for r in found)


def records_once(path: Path) -> list[Record]:
    found = list(read(path))
    assert count_records(path) == len(found)
    return found


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PIECES = st.sampled_from(['"', ",", "\n", "\r\n", '""', '","', "é", "word", " "])
ODD_TEXT = st.lists(PIECES, max_size=6).map("".join)


@settings(max_examples=50)
@given(st.lists(st.tuples(ANY_TEXT, ODD_TEXT)), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_what_csv_writes_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], quoting: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=quoting).writerows([("id", "text"), *rows])
    assert [r.fields for r in records_once(path)] == [{"id": a, "text": b} for a, b in rows]


@settings(max_examples=60)
@given(st.lists(ODD_TEXT.map("t".__add__), min_size=1, max_size=9), st.data())
def test_a_stray_quote_leaves_the_other_rows(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: st.DataObject
) -> None:
    """Of rows whose values begin with a letter: nothing tells an odd quote from one that closes."""
    written = []
    for number, text in enumerate(texts):
        out = io.StringIO()
        csv.writer(out).writerow([number, text])
        written.append(out.getvalue())
    path = tmp_path_factory.getbasetemp() / "damaged.csv"
    path.write_text("id,text\r\n" + "".join(written), newline="")
    before = records_once(path)
    at = data.draw(st.integers(0, len(texts) - 1))
    row = written[at]
    if row.count("\n") > 1:
        return
    cut = data.draw(st.integers(0, len(row) - 2))
    written[at] = row[:cut] + '"' + row[cut:]
    path.write_text("id,text\r\n" + "".join(written), newline="")
    found = records_once(path)
    assert found[:at] + found[at + 1 :] == before[:at] + before[at + 1 :]
    assert len(found) == len(before)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".json"])
def test_a_line_that_is_too_long_is_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, end: str
) -> None:
    """Wherever its end falls in what is read at a time."""
    monkeypatch.setattr(readers, "LONGEST_LINE", 40)
    end = "\n" if "json" in kind and end == "\r" else end
    row = '{{"id":"{}"}}' if "json" in kind else "{}"
    for size in (*range(30, 43), *range(77, 84)):
        ids = ["a", "x" * size, "b", "x" * size]
        head = [] if "json" in kind else ["id"]
        path = tmp_path / f"{size}{kind}"
        path.write_text(end.join([*head, *map(row.format, ids)]), newline="")
        found, first = records_once(path), len(head) + 1
        held = [i if len(row.format(i) + end * (n < 3)) <= 40 else None for n, i in enumerate(ids)]
        assert [r.fields and r.fields["id"] for r in found] == held
        assert [r.place for r in found] == [f"{path}:{n + first}" for n in range(4)]
        assert all("longer than" in str(r.fault) for r in found if r.fields is None)


def test_a_quoted_value_is_bounded_as_a_line_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 500)
    rows = ['0,"never', *[f"{n},good" for n in range(1, 50)], f'50,"{"x" * 501}', "51,good"]
    found = records(csv_file(tmp_path / "a.csv", *rows))
    assert [r.fields and r.fields["id"] for r in found] == [
        str(n) if n % 50 else None for n in range(52)
    ]
    assert "a quote is misplaced or never closed" in str(found[0].fault)
    assert "longer than" in str(found[50].fault)


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".jsonl.gz"])
def test_a_long_line_is_never_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 1 << 16)
    path = tmp_path / f"a{kind}"
    with gzip.open(path, "wb", 1) if "gz" in kind else path.open("wb") as file:
        file.write(b"id,text\n" + b"x" * (1 << 23) + b"\n")
    tracemalloc.start()
    try:
        found = list(read(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 1 + ("json" in kind) and peak < 1 << 20


def test_a_json_list_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    for text in (json.dumps(ROWS), json.dumps(ROWS, indent=2)):
        path.write_text(text)
        monkeypatch.setattr(readers, "LONGEST_LIST", len(path.read_bytes()))
        assert [r.fields for r in records(path)] == ROWS
        monkeypatch.setattr(readers, "LONGEST_LIST", len(path.read_bytes()) - 1)
        with pytest.raises(
            RowError, match=r"a\.json: a JSON list of more than .* one object a line"
        ):
            list(read(path))


@pytest.mark.parametrize(
    "text", ["[", "[1", "[1,", "[1,]", "[,]", "[]]", "[1][", "[1 2]", "[[]}", "[\xa0]"]
)
def test_what_is_no_json_list_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(RowError, match=r"a\.json: not a JSON list .*; write one object a line"):
        list(read(tmp_path / "a.json"))


@pytest.mark.parametrize("header", [b",,\n", b"id,,id\n", b'""\n', b""])
def test_a_csv_header_names_columns_once(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(header)
    with pytest.raises(RowError, match=r"a\.csv: the first line must name the columns, each once"):
        schema_of(path)


@pytest.mark.parametrize("text", [",id,text\n0,a,x\n1,b\n", '"id","","text",\na,0,x,1\nb,1,y\n'])
def test_csv_columns_without_a_name_are_ignored(tmp_path: Path, text: str) -> None:
    """The index that pandas and R write, and the comma at the end that spreadsheets do."""
    (tmp_path / "a.csv").write_text(text)
    good, bad = records(tmp_path / "a.csv")
    assert good.fields == {"id": "a", "text": "x"}
    assert f"{len(text.split()[0].split(','))} columns" in str(bad.fault)
    schema = schema_of(tmp_path / "a.csv")
    assert schema is not None and schema.names == ["id", "text"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_a_csv_that_is_not_utf8_is_told_so(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_text("id,text,maß\na,b,c\n", encoding=encoding)
    with pytest.raises(RowError, match=r"a\.csv: is not UTF-8; save it as UTF-8$"):
        read_rows(tmp_path / "a.csv")


def test_a_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_bytes(lines())
    with pytest.raises(RowError, match=r"\\udcff\.jsonl': its name is not UTF-8; rename it"):
        read_rows(tmp_path)


BROKEN = ["a.parquet", "a.arrow", "a.feather"]
BROKEN += ["a.jsonl.gz", "a.jsonl.zst", "a.json.bz2", "a.jsonl.lz4", "a.csv.zst"]


@pytest.mark.parametrize("name", BROKEN)
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


def bad_values() -> pa.Table:
    """Row 1 has text that is not UTF-8, row 2 a time after the year 9999; row 3 both."""
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in range(6)))
    text = pa.Array.from_buffers(pa.string(), 5, [None, offsets, pa.py_buffer(b"a\xffb\xffc")])
    when = pa.array([0, 0, 2**62, 2**62, 0], pa.timestamp("us"))
    return pa.table({"text": text, "when": when, "nano": pa.array(range(5), pa.timestamp("ns"))})


@pytest.mark.parametrize("block", [2, 1024])
def test_values_that_are_none_of_python_are_faults_of_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(readers, "BLOCK", block)
    table = bad_values()
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
    for name, new in (("a.arrow", pa.ipc.new_stream), ("a.feather", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / name), "wb") as file, new(file, table.schema) as out:
            out.write_table(table)
    for name in ("a.parquet", "a.arrow", "a.feather"):
        path = tmp_path / name
        both, texts = records(path, columns=["text", "when"]), records(path, columns=["text"])
        epoch = datetime(1970, 1, 1)
        assert [r.fields for r in both] == [
            {"text": "a", "when": epoch},
            None,
            None,
            None,
            {"text": "c", "when": epoch},
        ]
        assert [r.fields and r.fields["text"] for r in texts] == ["a", None, "b", None, "c"]
        for record in both[1:4]:
            assert str(record.fault).startswith(f"{record.place}: a value cannot be read (")
        with pytest.raises(RowError, match=rf"{name}:2: a value cannot be read .*; correct it"):
            read_rows(path)  # the times are no columns of ours
    with pytest.raises(RowError, match="row 1: a value cannot be read"):
        read_rows(table)
    assert [r.text for r in read_rows(table.take([0, 2, 4]))] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_nanoseconds_of_a_time_are_not_lost(tmp_path: Path, name: str) -> None:
    times = pa.table({"at": pa.array([1000, 1001, None], pa.time64("ns"))})
    write_stream(tmp_path / name, times) if "arrow" in name else pq.write_table(
        times, tmp_path / name
    )
    good, bad, none = records(tmp_path / name)
    assert good.fields == {"at": time(microsecond=1)} and none.fields == {"at": None}
    assert str(bad.fault).startswith(f"{bad.place}: a value cannot be read (") and not bad.fields


def test_large_blocks_are_made_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_LIST", 100)
    for name in ("a.parquet", "a.arrow", "a.feather"):
        WRITERS[name](tmp_path / name)
        assert [r.fields for r in records(tmp_path / name)] == ROWS


def test_columns_that_stand_twice_are_named(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", "2.2")
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, ["text", "more", "more"])
    pq.write_table(table, tmp_path / "a.parquet")
    write_stream(tmp_path / "a.arrow", table)
    frame = pandas.DataFrame([["a", 1, 2]], columns=table.column_names)
    given = {"a.parquet": tmp_path / "a.parquet", "a.arrow": tmp_path / "a.arrow"}
    for name, data in {**given, "the Table": table, "the DataFrame": frame}.items():
        with pytest.raises(RowError, match=f"{name}: the column 'more' stands twice; give every"):
            read_rows(data)


def test_rows_that_are_missing_are_no_end(tmp_path: Path) -> None:
    """A Parquet file that declares more rows than it holds."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"] * 100}), path, version="1.0", compression="none")
    data = path.read_bytes()
    footer = data.rindex(b"text")  # the schema, then num_rows as a zigzag varint
    path.write_bytes(data[:footer] + data[footer:].replace(b"\xc8\x01", b"\xca\x01"))
    for use in (count_records, lambda path: list(read(path))):
        with pytest.raises(RowError, match=r"a\.parquet: cannot be read"):
            use(path)


def test_a_damaged_page_is_found_before_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, use_dictionary=False)
    page = pq.read_metadata(path).row_group(0).column(1).data_page_offset
    data = path.read_bytes()
    path.write_bytes(data[:page] + b"\xff" * 12 + data[page + 12 :])
    assert len(list(read(path, ["id"]))) == len(ROWS)
    with pytest.raises(RowError, match=r"a\.parquet: cannot be read"):
        count_records(path)


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
    for source in (data, data.to_iterable_dataset(), data.with_format("numpy"), *files):
        named = read_rows(source, RowFormat(labels=NAMES, task="SEQ_CLS"))
        assert [row.label for row in named] == [2, 0, None]
        assert [row.label for row in read_rows(source)] == [0, 1, None]
    with pytest.raises(RowError, match=r"'good' is none of the 3 classes \['a', 'b', 'c'\]"):
        read_rows(data, RowFormat(labels=["a", "b", "c"], task="SEQ_CLS"))


def test_tables_that_are_none() -> None:
    pandas = pytest.importorskip("pandas", "2.2")
    assert [r.text for r in read_rows(pandas.Series(["a", "b"]))] == ["a", "b"]
    mixed = pandas.DataFrame({"text": ["a", "b", 1], "more": ["x", 2, None]})
    assert [r.text for r in read_rows(mixed, limit=2)] == ["a", "b"]
    with pytest.raises(RowError, match="row 2: 'text' is 1; make it a string"):
        read_rows(mixed)
    half = pandas.DataFrame({"text": pandas.Series(["a", "\ud800", "b"], dtype=object)})
    found = [
        r.fields and r.fields["text"]
        for r in iter_records(half, RowFormat())
        if isinstance(r, Record)
    ]
    assert found == ["a", None, "b"]
    named = pandas.DataFrame({"text": ["a"]}, index=pandas.Index(["x"], name="id"))
    assert [(r.id, r.text) for r in read_rows(named)] == [("x", "a")]
    with pytest.raises(RowError, match="the DataFrame: no column 'gld'; there are 'sentence'"):
        read_rows(as_pandas(), RowFormat({"text": "sentence", "label": "gld"}))
