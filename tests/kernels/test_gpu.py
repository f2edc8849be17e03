"""What only a GPU can show: graphs, compilation, autocast, the noise of another device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tfb_kernels import bayes_lora_linear, bayes_lora_merge, gaussian_noise
from tfb_kernels.noise import weight_noise
from tfb_kernels.testing import (
    eager_weight_samples,
    error_budget,
    exact_weight_samples,
    noise_allowance,
    rounding_allowance,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU; none here"
)

S, T, N, M, R = 10, 48, 256, 320, 16
STREAMS = [s // 2 for s in range(S)]


def operands(dtype: torch.dtype, *, shared: bool) -> dict[str, Any]:
    """Arguments of one layer on the GPU."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = (T,) if shared else (S, T)
    p: dict[str, Any] = {
        "x": randn(*rows, N).to(dtype),
        "base": randn(*rows, M).to(dtype),
        "A": randn(R, N) / N**0.5,
        "B": randn(M, R) / R**0.5,
        "inv_d": (torch.rand(R, generator=generator) + 0.5) / N**0.5,
        "sigmas": torch.tensor([(-1.0) ** s for s in range(S)]),
    }
    return {k: v.cuda() for k, v in p.items()}


def layer(p: dict[str, Any], seed: Tensor, streams: Tensor, index: Tensor) -> Tensor:
    given: dict[str, Any] = {"stream_index": index, "draws_per_stream": 2, "seed": seed}
    return bayes_lora_linear(*p.values(), streams, **given, layer_id=7, scaling=2.0, impl="triton")


def device_streams() -> tuple[Tensor, Tensor]:
    return torch.arange(S // 2).cuda(), torch.tensor(STREAMS).cuda()


def check(p: dict[str, Any], seed: int, y: Tensor) -> None:
    """y within twice the eager error of the definition, noise rounding allowed for."""
    cpu = {k: v.cpu() for k, v in p.items()}
    options: dict[str, Any] = {"seed": seed, "layer_id": 7, "scaling": 2.0}
    streams = torch.tensor(STREAMS)
    exact = exact_weight_samples(**cpu, streams=streams, **options)
    eager = eager_weight_samples(**cpu, streams=streams, **options)
    allowed = error_budget(exact, eager) + rounding_allowance(exact, p["base"], p["x"].dtype)
    allowed += noise_allowance(p["x"], p["B"], p["inv_d"], p["sigmas"], 2.0)
    assert float((y.cpu().double() - exact).abs().max()) <= allowed


def test_noise_equals_the_cpu() -> None:
    """1e-6 RMS, 1e-3 at worst, over four million normals."""
    E = gaussian_noise(3, 9, [0, 1, 2**32 - 1, 5], 256, 4096, device="cuda").cpu()
    exact = weight_noise(torch.tensor(3), 9, torch.tensor([0, 1, 2**32 - 1, 5]), 256, 4096)
    error = (E.double() - exact.double()).abs()
    assert float(error.max()) <= 1e-3
    assert float(error.square().mean().sqrt()) <= 1e-6


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_graph_replay_sees_a_new_seed(dtype: torch.dtype, shared: bool) -> None:
    """Captured once; writing another seed into the tensor gives that seed's draws."""
    p = operands(dtype, shared=shared)
    seed = torch.tensor(1).cuda()
    streams, index = device_streams()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        layer(p, seed, streams, index)  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(p, seed, streams, index)
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        check(p, value, y.clone())


@pytest.mark.parametrize("shared", [True, False])
def test_compiled_without_graph_breaks(shared: bool) -> None:
    """fullgraph=True, with inductor, and a new seed without compiling again."""
    p = operands(torch.bfloat16, shared=shared)
    streams, index = device_streams()
    compiled = torch.compile(layer, fullgraph=True)
    for value in (1, 2):
        check(p, value, compiled(p, torch.tensor(value).cuda(), streams, index))


@pytest.mark.parametrize("shared", [True, False])
def test_bitwise_equal_run_to_run(shared: bool) -> None:
    p = operands(torch.bfloat16, shared=shared)
    streams, index = device_streams()
    first = layer(p, torch.tensor(4).cuda(), streams, index)
    for _ in range(5):
        assert layer(p, torch.tensor(4).cuda(), streams, index).equal(first)


def test_graph_replay_merges_a_new_seed() -> None:
    """W_s of a captured launch has the noise of the seed that is in memory when it runs."""
    p = operands(torch.bfloat16, shared=False)
    weight, seed = torch.zeros(len(p["B"]), p["A"].shape[1]).cuda().bfloat16(), torch.tensor(1)
    streams, index = device_streams()
    factors = [p[k] for k in ("A", "B", "inv_d", "sigmas")]

    def merge(seed: Tensor) -> Tensor:
        return bayes_lora_merge(
            weight, *factors, streams, stream_index=index, seed=seed, layer_id=7, scaling=2.0
        )

    held = seed.cuda()
    merge(held)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged = merge(held)
    for value in (1, 2):
        held.fill_(value)
        graph.replay()
        assert merged.equal(merge(torch.tensor(value).cuda()))
        assert merged.isfinite().all() and merged.any()


def test_autocast_takes_x_in_its_dtype() -> None:
    p = operands(torch.float32, shared=True)
    streams, index = device_streams()
    seed = torch.tensor(4).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(p, seed, streams, index)
    assert y.equal(layer(p | {"x": p["x"].bfloat16()}, seed, streams, index))


@pytest.mark.parametrize("merging", ["always", "never"])
def test_a_model_on_the_gpu_gives_the_draws_of_the_cpu(merging: str) -> None:
    """The embedded demo's model in float32: probabilities of every draw, CPU against GPU.

    Budget: logits of order 10 through three layers; float32 products differ by about 1e-6 of
    their operands and the normals by 1e-6 RMS, so 1e-3 in a probability would be a wrong draw.
    """
    import tfb
    from tfb.demo import digits

    ids = torch.randint(3, 20, (4, 66), generator=torch.Generator().manual_seed(0))
    draws = tfb.Draws.antithetic(4, 0.01, seed=3)
    found = []
    for device in ("cpu", "cuda"):
        model = tfb.load_adapter(tfb.load_base(digits.BASE, digits.ADAPTER), digits.ADAPTER)
        bayes = tfb.bayesianize(model.to(device))
        bayes.merging = merging
        found.append(bayes.predict({"input_ids": ids}, draws, keep_draws=True).draw_probs)
    assert found[0] is not None and found[1] is not None
    assert float((found[0] - found[1].cpu()).abs().max()) <= 1e-3


@pytest.mark.parametrize("layers", [None, 1])
def test_decoding_in_cuda_graphs(layers: int | None) -> None:
    """What a static cache turns on in transformers: the tokens and log-probabilities of decoding
    without it; the second call replays the graphs, the third with other draws.

    Budget: as above; the two most probable tokens are never nearer than .04 in log-probability.
    """
    import tfb
    from tfb.demo import digits

    ids = torch.randint(3, 20, (4, 12), generator=torch.Generator().manual_seed(0)).cuda()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = tfb.load_adapter(tfb.load_base(digits.BASE, digits.ADAPTER), digits.ADAPTER)
    last = None if layers is None else tfb.last_layers(layers)
    bayes = tfb.bayesianize(model.cuda(), layers=last)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    graphs = {"cache_implementation": "static", "disable_compile": False}
    found = []
    for seed in (5, 5, 8):
        draws = tfb.Draws.antithetic(4, 0.01, seed=seed)
        eager = bayes.generate(batch, draws, **options)
        found.append(bayes.generate(batch, draws, **options | graphs))
        assert found[-1].sequences.equal(eager.sequences)
        assert float((found[-1].log_probs - eager.log_probs).abs().max()) <= 1e-3
    again, other = (float((found[0].log_probs - f.log_probs).abs().max()) for f in found[1:])
    assert again <= 1e-3 and other > 0.1
