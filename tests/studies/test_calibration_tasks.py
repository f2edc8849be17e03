"""The calibration benchmark's rows and adapters: nothing held out was trained on, labels mean what
they say, what is trained comes back as it was saved."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import tfb
from benchmarks.calibration.questions import arc
from benchmarks.calibration.stems import ending
from benchmarks.calibration.tasks import TASKS, intents, load_task
from benchmarks.calibration.train import RECIPES, adapter, evaluate_rows, train
from benchmarks.environment import INSTALL_MINILM, minilm_folder
from tfb.data.rows import Row

try:
    minilm_folder()
    HAS_MINILM = True
except FileNotFoundError:
    HAS_MINILM = False
needs_minilm = pytest.mark.skipif(not HAS_MINILM, reason=INSTALL_MINILM)
STORIES = ("clinc-domain", "clinc150", "clinc150-early", "banking")
ALL = [t if t in STORIES else pytest.param(t, marks=needs_minilm) for t in TASKS]


def texts(rows: list[Row]) -> set[str]:
    return {str(row.text or row.prompt) for row in rows}


@pytest.mark.parametrize("name", ALL)
def test_splits_share_no_text_across_seeds(shared: Path, name: str) -> None:
    """No seed's test row or anchor is a training row of any seed: ensembles mix them."""
    tasks = [load_task(name, shared, seed) for seed in range(2)]
    trained = set().union(*(texts(t.train) | texts(t.train_anchors) for t in tasks))
    for t in tasks:
        anchors, test = texts(t.anchors), texts(t.test)
        assert not trained & (anchors | test) and not anchors & test
        assert texts(t.train_anchors) <= texts(t.train)
        assert len(t.anchors) == len(t.train_anchors) >= (70 if name == "subject" else 290)
        assert len(t.test) >= {"subject": 200, "banking": 440, "difficulty": 800}.get(name, 1000)
        for rows in (t.train, t.anchors, t.test):
            assert all(r.label is not None and 0 <= r.label < t.classes for r in rows)
            assert len({r.id for r in rows}) == len(rows)
        for rows in t.shifts.values():
            assert len(rows) == 500 and not texts(rows) & test
    again = load_task(name, shared, 0, rows=50, anchors=20, shift_rows=10)
    assert again.test == tasks[0].test[:50] and again.train == tasks[0].train
    assert tasks[0].test != tasks[1].test


def test_domains_are_those_of_the_files(shared: Path) -> None:
    """Prompts and labels made from CLINC150's training rows follow the rule that the given file
    follows: of the 500 rows of anchor.jsonl, each is such a row with that label."""
    task = load_task("clinc-domain", shared, 0)
    assert len(task.train) == 2000
    known = {r.prompt: r.label for r in task.train if r.id.startswith("anchor-")}
    assert len(known) == 500
    splits, _ = intents(shared)
    domains = json.loads((shared / "data/clinc150/domains.json").read_text())
    index = {i: k for k, name in enumerate(sorted(domains)) for i in domains[name]}
    made = {f"{text}? Topic": index[intent] for text, intent in splits["train"]}
    assert all(made[str(prompt)] == label for prompt, label in known.items())
    assert all(made[str(r.prompt)] == r.label for r in task.train)


def test_banking_has_one_domains_intents(shared: Path) -> None:
    """Fifty training rows of each of fifteen; the out-of-scope rows have no label."""
    task = load_task("banking", shared, 0)
    assert dict(Counter(r.label for r in task.train)) == dict.fromkeys(range(15), 50)
    assert {r.label for r in task.shifts["oos"]} == {None}
    splits, index = intents(shared)
    names = sorted(json.loads((shared / "data/clinc150/domains.json").read_text())["banking"])
    known = {f"{text}? Intent": intent for text, intent in splits["test"]}
    assert all(names[r.label] == known[str(r.prompt)] for r in task.test if r.label is not None)
    assert set(names) <= set(index)


@needs_minilm
def test_few_shots(shared: Path) -> None:
    """Ten training rows of each of 150 intents; another seed draws others."""
    a, b = (load_task("clinc-fewshot", shared, seed) for seed in (0, 1))
    assert set(Counter(r.label for r in a.train).values()) == {10} and len(a.train) == 1500
    assert len(texts(a.train) & texts(b.train)) < 500


@needs_minilm
def test_questions_by_their_source(shared: Path) -> None:
    """Classes are the files; no variant of a training question is held out; texts are cut."""
    task = load_task("exam", shared, 0)
    assert set(Counter(r.label for r in task.train).values()) == {200}
    trained = {ending(str(r.text)) for r in load_task("exam", shared, 1).train + task.train}
    assert not trained & {ending(str(r.text)) for r in task.test + task.anchors}
    easy = {q.stem for q in arc(shared / "data/arc/ARC-Easy/test.json")}
    assert all(r.text in easy for r in task.test if r.label == 1 and len(str(r.text)) < 100)
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    rows = [*task.train, *task.test, *task.shifts["mmlu"], *task.shifts["winogrande"]]
    lengths = [len(ids) for ids in tokenizer([r.text for r in rows])["input_ids"]]
    assert max(lengths) <= 52  # 48, two special tokens, and a word cut open may split otherwise


def test_the_given_intents_adapter_knows_its_labels(shared: Path) -> None:
    """Sorted intents are its classes: validation accuracy 57.8 % as documented, within four
    standard errors of 100 rows."""
    task = load_task("clinc150", shared, 0, anchors=100)
    folder = adapter(Path("nowhere"), "clinc150", 0)
    model = tfb.load_adapter(tfb.load_base(task.base, folder), folder)
    tokenizer = AutoTokenizer.from_pretrained(str(task.base))
    found = evaluate_rows(model, task.anchors, task, tokenizer)
    assert found["accuracy"] == pytest.approx(0.578, abs=4 * (0.578 * 0.422 / 100) ** 0.5)


@pytest.mark.parametrize("name", [*STORIES, pytest.param("exam", marks=needs_minilm)])
def test_what_is_trained_comes_back(shared: Path, tmp_path: Path, name: str) -> None:
    """Two steps: the same seed gives the same tensors, another one others; the folder loads
    strictly, with the figures that were measured before it was saved, and names no folder."""
    task = load_task(name, shared, 1)
    task = replace(
        task, train=task.train[:16], anchors=task.anchors[:8], train_anchors=task.train[:8]
    )
    recipe = replace(RECIPES[name], epochs=1, batch_size=8)
    first, again, other = (tmp_path / f"{name}-{i}" for i in range(3))
    record = train(task, recipe, first)
    train(task, recipe, again)
    train(replace(task, seed=2), recipe, other)
    tensors, same, others = (
        load_file(p / "adapter_model.safetensors") for p in (first, again, other)
    )
    assert all(torch.equal(tensors[k], same[k]) for k in tensors)
    assert not all(torch.equal(tensors[k], others[k]) for k in tensors)
    assert any("lora_B" in k and bool(v.any()) for k, v in tensors.items())
    model = tfb.load_adapter(tfb.load_base(task.base, first), first)
    tokenizer = AutoTokenizer.from_pretrained(str(task.base))
    figures = evaluate_rows(model, task.anchors, task, tokenizer)
    assert figures == pytest.approx(record["figures"]["held_out"])
    saved = json.loads((first / "train.json").read_text())
    assert saved["recipe"] == json.loads(json.dumps(record["recipe"]))
    config = json.loads((first / "adapter_config.json").read_text())
    assert "/" not in config["base_model_name_or_path"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}-{i}" for i in range(3)]
    with pytest.raises(FileExistsError, match="remove it to train again"):
        train(task, recipe, first)


def test_an_adapter_that_is_not_trained_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.calibration\.train .*--seed 1"):
        adapter(tmp_path, "exam", 1)
    with pytest.raises(ValueError, match="adapter exams: expected one of clinc-domain"):
        adapter(tmp_path, "exams", 1)
