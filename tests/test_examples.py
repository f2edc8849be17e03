"""The examples run as they stand, in seconds and without a network, and say what is true."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import nll_loss

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run an example as a script in an empty folder; return its names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.syspath_prepend(EXAMPLES[0].parent)

    def call(name: str) -> dict[str, Any]:
        return runpy.run_path(str(EXAMPLES[0].with_name(f"{name}.py")), run_name="__main__")

    return call


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_tested(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 30
    assert path.stem.startswith("_") or f"test_{path.stem}(" in Path(__file__).read_text()


def test_quick_start(example: Any) -> None:
    """What was saved comes back; of the methods the adapter is not the one to use."""
    found = example("quick_start")
    assert found["again"].bayes.config == found["m"].bayes.config == found["fit"].config
    assert found["evidence"].recommended != "adapter"
    assert len(found["df"]) == 200


def test_classifier_from_csv(example: Any) -> None:
    """Both promises hold on the test rows, up to three standard errors of a share."""
    found = example("classifier_from_csv")
    df, labels = found["df"], found["LABELS"]
    truth = [labels[int(y)] for y in df["label"]]
    held = sum(y in s for y, s in zip(truth, df["prediction_set"], strict=True)) / len(df)
    assert held > 0.9 - 3 * math.sqrt(0.9 * 0.1 / len(df))
    answered = df[~df["abstain"]]
    wrong = (answered["prediction"] != answered["label"]).mean()
    assert len(answered) > len(df) / 2
    assert wrong < 0.15 + 3 * math.sqrt(0.15 * 0.85 / len(answered))


def test_chat_model(example: Any) -> None:
    """The answers that are written are the choices that scores call the best."""
    found = example("chat_model")
    assert [text.strip() for text in found["written"]["text"]] == list(found["df"]["choice"][:5])


def test_pipeline(example: Any) -> None:
    """transformers' softmax of our log-probabilities gives the averaged probabilities back."""
    found = example("pipeline")
    torch.testing.assert_close(torch.tensor(found["scores"]), found["probs"], atol=1e-5, rtol=0)


def test_trainer(example: Any) -> None:
    """One row of logits for each row of data, whose NLL is the loss that the Trainer tells."""
    pytest.importorskip("datasets")
    outcome = example("trainer")["outcome"]
    scores, labels = torch.tensor(outcome.predictions), torch.tensor(outcome.label_ids)
    assert scores.shape == (64, 10)
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(64), atol=1e-5, rtol=0)
    told = outcome.metrics["test_loss"]
    assert float(nll_loss(scores, labels)) == pytest.approx(told, abs=1e-5)


def test_export(example: Any) -> None:
    """PEFT alone, one request for each draw, gives the averaged probabilities."""
    found = example("export")
    torch.testing.assert_close(found["average"], found["ours"].cpu(), atol=1e-5, rtol=0)


def test_ray_scoring(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of Ray's workers hold this process's probabilities."""
    ray = pytest.importorskip("ray", reason="the extra tfb[ray] is not installed")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # the test's own is too long for a socket's name
    try:
        found = example("ray_scoring")
    finally:
        ray.shutdown()
    df, m = found["df"], found["m"]
    probs = m.predict(found["digits"].rows("test")[:8]).probs
    scored = torch.stack([torch.tensor(p) for p in df["probs"][:8]])
    torch.testing.assert_close(scored, probs, atol=1e-5, rtol=0, check_dtype=False)
    assert found["outcome"].status == "complete" and len(df) == 747


def test_own_module(example: Any) -> None:
    """The layer by hand is Bayesian: noise was found worth having, and leaves the model unsure."""
    found = example("own_module")
    assert found["bayes"].sigma > 0
    assert bool((found["bayes"].predict(found["x"]).epistemic > 0).all())
