"""Adaptive draws: every row gets as many antithetic pairs as its own Monte-Carlo error asks for.

Draws come in rounds of doubling size on fixed streams. After each round a row stops once the
standard error of its predicted class's probability is below the tolerance; the others go on. A
row's stopping depends on that row alone, so its result does not depend on the rows beside it nor
on their order (up to rounding, as everywhere).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tfb.draws import Draws
from tfb.predictive import Predictive
from tfb_kernels.reference import compute_dtype

FIRST = 4  # draws of the first round: two pairs, the fewest that tell an error
MOST = 64
TOLERANCE = 0.01  # of a probability


@dataclass(frozen=True)
class Adaptive:
    """What ``draws="auto"`` stands for.

    Attributes:
        tolerance: largest Monte-Carlo standard error of the predicted class's probability.
        most: draws at which a row stops in any case (even). first: draws of the first round.
    """

    tolerance: float = TOLERANCE
    most: int = MOST
    first: int = FIRST

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(f"tolerance={self.tolerance}: expected a positive number")
        if self.first < 4 or self.first % 2 or self.most < self.first or self.most % 2:
            raise ValueError(
                f"first={self.first}, most={self.most}: expected even numbers, 4 <= first <= most"
            )


def predict_adaptively(
    bayes: Any,
    batch: Mapping[str, Any],
    settings: Adaptive,
    *,
    label_ids: Tensor | None = None,
    **how: Any,
) -> Predictive:
    """Predictions of a batch's rows with their own ``draw_counts``.

    Args:
        bayes: a ``BayesianModel``. batch, label_ids, how: as for its ``logits``.
    """
    ids = batch.get("input_ids")
    rows = len(ids) if isinstance(ids, Tensor) else 1  # anything else is refused by logits()
    sigma = bayes.draws(2).sigmas[0]

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
        draws = Draws.antithetic(size, sigma, seed=bayes.seed, first_stream=done // 2)
        part = {k: some(v, active) for k, v in batch.items()}
        logits = bayes.logits(part, draws, some(label_ids, active), **how)
        kept.append(logits.to(compute_dtype(logits.dtype)).softmax(-1).cpu())
        done += size
        so_far = Draws.antithetic(done, sigma, seed=bayes.seed)
        found = Predictive.from_probs(torch.cat(kept), so_far)
        error = found.standard_error.gather(-1, found.prediction[:, None])[:, 0]
        stop = (error <= settings.tolerance) | (done >= settings.most)
        results.append((active[stop], found.rows(stop)))
        counts[active[stop]] = done
        kept = [p[:, ~stop] for p in kept]
        active = active[~stop]
        size = done  # doubling: the error halves with every second round
    return replace(Predictive.gather(results, rows), draw_counts=counts)
