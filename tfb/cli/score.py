"""``tfb score``: the command's options, its progress and its exit status."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from tfb.cli.console import (
    ROWS_HELP,
    SIGNALLED,
    Artifact,
    Base,
    Columns,
    Device,
    Labels,
    Limit,
    Mode,
    Tail,
    Truncate,
    advanced,
    check_place,
    fail,
    note,
    note_mode,
    parse_columns,
    parse_labels,
    progress_bar,
    quiet,
    say,
)

if TYPE_CHECKING:
    from tfb.sampling.adaptive import Adaptive
    from tfb.scoring.output import Counts

TOO_MANY_ERRORS = 3


def score(
    artifact: Artifact,
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help=f"files, folders, patterns: {ROWS_HELP}")
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="folder for part files and manifest.json"
        ),
    ],
    base: Base = None,
    columns: Columns = None,
    labels: Labels = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="A,B,...", help="columns of yours that pass through")
    ] = None,
    truncate: Truncate = None,
    draws: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="sampled adapters that a prediction averages: an even number, or auto: as many as "
            "each row needs",
        ),
    ] = "10",
    generate: Annotated[
        bool,
        typer.Option(
            "--generate",
            help="rows are prompts: write what follows, and how sure the model is of it",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="with --generate: most tokens of a text; default 128", min=1
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="with --generate: a text ends before this one; \\n is a line break, \\t a tab; "
            "may be given several times",
        ),
    ] = None,
    format: Annotated[str, typer.Option(metavar="NAME", help="parquet or jsonl")] = "parquet",
    resume: Annotated[bool, typer.Option("--resume", help="go on with what is there")] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="go on, and do the parts with errors again")
    ] = False,
    limit: Limit = None,
    device: Device = None,
    tolerance: Annotated[
        float | None,
        advanced(
            "--draws-tolerance",
            metavar="X",
            help="with --draws auto: the standard error from sampling that the probability of the "
            "predicted class may have; default 0.01",
        ),
    ] = None,
    most: Annotated[
        int | None,
        advanced(
            "--most-draws", metavar="N", help="with --draws auto: where a row stops; default 64"
        ),
    ] = None,
    per_draw: Annotated[
        bool, advanced("--per-draw", help="keep every draw's probabilities")
    ] = False,
    mode: Mode = None,
    tail: Tail = None,
    batch_tokens: Annotated[
        int, advanced(metavar="N", help="tokens of a batch, padding included", min=1)
    ] = 4096,
    part_rows: Annotated[int, advanced(metavar="N", help="most rows of a part file", min=1)] = 2048,
    max_error_rate: Annotated[
        float, advanced(metavar="SHARE", help="stop above this share of errors", min=0, max=1)
    ] = 0.05,
    engine: Annotated[
        str,
        advanced(
            metavar="NAME", help="local: this process; ray: workers of Ray (extra tfb\\[ray])"
        ),
    ] = "local",
    workers: Annotated[
        int | None,
        advanced(metavar="N", help="models with --engine ray; default: as many as fit", min=1),
    ] = None,
    ray_address: Annotated[
        str | None,
        advanced(metavar="ADDRESS", help="cluster of --engine ray; default: this machine"),
    ] = None,
) -> None:
    """Score any number of rows into a folder of part files; can be resumed.

    [bold]Examples[/]

    tfb score my-adapter-tfb rows.csv -o scored
    tfb score my-adapter-tfb 'rows/*.parquet' -o scored --draws auto --keep user
    tfb score my-adapter-tfb rows.csv -o scored --resume
    tfb score my-adapter-tfb prompts.jsonl -o written --generate --stop '.'

    Exit status: 0 all rows are done; 1 refused or broken off (a full disk);
    3 too many errors; 130 or 143 stopped by SIGINT or SIGTERM after the part in
    flight. What was finished is kept in any case; --resume goes on with it.
    """
    from tfb.scoring.job import Job
    from tfb.scoring.run import run

    quiet()
    check_place("--output", output, artifact)
    job = Job(
        artifact=artifact,
        inputs=tuple(inputs),
        output=output,
        base=base,
        tolerance=tolerance,
        most=most,
        draws=int(draws) if re.fullmatch("-?[0-9]{1,99}", draws) else draws,
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
        generate=generate,
        max_new_tokens=max_new_tokens,
        stop=tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in stop or []),
        limit=limit,
        device=device,
        workers=workers,
        ray_address=ray_address,
    )
    job.check()
    note_mode((job.sidecar["mode"], job.sidecar.get("tail")), mode, tail)
    with progress_bar("scoring") as bar:
        done = run(
            job,
            resume=resume,
            retry_errors=retry_errors,
            max_error_rate=max_error_rate,
            engine=engine,
            report=lambda now, total: bar.update(now.rows, total, f"{now.errors} errors"),
        )
    counts = done.counts
    cut = f", {counts.truncated} cut on the {truncate}" if truncate else ""
    say(f"{done.status}: {counts.rows} rows, {counts.errors} of them errors{cut}: {output}")
    if job.adaptive is not None:
        say(_draws(counts, job.adaptive))
    if done.signal is not None:
        note("the same command with --resume goes on from here")
        raise typer.Exit(SIGNALLED + done.signal)
    if done.too_many_errors:
        fail(
            f"{counts.errors} of {counts.rows} rows are errors, more than --max-error-rate "
            f"{max_error_rate:g}; see the column 'error', then go on with --retry-errors"
        )
        raise typer.Exit(TOO_MANY_ERRORS)


def _draws(counts: Counts, adaptive: Adaptive) -> str:
    """Say how many draws rows took, and how many would have needed more."""
    scored = counts.rows - counts.errors
    mean = f"draws: {counts.draws / max(1, scored):.3g} a row on average"
    if not counts.capped:
        return mean
    return (
        f"{mean}; {counts.capped} of {scored} rows stopped at {adaptive.most} draws, their error "
        f"still above {adaptive.tolerance:g} (--most-draws, --draws-tolerance)"
    )
