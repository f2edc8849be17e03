"""The output folder of a scoring run: part files and a manifest.

    part-00000.parquet, ...   results, one row for each row of the input (or .jsonl)
    manifest.json             configuration, hashes, versions, counts, throughput
    .lock                     held while a run writes to the folder

Each file is written under a temporary name, synced to disk and renamed, so that a file which has
its name is whole, whatever happened. The parts are the truth of what is finished; the manifest's
counts are for people.

Columns: id, those that were kept, prediction (index), choice (its text, or the class's name where
there is one), probs [K], total, aleatoric, epistemic (nats), agreement, standard_error, draws,
label, truncated (tokens left out, where that is allowed), draw_probs [S, K] and draw_logits [S, K]
on request, error (null in a good row; in others only id, kept columns and key
have values beside it), key (16 hex digits, see :mod:`tfb.scoring.windows`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any

from tfb.scoring.hashset import HashSet

FORMATS = ("parquet", "jsonl")
MANIFEST, LOCK, PARTIAL = "manifest.json", ".lock", ".partial"
UNCERTAINTIES = ("total", "aleatoric", "epistemic", "agreement", "standard_error")


class OutputError(ValueError):
    """A folder that cannot be written, or not continued; the message says what to do."""


@dataclass(frozen=True)
class Finished:
    """What the parts of a folder hold: keys and hashes of ids, numbers of rows."""

    keys: HashSet
    ids: HashSet
    rows: int
    errors: int
    truncated: int


@dataclass(frozen=True)
class FreeNumbers:
    """All numbers from 0 but those that are taken; can be sent to another process."""

    taken: frozenset[int]

    def __iter__(self) -> Iterator[int]:
        return (n for n in count() if n not in self.taken)


def part_schema(
    kept: Mapping[str, Any],
    *,
    truncated: bool = False,
    per_draw: bool = False,
    logits: bool = False,
) -> Any:
    """The Arrow schema of a part; ``kept``: Arrow types of the columns that pass through.

    Raises:
        ValueError: a kept column with the name of one of ours.
    """
    import pyarrow as pa

    real, reals = pa.float32(), pa.list_(pa.float32())
    first = {"id": pa.string()}
    ours: dict[str, Any] = {"prediction": pa.int32(), "choice": pa.string(), "probs": reals}
    ours |= {**dict.fromkeys(UNCERTAINTIES, real), "draws": pa.int32(), "label": pa.int32()}
    if truncated:
        ours["truncated"] = pa.int32()
    if per_draw:
        ours["draw_probs"] = pa.list_(reals)
    if logits:
        ours["draw_logits"] = pa.list_(reals)
    ours |= {"error": pa.string(), "key": pa.string()}
    if taken := sorted(set(kept) & {*first, *ours}):
        raise ValueError(f"--keep {taken[0]}: the output has a column of that name; rename yours")
    return pa.schema({**first, **kept, **ours})


class OutputFolder:
    """One run's folder. Used as a context manager it holds the folder's lock.

    Args:
        path: absent, empty, or the folder of an earlier run. schema: of its parts.
        kept: columns that pass through. file_format: one of ``FORMATS``.
    """

    def __init__(self, path: Path, schema: Any, kept: Sequence[str], file_format: str) -> None:
        self.path, self.schema, self.kept, self.format = path, schema, kept, file_format

    def __enter__(self) -> OutputFolder:
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            _sync(self.path.parent)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise OutputError(f"{self.path}: another run is writing to it; wait for it") from error
        for left in self.path.glob(f".*{PARTIAL}"):
            left.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def parts(self) -> list[Path]:
        """The finished part files, by number."""
        named = re.compile(rf"part-(\d+)\.{self.format}")
        found = [(int(m[1]), p) for p in self.path.iterdir() if (m := named.fullmatch(p.name))]
        return [path for _, path in sorted(found)]

    def free_numbers(self) -> FreeNumbers:
        """Numbers without a part, in order."""
        return FreeNumbers(frozenset(int(path.stem.removeprefix("part-")) for path in self.parts()))

    def write_part(self, number: int, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write the results of one window.

        Raises:
            OutputError: it cannot be written (a full disk); nothing of it is left then.
        """
        path = self.path / f"part-{number:05d}.{self.format}"
        _write(path, self._bytes(rows))
        return path

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace manifest.json; raises OutputError as ``write_part`` does."""
        text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
        _write(self.path / MANIFEST, text.encode())

    def finished(self, id_hash: Callable[[str], int], *, errors: bool = True) -> Finished:
        """What is done already; without ``errors`` only the good rows.

        Raises:
            OutputError: a part that cannot be read, or a row that stands there twice.
        """
        keys, ids, rows, bad, cut = HashSet(), HashSet(), 0, 0, 0
        for path in self.parts():
            found = self._read(path)
            wrong = sum(row["error"] is not None for row in found)
            chosen = [row for row in found if errors or row["error"] is None]
            keys.add(int(row["key"], 16) for row in chosen)
            ids.add(id_hash(row["id"]) for row in chosen if row["id"] is not None)
            rows, bad = rows + len(chosen), bad + (wrong if errors else 0)
            cut += sum(bool(row.get("truncated")) for row in chosen)
        if len(keys) < rows:
            raise OutputError(
                f"{self.path}: {rows - len(keys)} rows stand there twice; a part was copied or "
                "renamed: remove it"
            )
        return Finished(keys, ids, rows, bad, cut)

    def drop_errors(self) -> int:
        """Take the error rows out of all parts, so that they are to be done again; their number."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        dropped = 0
        for path in self.parts():
            if self.format == "jsonl":
                lines = path.read_bytes().splitlines(keepends=True)
                kept = [line for line in lines if json.loads(line)["error"] is None]
                before, after, data = len(lines), len(kept), b"".join(kept)
            else:
                table = pq.read_table(path, partitioning=None)
                good = table.filter(pc.field("error").is_null())
                before, after, data = len(table), len(good), _parquet(good)
            dropped += before - after
            if not after:
                path.unlink()
            elif after < before:
                _write(path, data)
        return dropped

    def _bytes(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        import pyarrow as pa

        if self.format == "jsonl":
            whole = [{n: plain(row.get(n)) for n in self.schema.names} for row in rows]
            lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in whole]
            return "".join(line + "\n" for line in lines).encode()
        text = [n for n in self.kept if pa.types.is_string(self.schema.field(n).type)]
        typed = [{**row, **{n: as_text(row.get(n)) for n in text}} for row in rows]
        return _parquet(pa.Table.from_pylist(typed, schema=self.schema))

    def _read(self, path: Path) -> list[dict[str, Any]]:
        """Key, id, error and truncated of each row of a part."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = [n for n in ("key", "id", "error", "truncated") if n in self.schema.names]
        try:
            if self.format == "jsonl":
                with path.open(encoding="utf-8") as file:
                    rows = [json.loads(line) for line in file]
            else:
                rows = pq.read_table(path, columns=names, partitioning=None).to_pylist()
            return [{name: row[name] for name in names} for row in rows]
        except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path}: is damaged ({error}); remove this part, its rows are then scored again"
            ) from error


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """manifest.json of a folder; None where there is none.

    Raises:
        OutputError: it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found["configuration"], dict):
            return dict(found)
    except (ValueError, KeyError, TypeError):
        pass
    raise OutputError(f"{path}: is damaged; choose a new folder")


def holds_something(folder: Path) -> bool:
    """Whether there is anything that a run has not left behind when it was killed at its start."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        return True
    left = re.compile(rf"{re.escape(LOCK)}|\..*{re.escape(PARTIAL)}")
    return any(not left.fullmatch(p.name) for p in folder.iterdir())


def as_text(value: Any) -> str | None:
    """A value of a column without a type: text as it stands, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(plain(value), ensure_ascii=False)


def plain(value: Any) -> Any:
    """A value as JSON can say it: NaN and infinities are null, dates and decimals are text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, bytes | date | datetime | time | timedelta | Decimal):
        return value.hex() if isinstance(value, bytes) else str(value)
    return value


def _parquet(table: Any) -> Any:
    """The bytes of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()


def _write(path: Path, data: Any) -> None:
    """All of ``data`` under ``path``, on the disk, or nothing."""
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    with _writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def _sync(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an OSError into an OutputError that names the file and the way out."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); what was finished is kept: "
            f"{'make room' if full else 'see to it'} and continue with --resume"
        ) from error
