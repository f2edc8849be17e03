"""The tasks: which rows an adapter is trained on, fitted on, judged by, and what is out of scope.

    clinc-domain    stories260K, next token over 10 domains; the given adapter is over-confident
    clinc150        stories260K, 150 intents; the given adapter is under-confident
    clinc-fewshot   MiniLM, 150 intents from 10 training rows each
    winogrande      MiniLM, a sentence with its gap filled: rightly or not
    arc             MiniLM, a question and an answer: the right one or not

Training, anchor and test rows share no text, also across seeds: they come from files or parts of
files that do not depend on the seed, which draws from within those. So an ensemble of several
seeds has no test row, and no anchor, among the training rows of any of its members.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import minilm
from benchmarks.calibration.pairs import (
    arc_questions,
    cut,
    ending,
    filled,
    one_each,
    pair,
    wrong,
)
from benchmarks.questions import mmlu, openbookqa, winogrande
from tfb.rows import Row, read_rows

TASKS = ("clinc-domain", "clinc150", "clinc-fewshot", "winogrande", "arc")
GIVEN = {"clinc-domain": "stories260K-clinc-domain", "clinc150": "stories260K-clinc150"}
SHOTS = 10  # training rows of an intent, clinc-fewshot
DOMAIN_ROWS = 2000  # training rows of clinc-domain, as many as the given adapter had
ARC_QUESTIONS = 600  # training questions of arc
ARC_POOL = 2400  # questions of ARC's training files that training rows are drawn from


@dataclass(frozen=True)
class Task:
    """One task at one seed; all lists are shuffled.

    Attributes:
        base: folder of the base model. task_type: "CAUSAL_LM" or "SEQ_CLS". classes: number of
            classes, or of choices.
        train: the rows of our own adapters. Of the 2,000 rows of the given clinc-domain adapter
            the 500 of anchor.jsonl are known; they are among these, the others are not.
        anchors: held out, to fit on. test: to judge by.
        train_anchors: training rows of the seed's adapter, the given ones included, as many as
            anchors (at most the 500 for clinc-domain).
        shifts: rows of another kind, to be told from ``test`` by their uncertainty; out-of-scope
            rows have no label.
    """

    name: str
    seed: int
    base: Path
    task_type: str
    classes: int
    train: list[Row]
    anchors: list[Row]
    test: list[Row]
    train_anchors: list[Row]
    shifts: dict[str, list[Row]]


def shared_folder() -> Path:
    """TFB_SHARED, or the folder ``shared`` beside the repository.

    Raises:
        FileNotFoundError: it holds no data.
    """
    folder = Path(os.environ.get("TFB_SHARED") or Path(__file__).resolve().parents[3] / "shared")
    if not (folder / "data").is_dir():
        raise FileNotFoundError(
            f"{folder} has no folder 'data': set TFB_SHARED to the reference models' and data's"
        )
    return folder


def load_task(
    name: str,
    shared: Path,
    seed: int,
    rows: int = 1000,
    anchors: int = 300,
    shift_rows: int = 500,
) -> Task:
    """The rows of a task, drawn by ``seed``.

    Args:
        shared: folder with ``models``, ``adapters`` and ``data``.
        rows, anchors, shift_rows: the most test rows, anchors and rows of each shift; fewer where
            the files hold no more.

    Raises:
        ValueError: an unknown task, or a number below 1. FileNotFoundError: MiniLM not installed.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r}: expected one of {', '.join(TASKS)}")
    for what, value in (("rows", rows), ("anchors", anchors), ("shift_rows", shift_rows)):
        if value < 1:
            raise ValueError(f"{what}={value}: expected at least 1")
    sizes = rows, anchors, shift_rows
    data = shared / "data"
    if name == "clinc-domain":
        return _clinc_domain(shared, seed, *sizes)
    if name in ("clinc150", "clinc-fewshot"):
        return _intents(name, shared, seed, *sizes)
    if name == "winogrande":
        return _winogrande(data, seed, *sizes)
    return _arc(data, seed, *sizes)


# --- CLINC150 -------------------------------------------------------------------------------------


def intents(shared: Path) -> tuple[dict[str, list[list[str]]], dict[str, int]]:
    """data_small.json ({split: [[text, intent]]}) and the index of each intent, in sorted order."""
    splits = json.loads((shared / "data/clinc150/data_small.json").read_text(encoding="utf-8"))
    names = sorted({intent for _text, intent in splits["train"]})
    return splits, {intent: i for i, intent in enumerate(names)}


def _intents(name: str, shared: Path, seed: int, rows: int, anchors: int, shift_rows: int) -> Task:
    splits, index = intents(shared)
    seen = {text for text, _intent in splits["train"]}

    def made(split: str) -> list[Row]:
        """Rows of a split; held-out ones that repeat a training text are left out."""
        return [
            Row(id=f"{split}-{i}", text=text, label=index.get(intent), source=f"{split}-{i}")
            for i, (text, intent) in enumerate(splits[split])
            if split == "train" or text not in seen
        ]

    train = _shuffled(made("train"), f"{name} train {seed}")
    if name == "clinc-fewshot":
        train = _few(train, SHOTS)
    stories = name == "clinc150"
    return Task(
        name=name,
        seed=seed,
        base=shared / "models/stories260K" if stories else minilm.folder(),
        task_type="SEQ_CLS",
        classes=len(index),
        train=train,
        anchors=_shuffled(made("val"), f"{name} anchors {seed}")[:anchors],
        test=_shuffled(made("test"), f"{name} test {seed}")[:rows],
        train_anchors=train[:anchors],
        shifts={"oos": _shuffled(made("oos_test"), f"{name} oos {seed}")[:shift_rows]},
    )


def _few(rows: Sequence[Row], shots: int) -> list[Row]:
    """The first ``shots`` rows of every label, in the rows' order."""
    count: dict[int | None, int] = {}
    kept = []
    for row in rows:
        count[row.label] = count.get(row.label, 0) + 1
        if count[row.label] <= shots:
            kept.append(row)
    return kept


def _clinc_domain(shared: Path, seed: int, rows: int, anchors: int, shift_rows: int) -> Task:
    folder = shared / "data/clinc-domain"
    known = read_rows(folder / "anchor.jsonl")
    prompts = {row.prompt for row in known}
    domains = json.loads((shared / "data/clinc150/domains.json").read_text(encoding="utf-8"))
    index = {intent: i for i, name in enumerate(sorted(domains)) for intent in domains[name]}
    splits, _ = intents(shared)
    others = [
        Row(
            id=f"train-{i}", prompt=f"{text}? Topic", choices=known[0].choices,
            label=index[intent], source=f"train-{i}",
        )
        for i, (text, intent) in enumerate(splits["train"])
    ]  # fmt: skip
    seen = prompts | {row.prompt for row in others}
    others = [row for row in others if row.prompt not in prompts]
    others = _shuffled(others, f"clinc-domain train {seed}")[: DOMAIN_ROWS - len(known)]

    def held_out(file: str, count: int) -> list[Row]:
        found = [row for row in read_rows(folder / f"{file}.jsonl") if row.prompt not in seen]
        return _shuffled(found, f"clinc-domain {file} {seed}")[:count]

    return Task(
        name="clinc-domain",
        seed=seed,
        base=shared / "models/stories260K",
        task_type="CAUSAL_LM",
        classes=len(domains),
        train=_shuffled(known + others, f"clinc-domain order {seed}"),
        anchors=held_out("validation", anchors),
        test=held_out("test", rows),
        train_anchors=_shuffled(known, f"clinc-domain train anchors {seed}")[:anchors],
        shifts={"oos": held_out("oos", shift_rows)},
    )


# --- pairs: a question and one of its choices, right or wrong -------------------------------------


def _winogrande(data: Path, seed: int, rows: int, anchors: int, shift_rows: int) -> Task:
    train = [
        row
        for q in winogrande(data / "winogrande/train_s.jsonl")
        for row in (pair(q, q.label, filled), pair(q, 1 - q.label, filled))
    ]
    # Twin sentences differ in a word or two: one of each, so that rows are independent.
    twins = {q.id.rsplit("-", 1)[0]: q for q in winogrande(data / "winogrande/dev.jsonl")}
    held = _shuffled(twins.values(), f"winogrande {seed}")
    return _pairs_task(
        "winogrande", seed, train,
        anchors=one_each(held[:anchors], f"winogrande anchors {seed}", filled),
        test=one_each(held[anchors:][::-1][:rows], f"winogrande test {seed}", filled),
        shifts={"arc": one_each(
            _shuffled(arc_questions(data, "test"), f"winogrande arc {seed}")[:shift_rows],
            f"winogrande arc {seed}",
        )},
    )  # fmt: skip


def _arc(data: Path, seed: int, rows: int, anchors: int, shift_rows: int) -> Task:
    pool = _shuffled(arc_questions(data, "train"), "arc")  # of no seed: see the head of the file
    known = {ending(q) for q in pool}
    training = _shuffled(pool[:ARC_POOL], f"arc train {seed}")[:ARC_QUESTIONS]
    rng = random.Random(f"arc pairs {seed}")
    train = [row for q in training for row in (pair(q, q.label), pair(q, rng.choice(wrong(q))))]
    held = _shuffled(pool[ARC_POOL:], f"arc anchors {seed}")[:anchors]
    test = [q for q in arc_questions(data, "test") if ending(q) not in known]
    subjects = sorted((data / "mmlu/test").glob("*.csv"))
    others = {
        "openbookqa": openbookqa(data / "openbookqa/test.tsv"),
        "mmlu": [q for path in subjects for q in mmlu(path)],
    }
    return _pairs_task(
        "arc", seed, train,
        anchors=one_each(held, f"arc anchors {seed}"),
        test=one_each(_shuffled(test, f"arc test {seed}")[:rows], f"arc test {seed}"),
        shifts={
            name: one_each(_shuffled(found, f"arc {name} {seed}")[:shift_rows], f"{name} {seed}")
            for name, found in others.items()
        },
    )  # fmt: skip


def _pairs_task(
    name: str,
    seed: int,
    train: list[Row],
    *,
    anchors: list[Row],
    test: list[Row],
    shifts: dict[str, list[Row]],
) -> Task:
    """A MiniLM task of two classes, its texts cut."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(minilm.folder()))
    train = cut(_shuffled(train, f"{name} train order {seed}"), tokenizer)
    return Task(
        name=name,
        seed=seed,
        base=minilm.folder(),
        task_type="SEQ_CLS",
        classes=2,
        train=train,
        anchors=cut(anchors, tokenizer),
        test=cut(test, tokenizer),
        train_anchors=train[: len(anchors)],
        shifts={name: cut(rows, tokenizer) for name, rows in shifts.items()},
    )


def _shuffled(items: Iterable[Any], key: str) -> list[Any]:
    """A new list, in an order that is a function of ``key``."""
    found = list(items)
    random.Random(key).shuffle(found)
    return found
