"""Whole runs: nothing lost, nothing twice, whatever stops them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.command import Run
from support.scoring import (
    DONE,
    DRAWS,
    ROWS,
    counted,
    files,
    manifest,
    results,
    small_job,
    stopping,
    write,
)

import tfb
from tfb.adapters.artifact import file_sha256
from tfb.adapters.loading import load_tokenizer
from tfb.cli.console import Meter
from tfb.data.readers import find_sources
from tfb.data.rows import RowError
from tfb.demo import digits
from tfb.evaluation.decisions import Decisions
from tfb.plain import differences
from tfb.scoring import run as offline
from tfb.scoring.job import Job, model_sha256
from tfb.scoring.output import Counts, OutputError, OutputFolder, locked
from tfb.scoring.ray import Worker
from tfb.scoring.run import (
    Outcome,
    input_files,
    noted_signals,
    plan,
    read_shards,
    run,
    stamp,
    verify,
)
from tfb.scoring.scorer import UNCERTAINTIES

MODEL = str(digits.BASE)
SINGLE = 2.0**-24
COUNTS = {"rows": 21, "errors": 0, "truncated": 0, "draws": 42, "capped": 0, "total": 21}
LOAD = Job.load


# --- shards ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), max_size=5), st.integers(1, 4), st.none() | st.integers(1, 30))
def test_shards_hold_every_record_once(counts: list[int], size: int, limit: int | None) -> None:
    """In the input's order, which is that of the parts' names, and never of two files."""
    shards = plan(counts, size, limit)
    everything = [(n, i) for n, count in enumerate(counts) for i in range(count)]
    found = [(s.file, i) for s in shards for i in range(s.start, s.stop)]
    assert found == everything[:limit]
    assert all(1 <= len(s) <= size and s.before == sum(counts[: s.file]) for s in shards)
    names = [s.name for s in shards]
    assert names == sorted(set(names))


@given(st.sets(st.integers(0, 6)), st.integers(1, 4))
def test_missing_shards_are_read_as_if_all_were(
    job_of_texts: tuple[Job, list[Any]], finished: set[int], size: int
) -> None:
    """Whichever are finished: the same items, numbers and places."""
    job, sources = replace(job_of_texts[0], part_rows=size), job_of_texts[1]
    shards = plan([file["records"] for file in input_files(sources, None)], size, None)
    stamps = {source: stamp(source) for source in sources}
    every = list(read_shards(stamps, shards, job))
    assert [w.shard for w in every] == shards
    assert [begun["id"] for w in every for _, begun in w.items] == [str(n) for n in range(11)]
    missing = [s for n, s in enumerate(shards) if n not in finished]
    left = list(read_shards(stamps, missing, job))
    assert left == [w for w in every if w.shard in missing]


@pytest.fixture(scope="module")
def job_of_texts(artifact: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Any]:
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"prompt": f"row {n}", "choices": ["a", "b"]} for n in range(11)]
    paths = [write(folder / "a.jsonl", rows[:7]), folder / "b.parquet"]
    pq.write_table(pa.Table.from_pylist(rows[7:]), paths[1], row_group_size=3)
    return Job(artifact, tuple(map(str, paths)), ""), find_sources(paths)


# --- what comes out -------------------------------------------------------------------------------


def test_parts_and_manifest(job: Job, whole: dict[str, bytes], artifact: str) -> None:
    """Rows in = rows out, in order; the manifest tells what they depend on."""
    seen: list[tuple[Counts, int]] = []
    assert run(job, report=lambda *now: seen.append(now)) == DONE
    assert files(job) == whole
    assert list(whole) == [f"part-00000-{start:08d}.jsonl" for start in (0, 6, 12, 18)]
    assert [r["id"] for r in results(job)] == [r["id"] for r in ROWS]
    assert seen == [(counted(rows), 21) for rows in (6, 12, 18, 21)]
    told = manifest(job)
    configuration, file = told["configuration"], Path(job.inputs[0])
    assert told["status"] == "complete" and told["counts"] == COUNTS
    assert told["files"] == [
        {
            "name": str(file),
            "size": file.stat().st_size,
            "sha256": file_sha256(file),
            "records": 21,
        }
    ]
    assert told["format_version"] == 2
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
        assert set(found) - set(wanted) == {"error"}
        assert found["id"] == wanted["id"] and found["choice"] == wanted["choice"]
        assert found["probs"] == pytest.approx(wanted["probs"], abs=budget + 2 * SINGLE)
    assert budget < 1e-4


def test_formats_of_input_and_output(job: Job, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The same rows from any file, to any format: the same values, bit for bit."""
    expected = [json.loads(line) for data in whole.values() for line in data.splitlines()]
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table.slice(0, 12), tmp_path / "a.parquet", row_group_size=5)
    pq.write_table(table.slice(12), tmp_path / "b.parquet")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    text = [{k: "|".join(v) if isinstance(v, list) else v for k, v in r.items()} for r in ROWS]
    pyarrow.csv.write_csv(pa.Table.from_pylist(text), tmp_path / "rows.csv")
    for number, (name, keep) in enumerate(
        [("*.parquet", ("tag",)), ("rows.jsonl.gz", ()), ("rows.csv", ("tag",))]
    ):
        changes: dict[str, Any] = {"output": str(tmp_path / str(number)), "format": "parquet"}
        other = replace(job, inputs=(str(tmp_path / name),), keep=keep, **changes)
        assert run(other).counts.rows == 21
        found = [{k: v for k, v in r.items() if k != "tag"} for r in results(other)]
        assert found == expected
        if keep:
            tags = [str(r["tag"]) if "csv" in name else r["tag"] for r in ROWS]
            assert [r["tag"] for r in results(other)] == tags
    assert list(files(replace(job, output=str(tmp_path / "0")))) == [
        f"part-0000{file}-{start:08d}.parquet" for file, start in ((0, 0), (0, 6), (1, 0), (1, 6))
    ]


def test_all_that_can_be_asked_for(job: Job, tmp_path: Path) -> None:
    """Draws, kept columns of any type, the user's names, cut rows, adaptive draws."""
    rows = [
        {"uid": r["id"], "q": r["prompt"], "options": r["choices"], "note": note}
        for r, note in zip(ROWS, ["x", 1, None, {"a": [1.5]}], strict=False)
    ]
    file = write(tmp_path / "names.jsonl", rows)
    columns = {"id": "uid", "prompt": "q", "choices": "options"}
    asked = replace(job, inputs=(str(file),), columns=columns, keep=("note", "uid"))
    notes: dict[str, list[Any]] = {
        "jsonl": [r["note"] for r in rows],
        "parquet": ["x", "1", None, '{"a": [1.5]}'],
    }
    for kind, expected in notes.items():
        one = replace(asked, output=str(tmp_path / kind), format=kind, per_draw=True)
        run(one)
        found = results(one)
        assert [r["note"] for r in found] == expected
        assert [r["uid"] for r in found] == [r["id"] for r in found] == [r["uid"] for r in rows]
        first = ["id", "note", "uid", "prediction", "choice", "probs", *UNCERTAINTIES, "draws"]
        assert list(found[0]) == [*first, "label", "draw_probs", "error"]
        for row in found:
            assert torch.tensor(row["draw_probs"]).shape == (2, len(row["probs"]))
    write(file, [{**rows[0], "q": "a " * 200 + "\n="}, rows[1]])
    short = replace(asked, output=str(tmp_path / "cut"), truncate="left")
    assert run(short) == Outcome("complete", counted(2, 0, 1))
    assert [r["truncated"] > 0 for r in results(short)] == [True, False]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_decisions_of_the_artifact_are_columns(artifact: str, tmp_path: Path, kind: str) -> None:
    """In its own mode alone; a row that is an error has none."""
    bayes = tfb.load(MODEL, artifact)
    bayes.decisions = Decisions(
        99, DRAWS, target_error=0.1, threshold=0.7, coverage=0.9, quantile=0.99
    )
    made = tfb.save(bayes, tmp_path / "decided")
    job = replace(small_job(str(made), tmp_path), base=MODEL, format=kind)
    write(tmp_path / "rows.jsonl", [*ROWS, {"id": "bad"}])
    run(job)
    found = results(job)
    bad = found.pop()
    assert bad["error"] and bad["abstain"] is None and bad["prediction_set"] is None
    for row, source in zip(found, ROWS, strict=True):
        assert row["abstain"] == (max(row["probs"]) <= 0.7)
        likely = {c for c, p in zip(source["choices"], row["probs"], strict=True) if p > 0.01}
        assert row["prediction_set"][0] == row["choice"] and set(row["prediction_set"]) == likely
    other = replace(job, mode="tail", tail=2, output=str(tmp_path / "tail"))
    run(other)
    assert not {"abstain", "prediction_set"} & results(other)[0].keys()


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_adaptive_draws_are_counted(job: Job, kind: str) -> None:
    """Rows that stopped at the cap above the tolerance; of parts, so that a resumed run tells too.

    Cap and tolerance are part of what results depend on.
    """
    auto = replace(job, draws="auto", tolerance=1e-3, most=8, format=kind)
    done = run(auto)
    draws = [r["draws"] for r in results(auto)]
    capped = [r for r in results(auto) if r["draws"] == 8 and r["standard_error"] > 1e-3]
    assert set(draws) <= {4, 8} and 0 < len(capped) < 21
    assert done.counts == Counts(21, draws=sum(draws), capped=len(capped))
    assert run(auto, resume=True).counts == done.counts
    assert manifest(auto)["counts"]["capped"] == len(capped)
    with pytest.raises(OutputError, match=r"tolerance: 0\.001 -> 0\.01; most: 8 -> 64"):
        run(replace(auto, tolerance=None, most=None), resume=True)


# --- stopped and continued ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_shard(job: Job, whole: dict[str, bytes], number: int) -> None:
    """Then the run goes on where it was, and its parts are those of a run without a signal."""
    before = [signal.getsignal(s) for s in offline.SIGNALS]
    assert run(job, report=stopping(2, number)) == Outcome("stopped", counted(12), number)
    assert [signal.getsignal(s) for s in offline.SIGNALS] == before
    assert files(job) == dict(list(whole.items())[:2]) and manifest(job)["status"] == "stopped"
    assert run(job, resume=True) == DONE
    assert files(job) == whole
    assert manifest(job)["counts"] == COUNTS
    assert run(job, resume=True) == DONE and files(job) == whole  # nothing left to do


def test_a_second_signal_acts_as_usual() -> None:
    # A shell's background jobs ignore it, and so do the tests that they run.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), noted_signals() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)


def test_parts_finished_in_any_order(job: Job, whole: dict[str, bytes]) -> None:
    """Several workers leave gaps, which are filled."""
    run(job)
    for name in list(whole)[::2]:
        (Path(job.output) / name).unlink()
    seen: list[int] = []
    assert run(job, resume=True, report=lambda now, _: seen.append(now.rows)) == DONE
    assert files(job) == whole and seen == [15, 21]


def test_ids_do_not_matter_to_resume(job: Job) -> None:
    """Rows of one id, good or not: whichever parts are missing or damaged, the same comes out."""
    same = [{**ROWS[0], "id": "x"}, {"id": "x"}, {**ROWS[1], "id": "x"}, "{oops", *ROWS[:3]]
    write(Path(job.inputs[0]), same * 2)
    job = replace(job, part_rows=3)
    first = run(job, max_error_rate=1)
    assert first.counts.rows == 14 and run(job, resume=True, max_error_rate=1) == first
    before = files(job)
    ids = ["x", "x", "x", None, *(row["id"] for row in ROWS[:3])]
    assert [r["id"] for r in results(job)] == ids * 2
    for name, data in before.items():
        part = Path(job.output) / name
        part.write_bytes(data.replace(b"x", b"y", 1) if b"x" in data else data[1:])
        with pytest.raises(OutputError, match=rf"{name}: is damaged .*; remove this part, its ro"):
            run(job, resume=True)
        part.unlink()  # as it says
        assert run(job, resume=True, max_error_rate=1) == first and files(job) == before


def test_the_input_is_not_in_the_output(job: Job, tmp_path: Path) -> None:
    """On resume parts would be read as rows."""
    with pytest.raises(OutputError, match="already holds something; choose a new folder"):
        run(replace(job, output=str(tmp_path)))
    write(tmp_path / "m1.jsonl", ROWS[:6])
    every = replace(job, inputs=(f"{tmp_path}/**/[mp]*.jsonl",))
    assert run(every).counts.rows == 6
    with pytest.raises(OutputError, match=r"out: holds the input .*part-0.*; choose a new folder"):
        run(every, resume=True)


# --- what is verified -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_verify(job: Job, kind: str) -> None:
    """Every fault of a folder in a line; nothing but the folder is needed."""
    job = replace(job, format=kind, draws="auto", tolerance=1e-3, most=8)
    done, out = run(job), Path(job.output)
    Path(job.inputs[0]).unlink()
    found, faults = verify(out)
    assert faults == [] and sum(found.values(), Counts()) == done.counts and len(found) == 4
    shutil.copytree(out, copy := out.with_name("copy"))
    (copy / ".lock").unlink()
    (copy / ".part-00000-00000000.jsonl.partial").touch()  # of a kill, and no part
    assert verify(copy) == (found, [])
    parts = sorted(copy.glob("part-*"))
    parts[0].unlink()
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    shutil.copy(parts[2], copy / f"part-00009-00000000.{kind}")
    shutil.copy(parts[2], parts[2].with_suffix(".bak"))
    found, faults = verify(copy)
    assert list(found) == [parts[2].stem, parts[3].stem]
    for fault, said in zip(
        faults,
        (
            f"{parts[1]}: is damaged (its bytes are not those of SHA256SUMS); remove this part",
            f"{parts[2].with_suffix('.bak')}: is no part of this run; remove it",
            f"{copy}/part-00009-00000000.{kind}: is no part of this run; remove it",
            f"{copy}: 1 of 4 parts are missing ({parts[0].name}); score them with resume=True",
        ),
        strict=True,
    ):
        assert fault.startswith(said)


def test_what_verify_says_of_a_run(job: Job, whole: dict[str, bytes]) -> None:
    """One that is writing, was killed, or never was."""
    out = Path(job.output)

    def report(*_: Any) -> None:
        with pytest.raises(OutputError, match="another run is writing to it; wait for it"):
            verify(out)

    run(replace(job, part_rows=100), report=report)
    told, manifest_file = manifest(job), out / "manifest.json"
    folder = OutputFolder(out, pa.schema([]), "jsonl")
    del told["sha256"]
    folder.write_manifest({**told, "counts": {**told["counts"], "errors": 2}})
    said = f"{manifest_file}: counts are not those of the parts (errors: 2 -> 0), as after a kill; "
    assert verify(out)[1] == [f"{said}count them again with resume=True"]
    with locked(out, shared=True):  # two may look at once
        verify(out)
    for name in ("SHA256SUMS", "manifest.json", ".lock"):  # a pipe would be waited for
        (out / name).unlink()
        os.mkfifo(out / name)
        with pytest.raises(OutputError, match=f"{name}: is no file; remove it, or put back"):
            verify(out)
    for folder_name in (out.with_name("gone"), Path(job.inputs[0]), out.parent):
        with pytest.raises(OutputError, match="is not there; name a folder that tfb score wrote"):
            verify(folder_name)


# --- what is refused ------------------------------------------------------------------------------


def test_a_folder_is_not_continued_unasked(job: Job, tmp_path: Path) -> None:
    run(job)
    with pytest.raises(OutputError, match=r"already holds a run \(complete, 21 rows\).*resume=Tr"):
        run(job)
    held = replace(job, output=str(tmp_path))
    for resume in (False, True):
        with pytest.raises(OutputError, match="already holds something; choose a new folder"):
            run(held, resume=resume)
    assert not (tmp_path / ".lock").exists()


def test_a_changed_configuration_is_refused(
    job: Job, loaded: tuple[Any, Any], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message shows what it was and is, before any model is loaded where that can be told."""
    run(job)
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"batch_tokens": 64}, "batch_tokens: 4096 -> 64"),
        ({"draws": 4, "part_rows": 7}, r"draws: 2 -> 4; part_rows: 6 -> 7"),
        ({"columns": {"id": "tag"}}, "columns.id: None -> tag"),
        ({"keep": ("tag",)}, r"keep: \[\] -> \['tag'\]"),
        ({"format": "parquet"}, "format: jsonl -> parquet"),
        ({"limit": 9}, "limit: None -> 9"),
    )
    with monkeypatch.context() as patch:
        patch.setitem(offline.ENGINES, "local", None)
        for change, message in changes:
            with pytest.raises(OutputError, match=f"another configuration .{message}"):
                run(replace(job, **change), resume=True)
        patch.setattr(torch, "__version__", "9.9")
        with pytest.raises(OutputError, match=r"versions\.torch: .* -> 9\.9"):
            run(job, resume=True)
    loaded[0].configure(sigma=0.5)
    with pytest.raises(OutputError, match=r"sigma: 0\.008 -> 0\.5"):
        run(job, resume=True)
    loaded[0].configure(sigma=0.008)
    assert files(job) == whole


def test_differences() -> None:
    was = {"a": 1, "b": {"x": 1, "y": 2}, "c": 3, "e": {"z": 1}}
    assert differences(was, {"a": 1, "b": {"x": 1, "y": 2}}) == []
    assert differences(was, {"a": 2, "b": {"x": 5}, "d": 4}) == [
        "a: 1 -> 2",
        "b.x: 1 -> 5",
        "b.y: 2 -> None",
        "d: None -> 4",
    ]


def test_a_changed_input_is_refused_and_a_longer_one_is_not(job: Job, tmp_path: Path) -> None:
    """The message names every file; new files get the next numbers, wherever they are named."""
    first, second = tmp_path / "m1.jsonl", tmp_path / "m2.jsonl"
    write(first, [{**row, "id": None} for row in ROWS[:7]])
    write(second, [{**row, "id": None} for row in ROWS[7:13]])
    one = replace(job, inputs=(str(tmp_path / "m*.jsonl"),))
    assert run(one).counts.rows == 13
    before, text = files(one), second.read_bytes()
    second.write_bytes(text.replace(b"=", b"!", 1))
    first.rename(tmp_path / "elsewhere")
    with pytest.raises(RowError) as refused:
        run(one, resume=True)
    said = f"{first} is missing, {second} has changed (sha256: "
    assert said in str(refused.value) and "size" not in str(refused.value)
    assert files(one) == before
    (tmp_path / "elsewhere").rename(first)
    second.write_bytes(text)
    write(tmp_path / "m0.jsonl", [{**row, "id": None} for row in ROWS[13:]])
    assert run(one, resume=True).counts.rows == 21
    assert files(one).items() > before.items()
    assert [r["id"] for r in results(one)] == [str(n) for n in range(21)]
    told = [(file["name"], file["records"]) for file in manifest(one)["files"]]
    assert told == [(str(first), 7), (str(second), 6), (str(tmp_path / "m0.jsonl"), 8)]


def test_a_kept_column_keeps_its_type(job: Job, tmp_path: Path) -> None:
    """A new file may not make text of what is a number in the parts that are there."""
    pq.write_table(pa.Table.from_pylist(ROWS[:9]), tmp_path / "a.parquet")
    kept = replace(job, inputs=(str(tmp_path / "a.parquet"),), keep=("tag",), format="parquet")
    assert run(kept).counts.rows == 9
    more = replace(kept, inputs=(*kept.inputs, *job.inputs))
    with pytest.raises(OutputError, match=r"configuration \(schema\.tag: int64 -> string\)"):
        run(more, resume=True)


def test_a_kept_column_of_a_type_that_parquet_lacks_is_text(job: Job, tmp_path: Path) -> None:
    tags = pa.RunEndEncodedArray.from_arrays([9], pa.array([3]))
    table = pa.Table.from_pylist(ROWS[:9]).drop_columns("tag").append_column("tag", tags)
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as out:
        out.write_table(table)
    kept = replace(job, inputs=(str(tmp_path / "a.arrow"),), keep=("tag",), format="parquet")
    assert run(kept) == Outcome("complete", counted(9))
    assert [r["tag"] for r in results(kept)] == ["3"] * 9


def test_limit_is_the_first_records_of_all(job: Job, tmp_path: Path) -> None:
    for n in range(3):
        write(tmp_path / f"m{n}.jsonl", ROWS[7 * n : 7 * n + 7])
    few = replace(job, inputs=(str(tmp_path / "m*.jsonl"),), limit=9)
    assert run(few).counts.rows == 9 and [r["id"] for r in results(few)] == [
        r["id"] for r in ROWS[:9]
    ]
    assert len(manifest(few)["files"]) == 2
    assert run(few, resume=True).counts.rows == 9


def test_input_is_checked_first(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is loaded: declared columns, files that break off, no rows at all."""
    monkeypatch.setitem(offline.ENGINES, "local", None)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    other = replace(job, inputs=(str(tmp_path / "a.parquet"),), columns={"prompt": "question"})
    with pytest.raises(RowError, match=r"no column 'question'; there are 'id'.* by columns"):
        run(other)
    with pytest.raises(RowError, match=r"no column 'source' to keep"):
        run(replace(other, columns={}, keep=("source",)))
    with pytest.raises(ValueError, match="keep=error: the output has a column of that name"):
        run(replace(job, keep=("error",)))
    assert not Path(job.output).exists()
    packed = gzip.compress(Path(job.inputs[0]).read_bytes())
    (tmp_path / "rows.jsonl.gz").write_bytes(packed[:-40])
    with pytest.raises(RowError, match=r"rows\.jsonl\.gz: cannot be read"):
        run(replace(job, inputs=(*job.inputs, str(tmp_path / "rows.jsonl.gz"))))
    write(Path(job.inputs[0]), ["", " "])
    with pytest.raises(RowError, match=r"rows\.jsonl: the input holds no rows; add some"):
        run(job)
    assert not files(job)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "csv"}, "format=csv: expected one of parquet, jsonl"),
        ({"draws": 3}, "draws=3: "),
        ({"draws": "many"}, "draws=many: expected an even number or auto"),
        ({"draws": "auto", "per_draw": True}, "draws=auto: rows have different"),
        ({"most": 8}, "draws=2: tolerance and most are those of draws=auto"),
        ({"draws": "auto", "most": 7}, "most=7: "),
        ({"draws": "auto", "tolerance": 0}, "tolerance=0: expected a positive number"),
        ({"part_rows": 0}, "part_rows=0: expected at least 1"),
        ({"limit": 0}, "limit=0: expected at least 1"),
        ({"tail": 2}, "tail=2 belongs to mode='tail'"),
        ({"truncate": "middle"}, "truncate='middle'"),
        ({"workers": 2}, "workers and ray_address are those of engine=ray"),
    ],
)
def test_settings_that_cannot_work(job: Job, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(replace(job, **change))
    for how in ({"engine": "spark"}, {"max_error_rate": 2}):
        with pytest.raises(ValueError, match=r"(engine=spark|max_error_rate=2): expected"):
            run(job, **how)  # type: ignore[arg-type]
    assert not Path(job.output).exists()


# --- errors are rows ------------------------------------------------------------------------------

BAD: list[Any] = [
    "{oops",
    {"id": "no prompt"},
    {**ROWS[0], "id": "empty", "prompt": " "},
    {**ROWS[0], "id": "long", "prompt": "a " * 200 + "\n="},
    {**ROWS[0], "id": ["x"]},
]
FAULTS = ("not valid JSON", "no column 'prompt'", "'prompt' is empty", "tokens, but the", "'id' is")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_errors_are_rows(job: Job, kind: str) -> None:
    job = replace(job, format=kind)
    write(Path(job.inputs[0]), [*ROWS[:8], *BAD, *ROWS[8:]])
    assert run(job, max_error_rate=1) == Outcome("complete", counted(26, 5))
    found = results(job)
    assert [r["error"] is not None for r in found] == [False] * 8 + [True] * 5 + [False] * 13
    assert [r["id"] for r in found[8:13]] == [None, "no prompt", "empty", "long", None]
    for row, fault in zip(found[8:13], FAULTS, strict=True):
        assert fault in row["error"] and "rows.jsonl:" in row["error"] and row["probs"] is None


class Crowded:
    """A model on a GPU that others use: long rows find no memory."""

    def __init__(self, bayes: tfb.BayesianModel) -> None:
        self._bayes = bayes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bayes, name)

    def predict(self, inputs: Any, *others: Any, **how: Any) -> Any:
        if inputs["input_ids"].numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._bayes.predict(inputs, *others, **how)


def test_parts_with_errors_are_done_again(
    job: Job, whole: dict[str, bytes], loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On request; parts without errors are not touched."""
    with monkeypatch.context() as patch:
        patch.setattr(Job, "load", lambda _: (Crowded(loaded[0]), loaded[1]))
        first = run(job, max_error_rate=1)
        assert first == Outcome("complete", counted(21, 6))
    name, good = next(iter(whole.items()))
    (Path(job.output) / name).unlink()
    assert run(job, resume=True, max_error_rate=1).counts.errors == 4
    assert files(job)[name] == good
    seen: list[int] = []
    assert run(job, retry_errors=True, report=lambda now, _: seen.append(now.rows)) == DONE
    assert files(job) == whole and seen == [12, 18, 21]
    assert verify(Path(job.output))[1] == []
    assert len(Path(job.output, "SHA256SUMS").read_text().splitlines()) == len(whole)
    assert (
        run(job, retry_errors=True, report=lambda now, _: seen.append(now.rows)) == DONE
        and len(seen) == 3
    )


def test_too_many_errors_stop_the_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "LEAST_ROWS", 8)
    write(Path(job.inputs[0]), [*ROWS[:5], *["{"] * 8, *ROWS[5:]])
    stopped = run(job, max_error_rate=0.2)
    assert stopped == Outcome("too many errors", counted(12, 7), None, True)
    assert len(results(job)) == 12 and manifest(job)["status"] == "too many errors"
    end = run(job, resume=True, max_error_rate=0.7)
    assert end == Outcome("complete", counted(29, 8)) and len(results(job)) == 29
    # A short input is scored to its end, and its share of errors is told all the same.
    monkeypatch.setattr(offline, "LEAST_ROWS", 1000)
    small = replace(job, output=f"{job.output}-small")
    assert run(small, max_error_rate=0.2) == Outcome("complete", counted(29, 8), None, True)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def command(job: Job, tfb_command: Run) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Exit status, stdout and stderr of ``tfb score`` on the job's input."""
    words = (
        job.artifact,
        job.inputs[0],
        "--output",
        job.output,
        "--draws",
        "2",
        "--part-rows",
        "6",
        "--format",
        "jsonl",
    )
    yield lambda *options: tfb_command("score", *words, *options)


def test_exit_status(
    command: Callable[..., tuple[int, str, str]],
    job: Job,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """143 after SIGTERM, 1 for a refusal, 0 at the end, 3 for too many errors."""
    with monkeypatch.context() as patch:
        report = stopping(1, signal.SIGTERM)
        patch.setattr(Meter, "update", lambda *now: report(Counts(), 0))
        code, out, _ = command()
    assert code == 143 and f"stopped: 6 rows, 0 of them errors: {job.output}" in out
    code, out, err = command()
    assert code == 1 and err.startswith("error: ") and "with --resume, or" in err and out == ""
    code, out, _ = command("--resume")
    assert code == 0 and "complete: 21 rows" in out and files(job) == whole
    with monkeypatch.context() as patch:
        patch.setattr(Job, "load", LOAD)
        code, _, err = command("--resume", "--mode", "tail", "--tail", 1)
    assert code == 1 and "note: sigma was searched with mode=full" in err
    assert "mode: full -> tail; tail: None -> 1" in err
    write(Path(job.inputs[0]), [*ROWS, *BAD])
    code, _, err = command("--resume")
    assert code == 1 and "rows.jsonl has changed (size: " in err
    code, out, err = command("--output", f"{job.output}-bad")
    assert code == 3 and "complete: 26 rows, 5 of them errors" in out
    assert "5 of 26 rows are errors, more than --max-error-rate 0.05" in err


def test_engines_agree_on_a_tokenizer_that_encoding_changes(
    artifact: str, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer.json may hold a truncation, which the first encoding resets."""

    def load(_: Job) -> tuple[Any, Any]:
        tokenizer = load_tokenizer(MODEL)
        tokenizer.backend_tokenizer.enable_truncation(64)
        return loaded[0], tokenizer

    monkeypatch.setattr(Job, "load", load)
    job = small_job(artifact, tmp_path)
    worker = Worker(job, torch.get_num_threads())
    assert offline.LocalEngine(job).configuration == worker.configuration()
