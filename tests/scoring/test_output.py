"""Part files and manifests: whole or not there, and what can be told from them."""

from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tfb.scoring.output import (
    FORMATS,
    OutputError,
    OutputFolder,
    as_text,
    holds_something,
    part_schema,
    plain,
    read_manifest,
)

KEPT = {"when": pa.timestamp("us"), "note": pa.string()}


def folder(path: Path, file_format: str = "parquet") -> OutputFolder:
    return OutputFolder(path, part_schema(KEPT), tuple(KEPT), file_format)


def good(n: int) -> dict[str, Any]:
    return {
        "id": f"r{n}", "when": datetime(2026, 1, 2), "note": {"a": [n]}, "prediction": 0,
        "choice": "A", "probs": [0.75, 0.25], "total": 0.5, "draws": 4, "label": None,
        "error": None, "key": f"{n:016x}",
    }  # fmt: skip


def bad(n: int) -> dict[str, Any]:
    return {"id": None if n % 2 else f"r{n}", "error": "bad", "key": f"{n:016x}"}


def name_hash(name: str) -> int:
    return 1000 + int(name[1:])


def test_schema() -> None:
    names = part_schema({"a": pa.int8()}, truncated=True, per_draw=True, logits=True).names
    assert names == [
        "id", "a", "prediction", "choice", "probs", "total", "aleatoric", "epistemic", "agreement",
        "standard_error", "draws", "label", "truncated", "draw_probs", "draw_logits", "error",
        "key",
    ]  # fmt: skip
    assert "truncated" not in part_schema({}).names
    with pytest.raises(ValueError, match="--keep error: the output has a column of that name"):
        part_schema({"error": pa.string()})


def test_both_formats(tmp_path: Path) -> None:
    """Every column in every row; what has no type is JSON in Parquet, itself in JSONL."""
    for file_format in FORMATS:
        with folder(tmp_path / file_format, file_format) as out:
            path = out.write_part(3, [good(0), bad(1)])
            assert path.name == f"part-00003.{file_format}"
            names = out.schema.names
    table = pq.read_table(tmp_path / "parquet" / "part-00003.parquet")
    assert table.schema.names == names
    first, second = table.to_pylist()
    assert first["note"] == '{"a": [0]}' and first["when"] == datetime(2026, 1, 2)
    lines = (tmp_path / "jsonl" / "part-00003.jsonl").read_text().splitlines()
    one, two = map(json.loads, lines)
    assert list(one) == list(two) == names
    assert one == first | {"note": {"a": [0]}, "when": "2026-01-02 00:00:00"}
    assert two == second and two["probs"] is None and two["error"] == "bad"


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_is_finished(tmp_path: Path, file_format: str) -> None:
    with folder(tmp_path, file_format) as out:
        out.write_part(2, [good(0), bad(1)])
        out.write_part(0, [bad(2), bad(3)])
        out.write_part(5, [good(4)])
        assert [int(p.stem[5:]) for p in out.parts()] == [0, 2, 5]
        free = iter(out.free_numbers())
        assert [next(free) for _ in range(4)] == [1, 3, 4, 6]
        every, fine = out.finished(name_hash), out.finished(name_hash, errors=False)
        assert (every.rows, every.errors, fine.rows, fine.errors) == (5, 3, 2, 0)
        assert every.keys.contains(range(6)) == [True] * 5 + [False]
        assert fine.keys.contains(range(6)) == [True, False, False, False, True, False]
        assert every.ids.contains([1000, 1002, 1004, 1001]) == [True] * 3 + [False]
        before = (tmp_path / f"part-00005.{file_format}").read_bytes()
        assert out.drop_errors() == 3
        assert [int(p.stem[5:]) for p in out.parts()] == [2, 5]
        assert out.finished(name_hash).rows == 2 == len(out.finished(name_hash).keys)
        assert (tmp_path / f"part-00005.{file_format}").read_bytes() == before


@pytest.mark.parametrize("file_format", FORMATS)
def test_damaged_and_copied_parts_are_refused(tmp_path: Path, file_format: str) -> None:
    with folder(tmp_path, file_format) as out:
        path = out.write_part(0, [good(0), good(1)])
        copy = tmp_path / f"part-00007.{file_format}"
        copy.write_bytes(path.read_bytes())
        with pytest.raises(OutputError, match="2 rows stand there twice; a part was copied"):
            out.finished(name_hash)
        copy.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(OutputError, match=rf"{copy.name}: is damaged .*remove this part"):
            out.finished(name_hash)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with folder(tmp_path), pytest.raises(OutputError, match="another run is writing to it"):
        folder(tmp_path).__enter__()
    with folder(tmp_path):
        assert read_manifest(tmp_path) is None


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".part-00001.parquet.partial").write_bytes(b"half")
    (tmp_path / ".lock").touch()
    assert not holds_something(tmp_path) and not holds_something(tmp_path / "absent")
    with folder(tmp_path) as out:
        assert [p.name for p in tmp_path.iterdir()] == [".lock"] and not out.parts()
    (tmp_path / "notes").touch()
    assert holds_something(tmp_path) and holds_something(tmp_path / "notes")


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whichever step fails, the old file stays, nothing half is left, and the message helps."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class FullFile:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return full if name == "write" else getattr(self._file, name)

        def __enter__(self) -> FullFile:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

    with folder(tmp_path) as out:
        out.write_part(0, [good(0)])
        out.write_manifest({"configuration": {}, "counts": 1})
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        with monkeypatch.context() as patch:
            if call == "write":
                opened = Path.open
                patch.setattr(Path, "open", lambda *a, **k: FullFile(opened(*a, **k)))
            else:
                patch.setattr(os, call, full)
            for write in (
                lambda: out.write_part(1, [good(1)]),
                lambda: out.write_manifest({"configuration": {}, "counts": 2}),
            ):
                with pytest.raises(OutputError, match=r"No space left on device\).*--resume"):
                    write()
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_manifest(tmp_path: Path) -> None:
    with folder(tmp_path) as out:
        out.write_manifest({"configuration": {"sigma": 0.1}})
        assert read_manifest(tmp_path) == {"configuration": {"sigma": 0.1}}
    for text in ("{", "[]", "{}", '{"configuration": 3}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(OutputError, match=r"manifest\.json: is damaged"):
            read_manifest(tmp_path)


def test_values_as_json_can_say_them() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    assert plain({1: (float("nan"), [float("-inf"), 2.5]), "b": b"\x01", "d": Decimal("1.50")}) == {
        "1": [None, [None, 2.5]], "b": "01", "d": "1.50",
    }  # fmt: skip
    assert plain(now) == "2026-01-02 00:00:00+00:00" and plain(True) is True
    assert as_text("ü") == "ü" and as_text(None) is None and as_text(["ü", 1]) == '["ü", 1]'
