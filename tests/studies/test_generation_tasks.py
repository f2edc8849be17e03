"""The generative benchmark's rows: nothing held out was trained on, answers are right, and tokens
are those that generation continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.calibration.tasks import intents
from benchmarks.generation.tasks import TASKS, exact, load_task, tokens, words
from benchmarks.generation.train import answer_nll, make_base


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_prompt_across_seeds(shared: Path, name: str) -> None:
    """No seed's test row or anchor is a training row of any seed; a pair of numbers in the other
    order is the same row."""

    def keys(prompts: list[str]) -> set[frozenset[str]]:
        return {frozenset(p.removesuffix(" is").split(" plus ")) for p in prompts}

    tasks = [load_task(name, shared, seed) for seed in range(2)]
    trained = set().union(*(keys([e.prompt for e in t.train]) for t in tasks))
    for t in tasks:
        anchors, test = (keys([e.prompt for e in rows]) for rows in (t.anchors, t.test))
        assert not trained & (anchors | test) and not anchors & test
        assert (len(t.anchors), len(t.test), len(set(t.shift))) == (300, 700, 500)
        assert not keys(t.shift) & (trained | anchors | test)
    assert load_task(name, shared, 0) == tasks[0] and tasks[0].test != tasks[1].test


def test_answers_are_right(shared: Path) -> None:
    """Sums add up, read back from their words; intents are the file's."""
    value = {words(n): n for n in range(200)}
    assert len(value) == 200 and value["one hundred forty seven"] == 147 and value["eleven"] == 11
    for e in load_task("sums", shared, 0).test:
        a, b = e.prompt.removesuffix(" is").split(" plus ")
        assert value[e.answer] == value[a] + value[b]
    splits, _ = intents(shared)
    known = dict(splits["test"])
    for e in load_task("intent", shared, 0).test:
        assert known[e.prompt.removesuffix("? Intent:")].replace("_", " ") == e.answer


@pytest.mark.parametrize("name", TASKS)
def test_tokens_are_those_that_generation_continues(
    shared: Path, tmp_path: Path, name: str
) -> None:
    """After the prompt's tokens come those that are decoded to the answer, then the end token of
    the base: it begins the model's stories, so the model knows it, unlike "</s>"."""
    make_base(shared / "models/stories260K", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "base"))
    for e in load_task(name, shared, 0).test[:100]:
        prompt, answer = tokens(e, tokenizer)
        assert prompt == tokenizer(e.prompt)["input_ids"]
        assert [*prompt, *answer[:-1]] == tokenizer(f"{e.prompt} {e.answer}")["input_ids"]
        assert answer[-1] == tokenizer.eos_token_id == tokenizer.bos_token_id
        assert exact(str(tokenizer.decode(answer, skip_special_tokens=True)), e.answer)
    generation = json.loads((tmp_path / "base/generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id


def test_nll_of_a_batch_is_that_of_its_rows_token_by_token(shared: Path) -> None:
    """The loss counts the answer's tokens and the end, each given all before it, and no padding."""
    model = AutoModelForCausalLM.from_pretrained(str(shared / "models/stories260K"))
    rows = [([1, 20, 21], [22, 2]), ([1, 30], [31, 32, 33, 34, 2])]
    with torch.no_grad():
        found = answer_nll(model, rows)
        wanted = [
            -model(torch.tensor([prompt + answer[:i]])).logits[0, -1].log_softmax(-1)[token]
            for prompt, answer in rows
            for i, token in enumerate(answer)
        ]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-4)


def test_exact_ignores_space_around_the_text_alone() -> None:
    assert exact(" eighty five\n", "eighty five")
    assert not exact("eighty  five", "eighty five") and not exact("Eighty five", "eighty five")


def test_an_unknown_task_is_named(shared: Path) -> None:
    with pytest.raises(ValueError, match="task 'sum': expected one of intent, intent-few, sums"):
        load_task("sum", shared, 0)
