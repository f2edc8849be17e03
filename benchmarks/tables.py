"""Tables and pictures from the committed rows: ``python -m benchmarks.tables``.

Of each point the newest row counts, apart for each device and not for toy sizes. --pages puts the
tables between ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks:NAME -->`` of their pages;
--plots draws benchmarks/plots/*.png. Absolute times are shown only where a GPU took them. To add a
table: a function in tables.py of its folder, and an entry here.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.calibration.ablation_tables import ablations_table, plot_ablations
from benchmarks.calibration.decisions import decisions_table
from benchmarks.calibration.quality_tables import plot_quality, quality_table
from benchmarks.calibration.tables import calibration_table, evidence_table, methods_table
from benchmarks.environment import REPOSITORY, RESULTS
from benchmarks.front import plot_front
from benchmarks.generation.tables import decoding_table, generation_table
from benchmarks.inference.tables import model_table, passes_table, predict_table
from benchmarks.kernels.tables import layer_table, linear_table, predictive_table
from benchmarks.markdown import Row
from benchmarks.paper.tables import paper_table
from benchmarks.scoring.tables import score_table

FOLDER = REPOSITORY / "benchmarks"
DOCS = REPOSITORY / "docs"
Table = Callable[[Sequence[Row]], str]
TABLES: dict[str, tuple[Table, str, Path]] = {  # how it is made, of which suite's rows, and where
    "methods": (methods_table, "calibration", REPOSITORY / "README.md"),
    "evidence": (evidence_table, "calibration", DOCS / "calibration.md"),
    "calibration": (calibration_table, "calibration", FOLDER / "calibration" / "README.md"),
    "ablations": (ablations_table, "ablations", FOLDER / "calibration" / "README.md"),
    "decisions": (decisions_table, "decisions", DOCS / "decisions.md"),
    "quality": (quality_table, "quality", DOCS / "performance.md"),
    "passes": (passes_table, "passes", DOCS / "performance.md"),
    "predict": (predict_table, "predict", DOCS / "performance.md"),
    "generation": (generation_table, "generation", DOCS / "generation.md"),
    "decoding": (decoding_table, "decoding", DOCS / "generation.md"),
    "score": (score_table, "score", DOCS / "scoring.md"),
    "layer": (layer_table, "layer", DOCS / "kernels.md"),
    "linear": (linear_table, "linear", DOCS / "kernels.md"),
    "model": (model_table, "model", DOCS / "kernels.md"),
    "paper": (paper_table, "paper", FOLDER / "paper" / "README.md"),
}
PRINTED: dict[str, tuple[Table, str]] = {
    **{name: (draw, suite) for name, (draw, suite, _page) in TABLES.items()},
    "predictive": (predictive_table, "predictive"),
}
PLOTS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {  # and of which suites' rows
    "front": (plot_front, ("reliability", "predict", "passes")),
    "quality": (plot_quality, ("quality",)),
    "ablations": (plot_ablations, ("ablations",)),
}


def read(suite: str, folder: Path, *, toy: bool = False) -> list[Row]:
    """Return the newest row of every point and device of a suite.

    Args:
        suite: Name of the results file.
        folder: Where it lies.
        toy: Take the rows of toy sizes and no others.
    """
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


def make(name: str, folder: Path, *, toy: bool = False) -> str:
    """Return a table from the rows in a folder."""
    draw, suite = PRINTED[name]
    return draw(read(suite, folder, toy=toy))


def fill(text: str, name: str, content: str) -> str:
    """Put ``content`` between the markers of ``name``.

    Raises:
        ValueError: There are no such markers.
    """
    start, end = f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the page has no markers {start} ... {end}; put them where it belongs")
    return pattern.sub(lambda _: f"{start}\n{content}\n{end}", text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pages", action="store_true", help="fill the tables of the pages")
    parser.add_argument("--plots", action="store_true", help="draw benchmarks/plots")
    parser.add_argument("--toy", action="store_true", help="only toy rows, to try the tables out")
    options = parser.parse_args(arguments)
    if options.toy and (options.pages or options.plots):
        parser.error("toy rows are no results: leave --pages and --plots out")
    for name in PRINTED:
        content = make(name, options.results, toy=options.toy)
        print(f"## {name}\n\n{content}\n")
        if options.pages and name in TABLES:
            page = TABLES[name][2]
            before = page.read_text(encoding="utf-8")
            if (after := fill(before, name, content)) != before:
                page.write_text(after, encoding="utf-8")
    for name, (draw, suites) in PLOTS.items():
        rows = [read(suite, options.results) for suite in suites]
        if options.plots and all(rows):
            draw(*rows, FOLDER / "plots" / f"{name}.png")


if __name__ == "__main__":
    main()
