"""``tfb score --generate``: its options, and what it says where they do not go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command import Run
from support.models import CASES, randomize
from support.scoring import write
from support.tokenizers import letters_and_pairs

import tfb


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    """That of a tiny Llama, as if fitted to choices in columns of other names."""
    folder, case = tmp_path_factory.mktemp("writer"), CASES["llama"]
    randomize(case.base(), 0).save_pretrained(folder / "base")
    letters_and_pairs().save_pretrained(folder / "base")
    case.build().save_pretrained(folder / "adapter")
    m = tfb.from_pretrained(folder / "adapter", folder / "base")
    m.bayes.configure(sigma=0.1)
    m.columns = {"prompt": "question", "choices": "options", "label": "gold"}
    m.save_pretrained(folder / "artifact")
    return str(folder / "artifact")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"question": text} for text in ("abc ", "xyzabc", "fgh\n", "é")]
    return write(tmp_path / "prompts.jsonl", rows)


def test_prompts_in_text_out(
    tfb_command: Run, artifact: str, prompts: Path, tmp_path: Path
) -> None:
    """As ``m.score`` gives it; the artifact keeps the prompts' column."""
    words = ("--generate", "--max-new-tokens", 5, "--stop", "\\n", "--stop", "q\\t", "--stop", "ß")
    words = (*words, "--draws", 2, "--device", "cpu", "--format", "jsonl", "--max-error-rate", 1)
    code, out, err = tfb_command("score", artifact, prompts, "-o", tmp_path / "out", *words)
    assert code == 0 and out.startswith("complete: 4 rows, 1 of them errors: "), (out, err)
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())["configuration"]
    assert (told["stop"], told["max_new_tokens"]) == (["\n", "q\t", "ß"], 5)
    (part,) = (tmp_path / "out").glob("part-*")
    found = list(map(json.loads, part.read_text().splitlines()))
    m = tfb.from_pretrained(artifact, device="cpu")
    how = {"generate": True, "max_new_tokens": 5, "stop": ["\n", "q\t", "ß"], "errors": "rows"}
    scored = list(m.score(prompts, 2, stream=True, **how))
    for column in ("id", "text", "tokens", "finish_reason"):
        assert [row[column] for row in found[:3]] == [row[column] for row in scored[:3]]
    assert "no tokens; write text" in found[3]["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max-new-tokens 5", "--max-new-tokens 5: is a setting of --generate; add that"),
        ("--stop x", "--stop x: is a setting of --generate; add that"),
        ("--generate --draws auto", "--draws auto: not with --generate, where draws write side"),
        ("--generate --per-draw", "--per-draw: not with --generate, where all draws write"),
        ("--generate --labels a,b", "--generate: rows have no choices and no classes; leave out"),
    ],
)
def test_options_that_do_not_go_together(
    tfb_command: Run, artifact: str, prompts: Path, tmp_path: Path, words: str, message: str
) -> None:
    code, _, err = tfb_command("score", artifact, prompts, "-o", tmp_path / "out", *words.split())
    assert code == 1 and message in err and not (tmp_path / "out").exists()
