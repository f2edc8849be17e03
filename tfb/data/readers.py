"""Rows and records of files, tables and lists as one stream, never a whole file in memory.

A row of a file that cannot be read is a record with a fault, not an end. pyarrow decompresses and
reads Parquet and Arrow; CSV goes through Python's own reader, which tells a faulty row from its
neighbours. A .json file that holds one list of objects is read at once.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from tfb.data.rows import ClassIndex, Row, RowError, RowFormat, decode_object
from tfb.data.sources import KINDS, Source, find_sources

BLOCK = 1024  # rows of a columnar file that are turned into Python objects at a time
LONGEST_LINE = 1 << 26  # bytes; a longer one is a faulty row, and is not held in memory
_MAGIC = {b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"\x1f\x8b": "compressed by gzip"}


@dataclass(frozen=True)
class Record:
    """One row as it was read, before anything is known of its columns."""

    place: str
    """Where it stands, "rows.jsonl:12"."""
    fields: dict[str, Any] | None
    """Values by column name; None where they could not be read."""
    fault: str | None = None
    """Why not."""


def read_rows(data: Any, form: RowFormat | None = None, *, limit: int | None = None) -> list[Row]:
    """All rows of ``data``; see :func:`iter_rows`.

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
        data: a path, folder or pattern (:mod:`tfb.data.sources`), or several as ``pathlib.Path``; a
            DataFrame of pandas or polars or a pyarrow table; or an iterable, such as a
            ``datasets.Dataset``, of dicts, strings (texts, or prompts where the task is a language
            model's) or :class:`Row`.
        form: names of columns and classes, and the task; None: our names, rows of any task.
        limit: stop after that many rows.

    Raises:
        RowError: a file that cannot be read, a table without a column of its rows, or a row that
            cannot be used. TypeError: data that holds no rows. ValueError: ``limit`` below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out to read every row")
    form = RowFormat() if form is None else form
    return _rows(islice(_items(data, form), limit), form)


def _rows(items: Iterator[Any], form: RowFormat) -> Iterator[Row]:
    for number, item in enumerate(items):
        source = f"row {number}"
        if isinstance(item, Record):
            if item.fields is None:
                raise RowError(str(item.fault))
            yield form.row(item.fields, item.place, number)
        elif isinstance(item, Row):
            yield item
        elif isinstance(item, Mapping):
            yield form.row(item, source, number)
        elif isinstance(item, str):
            name = "prompt" if form.task not in (None, "SEQ_CLS") else "text"
            yield form.row({form.names[name]: item}, source, number)
        else:
            raise TypeError(
                f"{source}: expected a dict, a string or a Row, got {type(item).__name__}; "
                "write [{'text': ..., 'label': ...}, ...]"
            )


def _items(data: Any, form: RowFormat) -> Iterator[Any]:
    """The records of files, the rows of tables, whose columns are checked, and the elements of
    anything else."""
    if isinstance(data, str | os.PathLike):
        return _file_records([data], form)
    several = isinstance(data, Mapping)
    if not several and hasattr(data, "with_format"):  # a Dataset
        if data.column_names is not None:  # known, of one that streams
            form.check(data.column_names, "the Dataset")
        return _with_classes(data.with_format(None), data.features or {})
    if hasattr(data, "to_list") and not hasattr(data, "columns"):
        return iter(data.to_list())  # a column of a DataFrame: texts
    if hasattr(data, "__arrow_c_stream__"):
        return _table_rows(data, form)
    if several or hasattr(data, "iloc") or not isinstance(data, Iterable):
        one = " (of a dict of splits one, such as data['test'])" * several
        raise TypeError(
            f"{type(data).__name__} holds no rows; give a path, a DataFrame (pandas 2.2 or newer), "
            f"a Dataset, or a list of dicts{one}"
        )
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
    """The records of files, their columns checked where files declare them."""
    sources = find_sources(paths)
    for source in sources:
        if (schema := schema_of(source)) is not None:
            form.check(schema.names, str(source))
    return read(sources, Meter(sources))


def _table_rows(data: Any, form: RowFormat) -> Iterator[dict[str, Any]]:
    """The rows of a DataFrame or table in memory, by Arrow's stream interface."""
    import pyarrow as pa

    kind = type(data).__name__
    try:
        batches = pa.RecordBatchReader.from_stream(data)
    except pa.ArrowException as error:
        raise TypeError(f"{kind}: is no table of one type a column ({error}); mend it") from error
    form.check(batches.schema.names, f"the {kind}")
    wanted = [name for name in batches.schema.names if name in form.names.values()]
    return (fields for batch in batches for fields in _fields(batch.select(wanted)))


def _fields(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow batch, ``BLOCK`` at a time."""
    for start in range(0, batch.num_rows, BLOCK):
        yield from batch.slice(start, BLOCK).to_pylist()


def _with_classes(rows: Iterable[dict[str, Any]], classes: Mapping[str, Any]) -> Iterator[Any]:
    """Rows whose class labels know their names; ``classes``: the data's features by column."""
    names = {column: found for column, feature in classes.items() if (found := _names(feature))}
    for fields in rows:
        for column, known in names.items():
            index = fields.get(column)
            if isinstance(index, int) and 0 <= index < len(known):
                fields = {**fields, column: ClassIndex(index, known[index])}
        yield fields


def _names(feature: Any) -> list[str] | None:
    """Of a ClassLabel of datasets, as it is or as it stands in a file's metadata."""
    names = (
        feature.get("names") if isinstance(feature, Mapping) else getattr(feature, "names", None)
    )
    return names if isinstance(names, list) else None


def _features(schema: Any) -> Mapping[str, Any]:
    """The features that datasets left in the metadata of a Parquet or Arrow file."""
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return {}


class Meter:
    """How far the reading has come: ``share`` of the bytes of all files, from 0 to 1."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._total = max(1, sum(s.path.stat().st_size for s in sources))
        self._before = 0
        self._here = 0.0

    @property
    def share(self) -> float:
        return min(1.0, (self._before + self._here) / self._total)

    def at(self, position: float) -> None:
        """Bytes of the present file that are read."""
        self._here = position

    def finished(self, source: Source) -> None:
        self._before += source.path.stat().st_size
        self._here = 0.0


def schema_of(source: Source) -> Any:
    """The Arrow schema of a file's columns; text for CSV, None for JSONL, where rows decide.

    Raises:
        RowError: a file that cannot be read, or a CSV header with an empty or repeated name.
    """
    import pyarrow as pa

    with _readable(source):
        if source.kind == "parquet":
            import pyarrow.parquet as pq

            return pq.read_schema(source.path)
        if source.kind == "arrow":
            with pa.memory_map(str(source.path)) as file:
                return _ipc_reader(file).schema
        if source.kind == "csv":
            with _open(source) as (stream, _):
                return pa.schema([(n, pa.string()) for n in _header(_csv(source, stream), source)])
    return None


def read(
    sources: Sequence[Source], meter: Meter, columns: Sequence[str] | None = None
) -> Iterator[Record]:
    """The records of all files, in order; a row that cannot be read is a record with a fault.

    Args:
        meter: is told how far it is. columns: read only these from columnar files; None: all.

    Raises:
        RowError: a file that cannot be read at all, or breaks off.
    """
    readers: dict[str, Callable[..., Iterator[Record]]] = {
        "jsonl": _read_jsonl,
        "csv": _read_csv,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
    }
    for source in sources:
        with _readable(source):
            yield from readers[source.kind](source, meter, columns)
        meter.finished(source)


def _read_jsonl(source: Source, meter: Meter, _: Sequence[str] | None) -> Iterator[Record]:
    with _open(source) as (stream, position):
        number = 0
        while line := stream.readline(LONGEST_LINE):
            number += 1
            place = f"{source}:{number}"
            meter.at(position())
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
                if found := next((n for m, n in _MAGIC.items() if line.startswith(m)), None):
                    raise RowError(f"{source}: is {found}, which its name does not say; rename it")
                is_json = ".json" in (suffix.lower() for suffix in source.path.suffixes)
                if is_json and line.lstrip().startswith(b"["):
                    yield from _json_list(source, line + stream.read())
                    return
            if len(line) >= LONGEST_LINE and not line.endswith(b"\n"):
                while (rest := stream.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield Record(place, None, f"{place}: a line of more than {LONGEST_LINE} bytes")
            elif line.strip():
                try:
                    yield Record(place, decode_object(line, place))
                except RowError as error:
                    yield Record(place, None, str(error))


def _read_csv(source: Source, meter: Meter, _: Sequence[str] | None) -> Iterator[Record]:
    with _open(source) as (stream, position):
        reader = _csv(source, stream)
        names = _header(reader, source)
        while True:
            place = f"{source}:{reader.line_num + 1}"
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield Record(place, None, f"{place}: not valid CSV ({error}); quote it")
                continue
            meter.at(position())
            if values is None:
                return
            if len(values) == len(names):
                yield Record(place, dict(zip(names, values, strict=True)))
            elif values:
                fault = f"{len(values)} values, but the header names {len(names)} columns"
                yield Record(place, None, f"{place}: {fault}; quote values with separators")


def _read_parquet(source: Source, meter: Meter, columns: Sequence[str] | None) -> Iterator[Record]:
    import pyarrow.parquet as pq

    size, number = source.path.stat().st_size, 0
    with pq.ParquetFile(source.path, memory_map=True) as file:
        names, features = file.schema_arrow.names, _features(file.schema_arrow)
        wanted = names if columns is None else [n for n in names if n in columns]
        rows = max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=BLOCK, columns=wanted):
            for fields in _with_classes(batch.to_pylist(), features):
                number += 1
                yield Record(f"{source}:{number}", fields)
            meter.at(size * number / rows)


def _read_arrow(source: Source, meter: Meter, columns: Sequence[str] | None) -> Iterator[Record]:
    import pyarrow as pa

    number = 0
    with pa.memory_map(str(source.path)) as file:
        reader = _ipc_reader(file)
        names = [n for n in reader.schema.names if columns is None or n in columns]
        features = _features(reader.schema)
        for batch in _ipc_batches(reader):
            for fields in _with_classes(_fields(batch.select(names)), features):
                number += 1
                yield Record(f"{source}:{number}", fields)
            meter.at(file.tell())


def _json_list(source: Source, data: bytes) -> Iterator[Record]:
    """The objects of one JSON list, however it is laid out; of lines with a list each, faults."""
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{source}: not a JSON list ({error}); write one object a line") from error
    for number, fields in enumerate(rows, 1):
        place = f"{source}:{number}"
        fault = None if isinstance(fields, dict) else f"{place}: expected a JSON object"
        yield Record(place, fields if fault is None else None, fault)


def _ipc_reader(file: Any) -> Any:
    import pyarrow as pa

    magic = file.read(6)
    file.seek(0)
    return pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)


def _ipc_batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):  # the file format
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    return iter(reader)


def _csv(source: Source, stream: BinaryIO) -> Any:
    # The default limit, 128 KiB, is less than a long prompt.
    csv.field_size_limit(LONGEST_LINE)
    tabs = ".tsv" in (s.lower() for s in source.path.suffixes[-2:])
    pieces = iter(lambda: stream.readline(LONGEST_LINE), b"")
    # Bytes that are not UTF-8 become half surrogates, which no row may hold.
    lines = (piece.decode("utf-8", "surrogateescape") for piece in pieces)
    return csv.reader(lines, delimiter="\t" if tabs else ",")


def _header(reader: Any, source: Source) -> list[str]:
    try:
        names: list[str] = next(reader, [])
    except csv.Error as error:
        raise RowError(f"{source}: not valid CSV ({error}); check its header") from error
    names = [name.removeprefix("\ufeff") if i == 0 else name for i, name in enumerate(names)]
    if not names:
        raise RowError(f"{source}: is empty; the first line must name the columns")
    if not all(names) or len(set(names)) < len(names):
        raise RowError(f"{source}: the first line must name every column once; it is {names}")
    return names


@contextmanager
def _open(source: Source) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The decompressed bytes of a text file, and a function that tells the bytes read of it."""
    with source.path.open("rb") as raw:
        if source.codec is None:
            yield raw, raw.tell
            return
        import pyarrow as pa

        with pa.CompressedInputStream(raw, source.codec) as stream:
            yield io.BufferedReader(stream, 1 << 16), raw.tell


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Turns what the libraries raise for a file that is broken into a RowError that names it."""
    import pyarrow as pa

    try:
        yield
    except RowError:
        raise
    except (OSError, EOFError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise RowError(f"{source}: cannot be read ({reason}); check the file") from error
