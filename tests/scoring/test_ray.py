"""Ray's workers make the parts that the local engine makes, whatever dies on the way."""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import tfb
from benchmarks.environment import REPOSITORY
from tfb.data.readers import find_sources
from tfb.data.rows import RowError, RowFormat
from tfb.demo import digits
from tfb.scoring import ray as ray_engine
from tfb.scoring.hashset import HashSet
from tfb.scoring.job import Job
from tfb.scoring.output import FreeNumbers, OutputError
from tfb.scoring.pipeline import LocalEngine
from tfb.scoring.ray import EngineError, RayEngine
from tfb.scoring.run import run
from tfb.scoring.scorer import Scored
from tfb.scoring.windows import Item, Reading, Window, Windows

MODEL, ADAPTER = str(digits.BASE), str(digits.ADAPTER)
DIGITS = [{**row, "label": None} for row in digits.rows("test")[:16]]
ROWS = [*DIGITS[:9], "{broken", DIGITS[0], {"id": "x"}, *DIGITS[9:]]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra tfb[ray] is not installed"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray of two CPUs; its address."""
    ray = ray_engine.import_ray()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:  # Ray's processes take the environment of here
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]))
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
            object_store_memory=200 << 20,
        )  # fmt: skip
    signal.signal(signal.SIGTERM, handler)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    bayes = tfb.bayesianize(tfb.load_adapter(tfb.load_base(MODEL, ADAPTER), ADAPTER), seed=3)
    bayes.configure(sigma=0.008)
    bayes.source = Path(ADAPTER)
    return str(tfb.save(bayes, tmp_path_factory.mktemp("made") / "artifact"))


@pytest.fixture
def job(artifact: str, tmp_path: Path) -> Job:
    """19 rows in five parts, three of them errors."""
    write(tmp_path / "rows.jsonl", ROWS)
    return Job(
        MODEL, artifact, ("rows.jsonl",), str(tmp_path / "out"), draws=2, part_rows=4,
        file_format="jsonl",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(artifact: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The parts that the local engine makes of ``job``."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder / "rows.jsonl", ROWS)
    job = Job(MODEL, artifact, ("rows.jsonl",), str(folder / "out"), draws=2, part_rows=4,
              file_format="jsonl")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(job, max_error_rate=1).errors == 3
    return files(job)


def write(path: Path, rows: list[Any]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))


def files(job: Job) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(job.output).glob("part-*"))}


def manifest(job: Job) -> dict[str, Any]:
    return dict(json.loads((Path(job.output) / "manifest.json").read_text()))


class Mortal(ray_engine._Worker):
    """Dies by SIGKILL once, with window 2 in flight."""

    def __init__(self, job: Job, *others: Any) -> None:
        super().__init__(job, *others)
        self.folder = Path(job.output).parent

    def _score(self, window: Window) -> Scored:
        died = self.folder / "died"
        if window.number == 2 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._score(window)


@needs_ray
def test_two_workers_of_the_command(
    job: Job, whole: dict[str, bytes], cluster: str, tmp_path: Path, artifact: str
) -> None:
    """The command joins a cluster, with relative names in a folder that is not the cluster's."""
    done = subprocess.run(
        [sys.executable, "-m", "tfb", "score", "--model", MODEL, "--input", "rows.jsonl",
         "--artifact", os.path.relpath(artifact, tmp_path), "--output", "out", "--draws", "2",
         "--part-rows", "4", "--format", "jsonl", "--max-error-rate", "1", "--engine", "ray",
         "--workers", "2", "--ray-address", cluster],
        capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "complete: 19 rows, 3 of them errors: out\n"
    assert files(job) == whole
    assert manifest(job)["counts"] == {
        "rows": 19, "errors": 3, "truncated": 0, "parts": 5
    }  # fmt: skip


@pytest.fixture
def known(artifact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the worker that only says what its configuration is; the command's test has it."""
    configuration = LocalEngine(Job(MODEL, artifact, (), "")).configuration()

    def told(engine: RayEngine) -> dict[str, Any]:
        engine._expected = {**configuration, **engine._job.declared()}
        return engine._expected

    monkeypatch.setattr(RayEngine, "configuration", told)
    monkeypatch.chdir(tmp_path)


@needs_ray
def test_stopped_and_continued_by_the_local_engine(
    job: Job, whole: dict[str, bytes], cluster: str, known: None
) -> None:
    ours = replace(job, workers=1)
    stop = iter([signal.SIGTERM])
    stopped = run(
        ours, engine="ray", max_error_rate=1, report=lambda _: os.kill(os.getpid(), next(stop))
    )
    assert stopped.status == "stopped" and stopped.signal == signal.SIGTERM
    assert len(files(job)) == 1 and files(job).items() < whole.items()
    with pytest.raises(OutputError, match=r"another configuration \(draws: 2 -> 4\)"):
        run(replace(ours, draws=4), engine="ray", resume=True)
    assert run(job, resume=True, max_error_rate=1).status == "complete"
    assert files(job) == whole and manifest(job)["sessions"] == 2


@needs_ray
def test_a_killed_worker_loses_nothing(
    job: Job, whole: dict[str, bytes], cluster: str, known: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its window is done by the worker that takes its place; the run was begun by this process."""
    stop = iter([signal.SIGTERM])
    run(job, max_error_rate=1, report=lambda _: os.kill(os.getpid(), next(stop)))
    assert files(job).items() < whole.items()
    monkeypatch.setattr(ray_engine, "_Worker", Mortal)
    ours = replace(job, workers=1)
    assert run(ours, engine="ray", resume=True, max_error_rate=1).status == "complete"
    assert (Path(job.output).parent / "died").exists() and files(job) == whole


@needs_ray
def test_what_workers_refuse(
    job: Job, cluster: str, known: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another configuration, and a window that ended each worker it was given to."""
    ray = ray_engine.import_ray()
    engine = RayEngine(replace(job, workers=1))
    expected = engine.configuration()
    attempts = ray.remote(ray_engine._Attempts).options(num_cpus=0).remote(1 + 1)
    item = Item(1, None, None, "no row")
    window = Window(7, [item], 1.0)
    worker = ray_engine._Worker(engine._job, 1, expected, attempts)
    assert [worker._result(window) for _ in range(2)] == [
        Scored(7, [{"id": None, "error": "no row", "key": "0000000000000001"}], 1, 0, 0, 1.0)
    ] * 2
    assert "have ended each worker that took them" in str(worker._result(window))
    moved = ray_engine._Worker(engine._job, 1, {**expected, "model_sha256": "f00"}, attempts)
    refusal = moved._result(window)
    assert "has another configuration (model_sha256: f00 -> " in str(refusal)

    scored = Scored(7, [], 0, 0, 0, 1.0)
    results = [RowError("broken off"), scored]
    batches = [ray_engine._column("result", value) for value in results]
    monkeypatch.setattr(RayEngine, "_dataset", lambda *_: Batches(batches))
    stream = engine.scored([])
    assert next(stream) == scored  # the windows before the fault come first
    with pytest.raises(RowError, match="broken off"):
        next(stream)
    batches[:] = [ray_engine._column("result", refusal)]
    with pytest.raises(EngineError, match="another configuration"):
        next(engine.scored([]))
    failure = ray.exceptions.RaySystemError("gone\nand much more")
    monkeypatch.setattr(RayEngine, "_dataset", lambda *_: Batches(batches, failure))
    with pytest.raises(EngineError, match=r"failed for good .*gone\); .*continue with --resume"):
        next(engine.scored([]))


@dataclass
class Batches:
    """In place of a dataset."""

    tables: list[Any]
    failure: Exception | None = None

    def iter_batches(self, **_: Any) -> Iterator[Any]:
        if self.failure is not None:
            raise self.failure
        yield from self.tables


@needs_ray
def test_a_file_that_breaks_off_is_the_last_block(tmp_path: Path) -> None:
    """After the windows that could be read; reading again gives the same blocks."""
    ray_engine.import_ray()
    write(tmp_path / "rows.jsonl", [{**row, "id": str(i)} for i, row in enumerate(DIGITS * 40)])
    packed = gzip.compress((tmp_path / "rows.jsonl").read_bytes())
    (tmp_path / "rows.jsonl.gz").write_bytes(packed[:-40])
    sources = find_sources([tmp_path / "rows.jsonl.gz"])
    windows = Windows(
        Reading(sources, RowFormat(task="CAUSAL_LM")), 64, HashSet(), FreeNumbers(frozenset({1}))
    )
    (task,) = ray_engine._source(windows).get_read_tasks(1)
    blocks = [table["window"][0].as_py() for table in task()]
    assert blocks == [table["window"][0].as_py() for table in task()]
    *found, error = map(pickle.loads, blocks)
    assert isinstance(error, RowError) and "rows.jsonl.gz: cannot be read" in str(error)
    assert [w.number for w in found] == [0, *range(2, len(found) + 1)] and len(found) >= 4
    assert {len(w.items) for w in found} == {64}


def test_what_json_can_nest_can_travel() -> None:
    kept = json.loads("[" * 900 + "]" * 900)
    window = Window(0, [Item(1, "a", None, "no row", {"note": kept})], 1.0)
    limit = sys.getrecursionlimit()
    (data,) = ray_engine._column("window", window)["window"].to_pylist()
    found = pickle.loads(data)
    assert json.dumps(found.items[0].kept["note"]) == json.dumps(kept)
    assert found.items[0].key == 1 and sys.getrecursionlimit() == limit


@needs_ray
def test_more_workers_than_fit(
    job: Job, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--workers 3: each takes 1 CPUs.*so 2 fit"):
        run(replace(job, workers=3), engine="ray")
    assert not Path(job.output).exists()


def test_what_is_refused(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read or written."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "tfb\[ray\]"'):
        run(job, engine="ray")
    for change in ({"workers": 2}, {"ray_address": "10.0.0.1:6379"}):
        with pytest.raises(ValueError, match="--workers and --ray-address: only with --engine ray"):
            run(replace(job, **change))
    with pytest.raises(ValueError, match="--workers 0: expected at least 1"):
        run(replace(job, workers=0), engine="ray")
    assert not Path(job.output).exists()
