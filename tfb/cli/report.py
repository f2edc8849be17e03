"""``tfb report``: the command's options, and what the page says of how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tfb.cli.console import (
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
    print_metrics,
    progress_bar,
    quiet,
)


def report(
    model: Annotated[str, typer.Option(help="base model: folder or hub name")],
    artifact: Annotated[Path, typer.Option(help="folder written by tfb fit")],
    data: Annotated[
        list[Path], typer.Option(help="labelled rows: JSONL, CSV, Parquet, Arrow; repeatable")
    ],
    output: Annotated[Path, typer.Option(help="new folder for the pictures and the page")],
    shift: Annotated[
        list[Path] | None,
        typer.Option(help="unfamiliar rows (out of scope), labels not used; repeatable"),
    ] = None,
    columns: Columns = None,
    labels: Labels = None,
    truncate: Truncate = None,
    draws: Annotated[
        int, typer.Option(help="posterior draws (antithetic pairs: an even number)")
    ] = 10,
    limit: Annotated[int | None, typer.Option(help="use only the first rows of each file")] = None,
    batch_size: Annotated[int, typer.Option(help="rows in a batch")] = 50,
) -> None:
    """One HTML page in plain words, with pictures: what the fit changed, why, and its cost."""
    from tfb.adapters.artifact import read_sidecar
    from tfb.evaluation.report import check_report_folder, write_report
    from tfb.scoring.rows import evaluations, pad_token

    quiet()
    check_draws(draws)
    check_batch_size(batch_size)
    check_report_folder(output)
    sidecar = read_sidecar(artifact)
    names = [path.stem for path in (*data, *(shift or []))]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"--data, --shift: two files are called {twice[0]!r}; rename one")
    given = Input.of(
        model, artifact, columns, labels, truncate,
        label_tokens=choose_label_tokens(artifact, sidecar),
        length_normalization=sidecar.get("length_normalization", "none"),
        saved=sidecar.get("labels"),
    )  # fmt: skip
    tables = {path: given.read(path, limit) for path in (*data, *(shift or []))}
    for path in data:
        check_labels(tables[path], "report needs one on every row of --data, --shift needs none")
    encoded = {path: given.encode(rows) for path, rows in tables.items()}
    bayes = load_artifact(model, artifact, given.tokenizer)
    found: dict[Path, list[Any]] = {}
    for path, rows in encoded.items():
        with progress_bar(path.name, 2 * len(rows)) as advance:
            found[path] = evaluations(
                bayes, rows, dataset=path.stem, draws=draws, batch_size=batch_size,
                pad=pad_token(bayes, given.tokenizer), progress=advance,
            )  # fmt: skip
    labelled = [e for path in data for e in found[path]]
    print_metrics(labelled)
    page = write_report(
        output,
        labelled,
        sidecar.get("fit"),
        title=f"{artifact.name}: what averaging over noisy copies changed",
        shifts=[e for path in shift or [] for e in found[path]],
        facts=facts(sidecar, draws),
    )
    out.print(f"report: {page}", markup=False, soft_wrap=True)


def facts(sidecar: Mapping[str, Any], draws: int) -> dict[str, str]:
    """What an artifact keeps of how it was made, and the draws of this report, by name."""
    mode = "full: noise at every token"
    if sidecar["mode"] == "tail":
        k = sidecar["tail"]
        mode = f"tail: noise at the last {'token' if k == 1 else f'{k} tokens'} of a prompt"
    kind = sidecar["base"]["model_type"]
    drawn = f"{draws} in this report, in pairs of opposite noise; seed {sidecar['seed']}"
    if sidecar["sigma"] == 0:
        drawn = "none: at σ = 0 all would be the unchanged adapter"
    found = {
        "σ": f"{sidecar['sigma']:.6g}",
        "Mode": mode,
        "Draws": drawn,
        "Model": f"{kind}, {len(sidecar['layers'])} adapted matrices with noise",
    }
    scales = _layer_scales(sidecar)
    if set(scales) != {1.0}:
        found["Layer scales"] = f"σ times {min(scales):.3g} to {max(scales):.3g}, by layer"
    fit = sidecar.get("fit")
    if fit is not None:
        # An artifact that was saved from Python need not name its file of anchors.
        file = (sidecar.get("extra") or {}).get("anchors")
        named = f"{file}, " if isinstance(file, str) else ""
        found["Search"] = f"{fit['search']}, {fit['draws']} draws at each σ, seed {fit['seed']}"
        found["Anchors"] = f"{named}{fit['anchors']:,} rows, hash {fit['anchor_hash'][:12]}"
        if fit.get("kl") is not None:
            found["KL divergence"] = f"{fit['kl']:.4g} nats from a prior of scale " + (
                f"{fit['prior_sigma']:.4g}"
            )
    versions = sidecar.get("versions") or {}
    if versions:
        found["Versions at the fit"] = ", ".join(f"{k} {v}" for k, v in versions.items())
    found["Adapter"] = f"SHA-256 {sidecar['adapter_sha256'][:12]}"
    return found


def _layer_scales(sidecar: Mapping[str, Any]) -> list[float]:
    """Multipliers of sigma, one a layer; earlier records have none, which are 1."""
    return list((sidecar.get("layer_scales") or dict.fromkeys(sidecar["layers"], 1.0)).values())
