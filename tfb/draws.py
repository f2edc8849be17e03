"""Posterior draws: pairs (sigma, stream) with a seed and a kind of noise.

A negative sigma flips the noise, so an antithetic pair is (+sigma, q), (-sigma, q). A sigma grid is
the same streams at several sigma (common random numbers). sigma = 0 is the adapter, exactly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from tfb_kernels.ops import NOISE_KINDS, by_stream


def stable_layer_id(name: str) -> int:
    """Return the unsigned 32-bit noise identity of a module's qualified name (BLAKE2s)."""
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


def check_even(draws: int, name: str = "draws") -> None:
    """Refuse a number of draws that is not a number of antithetic pairs.

    Args:
        draws: the number.
        name: the parameter that the message names.

    Raises:
        ValueError: it is odd or below 1.
    """
    _check_count(draws, name)
    if draws % 2:
        raise ValueError(
            f"{name}={draws}: antithetic draws come in pairs, use {draws + 1} (or tfb.Draws.iid)"
        )


@dataclass(frozen=True)
class Draws:
    """S posterior draws; immutable, hashable, independent of any model.

    Attributes:
        sigmas: S noise scales in the paper's pre-scaling units; any sign.
        streams: S noise streams, unsigned 32-bit; equal streams share their noise.
        seed: a signed 64-bit number.
        noise: "weight" (one weight sample for all tokens) or "token" (independent per token).

    Raises:
        ValueError: no draws, lengths that differ, non-finite sigma, stream or seed out of range.
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

    # --- constructors ---------------------------------------------------------------------------

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
        """Make n / 2 pairs (+sigma, q), (-sigma, q).

        A pair cancels the linear term of the noise in averaged probabilities.
        """
        check_even(n)
        _check_sigma(sigma)
        pairs = range(first_stream, first_stream + n // 2)
        return cls(
            (float(sigma), -float(sigma)) * (n // 2),
            tuple(q for q in pairs for _ in (0, 1)),
            seed,
            noise,
        )

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
        ``q * (G * k) + g * k + sign`` has stream q and sigma g. At sigma = 0 all n draws are the
        deterministic adapter.
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

    # --- views ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.sigmas)

    def __getitem__(self, index: slice) -> Draws:
        """Return a contiguous part, for running S draws in parts with identical results."""
        return replace(self, sigmas=self.sigmas[index], streams=self.streams[index])

    @cached_property
    def distinct_streams(self) -> tuple[int, ...]:
        """The Q streams without repeats, in order of first use."""
        return tuple(dict.fromkeys(self.streams))

    @cached_property
    def units(self) -> tuple[tuple[int, ...], ...]:
        """Draw numbers grouped by stream: the independent units of a Monte-Carlo average.

        The two draws of an antithetic pair are dependent, so a standard error counts the pair
        once.
        """
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
        """Return the draws as tensors on ``device``; they are made once for each device and kept.

        Inside ``torch.compile`` they are only read: draws that were never on ``device`` become
        constants of the graph.
        """
        device = torch.device(device)
        found = self._tensors.get(device)
        if found is None:
            distinct, index, run = by_stream(self.streams)
            found = DrawTensors(
                sigmas=torch.tensor(self.sigmas, dtype=torch.float64, device=device),
                streams=torch.tensor(distinct, dtype=torch.int64, device=device),
                stream_index=torch.tensor(index, dtype=torch.int64, device=device),
                seed=torch.tensor(self.seed, dtype=torch.int64, device=device),
                draws_per_stream=run,
            )
            if not torch.compiler.is_compiling():
                self._tensors[device] = found
        return found


@dataclass(frozen=True)
class DrawTensors:
    """Draws on one device.

    Attributes:
        sigmas: [S] float64.
        streams: [Q] int64, the distinct streams.
        stream_index: [S] int64, the place of each draw's stream in ``streams``.
        seed: 0-d int64.
        draws_per_stream: k if the draws come stream by stream, k of each; else 1.
    """

    sigmas: Tensor
    streams: Tensor
    stream_index: Tensor
    seed: Tensor
    draws_per_stream: int


def _check_count(draws: int, name: str) -> None:
    if draws < 1:
        raise ValueError(f"{name}={draws}: at least one draw is needed")


def _check_sigma(sigma: float) -> None:
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(
            f"sigma={sigma}: expected a finite number >= 0 (Draws(...) itself takes signed ones)"
        )
