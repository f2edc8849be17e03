"""Every command reads every file, and says what it cannot use."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.command import Run, fit_command
from support.models import CASES, randomize
from support.tables import FILES, NAMES, tokenizer, written

import tfb


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a base model with its tokenizer, and of a SEQ_CLS adapter with its head."""
    folder = tmp_path_factory.mktemp("classifier")
    case = CASES["llama_classifier"]
    randomize(case.base(), 0).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    case.build().save_pretrained(folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


@pytest.mark.parametrize("name", FILES)
def test_every_command_reads_every_file(
    tfb_command: Run, classifier: tuple[str, str], tmp_path: Path, name: str
) -> None:
    """Columns and names of classes are given to fit; the artifact keeps the names."""
    model, adapter = classifier
    data, artifact = written(tmp_path / name), tmp_path / "artifact"
    columns = ("--columns", "text=sentence, label=gold")
    names = tmp_path / "names.txt" if name == "rows.csv" else "bad, fair,good"
    (tmp_path / "names.txt").write_text("bad\nfair\n\ngood\n")
    common = ("--draws", 2)  # the artifact tells its base, and the columns
    steps = {
        "fit": (
            *fit_command(model, adapter, data, artifact)[1:],
            *columns,
            "--labels",
            names,
            "--draws",
            2,
            "--objective",
            "min_nll",
        ),
        "evaluate": (artifact, data, *common, "--json", tmp_path / "figures.json"),
        "score": (artifact, data, *common, "--output", tmp_path / "out", "--keep", "weight"),
        "report": (artifact, data, *common, "--output", tmp_path / "page"),
    }
    for command, options in steps.items():
        code, _, err = tfb_command(command, *options)
        assert code == 0, (command, err)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["methods"]["TFB + T"]["rows"] == 9 and figures["truncated"] == 0
    (part,) = (tmp_path / "out").glob("part-*")
    scored = pq.read_table(part).to_pylist()
    assert [(r["id"], r["label"], int(r["weight"])) for r in scored] == [
        (str(i), i % 3, i) for i in range(9)
    ]
    assert all(r["choice"] == NAMES[r["prediction"]] and r["error"] is None for r in scored)
    hits = sum(r["prediction"] == r["label"] for r in scored)
    assert figures["methods"]["TFB + T"]["accuracy"] == pytest.approx(hits / 9)
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())["configuration"]
    assert told["labels"] == list(NAMES) and told["truncate"] is None
    assert told["columns"] == {"text": "sentence", "label": "gold"}
    (tmp_path / "bare.csv").write_text("sentence\na b\nc\n")  # no labels: they are not needed
    code, _, err = tfb_command(
        "score", artifact, tmp_path / "bare.csv", *common, "--output", tmp_path / "bare"
    )
    (part,) = (tmp_path / "bare").glob("part-*")
    assert code == 0 and all(r["error"] is None for r in pq.read_table(part).to_pylist()), err


def test_what_the_options_cannot_be(
    tfb_command: Run, classifier: tuple[str, str], tmp_path: Path
) -> None:
    model, adapter = classifier
    data = written(tmp_path / "rows.csv")
    fit = fit_command(model, adapter, data, tmp_path / "o")
    for options, message in (
        (("--columns", "text"), "--columns 'text': expected name=column, such as text=sentence"),
        (("--columns", "text="), "--columns 'text=': expected name=column"),
        (("--columns", "text=a,text=b"), "--columns text=b: 'text' is named twice"),
        (("--columns", "text=a,id=a"), "columns: 'a' is named twice"),
        (("--columns", "prompt=sentence"), "'prompt' is none of id, text, label"),
        ((), "rows.csv: no column 'text'"),
        (("--columns", "text=sentence"), "no label; metric nll needs one on every row"),
        (("--columns", "text=sentence,label=gold"), "the label 'bad' is text; classes lack names"),
        (("--labels", "yes,no,"), "none of them empty"),
        (("--labels", "a,b"), "labels: 2 names, but the head has 3 classes"),
        (("--labels", "a,a,b"), "none of them empty or given twice"),
        (("--truncate", "top"), "truncate top: expected one of left, right"),
        (("--label-tokens", "first"), "label-tokens first: expected one of all, last"),
    ):
        code, out, err = tfb_command(*fit, *options)
        assert code == 1 and out == "" and message in err, (options, err)
    assert not (tmp_path / "o").exists()
    made = tfb.bayesianize(tfb.load_adapter(tfb.load_base(model, adapter), adapter))
    made.configure(sigma=0.1)
    made.source = Path(adapter)
    tfb.save(made, tmp_path / "artifact")
    job = ("score", tmp_path / "artifact", data, "--output", tmp_path / "out")
    job += ("--columns", "text=sentence")
    code, _, err = tfb_command(*job, "--labels", "a,b")
    assert code == 1 and "labels: 2 names, but the head has 3 classes" in err
    assert not (tmp_path / "out").exists()


def test_truncation_is_said_by_every_command(
    tfb_command: Run, classifier: tuple[str, str], tmp_path: Path
) -> None:
    """Rows that are cut are counted; a resumed run counts those of earlier parts."""
    model, adapter = classifier
    data, artifact = tmp_path / "rows.csv", tmp_path / "artifact"
    rows = "".join(f"{'a b c d ' * (40 if i % 3 == 0 else 1)},{i % 3}\n" for i in range(8))
    data.write_text("text,label\n" + rows)
    fit = (*fit_command(model, adapter, data, artifact), "--objective", "min_nll", "--draws", 2)
    code, _, err = tfb_command(*fit)
    assert code == 1 and "160 tokens, but the model takes" in err and "truncate" in err
    limit = CASES["llama_classifier"].base().config.max_position_embeddings
    code, _, err = tfb_command(*fit, "--truncate", "left")
    assert code == 0 and f"note: 3 of 8 rows were cut on the left to {limit} tokens" in err
    common = (artifact, data, "--truncate", "right", "--draws", 2)
    code, _, err = tfb_command("evaluate", *common)
    assert code == 0 and f"3 of 8 rows were cut on the right to {limit} tokens" in err
    score = ("score", *common, "--output", tmp_path / "out", "--part-rows", 4)
    code, out, err = tfb_command(*score)
    assert code == 0 and "8 rows, 0 of them errors, 3 cut on the right: " in out, err
    max((tmp_path / "out").glob("part-*")).unlink()
    code, out, err = tfb_command(*score, "--resume")
    assert code == 0 and "3 cut on the right" in out, err
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert (counts["rows"], counts["errors"], counts["truncated"]) == (8, 0, 3)
    parts = sorted((tmp_path / "out").glob("part-*"))
    cut = [r["truncated"] for p in parts for r in pq.read_table(p).to_pylist()]
    assert cut == [160 - limit, 0, 0, 160 - limit, 0, 0, 160 - limit, 0]
    code, _, err = tfb_command("score", *common[:2], *score[-4:], "--draws", 2, "--resume")
    assert code == 1 and "truncate: right -> None" in err
