"""Tables and pictures from the committed rows: ``python -m benchmarks.report``.

Of each point the newest row counts, apart for each device and not for toy sizes. --readme puts the
tables between ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks:NAME -->`` of README.md; --plots
draws benchmarks/plots/*.png. Absolute times are shown only where a GPU took them. To add a table:
a function below and its name in ``TABLES``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
Row = dict[str, Any]
NOT_MEASURED = "*Not measured on a GPU yet: `benchmarks/gpu.sh` does it in one command.*"


def read(suite: str, folder: Path) -> list[Row]:
    """The newest row of every point and device of a suite, toy sizes left out."""
    path = folder / f"{suite}.jsonl"
    if not path.is_file():
        return []
    newest: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if not row.get("toy"):
            key = json.dumps([row["device"], row["measure"], row["point"]], sort_keys=True)
            newest[key] = row
    return list(newest.values())


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in rows)])


def spread(value: dict[str, float], digits: int = 2) -> str:
    """median [q25, q75]."""
    m, low, high = (f"{value[k]:.{digits}f}" for k in ("median", "q25", "q75"))
    return f"{m} [{low}, {high}]"


def taken_on(rows: Sequence[Row]) -> str:
    """One line on hardware, versions and commits."""
    found = []
    for row in rows:
        e = row["environment"]
        device = (e["gpu"] or {}).get("name") or f"{e['cpu']['model']}, {e['cpu']['cores']} cores"
        v = e["versions"]
        found.append(
            f"{device}; torch {v['torch']}, transformers {v['transformers']}, peft {v['peft']}; "
            f"commit {e['commit']['id'][:10]}{', changed' if e['commit']['dirty'] else ''}; "
            f"{row['date'][:10]}"
        )
    return "<sub>" + "<br>".join(dict.fromkeys(found)) + "</sub>"


# --- tables ---------------------------------------------------------------------------------------


def predict_table(rows: Sequence[Row]) -> str:
    """The loops' time over ours, and everything in passes of the deterministic adapter."""
    if not rows:
        return "*No rows yet.*"
    body = []
    for row in rows:
        p, units = row["point"], row["in_units_of"]["ratios"]
        body.append([
            f"{p['model']}, {p['rows']} rows x {p['tokens']} tokens ({row['device']})",
            spread(row["ratios"]["naive"]), spread(row["ratios"]["flipout"]),
            spread(units["ours"]), spread(units["naive"]), spread(units["noise"], 3),
        ])  # fmt: skip
    headings = (
        "model", "naive loop / ours", "Flipout loop / ours", "ours, in passes", "naive, in passes",
        "all noise once, in passes",
    )  # fmt: skip
    return (
        table(headings, body)
        + "\n\nMedian and quartiles of "
        + (
            f"{rows[0]['contenders']['ours']['rounds']} or more interleaved rounds; a pass is one "
            "forward of the deterministic adapter on the same batch.\n\n"
        )
        + taken_on(rows)
    )


PASSES = {
    "ours": "full, S = 10", "full_4": "full, S = 4", "full_2": "full, S = 2",
    "quarter_10": "last quarter of the blocks, S = 10", "last_10": "last layer, S = 10",
    "last_100": "last layer, S = 100", "tail_10": "tail k = 1, S = 10",
    "tail_32": "tail k = 1, S = 32", "naive": "naive PEFT loop, S = 10",
    "flipout": "Flipout loop, S = 10", "base": "no adapter, one pass",
}  # fmt: skip


def passes_table(rows: Sequence[Row]) -> str:
    """Cost of every way to draw, in deterministic passes; targets met and missed."""
    if not rows:
        return "*No rows yet.*"
    names = [f"{r['point']['model']}, {r['point']['adapter']} ({r['device']})" for r in rows]
    body = [
        [label, *(spread(r["in_units_of"]["ratios"][key]) for r in rows)]
        for key, label in PASSES.items()
    ]
    missed = [
        f"- {name}: {t['name']} is {t['value']:.2f}, the target {t['bound']:.2f}"
        for name, row in zip(names, rows, strict=True)
        for t in row["targets"]
        if not t["met"]
    ]
    text = table(["in passes of the deterministic adapter", *names], body)
    if missed:
        text += "\n\nTargets that are missed:\n\n" + "\n".join(missed)
    return text + "\n\n" + taken_on(rows)


def linear_table(rows: Sequence[Row]) -> str:
    """Kernels on a GPU: the whole layer against its rivals; the points that lose are all listed."""
    rows = [r for r in rows if r["device"] == "cuda"]
    layers = [r for r in rows if r["measure"] == "layer" and "skipped_point" not in r]
    if not layers:
        return NOT_MEASURED
    body = []
    for row in layers:
        p = row["point"]
        best = min(row["ratios"], key=lambda k: row["ratios"][k]["median"])
        body.append([
            f"{p['layer']} r={p['r']} S={p['S']} T={p['T']} "
                + ("shared" if p["shared"] else "per draw"),
            f"{1e6 * row['contenders']['ours']['median']:.0f}",
            spread(row["ratios"]["naive"]), best, spread(row["ratios"][best]),
            f"{100 * row['floor']['fraction']:.0f} %" if "floor" in row else "",
        ])  # fmt: skip
    lost = [f"- {r['point']}: {', '.join(r['losses'])}" for r in rows if r.get("losses")]
    text = table(
        ["point", "ours, µs", "naive / ours", "best rival", "best rival / ours", "of the floor"],
        body,
    )
    return text + "\n\nLost points:\n\n" + ("\n".join(lost) or "none") + "\n\n" + taken_on(layers)


def quality_table(rows: Sequence[Row]) -> str:
    """What draws buy, beside what they cost."""
    if not rows:
        return "*No rows yet.*"
    body = [
        [
            r["point"]["method"], f"{r['passes']:.2f}", f"{r['nll']:.3f}", f"{100 * r['ece']:.1f}",
            f"{100 * r['accuracy']:.1f}", "" if r["mse"] is None else f"{r['mse']:.1e}",
        ]
        for r in rows
    ]  # fmt: skip
    headings = ("method", "passes", "NLL", "ECE %", "accuracy %", "MSE to 128 draws")
    return table(headings, body) + "\n\n" + taken_on(rows)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "predict": predict_table,
    "passes": passes_table,
    "linear": linear_table,
    "quality": quality_table,
}


# --- pictures -------------------------------------------------------------------------------------


def plot_quality(rows: Sequence[Row], target: Path) -> None:
    """NLL against cost, and Monte-Carlo error against cost; log axes for cost and error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    families = list(dict.fromkeys(r["point"]["family"] for r in rows))
    colours = ("#777777", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
    for family, colour in zip(families, colours, strict=False):
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
    right.set_title("Monte-Carlo error against 128 draws of the same predictive")
    left.legend(frameon=False)
    right.legend(frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


# --- command line ---------------------------------------------------------------------------------


def fill(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the markers of ``name``.

    Raises:
        ValueError: no such markers.
    """
    start, end = f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no markers {start} ... {end}; put them where it belongs")
    return pattern.sub(lambda _: f"{start}\n{content}\n{end}", text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    parser.add_argument("--readme", action="store_true", help="fill the tables of README.md")
    parser.add_argument("--plots", action="store_true", help="draw benchmarks/plots")
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        content = make(read(name, options.results))
        print(f"## {name}\n\n{content}\n")
        if options.readme:
            text = fill(text, name, content)
    if options.readme:
        README.write_text(text, encoding="utf-8")
    if options.plots and (rows := read("quality", options.results)):
        plot_quality(rows, FOLDER / "plots" / "quality.png")


if __name__ == "__main__":
    main()
