"""``tfb fit``: the command's options, its verdict, and what is kept of an interrupted search."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tfb.cli.console import (
    LABEL_REMEDY,
    ROWS_HELP,
    SIGNALLED,
    Base,
    BatchSize,
    Columns,
    Device,
    Input,
    Labels,
    LabelTokens,
    Limit,
    Tail,
    Truncate,
    advanced,
    check_labels,
    check_place,
    note,
    print_curve,
    print_fit,
    progress_bar,
    quiet,
    say,
)

if TYPE_CHECKING:
    from torch import Tensor

    from tfb.pretrained import TfbModel


def fit(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="a finished PEFT LoRA adapter: folder or hub name"),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="labelled rows, or prompts with answers, that the adapter was not trained on: "
            f"{ROWS_HELP}",
        ),
    ],
    base: Base = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="new folder for the artifact; default: ADAPTER-tfb, beside a local adapter",
        ),
    ] = None,
    columns: Columns = None,
    labels: Labels = None,
    truncate: Truncate = None,
    target_error: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="share of wrong answers to allow, such as 0.05: score then marks the rows to "
            "abstain from",
        ),
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="share of rows whose prediction set shall hold the right answer, such as 0.9",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="other labelled rows for these two; default: a random half of DATA"
        ),
    ] = None,
    limit: Limit = None,
    device: Device = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="also print every sigma that was tried, as a table")
    ] = False,
    metric: Annotated[
        str,
        advanced(
            metavar="NAME",
            help="the loss: nll, accuracy or expected_nll; without labels pseudo_nll or "
            "embedding_norm",
        ),
    ] = "nll",
    objective: Annotated[
        str | None,
        advanced(
            metavar="NAME",
            help="min_nll: the least loss; max_variance: the most noise that --tolerance allows, "
            "as the paper has it; gvi: the least loss with a prior; default: min_nll, but "
            "max_variance with --tolerance, another metric or search",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        advanced(
            metavar="X",
            help="degradation that max_variance accepts, relative; default 0.003, of accuracy 0.01",
        ),
    ] = None,
    absolute: Annotated[bool, advanced("--absolute", help="tolerance in the loss's units")] = False,
    search: Annotated[
        str, advanced(metavar="NAME", help="how sigma is searched: grid or bisection")
    ] = "grid",
    mode: Annotated[
        str,
        advanced(
            metavar="NAME", help="which tokens get noise: full (all) or tail (the last; cheaper)"
        ),
    ] = "full",
    tail: Tail = None,
    length_normalization: Annotated[
        str,
        advanced(
            metavar="NAME",
            help="choices of several tokens: none (sum of log-probs) or tokens (mean)",
        ),
    ] = "none",
    no_temperature: Annotated[
        bool, advanced("--no-temperature", help="fit sigma without a temperature beside it")
    ] = False,
    sigma: Annotated[
        float | None,
        advanced(metavar="X", help="fit the temperature alone, at this sigma; 0: no noise"),
    ] = None,
    draws: Annotated[
        int, advanced(metavar="N", help="sampled adapters at each sigma: an even number")
    ] = 8,
    seed: Annotated[int, advanced(metavar="N", help="seed of the noise")] = 0,
    label_tokens: LabelTokens = None,
    batch_size: BatchSize = 50,
) -> None:
    """Fit how much noise and what temperature the adapter needs, and write the artifact.

    [bold]Examples[/]

    tfb fit my-adapter dev.csv --columns text=sentence,label=intent
    tfb fit me/adapter dev.jsonl --base meta-llama/Llama-3.2-1B -o fitted
    tfb fit my-adapter dev.jsonl --target-error 0.05 --coverage 0.9
    tfb fit my-adapter pairs.jsonl --columns prompt=question,answer=target

    Ctrl-C or SIGTERM keeps what was measured; the same command then goes on.
    """
    from tfb.adapters.artifact import check_output_folder
    from tfb.adapters.loading import check_device
    from tfb.evaluation.decisions import check_targets
    from tfb.pretrained import check_fit_rows
    from tfb.sampling.config import SamplingConfig
    from tfb.search.fit import check_arguments, default_objective
    from tfb.search.loss import AnchorSet

    quiet()
    check_device(device)
    output = check_output_folder(default_output(adapter) if output is None else output)
    check_place("--output", output)
    SamplingConfig(mode=mode, tail=tail, length_normalization=length_normalization, seed=seed)
    if absolute and tolerance is None:
        raise ValueError("--absolute says how --tolerance is meant: give --tolerance as well")
    objective = default_objective(objective, metric, tolerance, search)
    if sigma is not None and no_temperature:
        raise ValueError(
            f"--sigma {sigma} leaves the temperature to fit: leave out --no-temperature"
        )
    if target_error is not None or coverage is not None:
        check_targets(target_error, coverage)
    elif calibration is not None:
        raise ValueError("--calibration is for --target-error and --coverage: give one as well")
    check_arguments(
        metric, tolerance, search, objective, draws, temperature=not no_temperature, sigma=sigma
    )
    given = Input.of(
        adapter,
        base,
        columns,
        labels,
        truncate,
        label_tokens,
        length_normalization=length_normalization,
    )
    rows = given.read(data, limit)
    decide = target_error is not None or coverage is not None
    needed = f"metric {metric} needs one on every row of DATA (embedding_norm needs none)"
    check_fit_rows(rows, given.form.task, metric, needed, LABEL_REMEDY, decide=decide)
    encoded = given.encode(rows)
    AnchorSet.of(encoded).check(metric)
    held_out = None if calibration is None else given.read(calibration, None)
    check_labels(held_out or [], "--calibration needs one on every row")
    m = given.load(device, labels=given.form.labels, seed=seed)
    m.bayes.configure(length_normalization=length_normalization)
    kept, model = Path(f"{output}.search.safetensors"), identity(m)
    sweeps = read_sweeps(kept, model)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with progress_bar("searching sigma (rows x draws)") as bar:
            found = m.fit(
                rows,
                truncate=truncate,
                target_error=target_error,
                coverage=coverage,
                calibration=held_out,
                metric=metric,
                tolerance=tolerance,
                search=search,
                objective=objective,
                temperature=not no_temperature,
                sigma=sigma,
                relative=not absolute,
                draws=draws,
                batch_size=batch_size,
                mode=mode,
                tail=tail,
                progress=bar.advance,
                sweeps=sweeps,
            )
    except KeyboardInterrupt as interrupted:
        note(keep_sweeps(kept, model, sweeps))
        raise typer.Exit(SIGNALLED + (*interrupted.args, signal.SIGINT)[0]) from interrupted
    except RuntimeError:  # of torch: another batch size may fit into memory
        note(keep_sweeps(kept, model, sweeps))
        raise
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    m.columns, m.extra = dict(given.form.columns), {"anchors": data.name}
    m.columns.pop("answer", None)
    m.save_pretrained(output)
    kept.unlink(missing_ok=True)
    print_fit(found)
    if m.bayes.decisions is not None:
        say(str(m.bayes.decisions))
    if curve:
        print_curve(found)
    say(f"artifact: {output}")


def default_output(adapter: str) -> Path:
    """Return ADAPTER-tfb: beside a local adapter, in the present folder for a hub name."""
    path = Path(adapter)
    if not path.is_dir():
        return Path(f"{path.name}-tfb")
    path = path if path.name not in ("", "..") else path.resolve()
    return path.with_name(f"{path.name}-tfb")


# --- an interrupted search ------------------------------------------------------------------------


def _interrupt(number: int, _: object) -> NoReturn:
    """Let SIGTERM do what Ctrl-C does."""
    raise KeyboardInterrupt(number)


def identity(m: TfbModel) -> str:
    """Return a hash of what the outputs of a sweep depend on beside its key."""
    from tfb.adapters.artifact import (
        base_fingerprint,
        base_settings,
        file_sha256,
        library_versions,
    )
    from tfb.adapters.loading import CONFIG, WEIGHTS
    from tfb.plain import json_sha256

    bayes = m.bayes
    assert bayes.source is not None
    known: list[Any] = [file_sha256(bayes.source / name) for name in (CONFIG, WEIGHTS)]
    known += [base_fingerprint(bayes.base), base_settings(bayes.base), library_versions()]
    return json_sha256([*known, str(bayes.dtype), bayes.device.type])


def read_sweeps(path: Path, model: str) -> dict[str, Tensor]:
    """Return the finished sweeps of an earlier search of the same model; say what is there."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            same = (file.metadata() or {}).get("model") == model
            found = {key: file.get_tensor(key) for key in file.keys()} if same else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        note(f"{path}: damaged ({error}); not used, the search begins anew")
        return {}
    if not same:
        note(f"{path}: is of another model, device or version; not used, the search begins anew")
    else:
        note(f"{path}: going on with {len(found)} finished sweeps of an interrupted search")
    return found


def keep_sweeps(path: Path, model: str, sweeps: dict[str, Tensor]) -> str:
    """Write the finished sweeps; return what was kept, and how to go on."""
    from safetensors.torch import save

    from tfb import atomic

    if not sweeps:
        return "interrupted before the first sweep was finished; nothing to keep"
    tensors = {key: found.detach().cpu().contiguous().clone() for key, found in sweeps.items()}
    atomic.write(path, save(tensors, {"model": model}))
    return (
        f"interrupted: {len(sweeps)} finished sweeps are kept in {path}; the same command goes on"
    )
