"""Prefixes that rows of a batch have in common (few-shot preambles, one context with many choices).

A prefix's keys and values are computed once (for each draw in full mode, with the mean adapter in
tail mode) and then serve every row that begins with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LEAST_SAVING = 0.1  # of the tokens; below, a second pass costs more than it saves


@dataclass(frozen=True)
class SharedPrefix:
    """Rows [B] as U distinct prefixes of ``length`` tokens and what follows.

    Attributes:
        length: tokens of every prefix. ids: [U, length]. owner: [B], the prefix of each row.
    """

    length: int
    ids: Tensor
    owner: Tensor


def find_shared_prefix(rows: Sequence[Sequence[int]], keep: int = 1) -> SharedPrefix | None:
    """The prefix length that leaves the fewest tokens to compute, or None if it saves too little.

    Args:
        rows: token ids of each row without padding. keep: last tokens of a row that stay outside.

    With prefixes of c tokens, U of them distinct, U c tokens and the padded rest B (T - c) are
    computed in place of B T.
    """
    B, T = len(rows), max(map(len, rows))
    longest = min(map(len, rows)) - keep
    if B < 2 or longest < 1:
        return None
    order = sorted(range(B), key=lambda b: list(rows[b]))
    # Rows in lexicographic order: a new prefix of c tokens begins where two neighbours agree on
    # fewer than c. Only such lengths, and the longest possible, can be best.
    agree = [_common(rows[a], rows[b], longest) for a, b in pairwise(order)]
    best, cost = 0, float(B * T)
    for c in sorted({longest, *agree} - {0}):
        found = (1 + sum(n < c for n in agree)) * c + B * (T - c)
        if found < cost:
            best, cost = c, found
    if cost > (1 - LEAST_SAVING) * B * T:
        return None
    owner, firsts = [0] * B, [order[0]]
    for previous, b in enumerate(order[1:]):
        if agree[previous] < best:
            firsts.append(b)
        owner[b] = len(firsts) - 1
    ids = torch.tensor([list(rows[b][:best]) for b in firsts])
    return SharedPrefix(best, ids, torch.tensor(owner))


def _common(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """Tokens on which a and b agree from the start, at most ``limit``."""
    for i in range(limit):
        if a[i] != b[i]:
            return i
    return limit


def spread_cache(cache: Any, owner: Tensor, groups: int) -> None:
    """Give every row the keys and values of its prefix, in place.

    Layers hold ``groups`` rows (what the draws have in common) or a multiple S of that, draw-major;
    they come to hold as many rows as ``owner`` [B], or S B.
    """
    for layer in cache.layers:
        draws = layer.keys.shape[0] // groups
        start = torch.arange(draws, device=owner.device)[:, None] * groups
        index = (start + owner[None, :]).flatten()
        layer.keys, layer.values = layer.keys[index], layer.values[index]
