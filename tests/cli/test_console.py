"""Progress where there is no terminal."""

from __future__ import annotations

import pytest

from tfb.cli import console
from tfb.cli.console import progress_bar


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("working", 3) as bar:
        for _ in range(3):
            bar.advance(1)
    assert capsys.readouterr() == ("", "")


def test_long_work_prints_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stderr, soon, every 30 seconds and at the end: what is done, of how much, since when."""
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with progress_bar("scoring") as bar:
        for done, now in ((5, 104.0), (10, 106.0), (900, 131.0), (1020, 136.0), (1900, 162.0)):  # noqa: B007
            bar.update(done, 2000, f"{done // 1000} errors")
        now = 170.0
        bar.update(2000, 2000)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "scoring: 10 of 2,000, 0 errors, 6 s",
        "scoring: 1,020 of 2,000, 1 errors, 36 s",
        "scoring: 2,000 of 2,000, 70 s",
    ]
