"""The report: three pictures and one page, all or nothing, in a folder of its own."""

from __future__ import annotations

import base64
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tfb import report
from tfb.metrics import Evaluation, evaluate
from tfb.report import PAGE, PICTURES, check_report_folder, plot_reliability, write_report
from tfb.search import CurvePoint, SigmaFit

PNG = b"\x89PNG\r\n\x1a\n"


def evaluation(name: str = "tfb", dataset: str = "test", *, seed: int = 0) -> Evaluation:
    """Sixty rows of four classes, right about as often as it claims."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(60, 4, generator=generator).mul(2).softmax(-1)
    labels = torch.multinomial(probs, 1, generator=generator)[:, 0]
    entropy = torch.special.entr(probs).sum(-1)
    return Evaluation(name, dataset, probs, labels, entropy, 0.7 * entropy, 0.3 * entropy)


def plain(name: str = "deterministic", dataset: str = "test") -> Evaluation:
    return replace(evaluation(name, dataset), aleatoric=None, epistemic=None)


def fit(**changes: Any) -> dict[str, Any]:
    losses = [(0.0, 0.8), (0.001, 0.79), (0.01, 0.7), (0.02, 0.8), (0.1, 3.0)]
    found = SigmaFit(
        sigma=0.02, metric="nll", objective="max_variance", tolerance=0.003, relative=True,
        two_sided=False, search="grid", mode="full", draws=10, seed=0, anchors=60,
        anchor_hash="0" * 64, baseline=0.8, limit=0.8024,
        curve=tuple(CurvePoint(s, loss, 0.01, float("nan")) for s, loss in losses),
        passes=141.0, stopped="crossing bracketed", notes=("the loss first falls",),
    )  # fmt: skip
    return replace(found, **changes).to_dict()


BOTH = [plain(), evaluation(), plain(dataset="shifted"), evaluation(dataset="shifted", seed=1)]


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(PNG) and png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.012, 0.034), "0.012 to\n0.034."),
        ((0.012, None), "0.012 to\nbeyond what was measured."),
        (None, None),
    ],
)
def test_page_states_the_interval(
    tmp_path: Path, interval: tuple[float, float | None] | None, said: str | None
) -> None:
    page = write_report(tmp_path / "report", [plain()], fit(interval=interval), title="A title")
    text = page.read_text()
    assert ("95 % interval over anchors and draws" in text) == (interval is not None)
    assert said is None or said in text


def test_pictures_and_page(tmp_path: Path) -> None:
    page = write_report(tmp_path / "new" / "report", BOTH, fit(), title="A title", notes=["So."])
    assert page == tmp_path / "new" / "report" / PAGE
    assert sorted(p.name for p in page.parent.iterdir()) == sorted([*PICTURES, PAGE])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report"]  # no staging folder left
    text = page.read_text()
    embedded = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', text)
    assert [name for name, _ in embedded] == list(PICTURES)
    for name, data in embedded:
        png = (page.parent / name).read_bytes()
        assert base64.b64decode(data) == png
        width, height = size(png)
        assert width >= 600 and height >= 300 and len(png) > 5_000  # axes and text, not a blank
    assert not re.search(r'(src|href)="(?!data:)', text)  # self-contained
    assert "<title>A title</title>" in text and "<p>So.</p>" in text
    assert "the loss first falls" in text and "σ = 0.02" in text and "141 passes" in text


def test_table_holds_the_metrics_and_marks_the_best(tmp_path: Path) -> None:
    """The first evaluation of a data set is the reference for flips."""
    other = evaluation(seed=3)
    e = replace(plain(), labels=other.labels)
    text = write_report(tmp_path / "r", [e, other], title="t").read_text()
    rows = re.findall(r"<tr><td>test</td><td>(\w+)</td>(.*)</tr>", text)
    assert [name for name, _ in rows] == ["deterministic", "tfb"]
    assert e.labels is not None and other.labels is not None
    first = evaluate(e.probs, e.labels)
    second = evaluate(other.probs, other.labels, reference_predictions=e.probs.argmax(-1))
    assert second.flip_ratio is not None and second.flip_ratio > 0
    for (_, cells), m in zip(rows, (first, second), strict=True):
        values = re.findall(r"<td[^>]*>([^<]*)</td>", cells)
        assert values == [
            f"{100 * m.accuracy:.2f}", f"{m.nll:.4f}", f"{100 * m.ece:.2f}", f"{m.brier:.4f}",
            f"{100 * m.miscalibration:+.2f}", f"{100 * (m.flip_ratio or 0):.2f}",
        ]  # fmt: skip
        best = re.findall(r'<td class="best">([^<]*)</td>', cells)
        assert (f"{m.nll:.4f}" in best) == (m.nll == min(first.nll, second.nll))


def test_pictures_that_have_nothing_to_show_are_left_out(tmp_path: Path) -> None:
    page = write_report(tmp_path / "r", [plain()], title="t")
    assert sorted(p.name for p in page.parent.iterdir()) == [PAGE, "reliability.png"]
    assert page.read_text().count("<img") == 1 and "Chosen on" not in page.read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sigma": 0.0, "limit": None, "objective": "min_nll"},
        {"metric": "accuracy", "limit": 0.9},
        {"metric": "embedding_norm", "sigma": 0.015},
        {"curve": (CurvePoint(0.0, 0.8, 0.0, 0.0), CurvePoint(0.02, 0.8, 0.0, 0.0))},
    ],
)
def test_sigma_curves_of_all_kinds_can_be_drawn(tmp_path: Path, changes: dict[str, Any]) -> None:
    report.plot_sigma_curve(fit(**changes), tmp_path / "a.png")
    assert size((tmp_path / "a.png").read_bytes())[0] >= 600


def test_all_rows_right_or_alike_can_be_drawn(tmp_path: Path) -> None:
    probs = torch.tensor([[1.0, 0.0]] * 3)
    zeros = torch.zeros(3)
    sure = Evaluation("sure", "d", probs, torch.tensor([0, 0, 0]), zeros, zeros, zeros)
    write_report(tmp_path / "r", [sure], title="t")
    assert size((tmp_path / "r" / "uncertainty.png").read_bytes())


@pytest.mark.parametrize("name", ["<b>x</b> & $a_b$ {{ 1 }}", "a" * 200, r"\alpha $\frac$"])
def test_names_and_titles_are_plain_text(tmp_path: Path, name: str) -> None:
    """No markup in the page, no TeX in the pictures, no template in either."""
    e = evaluation(name, name)
    text = write_report(tmp_path / "r", [e], fit(), title=name, notes=[name]).read_text()
    escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert text.count(escaped) == 5  # title twice, note, two cells
    assert "<b>x" not in text


# --- the folder ---------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    write_report(used, [plain()], title="t")  # empty: may be used
    for overwrite in (False, True):
        (used / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="used already holds something; choose a new folder"):
            write_report(used, [plain()], title="t", overwrite=overwrite)
    (used / "notes.txt").unlink()
    with pytest.raises(ValueError, match="used already holds something"):
        write_report(used, [plain()], title="t")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="file already holds something"):
        check_report_folder(file, overwrite=True)
    assert file.read_text() == "mine" and check_report_folder(tmp_path / "new").name == "new"


def test_overwrite_replaces_an_earlier_report(tmp_path: Path) -> None:
    """All of it: a picture that the new report lacks does not stay behind."""
    folder = tmp_path / "r"
    write_report(folder, BOTH, fit(), title="old")
    page = write_report(folder, [plain()], title="new", overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == [PAGE, "reliability.png"]
    assert "<h1>new</h1>" in page.read_text()


@pytest.mark.parametrize(
    ("step", "existing"),
    [("plot_reliability", False), ("plot_uncertainty", False), ("_page", False), ("_page", True)],
)
def test_failure_leaves_things_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, existing: bool
) -> None:
    folder = tmp_path / "r"
    if existing:
        write_report(folder, [plain()], title="old")
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr(report, step, broken)
    with pytest.raises(RuntimeError, match="no picture"):
        write_report(folder, BOTH, fit(), title="new", overwrite=existing)
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before
    assert folder.exists() == existing and len(list(tmp_path.iterdir())) == existing


def test_evaluations_without_labels_or_none_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one evaluation"):
        write_report(tmp_path / "r", [], title="t")
    with pytest.raises(ValueError, match="tfb on oos: no labels; a report needs them"):
        write_report(
            tmp_path / "r", [plain(), replace(evaluation(dataset="oos"), labels=None)], title="t"
        )
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'matplotlib, which .*pip install "tfb\[report\]"'):
        plot_reliability([plain()], tmp_path / "a.png")


def test_pyplot_is_not_imported(tmp_path: Path) -> None:
    """A caller's own plotting state is untouched."""
    known = set(sys.modules)
    write_report(tmp_path / "r", BOTH, fit(), title="t")
    assert "matplotlib.pyplot" not in set(sys.modules) - known
