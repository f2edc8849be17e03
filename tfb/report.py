"""Pictures and one self-contained HTML page about a fit: reliability, sigma curve, uncertainty.

matplotlib is an extra and imported here only; figures are made without pyplot, so a caller's own
plotting state is untouched.
"""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import torch

from tfb.metrics import Evaluation, evaluate, reliability

# Okabe-Ito: told apart by colour-blind readers.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
PICTURES = ("reliability.png", "sigma_curve.png", "uncertainty.png")
PAGE = "index.html"
HELP = {
    "reliability.png": (
        "Of the predictions made with a confidence of about 80 %, about 80 % should be right: bars "
        "on the diagonal are calibrated, bars below it over-confident, above it under-confident. "
        "Small panels count the rows in each bin; a bin of few rows says little."
    ),
    "sigma_curve.png": (
        "The loss on the anchor rows as the posterior widens. The dot is the chosen sigma, the "
        "dashed line the largest loss accepted. Bars are one standard error, over anchors, of the "
        "difference to sigma = 0 (the deterministic adapter, leftmost)."
    ),
    "uncertainty.png": (
        "Total uncertainty is the entropy of the averaged prediction. Aleatoric is the part every "
        "draw agrees on, epistemic the part the draws disagree about. A useful uncertainty is "
        "larger where the model is wrong."
    ),
}


LOSS_LABELS = {
    "nll": "NLL (nats a row)",
    "pseudo_nll": "NLL of the deterministic prediction (nats a row)",
    "accuracy": "error rate",
    "embedding_norm": "norm of the last hidden state",
}


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib, which is not installed; pip install "tfb[report]"'
        ) from error
    return Figure, FigureCanvasAgg


def _figure(width: float, height: float) -> Any:
    Figure, FigureCanvasAgg = _matplotlib()
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _short(name: str) -> str:
    """A caller's name as plain text of a bounded length; a "$" would start TeX in matplotlib."""
    return (name if len(name) <= 40 else f"{name[:28]}...{name[-9:]}").replace("$", r"\$")


def plot_reliability(evaluations: Sequence[Evaluation], path: Path, n_bins: int = 15) -> None:
    """Reliability diagrams side by side, one row for each data set, counts below each."""
    datasets = list(dict.fromkeys(e.dataset for e in evaluations))
    columns = max(sum(e.dataset == d for e in evaluations) for d in datasets)
    figure = _figure(3.4 * columns, 4.6 * len(datasets))
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
            top.bar(centre[seen], accuracy[seen], width, color=BLUE, edgecolor="white")
            top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
            top.plot(confidence[seen], accuracy[seen], ".", color=ORANGE)
            top.set(xlim=(0, 1), ylim=(0, 1), xticklabels=[])
            top.set_title(
                f"{_short(e.name)}\n{_short(dataset)}\naccuracy {100 * m.accuracy:.1f} %   "
                f"ECE {100 * m.ece:.1f} %\nNLL {m.nll:.3f} nats", fontsize=9,
            )  # fmt: skip
            bottom = figure.add_subplot(grid[2 * i + 1, j])
            bottom.bar(centre, counts, width, color=GREY, edgecolor="white")
            bottom.set(xlim=(0, 1), xlabel="confidence")
            if j == 0:
                top.set_ylabel("accuracy")
                bottom.set_ylabel("rows")
    figure.savefig(path, dpi=110)


def plot_sigma_curve(fit: Mapping[str, Any], path: Path) -> None:
    """Loss against sigma with error bars, the accepted loss and the chosen point."""
    figure = _figure(6.4, 4.2)
    axes = figure.add_subplot()
    points = fit["curve"]
    positive = [p["sigma"] for p in points if p["sigma"] > 0]
    axes.errorbar(
        [p["sigma"] for p in points],
        [p["loss"] for p in points],
        yerr=[p["standard_error"] or 0.0 for p in points],
        marker="o", markersize=4, linewidth=1.2, capsize=2, color=BLUE, label="anchors",
    )  # fmt: skip
    if fit.get("limit") is not None:
        axes.axhline(
            fit["limit"], color=GREY, linestyle="--", linewidth=1, label="largest accepted"
        )
    if positive:
        # Linear up to the smallest measured sigma, so that 0 has a place on a log axis.
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.4)
        axes.set_xlim(left=-0.05 * min(positive))
    values = sorted((p["sigma"], p["loss"]) for p in points)
    chosen = _interpolate(values, fit["sigma"])
    axes.plot([fit["sigma"]], [chosen], "o", markersize=10, color=ORANGE, zorder=5,
              label=f"chosen: {fit['sigma']:.4g}")  # fmt: skip
    # The loss far beyond the answer would flatten the part that decides; without an answer above
    # 0 the first few points are that part.
    end = 2.5 * fit["sigma"] or max(positive[:3], default=0.0)
    near = [
        p["loss"] + sign * (p["standard_error"] or 0.0)
        for p in points if p["sigma"] <= end for sign in (-1, 1)
    ]  # fmt: skip
    low, high = min(near), max([*near, fit.get("limit") or near[0]])
    axes.set_ylim(low - 0.1 * (high - low or 1), high + 0.3 * (high - low or 1))
    axes.set(xlabel="sigma (before the LoRA scaling)", ylabel=LOSS_LABELS[fit["metric"]])
    axes.set_title(f"{fit['objective']} on {fit['anchors']} anchors, {fit['draws']} draws")
    axes.legend(framealpha=0.9, edgecolor="none")
    figure.savefig(path, dpi=110)


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return float(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    return float(points[-1][1])


def plot_uncertainty(evaluations: Sequence[Evaluation], path: Path) -> None:
    """Histograms of each kind of uncertainty, correct against wrong rows, for the sampled runs."""
    sampled = [e for e in evaluations if e.epistemic is not None]
    kinds = ("total", "aleatoric", "epistemic")
    figure = _figure(10, 3.2 * max(1, len(sampled)))
    for i, e in enumerate(sampled):
        assert e.labels is not None
        right = e.probs.argmax(-1) == e.labels
        for j, kind in enumerate(kinds):
            axes = figure.add_subplot(len(sampled), 3, 3 * i + j + 1)
            values = getattr(e, kind)
            edges = torch.linspace(0, max(float(values.max()), 1e-6), 26).numpy()
            for label, rows, colour in (("right", right, BLUE), ("wrong", ~right, ORANGE)):
                if bool(rows.any()):
                    axes.hist(values[rows].numpy(), edges, density=True, alpha=0.6, color=colour,
                              label=f"{label} ({int(rows.sum())})")  # fmt: skip
            axes.set_xlabel(f"{kind} uncertainty (nats)")
            if j == 0:
                axes.set_ylabel("density (1 / nat)")
            if j == 1:
                # Above the axes: inside them it would hide bars.
                axes.set_title(f"{_short(e.name)}, {_short(e.dataset)}", pad=26)
                axes.legend(
                    frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0)
                )  # fmt: skip
    figure.savefig(path, dpi=110)


def check_report_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """The folder as a Path if a report can be made there; a caller asks before any long work.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: it is a file, holds something else, or a report without ``overwrite``.
    """
    _matplotlib()
    path = Path(folder)
    held = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if (path.exists() and not path.is_dir()) or (
        held and (not overwrite or held - {*PICTURES, PAGE})
    ):
        raise ValueError(f"{path} already holds something; choose a new folder or remove it")
    return path


def write_report(
    folder: str | Path,
    evaluations: Sequence[Evaluation],
    fit: Mapping[str, Any] | None = None,
    *,
    title: str,
    notes: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """The pictures and ``index.html`` (images embedded) in ``folder``; all of them or none.

    Args:
        evaluations: labelled; the first of each data set is the reference for flips.
        fit: ``SigmaFit.to_dict()``, or None. notes: sentences shown under the table.

    Raises:
        ValueError: no evaluations, or one without labels; the folder holds something else, or
            already a report without ``overwrite``.
    """
    path = check_report_folder(folder, overwrite=overwrite)
    if not evaluations:
        raise ValueError("a report needs at least one evaluation")
    if bare := [e for e in evaluations if e.labels is None]:
        raise ValueError(f"{bare[0].name} on {bare[0].dataset}: no labels; a report needs them")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        plot_reliability(evaluations, staging / PICTURES[0])
        if fit is not None:
            plot_sigma_curve(fit, staging / PICTURES[1])
        if any(e.epistemic is not None for e in evaluations):
            plot_uncertainty(evaluations, staging / PICTURES[2])
        made = [name for name in PICTURES if (staging / name).is_file()]
        page = _page(title, evaluations, fit, notes, {n: staging / n for n in made})
        (staging / PAGE).write_text(page, encoding="utf-8")
        path.mkdir(exist_ok=True)
        for name in set(PICTURES) - set(made):  # an earlier report's, which this one lacks
            (path / name).unlink(missing_ok=True)
        for name in [*made, PAGE]:  # the page last: it is the sign of a finished report
            os.replace(staging / name, path / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path / PAGE


def _page(
    title: str,
    evaluations: Sequence[Evaluation],
    fit: Mapping[str, Any] | None,
    notes: Sequence[str],
    pictures: Mapping[str, Path],
) -> str:
    rows = []
    for dataset in dict.fromkeys(e.dataset for e in evaluations):
        group = [e for e in evaluations if e.dataset == dataset]
        reference = group[0].probs.argmax(-1)
        figures = []
        for e in group:
            assert e.labels is not None
            figures.append(evaluate(e.probs, e.labels, reference_predictions=reference))
        best = {
            "accuracy": max(m.accuracy for m in figures),
            "nll": min(m.nll for m in figures),
            "ece": min(m.ece for m in figures),
            "brier": min(m.brier for m in figures),
        }
        for e, m in zip(group, figures, strict=True):
            cells = [
                (f"{getattr(m, key) * factor:.{places}f}", getattr(m, key) == best[key])
                for key, factor, places in (
                    ("accuracy", 100, 2), ("nll", 1, 4), ("ece", 100, 2), ("brier", 1, 4)
                )
            ]  # fmt: skip
            cells.append((f"{100 * m.miscalibration:+.2f}", False))
            cells.append((f"{100 * (m.flip_ratio or 0.0):.2f}", False))
            rows.append({"dataset": dataset, "name": e.name, "cells": cells})
    images = [
        {"name": n, "help": HELP[n], "data": base64.b64encode(p.read_bytes()).decode("ascii")}
        for n, p in pictures.items()
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tfb"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.j2").render(
        title=title, rows=rows, images=images, fit=fit, notes=list(notes)
    )
