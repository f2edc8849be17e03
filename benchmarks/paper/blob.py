"""The authors' published checkpoints (MLE, MAP, BLoB) as ordinary PEFT folders.

    python -m benchmarks.paper.blob CHECKPOINT OUT

Their wrapper is a PEFT model around a PEFT model, so keys have their prefix twice, which PEFT loads
as a silent no-op and ``tfb.load_adapter`` refuses. Written from the scripts' sources and tested on
what PEFT writes of a model wrapped as theirs is: the published files could not be had here.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from tfb.adapters.artifact import check_output_folder, staged_folder
from tfb.adapters.loading import (
    CONFIG,
    WEIGHTS,
    adapter_folder,
    adapter_tensor_shapes,
    local_folder,
    lora_keys,
)
from tfb.posterior import AdapterError

PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.(?P<factor>lora_A|lora_B)\.weight")
# BLoB's posterior (arXiv 2406.11675) is Gaussian in A: lora_A holds its mean, lora_A_rho the square
# roots of its standard deviations, in whose place TFB puts a variance of its own.
RHO = re.compile(r"(?P<module>.+)\.lora_A_rho")
# Of the base's frozen weights, which PEFT adds where the output embedding is adapted.
COPY = re.compile(r"(?:.+\.)?(?P<name>lm_head|embed_tokens)\.(?:base_layer\.)?weight")


@dataclass(frozen=True)
class MeanAdapter:
    """A checkpoint's mean, written as a PEFT folder.

    Attributes:
        folder: Where it lies.
        modules: How many have a LoRA.
        left_out: How many tensors of each kind: "lora_A_rho", "lm_head", "embed_tokens".
    """

    folder: Path
    modules: int
    left_out: dict[str, int]

    def __str__(self) -> str:
        parts = ", ".join(f"{n} {kind}" for kind, n in self.left_out.items()) or "nothing"
        return f"mean A and B of {self.modules} modules; left out: {parts}"


def mean_adapter(checkpoint: str | Path, folder: str | Path) -> MeanAdapter:
    """Write the mean of a published checkpoint to a new PEFT folder, all of it or nothing.

    Args:
        checkpoint: A local folder or a name for :func:`find_adapter`.
        folder: Absent or empty.

    Raises:
        AdapterError: No checkpoint there, an ordinary adapter, a key that is not understood, a
            module without A or B, or a rho of another shape than its A.
        ArtifactError: The folder holds something.
    """
    path = check_output_folder(folder)
    source = adapter_folder(find_adapter(checkpoint))
    taken, left_out = _sort(checkpoint, adapter_tensor_shapes(source))
    with staged_folder(path) as staging:
        with safe_open(source / WEIGHTS, framework="pt") as file:
            tensors = {ours: file.get_tensor(theirs) for ours, theirs in taken.items()}
        save_file(tensors, str(staging / WEIGHTS), metadata={"format": "pt"})
        shutil.copyfile(source / CONFIG, staging / CONFIG)
    return MeanAdapter(path, len(taken) // 2, left_out)


def find_adapter(name: str | Path) -> Path:
    """Return the local folder of an adapter.

    Args:
        name: A folder, or a hub name "owner/repository[/folder/in/it]".

    Raises:
        AdapterError: Neither a folder nor to be had from the hub.
    """
    if Path(name).is_dir() or len(parts := str(name).split("/")) <= 2:
        return local_folder(name, [CONFIG, WEIGHTS])
    inside = "/".join(parts[2:])
    patterns = [f"{inside}/{CONFIG}", f"{inside}/{WEIGHTS}"]
    return local_folder("/".join(parts[:2]), patterns) / inside


def _sort(
    checkpoint: str | Path, shapes: dict[str, list[int]]
) -> tuple[dict[str, str], dict[str, int]]:
    """Return their key by ours, and how many tensors of each kind are left out."""
    taken: dict[str, str] = {}
    rhos: dict[str, str] = {}
    unknown: list[str] = []
    left_out: Counter[str] = Counter()
    for key in shapes:
        # Taken off wherever it stands: from once to as often as models were wrapped.
        rest = key
        while rest.startswith(PREFIX):
            rest = rest.removeprefix(PREFIX)
        if rest == key:
            unknown.append(key)
        elif found := FACTOR.fullmatch(rest):
            A, B = lora_keys(found["module"])
            ours = A if found["factor"] == "lora_A" else B
            if ours in taken:
                raise AdapterError(f"{checkpoint}: {taken[ours]} and {key} are the same tensor")
            taken[ours] = key
        elif found := RHO.fullmatch(rest):
            rhos[found["module"]] = key
            left_out["lora_A_rho"] += 1
        elif found := COPY.fullmatch(rest):
            left_out[found["name"]] += 1
        else:
            unknown.append(key)
    if unknown:
        raise AdapterError(
            f"{checkpoint}: {len(unknown)} keys are not understood: {', '.join(unknown[:4])}"
            f"{', ...' if len(unknown) > 4 else ''}; expected {PREFIX}... with lora_A.weight, "
            "lora_B.weight and lora_A_rho of each module"
        )
    _check_complete(checkpoint, shapes, taken, rhos)
    if not left_out and all(ours == theirs for ours, theirs in taken.items()):
        raise AdapterError(f"{checkpoint}: an ordinary PEFT adapter; load it as it is")
    return taken, dict(sorted(left_out.items()))


def _check_complete(
    checkpoint: str | Path,
    shapes: dict[str, list[int]],
    taken: dict[str, str],
    rhos: dict[str, str],
) -> None:
    modules = {key.removeprefix(PREFIX).rsplit(".", 2)[0] for key in taken}
    if not modules:
        raise AdapterError(f"{checkpoint}: holds no lora_A and lora_B")
    for module in sorted(modules | set(rhos)):
        A, B = lora_keys(module)
        if lacks := [name for name in (A, B) if name not in taken]:
            raise AdapterError(f"{checkpoint}: {module} lacks {lacks[0].rsplit('.', 2)[1]}")
        if module in rhos and shapes[rhos[module]] != shapes[taken[A]]:
            raise AdapterError(
                f"{checkpoint}: {rhos[module]} is {shapes[rhos[module]]}, its lora_A "
                f"{shapes[taken[A]]}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.blob", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("checkpoint", help="folder, or owner/repository/folder/in/it")
    parser.add_argument("out", type=Path, help="new folder")
    options = parser.parse_args()
    try:
        made = mean_adapter(options.checkpoint, options.out)
        print(f"{made.folder}: {made}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
