"""The card of an artifact: the hub's metadata, what was fitted, and the adapter's own card."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.artifacts import digits_artifact
from support.fits import TEMPERED

import tfb
from tfb.adapters.artifact import read_sidecar
from tfb.adapters.card import MARK, TAGS, card_text, markdown
from tfb.demo import digits
from tfb.evaluation.decisions import Decisions

OWN = "---\nlicense: mit\ntags:\n- digits\nlanguage: en\n---\n# Digits\n\nTrained by us.\n"


def sidecar(**changes: Any) -> dict[str, Any]:
    fit = replace(TEMPERED, anchors=60)
    return {
        "sigma": fit.sigma,
        "temperature": fit.temperature,
        "mode": "full",
        "tail": None,
        "task": "SEQ_CLS",
        "labels": ["no", "yes"],
        "layers": {"a": 1.0, "b": 1.0},
        "base": {"model_type": "bert", "name": "google/bert-tiny"},
        "fit": fit.to_dict(),
        "extra": {"anchors": "dev.csv"},
        "versions": {"tfb": "0.1.0"},
    } | changes


def rows_of(text: str) -> dict[str, str]:
    """The table of a card."""
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, flags=re.MULTILINE))


def test_what_was_fitted() -> None:
    """Every figure of the record, in words that a reader of the hub finds."""
    card = ModelCard(card_text(sidecar()))
    assert card.data.to_dict() == {
        "base_model": "google/bert-tiny",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": [*TAGS],
    }
    rows = rows_of(card.text)
    assert rows["task"] == r"SEQ\_CLS: no, yes"
    assert rows["anchors"] == "dev.csv, 60 rows"
    assert rows["σ"] == "0.01 (95 %: 0.01 to 0.03)" and rows["temperature T"] == "1.5"
    assert rows["loss on the anchors"] == "1.1 → 0.7 (95 % of the change: -0.5 to -0.3)"
    assert rows["accuracy on the anchors"] == "75.0% → 75.0%"
    assert "the loss falls" in card.text and "- the loss first falls" in card.text
    assert 'tfb.from_pretrained("this folder or repository")' in card.text


def test_decisions_are_said() -> None:
    made = Decisions(rows=90, draws=10, coverage=0.9, quantile=0.7)
    text = card_text(sidecar(decisions=asdict(made)))
    assert f"- {markdown(made)}" in text.splitlines()


def test_a_model_without_a_fit() -> None:
    """Set by hand, on a base of a folder: the card neither shows figures nor the folder."""
    text = card_text(sidecar(fit=None, base={"name": "/home/me/bert"}, task="CAUSAL_LM"))
    assert "anchors" not in text and "/home" not in text
    assert rows_of(text)["σ"] == "0.01, chosen by hand"
    assert ModelCard(text).data.get("pipeline_tag") == "text-generation"
    assert 'repository", base="its base model")' in text


def test_users_names_stay_what_they_are() -> None:
    """A pipe would end a cell, a bracket begin a link, and a line break a row."""
    labels = ["a|b", "[x](javascript:1)", "<img>\n# c", "*d*"]
    text = card_text(sidecar(labels=labels))
    [line] = [line for line in text.splitlines() if line.startswith("| task")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 3
    shown = re.sub(r"\\(.)", r"\1", line)
    assert "a|b, [x](javascript:1), <img> # c, *d*" in shown
    assert not re.search(r"(?<!\\)[<*\[]", line)
    assert markdown("a_b") == r"a\_b"


@pytest.mark.parametrize("own", [OWN, "# Digits\n\nTrained by us.\n"])
def test_the_adapters_own_card_is_kept(tmp_path: Path, own: str) -> None:
    """Below ours, its metadata beside ours; a card of a card is the same card."""
    (tmp_path / "README.md").write_text(own)
    text = card_text(sidecar(), tmp_path)
    card = ModelCard(text)
    assert text.endswith(f"{MARK}\n\n# Digits\n\nTrained by us.\n")
    if own == OWN:
        assert card.data.get("license") == "mit" and card.data.get("language") == "en"
        assert card.data.get("tags") == ["digits", *TAGS]
    (tmp_path / "README.md").write_text(text)
    assert card_text(sidecar(), tmp_path) == text


@pytest.mark.parametrize("own", ["---\na: [b\n---\nText\n", "---\n- a\n---\nText\n"])
def test_a_damaged_card_is_kept_as_text(tmp_path: Path, own: str) -> None:
    (tmp_path / "README.md").write_text(own)
    text = card_text(sidecar(), tmp_path)
    assert text.endswith(f"{MARK}\n\n{own}") and ModelCard(text).data.get("library_name") == "peft"


def test_artifacts_carry_their_card(tmp_path: Path) -> None:
    """Once more saved it is the same, and not stacked."""
    first = digits_artifact(tmp_path)
    text = (first / "README.md").read_text()
    assert text == card_text(read_sidecar(first), digits.ADAPTER)
    assert str(digits.BASE) not in text and text.count("## Fit") == 1
    again = tfb.save(tfb.load(digits.BASE, first), tmp_path / "again")
    assert (again / "README.md").read_text() == text
