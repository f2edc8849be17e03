"""Losses known in closed form in the place of a model's, and the search on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import make_batch
from torch import Tensor

import tfb
from tfb import PredictiveFit, SearchError
from tfb.posterior import LowRankPosterior
from tfb.sampling.config import SamplingConfig
from tfb.search import fit as search
from tfb.search.loss import AnchorSet, LossMatrix

Curve = Callable[[float], float]
N = 8


class FakeLoss:
    """AnchorLoss's interface on a curve l(sigma), the loss of every anchor plus ``spread`` sigma
    times +-1. ``wrong`` says how many of the anchors are wrong at a sigma, the first ones."""

    log_probs: Tensor | None = None
    answer_losses: Tensor | None = None

    def __init__(
        self,
        curve: Curve,
        spread: float,
        anchors: AnchorSet,
        metric: str,
        draws: int,
        wrong: Callable[[float], int] | None = None,
    ) -> None:
        self.curve, self.anchors, self.metric, self.draws = curve, anchors, metric, draws
        self.wrong = wrong
        self.N = len(anchors)
        self.sign = spread * torch.tensor([1.0, -1.0] * (self.N // 2), dtype=torch.float64)
        self.passes = 1.0
        self.asked: list[tuple[int, list[float]]] = []  # anchors and sigmas of each sweep

    def __call__(self, sigmas: Sequence[float], rows: Tensor | None = None) -> LossMatrix:
        rows = torch.arange(self.N) if rows is None else rows
        wanted = [0.0, *sorted(sigmas)]
        self.asked.append((len(rows), wanted[1:]))
        self.passes += len(sigmas) * self.draws * len(rows) / self.N
        correct = None
        if self.wrong is not None:
            correct = torch.stack([rows >= self.wrong(s) for s in wanted])
        losses = torch.stack([self.curve(s) + s * self.sign[rows] for s in wanted])
        return LossMatrix(tuple((s, 1.0) for s in wanted), losses, correct)


def posteriors() -> dict[str, LowRankPosterior]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, (m, r, n) in {"a": (6, 2, 5), "b": (4, 3, 7)}.items():
        A, B = (0.1 * torch.randn(shape, generator=generator) for shape in ((r, n), (m, r)))
        made[name] = LowRankPosterior.from_lora(A, B, 2.0, name=name)
    return made


POSTERIORS = posteriors()
ENTRIES = 2 * 5 + 3 * 7
PRIOR = tfb.posterior.default_prior_sigma(list(POSTERIORS.values()))


class FakeModel:
    """What ``fit_sigma`` asks of a model beside its losses."""

    posteriors = POSTERIORS
    pad_token_id = 0

    def __init__(self) -> None:
        self.config = SamplingConfig(seed=11)

    def configure(self, **changes: Any) -> None:
        self.config = replace(self.config, **changes)


def find(
    curve: Curve,
    *,
    spread: float = 0.0,
    rows: int = N,
    wrong: Callable[[float], int] | None = None,
    **options: Any,
) -> tuple[PredictiveFit, FakeLoss]:
    """fit_sigma with AnchorLoss replaced: the fit, and what it asked. The objective is max_variance
    unless another is given; T is 1."""
    options = {"objective": "max_variance", "draws": 4} | options
    bayes, made = FakeModel(), []

    def fake(_: Any, anchors: AnchorSet, metric: str, *, draws: int, **__: Any) -> FakeLoss:
        made.append(FakeLoss(curve, spread, anchors, metric, draws, wrong))
        return made[-1]

    batch = make_batch(*[2] * rows) | {"labels": torch.arange(rows) % 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "AnchorLoss", fake)
        try:
            fit = tfb.fit_sigma(bayes, [batch], **options)  # type: ignore[arg-type]
        except SearchError:
            assert bayes.config == SamplingConfig(seed=11)  # as it was
            raise
    assert replace(fit.config, seed=11) == bayes.config
    return fit, made[0]


def power(crossing: float, exponent: float = 2.0, rise: float = 0.003) -> Curve:
    """1 + rise * (sigma / crossing)^exponent: worse by ``rise`` at ``crossing``."""
    return lambda sigma: 1.0 + rise * (sigma / crossing) ** exponent
