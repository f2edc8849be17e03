"""Offline scoring: files of rows to a folder of parts, so that nothing is lost.

The input is cut into shards, ranges of records of a file; an engine scores them, in any order, and
each becomes one part file, atomically. A run that was stopped, killed or out of disk is resumed
with the shards whose parts are missing. A changed configuration or input file is refused; further
files are welcome.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import groupby, islice
from pathlib import Path
from types import FrameType
from typing import Any

from tfb.adapters.artifact import file_sha256
from tfb.data.readers import Source, count_records, find_sources, read
from tfb.data.rows import RowError
from tfb.scoring.job import Engine, Job, Shard, Work, differences
from tfb.scoring.output import FORMAT_VERSION, Counts, OutputError, OutputFolder
from tfb.scoring.ray import RayEngine, import_ray
from tfb.scoring.scorer import Prepared, Result, read_item, result_rows

LEAST_ROWS = 1000  # before which no share of errors stops a run
RUNNING, COMPLETE, STOPPED, TOO_MANY_ERRORS = "running", "complete", "stopped", "too many errors"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        rows: of all parts.
        errors: of all parts.
        total: rows of all shards.
        rows_per_second: since this process began to score.
        seconds_left: at that speed.
    """

    rows: int
    errors: int
    total: int
    rows_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: "complete", "stopped" (by a signal) or "too many errors" (before the end).
        rows: of all parts, those of earlier runs included.
        errors: of all parts.
        truncated: rows that were cut.
        signal: what stopped it, if anything.
        too_many_errors: their share is above what was allowed.
    """

    status: str
    rows: int
    errors: int
    truncated: int
    signal: int | None
    too_many_errors: bool


def run(
    job: Job,
    *,
    resume: bool = False,
    retry_errors: bool = False,
    max_error_rate: float = 0.05,
    engine: str = "local",
    report: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Score a job's input into its folder.

    SIGINT or SIGTERM lets the shard in flight become a part, then ends the run.

    Args:
        job: what is to be done.
        resume: go on in a folder that a run has begun; an absent or empty one is begun.
        retry_errors: resume, and do the shards again whose parts hold errors.
        max_error_rate: the run stops once more than this share of all rows, of ``LEAST_ROWS`` at
            least, are errors.
        engine: "local" or "ray".
        report: is told of every finished shard.

    Raises:
        ValueError: settings that cannot work.
        RowError: input that cannot be read, or does not belong to the finished parts.
        ArtifactError: an artifact that cannot be used.
        OutputError: a folder that cannot be written or not be continued.
        EngineError: Ray's workers failed.
        ImportError: no Ray.
    """
    job.check()
    _check(job, engine, max_error_rate)
    sources = find_sources(job.inputs)
    job.check_columns(sources)
    folder = OutputFolder(Path(job.output), job.part_schema(sources), job.format)
    folder.earlier(resume=resume or retry_errors)
    with folder:
        earlier = folder.earlier(resume=resume or retry_errors)  # another run may have ended now
        if earlier is not None:
            _compare(folder, earlier, job.declared())
        files = input_files(sources, job.limit, () if earlier is None else earlier["files"])
        shards = plan([file for _, file in files], job)
        finished = folder.finished({shard.name: len(shard) for shard in shards})
        if retry_errors:
            finished = {name: found for name, found in finished.items() if not found.errors}
        scoring = ENGINES[engine](job)
        configuration = scoring.configuration()
        if earlier is not None:
            _compare(folder, earlier, configuration)
        ledger = _Ledger(
            _fixed(configuration, [file for _, file in files], earlier),
            sum(map(len, shards)),
            max_error_rate,
            sum(finished.values(), Counts()),
            len(finished),
        )
        folder.write_manifest(ledger.manifest(RUNNING))
        missing = [shard for shard in shards if shard.name not in finished]
        work = read_shards([source for source, _ in files], missing, job)
        stopped_by = _write_parts(scoring.results(work), folder, ledger, report)
        status = ledger.status(stopped_by)
        folder.write_manifest(ledger.manifest(status))
    return Outcome(
        status, **asdict(ledger.done), signal=stopped_by, too_many_errors=ledger.too_many
    )


def _check(job: Job, engine: str, max_error_rate: float) -> None:
    if engine not in ENGINES:
        raise ValueError(f"engine={engine}: expected one of {', '.join(ENGINES)}")
    if engine == "ray":
        import_ray()
    elif (job.workers, job.ray_address) != (None, None):
        raise ValueError("workers and ray_address belong to engine=ray")
    if not 0 <= max_error_rate <= 1:
        raise ValueError(f"max_error_rate={max_error_rate}: expected a share from 0 to 1")


def _compare(folder: OutputFolder, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if found := differences(earlier["configuration"], now):
        raise OutputError(
            f"{folder.path}: was begun with another configuration ({'; '.join(found)}); go back to "
            "that one, or choose a new folder"
        )


def _write_parts(
    scored: Iterator[tuple[Work, list[Result]]],
    folder: OutputFolder,
    ledger: _Ledger,
    report: Callable[[Progress], None] | None,
) -> int | None:
    """Write a part for each scored shard; return the signal that ended it, if any."""
    with Stop() as stop, closing(scored):  # type: ignore[type-var]
        for work, results in scored:
            rows = result_rows(work.items, results)
            folder.write_part(work.shard.name, rows)
            ledger.add(Counts.of(rows))
            folder.write_manifest(ledger.manifest(RUNNING))
            if report is not None:
                report(ledger.progress())
            if stop.signal is not None or ledger.stops:
                break
    return stop.signal


# --- the input ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputFile:
    """What the manifest tells of an input file.

    Attributes:
        name: as it was given.
        size: in bytes.
        sha256: of its bytes.
        records: their number.
    """

    name: str
    size: int
    sha256: str
    records: int


def input_files(
    sources: Sequence[Source], limit: int | None, earlier: Sequence[Mapping[str, Any]] = ()
) -> list[tuple[Source, InputFile]]:
    """Return the files of a run: those of ``earlier`` under their numbers, then the new ones.

    Args:
        sources: the input files.
        limit: records of the run; files behind them are left out.
        earlier: what the manifest of a resumed run tells of its files.

    Raises:
        RowError: a file of the earlier run is missing or has changed, or there are no records.
    """
    left = {str(source): source for source in sources}
    found: list[tuple[Source, InputFile]] = []
    faults = []
    for entry in earlier:
        was = InputFile(**entry)
        source = left.pop(was.name, None)
        if source is None:
            faults.append(f"{was.name} is missing")
        elif changes := differences(entry, _identity(source)):
            faults.append(f"{was.name} has changed ({'; '.join(changes)})")
        else:
            found.append((source, was))
    if faults:
        raise RowError(
            f"the input is not that of the finished parts: {', '.join(faults)}; give the same "
            "files under the same names, or choose a new folder"
        )
    for source in left.values():
        if limit is not None and sum(file.records for _, file in found) >= limit:
            break
        found.append((source, InputFile(**_identity(source), records=count_records(source))))
    if not any(file.records for _, file in found):
        raise RowError(f"{', '.join(map(str, sources))}: the input holds no rows; add some")
    return found


def _identity(source: Source) -> dict[str, Any]:
    try:
        size, digest = source.path.stat().st_size, file_sha256(source.path)
    except OSError as error:
        raise RowError(f"{source}: cannot be read ({error.strerror}); check the file") from error
    return {"name": str(source), "size": size, "sha256": digest}


def plan(files: Iterable[InputFile], job: Job) -> list[Shard]:
    """Cut files into shards of ``part_rows`` records, up to the job's limit."""
    shards, before = list[Shard](), 0
    for number, file in enumerate(files):
        end = file.records if job.limit is None else min(file.records, job.limit - before)
        for start in range(0, end, job.part_rows):
            shards.append(Shard(number, start, min(start + job.part_rows, end), before))
        before += file.records
    return shards


def read_shards(sources: Sequence[Source], shards: Iterable[Shard], job: Job) -> Iterator[Work]:
    """Read the records of shards, in order, each file once.

    Raises:
        RowError: a file that cannot be read, or holds fewer records than were counted.
    """
    form = job.row_format
    columns = [*form.names.values(), *job.keep]
    for number, group in groupby(shards, key=lambda shard: shard.file):
        here = list(group)
        at = here[0].start
        records = read(sources[number], columns, start=at)
        for shard in here:
            found = list(islice(records, shard.start - at, shard.stop - at))
            at = shard.stop
            if len(found) < len(shard):
                raise RowError(
                    f"{sources[number]}: has changed while it was read; choose a new folder, or "
                    "put it back and continue with resume=True"
                )
            numbered = enumerate(found, shard.before + shard.start)
            yield Work(shard, [read_item(record, n, form, job.keep) for n, record in numbered])


# --- the engine of one process --------------------------------------------------------------------


class LocalEngine:
    """One model in this process; a thread reads and tokenizes one shard ahead of it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._bayes, self._tokenizer = job.load()

    def configuration(self) -> dict[str, Any]:
        """See :class:`tfb.scoring.job.Engine`."""
        return self._job.configuration(self._bayes, self._tokenizer)

    def results(self, work: Iterable[Work]) -> Iterator[tuple[Work, list[Result]]]:
        """See :class:`tfb.scoring.job.Engine`."""
        scorer = self._job.scorer(self._bayes, self._tokenizer)
        stream = iter(work)

        def prepare() -> tuple[Work, Prepared] | None:
            found = next(stream, None)
            return None if found is None else (found, scorer.prepare(found.rows))

        with ThreadPoolExecutor(1, thread_name_prefix="tfb-reader") as reader:
            ahead = reader.submit(prepare)
            while (ready := ahead.result()) is not None:
                ahead = reader.submit(prepare)
                yield ready[0], scorer.compute(ready[1])


ENGINES: dict[str, Callable[[Job], Engine]] = {"local": LocalEngine, "ray": RayEngine}


class Stop:
    """Within this context SIGINT and SIGTERM only set ``signal``; a second one acts as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


# --- counts ---------------------------------------------------------------------------------------


def _fixed(
    configuration: Mapping[str, Any],
    files: Iterable[InputFile],
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the part of the manifest that a run does not change."""
    before = earlier or {}
    return {
        "format_version": FORMAT_VERSION,
        "configuration": configuration,
        "files": [asdict(file) for file in files],
        "started": before.get("started", _now()),
        "sessions": before.get("sessions", 0) + 1,
    }


@dataclass
class _Ledger:
    """Counts and speed of a run, and the manifest that tells them."""

    fixed: Mapping[str, Any]
    total: int
    max_error_rate: float
    done: Counts
    parts: int
    new: int = 0
    begun: float = field(default_factory=time.monotonic)

    def add(self, counts: Counts) -> None:
        self.done += counts
        self.parts += 1
        self.new += counts.rows

    @property
    def too_many(self) -> bool:
        return self.done.errors > self.max_error_rate * self.done.rows

    @property
    def stops(self) -> bool:
        """Whether errors end the run here."""
        return self.too_many and self.done.rows >= LEAST_ROWS

    def status(self, stopped_by: int | None) -> str:
        if self.stops:
            return TOO_MANY_ERRORS
        return COMPLETE if stopped_by is None else STOPPED

    def progress(self) -> Progress:
        speed = self.new / max(time.monotonic() - self.begun, 1e-9)
        left = (self.total - self.done.rows) / max(speed, 1e-9)
        return Progress(self.done.rows, self.done.errors, self.total, speed, left)

    def manifest(self, status: str) -> dict[str, Any]:
        return {
            "status": status,
            **self.fixed,
            "updated": _now(),
            "counts": {**asdict(self.done), "parts": self.parts, "total": self.total},
            "throughput": {  # of the latest session
                "rows": self.new,
                "seconds": round(time.monotonic() - self.begun, 3),
                "rows_per_second": round(self.progress().rows_per_second, 3),
            },
        }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
