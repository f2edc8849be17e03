"""The report: one page, whole or not at all, that states each number once and escapes all data."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape
from support.fits import TEMPERED, fit

from tfb.data.rows import Row
from tfb.evaluation import figures
from tfb.evaluation.compare import compare, compare_auroc
from tfb.evaluation.metrics import Evaluation
from tfb.evaluation.report import EXAMPLES, HEAD, PAGE, SCALES, TAIL, page_path, write_report

VOID = {"meta", "br", "input", "link"}


def evaluation(name: str = "tfb", dataset: str = "test", *, seed: int = 0) -> Evaluation:
    """Sixty rows of four classes, right about as often as it claims."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(60, 4, generator=generator).mul(2).softmax(-1)
    labels = torch.multinomial(probs, 1, generator=generator)[:, 0]
    total = torch.special.entr(probs).sum(-1)
    rows = [
        Row(f"{dataset}-{i}", prompt=f"question {i}?", choices=("A", "B", "C", "D"))
        for i in range(60)
    ]
    return Evaluation(name, dataset, probs, labels, total, 0.3 * total, 10, 10.0, rows)


def plain(name: str = "adapter", dataset: str = "test", **changes: Any) -> Evaluation:
    """Another method on the rows of ``evaluation``, without draws."""
    e = evaluation(name, dataset, seed=1)
    changes = {"labels": evaluation().labels, "epistemic": None} | changes
    return replace(e, **changes)


BOTH = [plain(), evaluation()]
OOD = [replace(e, dataset="unfamiliar", labels=None) for e in (plain(), evaluation(seed=2))]


class Page(HTMLParser):
    """The text of a page, tag by tag; raises where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def page(tmp_path: Path, *args: Any, **kwargs: Any) -> str:
    return write_report(tmp_path / "r.html", *args, title="A title", **kwargs).read_text()


def cells(table: str) -> list[list[str]]:
    """The text of each body row's cells, without what the scale means."""
    rows = re.findall(r"<tr><t[hd].*?</tr>", table.split("<tbody>")[1], flags=re.S)
    plain_rows = [re.sub(r'<span class="meaning">.*?</span>', "", row, flags=re.S) for row in rows]
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.S) for row in plain_rows]
    return [[re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", c)).strip() for c in row] for row in found]


def test_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    text = page(tmp_path, BOTH, fit(), ood=OOD, facts={"Seed": "7"})
    found = Page(text)
    assert found.tags.count("svg") == 2 + 1 + 1 + 3  # reliability, risk, sigma, uncertainties
    for number, name in enumerate(("Reliability", "Risk–coverage", "Loss", "Uncertainty"), 1):
        assert f"Figure {number}. {name}" in found.text
    assert not {"script", "img", "link", "iframe"} & set(found.tags)
    assert not re.search(r'(src|href)="(?!#)', text)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "<title>A title</title>" in text and "<dt>Seed</dt><dd>7</dd>" in text
    assert "the loss first falls" in found.text and "σ = 0.02 (objective max_variance; " in text
    assert "mean of 10 draws" in text and "prefers-color-scheme: dark" in text
    assert found.text.index("Flipped") < found.text.index("Figure 1")


@pytest.mark.parametrize("sigma", [0.0, 0.01])
def test_a_fitted_temperature_is_told(tmp_path: Path, sigma: float) -> None:
    """In the header and in the caption, with or without noise; T = 1 goes without saying."""
    text = page(tmp_path / "T", BOTH, replace(TEMPERED, sigma=sigma).to_dict())
    caption = text.split("Figure 3.")[1].split("</figcaption>")[0]
    assert f"σ = {sigma:g} with T = 1.5 (objective min_nll; the loss falls)" in caption
    assert "Every σ has its own temperature of least loss" in caption
    assert "σ = 0 is the adapter" not in caption
    assert f", σ = {sigma:g}, T = 1.5.</p>\n</header>" in text
    legend = '<span class="key before">the adapter</span>'
    assert legend in text
    plain_ = page(tmp_path / "plain", BOTH, fit())
    assert "T = " not in plain_ and legend not in plain_ and "σ = 0 is the adapter" in plain_


def test_every_metric_has_its_change_and_verdict(tmp_path: Path) -> None:
    """Before, after, change and limits of tfb.evaluation.compare; worse is said as better is."""
    text = page(tmp_path, BOTH, ood=OOD)
    rows = cells(text.split('class="verdicts"')[1].split("</table>")[0])
    changes = compare(*BOTH) | {"auroc": compare_auroc((OOD[0], BOTH[0]), (OOD[1], BOTH[1]))}
    assert len(rows) == len(changes) == len(SCALES)
    for row, (name, change) in zip(rows, changes.items(), strict=True):
        scale = SCALES[name]
        assert row[0].startswith(scale.name)
        assert row[1:3] == [scale.write(change.before), scale.write(change.after)]
        low, high = (scale.write(v, "+") for v in (change.low, change.high))
        assert row[3] == f"{scale.write(change.change, '+')} {low} to {high}"
        assert row[4] == scale.verdict(change)
    assert rows[-1][0] == "AUROC of unfamiliar %"


@pytest.mark.parametrize("name", ["accuracy", "nll"])
def test_verdicts(name: str) -> None:
    """Better is up for accuracy and down for NLL."""
    change = compare(*BOTH)[name]
    up = replace(change, before=0.5, after=0.7, low=0.1, high=0.3)
    down = replace(change, before=0.7, after=0.5, low=-0.3, high=-0.1)
    words = ["better", "worse"] if name == "accuracy" else ["worse", "better"]
    assert [SCALES[name].verdict(c) for c in (up, down)] == words
    assert SCALES[name].verdict(replace(up, low=-0.1)) == "within noise"


def test_examples_are_the_flipped_and_the_most_uncertain(tmp_path: Path) -> None:
    before, after = BOTH
    flipped, uncertain = page(tmp_path, BOTH).split("<h3>Most uncertain</h3>")
    flips = before.probs.argmax(-1) != after.probs.argmax(-1)
    count = int(flips.sum())
    gained = int((~before.correct & after.correct).sum())
    assert f"{count} predictions of 60 differ: {gained} became right" in flipped
    ids = re.findall(r'<p class="id">test-(\d+)</p>', flipped)
    assert len(ids) == min(count, EXAMPLES) and all(flips[int(i)] for i in ids)
    assert after.total is not None
    most = after.total.argsort(descending=True)[:EXAMPLES].tolist()
    assert re.findall(r'<p class="id">test-(\d+)</p>', uncertain) == list(map(str, most))
    assert f"question {most[0]}?" in uncertain
    answer = "ABCD"[int(after.probs[most[0]].argmax())]
    shown = re.sub("<[^>]*>", " ", uncertain.split("<li>")[1])
    assert f"{answer}  {100 * float(after.probs[most[0]].max()):.0f} %" in shown


def test_rows_that_are_not_known_are_numbered(tmp_path: Path) -> None:
    bare = [replace(e, rows=()) for e in BOTH]
    text = page(tmp_path, bare)
    assert re.search(r"row \d+", text) and "class 3" in text and "<blockquote>" not in text
    assert "billing" in page(tmp_path / "b", [replace(e, classes=("billing",) * 4) for e in bare])


@pytest.mark.parametrize(
    "row",
    [
        Row("1", text="x" * 1000),
        Row("1", messages=({"role": "user", "content": "x" * 1000},), choices=("A", "B", "C", "D")),
    ],
)
def test_long_texts_are_shortened(tmp_path: Path, row: Row) -> None:
    text = page(tmp_path, [replace(e, rows=[row] * 60) for e in BOTH])
    assert max(map(len, re.findall("x+", text))) == max(HEAD, TAIL)


def test_sigma_zero_stands_once(tmp_path: Path) -> None:
    before = plain()
    same = replace(before, name="tfb", draws=1)
    text = page(tmp_path, [before, same], fit(sigma=0.0, objective="min_nll", limit=None))
    assert "σ = 0: the predictive is the adapter, so every number stands once." in text
    assert text.count("<svg") == 1 + 1 + 1 + 1 and "Verdict" not in text and "Flipped" not in text
    assert all(len(row) == 2 for row in cells(text.split('class="verdicts"')[1]))


def test_one_evaluation_is_described_alone(tmp_path: Path) -> None:
    """Without uncertainty and search two figures have nothing to show; another data set is no
    counterpart."""
    bare = plain(total=None)
    text = page(tmp_path, [bare])
    assert text.count("<svg") == 1 and "Verdict" not in text and "stands once" not in text
    assert "Figure 2." not in text and "Figure 3." not in text and "Figure 4." not in text
    text = page(tmp_path / "b", [bare, plain(dataset="other")])
    assert "Verdict" not in text and "stands once" not in text


def test_other_methods_and_data_sets_are_a_table(tmp_path: Path) -> None:
    """Each beside the first method of its data set."""
    more = [*BOTH, plain("third"), plain(dataset="other"), replace(evaluation(), dataset="other")]
    assert "Every method" not in page(tmp_path / "two", BOTH)
    table = page(tmp_path, more).split("Every method and data set")[1].split("</table>")[0]
    rows = cells(table)
    names = ["test: adapter", "test: tfb", "test: third", "other: adapter", "other: tfb"]
    assert [row[0] for row in rows] == names
    for row, e in zip(rows, more, strict=True):
        first = next(f for f in more if f.dataset == e.dataset)
        changes = compare(first, e)
        written = [SCALES[n].write(c.after) for n, c in changes.items()]
        assert row[2:7] == written and row[7] == "10"
    marks = [bool(re.search(f'class="{word}"', table)) for word in ("better", "worse")]
    verdicts = {
        SCALES[n].verdict(c)
        for e in more
        for n, c in compare(next(f for f in more if f.dataset == e.dataset), e).items()
    }
    assert marks == ["better" in verdicts, "worse" in verdicts]


def test_few_rows_and_one_label_are_said(tmp_path: Path) -> None:
    labels = torch.zeros(60, dtype=torch.int64)
    text = page(tmp_path, [replace(e, labels=labels) for e in BOTH])
    assert "Only 60 rows" in text and "All rows have the same label" in text
    many = replace(
        plain(), probs=plain().probs.repeat(2, 1), labels=torch.arange(120) % 4, total=None, rows=()
    )
    assert "Only" not in page(tmp_path / "b", [many])


HOSTILE = ["<script>alert('x')</script>", '"onload="x', "{{ 1 + 1 }} $a_b$ \\frac", "-->]]>&amp;"]


@pytest.mark.parametrize("word", HOSTILE)
def test_all_data_are_escaped(tmp_path: Path, word: str) -> None:
    """Names, ids, texts, choices, facts, notes: text in the page, and tags that match."""
    row = Row(word, prompt=f"{word} ?", choices=(word,) * 4, label=0)
    found = [
        replace(e, name=f"{word} {i}", dataset=word, rows=[row] * 60) for i, e in enumerate(BOTH)
    ]
    ood = [replace(e, dataset=f"far {word}", labels=None) for e in found]
    text = write_report(
        tmp_path / "r.html",
        found,
        fit(notes=(word,), objective=word),
        title=word,
        ood=ood,
        facts={word: word},
    ).read_text()
    parsed = Page(text)
    usual = Page(page(tmp_path / "usual", BOTH, fit(), ood=OOD, facts={"a": "b"}))
    assert sorted(set(parsed.tags)) == sorted(set(usual.tags))
    assert parsed.text.count(word) > 30 and text.count(str(escape(word))) > 30
    assert word not in text or word == str(escape(word)) or word == HOSTILE[2]


# --- the file -----------------------------------------------------------------------------------


def test_output_is_a_file_or_a_folder_for_it(tmp_path: Path) -> None:
    assert page_path(tmp_path / "new") == tmp_path / "new" / PAGE
    assert page_path(tmp_path / "a" / "b.html") == tmp_path / "a" / "b.html"
    made = write_report(tmp_path / "new" / "folder", BOTH, title="t")
    assert made == tmp_path / "new" / "folder" / PAGE and list(made.parent.iterdir()) == [made]


def test_an_earlier_page_is_replaced_only_if_asked(tmp_path: Path) -> None:
    made = write_report(tmp_path, [plain()], title="old")
    with pytest.raises(ValueError, match=r"index\.html exists already; choose another name"):
        write_report(tmp_path, [plain()], title="new")
    assert "old" in made.read_text()
    write_report(made, [plain()], title="new", overwrite=True)
    assert "<h1>new</h1>" in made.read_text()
    held = tmp_path / "held"
    held.write_text("mine")
    for path in (held, held / "r.html"):  # below a file
        with pytest.raises(ValueError, match="no page can be written there"):
            page_path(path, overwrite=True)


@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_things_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    file = tmp_path / "r.html"
    if existing:
        file.write_text("old")

    def broken(*_: Any) -> str:
        raise RuntimeError("no figure")

    monkeypatch.setattr(figures, "uncertainty_panel", broken)
    with pytest.raises(RuntimeError, match="no figure"):
        write_report(file, BOTH, fit(), title="new", overwrite=existing)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"] * existing


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one evaluation"):
        page(tmp_path, [])
    with pytest.raises(ValueError, match="tfb on oos: no labels; a report needs them"):
        page(tmp_path, [plain(), replace(evaluation(dataset="oos"), labels=None)])
    with pytest.raises(ValueError, match="ood: other was not evaluated on test"):
        page(tmp_path, BOTH, ood=[replace(OOD[0], name="other")])
    assert not list(tmp_path.iterdir())
