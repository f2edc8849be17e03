"""The command line: ``tfb demo | fit | evaluate | score | report | export``, or ``python -m tfb``.

Each command checks its inputs and its output folder before any long work. To add a command: a
function below, its work in a module of its own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from tfb.cli.console import (
    LABEL_TOKENS_HELP,
    Columns,
    Input,
    Labels,
    Truncate,
    check_batch_size,
    check_draws,
    check_labels,
    choose_label_tokens,
    load_artifact,
    out,
    print_fit,
    print_label_tokens,
    print_metrics,
    progress_bar,
    quiet,
    write_json,
)
from tfb.cli.report import report
from tfb.cli.score import score

app = typer.Typer(
    help="Training-Free Bayesianization of LoRA adapters: calibrated probabilities, no training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

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


@app.command()
def fit(
    model: Model,
    adapter: Annotated[str, typer.Option(help="PEFT LoRA adapter: folder or hub name")],
    anchors: Annotated[Path, typer.Option(help="anchor rows: JSONL, CSV, Parquet, Arrow")],
    output: Annotated[Path, typer.Option("--out", help="new folder for the artifact")],
    columns: Columns = None,
    labels: Labels = None,
    truncate: Truncate = None,
    label_tokens: Annotated[str, typer.Option(help=LABEL_TOKENS_HELP)] = "all",
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
    from tfb.adapters.artifact import check_output_folder
    from tfb.adapters.bridge import bayesianize
    from tfb.adapters.loading import adapter_folder, load_adapter, load_base
    from tfb.sampling.config import check_mode
    from tfb.sampling.config import check_length_normalization
    from tfb.scoring.rows import compare_label_tokens, set_padding, to_device
    from tfb.search.fit import (
        SEARCH_DRAWS,
        TOLERANCE,
        check_arguments,
        default_objective,
        fit_sigma,
    )
    from tfb.search.loss import SUPERVISED, AnchorSet

    quiet()
    check_output_folder(output)
    check_mode(mode, tail)
    check_length_normalization(length_normalization)
    if draws is not None:
        check_draws(draws)
    check_batch_size(batch_size)
    if absolute and tolerance is None:
        raise ValueError("--absolute says how --tolerance is meant: give --tolerance as well")
    objective = default_objective(objective, metric, tolerance, search, compat)
    tolerance = TOLERANCE if tolerance is None else tolerance
    check_arguments(metric, tolerance, search, objective, draws or SEARCH_DRAWS, compat=compat)
    source = adapter_folder(adapter)
    given = Input.of(
        model, source, columns, labels, truncate,
        label_tokens=label_tokens, length_normalization=length_normalization,
    )  # fmt: skip
    rows = given.read(anchors, limit)
    if not compat and metric in SUPERVISED:
        check_labels(
            rows, f"metric {metric} needs one on every row of --anchors (embedding_norm needs none)"
        )
    encoded = given.encode(rows)
    AnchorSet.of(encoded).check("pseudo_nll" if compat else metric)
    bayes = bayesianize(
        load_adapter(load_base(model, adapter), adapter),
        config=SamplingConfig(seed=seed, length_normalization=length_normalization),
        labels=given.form.labels,
        label_tokens=label_tokens,
        source=source,
    )
    set_padding(bayes, given.tokenizer)
    to_device(bayes)
    extra: dict[str, Any] = {"anchors": anchors.name}
    if bayes.task != "SEQ_CLS" and all(row.label is not None for row in rows):
        figures = compare_label_tokens(
            bayes, rows, given.tokenizer, truncate=truncate, batch_size=batch_size
        )
        if figures is not None:
            extra["label_tokens_nll"] = figures
            print_label_tokens(figures, label_tokens)
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
    save(bayes, output, fit=found, **extra)
    print_fit(found)
    out.print(f"artifact: {output}", markup=False, soft_wrap=True)


@app.command()
def evaluate(
    model: Model,
    artifact: Annotated[Path, typer.Option(help="folder written by tfb fit")],
    data: Annotated[Path, typer.Option(help="labelled rows: JSONL, CSV, Parquet, Arrow")],
    columns: Columns = None,
    labels: Labels = None,
    truncate: Truncate = None,
    label_tokens: Annotated[
        str | None, typer.Option(help=f"{LABEL_TOKENS_HELP}; default: as fitted")
    ] = None,
    sigma: Annotated[float | None, typer.Option(help="use this sigma instead")] = None,
    mode: Mode = None,
    tail: Tail = None,
    draws: Draws = 10,
    limit: Limit = None,
    batch_size: BatchSize = 50,
    json_out: Annotated[Path | None, typer.Option("--json", help="also write the figures")] = None,
) -> None:
    """Accuracy, NLL, ECE and Brier of the deterministic adapter and of TFB."""
    from tfb.adapters.artifact import read_sidecar
    from tfb.evaluation.metrics import evaluate as measure
    from tfb.sampling.config import check_mode
    from tfb.scoring.rows import evaluations, pad_token

    quiet()
    check_mode(mode or "full", tail)
    check_draws(draws)
    check_batch_size(batch_size)
    if sigma is not None and not 0 <= sigma < float("inf"):
        raise ValueError(f"--sigma {sigma}: expected a finite number >= 0")
    if json_out is not None and json_out.exists():
        raise ValueError(f"--json {json_out} exists already; choose another name")
    sidecar = read_sidecar(artifact)
    chosen = choose_label_tokens(artifact, sidecar, label_tokens)
    given = Input.of(
        model, artifact, columns, labels, truncate, label_tokens=chosen,
        length_normalization=sidecar.get("length_normalization", "none"),
        saved=sidecar.get("labels"),
    )  # fmt: skip
    rows = given.read(data, limit)
    check_labels(rows, "evaluate needs one on every row")
    encoded = given.encode(rows)
    bayes = load_artifact(model, artifact, given.tokenizer, mode, tail)
    if sigma is not None:
        bayes.configure(sigma=sigma)
    with progress_bar("evaluating", 2 * len(rows)) as advance:
        found = evaluations(
            bayes, encoded, dataset=data.stem, draws=draws, batch_size=batch_size,
            pad=pad_token(bayes, given.tokenizer), progress=advance,
        )  # fmt: skip
    print_metrics(found)
    if bayes.sigma == 0.0:
        out.print("sigma = 0: no noise, so tfb is the deterministic adapter")
    if json_out is not None:
        reference, truth = found[0].probs.argmax(-1), found[0].labels
        assert truth is not None
        figures = {
            e.name: measure(e.probs, truth, reference_predictions=reference).to_dict()
            for e in found
        }
        averaged = found[-1].draws  # one where sigma is 0
        setting = {
            "sigma": bayes.sigma,
            "draws": averaged,
            "mode": bayes.config.mode,
            "tail": bayes.config.tail,
            "label_tokens": chosen,
            "truncated": encoded.rows_cut,
        }
        write_json(json_out, {"data": str(data.name), **setting, "metrics": figures})


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
    from tfb.adapters.artifact import check_output_folder, read_sidecar
    from tfb.adapters.export import MANIFEST, check_dtype, check_exportable
    from tfb.draws import Draws as PosteriorDraws
    from tfb.scoring.rows import load_tokenizer

    quiet()
    check_output_folder(output)
    check_draws(draws)
    check_dtype(dtype)
    sidecar = read_sidecar(artifact)
    check_exportable(mode or sidecar["mode"], sidecar.get("tail"))
    if sidecar["sigma"] == 0:
        raise ValueError(
            f"--artifact {artifact}: its sigma is 0, and all draws would be the adapter itself: "
            "serve that one"
        )
    chosen = PosteriorDraws.antithetic(
        draws, sidecar["sigma"], seed=sidecar["seed"] if seed is None else seed
    )
    bayes = load_artifact(model, artifact, load_tokenizer(model), mode)
    with progress_bar("writing adapters", draws) as advance:
        export_draws(bayes, output, chosen, dtype=dtype, progress=advance)
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
    from tfb.demo.run import run

    quiet()
    check_draws(draws)
    run(output, draws=draws)
