"""Adaptive draws: every row gets as many antithetic pairs as its own Monte-Carlo error asks for.

Draws come in rounds of doubling size on fixed streams. After each round a row stops once the
standard error of its predicted class's probability is below the tolerance; the others go on. A
row's stopping depends on that row alone, so its result does not depend on the rows beside it nor
on their order (up to rounding, as everywhere).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tfb.draws import Draws
from tfb.predictive import Predictive

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
    run: Callable[[Draws, Tensor], Tensor],
    rows: int,
    settings: Adaptive,
    sigma: float,
    seed: int,
    noise: str = "weight",
) -> Predictive:
    """Predictions of ``rows`` rows with their own ``draw_counts``.

    Args:
        run: gives logits [S, b, K] of some draws for the rows numbered by an index [b].
    """
    active = torch.arange(rows)
    kept: list[Tensor] = []  # probabilities of the active rows, [s, b, K] for each round
    results: list[tuple[Tensor, Predictive]] = []
    counts = torch.zeros(rows, dtype=torch.int64)
    done, size = 0, settings.first
    while len(active):
        size = min(size, settings.most - done)
        draws = Draws.antithetic(size, sigma, seed=seed, noise=noise, first_stream=done // 2)
        logits = run(draws, active)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        kept.append(logits.to(dtype).softmax(-1).cpu())
        done += size
        so_far = Draws.antithetic(done, sigma, seed=seed, noise=noise)
        found = Predictive.from_probs(torch.cat(kept), so_far)
        error = found.standard_error.gather(-1, found.prediction[:, None])[:, 0]
        stop = (error <= settings.tolerance) | (done >= settings.most)
        results.append((active[stop], found.rows(stop)))
        counts[active[stop]] = done
        kept = [p[:, ~stop] for p in kept]
        active = active[~stop]
        size = done  # doubling: the error halves with every second round
    return replace(Predictive.gather(results, rows), draw_counts=counts)
