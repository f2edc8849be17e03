"""The report: pictures and one page, all or nothing, in a folder of its own."""

from __future__ import annotations

import base64
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from markupsafe import escape

from tfb.evaluation import figures, findings, report
from tfb.evaluation.compare import compare
from tfb.evaluation.figures import plot_reliability
from tfb.evaluation.metrics import Evaluation, auroc, evaluate, risk_coverage
from tfb.evaluation.report import PAGE, PICTURES, check_report_folder, write_report

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
    return fits.fit(**{"notes": ("the loss first falls",), **changes})


BOTH = [
    plain(), evaluation(), plain(dataset="shifted"),
    replace(evaluation(dataset="shifted", seed=1), labels=plain().labels),
]  # fmt: skip
SHIFTS = [replace(e, dataset="unfamiliar", labels=None) for e in (plain(), evaluation(seed=2))]


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the page's words: drawing takes most of the time."""
    monkeypatch.setattr(report, "_draw", lambda *_: [])


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(PNG) and png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.012, 0.034), "it lies between 0.012 and 0.034."),
        ((0.012, None), "it is at least 0.012; what was measured shows no upper end."),
        (None, "was not worked out."),
    ],
)
def test_page_states_the_interval(
    tmp_path: Path, interval: tuple[float, float | None] | None, said: str
) -> None:
    page = write_report(tmp_path / "report", [plain()], fit(interval=interval), title="A title")
    assert said in page.read_text()
    assert ("the shaded band its 95 % interval" in page.read_text()) == (interval is not None)


def test_pictures_and_page(tmp_path: Path) -> None:
    page = write_report(
        tmp_path / "new" / "report", BOTH, fit(), title="A title", notes=["So."], shifts=SHIFTS,
        facts={"Seed": "7"},
    )  # fmt: skip
    assert page == tmp_path / "new" / "report" / PAGE
    assert sorted(p.name for p in page.parent.iterdir()) == sorted([*PICTURES, PAGE])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report"]  # no staging folder left
    text = page.read_text()
    embedded = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', text)
    assert len(embedded) == len(PICTURES) and all(len(alt) > 40 for alt, _ in embedded)
    for name, (_, data) in zip(PICTURES, embedded, strict=True):
        png = (page.parent / name).read_bytes()
        assert base64.b64decode(data) == png
        width, height = size(png)
        assert width >= 600 and height >= 300 and len(png) > 5_000  # axes and text, not a blank
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # self-contained
    assert "@import" not in text and "url(" not in text and "<script" not in text
    assert "<title>A title</title>" in text and "<p>So.</p>" in text
    assert "The loss first falls" in text and "σ = 0.02" in text and "141 passes" in text
    assert "<dt>Seed</dt><dd>7</dd>" in text
    assert findings.headline(BOTH, findings.comparisons(BOTH)) in text
    for line in findings.decision(fit()):
        assert escape(line) in text


@pytest.mark.usefixtures("no_pictures")
def test_table_holds_the_metrics_and_marks_the_best(tmp_path: Path) -> None:
    """The first evaluation of a data set is the reference for flips."""
    other = evaluation(seed=3)
    e = replace(plain(), labels=other.labels)
    text = write_report(tmp_path / "r", [e, other], title="t").read_text()
    table = text.split("Figures of each method")[1].split("</table>")[0]
    rows = re.findall(r'<tr><td class="text">test</td><td class="text">(\w+)</td>(.*)</tr>', table)
    assert [name for name, _ in rows] == ["deterministic", "tfb"]
    assert e.labels is not None and other.labels is not None
    first = evaluate(e.probs, e.labels)
    second = evaluate(other.probs, other.labels, reference_predictions=e.probs.argmax(-1))
    assert second.flip_ratio is not None and second.flip_ratio > 0
    for (_, cells), m, x in zip(rows, (first, second), (e, other), strict=True):
        assert x.total is not None
        values = re.findall(r"<td[^>]*>([^<]*)</td>", cells)
        assert values == [
            f"{100 * m.accuracy:.2f}", f"{m.nll:.4f}", f"{100 * m.ece:.2f}", f"{m.brier:.4f}",
            f"{100 * risk_coverage(x.total, x.correct).aurc:.2f}",
            f"{100 * m.miscalibration:+.2f}", f"{100 * (m.flip_ratio or 0):.2f}", "–",
        ]  # fmt: skip
        best = re.findall(r'<td class="best">([^<]*)</td>', cells)
        assert (f"{m.nll:.4f}" in best) == (m.nll == min(first.nll, second.nll))


def test_pictures_that_have_nothing_to_show_are_left_out(tmp_path: Path) -> None:
    bare = replace(plain(), total=None)
    page = write_report(tmp_path / "r", [bare], title="t")
    assert sorted(p.name for p in page.parent.iterdir()) == [PAGE, "reliability.png"]
    text = page.read_text()
    assert text.count("<img") == 1 and "Nothing was compared with it" in text
    for heading in ("How σ was chosen", "Risk–coverage)", "(Uncertainty)", "(Shift)"):
        assert heading not in text


@pytest.mark.usefixtures("no_pictures")
def test_changes_carry_their_limits_and_marks(tmp_path: Path) -> None:
    """The cells are those of tfb.evaluation.compare; only what is beyond noise is marked."""
    sure = replace(plain(), probs=plain().probs.pow(8) / plain().probs.pow(8).sum(-1, keepdim=True))
    changes = compare(sure, evaluation())
    text = write_report(tmp_path / "r", [sure, evaluation()], title="t").read_text()
    table = text.split("Change against")[1].split("</table>")[0]
    cells = re.findall(r"<td( class=\"best\")?>([^<]*)<small>([^<]*)</small></td>", table)
    assert len(cells) == 5 and changes["nll"].beyond_noise and not changes["accuracy"].beyond_noise
    names = ("accuracy", "nll", "ece", "brier", "aurc")
    for name, (mark, change, _) in zip(names, cells, strict=True):
        d, factor = changes[name], 1 if name in ("nll", "brier") else 100
        assert bool(mark) == d.beyond_noise
        assert float(change.replace("−", "-")) == pytest.approx(factor * d.change, abs=0.005)


@pytest.mark.usefixtures("no_pictures")
def test_mean_uncertainties_add_up(tmp_path: Path) -> None:
    text = write_report(tmp_path / "r", [plain(), evaluation()], title="t").read_text()
    table = text.split("total = aleatoric + epistemic")[1].split("</table>")[0]
    rows = re.findall(r'<td class="text">(all|right|wrong)</td>(.*)</tr>', table)
    numbers = {w: [float(x) for x in re.findall(r"<td>([^<]*)</td>", r)] for w, r in rows}
    assert numbers["all"][0] == 60 == numbers["right"][0] + numbers["wrong"][0]
    for _, total, aleatoric, epistemic in numbers.values():
        assert total == pytest.approx(aleatoric + epistemic, abs=0.0015)  # three roundings


@pytest.mark.usefixtures("no_pictures")
def test_shift_is_told_by_auroc(tmp_path: Path) -> None:
    """Unlabelled rows; a method that the first data set lacks is refused."""
    text = write_report(tmp_path / "r", BOTH, title="t", shifts=SHIFTS).read_text()
    table = text.split("Uncertainty on usual and on unfamiliar rows")[1].split("</table>")[0]
    for usual, other in zip(BOTH[:2], SHIFTS, strict=True):
        assert usual.total is not None and other.total is not None
        assert f"<td>{100 * auroc(other.total, usual.total):.1f}</td>" in table
    with pytest.raises(ValueError, match="shifts: other was not evaluated on test"):
        write_report(tmp_path / "s", BOTH, title="t", shifts=[replace(SHIFTS[0], name="other")])
    assert not (tmp_path / "s").exists()


@pytest.mark.usefixtures("no_pictures")
def test_sigma_zero_and_one_class(tmp_path: Path) -> None:
    """Draws that agree in full, and rows that all have one right answer."""
    e = evaluation()
    assert e.total is not None
    flat = replace(e, aleatoric=e.total, epistemic=torch.zeros(60),
                   labels=torch.zeros(60, dtype=torch.int64))  # fmt: skip
    before = replace(plain(), labels=flat.labels)
    zero = fit(sigma=0.0, objective="min_nll", limit=None, interval=(0.0, 0.001))
    text = write_report(tmp_path / "r", [before, flat], zero, title="t").read_text()
    assert "changed nothing on 60 rows of test" in text and "So σ = 0" in text
    assert "have the same right answer" in text and "only 60 rows" in text


def test_all_rows_right_or_alike_can_be_drawn(tmp_path: Path) -> None:
    probs = torch.tensor([[1.0, 0.0]] * 3)
    zeros = torch.zeros(3)
    sure = Evaluation("sure", "d", probs, torch.tensor([0, 0, 0]), zeros, zeros, zeros)
    write_report(tmp_path / "r", [sure], title="t")
    for name in ("uncertainty.png", "risk_coverage.png"):
        assert size((tmp_path / "r" / name).read_bytes())
    assert "<td>–</td>" in (tmp_path / "r" / PAGE).read_text()  # no wrong row to average over


@pytest.mark.parametrize("name", ["<b>x</b> & $a_b$ {{ 1 }}", "a" * 200, r"\alpha $\frac$"])
def test_names_and_titles_are_plain_text(tmp_path: Path, name: str) -> None:
    """No markup in the page, no TeX in the pictures, no template in either."""
    e = evaluation(name, name)
    text = write_report(tmp_path / "r", [e], fit(), title=name, notes=[name]).read_text()
    escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert text.count(escaped) > 5  # title twice, note, two cells, sentences
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
    write_report(folder, BOTH[:2], fit(), title="old")
    page = write_report(folder, [plain()], title="new", overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == [
        PAGE,
        "reliability.png",
        "risk_coverage.png",
    ]
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

    monkeypatch.setattr(report if step == "_page" else figures, step, broken)
    with pytest.raises(RuntimeError, match="no picture"):
        write_report(folder, BOTH[:2], fit(), title="new", overwrite=existing)
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
    write_report(tmp_path / "r", BOTH[:2], fit(), title="t", shifts=SHIFTS)
    assert "matplotlib.pyplot" not in set(sys.modules) - known
