"""Launch configurations and the choice between the paths, from ``data/launch.json``.

One entry for each architecture ("sm_90", "gfx942", ...), and "default" for every GPU that has
none, so that an unknown card works untuned. Nothing is tuned inside a user's forward pass.
``benchmarks/gpu.sh --stage sweep`` measures a card and writes its entry.

    kernels.<kernel>   list of {"max_rows", "max_rank", configuration}; the first that fits is used
    paths              thresholds of ``choose_path``
    measured           device, date, commit and medians behind an entry; null: chosen by counting
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

# What @triton.jit made of the kernels is decided when they are imported; so is this.
INTERPRET = bool(triton.knobs.runtime.interpret)

LAUNCH_FILE = Path(__file__).parent / "data" / "launch.json"
KERNELS = ("shrink", "token_shrink", "expand", "generate", "statistics", "mean")
PATHS = ("fused", "generate")


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes of one launch; each kernel's launcher says what it takes from here.

    block_t: rows of x. block_m: out_features. block_p: noise rows. block_k: in_features (expand:
    rank; statistics and mean: vocabulary). splits: parts of in_features that run side by side.
    """

    block_t: int = 64
    block_m: int = 128
    block_p: int = 32
    block_k: int = 64
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Paths:
    """Where generating once beats generating in registers.

    In registers every tile of noise is made again for each block of rows; generated once it is
    written, read back and multiplied by the vendor's library. ``generate_min_rows``: rows that
    share a stream from which on the latter is chosen.
    """

    generate_min_rows: int


@cache
def architecture() -> str:
    """ "sm_90", "gfx942", ... of the current device, or "interpreter"."""
    if INTERPRET:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


@cache
def table() -> dict[str, Any]:
    """The data file."""
    data: dict[str, Any] = json.loads(LAUNCH_FILE.read_text())["architectures"]
    return data


def _entry(arch: str) -> dict[str, Any]:
    """An architecture's own settings, those it does not name from "default"."""
    default, own = table()["default"], table().get(arch, {})
    return {part: default[part] | own.get(part, {}) for part in ("kernels", "paths")}


@cache
def configurations(arch: str, kernel: str) -> tuple[tuple[int, int, LaunchConfig], ...]:
    """(largest rows, largest rank, configuration) of one kernel, in the order they are tried."""
    return tuple(
        (
            c.get("max_rows") or 1 << 62,
            c.get("max_rank") or 1 << 62,
            LaunchConfig(**{k: v for k, v in c.items() if not k.startswith("max_")}),
        )
        for c in _entry(arch)["kernels"][kernel]
    )


def choose_config(kernel: str, *, rows: int, rank: int, arch: str | None = None) -> LaunchConfig:
    """The configuration for ``rows`` rows of x (or logits) at ``rank``."""
    for max_rows, max_rank, config in configurations(arch or architecture(), kernel):
        if rows <= max_rows and rank <= max_rank:
            return config
    raise LookupError(f"launch.json: no configuration of {kernel} for rows={rows}, rank={rank}")


def paths(arch: str | None = None) -> Paths:
    """The path thresholds of an architecture."""
    return Paths(**_entry(arch or architecture())["paths"])


def choose_path(rows: int) -> str:
    """ "fused" or "generate" for weight noise, with ``rows`` rows of x to each stream."""
    return "generate" if rows >= paths().generate_min_rows else "fused"


def math_kind() -> str:
    """Transcendentals of the noise (see triton_noise)."""
    return "libm" if INTERPRET or torch.version.hip else "cuda"


def signed_word(word: int) -> int:
    """An unsigned 32-bit number as the signed one with the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word


def dot_precision(dtype: torch.dtype) -> str:
    """TF32 only where torch itself was told that float32 products may use it."""
    # Every way to allow it sets this one; torch's older getter raises once a program has set it.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"
