"""The output folder of a scoring run.

    part-00002-00004096.parquet   results of a shard: file 2, from record 4096 (or .jsonl)
    SHA256SUMS                    of the parts, for `tfb verify` and `sha256sum -c`
    manifest.json                 configuration, input files, counts, and a hash of these
    .lock                         held while a run writes to the folder

The parts are the truth of what is finished; the manifest's counts are for people.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from tfb import atomic
from tfb.adapters.artifact import file_sha256
from tfb.plain import json_sha256, parse_json
from tfb.sampling.adaptive import Adaptive
from tfb.scoring.scorer import Result

FORMATS = ("parquet", "jsonl")
FORMAT_VERSION = 2
MANIFEST, LOCK, SUMS = "manifest.json", ".lock", "SHA256SUMS"
COUNTED = ("error", "truncated", "draws", "standard_error")  # columns
LEFT_BEHIND = re.compile(r"\.lock|\..*\.partial")  # by a run that was killed as it began
OLD_PART = re.compile(r"part-\d+\.(parquet|jsonl)")  # of version 0.1.0
SUM = re.compile(r"^([0-9a-fA-F]{64}) [ *](part-[-\d]+\.\w+)$", re.MULTILINE)
AGAIN = "remove this part, its rows are then scored again"


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
        self._sums: dict[str, str] = {}  # of the parts that are known to be whole, by file name

    def __enter__(self) -> OutputFolder:
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            atomic.sync(self.path.parent)
            for left in self.path.glob(".*.partial"):
                _regular(left)
            self._lock = locked(self.path)
            for left in self.path.glob(".*.partial"):
                left.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def earlier(self, *, resume: bool) -> dict[str, Any] | None:
        """Return the manifest of the run to go on with; None where a run may begin."""
        if self.path.is_symlink() and not self.path.exists():
            raise OutputError(f"{self.path}: is a link to nothing; choose a new folder")
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file; choose a new folder")
        names = [path.name for path in self.path.iterdir()]
        if any(map(OLD_PART.fullmatch, names)):
            raise _other_version(self.path)
        if MANIFEST not in names:
            if not all(map(LEFT_BEHIND.fullmatch, names)):
                raise OutputError(f"{self.path}: already holds something; choose a new folder")
            return None
        manifest = read_manifest(self.path)
        if not resume:
            raise OutputError(
                f"{self.path}: already holds a run ({manifest['status']}, "
                f"{manifest['counts']['rows']} rows); continue it with resume=True, or choose a "
                "new folder"
            )
        return manifest

    def finished(self, sizes: Mapping[str, int]) -> dict[str, Counts]:
        """Return what each finished part holds; refuse those that are not whole, or foreign.

        Args:
            sizes: rows of all parts of the run, by name.
        """
        found, faults = self.inspect(sizes)
        if faults:
            more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise OutputError("; ".join(faults[:3]) + more)
        return found

    def inspect(self, sizes: Mapping[str, int]) -> tuple[dict[str, Counts], list[str]]:
        """Read every part; return what whole ones hold, and what is wrong with the others."""
        known, found, faults = self._known_sums(), dict[str, Counts](), list[str]()
        parts = sorted(self.path.glob("part-*"))
        if parts and not known:
            what = "names no part" if (self.path / SUMS).exists() else "is gone"
            faults.append(f"{self.path / SUMS}: {what}; put it back, or choose a new folder")
            return found, faults
        for path in parts:
            if path.suffix != f".{self.kind}" or path.stem not in sizes:
                faults.append(f"{path}: is no part of this run; remove it")
                continue
            try:
                digest, counts = self._read(path, known[path.name])
            except Exception as error:  # whatever a reader makes of a file that is not ours
                faults.append(f"{path}: is damaged ({error}); {AGAIN}")
                continue
            if counts.rows != sizes[path.stem]:
                expected = f"expected {sizes[path.stem]}"
                faults.append(f"{path}: holds {counts.rows} rows, {expected}; {AGAIN}")
                continue
            found[path.stem], self._sums[path.name] = counts, digest
        return found, faults

    def _known_sums(self) -> Mapping[str, set[str]]:
        """Read SHA256SUMS. A part that is written again has two lines until the run ends."""
        path, found = _regular(self.path / SUMS), defaultdict[str, set[str]](set)
        if path.exists():
            for digest, name in SUM.findall(path.read_text("utf-8-sig", "replace")):
                found[name].add(digest.lower())
        return found

    def _read(self, path: Path, known: set[str]) -> tuple[str, Counts]:
        if not path.is_file():
            raise ValueError("not a file")
        if (digest := file_sha256(path)) not in known:
            raise ValueError(f"its bytes are not those of {SUMS}")
        if self.kind == "jsonl":
            with path.open(encoding="utf-8") as file:
                return digest, Counts.of([json.loads(line) for line in file], self.adaptive)
        there = pq.read_schema(path).names
        names = [name for name in COUNTED if name in there]
        rows = pq.read_table(path, columns=names, partitioning=None).to_pylist()
        return digest, Counts.of(rows, self.adaptive)

    def write_part(self, name: str, rows: Sequence[Result]) -> Counts:
        """Write and count a shard's results; where that fails (a full disk), no part is left.

        Its checksum is on the disk before it has its name: whatever is killed, a part has one.
        """
        data = _jsonl(rows, self.schema) if self.kind == "jsonl" else _parquet(rows, self.schema)
        path = self.path / f"{name}.{self.kind}"
        self._sums[path.name] = digest = hashlib.sha256(data).hexdigest()
        with _writing(path):
            if os.fstat(self._lock.fileno()).st_nlink == 0:
                raise OSError(f"{LOCK} was removed, and another run may have begun")
            atomic.append(path.with_name(SUMS), f"{digest}  {path.name}\n".encode())
            atomic.write(path, data)
        return Counts.of(rows, self.adaptive)

    def write_sums(self) -> None:
        """Replace SHA256SUMS: a line for each part, as far as they are known to be whole."""
        lines = [f"{digest}  {name}\n" for name, digest in sorted(self._sums.items())]
        with _writing(self.path / SUMS):
            atomic.write(self.path / SUMS, "".join(lines).encode())

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace manifest.json."""
        with _writing(self.path / MANIFEST):
            atomic.write_json(self.path / MANIFEST, {**manifest, "sha256": json_sha256(manifest)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what manifest.json says, if that is what a run wrote.

    Raises:
        OutputError: there is none, it is damaged, or it is of another version.
    """
    path = _regular(folder / MANIFEST)
    try:
        found = dict(parse_json(path.read_bytes()))
        version, whole = found["format_version"], found.pop("sha256", None) == json_sha256(found)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise OutputError(f"{path}: is not there; name a folder that tfb score wrote") from error
    except (ValueError, KeyError, TypeError):
        version, whole = None, False
    if version == 1 or (whole and version != FORMAT_VERSION):
        raise _other_version(folder)
    if not whole:
        raise OutputError(f"{path}: is damaged; choose a new folder, or put a copy of it back")
    return found


def _other_version(folder: Path) -> OutputError:
    return OutputError(
        f"{folder}: was written by another version of tfb, such as 0.1.0, whose parts this one "
        "cannot continue; choose a new folder"
    )


def locked(folder: Path, *, shared: bool = False) -> TextIO:
    """Return the lock of a folder, held until it is closed; ``shared``: by readers.

    Raises:
        OutputError: a run is writing to it.
    """
    file = _regular(folder / LOCK).open("r" if shared else "a")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if not isinstance(error, BlockingIOError):
            raise
        raise OutputError(f"{folder}: another run is writing to it; wait for it") from error
    return file


def _regular(path: Path) -> Path:
    """Return the path of a file that is there or not; refuse a pipe, which would be waited for."""
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is no file; remove it, or put back the file that was there")
    return path


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


def can_hold(kind: pa.DataType) -> bool:
    """Whether a part may have a column of a type: Parquet has none for some of Arrow's."""
    try:
        _parquet([{}], pa.schema({"column": kind}))
    except pa.ArrowException:
        return False
    return True


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
