"""The paper's data sets, from the hub or from a folder of the same files, as the product's rows.

The scripts evaluate on "validation" everywhere but in MMLU, which has only "test". A row's id is
task, split and row number, so that both sources give equal rows where they hold the same questions
in the same order. To add a task: an entry of ``TASKS``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calibration import questions
from benchmarks.calibration.questions import Question
from benchmarks.paper import prompts
from tfb.data.rows import Row

Record = Mapping[str, Any]
ANCHORS = ("train", "held-out")
ORDER_SEED = 42  # of the scripts' anchors, whatever the run's seed


@dataclass(frozen=True)
class TaskSpec:
    """Where a task's questions are and how they are asked.

    Attributes:
        script: The task's name in the scripts, and so in the paths of published adapters.
        hub: The data set's name for ``datasets.load_dataset``.
        config: The configuration's.
        files: A path in the folder of data for each split.
        parse: Makes a question of a hub record.
        read: Reads the questions of such a file.
        ask: Makes a row of a question, an id and a form of the prompts.
    """

    script: str
    hub: str
    config: str | None
    files: Mapping[str, str]
    parse: Callable[[Record], tuple[str, Sequence[str], int]]
    read: Callable[[Path], list[Question]]
    ask: Callable[[Question, str, str], Row]


def parse_winogrande(record: Record) -> tuple[str, Sequence[str], int]:
    choices = (record["option1"], record["option2"])
    return record["sentence"], choices, ("1", "2").index(record["answer"])


def parse_arc(record: Record) -> tuple[str, Sequence[str], int]:
    """Parse labels "A" to "E" or "1" to "5": their place among the choices is what counts."""
    choices = record["choices"]
    label = list(choices["label"]).index(record["answerKey"])
    return record["question"], choices["text"], label


def parse_openbookqa(record: Record) -> tuple[str, Sequence[str], int]:
    return parse_arc({**record, "question": record["question_stem"]})


def parse_boolq(record: Record) -> tuple[str, Sequence[str], int]:
    stem = prompts.boolq_stem(record["passage"], record["question"])
    return stem, prompts.TRUE_FALSE, int(not record["answer"])


def parse_mmlu(record: Record) -> tuple[str, Sequence[str], int]:
    return record["question"], record["choices"], int(record["answer"])


def read_boolq(path: Path) -> list[Question]:
    """Read BoolQ's train.jsonl or dev.jsonl.

    Raises:
        ValueError: A file that cannot be read or a row of another shape, by name.
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); check the path") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["answer"], bool):
                raise TypeError("answer is neither true nor false")
            found.append(_question(str(number), parse_boolq(record)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, row {number}: not a row of BoolQ ({error!r})") from error
    return found


def _winogrande(size: str) -> TaskSpec:
    files = {"train": f"winogrande/train_{size}.jsonl", "validation": "winogrande/dev.jsonl"}
    name, how = f"winogrande_{size}", (parse_winogrande, questions.winogrande, prompts.lettered)
    return TaskSpec(name, "allenai/winogrande", name, files, *how)


def _arc(name: str) -> TaskSpec:
    files = {split: f"arc/{name}/{split}.json" for split in ("train", "validation", "test")}
    return TaskSpec(name, "allenai/ai2_arc", name, files, parse_arc, questions.arc, prompts.arc)


def _mmlu(script: str, subject: str) -> TaskSpec:
    files = {"test": f"mmlu/test/{subject}_test.csv"}
    return TaskSpec(
        script, "cais/mmlu", subject, files, parse_mmlu, questions.mmlu, prompts.lettered
    )


TASKS = {
    "WG-S": _winogrande("s"),
    "ARC-C": _arc("ARC-Challenge"),
    "ARC-E": _arc("ARC-Easy"),
    "WG-M": _winogrande("m"),
    "OBQA": TaskSpec(
        "obqa",
        "allenai/openbookqa",
        "main",
        {
            "train": "openbookqa/train.tsv",
            "validation": "openbookqa/dev.tsv",
            "test": "openbookqa/test.tsv",
        },
        parse_openbookqa,
        questions.openbookqa,
        prompts.openbookqa,
    ),
    "BoolQ": TaskSpec(
        "boolq",
        "google/boolq",
        None,
        {"train": "boolq/train.jsonl", "validation": "boolq/dev.jsonl"},
        parse_boolq,
        read_boolq,
        prompts.boolq,
    ),
    "Chem": _mmlu("MMLU-chem", "college_chemistry"),
    "Phy": _mmlu("MMLU-phy", "college_physics"),
    "Chem-HS": _mmlu("MMLU-chem-hs", "high_school_chemistry"),
    "Phy-HS": _mmlu("MMLU-phy-hs", "high_school_physics"),
}
TRAINED = tuple(name for name, task in TASKS.items() if "train" in task.files)
OOD_FROM = "OBQA"
OOD = ("ARC-C", "ARC-E", "Chem", "Phy")
"""What an adapter of ``OOD_FROM`` is also evaluated on, in the scripts."""


def task_of(name: str, *, trained: bool = False) -> TaskSpec:
    """Return the task of that name; with ``trained``, one that has training rows.

    Raises:
        ValueError: There is none.
    """
    known = TRAINED if trained else tuple(TASKS)
    if name not in known:
        raise ValueError(f"--task {name}: expected one of {', '.join(known)}")
    return TASKS[name]


def evaluation_split(name: str, wanted: str) -> str:
    """Return the split whose rows are evaluated: the wanted one, or the only one there is (MMLU).

    Raises:
        ValueError: The task has no labelled rows in it.
    """
    splits = [split for split in TASKS[name].files if split != "train"]
    if TASKS[name].hub == "cais/mmlu":
        return splits[0]
    if wanted not in splits:
        raise ValueError(
            f"{name} has no labelled rows in its split {wanted!r}; use --split {splits[0]}"
        )
    return wanted


def load_rows(name: str, split: str, data: Path | None, form: str) -> list[Row]:
    """Load a task's rows from the folder ``data``, or, without one, from the hub.

    Raises:
        ValueError: A file that is missing or of another shape, by name, or a hub record that is.
        ImportError: The package ``datasets`` is missing (hub only).
    """
    task = task_of(name)
    if data is None:
        return rows_of_records(name, split, _hub_records(task, split), form)
    path = data / task.files[split]
    if not path.is_file():
        there = [s for s, file in task.files.items() if (data / file).is_file()]
        remedy = "leave --data out to load it from the hub"
        if split != "train" and (others := [s for s in there if s != "train"]):
            remedy = f"use --split {others[0]}, or {remedy}"
        raise ValueError(f"{path}: no such file, so {name} has no {split} rows; {remedy}")
    return _asked(name, split, task.read(path), form)


def rows_of_records(name: str, split: str, records: Iterable[Record], form: str) -> list[Row]:
    """Make rows of records as the hub's data sets have them.

    Raises:
        ValueError: A record of another shape, by task and number.
    """
    found = []
    for i, record in enumerate(records):
        try:
            found.append(_question(str(i), TASKS[name].parse(record)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{TASKS[name].hub}, {split} row {i}: not a row of {name} ({error!r}); its "
                "columns may have changed, use --data with the data set's own files"
            ) from error
    return _asked(name, split, found, form)


def _question(id: str, parts: tuple[str, Sequence[str], int]) -> Question:
    stem, choices, label = parts
    return Question(id, stem, tuple(choices), label)


def _asked(name: str, split: str, found: Sequence[Question], form: str) -> list[Row]:
    return [TASKS[name].ask(q, f"{name}/{split}/{i}", form) for i, q in enumerate(found)]


def _hub_records(task: TaskSpec, split: str) -> Iterable[Record]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            'data sets from the hub need the package datasets: pip install "tfb[paper]", or '
            "name a folder of their files with --data"
        ) from error
    records: Iterable[Record] = load_dataset(task.hub, task.config, split=split)
    return records


def choose_anchors(
    rows: Sequence[Row], anchors: int, train: Sequence[Row] | None
) -> tuple[list[Row], list[Row]]:
    """Return the anchors, and the rows that are evaluated.

    Args:
        rows: The split to evaluate.
        anchors: How many.
        train: The adapter's training rows, to search sigma on as the paper does, with the anchors
            that the scripts take (``Dataset.shuffle(seed=42)``); all of ``rows`` are evaluated
            then. None: held-out anchors, which are taken out of ``rows``.

    Raises:
        ValueError: Held-out anchors that leave nothing to evaluate.
    """
    source = rows if train is None else train
    order = np.random.default_rng(ORDER_SEED).permutation(len(source))
    chosen = [source[i] for i in order[:anchors]]
    if train is not None:
        return chosen, list(rows)
    if len(rows) <= anchors:
        raise ValueError(
            f"--anchor-rows {anchors}: held-out anchors come out of the {len(rows)} rows that are "
            "evaluated, and none would be left; take fewer"
        )
    return chosen, [rows[i] for i in sorted(order[anchors:])]
