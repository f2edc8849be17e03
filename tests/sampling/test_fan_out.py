"""What is computed once: the rows that modules see, whatever a call brings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.architectures import DRAWS, KINDS, batch_of, rows_seen, single_runs
from support.models import make_batch, randomize, relative
from torch import Tensor

import tfb
from tfb import Draws
from tfb.sampling.fan_out import FOLDABLE

EXACT = 1e-10
B, S = 3, len(DRAWS)


# --- fan-out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "llama-classifier"])
def test_what_lies_below_the_noise_runs_once(kind: str) -> None:
    """Embedding and the first two blocks see B rows; the third, which has noise, S B."""
    bayes = tfb.bayesianize(KINDS[kind].build(), layers=tfb.last_layers(1))
    blocks = [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]
    names = ["model.embed_tokens", *blocks, "model.layers.2.mlp.down_proj"]
    seen = rows_seen(bayes, names, lambda: bayes.logits(batch_of(), DRAWS))
    assert [seen[n] for n in names] == [[B], [B], [B], [S * B], [S * B]]


def test_the_first_noisy_input_is_read_once() -> None:
    """q, k and v of the first noisy block share one input: their base layers see B rows."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    heads = [f"model.layers.{i}.self_attn.{x}_proj.base_layer" for i in (0, 1) for x in "qkv"]
    after = ["model.layers.0.self_attn.o_proj.base_layer", "model.layers.0.mlp.up_proj.base_layer"]
    seen = rows_seen(bayes, [*heads, *after], lambda: bayes.logits(batch_of(), DRAWS))
    assert [seen[n] for n in heads] == [[B]] * 3 + [[S * B]] * 3
    assert [seen[n] for n in after] == [[S * B]] * 2


def test_last_layer_runs_the_backbone_once() -> None:
    """A thousand draws of the head cost one pass of what lies below it."""
    bayes = tfb.bayesianize(KINDS["llama"].build("lm_head"), layers=tfb.last_layers(0))
    names = ["model.layers.0.mlp", "model.layers.2.mlp", "lm_head.base_layer"]
    draws = Draws.antithetic(1000, 0.2)
    seen = rows_seen(bayes, names, lambda: bayes.logits(batch_of(), draws, draws_per_pass=1000))
    assert [seen[n] for n in names] == [[B]] * 3


def test_tail_computes_the_prompt_once() -> None:
    """T - k tokens of B rows, then S k tokens of B rows; never S B rows."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    tokens: list[tuple[int, int]] = []
    embed = bayes.base.get_submodule("model.embed_tokens")
    handle = embed.register_forward_pre_hook(lambda m, a: tokens.append(tuple(a[0].shape)))
    bayes.logits(batch_of(), DRAWS, mode="tail", tail=2)
    handle.remove()
    assert tokens == [(B, 9), (B, 2 * S)]


def test_tail_computes_the_prompt_once_for_all_parts_of_the_draws() -> None:
    """Two passes of two draws each go by the same cache, cut back in between."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    tokens: list[tuple[int, ...]] = []
    embed = bayes.base.get_submodule("model.embed_tokens")
    handle = embed.register_forward_pre_hook(lambda m, a: tokens.append(tuple(a[0].shape)))
    parts = bayes.logits(batch_of(), DRAWS, mode="tail", tail=2, draws_per_pass=2)
    handle.remove()
    assert tokens == [(B, 9), (B, 4), (B, 4)]
    assert relative(parts, bayes.logits(batch_of(), DRAWS, mode="tail", tail=2)) < EXACT


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_unknown_architectures_are_sampled_all_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without folding every block runs for every draw, with the same result."""
    for layers in (None, tfb.last_layers(1)):
        folded = tfb.bayesianize(KINDS[kind].build(), layers=layers).logits(batch_of(), DRAWS)
        with monkeypatch.context() as patch:
            patch.setattr("tfb.sampling.fan_out.FOLDABLE", frozenset(FOLDABLE) - {kind})
            plain = tfb.bayesianize(KINDS[kind].build(), layers=layers)
        assert relative(plain.logits(batch_of(), DRAWS), folded) < EXACT


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (4, 3, 2, 4), (7,), (16,) * 2, (2, 2)])
def test_equal_sizes_confuse_nothing(sizes: tuple[int, ...]) -> None:
    """B equal to T, to the heads, to 1: what runs over rows is told from what does not."""
    for kind in ("llama", "gpt2", "gemma3", "bert"):
        bayes = tfb.bayesianize(KINDS[kind].build(), layers=tfb.last_layers(1))
        batch = make_batch(*sizes)
        assert relative(bayes.logits(batch, DRAWS), single_runs(bayes, DRAWS, batch)) < EXACT


def test_the_models_own_call() -> None:
    """Inside ``sampling`` a plain call, with a cache by default, gives the same draws."""
    bayes = tfb.bayesianize(KINDS["llama"].build(), layers=tfb.last_layers(2))
    batch = make_batch(6, 6, 6)
    with torch.no_grad(), bayes.sampling(DRAWS):
        logits = bayes.model(input_ids=batch["input_ids"]).logits[:, -1]
    assert relative(logits.unflatten(0, (S, B)), bayes.logits(batch, DRAWS)) < EXACT


def test_a_second_active_adapter_is_added_in_every_draw() -> None:
    """Two active adapters, one of them Bayesian: nothing is folded, and both count."""
    model = KINDS["llama"].build()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomize(model, 3, ".other.")
    model.double().eval()
    bayes = tfb.bayesianize(model)
    alone = bayes.logits(batch_of(), DRAWS)
    model.base_model.set_adapter(["default", "other"])
    both = bayes.logits(batch_of(), DRAWS)
    assert relative(both, single_runs(bayes, DRAWS, batch_of())) < EXACT
    assert relative(both, alone) > 1e-3
    mean = bayes.logits(batch_of(), Draws.mean())[0]
    inputs = bayes.inputs(batch_of(), "full")
    with torch.no_grad():
        assert relative(mean, model(**inputs).logits[:, -1]) < EXACT


# --- what the fan-out must not confuse ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "bert"])
@pytest.mark.parametrize("layers", ["all", "last"])
def test_arguments_of_a_call(kind: str, layers: str) -> None:
    """With or without a mask, positions and a cache: a call is the calls of its draws."""
    chosen = tfb.last_layers(1) if layers == "last" else None
    bayes = tfb.bayesianize(KINDS[kind].build(), layers=chosen)
    ids = make_batch(4, 4, 4)["input_ids"]
    decoder = bayes.task == "CAUSAL_LM"
    options: dict[str, list[Any]] = {
        "attention_mask": [None, torch.ones_like(ids)],
        "position_ids": [None, torch.arange(4).expand(3, 4), torch.arange(4)[None]],
        "use_cache": [None, False, True] if decoder else [None],
    }
    found = []
    for mask in options["attention_mask"]:
        for position in options["position_ids"]:
            for cache in options["use_cache"]:
                given = {"attention_mask": mask, "position_ids": position, "use_cache": cache}
                call = {"input_ids": ids, **{k: v for k, v in given.items() if v is not None}}
                with torch.no_grad(), bayes.sampling(DRAWS):
                    found.append(bayes.model(**call).logits)
    assert all(relative(f, found[0]) < EXACT for f in found)
    for s in range(S):
        with torch.no_grad(), bayes.sampling(DRAWS[s : s + 1]):
            single = bayes.model(input_ids=ids).logits
        assert relative(found[0][B * s : B * (s + 1)], single) < EXACT


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_blocks_share_is_repeated_once(kind: str, layers: str) -> None:
    """Masks and rotary tables are copied for the draws at the first noisy block, and all blocks
    after it see the very same tensors."""
    chosen = tfb.last_layers(2) if layers == "last" else None
    bayes = tfb.bayesianize(KINDS[kind].build(), layers=chosen)
    prefix = "model.layers" if kind == "llama" else "transformer.h"
    given: list[set[int]] = []
    kept: list[Tensor] = []  # alive, so that no id is used twice

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        values = [*args[1:], *(v for k, v in kwargs.items() if k != "hidden_states")]
        flat = [x for v in values for x in (v if isinstance(v, tuple) else (v,))]
        tensors = [x for x in flat if isinstance(x, Tensor) and x.dim() > 0]
        assert all(len(x) in (1, S * B) for x in tensors if x.dim() > 1)
        kept.extend(tensors)
        given.append({id(x) for x in tensors if len(x) == S * B})

    first = 1 if layers == "last" else 0
    handles = [
        bayes.base.get_submodule(f"{prefix}.{i}").register_forward_pre_hook(spy, with_kwargs=True)
        for i in range(first, 3)
    ]
    bayes.logits(batch_of(), DRAWS)
    for handle in handles:
        handle.remove()
    assert len(given) == 3 - first and given[0]
    assert all(g == given[0] for g in given)


def test_gpt2_reads_its_fused_input_once() -> None:
    bayes = tfb.bayesianize(KINDS["gpt2"].build())
    names = [
        f"transformer.h.{i}.{x}.base_layer" for i in (0, 1) for x in ("attn.c_attn", "mlp.c_fc")
    ]
    seen = rows_seen(bayes, names, lambda: bayes.logits(batch_of(), DRAWS))
    assert [seen[n] for n in names] == [[B], [S * B], [S * B], [S * B]]


def test_what_reads_once_writes_for_every_draw() -> None:
    """q, k and v of the first noisy block: B rows in, S B rows out, others for each draw."""
    bayes = tfb.bayesianize(KINDS["llama"].build(), layers=tfb.last_layers(1))
    written: list[Tensor] = []
    handles = [
        bayes.base.get_submodule(f"model.layers.2.self_attn.{x}_proj").register_forward_hook(
            lambda m, a, out: written.append(out)
        )
        for x in "qkv"
    ]
    bayes.logits(batch_of(), DRAWS)
    for handle in handles:
        handle.remove()
    assert [len(w) for w in written] == [S * B] * 3
    assert all(relative(w[:B], w[B : 2 * B]) > 1e-3 for w in written)


def test_a_module_that_shares_an_input_need_not_be_noisy() -> None:
    """Only v of q, k and v has noise: the others run on their own, and nothing is confused."""
    for pattern in (r"v_proj", r"2\..*(k_proj|o_proj)", r"1\..*down_proj", r"gate_proj|lm_head"):
        model = KINDS["llama"].build("lm_head")
        bayes = tfb.bayesianize(model, layers=pattern)
        assert (
            relative(bayes.logits(batch_of(), DRAWS), single_runs(bayes, DRAWS, batch_of())) < EXACT
        )


@pytest.mark.parametrize("how", [{}, {"mode": "tail", "tail": 3}])
def test_a_thousand_draws_of_the_head_cost_one_pass(how: dict[str, Any]) -> None:
    """Without being told to: parts of the draws would run the backbone again for each."""
    bayes = tfb.bayesianize(KINDS["llama"].build("lm_head"), layers=tfb.last_layers(0))
    draws = Draws.antithetic(1000, 0.2)
    names = ["model.layers.0.mlp", "model.layers.2.mlp", "lm_head.base_layer"]
    seen = rows_seen(bayes, names, lambda: bayes.logits(batch_of(), draws, **how))
    assert [seen[n] for n in names] == [[B]] * 3


def test_draws_below_the_head_are_counted_in_full() -> None:
    """Noise in a block too, or a head of a second adapter: every draw takes all positions."""
    model = KINDS["llama"].build("lm_head")
    assert not tfb.bayesianize(model).head_alone
    model = KINDS["llama"].build("lm_head")
    bayes = tfb.bayesianize(model, layers=tfb.last_layers(0))
    assert bayes.head_alone
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    randomize(model, 3, ".other.").double()
    model.base_model.set_adapter(["default", "other"])
    assert not bayes.head_alone
    assert relative(bayes.logits(batch_of(), DRAWS), single_runs(bayes, DRAWS, batch_of())) < EXACT


@pytest.mark.parametrize("layers", ["all", "last", "head"])
def test_a_disabled_adapter_inside_sampling(layers: str) -> None:
    """S copies of the base model's rows; afterwards the draws are what they were."""
    k = {"all": 3, "last": 1, "head": 0}[layers]
    bayes = tfb.bayesianize(KINDS["llama"].build("lm_head"), layers=tfb.last_layers(k))
    batch = make_batch(5, 5, 5)
    with torch.no_grad():
        with bayes.model.disable_adapter():
            plain = bayes.model(**batch).logits
        with bayes.sampling(DRAWS):
            before = bayes.model(**batch).logits
            with bayes.model.disable_adapter():
                disabled = bayes.model(**batch).logits
            after = bayes.model(**batch).logits
    assert relative(disabled, plain.repeat(S, 1, 1)) < EXACT
    assert after.equal(before) and relative(before, disabled) > 1e-3
    with bayes.model.disable_adapter(), pytest.raises(ValueError, match="the adapter is disabled"):
        bayes.logits(batch, DRAWS)
