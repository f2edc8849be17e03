"""``tfb verify``: one line if all is well, else a line for each fault."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.artifacts import digits_artifact
from support.command import Run
from support.scoring import ROWS, write

from tfb.scoring.output import locked


@pytest.fixture
def scored(tfb_command: Run, tmp_path: Path) -> Path:
    """Five parts of seven rows, two of them errors; the artifact and the input are gone."""
    rows = write(tmp_path / "rows.jsonl", [*ROWS[:5], "{oops", {"id": "x"}])
    options = ("--part-rows", 2, "--draws", 2, "--max-error-rate", 1, "--format", "jsonl")
    artifact = digits_artifact(tmp_path)
    code, _, err = tfb_command("score", artifact, rows, "-o", tmp_path / "[red]out", *options)
    assert code == 0, err
    rows.unlink()
    artifact.rename(tmp_path / "elsewhere")
    return tmp_path / "[red]out"


def test_all_is_well(tfb_command: Run, scored: Path) -> None:
    said = "verified: 4 parts, 7 rows, 2 errors\n"
    assert tfb_command("verify", scored) == (0, said, "")
    (scored / ".lock").unlink()
    (scored / "README").write_text("mine")
    assert tfb_command("verify", scored) == (0, said, "")


def test_a_line_for_each_fault(tfb_command: Run, scored: Path) -> None:
    with locked(scored):
        code, _, err = tfb_command("verify", scored)
    assert code == 1 and err == f"error: {scored}: another run is writing to it; wait for it\n"
    parts = sorted(scored.glob("part-*"))
    parts[0].write_bytes(parts[0].read_bytes().replace(b"0", b"1", 1))
    parts[1].unlink()
    code, out, err = tfb_command("verify", scored)
    damaged, missing = err.splitlines()
    assert code == 1 and out == ""
    assert damaged == (
        f"error: {parts[0]}: is damaged (its bytes are not those of SHA256SUMS); remove this part, "
        "its rows are then scored again"
    )
    assert missing == (
        f"error: {scored}: 1 of 4 parts are missing ({parts[1].name}); score them with --resume"
    )
    manifest = scored / "manifest.json"
    manifest.write_text(manifest.read_text().replace(": 7", ": 8"))
    code, _, err = tfb_command("verify", scored)
    said = "is damaged; choose a new folder, or put a copy of it back"
    assert code == 1 and err == f"error: {manifest}: {said}\n"
