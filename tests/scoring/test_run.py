"""Whole runs: nothing lost, nothing twice, whatever stops them."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tfb
from benchmarks.environment import REPOSITORY
from tfb.cli import app as cli
from tfb.cli import score as score_command
from tfb.data.rows import RowError
from tfb.demo import digits
from tfb.scoring import run as offline
from tfb.scoring.job import Job, configuration_sha256, differences, model_sha256
from tfb.scoring.output import OutputError
from tfb.scoring.pipeline import LocalEngine, Stop
from tfb.scoring.rows import load_tokenizer
from tfb.scoring.run import Outcome, run

MODEL, ADAPTER = str(digits.BASE), str(digits.ADAPTER)
SINGLE = 2.0**-24
COUNTS = {"rows": 21, "errors": 0, "truncated": 0, "parts": 4}
KILLS = int(os.environ.get("TFB_KILLS", "6"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    bayes = tfb.bayesianize(tfb.load_adapter(tfb.load_base(MODEL, ADAPTER), ADAPTER), seed=3)
    bayes.sigma, bayes.source = 0.008, Path(ADAPTER)
    return str(bayes.save(tmp_path_factory.mktemp("made") / "artifact"))


@pytest.fixture(scope="module")
def loaded(artifact: str) -> tuple[tfb.BayesianModel, Any]:
    return tfb.load(MODEL, artifact), load_tokenizer(MODEL)


@pytest.fixture
def job(
    artifact: str, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Job:
    """A job on 21 digits in parts of 6, with a model that is loaded once for all tests."""

    class Loaded(LocalEngine):
        def __init__(self, job: Job) -> None:
            self._job = job
            self._bayes, self._tokenizer = loaded

    monkeypatch.setitem(offline.ENGINES, "local", Loaded)
    write(tmp_path / "rows.jsonl", ROWS)
    return Job(
        MODEL, artifact, (str(tmp_path / "rows.jsonl"),), str(tmp_path / "out"), draws=2,
        part_rows=6, file_format="jsonl",
    )  # fmt: skip


def cut(i: int, row: Any) -> dict[str, Any]:
    """A digit of which some lines are gone, with 4 or 10 choices."""
    lines = row["prompt"].split("\n")[i % 4 :]
    return {**row, "prompt": "\n".join(lines), "choices": row["choices"][: 10 if i % 2 else 4],
            "label": None, "tag": i}  # fmt: skip


ROWS = [cut(i, row) for i, row in enumerate(digits.rows("test")[:21])]


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def files(job: Job) -> dict[str, bytes]:
    """The part files of a job and what is in them."""
    return {p.name: p.read_bytes() for p in sorted(Path(job.output).glob("part-*"))}


def results(job: Job) -> list[dict[str, Any]]:
    """All rows, part by part."""
    found: list[dict[str, Any]] = []
    for path in sorted(Path(job.output).glob("part-*")):
        if path.suffix == ".parquet":
            found += pq.read_table(path).to_pylist()
        else:
            found += map(json.loads, path.read_bytes().splitlines())
    return found


def manifest(job: Job) -> dict[str, Any]:
    return dict(json.loads((Path(job.output) / "manifest.json").read_text()))


@pytest.fixture(scope="module")
def whole(artifact: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The parts of an uninterrupted run of ``job``, from a model of its own."""
    folder = tmp_path_factory.mktemp("whole")
    file = write(folder / "rows.jsonl", ROWS)
    job = Job(MODEL, artifact, (str(file),), str(folder / "out"), draws=2, part_rows=6,
              file_format="jsonl")  # fmt: skip
    assert run(job) == Outcome("complete", 21, 0, None, False)
    return files(job)


# --- what comes out -------------------------------------------------------------------------------


def test_parts_and_manifest(
    job: Job, whole: dict[str, bytes], artifact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in = rows out, in order; the manifest tells what they depend on."""
    monkeypatch.setattr(
        "tfb.scoring.windows.BLOCK", 2
    )  # so that this short input is read bit by bit
    seen: list[offline.Progress] = []
    run(job, report=seen.append)
    assert files(job) == whole and [f"part-0000{i}.jsonl" for i in range(4)] == list(whole)
    found = results(job)
    assert [r["id"] for r in found] == [r["id"] for r in ROWS]
    assert len({r["key"] for r in found}) == 21
    assert [p.rows for p in seen] == [6, 12, 18, 21] and seen[-1].share == 1
    assert seen[0].seconds_left is None and seen[-1].seconds_left == 0
    assert all(p.rows_per_second > 0 and p.tokens_per_second > 0 for p in seen)
    told = manifest(job)
    configuration = told["configuration"]
    assert told["status"] == "complete" and told["counts"] == COUNTS
    assert told["configuration_sha256"] == configuration_sha256(configuration)
    assert told["throughput"]["rows"] == 21 and told["inputs"] == list(job.inputs)
    assert (configuration["sigma"], configuration["seed"]) == (0.008, 3)
    bayes = tfb.load(MODEL, artifact)
    assert configuration["model_sha256"] == model_sha256(bayes.base)
    with torch.no_grad():
        next(p for n, p in bayes.base.named_parameters() if "lora" in n).add_(1)
    assert configuration["model_sha256"] == model_sha256(bayes.base)  # the artifact has a hash
    with torch.no_grad():
        bayes.base.model.norm.weight[3] += 1e-6
    assert configuration["model_sha256"] != model_sha256(bayes.base)


def test_values_are_those_of_the_iterator(job: Job, loaded: tuple[Any, Any]) -> None:
    """``tfb.score`` pads other rows together: within twice the error of rows scored alone."""
    run(job)
    expected = list(tfb.score(ROWS, *loaded, draws=2))
    alone = list(tfb.score(ROWS, *loaded, draws=2, batch_size=1))
    budget = 2 * max(
        abs(p - q)
        for a, b in zip(expected, alone, strict=True)
        for p, q in zip(a["probs"], b["probs"], strict=True)
    )
    for found, wanted in zip(results(job), expected, strict=True):
        assert found["id"] == wanted["id"] and found["choice"] == wanted["choice"]
        assert found["probs"] == pytest.approx(wanted["probs"], abs=budget + 2 * SINGLE)
    assert budget < 1e-4


def test_formats_of_input_and_output(job: Job, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The same rows from any file, to any format: the same values, bit for bit."""
    expected = [{k: v for k, v in r.items() if k != "key"} for r in results_of(whole)]
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table.slice(0, 9), tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(table.slice(9), tmp_path / "b.parquet")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    text = [{k: "|".join(v) if isinstance(v, list) else v for k, v in r.items()} for r in ROWS]
    pyarrow.csv.write_csv(pa.Table.from_pylist(text), tmp_path / "rows.csv")
    for number, (name, keep) in enumerate(
        [("*.parquet", ("tag",)), ("rows.jsonl.gz", ()), ("rows.csv", ("tag",))]
    ):
        other = replace(
            job, inputs=(str(tmp_path / name),), output=str(tmp_path / str(number)), keep=keep,
            file_format="parquet",
        )  # fmt: skip
        assert run(other).rows == 21
        found = [{k: v for k, v in r.items() if k not in ("key", "tag")} for r in results(other)]
        assert found == expected
        if keep:
            tags = [str(r["tag"]) if "csv" in name else r["tag"] for r in ROWS]
            assert [r["tag"] for r in results(other)] == tags


def results_of(parts: dict[str, bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for data in parts.values() for line in data.splitlines()]


def test_all_that_can_be_asked_for(job: Job, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Draws, logits, kept columns of any type, the user's names, tail mode, adaptive draws."""
    rows = [
        {"uid": r["id"], "q": r["prompt"], "options": r["choices"], "note": note}
        for r, note in zip(ROWS, ["x", 1, None, {"a": [1.5]}], strict=False)
    ]
    file = write(tmp_path / "names.jsonl", rows)
    columns = {"id": "uid", "prompt": "q", "choices": "options"}
    asked = replace(job, inputs=(str(file),), columns=columns, keep=("note", "uid"))
    notes: dict[str, list[Any]] = {
        "jsonl": [r["note"] for r in rows], "parquet": ["x", "1", None, '{"a": [1.5]}'],
    }  # fmt: skip
    for file_format, expected in notes.items():
        output = str(tmp_path / file_format)
        run(replace(asked, output=output, file_format=file_format, per_draw=True, logits=True))
        found = results(replace(asked, output=output))
        assert [r["note"] for r in found] == expected
        assert [r["uid"] for r in found] == [r["id"] for r in found] == [r["uid"] for r in rows]
        for row in found:
            draws = torch.tensor(row["draw_logits"]).softmax(-1)
            assert torch.tensor(row["draw_probs"]).shape == draws.shape == (2, len(row["probs"]))
    auto = replace(asked, output=str(tmp_path / "auto"), draws="auto")
    run(auto)
    assert {r["draws"] for r in results(auto)} <= {4, 8, 16, 32, 64}


# --- stopped and continued ------------------------------------------------------------------------


def stopping(after: int, number: int) -> Callable[[Any], None]:
    """A report that sends a signal to this process after so many parts."""
    seen: list[Any] = []

    def report(progress: Any) -> None:
        seen.append(progress)
        if len(seen) == after:
            os.kill(os.getpid(), number)

    return report


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_part(job: Job, whole: dict[str, bytes], number: int) -> None:
    """Then the run goes on where it was, and its parts are those of a run without a signal."""
    before = [signal.getsignal(s) for s in Stop.SIGNALS]
    stopped = run(job, report=stopping(2, number))
    assert stopped == Outcome("stopped", 12, 0, number, False)
    assert [signal.getsignal(s) for s in Stop.SIGNALS] == before
    assert files(job) == dict(list(whole.items())[:2]) and manifest(job)["status"] == "stopped"
    assert run(job, resume=True).status == "complete"
    assert files(job) == whole and manifest(job)["sessions"] == 2
    assert manifest(job)["counts"] == COUNTS
    assert run(job, resume=True).rows == 21 and files(job) == whole  # nothing left to do


def test_a_second_signal_acts_as_usual() -> None:
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_parts_finished_in_any_order(job: Job, whole: dict[str, bytes]) -> None:
    """Several workers leave gaps: the missing windows come back under the missing numbers."""
    run(job)
    for name in ("part-00000.jsonl", "part-00002.jsonl"):
        (Path(job.output) / name).unlink()
    run(job, resume=True)
    assert files(job) == whole


KILLED = """
import multiprocessing, os, random, signal, sys, threading, json
import torch
torch.set_num_threads(1)
from pathlib import Path
from tfb.scoring import run as offline
from tfb.scoring.job import Job
from tfb.scoring.run import run
from tfb.scoring.pipeline import LocalEngine

kills, seed, job = int(sys.argv[1]), int(sys.argv[2]), Job(**json.loads(sys.argv[3]))
loaded = LocalEngine(job)
offline.ENGINES["local"] = lambda _: loaded  # once: while it loads, nothing is written

def work(at, total):
    calls = 0
    def count(frame, event, _):
        nonlocal calls
        if os.sep + "tfb" + os.sep not in frame.f_code.co_filename:
            return
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
    threading.setprofile(count)
    sys.setprofile(count)
    run(job, resume=True, max_error_rate=1)
    sys.setprofile(None)
    total.value = calls

context = multiprocessing.get_context("fork")

def attempt(at):
    total = context.Value("q", 0)
    process = context.Process(target=work, args=(at, total))
    process.start()
    process.join()
    return process.exitcode, total.value

code, calls = attempt(0)
assert code == 0, code
whole = {p.name: p.read_bytes() for p in Path(job.output).glob("part-*")}
chance, killed, finished = random.Random(seed), 0, 0
while killed < kills:
    for path in Path(job.output).iterdir():
        path.unlink()
    code = None
    while code != 0 and killed < kills:
        code, _ = attempt(chance.randrange(1, calls))
        assert code in (0, -signal.SIGKILL), code
        killed += code != 0
        for path in Path(job.output).glob("part-*"):  # what has its name is whole
            assert path.read_bytes() == whole[path.name], path
    if code != 0:
        code, _ = attempt(0)
        assert code == 0, code
    assert {p.name: p.read_bytes() for p in Path(job.output).glob("part-*")} == whole
    assert sorted(p.name for p in Path(job.output).iterdir()) == sorted(
        [*whole, ".lock", "manifest.json"]
    )
    finished += 1
print(killed, finished, len(whole))
"""


def test_killed_at_random_moments(artifact: str, tmp_path: Path) -> None:
    """SIGKILL at a random call inside tfb, in any thread, again and again, then resumed.

    The parts are those of an uninterrupted run, byte for byte, at every moment. TFB_KILLS sets the
    number of kills.
    """
    write(tmp_path / "rows.jsonl", [*ROWS, "{broken", ROWS[0], {"id": "x"}])
    job = {
        "model": MODEL, "artifact": artifact, "inputs": [str(tmp_path / "rows.jsonl")], "draws": 2,
        "output": str(tmp_path / "out"), "part_rows": 5,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(KILLS), "11", json.dumps(job)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, finished, parts = map(int, done.stdout.split())
    assert killed == KILLS and finished >= 1 and parts == 5


@pytest.mark.parametrize("at", range(1, 12, 2))
def test_a_full_disk_at_any_write(
    job: Job, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Each of a run's writes may be the one that fails; what is there can be gone on with."""
    synced, count = os.fsync, 0

    def full(file: int) -> None:
        nonlocal count
        count += 1
        if count >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"No space left on device.*continue with --resume"):
            run(job)
    assert all(whole[name] == data for name, data in files(job).items())
    assert not list(Path(job.output).glob("*.partial"))
    assert run(job, resume=True).status == "complete" and files(job) == whole


def test_input_that_breaks_off_keeps_what_was_done(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the thread that reads ahead ends the run, after the windows before it."""
    monkeypatch.setattr("tfb.scoring.windows.BLOCK", 1)
    first = write(tmp_path / "first.jsonl", ROWS[:9])
    packed = tmp_path / "second.jsonl.gz"
    data = gzip.compress(write(tmp_path / "second.jsonl", ROWS[9:]).read_bytes())
    packed.write_bytes(data[:-40])
    both = replace(job, inputs=(str(first), str(packed)), part_rows=2)
    with pytest.raises(RowError, match=r"second\.jsonl\.gz: cannot be read"):
        run(both)
    assert [r["id"] for r in results(job)] == [r["id"] for r in ROWS[:8]]
    assert manifest(job)["status"] == "running"
    packed.write_bytes(data)
    assert run(both, resume=True).rows == 21
    assert [r["id"] for r in results(job)] == [r["id"] for r in ROWS]


# --- what is refused ------------------------------------------------------------------------------


def test_a_folder_is_not_continued_unasked(job: Job, tmp_path: Path) -> None:
    run(job)
    with pytest.raises(OutputError, match=r"already holds a run \(complete, 21 rows\).*--resume"):
        run(job)
    held = replace(job, output=str(tmp_path))
    for resume in (False, True):
        with pytest.raises(OutputError, match="already holds something; choose a new folder"):
            run(held, resume=resume)


def test_a_changed_configuration_is_refused(
    job: Job, loaded: tuple[Any, Any], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message shows what it was and is, before any model is loaded where that can be told."""
    run(job)
    with monkeypatch.context() as patch:
        patch.setitem(offline.ENGINES, "local", None)
        for change, message in (
            ({"batch_tokens": 64}, "batch_tokens: 4096 -> 64"),
            ({"draws": 4, "part_rows": 7}, r"draws: 2 -> 4; part_rows: 6 -> 7"),
            ({"columns": {"id": "tag"}}, "columns.id: None -> tag"),
            ({"keep": ("tag",)}, r"keep: \[\] -> \['tag'\]"),
            ({"file_format": "parquet"}, "file_format: jsonl -> parquet"),
        ):
            with pytest.raises(OutputError, match=f"another configuration .{message}"):
                run(replace(job, **change), resume=True)
        patch.setattr(torch, "__version__", "9.9")
        with pytest.raises(OutputError, match=r"versions\.torch: .* -> 9\.9"):
            run(job, resume=True)
    bayes = loaded[0]
    monkeypatch.setattr(bayes, "sigma", 0.5)
    with pytest.raises(OutputError, match=r"sigma: 0\.008 -> 0\.5"):
        run(job, resume=True)
    assert files(job) == whole


def test_differences() -> None:
    was = {"a": 1, "b": {"x": 1, "y": 2}, "c": 3, "e": {"z": 1}}
    assert differences(was, {"a": 1, "b": {"x": 1, "y": 2}}) == []
    assert differences(was, {"a": 2, "b": {"x": 5}, "d": 4}) == [
        "a: 1 -> 2", "b.x: 1 -> 5", "d: None -> 4", "b.y: 2 -> None",
    ]  # fmt: skip


def test_a_changed_input_is_refused_and_a_longer_one_is_not(job: Job) -> None:
    run(replace(job, limit=9))
    file, before = Path(job.inputs[0]), files(job)
    write(file, [*ROWS[:3], {**ROWS[3], "prompt": "a\n="}, *ROWS[4:]])
    with pytest.raises(
        RowError, match=r"rows\.jsonl:4: the row .* has changed since it was scored"
    ):
        run(job, resume=True)
    write(file, ROWS[2:])
    with pytest.raises(RowError, match="2 finished rows are not in the input any more"):
        run(job, resume=True)
    assert files(job) == before
    write(file, ROWS[::-1])
    assert run(job, resume=True).rows == 21
    assert sorted(r["id"] for r in results(job)) == sorted(r["id"] for r in ROWS)


def test_declared_columns_are_checked_first(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(offline.ENGINES, "local", None)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    other = replace(job, inputs=(str(tmp_path / "a.parquet"),), columns={"prompt": "question"})
    with pytest.raises(RowError, match=r"no column 'question'; there are 'id'.* by columns"):
        run(other)
    with pytest.raises(RowError, match=r"no column 'source'"):
        run(replace(other, columns={}, keep=("source",)))
    assert not Path(job.output).exists()


# --- errors are rows ------------------------------------------------------------------------------

BAD: list[Any] = [
    "{oops", {"id": "no prompt"}, {**ROWS[0], "id": "empty", "prompt": " "}, ROWS[1],
    {**ROWS[0], "id": "long", "prompt": "a " * 200 + "\n="}, {**ROWS[0], "id": ["x"]},
]  # fmt: skip


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_errors_are_rows_and_can_be_retried(
    job: Job, file_format: str, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(job, file_format=file_format)
    write(Path(job.inputs[0]), [*ROWS[:8], *BAD, *ROWS[8:]])
    first = run(job, max_error_rate=1)
    assert first == Outcome("complete", 27, 6, None, False)
    found = results(job)
    assert [r["error"] is not None for r in found] == [False] * 8 + [True] * 6 + [False] * 13
    assert [r["id"] for r in found[8:14]] == [
        None,
        "no prompt",
        "empty",
        ROWS[1]["id"],
        "long",
        None,
    ]
    for row, fault in zip(
        found[8:14],
        ("not valid JSON", "no column 'prompt'", "'prompt' is empty", "was already used",
         "tokens, but the", "'id' is a list"),
        strict=True,
    ):  # fmt: skip
        assert fault in row["error"] and "rows.jsonl:" in row["error"] and row["probs"] is None
    # Repaired in the input: refused as changed, unless the errors are to be done again.
    write(
        Path(job.inputs[0]), [*ROWS[:8], *BAD[:2], {**ROWS[0], "id": "empty"}, *BAD[3:], *ROWS[8:]]
    )
    with pytest.raises(RowError, match=r"has changed since"):
        run(job, resume=True, max_error_rate=1)
    again = run(job, retry_errors=True, max_error_rate=1)
    assert again == Outcome("complete", 27, 5, None, False)
    good = {r["id"]: r for r in found if r["error"] is None}
    repaired = {r["id"]: r for r in results(job) if r["error"] is None}
    assert {k: v for k, v in repaired.items() if k != "empty"} == good and "empty" in repaired
    assert len(results(job)) == 27


def test_too_many_errors_stop_the_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "LEAST_ROWS", 8)
    write(Path(job.inputs[0]), [*ROWS[:5], *["{"] * 8, *ROWS[5:]])
    stopped = run(job, max_error_rate=0.2)
    assert stopped == Outcome("too many errors", 12, 7, None, True)
    assert len(results(job)) == 12 and manifest(job)["status"] == "too many errors"
    end = run(job, resume=True, max_error_rate=0.5)
    assert end == Outcome("complete", 29, 8, None, False) and len(results(job)) == 29
    # A short input is scored to its end, and its share of errors is told all the same.
    monkeypatch.setattr(offline, "LEAST_ROWS", 1000)
    small = replace(job, output=f"{job.output}-small")
    assert run(small, max_error_rate=0.2) == Outcome("complete", 29, 8, None, True)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
    max_leaves=6,
)  # fmt: skip
CHOICES = st.lists(st.sampled_from(["0", "1", "2", "3", " 3", "x", ""]), max_size=4)
PROMPTS = st.sampled_from(["a b c\n=", "a" * 3000, "", " ", "\x00\x1b[", "q p =", "\ud800"])
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(0, 4) | ANY,
        "prompt": PROMPTS | ANY,
        "choices": CHOICES | ANY,
        "label": st.integers(-1, 4) | ANY,
        "text": ANY,
        "tag": ANY,
    },
)  # fmt: skip
BYTES = st.binary(max_size=20).map(lambda b: b.replace(b"\n", b""))
LINES = st.lists(FIELDS.map(lambda f: json.dumps(f).encode()) | BYTES, min_size=1, max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(LINES, st.sampled_from(["jsonl", "parquet"]))
def test_rows_in_are_rows_out(
    job: Job, tmp_path_factory: pytest.TempPathFactory, given_lines: list[bytes], file_format: str
) -> None:
    """Whatever the lines hold: one row for each, good or an error, or a refusal at the start."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "rows.jsonl").write_bytes(b"".join(line + b"\n" for line in given_lines))
    fuzzed = replace(
        job, inputs=(str(folder / "rows.jsonl"),), output=str(folder / "out"), part_rows=4,
        keep=("tag",), file_format=file_format,
    )  # fmt: skip
    first = given_lines[0].removeprefix(b"\xef\xbb\xbf")
    lines = sum(bool(line.strip()) for line in [first, *given_lines[1:]])
    if lines == 0:
        with pytest.raises(RowError, match="holds no rows"):
            run(fuzzed)
        return
    done = run(fuzzed, max_error_rate=1)
    found = results(fuzzed)
    assert done.rows == len(found) == lines
    assert done.errors == sum(r["error"] is not None for r in found)
    assert all((r["error"] is None) == (r["probs"] is not None) for r in found)
    good = [r["id"] for r in found if r["error"] is None]
    assert len(set(good)) == len(good) and None not in good
    assert run(fuzzed, resume=True, max_error_rate=1).rows == lines and results(fuzzed) == found


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def command(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Exit status, stdout and stderr of ``tfb score`` on the job's input."""

    def call(*options: object) -> tuple[int, str, str]:
        words = [
            "tfb", "score", "--model", MODEL, "--artifact", job.artifact, "--input", job.inputs[0],
            "--output", job.output, "--draws", 2, "--part-rows", 6, "--format", "jsonl", *options,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", [str(w) for w in words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def test_exit_status(
    command: Callable[..., tuple[int, str, str]],
    job: Job,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """143 after SIGTERM, 1 for a refusal, 0 at the end, 3 for too many errors."""
    with monkeypatch.context() as patch:
        from contextlib import nullcontext

        patch.setattr(score_command, "_bar", lambda: nullcontext(stopping(1, signal.SIGTERM)))
        code, out, _ = command()
    assert code == 143 and f"stopped: 6 rows, 0 of them errors: {job.output}" in out
    code, out, err = command()
    assert code == 1 and err.startswith("error: ") and "--resume" in err and out == ""
    code, out, _ = command("--resume")
    assert code == 0 and "complete: 21 rows" in out and files(job) == whole
    write(Path(job.inputs[0]), [*ROWS, *BAD])
    code, out, err = command("--resume")
    assert code == 3 and "complete: 27 rows, 6 of them errors" in out
    assert "6 of 27 rows are errors, more than --max-error-rate 0.05" in err
    monkeypatch.setitem(offline.ENGINES, "local", LocalEngine)
    code, _, err = command("--retry-errors", "--mode", "tail", "--tail", 1)
    assert code == 1 and "note: sigma was searched with mode=full" in err
    assert "mode: full -> tail; tail: None -> 1" in err
