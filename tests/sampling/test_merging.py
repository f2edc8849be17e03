"""Merged weights in whole models: the same draws as by adding updates, and PEFT's semantics.

In float64; that full mode is the definition, merged or not, is in ``test_architectures``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.layer import Linear as LoraLinear
from support.architectures import DRAWS, KINDS, OTHERS, batch_of
from support.models import CASES, add_lora, encoder, exact, make_batch, randomize, relative, run
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook

import tfb
from tfb import BayesLoRALinear, Draws, linear
from tfb.adapters.bridge import MergingLinear
from tfb.linear import LowRankSampler
from tfb.sampling.forward import mean_state
from tfb.sampling.state import SamplingState
from tfb_kernels.tuning import merge_min_rows

EXACT, S = 1e-10, len(DRAWS)
CPU = torch.device("cpu")
BASES = [f"model.layers.1.{x}_proj.base_layer" for x in ("self_attn.o", "mlp.up", "mlp.down")]


Counted = Callable[..., list[int]]


def bayesian(kind: str = "llama", merging: str = "auto") -> Any:
    bayes = tfb.bayesianize(KINDS[kind].build())
    bayes.merging = merging
    return bayes


@pytest.fixture
def base_calls(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Calls of the layers BASES in a prediction; counted in their class, since a layer with a hook
    of its own is not merged."""
    called: list[nn.Module] = []
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        called.append(self)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)

    def count(bayes: Any, names: Sequence[str] = BASES) -> list[int]:
        called.clear()
        bayes.logits(batch_of(), DRAWS)
        return [sum(m is bayes.base.get_submodule(n) for m in called) for n in names]

    return count


@pytest.mark.parametrize("how", [{"mode": "full"}, {"mode": "tail", "tail": 3}], ids=str)
@pytest.mark.parametrize("kind", [k for k in KINDS if "bert" not in k])
def test_tails_too_are_the_same_merged_or_added(kind: str, how: dict[str, Any]) -> None:
    """Rows as they are, and draws side by side on the sequence axis."""
    merged = bayesian(kind, "always").logits(batch_of(), DRAWS, **how)
    added = bayesian(kind, "never").logits(batch_of(), DRAWS, **how)
    assert relative(merged, added) < EXACT
    assert relative(merged[0], merged[1]) > 1e-3


def test_merged_layers_skip_their_base_product(base_calls: Counted) -> None:
    """And those that others have put a hook on do not: it is called."""
    assert base_calls(bayesian(merging="never")) == [1, 1, 1]
    bayes = bayesian(merging="always")
    assert base_calls(bayes) == [0, 0, 0]
    handle = bayes.base.get_submodule(BASES[1]).register_forward_hook(lambda m, args, y: None)
    assert base_calls(bayes) == [0, 1, 0]
    handle.remove()
    handle = register_module_forward_hook(lambda m, args, y: None)  # of every module
    assert base_calls(bayes) == [1, 1, 1]
    handle.remove()
    assert base_calls(bayes) == [0, 0, 0]


def test_auto_merges_from_the_threshold_on(
    base_calls: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer by its own shape; a draw of this batch has 27 rows."""
    bayes = bayesian()
    rows = batch_of()["input_ids"].numel()
    for o, up, down in ((rows, rows + 1, rows), (rows + 1, rows, rows + 1)):
        least = {(16, 16): o, (32, 16): up, (16, 32): down}
        monkeypatch.setattr(
            linear, "merge_min_rows", lambda m, n, d, least=least: least.get((m, n), 1)
        )
        for sampler in bayes.samplers.values():
            sampler.release()
        assert base_calls(bayes) == [int(bound > rows) for bound in (o, up, down)]


def test_inputs_that_draws_share_are_never_merged(base_calls: Counted) -> None:
    """The first noisy q, k and v read one input, which S products would read S times."""
    names = [f"model.layers.0.self_attn.{x}_proj.base_layer" for x in "qkv"]
    assert base_calls(bayesian(merging="always"), names) == [1, 1, 1]


def test_biases_of_base_and_adapter_are_both_added() -> None:
    """A base with a bias (BERT's have one) and ``lora_bias``."""

    def build() -> Any:
        model = KINDS["bert"].make()
        randomize(model, 0)
        config = LoraConfig(
            r=3, task_type="SEQ_CLS", target_modules=["query", "dense"], lora_bias=True
        )
        made = get_peft_model(model, config)
        randomize(made, 1, ".default.")
        return made.double().eval()

    found = []
    for merging in ("always", "never"):
        bayes = tfb.bayesianize(build())
        bayes.merging = merging
        found.append(bayes.logits(batch_of("right"), DRAWS))
    assert relative(*found) < EXACT


def test_a_bias_of_the_adapter_takes_the_dtype_of_the_base() -> None:
    """PEFT keeps an adapter in float32 on a base in bfloat16. Draws differ by roundings of W and of
    activations, 2^-9 each, through two layers; a bias left out would be of order one."""
    found = []
    for merging in ("always", "never"):
        base = randomize(encoder("Bert"), 0).bfloat16()
        bayes = tfb.bayesianize(add_lora(base, 1, **CASES["lora_bias"].config))
        bayes.merging = merging
        found.append(bayes.logits(make_batch(*[9] * 4, pad="right"), DRAWS).double())
    assert relative(*found) < 0.1


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_another_tuner_below_is_called() -> None:
    """LoRA on top of IA3: what PEFT calls the base layer is IA3's, which scales."""
    found = []
    for merging in ("always", "never"):
        targets = {"target_modules": ["q", "v"], "feedforward_modules": []}
        below = IA3Config(task_type="SEQ_2_SEQ_LM", **targets)
        scaled = get_peft_model(randomize(OTHERS["t5"].make(), 0), below)
        for name, p in scaled.named_parameters():
            if "ia3_l" in name:
                p.data.fill_(1.5)
        config = LoraConfig(r=3, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wo"])
        model = get_peft_model(scaled, config, adapter_name="upper")
        bayes = tfb.bayesianize(exact(randomize(model, 1, ".upper.")).eval(), "upper")
        for sampler in bayes.samplers.values():
            sampler.merging = merging  # "always" itself refuses
        found.append(bayes.logits(batch_of(), DRAWS))
    assert relative(*found) < EXACT


def test_a_second_adapter_a_disabled_one_and_dropout_are_peft_s(base_calls: Counted) -> None:
    """Where PEFT has more to do than one plain adapter, updates are added to its base product."""
    bayes, batch = bayesian(merging="always"), batch_of()
    layer = bayes.base.get_submodule("model.layers.1.mlp.up_proj")
    layer.lora_dropout["default"] = nn.Dropout(0.5).eval()
    assert base_calls(bayes) == [0, 0, 0]
    layer.lora_dropout["default"].train()
    with torch.no_grad(), bayes.sampling(DRAWS):  # predict would call eval()
        x = torch.randn(S * 3, 9, 16, dtype=torch.float64)
        assert layer.lora_variant["default"].merged(layer, "default", x) is None
    layer.lora_dropout["default"].eval()
    handle = layer.lora_dropout["default"].register_forward_hook(lambda m, args, y: 2 * y)
    assert base_calls(bayes) == [0, 1, 0]
    handle.remove()
    with torch.no_grad(), bayes.sampling(DRAWS), bayes.model.disable_adapter():
        disabled = bayes.model(**batch).logits
    with torch.no_grad(), bayes.model.disable_adapter():
        plain = bayes.model(**batch).logits
    assert relative(disabled, plain.repeat(S, 1, 1)) < EXACT
    bayes.model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
    bayes.model.double().eval()
    bayes.model.base_model.set_adapter(["default", "other"])
    assert base_calls(bayes) == [0, 1, 0]


def test_gradients_autocast_and_token_noise_are_added() -> None:
    """Gradients pass through the base layer; autocast would round a merged weight again."""
    bayes = bayesian(merging="always")
    layer, sampler = bayes.base.get_submodule(BASES[0]), next(iter(bayes.samplers.values()))
    x = torch.randn(S, 9, 16, dtype=torch.float64, requires_grad=True)

    def merges(x: Tensor, bias: Tensor | None = None, draws: Draws = DRAWS) -> bool:
        return bool(sampler.merges(x, 9, draws, layer.weight, bias))

    assert not merges(x) and merges(x.detach())
    assert not merges(x.detach(), torch.zeros(16, requires_grad=True))
    with torch.no_grad():
        assert merges(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not merges(x.detach())
    assert not merges(x.detach().float())
    assert not merges(x.detach(), draws=Draws.iid(S, 0.1, noise="token"))


def test_another_scaling_is_refused() -> None:
    """The posterior keeps its own: PEFT's would act where nothing is merged."""
    bayes = bayesian()
    told = "LoRA's scaling is 1, and 2 in the posterior; set it back"
    with rescale_adapter_scale(bayes.model, 0.5), pytest.raises(ValueError, match=told):
        bayes.logits(batch_of(), DRAWS)
    bayes.logits(batch_of(), DRAWS)


def test_the_prompt_of_a_tail_is_pefts_own_where_it_is_not_merged() -> None:
    """The mean adapter's arithmetic, with no noise to multiply by 0: keys and values to the bit."""
    kept = []
    for merging in (None, "never"):
        bayes = bayesian()
        backbone, ids = bayes.base.model, batch_of()["input_ids"]
        with torch.no_grad():
            if merging is None:
                kept.append(backbone(ids, use_cache=True).past_key_values)
                continue
            bayes.merging = merging
            state = mean_state(SamplingState(bayes.base, DRAWS), len(ids))
            with bayes.sampling_as(state):
                kept.append(backbone(ids, use_cache=True).past_key_values)
    for a, b in zip(kept[0].layers, kept[1].layers, strict=True):
        assert a.keys.equal(b.keys) and a.values.equal(b.values)


def test_remove_gives_peft_its_class_back() -> None:
    """And a hook that holds the method of ours goes on."""
    bayes, batch = bayesian(), batch_of()
    layers = [bayes.base.get_submodule(n) for n in bayes.samplers]
    assert all(type(x) is MergingLinear for x in layers)
    held = layers[0].forward
    model = bayes.remove()
    assert all(type(x) is LoraLinear for x in layers)
    expected = run(model, batch)
    layers[0].forward = held
    assert run(model, batch).equal(expected)


def test_copies_of_a_module_call_their_own() -> None:
    """As ``nn.DataParallel`` makes them: other weights behind the same attributes."""
    layer: Any = next(m for m in bayesian().base.modules() if type(m) is MergingLinear)
    copy: Any = layer._replicate_for_data_parallel()
    copy.base_layer = nn.Linear(layer.in_features, layer.out_features).double()
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    with torch.no_grad():
        difference = copy(x) - layer(x)
        assert relative(difference, copy.base_layer(x) - layer.base_layer(x)) < EXACT


def test_merging_is_one_of_three_words() -> None:
    bayes = bayesian()
    assert bayes.merging == "auto"
    with pytest.raises(ValueError, match="merging='yes': expected one of auto, always, never"):
        bayes.merging = "yes"
    layer = bayes.base.get_submodule("model.layers.1.mlp.up_proj")
    layer.forward = layer.forward  # as a hook of accelerate's has it
    with pytest.raises(ValueError, match="no draw can be merged into"):
        bayes.merging = "always"
    bayes.model.merge_and_unload()
    with pytest.raises(ValueError, match=r"does not carry this posterior any more"):
        bayes.merging = "always"
    bayes.remove()


# --- one layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "draws", [DRAWS, Draws.iid(3, 0.2), Draws((0.1, 0.2, -0.1, 0.0), (7, 3, 7, 7))], ids=len
)
def test_a_layer_in_parts_of_any_size(
    draws: Draws, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many merged weights at a time as fit, whole streams or not: the same outputs, which
    are those of updates added, within two roundings of W_s and of the output."""
    torch.manual_seed(0)
    layer = BayesLoRALinear.from_weights(
        nn.Linear(24, 20, bias=bias, dtype=dtype), torch.randn(4, 24), torch.randn(20, 4), 0.5
    )
    x = torch.randn(len(draws), 9, 24).to(dtype)
    outputs = []
    with torch.no_grad():
        for each in (1, 20 * 24 * 2, 2 * 20 * 24 * 8, 1 << 20):
            monkeypatch.setitem(linear.MERGED_BYTES, "cpu", each)
            layer.sampler.merging = "always"
            outputs.append(layer(x, draws))
        layer.sampler.merging = "never"
        added = layer(x, draws)
    allowed = 24 * torch.finfo(dtype).eps
    for y in outputs:
        assert relative(y.double(), added.double()) < allowed


def test_threads_keep_their_own_scratch() -> None:
    """Two threads that merge into scratch at the same time do not see each other's weights. The
    library's number of threads is each thread's own, and decides how a product is rounded."""
    torch.manual_seed(0)
    layer = BayesLoRALinear.from_weights(
        nn.Linear(64, 64), torch.randn(4, 64), torch.randn(64, 4), 0.5
    )
    layer.sampler.merging = "always"
    x = torch.randn(8, 5, 64)
    sets = [Draws.antithetic(8, 0.1), Draws.antithetic(8, 0.3, first_stream=9)]
    with torch.no_grad():
        expected = [layer(x, d) for d in sets]
    wrong: list[int] = []

    def work(i: int) -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            wrong.extend(i for _ in range(50) if not layer(x, sets[i]).equal(expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, for jvp
def test_transforms_of_a_layer_are_those_of_an_affine_map() -> None:
    """vmap and forward-mode derivatives, where nothing can be written into scratch."""
    layer = BayesLoRALinear.from_weights(
        nn.Linear(24, 20).double(), torch.randn(4, 24).double(), torch.randn(20, 4).double(), 1.0
    )
    layer.sampler.merging = "always"
    x, step = torch.randn(2, S, 9, 24, dtype=torch.float64)

    def call(x: Tensor) -> Tensor:
        return layer(x, DRAWS)

    with torch.no_grad():
        y, change = call(x), call(x + step) - call(x)
        mapped = torch.func.vmap(call)(torch.stack([x, x + step]))
        tangent = torch.func.jvp(call, (x,), (step,))[1]
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, step))).tangent
    assert relative(mapped, torch.stack([y, y + change])) < EXACT
    assert relative(tangent, change) < EXACT and relative(dual, change) < EXACT


def test_scratch_is_where_the_weight_is() -> None:
    """Not on the default device."""
    layer = BayesLoRALinear.from_weights(
        nn.Linear(24, 20), torch.randn(4, 24), torch.randn(20, 4), 1.0
    )
    layer.sampler.merging = "always"
    layer.sampler.release()
    x = torch.randn(S, 9, 24)
    with torch.no_grad(), torch.device("meta"):
        inside = layer(x, DRAWS)
    with torch.no_grad():
        assert layer(x, DRAWS).equal(inside)


def test_scratch_of_inference_mode_can_be_written_outside() -> None:
    layer = BayesLoRALinear.from_weights(
        nn.Linear(24, 20), torch.randn(4, 24), torch.randn(20, 4), 1.0
    )
    layer.sampler.merging = "always"
    layer.sampler.release()
    x = torch.randn(4, 9, 24)
    with torch.inference_mode():
        inside = layer(x, DRAWS)
    with torch.no_grad():
        assert layer(x, DRAWS).equal(inside)


def test_the_threshold_of_bytes() -> None:
    """In proportion to 2 n m / (n + 2 m): W read and written against x, base and output."""
    one = merge_min_rows(64, 64, CPU)
    assert merge_min_rows(128, 128, CPU) == 2 * one
    assert merge_min_rows(64, 128, CPU) > merge_min_rows(128, 64, CPU)


def test_a_sampler_merges_what_it_would_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows a draw, not rows of all draws, are compared with the threshold."""
    layer = BayesLoRALinear.from_weights(
        nn.Linear(24, 20), torch.randn(4, 24), torch.randn(20, 4), 1.0
    )
    monkeypatch.setattr(linear, "merge_min_rows", lambda m, n, device: 9)
    sampler: LowRankSampler = layer.sampler
    weight: Tensor = layer.base.weight.detach()  # type: ignore[union-attr, operator]
    assert sampler.merges(torch.ones(4, 9, 24), 9, DRAWS, weight)
    assert not sampler.merges(torch.ones(4, 8, 24), 8, DRAWS, weight)
