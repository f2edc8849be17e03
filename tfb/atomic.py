"""The one way in which files appear: whole, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, sync it to disk, and rename it.

    Whatever happens, a file that has its name is whole. Its folder is made if need be.

    Raises:
        OSError: the disk is full, or the folder cannot be written. The temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append(path: Path, data: bytes) -> None:
    """Write at the end of a file and sync it. A kill may leave a part of ``data``.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON that people can read too.

    Raises:
        ValueError: it holds NaN or an infinity.
        OSError: see :func:`write`.
    """
    write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def sync(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside ``path`` that takes its place if the block succeeds.

    If the block fails, the folder is removed.

    Args:
        path: absent, or an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield staging
        # Private until it is whole; then as any new file, whatever its writer made of it.
        umask = os.umask(0)
        os.umask(umask)
        for entry in (staging, *staging.rglob("*")):
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)
        if path.exists():
            path.rmdir()  # empty: its caller checked, and rmdir refuses if that changed
        os.replace(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
