"""What a search spends, in deterministic passes over all anchors, counted in tokens.

full   every draw is a pass (also where draws share blocks or prefixes, which costs less)
tail   a sweep runs each row's first T - k tokens once, whatever its number of draws, and the
       last k tokens once for each draw: 1 + (S - 1) k / T passes for S draws
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class PassCounter:
    """Counts the tokens of sweeps over rows of an anchor set."""

    def __init__(self, batches: Sequence[Mapping[str, Any]], tail: int | None) -> None:
        self._tokens = torch.cat([_lengths(b) for b in batches])  # [N]
        self._drawn = self._tokens if tail is None else self._tokens.clamp_max(tail)
        self._common = self._tokens - self._drawn
        self._total = int(self._tokens.sum())
        self._spent = 0

    @property
    def passes(self) -> float:
        return self._spent / self._total

    def spend(self, rows: Tensor, draws: int) -> None:
        """A sweep of ``draws`` draws over ``rows``."""
        self._spent += int((self._common[rows] + draws * self._drawn[rows]).sum())

    @property
    def draw_cost(self) -> float:
        """One more draw in a sweep over all rows, in passes: 1 in full mode, about k / T in tail
        mode."""
        return int(self._drawn.sum()) / self._total


def passes_per_row(lengths: Sequence[int], draws: int, tail: int | None = None) -> float:
    """What ``draws`` draws of prompts of these many tokens cost, in deterministic passes, by the
    rule above; tokens of choices are left out."""
    total = sum(lengths)
    drawn = total if tail is None else sum(min(n, tail) for n in lengths)
    return (total - drawn + draws * drawn) / total


def _lengths(batch: Mapping[str, Any]) -> Tensor:
    """[B] tokens of each row."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        return torch.full((ids.shape[0],), int(ids.shape[1]))
    return mask.sum(1).long().cpu()
