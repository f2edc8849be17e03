"""Multiple-choice questions of WinoGrande, ARC, OpenBookQA and MMLU, read from their files.

A file of another shape is a ValueError that names it and the row.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ARC = re.compile(
    r"Please choose the correct answer to the question: (?P<stem>.+?)\n\n"
    r"(?P<choices>Answer1: .+)\n\nAnswer format: (?P<names>answer1(?:/answer\d)+)",
    re.DOTALL,
)
OPENBOOKQA = re.compile(r"\(A\) (.+?) \(B\) (.+?) \(C\) (.+?) \(D\) (.+)")
OPENBOOKQA_HEADER = ["ID", "Question Stem", "Choices", "Complete Question", "Answer Key"]
MMLU_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        id: The file's own, or file and row number.
        stem: Of WinoGrande the sentence with its gap, "_".
        choices: The answers.
        label: The index of the right one.
    """

    id: str
    stem: str
    choices: tuple[str, ...]
    label: int


def winogrande(path: Path) -> list[Question]:
    """Read WinoGrande's train_*.jsonl or dev.jsonl.

    Sentences come in twins, whose ids differ in the number behind the last dash alone.
    """
    found = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = json.loads(line)
            sentence, answer = row["sentence"], row["answer"]
            choices = (row["option1"], row["option2"])
            name = row["qID"]
        except (ValueError, KeyError, TypeError) as error:
            _fail(path, number, f"not a row of WinoGrande ({error!r})")
        if sentence.count("_") != 1 or answer not in ("1", "2"):
            _fail(path, number, "expected one gap '_' and the answer '1' or '2'")
        found.append(Question(name, sentence, choices, int(answer) - 1))
    return _some(path, found)


def arc(path: Path) -> list[Question]:
    """Read ARC-Easy or ARC-Challenge as instructions; id: folder, file and row number."""
    try:
        rows = json.loads(_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); give ARC's own files") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows; give ARC's own files")
    return _some(path, [_arc(path, i, row) for i, row in enumerate(rows, start=1)])


def _arc(path: Path, number: int, row: Any) -> Question:
    instruction = row.get("instruction") if isinstance(row, dict) else None
    parsed = ARC.fullmatch(instruction) if isinstance(instruction, str) else None
    if parsed is None:
        _fail(path, number, "the instruction is not 'Please choose ... Answer1: ... Answer format'")
    names = parsed["names"].split("/")
    # As many answers as are named: a further "Answer3:" inside a text stays in it.
    pattern = " ".join(rf"Answer{i}: (.+?)" for i in range(1, len(names) + 1))
    choices = re.fullmatch(pattern, parsed["choices"], re.DOTALL)
    if choices is None or row.get("answer") not in names:
        _fail(path, number, f"expected {len(names)} answers and one of {names} as the right one")
    label = names.index(row["answer"])
    return Question(
        f"{path.parent.name}/{path.stem}-{number}", parsed["stem"], choices.groups(), label
    )


def openbookqa(path: Path) -> list[Question]:
    """Read OpenBookQA's train.tsv, dev.tsv or test.tsv (the main set, without the core facts)."""
    lines = _lines(path)
    if not lines or lines[0].split("\t") != OPENBOOKQA_HEADER:
        _fail(path, 1, f"expected the columns {', '.join(OPENBOOKQA_HEADER)}")
    found = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        choices = OPENBOOKQA.fullmatch(cells[2]) if len(cells) == len(OPENBOOKQA_HEADER) else None
        if choices is None or cells[4] not in tuple("ABCD"):
            _fail(path, number, "expected '(A) ... (B) ... (C) ... (D) ...' and a letter")
        found.append(Question(cells[0], cells[1], choices.groups(), "ABCD".index(cells[4])))
    return _some(path, found)


def mmlu(path: Path) -> list[Question]:
    """Read one subject's csv; id: file and row number, the header being row 1."""
    rows = list(csv.reader(io.StringIO(_text(path), newline="")))
    if not rows or rows[0] != MMLU_HEADER:
        _fail(path, 1, f"expected the columns {', '.join(MMLU_HEADER)}")
    found = []
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(MMLU_HEADER) or row[-1] not in tuple("0123"):
            _fail(path, number, "expected a question, four choices and an answer from 0 to 3")
        found.append(Question(f"{path.stem}-{number}", row[0], tuple(row[1:5]), int(row[-1])))
    return _some(path, found)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); check the path") from error


def _lines(path: Path) -> list[str]:
    """Return lines as JSONL and TSV have them: a Unicode line separator inside a text ends none."""
    return _text(path).removesuffix("\n").split("\n")


def _some(path: Path, found: list[Question]) -> list[Question]:
    if not found:
        raise ValueError(f"{path}: holds no questions; give one of the data set's own files")
    return found


def _fail(path: Path, number: int, fault: str) -> NoReturn:
    raise ValueError(f"{path}, row {number}: {fault}; give one of the data set's own files")
