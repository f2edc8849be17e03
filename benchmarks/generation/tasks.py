"""The tasks of generation: prompts, the answers that are right, and prompts out of scope.

    intent      an utterance of CLINC150; its intent in words. Out of scope: those of no intent
    intent-few  the same, trained on a fifth of the rows, long
    sums        two numbers below 100 in words; their sum. Out of scope: differences, products

Answers have several tokens. Training, anchor and test rows come from parts that do not depend on
the seed, and share no utterance and no pair of numbers, in either order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

from benchmarks.calibration.tasks import intents

TASKS = ("intent", "intent-few", "sums")
ADAPTERS = Path(__file__).resolve().parent / "adapters"
BASE = ADAPTERS / "stories260K"  # the given model with the end token that it knows: see train.py
ANCHORS, TEST, SHIFT = 300, 700, 500  # rows
FEW = 1500  # training rows of intent-few
TRAIN_PAIRS, HELD_PAIRS = 2500, 500  # of the 5,050 pairs of numbers; the rest is for tests
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


@dataclass(frozen=True)
class Example:
    """A prompt, and the text that should follow it after a space."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """One task at one seed; all lists are shuffled.

    Attributes:
        name: Of ``TASKS``.
        seed: Of the draw and the order of the rows.
        base: Folder of the base model, which ``benchmarks.generation.train`` makes.
        train: Rows of the adapter.
        anchors: Held out, to fit on.
        test: To judge by.
        shift: Prompts out of scope. None has a right answer.
    """

    name: str
    seed: int
    base: Path
    train: list[Example]
    anchors: list[Example]
    test: list[Example]
    shift: list[str]


def load_task(name: str, shared: Path, seed: int) -> Task:
    """Return the rows of a task.

    Args:
        name: Of ``TASKS``.
        shared: Folder with ``data``.
        seed: Of the draw.

    Raises:
        ValueError: An unknown task.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r}: expected one of {', '.join(TASKS)}")
    parts = _sums() if name == "sums" else _intent(shared)

    def drawn(part: str, most: int) -> list[Example]:
        rows = parts[part]
        return random.Random(f"{name} {part} {seed}").sample(rows, min(most, len(rows)))

    return Task(
        name=name,
        seed=seed,
        base=BASE,
        train=drawn("train", FEW if name == "intent-few" else len(parts["train"])),
        anchors=drawn("anchors", ANCHORS),
        test=drawn("test", TEST),
        shift=[row.prompt for row in drawn("shift", SHIFT)],
    )


def adapter_folder(root: Path, task: str, seed: int) -> Path:
    """Return the folder of an adapter, trained or not."""
    return root / f"{task}-{seed}"


def exact(text: str, answer: str) -> bool:
    """Whether a decoded text, without special tokens, is the answer but for space around it."""
    return text.strip() == answer


def tokens(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt, and those of the answer with the end token.

    Both are parts of one text's tokens, as generation from the prompt's tokens continues them.
    """
    prompt = tokenizer(example.prompt)["input_ids"]
    text = tokenizer(f"{example.prompt} {example.answer}")["input_ids"]
    assert text[: len(prompt)] == prompt, f"{example}: the prompt's tokens change"
    return prompt, [*text[len(prompt) :], tokenizer.eos_token_id]


def words(number: int) -> str:
    """Return a number from 0 to 199 in words, without hyphens."""
    if number < 20:
        return ONES.split()[number]
    head, rest = "one hundred", number - 100
    if number < 100:
        head, rest = TENS.split()[number // 10 - 2], number % 10
    return f"{head} {words(rest)}" if rest else head


def _intent(shared: Path) -> dict[str, list[Example]]:
    splits, _ = intents(shared)
    seen = {text for text, _intent in splits["train"]}
    names = {"train": "train", "anchors": "val", "test": "test", "shift": "oos_test"}
    return {
        part: [
            Example(f"{text}? Intent:", intent.replace("_", " "))
            for text, intent in splits[split]
            if part == "train" or text not in seen
        ]
        for part, split in names.items()
    }


def _sums() -> dict[str, list[Example]]:
    pairs = list(combinations_with_replacement(range(100), 2))
    random.Random("sums").shuffle(pairs)

    def made(chosen: Sequence[tuple[int, int]], operators: Sequence[str]) -> list[Example]:
        """Examples of pairs in both orders."""
        return [
            Example(f"{words(x)} {operator} {words(y)} is", words(a + b))
            for a, b in chosen
            for x, y in dict.fromkeys([(a, b), (b, a)])
            for operator in operators
        ]

    held = TRAIN_PAIRS + HELD_PAIRS
    return {
        "train": made(pairs[:TRAIN_PAIRS], ["plus"]),
        "anchors": made(pairs[TRAIN_PAIRS:held], ["plus"]),
        "test": made(pairs[held:], ["plus"]),
        "shift": made(pairs[held:], ["minus", "times"]),
    }
