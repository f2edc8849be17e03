"""Launch configurations from ``data/launch.json`` (see tuning.py), and what all launchers share.

    kernels.<kernel>   list of {"max_rows", "max_rank", configuration}; the first that fits is used

Nothing is tuned inside a user's forward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from tfb_kernels import tuning

# What @triton.jit made of the kernels is decided when they are imported; so is this.
INTERPRET = bool(triton.knobs.runtime.interpret)

KERNELS = ("shrink", "expand", "generate", "merge", "statistics", "mean")
PATHS = ("fused", "generate")


class LaunchConfig(NamedTuple):
    """Tile sizes of one launch; each kernel's launcher says what it takes from here.

    Attributes:
        block_t: rows of x.
        block_m: out_features.
        block_n: in_features of merge.
        block_p: rows of noise.
        block_k: in_features; of expand and merge the rank, of statistics and mean the vocabulary.
        num_warps: of a program.
        num_stages: of its loads.
    """

    block_t: int = 64
    block_m: int = 128
    block_n: int = 128
    block_p: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 2


def architecture(device: torch.device) -> str:
    """Return ``tuning.architecture``, but "interpreter" where no kernel is compiled."""
    return "interpreter" if INTERPRET else tuning.architecture(device)


@tuning.cached
def configurations(arch: str, kernel: str) -> tuple[tuple[int, int, LaunchConfig], ...]:
    """List (largest rows, largest rank, configuration) of a kernel, in the order of trial."""
    return tuple(
        (
            c.get("max_rows") or 1 << 62,
            c.get("max_rank") or 1 << 62,
            LaunchConfig(**{k: v for k, v in c.items() if not k.startswith("max_")}),
        )
        for c in tuning.entry(arch)["kernels"][kernel]
    )


@tuning.cached
def choose_config(kernel: str, *, rows: int, rank: int, arch: str) -> LaunchConfig:
    """Return the configuration for ``rows`` rows of x (or logits) at ``rank``."""
    for max_rows, max_rank, config in configurations(arch, kernel):
        if rows <= max_rows and rank <= max_rank:
            return config
    raise LookupError(f"launch.json: no configuration of {kernel} for rows={rows}, rank={rank}")


def choose_path(rows: int, arch: str) -> str:
    """Return "fused" or "generate", for ``rows`` rows of x to each stream."""
    return "generate" if rows >= tuning.paths(arch).generate_min_rows else "fused"


def math_kind() -> str:
    """Name the transcendentals of the noise (see triton_noise)."""
    return "libm" if INTERPRET or torch.version.hip else "cuda"


def signed_word(word: int) -> int:
    """Return the signed 32-bit number with the bits of an unsigned one."""
    return word - (1 << 32) if word >= 1 << 31 else word


def dot_precision(dtype: torch.dtype) -> str:
    """Return "tf32" only where torch was told that float32 products may use it, else "ieee"."""
    # Every way to allow it sets this one; torch's older getter raises once a program has set it.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    # Of AMD's cards one alone has it.
    return "tf32" if allowed and dtype == torch.float32 and not torch.version.hip else "ieee"


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a product's operands.

    The interpreter's products in bfloat16 are wrong (triton #11584), and get float32.
    """
    return torch.float32 if INTERPRET and dtype == torch.bfloat16 else dtype


def power_of_2(size: int) -> int:
    """Return the next power of two, as tl.arange takes it."""
    return 1 << max(size - 1, 0).bit_length()


def padded_rank(R: int) -> int:
    """Return the rank as tl.arange and tl.dot take it: a power of two, at least 16."""
    return max(16, power_of_2(R))
