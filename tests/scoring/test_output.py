"""Part files and manifests: whole or not there, and what can be told from them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.files import flip

from tfb.scoring.output import (
    FORMATS,
    Counts,
    OutputError,
    OutputFolder,
    as_text,
    can_hold,
    plain,
    read_manifest,
)

NUMBER, TEXT = pa.int32(), pa.string()
SCHEMA = pa.schema(
    {
        "id": TEXT,
        "when": pa.timestamp("us"),
        "note": TEXT,
        "prediction": NUMBER,
        "choice": TEXT,
        "probs": pa.list_(pa.float32()),
        "total": pa.float32(),
        "draws": NUMBER,
        "label": NUMBER,
        "truncated": NUMBER,
        "error": TEXT,
    }
)
MANIFEST: dict[str, Any] = {
    "format_version": 2,
    "status": "stopped",
    "configuration": {"sigma": 0.1},
    "files": [],
    "counts": {"rows": 3},
}


def folder(path: Path, kind: str = "parquet") -> OutputFolder:
    return OutputFolder(path, SCHEMA, kind)


def good(n: int) -> dict[str, Any]:
    return {
        "id": f"r{n}",
        "when": datetime(2026, 1, 2),
        "note": {"a": [n]},
        "prediction": 0,
        "choice": "A",
        "probs": [0.75, 0.25],
        "total": 0.5,
        "draws": 4,
        "label": None,
        "truncated": n,
        "error": None,
    }


def bad(name: str | None) -> dict[str, Any]:
    return {"id": name, "error": "bad"}


def test_both_formats(tmp_path: Path) -> None:
    """Every column in every row; what has no type is JSON in Parquet, itself in JSONL."""
    for kind in FORMATS:
        with folder(tmp_path / kind, kind) as out:
            out.write_part("part-3", [good(0), bad(None)])
    table = pq.read_table(tmp_path / "parquet" / "part-3.parquet")
    assert table.schema == SCHEMA
    first, second = table.to_pylist()
    assert first["note"] == '{"a": [0]}' and first["when"] == datetime(2026, 1, 2)
    lines = (tmp_path / "jsonl" / "part-3.jsonl").read_text().splitlines()
    one, two = map(json.loads, lines)
    assert list(one) == list(two) == SCHEMA.names
    assert one == first | {"note": {"a": [0]}, "when": "2026-01-02 00:00:00"}
    assert two == second and two["probs"] is None and two["error"] == "bad"


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_finished(tmp_path: Path, kind: str) -> None:
    sizes = {"part-0": 2, "part-1": 2, "part-2": 1}
    with folder(tmp_path, kind) as out:
        out.write_part("part-2", [good(0)])
        out.write_part("part-0", [good(7), bad("x")])
        found = out.finished(sizes)
        assert found == {"part-0": Counts(2, 1, 1, 4), "part-2": Counts(1, 0, 0, 4)}
        assert sum(found.values(), Counts()) == Counts(3, 1, 1, 8)
        part = tmp_path / f"part-0.{kind}"
        copy = tmp_path / f"part-9.{kind}"
        copy.write_bytes(part.read_bytes())
        with pytest.raises(OutputError, match=rf"{copy.name}: is no part of this run; remove it"):
            out.finished(sizes)
        copy.unlink()
        with pytest.raises(OutputError, match=r"part-2.*: holds 1 rows, expected 3; remove this"):
            out.finished(sizes | {"part-2": 3})
        assert out.finished(sizes) == found
    other = "jsonl" if kind == "parquet" else "parquet"
    with folder(tmp_path, other) as out, pytest.raises(OutputError, match="is no part of this run"):
        out.finished(sizes)


FAULTS: dict[str, Callable[[Path], Any]] = {
    "a flipped byte": lambda path: flip(path, path.stat().st_size // 2),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "empty": lambda path: path.write_bytes(b""),
    "another part's rows": lambda path: shutil.copy(path.with_stem("part-1"), path),
    "nested too deep": lambda path: path.write_bytes(b"[" * 100_000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("gone")),
    "another checksum": lambda path: flip(path.with_name("SHA256SUMS"), 3),
    "a checksum that is another's": lambda path: flip(path.with_name("SHA256SUMS"), 72),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_part_is_named(tmp_path: Path, kind: str, fault: str) -> None:
    """With the remedy, which helps: written again it is what it was, byte for byte."""
    sizes = {"part-0": 2, "part-1": 2, "part-2": 2}
    with folder(tmp_path, kind) as out:
        for name in sizes:
            out.write_part(name, [good(int(name[-1])), bad(None)])
        found, part = out.finished(sizes), tmp_path / f"part-0.{kind}"
        before = part.read_bytes()
        FAULTS[fault](part)
        with pytest.raises(OutputError, match=rf"{part}: is damaged \(.*\); remove this part") as e:
            out.finished(sizes)
        assert "part-1" not in str(e.value)
        part.rmdir() if part.is_dir() else part.unlink()
        assert out.finished(sizes) == {n: c for n, c in found.items() if n != "part-0"}
        out.write_part("part-0", [good(0), bad(None)])
        assert out.finished(sizes) == found and part.read_bytes() == before
        out.write_sums()
        check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
        assert subprocess.run(check, cwd=tmp_path).returncode == 0
        (tmp_path / "SHA256SUMS").unlink()
        with pytest.raises(OutputError, match="SHA256SUMS: is gone; put it back, or choose a new"):
            out.finished(sizes)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS", ".lock", ".part-1.partial"])
def test_what_is_no_file_is_refused_by_name(
    tmp_path: Path, name: str, make: Callable[[Path], Any]
) -> None:
    """A pipe would be waited for."""
    with folder(tmp_path) as out:
        out.write_part("part-0-0", [good(0)])
        out.write_manifest(MANIFEST)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)

    def resume() -> None:
        out = folder(tmp_path)
        out.earlier(resume=True)
        with out:
            out.finished({"part-0-0": 1})

    with pytest.raises(OutputError, match=f"{name}: is no file; remove it, or put back the file"):
        resume()
    assert (tmp_path / name).exists()


def test_checksums_as_other_tools_write_them(tmp_path: Path) -> None:
    sizes, path = {"part-0": 1}, tmp_path / "SHA256SUMS"
    with folder(tmp_path) as out:
        out.write_part("part-0", [good(0)])
        digest, name = path.read_text().split()
        for text in (f"{digest.upper()} *{name}\r\n", f"\ufeff{digest}  {name}\r\n"):
            path.write_bytes(text.encode())
            assert list(out.finished(sizes)) == ["part-0"]
        path.write_bytes(b"")
        with pytest.raises(OutputError, match="SHA256SUMS: names no part; put it back, or choose"):
            out.finished(sizes)


def test_a_part_is_written_again(tmp_path: Path) -> None:
    """A kill after the new checksum and before the new part leaves the old one, whole."""
    with folder(tmp_path) as out:
        out.write_part("part-0", [bad(None)])
        old = (tmp_path / "part-0.parquet").read_bytes()
        out.write_part("part-0", [good(0)])
        new = (tmp_path / "part-0.parquet").read_bytes()
        torn = (tmp_path / "SHA256SUMS").read_bytes()[:-5]
        for data, sums, errors in ((old, None, 1), (new, None, 0), (old, torn, 1)):
            (tmp_path / "part-0.parquet").write_bytes(data)
            if sums is not None:
                (tmp_path / "SHA256SUMS").write_bytes(sums)
            assert out.finished({"part-0": 1})["part-0"].errors == errors
        out.write_sums()
        (line,) = (tmp_path / "SHA256SUMS").read_text().splitlines()
        assert line == f"{hashlib.sha256(old).hexdigest()}  part-0.parquet"


def test_a_lock_that_is_gone(tmp_path: Path) -> None:
    """Another run may have begun: nothing more is written."""
    with folder(tmp_path) as out:
        out.write_part("part-0", [good(0)])
        (tmp_path / ".lock").unlink()
        with (
            folder(tmp_path) as other,
            pytest.raises(OutputError, match=r"part-1.*lock was removed, and another run may have"),
        ):
            other.write_part("part-2", [good(0)])
            out.write_part("part-1", [good(0)])
    assert sorted(p.name for p in tmp_path.glob("part*")) == ["part-0.parquet", "part-2.parquet"]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with folder(tmp_path), pytest.raises(OutputError, match="another run is writing to it"):
        folder(tmp_path).__enter__()
    with folder(tmp_path) as out:
        assert out.earlier(resume=False) is None


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".part-00001.parquet.partial").write_bytes(b"half")
    (tmp_path / ".lock").touch()
    assert folder(tmp_path).earlier(resume=False) is None
    assert folder(tmp_path / "absent").earlier(resume=True) is None
    with folder(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_a_folder_is_not_continued_unasked(tmp_path: Path) -> None:
    out = folder(tmp_path)
    out.write_manifest(MANIFEST)
    assert out.earlier(resume=True) == MANIFEST
    said = r"already holds a run \(stopped, 3 rows\); continue it with resume=True"
    with pytest.raises(OutputError, match=said):
        out.earlier(resume=False)
    text = (tmp_path / "manifest.json").read_text()
    assert read_manifest(tmp_path) == MANIFEST
    damaged = ("", "{", "[]", "{}", '{"format_version": 2, "configuration": 3}', "[" * 100_000)
    changes = (("0.1", "0.2"), ("files", "fi1es"), ("3", '"3"'), ("[]", "3"), ("stopped", "stoppe"))
    for damage in (*damaged, "\x80", *(text.replace(*change, 1) for change in changes)):
        assert damage != text
        (tmp_path / "manifest.json").write_bytes(damage.encode("latin-1"))
        with pytest.raises(OutputError, match=r"manifest\.json: is damaged; choose a new folder"):
            out.earlier(resume=True)
    out.write_manifest(MANIFEST | {"format_version": 3})
    with pytest.raises(OutputError, match="was written by another version of tfb"):
        out.earlier(resume=True)
    (tmp_path / "manifest.json").rename(tmp_path / "notes")
    (tmp_path / "link").symlink_to("gone")
    for path, message in (
        (tmp_path, "already holds something"),
        (tmp_path / "notes", "a file"),
        (tmp_path / "link", "is a link to nothing"),
    ):
        for resume in (False, True):
            with pytest.raises(OutputError, match=f"{message}; choose a new folder"):
                folder(path).earlier(resume=resume)


@pytest.mark.parametrize("resume", [False, True])
def test_output_of_version_0_1_0_is_refused_by_name(tmp_path: Path, resume: bool) -> None:
    """By its manifest as that version wrote it, or, without one, by the names of its parts."""
    manifest = {
        "status": "stopped",
        "format_version": 1,
        "configuration": {"sigma": 0.1},
        "configuration_sha256": "f00",
        "inputs": ["rows.jsonl"],
        "counts": {"rows": 6, "errors": 0, "truncated": 0, "parts": 1},
    }
    part = tmp_path / "part-00000.jsonl"
    part.write_text('{"id": "r0", "error": null, "key": "0123456789abcdef"}\n')
    for text in (json.dumps(manifest), None):
        path = tmp_path / "manifest.json"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        said = r"by another version of tfb, such as 0\.1\.0, whose parts .*; choose a new folder"
        with pytest.raises(OutputError, match=said):
            folder(tmp_path).earlier(resume=resume)


# --- a full disk ----------------------------------------------------------------------------------


@contextmanager
def full(path: Path) -> Iterator[None]:
    """The kernel finds no space for a file that is written in the place of ``path``."""
    path.with_name(f".{path.name}.partial").symlink_to("/dev/full")
    yield


@contextmanager
def forbidden(path: Path) -> Iterator[None]:
    """There is a folder where the file is written."""
    blocked = path.with_name(f".{path.name}.partial")
    blocked.mkdir()
    yield
    blocked.rmdir()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [(full, r"No space left on device\).*: make room and"), (forbidden, r"\).*: see to it and")],
)
def test_what_cannot_be_written_leaves_what_was(
    tmp_path: Path, fault: Callable[[Path], Any], message: str, kind: str
) -> None:
    """The old files stay, nothing half is left, and the message helps."""
    with folder(tmp_path, kind) as out:
        out.write_part("part-0", [good(0)])
        out.write_manifest(MANIFEST)
        before = {p.name: p.read_bytes() for p in tmp_path.glob("[mp]*")}
        for name, write in (
            (f"part-0.{kind}", lambda: out.write_part("part-0", [good(1)])),
            (f"part-1.{kind}", lambda: out.write_part("part-1", [good(1)])),
            ("manifest.json", lambda: out.write_manifest({})),
        ):
            said = rf"{name}: cannot be written .*{message} continue with resume=True"
            with fault(tmp_path / name), pytest.raises(OutputError, match=said):
                write()
            assert {p.name: p.read_bytes() for p in tmp_path.glob("[mp]*")} == before
            assert not any(tmp_path.glob(".*.partial"))
            assert list(out.finished({"part-0": 1})) == ["part-0"]
        out.write_part("part-1", [good(1)])


def test_types_that_parquet_has() -> None:
    has = [TEXT, pa.list_(pa.float32()), pa.time64("ns"), pa.dictionary(pa.int32(), TEXT)]
    lacks = [
        pa.run_end_encoded(pa.int32(), TEXT),
        pa.month_day_nano_interval(),
        pa.sparse_union([pa.field("a", TEXT)]),
        pa.struct([]),
    ]
    assert all(map(can_hold, has)) and not any(map(can_hold, lacks))


def test_values_as_json_can_say_them() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    values = {1: (float("nan"), [float("-inf"), 2.5]), "b": b"\x01", "d": Decimal("1.50")}
    assert plain(values) == {"1": [None, [None, 2.5]], "b": "01", "d": "1.50"}
    assert plain(now) == "2026-01-02 00:00:00+00:00" and plain(True) is True
    assert as_text("ü") == "ü" and as_text(None) is None and as_text(["ü", 1]) == '["ü", 1]'
