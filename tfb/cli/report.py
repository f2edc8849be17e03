"""``tfb report``: the command's options, and what the page says of how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfb.cli.console import (
    Artifact,
    BatchSize,
    Columns,
    Draws,
    Input,
    Labels,
    Limit,
    Model,
    Truncate,
    check_labels,
    load_artifact,
    out,
    print_metrics,
    progress_bar,
    quiet,
)

if TYPE_CHECKING:
    from tfb.evaluation.metrics import Evaluation


def report(
    model: Model,
    artifact: Artifact,
    data: Annotated[
        list[Path], typer.Option(help="labelled rows: JSONL, CSV, Parquet, Arrow; repeatable")
    ],
    output: Annotated[Path, typer.Option(help="the page: a new .html file, or a folder for it")],
    shift: Annotated[
        list[Path] | None,
        typer.Option(help="OOD rows, labels not used; repeatable"),
    ] = None,
    columns: Columns = None,
    labels: Labels = None,
    truncate: Truncate = None,
    draws: Draws = 10,
    limit: Limit = None,
    batch_size: BatchSize = 50,
    overwrite: Annotated[bool, typer.Option(help="replace an earlier page")] = False,
) -> None:
    """Write one HTML page: what the fit changed, on which rows, how surely, and how it was made."""
    from dataclasses import replace

    from tfb.adapters.artifact import read_sidecar
    from tfb.draws import check_even
    from tfb.evaluation.report import page_path, write_report
    from tfb.scoring.evaluate import evaluations

    quiet()
    check_even(draws)
    page_path(output, overwrite=overwrite)
    sidecar = read_sidecar(artifact)
    files = [*data, *(shift or [])]
    names = [path.stem for path in files]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"--data, --shift: two files are called {twice[0]!r}; rename one")
    given = Input.of_artifact(model, artifact, columns, labels, truncate)
    rows = {path: given.read(path, limit) for path in files}
    for path in data:
        check_labels(rows[path], "report needs one on every row of --data, --shift needs none")
    encoded = {path: given.encode(rows[path]) for path in files}
    bayes = load_artifact(model, artifact, given.tokenizer)
    found: dict[Path, list[Evaluation]] = {}
    for path in files:
        with progress_bar(path.name, 2 * len(rows[path])) as advance:
            measured = evaluations(
                bayes,
                encoded[path],
                dataset=path.stem,
                draws=draws,
                batch_size=batch_size,
                progress=advance,
            )
        found[path] = [replace(e, rows=rows[path], classes=given.form.labels) for e in measured]
    labelled = [e for path in data for e in found[path]]
    print_metrics(labelled)
    page = write_report(
        output,
        labelled,
        sidecar.get("fit"),
        title=f"{artifact.name}: the adapter and its predictive",
        ood=[e for path in shift or [] for e in found[path]],
        facts=facts(sidecar, draws),
        overwrite=overwrite,
    )
    out.print(f"report: {page}", markup=False, soft_wrap=True)


def facts(sidecar: Mapping[str, Any], draws: int) -> dict[str, str]:
    """Return what an artifact keeps of how it was made, and this report's draws, by name."""
    tail, fit = sidecar.get("tail"), sidecar.get("fit")
    found = {
        "σ": f"{sidecar['sigma']:.6g}",
        "Temperature": f"{sidecar.get('temperature', 1.0):.4g}",
        "Mode": "full" if tail is None else f"tail, last {tail} of the prompt's tokens",
        "Draws": f"{draws}, antithetic; seed {sidecar['seed']}" if sidecar["sigma"] else "none",
        "Model": f"{sidecar['base']['model_type']}, {len(sidecar['layers'])} matrices with noise",
    }
    if fit is not None:
        # An artifact that was saved from Python need not name its file of anchors.
        file = (sidecar.get("extra") or {}).get("anchors")
        anchors = f"{fit['anchors']:,} rows, hash {fit['anchor_hash'][:12]}"
        found["Search"] = (
            f"{fit['search']}, {fit['draws']} draws at each σ, {fit['passes']:.3g} passes over the "
            f"anchors, seed {fit['seed']}; {fit['stopped']}"
        )
        found["Anchors"] = f"{file}, {anchors}" if isinstance(file, str) else anchors
        if fit.get("kl") is not None:
            found["KL"] = f"{fit['kl']:.4g} nats from a prior of scale {fit['prior_sigma']:.4g}"
    if versions := sidecar.get("versions"):
        found["Versions"] = ", ".join(f"{k} {v}" for k, v in versions.items())
    found["Adapter"] = f"SHA-256 {sidecar['adapter_sha256'][:12]}"
    return found
