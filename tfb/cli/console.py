"""What the commands have in common: options, loading, and what is printed."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tfb.data.batching import EncodedRows
    from tfb.data.encoding import RowEncoder
    from tfb.data.rows import Row, RowFormat
    from tfb.evaluation.metrics import Evaluation, Metrics
    from tfb.model import BayesianModel
    from tfb.search.result import PredictiveFit

out = Console(width=None if sys.stdout.isatty() else 120)

# --- options --------------------------------------------------------------------------------------

Model = Annotated[str, typer.Option("--model", help="base model: folder or hub name")]
Artifact = Annotated[Path, typer.Option(help="folder written by tfb fit")]
Draws = Annotated[int, typer.Option(help="posterior draws (antithetic pairs: an even number)")]
Mode = Annotated[str | None, typer.Option(help="full or tail; default: as sigma was searched")]
Tail = Annotated[int | None, typer.Option(help="positions with noise in --mode tail", min=1)]
BatchSize = Annotated[int, typer.Option(help="rows in a batch", min=1)]
Limit = Annotated[int | None, typer.Option(help="use only the first rows", min=1)]
Columns = Annotated[
    list[str] | None,
    typer.Option("--columns", help="ours=yours: text=sentence,label=gold; repeatable"),
]
Labels = Annotated[
    str | None,
    typer.Option(
        help="names of the classes in order, a,b,c or a file with one a line; for language models "
        "the choices of rows that bring none; fit keeps them"
    ),
]
Truncate = Annotated[
    str | None, typer.Option(help="left or right: cut rows that are too long, and say so")
]
LABEL_TOKENS_HELP = "by which tokens choices are scored: all, or the last one (authors' scripts)"


def as_flags(message: str, flags: Mapping[str, str], given: Sequence[str] = ()) -> str:
    """Say "draws=3: expected an even number" as "--draws 3: expected an even number".

    The library names parameters; ``flags`` are the command's options by the names of theirs.
    What the user has ``given``, such as a folder called "seed=0", stays as it is.
    """
    if quoted := next((text for text in given if "=" in text and text in message), None):
        parts = message.split(quoted)
        return quoted.join(as_flags(part, flags, given) for part in parts)
    message = re.sub(r"bayes\.configure\((.*?)\)", r"\1", message)
    names = "|".join(map(re.escape, flags))
    # Not within a word, a path or a flag's own value.
    pattern = rf"""(?<![\w./'"-])({names})=(?:(True)\b|'([^']*)'|([^\s,;:)]+))"""

    def flag(found: re.Match[str]) -> str:
        name, true, quoted, bare = found.groups()
        value = quoted if quoted is not None else bare
        return flags[name] if true else f"{flags[name]} {value}"

    return re.sub(pattern, flag, message) if flags else message


def quiet() -> None:
    """Keep the libraries' own progress and advice out of the way of our messages."""
    import transformers

    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    # PEFT asks transformers for an old name whenever it wraps a model; users can do nothing.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_labels(rows: Sequence[Row], needed: str) -> None:
    """Refuse the first row without a label, by file and line; ``needed`` says by what."""
    if bare := [row.source for row in rows if row.label is None]:
        raise ValueError(
            f"{bare[0]}: no label; {needed}; if its column has another name: --columns label=NAME"
        )


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
    """Rows of files as a command reads them: for an adapter or artifact, before its weights are."""

    tokenizer: PreTrainedTokenizerBase
    form: RowFormat
    encoder: RowEncoder

    @classmethod
    def of(
        cls,
        model: str,
        adapter: str | Path,
        columns: Sequence[str] | None,
        labels: str | None,
        truncate: str | None,
        *,
        label_tokens: str,
        length_normalization: str,
        saved: Sequence[str] | None = None,
    ) -> Input:
        """Read configurations and the tokenizer; ``saved`` are labels of an artifact."""
        from tfb.adapters.loading import adapter_config, base_config, class_names, load_tokenizer
        from tfb.data.encoding import RowEncoder
        from tfb.data.rows import RowFormat

        given, named = parse_columns(columns), parse_labels(labels)
        tokenizer = load_tokenizer(model)
        task = str(adapter_config(adapter).get("task_type"))
        config = base_config(model, adapter)
        encoder = RowEncoder.of(
            tokenizer,
            task,
            config,
            label_tokens=label_tokens,
            length_normalization=length_normalization,
            truncate=truncate,
        )
        form = RowFormat(given, class_names(task, config, named, saved), task)
        return cls(tokenizer, form, encoder)

    @classmethod
    def of_artifact(
        cls,
        model: str,
        artifact: Path,
        columns: Sequence[str] | None,
        labels: str | None,
        truncate: str | None,
        label_tokens: str | None = None,
    ) -> Input:
        """Read rows as an artifact's were; ``label_tokens`` takes the place of its own."""
        from tfb.adapters.artifact import read_sidecar

        sidecar = read_sidecar(artifact)
        return cls.of(
            model,
            artifact,
            columns,
            labels,
            truncate,
            label_tokens=choose_label_tokens(sidecar, label_tokens),
            length_normalization=sidecar.get("length_normalization", "none"),
            saved=sidecar.get("labels"),
        )

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


def load_artifact(
    model: str,
    artifact: Path,
    tokenizer: PreTrainedTokenizerBase,
    mode: str | None = None,
    tail: int | None = None,
) -> BayesianModel:
    """Load an artifact onto the device, in ``mode`` if one is given."""
    from tfb.adapters.artifact import load
    from tfb.adapters.loading import set_padding, to_device

    bayes = load(model, artifact)
    set_padding(bayes.base, tokenizer)
    to_device(bayes.model)
    note_mode((bayes.config.mode, bayes.config.tail), mode, tail)
    if mode is not None:
        bayes.configure(mode=mode, tail=tail)
    return bayes


def note_mode(searched: tuple[str, int | None], mode: str | None, tail: int | None) -> None:
    """Say that sigma was searched in another mode than the one asked for (None: in that one)."""
    if mode is not None and searched != (mode, tail):
        note(
            f"sigma was searched with mode={searched[0]} tail={searched[1]}; it need not suit "
            f"mode={mode} tail={tail}"
        )


def choose_label_tokens(sidecar: Mapping[str, Any], given: str | None = None) -> str:
    """Return the convention by which choices are scored: ``given``, or an artifact's.

    Say so if it is not the one that the adapter was trained for.
    """
    chosen = given or str(sidecar.get("label_tokens", "all"))
    figures = (sidecar.get("extra") or {}).get("label_tokens_nll")
    if isinstance(figures, dict) and _least(figures) != chosen:
        note(f"label_tokens is {chosen!r}, but {_trained_for(figures)}")
    return chosen


# --- what is printed and written ------------------------------------------------------------------


def note(text: str) -> None:
    """Print a remark on stderr."""
    Console(stderr=True).print(f"note: {text}", soft_wrap=True, markup=False, highlight=False)


@contextmanager
def progress_bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr, so that stdout stays clean; yield ``advance(n)``."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


def print_fit(found: PredictiveFit) -> None:
    """Print the curve and the answer."""
    table = Table(title=f"{found.metric} on {found.anchors} anchors")
    for heading in ("sigma", "T", "loss", "change", "± error", "accuracy %", "anchors"):
        table.add_column(heading, justify="right")
    for p in found.curve:
        table.add_row(
            f"{p.sigma:.5g}",
            f"{p.temperature:.3g}",
            f"{p.loss:.4f}",
            f"{p.loss - found.baseline:+.4f}",
            "" if p.standard_error is None else f"{p.standard_error:.4f}",
            "" if p.accuracy is None else f"{100 * p.accuracy:.1f}",
            str(p.anchors or found.anchors),
        )
    out.print(table)
    kl = "" if found.kl is None else f", KL {found.kl:.4g} nats"
    lam = "" if found.implied_lambda is None else f", implied lambda {found.implied_lambda:.3g}"
    cost = f"{found.passes:.4g} passes{kl}{lam}"
    say(f"sigma = {found.sigma:.6g}, T = {found.temperature:.4g} ({found.objective}; {cost})")
    say(found.stopped)
    if found.interval is not None:
        low, high = found.interval
        end = "beyond what was measured" if high is None else f"{high:.4g}"
        say(f"95 % interval of sigma over anchors: {low:.4g} to {end}")
    if found.change is not None:
        say("95 % interval of the change of the loss: {:+.4f} to {:+.4f}".format(*found.change))
    for remark in found.notes:
        say(f"note: {remark}")


def say(text: str) -> None:
    """Print a line on stdout as it is."""
    out.print(text, markup=False, soft_wrap=True)


def print_label_tokens(figures: Mapping[str, float], chosen: str) -> None:
    """Print by which tokens of the choices the adapter was trained, as its NLL tells."""
    say(f"label_tokens: {_trained_for(figures)}")
    if (trained := _least(figures)) != chosen:
        note(
            f"the search goes on with {chosen!r}, where the adapter's figures are wrong; stop it "
            f"and fit with --label-tokens {trained}"
        )


def _trained_for(figures: Mapping[str, float]) -> str:
    said = " and ".join(f"{nll:.4g} with {name!r}" for name, nll in figures.items())
    return f"the adapter was trained for {_least(figures)!r}: on the anchors its NLL is {said}"


def _least(figures: Mapping[str, float]) -> str:
    return min(figures, key=figures.__getitem__)


def print_metrics(found: Sequence[Evaluation]) -> list[Metrics]:
    """Print one table, a row for each evaluation, and return what it says."""
    from tfb.evaluation.metrics import evaluate

    table, figures = Table(), []
    for heading in ("data", "method"):
        table.add_column(heading)
    for heading in ("accuracy %", "NLL", "ECE %", "Brier", "conf-acc %", "flipped %"):
        table.add_column(heading, justify="right")
    for e in found:
        assert e.labels is not None
        reference = next(f for f in found if f.dataset == e.dataset).probs.argmax(-1)
        figures.append(m := evaluate(e.probs, e.labels, reference_predictions=reference))
        table.add_row(
            e.dataset,
            e.name,
            f"{100 * m.accuracy:.2f}",
            f"{m.nll:.4f}",
            f"{100 * m.ece:.2f}",
            f"{m.brier:.4f}",
            f"{100 * m.miscalibration:+.2f}",
            f"{100 * (m.flip_ratio or 0):.2f}",
        )
    out.print(table)
    return figures
