"""Rows in are rows out, whatever they hold."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults.cases import promised
from faults.strategies import BAD, CORPUS, GOOD, SIMPLE, File, nested, row_files
from hypothesis import HealthCheck, Phase, example, given, settings
from support.children import Children
from support.scoring import results, small_job, write

import tfb
from tfb.adapters.loading import load_tokenizer
from tfb.demo import digits
from tfb.scoring.job import Job
from tfb.scoring.run import run

FUZZED = int(os.environ.get("TFB_FUZZ", "10000"))  # rows
EACH = 56  # of a file, of which there are six in each example
ROUNDING = 1e-4  # of a probability, between batches


def reference(loaded: tuple[Any, Any], files: Sequence[File]) -> dict[str, dict[str, Any]]:
    """What the good rows are when they are scored from memory."""
    rows = {json.dumps(row): row for file in files for what, _, row in file.truth if what == GOOD}
    found = tfb.score(list(rows.values()), *loaded, draws=2, errors="rows") if rows else []
    return dict(zip(rows, found, strict=True))


def score_files(job: Job, folder: Path, files: Sequence[File]) -> list[dict[str, Any]]:
    """Score the files as one job, resume it when it is done, and return its rows."""
    names = []
    for n, file in enumerate(files):
        names.append(str(folder / f"rows-{n}{file.suffix}"))
        Path(names[-1]).write_bytes(file.data)
    ours = replace(job, inputs=tuple(names), output=str(folder / "out"), part_rows=100)
    done = run(ours, max_error_rate=1)
    found = results(ours)
    assert done.counts.rows == len(found)
    assert done.counts.errors == sum(row["error"] is not None for row in found)
    assert run(ours, resume=True, max_error_rate=1) == done
    return found


def check(found: Sequence[dict[str, Any]], files: Sequence[File], expected: Any) -> None:
    """Compare results with the truth, row by row."""
    truth = [(n, *rest) for n, file in enumerate(files) for rest in file.truth]
    assert len(found) == len(truth)
    for result, (n, what, line, row) in zip(found, truth, strict=True):
        where = rf"rows-{n}{files[n].suffix}:{line}\b"
        assert result["error"] is None or re.search(where, result["error"]), (where, result)
        assert (result["error"] is None) == (result["probs"] is not None)
        assert what != BAD or result["error"] is not None, (where, result)
        if what == GOOD:
            wanted = expected[json.dumps(row)]
            assert result["id"] == row["id"]
            assert (result["error"] is None) == (wanted["error"] is None), (where, result, wanted)
            if wanted["error"] is None:
                assert result["probs"] == pytest.approx(wanted["probs"], abs=ROUNDING), where


@promised(
    "rows are good, bad or odd",
    "rows in = rows out, in order; a good row has the result that it has in memory, to rounding; a "
    "bad one is an error that names its line; a finished run is gone on with",
    ["10,000 fuzzed rows (or TFB_FUZZ) as JSONL, JSON, CSV, Parquet and Arrow, plain and packed"],
)
def test_rows_in_are_rows_out(
    job: Job, loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    counted = 0

    @settings(
        max_examples=-(-FUZZED // (6 * EACH)),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(row_files(EACH))
    def fuzz(files: list[File]) -> None:
        nonlocal counted
        counted += sum(len(file.truth) for file in files)
        found = score_files(job, tmp_path_factory.mktemp("fuzz"), files)
        check(found, files, reference(loaded, files))

    for known in CORPUS:
        fuzz = example(known)(fuzz)
    fuzz()
    assert counted >= FUZZED


# --- rows that ended a run, or took all memory ----------------------------------------------------

MOMENT = datetime.datetime(2026, 1, 2)


def kept_json(depth: int) -> Callable[[Path], Path]:
    """Fields of good rows, nested so deep."""

    def make(folder: Path) -> Path:
        lines = [json.dumps(row)[:-1] + f', "tag": {nested(depth)}}}' for row in SIMPLE[:3]]
        return write(folder / "rows.jsonl", lines)

    return make


def kept_moments(kind: pa.DataType, values: list[int]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        rows = pa.Table.from_pylist(SIMPLE[: len(values)])
        tags = pa.array(values, pa.int64()).cast(kind)
        pq.write_table(rows.append_column("tag", tags), folder / "rows.parquet")
        return folder / "rows.parquet"

    return make


KEPT = {
    **{f"JSON nested {depth} deep": kept_json(depth) for depth in (490, 700, 960, 5000)},
    "timestamps in nanoseconds": kept_moments(pa.timestamp("ns"), [1, 999, 10**18 + 1]),
    "timestamps beyond the year 9999": kept_moments(pa.timestamp("s"), [10**12, -(10**12), 0]),
    "times in nanoseconds": kept_moments(pa.time64("ns"), [1, 999, 10**12 + 1]),
    "durations beyond Python's": kept_moments(pa.duration("s"), [2**62, -(2**62), 0]),
}


@promised(
    "a column that is kept holds what cannot be written",
    "each row is a result or an error of its own, in JSONL and in Parquet; the run goes on",
    KEPT,
)
def test_kept_columns(job: Job, tmp_path: Path, fault: Callable[[Path], Path]) -> None:
    source = fault(tmp_path)
    for kind in ("jsonl", "parquet"):
        output = str(tmp_path / kind)
        ours = replace(job, inputs=(str(source),), keep=("tag",), format=kind, output=output)
        assert run(ours, max_error_rate=1).counts.rows == 3
        found = results(ours)
        assert all(row["error"] is None or f"{source.name}:" in row["error"] for row in found)
        assert run(ours, resume=True, max_error_rate=1).counts.rows == 3


def score_large(artifact: str, folder: str, case: str) -> list[Any]:
    """In a child with little memory: the errors of a file's rows."""
    loaded = tfb.load(str(digits.BASE), artifact), load_tokenizer(str(digits.BASE))
    Job.load = lambda _: loaded  # type: ignore[method-assign]
    source = Path(folder) / ("large.csv" if "CSV" in case else "large.jsonl")
    source.write_text(LARGE[case]())
    job = replace(small_job(artifact, Path(folder)), inputs=(str(source),))
    run(job, max_error_rate=1)
    return [row["error"] for row in results(job)]


def choices(count: int) -> Callable[[], str]:
    names = [f"{n} {n % 10}" for n in range(count)]
    return lambda: lines({**SIMPLE[1], "choices": names})


def lines(*rows: Any) -> str:
    """A good row, others, and a good row."""
    made = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return "\n".join([json.dumps(SIMPLE[0]), *made, json.dumps(SIMPLE[2])])


LARGE: dict[str, Callable[[], str]] = {
    "a prompt of 30 MiB": lambda: lines({**SIMPLE[1], "prompt": "a b " * (30 << 18)}),
    "a line of 200 MiB": lambda: lines("x" * (200 << 20)),
    "a CSV value of 64 MiB": lambda: (
        'id,prompt,choices\nx,a =,0|1\ny,"' + "a b " * (16 << 20) + '",0|1\nz,a =,0|1\n'
    ),
    "a CSV quote that stays open for 64 MiB": lambda: (
        'id,prompt,choices\nx,a =,0|1\ny,"' + "a b " * (16 << 20) + ",0|1\nz,a =,0|1\n"
    ),
    "1,000 choices": choices(1000),
    "3,000 choices": choices(3000),
    "30,000 choices": choices(30_000),
    "200,000 equal choices": lambda: lines({**SIMPLE[1], "choices": ["0"] * 200_000}),
    "200,000 keys": lambda: lines({**SIMPLE[1], **{str(n): n for n in range(200_000)}}),
    "one key 500,000 times": lambda: lines("{" + '"a": 1, ' * 500_000 + '"b": 1}'),
    "JSON nested a million deep": lambda: lines(nested(10**6)),
    "a number of a million digits": lambda: lines('{"id": ' + "9" * 10**6 + "}"),
    "a choice of 10 MiB": lambda: lines({**SIMPLE[1], "choices": ["a " * (5 << 20), "b"]}),
}


@promised(
    "a row is far too large",
    "it is a result or an error of its own, in less than 4 GiB and two minutes; the rows beside it "
    "are scored",
    {name: name for name in LARGE},
)
def test_large_rows(artifact: str, tmp_path: Path, in_child: Children, fault: str) -> None:
    answer = in_child("faults.test_rows:score_large", artifact, str(tmp_path), fault)
    assert answer.value is not None, answer
    first, *middle, last = answer.value
    assert first is None and last is None and len(middle) == 1, answer
