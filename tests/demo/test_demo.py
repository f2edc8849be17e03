"""The embedded demo: an adapter that is over-fitted as it says, and the whole way on few rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

import tfb
from benchmarks.environment import REPOSITORY
from tfb import Draws
from tfb.adapters.artifact import read_sidecar
from tfb.cli.demo import demo
from tfb.data.readers import read_rows
from tfb.data.rows import Row
from tfb.demo import digits
from tfb.evaluation.metrics import Metrics, evaluate
from tfb.evaluation.report import PAGE
from tfb.scoring.evaluate import encode, predict_rows


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


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files and folders that pages name, of the embedded model, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for file, split in (("anchors", "anchor"), ("rows", "test"), ("test", "test")):
        lines = [json.dumps(row) for row in digits.rows(split)[:40]]
        Path(f"{file}.jsonl").write_text("\n".join(lines))
    table = pd.read_json("anchors.jsonl", lines=True)
    table.assign(choices="|".join(digits.CHOICES)).to_csv("dev.csv", index=False)
    Path("path/to").mkdir(parents=True)
    for name, folder in (("base", digits.BASE), ("adapter", digits.ADAPTER)):
        Path("path/to", name).symlink_to(folder)


def blocks(page: str) -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def test_the_readmes_example_runs(paths: None, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands: a verdict of five lines at most, a table, and an artifact that is the model."""
    names: dict[str, Any] = {}
    [block] = blocks("README.md")
    exec(block, names)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{names['fit']}\n") and len(str(names["fit"]).splitlines()) <= 5
    assert "adapter" in printed and "TFB + T" in printed
    again, df = names["m"].score("rows.jsonl"), names["df"]
    pd.testing.assert_frame_equal(again, df)
    assert list(df["id"]) == [row["id"] for row in digits.rows("test")[:40]]
    probs = torch.tensor(df["probs"].tolist(), dtype=torch.float64)
    assert torch.allclose(probs.sum(-1), torch.ones(40, dtype=torch.float64), atol=1e-6)


def test_the_examples_of_what_is_beneath_run(paths: None) -> None:
    """Those of docs/python.md, as they stand; the artifact is the model."""
    first, batches, methods, generation = blocks("docs/python.md")
    names: dict[str, Any] = {}
    exec(first, names)
    names["yes"], names["no"] = names["anchors"].label_ids[0][:2]
    names["prompts"] = [digits.rows("test")[0]["prompt"]]
    for block in (batches, methods, generation):
        exec(block, names)
    assert names["pred"].probs.shape == (1, 2) and names["logits"].shape[0] == 10
    assert names["out"].total.shape[0] == 1
    bayes, fit = names["bayes"], names["fit"]
    assert bayes.config == fit.config and names["both"] == fit
    assert names["paper"].temperature == names["noise"].temperature == 1.0
    assert names["scaled"].sigma == 0.0 and names["paper"].sigma > names["noise"].sigma
    sidecar = read_sidecar("artifact")
    assert all(sidecar[k] == sidecar["fit"][k] for k in ("sigma", "temperature"))
    [again] = tfb.score(read_rows("rows.jsonl", limit=1), bayes, names["tokenizer"])
    [first] = tfb.score(read_rows("rows.jsonl", limit=1), bayes, names["tokenizer"], draws=10)
    assert first == again and set(names["result"]) == set(again)


def test_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On all anchors and 60 rows of each split, into the default folder, which is replaced."""
    original = digits.rows
    monkeypatch.setattr(digits, "rows", lambda x: original(x)[: None if x == "anchor" else 60])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo_out").mkdir()
    (tmp_path / "demo_out" / PAGE).write_text("an earlier demo")
    demo(None, draws=2)
    text = capsys.readouterr().out
    for part in (
        "nll on 200 anchors",
        "temperature alone (sigma 0): ",
        "max_variance): ",
        "in all",
    ):
        assert part in text
    cells = [[cell.strip() for cell in line.split("│")] for line in text.splitlines()]
    for split in ("test", "shifted"):
        for method in ("adapter", "tfb", "temperature alone", "tfb, max_variance"):
            found = [row[1:3] for row in cells].count([split, method])
            assert found == 1 + (method != "adapter")  # metrics, then changes
    assert [p.name for p in (tmp_path / "demo_out").iterdir()] == [PAGE]
    page = (tmp_path / "demo_out" / PAGE).read_text()
    assert "tfb against adapter, on the 60 labelled rows of test" in page
    assert page.count("<svg") == 7 and page.count("shifted: ") == 4
    assert "Every σ has its own temperature" in page
    for fact in ("<dt>σ</dt>", "2, antithetic; seed 0", "200 rows, hash", "torch 2."):
        assert fact in page.split("How this was made")[1]


@pytest.mark.parametrize("output", [None, "mine.html", "mine"])
def test_a_page_in_use_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | None
) -> None:
    """The default page may be an earlier demo's, but no folder of that name."""

    def unexpected(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(tfb, "load_base", unexpected, raising=False)
    monkeypatch.chdir(tmp_path)
    used = tmp_path / ("demo_out/index.html" if output is None else output)
    used.parent.mkdir(exist_ok=True)
    if output is None:
        used.mkdir()
    else:
        used.write_text("mine")
    with pytest.raises(ValueError, match=r"exists already; choose|no page can be written there"):
        demo(None if output is None else Path(output), draws=2)
    assert output is None or used.read_text() == "mine"
