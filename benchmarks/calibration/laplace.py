"""Last-layer Laplace (Daxberger et al. 2021) through laplace-torch: a Gaussian over the head alone.

The head is linear in features of the deterministic model, which are computed once, so the
network's own predictive is that of the linear head: weights are sampled and their softmax averaged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SAMPLES = 100  # of the head's weights; a sample costs one product with the head
BATCH = 250
PRECISIONS = (-2.0, 5.0, 29)  # log10 of the first and the last, and how many: 4 a decade


def fit_laplace(head: nn.Linear, features: Tensor, labels: Tensor) -> Any:
    """Fit the Laplace approximation at ``head``, on rows that it was trained on.

    Kronecker-factored GGN, isotropic prior, its precision by marginal likelihood: the library's
    own recommendations.

    Args:
        head: the linear layer.
        features: [N, D].
        labels: [N].

    Raises:
        ImportError: laplace-torch is not installed.
    """
    try:
        from laplace import Laplace
    except ImportError as error:
        raise ImportError(
            "last-layer Laplace needs laplace-torch: pip install 'tfb[calibration]'"
        ) from error
    fitted = Laplace(head, "classification", subset_of_weights="all", hessian_structure="kron")
    fitted.fit(_loader(features, labels))
    with _quiet():
        fitted.optimize_prior_precision(pred_type="nn", method="marglik")
    return fitted


def tune_laplace(fitted: Any, features: Tensor, labels: Tensor, seed: int) -> None:
    """Set the prior precision of least NLL of the sampled predictive, on held-out rows.

    The library's own grid search (laplace-torch 0.3) is not used: it hands one running mean of the
    NLL from precision to precision, and so prefers the end of the grid. Here all precisions see the
    same random numbers.

    Args:
        fitted: of ``fit_laplace``.
        features: [N, D].
        labels: [N].
        seed: of the samples.
    """

    def nll(precision: float) -> float:
        fitted.prior_precision = precision
        probs = sample_laplace(fitted, features, seed).double().mean(0)
        return float(torch.nn.functional.nll_loss(probs.log(), labels))

    fitted.prior_precision = min(torch.logspace(*PRECISIONS).tolist(), key=nll)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what is said to every classifier, whatever was asked for; samples need no link."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="By default `link_approx`")
        yield


def _loader(features: Tensor, labels: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(features, labels), batch_size=BATCH)


@torch.no_grad()
def sample_laplace(fitted: Any, features: Tensor, seed: int) -> Tensor:
    """Return [S, N, K] probabilities of ``SAMPLES`` heads, the same for all rows of a call."""
    generator = torch.Generator().manual_seed(seed)
    samples: Tensor = fitted.predictive_samples(
        features, pred_type="nn", n_samples=SAMPLES, generator=generator
    )
    return samples
