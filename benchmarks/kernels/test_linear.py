"""One layer of Llama-3.1-8B with ten draws, rank 16, bfloat16: 12 points, the smallest first.

Twice: "layer" is the base product and the update against ``contenders.RIVALS``, also with 2 to 100
draws at 256 rows, "update" the update alone against the bytes that it must move. CUDA graphs leave
launches out; what single kernels take is in ``test_profile.py``. Every path is first compared with
float64: what is wrong is not timed. Without a GPU, and with --toy, the same code runs at toy sizes
in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.environment import environment
from benchmarks.kernels import contenders
from benchmarks.kernels.contenders import SIGMA, Layer, make_layer
from benchmarks.timing import LOSS, Bench, Row, Step, compare, record_skip, target
from tfb.draws import Draws
from tfb_kernels import gaussian_noise, launch, tuning
from tfb_kernels.noise import weight_noise

S, RANK = 10, 16
LAYERS = {  # out_features, in_features of Llama-3.1-8B's projections
    "q": (4096, 4096),  # shared x, as in the first noisy layer
    "down": (4096, 14336),  # x of each draw's own, as above a first noisy layer
    "head": (128256, 4096),  # shared x, as in last-layer TFB
}
TOY = (256, 256)
ROWS, TOY_ROWS = (1, 50, 256, 4096), (1, 16)
COUNTS = (2, 4, 32, 100)  # of draws, beside S, at 256 rows
LARGE = 64 << 20  # bytes from which on an operation is bandwidth and no longer latency
FLOOR = 1.25  # the update over the time of its bytes
EXPAND = 0.8  # of what bytes and instructions of expand allow
LANES = 128  # instructions of single threads that an NVIDIA multiprocessor issues a cycle


@dataclass(frozen=True)
class Point:
    """A key of ``LAYERS``, T rows a draw, whether x is [T, n] or [S, T, n], and S draws."""

    layer: str
    T: int
    shared: bool
    S: int = S

    def __str__(self) -> str:
        return f"{self.layer}-T{self.T}-S{self.S}-{'shared' if self.shared else 'per-draw'}"


def points(toy: bool) -> list[Point]:
    """List points by rows, so that what a short run does not reach is the largest."""
    rows = TOY_ROWS if toy else ROWS
    return [Point(layer, T, shared=layer != "down") for T in rows for layer in LAYERS]


def points_by_draws(toy: bool) -> list[Point]:
    """List points of other numbers of draws."""
    T, counts = (TOY_ROWS[-1], COUNTS[:1]) if toy else (256, COUNTS)
    return [Point(layer, T, layer == "q", count) for count in counts for layer in ("q", "down")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "point" in metafunc.fixturenames:
        toy = metafunc.config.getoption("--toy") or not torch.cuda.is_available()
        found = points(toy)
        if metafunc.function is test_layer:
            found += points_by_draws(toy)
        metafunc.parametrize("point", found, ids=str)


# --- are they right -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wrong(bench: Bench) -> dict[str, str]:
    """Return the paths of ours that float64 refutes, and how."""
    found = {path: contenders.errors(path, bench.device, bench.dtype) for path in contenders.PATHS}
    found["merge"] = contenders.merge_errors(bench.device, bench.dtype)
    return {path: error for path, error in found.items() if error is not None}


@pytest.mark.parametrize("path", [*contenders.PATHS, "merge"])
def test_right(benchmark: Any, wrong: dict[str, str], path: str) -> None:
    """Every path against float64; also under --benchmark-only, before anything is timed."""
    benchmark.pedantic(lambda: None)
    assert path not in wrong, wrong[path]


def test_noise_is_that_of_the_cpu(benchmark: Any, bench: Bench) -> None:
    """The contract: 1e-6 RMS, 1e-3 at worst."""
    benchmark.pedantic(lambda: None)
    exact = weight_noise(torch.tensor(3), 9, torch.tensor([0, 7]), RANK, 4096)
    error = gaussian_noise(3, 9, [0, 7], RANK, 4096, device=bench.device).cpu() - exact
    assert float(error.abs().max()) <= 1e-3
    assert float(error.square().mean().sqrt()) <= 1e-6


def test_rivals_draw_from_the_posterior(benchmark: Any, bench: Bench) -> None:
    benchmark.pedantic(lambda: None)
    contenders.check_rivals(bench.device)


# --- operands -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    """Rotating buffer sets of one point: layers and x."""

    layers: list[Layer]
    x: list[Tensor]
    draws: Draws
    description: dict[str, Any]

    def step(self, call: Callable[[Layer, Tensor, Draws], object]) -> Step:
        return lambda i: call(self.layers[i % len(self.layers)], self.x[i], self.draws)


@dataclass(frozen=True)
class Bytes:
    """Of the tensors of one point."""

    x: int
    weight: int
    base: int
    outputs: int

    @property
    def update(self) -> int:
        """What the update reads and writes."""
        return self.x + self.base + self.outputs


def shape(bench: Bench, point: Point) -> tuple[int, int]:
    return TOY if bench.toy else LAYERS[point.layer]


def sizes(bench: Bench, point: Point) -> Bytes:
    (m, n), width = shape(bench, point), bench.dtype.itemsize
    outputs = point.S * point.T
    inputs = point.T if point.shared else outputs
    return Bytes(inputs * n * width, m * n * width, inputs * m * width, outputs * m * width)


def operands(bench: Bench, point: Point, copies: int, layers: int) -> Operands:
    """Make ``copies`` inputs, and ``layers`` weights that take turns."""
    m, n = shape(bench, point)
    rows = (point.T,) if point.shared else (point.S, point.T)
    draws = Draws.antithetic(point.S, SIGMA)
    return Operands(
        layers=[make_layer(m, n, RANK, bench.dtype, bench.device) for _ in range(layers)],
        x=[torch.randn(*rows, n, dtype=bench.dtype, device=bench.device) for _ in range(copies)],
        draws=draws,
        description={
            **asdict(point),
            "r": RANK,
            "m": m,
            "n": n,
            "streams": len(draws.distinct_streams),
            "dtype": bench.dtype_name,
        },
    )


def layer_operands(bench: Bench, point: Point) -> Operands:
    """Make weights and inputs that take turns: the whole layer reads both."""
    nbytes = sizes(bench, point)
    copies = bench.copies(nbytes.weight + nbytes.x)
    return operands(bench, point, copies, copies)


def refuse(bench: Bench, point: Point, measure: str, wrong: dict[str, str]) -> None:
    """Skip, with a row that says so, where ours is wrong or does not fit."""
    own = ("auto",) if point.shared else ("auto", "merge")
    why = next((f"ours is wrong: {path}: {wrong[path]}" for path in own if path in wrong), None)
    if bench.device.type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        if (need := sizes(bench, point).outputs) > memory / 8:
            why = f"outputs of {need / 2**30:.1f} GiB exceed an eighth of the GPU's memory"
    if why is not None:
        record_skip(bench, "linear", measure, asdict(point), why)
        pytest.skip(why)


# --- targets --------------------------------------------------------------------------------------


def judge_layer(point: Point, row: Row) -> list[Row]:
    """Judge ours by the best rival or path; ten draws of one x by base products or naive loops."""
    ratios = {k: v["median"] for k, v in row["ratios"].items()}
    known = [k for k in ratios if k in contenders.RIVALS | contenders.OURS]
    best = min(known, key=ratios.__getitem__)
    found = [target(f"ours / best ({best})", 1 / ratios[best], LOSS, at_least=False)]
    if not point.shared or point.S != S:
        return found
    if point.T < 256:
        found.append(target("ours / base product", 1 / ratios["base"], 1.5, at_least=False))
    elif "naive" in ratios:
        found.append(target("naive / ours", ratios["naive"], 8.0, at_least=True))
    return found


def judge_update(bench: Bench, point: Point, row: Row) -> list[Row]:
    """Judge large updates by their bytes, large expands by their floor."""
    nbytes, found = sizes(bench, point), []
    if nbytes.update >= LARGE:
        value = 1 / row["floor"]["fraction"]
        found.append(target("update / time of its bytes", value, FLOOR, at_least=False))
    if "expand" in row["contenders"] and nbytes.outputs >= LARGE:
        fraction = expand_floor(bench, point) / row["contenders"]["expand"]["median"]
        found.append(target("expand, of its floor", fraction, EXPAND, at_least=True))
    return found


def expand_floor(bench: Bench, point: Point) -> float:
    """Return the seconds that expand's bytes or instructions take at least."""
    nbytes = sizes(bench, point)
    by_bytes = (nbytes.base + nbytes.outputs) / bench.bandwidth
    gpu = environment()["gpu"] or {}
    if torch.version.hip or not gpu.get("sm_clock_max_mhz"):
        return by_bytes
    from tfb_kernels.aot import expand_instructions  # needs Triton's compiler

    arch = launch.architecture(bench.device)
    each = expand_instructions(arch, "bf16", RANK, point.S * point.T, shared=point.shared)
    issued = LANES * gpu["processors"] * gpu["sm_clock_max_mhz"] * 1e6
    return max(by_bytes, each * nbytes.outputs / bench.dtype.itemsize / issued)


# --- tests ----------------------------------------------------------------------------------------


def test_layer(benchmark: Any, kernels: Bench, wrong: dict[str, str], point: Point) -> None:
    """The whole layer, base product and update, against what people would do."""
    refuse(kernels, point, "layer", wrong)
    case = layer_operands(kernels, point)
    skipped = {k: v for k, v in wrong.items() if k in contenders.OURS}
    if point.shared:
        skipped["merge"] = "x is shared: one product serves all draws"
    calls = {k: v for k, v in contenders.OURS.items() if k not in skipped} | contenders.RIVALS
    compare(
        benchmark,
        kernels,
        "linear",
        "layer",
        case.description,
        {
            "ours": case.step(contenders.ours),
            **{name: case.step(call) for name, call in calls.items()},
            "base": case.step(lambda layer, x, draws: F.linear(x, layer.W)),
        },
        copies=len(case.x),
        graphs=True,
        unit="base",
        skipped=skipped,
        judge=partial(judge_layer, point),
        rounds=(20, 20),
    )


def test_update(benchmark: Any, kernels: Bench, wrong: dict[str, str], point: Point) -> None:
    """The update alone, beside expand alone (on a GPU) and the base product."""
    refuse(kernels, point, "update", wrong)
    nbytes = sizes(kernels, point)
    # The update never reads the weight: only what it reads can hold the last cache.
    copies = kernels.copies(nbytes.x + nbytes.base)
    # The base product beside it does.
    case = operands(kernels, point, copies, min(copies, kernels.copies(nbytes.weight)))
    layer = case.layers[0]
    base = [F.linear(x, layer.W) for x in case.x]
    inplace = not point.shared
    steps: dict[str, Step] = {
        "ours": lambda i: layer.sampler(case.x[i], base[i], case.draws, inplace=inplace),
        "base": case.step(lambda layer, x, draws: F.linear(x, layer.W)),
    }
    skipped = {}
    if kernels.device.type == "cuda":
        steps["expand"] = expand_step(case, base)
    else:
        skipped["expand"] = "a Triton kernel; no GPU here"
    compare(
        benchmark,
        kernels,
        "linear",
        "update",
        case.description,
        steps,
        copies=copies,
        graphs=True,
        unit="base",
        parts=("expand",),
        skipped=skipped,
        least_bytes=nbytes.update,
        judge=partial(judge_update, kernels, point),
        rounds=(20, 20),
    )


def expand_step(case: Operands, base: list[Tensor]) -> Step:
    """Return expand alone on z [S, T, r], finalised."""
    from tfb_kernels import triton_expand

    x, (T, m) = case.x[0], base[0].shape[-2:]
    B = case.layers[0].sampler.factors(x.device, x.dtype).B
    R, shared = B.shape[1], x.dim() == 2
    z = torch.randn((S, T, R), dtype=x.dtype, device=x.device)
    config = launch.choose_config("expand", rows=S * T, rank=R, arch=launch.architecture(x.device))
    problem = (S, T, m, R, x.dtype, launch.dot_precision(x.dtype))
    wave = tuning.processors(x.device)
    plan = triton_expand.plan(*problem, config, wave, shared=shared, bias=False)
    outputs = base[0].new_empty((S, T, m)) if shared else None

    def step(i: int) -> None:
        triton_expand.expand(z, B, base[i], None, base[i] if outputs is None else outputs, plan)

    return step
