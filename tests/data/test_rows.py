"""Reading of task rows: the two shapes, and an error that names place and remedy for all else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfb.data.readers import read_rows
from tfb.data.rows import ANSWERS, DEEPEST, PROMPTS, Row, RowError, RowFormat, decode_object

CHOICE: dict[str, Any] = {"id": "q1", "prompt": "2+2?", "choices": ["A", "B"], "label": 1}
TEXT: dict[str, Any] = {"id": "t1", "text": "book a table", "label": 3}


def write(path: Path, *rows: Any) -> Path:
    """A JSONL file; strings and bytes are written as they stand."""
    lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    path.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    return path


def parse_row(line: str | bytes, source: str = "row") -> Row:
    line = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    return RowFormat().row(decode_object(line, source), source)


def test_both_shapes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", CHOICE, "", {**TEXT, "id": 7})
    first, second = read_rows(file)
    assert first == Row("q1", "2+2?", ("A", "B"), None, 1, f"{file}:1")
    assert second == Row("7", None, None, "book a table", 3, f"{file}:3")


@pytest.mark.parametrize(
    ("label", "index"),
    [
        (0, 0),
        (1, 1),
        ("A", 0),
        ("B", 1),
        (None, None),
        ("1", 1),
        (" A", 0),
        ("", None),
        (1.0, 1),
        (float("nan"), None),
    ],
)
def test_label_is_an_index_or_a_choice(label: Any, index: int | None) -> None:
    assert parse_row(json.dumps({**CHOICE, "label": label})).label == index


def test_label_may_be_absent() -> None:
    assert parse_row('{"id": 1, "prompt": "p", "choices": ["A", "B"]}').label is None
    assert parse_row('{"id": 1, "text": "p"}').label is None


def test_line_ends_inside_strings_and_byte_order_mark(tmp_path: Path) -> None:
    row = json.dumps({"id": "1", "text": "a\u2028b\x85c"}, ensure_ascii=False)
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n")
    assert read_rows(file)[0].text == "a\u2028b\x85c"


def test_several_files_and_limit(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", {"id": 1, "text": "x"}, {"id": 2, "text": "y"})
    b = write(tmp_path / "b.jsonl", {"id": 3, "text": "z"}, "not json")
    assert [row.id for row in read_rows([a, b], limit=3)] == ["1", "2", "3"]
    assert [row.id for row in read_rows(a, limit=9)] == ["1", "2"]
    with pytest.raises(RowError, match=r"b\.jsonl:2: not valid JSON"):
        read_rows([a, b])
    with pytest.raises(ValueError, match="limit must be at least 1"):
        read_rows(a, limit=0)


BAD_LINES = [
    ('{"id": 1', "not valid JSON .* column", "one complete JSON object"),
    ("[" * 100_000, "not valid JSON", "one complete JSON object"),
    ('{"id": %s, "text": "x"}' % ("9" * 5000), "not valid JSON", "one complete JSON object"),
    ('{"id": 1, "text": "x", "id": 2}', "the key 'id' stands twice", "write one complete"),
    ('{"text": "x", "a": [{"%s": 1, "%s": 2}]}' % (("k" * 999,) * 2), "the key 'kkk", "write one"),
    ('{"text": %s}' % ("[" * 900 + "]" * 900), r"'text' is \[\[\[", "make it a string"),
    ({**CHOICE, "choices": "[" * 100_000}, r"'choices' is '\[\[\[", "write a list"),
    ({**CHOICE, "choices": '["A", {"b": 1, "b": 2}]'}, "'choices' is ", "write a list"),
    ({"messages": "[" * 100_000, "choices": "A|B"}, "'messages' is no list", "write [{"),
    (
        {"messages": '[{"role": "a", "role": "b"}]', "choices": "A|B"},
        "no list of messages",
        "write",
    ),
    (b'{"id": 1, "text": "\xff"}', "not UTF-8", "save the file as UTF-8"),
    ("[1]", r"expected a JSON object, found \[1\]", "write {"),
    ("3", "expected a JSON object, found 3;", "write {"),
    ("null", "expected a JSON object, found None", "write {"),
    ({"id": 1}, "no column 'text'; there are 'id'", "such as text=YOURS"),
    ({"id": 1, "choices": ["A", "B"]}, "no column 'prompt'", "such as prompt=YOURS"),
    ({"id": 1, "prompt": "x"}, "no column 'choices'", "all rows the same by labels"),
    ({**CHOICE, "messages": "[]"}, "'prompt' together with 'messages'", "keep one"),
    ({"messages": "say", "choices": "A|B"}, "'messages' is no list", "write [{"),
    ({"messages": [], "choices": "A|B"}, "'messages' is no list", "write [{"),
    ({"messages": ["x"], "choices": "A|B"}, "a message is 'x'", "write {"),
    ({"messages": [{"role": "user"}], "choices": "A|B"}, "'content' of a message is None", "make"),
    ({**TEXT, "id": 1.5}, "'id' is 1.5", "make it a string"),
    ({**TEXT, "id": True}, "'id' is True", "make it a string"),
    ({**TEXT, "id": " "}, "'id' is empty", "write some text"),
    ({**TEXT, "text": ["x"]}, r"'text' is \['x'\]", "make it a string"),
    ({**TEXT, "text": ""}, "nothing in column 'text'", "write it, or remove the row"),
    ({**TEXT, "text": "\n"}, "'text' is empty", "write some text"),
    ('{"id": 1, "text": "\\ud800"}', "half of a surrogate pair", "save it as UTF-8"),
    ({**TEXT, "label": -1}, "the label -1 is negative", "count from 0"),
    ({**CHOICE, "label": "9" * 5000}, "is none of the 2 choices", "use one of these"),
    ({**TEXT, "label": 10**4000}, "the label 1000.*000 is too large", "count from 0"),
    ({**TEXT, "label": 2**31}, "the label 2147483648 is too large", "count from 0"),
    ({**CHOICE, "label": 1e300}, "the label 1000.* is outside the 2 choices", "count from 0"),
    ({**CHOICE, "label": float("inf")}, "'label' is inf", "an integer index"),
    ({**TEXT, "id": float("nan")}, "'id' is nan", "make it a string"),
    ({**TEXT, "id": 10**4000}, "'id' is 1000", "make it a string"),
    ({**TEXT, "label": "sports"}, "the label 'sports' is text; classes lack names", "by labels"),
    ({**CHOICE, "prompt": None}, "nothing in column 'prompt'", "write it, or remove the row"),
    ({**CHOICE, "prompt": "  "}, "'prompt' is empty", "write some text"),
    ({**CHOICE, "choices": "AB"}, "'choices' holds 1", "at least two"),
    ({**CHOICE, "choices": "['A', 'B']"}, "'choices' is ", 'a list, ["A", "B"], or A|B'),
    ({**CHOICE, "choices": 3}, "'choices' is 3", "write a list"),
    ({**CHOICE, "choices": ["A"]}, "'choices' holds 1", "at least two"),
    ({**CHOICE, "choices": []}, "'choices' holds 0", "at least two"),
    ({**CHOICE, "choices": ["A", 2]}, "a choice is 2", "make it a string"),
    ({**CHOICE, "choices": ["A", ""]}, "a choice is empty", "write some text"),
    ({**CHOICE, "choices": ["A", "B", "A"]}, "the choice 'A' stands twice", "make them differ"),
    ({**CHOICE, "label": 2}, "the label 2 is outside the 2 choices", "count from 0"),
    ({**CHOICE, "label": -1}, "the label -1 is outside the 2 choices", "or leave it out"),
    ({**CHOICE, "label": "C"}, "the label 'C' is none of the 2 choices", "use one of these"),
    ({**CHOICE, "label": 1.5}, "'label' is 1.5", "an integer index"),
    ({**CHOICE, "label": True}, "'label' is True", "an integer index"),
    ({**CHOICE, "label": [1]}, r"'label' is \[1\]", "an integer index"),
]


@pytest.mark.parametrize(("bad", "fault", "remedy"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_line(tmp_path: Path, bad: Any, fault: str, remedy: str) -> None:
    file = write(tmp_path / "rows.jsonl", {"id": "fine", "text": "x"}, bad)
    with pytest.raises(RowError, match=fault) as caught:
        read_rows(file)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize("huge", [10**5000, -(10**5000)], ids=["+", "-"])
def test_integers_that_python_does_not_write(huge: int) -> None:
    for name in ("id", "text", "label"):
        with pytest.raises(RowError, match=rf"row 0: .*(label|'{name}'.* is) .*int.*; "):
            read_rows([{**TEXT, name: huge}], RowFormat(task="SEQ_CLS", labels=["a", "b"]))


def test_many_choices_take_no_quadratic_time() -> None:
    choices = [str(n) for n in range(50_000)]
    assert len(RowFormat().row({"prompt": "x", "choices": choices}).choices or ()) == 50_000
    with pytest.raises(RowError, match="the choice '49999' stands twice; make them differ"):
        RowFormat().row({"prompt": "x", "choices": [*choices, "49999"]})


def test_messages_nested_deep_are_refused() -> None:
    """What is kept of a message can be printed, however deep the call stack is."""

    def nested(levels: int) -> Row:
        tools: Any = {"a": 1}
        for level in range(levels - 1):
            tools = [tools, 1] if level % 2 else {"a": tools}
        said = [{"role": "user", "content": "hi", "tools": tools}]
        return RowFormat().row({"messages": said, "choices": "A|B"})

    assert "hi" in nested(DEEPEST).question
    for levels in (DEEPEST + 1, 900, 100_000):
        with pytest.raises(RowError, match="row: a message is nested more than 100 levels deep; "):
            nested(levels)


def test_few_of_many_columns_are_shown() -> None:
    with pytest.raises(RowError, match=r"there are 'c0', .*'c19', \.\.\.; name yours by") as caught:
        RowFormat().row({f"c{n}": 1 for n in range(100_000)})
    assert len(str(caught.value)) < 500


def test_duplicate_ids_name_both_places(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", {"id": "x", "text": "1"}, {"id": 5, "text": "2"})
    b = write(tmp_path / "b.jsonl", {"id": "5", "text": "3"})
    with pytest.raises(RowError, match=r"b\.jsonl:1: the id '5' was already used at .*a\.jsonl:2"):
        read_rows([a, b])


def test_missing_and_empty(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", TEXT)
    with pytest.raises(RowError, match=r"no\.jsonl: there is no such file"):
        read_rows([good, tmp_path / "no.jsonl"])
    with pytest.raises(RowError, match=r"empty\.jsonl: holds no rows; add some"):
        read_rows(write(tmp_path / "empty.jsonl", "", "  "))
    with pytest.raises(RowError, match="the input: holds no rows"):
        read_rows([])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
COLUMNS = st.sampled_from(["id", "prompt", "messages", "choices", "text", "label", "other"])
ROWS = st.dictionaries(COLUMNS, JSON_VALUES | st.just(["A", "B"]), max_size=5)


def parses_or_row_error(line: str | bytes) -> None:
    try:
        row = parse_row(line, "f:1")
    except RowError as error:
        assert str(error).startswith("f:1: ") and ";" in str(error)
    else:
        asked = row.prompt is not None or row.messages is not None
        assert row.id and (row.text is not None) != asked == (row.choices is not None)
        row.id.encode()  # what is accepted can be written again


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_fuzz_arbitrary_lines(line: str | bytes) -> None:
    parses_or_row_error(line)


@given(JSON_VALUES | ROWS)
def test_fuzz_json_values(value: Any) -> None:
    parses_or_row_error(json.dumps(value))


@given(st.data())
def test_fuzz_broken_rows(data: st.DataObject) -> None:
    """A good line with a piece cut out and another put in."""
    line = json.dumps(data.draw(st.sampled_from([CHOICE, TEXT])))
    start = data.draw(st.integers(0, len(line)))
    end = data.draw(st.integers(start, len(line)))
    parses_or_row_error(line[:start] + data.draw(st.text(max_size=4)) + line[end:])


# --- other names ----------------------------------------------------------------------------------


def test_columns_under_other_names() -> None:
    fields = {"uid": 3, "question": "2+2?", "options": ["A", "B"], "gold": "B", "prompt": "no"}
    columns = {"id": "uid", "prompt": "question", "choices": "options", "label": "gold"}
    assert RowFormat(columns).row(fields) == Row("3", "2+2?", ("A", "B"), None, 1)
    with pytest.raises(RowError, match=r"no column 'body'.* there are 'a'; .* such as text=YOURS"):
        RowFormat({"text": "body"}, task="SEQ_CLS").row({"a": "x"})


def test_other_columns_are_ignored_and_rows_numbered() -> None:
    rows = read_rows([{"text": "x", "weight": 2}, {"text": "y", "id": "b"}, {"text": "z"}])
    assert [(r.id, r.text) for r in rows] == [("0", "x"), ("b", "y"), ("2", "z")]


def test_the_task_decides_where_a_row_could_be_both() -> None:
    both = {"text": "t", "prompt": "p", "choices": ["A", "B"], "label": 1}
    assert RowFormat(task="SEQ_CLS").row(both).text == "t"
    assert RowFormat(task="CAUSAL_LM").row(both).prompt == "p"
    with pytest.raises(RowError, match="no column 'prompt'"):
        RowFormat(task="CAUSAL_LM").row({"text": "t"})


@pytest.mark.parametrize(
    ("label", "index"), [("bad", 0), ("good", 1), (" good ", 1), ("2", 2), (2, 2), ("0", 0)]
)
def test_labels_by_the_names_of_classes(label: Any, index: int) -> None:
    form = RowFormat(labels=["bad", "good", "fair"], task="SEQ_CLS")
    assert form.row({"text": "x", "label": label}).label == index
    for wrong, message in (("fine", "none of the 3 classes"), (3, "outside the 3 classes")):
        with pytest.raises(RowError, match=message):
            form.row({"text": "x", "label": wrong})


def test_a_message_shows_few_of_many_names() -> None:
    form = RowFormat(labels=[f"intent {i}" for i in range(150)], task="SEQ_CLS")
    message = r"none of the 150 classes \['intent 0', .*'intent 5', \.\.\.\]; use one of these"
    with pytest.raises(RowError, match=message):
        form.row({"text": "x", "label": "intend 3"})


def test_names_that_are_numbers_are_no_indices() -> None:
    """ "2" of the stars 1 to 3 is the second one, 2 the third; "0" is neither."""
    form = RowFormat(labels=["1", "2", "3"], task="SEQ_CLS")
    assert [form.row({"text": "x", "label": y}).label for y in ("1", "3", 0, 2)] == [0, 2, 0, 2]
    with pytest.raises(RowError, match=r"'0' is none of the 3 classes .*; use one of these"):
        form.row({"text": "x", "label": "0"})
    choices = {"prompt": "x", "choices": "2 | 1 | 0"}
    labels = [RowFormat().row({**choices, "label": y}).label for y in ("0", "2", 1)]
    assert labels == [2, 0, 1] and RowFormat().row(choices).choices == ("2", "1", "0")


def test_a_column_has_one_meaning() -> None:
    """What stands for another column is not its own as well."""
    said = [{"role": "user", "content": "hi"}]
    row = RowFormat({"messages": "prompt"}).row({"prompt": said, "choices": ["A", "B"]})
    assert row.messages == tuple(said) and row.prompt is None
    assert RowFormat({"prompt": "text"}).row({"text": "x", "choices": "A|B"}).prompt == "x"
    row = RowFormat({"label": "id"}).row({"text": "x", "id": 1}, number=7)
    assert (row.id, row.label) == ("7", 1)
    with pytest.raises(RowError, match=r"'prompt' is \[.*; .*columns, messages=YOURS"):
        RowFormat().row({"prompt": said, "choices": ["A", "B"]})


def test_values_of_other_libraries() -> None:
    for label in (np.int64(1), np.array(1), torch.tensor(1), np.float32(1)):
        row = RowFormat().row({"id": np.int64(3), "text": np.str_("x"), "label": label})
        assert (row.id, row.text, row.label, type(row.label)) == ("3", "x", 1, int)
    choices = np.array(["A", "B"], dtype=object)
    assert RowFormat().row({"prompt": "x", "choices": choices}).choices == ("A", "B")
    with pytest.raises(RowError, match="'label' is b'1'"):
        RowFormat().row({"text": "x", "label": b"1"})


def test_labels_are_the_choices_of_rows_without() -> None:
    form = RowFormat(labels=["yes", "no"], task="CAUSAL_LM")
    assert form.row({"prompt": "x", "label": "no"}) == Row("0", "x", ("yes", "no"), None, 1)
    assert form.row({"prompt": "x", "choices": "A|B", "label": "B"}).choices == ("A", "B")


def test_messages_in_place_of_a_prompt() -> None:
    said = [{"role": "user", "content": "hi", "name": "x"}]
    for messages in (said, json.dumps(said)):
        row = RowFormat().row({"messages": messages, "choices": '["A", "B|C"]', "label": "B|C"})
        assert row.messages == tuple(said) and row.prompt is None
        assert row.choices == ("A", "B|C") and row.label == 1


PROMPT: dict[str, Any] = {"id": "g1", "prompt": "2+2?", "choices": 3, "label": [], "answer": 4}


def test_rows_to_be_continued() -> None:
    """By their prompts alone, whatever else is there, or with the text that is right."""
    free, told = RowFormat({"answer": "gold"}, task=ANSWERS), RowFormat(task=PROMPTS)
    assert told.row(PROMPT) == Row("g1", "2+2?")
    assert free.row({**PROMPT, "gold": " four"}) == Row("g1", "2+2?", answer=" four")
    said = [{"role": "user", "content": "2+2?"}]
    assert told.row({"messages": said}, number=7) == Row("7", messages=tuple(said))
    assert read_rows(["2+2?"], told) == [Row("0", "2+2?", source="row 0")]


@pytest.mark.parametrize(
    ("task", "fields", "fault"),
    [
        (PROMPTS, {"text": "x"}, "no column 'prompt'; there are 'text'; name yours by columns"),
        (PROMPTS, {"prompt": " "}, "'prompt' is empty; write some text"),
        (PROMPTS, {"prompt": 3}, "'prompt' is 3; make it a string"),
        (PROMPTS, {"prompt": "x", "messages": "[]"}, "'prompt' together with 'messages'"),
        (PROMPTS, {"messages": []}, "'messages' is no list of messages"),
        (ANSWERS, {"prompt": "x"}, "no column 'answer'; .* such as answer=YOURS"),
        (ANSWERS, {"prompt": "x", "answer": ""}, "nothing in column 'answer'; write it, or"),
        (ANSWERS, {"prompt": "x", "answer": "\n"}, "'answer' is empty; write some text"),
        (ANSWERS, {"prompt": "x", "answer": 4}, "'answer' is 4; make it a string"),
        (ANSWERS, {"prompt": None, "answer": "4"}, "nothing in column 'prompt'"),
    ],
)
def test_rows_that_cannot_be_continued(task: str, fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(RowError, match=f"^f:3: .*{fault}"):
        RowFormat(task=task).row(fields, "f:3")


def test_settings_that_cannot_be() -> None:
    for how, message in (
        ({"columns": {"question": "prompt"}}, "'question' is none of id, prompt, messages"),
        ({"columns": {"prompt": "x"}, "task": "SEQ_CLS"}, "'prompt' is none of id, text, label;"),
        ({"columns": {"label": "x"}, "task": PROMPTS}, "'label' is none of id, prompt, messages;"),
        ({"columns": {"id": "a", "text": "a"}}, "'a' is named twice"),
        ({"labels": ["a"]}, "two or more names"),
        ({"labels": ["a", "b", "a"]}, r"given twice, got \['a', 'b', 'a'\]"),
        ({"labels": "a,b"}, "got 'a,b'"),
        ({"labels": [1, 2]}, r"got \[1, 2\]"),
        ({"labels": ["a", " "]}, "none of them empty"),
    ):
        with pytest.raises(ValueError, match=message):
            RowFormat(**how)  # type: ignore[arg-type]


def test_a_row_by_hand_says_what_to_write() -> None:
    for wrong in (
        {"id": "good"},
        {"id": "1", "choices": ("A", "B")},
        {"id": "1", "text": "x", "prompt": "y"},
        {"id": "1", "text": "x", "answer": "y"},
        {"id": "1", "prompt": "x", "choices": ("A", "B"), "answer": "A"},
    ):
        with pytest.raises(
            RowError, match=r"write Row\(id='1', text='...'\) or Row\(id='1', prompt"
        ):
            Row(**wrong)
    with pytest.raises(RowError, match="the label 'yes' is no index; write its position"):
        Row("1", text="x", label="yes")  # type: ignore[arg-type]


@given(st.data())
def test_fuzz_cut_lines_are_row_errors(data: st.DataObject) -> None:
    line = json.dumps(data.draw(st.sampled_from([CHOICE, TEXT])))
    with pytest.raises(RowError):
        parse_row(line[: data.draw(st.integers(0, len(line) - 1))])


def test_reference_files(shared: Path) -> None:
    folder = shared / "data" / "clinc-domain"
    counts = {"anchor": 500, "validation": 3000, "test": 4500, "oos": 1000}
    for name, count in counts.items():
        rows = read_rows(folder / f"{name}.jsonl")
        assert len(rows) == count
        assert all((row.label is None) == (name == "oos") for row in rows)
        assert all(row.choices == tuple("ABCDEFGHIJ") for row in rows)
