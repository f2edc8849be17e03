"""``tfb score``: the command's options, its progress and its exit status."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tfb.cli.console import (
    Artifact,
    Columns,
    Labels,
    Limit,
    Mode,
    Model,
    Tail,
    Truncate,
    choose_label_tokens,
    note_mode,
    out,
    parse_columns,
    parse_labels,
    quiet,
)

if TYPE_CHECKING:
    from tfb.scoring.output import Counts

TOO_MANY_ERRORS = 3
SIGNALLED = 128  # plus the signal's number, as shells have it


def score(
    model: Model,
    artifact: Artifact,
    inputs: Annotated[
        list[str],
        typer.Option("--input", help="JSONL, CSV, Parquet, Arrow; folder or pattern; repeatable"),
    ],
    output: Annotated[str, typer.Option(help="folder for part files and manifest.json")],
    format: Annotated[str, typer.Option(help="parquet or jsonl")] = "parquet",
    mode: Mode = None,
    tail: Tail = None,
    draws: Annotated[str, typer.Option(help="posterior draws (an even number), or auto")] = "10",
    batch_tokens: Annotated[
        int, typer.Option(help="tokens of a batch, padding included", min=1)
    ] = 4096,
    part_rows: Annotated[int, typer.Option(help="most rows of a part file", min=1)] = 2048,
    columns: Columns = None,
    labels: Labels = None,
    truncate: Truncate = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="columns that pass through: a,b; repeatable")
    ] = None,
    per_draw: Annotated[bool, typer.Option(help="keep every draw's probabilities")] = False,
    limit: Limit = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what is there")] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="go on, and do the parts with errors again")
    ] = False,
    max_error_rate: Annotated[
        float, typer.Option(help="stop above this share of errors", min=0, max=1)
    ] = 0.05,
    engine: Annotated[
        str, typer.Option(help="local: this process; ray: workers of Ray (extra tfb\\[ray])")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(help="models with --engine ray; default: as many as fit", min=1),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="cluster of --engine ray; default: this machine")
    ] = None,
    device: Annotated[str | None, typer.Option(help="default: a GPU if there is one")] = None,
) -> None:
    """Score any number of rows into a folder of part files; can be resumed.

    Exit status: 0 all rows are done; 1 refused or broken off (a full disk), 3 more errors than
    --max-error-rate, 130 or 143 stopped by SIGINT or SIGTERM after the part in flight. What was
    finished is kept in any case; --resume goes on with it.
    """
    from tfb.adapters.artifact import read_sidecar
    from tfb.scoring.job import Job
    from tfb.scoring.run import run

    quiet()
    job = Job(
        model=model,
        artifact=str(artifact),
        inputs=tuple(inputs),
        output=output,
        draws=int(draws) if draws.lstrip("-").isdecimal() else draws,
        mode=mode,
        tail=tail,
        format=format,
        batch_tokens=batch_tokens,
        part_rows=part_rows,
        columns=parse_columns(columns),
        labels=parse_labels(labels),
        truncate=truncate,
        keep=tuple(name for option in keep or [] for name in option.split(",")),
        per_draw=per_draw,
        limit=limit,
        device=device,
        workers=workers,
        ray_address=ray_address,
    )
    job.check()
    sidecar = read_sidecar(artifact)
    note_mode((sidecar["mode"], sidecar.get("tail")), mode, tail)
    choose_label_tokens(sidecar)
    with _bar() as report:
        done = run(
            job,
            resume=resume,
            retry_errors=retry_errors,
            max_error_rate=max_error_rate,
            engine=engine,
            report=report,
        )
    rows, errors = done.counts.rows, done.counts.errors
    cut = f", {done.counts.truncated} cut on the {truncate}" if truncate else ""
    ended = f"{done.status}: {rows} rows, {errors} of them errors{cut}: {output}"
    out.print(ended, markup=False, soft_wrap=True)
    if done.signal is not None:
        raise typer.Exit(SIGNALLED + done.signal)
    if done.too_many_errors:
        said = (
            f"error: {errors} of {rows} rows are errors, more than --max-error-rate "
            f"{max_error_rate:g}; see the column 'error', then go on with --retry-errors"
        )
        Console(stderr=True).print(said, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(TOO_MANY_ERRORS)


@contextmanager
def _bar() -> Iterator[Callable[[Counts, int], None]]:
    """Show a bar on stderr, so that stdout stays clean; yield what takes reports.

    It appears with the first of them: a refusal is one clear line.
    """
    columns = (
        TextColumn("scoring"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows, {task.fields[errors]} errors"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", errors=0)

    def report(counts: Counts, total: int) -> None:
        bar.start()
        bar.update(task, completed=counts.rows, total=total, errors=counts.errors)

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()
