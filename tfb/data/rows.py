"""Task rows: fields under any names to rows that are checked, before any model is loaded.

    {"id": "q1", "prompt": "... Answer:", "choices": ["A", "B"], "label": 1}     choice row
    {"id": "t1", "text": "book me a table", "label": 3}                          text row
    {"id": "g1", "prompt": "... Answer:", "answer": "B"}                         answer row

A chat has ``messages`` in place of ``prompt``. ``label`` (index, or text of a choice or class) and
``id`` may be left out. Every fault names the place, the fault and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

from tfb.plain import listed, parse_json, repeated, shown

CHOICE_COLUMNS = ("id", "prompt", "messages", "choices", "label")
DEEPEST = 100  # levels of a message or kept value; JSON gives up a little below a thousand
# What rows are where it is not the model's task that tells: prompts to continue, with an answer.
PROMPTS, ANSWERS = "prompts", "answers"
COLUMNS = {
    "SEQ_CLS": ("id", "text", "label"),
    PROMPTS: ("id", "prompt", "messages"),
    ANSWERS: ("id", "prompt", "messages", "answer"),
    None: (*CHOICE_COLUMNS, "text"),
}


class RowError(ValueError):
    """A row that cannot be used. The message names the place, the fault and the remedy."""


@dataclass(frozen=True)
class Row:
    """One task row: a text row has `text`, any other `prompt` or `messages`.

    Behind these a choice row has `choices`, and a row to write text for may have an `answer`.

    Attributes:
        id: its name in results.
        prompt: what choices or an answer continue.
        choices: two or more answers.
        text: what a classification head reads.
        label: position of the right choice or class, from 0; None where it is not known.
        source: where the row was read, "file.jsonl:12"; used in error messages only.
        messages: of a chat: role, content and what else the template reads of each.
        answer: the text that is right.

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
    answer: str | None = None

    @property
    def question(self) -> str:
        """What is asked, as text: rows that ask the same are the same, whatever their ids."""
        return repr((self.text, self.prompt, self.messages, self.choices))

    def __post_init__(self) -> None:
        asked = [self.text, self.prompt, self.messages].count(None) == 2
        behind = (self.choices is not None) + (self.answer is not None)
        if not asked or behind > (self.text is None):
            raise RowError(
                f"Row({self.id!r}): a row has one of text, prompt and messages, and behind the "
                "last two may have choices or an answer; write Row(id='1', text='...') or "
                "Row(id='1', prompt='...', choices=('A', 'B'), label=0)"
            )
        if self.label is not None and type(self.label) is not int:
            fault = f"the label {self.label!r} is no index"
            _fail(f"Row({self.id!r})", fault, "write its position, counted from 0")


def fitted_task(task: str, columns: Mapping[str, str]) -> str:
    """Return what rows of a fit are: ``ANSWERS`` where a column is the answer, else the model's.

    Raises:
        ValueError: an answer, and the model is no causal language model.
    """
    if "answer" not in columns:
        return task
    if both := sorted({"choices", "label"} & columns.keys()):
        raise ValueError(f"columns: 'answer' stands in place of {both[0]!r}; leave one of them out")
    if task != "CAUSAL_LM":
        raise ValueError(f"columns: 'answer' needs a causal language model, not {task}")
    return ANSWERS


def task_of(rows: Sequence[Row], task: str) -> str:
    """Return ``ANSWERS`` for rows that have one, else the model's task."""
    return ANSWERS if any(row.answer is not None for row in rows) else task


def prompt_columns(columns: Mapping[str, str]) -> dict[str, str]:
    """Return the names of columns without those of what a fit reads behind its prompts."""
    behind = ("choices", "label", "answer")
    return {ours: theirs for ours, theirs in columns.items() if ours not in behind}


def check_labels(rows: Sequence[Row], needed: str, remedy: str) -> None:
    """Refuse the first row without a label, by file and line.

    Args:
        rows: the rows.
        needed: what needs one.
        remedy: how to name its column.

    Raises:
        RowError: there is one.
    """
    if bare := [row.source for row in rows if row.label is None]:
        raise RowError(f"{bare[0]}: no label; {needed}; if its column has another name: {remedy}")


@dataclass(frozen=True)
class RowFormat:
    """How fields become rows.

    Attributes:
        columns: the data's name for each of ours that it calls otherwise: {"text": "sentence"}.
        labels: names of the classes, in the order of the head's outputs; the choices of choice
            rows that bring none.
        task: "SEQ_CLS" reads text rows, "CAUSAL_LM" and "SEQ_2_SEQ_LM" choice rows, ``PROMPTS``
            rows with nothing behind the prompt, ``ANSWERS`` those with an answer; None: text rows
            and choice rows, each as what it is.
        optional: our names of columns that are in ``columns`` and may be missing all the same.

    Raises:
        ValueError: a name that no row has, one that is given twice, or fewer than two labels.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Sequence[str] | None = None
    task: str | None = None
    optional: Sequence[str] = ()

    def __post_init__(self) -> None:
        for ours, theirs in self.columns.items():
            if ours not in self.ours:
                known = ", ".join(self.ours)
                raise ValueError(f"columns: {ours!r} is none of {known}; write ours=yours")
            if list(self.columns.values()).count(theirs) > 1:
                raise ValueError(f"columns: {theirs!r} is named twice")
        names = self.labels
        if names is not None and (
            isinstance(names, str)
            or not all(isinstance(name, str) and name.strip() for name in names)
            or len(set(names)) < max(2, len(names))
        ):
            raise ValueError(
                "labels: expected two or more names, none of them empty or given twice, got "
                f"{shown(names)}"
            )

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
        """Refuse a table that lacks columns of its rows, or names one twice.

        Raises:
            RowError: it does.
        """
        if (twice := repeated(present)) is not None:
            fault = f"the column {shown(twice)} stands twice"
            _fail(source, fault, "give every column a name of its own")
        for ours, theirs in self.columns.items():
            if theirs not in present and ours not in self.optional:
                self._missing(ours, present, source)
        there = {ours for ours, theirs in self.names.items() if theirs in present}
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
        values = {ours: _plain(fields.get(theirs)) for ours, theirs in self.names.items()}
        given = {name: v for name, v in values.items() if v is not None and v != ""}
        self._check_columns(given.keys(), list(fields), source)
        name, label = self.row_id(fields, source, number), given.get("label")
        if self._is_text(given.keys()):
            text = _string(given["text"], "'text'", source)
            index = _label(label, self.labels, "classes", source)
            return Row(name, text=text, label=index, source=source)
        if "prompt" in given and "messages" in given:
            _fail(source, "the row has 'prompt' together with 'messages'", "keep one of them")
        messages = prompt = None
        if "messages" in given:
            messages = _messages(given["messages"], source)
        else:
            prompt = _string(given["prompt"], "'prompt'", source)
        if self.task in (PROMPTS, ANSWERS):
            answer = _string(given["answer"], "'answer'", source) if self.task == ANSWERS else None
            return Row(name, prompt, source=source, messages=messages, answer=answer)
        choices = tuple(self.labels or ())
        if "choices" in given:
            choices = _choices(given["choices"], source)
        index = _label(label, choices, "choices", source)
        return Row(name, prompt, choices, label=index, source=source, messages=messages)

    def row_id(self, fields: Mapping[str, Any], source: str, number: int) -> str:
        """Return the id as text; the row's number where there is none.

        Raises:
            RowError: neither a string with text in it nor an integer of a usual size.
        """
        value = _plain(fields.get(self.names.get("id", "")))
        if value is None or value == "":
            return str(number)
        # Python writes no integers of more than 4,300 digits.
        short = type(value) is int and value.bit_length() < 10_000
        return str(value) if short else _string(value, "'id'", source)

    def _is_text(self, there: Set[str]) -> bool:
        return self.task == "SEQ_CLS" or (self.task is None and "text" in there)

    def _check_columns(self, there: Set[str], present: Sequence[str], source: str) -> None:
        """Refuse columns of ours that do not suffice for a row."""
        if self._is_text(there):
            needed = ["text"]
        elif there & {"prompt", "messages"}:
            choices = ["choices"] if self.labels is None else []
            needed = {PROMPTS: [], ANSWERS: ["answer"]}.get(self.task or "", choices)
        else:
            needed = ["prompt" if self.task or "choices" in there else "text"]
        for name in needed:
            if name not in there:
                self._missing(name, present, source)

    def _missing(self, ours: str, present: Sequence[str], source: str) -> NoReturn:
        more = ""
        if ours == "choices":
            more = (
                ", or give all rows the same by labels; prompts with answers can be fitted to, and "
                "prompts alone be continued by score"
            )
        if ours == "text" and self.task is None:
            more = ", or prompt=YOURS and choices=YOURS of a choice row"
        theirs = self.columns.get(ours, ours)
        if theirs in present:
            _fail(source, f"nothing in column {theirs!r}", f"write it, or remove the row{more}")
        there = listed([*map(shown, present)], 20) or "none"
        remedy = f"name yours by columns, such as {ours}=YOURS{more}"
        _fail(source, f"no column {theirs!r}; there are {there}", remedy)


class ClassIndex(int):
    """A label as a data set stores it: an index into its own classes, with the class's name."""

    name: str

    def __new__(cls, index: int, name: str) -> ClassIndex:  # noqa: D102
        found = super().__new__(cls, index)
        found.name = name
        return found


def decode_object(data: Any, source: str) -> dict[str, Any]:
    """Return the JSON object in UTF-8 bytes, or the object that was decoded already.

    Raises:
        RowError: not UTF-8, not JSON, not an object, or a key that stands twice in one.
    """
    try:
        value = parse_json(data) if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        fault = f"the line is not UTF-8 ({error.reason})"
        _fail(source, fault, "save the file as UTF-8, or name it by its format")
    except ValueError as error:
        _fail(source, f"not valid JSON ({error})", "write one complete JSON object a line")
    if not isinstance(value, dict):
        fault = f"expected a JSON object, found {shown(value)}"
        _fail(source, fault, 'write {"prompt": ..., "choices": [...]} or {"text": ...}')
    return value


def _choices(value: Any, source: str) -> tuple[str, ...]:
    """Read a list of choices, a text with a JSON list, or one with choices parted by "|"."""
    if isinstance(value, str):
        parts = [choice.strip() for choice in value.split("|")]
        value = _json_list(value) if value.lstrip().startswith("[") else parts
    if not isinstance(value, list | tuple):
        _fail(source, f"'choices' is {shown(value)}", 'write a list, ["A", "B"], or A|B')
    for choice in value:
        _string(choice, "a choice", source)
    if len(value) < 2:
        _fail(source, f"'choices' holds {len(value)}", "give at least two choices")
    if (twice := repeated(value)) is not None:
        _fail(source, f"the choice {shown(twice)} stands twice", "make them differ")
    return tuple(value)


def _messages(value: Any, source: str) -> tuple[dict[str, Any], ...]:
    """Read a list of messages, or a text with one as JSON."""
    value = _json_list(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not value:
        _fail(source, "'messages' is no list of messages", 'write [{"role": ..., "content": ...}]')
    for message in value:
        if not isinstance(message, Mapping):
            fault = f"a message is {shown(message)}"
            _fail(source, fault, 'write {"role": ..., "content": ...}')
        for name in ("role", "content"):
            _string(message.get(name), f"{name!r} of a message", source)
    # Other fields are the template's business; in tables they are null where they are not.
    said = tuple({name: v for name, v in message.items() if v is not None} for message in value)
    if any(is_deep(v, DEEPEST) for message in said for v in message.values()):
        fault = f"a message is nested more than {DEEPEST} levels deep"
        _fail(source, fault, "leave that field out, or write it as text")
    return said


def is_deep(value: Any, levels: int) -> bool:
    """Return whether lists and dicts hold values below some levels: such cannot be written."""
    if not isinstance(value, Mapping | list | tuple):
        return False
    inner = value.values() if isinstance(value, Mapping) else value
    return any(levels == 0 or is_deep(each, levels - 1) for each in inner)


def _json_list(text: str) -> Any:
    """Return what a text holds as JSON, else the text."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def _label(value: Any, names: Sequence[str] | None, what: str, source: str) -> int | None:
    """Return a label's index; blank and NaN are none."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, ClassIndex) and names is not None and what == "classes":
        value = value.name  # the data's classes need not stand in the model's order
    if isinstance(value, float) and value.is_integer():  # a column with nulls, by way of pandas
        value = int(value)
    if isinstance(value, str):
        value = _index_of(value, names or (), what, source)
    if not isinstance(value, int) or isinstance(value, bool):
        _fail(source, f"'label' is {shown(value)}", "use an integer index, counted from 0")
    if not 0 <= value < (2**31 if names is None else len(names)):  # results hold 32 bits
        within = "negative" if value < 0 else "too large"
        within = within if names is None else f"outside the {len(names)} {what}"
        _fail(source, f"the label {shown(value)} is {within}", "count from 0, or leave it out")
    return int(value)


def _index_of(label: str, names: Sequence[str], what: str, source: str) -> int:
    """Return the position of a name, or the index that a text holds where no name is a number."""
    if label in names:
        return names.index(label)
    bare = [name.strip() for name in names]
    if label.strip() in bare:
        return bare.index(label.strip())
    if label.strip().isdecimal() and len(label) < 10 and not any(map(str.isdecimal, bare)):
        return int(label)
    if not names:
        fault = f"the label {shown(label)} is text; {what} lack names"
        _fail(source, fault, "use its index, or name them by labels")
    told = shown(list(names))
    fault = f"the label {shown(label)} is none of the {len(names)} {what} {told}"
    _fail(source, fault, "use one of these")


def _string(value: Any, name: str, source: str) -> str:
    if not isinstance(value, str):
        more = ", or name a column of messages by columns, messages=YOURS" * (name == "'prompt'")
        _fail(source, f"{name} is {shown(value)}", f"make it a string{more}")
    if not value.strip():
        _fail(source, f"{name} is empty", "write some text into it, or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        fault = f"{name} holds bytes that are not UTF-8, or half of a surrogate pair"
        _fail(source, fault, "save it as UTF-8")
    return value


def _plain(value: Any) -> Any:
    """Turn a value of numpy, torch or pandas into Python's own."""
    if type(value).__name__ == "NAType":  # is neither equal to anything nor true or false
        return None
    return value.tolist() if hasattr(value, "tolist") else value


def _fail(source: str, fault: str, remedy: str) -> NoReturn:
    raise RowError(f"{source}: {fault}; {remedy}")
