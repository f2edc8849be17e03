"""How a model samples: one frozen record, returned by the search and held by the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

MODES = ("full", "tail")
LENGTH_NORMALIZATIONS = ("none", "tokens")


@dataclass(frozen=True)
class SamplingConfig:
    """Everything that a prediction depends on beside the model, the rows and the draws.

    Attributes:
        sigma: the posterior's scale, in the paper's pre-scaling units. None: not fitted yet.
        temperature: T of the likelihood, p(y | x) = mean_s softmax(z_s / T).
        mode: "full", or "tail": noise at the last ``tail`` positions only.
        tail: positions with noise in tail mode, else None.
        length_normalization: choices of several tokens are scored by the sum of their tokens'
            log-probabilities ("none") or by the mean ("tokens").
        seed: of the draws, a signed 64-bit number.
    """

    sigma: float | None = None
    temperature: float = 1.0
    mode: str = "full"
    tail: int | None = None
    length_normalization: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sigma is not None and not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ValueError(f"sigma={self.sigma}: expected a finite number >= 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature}: expected a positive number")
        check_mode(self.mode, self.tail)
        if self.length_normalization not in LENGTH_NORMALIZATIONS:
            raise ValueError(
                f"length_normalization={self.length_normalization!r}: expected one of "
                f"{', '.join(LENGTH_NORMALIZATIONS)}"
            )


def check_mode(mode: str, tail: int | None) -> None:
    """Refuse an unknown mode, or a ``tail`` that does not belong to it."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if mode == "tail" and (tail is None or tail < 1):
        raise ValueError(f"tail={tail}: mode='tail' needs k >= 1 positions with noise")
    if mode != "tail" and tail is not None:
        raise ValueError(f"tail={tail} belongs to mode='tail', not to mode={mode!r}")
