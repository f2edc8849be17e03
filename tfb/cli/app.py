"""The command line: ``tfb demo | fit | evaluate | score | report | export``, or ``python -m tfb``.

Each command checks its inputs and its output folder before any long work.
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

from tfb.atomic import write_json
from tfb.cli.console import (
    LABEL_TOKENS_HELP,
    Artifact,
    BatchSize,
    Columns,
    Draws,
    Input,
    Labels,
    Limit,
    Mode,
    Model,
    Tail,
    Truncate,
    as_flags,
    check_labels,
    load_artifact,
    print_fit,
    print_label_tokens,
    print_metrics,
    progress_bar,
    quiet,
    say,
)
from tfb.cli.demo import demo
from tfb.cli.report import report
from tfb.cli.score import score

app = typer.Typer(
    help="Training-Free Bayesianization of LoRA adapters: calibrated probabilities, no training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> NoReturn:
    """Run the command line: a user's mistake ends in one clear line and exit code 1."""
    # PEFT imports it, and it warns of kernels that it could not fetch, whether or not they matter.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        if os.environ.get("TFB_TRACEBACK"):
            raise
        message = as_flags(str(error), _flags(sys.argv[1:2]), sys.argv[2:])
        # Escaped: a message may hold brackets ("tfb[report]", a file's name) that rich would eat.
        message = f"[bold red]error[/]: {escape(message)}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(1)
    sys.exit(0)


def _flags(command: list[str]) -> dict[str, str]:
    """Return the options of a command by the names of their parameters."""
    commands: Any = typer.main.get_command(app)
    found = [commands.commands[name] for name in command if name in commands.commands]
    return {p.name: p.opts[0] for c in found for p in c.params}


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
        typer.Option(
            help="degradation that max_variance accepts, relative; default 0.003, of accuracy 0.01"
        ),
    ] = None,
    absolute: Annotated[bool, typer.Option(help="tolerance in the loss's own units")] = False,
    search: Annotated[str, typer.Option(help="grid or bisection")] = "grid",
    mode: Annotated[str, typer.Option(help="how draws reach the model: full or tail")] = "full",
    tail: Tail = None,
    length_normalization: Annotated[
        str,
        typer.Option(help="choices of several tokens: none (sum of log-probs) or tokens (mean)"),
    ] = "none",
    temperature: Annotated[
        bool, typer.Option(help="fit a temperature beside sigma (objective min_nll)")
    ] = True,
    sigma: Annotated[
        float | None, typer.Option(help="fit the temperature alone, at this sigma; 0: no noise")
    ] = None,
    draws: Annotated[int, typer.Option(help="antithetic draws at each sigma")] = 8,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    batch_size: BatchSize = 50,
) -> None:
    """Fit sigma and the temperature on anchor rows and write the artifact."""
    from tfb.adapters.artifact import check_output_folder, save
    from tfb.adapters.bridge import bayesianize
    from tfb.adapters.loading import (
        adapter_folder,
        load_adapter,
        load_base,
        set_padding,
        to_device,
    )
    from tfb.sampling.config import SamplingConfig
    from tfb.scoring.evaluate import compare_label_tokens
    from tfb.search.fit import check_arguments, default_objective, fit_sigma
    from tfb.search.loss import METRICS, AnchorSet

    quiet()
    check_output_folder(output)
    config = SamplingConfig(
        mode=mode, tail=tail, length_normalization=length_normalization, seed=seed
    )
    if absolute and tolerance is None:
        raise ValueError("--absolute says how --tolerance is meant: give --tolerance as well")
    objective = default_objective(objective, metric, tolerance, search)
    check_arguments(
        metric, tolerance, search, objective, draws, temperature=temperature, sigma=sigma
    )
    source = adapter_folder(adapter)
    given = Input.of(
        model,
        source,
        columns,
        labels,
        truncate,
        label_tokens=label_tokens,
        length_normalization=length_normalization,
    )
    rows = given.read(anchors, limit)
    if METRICS[metric].labelled:
        needed = f"metric {metric} needs one on every row of --anchors (embedding_norm needs none)"
        check_labels(rows, needed)
    encoded = given.encode(rows)
    AnchorSet.of(encoded).check(metric)
    bayes = bayesianize(
        load_adapter(load_base(model, adapter), adapter),
        config=config,
        labels=given.form.labels,
        label_tokens=label_tokens,
        source=source,
    )
    set_padding(bayes.base, given.tokenizer)
    to_device(bayes.model)
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
            temperature=temperature,
            sigma=sigma,
            relative=not absolute,
            draws=draws,
            batch_size=batch_size,
            progress=advance,
        )
    save(bayes, output, fit=found, **extra)
    print_fit(found)
    say(f"artifact: {output}")


@app.command()
def evaluate(
    model: Model,
    artifact: Artifact,
    data: Annotated[Path, typer.Option(help="labelled rows: JSONL, CSV, Parquet, Arrow")],
    columns: Columns = None,
    labels: Labels = None,
    truncate: Truncate = None,
    label_tokens: Annotated[
        str | None, typer.Option(help=f"{LABEL_TOKENS_HELP}; default: as fitted")
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help="use this sigma instead, at the artifact's temperature")
    ] = None,
    mode: Mode = None,
    tail: Tail = None,
    draws: Draws = 10,
    limit: Limit = None,
    batch_size: BatchSize = 50,
    json_out: Annotated[Path | None, typer.Option("--json", help="also write the figures")] = None,
) -> None:
    """Measure accuracy, NLL, ECE and Brier of the deterministic adapter and of TFB."""
    from tfb.draws import check_even
    from tfb.sampling.config import SamplingConfig
    from tfb.scoring.evaluate import evaluations

    quiet()
    check_even(draws)
    SamplingConfig(sigma=sigma, mode=mode or "full", tail=tail)  # refuses what cannot be
    if json_out is not None and json_out.exists():
        raise ValueError(f"--json {json_out} exists already; choose another name")
    given = Input.of_artifact(model, artifact, columns, labels, truncate, label_tokens)
    rows = given.read(data, limit)
    check_labels(rows, "evaluate needs one on every row")
    encoded = given.encode(rows)
    bayes = load_artifact(model, artifact, given.tokenizer, mode, tail)
    if sigma is not None:
        bayes.configure(sigma=sigma)
    with progress_bar("evaluating", 2 * len(rows)) as advance:
        found = evaluations(
            bayes,
            encoded,
            dataset=data.stem,
            draws=draws,
            batch_size=batch_size,
            progress=advance,
        )
    figures = print_metrics(found)
    if bayes.sigma == 0.0:
        T = bayes.config.temperature
        at = "" if T == 1.0 else f" at temperature {T:.4g}"
        say(f"sigma = 0: no noise, so tfb is the deterministic adapter{at}")
    if json_out is None:
        return
    setting = {
        "sigma": bayes.sigma,
        "temperature": bayes.config.temperature,
        "draws": found[-1].draws,  # one where sigma is 0
        "mode": bayes.config.mode,
        "tail": bayes.config.tail,
        "label_tokens": given.encoder.label_tokens,
        "truncated": encoded.rows_cut,
    }
    metrics = {e.name: m.to_dict() for e, m in zip(found, figures, strict=True)}
    write_json(json_out, {"data": str(data.name), **setting, "metrics": metrics})


app.command()(score)
app.command()(report)


@app.command()
def export(
    model: Model,
    artifact: Artifact,
    output: Annotated[Path, typer.Option("--out", help="new folder for the sampled adapters")],
    draws: Draws = 10,
    seed: Annotated[int | None, typer.Option(help="seed of the noise; default: as fitted")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16, float32, float64")] = "auto",
    mode: Annotated[str | None, typer.Option(help="full: accept a sigma of mode tail")] = None,
) -> None:
    """Write sampled adapters as PEFT folders, for servers of many LoRA adapters."""
    from tfb.adapters.artifact import check_output_folder, read_sidecar
    from tfb.adapters.export import MANIFEST, check_dtype, check_exportable
    from tfb.adapters.export import export as write_adapters
    from tfb.adapters.loading import load_tokenizer
    from tfb.draws import Draws as PosteriorDraws
    from tfb.draws import check_even

    quiet()
    check_output_folder(output)
    check_even(draws)
    check_dtype(dtype)
    sidecar = read_sidecar(artifact)
    check_exportable(mode or sidecar["mode"], sidecar.get("tail"))
    if sidecar["sigma"] == 0:
        raise ValueError(
            f"--artifact {artifact}: its sigma is 0, and all draws would be the adapter itself: "
            f"serve that one, with logits divided by {sidecar.get('temperature', 1.0):.6g}"
        )
    chosen = PosteriorDraws.antithetic(
        draws, sidecar["sigma"], seed=sidecar["seed"] if seed is None else seed
    )
    bayes = load_artifact(model, artifact, load_tokenizer(model), mode)
    with progress_bar("writing adapters", draws) as advance:
        write_adapters(bayes, output, chosen, dtype=dtype, progress=advance)
    rounding = json.loads((output / MANIFEST).read_text())["rounding"]
    lost = "" if rounding is None else f"; rounding {rounding:.2g} of the noise"
    say(f"{draws} adapters, sigma = {sidecar['sigma']:.6g}{lost}: {output}")


app.command()(demo)
