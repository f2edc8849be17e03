"""Posterior draws: pairs (sigma, stream) with a seed and a kind of noise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tfb_kernels.ops import NOISE_KINDS, by_stream

MOST_DRAWS = 1 << 16


def stable_layer_id(name: str) -> int:
    """Return the unsigned 32-bit noise identity of a module's qualified name (BLAKE2s)."""
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


def check_even(draws: int, name: str = "draws") -> None:
    """Refuse a number of draws that is no number of antithetic pairs."""
    _check_count(draws, name)
    if draws % 2:
        raise ValueError(
            f"{name}={draws}: antithetic draws come in pairs, use {draws + 1} (or tfb.Draws.iid)"
        )


@dataclass(frozen=True, repr=False)
class Draws:
    """S posterior draws; immutable, hashable, independent of any model.

    sigma = 0 is the adapter, exactly. An antithetic pair is (+sigma, q), (-sigma, q).

    Attributes:
        sigmas: S noise scales in the paper's pre-scaling units; a negative one flips the noise.
        streams: S unsigned 32-bit numbers; equal streams share their noise.
        seed: a signed 64-bit number.
        noise: "weight" (one weight sample for all tokens) or "token" (independent per token).
    """

    sigmas: tuple[float, ...]
    streams: tuple[int, ...]
    seed: int = 0
    noise: str = "weight"
    _tensors: dict[torch.device, DrawTensors] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.sigmas or len(self.sigmas) != len(self.streams):
            raise ValueError(
                f"draws: need S >= 1 sigmas and as many streams, got {len(self.sigmas)} and "
                f"{len(self.streams)}"
            )
        for sigma in self.sigmas:
            if not math.isfinite(sigma):
                raise ValueError(f"draws: sigma={sigma} is not finite")
        for stream in self.streams:
            if not 0 <= stream < 1 << 32:
                raise ValueError(f"draws: stream {stream} is not an unsigned 32-bit number")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ValueError(f"draws: seed={self.seed} does not fit a signed 64-bit number")
        if self.noise not in NOISE_KINDS:
            raise ValueError(f"draws: noise={self.noise!r}, expected {' or '.join(NOISE_KINDS)}")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{s:.4g}" for s in sorted({abs(s) for s in self.sigmas})[:4])
        more = ", ..." if len({abs(s) for s in self.sigmas}) > 4 else ""
        streams = len(set(self.streams))
        return f"Draws({len(self)} of {streams} streams, sigma {sizes}{more}, seed {self.seed})"

    @classmethod
    def mean(cls) -> Draws:
        """Make one draw at sigma = 0: the deterministic adapter."""
        return cls((0.0,), (0,))

    @classmethod
    def iid(
        cls, n: int, sigma: float, *, seed: int = 0, noise: str = "weight", first_stream: int = 0
    ) -> Draws:
        """Make n independent draws at ``sigma``."""
        _check_count(n, "draws")
        _check_sigma(sigma)
        return cls((float(sigma),) * n, tuple(range(first_stream, first_stream + n)), seed, noise)

    @classmethod
    def antithetic(
        cls, n: int, sigma: float, *, seed: int = 0, noise: str = "weight", first_stream: int = 0
    ) -> Draws:
        """Make n / 2 pairs (+sigma, q), (-sigma, q), in whose average linear terms cancel."""
        check_even(n)
        _check_sigma(sigma)
        streams = tuple(first_stream + s // 2 for s in range(n))
        return cls((float(sigma), -float(sigma)) * (n // 2), streams, seed, noise)

    @classmethod
    def grid(
        cls,
        sigmas: Sequence[float],
        n: int,
        *,
        antithetic: bool = True,
        seed: int = 0,
        noise: str = "weight",
        first_stream: int = 0,
    ) -> Draws:
        """Make n draws at each of G sigmas, on common streams.

        All draws of a stream stand side by side. With k = 2 (antithetic) or 1, draw number
        ``q * (G * k) + g * k + sign`` has stream q and sigma g.
        """
        if not sigmas:
            raise ValueError("draws: the sigma grid is empty")
        for sigma in sigmas:
            _check_sigma(sigma)
        make = cls.antithetic if antithetic else cls.iid
        one = make(n, 1.0, seed=seed, noise=noise, first_stream=first_stream)
        k = 2 if antithetic else 1
        cells = [
            (sigma * one.sigmas[q * k + sign], one.streams[q * k])
            for q in range(n // k)
            for sigma in sigmas
            for sign in range(k)
        ]
        return cls(tuple(c[0] for c in cells), tuple(c[1] for c in cells), seed, noise)

    def __len__(self) -> int:
        return len(self.sigmas)

    def __getitem__(self, index: slice) -> Draws:
        """Return a contiguous part, which gives what it gives within the whole."""
        return replace(self, sigmas=self.sigmas[index], streams=self.streams[index])

    @cached_property
    def distinct_streams(self) -> tuple[int, ...]:
        """The Q streams without repeats, in order of first use."""
        return tuple(dict.fromkeys(self.streams))

    @cached_property
    def units(self) -> tuple[tuple[int, ...], ...]:
        """Draw numbers grouped by stream: the independent units of a Monte-Carlo average."""
        groups: dict[int, list[int]] = {q: [] for q in self.distinct_streams}
        for s, q in enumerate(self.streams):
            groups[q].append(s)
        return tuple(tuple(g) for g in groups.values())

    def unit_tensor(self, device: torch.device | str = "cpu") -> Tensor | None:
        """Return ``units`` as [U, D] int64, or None where streams repeat unevenly."""
        if len({len(u) for u in self.units}) > 1:
            return None
        return torch.tensor(self.units, dtype=torch.int64, device=device)

    def tensors(self, device: torch.device | str = "cpu") -> DrawTensors:
        """Return the draws as tensors on ``device``, made once for each device."""
        device = torch.device(device)
        found = self._tensors.get(device)
        if found is None:
            distinct, index, run = by_stream(self.streams)
            found = DrawTensors(
                sigmas=torch.tensor(self.sigmas, dtype=torch.float64, device=device),
                streams=torch.tensor(distinct, dtype=torch.int64, device=device),
                stream_index=torch.tensor(index, dtype=torch.int64, device=device),
                draws_per_stream=run,
                seed=torch.tensor(self.seed, dtype=torch.int64, device=device),
            )
            if not torch.compiler.is_compiling():  # there they are constants of the graph
                self._tensors[device] = found
        return found


class DrawTensors(NamedTuple):
    """Draws on one device, in the order of :class:`tfb_kernels.samples.Samples`."""

    sigmas: Tensor  # [S] float64
    streams: Tensor  # [Q] int64, without repeats
    stream_index: Tensor  # [S] int64, the place of each draw's stream in ``streams``
    draws_per_stream: int  # k if draws come stream by stream, k of each; else 1
    seed: Tensor  # 0-d int64


def _check_count(draws: int, name: str) -> None:
    if not isinstance(draws, int):
        raise ValueError(f"{name}={draws!r}: expected a number of draws")
    if draws < 1:
        raise ValueError(f"{name}={draws}: at least one draw is needed")
    if draws > MOST_DRAWS:
        raise ValueError(f"{name}={draws}: expected at most {MOST_DRAWS}")


def _check_sigma(sigma: float) -> None:
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(
            f"sigma={sigma}: expected a finite number >= 0 (Draws(...) itself takes signed ones)"
        )
