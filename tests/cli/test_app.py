"""The command line, from rows to a report, and what it says of bad input before long work."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from support.artifacts import digits_artifact
from support.command import Run, fit_command
from support.scoring import write

import tfb
from tfb.adapters.loading import load_tokenizer
from tfb.cli import app as cli
from tfb.cli import console
from tfb.cli.console import as_flags
from tfb.cli.fit import default_output
from tfb.data.readers import read_rows
from tfb.data.rows import RowError
from tfb.demo import digits
from tfb.evaluation.metrics import evaluate
from tfb.evaluation.report import PAGE
from tfb.scoring.evaluate import encode, predict_rows
from tfb.search.result import PredictiveFit

MODEL, ADAPTER = str(digits.BASE), str(digits.ADAPTER)
ROWS = 24


@pytest.fixture
def run(tfb_command: Run) -> Run:
    return tfb_command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("digits")
    return {name: write(folder / f"{name}.jsonl", digits.rows(name)) for name in ("anchor", "test")}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact at sigma = .008, without a search."""
    return digits_artifact(tmp_path_factory.mktemp("made"))


# --- the whole way --------------------------------------------------------------------------------


def test_fit_evaluate_score_report(run: Run, data: dict[str, Path], tmp_path: Path) -> None:
    """Each command's output is the next one's input."""
    made = tmp_path / "artifact"
    code, out, err = run(
        *fit_command(MODEL, ADAPTER, data["anchor"], made),
        "--draws",
        2,
        "--limit",
        20,
        "--tolerance",
        0.05,
        "--seed",
        5,
    )
    assert code == 0, err
    sidecar = json.loads((made / "tfb.json").read_text())
    assert out == f"{PredictiveFit.from_dict(sidecar['fit'])}\nartifact: {made}\n"
    assert sidecar["seed"] == 5 and sidecar["fit"]["anchors"] == 20 and sidecar["fit"]["draws"] == 2

    figures = tmp_path / "new" / "figures.json"
    common = ("--draws", 2, "--limit", ROWS)
    code, out, err = run("evaluate", made, data["test"], *common, "--json", figures)
    assert code == 0, err
    assert "use adapter: " in out or "use TFB: " in out

    scored = tmp_path / "scored"
    code, out, err = run(
        "score",
        made,
        data["test"],
        *common,
        "--output",
        scored,
        "--format",
        "jsonl",
        "--batch-tokens",
        1 << 20,
    )
    assert code == 0 and f"complete: {ROWS} rows, 0 of them errors" in out, err
    lines = [json.loads(x) for x in (scored / "part-00000-00000000.jsonl").read_text().splitlines()]
    rows = read_rows(data["test"], limit=ROWS)
    assert [x["id"] for x in lines] == [r.id for r in rows]
    probs = torch.tensor([x["probs"] for x in lines], dtype=torch.float64)
    labels = torch.tensor([x["label"] for x in lines])
    # The file holds what evaluate judged: the same draws give the same figures.
    mine = {k: v for k, v in evaluate(probs, labels).to_dict().items() if v is not None}
    theirs = json.loads(figures.read_text())["methods"]["TFB"]
    assert mine == pytest.approx({name: theirs[name] for name in mine}, rel=1e-6)

    page = tmp_path / "report"
    unlabelled = tmp_path / "unfamiliar.jsonl"
    bare = [
        {k: v for k, v in json.loads(x).items() if k != "label"}
        for x in data["test"].read_text().splitlines()[-ROWS:]
    ]
    write(unlabelled, bare)
    code, out, err = run(
        "report", made, data["test"], *common, "--shift", unlabelled, "--output", page
    )
    assert code == 0, err
    assert [p.name for p in page.iterdir()] == [PAGE]
    text = page.joinpath(PAGE).read_text()
    assert "of unfamiliar" in text and "mean of 2 draws" in text and "digits-" in text
    assert "seed 5" in text and "torch " in text


@pytest.mark.parametrize(
    ("options", "arguments", "rows"),
    [
        (("--no-temperature",), {"temperature": False}, 60),
        (("--sigma", 0), {"sigma": 0.0}, 200),  # one pass over enough rows for a verdict
        ((), {}, 60),
    ],
)
def test_fit_is_the_librarys_fit(
    run: Run,
    data: dict[str, Path],
    tmp_path: Path,
    options: tuple[object, ...],
    arguments: dict[str, Any],
    rows: int,
) -> None:
    """Without a temperature, a temperature alone, and both: the record, and what evaluate says."""
    made = tmp_path / "artifact"
    anchors = ("--limit", rows, "--draws", 2, *options)
    code, out, err = run(*fit_command(MODEL, ADAPTER, data["anchor"], made), *anchors)
    assert code == 0, err
    bayes = tfb.bayesianize(tfb.load_adapter(tfb.load_base(MODEL, ADAPTER), ADAPTER))
    encoded = encode(bayes, read_rows(data["anchor"], limit=rows), load_tokenizer(MODEL))
    fit = tfb.fit_sigma(bayes, encoded, draws=2, **arguments)
    sidecar = json.loads((made / "tfb.json").read_text())
    assert sidecar["fit"] == fit.to_dict()
    assert (sidecar["sigma"], sidecar["temperature"]) == (fit.sigma, fit.temperature)
    assert out == f"{fit}\nartifact: {made}\n"
    temperatures = {p.temperature for p in fit.curve}
    assert (temperatures == {1.0}) == ("--no-temperature" in options)
    if "--sigma" in options:
        assert fit.sigma == 0.0 and fit.temperature > 1.0  # the adapter is over-confident
        assert [(p.sigma, p.temperature) for p in fit.curve] == [(0.0, 1.0), (0.0, fit.temperature)]
    figures = tmp_path / "figures.json"
    common = (made, data["test"], "--draws", 2, "--limit", ROWS)
    code, out, err = run("evaluate", *common, "--json", figures)
    assert code == 0, err
    found = json.loads(figures.read_text())
    assert (found["sigma"], found["temperature"]) == (fit.sigma, fit.temperature)
    assert list(found["methods"]) == ["adapter", *fit.methods]


def test_evaluate_is_the_librarys_evaluation(
    run: Run, data: dict[str, Path], artifact: Path, tmp_path: Path
) -> None:
    """--json and --rows hold exactly what predict_rows gives at the artifact's sigma and seed."""
    figures = tmp_path / "figures.json"
    common = (artifact, data["test"], "--draws", 4, "--limit", ROWS)
    code, _, err = run("evaluate", *common, "--json", figures, "--rows", tmp_path / "rows.parquet")
    assert code == 0, err
    bayes = tfb.load(MODEL, artifact)
    tokenizer = load_tokenizer(MODEL)
    encoded = encode(bayes, read_rows(data["test"], limit=ROWS), tokenizer)
    mean = predict_rows(bayes, encoded, tfb.Draws.mean()).probs
    draws = tfb.Draws.antithetic(4, 0.008, seed=3)
    probs = predict_rows(bayes, encoded, draws).probs
    labels = torch.tensor(encoded.labels)
    found = json.loads(figures.read_text())
    assert found["sigma"] == 0.008 and found["draws"] == 4 and found["mode"] == "full"
    table = pd.read_parquet(tmp_path / "rows.parquet")
    assert list(table["id"]) == encoded.ids and list(table["label"]) == encoded.labels
    for name, p in (("adapter", mean), ("TFB + T", probs)):
        expected = evaluate(p, labels).to_dict()
        assert {k: found["methods"][name][k] for k in expected} == expected
        key = name.lower().replace(" + ", "_")
        assert list(table[f"{key}_prediction"]) == p.argmax(-1).tolist()
        assert list(table[f"{key}_choice"]) == [str(i) for i in p.argmax(-1).tolist()]
        assert list(table[f"{key}_confidence"]) == p.amax(-1).tolist()
    assert [list(row) for row in table["probs"]] == probs.tolist()
    for suffix, read in (("jsonl", partial(pd.read_json, lines=True)), ("csv", pd.read_csv)):
        code, _, err = run("evaluate", *common, "--rows", tmp_path / f"rows.{suffix}")
        again = read(tmp_path / f"rows.{suffix}")
        assert code == 0 and list(again) == list(table), err
        assert list(again["tfb_t_prediction"]) == list(table["tfb_t_prediction"])
        assert list(again["total"]) == pytest.approx(list(table["total"]), rel=1e-12)


def test_score_parquet_with_draws(
    run: Run, data: dict[str, Path], artifact: Path, tmp_path: Path
) -> None:
    """Parquet holds typed columns; the draws average to the probabilities."""
    code, _, err = run(
        "score",
        artifact,
        data["test"],
        "--output",
        tmp_path / "out",
        "--per-draw",
        "--draws",
        4,
        "--limit",
        5,
    )
    assert code == 0, err
    table = pq.read_table(tmp_path / "out" / "part-00000-00000000.parquet")
    assert table.num_rows == 5 and str(table.schema.field("epistemic").type) == "float"
    draws = torch.tensor(table["draw_probs"].to_pylist())
    assert draws.shape == (5, 4, 10)
    # Averages of float32 numbers below 1, stored in float32.
    eps = torch.finfo(torch.float32).eps
    assert float((draws.mean(1) - torch.tensor(table["probs"].to_pylist())).abs().max()) <= 4 * eps


def test_module_and_help(tmp_path: Path) -> None:
    """``python -m tfb`` is the same command; every subcommand explains its options.

    A file in the current folder is not what it imports.
    """
    (tmp_path / "typer.py").write_text("raise SystemExit('run')")
    command = [sys.executable, "-m", "tfb", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    for name in ("demo", "fit", "evaluate", "score", "report"):
        assert name in done.stdout


COMMANDS = ("fit", "evaluate", "score", "verify", "report", "export", "demo")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, width: int
) -> None:
    """Examples come first, whole lines that the command can parse; rare options on request only."""
    monkeypatch.setenv("COLUMNS", str(width))
    code, short, _ = run(command, "--help")
    code_of_long, long, _ = run(command, "--help", "--advanced")
    assert code == code_of_long == 0
    options: Any = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    for out in (short, long):
        lines = [line.strip() for line in out.splitlines()]
        examples = [line.split() for line in lines if line.startswith("tfb ")]
        assert 2 <= len(examples) <= 4 and all(x[1] == command for x in examples)
        assert out.index("tfb ") < out.index("Options ─")
        assert ("--device" in out) == (command != "verify")
        flags = {word for x in examples for word in x if word.startswith("-")}
        assert flags <= {name for option in options for name in option.opts}
    rare = [option.opts[0] for option in options if option.hidden]
    assert not [name for name in rare if f" {name} " in short]
    assert all(f" {name} " in long for name in rare)
    assert bool(rare) == (f"{command} --help --advanced" in short) and "[bold]" not in long


def test_help_names_the_extra(run: Run) -> None:
    """Brackets are not eaten as markup."""
    code, out, _ = run("score", "--help", "--advanced")
    assert code == 0 and "tfb[ray]" in out


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"tfb {tfb.__version__}\n", "")


# --- bad input ------------------------------------------------------------------------------------


def one_line(err: str) -> str:
    """What a user sees of a mistake: one line on stderr, no traceback."""
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever loads weights fails the test: the fault must be found before."""

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded before the input was checked")

    # The last first: a module that is imported here would take what is patched for its own.
    monkeypatch.setattr("tfb.pretrained.load_base", loaded)
    monkeypatch.setattr("tfb.adapters.artifact.load_base", loaded)
    monkeypatch.setattr("tfb.adapters.loading.load_base", loaded)


ROW = {"id": "1", "prompt": "a a a\n=", "choices": ["0", "1"], "label": 0}
OTHER = ROW | {"id": "2", "label": 1}
BAD_ROWS: dict[str, tuple[list[dict[str, Any] | str], str]] = {
    "malformed": ([ROW, "{oops"], r"rows\.jsonl:2: not valid JSON"),
    "duplicate": ([ROW, ROW], "id '1' was already used"),
    "column": ([{"id": "1", "question": "a", "choices": ["0", "1"]}], "no column 'prompt'"),
    "label": ([ROW | {"label": 7}], "label 7 is outside the 2 choices"),
    "colliding": ([OTHER, ROW | {"choices": ["0", " 0"]}], "the same token|does not know"),
    "long": ([OTHER, ROW | {"prompt": "a " * 500 + "\n="}], r"tokens, but the model takes 128"),
    "empty": ([""], "holds no rows"),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("command", ["fit", "evaluate", "report"])
def test_bad_rows_are_named_first(
    run: Run, artifact: Path, tmp_path: Path, command: str, kind: str
) -> None:
    """Every command names the row, before weights are loaded and before its folder is made."""
    rows, message = BAD_ROWS[kind]
    file, target = write(tmp_path / "rows.jsonl", rows), tmp_path / "target"
    arguments: dict[str, tuple[object, ...]] = {
        "fit": (ADAPTER, file, "--output", target),
        "evaluate": (artifact, file),
        "report": (artifact, file, "--output", target),
    }
    code, out, err = run(command, *arguments[command], "--base", MODEL)
    assert code == 1 and out == ""
    line = one_line(err)
    assert re.search(message, line) and str(file) in line  # the fault and its place
    assert ";" in line  # the remedy follows
    assert not target.exists()


DRAWING = ("fit", "evaluate", "score", "report", "export", "demo")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("fit", ("--draws", 3), "--draws 3: "),
        ("fit", ("--draws", 0), "--draws 0: "),
        ("fit", ("--metric", "speed"), "--metric speed: expected one of"),
        ("fit", ("--objective", "most"), "--objective most: expected one of"),
        ("fit", ("--search", "luck"), "--search luck: expected one of"),
        ("fit", ("--mode", "half"), "--mode half: expected one of"),
        ("fit", ("--tolerance", -1), "--tolerance -1.0: expected a positive number"),
        ("fit", ("--mode", "tail"), "--mode tail needs k >= 1"),
        ("fit", ("--sigma", -1), "--sigma -1.0: expected a finite number >= 0"),
        (
            "fit",
            ("--sigma", 0, "--no-temperature"),
            "--sigma 0.0 leaves the temperature to fit: leave out --no-temperature",
        ),
        ("fit", ("--sigma", 0, "--tolerance", 0.1), "--sigma 0.0 leaves the temperature to fit"),
        ("fit", ("--sigma", 0, "--metric", "accuracy"), "--sigma 0.0 leaves the temperature"),
        ("evaluate", ("--sigma", -0.5), "--sigma -0.5: expected a finite number >= 0"),
        ("evaluate", ("--sigma", "nan"), "--sigma nan"),
        ("evaluate", ("--mode", "half"), "--mode half"),
        ("evaluate", ("--draws", 3), "--draws 3"),
        ("score", ("--format", "csv"), "--format csv: expected one of parquet, jsonl"),
        ("score", ("--draws", 5), "--draws 5"),
        ("score", ("--draws", "many"), "--draws many: expected an even number or auto"),
        ("score", ("--draws", "auto", "--per-draw"), "--draws auto: rows have different numbers"),
        ("score", ("--engine", "abacus"), "--engine abacus: expected one of local"),
        ("score", ("--columns", "prompt"), "--columns 'prompt': expected name=column"),
        (
            "score",
            ("--columns", "answer=a"),
            "'answer' is none of id, prompt, messages, choices, label",
        ),
        ("score", ("--keep", "error"), "the output has a column of that name"),
        ("score", ("--mode", "tail"), "--mode tail needs k >= 1"),
        ("score", ("--most-draws", 8), "--draws 10: tolerance and most are those of --draws auto"),
        ("score", ("--draws", "auto", "--most-draws", 9), "--most-draws 9: "),
        ("score", ("--draws", "auto", "--draws-tolerance", 0), "--draws-tolerance 0.0: expected"),
        ("report", ("--draws", 1), "--draws 1"),
        ("fit", ("--target-error", 1), "--target-error 1.0: expected a number between 0 and 1"),
        ("fit", ("--coverage", 2), "--coverage 2.0: expected a number between 0 and 1"),
        ("fit", ("--calibration", "x.csv"), "give one as well"),
        ("evaluate", ("--rows", "rows.txt"), "a name that ends in .parquet, .jsonl, .csv"),
        ("score", ("--draws", "--4"), "--draws --4: expected an even number or auto"),
        ("score", ("--draws", "auto", "--draws-tolerance", "nan"), "--draws-tolerance nan: exp"),
        ("score", ("--draws", "auto", "--draws-tolerance", "inf"), "--draws-tolerance inf: exp"),
        *((c, ("--draws", 10**30), f"--draws {10**30}: expected at most 65536") for c in DRAWING),
        *((c, ("--device", "cuda:99"), "--device cuda:99: torch sees") for c in DRAWING),
        *(
            (command, ("--device", name), f"--device {name}: expected cpu, cuda or cuda:0, ...")
            for command in DRAWING
            for name in ("mps", "meta", "xyz", "cuda:256")  # torch takes the last for cuda:0
        ),
    ],
)
def test_bad_options(
    run: Run,
    data: dict[str, Path],
    artifact: Path,
    tmp_path: Path,
    command: str,
    options: tuple[object, ...],
    message: str,
) -> None:
    arguments: dict[str, tuple[object, ...]] = {
        "fit": (ADAPTER, data["anchor"], "--output", tmp_path / "t"),
        "evaluate": (artifact, data["test"]),
        "score": (artifact, data["test"], "--output", tmp_path / "t"),
        "report": (artifact, data["test"], "--output", tmp_path / "t"),
        "export": (artifact, "--output", tmp_path / "t"),
        "demo": ("--output", tmp_path / "t"),
    }
    base = () if command == "demo" else ("--base", MODEL)
    code, _, err = run(command, *arguments[command], *base, *options)
    assert code == 1 and message in one_line(err)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("fit", ("--limit", 0)),
        ("fit", ("--batch-size", 0)),
        ("fit", ("--tail", 0)),
        ("evaluate", ("--batch-size", "many")),
        ("report", ("--limit", -1)),
        ("demo", ("--draws", "many")),
        ("fit", ("--nonsense",)),
        ("score", ("--batch-tokens", -1)),
        ("score", ("--part-rows", 0)),
        ("score", ("--limit", 0)),
        ("score", ("--max-error-rate", 2)),
        ("score", ("--tail", -1)),
        ("evaluate", ("--limit", 10**30)),
    ],
)
def test_numbers_out_of_range_are_wrong_usage(
    run: Run, command: str, options: tuple[object, ...]
) -> None:
    """typer names the option and the range; exit status 2, as for every other command line."""
    code, _, err = run(command, *options)
    assert code == 2 and str(options[0]) in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ARTIFACT", ("evaluate", "", "rows.csv")),
        ("DATA", ("evaluate", "made", "")),
        ("INPUT...", ("score", "made", "rows.csv", "", "-o", "out")),
        ("--output", ("score", "made", "rows.csv", "-o", "")),
        ("--output", ("demo", "--output=")),
        ("--base", ("fit", "mine", "rows.csv", "--base", "")),
        ("--shift", ("report", "made", "rows.csv", "-o", "page", "--shift", "x", "--shift", "")),
        ("--device", ("export", "made", "-o", "out", "--device", "")),
        ("OUTPUT", ("verify", "")),
    ],
)
def test_nothing_is_called_nothing(run: Run, name: str, words: tuple[str, ...]) -> None:
    """A path of '' would be the current folder."""
    code, _, err = run(*words)
    assert code == 2 and name in err and "is empty ('')" in err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/proc/out", "cannot be written (/proc: No such file or directory); choose another place"),
        ("kept/out", "kept: Not a directory); choose another place"),
        ("gone", "is a link to nothing; choose another name"),
        ("gone/out", "is a link to nothing; choose another name"),
    ],
)
def test_places_that_cannot_be_written(
    run: Run, data: dict[str, Path], artifact: Path, tmp_path: Path, place: str, message: str
) -> None:
    """Found before long work, by every command."""
    (tmp_path / "kept").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    output = tmp_path / place
    for command in (
        ("fit", ADAPTER, data["anchor"], "--base", MODEL, "--output", output),
        ("score", artifact, data["test"], "--output", output),
        ("report", artifact, data["test"], "--output", output),
        ("export", artifact, "--output", output),
        ("demo", "--output", output),
        ("evaluate", artifact, data["test"], "--json", output),
    ):
        code, _, err = run(*command)
        assert code == 1 and message in one_line(err) and str(output) in err
    assert (tmp_path / "kept").read_bytes() == b""


@pytest.mark.usefixtures("no_model")
def test_no_output_within_the_artifact(
    run: Run, data: dict[str, Path], artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(artifact)
    for command in (("score", artifact, data["test"]), ("export", artifact)):
        for inside in (artifact / "out", tmp_path / "link" / "out"):
            code, _, err = run(*command, "--output", inside)
            assert code == 1 and f"is within {artifact}; choose a place elsewhere" in one_line(err)
    assert not (artifact / "out").exists()


def test_messages_of_the_library_name_the_options() -> None:
    """Parameters become options, with their values; other words with an = stay."""
    flags = {"draws": "--draws", "batch_size": "--batch-size", "file_format": "--format"}
    flags |= {"mode": "--mode", "resume": "--resume", "tail": "--tail"}
    for message, said in (
        ("draws=3: expected an even number", "--draws 3: expected an even number"),
        ("mode='tail' needs tail=k", "--mode tail needs --tail k"),
        ("go on with resume=True, or not", "go on with --resume, or not"),
        ("file_format='csv': expected", "--format csv: expected"),
        ("(mode='full', batch_size=2)", "(--mode full, --batch-size 2)"),
        ("write ours=yours, such as text=sentence", "write ours=yours, such as text=sentence"),
        ("/data/mode=x/rows.jsonl: odd", "/data/mode=x/rows.jsonl: odd"),
        ("p.draws=4 is no parameter", "p.draws=4 is no parameter"),
        ("or accept it: bayes.configure(mode='full')", "or accept it: --mode full"),
    ):
        assert as_flags(message, flags) == said
    assert as_flags("name it by columns", {}) == "name it by columns"
    folder = "mode=x,draws=3/artifact"
    assert as_flags(f"{folder}: draws=3", flags, ["--output", folder]) == f"{folder}: --draws 3"


@pytest.mark.usefixtures("no_model")
def test_anchors_of_one_class_or_without_labels(run: Run, tmp_path: Path) -> None:
    """One-class anchors are refused; unlabelled ones too, where the metric needs labels."""
    for name, rows, message in (
        ("one", [ROW, OTHER | {"label": 0}], "all 2 rows have label 0"),
        (
            "none",
            [ROW, {k: v for k, v in OTHER.items() if k != "label"}],
            "none.jsonl:2: no label; metric nll needs one on every row",
        ),
    ):
        file = write(tmp_path / f"{name}.jsonl", rows)
        code, _, err = run(*fit_command(MODEL, ADAPTER, file, tmp_path / "t"))
        assert code == 1 and message in one_line(err)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_unlabelled_rows_cannot_be_judged(
    run: Run, artifact: Path, tmp_path: Path, command: str
) -> None:
    file = write(tmp_path / "rows.jsonl", [ROW, {**OTHER, "label": None}])
    more = ("--output", tmp_path / "t") if command == "report" else ()
    code, _, err = run(command, artifact, file, *more)
    assert code == 1 and f"{file}:2: no label; {command} needs one on every row" in one_line(err)


@pytest.mark.usefixtures("no_model")
def test_score_refuses_an_input_without_rows(run: Run, artifact: Path, tmp_path: Path) -> None:
    file, target = write(tmp_path / "rows.jsonl", [""]), tmp_path / "target"
    code, _, err = run("score", artifact, file, "--output", target)
    assert code == 1 and f"{file}: the input holds no rows" in one_line(err)
    assert not target.exists()


@pytest.mark.usefixtures("no_model")
def test_data_files_of_one_name_cannot_share_a_report(
    run: Run, data: dict[str, Path], artifact: Path, tmp_path: Path
) -> None:
    """They would be one data set in its table."""
    (tmp_path / "more").mkdir()
    other = write(tmp_path / "more" / "test.jsonl", [ROW, OTHER])
    code, _, err = run("report", artifact, data["test"], other, "--output", tmp_path / "t")
    assert code == 1 and "two files are called 'test'; rename one" in one_line(err)


@pytest.mark.usefixtures("no_model")
def test_brackets_in_messages_are_not_markup(
    run: Run,
    data: dict[str, Path],
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """rich would take "[report]" for a style and print nothing of it."""
    gone = tmp_path / "rows[bold][/x].jsonl"
    code, _, err = run("evaluate", artifact, gone)
    assert code == 1 and f"{gone}: matches no file; check the pattern" in one_line(err)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("report", artifact, data["test"], "--output", tmp_path / "t")
    assert code == 1 and 'pip install "tfb[report]"' in one_line(err)


@pytest.mark.usefixtures("no_model")
def test_existing_outputs_are_kept(
    run: Run, data: dict[str, Path], artifact: Path, tmp_path: Path
) -> None:
    """A folder that holds something, and an existing --json file, stay as they are."""
    held = tmp_path / "held"
    held.mkdir()
    kept = held / "kept"
    kept.write_text("mine")
    tail: dict[str, tuple[object, ...]] = {
        "fit": (ADAPTER, data["anchor"], "--output", held),
        "score": (artifact, data["test"], "--output", held),
        "report": (artifact, data["test"], "--output", kept),
        "evaluate": (artifact, data["test"], "--json", kept),
        "export": (artifact, "--output", held),
    }
    for command, arguments in tail.items():
        code, _, err = run(command, *arguments)
        assert code == 1 and "already" in one_line(err) and "choose" in err
    assert [p.name for p in held.iterdir()] == ["kept"] and kept.read_text() == "mine"


def test_missing_things_are_named(
    run: Run, data: dict[str, Path], artifact: Path, tmp_path: Path
) -> None:
    """No such file, artifact, adapter or model."""
    gone = tmp_path / "gone"
    for arguments, message in (
        (
            fit_command(MODEL, ADAPTER, gone, gone),
            "there is no such file",
        ),
        (
            fit_command(MODEL, gone, data["anchor"], gone),
            "no folder of this name is here",
        ),
        (
            ("evaluate", gone, data["test"]),
            "no folder of this name is here",
        ),
        (
            ("evaluate", artifact, data["test"], "--base", gone),
            "no base model's configuration can be loaded",
        ),
    ):
        code, _, err = run(*arguments)
        assert code == 1 and message in one_line(err) and str(gone) in err
    for arguments, option in ((("fit", ADAPTER), "DATA"), (("guess",), "guess")):
        code, _, err = run(*arguments)
        assert code == 2 and option in err and "Traceback" not in err


def test_artifact_of_another_base(
    run: Run, data: dict[str, Path], artifact: Path, tmp_path: Path
) -> None:
    """Weights that are not those sigma was fitted on are refused."""
    other = tmp_path / "base"
    shutil.copytree(MODEL, other)
    weights = load_file(other / "model.safetensors")
    save_file(
        {k: v * 1.5 for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    code, _, err = run("evaluate", artifact, data["test"], "--base", other)
    line = err.splitlines()[-1]  # progress may have been drawn and erased before
    assert code == 1 and line.startswith("error: ") and "load the base it was fitted on" in line
    assert "base model with other weights" in line


def test_exit_status_of_the_process(artifact: Path, tmp_path: Path) -> None:
    command = [
        # An older PEFT warns of settings that the artifact's has in addition.
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tfb",
        "evaluate",
        str(artifact),
        "no.jsonl",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert one_line(done.stderr) == "error: no.jsonl: there is no such file; check the path\n"


def test_tracebacks_are_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path
) -> None:
    """With TFB_TRACEBACK set the exception itself comes out."""
    monkeypatch.setenv("TFB_TRACEBACK", "1")
    gone = str(tmp_path / "no.jsonl")
    monkeypatch.setattr(sys, "argv", ["tfb", "evaluate", str(artifact), gone])
    with pytest.raises(RowError, match="there is no such file"):
        cli.main()


@pytest.mark.usefixtures("no_model")
def test_whatever_is_raised_takes_one_line(
    run: Run,
    data: dict[str, Path],
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Panic(BaseException):
        """What Rust's libraries raise is no Exception."""

    for error, message in (
        (RuntimeError("first\nCompile with TORCH_USE_CUDA_DSA"), "first (TFB_TRACEBACK=1 shows"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\n"), "out of memory; take smaller batc"),
        (MemoryError(), "out of memory; take smaller batches"),
        (KeyError("layers"), "KeyError: 'layers' (TFB_TRACEBACK=1 shows where)"),
        (RecursionError("too deep"), "RecursionError: too deep (TFB_TRACEBACK=1 shows where)"),
        (Panic("index out of range"), "Panic: index out of range (TFB_TRACEBACK=1"),
        (ValueError("a\x1b[2Jb \udce9"), "error: a\\x1b[2Jb \\udce9"),
    ):

        def raised(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("tfb.pretrained.from_pretrained", raised)
        code, _, err = run("evaluate", artifact, data["test"])
        assert code == 1 and message in one_line(err) and "DSA" not in err

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tfb.pretrained.from_pretrained", interrupted)
    assert run("evaluate", artifact, data["test"]) == (130, "", "error: interrupted\n")


def test_terminals_of_ascii_and_closed_pipes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", ascii_only)
        code, _, _ = run("verify", "é")
        ascii_only.flush()
        assert code == 1 and b"error: \\xe9/manifest.json: is not" in ascii_only.buffer.getvalue()
    end, start = os.pipe()
    os.close(end)
    with open(start, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(console.out, "quiet", False)  # which rich sets for good
        code, _, err = run("--version")
    assert code == 1 and err == ""


# --- where things go ------------------------------------------------------------------------------


def test_the_artifact_is_put_beside_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or into the present folder, for a name of the hub."""
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path / "adapter")
    assert default_output(str(tmp_path / "adapter/")) == tmp_path / "adapter-tfb"
    assert default_output(".") == tmp_path / "adapter-tfb"
    assert default_output("../adapter") == Path("../adapter-tfb")
    assert default_output("me/name") == Path("name-tfb")


def test_fit_without_an_output(run: Run, data: dict[str, Path], tmp_path: Path) -> None:
    """An adapter that tells its base needs nothing but rows."""
    shutil.copytree(ADAPTER, tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = MODEL
    (tmp_path / "mine" / "adapter_config.json").write_text(json.dumps(config))
    code, out, err = run("fit", tmp_path / "mine", data["anchor"], "--sigma", 0, "--limit", 50)
    assert code == 0 and f"artifact: {tmp_path / 'mine-tfb'}" in out, err
    assert (tmp_path / "mine-tfb" / "tokenizer_config.json").is_file()


def test_an_adapter_that_does_not_tell_its_base(
    run: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    code, _, err = run("fit", ADAPTER, data["anchor"], "--output", tmp_path / "t")
    assert code == 1 and "does not say what its base model is; give --base NAME" in one_line(err)


# --- decisions ------------------------------------------------------------------------------------


def test_decisions_of_a_fit(run: Run, data: dict[str, Path], tmp_path: Path) -> None:
    """Said, saved, and written by score; on rows that the search did not see."""
    made, output = tmp_path / "made", tmp_path / "scored"
    fit = (*fit_command(MODEL, ADAPTER, data["anchor"], made), "--sigma", 0, "--coverage", 0.8)
    code, _, err = run(*fit, "--calibration", data["anchor"])
    assert code == 1 and "are among those that sigma and T are fitted to" in one_line(err)
    code, out, err = run(*fit, "--target-error", 0.5, "--calibration", data["test"])
    decisions = tfb.load(MODEL, made).decisions
    assert code == 0 and decisions is not None and f"\n{decisions}\n" in out, err
    assert decisions.rows == len(read_rows(data["test"])) and decisions.coverage == 0.8
    code, _, err = run("score", made, data["test"], "--output", output, "--limit", 8)
    assert code == 0, err
    for row in pq.read_table(output / "part-00000-00000000.parquet").to_pylist():
        expected = decisions.apply(torch.tensor([row["probs"]]))
        assert [row["abstain"]] == expected["abstain"]
        assert row["prediction_set"] == [str(i) for i in expected["prediction_set"][0]]


def test_adaptive_draws_are_told(
    run: Run, data: dict[str, Path], artifact: Path, tmp_path: Path
) -> None:
    """How many on average, and how many rows would have needed more."""
    common = ("score", artifact, data["test"], "--limit", ROWS, "--draws", "auto", "--output")
    capped = ("--most-draws", 8, "--draws-tolerance", 1e-4)
    code, out, err = run(*common, tmp_path / "few", *capped, "--format", "jsonl")
    (part,) = (tmp_path / "few").glob("part-*")
    rows = [json.loads(line) for line in part.read_text().splitlines()]
    mean = sum(row["draws"] for row in rows) / ROWS
    left = sum(row["standard_error"] > 1e-4 and row["draws"] == 8 for row in rows)
    assert code == 0 and 0 < left < ROWS, err
    said = f"draws: {mean:.3g} a row on average; {left} of {ROWS} rows stopped at 8 draws"
    assert said in out and "still above 0.0001" in out
    code, out, err = run(*common, tmp_path / "easy", "--draws-tolerance", 1)
    assert code == 0 and "draws: 4 a row on average\n" in out, err
