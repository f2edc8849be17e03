"""The tasks: which rows an adapter is trained on, fitted on, judged by, and what is out of scope.

    clinc-domain    stories260K, next token over 10 domains; the given adapter is over-confident
    clinc150        stories260K, 150 intents; the given adapter is a little over-confident
    clinc150-early  the same, by adapters of our own whose training stops early: under-confident
    clinc-fewshot   MiniLM, 150 intents from 10 training rows each
    exam            MiniLM, a science question: of ARC-Challenge, ARC-Easy or OpenBookQA
    subject         MiniLM, a question of MMLU: which of its four subjects; few rows
    difficulty      MiniLM, a question of ARC: of its easy or of its challenge set
    banking         stories260K, next token over 15 intents of one domain

The last two were not looked at while defaults were chosen.

Training, anchor and test rows share no text letter for letter, also across seeds: they come from
files or parts of files that do not depend on the seed, which draws from within those. So an
ensemble of several seeds has no test row, and no anchor, among the training rows of any of its
members. A few of CLINC's rows (at seed 0 up to 2 of 1,000 test rows) repeat a training row but for
case or punctuation.

WinoGrande and ARC as sentences with a right or wrong answer were tried for the harder two: a
LoRA-adapted MiniLM stays at chance on both, so there is no confidence to calibrate
(benchmarks/NOTES.md).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.calibration.questions import arc, mmlu, openbookqa, winogrande
from benchmarks.calibration.stems import cut, stems, unseen
from benchmarks.environment import minilm_folder
from tfb.data.readers import read_rows
from tfb.data.rows import Row

TASKS = (
    "clinc-domain",
    "clinc150",
    "clinc150-early",
    "clinc-fewshot",
    "exam",
    "subject",
    "difficulty",
    "banking",
)
GIVEN = {"clinc-domain": "stories260K-clinc-domain", "clinc150": "stories260K-clinc150"}
LABEL_TOKENS = "last"  # of next tokens: the convention that the given adapter was trained with
SHOTS = 10  # training rows of an intent, clinc-fewshot
DOMAIN_ROWS = 2000  # training rows of clinc-domain, as many as the given adapter had
SOURCES = {  # of questions to be told apart
    "exam": ("arc/ARC-Challenge/{}.json", "arc/ARC-Easy/{}.json", "openbookqa/{}.tsv"),
    "difficulty": ("arc/ARC-Challenge/{}.json", "arc/ARC-Easy/{}.json"),
}
SOURCE_ROWS = 200  # training rows of a class
SOURCE_POOL = 600  # rows of a class of the training files that training rows are drawn from
SOURCE_HELD, SOURCE_TEST = 400, 450  # rows of a class: anchors, of the training files; test
BANKING = "ABCDEFGHIJKLMNO"
SUBJECTS = ("college_chemistry", "college_physics", "high_school_chemistry", "high_school_physics")
SUBJECT_POOL, SUBJECT_ANCHORS = 0.45, 0.15  # shares of MMLU's rows; the rest is test
SUBJECT_ROWS = 0.8  # training rows, a share of their pool


@dataclass(frozen=True)
class Task:
    """One task at one seed; all lists are shuffled.

    Attributes:
        name: of ``TASKS``.
        seed: of the rows.
        base: folder of the base model.
        task_type: "CAUSAL_LM" or "SEQ_CLS".
        classes: number of classes, or of choices.
        train: the rows of our own adapters. Of the 2,000 rows of the given clinc-domain adapter
            the 500 of anchor.jsonl are known; they are among these, the others are not.
        anchors: held out, to fit on.
        test: to judge by.
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


def load_task(
    name: str,
    shared: Path,
    seed: int,
    rows: int = 1000,
    anchors: int = 300,
    shift_rows: int = 500,
) -> Task:
    """Return the rows of a task, drawn by ``seed``; fewer where the files hold no more.

    Args:
        name: of ``TASKS``.
        shared: folder with ``models``, ``adapters`` and ``data``.
        seed: of the draw.
        rows: the most test rows.
        anchors: the most anchors.
        shift_rows: the most rows of each shift.

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
    if name == "banking":
        return _banking(shared, seed, *sizes)
    if name in ("clinc150", "clinc150-early", "clinc-fewshot"):
        return _intents(name, shared, seed, *sizes)
    return _subject(data, seed, *sizes) if name == "subject" else _sources(name, data, seed, *sizes)


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
    stories = name != "clinc-fewshot"
    return Task(
        name=name,
        seed=seed,
        base=shared / "models/stories260K" if stories else minilm_folder(),
        task_type="SEQ_CLS",
        classes=len(index),
        train=train,
        anchors=_shuffled(made("val"), f"{name} anchors {seed}")[:anchors],
        test=_shuffled(made("test"), f"{name} test {seed}")[:rows],
        train_anchors=train[:anchors],
        shifts={"oos": _shuffled(made("oos_test"), f"{name} oos {seed}")[:shift_rows]},
    )


def _domains(shared: Path) -> dict[str, list[str]]:
    """Return the intents of each of the ten domains."""
    path = shared / "data/clinc150/domains.json"
    found: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _prompted(
    split: str, i: int, prompt: str, choices: tuple[str, ...] | None, label: int | None
) -> Row:
    """Make a row of a next-token task, named by its place in CLINC150's split."""
    name = f"{split}-{i}"
    return Row(id=name, prompt=prompt, choices=choices, label=label, source=name)


def _few(rows: Sequence[Row], shots: int) -> list[Row]:
    """Return the first ``shots`` rows of every label, in the rows' order."""
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
    domains = _domains(shared)
    index = {intent: i for i, name in enumerate(sorted(domains)) for intent in domains[name]}
    splits, _ = intents(shared)
    others = [
        _prompted("train", i, f"{text}? Topic", known[0].choices, index[intent])
        for i, (text, intent) in enumerate(splits["train"])
    ]
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


def _banking(shared: Path, seed: int, rows: int, anchors: int, shift_rows: int) -> Task:
    index = {intent: i for i, intent in enumerate(sorted(_domains(shared)["banking"]))}
    splits, _ = intents(shared)
    seen = {text for text, _intent in splits["train"]}

    def made(split: str) -> list[Row]:
        found = [
            _prompted(split, i, f"{text}? Intent", tuple(BANKING), index.get(intent))
            for i, (text, intent) in enumerate(splits[split])
            if (intent in index or split == "oos_test") and (split == "train" or text not in seen)
        ]
        return _shuffled(found, f"banking {split} {seed}")

    train = made("train")
    return Task(
        name="banking",
        seed=seed,
        base=shared / "models/stories260K",
        task_type="CAUSAL_LM",
        classes=len(index),
        train=train,
        anchors=made("val")[:anchors],
        test=made("test")[:rows],
        train_anchors=train[:anchors],
        shifts={"oos": made("oos_test")[:shift_rows]},
    )


# --- questions by their source ----------------------------------------------------------------


def _sources(name: str, data: Path, seed: int, rows: int, anchors: int, shift_rows: int) -> Task:
    train, pools, held, test = [], [], [], []
    for label, file in enumerate(SOURCES[name]):
        read = arc if file.startswith("arc") else openbookqa
        known = stems(read(data / file.format("train")), label, f"train-{label}")
        known = _shuffled(known, name)[: SOURCE_POOL + SOURCE_HELD]
        pools += known[:SOURCE_POOL]
        held += known[SOURCE_POOL:]
        train += _shuffled(known[:SOURCE_POOL], f"{name} train {seed}")[:SOURCE_ROWS]
        test += stems(read(data / file.format("test")), label, f"test-{label}")[:SOURCE_TEST]
    held = unseen(held, pools)
    test = unseen(test, [*pools, *held])
    return _question_task(
        name,
        len(SOURCES[name]),
        seed,
        train,
        anchors=_shuffled(held, f"{name} anchors {seed}")[:anchors],
        test=_shuffled(test, f"{name} test {seed}")[:rows],
        shifts={"mmlu": _mmlu(data), "winogrande": _sentences(data)},
        shift_rows=shift_rows,
    )


def _subject(data: Path, seed: int, rows: int, anchors: int, shift_rows: int) -> Task:
    train, held, test = [], [], []
    for label, subject in enumerate(SUBJECTS):
        found = _shuffled(stems(mmlu(_mmlu_file(data, subject)), label, subject), "subject")
        pool, rest = int(len(found) * SUBJECT_POOL), int(len(found) * SUBJECT_ANCHORS)
        drawn = _shuffled(found[:pool], f"subject train {seed}")[: int(pool * SUBJECT_ROWS)]
        train += drawn
        held += unseen(found[pool : pool + rest], found[:pool])
        test += unseen(found[pool + rest :], found[: pool + rest])
    held, test = unseen(held, train), unseen(test, [*train, *held])
    challenge = stems(arc(data / "arc/ARC-Challenge/test.json"), None, "arc")
    return _question_task(
        "subject",
        len(SUBJECTS),
        seed,
        train,
        anchors=_shuffled(held, f"subject anchors {seed}")[:anchors],
        test=_shuffled(test, f"subject test {seed}")[:rows],
        shifts={"arc": challenge, "winogrande": _sentences(data)},
        shift_rows=shift_rows,
    )


def _mmlu_file(data: Path, subject: str) -> Path:
    return data / f"mmlu/test/{subject}_test.csv"


def _mmlu(data: Path) -> list[Row]:
    return [r for s in SUBJECTS for r in stems(mmlu(_mmlu_file(data, s)), None, s)]


def _sentences(data: Path) -> list[Row]:
    return stems(winogrande(data / "winogrande/dev.jsonl"), None, "winogrande")


def _question_task(
    name: str,
    classes: int,
    seed: int,
    train: list[Row],
    *,
    anchors: list[Row],
    test: list[Row],
    shifts: dict[str, list[Row]],
    shift_rows: int,
) -> Task:
    """Make a MiniLM task, its texts cut."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    train = cut(_shuffled(train, f"{name} train order {seed}"), tokenizer)
    return Task(
        name=name,
        seed=seed,
        base=minilm_folder(),
        task_type="SEQ_CLS",
        classes=classes,
        train=train,
        anchors=cut(anchors, tokenizer),
        test=cut(test, tokenizer),
        train_anchors=train[: len(anchors)],
        shifts={
            shift: cut(_shuffled(found, f"{name} {shift} {seed}")[:shift_rows], tokenizer)
            for shift, found in shifts.items()
        },
    )


def _shuffled(items: Iterable[Any], key: str) -> list[Any]:
    """Return a new list, in an order that is a function of ``key``."""
    found = list(items)
    random.Random(key).shuffle(found)
    return found
