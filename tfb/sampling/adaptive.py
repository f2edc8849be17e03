"""``draws="auto"``: as many pairs as a row's error asks for (docs/design/adaptive-draws.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tfb.draws import Draws, check_even
from tfb.predictive import Predictive, tempered
from tfb.sampling.state import Batch


@dataclass(frozen=True)
class Adaptive:
    """What ``draws="auto"`` stands for.

    Attributes:
        tolerance: largest Monte-Carlo standard error of the predicted class's probability.
        most: draws at which a row stops in any case (even).
        first: draws of the first round (even): two pairs are the fewest that tell an error.
    """

    tolerance: float = 0.01
    most: int = 64
    first: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance={self.tolerance}: expected a positive number")
        check_even(self.first, "first")
        check_even(self.most, "most")
        if not 4 <= self.first <= self.most:
            raise ValueError(f"first={self.first}, most={self.most}: expected 4 <= first <= most")


def predict_adaptively(
    logits_of: Callable[[Batch, Draws, Tensor | None], Tensor],
    batch: Batch,
    label_ids: Tensor | None,
    settings: Adaptive,
    first: Draws,
    temperature: float,
) -> Predictive:
    """Predict every row with as many draws as its own error asks for."""
    ids = batch.get("input_ids")
    rows = len(ids) if isinstance(ids, Tensor) else 1  # anything else is refused by logits()
    some_draws = partial(Draws.antithetic, sigma=first.sigmas[0], seed=first.seed)

    def some(value: Any, index: Tensor) -> Any:
        by_row = isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows
        return value[index.to(value.device)] if by_row else value

    active = torch.arange(rows)
    kept: list[Tensor] = []  # probabilities of the active rows, [s, b, K] for each round
    results: list[tuple[Tensor, Predictive]] = []
    counts = torch.zeros(rows, dtype=torch.int64)
    done, size = 0, settings.first
    while len(active):
        size = min(size, settings.most - done)
        draws = some_draws(size, first_stream=done // 2)
        part = {k: some(v, active) for k, v in batch.items()}
        logits = logits_of(part, draws, some(label_ids, active))
        kept.append(tempered(logits, temperature).softmax(-1).cpu())
        done += size
        found = Predictive.from_probs(torch.cat(kept), some_draws(done))
        error = found.predicted_error
        stop = (error <= settings.tolerance) | error.isnan() | (done >= settings.most)
        results.append((active[stop], found.rows(stop)))
        counts[active[stop]] = done
        kept = [p[:, ~stop] for p in kept]
        active = active[~stop]
        size = done  # doubling: the error halves with every second round
    return replace(Predictive.gather(results), draw_counts=counts)
