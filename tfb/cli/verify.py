"""``tfb verify``: the command's argument, and a line for each fault."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfb.cli.console import as_flags, fail, quiet, say


def verify(
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="the folder that tfb score wrote")
    ],
) -> None:
    """Check that a folder of scored rows is complete and that no byte of it has changed.

    [bold]Examples[/]

    tfb verify scored
    tfb verify /archive/scored

    Needs neither model nor input. Exit status: 0 all is well, 1 it is not: each
    fault is a line with its remedy.
    """
    from tfb.scoring.output import Counts
    from tfb.scoring.run import verify as check

    quiet()
    found, faults = check(output)
    for fault in faults:
        fail(as_flags(fault, {"resume": "--resume"}))
    if faults:
        raise typer.Exit(1)
    total = sum(found.values(), Counts())
    say(f"verified: {len(found):,} parts, {total.rows:,} rows, {total.errors:,} errors")
