"""``tfb export``: the command's options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tfb.cli.console import (
    Artifact,
    Base,
    Device,
    Draws,
    Input,
    advanced,
    check_place,
    progress_bar,
    quiet,
    say,
)


def export(
    artifact: Artifact,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="a new folder")],
    base: Base = None,
    draws: Draws = 10,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="auto, float16, bfloat16, float32 or float64")
    ] = "auto",
    seed: Annotated[
        int | None, advanced(metavar="N", help="seed of the noise; default: as fitted")
    ] = None,
    mode: Annotated[
        str | None,
        advanced(metavar="NAME", help="full: take a sigma that was fitted for --mode tail"),
    ] = None,
) -> None:
    """Write sampled adapters as PEFT folders, for servers of many LoRA adapters.

    [bold]Examples[/]

    tfb export my-adapter-tfb -o adapters
    tfb export my-adapter-tfb -o adapters --draws 4 --dtype bfloat16

    Average the probabilities that the server gives with each of them.
    """
    from tfb.adapters.artifact import check_output_folder
    from tfb.adapters.export import MANIFEST, check_dtype, check_exportable
    from tfb.adapters.export import export as write_adapters
    from tfb.adapters.loading import check_device
    from tfb.draws import Draws as PosteriorDraws
    from tfb.draws import check_even

    quiet()
    check_output_folder(output)
    check_place("--output", output, artifact)
    check_device(device)
    check_even(draws)
    check_dtype(dtype)
    given = Input.of(artifact, base)
    sidecar = given.sidecar
    if mode not in (None, "full"):
        raise ValueError(f"--mode {mode}: an exported adapter has its noise at every token: full")
    check_exportable(mode or sidecar["mode"], sidecar.get("tail"))
    if sidecar["sigma"] == 0:
        raise ValueError(
            f"{artifact}: its sigma is 0, and all draws would be the adapter itself: serve that "
            f"one, with logits divided by {sidecar.get('temperature', 1.0):.6g}"
        )
    chosen = PosteriorDraws.antithetic(
        draws, sidecar["sigma"], seed=sidecar["seed"] if seed is None else seed
    )
    m = given.load(device, mode)
    with progress_bar("writing adapters", draws) as bar:
        write_adapters(m.bayes, output, chosen, dtype=dtype, progress=bar.advance)
    rounding = json.loads((output / MANIFEST).read_text())["rounding"]
    lost = "" if rounding is None else f"; rounding {rounding:.2g} of the noise"
    say(f"{draws} adapters, sigma = {sidecar['sigma']:.6g}{lost}: {output}")
