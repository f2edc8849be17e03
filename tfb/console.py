"""What the commands have in common: checks, loading, and what is printed."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

out = Console(width=None if sys.stdout.isatty() else 120)


def quiet() -> None:
    """One message each from us; the libraries' own progress and advice stay out of the way."""
    import transformers

    # PEFT asks transformers for an old name whenever it wraps a model; users can do nothing.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_draws(draws: int) -> None:
    if draws < 2 or draws % 2:
        raise ValueError(f"--draws {draws}: expected a positive even number (antithetic pairs)")


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: expected at least 1")


def check_labels(rows: Sequence[Any], needed: str) -> None:
    """Refuse the first row without a label, by file and line; ``needed``: by what."""
    if bare := [row.source for row in rows if row.label is None]:
        raise ValueError(f"{bare[0]}: no label; {needed}")


def _early_config(model: str, task: str) -> Any:
    """The base model's configuration, if rows can be checked by it before weights are loaded.

    None for a classification head: its number of classes comes with the adapter's weights.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model, trust_remote_code=False) if task != "SEQ_CLS" else None


def encode_early(rows: Any, tokenizer: Any, model: str, task: str) -> Any:
    """The rows encoded, and so checked, before weights are loaded; None where that is too early."""
    from tfb.scoring import encode_rows

    config = _early_config(model, task)
    return None if config is None else encode_rows(rows, tokenizer, task, config)


def load_artifact(
    model: str, artifact: Path, tokenizer: Any, mode: str | None = None, tail: int | None = None
) -> Any:
    import tfb
    from tfb.scoring import set_padding, to_device

    bayes = tfb.load(model, artifact)
    set_padding(bayes, tokenizer)
    to_device(bayes)
    note_mode((bayes.mode, bayes.tail), mode, tail)
    if mode is not None:
        bayes.set_mode(mode, tail)
    return bayes


def note_mode(searched: tuple[str, int | None], mode: str | None, tail: int | None) -> None:
    """Say that sigma was searched in another mode than the one asked for (None: in that one)."""
    if mode is not None and searched != (mode, tail):
        Console(stderr=True).print(
            f"note: sigma was searched with mode={searched[0]} tail={searched[1]}; it need not "
            f"suit mode={mode} tail={tail}",
            soft_wrap=True,
        )


# --- what is printed and written ------------------------------------------------------------------


@contextmanager
def progress_bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, so that stdout stays clean; yields ``advance(n)``."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


def print_fit(found: Any) -> None:
    """The curve and the answer."""
    table = Table(title=f"{found.metric} on {found.anchors} anchors")
    for heading in ("sigma", "loss", "change", "± anchors", "± draws", "anchors"):
        table.add_column(heading, justify="right")
    for p in found.curve:
        change = p.loss - found.baseline
        table.add_row(
            f"{p.sigma:.5g}", f"{p.loss:.4f}", f"{change:+.4f}", f"{p.standard_error:.4f}",
            f"{p.draw_standard_error:.4f}", str(p.anchors or found.anchors),
        )  # fmt: skip
    out.print(table)
    kl = "" if found.kl is None else f", KL {found.kl:.4g} nats"
    lam = "" if found.implied_lambda is None else f", implied lambda {found.implied_lambda:.3g}"
    out.print(
        f"sigma = {found.sigma:.6g} ({found.objective}; {found.stopped}; "
        f"{found.passes:.4g} passes{kl}{lam})", markup=False, soft_wrap=True
    )  # fmt: skip
    if found.interval is not None:
        low, high = found.interval
        end = "beyond what was measured" if high is None else f"{high:.4g}"
        out.print(f"95 % interval over anchors and draws: {low:.4g} to {end}", soft_wrap=True)
    for note in found.notes:
        out.print(f"note: {note}", markup=False, soft_wrap=True)


def print_metrics(found: list[Any]) -> None:
    """One table: a row for each evaluation."""
    from tfb.metrics import evaluate as measure

    table = Table()
    for heading in ("data", "method", "accuracy %", "NLL", "ECE %", "Brier", "conf-acc %",
                    "flipped %"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("data", "method") else "right")
    for e in found:
        reference = next(f for f in found if f.dataset == e.dataset).probs.argmax(-1)
        m = measure(e.probs, e.labels, reference_predictions=reference)
        table.add_row(
            e.dataset, e.name, f"{100 * m.accuracy:.2f}", f"{m.nll:.4f}", f"{100 * m.ece:.2f}",
            f"{m.brier:.4f}", f"{100 * m.miscalibration:+.2f}", f"{100 * (m.flip_ratio or 0):.2f}",
        )  # fmt: skip
    out.print(table)


def write_json(path: Path, value: Any) -> None:
    """Atomically, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
