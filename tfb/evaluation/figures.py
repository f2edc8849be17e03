"""Pictures of evaluations and of a search: reliability, sigma curve, risk-coverage, uncertainty.

matplotlib is an extra and imported here only; figures are made without pyplot, so a caller's own
plotting state is untouched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfb.evaluation.metrics import Evaluation, reliability, risk_coverage
from tfb.search.interval import point_margin

# Okabe-Ito: told apart by colour-blind readers.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
LINES = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
KINDS = ("total", "aleatoric", "epistemic")
FIRST_SHARE = 0.05  # of the rows: the risk of fewer is that of a handful, which jumps
LOSS_LABELS = {
    "nll": "NLL on the anchors (nats a row)",
    "expected_nll": "mean NLL of single draws (nats a row)",
    "pseudo_nll": "NLL of the deterministic prediction (nats a row)",
    "accuracy": "error rate on the anchors",
    "embedding_norm": "norm of the last hidden state",
}


def require_matplotlib() -> tuple[Any, Any]:
    """matplotlib's Figure and its canvas; raises ImportError that names the extra."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib, which is not installed; pip install "tfb[report]"'
        ) from error
    return Figure, FigureCanvasAgg


def _figure(width: float, height: float) -> Any:
    Figure, FigureCanvasAgg = require_matplotlib()
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _short(name: str) -> str:
    """A caller's name as plain text of a bounded length; a "$" would start TeX in matplotlib."""
    return (name if len(name) <= 40 else f"{name[:28]}...{name[-9:]}").replace("$", r"\$")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)


def plot_reliability(evaluations: Sequence[Evaluation], path: Path, n_bins: int = 15) -> None:
    """Reliability diagrams side by side, one row for each data set, counts below each."""
    datasets = list(dict.fromkeys(e.dataset for e in evaluations))
    columns = max(sum(e.dataset == d for e in evaluations) for d in datasets)
    figure = _figure(max(3.6 * columns, 5.6), 4.8 * len(datasets))
    grid = figure.add_gridspec(2 * len(datasets), columns, height_ratios=[3, 1] * len(datasets))
    for i, dataset in enumerate(datasets):
        for j, e in enumerate(e for e in evaluations if e.dataset == dataset):
            assert e.labels is not None
            bins, m = reliability(e.probs, e.labels, n_bins), e.metrics
            width = 1 / n_bins
            # NumPy throughout: matplotlib's arithmetic on tensors is deprecated by NumPy.
            centre = (bins.edges[:-1] + width / 2).numpy()
            counts, accuracy, confidence = (
                t.numpy() for t in (bins.counts, bins.accuracy, bins.confidence)
            )
            top = figure.add_subplot(grid[2 * i, j])
            seen = counts > 0
            top.bar(centre[seen], accuracy[seen], width, color=BLUE, edgecolor="white",
                    label="share that is right")  # fmt: skip
            top.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
            top.plot(
                confidence[seen],
                accuracy[seen],
                ".",
                color=ORANGE,
                label="at their mean confidence",
            )
            top.set(xlim=(0, 1), ylim=(0, 1), xticklabels=[])
            top.set_title(
                f"{_short(e.name)}\n{_short(dataset)}, {m.rows:,} rows\n"
                f"accuracy {100 * m.accuracy:.1f} %   ECE {100 * m.ece:.1f} %", fontsize=9,
            )  # fmt: skip
            bottom = figure.add_subplot(grid[2 * i + 1, j])
            bottom.bar(centre, counts, width, color=GREY, edgecolor="white")
            bottom.set(xlim=(0, 1), xlabel="confidence")
            if j == 0:
                top.set_ylabel("share that is right")
                bottom.set_ylabel("rows")
                if i == 0:
                    top.legend(fontsize=7, loc="upper left", framealpha=0.8, edgecolor="none")
    _save(figure, path)


def plot_sigma_curve(fit: Mapping[str, Any], path: Path) -> None:
    """Loss against sigma with 95 % intervals, the accepted loss, the chosen point, its interval."""
    figure = _figure(7.4, 4.6)
    axes = figure.add_subplot()
    points = fit["curve"]
    streams = fit["draws"] // (1 if fit.get("compat") else 2)  # the authors' draws are iid
    positive = [p["sigma"] for p in points if p["sigma"] > 0]
    margins = [
        point_margin(
            p["standard_error"] or 0.0, p.get("anchors") or fit["anchors"],
            p["draw_standard_error"] or 0.0, streams,
        )
        for p in points
    ]  # fmt: skip
    axes.errorbar(
        [p["sigma"] for p in points], [p["loss"] for p in points], yerr=margins,
        marker="o", markersize=4, linewidth=1.2, capsize=2, elinewidth=0.8, color=BLUE,
        label="measured, 95 % interval of the change",
    )  # fmt: skip
    if fit.get("limit") is not None:
        axes.axhline(
            fit["limit"], color=GREY, linestyle="--", linewidth=1, label="largest loss accepted"
        )
    if positive:
        # Linear up to the smallest measured sigma, so that 0 has a place on a log axis.
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.4)
        axes.set_xlim(-0.05 * min(positive), 1.15 * max(positive))
    chosen = _interpolate(sorted((p["sigma"], p["loss"]) for p in points), fit["sigma"])
    if fit.get("interval") is not None:
        low, high = fit["interval"]
        axes.axvspan(low, axes.get_xlim()[1] if high is None else high, color=ORANGE, alpha=0.15,
                     linewidth=0, label="95 % interval of σ")  # fmt: skip
    axes.plot([fit["sigma"]], [chosen], "D", markersize=8, color=ORANGE, zorder=5,
              label=f"chosen: σ = {fit['sigma']:.4g}")  # fmt: skip
    axes.set_ylim(*_deciding_range(fit, margins))
    axes.set(xlabel="σ, the scale of the noise",
             ylabel=LOSS_LABELS[fit["metric"]])  # fmt: skip
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    _save(figure, path)


def _deciding_range(fit: Mapping[str, Any], margins: Sequence[float]) -> tuple[float, float]:
    """Limits of the loss axis. The loss far beyond the answer would flatten the part that decides;
    without an answer above 0 the first few points are that part."""
    positive = [p["sigma"] for p in fit["curve"] if p["sigma"] > 0]
    end = 1.6 * fit["sigma"] or max(positive[:3], default=0.0)
    shown = [(p["loss"], m) for p, m in zip(fit["curve"], margins, strict=True)
             if p["sigma"] <= end]  # fmt: skip
    levels = [loss for loss, _ in shown] + ([] if fit.get("limit") is None else [fit["limit"]])
    spread = max(levels) - min(levels) or 1.0
    # Bars of few streams can be far longer than the curve is high; they may leave the picture.
    low = min(loss - min(m, 1.5 * spread) for loss, m in shown)
    high = max([loss + min(m, 1.5 * spread) for loss, m in shown] + levels)
    return low - 0.05 * (high - low or 1), high + 0.15 * (high - low or 1)


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return float(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    return float(points[-1][1])


def plot_risk_coverage(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Share of wrong answers against the share of rows answered, the surest first: by total
    uncertainty, and by epistemic where there are draws. One panel for each data set."""
    ranked = [e for e in evaluations if e.total is not None]
    datasets = list(dict.fromkeys(e.dataset for e in ranked))
    figure = _figure(max(5.2 * len(datasets), 7.0), 5.4)
    for i, dataset in enumerate(datasets):
        axes, highest = figure.add_subplot(1, len(datasets), i + 1), 0.0
        for e, colour in zip((e for e in ranked if e.dataset == dataset), _colours(), strict=False):
            for kind, style in (("total", "-"), ("epistemic", "--")):
                values = getattr(e, kind)
                if values is None:
                    continue
                curve = risk_coverage(values, e.correct)
                x, y = (
                    100 * t[curve.coverage >= FIRST_SHARE] for t in (curve.coverage, curve.risk)
                )
                highest = max(highest, float(y.max()))
                axes.plot(
                    x.numpy(), y.numpy(), style, color=colour, linewidth=1.6,
                    label=f"{_short(e.name)}, by {kind} (AURC {100 * curve.aurc:.2f} %)",
                )  # fmt: skip
        axes.set(xlim=(0, 100), ylim=(0, 1.08 * highest or 1.0), xlabel="rows answered (%)")
        axes.set_title(f"{_short(dataset)}", fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13))
        if i == 0:
            axes.set_ylabel("wrong among those answered (%)")
    _save(figure, path)


def _colours() -> Any:
    """Endless: methods beyond the sixth share colours."""
    while True:
        yield from LINES


def plot_uncertainty(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Histograms of each kind of uncertainty, right against wrong rows, for the sampled runs."""
    sampled = [e for e in evaluations if e.epistemic is not None]
    figure = _figure(10, 3.2 * max(1, len(sampled)))
    for i, e in enumerate(sampled):
        for j, kind in enumerate(KINDS):
            axes, values = figure.add_subplot(len(sampled), 3, 3 * i + j + 1), getattr(e, kind)
            groups = {"right": values[e.correct], "wrong": values[~e.correct]}
            _histograms(axes, groups, f"{kind} uncertainty (nats)", middle=j == 1, first=j == 0,
                        title=f"{_short(e.name)}, {_short(e.dataset)}")  # fmt: skip
    _save(figure, path)


def plot_shift(evaluations: Sequence[Evaluation], shifts: Sequence[Evaluation], path: Path) -> None:
    """Histograms of total and epistemic uncertainty, rows of another kind against the first data
    set's, for the sampled runs."""
    sampled = [e for e in shifts if e.epistemic is not None]
    figure = _figure(10, 3.2 * max(1, len(sampled)))
    for i, shift in enumerate(sampled):
        usual = counterpart(evaluations, shift)
        for j, kind in enumerate(("total", "epistemic")):
            axes = figure.add_subplot(len(sampled), 2, 2 * i + j + 1)
            groups = {_short(e.dataset): getattr(e, kind) for e in (usual, shift)}
            _histograms(axes, groups, f"{kind} uncertainty (nats)", middle=True, first=j == 0,
                        title=_short(shift.name))  # fmt: skip
    _save(figure, path)


def counterpart(evaluations: Sequence[Evaluation], shift: Evaluation) -> Evaluation:
    """The same method on the first data set."""
    dataset = evaluations[0].dataset
    return next(e for e in evaluations if e.dataset == dataset and e.name == shift.name)


def _histograms(
    axes: Any, groups: Mapping[str, Tensor], label: str, *, middle: bool, first: bool, title: str
) -> None:
    highest = max(float(v.max()) for v in groups.values() if len(v))
    edges = torch.linspace(0, max(highest, 1e-6), 26).numpy()
    for (name, values), colour, hatch in zip(
        groups.items(), (BLUE, ORANGE), ("", "///"), strict=True
    ):
        if len(values):
            axes.hist(
                values.numpy(), edges, density=True, alpha=0.55, color=colour, hatch=hatch,
                edgecolor="white", linewidth=0, label=f"{name} ({len(values):,})",
            )  # fmt: skip
    axes.set_xlabel(label)
    if first:
        axes.set_ylabel("density (1 / nat)")
    if middle:
        # Above the axes: inside them it would hide bars.
        axes.set_title(title, pad=26, fontsize=10)
        axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
