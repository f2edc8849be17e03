"""Part files and manifests: whole or not there, and what can be told from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tfb.scoring.output import (
    FORMATS,
    Counts,
    OutputError,
    OutputFolder,
    as_text,
    plain,
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
        copy.rename(tmp_path / f"part-2.{kind}")
        with pytest.raises(OutputError, match=r"part-2.*: holds 2 rows, expected 1; remove this"):
            out.finished(sizes)
        (tmp_path / f"part-2.{kind}").write_bytes(part.read_bytes()[:-30])
        with pytest.raises(OutputError, match=r"part-2.*: is damaged .*remove this part"):
            out.finished(sizes)
    (tmp_path / f"part-2.{kind}").unlink()
    other = "jsonl" if kind == "parquet" else "parquet"
    with folder(tmp_path, other) as out, pytest.raises(OutputError, match="is no part of this run"):
        out.finished(sizes)


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
    for text in ("{", "[]", "{}", '{"format_version": 2, "configuration": 3}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(OutputError, match=r"manifest\.json: is damaged; choose a new folder"):
            out.earlier(resume=True)
    (tmp_path / "manifest.json").rename(tmp_path / "notes")
    for path, message in ((tmp_path, "already holds something"), (tmp_path / "notes", "a file")):
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
        said = r"was written by tfb 0\.1\.0, whose parts .* cannot continue; choose a new folder"
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
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        for name, write in (
            (f"part-0.{kind}", lambda: out.write_part("part-0", [good(1)])),
            (f"part-1.{kind}", lambda: out.write_part("part-1", [good(1)])),
            ("manifest.json", lambda: out.write_manifest({})),
        ):
            said = rf"{name}: cannot be written .*{message} continue with resume=True"
            with fault(tmp_path / name), pytest.raises(OutputError, match=said):
                write()
            assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
        out.write_part("part-1", [good(1)])


def test_values_as_json_can_say_them() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    values = {1: (float("nan"), [float("-inf"), 2.5]), "b": b"\x01", "d": Decimal("1.50")}
    assert plain(values) == {"1": [None, [None, 2.5]], "b": "01", "d": "1.50"}
    assert plain(now) == "2026-01-02 00:00:00+00:00" and plain(True) is True
    assert as_text("ü") == "ü" and as_text(None) is None and as_text(["ü", 1]) == '["ü", 1]'
