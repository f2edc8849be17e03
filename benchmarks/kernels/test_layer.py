"""``tfb.BayesLoRALinear`` on a CPU: S samples of one layer for one read of x [T, n], in float32.

On a CPU ours keeps the noise of fixed draws from call to call; so do the contenders "kept", which
are therefore the rivals to beat. The loops cost S base products each, 15 s or more a call at the
largest point: so that the suite ends within 25 minutes on two cores, ``points`` and ``left_out``
leave some out, the row says which. ``test_linear.py`` measures a GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tfb
from benchmarks.kernels import contenders
from benchmarks.kernels.contenders import SIGMA, Layer, make_layer
from benchmarks.timing import Bench, Step, compare
from tfb.draws import Draws
from tfb_kernels.testing import exact_weight_samples

LAYERS, TOY_LAYERS = ((2048, 2048), (4096, 14336)), ((64, 96),)  # in_features, out_features
RANKS, RANK = (8, 16, 64), 16
ROWS, TOY_ROWS = (1, 16, 256, 1024), (1, 16)
DRAWS = (10, 32)
# Multiply-adds of S base products, 2 s and 0.5 s a loop: larger points have rank ``RANK`` alone,
# and no loop but ``naive``.
MOST, MOST_OF_LOOPS = 2e11, 5e10
SECONDS = 10.0  # of a point's rounds, once it has had the fewest
ROUNDS = (15, 40)
EXACT = 1e-2  # of the draws' standard deviation, by which ours may differ from float64


@dataclass(frozen=True)
class Point:
    """A layer n -> m of rank r, T rows that S draws share."""

    n: int
    m: int
    r: int
    T: int
    S: int

    def __str__(self) -> str:
        return f"{self.n}-{self.m}-r{self.r}-T{self.T}-S{self.S}"

    @property
    def work(self) -> float:
        """Multiply-adds of S base products."""
        return float(self.S * self.T * self.n * self.m)


def points(toy: bool) -> list[Point]:
    """List the cheapest first, so that a short run has most of them."""
    found = [
        Point(n, m, r, T, S)
        for n, m in (TOY_LAYERS if toy else LAYERS)
        for r in RANKS
        for T in (TOY_ROWS if toy else ROWS)
        for S in DRAWS
    ]
    return sorted((p for p in found if p.r == RANK or p.work <= MOST), key=lambda p: p.work)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "point" in metafunc.fixturenames:
        metafunc.parametrize("point", points(metafunc.config.getoption("--toy")), ids=str)


@pytest.fixture(autouse=True)
def _on_a_cpu(bench: Bench) -> None:
    if bench.device.type != "cpu":
        pytest.skip("test_linear.py measures a layer on a GPU")


def bayesian(layer: Layer) -> tfb.BayesLoRALinear:
    """Return what users call, on the contenders' own weight and adapter."""
    m, n = layer.W.shape
    base = nn.Linear(n, m, bias=False, device="meta")
    base.weight = nn.Parameter(layer.W, requires_grad=False)
    return tfb.BayesLoRALinear(base, layer.posterior)


def check(module: tfb.BayesLoRALinear, layer: Layer, x: Tensor, draws: Draws) -> None:
    """Compare ours at this very point with float64, at its first and last rows.

    Noise that is wrong, or another draw's, is off by a hundred times what is allowed.
    """
    p, some = layer.posterior, [0, len(x) - 1]
    few = x[some].double()
    base = F.linear(few, layer.W.double())
    drawn = (torch.tensor(draws.sigmas), torch.tensor(draws.streams))
    how: dict[str, Any] = {"seed": draws.seed, "layer_id": p.layer_id, "scaling": p.scaling}
    exact = exact_weight_samples(few, base, p.A, p.B, p.inv_d, *drawn, **how)
    error = float((module(x, draws)[:, some] - exact).abs().max())
    allowed = EXACT * float(exact.std(0).mean())
    assert error <= allowed, f"ours is off by {error:.3g}, allowed are {allowed:.3g}"


def left_out(point: Point) -> dict[str, str]:
    """Return the contenders that this point goes without, and why.

    ``merged`` writes a matrix as large as W for each draw, whatever the rank.
    """
    found = {}
    if point.work > MOST_OF_LOOPS:
        found["naive_kept"] = "as slow as naive, which is here"
    if point.work > MOST_OF_LOOPS or point.r != RANK or min(DRAWS) != point.S:
        found["merged"] = f"at r = {RANK} and S = {min(DRAWS)} of small points alone"
    return found


def test_rivals_draw_from_the_posterior(benchmark: Any, bench: Bench) -> None:
    benchmark.pedantic(lambda: None)
    contenders.check_rivals(bench.device)


def test_layer(benchmark: Any, bench: Bench, point: Point) -> None:
    layer = make_layer(point.m, point.n, point.r, bench.dtype, bench.device)
    module, x = bayesian(layer), torch.randn(point.T, point.n)
    draws = Draws.antithetic(point.S, SIGMA)
    check(module, layer, x, draws)
    skipped = left_out(point)
    rivals = contenders.RIVALS | {k: keep(layer, draws) for k, keep in contenders.KEPT.items()}

    def step(rival: contenders.Contender) -> Step:
        return lambda i: rival(layer, x, draws)

    steps: dict[str, Step] = {
        "ours": lambda i: module(x, draws),
        **{k: step(rival) for k, rival in rivals.items() if k not in skipped},
        "base": lambda i: F.linear(x, layer.W),
    }
    compare(
        benchmark,
        replace(bench, seconds=min(bench.seconds, SECONDS)),
        "layer",
        "layer",
        asdict(point) | {"streams": len(draws.distinct_streams), "dtype": bench.dtype_name},
        steps,
        unit="base",
        skipped=skipped,
        rounds=ROUNDS,
    )
