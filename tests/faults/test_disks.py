"""A disk that is full, or cannot be written, at any file and any byte."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from faults.cases import promised
from support.children import Children
from support.scoring import DONE, files, small_job

from tfb.scoring import run as offline
from tfb.scoring.job import Job
from tfb.scoring.output import OutputError
from tfb.scoring.run import run

WHOLE = (
    "a refusal that names the file and the remedy; what was finished is kept, nothing half-written "
    "is left, and resumed all parts are byte for byte those of an undisturbed run"
)


@promised(
    "the disk is full",
    WHOLE,
    {
        "the first manifest": ("manifest.json", False),
        "the second manifest": ("manifest.json", True),
        "the first part": ("part", False),
        "the second part": ("part", True),
    },
)
def test_a_full_disk(
    job: Job, whole: dict[str, bytes], fault: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has no space for the first or a later file."""
    name, begun = fault
    name = name if name == "manifest.json" else list(whole)[begun]
    at = Path(job.output) / f".{name}.partial"
    here = offline.ENGINES["local"]

    def engine(job: Job) -> Any:
        at.symlink_to("/dev/full")
        return here(job)

    with monkeypatch.context() as patch:
        if not begun:
            patch.setitem(offline.ENGINES, "local", engine)
        said = rf"{name}: cannot be written \(No space left on device\).*: make room and continue"
        with pytest.raises(OutputError, match=said):
            run(job, report=lambda *_: at.symlink_to("/dev/full"))
    parts = begun + (begun and name == "manifest.json")
    assert files(job) == dict(list(whole.items())[:parts]) and not at.is_symlink()
    assert run(job, resume=True) == DONE and files(job) == whole


def run_with_room(artifact: str, folder: str, room: int) -> list[Any]:
    """In a child: what a run says where no file may be larger; whether that helps afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir()
    job = small_job(artifact, Path(folder))
    engine = offline.LocalEngine(job)
    offline.ENGINES["local"] = lambda _: engine
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    try:
        said = str(asdict(run(job)))
    except OutputError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    left = [path.name for path in Path(job.output).glob(".*.partial")]
    before = {name: data.decode() for name, data in files(job).items()}
    assert run(job, resume=True) == DONE
    after = {name: data.decode() for name, data in files(job).items()}
    return [said, left, before, after]


@promised(
    "the disk is full",
    WHOLE,
    ["any file after 0 to 8,000 bytes (a limit of the kernel's)"],
)
def test_no_room_at_any_byte(
    artifact: str, whole: dict[str, bytes], tmp_path: Path, in_child: Children
) -> None:
    expected = {name: data.decode() for name, data in whole.items()}
    rooms = [0, 1, 100, *range(500, 4001, 500), 8000]
    calls = [(artifact, str(tmp_path / "room"), room) for room in rooms]
    stopped = 0
    for answer, room in zip(
        in_child.each("faults.test_disks:run_with_room", calls), rooms, strict=True
    ):
        assert answer.value is not None, (room, answer)
        said, left, before, after = answer.value
        assert not left and before.items() <= expected.items() and after == expected, room
        if before != expected:
            assert "cannot be written (File too large)" in said and "continue with resume" in said
            stopped += 1
    assert stopped > 5 and before == expected  # the last had room enough


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "out"


def link_to_itself(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop" / "out"


@promised(
    "the output cannot be written",
    "a refusal before or at the first file; nothing is left",
    {
        "a folder of the kernel's": lambda _: Path("/proc/tfb-out"),
        "a folder below a file": below_a_file,
        "a folder below a link to itself": link_to_itself,
        "a name of 300 letters": lambda folder: folder / ("a" * 300),
    },
)
def test_output_that_cannot_be_written(
    job: Job, tmp_path: Path, fault: Callable[[Path], Path]
) -> None:
    output = fault(tmp_path)
    with pytest.raises((OutputError, OSError), match=output.name):
        run(replace(job, output=str(output)))
