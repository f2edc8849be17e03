"""Questions as next-token tasks: prompts, choices and label tokens.

The templates are those of the authors' scripts (Wang-ML-Lab/bayesian-peft), because a published
adapter knows no other: in form "script" with all their slips, in form "plain" without them, for
adapters of one's own. README.md of this folder has the differences in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.calibration.questions import Question
from tfb.data.batching import EncodedRows
from tfb.data.encoding import RowEncoder
from tfb.data.rows import Row, RowError

FORMS = ("script", "plain")
LETTERS = "ABCDE"
TEMPLATE = (
    "Return the label of the correct answer for the question below.\n\n"
    "Question: {stem}\n{heading}:\n{choices}\nAnswer:"
)
BOOLQ = (
    "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
    "Passage: {stem}\nAnswer (true or false):"
)
PASSAGE = 1024  # characters of a BoolQ passage, as in the scripts
TRUE_FALSE = ("True", "False")


def boolq_stem(passage: str, question: str) -> str:
    """Return a BoolQ question's stem: the passage, cut as in the scripts, and the question."""
    return f"{passage[:PASSAGE]}\nQuestion: {question}"


def lettered(question: Question, id: str, form: str) -> Row:
    """Ask WinoGrande and MMLU: "A) text" in both forms."""
    return _row(question, id, "Choices", letter_first=True)


def arc(question: Question, id: str, form: str) -> Row:
    """Ask ARC: the letter behind the text in form "script"."""
    return _row(question, id, "Choices", letter_first=form == "plain")


def openbookqa(question: Question, id: str, form: str) -> Row:
    """Ask OpenBookQA as ARC, with the scripts' spelling of the heading in form "script"."""
    heading = "Choices" if form == "plain" else "Chioces"
    return _row(question, id, heading, letter_first=form == "plain")


def boolq(question: Question, id: str, form: str) -> Row:
    """Ask BoolQ: the words themselves are the choices; exchanged in form "script"."""
    label = question.label if form == "plain" else 1 - question.label
    return Row(
        id=id, prompt=BOOLQ.format(stem=question.stem), choices=TRUE_FALSE, label=label, source=id
    )


def _row(question: Question, id: str, heading: str, *, letter_first: bool) -> Row:
    letters = tuple(LETTERS[: len(question.choices)])
    pairs = zip(letters, question.choices, strict=True)
    lines = (f"{a}) {text}" if letter_first else f"{text}) {a}" for a, text in pairs)
    prompt = TEMPLATE.format(stem=question.stem, heading=heading, choices="\n".join(lines))
    return Row(id=id, prompt=prompt, choices=letters, label=question.label, source=id)


def encode(rows: Sequence[Row], tokenizer: Any, config: Any, form: str) -> EncodedRows:
    """Encode rows as the product does; in form "script" with the scripts' label tokens.

    Args:
        rows: Questions that were asked.
        tokenizer: The base model's.
        config: The base model's configuration.
        form: "script" or "plain".

    Raises:
        RowError: A row that the tokenizer or the model cannot take, or, in form "script", choices
            that are no single token or share one.
    """
    label_tokens = "all" if form == "plain" else "last"  # which leaves prompts as they are
    encoded = RowEncoder.of(tokenizer, "CAUSAL_LM", config, label_tokens=label_tokens)(rows)
    if form == "plain":
        return encoded
    known = {choice: label_token(choice, tokenizer) for row in rows for choice in row.choices or ()}
    label_ids = [tuple(known[choice] for choice in row.choices or ()) for row in rows]
    for row, ids in zip(rows, label_ids, strict=True):
        if len(set(ids)) < len(ids):
            raise RowError(
                f"{row.source}: the scripts' label tokens of {row.choices} are {ids}, not all "
                "different; use --prompts plain"
            )
    return replace(encoded, label_ids=label_ids, choice_ids=None)


def label_token(choice: str, tokenizer: Any) -> int:
    """Return the scripts' label token of a choice: the last one of the choice encoded alone.

    Raises:
        RowError: The choice is more than one token, a leading space apart.
    """
    ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.decode(ids[-1:]).strip() != choice:
        raise RowError(
            f"the tokenizer splits {choice!r} into {len(ids)} tokens, and the scripts score its "
            "last one alone; use --prompts plain"
        )
    return int(ids[-1])
