"""Reading task rows: one JSON object a line, checked before any model is loaded.

Two shapes are accepted, and one file may hold only one of them where it is encoded:

    {"id": "q1", "prompt": "... Answer:", "choices": ["A", "B"], "label": 1}     choice row
    {"id": "t1", "text": "book me a table", "label": 3}                          text row

`label` is optional (absent or null: unlabelled). It is an index, or, in a choice row, one of the
choices. Every fault is a `RowError` that names the file, the line and the remedy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

PathOrPaths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

CHOICE_COLUMNS = ("id", "prompt", "choices", "label")
TEXT_COLUMNS = ("id", "text", "label")


class RowError(ValueError):
    """A row that cannot be used. The message names the place, the fault and the remedy."""


@dataclass(frozen=True)
class Row:
    """One task row: a choice row has `prompt` and `choices`, a text row has `text`."""

    id: str
    prompt: str | None = None
    choices: tuple[str, ...] | None = None
    text: str | None = None
    label: int | None = None
    source: str = "row"
    """Where the row was read, "file.jsonl:12"; used in error messages only."""

    @property
    def is_choice(self) -> bool:
        return self.choices is not None


def read_rows(paths: PathOrPaths, *, limit: int | None = None) -> list[Row]:
    """All rows of one or more JSONL files, in order; see `iter_rows`."""
    return list(iter_rows(paths, limit=limit))


def iter_rows(paths: PathOrPaths, *, limit: int | None = None) -> Iterator[Row]:
    """Stream the rows of one or more JSONL files, in order.

    Args:
        paths: one path or several. Whether each exists is checked before the first row.
        limit: stop after that many rows over all files; lines beyond it are not looked at.

    Blank lines are skipped. Ids must be unique over all files, so the ids seen are kept in memory.

    Raises:
        RowError: a missing, unreadable or empty file, or a faulty line.
        ValueError: `limit` below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out to read every row")
    files = [Path(paths)] if isinstance(paths, str | os.PathLike) else [Path(p) for p in paths]
    if not files:
        raise RowError("no input files were given; name at least one JSONL file")
    for file in files:
        _check_file(file)
    return _stream(files, limit)


def parse_row(line: str | bytes, source: str = "row") -> Row:
    """Parse and check one JSON line.

    Raises:
        RowError: malformed JSON, a wrong column, a wrong type or an impossible value.
    """
    return make_row(decode_object(line, source), source)


def make_row(fields: dict[str, Any], source: str = "row") -> Row:
    """Check the columns of one row and their values.

    Raises:
        RowError: a wrong column, a wrong type or an impossible value.
    """
    _check_columns(fields, source)
    return _choice_row(fields, source) if "text" not in fields else _text_row(fields, source)


def _stream(files: list[Path], limit: int | None) -> Iterator[Row]:
    seen: dict[str, tuple[int, int]] = {}  # id -> (file, line): small, as there may be millions
    count = 0
    for index, file in enumerate(files):
        before = count
        try:
            with file.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
                    if not line.strip():
                        continue
                    row = parse_row(line, f"{file}:{number}")
                    if row.id in seen:
                        other, other_line = seen[row.id]
                        _fail(
                            row.source,
                            f"the id {row.id!r} was already used at {files[other]}:{other_line}",
                            "give every row an id of its own",
                        )
                    seen[row.id] = (index, number)
                    count += 1
                    yield row
                    if count == limit:
                        return
        except OSError as error:
            raise RowError(f"{file}: cannot be read ({error.strerror or error})") from error
        if count == before:
            _fail(str(file), "the file holds no rows", "write one JSON object a line into it")


def _check_file(file: Path) -> None:
    if file.is_dir():
        _fail(str(file), "this is a folder", "name the JSONL files inside it")
    if not file.exists():
        _fail(str(file), "there is no such file", "check the path")


def decode_object(line: str | bytes, source: str) -> dict[str, Any]:
    """The JSON object on a line, whatever its columns.

    Raises:
        RowError: not UTF-8, not JSON, not an object, or a key that stands twice.
    """
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
    except UnicodeDecodeError as error:
        _fail(source, f"the line is not UTF-8 ({error.reason})", "save the file as UTF-8", error)
    try:
        fields = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, source))
    except RowError:
        raise
    except json.JSONDecodeError as error:
        fault = f"not valid JSON ({error.msg} at column {error.colno})"
        _fail(source, fault, "write one complete JSON object a line", error)
    except (ValueError, RecursionError) as error:
        # An integer of more digits, or brackets of more depth, than Python is willing to read.
        _fail(source, f"not usable JSON ({error})", "write one plain JSON object a line", error)
    if not isinstance(fields, dict):
        _fail(
            source,
            f"expected a JSON object, found {_kind(fields)}",
            'write {"id": ..., "prompt": ..., "choices": [...]} or {"id": ..., "text": ...}',
        )
    return fields


def _check_columns(fields: dict[str, Any], source: str) -> None:
    if "text" in fields and ("prompt" in fields or "choices" in fields):
        _fail(
            source,
            "the row has 'text' together with 'prompt' or 'choices'",
            "keep 'text' for a classification head, or 'prompt' and 'choices' for a language model",
        )
    allowed = TEXT_COLUMNS if "text" in fields else CHOICE_COLUMNS
    unknown = [name for name in fields if name not in allowed]
    if unknown:
        _fail(
            source,
            f"unknown column{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}",
            f"allowed here: {', '.join(allowed)}; remove or rename the others",
        )
    missing = [name for name in allowed if name != "label" and name not in fields]
    if missing == ["prompt", "choices"]:
        _fail(source, "the row has no task", "add 'prompt' and 'choices', or add 'text'")
    if missing:
        _fail(source, f"missing column {', '.join(map(repr, missing))}", "add it to every row")


def _unique(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    """An object from its pairs; JSON would silently keep the last of two equal keys."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        _fail(source, f"{', '.join(map(repr, twice))} stands twice in one object", "keep one")
    return fields


def _choice_row(fields: dict[str, Any], source: str) -> Row:
    choices = fields["choices"]
    if not isinstance(choices, list):
        _fail(source, f"'choices' is {_kind(choices)}", "make it a list of strings")
    for choice in choices:
        _string(choice, "a choice", source)
    if len(choices) < 2:
        _fail(source, f"'choices' holds {len(choices)}", "give at least two choices")
    if len(set(choices)) < len(choices):
        twice = sorted({choice for choice in choices if choices.count(choice) > 1})
        _fail(source, f"choices stand twice: {', '.join(map(repr, twice))}", "make them differ")
    label = fields.get("label")
    if isinstance(label, str):
        if label not in choices:
            _fail(
                source,
                f"the label {label!r} is none of the choices {choices}",
                "use one of the choices, or its index",
            )
        label = choices.index(label)
    label = _index(label, source)
    if label is not None and label >= len(choices):
        _fail(
            source,
            f"the label {label} is outside the {len(choices)} choices",
            f"use an index from 0 to {len(choices) - 1}",
        )
    return Row(
        id=row_id(fields["id"], source),
        prompt=_string(fields["prompt"], "'prompt'", source),
        choices=tuple(choices),
        label=label,
        source=source,
    )


def _text_row(fields: dict[str, Any], source: str) -> Row:
    label = fields.get("label")
    if isinstance(label, str):
        _fail(source, f"the label {label!r} is a string", "use the index of the class")
    return Row(
        id=row_id(fields["id"], source),
        text=_string(fields["text"], "'text'", source),
        label=_index(label, source),
        source=source,
    )


def row_id(value: Any, source: str = "row") -> str:
    """An id as text.

    Raises:
        RowError: neither a string with text in it nor an integer.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        _fail(source, f"'id' is {_kind(value)}", "make it a string or an integer")
    return _string(value, "'id'", source)


def _string(value: Any, name: str, source: str) -> str:
    if not isinstance(value, str):
        _fail(source, f"{name} is {_kind(value)}", "make it a string")
    if not value.strip():
        _fail(source, f"{name} is empty", "write some text into it, or remove the row")
    if any("\ud800" <= character <= "\udfff" for character in value):
        _fail(source, f"{name} holds half of a surrogate pair", "write it as proper Unicode")
    return value


def _index(value: Any, source: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        _fail(source, f"'label' is {_kind(value)}", "use an integer index, counted from 0")
    if value < 0:
        _fail(source, f"the label {value} is negative", "count from 0, or leave 'label' out")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), f"the number {value}")


def _fail(source: str, fault: str, remedy: str, cause: Exception | None = None) -> NoReturn:
    raise RowError(f"{source}: {fault}; {remedy}") from cause
