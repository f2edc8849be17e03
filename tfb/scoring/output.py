"""The output folder of a scoring run.

    part-00002-00004096.parquet   results of a shard: file 2, from record 4096 (or .jsonl)
    manifest.json                 configuration, input files, counts
    .lock                         held while a run writes to the folder

The parts are the truth of what is finished; the manifest's counts are for people.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tfb import atomic
from tfb.sampling.adaptive import Adaptive
from tfb.scoring.scorer import Result

FORMATS = ("parquet", "jsonl")
FORMAT_VERSION = 2
MANIFEST, LOCK = "manifest.json", ".lock"
COUNTED = ("error", "truncated", "draws", "standard_error")  # columns
LEFT_BEHIND = re.compile(r"\.lock|\..*\.partial")  # by a run that was killed as it began
OLD_PART = re.compile(r"part-\d+\.(parquet|jsonl)")  # of version 0.1.0


class OutputError(ValueError):
    """A folder that cannot be written, or not continued; the message says what to do."""


@dataclass(frozen=True)
class Counts:
    """What parts hold.

    Attributes:
        rows: all of them.
        errors: rows that could not be scored.
        truncated: rows that were cut.
        draws: of the other rows, together.
        capped: rows of ``draws="auto"`` whose error was still too large after the most draws.
    """

    rows: int = 0
    errors: int = 0
    truncated: int = 0
    draws: int = 0
    capped: int = 0

    @classmethod
    def of(cls, rows: Sequence[Result], adaptive: Adaptive | None = None) -> Counts:
        """Count results; ``adaptive`` are the settings of ``draws="auto"``."""
        good = [row for row in rows if row["error"] is None]
        return cls(
            rows=len(rows),
            errors=len(rows) - len(good),
            truncated=sum(bool(row.get("truncated")) for row in rows),
            draws=sum(row["draws"] for row in good),
            capped=0 if adaptive is None else sum(_capped(row, adaptive) for row in good),
        )

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Counts(*(a + b for a, b in pairs))


def _capped(row: Result, adaptive: Adaptive) -> bool:
    return bool(row["draws"] == adaptive.most and row["standard_error"] > adaptive.tolerance)


class OutputFolder:
    """One run's folder of parts; as a context it is locked.

    Args:
        path: the folder.
        schema: columns of a part.
        kind: one of ``FORMATS``.
        adaptive: settings of ``draws="auto"``, where the run has it.
    """

    def __init__(
        self, path: Path, schema: pa.Schema, kind: str, adaptive: Adaptive | None = None
    ) -> None:
        self.path, self.schema, self.kind, self.adaptive = path, schema, kind, adaptive

    def __enter__(self) -> OutputFolder:
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            atomic.sync(self.path.parent)
            self._lock = (self.path / LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise OutputError(f"{self.path}: another run is writing to it; wait for it") from error
        for left in self.path.glob(".*.partial"):
            left.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def earlier(self, *, resume: bool) -> dict[str, Any] | None:
        """Return the manifest of the run to go on with; None where a run may begin."""
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file; choose a new folder")
        names = [path.name for path in self.path.iterdir()]
        manifest = self._manifest() if MANIFEST in names else None
        if any(map(OLD_PART.fullmatch, names)) or (manifest or {}).get("format_version") == 1:
            raise OutputError(
                f"{self.path}: was written by tfb 0.1.0, whose parts this version cannot "
                "continue; choose a new folder"
            )
        if manifest is None:
            if not all(map(LEFT_BEHIND.fullmatch, names)):
                raise OutputError(f"{self.path}: already holds something; choose a new folder")
            return None
        if not resume:
            raise OutputError(
                f"{self.path}: already holds a run ({manifest.get('status')}, "
                f"{manifest['counts']['rows']} rows); continue it with resume=True, or choose a "
                "new folder"
            )
        return manifest

    def _manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
            if found["format_version"] == 1 or {"configuration", "files", "counts"} <= found.keys():
                return found
        except (ValueError, KeyError, TypeError):
            pass
        raise OutputError(f"{path}: is damaged; choose a new folder")

    def finished(self, sizes: Mapping[str, int]) -> dict[str, Counts]:
        """Return what each finished part holds; ``sizes``: rows of all of the run's, by name."""
        found = {}
        for path in sorted(self.path.glob("part-*")):
            if path.suffix != f".{self.kind}" or path.stem not in sizes:
                raise OutputError(f"{path}: is no part of this run; remove it")
            found[path.stem] = counts = self._read(path)
            if counts.rows != sizes[path.stem]:
                raise OutputError(
                    f"{path}: holds {counts.rows} rows, expected {sizes[path.stem]}; remove this "
                    "part, its rows are then scored again"
                )
        return found

    def _read(self, path: Path) -> Counts:
        try:
            if self.kind == "jsonl":
                with path.open(encoding="utf-8") as file:
                    return Counts.of([json.loads(line) for line in file], self.adaptive)
            names = [name for name in COUNTED if name in self.schema.names]
            rows = pq.read_table(path, columns=names, partitioning=None).to_pylist()
            return Counts.of(rows, self.adaptive)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path}: is damaged ({error}); remove this part, its rows are then scored again"
            ) from error

    def write_part(self, name: str, rows: Sequence[Result]) -> Counts:
        """Write and count a shard's results; where that fails (a full disk), nothing is left."""
        data = _jsonl(rows, self.schema) if self.kind == "jsonl" else _parquet(rows, self.schema)
        path = self.path / f"{name}.{self.kind}"
        with _writing(path):
            atomic.write(path, data)
        return Counts.of(rows, self.adaptive)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace manifest.json."""
        with _writing(self.path / MANIFEST):
            atomic.write_json(self.path / MANIFEST, manifest)


def _jsonl(rows: Iterable[Result], schema: pa.Schema) -> bytes:
    whole = ({name: plain(row.get(name)) for name in schema.names} for row in rows)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in whole]
    return "".join(lines).encode()


def _parquet(rows: Iterable[Result], schema: pa.Schema) -> bytes:
    text = [column.name for column in schema if pa.types.is_string(column.type)]
    typed = [{**row, **{name: as_text(row.get(name)) for name in text}} for row in rows]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(typed, schema=schema), sink)
    return sink.getvalue().to_pybytes()


def as_text(value: Any) -> str | None:
    """Return a value of a column without a type: text as it stands, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(plain(value), ensure_ascii=False)


def plain(value: Any) -> Any:
    """Return a value as JSON can say it: NaN and infinities null, dates and decimals text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return value.hex() if isinstance(value, bytes) else str(value)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError that names the file and the way out."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); what was finished is kept: "
            f"{'make room' if full else 'see to it'} and continue with resume=True"
        ) from error
