"""The loss of answers: what a token costs under the averaged distribution, in nats, at any T.

A pass yields it on a grid of temperatures, so that nothing of the vocabulary's size is kept. In
between it is a cubic spline in log T, of each row and so of their mean.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

TEMPERATURES = tuple(4.0 ** (i / 6) for i in range(-6, 13))  # 1/4 to 16
_LOG_T = np.log(TEMPERATURES)
NEAR_ZERO = 0.1  # nats a token, or of choices the NLL over that of a guess


def token_nll(log_probs: Tensor, present: Tensor) -> Tensor:
    """Return the mean over tokens of -log mean_s p_s, [B, G].

    Args:
        log_probs: [S, B, L, G] of each draw; 0 where an answer has no token.
        present: [B, L], where it has one.
    """
    mean = log_probs.double().logsumexp(0) - math.log(len(log_probs))
    return -mean.sum(1) / present.sum(1, keepdim=True)


def best_temperature(losses: Tensor) -> float:
    """Return the T of least mean loss, of losses [n, G] at ``TEMPERATURES``.

    Without a wrong token the loss would fall for ever: where it is near 0 at the least of them, T
    is 1.
    """
    mean = CubicSpline(_LOG_T, losses.mean(0).numpy())
    places = np.append(mean.derivative().roots(extrapolate=False), _LOG_T[[0, -1]])
    log_T = places[np.nanargmin(mean(places))]  # a loss of 0 everywhere has no single root
    endless = log_T == _LOG_T[0] and mean(log_T) < NEAR_ZERO
    return 1.0 if endless else math.exp(log_T)


def losses_at(losses: Tensor, T: float) -> Tensor:
    """Return the losses [n] at T, of losses [n, G] at ``TEMPERATURES``."""
    if T == 1.0:
        return losses[:, TEMPERATURES.index(T)]
    return torch.from_numpy(CubicSpline(_LOG_T, losses.numpy(), axis=1)(math.log(T)))


def surprise(losses: Tensor) -> Tensor:
    """Return how far the adapter's loss at T = 1 exceeds its own entropy, [n].

    Without draws that is the slope -d loss / d log T.
    """
    return -torch.from_numpy(CubicSpline(_LOG_T, losses.numpy(), axis=1)(0.0, 1))
