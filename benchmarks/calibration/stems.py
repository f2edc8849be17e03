"""Questions without their choices, to be told apart by where they come from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.calibration.questions import Question
from tfb.data.rows import Row

TOKENS = 48  # the most of a stem; longer ones lose their beginning, the question itself comes last


def stems(questions: Iterable[Question], label: int | None, prefix: str) -> list[Row]:
    """Rows of one class, or of a shift (label None), each stem once."""
    once = {ending(q.stem): q for q in questions}
    return [
        Row(id=f"{prefix}-{i}", text=q.stem, label=label, source=f"{prefix}-{i}")
        for i, q in enumerate(once.values())
    ]


def unseen(rows: Sequence[Row], seen: Sequence[Row]) -> list[Row]:
    """Return the rows whose stem no row of ``seen`` has, variants included."""
    known = {ending(str(row.text)) for row in seen}
    return [row for row in rows if ending(str(row.text)) not in known]


def cut(rows: Sequence[Row], tokenizer: Any) -> list[Row]:
    """Keep the last ``TOKENS`` tokens of every text."""
    texts = [row.text or "" for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        row
        if len(at) <= TOKENS
        else Row(id=row.id, text=text[at[-TOKENS][0] :], label=row.label, source=row.source)
        for row, text, at in zip(rows, texts, encoded["offset_mapping"], strict=True)
    ]


def ending(stem: str) -> str:
    """Return a stem's end in bare letters and digits; stems that differ elsewhere are variants."""
    return re.sub(r"\W+", "", stem.lower())[-100:]
