"""Files, tables and lists as one stream of rows, never a whole file in memory.

Formats by name: JSONL (.jsonl .ndjson .json, also one JSON list), CSV (.csv .tsv, with a header;
every value is text), Parquet (.parquet .pq), Arrow (.arrow .feather, and folders of datasets'
``save_to_disk``). .gz .zst .bz2 .lz4 behind the name of a text file say how it is compressed.
A row that cannot be read is a record with a fault, not an end.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from tfb.data.rows import ClassIndex, Row, RowError, RowFormat, decode_object, json_object

KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
}
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
TEXT = ("jsonl", "csv")  # kinds that are read line by line
BLOCK = 1024  # rows of a table that are turned into Python objects at a time
_MAGIC = {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"\x1f\x8b": "compressed by gzip"}
csv.field_size_limit(1 << 26)  # the default, 128 KiB, is less than a long prompt

Lines = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
"""Of each record of a text file its place, and what parses it or raises RowError."""
Chunks = Iterator[tuple[int, Callable[[list[str]], Iterable[pa.RecordBatch]]]]
"""Of each part of a columnar file its number of records, and what reads columns of it."""


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        path: where it is.
        kind: one of the values of ``KINDS``.
        codec: one of the values of ``CODECS``, for a text file that is compressed.
    """

    path: Path
    kind: str
    codec: str | None = None

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Record:
    """One row as it was read, before anything is known of its columns.

    Attributes:
        place: where it stands, "rows.jsonl:12".
        fields: values by column name; None where they could not be read.
        fault: why they could not.
    """

    place: str
    fields: dict[str, Any] | None
    fault: str | None = None


# --- rows of anything that holds them -------------------------------------------------------------


def read_rows(data: Any, form: RowFormat | None = None, *, limit: int | None = None) -> list[Row]:
    """Return all rows of ``data`` as :func:`iter_rows` reads them.

    Raises:
        RowError: there are none, or an id stands twice.
    """
    rows, places = list(iter_rows(data, form, limit=limit)), dict[str, str]()
    for row in rows:
        if row.id in places:
            raise RowError(
                f"{row.source}: the id {row.id!r} was already used at {places[row.id]}; give every "
                "row an id of its own, or none"
            )
        places[row.id] = row.source
    if not rows:
        where = data if isinstance(data, str | os.PathLike) else "the input"
        raise RowError(f"{where}: holds no rows; add some")
    return rows


def iter_rows(
    data: Any, form: RowFormat | None = None, *, limit: int | None = None
) -> Iterator[Row]:
    """Stream the rows of anything that holds rows, in order.

    Args:
        data: a path, folder or pattern, or several as ``pathlib.Path``; a DataFrame of pandas or
            polars or a pyarrow table; or an iterable, such as a ``datasets.Dataset``, of dicts,
            strings (texts, or prompts where the task is a language model's) or :class:`Row`.
        form: names of columns and classes, and the task; None: our names, rows of any task.
        limit: stop after that many rows.

    Raises:
        RowError: a file that cannot be read, a table without a column of its rows, or a row that
            cannot be used.
        TypeError: data that holds no rows.
        ValueError: ``limit`` below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out to read every row")
    form = RowFormat() if form is None else form
    return _rows(islice(iter_records(data, form), limit), form)


def _rows(records: Iterable[Record | Row], form: RowFormat) -> Iterator[Row]:
    for number, record in enumerate(records):
        if isinstance(record, Row):
            yield record
        elif record.fields is None:
            raise RowError(str(record.fault))
        else:
            yield form.row(record.fields, record.place, number)


def iter_records(data: Any, form: RowFormat) -> Iterator[Record | Row]:
    """Stream the records of anything that holds rows, before they are checked; rows as they are.

    Args:
        data: as for :func:`iter_rows`.
        form: names of columns, and the task.

    Raises:
        RowError: a file that cannot be read, or a table without a column of its rows.
        TypeError: data that holds no rows.
    """
    return _as_records(_items(data, form), form)


def _as_records(items: Iterator[Any], form: RowFormat) -> Iterator[Record | Row]:
    name = "prompt" if form.task not in (None, "SEQ_CLS") else "text"
    for number, item in enumerate(items):
        place = f"row {number}"
        if isinstance(item, Record | Row):
            yield item
        elif isinstance(item, Mapping):
            yield Record(place, dict(item))
        elif isinstance(item, str):
            yield Record(place, {form.names[name]: item})
        else:
            raise TypeError(
                f"{place}: expected a dict, a string or a Row, got {type(item).__name__}; "
                "write [{'text': ..., 'label': ...}, ...]"
            )


def _items(data: Any, form: RowFormat) -> Iterator[Any]:
    """Stream the records of files, the rows of tables, and the elements of anything else."""
    if isinstance(data, str | os.PathLike):
        return _file_records([data], form)
    if isinstance(data, Mapping):
        raise _holds_no_rows(data, " (of a dict of splits one, such as data['test'])")
    if hasattr(data, "with_format"):  # a Dataset
        if data.column_names is not None:  # known, of one that streams
            form.check(data.column_names, "the Dataset")
        features = data.features.to_dict() if data.features else {}
        return _with_classes(data.with_format(None), features)
    if hasattr(data, "to_list") and not hasattr(data, "columns"):
        return iter(data.to_list())  # a column of a DataFrame: texts
    if hasattr(data, "__arrow_c_stream__"):
        return _table_rows(data, form)
    if hasattr(data, "iloc") or not isinstance(data, Iterable):
        raise _holds_no_rows(data)
    return _elements(data, form)


def _holds_no_rows(data: Any, more: str = "") -> TypeError:
    return TypeError(
        f"{type(data).__name__} holds no rows; give a path, a DataFrame (pandas 2.2 or newer), "
        f"a Dataset, or a list of dicts{more}"
    )


def _elements(data: Iterable[Any], form: RowFormat) -> Iterator[Any]:
    """Stream the elements of an iterable, or the records of the files that they name."""
    stream = iter(data)
    first = list(islice(stream, 1))
    if first and isinstance(first[0], os.PathLike):
        return _file_records([*first, *stream], form)
    if first and isinstance(first[0], str) and _is_file_name(first[0]):
        raise TypeError(
            f"a list of strings is a list of texts, but {first[0]!r} looks like a file; give it "
            "alone, or several as pathlib.Path"
        )
    return chain(first, stream)


def _is_file_name(text: str) -> bool:
    return Path(text).suffix.lower() in KINDS and not any(map(str.isspace, text))


def _file_records(paths: Sequence[str | os.PathLike[str]], form: RowFormat) -> Iterator[Record]:
    """Stream the records of files, whose columns are checked where they are declared."""
    sources = find_sources(paths)
    for source in sources:
        if (schema := schema_of(source)) is not None:
            form.check(schema.names, str(source))
    return chain.from_iterable(map(read, sources))


def _table_rows(data: Any, form: RowFormat) -> Iterator[dict[str, Any]]:
    """Stream the rows of a DataFrame or table in memory, by Arrow's stream interface."""
    kind = type(data).__name__
    try:
        batches = pa.RecordBatchReader.from_stream(data)
    except pa.ArrowException as error:
        raise TypeError(f"{kind}: is no table of one type a column ({error}); mend it") from error
    form.check(batches.schema.names, f"the {kind}")
    wanted = [name for name in batches.schema.names if name in form.names.values()]
    return chain.from_iterable(_fields(batch.select(wanted)) for batch in batches)


def _fields(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    for start in range(0, batch.num_rows, BLOCK):
        yield from batch.slice(start, BLOCK).to_pylist()


def _with_classes(
    rows: Iterable[dict[str, Any]], features: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Tell class labels their names; ``features``: of datasets, by column."""
    classes = {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"
    }
    for fields in rows:
        for column, names in classes.items():
            index = fields.get(column)
            if isinstance(index, int) and 0 <= index < len(names):
                fields = {**fields, column: ClassIndex(index, names[index])}
        yield fields


# --- finding files --------------------------------------------------------------------------------


def find_sources(inputs: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Return the files behind paths, folders and patterns, in order.

    A folder stands for the files in it, a pattern (``data/*.parquet``) for what it matches, both
    sorted.

    Raises:
        RowError: nothing there, a name whose format is unknown, or a file that is named twice.
    """
    if not inputs:
        raise RowError("no input files were given; name at least one")
    found = [source for name in inputs for source in _named(os.fspath(name))]
    seen: set[Path] = set()
    for source in found:
        real = source.path.resolve()
        if real in seen:
            raise RowError(f"{source}: is named twice; name every input once")
        seen.add(real)
    return found


def _named(name: str) -> list[Source]:
    if Path(name).exists():
        paths = [name]
    elif glob.has_magic(name):
        paths = sorted(glob.glob(name, recursive=True))
        if not paths:
            raise RowError(f"{name}: matches no file; check the pattern")
    else:
        raise RowError(f"{name}: there is no such file; check the path")
    found: list[Source] = []
    for path in map(Path, paths):
        found += _in_folder(path) if path.is_dir() else [_source(path)]
    return found


def _source(path: Path) -> Source:
    kind, codec = _format(path)
    if kind is None or (codec and kind not in TEXT):
        raise RowError(
            f"{path}: the format is told by the name, and this one is not known; expected "
            f"{' '.join(KINDS)}, the text formats also with {' '.join(CODECS)}"
        )
    return Source(path, kind, codec)


def _format(path: Path) -> tuple[str | None, str | None]:
    codec = CODECS.get(path.suffix.lower())
    return KINDS.get((path.with_suffix("") if codec else path).suffix.lower()), codec


def _in_folder(folder: Path) -> list[Source]:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir()))
        raise RowError(f"{folder}: holds several splits; name the folder of one ({splits})")
    if (folder / "state.json").is_file():
        return _saved_dataset(folder)
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith((".", "_")))
    known = [_source(path) for path in files if _format(path)[0]]
    if not known:
        raise RowError(f"{folder}: a folder without input files; name the files")
    return known


def _saved_dataset(folder: Path) -> list[Source]:
    """List what ``Dataset.save_to_disk`` wrote; other Arrow files beside it may be caches."""
    try:
        files = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        return [Source(folder / file["filename"], "arrow") for file in files]
    except (ValueError, KeyError, TypeError) as error:
        raise RowError(f"{folder}: its state.json is no saved Dataset's; save it again") from error


# --- reading one file -----------------------------------------------------------------------------


def schema_of(source: Source) -> pa.Schema | None:
    """Return the columns of a file: text for CSV, None for JSONL, where each row has its own.

    Raises:
        RowError: a file that cannot be read, or a CSV header with an empty or repeated name.
    """
    if source.kind == "jsonl":
        return None
    with _readable(source):
        if source.kind == "csv":
            with _csv(source) as (_, names):
                return pa.schema([(name, pa.string()) for name in names])
        with _table(source) as (schema, _):
            return schema


def count_records(source: Source) -> int:
    """Return how many records :func:`read` yields, from metadata or without parsing them.

    Raises:
        RowError: a file that cannot be read to its end.
    """
    with _readable(source):
        if source.kind in TEXT:
            return sum(1 for _ in _lines(source))
        with _table(source) as (_, chunks):
            return sum(rows for rows, _ in chunks)


def read(
    source: Source, columns: Sequence[str] | None = None, *, start: int = 0
) -> Iterator[Record]:
    """Stream the records of a file; one that cannot be read has a fault.

    Args:
        source: the file.
        columns: read only these from a columnar file; None: all.
        start: number of the first record, from 0; those before it are skipped unparsed.

    Raises:
        RowError: a file that cannot be read at all, or breaks off.
    """
    with _readable(source):
        if source.kind not in TEXT:
            yield from _read_table(source, columns, start)
            return
        for place, parse in islice(_lines(source), start, None):
            try:
                yield Record(place, parse())
            except RowError as error:
                yield Record(place, None, str(error))


def _read_table(source: Source, columns: Sequence[str] | None, start: int) -> Iterator[Record]:
    with _table(source) as (schema, chunks):
        names = [name for name in schema.names if columns is None or name in columns]
        features, number = _features(schema), 0
        for rows, load in chunks:
            if number + rows <= start:
                number += rows
                continue
            for batch in load(names):
                here = batch.slice(min(max(0, start - number), batch.num_rows))
                number += batch.num_rows
                first = number - here.num_rows + 1
                for i, fields in enumerate(_with_classes(_fields(here), features), first):
                    yield Record(f"{source}:{i}", fields)


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    """Return the features that datasets left in the metadata of a Parquet or Arrow file."""
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return {}


@contextmanager
def _table(source: Source) -> Iterator[tuple[pa.Schema, Chunks]]:
    """Open a columnar file, mapped into memory."""
    if source.kind == "parquet":
        with pq.ParquetFile(source.path, memory_map=True) as file:
            groups = range(file.num_row_groups)
            rows = [file.metadata.row_group(group).num_rows for group in groups]
            loads = [partial(file.iter_batches, BLOCK, [group]) for group in groups]
            yield file.schema_arrow, zip(rows, loads, strict=True)
        return
    with pa.memory_map(str(source.path)) as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            reader = pa.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            reader = batches = pa.ipc.open_stream(file)
        yield reader.schema, ((batch.num_rows, partial(_selected, batch)) for batch in batches)


def _selected(batch: pa.RecordBatch, names: list[str]) -> Iterable[pa.RecordBatch]:
    return [batch.select(names)]


def _lines(source: Source) -> Lines:
    return _jsonl_lines(source) if source.kind == "jsonl" else _csv_lines(source)


def _jsonl_lines(source: Source) -> Lines:
    with _open(source) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
                if found := next((n for m, n in _MAGIC.items() if line.startswith(m)), None):
                    raise RowError(f"{source}: is {found}, which its name does not say; rename it")
                is_json = ".json" in (suffix.lower() for suffix in source.path.suffixes)
                if is_json and line.lstrip().startswith(b"["):
                    yield from _json_list(source, line + stream.read())
                    return
            if line.strip():
                place = f"{source}:{number}"
                yield place, partial(decode_object, line, place)


def _json_list(source: Source, data: bytes) -> Lines:
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{source}: not a JSON list ({error}); write one object a line") from error
    for number, fields in enumerate(rows, 1):
        place = f"{source}:{number}"
        yield place, partial(json_object, fields, place)


def _csv_lines(source: Source) -> Lines:
    with _csv(source) as (reader, names):
        while True:
            place = f"{source}:{reader.line_num + 1}"
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield place, partial(_refuse, f"{place}: not valid CSV ({error}); quote it")
                continue
            if values is None:
                return
            if values:
                yield place, partial(_csv_fields, names, values, place)


def _refuse(fault: str) -> NoReturn:
    raise RowError(fault)


def _csv_fields(names: list[str], values: list[str], place: str) -> dict[str, Any]:
    if len(values) != len(names):
        fault = f"{len(values)} values, but the header names {len(names)} columns"
        raise RowError(f"{place}: {fault}; quote values with separators")
    return dict(zip(names, values, strict=True))


@contextmanager
def _csv(source: Source) -> Iterator[tuple[Any, list[str]]]:
    """Open a CSV file for a reader of its rows, and the names of its columns."""
    tabs = ".tsv" in (suffix.lower() for suffix in source.path.suffixes[-2:])
    with _open(source) as stream:
        # Bytes that are not UTF-8 become half surrogates, which no row may hold.
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        reader = csv.reader(text, delimiter="\t" if tabs else ",")
        try:
            names: list[str] = next(reader, [])
        except csv.Error as error:
            raise RowError(f"{source}: not valid CSV ({error}); check its header") from error
        if not names:
            raise RowError(f"{source}: is empty; the first line must name the columns")
        if not all(names) or len(set(names)) < len(names):
            raise RowError(f"{source}: the first line must name every column once; it is {names}")
        yield reader, names


@contextmanager
def _open(source: Source) -> Iterator[io.BufferedReader]:
    """Open a text file for its bytes, decompressed."""
    with pa.input_stream(str(source.path), compression=source.codec) as stream:
        yield io.BufferedReader(stream, 1 << 16)


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Turn what the libraries raise for a file that is broken into a RowError that names it."""
    try:
        yield
    except (OSError, EOFError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise RowError(f"{source}: cannot be read ({reason}); check the file") from error
