"""Table and picture of what draws buy beside what they cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.markdown import Row, blocks, table, taken_on

NO_ROWS = (
    "*Not run yet: `python -m benchmarks.calibration.quality --record` (twenty minutes, two quiet "
    "cores).*"
)
# Okabe and Ito's palette, told apart by the colour-blind too.
PALETTE = ("#777777", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def quality_table(rows: Sequence[Row]) -> str:
    """Return what draws buy, beside what they cost."""
    if not rows:
        return NO_ROWS
    body = []
    for r in rows:
        percent = (f"{100 * r[name]:.1f}" for name in ("ece", "accuracy"))
        error = "" if r["mse"] is None else f"{r['mse']:.1e}"
        cells = (f"{r['passes']:.2f}", f"{r['nll']:.3f}", *percent, error)
        body.append([r["point"]["method"], *cells])
    error = f"MSE to {rows[0]['point']['reference_draws']} draws"
    headings = ("method", "passes", "NLL", "ECE %", "accuracy %", error)
    return blocks(table(headings, body), taken_on(rows))


def plot_quality(rows: Sequence[Row], target: Path) -> None:
    """Draw NLL and Monte-Carlo error against cost; log axes for cost and error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    families = dict.fromkeys(r["point"]["family"] for r in rows)
    for family, colour in zip(families, itertools.cycle(PALETTE), strict=False):
        for axes, key in ((left, "nll"), (right, "mse")):
            own = [(r["passes"], r[key]) for r in rows if r["point"]["family"] == family and r[key]]
            if own:
                axes.plot(*zip(*own, strict=True), "o-", color=colour, label=family, markersize=4)
    left.set(ylabel="NLL (nats a row)", title="quality on held-out rows")
    reference = rows[0]["point"]["reference_draws"]
    title = f"error against {reference} draws of the same predictive"
    right.set(yscale="log", ylabel="mean squared error of probabilities", title=title)
    for axes in (left, right):
        axes.set(xscale="log", xlabel="cost (deterministic passes)")
        axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axes.xaxis.minorticks_off()
        axes.legend(frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
