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
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tfb.data.rows import ClassIndex, Row, RowError, RowFormat, decode_object
from tfb.plain import parse_json, repeated, shown

JSON = (".jsonl", ".ndjson", ".json")
CSV = (".csv", ".tsv")
PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather")
SUFFIXES = JSON + CSV + PARQUET + ARROW
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}  # behind a text file's
BLOCK = 1024  # rows of a table that are turned into Python objects at a time
LONGEST_LINE = 1 << 24  # bytes of JSON, characters of CSV; what they decode to takes up to 25 times
LONGEST_LIST = 1 << 27  # bytes of a JSON list, or of a block of a table, which memory holds whole
TOO_LONG = f"longer than {LONGEST_LINE >> 20} MiB; shorten it, or leave the row out"
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # bytes of another encoding, read as UTF-8
csv.field_size_limit(2 * LONGEST_LINE)  # the default, 128 KiB, is less than a long prompt


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
    if isinstance(item, Mapping | RowError):
        return _table_record(item, place)
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
        return _dataset_rows(data, form)
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
    wanted = list(form.names.values())
    return chain.from_iterable(read(source, wanted) for source in sources)


def _dataset_rows(data: Any, form: RowFormat) -> Iterator[Any]:
    """Stream the rows of a ``datasets.Dataset``, or of one that streams itself."""
    data = data.with_format(None)
    if data.column_names is not None:  # known, of one that streams
        form.check(data.column_names, "the Dataset")
        wanted = set(form.names.values())
        data = data.select_columns([name for name in data.column_names if name in wanted])
    features = data.features.to_dict() if data.features else {}
    if not hasattr(data, "__len__"):
        return _with_classes(data, features)

    def rows(start: int, stop: int) -> list[dict[str, Any]]:
        values = data[start:stop]
        return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]

    return _with_classes(_in_blocks(len(data), rows), features)


def _table_rows(data: Any, form: RowFormat) -> Iterator[dict[str, Any] | RowError]:
    """Stream the rows of a DataFrame or table in memory, by Arrow's stream interface."""
    name, wanted = f"the {type(data).__name__}", set(form.names.values())
    if hasattr(data, "iloc"):  # of pandas: values of any kind, of which Arrow may know none
        form.check([*map(str, data.columns), *filter(None, data.index.names)], name)
        data = data[[column for column in data.columns if str(column) in wanted]]

        def rows(start: int, stop: int) -> list[dict[str, Any]]:
            return pa.table(data.iloc[start:stop]).to_pylist()

        yield from _in_blocks(len(data), rows)
        return
    with _readable(name):
        batches = pa.RecordBatchReader.from_stream(data)
        form.check(batches.schema.names, name)
        names = [name for name in batches.schema.names if name in wanted]
        yield from chain.from_iterable(_fields(batch.select(names)) for batch in batches)


def _fields(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | RowError]:
    try:
        batch.validate(full=True)  # no offset points out of its buffer, every text is UTF-8
        whole = True
    except pa.ArrowException:
        whole = False

    def rows(start: int, stop: int) -> list[dict[str, Any]]:
        block = batch.slice(start, stop - start)
        if not whole:
            block.validate(full=True)
        for number, column in enumerate(block.columns):
            if column.type == pa.time64("ns"):  # Python's would lose the nanoseconds unsaid
                name, exact = block.schema.names[number], column.cast(pa.time64("us"))
                block = block.set_column(number, name, exact)
        if stop - start > 1 and block.nbytes > LONGEST_LIST:
            raise pa.ArrowInvalid("too large to be Python's all at once")
        return block.to_pylist()

    return _in_blocks(batch.num_rows, rows)


def _in_blocks(
    length: int, rows: Callable[[int, int], list[dict[str, Any]]]
) -> Iterator[dict[str, Any] | RowError]:
    """Stream rows that are made some at a time; one that cannot be made is an error."""
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        try:
            yield from rows(start, stop)
        except Exception:  # what libraries raise for a value is not declared
            for number in range(start, stop):
                try:
                    yield from rows(number, number + 1)
                except Exception as error:
                    yield RowError(f"a value cannot be read ({error}); correct it")


def _with_classes(
    rows: Iterable[dict[str, Any] | RowError], features: Mapping[str, Any]
) -> Iterator[dict[str, Any] | RowError]:
    """Tell class labels their names; ``features``: of datasets, by column."""
    classes = {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, Mapping)
        and feature.get("_type") == "ClassLabel"
        and isinstance(feature.get("names"), list)
    }
    for fields in rows:
        if isinstance(fields, RowError):
            yield fields
            continue
        found = dict(fields)
        for column in classes.keys() & fields.keys():
            index, names = fields[column], classes[column]
            if isinstance(index, int) and 0 <= index < len(names):
                found[column] = ClassIndex(index, names[index])
        yield found


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
    for name in inputs:
        with _readable(name):
            for source in _named(name):
                if found.setdefault(source.resolve(), source) is not source:
                    raise RowError(f"{source}: is named twice; name every input once")
    return list(found.values())


def _named(name: str | os.PathLike[str]) -> Iterator[Path]:
    pattern = Path(name)
    if not str(name).strip():
        raise RowError(
            "an input has no name; name a file, a folder or a pattern, . for this folder"
        )
    paths = [pattern] if pattern.exists() else _matches(pattern)
    if not paths and glob.has_magic(str(pattern)):
        raise RowError(f"{pattern}: matches no file; check the pattern")
    if not paths:
        raise RowError(f"{pattern}: there is no such file; check the path")
    for path in chain.from_iterable(_in_folder(p) if p.is_dir() else [p] for p in paths):
        if _suffix(path) not in SUFFIXES:
            raise RowError(
                f"{path}: the format is told by the name, and this one is not known; expected "
                f"{' '.join(SUFFIXES)}, the text formats also with {' '.join(CODECS)}"
            )
        if not path.is_file():  # a pipe or device cannot be read twice, nor perhaps to its end
            raise RowError(f"{path}: is no regular file, or a link to none; save its rows as one")
        if NOT_TEXT.search(str(path)):
            raise RowError(f"{str(path)!a}: its name is not UTF-8; rename it")
        yield path


def _matches(pattern: Path) -> list[Path]:
    """Return what a pattern matches, as in a shell: ``**`` follows no links, ``*`` no dots."""
    anchor = Path(pattern.anchor)
    parts = pattern.parts[1:] if pattern.anchor else pattern.parts
    hidden = sum(part.startswith(".") for part in pattern.parts)

    def is_shown(path: Path) -> bool:
        return sum(part.startswith(".") for part in path.parts) <= hidden

    return sorted(filter(is_shown, anchor.glob("/".join(parts))))


def _suffix(path: Path) -> str:
    """Return the suffix that tells the format, with none of compression behind it."""
    *_, inner, last = ["", "", *map(str.lower, path.suffixes)]
    return inner if last in CODECS and inner in JSON + CSV else last


def _in_folder(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        raise RowError(f"{folder}: holds several splits; name the folder of one")
    if (folder / "state.json").is_file():  # of Dataset.save_to_disk; beside its data lie caches
        return _saved_files(folder)
    names = (p for p in folder.iterdir() if _suffix(p) in SUFFIXES and not p.is_dir())
    found = sorted(path for path in names if not path.name.startswith((".", "_")))
    if not found:
        raise RowError(f"{folder}: a folder without input files; name the files")
    return found


def _saved_files(folder: Path) -> list[Path]:
    try:  # shards of an earlier save may lie there as well
        state = parse_json((folder / "state.json").read_bytes())
        paths = [folder / file["filename"] for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RowError(f"{folder}: its state.json is no saved Dataset's; save it again") from error
    if outside := [path for path in paths if path.parent != folder]:
        raise RowError(f"{folder}: its state.json names {outside[0]}, outside of it; save it again")
    return paths


# --- reading one file -----------------------------------------------------------------------------


def schema_of(source: Path) -> pa.Schema | None:
    """Return the columns of a file: text for CSV, None for JSONL, where each row has its own.

    Raises:
        RowError: a file that cannot be read, or a CSV header without names, or a name twice.
    """
    if _suffix(source) in JSON:
        return None
    with _readable(source):
        if _suffix(source) in CSV:
            with _csv(source) as (names, _):
                return pa.schema([(name, pa.string()) for name in names if name])
        with _table(source) as (schema, _):
            _features(schema)
            return schema


def count_records(source: Path, columns: Sequence[str] | None = None) -> int:
    """Return how many records :func:`read` yields of these columns.

    Raises:
        RowError: a file that cannot be read to its end.
    """
    if _suffix(source) in JSON + CSV:
        return sum(1 for _ in read(source))
    # Decoded, as a page may be damaged: that is to be known before a model is loaded.
    with _readable(source), _table(source, columns) as (_, batches):
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
            for number, item in enumerate(_with_classes(rows, _features(schema)), start + 1):
                yield _table_record(item, f"{source}:{number}")


def _table_record(item: Mapping[str, Any] | RowError, place: str) -> Record:
    if isinstance(item, RowError):
        return Record(place, None, f"{place}: {item}")
    return Record(place, dict(item))


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    """Return the features that datasets left in the metadata of a Parquet or Arrow file."""
    try:
        return dict(parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError):
        return {}
    except ValueError as error:
        raise pa.ArrowInvalid(f"its metadata of datasets is no JSON: {error}") from error


@contextmanager
def _table(
    source: Path, columns: Sequence[str] | None = None, start: int = 0
) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Open a columnar file for its schema, and batches of ``columns`` from a record on."""
    if _suffix(source) in PARQUET:
        with pq.ParquetFile(source, memory_map=True) as file:
            groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
            first = 0
            while first < len(groups) and groups[first].num_rows <= start:
                start -= groups[first].num_rows
                first += 1
            wanted = list(range(first, len(groups)))
            widest = max((g.total_byte_size // max(1, g.num_rows) for g in groups), default=0)
            block = min(BLOCK, LONGEST_LIST // max(1, widest)) or 1
            # Of no groups, old versions of pyarrow cannot make an iterator.
            batches = file.iter_batches(block, wanted, columns) if wanted else ()
            declared = sum(groups[n].num_rows for n in wanted)
            yield file.schema_arrow, _from_record(start, batches, declared)
        return
    with pa.memory_map(str(source)) as file:
        in_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_stream(file) if in_stream else pa.ipc.open_file(file)
        batches = reader if in_stream else map(reader.get_batch, range(reader.num_record_batches))
        names = [name for name in reader.schema.names if columns is None or name in columns]
        yield reader.schema, (batch.select(names) for batch in _from_record(start, batches))


def _from_record(
    start: int, batches: Iterable[pa.RecordBatch], declared: int | None = None
) -> Iterator[pa.RecordBatch]:
    count = 0
    for batch in batches:
        if start < batch.num_rows:
            yield batch.slice(start)
        start = max(0, start - batch.num_rows)
        count += batch.num_rows
    if declared not in (None, count):
        raise pa.ArrowInvalid(f"{count} rows, but {declared} are declared")


def _json_records(source: Path) -> Iterator[Record]:
    number = 0
    with _open(source) as stream:
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            place, whole = f"{source}:{number}", len(line) <= LONGEST_LINE
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
                if _suffix(source) == ".json" and line.lstrip().startswith(b"["):
                    yield from _json_list(source, line + stream.read(LONGEST_LIST))
                    return
            if not whole:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LONGEST_LINE)
                yield Record(place, None, f"{place}: {TOO_LONG}")
            elif line.strip():
                yield _parsed(line, place)


def _json_list(source: Path, data: bytes) -> Iterator[Record]:
    if len(data) > LONGEST_LIST:
        most = f"{LONGEST_LIST >> 20} MiB"
        raise RowError(f"{source}: a JSON list of more than {most}; write one object a line")
    try:
        rows = parse_json(data)
    except ValueError as error:
        raise RowError(f"{source}: not a JSON list ({error}); write one object a line") from error
    for number, fields in enumerate(rows, 1):
        yield _parsed(fields, f"{source}:{number}")


def _parsed(data: Any, place: str) -> Record:
    try:
        return Record(place, decode_object(data, place))
    except RowError as error:
        return Record(place, None, str(error))


def _csv_records(source: Path) -> Iterator[Record]:
    with _csv(source) as (names, records):
        for first, last, values in records:
            place = f"{source}:{first}"
            if isinstance(values, str):
                yield Record(place, None, f"{place}: {values}")
            elif len(values) == len(names):
                pairs = zip(names, values, strict=True)
                yield Record(place, {name: value for name, value in pairs if name})
            elif values:  # no empty line
                # All its quotes are closed, so lines of it that look like rows may be a text's:
                # to read them again could make rows that nobody wrote.
                within = f" in lines {first} to {last}" if last > first else ""
                fault = f"{len(values)} values{within}, but the header has {len(names)} columns"
                yield Record(place, None, f"{place}: {fault}; quote values with separators")


@contextmanager
def _csv(source: Path) -> Iterator[tuple[list[str], Iterator[tuple[int, int, list[str] | str]]]]:
    """Open a CSV file for the names of its columns, "" for none, and its records as read."""
    with _open(source) as stream:
        records = _csv_values(stream, "\t" if _suffix(source) == ".tsv" else ",")
        _, _, names = next(records, (1, 1, []))
        if isinstance(names, str):
            raise RowError(f"{source}:1: the header cannot be read: {names}")
        if any(map(NOT_TEXT.search, names)):
            raise RowError(f"{source}: is not UTF-8; save it as UTF-8")
        if not any(names) or repeated(filter(None, names)) is not None:
            fault = f"the first line must name the columns, each once; it is {shown(names)}"
            raise RowError(f"{source}: {fault}")
        yield names, records


def _csv_values(
    stream: io.BufferedReader, delimiter: str
) -> Iterator[tuple[int, int, list[str] | str]]:
    """Stream records by their first and last line: values, or a fault; then line 2 is read anew."""
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        first = lines.number + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = f"not valid CSV, a quote is misplaced or never closed ({error})"
            remedy = "quote the value whole, and write quotes inside it twice, not with a backslash"
            yield first, first, TOO_LONG if lines.taken[0] is None else f"{fault}; {remedy}"
            lines.give_back()
        else:
            yield first, lines.number, values
        lines.begin()


class _Lines:
    """Lines for csv's reader, which can have all but the first of a broken record again.

    Attributes:
        number: of the line that was handed out last, from 1.
        taken: lines of the record under way; None for one that is too long.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        # Bytes that are not UTF-8 become half surrogates, which no row may hold.
        self.text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        self.number = self.broken = 0
        self.again: list[str | None] = []  # the next one last
        self.begin()

    def begin(self) -> None:
        """Begin a record."""
        self.taken: list[str | None] = []
        self.size = 0

    def give_back(self) -> None:
        """Hand out the lines after the first once more."""
        # In quotes at the end of a line before this one, any record ends as this one did: so it
        # is not read on, and what quotes there are costs no more than two readings.
        self.broken = max(self.broken, self.number)
        self.number -= len(self.taken) - 1
        self.again += self.taken[:0:-1]

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self.taken and (self.number < self.broken or self.size > LONGEST_LINE):
            raise csv.Error("the record goes on too far")
        line = self.again.pop() if self.again else self._read()
        if line == "":
            raise StopIteration
        self.number += 1
        self.taken.append(line)
        self.size += sys.getsizeof(line)  # many short lines take more than their characters
        if line is None:
            raise csv.Error("a line is too long")
        return line

    def _read(self) -> str | None:
        """Return a line, "" at the end, None for one that is too long."""
        line = self.text.readline(LONGEST_LINE + 1)
        if len(line) <= LONGEST_LINE:
            return line
        while line and line[-1] not in "\r\n":
            line = self.text.readline(LONGEST_LINE)
        if line.endswith("\r") and (following := self._read()) != "\n":  # of a parted "\r\n"
            self.again.append(following)
        return None


def _open(source: Path) -> io.BufferedReader:
    """Open a text file for its bytes, decompressed by its name."""
    codec = CODECS.get(source.suffix.lower())
    return io.BufferedReader(pa.input_stream(str(source), compression=codec), 1 << 16)


@contextmanager
def _readable(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the libraries raise for a file that is broken into a RowError that names it."""
    try:
        yield
    except RowError:
        raise
    except (OSError, EOFError, ValueError, KeyError, RecursionError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise RowError(f"{source}: cannot be read ({reason}); check the file") from error
