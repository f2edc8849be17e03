"""``tfb demo``: the whole way on an embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfb.cli.console import Draws, quiet


def demo(
    output: Annotated[Path | None, typer.Option(help="folder for pictures and page")] = None,
    draws: Draws = 10,
) -> None:
    """Go the whole way on an embedded model: fit sigma, compare, draw the pictures."""
    from tfb.demo.run import run
    from tfb.draws import check_even

    quiet()
    check_even(draws)
    run(output, draws=draws)
