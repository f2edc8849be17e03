"""Noise contract, version 1: standard normals as a pure function of their coordinates.

The contract and its formulas are in ``docs/noise-contract.md``. This file is its oracle: it
evaluates log, sin and cos in float64 and rounds once.

To change the noise is to change every saved seed's meaning: raise ``NOISE_VERSION``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NOISE_VERSION = 1

PHILOX_ROUNDS = 10
PHILOX_M = (0xD2511F53, 0xCD9E8D57)  # multipliers, Random123's philox.h
PHILOX_W = (0x9E3779B9, 0xBB67AE85)  # Weyl increments of the key
TOKEN_DOMAIN = 1 << 31  # added to the column group of token noise

_MASK = 0xFFFFFFFF
_CHUNK = 1 << 15  # Philox calls at a time: the int64 temporaries stay in a core's cache


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10 on int64 tensors that hold 32-bit words.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        counter: four words, broadcastable against each other, values in [0, 2^32).
        key: two words, values in [0, 2^32).

    Returns:
        Four words of the broadcast shape, values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # A 32x32 product may wrap the sign of int64; its bits are right all the same, and the
        # mask after the arithmetic shift removes the copies of the sign.
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) ^ c1 ^ k0) & _MASK,
            p1 & _MASK,
            ((p0 >> 32) ^ c3 ^ k1) & _MASK,
            p0 & _MASK,
        )
        k0, k1 = (k0 + PHILOX_W[0]) & _MASK, (k1 + PHILOX_W[1]) & _MASK
    return c0, c1, c2, c3


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Turn two words into two independent standard normals, float64."""
    u = radius_word.to(torch.float32) * 2.0**-32 + 2.0**-33
    signed = (angle_word ^ 0x80000000) - 0x80000000
    theta = signed.to(torch.float32) * torch.tensor(math.pi * 2.0**-31, dtype=torch.float32)
    radius = (-2.0 * u.double().log()).sqrt_()
    angle = theta.double()
    return radius * angle.cos(), radius * angle.sin()


def _key(seed: Tensor) -> tuple[Tensor, Tensor]:
    return seed & _MASK, (seed >> 32) & _MASK


def _normals(
    seed: Tensor, layer_id: int, streams: Tensor, rows: int, columns: int, domain: int
) -> Tensor:
    """Return [Q, rows, columns] float32 normals; the column group is offset by ``domain``."""
    device = streams.device
    key = _key(seed.to(device))
    groups = (columns + 3) // 4
    out = torch.empty(len(streams), rows, groups * 4, dtype=torch.float32, device=device)
    group = torch.arange(groups, dtype=torch.int64, device=device) + domain
    layer = torch.full((), layer_id, dtype=torch.int64, device=device)
    # Work through the (stream, row) pairs in slabs of at most _CHUNK Philox calls; a row longer
    # than that is one slab of its own.
    flat = out.view(len(streams) * rows, groups, 4)
    pair = torch.arange(len(streams) * rows, dtype=torch.int64, device=device)
    slab = max(1, _CHUNK // max(groups, 1)) if device.type == "cpu" else max(len(pair), 1)
    for start in range(0, len(pair), slab):
        p = pair[start : start + slab]
        words = philox4x32(
            (group[None, :], (p % rows)[:, None], streams[p // rows][:, None], layer), key
        )
        block = flat[start : start + slab]
        block[..., 0], block[..., 1] = _box_muller(words[0], words[1])
        block[..., 2], block[..., 3] = _box_muller(words[2], words[3])
    return out[..., :columns].contiguous()


def weight_noise(seed: Tensor, layer_id: int, streams: Tensor, r: int, n: int) -> Tensor:
    """Return E [Q, r, n] float32 on the device of ``streams`` [Q] int64; ``seed`` is int64, 0-d."""
    return _normals(seed, layer_id, streams, r, n, 0)


def token_noise(seed: Tensor, layer_id: int, streams: Tensor, tokens: int, r: int) -> Tensor:
    """Return Xi [Q, T, r] float32: r normals for each token position of the flattened batch."""
    return _normals(seed, layer_id, streams, tokens, r, TOKEN_DOMAIN)
