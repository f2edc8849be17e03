"""The public operations against their definition in float64, and as torch operators.

Tolerances are a-priori bounds. A result that went through k roundings of unit roundoff u = eps/2
is off by at most about k u times what the same formula gives for absolute values, M. Here
k <= n + r + 8: two dot products, and sigma, inv_d, their product, the gain, the sum, the scaling,
the base and its addition. k eps M is twice that, which covers the truth's own rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operators import (
    LOW,
    STREAMS,
    Problem,
    compiled_once,
    indexed,
    problem,
    within,
)
from torch import Tensor

from tfb_kernels import (
    ImplementationUnavailableError,
    bayes_lora_linear,
    gaussian_noise,
    ops,
    predictive_reduction,
    reference,
)
from tfb_kernels.noise import token_noise, weight_noise
from tfb_kernels.reference import compute_dtype
from tfb_kernels.testing import error_budget, exact_weight_samples

NOISE = ("weight", "token")


def definition(p: Problem, noise: str, *, absolute: bool = False) -> Tensor:
    """y [S, T, m] float64, draw by draw; ``absolute`` gives M, the magnitude of its terms."""

    def f64(t: Tensor) -> Tensor:
        return t.double().abs() if absolute else t.double()

    A, B, inv_d = f64(p["A"]), f64(p["B"]), f64(p["inv_d"])
    seed, layer = torch.tensor(p["seed"]), p["layer_id"]
    r, n = A.shape
    out = []
    for s, q in enumerate(p["streams"].tolist()):
        x, base = (f64(t if t.dim() == 2 else t[s]) for t in (p["x"], p["base"]))
        stream = torch.tensor([q])
        if noise == "weight":
            e = x @ f64(weight_noise(seed, layer, stream, r, n)[0]).mT
        else:
            xi = f64(token_noise(seed, layer, stream, len(x), r)[0])
            e = x.square().sum(-1, keepdim=True).sqrt() * xi
        z = x @ A.mT + f64(p["sigmas"])[s] * inv_d * e
        out.append(base + (abs(p["scaling"]) if absolute else p["scaling"]) * (z @ B.mT))
    return torch.stack(out)


def bound(p: Problem, noise: str) -> Tensor:
    """Elementwise error bound of the module's docstring, and the rounding to base's dtype."""
    compute, stored = (torch.finfo(t) for t in (compute_dtype(p["x"].dtype), p["base"].dtype))
    M = definition(p, noise, absolute=True)
    n, r = p["x"].shape[-1], len(p["inv_d"])
    total = (n + r + 8) * compute.eps * M
    if stored.eps > compute.eps:
        largest = definition(p, noise).abs() + total
        total = total + stored.eps / 2 * largest + stored.smallest_normal * stored.eps
    return total


def run(p: Problem, noise: str = "weight", **changes: Any) -> Tensor:
    return bayes_lora_linear(**{**p, "impl": "reference", **changes}, noise=noise)


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("shared", [True, False])
def test_float64_is_the_definition(shared: bool, noise: str) -> None:
    p = problem(shared=shared)
    y = run(p, noise)
    assert y.dtype == torch.float64 and y.shape == (6, 5, 20)
    within(y - definition(p, noise), bound(p, noise))
    if noise == "weight":
        within(y - exact_weight_samples(**p), bound(p, noise))
    assert torch.equal(run(p, noise, impl="auto"), y)


def eager(p: Problem) -> Tensor:
    """What plain torch gives in the working precision: every factor, noise and product in it."""
    dtype = p["x"].dtype
    A, B = p["A"].to(dtype), p["B"].to(dtype)
    E = gaussian_noise(p["seed"], p["layer_id"], p["streams"], *A.shape).to(dtype)
    gain = (p["sigmas"][:, None] * p["inv_d"]).to(dtype)
    sampled = A + gain[..., None] * E
    return p["base"] + p["scaling"] * (p["x"] @ sampled.mT @ B.mT)


@pytest.mark.parametrize("factors", [None, torch.float32])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shared", [True, False])
def test_low_precision(shared: bool, dtype: torch.dtype, factors: torch.dtype | None) -> None:
    """Inside the a-priori bound, and no worse than twice plain torch in that precision."""
    p = problem(shared=shared, dtype=dtype, factors=factors, T=32, n=64, m=48, r=8)
    y, exact = run(p), exact_weight_samples(**p)
    assert y.dtype == dtype
    within(y.double() - exact, bound(p, "weight"))
    assert float((y.double() - exact).abs().max()) <= error_budget(exact, eager(p))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shared", [True, False])
def test_low_precision_token(shared: bool, dtype: torch.dtype) -> None:
    p = problem(shared=shared, dtype=dtype, T=9)
    within(run(p, "token").double() - definition(p, "token"), bound(p, "token"))


@pytest.mark.parametrize(("x", "base"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_result_has_the_dtype_of_base(x: str, base: str) -> None:
    """And only the result is rounded to it: float32 factors stay float32 beside bfloat16 x."""
    p = problem(shared=True, dtype=getattr(torch, x), factors=torch.float32)
    p["base"] = p["base"].to(getattr(torch, base))
    y = run(p)
    assert y.dtype == getattr(torch, base)
    within(y.double() - exact_weight_samples(**p), bound(p, "weight"))


@given(data=st.data())
@settings(max_examples=80)
def test_any_sizes_and_dtypes(data: st.DataObject) -> None:
    draw = data.draw
    S = draw(st.integers(1, 6), label="S")
    pool = draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3), label="Q")
    p = problem(
        shared=draw(st.booleans(), label="shared"),
        T=draw(st.integers(0, 4), label="T"),
        n=draw(st.integers(1, 9), label="n"),
        m=draw(st.integers(1, 7), label="m"),
        r=draw(st.integers(1, 5), label="r"),
        sigmas=tuple(draw(st.lists(st.floats(-3, 3), min_size=S, max_size=S), label="sigmas")),
        streams=tuple(draw(st.lists(st.sampled_from(pool), min_size=S, max_size=S), label="q")),
        dtype=draw(st.sampled_from([torch.float64, *LOW]), label="dtype"),
        factors=draw(st.sampled_from([None, torch.float32]), label="factors"),
        seed=draw(st.integers(-(2**63), 2**63 - 1), label="seed"),
    )
    p["inv_d"][0] *= draw(st.sampled_from([0.0, 1.0]), label="first direction")
    noise = draw(st.sampled_from(NOISE), label="noise")
    exact = exact_weight_samples(**p) if noise == "weight" else definition(p, noise)
    within(run(p, noise).double() - exact, bound(p, noise))


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
@pytest.mark.parametrize("shared", [True, False])
def test_bias_is_added_to_every_draw(shared: bool, dtype: torch.dtype, noise: str) -> None:
    p = problem(shared=shared, dtype=dtype)
    bias = torch.linspace(-2, 2, 20, dtype=dtype)
    with_bias = p | {"base": p["base"].double() + bias.double()}
    # bound() of the sum in float64, but rounded as often and to the dtype of the real base
    limit = bound(p, noise) + bias.double().abs() * 2 * torch.finfo(dtype).eps
    within(run(p, noise, bias=bias).double() - definition(with_bias, noise), limit)


@pytest.mark.parametrize("bias", [None, torch.linspace(-2, 2, 20, dtype=torch.float64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inplace_is_the_same_in_the_memory_of_base(dtype: torch.dtype, bias: Tensor | None) -> None:
    p = problem(shared=False, dtype=dtype)
    options = {"bias": None if bias is None else bias.to(dtype)}
    expected, base = run(p, **options), p["base"].clone()
    assert torch.equal(p["base"], base)  # untouched unless asked
    y = run(p, **options, base=base, inplace=True)
    assert y.data_ptr() == base.data_ptr() and torch.equal(y, expected)


def test_autocast_takes_x_in_its_dtype() -> None:
    """Off by at most the rounding of each factor, product and sum to bfloat16, 8 in all."""
    p = problem(shared=True, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(p)
    assert y.dtype == torch.float32
    M = definition(p, "weight", absolute=True)
    error = y.double() - definition(p, "weight")
    within(error, 8 * torch.finfo(torch.bfloat16).eps * M)
    assert not torch.equal(y, run(p))
    # x alone is rounded: the arithmetic inside stays float32.
    assert torch.equal(y, run(p, x=p["x"].bfloat16()))


# --- identities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("shared", [True, False])
def test_many_draws_are_as_many_single_runs(shared: bool, noise: str) -> None:
    p = problem(shared=shared)
    y, limit = run(p, noise), 2 * bound(p, noise)
    for s in range(6):
        one = {k: p[k][s : s + 1] for k in ("sigmas", "streams")}
        if not shared:
            one |= {k: p[k][s : s + 1] for k in ("x", "base")}
        within(run(p | one, noise) - y[s : s + 1], limit[s : s + 1])


@pytest.mark.parametrize("noise", NOISE)
def test_shared_input_is_the_same_input_for_every_draw(noise: str) -> None:
    p = problem(shared=True)
    repeated = {k: p[k].expand(6, -1, -1) for k in ("x", "base")}
    within(run(p | repeated, noise) - run(p, noise), 2 * bound(p, noise))


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("shared", [True, False])
def test_sigma_zero_is_the_deterministic_adapter(shared: bool, noise: str) -> None:
    """Whatever the stream, seed and layer, to the bit."""
    p = problem(shared=shared, sigmas=(0.0, -0.0, 0.0), streams=(0, 5, 6))
    y = run(p, noise)
    lora = p["base"] + p["scaling"] * (p["x"] @ p["A"].mT @ p["B"].mT)
    within(y - lora, bound(p, noise))
    assert torch.equal(run(p, noise, seed=99, layer_id=1, streams=[2, 8, 9]), y)


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("shared", [True, False])
def test_antithetic_pairs_average_to_the_mean(shared: bool, noise: str) -> None:
    p = problem(shared=shared, sigmas=(0.8, -0.8, 3.0, -3.0), streams=(1, 1, 9, 9))
    if not shared:
        pairs = {k: p[k][[0, 0, 2, 2]] for k in ("x", "base")}
        p |= pairs
    lora = p["base"] + p["scaling"] * (p["x"] @ p["A"].mT @ p["B"].mT)
    y, limit = run(p, noise), bound(p, noise)
    noise_part = y - lora
    within(noise_part[0::2] + noise_part[1::2], 2 * (limit[0::2] + limit[1::2]))
    assert float(noise_part.abs().mean()) > 1e10 * float(limit.mean())  # it was not all zero
    flipped = run(p, noise, sigmas=-p["sigmas"])
    within((flipped - lora) + noise_part, 4 * limit)


@pytest.mark.parametrize("noise", NOISE)
def test_directions_without_inverse_carry_no_noise(noise: str) -> None:
    """With B the identity, output i has the noise of direction i: none where inv_d is 0."""
    p = problem(shared=True, m=4, r=4)
    p |= {"B": torch.eye(4, dtype=torch.float64), "inv_d": torch.tensor([1.0, 0.0, 2.0, 0.0])}
    noisy, mean = run(p, noise), run(p, noise, sigmas=torch.zeros(6, dtype=torch.float64))
    assert torch.equal(noisy[..., [1, 3]], mean[..., [1, 3]])
    assert bool((noisy != mean)[p["sigmas"] != 0][..., [0, 2]].all())


def test_weight_noise_is_shared_by_tokens_and_token_noise_is_not() -> None:
    p = problem(shared=True, T=1)
    p |= {k: p[k].expand(3, -1) for k in ("x", "base")}
    weight, token = run(p, "weight"), run(p, "token")
    within(weight[:, 1:] - weight[:, :1], 2 * bound(p, "weight")[:, 1:])
    assert bool((token[p["sigmas"] != 0, 1:] != token[p["sigmas"] != 0, :1]).all())


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("shared", [True, False])
def test_no_tokens(shared: bool, noise: str) -> None:
    assert run(problem(shared=shared, T=0), noise).shape == (6, 0, 20)


@pytest.mark.parametrize("shared", [True, False])
def test_pool_and_stream_index_change_no_bit(shared: bool) -> None:
    """In the plain call's own order; in another, other matrix products give the same numbers."""
    p = problem(shared=shared)
    plain, token = run(p), run(p, "token")
    for order in ([4, 2**32 - 1, 0], [0, 4, 2**32 - 1]):
        index = indexed(order, STREAMS)
        E = gaussian_noise(p["seed"], p["layer_id"], order, 4, 24)
        y = run(p, **index)
        assert torch.equal(run(p, **index, pool=E), y)
        assert torch.equal(run(p, "token", **index), token)
        within(y - plain, 2 * bound(p, "weight"))
        if order == list(dict.fromkeys(STREAMS)):
            assert torch.equal(y, plain)


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("shared", [True, False])
def test_draws_per_stream_changes_no_number(shared: bool, noise: str) -> None:
    """Draws that come stream by stream: found by the plain call, promised or not by the caller."""
    streams = (7, 7, 7, 2, 2, 2)
    p = problem(shared=shared, streams=streams)
    index, plain = indexed([7, 2], streams), run(p, noise)
    assert torch.equal(run(p, noise, **index, draws_per_stream=3), plain)
    within(run(p, noise, **index) - plain, 2 * bound(p, noise))
    within(plain - definition(p, noise), bound(p, noise))


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("shared", [True, False])
def test_each_stream_is_generated_once(
    shared: bool, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def counting(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(seed: Tensor, layer_id: int, streams: Tensor, *size: int) -> Tensor:
            asked.append(streams.tolist())
            return make(seed, layer_id, streams, *size)

        return wrapper

    monkeypatch.setattr(reference, "weight_noise", counting(weight_noise))
    monkeypatch.setattr(reference, "token_noise", counting(token_noise))
    p = problem(shared=shared)
    run(p, noise)
    assert sorted(q for streams in asked for q in streams) == [0, 4, 2**32 - 1]
    asked.clear()
    index = {"streams": [0, 4, 2**32 - 1], "stream_index": torch.tensor([1, 1, 2, 0, 1, 0])}
    run(p, noise, **index)
    assert [sorted(streams) for streams in asked] == [[0, 4, 2**32 - 1]]
    if noise == "weight":
        asked.clear()
        run(p, **index, pool=torch.zeros(3, 4, 24))
        assert asked == []


def test_forms_of_the_arguments() -> None:
    """Streams and seed as numbers or tensors, the seed with or without sign: one result."""
    p = problem(shared=True)
    y = run(p)
    for seed in (-7, 2**64 - 7, torch.tensor(-7), torch.tensor([-7])):
        assert torch.equal(run(p, seed=seed), y)
    for streams in (list(STREAMS), STREAMS, torch.tensor(STREAMS)):
        assert torch.equal(run(p, streams=streams), y)


# --- predictive_reduction -----------------------------------------------------------------------


@pytest.mark.parametrize("label_ids", [None, [5, 0, 3], [[5, 0, 3], [1, 2, 3]]])
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_predictive_reduction(dtype: torch.dtype, label_ids: list[Any] | None) -> None:
    """By its definition, one row, draw and unit after the other.

    A softmax of V numbers of magnitude L is off by (V + L + 8) eps relative, its entropy by as
    much of the sum of |p log p|, which is at most log V, plus the sum of p.
    """
    g = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(6, 2, 7, generator=g, dtype=torch.float64)).to(dtype)
    units = torch.tensor([[0, 3], [1, 4], [5, 2]])
    ids = None if label_ids is None else torch.tensor(label_ids)
    probs, total, expected, choices, error = predictive_reduction(logits, units, label_ids=ids)
    eps = torch.finfo(compute_dtype(dtype)).eps
    assert all(t.dtype == compute_dtype(dtype) for t in (probs, total, expected, error))
    for b in range(2):
        columns = slice(None) if ids is None else (ids if ids.dim() == 1 else ids[b])
        kept = logits[:, b].double()[:, columns]
        V = kept.shape[-1]
        tolerance = (V + float(kept.abs().max()) + 8) * eps
        p = [row.exp() / row.exp().sum() for row in kept]
        mean = sum(p) / 6
        unit_means = [(p[i] + p[j]) / 2 for i, j in units.tolist()]
        spread = sum((u - mean) ** 2 for u in unit_means) / (3 - 1)
        entropies = [-(q * q.log()).sum() for q in [*p, mean]]
        slack = tolerance * (1 + math.log(V)) * 2
        within(probs[b].double() - mean, tolerance * mean)
        within(total[b].double() - entropies[-1], torch.tensor(slack))
        within(expected[b].double() - sum(entropies[:6]) / 6, torch.tensor(slack))
        within(error[b].double() - (spread / 3).sqrt(), 3 * tolerance * (mean + spread.sqrt()))
        assert choices[:, b].tolist() == [int(row.argmax()) for row in kept]


def test_draws_are_their_own_units_by_default() -> None:
    logits = torch.linspace(-2, 3, 24).view(4, 2, 3).sin()
    for a, b in zip(
        predictive_reduction(logits),
        predictive_reduction(logits, torch.arange(4)[:, None]),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert bool(predictive_reduction(logits, torch.arange(4)[None])[-1].isnan().all())


# --- torch operators ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shared", "noise", "dtype", "pooled", "biased"),
    [
        (True, "weight", torch.float32, False, True),
        (False, "weight", torch.bfloat16, True, False),
        (True, "token", torch.float64, False, False),
        (False, "token", torch.float32, False, True),
    ],
)
def test_opcheck_bayes_lora_linear(
    shared: bool, noise: str, dtype: torch.dtype, pooled: bool, biased: bool
) -> None:
    p = problem(shared=shared, dtype=dtype)
    streams, index = indexed([4, 0, 2**32 - 1], STREAMS).values()
    pool = gaussian_noise(3, 1, streams, 4, 24) if pooled else None
    bias = torch.ones(20, dtype=dtype) if biased else None
    tensors = [p[k] for k in ("x", "base", "A", "B", "inv_d", "sigmas")]
    args = (*tensors, streams, index, 1, torch.tensor(3), 1, 0.5, noise, pool, bias, "reference")
    torch.library.opcheck(torch.ops.tfb.bayes_lora_linear.default, args)
    if not shared:
        torch.library.opcheck(torch.ops.tfb.bayes_lora_linear_.default, args)


def test_opcheck_gaussian_noise() -> None:
    args = (torch.tensor(5), 3, torch.tensor([1, 2**32 - 1]), 3, 7)
    torch.library.opcheck(torch.ops.tfb.gaussian_noise.default, args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck_predictive_reduction(dtype: torch.dtype) -> None:
    args = (torch.randn(4, 3, 5).to(dtype), torch.tensor([[0, 1], [2, 3]]), "reference")
    torch.library.opcheck(torch.ops.tfb.predictive_reduction.default, args)


def test_compile_gaussian_noise() -> None:
    compiled_once(lambda seed: gaussian_noise(seed, 3, [0, 9], 4, 6) * 2)


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("shared", [True, False])
def test_compile_bayes_lora_linear(shared: bool, noise: str) -> None:
    p = problem(shared=shared, dtype=torch.float32) | {"streams": list(STREAMS)}
    compiled_once(lambda seed: bayes_lora_linear(**{**p, "seed": seed}, noise=noise).relu())


def test_compile_with_a_pool() -> None:
    """A caller's own graph: the pool is generated and used inside it, seed and all."""
    p = problem(shared=True, dtype=torch.float32)
    index = indexed([4, 0, 2**32 - 1], STREAMS)

    def function(seed: Tensor) -> Tensor:
        E = gaussian_noise(seed, p["layer_id"], index["streams"], 4, 24)
        return bayes_lora_linear(**{**p, **index, "seed": seed, "pool": E})

    compiled_once(function)


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_with_a_number_as_seed(inplace: bool) -> None:
    p = problem(shared=False, dtype=torch.float32) | {"streams": list(STREAMS)}
    expected = bayes_lora_linear(**p)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, base: bayes_lora_linear(**{**p, "x": x, "base": base}, inplace=inplace),
        fullgraph=True,
        backend="aot_eager",
    )
    base = p["base"].clone()
    assert torch.equal(compiled(p["x"], base), expected)
    assert torch.equal(base, expected if inplace else p["base"])
    torch._dynamo.reset()


def test_compile_predictive_reduction() -> None:
    torch._dynamo.reset()
    logits, units = torch.randn(4, 3, 6), torch.tensor([[0, 1], [2, 3]])

    def function(logits: Tensor) -> list[Tensor]:
        return [t * 1 for t in predictive_reduction(logits, units, label_ids=torch.tensor([1, 4]))]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(logits), function(logits), strict=True):
        assert torch.equal(actual, expected)
    torch._dynamo.reset()


# --- errors -------------------------------------------------------------------------------------

SIX = torch.ones(6, dtype=torch.float64)
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"impl": "cuda"}, "impl='cuda': expected one of auto, triton, reference"),
    ({"noise": "flipout"}, "noise='flipout': expected one of weight, token"),
    ({"layer_id": -1}, "layer_id=-1: expected an unsigned 32-bit number"),
    ({"layer_id": 2**32}, "layer_id=4294967296: expected an unsigned 32-bit"),
    ({"seed": 2**64}, f"seed={2**64}: expected 64 bits"),
    ({"seed": -(2**63) - 1}, f"seed={-(2**63) - 1}: expected 64 bits"),
    ({"seed": torch.tensor(1.0)}, r"seed: expected one int64 value, got torch.float32 \[\]"),
    ({"seed": torch.tensor([1, 2])}, r"seed: expected one int64 value, got torch.int64 \[2\]"),
    ({"streams": [0, 1, 2, 3, 4, -1]}, "streams: -1 is not an unsigned 32-bit number"),
    ({"streams": [0, 1, 2, 3, 4, 2**32]}, "streams: 4294967296 is not an unsigned 32-bit"),
    ({"streams": torch.ones(6)}, r"streams: expected integers \[Q\], got torch.float32 \[6\]"),
    ({"streams": torch.ones(2, 3, dtype=torch.int64)}, r"streams: expected integers .* \[2, 3\]"),
    ({"streams": [0, 1, 2]}, r"streams: expected \[6\], one for each of sigmas, got \[3\]"),
    ({"x": torch.ones(5, 24, dtype=torch.int64)}, "x: torch.int64 is not a supported"),
    ({"base": torch.ones(5, 20, dtype=torch.int8)}, "base: torch.int8 is not a supported"),
    ({"A": torch.ones(4, 24, dtype=torch.bool)}, "A: torch.bool is not a supported"),
    ({"B": torch.ones(20, 4, dtype=torch.complex64)}, "B: torch.complex64 is not a supported"),
    ({"A": torch.ones(24)}, r"A: expected \[r, n\], got \[24\]"),
    ({"B": torch.ones(20, 5)}, r"B: expected \[m, 4\], with A \[4, 24\], got \[20, 5\]"),
    ({"B": torch.ones(4)}, r"B: expected \[m, 4\], with A \[4, 24\], got \[4\]"),
    ({"inv_d": torch.ones(3)}, r"inv_d: expected \[4\], got \[3\]"),
    ({"sigmas": torch.ones(())}, r"sigmas: expected \[S\], S at least 1, got \[\]"),
    ({"sigmas": torch.ones(0)}, r"sigmas: expected \[S\], S at least 1, got \[0\]"),
    ({"x": torch.ones(5, 23)}, r"x: expected \[T, 24\] or \[6, T, 24\], got \[5, 23\]"),
    ({"x": torch.ones(24)}, r"x: expected \[T, 24\] or \[6, T, 24\], got \[24\]"),
    ({"x": torch.ones(4, 5, 24)}, r"x: expected \[6, T, 24\], one input .* got \[4, 5, 24\]"),
    ({"base": torch.ones(5, 19)}, r"base: expected \[5, 20\], like x, got \[5, 19\]"),
    ({"base": torch.ones(6, 5, 20)}, r"base: expected \[5, 20\], like x, got \[6, 5, 20\]"),
    ({"stream_index": torch.zeros(5).long()}, r"stream_index: expected \[6\], got \[5\]"),
    ({"pool": torch.ones(6, 4, 24)}, "pool: needs stream_index and noise='weight'"),
    (
        {"pool": torch.ones(6, 4, 24), "stream_index": torch.arange(6), "noise": "token"},
        "pool: needs stream_index and noise='weight'",
    ),
    (
        {"pool": torch.ones(5, 4, 24), "stream_index": torch.arange(6)},
        r"pool: expected \[6, 4, 24\], got \[5, 4, 24\]",
    ),
    (
        {"draws_per_stream": 0, "stream_index": torch.arange(6)},
        "draws_per_stream=0: does not divide 6 draws over 6 streams",
    ),
    (
        {"draws_per_stream": 4, "streams": [0, 1], "stream_index": torch.zeros(6).long()},
        "draws_per_stream=4: does not divide 6 draws over 2 streams",
    ),
    ({"bias": torch.ones(19)}, r"bias: expected \[20\], got \[19\]"),
    ({"inplace": True}, r"inplace: needs x \[S, T, n\]"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ARGUMENTS, ids=range(len(BAD_ARGUMENTS)))
def test_bad_argument(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bayes_lora_linear(**{**problem(shared=True), **bad})


def test_per_draw_base_must_follow_x() -> None:
    p = problem(shared=False)
    with pytest.raises(ValueError, match=r"base: expected \[6, 5, 20\], like x, got \[5, 20\]"):
        run(p, base=p["base"][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, [0], -1, 3), "r=-1, n=3: sizes cannot be negative"),
        ((0, 0, [0], 3, -1), "r=3, n=-1: sizes cannot be negative"),
        ((0, -1, [0], 3, 3), "layer_id=-1"),
        ((2**64, 0, [0], 3, 3), "seed=18446744073709551616"),
        ((torch.tensor(0, dtype=torch.int32), 0, [0], 3, 3), "seed: expected one int64 value"),
        ((0, 0, [2**32], 3, 3), "streams: 4294967296"),
        ((0, 0, torch.zeros(1), 3, 3), "streams: expected integers"),
    ],
)
def test_bad_noise_argument(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian_noise(*arguments)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(3, 4),), {}, r"logits: expected floats \[S, B, V\], got \[3, 4\]"),
        ((torch.ones(3, 4, 5).long(),), {}, "logits: expected floats"),
        ((torch.ones(0, 4, 5),), {}, r"logits: expected floats .* \[0, 4, 5\]"),
        ((torch.ones(3, 4, 0),), {}, r"logits: expected floats .* \[3, 4, 0\]"),
        ((torch.ones(3, 4, 5), torch.arange(3)), {}, r"units: expected int64 \[U, D\] with"),
        ((torch.ones(3, 4, 5), torch.ones(1, 2).long()), {}, r"U D = 3, got \[1, 2\]"),
        ((torch.ones(3, 4, 5), torch.ones(3, 1)), {}, "units: expected int64"),
        ((torch.ones(3, 4, 5),), {"label_ids": torch.ones(3, 2)}, r"label_ids: expected \[K\]"),
        ((torch.ones(3, 4, 5),), {"label_ids": torch.ones(0)}, r"\[4, K\], got \[0\]"),
        ((torch.ones(3, 4, 5),), {"impl": "fast"}, "impl='fast': expected one of"),
    ],
)
def test_bad_reduction_argument(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        predictive_reduction(*arguments, **options)


def test_inplace_needs_contiguous_memory() -> None:
    p = problem(shared=False)
    with pytest.raises(ValueError, match="contiguous base"):
        run(p, base=p["base"].mT.contiguous().mT, inplace=True)


def test_an_implementation_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a silent fallback, whatever keeps it from running; "auto" takes what can."""
    p, logits = problem(shared=True, dtype=torch.float32), torch.ones(2, 3, 4)
    with pytest.raises(ImplementationUnavailableError, match="impl='triton' cannot run here"):
        run(problem(shared=True, dtype=torch.float64), impl="triton")
    monkeypatch.setattr(ops, "HAS_TRITON", False)
    for call in (
        lambda impl: run(p, impl=impl),
        lambda impl: predictive_reduction(logits, impl=impl)[0],
    ):
        with pytest.raises(ImplementationUnavailableError, match="triton is not installed"):
            call("triton")
        assert torch.equal(call("auto"), call("reference"))


def test_token_and_kept_noise_are_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too: "auto" takes it, and "triton" by name says what to do."""
    p = problem(shared=True, dtype=torch.float32)
    index = indexed([4, 2**32 - 1, 0], STREAMS)
    pool = gaussian_noise(p["seed"], p["layer_id"], index["streams"], 4, 24)
    monkeypatch.setattr(ops, "resolve_impl", lambda impl, *_: "triton")
    with pytest.raises(ImplementationUnavailableError, match="use impl='reference' or impl='auto'"):
        run(p, "token", impl="triton")
    token = run(p, "token", impl="auto")
    with pytest.raises(ValueError, match="pool: impl='triton' makes its noise in registers"):
        run(p, **index, pool=pool, impl="triton")
    kept = run(p, **index, pool=pool, impl="auto")
    monkeypatch.undo()
    assert torch.equal(kept, run(p, **index, pool=pool))
    assert torch.equal(token, run(p, "token"))


@pytest.mark.parametrize("bad", [-1, 1 << 32])
def test_streams_in_a_tensor_are_checked_too(bad: int) -> None:
    with pytest.raises(ValueError, match="not an unsigned 32-bit number"):
        gaussian_noise(0, 0, torch.tensor([0, bad]), 2, 3)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("size", [(0, 3), (2, 0)])
def test_an_adapter_without_rank_or_features_is_refused(size: tuple[int, int], impl: str) -> None:
    (r, n), m = size, 4
    shapes = ((5, n), (5, m), (r, n), (m, r), (r,), (2,))
    device = "cuda" if torch.cuda.is_available() else "cpu"  # else triton has no use for them
    tensors = [torch.zeros(shape, device=device) for shape in shapes]
    with pytest.raises(ValueError, match="r and n at least 1"):
        bayes_lora_linear(*tensors, [0, 0], seed=0, layer_id=0, scaling=1.0, impl=impl)


def test_predictive_reduction_of_no_rows() -> None:
    """Empty in, empty out, and no warning."""
    probs, total, expected, argmax, error = predictive_reduction(torch.randn(4, 0, 3))
    assert probs.shape == error.shape == (0, 3) and argmax.shape == (4, 0)
    assert total.shape == expected.shape == (0,)


def test_compile_with_streams_in_a_tensor() -> None:
    """Inside a compiled graph streams are not looked at, and give the same values."""
    p = problem(shared=True)

    def function(streams: Tensor) -> Tensor:
        return run(p, streams=streams)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    within(compiled(p["streams"]) - function(p["streams"]), 2 * bound(p, "weight"))
