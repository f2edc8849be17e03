"""Panels: every kind of curve and of rows can be drawn, in the page's colours, without pyplot."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from support.fits import POINTS, TEMPERED, fit

from tfb.evaluation import figures
from tfb.evaluation.metrics import Evaluation
from tfb.search.result import CurvePoint, PredictiveFit

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


def line_of(svg: str) -> list[tuple[float, float]]:
    """The vertices of the line over sigma: of the path that has most of them."""
    paths = re.findall(r'd="([^"]*)"[^>]*style="[^"]*stroke: var\(--after\)', svg)
    points = [re.findall(r"[ML] (\S+) (\S+)", path) for path in paths]
    return [(float(x), float(y)) for x, y in max(points, key=len)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sigma": 0.0, "limit": None, "objective": "min_nll"},
        {"metric": "accuracy", "limit": 0.9, "interval": (0.0, None)},
        {"interval": None, "metric": "pseudo_nll"},
        {"metric": "embedding_norm", "sigma": 0.015},
        {"curve": (CurvePoint(0.0, 0.8, None), CurvePoint(0.02, 0.8, None))},
        {"curve": (CurvePoint(0.0, 0.8, 0.0), CurvePoint(0.0, 0.5, 0.1, 1.6)), "sigma": 0.0},
    ],
)
def test_sigma_curves_of_all_kinds_can_be_drawn(changes: dict[str, Any]) -> None:
    words = texts(figures.sigma_panel(fit(**changes)))
    assert "σ" in words and figures.LOSS_LABELS[fit(**changes)["metric"]] in words


def test_sigma_panel_reads_records_of_0_1_0() -> None:
    """Their points have no temperature, and say no number of anchors: all of them."""
    sidecar = Path(__file__).parents[1] / "adapters" / "artifact-0.1.0" / "tfb.json"
    record = json.loads(sidecar.read_text())["fit"]
    ours = PredictiveFit.from_dict(record).to_dict()
    for point in record["curve"]:
        del point["anchors"]
    shapes = [
        re.findall(r' (?:d|x|y|style)="([^"]*)"', figures.sigma_panel(one))
        for one in (record, ours)
    ]
    assert shapes[0] == shapes[1] and len(line_of(figures.sigma_panel(record))) == 10


def test_points_of_part_of_the_anchors_are_not_on_the_line() -> None:
    """The line of four points has one vertex fewer where one of them is of part of the anchors."""

    def vertices(anchors: int) -> int:
        losses = ((0.0, 0.8, 60), (0.01, 0.7, anchors), (0.02, 0.8, 60), (0.03, 0.9, 60))
        curve = tuple(CurvePoint(s, loss, 0.01, anchors=n) for s, loss, n in losses)
        return len(line_of(figures.sigma_panel(fit(curve=curve, interval=None, limit=None))))

    assert vertices(60) == 4 and vertices(15) == 3


def test_the_adapter_stands_apart_from_sigmas_at_their_temperatures() -> None:
    """One point at sigma = 0 in its own colour, above the line, which begins at the fitted T."""
    svg = figures.sigma_panel(TEMPERED.to_dict())
    use = r'<use [^>]*x="(\S+)" y="(\S+)" style="[^"]*var\(--before\)'
    [(x, y)] = re.findall(use, svg)
    line = line_of(svg)
    assert len(line) == sum(n == TEMPERED.anchors for *_, n in POINTS) - 1
    assert float(x) == line[0][0] < line[1][0]
    # Heights are in proportion to the loss; they have six decimals and are tens of points.
    adapter, start, answer = TEMPERED.baseline, POINTS[1][2], TEMPERED.curve[3].loss
    share = (line[0][1] - float(y)) / (line[1][1] - line[0][1])
    assert share == pytest.approx((adapter - start) / (start - answer), rel=1e-6)
    assert not re.findall(use, figures.sigma_panel(fit()))


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
