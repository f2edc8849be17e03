"""ECE and NLL of every method on every task, from the calibration rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarks.calibration.tables import LABELS, group
from benchmarks.markdown import Row

OTHERS, OURS = "#777777", "#0072B2"  # Okabe and Ito's palette
FAR = 2.0  # times the median method: a point beyond would squeeze the others together
FIGURES = (("nll", "NLL (nats a row)", 1.0), ("ece", "ECE (%)", 100.0))


def plot_calibration(rows: Sequence[Row], target: Path) -> None:
    """Draw a column for each task, a line for each method; bars are deviations over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = group(rows)
    figure = Figure(figsize=(3.0 * len(tasks) + 2.2, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(FIGURES), len(tasks), squeeze=False, sharey=True)
    names = [name for name in LABELS if any(name in methods for methods in tasks.values())]
    for column, (task, methods) in enumerate(tasks.items()):
        for line, (key, label, factor) in enumerate(FIGURES):
            ax = axes[line][column]
            found = {
                name: [factor * r[key] for r in methods.get(name, []) if "left_out" not in r]
                for name in names
            }
            cut = FAR * median(mean(v) for v in found.values() if v)
            if found["mle"]:  # what the others are compared with is never cut off
                cut = max(cut, 1.1 * mean(found["mle"]))
            for place, name in enumerate(names):
                if values := found[name]:
                    _point(ax, place, name, values, cut)
            if found["mle"]:
                ax.axvline(mean(found["mle"]), color=OTHERS, linewidth=0.8, linestyle=":")
            ax.set(xlabel=label, title=task if line == 0 else "")
            ax.set_yticks(range(len(names)), [LABELS[n] for n in names])
            ax.grid(axis="x", linewidth=0.4)
            ax.margins(x=0.12)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)  # shared: the first method on top
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


def _point(ax: Any, place: int, name: str, values: list[float], cut: float) -> None:
    """One method's mean and spread; beyond ``cut`` an arrow at the edge, with the mean as text."""
    colour = OURS if name.startswith(("tfb", "authors")) else OTHERS
    if mean(values) > cut:
        ax.plot(cut, place, ">", color=colour, markersize=6)
        ax.annotate(
            f"{mean(values):.3g}",
            (cut, place),
            xytext=(-6, 0),
            ha="right",
            va="center",
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )
        return
    spread = stdev(values) if len(values) > 1 else None
    ax.errorbar(mean(values), place, xerr=spread, fmt="o", markersize=5, color=colour)
