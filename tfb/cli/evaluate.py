"""``tfb evaluate``: the command's options, its table, and the files of figures and rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    LabelTokens,
    Limit,
    Mode,
    Tail,
    Truncate,
    advanced,
    check_labels,
    check_place,
    evaluated,
    progress_bar,
    quiet,
    say,
)

if TYPE_CHECKING:
    from tfb.data.rows import Row
    from tfb.evaluation.metrics import Evaluation

# How to have a method in place of the artifact's own.
ADVICE = {
    "adapter": "the artifact predicts by its last row; for the first, use the adapter as it is",
    "temperature": "the artifact predicts by its last row; for a temperature alone: fit --sigma 0",
    "TFB": "the artifact predicts by its last row; for noise alone: fit --no-temperature",
}
ROW_FORMATS = (".parquet", ".jsonl", ".csv")


def evaluate(
    artifact: Artifact,
    data: Annotated[Path, typer.Argument(metavar="DATA", help=f"labelled rows: {ROWS_HELP}")],
    base: Base = None,
    columns: Columns = None,
    labels: Labels = None,
    truncate: Truncate = None,
    draws: Draws = 10,
    limit: Limit = None,
    rows_out: Annotated[
        Path | None,
        typer.Option(
            "--rows",
            metavar="FILE",
            help="also write every row's predictions: a new .parquet, .jsonl or .csv file",
        ),
    ] = None,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="also write the figures: a new file"),
    ] = None,
    device: Device = None,
    sigma: Annotated[
        float | None,
        advanced(metavar="X", help="use this sigma instead, at the artifact's temperature"),
    ] = None,
    mode: Mode = None,
    tail: Tail = None,
    label_tokens: LabelTokens = None,
    batch_size: BatchSize = 50,
) -> None:
    """Compare the adapter, a temperature, TFB and TFB with a temperature; recommend one.

    [bold]Examples[/]

    tfb evaluate my-adapter-tfb test.csv
    tfb evaluate my-adapter-tfb test.csv --rows rows.csv --json figures.json
    tfb evaluate my-adapter-tfb test.jsonl --base ../models/llama --device cpu

    NLL: the loss, in nats. ECE: how far confidence is from accuracy. Less is
    better of both. Intervals: 95 % limits of the change from the adapter.
    """
    from tfb.adapters.loading import check_device
    from tfb.atomic import write_json
    from tfb.draws import check_even
    from tfb.evaluation.compare import Comparison
    from tfb.sampling.config import SamplingConfig
    from tfb.scoring.evaluate import evaluations

    quiet()
    check_device(device)
    check_even(draws)
    SamplingConfig(sigma=sigma, mode=mode or "full", tail=tail)  # refuses what cannot be
    check_new("--json", json_out)
    check_new("--rows", rows_out, ROW_FORMATS)
    given = Input.of(artifact, base, columns, labels, truncate, label_tokens)
    rows = given.read(data, limit)
    check_labels(rows, "evaluate needs one on every row")
    encoded = given.encode(rows)
    m = given.load(device, mode, tail)
    if sigma is not None:
        m.bayes.configure(sigma=sigma)
    with progress_bar("evaluating", evaluated(m.methods) * len(rows)) as bar:
        found = evaluations(
            m.bayes,
            encoded,
            dataset=data.stem,
            draws=draws,
            batch_size=batch_size,
            configs=m.methods,
            progress=bar.advance,
        )
    comparison = Comparison.of(found)
    say(str(comparison))
    if (advice := ADVICE.get(comparison.recommended)) and comparison.recommended != found[-1].name:
        say(advice)
    if rows_out is not None:
        write_rows(rows_out, rows, found, given.form.labels)
    if json_out is not None:
        setting = {
            "data": data.name,
            "sigma": m.bayes.sigma,
            "temperature": m.bayes.config.temperature,
            "draws": draws,
            "mode": m.bayes.config.mode,
            "tail": m.bayes.config.tail,
            "label_tokens": m.bayes.label_tokens,
            "truncated": encoded.rows_cut,
        }
        write_json(json_out, setting | comparison.to_dict())


def check_new(option: str, file: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Refuse a file that exists, or whose name ends otherwise."""
    if file is None:
        return
    if file.exists():
        raise ValueError(f"{option} {file} exists already; choose another name")
    if suffixes and file.suffix not in suffixes:
        raise ValueError(f"{option} {file}: expected a name that ends in {', '.join(suffixes)}")
    check_place(option, file)


def write_rows(
    file: Path, rows: Sequence[Row], found: Sequence[Evaluation], names: Sequence[str] | None
) -> None:
    """Write every row: its label, each method's prediction, and all that the last method says."""
    import pandas as pd

    from tfb import atomic

    choices = [row.choices or names for row in rows]
    table: dict[str, Any] = {"id": [row.id for row in rows], "label": [row.label for row in rows]}
    for e in found:
        key = re.sub(r"\W+", "_", e.name.lower())
        best = e.probs.argmax(-1).tolist()
        table[f"{key}_prediction"] = best
        if all(choices):
            table[f"{key}_choice"] = [c[i] for c, i in zip(choices, best, strict=True) if c]
        table[f"{key}_confidence"] = e.probs.amax(-1).tolist()
    probs = e.probs.tolist()
    table["probs"] = [p[: len(c or p)] for c, p in zip(choices, probs, strict=True)]
    measured: Mapping[str, Any] = {"total": e.total, "epistemic": e.epistemic}
    table |= {name: values.tolist() for name, values in measured.items() if values is not None}
    frame = pd.DataFrame(table)
    data = {
        ".parquet": lambda: frame.to_parquet(None, index=False),
        ".jsonl": lambda: frame.to_json(None, orient="records", lines=True, double_precision=15),
        ".csv": lambda: frame.to_csv(None, index=False),
    }[file.suffix]()
    atomic.write(file, data.encode() if isinstance(data, str) else data)
