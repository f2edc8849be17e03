"""The Triton kernels against the float64 definition: on a GPU where there is one, else interpreted.

Budgets: twice the error of eager PyTorch in the same dtype, plus what the noise contract allows
two implementations of the normals to differ by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tfb_kernels import (
    bayes_lora_linear,
    bayes_lora_merge,
    gaussian_noise,
    launch,
    predictive_reduction,
    triton_expand,
    triton_shrink,
)
from tfb_kernels.launch import INTERPRET, LaunchConfig, choose_config, dot_precision
from tfb_kernels.noise import weight_noise
from tfb_kernels.ops import why_not_triton
from tfb_kernels.samples import Samples
from tfb_kernels.testing import (
    eager_weight_samples,
    error_budget,
    exact_weight_samples,
    noise_allowance,
    rounding_allowance,
)
from tfb_kernels.triton_generate import generate
from tfb_kernels.triton_linear import bayes_lora_linear_triton
from tfb_kernels.triton_shrink import shrink

# NumPy's view of the interpreter's one-element ranges; the kernels are not concerned.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0 to a scalar is deprecated:DeprecationWarning"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# bfloat16 products are wrong in the interpreter (triton #11584); the kernels compute them in
# float32 there, which is tested, but says nothing of a GPU.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYER_ID = (1 << 32) - 5
SEED = -(1 << 62) + 12345


@dataclass(frozen=True)
class Problem:
    """Arguments of bayes_lora_linear in the order of its signature."""

    x: Tensor
    base: Tensor
    A: Tensor
    B: Tensor
    inv_d: Tensor
    sigmas: Tensor
    streams: Tensor
    scaling: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.x, self.base, self.A, self.B, self.inv_d, self.sigmas, self.streams)

    @property
    def options(self) -> dict[str, Any]:
        return {"seed": SEED, "layer_id": LAYER_ID, "scaling": self.scaling}


def problem(
    T: int, n: int, m: int, r: int, streams: list[int], *, shared: bool, dtype: torch.dtype
) -> Problem:
    """Operands of order one: every term of the result matters."""
    generator = torch.Generator().manual_seed(T * n + m * r + len(streams))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    S = len(streams)
    rows = (T,) if shared else (S, T)
    inv_d = torch.rand(r, generator=generator) + 0.5
    if r > 1:
        inv_d[-1] = 0.0  # a direction that B does not span
    return Problem(
        x=randn(*rows, n).to(DEVICE, dtype),
        base=randn(*rows, m).to(DEVICE, dtype),
        A=(randn(r, n) / n**0.5).to(DEVICE),
        B=(randn(m, r) / r**0.5).to(DEVICE),
        inv_d=(inv_d / n**0.5).to(DEVICE),
        sigmas=torch.tensor([(-1.0) ** s * (0.5 + s % 3) for s in range(S)]).to(DEVICE),
        streams=torch.tensor(streams),
        scaling=1.75,
    )


def poisoned(p: Problem) -> Tensor:
    """An output that shows any element left unwritten."""
    shape = (len(p.sigmas), *p.base.shape[-2:])
    return torch.full(shape, float("nan"), dtype=p.base.dtype, device=DEVICE)


def by_path(p: Problem, path: str, *, run: int = 1, **options: Any) -> Tensor:
    """One of the paths by name, into a poisoned output."""
    order = list(dict.fromkeys(p.streams.tolist()))
    index = torch.tensor([order.index(q) for q in p.streams.tolist()], device=DEVICE)
    x, base, *factors = p.tensors[:6]
    numbered = (torch.tensor(order, device=DEVICE), index, run)
    of_layer = (torch.tensor(SEED, device=DEVICE), LAYER_ID, p.scaling)
    samples = Samples(*factors, *numbered, *of_layer)
    out = options.pop("out", poisoned(p))
    return bayes_lora_linear_triton(x, base, samples, out=out, path=path, **options)


def check(p: Problem, y: Tensor) -> None:
    """y within the budget of the definition, everywhere."""
    exact = exact_weight_samples(*(t.cpu() for t in p.tensors), **p.options)
    eager = eager_weight_samples(*(t.cpu() for t in p.tensors), **p.options)
    allowed = error_budget(exact, eager) + rounding_allowance(exact, p.base, p.x.dtype)
    allowed += noise_allowance(p.x, p.B, p.inv_d, p.sigmas, p.scaling)
    assert y.shape == exact.shape and y.dtype == p.base.dtype
    assert float((y.cpu().double() - exact).abs().max()) <= allowed


def test_the_kernels_run_here() -> None:
    """Nothing below passes because it was not run."""
    assert why_not_triton(DEVICE) is None
    assert torch.cuda.is_available() is not INTERPRET


# --- linear -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["fused", "generate"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("T", "n", "m", "r", "streams"),
    [
        (1, 1, 1, 1, [0]),
        (5, 37, 19, 3, [7, 7, 2, 2]),
        (70, 130, 131, 16, [4, 1, 4, 2**32 - 1]),
        (17, 65, 150, 40, [0, 1, 2]),
        (3, 70, 33, 200, [9, 9]),
    ],
)
def test_ragged_shapes(
    T: int, n: int, m: int, r: int, streams: list[int], shared: bool, path: str, dtype: torch.dtype
) -> None:
    """No size needs to be a multiple of anything, on either path."""
    p = problem(T, n, m, r, streams, shared=shared, dtype=dtype)
    check(p, by_path(p, path))


@pytest.mark.parametrize("path", ["fused", "generate"])
def test_runs_of_a_stream_are_taken_together(path: str) -> None:
    """Draws that come stream by stream share their noise tiles and change no value."""
    p = problem(9, 70, 20, 8, [3, 3, 5, 5], shared=False, dtype=torch.float32)
    check(p, by_path(p, path, run=2))


def test_public_function_and_inplace_and_bias() -> None:
    """The public call gives the path's values; in place they land in base; a bias is added."""
    p = problem(6, 50, 21, 4, [1, 1, 0, 0], shared=False, dtype=torch.float32)
    y = bayes_lora_linear(*p.tensors, impl="triton", **p.options)
    check(p, y)
    bias = torch.arange(21.0, device=DEVICE)
    base = p.base.clone()
    z = bayes_lora_linear(
        p.x, base, *p.tensors[2:], impl="triton", bias=bias, inplace=True, **p.options
    )
    assert z is base
    check(replace(p, base=p.base + bias), z)


@pytest.fixture(params=["ieee", "tf32"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """torch's setting for float32 products, made the way that newer programs make it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = request.param
    yield request.param
    matmul.fp32_precision = before


def test_float32_under_torchs_precision_setting(precision: str) -> None:
    """A program that set ``fp32_precision``, after which torch's older getter raises, gets its
    products in that precision. TF32 rounds both operands to 11 bits: x, A' + noise, z and B'."""
    p = problem(6, 50, 21, 4, [1, 0], shared=True, dtype=torch.float32)
    y = bayes_lora_linear(*p.tensors, impl="triton", **p.options)
    assert dot_precision(torch.float32) == precision
    assert dot_precision(torch.bfloat16) == "ieee"
    if INTERPRET or precision == "ieee":  # NumPy's products are float32 in any case
        check(p, y)
    else:
        exact = exact_weight_samples(*(t.cpu() for t in p.tensors), **p.options)
        assert float((y.cpu().double() - exact).norm() / exact.norm()) < 4 * 2.0**-11


@pytest.mark.parametrize("shared", [True, False])
def test_compiled_without_graph_breaks(shared: bool) -> None:
    """``fullgraph`` on the way to the kernels: the bits of the eager call. Draws are numbered by
    stream, since a graph cannot look for repeats and would make each stream twice."""
    p = problem(6, 50, 21, 4, [1, 1, 0, 0], shared=shared, dtype=torch.float32)
    p = replace(p, streams=torch.tensor([1, 0], device=DEVICE))
    torch._dynamo.reset()
    compiled = torch.compile(bayes_lora_linear, fullgraph=True, backend="eager")
    index = torch.tensor([0, 0, 1, 1], device=DEVICE)
    options = p.options | {"impl": "triton", "stream_index": index, "draws_per_stream": 2}
    assert compiled(*p.tensors, **options).equal(bayes_lora_linear(*p.tensors, **options))
    torch._dynamo.reset()


def test_factors_in_the_dtype_of_x_change_no_bit() -> None:
    """As a caller keeps them; float32 ones are converted at every call."""
    p = problem(6, 50, 21, 4, [1, 0], shared=True, dtype=torch.float16)
    kept = replace(p, A=p.A.half(), B=p.B.half())
    for path in ("fused", "generate"):
        assert by_path(kept, path).equal(by_path(p, path))


@pytest.mark.parametrize("shared", [True, False])
def test_strided_input(shared: bool) -> None:
    """x may be any view: columns apart, rows apart, a transposed tensor."""
    p = problem(6, 50, 21, 4, [1, 0], shared=shared, dtype=torch.float32)
    wide = torch.zeros(*p.x.shape[:-1], 100, device=DEVICE)
    wide[..., ::2] = p.x
    check(p, by_path(replace(p, x=wide[..., ::2]), "fused"))
    turned = p.x.transpose(-1, -2).contiguous().transpose(-1, -2)
    check(p, by_path(replace(p, x=turned), "fused"))
    apart = torch.zeros(*p.base.shape[:-1], 42, device=DEVICE)
    apart[..., :21] = p.base
    check(p, by_path(replace(p, base=apart[..., :21]), "fused"))


@pytest.mark.parametrize("shared", [True, False])
def test_strided_numbers(shared: bool) -> None:
    """sigma, 1/d, bias and streams, which kernels read side by side, may be columns of a matrix."""

    def column(t: Tensor) -> Tensor:
        return torch.stack([t, t + 1], 1)[:, 0]

    p = problem(6, 50, 21, 4, [1, 0], shared=shared, dtype=torch.float32)
    weight = torch.randn(21, 50).to(DEVICE)
    bias, index = torch.randn(21).to(DEVICE), torch.tensor([0, 1], device=DEVICE)
    numbers = (p.inv_d, p.sigmas, p.streams.to(DEVICE), bias, index)
    found = []
    for inv_d, sigmas, streams, bias, index in (numbers, map(column, numbers)):
        rest = (p.A, p.B, inv_d, sigmas, streams)
        options = p.options | {"impl": "triton", "stream_index": index}
        found.append(
            (
                bayes_lora_linear(p.x, p.base, *rest, bias=bias, **options),
                bayes_lora_merge(weight, *rest, **options),
                gaussian_noise(SEED, LAYER_ID, streams, 4, 50),
            )
        )
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_rows_of_a_base_that_are_far_apart() -> None:
    """The last positions of logits of long prompts: 32 bits do not hold a tile's offsets."""
    p = problem(16, 16, 5, 2, [0], shared=False, dtype=torch.float16)
    apart = (1 << 31) // 15 + 1
    far = torch.empty(16 * apart, dtype=torch.float16, device=DEVICE)  # touched at 16 rows alone
    base = far.as_strided(p.base.shape, (0, apart, 1))
    base.copy_(p.base)
    assert by_path(replace(p, base=base), "fused").equal(by_path(p, "fused"))


@pytest.mark.parametrize("path", ["fused", "generate"])
def test_no_tokens(path: str) -> None:
    """Nothing in, nothing out."""
    for shared in (True, False):
        p = problem(0, 30, 7, 4, [1, 0], shared=shared, dtype=torch.float16)
        assert by_path(p, path).shape == (2, 0, 7)


def test_sigma_zero_is_the_deterministic_adapter() -> None:
    """Exactly: what the noise is changes no bit."""
    p = problem(5, 40, 12, 4, [1, 2], shared=True, dtype=torch.float32)
    p = replace(p, sigmas=torch.zeros(2, device=DEVICE))
    mean = by_path(p, "fused")
    assert mean.equal(by_path(replace(p, streams=torch.tensor([7, 3])), "fused"))
    check(p, mean)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's 0 inf
def test_noise_that_overflowed_does_not_touch_sigma_zero() -> None:
    """0 times infinity is NaN; finalise gives the mean, scaled, at sigma = 0 and where d = 0."""
    z = torch.zeros(20, 5, 2, 4, device=DEVICE)  # more splits than are read at a time
    z[:, :, 0], z[1, :, 1] = 0.5, float("inf")
    sigmas, inv_d = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0, 2.0, 0.0])
    index = torch.tensor([0, 0], device=DEVICE)
    zf = triton_expand.finalise(
        z, sigmas.to(DEVICE), inv_d.to(DEVICE), index, 2.0, 5, 2, torch.float32, shared=True
    )
    assert zf[0].equal(torch.full((5, 4), 20.0, device=DEVICE))
    assert zf[1, :, 1::2].equal(zf[0, :, 1::2]) and bool(zf[1, :, ::2].isinf().all())


def test_many_draws() -> None:
    """200 draws of 87 streams: several blocks of noise rows, the last one smaller than the rest."""
    plan = planned(1, 2, 17, 87, 2, torch.float32)
    assert plan.constants["MIDDLE"] and plan.constants["TAIL"]
    streams = [s % 87 for s in range(200)]
    p = problem(2, 17, 5, 2, streams, shared=True, dtype=torch.float32)
    check(p, by_path(p, "fused"))


def test_draws_equal_single_runs_to_the_bit() -> None:
    """A draw does not know which other draws share its launch (where n is not split)."""
    p = problem(20, 60, 24, 4, [5, 5, 6, 8], shared=False, dtype=torch.float16)
    together = by_path(p, "fused")
    for s in range(4):
        one = {k: getattr(p, k)[s : s + 1] for k in ("x", "base", "sigmas", "streams")}
        assert by_path(replace(p, **one), "fused").equal(together[s : s + 1])


def test_bitwise_equal_run_to_run() -> None:
    """Also where n is split: the parts are added in order."""
    p = problem(3, 600, 24, 4, [5, 6], shared=False, dtype=torch.float16)
    assert planned(2, 3, 600, 1, 4, torch.float16).grid[2] > 1
    assert by_path(p, "fused").equal(by_path(p, "fused"))


def planned(
    G: int,
    T: int,
    n: int,
    Q: int,
    R: int,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
    wave: int = 4,
) -> triton_shrink.Plan:
    """shrink's plan, by default that of the table for the interpreter."""
    arch = launch.architecture(DEVICE)
    config = config or choose_config("shrink", rows=T, rank=R, arch=arch)
    return triton_shrink.plan(G, T, n, Q, R, dtype, dot_precision(dtype), config, wave)


# --- noise --------------------------------------------------------------------------------------


def unit_rows(n: int) -> Tensor:
    """x [1, n, n] that reads a matrix out: shrink then returns E itself."""
    return torch.eye(n, device=DEVICE)[None]


@pytest.mark.parametrize("n", [38, 64])
def test_noise_does_not_depend_on_tiles_and_splits(n: int) -> None:
    """E read out by an identity: to the bit the same for every tile and split of n, and the
    contract's, to 1e-3 at worst and 1e-6 RMS."""
    r, seed = 5, torch.tensor(SEED, device=DEVICE)
    streams = torch.tensor([[3, 2**32 - 1, 7, 8]], device=DEVICE)
    A = torch.randn(r, n, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    E = weight_noise(seed.cpu(), LAYER_ID, streams[0].cpu(), r, n)
    first = None
    for config, wave in (
        (LaunchConfig(block_t=16, block_p=16, block_k=32), 1),
        (LaunchConfig(block_t=64, block_p=32, block_k=32), 40),
        (LaunchConfig(block_t=32, block_p=32, block_k=16), 1),
        (LaunchConfig(block_t=16, block_p=64, block_k=16), 16),
    ):
        plan = planned(1, n, n, 4, r, torch.float32, config, wave)
        z = shrink(unit_rows(n), A, streams, seed, LAYER_ID, plan)
        assert z.shape == (plan.grid[2], n, 5, r)
        found = z.sum(0)
        assert found[:, 0].mT.equal(A)
        close_to_contract(found[:, 1:].permute(1, 2, 0).cpu(), E)
        first = found if first is None else first
        assert found.equal(first)


def close_to_contract(found: Tensor, E: Tensor) -> None:
    """Normals equal as the noise contract says."""
    error = (found.double() - E.double()).abs()
    assert float(error.max()) <= 1e-3
    assert float(error.square().mean().sqrt()) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_generate_is_the_contract(dtype: torch.dtype) -> None:
    """Stacked factors: A' and each stream's E, rounded once to the dtype that was asked for."""
    r, n = 5, 131
    streams = torch.tensor([[3, 1], [0, 9]], device=DEVICE)
    A = torch.randn(r, n, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    seed = torch.tensor(SEED, device=DEVICE)
    config = choose_config("generate", rows=0, rank=r, arch=launch.architecture(DEVICE))
    stacked = generate(A, streams, seed, LAYER_ID, r, n, dtype, config)
    assert stacked.dtype == dtype and stacked.shape == (2, 3, r, n)
    for g in range(2):
        if dtype == torch.bfloat16 and INTERPRET:  # which cuts off where GPUs round
            assert bool(((stacked[g, 0] - A).abs() <= torch.finfo(dtype).eps * A.abs()).all())
        else:
            assert stacked[g, 0].equal(A.to(dtype))
        E = weight_noise(seed.cpu(), LAYER_ID, streams[g].cpu(), r, n)
        if dtype == torch.float32:
            close_to_contract(stacked[g, 1:].cpu(), E)
        else:
            # One rounding of values below 8, and normals that may round to the neighbour.
            eps = torch.finfo(dtype).eps
            assert float((stacked[g, 1:].cpu().double() - E).abs().max()) <= 8 * eps
    bare = generate(None, streams[:1], seed, LAYER_ID, r, n, torch.float32, config)
    close_to_contract(bare[0].cpu(), weight_noise(seed.cpu(), LAYER_ID, streams[0].cpu(), r, n))


# --- predictive -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("S", "B", "V"), [(1, 1, 1), (2, 3, 37), (6, 2, 5003)])
def test_predictive_reduction(S: int, B: int, V: int, dtype: torch.dtype) -> None:
    """Against the oracle in float64 on the same (rounded) logits; masked columns are allowed.

    Budget: float32 sums of V terms of one sign, ratio of two of them: V eps for probabilities in
    relative terms, times the size of the logarithms (below 64) for entropies.
    """
    generator = torch.Generator().manual_seed(S + V)
    logits = (torch.randn(S, B, V, generator=generator) * 4).to(dtype)
    if V > 100:
        logits[:, 0, : V // 2] = float("-inf")
    units = torch.arange(S).view(-1, 2 if S % 2 == 0 else 1)
    found = predictive_reduction(logits.to(DEVICE), units.to(DEVICE), impl="triton")
    exact = predictive_reduction(logits.double(), units, impl="reference")
    eps = torch.finfo(torch.float32).eps
    probs, total, expected, argmax, error = (t.cpu() for t in found)
    relative = (32 + V**0.5 * 4) * eps  # random signs of rounding; 32: exp and log of a few ulp
    assert float(((probs - exact[0]).abs() - relative * exact[0]).max()) <= 1e-30
    assert float((total - exact[1]).abs().max()) <= 64 * relative
    assert float((expected - exact[2]).abs().max()) <= 64 * relative
    chosen = logits.double().gather(-1, argmax[..., None])[..., 0]
    assert chosen.equal(logits.double().amax(-1))
    assert argmax.equal(exact[3])
    if len(units) == 1:
        assert bool(error.isnan().all())
    else:
        assert float((error - exact[4]).abs().max()) <= 2 * relative


def test_predictive_label_columns() -> None:
    """Only the named columns, renormalised over them, the same for rows in common or each."""
    logits = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids = torch.tensor([5, 2, 49], device=DEVICE)
    common = predictive_reduction(logits, label_ids=ids, impl="triton")[0]
    each = predictive_reduction(logits, label_ids=ids.expand(3, 3), impl="triton")[0]
    assert common.equal(each)
    exact = logits[..., ids].double().softmax(-1).mean(0)
    assert float((common - exact).abs().max()) <= 32 * torch.finfo(torch.float32).eps
