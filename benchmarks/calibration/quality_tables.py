"""Table and picture of what draws buy beside what they cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.markdown import Row, table, taken_on


def quality_table(rows: Sequence[Row]) -> str:
    """What draws buy, beside what they cost."""
    if not rows:
        return (
            "*Not run yet: `python -m benchmarks.quality --record` (twenty minutes, two quiet "
            "cores).*"
        )
    body = [
        [
            r["point"]["method"], f"{r['passes']:.2f}", f"{r['nll']:.3f}", f"{100 * r['ece']:.1f}",
            f"{100 * r['accuracy']:.1f}", "" if r["mse"] is None else f"{r['mse']:.1e}",
        ]
        for r in rows
    ]  # fmt: skip
    headings = (
        "method",
        "passes",
        "NLL",
        "ECE %",
        "accuracy %",
        f"MSE to {rows[0]['point']['reference_draws']} draws",
    )
    return table(headings, body) + "\n\n" + taken_on(rows)


def plot_quality(rows: Sequence[Row], target: Path) -> None:
    """NLL against cost, and Monte-Carlo error against cost; log axes for cost and error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    families = list(dict.fromkeys(r["point"]["family"] for r in rows))
    # Okabe and Ito's palette, told apart by the colour-blind too.
    palette = ("#777777", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    for family, colour in zip(families, itertools.cycle(palette), strict=False):
        own = [r for r in rows if r["point"]["family"] == family]
        left.plot([r["passes"] for r in own], [r["nll"] for r in own], "o-", color=colour,
                  label=family, markersize=4)  # fmt: skip
        timed = [r for r in own if r["mse"] is not None and r["mse"] > 0]
        if timed:
            right.plot([r["passes"] for r in timed], [r["mse"] for r in timed], "o-",
                       color=colour, label=family, markersize=4)  # fmt: skip
    left.set(xscale="log", xlabel="cost (deterministic passes)", ylabel="NLL (nats a row)")
    right.set(xscale="log", yscale="log", xlabel="cost (deterministic passes)",
              ylabel="mean squared error of probabilities")  # fmt: skip
    left.set_title("quality on held-out rows")
    reference = rows[0]["point"]["reference_draws"]
    right.set_title(f"error against {reference} draws of the same predictive")
    for axes in (left, right):
        axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axes.xaxis.set_minor_locator(NullLocator())
    left.legend(frameon=False)
    right.legend(frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
