"""``tfb report``: the command's options, and what the page says of how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tfb.console import (
    check_batch_size,
    check_draws,
    check_labels,
    encode_early,
    load_artifact,
    out,
    print_metrics,
    progress_bar,
    quiet,
)


def report(
    model: Annotated[str, typer.Option(help="base model: folder or hub name")],
    artifact: Annotated[Path, typer.Option(help="folder written by tfb fit")],
    data: Annotated[list[Path], typer.Option(help="labelled rows, JSONL; repeatable")],
    output: Annotated[Path, typer.Option(help="new folder for the pictures and the page")],
    shift: Annotated[
        list[Path] | None,
        typer.Option(help="unfamiliar rows (out of scope), labels not used, JSONL; repeatable"),
    ] = None,
    draws: Annotated[
        int, typer.Option(help="posterior draws (antithetic pairs: an even number)")
    ] = 10,
    limit: Annotated[int | None, typer.Option(help="use only the first rows of each file")] = None,
    batch_size: Annotated[int, typer.Option(help="rows in a batch")] = 50,
) -> None:
    """One HTML page in plain words, with pictures: what the fit changed, why, and its cost."""
    from tfb.artifact import read_sidecar
    from tfb.report import check_report_folder, write_report
    from tfb.rows import read_rows
    from tfb.scoring import encode, evaluations, load_tokenizer, pad_token

    quiet()
    check_draws(draws)
    check_batch_size(batch_size)
    check_report_folder(output)
    sidecar = read_sidecar(artifact)
    task = str(sidecar["task"])
    names = [path.stem for path in (*data, *(shift or []))]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"--data, --shift: two files are called {twice[0]!r}; rename one")
    tables = {path: read_rows(path, limit=limit) for path in (*data, *(shift or []))}
    for path in data:
        check_labels(tables[path], "report needs one on every row of --data, --shift needs none")
    tokenizer = load_tokenizer(model)
    early = {p: encode_early(rows, tokenizer, model, task) for p, rows in tables.items()}
    bayes = load_artifact(model, artifact, tokenizer)
    found: dict[Path, list[Any]] = {}
    for path, rows in tables.items():
        encoded = encode(bayes, rows, tokenizer) if early[path] is None else early[path]
        with progress_bar(path.name, 2 * len(rows)) as advance:
            found[path] = evaluations(
                bayes, encoded, dataset=path.stem, draws=draws, batch_size=batch_size,
                pad=pad_token(bayes, tokenizer), progress=advance,
            )  # fmt: skip
    labelled = [e for path in data for e in found[path]]
    print_metrics(labelled)
    again = _report_line(model, artifact, data, shift or [], output, draws, limit)
    page = write_report(
        output,
        labelled,
        sidecar.get("fit"),
        title=f"{artifact.name}: what averaging over noisy copies changed",
        shifts=[e for path in shift or [] for e in found[path]],
        facts=facts(sidecar, draws),
        commands=[*fit_line(model, artifact, sidecar), again],
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


def fit_line(model: str, artifact: Path, sidecar: Mapping[str, Any]) -> list[str]:
    """The ``tfb fit`` that gives this sigma, if the anchors' file is known; the artifact holds the
    adapter itself."""
    fit, file = sidecar.get("fit"), (sidecar.get("extra") or {}).get("anchors")
    if fit is None or not isinstance(file, str):
        return []
    if not _of_a_command(sidecar, fit):
        return []
    words: list[object] = ["tfb", "fit", "--model", model, "--adapter", artifact]
    words += ["--anchors", file, "--limit", fit["anchors"], "--out", "NEW"]
    if fit.get("compat"):
        words += ["--compat", fit["compat"]]
    else:
        words += ["--metric", fit["metric"], "--objective", fit["objective"]]
        words += ["--search", fit["search"]]
    if fit["objective"] == "max_variance":
        words += ["--tolerance", fit["tolerance"], *([] if fit["relative"] else ["--absolute"])]
    words += ["--mode", fit["mode"]]
    words += [] if fit.get("tail") is None else ["--tail", fit["tail"]]
    if (normalization := sidecar.get("length_normalization", "none")) != "none":
        words += ["--length-normalization", normalization]
    words += ["--draws", fit["draws"], "--seed", fit["seed"]]
    return [_line(words)]


def _of_a_command(sidecar: Mapping[str, Any], fit: Mapping[str, Any]) -> bool:
    """Whether the command could have made this fit, as far as the record tells: from Python
    there are multipliers, families of noise and lambda to choose as well."""
    weight = fit.get("kl_weight")
    return (
        weight in (None, 1 / fit["anchors"])
        and fit.get("family", "low_rank") == "low_rank"
        and set(_layer_scales(sidecar)) == {1.0}
    )


def _layer_scales(sidecar: Mapping[str, Any]) -> list[float]:
    """Multipliers of sigma, one a layer; earlier records have none, which are 1."""
    return list((sidecar.get("layer_scales") or dict.fromkeys(sidecar["layers"], 1.0)).values())


def _report_line(
    model: str,
    artifact: Path,
    data: list[Path],
    shift: list[Path],
    output: Path,
    draws: int,
    limit: int | None,
) -> str:
    words: list[object] = ["tfb", "report", "--model", model, "--artifact", artifact]
    words += [word for path in data for word in ("--data", path)]
    words += [word for path in shift for word in ("--shift", path)]
    words += ["--draws", draws, *([] if limit is None else ["--limit", limit])]
    return _line([*words, "--output", f"{output}-again"])


def _line(words: list[object]) -> str:
    return shlex.join(str(word) for word in words)
