"""Files and folders appear whole, or not at all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from tfb import atomic


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"first", b"", b"second" * 1000):
        atomic.write(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["file"]


def test_json_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep.json"
    atomic.write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]} and path.read_text().endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(path, [float("nan")])
    assert json.loads(path.read_text()) == {"a": [1, None]}


def test_a_disk_that_is_full_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own ENOSPC: what would be the temporary file is /dev/full."""
    path = tmp_path / "file"
    atomic.write(path, b"old")
    (tmp_path / ".file.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        atomic.write(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_folder_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    """With the permissions that any new file has, in an absent or an empty folder."""
    (tmp_path / "empty").mkdir()
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "new" / "deep", tmp_path / "empty"):
        with atomic.staged_folder(path) as staging:
            (staging / "file").write_text("whole")
            assert not path.exists() or not list(path.iterdir())
        assert (path / "file").read_text() == "whole" and os.listdir(path) == ["file"]
        assert stat.S_IMODE((path / "file").stat().st_mode) == 0o666 & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask
        assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic.staged_folder(tmp_path / "new") as staging:
        (staging / "file").write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_taken_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with pytest.raises(OSError, match="not empty"), atomic.staged_folder(path) as staging:
        (staging / "file").write_text("mine")
        path.mkdir()
        (path / "other").write_text("theirs")
    assert os.listdir(tmp_path) == ["new"] and os.listdir(path) == ["other"]
