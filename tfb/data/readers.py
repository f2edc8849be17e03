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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tfb.data.rows import ClassIndex, Row, RowError, RowFormat, decode_object

JSON = (".jsonl", ".ndjson", ".json")
CSV = (".csv", ".tsv")
PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather")
SUFFIXES = JSON + CSV + PARQUET + ARROW
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}  # behind a text file's
BLOCK = 1024  # rows of a table that are turned into Python objects at a time
csv.field_size_limit(1 << 26)  # the default, 128 KiB, is less than a long prompt


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
    """Return the rows of anything that holds rows, in order.

    Args:
        data: a path, folder or pattern, or several as ``pathlib.Path``; a DataFrame of pandas or
            polars or a pyarrow table; or an iterable, such as a ``datasets.Dataset``, of dicts,
            strings (texts, or prompts where the task is a language model's) or :class:`Row`.
        form: names of columns and classes, and the task; None: our names, rows of any task.
        limit: stop after that many rows.

    Raises:
        RowError: a file that cannot be read, a table without a column of its rows, a row that
            cannot be used, an id that stands twice, or no rows.
        TypeError: data that holds no rows.
        ValueError: ``limit`` below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out to read every row")
    form = RowFormat() if form is None else form
    rows: dict[str, Row] = {}
    for number, record in enumerate(islice(iter_records(data, form), limit)):
        row = record if isinstance(record, Row) else _row(record, number, form)
        if (first := rows.setdefault(row.id, row)) is not row:
            raise RowError(
                f"{row.source}: the id {row.id!r} was already used at {first.source}; give every "
                "row an id of its own, or none"
            )
    if not rows:
        where = data if isinstance(data, str | os.PathLike) else "the input"
        raise RowError(f"{where}: holds no rows; add some")
    return list(rows.values())


def _row(record: Record, number: int, form: RowFormat) -> Row:
    if record.fields is None:
        raise RowError(str(record.fault))
    return form.row(record.fields, record.place, number)


def iter_records(data: Any, form: RowFormat) -> Iterator[Record | Row]:
    """Stream the records of all that :func:`read_rows` takes, unchecked; rows as they are.

    Raises:
        RowError: a file that cannot be read, or a table without a column of its rows.
        TypeError: data that holds no rows.
    """
    return (_record(item, f"row {n}", form) for n, item in enumerate(_items(data, form)))


def _record(item: Any, place: str, form: RowFormat) -> Record | Row:
    if isinstance(item, Record | Row):
        return item
    if isinstance(item, Mapping):
        return Record(place, dict(item))
    if isinstance(item, str):
        name = "prompt" if form.task not in (None, "SEQ_CLS") else "text"
        return Record(place, {form.names[name]: item})
    raise TypeError(
        f"{place}: expected a dict, a string or a Row, got {type(item).__name__}; "
        "write [{'text': ..., 'label': ...}, ...]"
    )


def _items(data: Any, form: RowFormat) -> Iterator[Any]:
    """Stream the records of files, the rows of tables, and the elements of anything else."""
    if isinstance(data, str | os.PathLike):
        return _file_records([data], form)
    if hasattr(data, "with_format") and not isinstance(data, Mapping):  # a Dataset
        if data.column_names is not None:  # known, of one that streams
            form.check(data.column_names, "the Dataset")
        features = data.features.to_dict() if data.features else {}
        return _with_classes(data.with_format(None), features)
    table = hasattr(data, "columns") or hasattr(data, "schema")  # no column of one
    if table and hasattr(data, "__arrow_c_stream__"):
        return _table_rows(data, form)
    if isinstance(data, Mapping) or hasattr(data, "columns") or not isinstance(data, Iterable):
        raise TypeError(
            f"{type(data).__name__} holds no rows; give a path, a DataFrame (pandas 2.2 or newer), "
            "a Dataset (of a dict of splits one, such as data['test']), or a list of dicts"
        )
    return _elements(data, form)


def _elements(data: Iterable[Any], form: RowFormat) -> Iterator[Any]:
    """Stream the elements of an iterable, or the records of the files that they name."""
    stream = iter(data)
    first = list(islice(stream, 1))
    head = first[0] if first else None
    if isinstance(head, os.PathLike):
        return _file_records([head, *stream], form)
    if isinstance(head, str) and " " not in head and _suffix(Path(head)) in SUFFIXES:
        raise TypeError(
            f"a list of strings is a list of texts, but {head!r} looks like a file; give it "
            "alone, or several as pathlib.Path"
        )
    return chain(first, stream)


def _file_records(paths: Sequence[str | os.PathLike[str]], form: RowFormat) -> Iterator[Record]:
    """Stream the records of files, whose columns are checked where they are declared."""
    sources = find_sources(paths)
    for source in sources:
        if (schema := schema_of(source)) is not None:
            form.check(schema.names, str(source))
    return chain.from_iterable(map(read, sources))


def _table_rows(data: Any, form: RowFormat) -> Iterator[dict[str, Any]]:
    """Stream the rows of a DataFrame or table in memory, by Arrow's stream interface."""
    batches = pa.RecordBatchReader.from_stream(data)
    form.check(batches.schema.names, f"the {type(data).__name__}")
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


def find_sources(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the files behind paths, folders and patterns, in order.

    A folder stands for the files in it, a pattern (``data/*.parquet``) for what it matches, both
    sorted.

    Raises:
        RowError: nothing there, a name whose format is unknown, or a file that is named twice.
    """
    if not inputs:
        raise RowError("no input files were given; name at least one")
    found: dict[Path, Path] = {}
    for source in chain.from_iterable(map(_named, inputs)):
        if found.setdefault(source.resolve(), source) is not source:
            raise RowError(f"{source}: is named twice; name every input once")
    return list(found.values())


def _named(name: str | os.PathLike[str]) -> Iterator[Path]:
    pattern = str(Path(name))
    paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not paths and glob.has_magic(pattern):
        raise RowError(f"{pattern}: matches no file; check the pattern")
    if not paths:
        raise RowError(f"{pattern}: there is no such file; check the path")
    for path in map(Path, paths):
        if path.is_dir():
            yield from _in_folder(path)
        elif _suffix(path) in SUFFIXES:
            yield path
        else:
            raise RowError(
                f"{path}: the format is told by the name, and this one is not known; expected "
                f"{' '.join(SUFFIXES)}, the text formats also with {' '.join(CODECS)}"
            )


def _suffix(path: Path) -> str:
    """Return the suffix that tells the format, with none of compression behind it."""
    inner = path.with_suffix("").suffix.lower()
    text = path.suffix.lower() in CODECS and inner in JSON + CSV
    return inner if text else path.suffix.lower()


def _in_folder(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        raise RowError(f"{folder}: holds several splits; name the folder of one")
    if (folder / "state.json").is_file():  # of Dataset.save_to_disk; beside its data lie caches
        return _saved_files(folder)
    paths = (p for p in folder.iterdir() if p.is_file() and _suffix(p) in SUFFIXES)
    found = sorted(path for path in paths if not path.name.startswith((".", "_")))
    if not found:
        raise RowError(f"{folder}: a folder without input files; name the files")
    return found


def _saved_files(folder: Path) -> list[Path]:
    try:  # shards of an earlier save may lie there as well
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RowError(f"{folder}: its state.json is no saved Dataset's; save it again") from error


# --- reading one file -----------------------------------------------------------------------------


def schema_of(source: Path) -> pa.Schema | None:
    """Return the columns of a file: text for CSV, None for JSONL, where each row has its own.

    Raises:
        RowError: a file that cannot be read, or a CSV header with an empty or repeated name.
    """
    if _suffix(source) in JSON:
        return None
    with _readable(source):
        if _suffix(source) in CSV:
            with _csv(source) as (names, _):
                return pa.schema([(name, pa.string()) for name in names])
        with _table(source) as (schema, _):
            return schema


def count_records(source: Path) -> int:
    """Return how many records :func:`read` yields.

    Raises:
        RowError: a file that cannot be read to its end.
    """
    if _suffix(source) in JSON + CSV:
        return sum(1 for _ in read(source))
    with _readable(source), _table(source, []) as (_, batches):
        return sum(batch.num_rows for batch in batches)


def read(source: Path, columns: Sequence[str] | None = None, *, start: int = 0) -> Iterator[Record]:
    """Stream the records of a file; one that cannot be read has a fault.

    Args:
        source: the file.
        columns: read only these from a columnar file; None: all.
        start: number of the first record, from 0.

    Raises:
        RowError: a file that cannot be read at all, or breaks off.
    """
    with _readable(source):
        if _suffix(source) in JSON + CSV:
            records = _csv_records(source) if _suffix(source) in CSV else _json_records(source)
            yield from islice(records, start, None)
            return
        with _table(source, columns, start) as (schema, batches):
            rows = chain.from_iterable(map(_fields, batches))
            for number, fields in enumerate(_with_classes(rows, _features(schema)), start + 1):
                yield Record(f"{source}:{number}", fields)


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    """Return the features that datasets left in the metadata of a Parquet or Arrow file."""
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return {}


@contextmanager
def _table(
    source: Path, columns: Sequence[str] | None = None, start: int = 0
) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Open a columnar file for its schema, and batches of ``columns`` from a record on."""
    if _suffix(source) in PARQUET:
        with pq.ParquetFile(source, memory_map=True) as file:
            groups = list(range(file.num_row_groups))
            while groups and (rows := file.metadata.row_group(groups[0]).num_rows) <= start:
                start -= rows
                del groups[0]
            # Of no groups, old versions of pyarrow cannot make an iterator.
            batches = file.iter_batches(BLOCK, groups, columns) if groups else ()
            yield file.schema_arrow, _from_record(start, batches)
        return
    with pa.memory_map(str(source)) as file:
        in_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_stream(file) if in_stream else pa.ipc.open_file(file)
        batches = reader if in_stream else map(reader.get_batch, range(reader.num_record_batches))
        names = [name for name in reader.schema.names if columns is None or name in columns]
        yield reader.schema, (batch.select(names) for batch in _from_record(start, batches))


def _from_record(start: int, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        if start < batch.num_rows:
            yield batch.slice(start)
        start = max(0, start - batch.num_rows)


def _json_records(source: Path) -> Iterator[Record]:
    with _open(source) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
                if _suffix(source) == ".json" and line.lstrip().startswith(b"["):
                    yield from _json_list(source, line + stream.read())
                    return
            if line.strip():
                yield _parsed(line, f"{source}:{number}")


def _json_list(source: Path, data: bytes) -> Iterator[Record]:
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{source}: not a JSON list ({error}); write one object a line") from error
    for number, fields in enumerate(rows, 1):
        yield _parsed(fields, f"{source}:{number}")


def _parsed(data: Any, place: str) -> Record:
    try:
        return Record(place, decode_object(data, place))
    except RowError as error:
        return Record(place, None, str(error))


def _csv_records(source: Path) -> Iterator[Record]:
    with _csv(source) as (names, reader):
        while True:
            place = f"{source}:{reader.line_num + 1}"
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield Record(place, None, f"{place}: not valid CSV ({error}); quote it")
                continue
            if values is None:
                return
            if len(values) == len(names):
                yield Record(place, dict(zip(names, values, strict=True)))
            elif values:  # no empty line
                fault = f"{len(values)} values, but the header names {len(names)} columns"
                yield Record(place, None, f"{place}: {fault}; quote values with separators")


@contextmanager
def _csv(source: Path) -> Iterator[tuple[list[str], Any]]:
    """Open a CSV file for the names of its columns, and a reader of its rows."""
    with _open(source) as stream:
        # Bytes that are not UTF-8 become half surrogates, which no row may hold.
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        reader = csv.reader(text, delimiter="\t" if _suffix(source) == ".tsv" else ",")
        names: list[str] = next(reader, [])
        if not names or not all(names) or len(set(names)) < len(names):
            raise RowError(f"{source}: the first line must name every column once; it is {names}")
        yield names, reader


def _open(source: Path) -> io.BufferedReader:
    """Open a text file for its bytes, decompressed by its name."""
    codec = CODECS.get(source.suffix.lower())
    return io.BufferedReader(pa.input_stream(str(source), compression=codec), 1 << 16)


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    """Turn what the libraries raise for a file that is broken into a RowError that names it."""
    try:
        yield
    except (OSError, EOFError, csv.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise RowError(f"{source}: cannot be read ({reason}); check the file") from error
