"""Offline scoring: files of rows to a folder of parts, so that nothing is lost.

    job      what is to be done, plain data that can be sent to other processes (tfb/job.py)
    windows  the rows that are not finished, cut into the unit of a run (tfb/windows.py)
    engine   windows -> scored windows, in any order (tfb/pipeline.py; tfb/ray_engine.py)
    parts    each scored window becomes one file, atomically (tfb/parts.py)

A run that was stopped, killed or out of disk is continued with ``resume``: rows whose keys stand in
the parts are skipped, the rest is cut into the windows it would have been. A changed configuration
is refused, and so is an input that lacks finished rows or has changed them; new rows are welcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tfb.data.readers import find_sources
from tfb.scoring.hashset import HashSet
from tfb.scoring.job import Job, configuration_sha256, differences, kept_types
from tfb.scoring.output import (
    Finished,
    OutputError,
    OutputFolder,
    holds_something,
    part_schema,
    read_manifest,
)
from tfb.scoring.pipeline import LocalEngine, Stop
from tfb.scoring.ray import RayEngine, import_ray
from tfb.scoring.scorer import Scored
from tfb.scoring.windows import Windows, check_unchanged

ENGINES: dict[str, Any] = {"local": LocalEngine, "ray": RayEngine}
FORMAT_VERSION = 1
LEAST_ROWS = 1000  # before which no share of errors stops a run
RUNNING, COMPLETE, STOPPED, TOO_MANY_ERRORS = "running", "complete", "stopped", "too many errors"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        rows, errors: of all parts. share: of the input, 0 to 1.
        rows_per_second, tokens_per_second: since this process began to score.
        seconds_left: None while unknown.
    """

    rows: int
    errors: int
    share: float
    rows_per_second: float
    tokens_per_second: float
    seconds_left: float | None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: "complete", "stopped" (by a signal) or "too many errors" (before the end).
        rows, errors: of all parts, those of earlier runs included. signal: what stopped it.
        too_many_errors: their share is above what was allowed. truncated: rows that were cut.
    """

    status: str
    rows: int
    errors: int
    signal: int | None
    too_many_errors: bool
    truncated: int = 0


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

    SIGINT or SIGTERM lets the window in flight become a part, then ends the run.

    Args:
        resume: go on in a folder that a run has begun; an absent or empty one is begun.
        retry_errors: resume, and do the error rows again.
        max_error_rate: the run stops once more than this share of all rows, of ``LEAST_ROWS`` at
            least, are errors. engine: "local" or "ray". report: is told of every finished
            window.

    Raises:
        ValueError: settings that cannot work; RowError: input that cannot be read, or does not
            belong to the finished parts; ArtifactError: an artifact that cannot be used;
            OutputError: a folder that cannot be written or not be continued; EngineError: Ray's
            workers failed; ImportError: no Ray.
    """
    job.check()
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    if engine == "ray":
        import_ray()
    elif (job.workers, job.ray_address) != (None, None):
        raise ValueError("--workers and --ray-address: only with --engine ray")
    if not 0 <= max_error_rate <= 1:
        raise ValueError(f"--max-error-rate {max_error_rate}: expected a share from 0 to 1")
    path = Path(job.output)
    earlier = _earlier(path, resume or retry_errors)
    sources = find_sources(job.inputs)
    reading = job.reading(sources)
    schema = part_schema(
        kept_types(sources, job.keep),
        truncated=job.truncate is not None,
        per_draw=job.per_draw,
        logits=job.logits,
    )
    folder = OutputFolder(path, schema, job.keep, job.file_format)
    with ExitStack() as stack:
        done, finished = HashSet(), None
        if earlier is not None:
            stack.enter_context(folder)
            _compare(path, earlier["configuration"], job.declared())
            salt = bytes.fromhex(configuration_sha256(earlier["configuration"]))
            reading = replace(reading, salt=salt)
            finished = folder.finished(reading.id_hash, errors=not retry_errors)
            check_unchanged(reading, finished.keys, finished.ids)
            done = finished.keys
        engine_ = ENGINES[engine](job)
        configuration = engine_.configuration()
        if earlier is not None:
            _compare(path, earlier["configuration"], configuration)
        else:
            stack.enter_context(folder)
            _earlier(path, False)  # another run may have begun meanwhile
        if retry_errors:
            folder.drop_errors()
        salt = bytes.fromhex(configuration_sha256(configuration))
        pending = Windows(replace(reading, salt=salt), job.part_rows, done, folder.free_numbers())
        parts = len(folder.parts())
        ledger = _Ledger(job, configuration, earlier, finished, parts, max_error_rate)
        folder.write_manifest(ledger.manifest(RUNNING))
        signal = _write_parts(engine_.scored(pending), folder, ledger, report)
        status = ledger.status(signal)
        folder.write_manifest(ledger.manifest(status))
    return Outcome(status, ledger.rows, ledger.errors, signal, ledger.too_many, ledger.truncated)


def _write_parts(
    scored: Generator[Scored, None, None],
    folder: OutputFolder,
    ledger: _Ledger,
    report: Callable[[Progress], None] | None,
) -> int | None:
    """Write each scored window while the next is computed; the signal that ended it, if any."""
    written: Future[None] | None = None
    with (
        Stop() as stop,
        ThreadPoolExecutor(1, thread_name_prefix="tfb-writer") as writer,
        closing(scored),
    ):
        for part in scored:
            ledger.add(part)
            if written is not None:
                written.result()
            written = writer.submit(_commit, folder, part, ledger.manifest(RUNNING))
            if report is not None:
                report(ledger.progress())
            if stop.signal is not None or ledger.stops:
                break
        if written is not None:
            written.result()
    return stop.signal


class _Ledger:
    """Counts and speed of a run, and the manifest that tells them."""

    def __init__(
        self,
        job: Job,
        configuration: Mapping[str, Any],
        earlier: Mapping[str, Any] | None,
        finished: Finished | None,
        parts: int,
        max_error_rate: float,
    ) -> None:
        self.rows = self.errors = self.truncated = 0
        if finished is not None:
            self.rows, self.errors = finished.rows, finished.errors
            self.truncated = finished.truncated
        self.parts = parts
        self._max = max_error_rate
        self._fixed = {
            "format_version": FORMAT_VERSION,
            "configuration": configuration,
            "configuration_sha256": configuration_sha256(configuration),
            "inputs": list(job.inputs),
            "started": _now() if earlier is None else earlier.get("started"),
            "sessions": 1 if earlier is None else int(earlier.get("sessions", 0)) + 1,
        }
        self._new = self._tokens = 0
        self._share = 0.0
        self._first_share: float | None = None
        self._begin = time.monotonic()

    def add(self, part: Scored) -> None:
        """Count a scored window."""
        self.rows += len(part.rows)
        self.errors += part.errors
        self.truncated += part.truncated
        self.parts += 1
        self._new += len(part.rows)
        self._tokens += part.tokens
        self._share = max(self._share, part.share)
        if self._first_share is None:
            self._first_share = self._share

    @property
    def too_many(self) -> bool:
        return self.errors > self._max * self.rows

    @property
    def stops(self) -> bool:
        """Whether errors end the run here."""
        return self.too_many and self.rows >= LEAST_ROWS

    def progress(self) -> Progress:
        seconds = max(time.monotonic() - self._begin, 1e-9)
        # Rows that were finished before are read in no time: the rest is told from the first
        # window of this process on.
        came = self._share - (self._first_share or 0.0)
        left = seconds * (1 - self._share) / came if came > 0 else None
        return Progress(
            self.rows, self.errors, self._share, self._new / seconds, self._tokens / seconds, left
        )

    def status(self, signal: int | None) -> str:
        """How the run ended."""
        if self.stops:
            return TOO_MANY_ERRORS
        return COMPLETE if signal is None else STOPPED

    def manifest(self, status: str) -> dict[str, Any]:
        """The manifest as of now."""
        seconds = time.monotonic() - self._begin
        p = self.progress()
        return {
            "status": status,
            **self._fixed,
            "updated": _now(),
            "counts": {
                "rows": self.rows,
                "errors": self.errors,
                "truncated": self.truncated,
                "parts": self.parts,
            },
            "throughput": {  # of the latest session
                "rows": self._new,
                "seconds": round(seconds, 3),
                "rows_per_second": round(p.rows_per_second, 3),
                "tokens_per_second": round(p.tokens_per_second, 3),
            },
        }


def _earlier(path: Path, resume: bool) -> dict[str, Any] | None:
    """The manifest of the run to go on with; None for a folder that a run may begin in.

    Raises:
        OutputError: the folder holds something else, or a run that was not asked to go on.
    """
    manifest = read_manifest(path)
    if manifest is None:
        if holds_something(path):
            raise OutputError(f"{path} already holds something; choose a new folder")
        return None
    if not resume:
        raise OutputError(
            f"{path} already holds a run ({manifest.get('status')}, "
            f"{manifest.get('counts', {}).get('rows')} rows); continue it with --resume, or choose "
            "a new folder"
        )
    return manifest


def _compare(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if found := differences(was, now):
        raise OutputError(
            f"{path}: was begun with another configuration ({'; '.join(found)}); go back to that "
            "one, or choose a new folder"
        )


def _commit(folder: OutputFolder, part: Scored, manifest: Mapping[str, Any]) -> None:
    folder.write_part(part.number, part.rows)
    folder.write_manifest(manifest)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
