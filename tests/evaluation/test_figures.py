"""Pictures: all kinds of curves and of rows can be drawn, without touching pyplot."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import fits
import pytest
import torch

from tfb.evaluation import figures
from tfb.evaluation.metrics import Evaluation
from tfb.search.result import CurvePoint

NAN = float("nan")


def fit(**changes: Any) -> dict[str, Any]:
    return fits.fit(**{"interval": (0.01, 0.03), **changes})


def size(path: Path) -> tuple[int, int]:
    png = path.read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


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
def test_sigma_curves_of_all_kinds_can_be_drawn(tmp_path: Path, changes: dict[str, Any]) -> None:
    figures.plot_sigma_curve(fit(**changes), tmp_path / "a.png")
    assert size(tmp_path / "a.png")[0] >= 600


@pytest.mark.parametrize("sigma", [0.0, 0.02])
@pytest.mark.parametrize("error", [0.0, 0.01, 100.0])
def test_the_deciding_part_fills_the_picture(sigma: float, error: float) -> None:
    """The loss at 0, the limit and the answer are inside, whatever the bars; the far end, where
    the loss is 3, is not."""
    curve = fit(sigma=sigma)
    low, high = figures._deciding_range(curve, [error] * 5)
    assert low < 0.7 < 0.8024 < high < 3.0


def test_two_rows_of_one_kind_can_be_drawn(tmp_path: Path) -> None:
    """Nothing wrong, every uncertainty 0, and fewer rows than the first share."""
    zeros = torch.zeros(2)
    e = Evaluation("tfb", "d", torch.tensor([[1.0, 0.0]] * 2), torch.tensor([0, 0]), zeros, zeros,
                   zeros)  # fmt: skip
    figures.plot_risk_coverage([e], tmp_path / "a.png")
    figures.plot_shift([e], [replace(e, dataset="other", labels=None)], tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert min(size(tmp_path / name)) >= 300


def test_counterpart_is_the_same_method_on_the_first_data_set() -> None:
    probs = torch.tensor([[0.5, 0.5]])
    found = [Evaluation(n, d, probs) for d in ("first", "second") for n in ("a", "b")]
    assert figures.counterpart(found, Evaluation("b", "other", probs)) is found[1]
