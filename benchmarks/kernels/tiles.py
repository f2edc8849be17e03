"""Tile configurations that the sweep tries, and launches of each kernel with one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tfb_kernels import launch, tuning
from tfb_kernels.launch import LaunchConfig, choose_config
from tfb_kernels.samples import Samples

RANK, STREAMS, DRAWS = 16, 5, 10


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        shared: in_features and out_features of q, whose x all draws share.
        per_draw: Those of down, whose x is of each draw's own.
        vocabulary: Of the logits.
        label_rows: Of the logits.
        rows: Numbers of rows that kernels are measured at.
        up_to: The most rows that each of these answers for.
        path_rows: Numbers of rows that paths are compared at.
        merge_rows: Rows of a draw that merging is compared at.
    """

    shared: tuple[int, int] = (4096, 4096)
    per_draw: tuple[int, int] = (14336, 4096)
    vocabulary: int = 128256
    label_rows: int = 50
    rows: tuple[int, ...] = (8, 50, 256, 1024, 4096)
    up_to: tuple[int | None, ...] = (16, 128, 512, 2048, None)
    path_rows: tuple[int, ...] = (16, 64, 128, 256, 512, 1024, 2048, 4096)
    merge_rows: tuple[int, ...] = (64, 256, 512, 1024, 2048, 4096)


CPU = Sizes((512, 512), (2816, 1024), merge_rows=(128, 256, 512, 1024, 2048, 4096))
TOY = Sizes((64, 48), (96, 32), 100, 2, (4, 20), (16, None), (4, 32), (8, 64))


@dataclass(frozen=True)
class Job:
    """One kernel at one number of rows, in both ways of x where it has two."""

    kernel: str
    rows: int
    max_rows: int | None
    candidates: tuple[LaunchConfig, ...]


# --- candidates -----------------------------------------------------------------------------------


def candidates(kernel: str, rows: int) -> Iterator[LaunchConfig]:
    """Yield tiles worth trying: as few rows of a tile idle as a number of rows allows."""
    tiles = [16] if rows <= 16 else [16, 32, 64] if rows <= 64 else [32, 64, 128]
    if kernel == "shrink":
        sizes = {"block_t": tiles, "block_p": (32, 64, 128), "block_k": (64, 128)}
        found = _grid(**sizes, num_warps=(4, 8), num_stages=(2, 3, 4))
        return filter(_fits_shrink, found)
    if kernel == "merge":
        sizes = {"block_m": (32, 64, 128), "block_n": (64, 128, 256), "block_k": (16, 32)}
        found = _grid(**sizes, num_warps=(4, 8))
        return (c for c in found if 16 <= _each(c, c.block_m * c.block_n) <= 64)
    if kernel == "expand":
        sizes = {"block_t": tiles, "block_m": (64, 128, 256, 512), "block_k": (32,)}
        found = _grid(**sizes, num_warps=(2, 4, 8), num_stages=(2, 3))
        most = {16: 128}  # elements a thread
        return (
            c for c in found if 16 <= _each(c, c.block_t * c.block_m) <= most.get(c.block_t, 64)
        )
    if kernel == "generate":
        found = _grid(block_p=(8, 16, 32, 64), block_k=(128, 256, 512, 1024), num_warps=(2, 4, 8))
        return (c for c in found if 4 <= _each(c, c.block_p * c.block_k) <= 64)
    found = _grid(block_k=(256, 512, 1024, 2048, 4096, 8192), num_warps=(2, 4, 8, 16))
    return (c for c in found if 4 <= _each(c, c.block_k) <= 64)


def _grid(**sizes: Sequence[int]) -> Iterator[LaunchConfig]:
    for values in product(*sizes.values()):
        yield LaunchConfig(**dict(zip(sizes, values, strict=True)))


def _each(config: LaunchConfig, elements: int) -> int:
    """Return the elements of a tile that one thread holds."""
    return elements // (32 * config.num_warps)


def _fits_shrink(c: LaunchConfig) -> bool:
    """Whether there is enough work a step for 8 warps, and no more than registers hold of 4."""
    tile = c.block_t * c.block_p
    fits = (c.num_warps == 8) == (tile >= 8192) and tile <= 16384
    return fits and (c.block_k == 64 or c.num_stages == 2)


def jobs(sizes: Sizes, toy: bool) -> Iterator[Job]:
    """Yield all kernels that have configurations."""
    few = slice(None, None, 20) if toy else slice(None)
    for kernel in ("shrink", "expand"):
        for rows, bound in zip(sizes.rows, sizes.up_to, strict=True):
            yield Job(kernel, rows, bound, tuple(candidates(kernel, rows))[few])
    # One line each, for any number of rows.
    for kernel in ("generate", "merge", "statistics", "mean"):
        yield Job(kernel, sizes.label_rows, None, tuple(candidates(kernel, 0))[few])


# --- what is timed --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A launch of a kernel by a configuration, or by what its launcher makes of one."""

    launch: Callable[[Any], object]
    plan: Callable[[LaunchConfig], Any] = field(default=lambda config: config)

    def __call__(self, config: LaunchConfig) -> object:
        return self.launch(self.plan(config))


def steps(job: Job, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Step]:
    """Return, by the way x comes, a launch of the job's kernel with a configuration."""
    from tfb_kernels.triton_generate import generate
    from tfb_kernels.triton_predictive import predictive_reduction_triton

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    if job.kernel in ("statistics", "mean"):
        logits = randn(DRAWS, job.rows, sizes.vocabulary)
        units = torch.arange(DRAWS, device=device).view(-1, 2)
        arch = launch.architecture(device)
        other = choose_config("mean", rows=0, rank=0, arch=arch)
        if job.kernel == "statistics":
            return {"": Step(lambda c: predictive_reduction_triton(logits, units, c, other))}
        other = choose_config("statistics", rows=0, rank=0, arch=arch)
        return {"": Step(lambda c: predictive_reduction_triton(logits, units, other, c))}

    seed, found = torch.tensor(0, device=device), dict[str, Step]()
    # Shared: one group of all streams. Per draw: a group for each pair of draws.
    for kind, (n, m), groups, q in (
        ("shared", sizes.shared, 1, STREAMS),
        ("per-draw", sizes.per_draw, STREAMS, 1),
    ):
        A, streams = randn(RANK, n), torch.arange(groups * q, device=device)
        grouped = streams.view(groups, q)
        if job.kernel == "shrink":
            x = randn(groups, job.rows, n)
            found[kind] = _shrink_step(x, A, grouped, seed)
        elif job.kernel == "generate":
            found[kind] = Step(partial(generate, A, grouped, seed, 0, RANK, n, dtype))
        elif job.kernel == "merge":
            found[kind] = _merge_step(randn(m, n), A, randn(m, RANK), streams, seed)
        else:
            found[kind] = _expand_step(job, m, kind == "shared", randn, device)
    return found


def _merge_step(W: Tensor, A: Tensor, B: Tensor, streams: Tensor, seed: Tensor) -> Step:
    from tfb_kernels.triton_merge import merge

    sigmas = torch.tensor([0.1, -0.1] * STREAMS, device=W.device)
    index, inv_d = streams.repeat_interleave(2), torch.ones(RANK, device=W.device)
    samples = Samples(A, B, inv_d, sigmas, streams, index, 2, seed, 0, 1.0)
    out = W.new_empty((DRAWS, *W.shape))
    return Step(lambda config: merge(W, samples, out, config=config))


def _shrink_step(x: Tensor, A: Tensor, streams: Tensor, seed: Tensor) -> Step:
    from tfb_kernels import triton_shrink

    G, T, n = x.shape
    shape = (G, T, n, streams.shape[1], len(A), x.dtype, launch.dot_precision(x.dtype))
    wave = tuning.processors(x.device)
    return Step(
        lambda made: triton_shrink.shrink(x, A, streams, seed, 0, made),
        lambda config: triton_shrink.plan(*shape, config, wave),
    )


def _expand_step(
    job: Job, m: int, shared: bool, randn: Callable[..., Tensor], device: torch.device
) -> Step:
    """Expand into outputs of a draw for shared x, else in place; ``job.rows`` are rows of it."""
    from tfb_kernels import triton_expand

    draws = DRAWS if shared else 2
    T = max(1, job.rows // draws)
    base = randn(T, m) if shared else randn(draws, T, m)
    out = base.new_empty((draws, T, m)) if shared else base
    operand = launch.operand_dtype(base.dtype)
    z, B = randn(draws, T, RANK, dtype=operand), randn(m, RANK, dtype=operand)
    shape = (draws, T, m, RANK, base.dtype, launch.dot_precision(base.dtype))
    wave = tuning.processors(device)
    return Step(
        lambda made: triton_expand.expand(z, B, base, None, out, made),
        lambda config: triton_expand.plan(*shape, config, wave, shared=shared, bias=False),
    )


def distinct(candidates: Iterable[LaunchConfig], made: Mapping[str, Step]) -> list[LaunchConfig]:
    """Return the first of all candidates that come to the same launches.

    Launchers shrink tiles where programs are few, and a larger one that was never launched must not
    be chosen.
    """
    found: dict[str, LaunchConfig] = {}
    for config in candidates:
        found.setdefault(str([step.plan(config) for step in made.values()]), config)
    return list(found.values())
