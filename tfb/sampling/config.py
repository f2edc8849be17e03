"""How a model samples: one frozen record, returned by the search and held by the model."""

from __future__ import annotations

import sys
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Self

from tfb.draws import Draws

LARGEST_TEMPERATURE = 1e30  # and the least is its inverse: float32 logits / T stay finite
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
        if self.sigma is not None and not _within(self.sigma, int | float, 0, sys.float_info.max):
            raise ValueError(f"sigma={self.sigma!r}: expected a finite number >= 0")
        if not _within(self.temperature, int | float, 1 / LARGEST_TEMPERATURE, LARGEST_TEMPERATURE):
            raise ValueError(
                f"temperature={self.temperature!r}: expected a positive number, from "
                f"{1 / LARGEST_TEMPERATURE:g} to {LARGEST_TEMPERATURE:g}"
            )
        check_mode(self.mode, self.tail)
        if not _within(self.seed, int, -(1 << 63), (1 << 63) - 1):
            raise ValueError(f"seed={self.seed!r}: does not fit a signed 64-bit number")
        if self.length_normalization not in LENGTH_NORMALIZATIONS:
            raise ValueError(
                f"length_normalization={self.length_normalization!r}: expected one of "
                f"{', '.join(LENGTH_NORMALIZATIONS)}"
            )

    def __str__(self) -> str:
        if self.sigma is None:
            return "not fitted"
        return f"sigma={self.sigma:.4g}, T={self.temperature:.4g}"


def check_mode(mode: str, tail: int | None) -> None:
    """Refuse an unknown mode, or a ``tail`` that does not belong to it."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if mode == "tail" and not _within(tail, int, 1, sys.maxsize):
        raise ValueError(f"tail={tail}: mode='tail' needs k >= 1 positions with noise")
    if mode != "tail" and tail is not None:
        raise ValueError(f"tail={tail} belongs to mode='tail', not to mode={mode!r}")


def _within(value: Any, kind: Any, least: float, most: float) -> bool:
    """Tell whether a value is a number of a kind, and in range, so not NaN."""
    value = value.tolist() if hasattr(value, "tolist") else value  # of numpy or torch
    return isinstance(value, kind) and not isinstance(value, bool) and bool(least <= value <= most)


class Configured:
    """What has a configuration, and makes draws by it."""

    def __init__(self, config: SamplingConfig) -> None:
        self._config = config

    def frozen(self) -> Self:
        """Return a view of the model that keeps its configuration while others configure it."""
        return copy(self)

    def check_config(self, config: SamplingConfig) -> None:
        """Refuse what the model cannot do, with a ValueError."""
        raise NotImplementedError

    @property
    def config(self) -> SamplingConfig:
        """How draws are made and averaged; frozen, replaced by :meth:`configure`."""
        return self._config

    @property
    def sigma(self) -> float | None:
        """The posterior's scale, None until it is fitted or configured."""
        return self._config.sigma

    def configure(self, **changes: Any) -> Self:
        """Replace parts of the configuration, and return the model itself.

        Args:
            changes: fields of :class:`SamplingConfig`. A new ``mode`` drops ``tail``.

        Raises:
            ValueError: an impossible value, or a mode that the model cannot take.
        """
        if "mode" in changes:
            changes.setdefault("tail", None)
        config = replace(self._config, **changes)
        self.check_config(config)
        self._config = config
        return self

    def draws(self, n: int | Draws) -> Draws:
        """Return ``n`` antithetic draws at the model's sigma and seed, or the given draws.

        Raises:
            ValueError: sigma is not set, or n is odd or < 1.
        """
        if isinstance(n, Draws):
            return n
        config = self._config
        if config.sigma is None:
            raise ValueError(
                "sigma is not set: run tfb.fit_sigma(bayes, anchors) or TfbModel.fit, "
                "bayes.configure(sigma=...), or pass tfb.Draws"
            )
        return Draws.antithetic(n, config.sigma, seed=config.seed)
