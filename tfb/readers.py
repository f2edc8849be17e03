"""Records of input files as one stream, never a whole file in memory.

A row that cannot be read is a record with a fault, not an end. pyarrow decompresses and reads
Parquet and Arrow; CSV goes through Python's own reader, which tells a faulty row from its
neighbours.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from tfb.rows import RowError, decode_object
from tfb.sources import Source

BLOCK = 1024  # rows of a columnar file that are turned into Python objects at a time
LONGEST_LINE = 1 << 26  # bytes; a longer one is a faulty row, and is not held in memory


@dataclass(frozen=True)
class Record:
    """One row as it was read, before anything is known of its columns."""

    place: str
    """Where it stands, "rows.jsonl:12"."""
    kind: str
    fields: dict[str, Any] | None
    """Values by column name; None where they could not be read."""
    fault: str | None = None
    """Why not."""


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
            if len(line) >= LONGEST_LINE and not line.endswith(b"\n"):
                while (rest := stream.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield Record(
                    place, "jsonl", None, f"{place}: a line of more than {LONGEST_LINE} bytes"
                )
            elif line.strip():
                try:
                    yield Record(place, "jsonl", decode_object(line, place))
                except RowError as error:
                    yield Record(place, "jsonl", None, str(error))


def _read_csv(source: Source, meter: Meter, _: Sequence[str] | None) -> Iterator[Record]:
    with _open(source) as (stream, position):
        reader = _csv(source, stream)
        names = _header(reader, source)
        while True:
            place = f"{source}:{reader.line_num + 1}"
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield Record(place, "csv", None, f"{place}: not valid CSV ({error}); quote it")
                continue
            meter.at(position())
            if values is None:
                return
            if len(values) == len(names):
                yield Record(place, "csv", dict(zip(names, values, strict=True)))
            elif values:
                fault = f"{len(values)} values, but the header names {len(names)} columns"
                yield Record(place, "csv", None, f"{place}: {fault}; quote values with separators")


def _read_parquet(source: Source, meter: Meter, columns: Sequence[str] | None) -> Iterator[Record]:
    import pyarrow.parquet as pq

    size, number = source.path.stat().st_size, 0
    with pq.ParquetFile(source.path, memory_map=True) as file:
        names = file.schema_arrow.names
        wanted = names if columns is None else [n for n in names if n in columns]
        rows = max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=BLOCK, columns=wanted):
            for fields in batch.to_pylist():
                number += 1
                yield Record(f"{source}:{number}", "parquet", fields)
            meter.at(size * number / rows)


def _read_arrow(source: Source, meter: Meter, columns: Sequence[str] | None) -> Iterator[Record]:
    import pyarrow as pa

    number = 0
    with pa.memory_map(str(source.path)) as file:
        reader = _ipc_reader(file)
        names = [n for n in reader.schema.names if columns is None or n in columns]
        for batch in _ipc_batches(reader):
            chosen = batch.select(names)
            for start in range(0, chosen.num_rows, BLOCK):
                for fields in chosen.slice(start, BLOCK).to_pylist():
                    number += 1
                    yield Record(f"{source}:{number}", "arrow", fields)
            meter.at(file.tell())


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
    if not names or not all(names) or len(set(names)) < len(names):
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
