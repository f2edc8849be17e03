"""Last-layer Laplace (Daxberger et al. 2021) through laplace-torch: a Gaussian over the head alone.

The head is linear in features of the deterministic model, which are computed once, so the
network's own predictive is that of the linear head: weights are sampled and their softmax averaged.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

SAMPLES = 100  # of the head's weights; a sample costs one product with the head
BATCH = 250


def fit_laplace(head: nn.Linear, features: Tensor, labels: Tensor) -> Any:
    """The Laplace approximation at ``head``, on rows that it was trained on.

    Kronecker-factored GGN, isotropic prior, its precision by marginal likelihood: the library's
    own recommendations.

    Args:
        features: [N, D]. labels: [N].

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
    fitted.fit(DataLoader(TensorDataset(features, labels), batch_size=BATCH))
    with warnings.catch_warnings():
        # Said to every classifier, whatever was asked for; samples need no link.
        warnings.filterwarnings("ignore", message="By default `link_approx`")
        fitted.optimize_prior_precision(pred_type="nn", method="marglik")
    return fitted


@torch.no_grad()
def sample_laplace(fitted: Any, features: Tensor, seed: int) -> Tensor:
    """[S, N, K] probabilities of ``SAMPLES`` heads, the same heads for all rows of a call."""
    generator = torch.Generator().manual_seed(seed)
    samples: Tensor = fitted.predictive_samples(
        features, pred_type="nn", n_samples=SAMPLES, generator=generator
    )
    return samples
