"""One layer at Llama-3.1-8B's shapes: the whole layer against ``baselines``, and the update alone.

Not the full cross, which is some 2,000 points, but 77 (``points``):

    50   q/o at rank 16: T in {1, 16, 256, 4096, 16384} x S in {1, 2, 4, 10, 32} x shared, per draw
    27   one factor changed at a time around S = 10, T in {1, 256, 4096}: the other layers (x per
         draw, as above a first noisy layer; the head shared, as in last-layer TFB), ranks 8 and 64
         (both sharings), iid draws in place of antithetic ones

and for the choice between the Triton paths 36 more (``path_points``), by rows to a stream. bfloat16
on a GPU. Without one, and with --toy, the same code runs at toy sizes in float32.

Targets, from DESIGN.md: see ``judge_layer`` and ``judge_op``; what is missed is in the row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import baselines
from benchmarks.baselines import CONTENDERS, Layer, make_draws, make_layer
from benchmarks.harness import LOSS, Bench, Row, Step, Work, compare, record_skip, target
from tfb.draws import Draws

# out_features, in_features of Llama-3.1-8B's projections.
LAYERS = {
    "q": (4096, 4096),
    "v": (1024, 4096),
    "gate": (14336, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
TOY = (256, 256)
COMPILE_SECONDS = 90.0  # for all points together; a model compiles once, a sweep of shapes often


@dataclass(frozen=True)
class Point:
    """layer: a key of LAYERS. r: rank. S: draws. T: tokens. shared: x [T, n], else [S, T, n].
    draws: "antithetic" (two draws to a stream; iid where S is odd) or "iid"."""

    layer: str = "q"
    r: int = 16
    S: int = 10
    T: int = 256
    shared: bool = False
    draws: str = "antithetic"

    def __str__(self) -> str:
        x = "shared" if self.shared else "per-draw"
        tail = "-iid" if self.draws == "iid" else ""
        return f"{self.layer}-r{self.r}-S{self.S}-T{self.T}-{x}{tail}"


def points(toy: bool) -> Iterator[Point]:
    """The documented list."""
    sizes, counts = ((1, 16, 64), (2, 4)) if toy else ((1, 16, 256, 4096, 16384), (1, 2, 4, 10, 32))
    for T in sizes:
        for S in counts:
            for shared in (True, False):
                yield Point(S=S, T=T, shared=shared)
    for T in (16,) if toy else (1, 256, 4096):
        centre = Point(T=T, S=4 if toy else 10)
        for layer in ("v", "gate", "down", "head"):
            yield replace(centre, layer=layer, shared=layer == "head")
        for r in (8, 64):
            for shared in (True, False):
                yield replace(centre, r=r, shared=shared)
        yield replace(centre, draws="iid")


def path_points(toy: bool) -> Iterator[Point]:
    """q/o by rows, for ``paths.generate_min_rows`` of launch.json."""
    for r in (16,) if toy else (16, 64):
        for T in (4, 32) if toy else (8, 16, 32, 64, 128, 256, 512, 1024, 2048):
            for shared in (True, False):
                yield Point(r=r, S=4 if toy else 10, T=T, shared=shared)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    toy = metafunc.config.getoption("--toy") or not torch.cuda.is_available()
    listed = path_points if metafunc.function is test_paths else points
    metafunc.parametrize("point", listed(toy), ids=str)


# --- operands -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def kernels(bench: Bench) -> Bench:
    """The session, after every contender proved right at a small size."""
    on_gpu = bench.device.type == "cuda"
    with torch.no_grad():
        baselines.check(bench.device, bench.dtype, with_compiled=on_gpu)
    return bench.for_kernels()


@dataclass(frozen=True)
class Operands:
    """Rotating buffer sets of one point: layers, x and base outputs."""

    layers: list[Layer]
    x: list[Tensor]
    draws: Draws
    description: dict[str, Any]
    work: Work

    def step(self, call: Callable[[Layer, Tensor, Draws], object]) -> Step:
        return lambda i: call(self.layers[i], self.x[i], self.draws)


def shape(bench: Bench, point: Point) -> tuple[int, int]:
    return TOY if bench.toy else LAYERS[point.layer]


def output_bytes(bench: Bench, point: Point) -> int:
    return point.S * point.T * shape(bench, point)[0] * bench.dtype.itemsize


def operands(bench: Bench, point: Point) -> Operands:
    m, n = shape(bench, point)
    size, device = bench.dtype.itemsize, bench.device
    inputs = 1 if point.shared else point.S
    x_bytes, w_bytes = inputs * point.T * n * size, m * n * size
    copies = bench.copies(w_bytes + x_bytes)
    rows = (point.T,) if point.shared else (point.S, point.T)
    lora = 2 * point.r * (inputs * n + point.S * (n + m))
    draws = make_draws(point.S, iid=point.draws == "iid")
    return Operands(
        layers=[make_layer(m, n, point.r, bench.dtype, device) for _ in range(copies)],
        x=[torch.randn(*rows, n, dtype=bench.dtype, device=device) for _ in range(copies)],
        draws=draws,
        description={
            **asdict(point), "m": m, "n": n, "streams": len(draws.distinct_streams),
            "dtype": str(bench.dtype).removeprefix("torch."),
        },
        work=Work(
            bytes=w_bytes + x_bytes + output_bytes(bench, point),
            flops=point.T * (2 * m * n * inputs + lora),
        ),
    )  # fmt: skip


def refuse_large(bench: Bench, point: Point, measure: str) -> None:
    """Skip, with a row that says so, where the outputs exceed a quarter of the GPU's memory."""
    if bench.device.type != "cuda":
        return
    memory = torch.cuda.get_device_properties(0).total_memory
    if (need := output_bytes(bench, point)) > memory / 4:
        why = f"outputs of {need / 2**30:.1f} GiB exceed a quarter of the GPU's memory"
        record_skip(bench, "linear", measure, asdict(point), why)
        pytest.skip(why)


_compile_seconds = 0.0


def compilation(case: Operands, on_gpu: bool) -> str | None:
    """Compile the compiled contender for this point; why it is left out, if it is."""
    global _compile_seconds
    if not on_gpu:
        return "torch.compile is measured on a GPU only"
    if _compile_seconds > COMPILE_SECONDS:
        return f"the session's {COMPILE_SECONDS:g} s of torch.compile were spent"
    start = time.perf_counter()
    try:
        baselines.compiled(case.layers[0], case.x[0], case.draws)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # whatever inductor meets is a result, not our failure
        return f"torch.compile failed: {type(error).__name__}"
    finally:
        _compile_seconds += time.perf_counter() - start
    return None


# --- targets --------------------------------------------------------------------------------------


def judge_layer(point: Point, row: Row) -> list[Row]:
    """At most 3 % slower than the best contender; shared x, T >= 4096, S = 10: 8 x naive."""
    ratios = {k: v["median"] for k, v in row["ratios"].items() if k in CONTENDERS}
    best = min(ratios, key=lambda k: ratios[k])
    found = [target(f"ours / best ({best})", 1 / ratios[best], LOSS, at_least=False)]
    if point.shared and point.T >= 4096 and point.S == 10 and "naive" in ratios:
        found.append(target("naive / ours", ratios["naive"], 8.0, at_least=True))
    return found


def judge_op(point: Point, expand_bytes: float, copy: float, row: Row) -> list[Row]:
    """Per-draw x, S T >= 4096: the update within 5 % (r <= 16) or 10 % (r = 64) of the base
    product. expand at 80 % of copy bandwidth or more, where it is large enough to be bandwidth."""
    found = []
    if not point.shared and point.S * point.T >= 4096:
        bound = 0.05 if point.r <= 16 else 0.10
        value = 1 / row["ratios"]["base"]["median"]
        found.append(target("update / base product", value, bound, at_least=False))
    if "expand" in row["contenders"] and expand_bytes >= 64 << 20:
        rate = expand_bytes / row["contenders"]["expand"]["median"] / copy
        found.append(target("expand / copy bandwidth", rate, 0.8, at_least=True))
    return found


# --- tests ----------------------------------------------------------------------------------------


def test_layer(benchmark: Any, kernels: Bench, point: Point) -> None:
    """The whole layer, base product and update, against what people would do."""
    refuse_large(kernels, point, "layer")
    case = operands(kernels, point)
    steps = {"ours": case.step(baselines.ours)}
    steps |= {name: case.step(call) for name, call in CONTENDERS.items()}
    skipped = {}
    if why := compilation(case, kernels.device.type == "cuda"):
        skipped["compiled"] = why
        del steps["compiled"]
    compare(
        benchmark, kernels, "linear", "layer", case.description, steps,
        copies=len(case.x), graphs=("ours",), skipped=skipped, work=case.work,
        judge=partial(judge_layer, point),
    )  # fmt: skip


def test_op(benchmark: Any, kernels: Bench, point: Point) -> None:
    """The update alone, beside the base product alone and (on a GPU) expand alone."""
    refuse_large(kernels, point, "op")
    case = operands(kernels, point)
    base = [F.linear(x, layer.W) for x, layer in zip(case.x, case.layers, strict=True)]
    outputs, inputs = output_bytes(kernels, point), base[0].numel() * kernels.dtype.itemsize
    skipped: dict[str, str] = {}
    steps = {
        "ours": op_step(case, base),
        "base": case.step(lambda layer, x, draws: F.linear(x, layer.W)),
    }
    if kernels.device.type == "cuda":
        steps["expand"] = expand_step(case, base)
    else:
        skipped["expand"] = "a Triton kernel; no GPU here"
    x_bytes = case.x[0].numel() * kernels.dtype.itemsize
    compare(
        benchmark, kernels, "linear", "op", case.description, steps,
        copies=len(case.x), graphs=("ours", "base", "expand"), unit="base", parts=("expand",),
        skipped=skipped,
        work=Work(x_bytes + inputs + outputs, case.work.flops - base_flops(case)),
        judge=partial(judge_op, point, inputs + outputs, kernels.ceilings.copy),
    )  # fmt: skip


def test_paths(benchmark: Any, kernels: Bench, point: Point) -> None:
    """The update by each Triton path ("auto" is ours), as graphs too, which leave launches out."""
    case = operands(kernels, point)
    base = [F.linear(x, layer.W) for x, layer in zip(case.x, case.layers, strict=True)]
    steps = {"ours": op_step(case, base)}
    for path in ("fused", "generate"):
        steps[path] = path_step(case, base, path)
    # Rows of x that share a stream, which is what choose_path looks at.
    run = case.draws.tensors().draws_per_stream
    rows = point.T if point.shared else run * point.T
    compare(
        benchmark, kernels, "linear", "paths", case.description | {"rows": rows}, steps,
        copies=len(case.x), graphs=("ours", "fused", "generate"),
    )  # fmt: skip


def base_flops(case: Operands) -> float:
    x = case.x[0]
    return 2 * x.numel() / x.shape[-1] * case.layers[0].W.numel()


def op_step(case: Operands, base: list[Tensor]) -> Step:
    inplace = case.x[0].dim() == 3
    return lambda i: case.layers[i].sampler(case.x[i], base[i], case.draws, inplace=inplace)


def path_step(case: Operands, base: list[Tensor], path: str) -> Step:
    return lambda i: baselines.op_on_path(case.layers[i], case.x[i], base[i], case.draws, path)


def expand_step(case: Operands, base: list[Tensor]) -> Step:
    """expand alone on z [1, rows, slots, r] of zeros, a slot of A' x and one for each noise."""
    from tfb_kernels.launch import choose_config
    from tfb_kernels.triton_expand import expand

    x, t = case.x[0], case.draws.tensors(case.x[0].device)
    A, B, inv_d = case.layers[0].sampler.factors(x.device)
    slots = 1 + (len(t.streams) if x.dim() == 2 else 1)
    z = x.new_zeros((1, x.numel() // x.shape[-1], slots, len(A)), dtype=torch.float32)
    config = choose_config("expand", rows=z.shape[1], rank=len(A))
    shared_out = base[0].new_empty((len(case.draws), *base[0].shape[-2:]))

    def step(i: int) -> None:
        out = base[i] if x.dim() == 3 else shared_out
        expand(
            z, B, base[i], None, out, t.sigmas, inv_d, t.stream_index, baselines.SCALING,
            x.dtype, config,
        )  # fmt: skip

    return step
