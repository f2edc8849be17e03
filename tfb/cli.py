"""The command line: ``tfb demo | fit | evaluate | score | report | export``, or ``python -m tfb``.

Each command checks its inputs and its output folder before any long work. To add a command: a
function below, its work in a module of its own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tfb.report_command import report
from tfb.score_command import score

app = typer.Typer(
    help="Training-Free Bayesianization of LoRA adapters: calibrated probabilities, no training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Console(width=None if sys.stdout.isatty() else 120)

Model = Annotated[str, typer.Option("--model", help="base model: folder or hub name")]
Draws = Annotated[int, typer.Option(help="posterior draws (antithetic pairs: an even number)")]
Mode = Annotated[str | None, typer.Option(help="full or tail; default: as sigma was searched")]
Tail = Annotated[int | None, typer.Option(help="positions with noise in --mode tail")]
BatchSize = Annotated[int, typer.Option(help="rows in a batch")]
Limit = Annotated[int | None, typer.Option(help="use only the first rows")]


def main() -> NoReturn:
    """Entry point: a user's mistake ends in one clear line and exit code 1, not a traceback."""
    # PEFT imports it, and it warns of kernels that it could not fetch, whether or not they matter.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        if os.environ.get("TFB_TRACEBACK"):
            raise
        # Escaped: a message may hold brackets ("tfb[report]", a file's name) that rich would eat.
        message = f"[bold red]error[/]: {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(1)
    sys.exit(0)


@contextmanager
def progress_bar(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, so that stdout stays clean; yields ``advance(n)``."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


def _tokenizer(model: str) -> Any:
    from tfb.scoring import load_tokenizer

    return load_tokenizer(model)


def _quiet() -> None:
    """One message each from us; the libraries' own progress and advice stay out of the way."""
    import transformers

    # PEFT asks transformers for an old name whenever it wraps a model; users can do nothing.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _check_draws(draws: int) -> None:
    if draws < 2 or draws % 2:
        raise ValueError(f"--draws {draws}: expected a positive even number (antithetic pairs)")


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: expected at least 1")


def _early_config(model: str, task: str) -> Any:
    """The base model's configuration, if rows can be checked by it before weights are loaded.

    None for a classification head: its number of classes comes with the adapter's weights.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model) if task != "SEQ_CLS" else None


def _encode_early(rows: Any, tokenizer: Any, model: str, task: str) -> Any:
    """The rows encoded, and so checked, before weights are loaded; None where that is too early."""
    from tfb.scoring import encode_rows

    config = _early_config(model, task)
    return None if config is None else encode_rows(rows, tokenizer, task, config)


def _load_artifact(
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


@app.command()
def fit(
    model: Model,
    adapter: Annotated[str, typer.Option(help="PEFT LoRA adapter: folder or hub name")],
    anchors: Annotated[Path, typer.Option(help="anchor rows, JSONL")],
    output: Annotated[Path, typer.Option("--out", help="new folder for the artifact")],
    metric: Annotated[
        str, typer.Option(help="nll, accuracy, pseudo_nll, embedding_norm, expected_nll")
    ] = "nll",
    objective: Annotated[
        str | None,
        typer.Option(
            help="min_nll, max_variance or gvi; default: min_nll, but max_variance with "
            "--tolerance, another metric or another search"
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="degradation that max_variance accepts, relative; default 0.003"),
    ] = None,
    absolute: Annotated[bool, typer.Option(help="tolerance in the loss's own units")] = False,
    search: Annotated[str, typer.Option(help="grid, root or bisection")] = "grid",
    compat: Annotated[str | None, typer.Option(help="reference: the authors' rule")] = None,
    mode: Annotated[str, typer.Option(help="how draws reach the model: full or tail")] = "full",
    tail: Tail = None,
    length_normalization: Annotated[
        str,
        typer.Option(help="choices of several tokens: none (sum of log-probs) or tokens (mean)"),
    ] = "none",
    draws: Annotated[
        int | None, typer.Option(help="antithetic draws at each sigma; default 4 (compat: 10)")
    ] = None,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    batch_size: BatchSize = 50,
) -> None:
    """Search sigma on anchor rows and write the artifact."""
    from tfb.adapters import adapter_config, load_adapter, load_base, local_folder
    from tfb.anchor import AnchorSet
    from tfb.artifact import check_output_folder
    from tfb.choices import check_length_normalization
    from tfb.convert import bayesianize
    from tfb.engine import check_mode
    from tfb.rows import read_rows
    from tfb.scoring import encode, set_padding, to_device
    from tfb.search import (
        SEARCH_DRAWS,
        TOLERANCE,
        check_arguments,
        default_objective,
        fit_sigma,
    )

    _quiet()
    check_output_folder(output)
    check_mode(mode, tail)
    check_length_normalization(length_normalization)
    if draws is not None:
        _check_draws(draws)
    _check_batch_size(batch_size)
    if absolute and tolerance is None:
        raise ValueError("--absolute says how --tolerance is meant: give --tolerance as well")
    objective = default_objective(objective, metric, tolerance, search, compat)
    tolerance = TOLERANCE if tolerance is None else tolerance
    check_arguments(metric, tolerance, search, objective, draws or SEARCH_DRAWS, compat=compat)
    rows = read_rows(anchors, limit=limit)
    source = local_folder(adapter, ["adapter_config.json", "adapter_model.safetensors"])
    tokenizer = _tokenizer(model)
    task = str(adapter_config(source).get("task_type"))
    encoded = _encode_early(rows, tokenizer, model, task)
    if encoded is not None:
        AnchorSet.of(encoded).check("pseudo_nll" if compat else metric)
    bayes = bayesianize(load_adapter(load_base(model, adapter), adapter), seed=seed)
    bayes.source, bayes.length_normalization = source, length_normalization
    set_padding(bayes, tokenizer)
    to_device(bayes)
    encoded = encode(bayes, rows, tokenizer) if encoded is None else encoded
    with progress_bar("searching sigma (rows x draws)", None) as advance:
        found = fit_sigma(
            bayes,
            encoded,
            metric,
            tolerance,
            search,
            objective=objective,
            relative=not absolute,
            draws=draws,
            batch_size=batch_size,
            mode=mode,
            tail=tail,
            compat=compat,
            progress=advance,
        )
    bayes.save(output, fit=found, anchors=str(anchors.name))
    print_fit(found)
    out.print(f"artifact: {output}", markup=False, soft_wrap=True)


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


def evaluations(
    bayes: Any,
    encoded: Any,
    *,
    dataset: str,
    draws: int,
    batch_size: int,
    pad: int,
    temperature: float | None = None,
    sigmas: dict[str, float] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Any]:
    """Deterministic, optionally temperature-scaled, and TFB evaluations of labelled rows.

    ``sigmas``: a name for each sigma to sample at; default {"tfb": bayes.sigma}.
    """
    import torch

    from tfb.cost import passes_per_row
    from tfb.draws import Draws as PosteriorDraws
    from tfb.metrics import Evaluation, apply_temperature
    from tfb.scoring import predict_rows

    common: dict[str, Any] = {"batch_size": batch_size, "pad_token_id": pad, "progress": progress}
    mean = predict_rows(bayes, encoded, PosteriorDraws.mean(), **common)
    labels = torch.tensor([-1 if y is None else y for y in encoded.labels])
    known = None if bool((labels < 0).any()) else labels
    found = [Evaluation("deterministic", dataset, mean.probs, known, total=mean.total, passes=1.0)]
    if temperature is not None:
        scaled = apply_temperature(mean.probs.clamp_min(1e-30).log(), temperature)
        entropy = torch.special.entr(scaled).sum(-1)
        found.append(
            Evaluation("temperature-scaled", dataset, scaled, known, total=entropy, passes=1.0)
        )
    passes = passes_per_row([len(ids) for ids in encoded.input_ids], draws, bayes.tail)
    for name, sigma in (sigmas or {"tfb": bayes.sigma}).items():
        chosen = PosteriorDraws.antithetic(draws, sigma, seed=bayes.seed)
        p = predict_rows(bayes, encoded, chosen, **common)
        found.append(
            Evaluation(name, dataset, p.probs, known, total=p.total, aleatoric=p.aleatoric,
                       epistemic=p.epistemic, draws=draws, passes=passes)
        )  # fmt: skip
    return found


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


@app.command()
def evaluate(
    model: Model,
    artifact: Annotated[Path, typer.Option(help="folder written by tfb fit")],
    data: Annotated[Path, typer.Option(help="labelled rows, JSONL")],
    sigma: Annotated[float | None, typer.Option(help="use this sigma instead")] = None,
    mode: Mode = None,
    tail: Tail = None,
    draws: Draws = 10,
    limit: Limit = None,
    batch_size: BatchSize = 50,
    json_out: Annotated[Path | None, typer.Option("--json", help="also write the figures")] = None,
) -> None:
    """Accuracy, NLL, ECE and Brier of the deterministic adapter and of TFB."""
    from tfb.artifact import read_sidecar
    from tfb.engine import check_mode
    from tfb.metrics import evaluate as measure
    from tfb.rows import read_rows
    from tfb.scoring import encode, pad_token

    _quiet()
    check_mode(mode or "full", tail)
    _check_draws(draws)
    _check_batch_size(batch_size)
    if sigma is not None and not 0 <= sigma < float("inf"):
        raise ValueError(f"--sigma {sigma}: expected a finite number >= 0")
    if json_out is not None and json_out.exists():
        raise ValueError(f"--json {json_out} exists already; choose another name")
    rows = read_rows(data, limit=limit)
    if unlabelled := [r.source for r in rows if r.label is None]:
        raise ValueError(f"{unlabelled[0]}: no label; evaluate needs one on every row")
    task = str(read_sidecar(artifact)["task"])
    tokenizer = _tokenizer(model)
    encoded = _encode_early(rows, tokenizer, model, task)
    bayes = _load_artifact(model, artifact, tokenizer, mode, tail)
    if sigma is not None:
        bayes.sigma = sigma
    encoded = encode(bayes, rows, tokenizer) if encoded is None else encoded
    with progress_bar("evaluating", 2 * len(rows)) as advance:
        found = evaluations(
            bayes, encoded, dataset=data.stem, draws=draws, batch_size=batch_size,
            pad=pad_token(bayes, tokenizer), progress=advance,
        )  # fmt: skip
    print_metrics(found)
    if json_out is not None:
        reference = found[0].probs.argmax(-1)
        figures = {
            e.name: measure(e.probs, e.labels, reference_predictions=reference).to_dict()
            for e in found
        }
        setting = {"sigma": bayes.sigma, "draws": draws, "mode": bayes.mode, "tail": bayes.tail}
        write_json(json_out, {"data": str(data.name), **setting, "metrics": figures})


def write_json(path: Path, value: Any) -> None:
    """Atomically, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


app.command()(score)


app.command()(report)


@app.command()
def export(
    model: Model,
    artifact: Annotated[Path, typer.Option(help="folder written by tfb fit")],
    output: Annotated[Path, typer.Option("--out", help="new folder for the sampled adapters")],
    draws: Draws = 10,
    seed: Annotated[int | None, typer.Option(help="seed of the noise; default: as fitted")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto, stored, float16, bfloat16, float32, float64")
    ] = "auto",
    mode: Annotated[str | None, typer.Option(help="full: accept a sigma of mode tail")] = None,
) -> None:
    """Sampled adapters as PEFT folders, for servers of many LoRA adapters."""
    from tfb.artifact import check_output_folder, read_sidecar
    from tfb.draws import Draws as PosteriorDraws
    from tfb.exporting import MANIFEST, check_dtype, check_exportable

    _quiet()
    check_output_folder(output)
    _check_draws(draws)
    check_dtype(dtype)
    sidecar = read_sidecar(artifact)
    check_exportable(mode or sidecar["mode"], sidecar.get("tail"))
    chosen = PosteriorDraws.antithetic(
        draws, sidecar["sigma"], seed=sidecar["seed"] if seed is None else seed
    )
    bayes = _load_artifact(model, artifact, _tokenizer(model), mode)
    with progress_bar("writing adapters", draws) as advance:
        bayes.export(output, chosen, dtype=dtype, progress=advance)
    rounding = json.loads((output / MANIFEST).read_text())["rounding"]
    lost = "" if rounding is None else f"; rounding {rounding:.2g} of the noise"
    out.print(
        f"{draws} adapters, sigma = {sidecar['sigma']:.6g}{lost}: {output}", markup=False,
        soft_wrap=True,
    )  # fmt: skip


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option(help="folder for pictures and page")] = None,
    draws: Draws = 10,
) -> None:
    """The whole way on an embedded model: fit sigma, compare, draw the pictures."""
    from tfb.demo import run

    _quiet()
    _check_draws(draws)
    run(output, draws=draws)
