"""``BayesLoRALinear``: samples around a frozen layer, with neither PEFT nor transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.calls import functions_entered
from torch import Tensor, nn

import tfb.linear
from tfb import BayesLoRALinear, Draws
from tfb.draws import stable_layer_id
from tfb.posterior import AdapterError
from tfb_kernels import gaussian_noise

N, M, R = 12, 9, 4
F64 = torch.float64
EPS = torch.finfo(F64).eps
DRAWS = Draws.antithetic(6, 0.3, seed=11)


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def lora(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return (randn(R, N, seed=1) / N**0.5).to(dtype), randn(M, R, seed=2).to(dtype)


def make(
    layer_id: int = 5, *, dtype: torch.dtype = F64, factors: torch.dtype = F64
) -> BayesLoRALinear:
    base = nn.Linear(N, M, dtype=dtype).requires_grad_(False)
    base.weight.copy_(randn(M, N, seed=3) / N**0.5)
    base.bias.copy_(randn(M, seed=4))
    return BayesLoRALinear.from_weights(base, *lora(factors), -1.5, layer_id=layer_id)


def rounding(layer: BayesLoRALinear, x: Tensor, sigma: float = 0.0) -> float:
    """Bound for base and update in either order: two chains of N + R + 8 roundings each.

    The noise is at most 6.77 (the contract's smallest u), so it adds that times sigma / d.
    """
    p, base = layer.posterior, layer.base
    factor = p.A.double().abs() + 6.77 * sigma * p.inv_d[:, None]
    assert isinstance(base, nn.Linear)
    terms = x.double().abs() @ (base.weight.double().abs() + 1.5 * p.B.double().abs() @ factor).mT
    return float(2 * (N + R + 8) * EPS * (terms + base.bias.double().abs()).max())


def calls_of(module: nn.Module) -> list[tuple[int, ...]]:
    """The input shapes that ``module`` will have been called with."""
    seen: list[tuple[int, ...]] = []
    module.register_forward_hook(lambda _m, inputs, _y: seen.append(tuple(inputs[0].shape)))
    return seen


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3)])
def test_without_draws_it_is_the_adapter(lead: tuple[int, ...]) -> None:
    layer, x, (A, B) = make(), randn(*lead, N), lora()
    y = layer(x)
    assert y.shape == (*lead, M)
    expected = layer.base(x) - 1.5 * (x @ (B @ A).mT)
    slack = rounding(layer, x) + 100 * EPS * float(A.norm() * B.norm() * x.norm())  # SVD
    assert float((y - expected).abs().max()) <= slack


@pytest.mark.parametrize("per_draw", [False, True])
def test_samples_are_weight_samples(per_draw: bool) -> None:
    """y_s = base(x) + x dW_s^T with the posterior's own sampled dW."""
    layer = make()
    x = randn(len(DRAWS), 5, N) if per_draw else randn(5, N)
    y = layer(x, DRAWS)
    assert y.shape == (len(DRAWS), 5, M)
    for s, (sigma, stream) in enumerate(zip(DRAWS.sigmas, DRAWS.streams, strict=True)):
        x_s = x[s] if per_draw else x
        expected = layer.base(x_s) + x_s @ layer.posterior.sample(sigma, stream, seed=11).mT
        assert float((y[s] - expected).abs().max()) <= rounding(layer, x, 0.3)


@pytest.mark.parametrize("noise", ["weight", "token"])
def test_sigma_zero_is_the_layer_without_draws(noise: str) -> None:
    layer, x = make(), randn(5, N)
    y = layer(x, Draws.iid(3, 0.0, noise=noise))
    assert float((y - layer(x)).abs().max()) <= rounding(layer, x)


@pytest.mark.parametrize("noise", ["weight", "token"])
def test_shared_input_is_the_same_input_for_every_draw(noise: str) -> None:
    layer, x = make(), randn(5, N)
    draws = Draws.antithetic(6, 0.3, noise=noise)
    # Covers token noise too: its |x_t| is at most the sum of the |x_tj|.
    slack = rounding(layer, x, 0.3)
    assert float((layer(x.expand(6, 5, N), draws) - layer(x, draws)).abs().max()) <= slack


def test_chunks_of_draws_are_the_same_draws() -> None:
    layer, x = make(), randn(5, N)
    chunks = torch.cat([layer(x, DRAWS[s : s + 4]) for s in range(0, 6, 4)])
    assert float((chunks - layer(x, DRAWS)).abs().max()) <= rounding(layer, x, 0.3)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_result_has_the_dtype_of_the_base(dtype: torch.dtype, factors: torch.dtype) -> None:
    layer, x = make(dtype=dtype, factors=factors), randn(5, N).to(dtype)
    assert layer(x).dtype == layer(x, DRAWS).dtype == dtype


def test_any_module_can_be_the_base() -> None:
    base = nn.Sequential(nn.Linear(N, 3, dtype=F64), nn.Linear(3, M, dtype=F64))
    layer = BayesLoRALinear.from_weights(base, *lora(), 1.0)
    assert layer(randn(5, N), DRAWS).shape == (6, 5, M)


# --- what runs how often ------------------------------------------------------------------------


def test_base_runs_once_on_what_it_is_given() -> None:
    """Shared x is not repeated for the base; one input for each draw goes through in one call."""
    layer = make()
    seen = calls_of(layer.base)
    layer(randn(5, N), DRAWS)
    layer(randn(6, 5, N), DRAWS)
    layer(randn(5, N))
    assert seen == [(5, N), (6, 5, N), (5, N)]


def count_generation(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    asked: list[list[int]] = []

    def counting(seed: Any, layer_id: int, streams: Tensor, r: int, n: int) -> Tensor:
        asked.append(streams.tolist())
        return gaussian_noise(seed, layer_id, streams, r, n)

    monkeypatch.setattr(tfb.linear, "gaussian_noise", counting)
    return asked


def test_noise_is_kept_while_the_streams_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other batches, other sigmas and equal draws use it again; other streams or seeds do not."""
    asked = count_generation(monkeypatch)
    layer = make()
    first = layer(randn(5, N), DRAWS)
    layer(randn(6, 3, N), DRAWS)
    layer(randn(5, N), Draws.antithetic(6, 0.9, seed=11))
    layer(randn(5, N), Draws.iid(3, 0.3, seed=11))
    assert asked == [[0, 1, 2]]
    layer(randn(5, N), Draws.antithetic(6, 0.3, seed=12))
    layer(randn(5, N), Draws.iid(2, 0.3, seed=12))
    layer(randn(5, N), Draws.iid(2, 0.3, seed=12, first_stream=7))
    assert torch.equal(layer(randn(5, N), DRAWS), first)
    assert asked == [[0, 1, 2], [0, 1, 2], [7, 8], [0, 1, 2]]


def test_draws_in_parts_generate_each_stream_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the draws, again and in any order, give the bits of a layer that saw only them."""
    layer, x = make(), randn(5, N)
    several = [Draws.iid(2, 0.3, first_stream=q) for q in (0, 2, 4)]
    several += [Draws((0.1, 0.2, 0.3), (5, 0, 3)), Draws.iid(6, 0.3)]
    expected = [make()(x, draws) for draws in several]
    asked = count_generation(monkeypatch)
    for _ in range(2):
        assert all(torch.equal(layer(x, d), y) for d, y in zip(several, expected, strict=True))
    assert asked == [[0, 1], [2, 3], [4, 5]]
    pool = layer.sampler._pool
    assert pool is not None and sorted(pool.places) == [0, 1, 2, 3, 4, 5]


def test_kept_streams_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound the streams in use replace the others; the values stay."""
    monkeypatch.setattr(tfb.linear, "KEPT_STREAMS", 3)
    layer, x = make(), randn(5, N)
    for first in (0, 1, 5, 0):
        draws = Draws.iid(3, 0.3, first_stream=first)
        assert torch.equal(layer(x, draws), make()(x, draws))
        pool = layer.sampler._pool
        assert pool is not None and set(draws.streams) == set(pool.places)


def test_release_forgets_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_generation(monkeypatch)
    layer, x = make(), randn(5, N)
    first = layer(x, DRAWS)
    layer.sampler.release()
    assert layer.sampler._pool is None and not layer.sampler._factors
    assert torch.equal(layer(x, DRAWS), first) and len(asked) == 2


def test_token_noise_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_generation(monkeypatch)
    layer = make()
    layer(randn(5, N), Draws.iid(3, 0.3, noise="token"))
    assert asked == [] and layer.sampler._pool is None


def test_threads_with_different_draws() -> None:
    """A thread never gets the noise that another one's draws left behind."""
    layer, x = make(), randn(5, N)
    several = [Draws.antithetic(4, 0.3, seed=s) for s in range(3)]
    expected = [layer(x, draws) for draws in several]
    with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = list(pool.map(lambda i: (i % 3, layer(x, several[i % 3])), range(90)))
    assert all(torch.equal(y, expected[i]) for i, y in results)


# --- identity of the noise ----------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["weight", "token"])
def test_layers_share_noise_only_if_they_share_the_id(noise: str) -> None:
    x, draws = randn(5, N), Draws.iid(4, 0.3, noise=noise)
    a, b, other = make(5)(x, draws), make(5)(x, draws), make(6)(x, draws)
    assert torch.equal(a, b)
    assert bool((a != other).all())


def test_layers_without_an_id_share_no_noise() -> None:
    """Made from equal weights, two layers draw independently."""
    a, b = (BayesLoRALinear.from_weights(nn.Linear(N, M), *lora(), 1.0) for _ in range(2))
    assert a.posterior.layer_id != b.posterior.layer_id
    streams = range(200)
    drawn = [gaussian_noise(0, t.posterior.layer_id, streams, R, N).flatten() for t in (a, b)]
    # The correlation of k independent pairs of normals has standard error k^-1/2.
    assert abs(float(torch.corrcoef(torch.stack(drawn))[0, 1])) < 4 * drawn[0].numel() ** -0.5


# Also run as text, here and in a second process: no PEFT, no transformers, the same numbers.
SCRIPT = """
import hashlib, sys, torch
import tfb, tfb_kernels
torch.set_num_threads(1)  # another number of threads adds in another order
from tfb.draws import stable_layer_id
g = torch.Generator().manual_seed(0)
A, B, x = (torch.randn(*s, generator=g) for s in ((4, 12), (9, 4), (5, 12)))
base = torch.nn.Linear(12, 9)
torch.nn.init.constant_(base.weight, 0.25), torch.nn.init.zeros_(base.bias)
name = "model.layers.0.mlp.up_proj"
layer = tfb.BayesLoRALinear.from_weights(base, A, B, 2.0, layer_id=stable_layer_id(name))
y = layer(x, tfb.Draws.iid(10, sigma=0.01, seed=3)).detach()
E = tfb_kernels.gaussian_noise(3, stable_layer_id(name), range(10), 4, 12)
digest = hashlib.sha256(E.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
"""


def test_alone_and_the_same_in_every_process() -> None:
    report = """
print(digest)
print(*sorted({m.split(".")[0] for m in sys.modules} & {"peft", "transformers"}))
"""
    other = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT + report],
        check=True,
        capture_output=True,
        text=True,
    )
    here: dict[str, Any] = {}
    exec(SCRIPT, here)
    assert other.stdout == f"{here['digest']}\n\n"


# --- the module ---------------------------------------------------------------------------------


def test_only_the_base_has_parameters() -> None:
    layer = make(stable_layer_id("a.b"))
    assert [name for name, _ in layer.named_parameters()] == ["base.weight", "base.bias"]
    assert list(layer.buffers()) == []
    assert "rank=4, scaling=-1.5, layer_id=" in repr(layer)
    assert layer.posterior is layer.sampler.posterior and layer.posterior.scaling == -1.5


def other(factors: torch.dtype = F64) -> BayesLoRALinear:
    """A layer of the same shapes and other weights."""
    A, B = (t.roll(1, 0).to(factors) for t in lora())
    return BayesLoRALinear.from_weights(nn.Linear(N, M, dtype=F64), A, B, 0.5)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("factors", [torch.float32, F64])
def test_a_state_dict_brings_the_draws(factors: torch.dtype, assign: bool, tmp_path: Path) -> None:
    """Through a file, bit for bit, into a layer that has already drawn from another posterior."""
    layer, x = make(factors=factors), randn(5, N)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    assert set(state) == {"base.weight", "base.bias", "A", "B", "d", "scaling", "layer_id"}
    loaded = other(F64)
    loaded(x, DRAWS)
    loaded.load_state_dict(state, assign=assign)
    assert loaded.posterior.A.dtype == factors
    assert torch.equal(loaded(x, DRAWS), layer(x, DRAWS)) and torch.equal(loaded(x), layer(x))
    kept = loaded.posterior.A.clone()
    state["A"].zero_()
    assert torch.equal(loaded.posterior.A, kept) != assign


def test_a_state_dict_is_one_of_many() -> None:
    """Nested, in a list, beside other modules; keys of neighbours do not mix."""
    nets = [nn.ModuleList([nn.Linear(2, 2), make(5), other()]), nn.ModuleList([nn.Linear(2, 2)])]
    nets[1].extend([other(), make(6)])
    nets[1].load_state_dict(nets[0].state_dict())
    x = randn(5, N)
    assert all(
        torch.equal(a(x, DRAWS), b(x, DRAWS)) for a, b in zip(nets[0][1:], nets[1][1:], strict=True)
    )


def test_casts_leave_the_posterior() -> None:
    layer = make()
    before = {k: layer.state_dict()[k].clone() for k in ("A", "B", "d", "scaling")}
    for cast in (layer.half(), layer.bfloat16(), layer.float(), layer.double()):
        assert all(torch.equal(cast.state_dict()[k], t) for k, t in before.items())
    layer = make().float()
    expected = make(dtype=torch.float32)(randn(5, N).float(), DRAWS)
    assert torch.equal(layer(randn(5, N).float(), DRAWS), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": randn(R, N + 1)}, r"size mismatch for A: .*\[4, 13\]"),
        ({"d": randn(R + 1)}, "size mismatch for d"),
        ({"B": None}, 'Missing key.*"B"'),
        ({"C": randn(1)}, 'Unexpected key.*"C"'),
        (
            {"A": randn(R, N).half()},
            "A: expected torch.float32 or torch.float64, got torch.float16",
        ),
        ({"d": torch.ones(R)}, "d: expected torch.float64, got torch.float32"),
        ({"B": torch.full((M, R), torch.nan)}, "B: holds NaN or Inf"),
        ({"layer_id": torch.tensor(1 << 32)}, "layer_id: 4294967296 is not an unsigned 32-bit"),
    ],
)
def test_state_that_cannot_be_loaded(change: dict[str, Any], message: str) -> None:
    """An error that names the tensor; the posterior stays."""
    layer, before = make(), make()(randn(5, N), DRAWS)
    state = {k: v for k, v in (other().state_dict() | change).items() if v is not None}
    kept = layer.posterior
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    if change.keys() != {"C"}:
        assert layer.posterior is kept
        layer.base = make().base
        assert torch.equal(layer(randn(5, N), DRAWS), before)


def test_a_lenient_load_without_factors_keeps_them() -> None:
    """State of version 0.1.0 has the base alone."""
    layer, kept = make(), make().posterior
    base = {k: v for k, v in other().state_dict().items() if k.startswith("base.")}
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(base)
    missing = layer.load_state_dict(base, strict=False).missing_keys
    assert missing == ["A", "B", "d", "scaling", "layer_id"]
    assert torch.equal(layer.posterior.A, kept.A) and layer.posterior.layer_id == kept.layer_id


def test_a_deep_copy_draws_the_same_and_stands_alone() -> None:
    layer, x = make(), randn(5, N)
    expected = layer(x, DRAWS)
    copy = deepcopy(layer)
    layer.load_state_dict(other().state_dict())
    assert torch.equal(copy(x, DRAWS), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer: layer(randn(N), DRAWS), r"x: expected \[T, 12\] or \[6, T, 12\], one"),
        (lambda layer: layer(randn(1, 6, 5, N), DRAWS), r"x: expected .* got \[1, 6, 5, 12\]"),
        (
            lambda layer: layer(randn(5, 5, N), DRAWS),
            r"x: expected .* one input for each draw, got",
        ),
    ],
)
def test_wrong_inputs(call: Callable[[BayesLoRALinear], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make())


@pytest.mark.parametrize(
    ("n", "m", "message"),
    [
        (N + 1, M, "base.in_features is 13, but A and B imply 12"),
        (N, M - 1, "base.out_features is 8, but A and B imply 9"),
    ],
)
def test_base_that_does_not_fit(n: int, m: int, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        BayesLoRALinear.from_weights(nn.Linear(n, m), *lora(), 1.0)


def test_untrained_adapter_is_refused() -> None:
    with pytest.raises(AdapterError, match="lora_B is zero"):
        BayesLoRALinear.from_weights(nn.Linear(N, M), lora()[0], torch.zeros(M, R), 1.0)


# --- host time ------------------------------------------------------------------------------------


def python_calls(call: Callable[[], object]) -> int:
    """Python functions entered in a call, itself left out, once everything is cached."""
    for _ in range(2):
        call()
    return functions_entered(call)["call"] - 1


@torch.no_grad()
def test_a_layer_call_is_thin() -> None:
    """A decoded token passes hundreds of layers, and each call is Python before it is arithmetic:
    adding an update enters at most 25 functions, merging at most 35."""
    layer = make()
    x, base, bias = randn(6, 3, N), randn(6, 3, M), layer.base.bias
    assert python_calls(lambda: layer.sampler(x, base, DRAWS, inplace=True)) <= 25
    weight = layer.base.weight
    assert python_calls(lambda: layer.sampler.merged(x, weight, bias, DRAWS)) <= 35
