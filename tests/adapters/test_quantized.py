"""bitsandbytes bases, 8-bit and 4-bit, which since 0.46 also run on a CPU.

A last bit that flips in a float32 input may move a quantized activation by 2^-8: so every
comparison is with the dequantized model in float64, and allows twice the error that PEFT's own
arithmetic has on the quantized model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import (
    causal,
    exact,
    llama,
    make_batch,
    randomize,
    relative,
    rows_of,
    run,
    sampled,
)
from torch import Tensor, nn

import tfb
from tfb import Draws
from tfb_kernels import gaussian_noise

pytest.importorskip("bitsandbytes", reason="the extra 'bitsandbytes' is not installed")

DRAWS = Draws.antithetic(4, 0.1, seed=3)
# bitsandbytes quantizes no product narrower than this well; a block of 4-bit weights has 64 values.
SIZES = {"hidden_size": 64, "intermediate_size": 128}
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    # The threshold moves whole columns of a batch to half precision as soon as one row has an
    # outlier there: with it, no row of an 8-bit model is independent of the others.
    "8bit": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "fp4-bf16": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
}


def batch() -> dict[str, Tensor]:
    return make_batch(7, 3, 5, extras=("position_ids",))


def adapted(base: Any) -> Any:
    model = get_peft_model(base, LoraConfig(**causal(r=4)))
    return randomize(model, 1, ".default.").eval()


@pytest.fixture(params=sorted(QUANTIZATIONS))
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Builds twins of one quantized PEFT model."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    randomize(llama(**SIZES), 0).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(**QUANTIZATIONS[request.param])
    return lambda: adapted(
        AutoModelForCausalLM.from_pretrained(str(tmp_path), quantization_config=settings)
    )


def dequantized(model: Any) -> Any:
    """The same function in float64: weights as the quantized layers mean them."""
    from peft.utils.integrations import dequantize_module_weight

    twin = adapted(llama(**SIZES))
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name, p in twin.named_parameters():
            value = own[name]
            if value.shape != p.shape or not value.is_floating_point():
                layer = model.get_submodule(name.rpartition(".")[0])
                value = dequantize_module_weight(layer)
            p.copy_(value)
    return exact(twin)


@torch.no_grad()
def peft_loop(model: Any, bayes: Any) -> Tensor:
    """Logits [S, B, T, V] by PEFT alone: B' and A' + sigma / d o E written into its weights."""
    base = model.get_base_model()
    found = []
    for sigma, stream in zip(DRAWS.sigmas, DRAWS.streams, strict=True):
        for name, p in bayes.posteriors.items():
            layer = base.get_submodule(name)
            noise = gaussian_noise(DRAWS.seed, p.layer_id, [stream], p.rank, p.in_features)[0]
            layer.lora_A["default"].weight.copy_(p.A + sigma * p.inv_d[:, None] * noise)
            layer.lora_B["default"].weight.copy_(p.B)
        found.append(run(model, batch()))
    return torch.stack(found)


def test_quantized_draws_are_as_exact_as_peft(quantized: Any) -> None:
    """One pass for all draws, one for each, rows by themselves, and tail sampling."""
    bayes = tfb.bayesianize(quantized())
    kinds = {type(bayes.base.get_submodule(n).base_layer).__name__ for n in bayes.samplers}
    assert kinds <= {"Linear8bitLt", "Linear4bit"}
    reference = tfb.bayesianize(dequantized(quantized()))
    expected = sampled(reference, DRAWS, batch())
    eager = relative(peft_loop(quantized(), bayes), expected)
    assert relative(expected[0], expected[1]) > 10 * eager  # draws differ by more than the error
    assert relative(sampled(bayes, DRAWS, batch()), expected) < 2 * eager
    for how in ({"mode": "full"}, {"mode": "tail", "tail": 2}):
        last = reference.logits(batch(), DRAWS, **how)
        each = [bayes.logits(batch(), DRAWS[i : i + 1], **how) for i in range(4)]
        alone = [bayes.logits(rows_of(batch(), i), DRAWS, **how) for i in range(3)]
        for found in (torch.cat(each), torch.cat(alone, dim=1)):
            assert relative(found, last) < 2 * eager


def test_quantized_models_outside_sampling_are_peft_models(quantized: Any) -> None:
    bayes, twin = tfb.bayesianize(quantized()), quantized()
    assert torch.equal(run(bayes.model, batch()), run(twin, batch()))
    with bayes.model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(run(bayes.model, batch()), run(twin, batch()))


def test_layers_stay_quantized(quantized: Any) -> None:
    bayes = tfb.bayesianize(quantized())
    bayes.predict(batch(), DRAWS)
    layer = bayes.base.get_submodule("model.layers.0.mlp.down_proj").base_layer
    assert isinstance(layer, nn.Linear) and not layer.weight.is_floating_point()


def test_nothing_is_merged_into_quantized_weights(quantized: Any) -> None:
    bayes = tfb.bayesianize(quantized())
    with pytest.raises(ValueError, match="no draw can be merged into layers that are quantized"):
        bayes.merging = "always"
    assert bayes.merging == "auto"
