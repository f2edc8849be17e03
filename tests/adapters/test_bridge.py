"""The PEFT bridge: a sampled adapter is the adapter, its noise is the posterior's, all else is
left to PEFT, and what cannot be sampled is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from support.models import (
    BERT,
    CASES,
    HEADS,
    HIDDEN,
    LLAMA,
    VOCAB,
    add_lora,
    causal,
    encoder,
    exact,
    llama,
    make_batch,
    naive,
    randomize,
    relative,
    rows_of,
    run,
    sampled,
)
from torch import nn

import tfb
from tfb import AdapterError, Draws

# Two orders of operations on the same float64 numbers, through two blocks of width 16: some
# hundred roundings of 1.1e-16 each, amplified by norms and softmax. 1e-10 leaves them a factor of
# thousands and would show a single float32 rounding (6e-8) anywhere.
EXACT = 1e-10

# Pairs, a repeated stream at another sigma, the mean and a far stream, in no order.
DRAWS = Draws((0.05, -0.05, 0.0, 0.1, 0.05), (0, 0, 1, 2**32 - 1, 1), seed=-3)


def twins(kind: str) -> tuple[Any, Any]:
    """Two equal float64 models."""
    return exact(CASES[kind].build()), exact(CASES[kind].build())


# --- the mean and the draws ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
def test_draw_at_sigma_zero_is_pefts_output(kind: str) -> None:
    """No further from the float64 truth than twice PEFT's own rounding.

    An attention that hangs in the balance multiplies a rounding by hundreds in one row and not in
    the next, so one model's largest error says little: the typical (geometric mean) row of four
    models is compared.
    """
    case = CASES[kind]
    peft_errors, our_errors = [], []
    for seed in range(0, 40, 10):
        model, batch = case.build(seed), case.batch(*[3, 5, 7, 4] * 4, seed=seed)
        truth = run(exact(case.build(seed)), batch)
        eager = run(model, batch)
        mean, other = sampled(tfb.bayesianize(model), Draws((0.0, 0.0), (0, 5)), batch)
        assert mean.dtype == eager.dtype
        assert torch.equal(mean, other)  # the stream of a draw without noise does not matter
        peft_errors.append(row_errors(eager, truth))
        our_errors.append(row_errors(mean, truth))
    tiny = torch.finfo(torch.float32).eps
    ours, pefts = (
        (torch.cat(errors) + tiny).log().mean().exp() for errors in (our_errors, peft_errors)
    )
    assert ours <= 2 * pefts


def row_errors(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """[B] relative errors."""
    difference = (found.double() - truth).flatten(1).norm(dim=1)
    return difference / truth.flatten(1).norm(dim=1)


@pytest.mark.parametrize("kind", CASES)
def test_draws_are_runs_with_materialised_weights(kind: str) -> None:
    (model, twin), batch = twins(kind), CASES[kind].batch()
    bayes = tfb.bayesianize(model)
    found = sampled(bayes, DRAWS, batch)
    expected = naive(twin, bayes.posteriors, DRAWS, lambda m: run(m, batch))
    assert relative(found, expected) < EXACT
    assert relative(found[2], run(twin, batch)) < EXACT  # sigma = 0
    assert relative(found[0], found[1]) > 1e-3  # the noise is no rounding


@settings(max_examples=25)
@given(data=st.data())
def test_any_adapter_samples_draw_by_draw(data: st.DataObject) -> None:
    """An S-draw pass is S passes of one draw, whatever the adapter."""
    targets = data.draw(st.lists(st.sampled_from([*LLAMA, "lm_head"]), min_size=1, unique=True))
    config = causal(
        r=data.draw(st.integers(1, 20), "r"),  # also beyond the layers' width
        lora_alpha=data.draw(st.sampled_from([1, 8, 33]), "alpha"),
        use_rslora=data.draw(st.booleans(), "rslora"),
        target_modules=targets,
    )
    sigmas = data.draw(st.lists(st.sampled_from([-0.1, -0.02, 0.0, 0.05]), min_size=1, max_size=5))
    streams = [data.draw(st.integers(0, 3)) for _ in sigmas]
    draws = Draws(tuple(sigmas), tuple(streams), seed=data.draw(st.integers(-(2**63), 2**63 - 1)))
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    batch = make_batch(*lengths, extras=("position_ids",))
    bayes = tfb.bayesianize(exact(add_lora(randomize(llama(), 0), **config)))
    together = sampled(bayes, draws, batch)
    single = [sampled(bayes, draws[s : s + 1], batch)[0] for s in range(len(draws))]
    assert relative(together, torch.stack(single)) < EXACT


def test_chosen_layers_only_are_sampled() -> None:
    (model, twin), batch = twins("llama"), CASES["llama"].batch()
    bayes = tfb.bayesianize(model, layers=r"layers\.1\.mlp")
    assert set(bayes.posteriors) == {f"model.layers.1.mlp.{p}" for p in LLAMA[4:]}
    expected = naive(twin, bayes.posteriors, DRAWS, lambda m: run(m, batch))
    assert relative(sampled(bayes, DRAWS, batch), expected) < EXACT


OPTIONS: dict[str, dict[str, Any]] = {
    "saved head": {"modules_to_save": ["lm_head", "norm"]},
    "trained tokens": {"trainable_token_indices": [5, 6, 7]},
    "trained tokens of a tied embedding": {"trainable_token_indices": [5, 6, 7], "tied": True},
    "saved tied embedding": {
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
        "tied": True,
    },
    "blocks used twice": {"layer_replication": [[0, 2], [1, 2]]},
    "trained biases": {"bias": "all"},
    "PiSSA": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_what_peft_changes_beside_lora_stays(option: str) -> None:
    def build() -> Any:
        config = dict(OPTIONS[option])
        base = llama(tie_word_embeddings=config.pop("tied", False))
        return exact(add_lora(randomize(base, 0), **causal(**config)))

    model, twin, batch = build(), build(), CASES["llama"].batch()
    plain = run(twin, batch)
    bayes = tfb.bayesianize(model)
    assert torch.equal(run(model, batch), plain)
    found = sampled(bayes, DRAWS, batch)
    assert relative(found, naive(twin, bayes.posteriors, DRAWS, lambda m: run(m, batch))) < EXACT
    assert relative(found[2], plain) < EXACT
    labels = torch.tensor([7, 63, 5])
    everything = bayes.logits(batch, DRAWS)
    assert relative(bayes.logits(batch, DRAWS, labels), everything[..., labels]) < EXACT


def test_saved_head_is_used() -> None:
    """modules_to_save: sampling uses the adapter's head, not the base model's."""
    (model, twin), batch = twins("bert"), CASES["bert"].batch()
    for m in (model, twin):
        m.get_base_model().classifier.original_module.weight.data.fill_(torch.nan)
    bayes = tfb.bayesianize(model)
    found = sampled(bayes, DRAWS, batch)
    assert relative(found, naive(twin, bayes.posteriors, DRAWS, lambda m: run(m, batch))) < EXACT


# --- outside sampling ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
def test_outside_sampling_no_bit_changes(kind: str) -> None:
    model, batch = CASES[kind].build(), CASES[kind].batch()

    def outputs() -> list[torch.Tensor]:
        plain = run(model, batch)
        torch.manual_seed(0)
        training = run(model.train(), batch)  # with dropout, where there is one
        return [plain, training, run(model.eval(), rows_of(batch, 1))]

    before = outputs()
    bayes = tfb.bayesianize(model)
    assert all(map(torch.equal, before, outputs()))
    sampled(bayes, DRAWS, batch)
    assert all(map(torch.equal, before, outputs()))
    assert bayes.remove() is model
    assert all(map(torch.equal, before, outputs()))


def test_disabled_adapter_is_the_base_model() -> None:
    base, batch = randomize(llama(), 0), CASES["llama"].batch()
    expected = run(base, batch)
    bayes = tfb.bayesianize(add_lora(base, **causal()))
    assert not torch.equal(run(bayes.model, batch), expected)
    with bayes.model.disable_adapter():
        assert torch.equal(run(bayes.model, batch), expected)
        with pytest.raises(ValueError, match=r"disabled \(disable_adapter\)"):
            sampled(bayes, DRAWS, batch)
    with bayes.sampling(DRAWS), bayes.model.disable_adapter():
        draws = run(bayes.model, batch).unflatten(0, (len(DRAWS), -1))
    # No noise survives it. The base's own rounding may depend on the batch size.
    assert all(torch.equal(draw, draws[0]) for draw in draws)
    assert relative(draws[0], expected) < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bf16", "lora_bias"])
def test_merging_merges_the_mean(kind: str, safe: bool) -> None:
    """To the bit what PEFT merges, and then nothing can be sampled."""
    case = CASES[kind]
    expected = case.build().merge_and_unload(safe_merge=safe)
    bayes = tfb.bayesianize(case.build())
    merged = bayes.model.merge_and_unload(safe_merge=safe)
    found = merged.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name
    assert torch.equal(run(merged, case.batch()), run(expected, case.batch()))
    with pytest.raises(ValueError, match="does not carry this posterior any more"):
        sampled(bayes, DRAWS, case.batch())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora_bias"])
def test_merge_and_unmerge(kind: str) -> None:
    (model, twin), batch = twins(kind), CASES[kind].batch()
    bayes = tfb.bayesianize(model)
    before, draws = run(model, batch), sampled(bayes, DRAWS, batch)
    model.merge_adapter()
    assert relative(run(model, batch), before) < EXACT
    with pytest.raises(ValueError, match=r"merged into the base weight; call .*unmerge_adapter"):
        sampled(bayes, DRAWS, batch)
    model.unmerge_adapter()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-14)
    assert relative(run(model, batch), before) < EXACT
    assert relative(sampled(bayes, DRAWS, batch), draws) < EXACT


# --- several adapters ---------------------------------------------------------------------------


def two_adapters() -> Any:
    """ "default" on attention, "other" on values and the feed-forward block; float64."""
    model = add_lora(randomize(llama(), 0), **causal(target_modules=LLAMA[:4]))
    model.add_adapter("other", peft.LoraConfig(**causal(r=3, target_modules=LLAMA[2:])))
    randomize(model, 7, ".other.")
    return exact(model)


def test_only_the_bayesianized_adapter_is_sampled() -> None:
    model, twin, batch = two_adapters(), two_adapters(), CASES["llama"].batch()
    bayes = tfb.bayesianize(model)
    expected = naive(twin, bayes.posteriors, DRAWS, lambda m: run(m, batch))
    assert relative(sampled(bayes, DRAWS, batch), expected) < EXACT
    for m in (model, twin):
        m.set_adapter("other")
    assert torch.equal(run(model, batch), run(twin, batch))
    with pytest.raises(ValueError, match=r"'default' is not active \(active: other\); call .*set_"):
        sampled(bayes, DRAWS, batch)
    model.set_adapter("default")
    assert relative(sampled(bayes, DRAWS, batch), expected) < EXACT


def test_adapters_acting_together() -> None:
    """With both active one is sampled and the other stays as it is."""
    model, twin, batch = two_adapters(), two_adapters(), CASES["llama"].batch()
    for m in (model, twin):
        m.base_model.set_adapter(["default", "other"])
    bayes = tfb.bayesianize(model, "other")
    expected = naive(twin, bayes.posteriors, DRAWS, lambda m: run(m, batch), adapter="other")
    assert relative(sampled(bayes, DRAWS, batch), expected) < EXACT


def test_two_bayesianized_adapters() -> None:
    model, twin, batch = two_adapters(), two_adapters(), CASES["llama"].batch()
    both = {name: tfb.bayesianize(model, name) for name in ("default", "other")}
    for name, bayes in both.items():
        for m in (model, twin):
            m.set_adapter(name)
        expected = naive(twin, bayes.posteriors, DRAWS, lambda m: run(m, batch), adapter=name)
        assert relative(sampled(bayes, DRAWS, batch), expected) < EXACT
    model.base_model.set_adapter(["default", "other"])
    with (
        both["default"].sampling(DRAWS),
        pytest.raises(ValueError, match="another adapter of this model is being sampled"),
    ):
        sampled(both["other"], DRAWS, batch)
    both["default"].remove()
    sampled(both["other"], DRAWS, batch)  # the other one is untouched by it


def test_mixed_batches_keep_their_meaning() -> None:
    model, batch = two_adapters(), CASES["llama"].batch()
    mixed = {**batch, "adapter_names": ["default", "__base__", "other"]}
    before = run(model, mixed)
    for name in ("default", "other"):
        tfb.bayesianize(model, name)
    assert torch.equal(run(model, mixed), before)


def test_removing() -> None:
    model, batch = CASES["llama"].build(), CASES["llama"].batch()
    first = tfb.bayesianize(model)
    found = sampled(first, DRAWS, batch)
    with pytest.raises(AdapterError, match=r"q_proj: already Bayesianized; call remove\(\)"):
        tfb.bayesianize(model)
    first.remove()
    assert not any(m.lora_variant for m in model.modules() if isinstance(m, LoraLayer))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="does not carry this posterior any more"):
        sampled(first, DRAWS, batch)
    second = tfb.bayesianize(model)
    first.remove()  # again: no harm to the second
    assert torch.equal(sampled(second, DRAWS, batch), found)


def test_a_copy_is_not_the_model() -> None:
    """A deep copy computes the deterministic adapter; sampling it is an error, not a mean."""
    bayes, batch = tfb.bayesianize(CASES["llama"].build()), CASES["llama"].batch()
    copied = copy.deepcopy(bayes)
    assert torch.equal(run(copied.model, batch), run(bayes.model, batch))
    with pytest.raises(ValueError, match="or a copy of the model"):
        sampled(copied, DRAWS, batch)


def test_deleted_adapter_is_refused() -> None:
    model, batch = two_adapters(), CASES["llama"].batch()
    bayes = tfb.bayesianize(model, "other")
    model.delete_adapter("other")
    with pytest.raises(ValueError, match="'other' is not active"):
        sampled(bayes, DRAWS, batch)


# --- refusals -----------------------------------------------------------------------------------


class Odd(nn.Module):
    """Layers that are no linear map of one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.score = nn.Linear(8, 3)
        self.config = {"model_type": "custom"}

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.score(input_ids)


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    return transformers.MixtralForCausalLM(config)


def routed() -> Any:
    """A Llama whose feed-forward block sits where routed experts do."""
    model = llama()
    block = model.model.layers[0]
    block.experts, block.mlp = nn.ModuleList([block.mlp]), nn.Identity()
    return model


def odd(target: str) -> Any:
    return add_lora(Odd(), r=2, task_type="SEQ_CLS", target_modules=[target])


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "plain model": (llama, "expected a peft.PeftModel, got LlamaForCausalLM; load .*load_adapter"),
    "IA3": (
        lambda: peft.get_peft_model(llama(), peft.IA3Config(task_type="CAUSAL_LM")),
        "is IA3; only LORA adapters",
    ),
    "prompt tuning": (
        lambda: peft.get_peft_model(
            llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        ),
        "is PROMPT_TUNING; only LORA adapters",
    ),
    "no task": (
        lambda: add_lora(llama(), **causal(task_type=None)),
        "task_type None; supported: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS",
    ),
    "other task": (
        lambda: add_lora(encoder("Bert"), r=2, task_type="TOKEN_CLS", target_modules=["query"]),
        "task_type TOKEN_CLS; supported",
    ),
    "DoRA": (
        lambda: add_lora(llama(), **causal(use_dora=True)),
        r"q_proj: LoRA variant DoraLinearVariant is not plain LoRA.*; exclude .* with layers=",
    ),
    "aLoRA": (
        lambda: add_lora(llama(), **causal(alora_invocation_tokens=[5, 6])),
        "q_proj: LoRA variant ALoraLinearVariant is not plain LoRA",
    ),
    "embedding": (
        lambda: add_lora(llama(), **causal(target_modules=["embed_tokens", "q_proj"])),
        r" model\.embed_tokens: LoRA on Embedding is not supported.*; exclude .* with layers=",
    ),
    "convolution 1d": (lambda: odd("conv1"), "conv1: LoRA on Conv1d is not supported"),
    "convolution 2d": (lambda: odd("conv2"), "conv2: LoRA on Conv2d is not supported"),
    "attention": (lambda: odd("attention"), "attention: LoRA on MultiheadAttention is not"),
    "expert parameters": (
        lambda: add_lora(
            mixtral(),
            **causal(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]),
        ),
        r"mlp\.experts: LoRA on ParamWrapper is not supported",
    ),
    "expert layers": (
        lambda: add_lora(routed(), **causal()),
        r"layers\.0\.experts\.0\.up_proj: mixture-of-experts layers see routed rows",
    ),
    "untrained": (
        lambda: peft.get_peft_model(llama(), peft.LoraConfig(**causal())),
        r"'model\.layers\.0\..*lora_B is zero, .*never trained, or its weights were not loaded",
    ),
    "damaged": (
        lambda: spoil(CASES["llama"].build()),
        r"'model\.layers\.1\.mlp\.up_proj': lora_A holds NaN or Inf; the checkpoint is damaged",
    ),
    "merged": (
        lambda: merged(CASES["llama"].build()),
        r"q_proj: the adapter is merged into the base; call unmerge_adapter\(\)",
    ),
    "meta": (
        lambda: peft.get_peft_model(llama(), peft.LoraConfig(**causal()), low_cpu_mem_usage=True),
        "q_proj: weights are on the meta device; load them first",
    ),
}


def spoil(model: Any) -> Any:
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    layer.lora_A["default"].weight.data[1, 2] = torch.nan
    return model


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str) -> None:
    make, message = REFUSED[what]
    model = make()
    with pytest.raises(AdapterError, match=message):
        tfb.bayesianize(model)
    # Nothing of ours stays behind.
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        variants = getattr(module, "lora_variant", {}).values()
        assert not any(type(v).__module__.startswith("tfb") for v in variants)


def test_unknown_adapter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(AdapterError, match="no adapter 'mine'; the model has: default, other"):
        tfb.bayesianize(two_adapters(), "mine")


def test_many_refusals_are_counted() -> None:
    with pytest.raises(AdapterError, match=r"; and 6 more; exclude "):
        tfb.bayesianize(add_lora(llama(), **causal(use_dora=True)))


def test_refused_layers_can_stay_deterministic() -> None:
    def build() -> Any:
        config = causal(target_modules=["embed_tokens", "q_proj"])
        return exact(add_lora(randomize(llama(), 0), **config))

    model, twin, batch = build(), build(), CASES["llama"].batch()
    bayes = tfb.bayesianize(model, layers=lambda name: not name.endswith("embed_tokens"))
    expected = naive(twin, bayes.posteriors, DRAWS, lambda m: run(m, batch))
    assert relative(sampled(bayes, DRAWS, batch), expected) < EXACT


def test_layers_that_select_nothing() -> None:
    model = CASES["llama"].build()
    with pytest.raises(ValueError, match=r"layers='layers.7' selects none of the 14 modules: mod"):
        tfb.bayesianize(model, layers="layers.7")


def test_equal_noise_identities_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfb.adapters.bridge.stable_layer_id", lambda name: len(name) % 2)
    with pytest.raises(AdapterError, match=r"modules '\S+q_proj' and '\S+' have the same 32-bit"):
        tfb.bayesianize(CASES["llama"].build())


def test_factors_of_other_modules_are_refused() -> None:
    posteriors = tfb.bayesianize(CASES["llama"].build()).posteriors
    name = "model.layers.0.mlp.up_proj"
    del posteriors[name]
    with pytest.raises(AdapterError, match=f"differ in modules: {name}"):
        tfb.bayesianize(CASES["llama"].build(), posteriors=posteriors)


def test_row_moving_layers_are_named() -> None:
    """A sampled layer that meets other rows than the model's says so; it does not mix draws."""
    bayes = tfb.bayesianize(CASES["llama"].build())
    layer = bayes.base.get_submodule("model.layers.0.mlp.up_proj")
    with (
        bayes.sampling(DRAWS),
        pytest.raises(RuntimeError, match="up_proj: called outside the model's forward pass"),
    ):
        layer(torch.zeros(2, HIDDEN))
    hook = bayes.base.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, args: (args[0][:-1],)
    )
    with pytest.raises(RuntimeError, match="routes or reshapes rows"):
        sampled(bayes, DRAWS, CASES["llama"].batch())
    hook.remove()
    sampled(bayes, DRAWS, CASES["llama"].batch())


def test_bert_targets_are_all_adapted() -> None:
    """The suite's own premise: every kind of linear layer of an encoder is among the cases."""
    bayes = tfb.bayesianize(CASES["bert"].build())
    assert {name.split(".")[-1] for name in bayes.posteriors} == set(BERT)
