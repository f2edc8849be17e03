"""The command line: ``tfb fit | evaluate | score | report | export | demo``, or ``python -m tfb``.

Each command checks its inputs and its output folder before any long work.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer

from tfb.cli.console import Command, as_flags, fail, say
from tfb.cli.demo import demo
from tfb.cli.evaluate import evaluate
from tfb.cli.export import export
from tfb.cli.fit import fit
from tfb.cli.report import report
from tfb.cli.score import score

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
for command in (fit, evaluate, score, report, export, demo):
    app.command(cls=Command)(command)


def _print_version(asked: bool) -> None:
    if asked:
        say(f"tfb {version('tfb')}")
        raise typer.Exit


@app.callback()
def tfb(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version"),
    ] = False,
) -> None:
    """Calibrated probabilities from a finished LoRA adapter, without training.

    [bold]Examples[/]

    tfb demo                                       the whole way, in a minute
    tfb fit my-adapter dev.csv                     writes my-adapter-tfb
    tfb evaluate my-adapter-tfb test.csv           is it better, and how surely?
    tfb score my-adapter-tfb rows.csv -o scored    probabilities and uncertainties
    """


def main() -> NoReturn:
    """Run the command line: what goes wrong ends in one clear line and exit code 1."""
    # PEFT imports it, and it warns of kernels that it could not fetch, whether or not they matter.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("TFB_TRACEBACK"):
            raise
        fail(as_flags(_told(error), _flags(sys.argv[1:2]), sys.argv[2:]))
        sys.exit(1)
    sys.exit(0)


def _told(error: Exception) -> str:
    """Return what to print of an error: of torch's, which go on for pages, the first line."""
    if not isinstance(error, RuntimeError):
        return str(error)
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if type(error).__name__ == "OutOfMemoryError":
        return f"{first} Take smaller batches, or --device cpu"
    return f"{first} (TFB_TRACEBACK=1 shows where)"


def _flags(command: list[str]) -> dict[str, str]:
    """Return the options of a command by the names of their parameters."""
    commands: Any = typer.main.get_command(app)
    found = [commands.commands[name] for name in command if name in commands.commands]
    return {p.name: p.opts[0] for c in found for p in c.params if p.param_type_name == "option"}
