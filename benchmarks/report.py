"""Tables and pictures from the committed rows: ``python -m benchmarks.report``.

Of each point the newest row counts, apart for each device and not for toy sizes. --readme puts the
tables between ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks:NAME -->`` of README.md or of
their own page (``PAGES``); --plots draws benchmarks/plots/*.png. Absolute times are shown only
where a GPU took them. To add a table: a function here or in a file of its suite, and its name in
``TABLES``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.calibration.ablation_tables import ablations_table, plot_ablations
from benchmarks.calibration.pictures import plot_calibration
from benchmarks.calibration.tables import calibration_table, evidence_table
from benchmarks.kernel_tables import linear_table, model_table, predictive_table
from benchmarks.layer_tables import layer_table
from benchmarks.markdown import Row, spread, table, taken_on
from benchmarks.paper.tables import paper_table
from benchmarks.score_tables import score_table

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"


def read(suite: str, folder: Path, *, toy: bool = False) -> list[Row]:
    """The newest row of every point and device of a suite, toy sizes left out (or nothing else)."""
    path = folder / f"{suite}.jsonl"
    if not path.is_file():
        return []
    newest: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if bool(row.get("toy")) == toy:
            gpu = (row.get("environment", {}).get("gpu") or {}).get("name")
            key = json.dumps([row["device"], gpu, row["measure"], row["point"]], sort_keys=True)
            newest[key] = row
    return list(newest.values())


# --- tables ---------------------------------------------------------------------------------------


def predict_table(rows: Sequence[Row]) -> str:
    """The loops' time over ours, everything in passes of the deterministic adapter, and in which
    batches each of them ran; targets missed."""
    if not rows:
        return "*No rows yet.*"
    names, body = [], []
    for row in rows:
        p, units = row["point"], row["in_units_of"]["ratios"]
        threads = row["environment"]["torch_threads"]
        device = row["device"] if row["device"] != "cpu" else f"cpu, threads: {threads}"
        names.append(f"{p['model']}, {p['rows']} rows x {p['tokens']} tokens ({device})")
        body.append([
            names[-1], spread(row["ratios"]["naive"]), spread(row["ratios"]["flipout"]),
            spread(units["ours"]), spread(units["naive"]),
            # Rows from before batches were chosen have one batch for all.
            spread(units["ours_default"]) if "ours_default" in units else "",
            _batches(row["chosen"]) if "chosen" in row else f"{p['rows']} for all",
            spread(units["noise"], 3),
        ])  # fmt: skip
    headings = (
        "model", "naive loop / ours", "Flipout loop / ours", "ours, in passes", "naive, in passes",
        "ours by default, in passes", "rows a batch", "all noise once, in passes",
    )  # fmt: skip
    rounds = min(r["contenders"]["ours"]["rounds"] for r in rows)
    note = (
        f"Median and quartiles of {rounds} or more interleaved rounds; a pass is one forward of "
        "the deterministic adapter on all rows in one batch, which is also what ours takes by "
        "default."
    )
    parts = [table(headings, body), note, _missed(names, rows), taken_on(rows)]
    return "\n\n".join(part for part in parts if part)


def _batches(chosen: dict[str, dict[str, int | None]]) -> str:
    """Rows a batch that each contender was fastest with, and ours' draws a pass."""
    each = chosen["ours"]["draws_per_pass"] or "default"
    loops = ", ".join(f"{k} {chosen[k]['rows']}" for k in ("naive", "flipout"))
    return f"ours {chosen['ours']['rows']} (draws a pass: {each}), {loops}"


def _missed(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The targets that rows miss, by the rows' names."""
    missed = [
        f"- {name}: {t['name']} is {t['value']:.2f}, the target {t['bound']:.2f}"
        for name, row in zip(names, rows, strict=True)
        for t in row["targets"]
        if not t["met"]
    ]
    return "Targets that are missed:\n\n" + "\n".join(missed) if missed else ""


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
    decoding = [r for r in rows if r["measure"] == "decode"]
    rows = [r for r in rows if r["measure"] != "decode"]
    names = [
        "{model}, {adapter}, {rows} x {tokens}".format_map(r["point"]) + f" ({r['device']})"
        for r in rows
    ]
    columns: dict[str, Row] = {}
    for name, row in zip(names, rows, strict=True):
        units = dict(row["in_units_of"]["ratios"])
        if row["measure"] == "ways":
            units["tail_10"] = units.pop("ours")
        columns.setdefault(name, {}).update(units)
    body = [
        [label, *(spread(u[key]) if key in u else "" for u in columns.values())]
        for key, label in PASSES.items()
    ]
    parts = [table(["in passes of the deterministic adapter", *columns], body)]
    for r in decoding:
        u, p = r["in_units_of"]["ratios"], r["point"]
        parts.append(
            f"Decoding {p['new_tokens']} tokens after {p['rows']} prompts of {p['tokens']} "
            f"with 10 draws ({p['model']}, {r['device']}) takes {spread(u['ours'])} times one "
            "plain generation; ten generations with materialised noise, which average nothing, "
            f"{spread(u['naive'])}."
        )
    parts += [_missed(names, rows), taken_on(rows)]
    return "\n\n".join(part for part in parts if part)


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


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "predict": predict_table,
    "passes": passes_table,
    "layer": layer_table,
    "linear": linear_table,
    "model": model_table,
    "quality": quality_table,
    "score": score_table,
    "evidence": evidence_table,
    "calibration": calibration_table,
    "ablations": ablations_table,
    "paper": paper_table,
}
SUITES = {"evidence": "calibration"}  # whose rows a table shows, where not those of its name
PAGES = {  # where not in the README
    "calibration": FOLDER / "calibration" / "README.md",
    "ablations": FOLDER / "calibration" / "README.md",
    "paper": FOLDER / "paper" / "README.md",
}

# Printed, not in the README.
MORE: dict[str, Callable[[Sequence[Row]], str]] = {"predictive": predictive_table}


# --- pictures -------------------------------------------------------------------------------------


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


PLOTS: dict[str, Callable[[Sequence[Row], Path], None]] = {
    "quality": plot_quality,
    "calibration": plot_calibration,
    "ablations": plot_ablations,
}


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
    parser.add_argument("--readme", action="store_true", help="fill the tables of the READMEs")
    parser.add_argument("--plots", action="store_true", help="draw benchmarks/plots")
    parser.add_argument("--toy", action="store_true", help="only toy rows, to try the tables out")
    options = parser.parse_args(arguments)
    if options.toy and (options.readme or options.plots):
        parser.error("toy rows are no results: leave --readme and --plots out")
    for name, make in (TABLES | MORE).items():
        content = make(read(SUITES.get(name, name), options.results, toy=options.toy))
        print(f"## {name}\n\n{content}\n")
        if options.readme and name in TABLES:
            page = PAGES.get(name, README)
            text = fill(page.read_text(encoding="utf-8"), name, content)
            page.write_text(text, encoding="utf-8")
    for name, draw in PLOTS.items():
        if options.plots and (rows := read(name, options.results)):
            draw(rows, FOLDER / "plots" / f"{name}.png")


if __name__ == "__main__":
    main()
