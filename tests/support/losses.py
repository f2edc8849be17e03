"""Losses known in closed form in the place of a model's, and the search on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import make_batch

import tfb
from tfb import SearchError, SigmaFit
from tfb.posterior import LowRankPosterior
from tfb.sampling.config import SamplingConfig
from tfb.search import fit as search
from tfb.search.loss import AnchorSet, LossTable

Curve = Callable[[float], float]
N = 8


class FakeLoss:
    """AnchorLoss's interface on a curve l(sigma): every anchor has that loss, plus ``spread``
    times +-1, so that a paired difference has the standard error spread / sqrt(N - 1)."""

    def __init__(
        self, curve: Curve, spread: float, anchors: AnchorSet, n: int, seed: int, cost: float = 1.0
    ) -> None:
        self.curve, self.anchors, self.n = curve, anchors, n
        self.config = SamplingConfig(seed=seed)
        self.N = len(anchors)
        self.sign = spread * torch.tensor([1.0, -1.0] * (self.N // 2), dtype=torch.float64)
        self.passes = 1.0
        self.cost = SimpleNamespace(draw_cost=cost)
        self.probabilities = None
        self.measured = torch.ones(self.N, dtype=torch.bool)
        self.asked: list[float] = []

    @property
    def baseline(self) -> torch.Tensor:
        return torch.full((self.N,), self.curve(0.0), dtype=torch.float64)

    def baseline_of(self, rows: torch.Tensor) -> torch.Tensor:
        return self.baseline[rows]

    def __call__(self, sigmas: Sequence[float], *, rows: torch.Tensor | None = None) -> LossTable:
        rows = torch.arange(self.N) if rows is None else rows
        self.asked += sigmas
        # One sweep: what is common to all draws, and the draws.
        cost = self.cost.draw_cost
        self.passes += (1 - cost + len(sigmas) * self.n * cost) * len(rows) / self.N
        found = torch.stack([self.curve(s) + self.sign[rows] for s in sigmas])
        return LossTable(found, found.mean(1, keepdim=True).expand(-1, self.n // 2))


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


def anchor_set(rows: int = N) -> AnchorSet:
    batch = make_batch(*[2] * rows) | {"labels": torch.arange(rows) % 2}
    return AnchorSet.of([batch])


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
    cost: float = 1.0,
    make: Callable[..., Any] = FakeLoss,
    **options: Any,
) -> tuple[SigmaFit, Any, Any]:
    """fit_sigma with AnchorLoss replaced; the fit, the fake loss, the fake model. The objective is
    max_variance unless another is given."""
    options.setdefault("objective", "max_variance")
    bayes, made = FakeModel(), []

    def fake(_: Any, anchors: AnchorSet, __: str, *, draws: int, config: Any, **___: Any) -> Any:
        made.append(make(curve, spread, anchors, draws, config.seed, cost))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "AnchorLoss", fake)
        try:
            fit = tfb.fit_sigma(bayes, anchor_set(rows), **options)  # type: ignore[arg-type]
        except SearchError:
            assert bayes.config == SamplingConfig(seed=11)  # as it was
            raise
    assert replace(fit.config, seed=11) == bayes.config
    return fit, made[0], bayes


def power(crossing: float, exponent: float = 2.0, rise: float = 0.003) -> Curve:
    """1 + rise * (sigma / crossing)^exponent: worse by ``rise`` at ``crossing``."""
    return lambda sigma: 1.0 + rise * (sigma / crossing) ** exponent


class WavyLoss(FakeLoss):
    """Row i has 1 - x + x^2 + spread x cos(3 log(x) / 2 + phase_i), x = (sigma / SCALE)^2: what
    parts of the rows say of one sigma says little of the next."""

    SCALE = 0.02

    def __init__(
        self, curve: Curve, spread: float, anchors: AnchorSet, n: int, seed: int, cost: float = 1.0
    ) -> None:
        super().__init__(lambda _: 1.0, 0.0, anchors, n, seed, cost)
        generator = torch.Generator().manual_seed(seed)
        self.phase = 2 * math.pi * torch.rand(self.N, generator=generator, dtype=torch.float64)
        self.spread = spread

    def at(self, sigmas: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[G, N'] losses."""
        x = (sigmas[:, None] / self.SCALE) ** 2
        return 1.0 - x + x * x + self.spread * x * (1.5 * x.log() + self.phase[rows]).cos()

    def __call__(self, sigmas: Sequence[float], **options: Any) -> LossTable:
        asked = super().__call__(sigmas, **options)
        rows = options.get("rows")
        rows = torch.arange(self.N) if rows is None else rows
        found = self.at(torch.tensor(sigmas, dtype=torch.float64), rows)
        return LossTable(found, found.mean(1, keepdim=True).expand_as(asked.left_out))


class GaussianLoss(FakeLoss):
    """A model whose losses are Gaussian: row i has b_i + (c_i + g) sigma^2 with b_i ~ N(1, .1),
    c_i ~ N(MEAN, spread), and g the mean over streams of N(0, STREAM). ``truth`` is where the
    expected change crosses the tolerance .003, ``crossing`` where this sample's does."""

    MEAN, STREAM = 10.0, 1.0

    def __init__(
        self, curve: Curve, spread: float, anchors: AnchorSet, n: int, seed: int, cost: float = 1.0
    ) -> None:
        super().__init__(lambda _: 1.0, 0.0, anchors, n, seed, cost)
        generator = torch.Generator().manual_seed(seed)
        self.b, self.c, self.g = (
            torch.randn(k, generator=generator, dtype=torch.float64)
            for k in (self.N, self.N, n // 2)
        )
        self.b = 1.0 + 0.1 * self.b
        self.c = self.MEAN + spread * self.c
        self.g *= self.STREAM
        self.truth = (0.003 / self.MEAN) ** 0.5
        self.crossing = float((0.003 * self.b.mean() / (self.c.mean() + self.g.mean())) ** 0.5)

    @property
    def baseline(self) -> torch.Tensor:
        return self.b

    def __call__(self, sigmas: Sequence[float], **options: Any) -> LossTable:
        asked = super().__call__(sigmas, **options)
        rows = options.get("rows")
        rows = torch.arange(self.N) if rows is None else rows
        assert asked.rows.shape[1] == len(rows)
        x = torch.tensor(sigmas, dtype=torch.float64)[:, None] ** 2
        found = self.b[rows] + (self.c[rows] + self.g.mean()) * x
        U = len(self.g)
        others = (self.g.sum() - self.g) / (U - 1) if U > 1 else self.g
        left_out = self.b[rows].mean() + (self.c[rows].mean() + others) * x
        return LossTable(found, left_out)

    def draw_error(self, fit: SigmaFit) -> float:
        """The jackknife of a mean of U numbers is their standard deviation over sqrt(U)."""
        return float(self.g.std()) / len(self.g) ** 0.5 * fit.sigma**2
