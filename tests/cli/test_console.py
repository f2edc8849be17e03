"""What is printed, and progress where there is no terminal."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tfb.cli import console
from tfb.cli.console import fail, note, print_metrics, progress_bar, say
from tfb.evaluation.metrics import Evaluation


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


def test_names_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No markup, no emoji, nothing that moves a terminal's cursor; in tables and bars as well."""
    name = "[b]a[/x] :cat:"
    for print_line, begin in ((say, ""), (note, "note: "), (fail, "error: ")):
        print_line(f"{name}\x1b[2J\x9b")
        assert "".join(capsys.readouterr()) == f"{begin}{name}\\x1b[2J\\x9b\n"
    labels = torch.tensor([0, 1])
    print_metrics([Evaluation(name, f"{name}\x1b", torch.eye(2, dtype=torch.float64), labels)])
    assert f"{name}\\x1b │ {name} │" in capsys.readouterr().out
    monkeypatch.setattr(
        console, "console", partial(console.console, force_terminal=True, color_system=None)
    )
    with progress_bar(name, 2) as bar:
        bar.update(1, 2)
    assert name in capsys.readouterr().err
