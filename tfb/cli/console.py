"""What the commands have in common: options, loading, and what is printed."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

if TYPE_CHECKING:
    from tfb.data.batching import EncodedRows
    from tfb.data.encoding import RowEncoder
    from tfb.data.rows import Row, RowFormat
    from tfb.evaluation.metrics import Evaluation
    from tfb.pretrained import TfbModel
    from tfb.sampling.config import SamplingConfig
    from tfb.search.result import PredictiveFit

SIGNALLED = 128  # plus a signal's number: the exit status, as shells have it
FIRST, EVERY = 5, 30.0  # seconds until the first line of progress, and between lines
# Of a terminal: in a file's name or a label they would move the cursor, or worse.
CONTROLS = {n: f"\\x{n:02x}" for n in (*range(9), *range(11, 32), *range(127, 160))}


def console(**options: Any) -> Console:
    """Return a console that prints text as it is: a file's name or a label may hold [bold]."""
    return Console(markup=False, emoji=False, highlight=False, **options)


out = console(width=None if sys.stdout.isatty() else 120)

# --- options --------------------------------------------------------------------------------------


def advanced(*names: str, help: str, **more: Any) -> Any:
    """Return an option that help shows with ``--advanced`` only."""
    return typer.Option(*names, help=help, hidden=True, rich_help_panel="Advanced", **more)


class Command(TyperCommand):
    """A command whose rare options are shown by ``--help --advanced``.

    No argument of it may be empty: a path of '' would be the current folder.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Show all options if that is asked for; else say where the others are."""
        params: list[Any] = self.params
        rare = [param for param in params if getattr(param, "hidden", False)]
        if "--advanced" in args:
            args = ["--help"]
            for param in rare:
                param.hidden = False
        elif rare:
            self.epilog = f"More options: {ctx.command_path} --help --advanced"
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        for param in params:
            values = given.get(param.name)
            if "" in (values if isinstance(values, list | tuple) else (values,)):
                raise typer.BadParameter("is empty ('')", ctx=ctx, param=param)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C ends it with a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            fail("interrupted")
            raise typer.Exit(SIGNALLED + signal.SIGINT) from error

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; a flag has nothing to be given."""
        found = super().get_params(ctx)
        for param in found:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return list(found)


ROWS_HELP = "JSONL, JSON, CSV, Parquet or Arrow"
LABEL_REMEDY = "--columns label=NAME"
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="base model, a folder or hub name; default: as the artifact or adapter says",
    ),
]
Artifact = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="what tfb fit wrote: folder or hub name")
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one"),
]
Draws = Annotated[
    int,
    typer.Option(metavar="N", help="sampled adapters that a prediction averages: an even number"),
]
Mode = Annotated[
    str | None,
    advanced(
        metavar="NAME",
        help="which tokens get noise: full (all) or tail (the last); default: as fitted",
    ),
]
Tail = Annotated[
    int | None,
    advanced(
        metavar="N",
        help="with --mode tail: how many of the prompt's last tokens get noise",
        min=1,
        max=1 << 31,
    ),
]
BatchSize = Annotated[int, advanced(metavar="N", help="rows that the model sees at once", min=1)]
Limit = Annotated[
    int | None,
    typer.Option(metavar="N", help="use only the first rows", min=1, max=sys.maxsize),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="OURS=YOURS",
        help="columns that have other names in your data: text=sentence,label=gold of a "
        "classifier, prompt=question,label=gold of a language model; fit keeps them",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        help="names of the classes in order, or a file with one a line; for language models the "
        "choices of rows that bring none; fit keeps them",
    ),
]
Truncate = Annotated[
    str | None,
    typer.Option(
        metavar="SIDE", help="left or right: cut rows that are too long; default: refuse them"
    ),
]
LabelTokens = Annotated[
    str | None,
    advanced(
        metavar="NAME",
        help="which tokens of a choice are scored: all, or the last one; default: what fit found "
        "to suit the adapter",
    ),
]


def as_flags(message: str, flags: Mapping[str, str], given: Sequence[str] = ()) -> str:
    """Say "draws=3: expected an even number" as "--draws 3: expected an even number".

    The library names parameters; ``flags`` are the command's options by the names of theirs.
    What the user has ``given``, such as a folder called "seed=0", stays as it is.
    """
    if quoted := next((text for text in given if "=" in text and text in message), None):
        parts = message.split(quoted)
        return quoted.join(as_flags(part, flags, given) for part in parts)
    message = re.sub(r"bayes\.configure\((.*?)\)", r"\1", message)
    if not flags:
        return message
    names = "|".join(map(re.escape, flags))
    # Not within a word, a path or a flag's own value.
    pattern = rf"""(?<![\w./'"-])({names})=(?:(True)\b|'([^']*)'|([^\s,;:)]+))"""

    def flag(found: re.Match[str]) -> str:
        name, true, quoted, bare = found.groups()
        value = quoted if quoted is not None else bare
        return flags[name] if true else f"{flags[name]} {value}"

    message = re.sub(rf"\bby ({names})\b", lambda m: f"by {flags[m[1]]}", message)
    return re.sub(pattern, flag, message)


def quiet() -> None:
    """Keep the libraries' own progress and advice out of the way of our messages."""
    import transformers

    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    # PEFT asks transformers for an old name whenever it wraps a model; users can do nothing.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_place(option: str, path: str | Path, artifact: str | None = None) -> None:
    """Refuse an output that cannot be made, or that would lie within an artifact or adapter."""
    path, place = Path(path), Path(os.path.realpath(path))
    if artifact is not None and place.is_relative_to(os.path.realpath(artifact)):
        raise ValueError(f"{option} {path}: is within {artifact}; choose a place elsewhere")
    if gone := [p for p in (path, *path.parents) if p.is_symlink() and not p.exists()]:
        raise ValueError(f"{option} {path}: {gone[0]} is a link to nothing; choose another name")
    there = next(parent for parent in (place, *place.parents) if parent.exists())
    try:
        if there != place and not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        if there.is_dir():
            tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(
            f"{option} {path}: cannot be written ({there}: {error.strerror}); choose another place"
        ) from error


def check_labels(rows: Sequence[Row], needed: str) -> None:
    """Refuse the first row without a label; ``needed`` says by what."""
    from tfb.data import rows as data

    data.check_labels(rows, needed, LABEL_REMEDY)


# --- how rows are read ----------------------------------------------------------------------------


def parse_columns(options: Sequence[str] | None) -> dict[str, str]:
    """Parse "prompt=question,choices=options" as {"prompt": "question", "choices": "options"}."""
    found: dict[str, str] = {}
    for pair in (p for option in options or () for p in option.split(",")):
        ours, separator, theirs = map(str.strip, pair.partition("="))
        if not (separator and ours and theirs):
            raise ValueError(f"--columns {pair!r}: expected name=column, such as text=sentence")
        if ours in found:
            raise ValueError(f"--columns {pair}: {ours!r} is named twice")
        found[ours] = theirs
    return found


def parse_labels(option: str | None) -> tuple[str, ...] | None:
    """Parse "a,b,c", or the lines of a file of that name, as ("a", "b", "c")."""
    if option is None:
        return None
    file = Path(option)
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else None
    names = option.split(",") if lines is None else [line for line in lines if line.strip()]
    return tuple(name.strip() for name in names)


@dataclass(frozen=True)
class Input:
    """An adapter or artifact as a command is given it, and how it reads rows; no weights yet."""

    folder: Path
    base: str
    sidecar: Mapping[str, Any]
    label_tokens: str | None
    form: RowFormat
    encoder: RowEncoder

    @classmethod
    def of(
        cls,
        name: str,
        base: str | None,
        columns: Sequence[str] | None = None,
        labels: str | None = None,
        truncate: str | None = None,
        label_tokens: str | None = None,
        *,
        length_normalization: str | None = None,
    ) -> Input:
        """Read configurations and the tokenizer.

        What is not given is as an artifact has it; ``length_normalization`` is of an adapter only.
        """
        from tfb.adapters.artifact import base_of, read_sidecar
        from tfb.adapters.loading import (
            FILES,
            adapter_config,
            adapter_folder,
            base_config,
            local_folder,
            tokenizer_of,
        )
        from tfb.data.encoding import LABEL_TOKENS, RowEncoder
        from tfb.data.rows import fitted_task
        from tfb.scoring.job import saved_format

        if length_normalization is None:
            sidecar = read_sidecar(folder := local_folder(name, FILES))
        else:
            folder, sidecar = adapter_folder(name), {"length_normalization": length_normalization}
        given, named = parse_columns(columns), parse_labels(labels)
        base = base_of(folder, base)
        task, config = str(adapter_config(folder).get("task_type")), base_config(base, folder)
        if length_normalization is not None:
            task = fitted_task(task, given)
        sidecar |= {"task": task}
        encoder = RowEncoder.of(
            tokenizer_of(folder, base),
            task,
            config,
            label_tokens=label_tokens or sidecar.get("label_tokens", LABEL_TOKENS[0]),
            length_normalization=sidecar.get("length_normalization", "none"),
            truncate=truncate,
        )
        form = saved_format(sidecar, config, given, named)
        return cls(folder, base, sidecar, label_tokens, form, encoder)

    def read(self, path: Path, limit: int | None) -> list[Row]:
        """Read the rows of a file, folder or pattern."""
        from tfb.data.readers import read_rows

        return read_rows(path, self.form, limit=limit)

    def encode(self, rows: Sequence[Row]) -> EncodedRows:
        """Encode rows; say so if some were cut."""
        encoded = self.encoder(rows)
        if cut := encoded.rows_cut:
            note(
                f"{cut} of {len(rows)} rows were cut on the {self.encoder.truncate} to "
                f"{self.encoder.limit} tokens"
            )
        return encoded

    def load(
        self,
        device: str | None,
        mode: str | None = None,
        tail: int | None = None,
        **options: Any,
    ) -> TfbModel:
        """Load the model, in ``mode`` if one is given; options as ``tfb.from_pretrained``."""
        import tfb

        m = tfb.from_pretrained(
            self.folder,
            self.base,
            tokenizer=self.encoder.tokenizer,
            device=device,
            label_tokens=self.label_tokens,
            **options,
        )
        note_mode((m.bayes.config.mode, m.bayes.config.tail), mode, tail)
        if mode is not None:
            m.bayes.configure(mode=mode, tail=tail)
        return m


def note_mode(searched: tuple[str, int | None], mode: str | None, tail: int | None) -> None:
    """Say that sigma was searched in another mode than the one asked for (None: in that one)."""
    if mode is not None and searched != (mode, tail):
        note(
            f"sigma was searched with mode={searched[0]} tail={searched[1]}; it need not suit "
            f"mode={mode} tail={tail}"
        )


# --- what is printed and written ------------------------------------------------------------------


def note(text: str) -> None:
    """Print a remark on stderr."""
    console(stderr=True).print(f"note: {text}".translate(CONTROLS), soft_wrap=True)


class Meter:
    """What is done of long work: a bar, or where there is no terminal a line now and then."""

    def __init__(self, label: str, total: int | None, bar: Progress) -> None:
        self.label, self.total, self.done, self.remark = label, total, 0, ""
        self._bar, self._task = bar, bar.add_task(label, total=total, remark="")
        self._started = time.monotonic()
        self._told = self._started - EVERY + FIRST

    def advance(self, n: int) -> None:
        """Add to what is done."""
        self.update(self.done + n, self.total)

    def update(self, done: int, total: int | None, remark: str = "") -> None:
        """Set what is done, of how much, and a remark on it."""
        self.done, self.total, self.remark = done, total, remark
        self._bar.update(self._task, completed=done, total=total, remark=remark)
        if done != total and time.monotonic() - self._told >= EVERY:
            self.tell()

    def tell(self) -> None:
        """Print a line where there is no terminal."""
        if self._bar.console.is_terminal:
            return
        self._told = time.monotonic()
        whole = "" if self.total is None else f" of {self.total:,}"
        remark = f", {self.remark}" if self.remark else ""
        line = f"{self.label}: {self.done:,}{whole}{remark}, {self._told - self._started:.0f} s"
        self._bar.console.print(line, soft_wrap=True)

    def end(self) -> None:
        """Print the last line of work that was not short."""
        if time.monotonic() - self._started >= FIRST:
            self.tell()


@contextmanager
def progress_bar(label: str, total: int | None = None) -> Iterator[Meter]:
    """Show progress on stderr, so that stdout stays clean."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[remark]}"),
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
    )
    with bar if bar.console.is_terminal else nullcontext():
        meter = Meter(label, total, bar)
        yield meter
    meter.end()


def evaluated(methods: Mapping[str, SamplingConfig]) -> int:
    """Return how often an evaluation of the adapter and these methods goes over its rows."""
    return 1 + sum((c.sigma, c.temperature) != (0.0, 1.0) for c in methods.values())


def print_fit(found: PredictiveFit) -> None:
    """Print the verdict, with all notes."""
    say(str(replace(found, notes=found.notes[:1])))
    for remark in found.notes[1:]:
        say(f"note: {remark}")


def print_curve(found: PredictiveFit) -> None:
    """Print every sigma that was measured; * marks the answer."""
    table = Table(title=f"{found.metric} on {found.anchors} anchors")
    for heading in ("sigma", "T", "loss", "change", "± error", "accuracy %", "anchors"):
        table.add_column(heading, justify="right")
    found_at = found.sigma, found.temperature
    for p in found.curve:
        table.add_row(
            f"{p.sigma:.5g}" + " *" * ((p.sigma, p.temperature) == found_at),
            f"{p.temperature:.3g}",
            f"{p.loss:.4f}",
            f"{p.loss - found.baseline:+.4f}",
            "" if p.standard_error is None else f"{p.standard_error:.4f}",
            "" if p.accuracy is None else f"{100 * p.accuracy:.1f}",
            str(p.anchors or found.anchors),
        )
    out.print(table)


def fail(text: str) -> None:
    """Print an error on stderr."""
    error = Text.assemble(("error", "bold red"), f": {text.translate(CONTROLS)}")
    console(stderr=True).print(error, soft_wrap=True)


def say(text: str) -> None:
    """Print a line on stdout as it is."""
    out.print(text.translate(CONTROLS), soft_wrap=True)


def print_metrics(found: Sequence[Evaluation]) -> None:
    """Print one table, a row for each evaluation."""
    from tfb.evaluation.metrics import evaluate

    table = Table()
    for heading in ("data", "method"):
        table.add_column(heading)
    for heading in ("accuracy %", "NLL", "ECE %", "Brier", "conf-acc %", "flipped %"):
        table.add_column(heading, justify="right")
    for e in found:
        assert e.labels is not None
        reference = next(f for f in found if f.dataset == e.dataset).probs.argmax(-1)
        m = evaluate(e.probs, e.labels, reference_predictions=reference)
        table.add_row(
            e.dataset.translate(CONTROLS),
            e.name,
            f"{100 * m.accuracy:.2f}",
            f"{m.nll:.4f}",
            f"{100 * m.ece:.2f}",
            f"{m.brier:.4f}",
            f"{100 * m.miscalibration:+.2f}",
            f"{100 * (m.flip_ratio or 0):.2f}",
        )
    out.print(table)
