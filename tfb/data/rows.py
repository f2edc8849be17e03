"""Task rows: fields under any names to rows that are checked, before any model is loaded.

    {"id": "q1", "prompt": "... Answer:", "choices": ["A", "B"], "label": 1}     choice row
    {"id": "t1", "text": "book me a table", "label": 3}                          text row

A chat row has ``messages`` in place of ``prompt``. ``label``, an index or the text of a choice or
class, and ``id`` may be left out. Every fault names the place, the fault and the remedy.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

CHOICE_COLUMNS = ("id", "prompt", "messages", "choices", "label")
COLUMNS = {"SEQ_CLS": ("id", "text", "label"), None: (*CHOICE_COLUMNS, "text")}


class RowError(ValueError):
    """A row that cannot be used. The message names the place, the fault and the remedy."""


@dataclass(frozen=True)
class Row:
    """One task row: a choice row has `choices` and `prompt` or `messages`, a text row has `text`.

    Attributes:
        id: its name in results.
        prompt: what the choices continue.
        choices: two or more answers.
        text: what a classification head reads.
        label: position of the right choice or class, from 0; None where it is not known.
        source: where the row was read, "file.jsonl:12"; used in error messages only.
        messages: of a chat: role, content and what else the template reads of each.

    Raises:
        RowError: another combination, or a label that is no index.
    """

    id: str
    prompt: str | None = None
    choices: tuple[str, ...] | None = None
    text: str | None = None
    label: int | None = None
    source: str = "row"
    messages: tuple[Mapping[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        asked = (self.prompt is not None) + (self.messages is not None)
        if (self.text is not None, asked, self.choices is not None) not in (
            (True, 0, False),
            (False, 1, True),
        ):
            raise RowError(
                f"Row({self.id!r}): a row has a text, or a prompt or messages with choices; write "
                "Row(id='1', text='...') or Row(id='1', prompt='...', choices=('A', 'B'), label=0)"
            )
        if self.label is not None and type(self.label) is not int:
            raise RowError(
                f"Row({self.id!r}): the label {self.label!r} is no index; write the position of "
                "the choice or class, counted from 0"
            )


@dataclass(frozen=True)
class RowFormat:
    """How fields become rows.

    Attributes:
        columns: the data's name for each of ours that it calls otherwise: {"text": "sentence"}.
        labels: names of the classes, in the order of the head's outputs; the choices of choice
            rows that bring none.
        task: "SEQ_CLS" reads text rows, "CAUSAL_LM" and "SEQ_2_SEQ_LM" choice rows; None: each row
            as what it is.

    Raises:
        ValueError: a name that no row has, one that is given twice, or fewer than two labels.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Sequence[str] | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        for ours, theirs in self.columns.items():
            if ours not in self.ours:
                what = "" if self.task is None else f" that rows of task {self.task} have"
                known = ", ".join(self.ours)
                raise ValueError(f"columns: {ours!r} is none of {known}{what}; write ours=yours")
            if list(self.columns.values()).count(theirs) > 1:
                raise ValueError(f"columns: {theirs!r} is named twice")
        names = self.labels
        if names is None:
            return
        if isinstance(names, str) or not all(isinstance(n, str) and n.strip() for n in names):
            raise ValueError(f"labels: expected a list of names, none of them empty, got {names!r}")
        if len(names) < 2:
            raise ValueError(f"labels: expected at least two names, got {names}")
        if twice := [name for name in names if list(names).count(name) > 1]:
            raise ValueError(f"labels: {twice[0]!r} stands twice; name every class once")

    @property
    def ours(self) -> tuple[str, ...]:
        """Our names of the columns."""
        return COLUMNS.get(self.task, CHOICE_COLUMNS)

    @cached_property
    def names(self) -> dict[str, str]:
        """The data's name for every column of ours."""
        # A name that stands for another of our columns is not also its own.
        taken = {theirs for ours, theirs in self.columns.items() if ours != theirs}
        own = {name: name for name in self.ours if name not in taken}
        return own | dict(self.columns)

    def check(self, present: Sequence[str], source: str) -> None:
        """Refuse a table that lacks columns of its rows.

        Raises:
            RowError: it does.
        """
        for ours, theirs in self.columns.items():
            if theirs not in present:
                self._missing(ours, present, source)
        there = {ours for ours, theirs in self.names.items() if theirs in present}
        if "prompt" in there:
            there.discard("messages")  # each row may have one of them
        if self.task is not None:
            self._check_columns(there, present, source)

    def row(self, fields: Mapping[str, Any], source: str = "row", number: int = 0) -> Row:
        """Check the fields of one row.

        Args:
            fields: values by the data's names.
            source: where they were read, for error messages.
            number: the id of a row without one.

        Raises:
            RowError: a missing field, a wrong type or an impossible value.
        """
        values = {name: _plain(fields.get(theirs)) for name, theirs in self.names.items()}
        there = {name for name, value in values.items() if not _is_absent(value)}
        self._check_columns(there, list(fields), source)
        name, given = self.row_id(fields, source, number), values.get("label")
        if self._is_text(there):
            text = _string(values["text"], "'text'", source)
            label = _label(given, self.labels, "classes", source)
            return Row(name, text=text, label=label, source=source)
        choices = tuple(self.labels or ())
        if "choices" in there:
            choices = _choices(values["choices"], source)
        messages = prompt = None
        if "messages" in there:
            messages = _messages(values["messages"], source)
        else:
            prompt = _string(values["prompt"], "'prompt'", source)
        label = _label(given, choices, "choices", source)
        return Row(name, prompt, choices, label=label, source=source, messages=messages)

    def row_id(self, fields: Mapping[str, Any], source: str, number: int) -> str:
        """Return the id as text; the row's number where there is none.

        Raises:
            RowError: neither a string with text in it nor an integer.
        """
        value = _plain(fields.get(self.names.get("id", "")))
        if _is_absent(value):
            return str(number)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            _fail(source, f"'id' is {_described(value)}", "make it a string or an integer")
        return _string(value, "'id'", source)

    def _is_text(self, there: set[str]) -> bool:
        return self.task == "SEQ_CLS" or (self.task is None and "text" in there)

    def _check_columns(self, there: set[str], present: Sequence[str], source: str) -> None:
        """Refuse columns of ours that do not suffice for a row, or are too many."""
        if self._is_text(there):
            if "text" not in there:
                self._missing("text", present, source)
            return
        asked = there & {"prompt", "messages"}
        if not asked:
            self._missing("prompt" if self.task or "choices" in there else "text", present, source)
        if len(asked) > 1:
            _fail(source, "the row has 'prompt' together with 'messages'", "keep one of them")
        if "choices" not in there and self.labels is None:
            self._missing("choices", present, source)

    def _missing(self, ours: str, present: Sequence[str], source: str) -> NoReturn:
        more = ", or give all rows the same by labels" if ours == "choices" else ""
        if ours == "text" and self.task is None:
            more = ", or prompt=YOURS and choices=YOURS of a choice row"
        theirs = self.columns.get(ours, ours)
        if theirs in present:
            _fail(source, f"nothing in column {theirs!r}", f"write it, or remove the row{more}")
        _fail(
            source,
            f"no column {theirs!r}; there are " + (", ".join(map(repr, present)) or "none"),
            f"name yours by columns, such as {ours}=YOURS{more}",
        )


class ClassIndex(int):
    """A label as a data set stores it: an index into its own classes, with the class's name."""

    name: str

    def __new__(cls, index: int, name: str) -> ClassIndex:  # noqa: D102
        found = super().__new__(cls, index)
        found.name = name
        return found


def decode_object(line: bytes, source: str) -> dict[str, Any]:
    """Return the JSON object on a line, whatever its columns.

    Raises:
        RowError: not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        _fail(source, f"the line is not UTF-8 ({error.reason})", "save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        fault = f"not valid JSON ({getattr(error, 'msg', error)}{place})"
        _fail(source, fault, "write one complete JSON object a line")
    return json_object(value, source)


def json_object(value: Any, source: str) -> dict[str, Any]:
    """Return a value that is a JSON object.

    Raises:
        RowError: it is none.
    """
    if not isinstance(value, dict):
        fault = f"expected a JSON object, found {_described(value)}"
        _fail(source, fault, 'write {"prompt": ..., "choices": [...]} or {"text": ...}')
    return value


def _choices(value: Any, source: str) -> tuple[str, ...]:
    """Read a list of choices, a text with a JSON list, or one with choices parted by "|"."""
    if isinstance(value, str):
        parsed = _json_list(value)
        if parsed is None and value.lstrip().startswith("["):
            _fail(source, f"'choices' is no JSON list: {value[:60]}", 'write ["A", "B"] or A|B')
        value = [c.strip() for c in value.split("|")] if parsed is None else parsed
    if not isinstance(value, list | tuple):
        _fail(source, f"'choices' is {_described(value)}", "make it a list of strings")
    for choice in value:
        _string(choice, "a choice", source)
    if len(value) < 2:
        _fail(source, f"'choices' holds {len(value)}", "give at least two choices")
    if len(set(value)) < len(value):
        twice = sorted({choice for choice in value if value.count(choice) > 1})
        _fail(source, f"choices stand twice: {', '.join(map(repr, twice))}", "make them differ")
    return tuple(value)


def _messages(value: Any, source: str) -> tuple[dict[str, Any], ...]:
    """Read a list of messages, or a text with one as JSON."""
    if isinstance(value, str):
        value = _json_list(value)
    if not isinstance(value, list | tuple) or not value:
        _fail(source, "'messages' is no list of messages", 'write [{"role": ..., "content": ...}]')
    found = []
    for message in value:
        if not isinstance(message, Mapping):
            fault = f"a message is {_described(message)}"
            _fail(source, fault, 'write {"role": ..., "content": ...}')
        for name in ("role", "content"):
            _string(message.get(name), f"{name!r} of a message", source)
        # Other fields are the template's business; in tables they are null where they are not.
        found.append({name: value for name, value in message.items() if value is not None})
    return tuple(found)


def _json_list(text: str) -> Any:
    """Return the JSON list that a text holds, None if it holds none."""
    try:
        return json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None


def _label(value: Any, names: Sequence[str] | None, what: str, source: str) -> int | None:
    """Return a label's index; blank and NaN are none."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, ClassIndex) and names is not None and what == "classes":
        value = value.name  # the data's classes need not stand in the model's order
    if isinstance(value, float) and value.is_integer():  # a column with nulls, by way of pandas
        value = int(value)
    if isinstance(value, str):
        return _index_of(value, names or (), what, source)
    if not isinstance(value, int) or isinstance(value, bool):
        _fail(source, f"'label' is {_described(value)}", "use an integer index, counted from 0")
    if value < 0:
        _fail(source, f"the label {value} is negative", "count from 0, or leave 'label' out")
    _check_range(value, names, what, source)
    return int(value)


def _index_of(label: str, names: Sequence[str], what: str, source: str) -> int:
    """Return the position of a name, or the index that a text holds where no name is a number."""
    same = [i for i, name in enumerate(names) if name == label]
    same = same or [i for i, name in enumerate(names) if name.strip() == label.strip()]
    if len(same) == 1:
        return same[0]
    if _is_index(label) and not any(map(_is_index, names)):
        _check_range(int(label), names or None, what, source)
        return int(label)
    if not names:
        fault = f"the label {label!r} is text; {what} lack names"
        _fail(source, fault, "use its index, or name them by labels")
    fault = f"the label {label!r} is none of the {len(names)} {what} {reprlib.repr(list(names))}"
    _fail(source, fault, "use one of these")


def _check_range(index: int, names: Sequence[str] | None, what: str, source: str) -> None:
    if names is not None and index >= len(names):
        fault = f"the label {index} is outside the {len(names)} {what}"
        _fail(source, fault, f"use an index from 0 to {len(names) - 1}")


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value)  # CSV has no null


def _string(value: Any, name: str, source: str) -> str:
    if not isinstance(value, str):
        more = ", or name a column of messages by columns, messages=YOURS" * (name == "'prompt'")
        _fail(source, f"{name} is {_described(value)}", f"make it a string{more}")
    if not value.strip():
        _fail(source, f"{name} is empty", "write some text into it, or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        fault = f"{name} holds bytes that are not UTF-8, or half of a surrogate pair"
        _fail(source, fault, "save it as UTF-8")
    return value


def _is_index(text: str) -> bool:
    digits = text.strip()
    return digits.isascii() and digits.isdigit() and len(digits) < 10


def _plain(value: Any) -> Any:
    """Turn a value of numpy, torch or pandas into Python's own."""
    if type(value).__name__ == "NAType":
        return None
    return value.tolist() if hasattr(value, "tolist") else value


def _described(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"the number {value}"
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")


def _fail(source: str, fault: str, remedy: str) -> NoReturn:
    raise RowError(f"{source}: {fault}; {remedy}")
