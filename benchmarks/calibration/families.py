"""Families of posteriors for the paper's ablation, as :class:`LowRankPosterior` of other factors.

    low_rank    TFB: row i of A' has standard deviation sigma / d_i, so that dW has covariance
                s^2 sigma^2 (U U^T (x) I_n)
    constant    every row of A' has standard deviation sigma: covariance s^2 sigma^2
                (B' B'^T (x) I_n), large in the adapter's strong directions
    full_rank   every entry of dW has standard deviation s sigma: covariance s^2 sigma^2
                (I_m (x) I_n), also where the adapter does nothing

``constant`` is TFB with d_i = 1 (0 where there is no adapter); ``full_rank`` is TFB with B' = I_m
and A' = B' A': a "low" rank of m. So noise, both noise kinds, KL and the search are the same code.
Weight noise materialises E [m, n] for each stream: meant for models of moderate width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

import tfb
from tfb.posterior import LowRankPosterior

FAMILIES = ("low_rank", "constant", "full_rank")


def in_family(posterior: LowRankPosterior, family: str) -> LowRankPosterior:
    """Return ``posterior`` with the same mean and the noise of ``family``.

    Raises:
        ValueError: an unknown family.
    """
    if family == "low_rank":
        return posterior
    if family == "constant":
        return replace(posterior, d=(posterior.d > 0).double())
    if family == "full_rank":
        m, dtype = posterior.out_features, posterior.A.dtype
        product = posterior.B.double() @ posterior.A.double()
        return replace(
            posterior,
            A=product.to(dtype),
            B=torch.eye(m, dtype=dtype),
            d=torch.ones(m, dtype=torch.float64),
        )
    raise ValueError(f"family={family!r}: expected one of {', '.join(FAMILIES)}")


def with_family(bayes: tfb.BayesianModel, family: str) -> tfb.BayesianModel:
    """Return the model with the posteriors of ``family`` in the place of TFB's."""
    return with_posteriors(bayes, {n: in_family(p, family) for n, p in bayes.posteriors.items()})


def with_posteriors(
    bayes: tfb.BayesianModel, posteriors: Mapping[str, LowRankPosterior]
) -> tfb.BayesianModel:
    """Return the model with other posteriors; modules without one are deterministic.

    ``bayes`` itself is removed from the model.
    """
    return tfb.bayesianize(
        bayes.remove(),
        bayes.adapter,
        layers=posteriors.__contains__,
        posteriors=posteriors,
        config=bayes.config,
        labels=bayes.labels,
        label_tokens=bayes.label_tokens,
        source=bayes.source,
    )
