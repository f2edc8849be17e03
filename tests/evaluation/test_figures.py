"""Panels: every kind of curve and of rows can be drawn, in the page's colours, without pyplot."""

from __future__ import annotations

import re
import sys
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from support.fits import fit

from tfb.evaluation import figures
from tfb.evaluation.metrics import Evaluation
from tfb.search.result import CurvePoint

SHAPE = "{http://www.w3.org/2000/svg}"


def evaluation(rows: int = 60) -> Evaluation:
    probs = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    total = torch.special.entr(probs).sum(-1)
    return Evaluation("tfb", "test", probs, torch.arange(rows) % 4, total, 0.3 * total)


def texts(svg: str) -> list[str]:
    """The words of a panel, which has to be well-formed."""
    name = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    root = ElementTree.fromstring(svg.replace("<svg ", f"<svg {name} ", 1))
    return [t.text or "" for t in root.iter(f"{SHAPE}text")]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sigma": 0.0, "limit": None, "objective": "min_nll"},
        {"metric": "accuracy", "limit": 0.9, "interval": (0.0, None)},
        {"interval": None, "metric": "pseudo_nll"},
        {"metric": "embedding_norm", "sigma": 0.015},
        {"curve": (CurvePoint(0.0, 0.8, 0.0, 0.0), CurvePoint(0.02, 0.8, 0.0, 0.0))},
    ],
)
def test_sigma_curves_of_all_kinds_can_be_drawn(changes: dict[str, Any]) -> None:
    words = texts(figures.sigma_panel(fit(**changes)))
    assert "σ" in words and figures.LOSS_LABELS[fit(**changes)["metric"]] in words


def test_sigma_panel_reads_records_of_0_1_0() -> None:
    """Their points say no number of anchors: all of them."""
    record = fit() | {"compat": None, "family": "low_rank"}
    for point in record["curve"]:
        del point["anchors"]
    assert figures.sigma_panel(record).count("<use") == figures.sigma_panel(fit()).count("<use")


def test_points_of_part_of_the_anchors_are_not_on_the_line() -> None:
    """The line of four points has one vertex fewer where one of them is of part of the anchors."""

    def vertices(anchors: int) -> list[int]:
        losses = ((0.0, 0.8, 60), (0.01, 0.7, anchors), (0.02, 0.8, 60), (0.03, 0.9, 60))
        curve = tuple(CurvePoint(s, loss, 0.01, 0.0, n) for s, loss, n in losses)
        svg = figures.sigma_panel(fit(curve=curve, interval=None, limit=None))
        lines = re.findall(r'd="([^"]*)"[^>]*style="[^"]*stroke: var\(--after\)', svg)
        return [len(re.findall("[ML] ", path)) for path in lines]

    assert max(vertices(60)) == 4 and max(vertices(15)) == 3


@pytest.mark.parametrize("sigma", [0.0, 0.02])
def test_the_deciding_part_fills_the_panel(sigma: float) -> None:
    """The loss at 0, the limit and the answer are inside; the far end, where it is 3, is not."""
    record = fit(sigma=sigma)
    low, high = figures.shown_losses(record, record["curve"])
    assert low < 0.7 < 0.8024 < high < 3.0


@pytest.mark.parametrize(("rows", "dots"), [(1, 1), (34, 2), (600, 10)])
def test_reliability_counts_rows_and_has_few_bins_for_few(rows: int, dots: int) -> None:
    words = texts(figures.reliability_panel(evaluation(rows), "after"))
    counts = [int(w) for w in words if w.isdigit()]
    assert sum(counts) == rows and 1 <= len(counts) <= dots


def test_rows_that_are_all_right_or_alike_can_be_drawn() -> None:
    zeros = torch.zeros(2)
    probs = torch.tensor([[1.0, 0.0]] * 2)
    e = Evaluation("sure", "d", probs, torch.tensor([0, 0]), zeros, zeros)
    figures.reliability_panel(e, "before")
    figures.risk_coverage_panel({"before": e})
    figures.uncertainty_panel({"right": zeros, "wrong": zeros[:0], "ood": zeros}, "total", 10)


def test_panels_take_colours_and_font_from_the_page() -> None:
    svg = figures.risk_coverage_panel({"before": evaluation(), "after": evaluation(30)})
    assert {"var(--before)", "var(--after)", "var(--soft)"} <= set(re.findall(r"var\([^)]*\)", svg))
    assert "#0000" not in svg and "font-family" not in svg and "<style" not in svg
    other = figures.uncertainty_panel({"right": torch.rand(30)}, "total", 10)
    ids = [set(re.findall(r'id="([^"]*)"', x)) for x in (svg, other)]
    assert not ids[0] & ids[1]  # both stand in one page


def test_pyplot_is_not_imported() -> None:
    """A caller's own plotting state is untouched."""
    known = set(sys.modules)
    figures.sigma_panel(fit())
    assert "matplotlib.pyplot" not in set(sys.modules) - known


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'matplotlib, which .*pip install "tfb\[report\]"'):
        figures.require_matplotlib()
