"""Panels of the report's figures, as SVG that takes its colours and font from the page.

matplotlib, an extra, is used without pyplot, so a caller's own plotting state is untouched.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from scipy.stats import binomtest
from torch import Tensor

from tfb.evaluation.compare import LEVEL
from tfb.evaluation.metrics import Evaluation, reliability, risk_coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

P = ParamSpec("P")

WIDTH, HEIGHT = 4.3, 3.3  # inches
Z = 1.96  # standard errors to either side: 95 %
ROWS_PER_BIN, MOST_BINS = 15, 10
FIRST_SHARE, FIRST_ROWS = 0.05, 10  # the risk of fewer rows than these is that of a handful
# What stands for the page's colours until the SVG is made: blacks that nothing else has.
NAMES = ("ink", "soft", "before", "after", "right", "wrong", "ood")
COLOURS = {name: f"#0000{i:02x}" for i, name in enumerate(NAMES, start=1)}
STYLES = {"before": "--", "wrong": "--", "ood": ":"}  # for readers without colours; else solid
LOSS_LABELS = {
    "nll": "NLL of the anchors (nats)",
    "expected_nll": "mean NLL of single draws (nats)",
    "pseudo_nll": "NLL of the adapter's predictions (nats)",
    "accuracy": "error rate of the anchors",
    "embedding_norm": "norm of the last hidden state",
}


def require_matplotlib() -> None:
    """Name the extra where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'figures need matplotlib, which is not installed; pip install "tfb[report]"'
        ) from error


def _panel(draw: Callable[Concatenate[Axes, P], None]) -> Callable[P, str]:
    """Make of a function that draws on axes one that returns their SVG."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        style: Any = {"svg.fonttype": "none", "font.size": 10}
        style |= dict.fromkeys(("text.color", "axes.labelcolor"), COLOURS["ink"])
        style |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), COLOURS["soft"])
        style |= dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
        with rc_context(style):
            figure, svg = Figure(figsize=(WIDTH, HEIGHT), layout="constrained"), io.StringIO()
            draw(figure.add_subplot(), *args, **kwargs)
            figure.savefig(svg, format="svg", transparent=True)
        return _of_page(svg.getvalue())

    return drawn


def _of_page(svg: str) -> str:
    """Make a file's SVG part of a page: no header, size, style or names, the page's colours."""
    body = svg[svg.index("<g id=") : svg.rindex("</svg>")]
    for pattern, new in (
        (r'<g id="[^"]*"', "<g"),
        (r" font-family: [^;]*;", ""),
        *((colour, f"var(--{name})") for name, colour in COLOURS.items()),
    ):
        body = re.sub(pattern, new, body)
    return f'<svg viewBox="0 0 {72 * WIDTH:g} {72 * HEIGHT:g}" aria-hidden="true">{body}</svg>'


@_panel
def reliability_panel(axes: Axes, e: Evaluation, colour: str) -> None:
    """Draw the share that is right against confidence, with 95 % intervals and counts."""
    n_bins = max(2, min(MOST_BINS, len(e.probs) // ROWS_PER_BIN))
    bins = reliability(e.probs, e.known_labels, n_bins)
    small: Any = {"color": COLOURS["soft"], "va": "top", "fontsize": 8.5}
    axes.plot([0, 1], [0, 1], color=COLOURS["soft"], linewidth=0.8)
    columns = (bins.counts, bins.accuracy, bins.confidence)
    for count, share, confidence in zip(*(c.tolist() for c in columns), strict=True):
        if count:
            ends = binomtest(round(share * count), count).proportion_ci(LEVEL, "wilson")
            below, above = max(0.0, share - ends.low), max(0.0, ends.high - share)
            _points(axes, [confidence], [share], [[below], [above]], colour)
            axes.text(confidence, -0.04, str(count), ha="center", **small)
    axes.text(-0.02, -0.04, "rows", ha="left", **small)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.13, 1.03), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set(xlabel="confidence", ylabel="share that is right")


@_panel
def risk_coverage_panel(axes: Axes, evaluations: Mapping[str, Evaluation]) -> None:
    """Draw the share that is wrong against the share answered, by total uncertainty."""
    for colour, e in evaluations.items():
        assert e.total is not None
        curve, N = risk_coverage(e.total, e.correct), len(e.probs)
        start = min(N - 1, max(FIRST_ROWS, math.ceil(FIRST_SHARE * N)) - 1)
        _line(axes.plot, colour, *(100 * v[start:].numpy() for v in (curve.coverage, curve.risk)))
    axes.set(xlim=(0, 100), ylim=(0, None))
    axes.set(xlabel="rows answered, least uncertain first (%)", ylabel="wrong among them (%)")


@_panel
def sigma_panel(axes: Axes, fit: Mapping[str, Any]) -> None:
    """Draw the anchors' loss against sigma, from a fit's record (``PredictiveFit.to_dict()``)."""
    points = fit["curve"]
    whole = [p for p in points if p.get("anchors") in (None, fit["anchors"])]
    if [p["sigma"] for p in whole[:2]] == [0.0, 0.0]:  # at T = 1, and at the T of least loss
        axes.plot(0.0, whole[0]["loss"], "o", markersize=5, color=COLOURS["before"])
        whole = whole[1:]
    positive = [p["sigma"] for p in points if p["sigma"] > 0]
    sigmas, losses = ([p[name] for p in whole] for name in ("sigma", "loss"))
    _points(axes, sigmas, losses, [Z * _error(p) for p in whole], "after", "-")
    for p in (p for p in points if p not in whole):
        axes.plot(p["sigma"], p["loss"], "o", markersize=4, color=COLOURS["soft"], fillstyle="none")
    if fit.get("limit") is not None:
        axes.axhline(fit["limit"], color=COLOURS["soft"], linestyle="--", linewidth=1)
    if positive:
        # Linear up to the smallest measured sigma, so that 0 has a place on a log axis.
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.4)
        axes.set_xlim(-0.1 * min(positive), 1.3 * max(positive))
        axes.set_xticks([0, *_decades(min(positive), max(positive))], minor=False)
        axes.set_xticks([], minor=True)
    axes.set(ylim=shown_losses(fit, whole), xlabel="σ", ylabel=LOSS_LABELS[fit["metric"]])
    axes.axvline(fit["sigma"], color=COLOURS["ink"], linewidth=1.2, zorder=1)
    if fit.get("interval") is not None:
        low, high = fit["interval"]
        ends = [low, axes.get_xlim()[1] if high is None else high]
        style: Any = {"color": COLOURS["ink"], "transform": axes.get_xaxis_transform()}
        axes.plot(ends, [0.03, 0.03], linewidth=2.5, **style)
        for at, mark in zip(ends, ("|", ">" if high is None else "|"), strict=True):
            axes.plot(at, 0.03, mark, clip_on=False, **style)


def _decades(low: float, high: float) -> list[float]:
    """Return the powers of ten between two sigmas, or both sigmas where there are none."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [10.0**k for k in powers] or sorted({low, high})


def _error(point: Mapping[str, Any]) -> float:
    """Return the standard error of the change from the adapter, over anchors."""
    return float(point["standard_error"] or 0.0)


def shown_losses(fit: Mapping[str, Any], whole: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return limits of the loss axis; losses far beyond the answer would flatten what decides."""
    near = [p for i, p in enumerate(whole) if i < 3 or p["sigma"] <= 1.6 * fit["sigma"]]
    levels = [p["loss"] + side * Z * _error(p) for p in near for side in (-1, 1)]
    levels += [level for level in (fit["baseline"], fit.get("limit")) if level is not None]
    low, high = min(levels), max(levels)
    spread = high - low or 1.0
    return low - 0.15 * spread, high + 0.1 * spread


@_panel
def uncertainty_panel(axes: Axes, groups: Mapping[str, Tensor], kind: str, size: float) -> None:
    """Draw the cumulative share of rows against their uncertainty, for each group's colour."""
    for colour, values in groups.items():
        if len(values):
            _line(axes.ecdf, colour, values.numpy())
    axes.set(xlim=(0, None), ylim=(0, 1.02))
    axes.set_xlabel(f"{kind} uncertainty (nats)", size=size)
    axes.set_ylabel("share of rows at or below", size=size)
    axes.tick_params(labelsize=size)


def _line(draw: Callable[..., object], colour: str, *values: Any) -> None:
    draw(*values, color=COLOURS[colour], linestyle=STYLES.get(colour, "-"), linewidth=1.6)


def _points(axes: Axes, x: Any, y: Any, bars: Any, colour: str, linestyle: str = "") -> None:
    style: Any = {"color": COLOURS[colour], "linestyle": linestyle, "linewidth": 1.2}
    axes.errorbar(x, y, bars, marker="o", markersize=4, elinewidth=0.9, capsize=2, **style)
