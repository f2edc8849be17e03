"""Tables and pictures from the committed rows: ``python -m benchmarks.tables``.

Of each point the newest row counts, apart for each device and not for toy sizes. --readme puts the
tables between ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks:NAME -->`` of README.md or of
their own page (``PAGES``); --plots draws benchmarks/plots/*.png. Absolute times are shown only
where a GPU took them. To add a table: a function in tables.py of its folder, and an entry here.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.calibration.ablation_tables import ablations_table, plot_ablations
from benchmarks.calibration.pictures import plot_calibration
from benchmarks.calibration.quality_tables import plot_quality, quality_table
from benchmarks.calibration.tables import calibration_table, evidence_table
from benchmarks.environment import REPOSITORY, RESULTS
from benchmarks.inference.tables import model_table, passes_table, predict_table
from benchmarks.kernels.tables import layer_table, linear_table, predictive_table
from benchmarks.markdown import Row
from benchmarks.paper.tables import paper_table
from benchmarks.scoring.tables import score_table

README = REPOSITORY / "README.md"
FOLDER = REPOSITORY / "benchmarks"
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
PRINTED = TABLES | {"predictive": predictive_table}
PLOTS: dict[str, Callable[[Sequence[Row], Path], None]] = {
    "quality": plot_quality,
    "calibration": plot_calibration,
    "ablations": plot_ablations,
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
    return PRINTED[name](read(SUITES.get(name, name), folder, toy=toy))


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
    parser.add_argument("--readme", action="store_true", help="fill the tables of the READMEs")
    parser.add_argument("--plots", action="store_true", help="draw benchmarks/plots")
    parser.add_argument("--toy", action="store_true", help="only toy rows, to try the tables out")
    options = parser.parse_args(arguments)
    if options.toy and (options.readme or options.plots):
        parser.error("toy rows are no results: leave --readme and --plots out")
    for name in PRINTED:
        content = make(name, options.results, toy=options.toy)
        print(f"## {name}\n\n{content}\n")
        if options.readme and name in TABLES:
            page = PAGES.get(name, README)
            before = page.read_text(encoding="utf-8")
            if (after := fill(before, name, content)) != before:
                page.write_text(after, encoding="utf-8")
    for name, draw in PLOTS.items():
        if options.plots and (rows := read(name, options.results)):
            draw(rows, FOLDER / "plots" / f"{name}.png")


if __name__ == "__main__":
    main()
