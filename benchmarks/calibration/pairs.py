"""Questions as classification: a question with one of its choices, which is right or wrong."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.questions import Question, arc
from tfb.rows import Row

TOKENS = 48  # the most of a question with its answer; longer ones lose their beginning
WRONG, RIGHT = 0, 1
Text = Callable[[Question, int], str]


def answered(question: Question, choice: int) -> str:
    """The question, and then the choice."""
    return f"{question.stem} {question.choices[choice]}"


def filled(question: Question, choice: int) -> str:
    """A sentence of WinoGrande with the choice in its gap."""
    return question.stem.replace("_", question.choices[choice])


def pair(question: Question, choice: int, text: Text = answered) -> Row:
    """The row of a question with one of its choices."""
    name = f"{question.id}/{choice}"
    label = RIGHT if choice == question.label else WRONG
    return Row(id=name, text=text(question, choice), label=label, source=name)


def wrong(question: Question) -> list[int]:
    """The choices that are not the answer."""
    return [i for i in range(len(question.choices)) if i != question.label]


def one_each(questions: Sequence[Question], key: str, text: Text = answered) -> list[Row]:
    """One row of every question, right and wrong in turn, drawn by ``key``; both rows of one
    question would not be independent."""
    rng = random.Random(key)
    chosen = [q.label if i % 2 else rng.choice(wrong(q)) for i, q in enumerate(questions)]
    return [pair(q, c, text) for q, c in zip(questions, chosen, strict=True)]


def cut(rows: Sequence[Row], tokenizer: Any) -> list[Row]:
    """The last ``TOKENS`` tokens of every text: answers come last."""
    texts = [row.text or "" for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        row
        if len(at) <= TOKENS
        else Row(id=row.id, text=text[at[-TOKENS][0] :], label=row.label, source=row.source)
        for row, text, at in zip(rows, texts, encoded["offset_mapping"], strict=True)
    ]


def arc_questions(data: Path, split: str) -> list[Question]:
    """Challenge and Easy, each question once."""
    kinds = ("Challenge", "Easy")
    found = [q for kind in kinds for q in arc(data / f"arc/ARC-{kind}/{split}.json")]
    return list({ending(q): q for q in found}.values())


def ending(question: Question) -> str:
    """The stem's end in bare letters and digits: questions that differ elsewhere are variants."""
    return re.sub(r"\W+", "", question.stem.lower())[-100:]
