"""Offline scoring: files of rows to a folder of parts, so that nothing is lost.

The input is cut into shards, ranges of records of a file; an engine scores them, in any order, and
each becomes one part file, atomically. A run that was stopped, killed or out of disk is resumed
with the shards whose parts are missing. A changed configuration or input file is refused, and a
damaged part; further files are welcome.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby, islice
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa

from tfb.adapters.artifact import file_sha256
from tfb.adapters.loading import check_device
from tfb.data.readers import count_records, find_sources, read
from tfb.data.rows import RowError
from tfb.plain import differences, listed
from tfb.sampling.adaptive import Adaptive
from tfb.scoring.job import Job, Shard, Work
from tfb.scoring.output import (
    FORMAT_VERSION,
    LOCK,
    MANIFEST,
    Counts,
    OutputError,
    OutputFolder,
    locked,
    read_manifest,
)
from tfb.scoring.ray import RayEngine, import_ray
from tfb.scoring.scorer import Prepared, Result, read_item, result_rows, rows_of

LEAST_ROWS = 1000  # before which no share of errors stops a run
RUNNING, COMPLETE, STOPPED, TOO_MANY_ERRORS = "running", "complete", "stopped", "too many errors"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: "complete", "stopped" (by a signal) or "too many errors" (before the end).
        counts: of all parts, those of earlier runs included.
        signal: what stopped it, if anything.
        too_many_errors: their share is above what was allowed.
    """

    status: str
    counts: Counts
    signal: int | None = None
    too_many_errors: bool = False


def run(
    job: Job,
    *,
    resume: bool = False,
    retry_errors: bool = False,
    max_error_rate: float = 0.05,
    engine: str = "local",
    report: Callable[[Counts, int], None] | None = None,
) -> Outcome:
    """Score a job's input into its folder.

    SIGINT or SIGTERM lets the shard in flight become a part, then ends the run.

    Args:
        job: what is to be done.
        resume: go on in a folder that a run has begun.
        retry_errors: resume, and do the shards again whose parts hold errors.
        max_error_rate: after ``LEAST_ROWS`` rows, a greater share of errors stops the run.
        engine: "local" or "ray".
        report: is told the counts of all parts, and the run's rows, after every shard.

    Raises:
        ValueError: settings that cannot work.
        RowError: input that cannot be read, or does not belong to the finished parts.
        ArtifactError: an artifact that cannot be used.
        OutputError: a folder that cannot be written or not be continued.
        EngineError: Ray's workers failed.
        ImportError: Ray is asked for and not installed.
    """
    job.check()
    _check(job, engine, max_error_rate)
    sources = find_sources(job.inputs)
    stamps = {source: stamp(source) for source in sources}  # before anything of them is read
    schema = job.part_schema(sources)
    columns = {"schema": {column.name: str(column.type) for column in schema}}
    folder = OutputFolder(Path(job.output), schema, job.format, job.adaptive)
    earlier = folder.earlier(resume=resume or retry_errors)
    output = Path(os.path.realpath(job.output))
    if within := [s for s in sources if Path(os.path.realpath(s)).is_relative_to(output)]:
        raise OutputError(f"{job.output}: holds the input {within[0]}; choose a new folder")
    _compare(folder, earlier, job.declared() | columns)
    read_columns = [*job.row_format.names.values(), *job.keep]
    files = input_files(
        sources, job.limit, () if earlier is None else earlier["files"], read_columns
    )
    shards = plan([file["records"] for file in files], job.part_rows, job.limit)
    with folder:
        if folder.earlier(resume=True) != earlier:
            raise OutputError(f"{folder.path}: another run has written to it meanwhile; run again")
        finished = folder.finished({shard.name: len(shard) for shard in shards})
        if retry_errors:
            finished = {name: counts for name, counts in finished.items() if not counts.errors}
        scoring = ENGINES[engine](job)
        configuration = scoring.configuration | columns
        _compare(folder, earlier, configuration)
        total, counts = sum(map(len, shards)), sum(finished.values(), Counts())
        manifest = {
            "status": RUNNING,
            "format_version": FORMAT_VERSION,
            "configuration": configuration,
            "files": files,
            "started": _now() if earlier is None else earlier["started"],
        }

        def note(**changes: Any) -> None:
            manifest.update(changes, updated=_now(), counts={"total": total, **asdict(counts)})
            folder.write_manifest(manifest)

        note()
        folder.write_sums()
        missing = [shard for shard in shards if shard.name not in finished]
        read_again = [Path(file["name"]) for file in files]
        work = read_shards({source: stamps[source] for source in read_again}, missing, job)
        with noted_signals() as caught, closing(scoring.results(work)) as scored:
            for done, results in scored:
                rows = result_rows(done.items, results)
                counts += folder.write_part(done.shard.name, rows)
                note()
                if report is not None:
                    report(counts, total)
                if caught or _stops(counts, max_error_rate):
                    break
        folder.write_sums()
        status = STOPPED if caught else COMPLETE
        note(status=TOO_MANY_ERRORS if _stops(counts, max_error_rate) else status)
    too_many = counts.errors > max_error_rate * counts.rows
    return Outcome(str(manifest["status"]), counts, caught[0] if caught else None, too_many)


def verify(output: Path) -> tuple[dict[str, Counts], list[str]]:
    """Check a run's folder, to every byte of its parts; needs neither model nor input.

    Returns:
        What each whole part holds, by name, and each fault in a line with its remedy.

    Raises:
        OutputError: no folder of a run, a damaged manifest, or a run that is writing to it.
    """
    # A copy of a folder may be without the lock.
    with locked(output, shared=True) if (output / LOCK).exists() else nullcontext():
        manifest = read_manifest(output)
        told = manifest["configuration"]
        auto = Adaptive(told["tolerance"], told["most"]) if told["draws"] == "auto" else None
        records = [file["records"] for file in manifest["files"]]
        shards = plan(records, told["part_rows"], told["limit"])
        folder = OutputFolder(output, pa.schema([]), told["format"], auto)
        found, faults = folder.inspect({shard.name: len(shard) for shard in shards})
    there = {path.name for path in output.glob("part-*")}
    names = [f"{shard.name}.{folder.kind}" for shard in shards]
    if missing := [name for name in names if name not in there]:
        faults.append(
            f"{output}: {len(missing)} of {len(shards)} parts are missing ({listed(missing, 3)}); "
            "score them with resume=True"
        )
    counts = {"total": sum(map(len, shards)), **asdict(sum(found.values(), Counts()))}
    if not faults and counts != manifest["counts"]:
        others = "; ".join(differences(manifest["counts"], counts))
        faults.append(
            f"{output / MANIFEST}: counts are not those of the parts ({others}), as after a kill; "
            "count them again with resume=True"
        )
    return found, faults


def _check(job: Job, engine: str, max_error_rate: float) -> None:
    if engine not in ENGINES:
        raise ValueError(f"engine={engine}: expected one of {', '.join(ENGINES)}")
    if engine == "ray":
        import_ray()
    elif job.workers is not None or job.ray_address is not None:
        raise ValueError(f"engine={engine}: workers and ray_address are those of engine=ray")
    else:
        check_device(job.device)  # that of Ray's workers may be elsewhere
    if not 0 <= max_error_rate <= 1:
        raise ValueError(f"max_error_rate={max_error_rate}: expected a share from 0 to 1")


def _compare(
    folder: OutputFolder, earlier: Mapping[str, Any] | None, now: Mapping[str, Any]
) -> None:
    if earlier is not None and (found := differences(earlier["configuration"], now)):
        raise OutputError(
            f"{folder.path}: was begun with another configuration ({'; '.join(found)}); go back to "
            "that one, or choose a new folder"
        )


def _stops(counts: Counts, max_error_rate: float) -> bool:
    """Whether errors end the run here."""
    return counts.rows >= LEAST_ROWS and counts.errors > max_error_rate * counts.rows


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in place of acting on them; a second one acts as usual."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        before.update({number: signal.signal(number, note) for number in SIGNALS})
    try:
        yield caught
    finally:
        restore()


# --- the input ------------------------------------------------------------------------------------


def input_files(
    sources: Sequence[Path],
    limit: int | None,
    earlier: Sequence[Mapping[str, Any]] = (),
    columns: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return what the manifest tells of the files of a run, of which ``columns`` are read.

    Those of an ``earlier`` manifest come first, unchanged. Files behind the limit are left out.
    """
    left = {str(source): source for source in sources}
    found, faults = list(map(dict, earlier)), []
    for file in found:
        source = left.pop(file["name"], None)
        if source is None:
            faults.append(f"{file['name']} is missing")
        elif changes := differences(file, _identity(source)):
            faults.append(f"{source} has changed ({'; '.join(changes)})")
    if faults:
        raise RowError(
            f"the input is not that of the finished parts: {', '.join(faults)}; give the same "
            "files under the same names, or choose a new folder"
        )
    for source in left.values():
        if limit is not None and sum(file["records"] for file in found) >= limit:
            break
        found.append({**_identity(source), "records": count_records(source, columns)})
    if not any(file["records"] for file in found):
        raise RowError(f"{', '.join(map(str, sources))}: the input holds no rows; add some")
    return found


def _identity(source: Path) -> dict[str, Any]:
    size, digest = source.stat().st_size, file_sha256(source)
    return {"name": str(source), "size": size, "sha256": digest}


def stamp(source: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is replaced or written to; None: it is gone."""
    try:
        found = source.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def plan(records: Iterable[int], part_rows: int, limit: int | None) -> list[Shard]:
    """Cut files with these numbers of records into shards, up to a limit of them all."""
    shards, before = list[Shard](), 0
    for number, count in enumerate(records):
        end = count if limit is None else min(count, limit - before)
        for start in range(0, end, part_rows):
            shards.append(Shard(number, start, min(start + part_rows, end), before))
        before += count
    return shards


def read_shards(
    stamps: Mapping[Path, tuple[int, ...] | None], shards: Iterable[Shard], job: Job
) -> Iterator[Work]:
    """Read the records of shards, in order, each file once.

    Args:
        stamps: of the files, by :func:`stamp` before they were counted.
        shards: which records.
        job: says what is kept of them.

    Raises:
        RowError: a file that has changed since its stamp, or cannot be read.
    """
    form, sources = job.row_format, list(stamps)
    columns = [*form.names.values(), *job.keep]
    for number, group in groupby(shards, key=lambda shard: shard.file):
        here = list(group)
        source, at = sources[number], here[0].start
        records = read(source, columns, start=at)
        for shard in here:
            found = list(islice(records, shard.start - at, shard.stop - at))
            at = shard.stop
            if len(found) < len(shard) or stamp(source) != stamps[source]:
                raise RowError(
                    f"{source}: has changed while it was read; choose a new folder, or "
                    "put it back and continue with resume=True"
                )
            numbered = enumerate(found, shard.before + shard.start)
            yield Work(shard, [read_item(record, n, form, job.keep) for n, record in numbered])


# --- the engine of one process --------------------------------------------------------------------


class LocalEngine:
    """One model in this process; a thread reads and tokenizes one shard ahead of it."""

    def __init__(self, job: Job) -> None:
        bayes, tokenizer = job.load()
        self.configuration = job.configuration(bayes, tokenizer)
        self._scorer = job.scorer(bayes, tokenizer)

    def results(self, work: Iterable[Work]) -> Generator[tuple[Work, list[Result]]]:
        """Score shards in turn; an error in reading is raised after the shards before it."""
        stream = iter(work)

        def prepare() -> tuple[Work, Prepared] | None:
            found = next(stream, None)
            return None if found is None else (found, self._scorer.prepare(rows_of(found.items)))

        with ThreadPoolExecutor(1, thread_name_prefix="tfb-reader") as reader:
            ahead = reader.submit(prepare)
            while (ready := ahead.result()) is not None:
                ahead = reader.submit(prepare)
                yield ready[0], self._scorer.compute(ready[1])


ENGINES: dict[str, Callable[[Job], LocalEngine | RayEngine]] = {
    "local": LocalEngine,
    "ray": RayEngine,
}
