"""Tables and the picture of the ablations, from their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.markdown import Row, table, taken_on

TITLES = {
    "family": "Family of the posterior, the same search on each",
    "metric": "Metric of the search (max_variance; tolerance 0.3 %, of accuracy 1 %)",
    "objective": "Objective, held-out or training anchors (gvi: expected_nll, λ = 1 / rows of the "
    "likelihood)",
    "tolerance": "Tolerance of max_variance, held-out or training anchors",
    "draws": "Draws in prediction, at the σ of max_variance",
    "search_draws": "Draws in the search",
    "anchors": "Number of held-out anchors: mean ± sd over 3 samples",
    "tail": "Positions that get noise, min_nll (full mode: see the families)",
}
HEADINGS = (
    "σ",
    "T",
    "95 % interval",
    "passes",
    "accuracy %",
    "NLL",
    "ECE %",
    "Brier",
    "AUROC total",
    "AUROC epistemic",
)
FIGURES = ("accuracy", "nll", "ece", "brier", "auroc_total", "auroc_epistemic")
COLOURS = {"held_out": "#0072B2", "train": "#D55E00"}
LABELS = {"held_out": "held-out anchors", "train": "training anchors"}


def ablations_table(rows: Sequence[Row]) -> str:
    """One table for each ablation, its first line the deterministic adapter."""
    if not rows:
        return (
            "*Not run yet: `python -m benchmarks.calibration.ablations --record` (after "
            "`benchmarks.calibration.train`).*"
        )
    parts = []
    for ablation, title in TITLES.items():
        own = [r for r in rows if r["measure"] == ablation]
        if own:
            parts.append(f"**{title}**\n\n{_table(own, rows)}")
    return "\n\n".join((*parts, _note(rows), taken_on(rows)))


def _table(own: Sequence[Row], rows: Sequence[Row]) -> str:
    body = []
    for task in dict.fromkeys(r["point"]["task"] for r in own):
        base = [r for r in rows if r["measure"] == "deterministic" and r["point"]["task"] == task]
        body += [[task, "deterministic", "0", "1", "", "1", *_figures([r])] for r in base]
        groups: dict[str, list[Row]] = {}
        for row in own:
            if row["point"]["task"] == task:
                groups.setdefault(_name(row), []).append(row)
        for name, group in groups.items():
            body.append([task, name, *_cells(group)])
    return table(("task", own[0]["measure"].replace("_", " "), *HEADINGS), body)


def _name(row: Row) -> str:
    """Name the row's setting in its table."""
    p, ablation = row["point"], row["measure"]
    value = f"{100 * p['value']:g} %" if ablation == "tolerance" else str(p["value"])
    if ablation in ("objective", "tolerance"):
        return f"{value}, {LABELS[p['source']]}"
    if ablation in ("family", "anchors", "search_draws"):
        return f"{value}, {p['options'].get('objective', 'max_variance')}"
    if ablation == "tail":
        return f"last {value} ({row['prediction_passes']:.2f} passes a row)"
    return value


def _cells(group: Sequence[Row]) -> list[str]:
    """Cells behind the name, of one row or of the mean over several samples of anchors."""
    found = [r for r in group if r["sigma"] is not None]
    if not found:
        return ["no answer", "", "", "", *[""] * len(FIGURES)]
    if len(group) == 1:
        row = found[0]
        return [
            f"{row['sigma']:.3g}",
            f"{_temperature(row):.3g}",
            _interval(row["interval"]),
            f"{row['passes']:.1f}",
            *_figures(found),
        ]
    sigma = _spread([r["sigma"] for r in found])
    temperature = _spread([_temperature(r) for r in found])
    if len(found) < len(group):
        sigma += f" ({len(found)} of {len(group)})"
    return [sigma, temperature, "", f"{mean(r['passes'] for r in found):.1f}", *_figures(found)]


def _temperature(row: Row) -> float:
    """Return T, which the first rows do not name: it was 1."""
    return float(row.get("temperature", 1.0))


def _spread(values: Sequence[float]) -> str:
    """Return mean ± sd, or the value that all have."""
    if len(set(values)) == 1:
        return f"{values[0]:.3g}"
    return f"{mean(values):.3g} ± {stdev(values):.2g}"


def _interval(limits: Any) -> str:
    if limits is None:
        return ""
    low, high = limits
    return f"{low:.3g} to {'?' if high is None else format(high, '.3g')}"


def _figures(group: Sequence[Row]) -> list[str]:
    """Return the mean of each figure, where it is known; percent for accuracy and ECE."""
    percent, cells = ("accuracy", "ece"), []
    for name in FIGURES:
        known = [r[name] for r in group if r[name] is not None]
        value = mean(known) if known else None
        cells.append(
            "" if value is None else f"{100 * value:.1f}" if name in percent else f"{value:.3f}"
        )
    return cells


def _note(rows: Sequence[Row]) -> str:
    sizes = []
    for task in dict.fromkeys(r["point"]["task"] for r in rows):
        own = [r["point"] for r in rows if r["point"]["task"] == task]
        anchors = next(p["anchors"] for p in own if p.get("draws") == 10)
        sizes.append(
            f"{task}: {anchors} anchors, {own[0]['rows']} test and {own[0]['shift_rows']} "
            "out-of-scope rows"
        )
    return (
        f"{'; '.join(sizes)}. One thing varies, the rest is the paper's rule: nll, max_variance, "
        "0.3 %, 4 draws in the search, 10 in prediction, held-out anchors; min_nll fits T too. "
        "Passes are those of the search, over its anchors; AUROC tells out-of-scope rows from test "
        "rows by total or epistemic uncertainty. A question mark: the search saw no upper limit."
    )


def plot_ablations(rows: Sequence[Row], target: Path) -> None:
    """sigma, test NLL and test ECE against the tolerance, for both kinds of anchors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(r["point"]["task"] for r in rows))
    figure = Figure(figsize=(11, 3.4 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(tasks), 3, squeeze=False)
    columns = (
        ("sigma", "σ", 1.0),
        ("nll", "test NLL (nats a row)", 1.0),
        ("ece", "test ECE (%)", 100.0),
    )
    for task, line in zip(tasks, grid, strict=True):
        own = [r for r in rows if r["point"]["task"] == task]
        base = next(r for r in own if r["measure"] == "deterministic")
        for (key, label, scale), axes in zip(columns, line, strict=True):
            for source, colour in COLOURS.items():
                points = sorted(
                    (100 * r["point"]["value"], scale * r[key])
                    for r in own
                    if r["measure"] == "tolerance"
                    and r["point"]["source"] == source
                    and r["sigma"] is not None
                )
                axes.plot(
                    *zip(*points, strict=True),
                    "o-",
                    color=colour,
                    label=LABELS[source],
                    markersize=4,
                )
            if key != "sigma":
                axes.axhline(
                    scale * base[key], color="#777777", linestyle="--", label="deterministic"
                )
            axes.set(xscale="log", xlabel="tolerance (%)", ylabel=label)
            axes.set_xticks([0.1, 0.3, 1, 3, 10, 30], ["0.1", "0.3", "1", "3", "10", "30"])
            axes.minorticks_off()
            if key == "sigma":
                axes.set_yscale("log")
            axes.set_title(task)
        line[1].legend(frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
