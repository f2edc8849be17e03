"""The embedded demo: an adapter that is over-fitted as it says, and the whole way on few rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import tfb
from benchmarks.environment import REPOSITORY
from tfb import Draws
from tfb.adapters.artifact import read_sidecar
from tfb.data.readers import read_rows
from tfb.data.rows import Row
from tfb.demo import digits
from tfb.demo import run as demo
from tfb.evaluation.metrics import Metrics, evaluate
from tfb.evaluation.report import PAGE, PICTURES
from tfb.scoring.rows import encode, predict_rows


def measured(bayes: tfb.BayesianModel, tokenizer: Any, split: str) -> Metrics:
    """The plain adapter on a whole split."""
    rows = [
        Row(r["id"], r["prompt"], tuple(r["choices"]), None, r["label"]) for r in digits.rows(split)
    ]
    encoded = encode(bayes, rows, tokenizer)
    probs = predict_rows(bayes, encoded, Draws.mean()).probs
    return evaluate(probs, torch.tensor(encoded.labels))


def test_adapter_is_overfitted() -> None:
    """Train rows all right; held-out accuracy lower and confidence above it, each by more than 5
    binomial standard errors; worse still on shifted digits."""
    base = tfb.load_base(digits.BASE, digits.ADAPTER)
    bayes = tfb.bayesianize(tfb.load_adapter(base, digits.ADAPTER))
    tokenizer = AutoTokenizer.from_pretrained(str(digits.BASE))
    train, test, shifted = (measured(bayes, tokenizer, s) for s in ("train", "test", "shifted"))
    assert train.accuracy == 1.0
    for m, below in ((test, 1.0), (shifted, test.accuracy)):
        error = (m.accuracy * (1 - m.accuracy) / m.rows) ** 0.5
        assert 0.2 < m.accuracy < below - 5 * error  # and above the 10 % of guessing
        assert m.miscalibration > 4 * error


def test_the_readmes_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks on models, as they stand, on the embedded one; the artifact is the model."""
    monkeypatch.chdir(tmp_path)
    for file, split in (("anchors.jsonl", "anchor"), ("rows.jsonl", "test")):
        lines = [json.dumps(row) for row in digits.rows(split)[:40]]
        Path(file).write_text("\n".join(lines))
    Path("path/to").mkdir(parents=True)
    for name, folder in (("base", digits.BASE), ("adapter", digits.ADAPTER)):
        Path("path/to", name).symlink_to(folder)
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    first, batches, temperature, generation = (
        part.split("```")[0] for part in text.split("```python\n")[1:5]
    )
    names: dict[str, Any] = {}
    exec(first, names)
    names["yes"], names["no"] = names["anchors"].label_ids[0][:2]
    names["prompts"] = [digits.rows("test")[0]["prompt"]]
    for block in (batches, temperature, generation):
        exec(block, names)
    B, K = names["probs"].shape
    assert (B, K) == (1, 2) and names["logits"].shape[0] == 10 and names["out"].total.shape[0] == 1
    bayes, fit = names["bayes"], names["fit"]
    assert bayes.sigma == fit.sigma > 0 and read_sidecar("artifact")["fit"]["sigma"] == fit.sigma
    [again] = tfb.score(read_rows("rows.jsonl", limit=1), bayes, names["tokenizer"])
    [first] = tfb.score(read_rows("rows.jsonl", limit=1), bayes, names["tokenizer"], draws=10)
    assert first == again and set(names["result"]) == set(again)


def test_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the first 60 rows of each split, into the default folder, which is replaced."""
    original = digits.rows
    monkeypatch.setattr(digits, "rows", lambda name: original(name)[:60])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo_out").mkdir()
    (tmp_path / "demo_out" / PAGE).write_text("an earlier demo")
    demo.run(None, draws=2)
    text = capsys.readouterr().out
    assert "Searching sigma on 60 held-out anchors" in text
    for part in (
        "temperature fitted on the same anchors: ",
        "objective max_variance): ",
        "in all)",
    ):
        assert part in text
    for split in ("test", "shifted"):
        for method in ("deterministic", "temperature-scaled", "tfb max_variance", "tfb min_nll"):
            assert any(split in line and method in line for line in text.splitlines())
        assert any("tfb min_nll: Averaging" in line and split in line for line in text.splitlines())
    assert sorted(p.name for p in (tmp_path / "demo_out").iterdir()) == sorted(
        {*PICTURES, PAGE} - {"shift.png"}
    )
    page = (tmp_path / "demo_out" / PAGE).read_text()
    assert page.count("<img") == 4 and "Digits: an over-fitted adapter" in page
    table = page.split("Figures of each method")[1].split("</table>")[0]
    assert table.count("<tr><td") == 8


@pytest.mark.parametrize("folder", [None, "mine"])
def test_a_folder_in_use_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str | None
) -> None:
    """The default folder may hold an earlier report, and nothing else."""

    def unexpected(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(tfb, "load_base", unexpected, raising=False)
    monkeypatch.chdir(tmp_path)
    used = tmp_path / (folder or "demo_out")
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{used.name} already holds something"):
        demo.run(None if folder is None else Path(folder), draws=2)
    assert [p.name for p in used.iterdir()] == ["notes.txt"]
