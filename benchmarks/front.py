"""The README's picture: reliability before and after, and throughput against the naive loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calibration.tables import JOINT
from benchmarks.markdown import Row

BEFORE, AFTER, CHEAPER = "#777777", "#0072B2", "#009E73"  # Okabe and Ito's palette
LEAST_ROWS = 30  # of a bin that is shown: below, an accuracy is known to no better than 9 points
CHEAPER_WAYS = {
    "quarter_10": "last quarter of the blocks",
    "ours": "last position (tail)",
    "last_10": "last layer",
}
RELIABILITY = (("mle", BEFORE, "the adapter"), (JOINT, AFTER, "σ and T fitted"))


def plot_front(
    reliability: Sequence[Row], predict: Sequence[Row], passes: Sequence[Row], target: Path
) -> None:
    """Draw a line for each task, before and after, and a bar for each way to draw ten samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    *pair, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    for axes, (method, colour, title) in zip(pair, RELIABILITY, strict=True):
        _reliability(axes, [r for r in reliability if r["point"]["method"] == method], colour)
        axes.set_title(title, fontsize=11)
    pair[0].set_ylabel("accuracy (%)")
    _throughput(right, speedups(predict, passes))
    for axes in (*pair, right):
        axes.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=160)


def curve(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean confidence and accuracy of the bins of all seeds together, in percent."""
    counts, accuracy, confidence = (
        np.array([r[name] for r in rows], dtype=float)
        for name in ("counts", "accuracy", "confidence")
    )
    in_all = counts.sum(0)
    shown = in_all >= LEAST_ROWS
    x, y = ((v * counts).sum(0)[shown] / in_all[shown] for v in (confidence, accuracy))
    return 100 * x, 100 * y


def speedups(
    predict: Sequence[Row], passes: Sequence[Row]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return rows a second over the naive loop's: of full mode by model, of confined noise."""
    full = {row["point"]["model"]: row["ratios"]["naive"]["median"] for row in predict}
    own = {r["measure"]: r for r in passes if r["point"].get("adapter") == "r16-all"}
    full[own["predict"]["point"]["model"]] = own["predict"]["ratios"]["naive"]["median"]
    naive, units = (own[k]["in_units_of"]["ratios"] for k in ("predict", "ways"))
    confined = {
        label: naive["naive"]["median"] / units[key]["median"]
        for key, label in CHEAPER_WAYS.items()
    }
    return full, confined


def _reliability(axes: Any, rows: Sequence[Row], colour: str) -> None:
    axes.plot([0, 100], [0, 100], color="black", linewidth=0.8, linestyle=":")
    for task in dict.fromkeys(r["point"]["task"] for r in rows):
        own = [r for r in rows if r["point"]["task"] == task]
        axes.plot(*curve(own), "o-", color=colour, linewidth=1.3, markersize=3, alpha=0.85)
    axes.set(xlabel="confidence (%)", xlim=(0, 100), ylim=(0, 100))
    axes.set_aspect("equal")


def _throughput(axes: Any, groups: Sequence[dict[str, float]]) -> None:
    titles, place = ("full mode", "noise confined to the ..."), 0
    names = [name for found in groups for name in found]
    for found, colour, title in zip(groups, (AFTER, CHEAPER), titles, strict=True):
        axes.barh(range(place, place + len(found)), found.values(), color=colour, label=title)
        for value in found.values():
            axes.annotate(f" {value:.1f}×", (value, place), va="center", fontsize=9)
            place += 1
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(place), names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    axes.set_title("rows a second, 10 draws, CPU", fontsize=11)
    axes.set_xlabel("times those of a naive loop")
