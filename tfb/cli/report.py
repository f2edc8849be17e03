"""``tfb report``: the command's options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfb.cli.console import (
    ROWS_HELP,
    Artifact,
    Base,
    BatchSize,
    Columns,
    Device,
    Draws,
    Input,
    Labels,
    Limit,
    Truncate,
    check_labels,
    check_place,
    evaluated,
    print_metrics,
    progress_bar,
    quiet,
    say,
)

if TYPE_CHECKING:
    from tfb.evaluation.metrics import Evaluation


def report(
    artifact: Artifact,
    data: Annotated[
        list[Path], typer.Argument(metavar="DATA...", help=f"labelled rows: {ROWS_HELP}")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PAGE",
            help="the page: a new .html file, or a folder for it",
        ),
    ],
    base: Base = None,
    shift: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="rows of another kind, where it should be unsure; repeatable"
        ),
    ] = None,
    columns: Columns = None,
    labels: Labels = None,
    truncate: Truncate = None,
    draws: Draws = 10,
    limit: Limit = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier page")] = False,
    batch_size: BatchSize = 50,
) -> None:
    """Write one HTML page: what the fit changed, on which rows, how surely, and how it was made.

    [bold]Examples[/]

    tfb report my-adapter-tfb test.csv -o report.html
    tfb report my-adapter-tfb test.csv --shift other.csv -o report.html

    The labels of --shift are not used.
    """
    from dataclasses import replace

    from tfb.adapters.loading import check_device
    from tfb.draws import check_even
    from tfb.evaluation.report import facts, page_path, write_report
    from tfb.scoring.evaluate import evaluations

    quiet()
    check_device(device)
    check_even(draws)
    check_place("--output", page_path(output, overwrite=overwrite))
    files = [*data, *(shift or [])]
    names = [path.stem for path in files]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"DATA, --shift: two files are called {twice[0]!r}; rename one")
    given = Input.of(artifact, base, columns, labels, truncate)
    rows = {path: given.read(path, limit) for path in files}
    for path in data:
        check_labels(rows[path], "report needs one on every row of DATA, --shift needs none")
    encoded = {path: given.encode(rows[path]) for path in files}
    m = given.load(device)
    found: dict[Path, list[Evaluation]] = {}
    for path in files:
        with progress_bar(path.name, evaluated(m.methods) * len(rows[path])) as bar:
            adapter, *others, ours = evaluations(
                m.bayes,
                encoded[path],
                dataset=path.stem,
                draws=draws,
                batch_size=batch_size,
                configs=m.methods,
                progress=bar.advance,
            )
        found[path] = [
            replace(e, rows=rows[path], classes=given.form.labels) for e in (adapter, ours, *others)
        ]
    labelled = [e for path in data for e in found[path]]
    print_metrics(labelled)
    page = write_report(
        output,
        labelled,
        given.sidecar.get("fit"),
        title=f"{Path(artifact).name}: the adapter and its predictive",
        ood=[e for path in shift or [] for e in found[path]],
        facts=facts(given.sidecar, draws),
        overwrite=overwrite,
    )
    say(f"report: {page}")
