"""The command line, ``tfb`` or ``python -m tfb``: fit, evaluate, score, verify and others.

Each command checks its inputs and its output folder before any long work.
"""

from __future__ import annotations

import io
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
from tfb.cli.verify import verify
from tfb.plain import told

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
for command in (fit, evaluate, score, verify, report, export, demo):
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
    tfb verify scored                              is every part there and whole?
    """


def main() -> NoReturn:
    """Run the command line: what goes wrong ends in one clear line and exit code 1."""
    # PEFT imports it, and it warns of kernels that it could not fetch, whether or not they matter.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):  # a terminal or a pipe may know ASCII only
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # Rust's panics in tokenizers are no Exception
        if os.environ.get("TFB_TRACEBACK"):
            raise
        fail(as_flags(_told(error), _flags(sys.argv[1:2]), sys.argv[2:]))
        sys.exit(1)
    sys.exit(0)


def _told(error: BaseException) -> str:
    """Return what to print of an error: of what others raise, which may go on for pages, a line."""
    if isinstance(error, ValueError | OSError | ImportError):
        return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError"):
        return f"out of memory; take smaller batches ({told(error)})"
    return f"{told(error)} (TFB_TRACEBACK=1 shows where)"


def _flags(command: list[str]) -> dict[str, str]:
    """Return the options of a command by the names of their parameters."""
    commands: Any = typer.main.get_command(app)
    found = [commands.commands[name] for name in command if name in commands.commands]
    return {p.name: p.opts[0] for c in found for p in c.params if p.param_type_name == "option"}
