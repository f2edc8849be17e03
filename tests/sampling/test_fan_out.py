"""What is computed once: rows that modules see, prefixes, chunks, label columns, adaptive draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from support.models import HIDDEN, VOCAB, make_batch, randomize, relative
from test_architectures import DRAWS, KINDS, batch_of, single_runs
from torch import Tensor

import tfb
from tfb import Draws
from tfb.sampling import forward as passes
from tfb.sampling.adaptive import Adaptive
from tfb.sampling.fan_out import FOLDABLE
from tfb.sampling.kv_cache import LEAST_SAVING, find_shared_prefix
from tfb.sampling.memory import CPU_BYTES, draws_that_fit

EXACT = 1e-10
B, S = 3, len(DRAWS)


def rows_seen(bayes: Any, names: Sequence[str], call: Callable[[], object]) -> dict[str, list[int]]:
    """Rows of the input of each named module, call by call."""
    seen: dict[str, list[int]] = {n: [] for n in names}
    handles = []
    for name in names:

        def hook(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            seen[name].append(len(value))

        module = bayes.base.get_submodule(name)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    call()
    for handle in handles:
        handle.remove()
    return seen


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
    inputs, _ = bayes.inputs(batch_of(), "full")
    with torch.no_grad():
        assert relative(mean, model(**inputs).logits[:, -1]) < EXACT


# --- chunks and label columns ---------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"mode": "tail", "tail": 2}])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_chunks_change_nothing(size: int, how: dict[str, Any]) -> None:
    """Draws in several passes, pairs kept together, in the order that was asked for."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    draws = Draws.antithetic(10, 0.2, seed=2)
    whole = bayes.logits(batch_of(), draws, draws_per_pass=10, **how)
    parts = bayes.logits(batch_of(), draws, draws_per_pass=size, **how)
    assert relative(parts, whole) < EXACT
    with pytest.raises(ValueError, match="draws_per_pass=0"):
        bayes.logits(batch_of(), draws, draws_per_pass=0, **how)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("size", [1, 3])
def test_parts_of_the_draws_replay_the_blocks_below_the_noise(kind: str, size: int) -> None:
    """Whatever a block returns: all draws in one pass, and in parts of one draw or more, agree."""
    bayes = tfb.bayesianize(KINDS[kind].build(), layers=tfb.last_layers(1))
    draws = Draws.iid(5, 0.2, seed=2)
    whole = bayes.logits(batch_of(), draws, draws_per_pass=5)
    parts = bayes.logits(batch_of(), draws, draws_per_pass=size)
    assert relative(parts, whole) < EXACT


@pytest.mark.parametrize("size", [1, 2])
def test_blocks_below_the_noise_run_once_for_all_parts(size: int) -> None:
    bayes = tfb.bayesianize(KINDS["llama"].build(), layers=tfb.last_layers(1))
    names = [f"model.layers.{i}.mlp.gate_proj" for i in range(3)]
    draws = Draws.iid(4, 0.2)
    seen = rows_seen(bayes, names, lambda: bayes.logits(batch_of(), draws, draws_per_pass=size))
    assert [seen[n] for n in names] == [[B], [B], [size * B] * (4 // size)]


def test_a_replay_ends_with_its_batch() -> None:
    """Other batches and plain passes see their own rows; remove() leaves blocks as they were."""
    model = KINDS["llama"].build()
    before = [dict(vars(block)) for block in model.base_model.model.model.layers]
    bayes = tfb.bayesianize(model, layers=tfb.last_layers(1))
    other = {k: v.flip(0) for k, v in batch_of().items()}
    inputs, _ = bayes.inputs(batch_of(), "full")
    with torch.no_grad():
        plain = bayes.model(**inputs).logits
    a = bayes.logits(batch_of(), DRAWS, draws_per_pass=1)
    b = bayes.logits(other, DRAWS, draws_per_pass=1)
    assert relative(b.flip(1), a) < EXACT
    with torch.no_grad():
        assert torch.equal(bayes.model(**inputs).logits, plain)
    bayes.remove()
    layers = model.base_model.model.model.layers
    assert [set(vars(block)) for block in layers] == [set(d) for d in before]


def test_memory_of_a_cpu() -> None:
    """As much as the widest activation may take, at least one draw, never more than asked for."""
    base, ids = KINDS["llama"].make(), torch.zeros(4, 100, dtype=torch.int64)
    token = 2 * HIDDEN * 4  # bytes, float32
    assert draws_that_fit(base, 10, ids, None) == 10
    assert draws_that_fit(base, 10**6, ids, None) == CPU_BYTES // (400 * token)
    assert draws_that_fit(base, 10**6, ids, 1) == CPU_BYTES // (4 * token)
    assert draws_that_fit(base, 5, torch.zeros(1, CPU_BYTES // token + 1), None) == 1


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_only_label_rows_of_the_head_are_multiplied(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids [K] or [B, K]: the distinct ones are computed, and give the full head's values."""
    bayes = tfb.bayesianize(KINDS[kind].build())
    everything = bayes.logits(batch_of(), DRAWS)
    computed: list[int] = []
    linear = torch.nn.functional.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[1] == HIDDEN and weight.shape[0] in (3, 5, VOCAB):
            computed.append(weight.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    common = torch.tensor([5, 9, 63])
    assert relative(bayes.logits(batch_of(), DRAWS, common), everything[..., common]) < EXACT
    assert computed == [3]
    own = torch.tensor([[5, 9], [63, 5], [7, 8]])
    found = bayes.logits(batch_of(), DRAWS, own)
    assert relative(found, everything.gather(-1, own.expand(S, 3, 2))) < EXACT
    assert computed == [3, 5]
    bayes.remove()
    assert "forward" not in vars(bayes.base.get_output_embeddings())


# --- prefixes -------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=7), min_size=1, max_size=6),
       st.integers(1, 2))  # fmt: skip
def test_shared_prefix_is_the_best(rows: list[list[int]], keep: int) -> None:
    """Against all lengths by brute force: fewest tokens, or none where too little is saved."""
    B, T = len(rows), max(map(len, rows))
    longest = min(map(len, rows)) - keep
    costs = {c: len({tuple(r[:c]) for r in rows}) * c + B * (T - c) for c in range(1, longest + 1)}
    best = min(costs.values(), default=B * T)
    found = find_shared_prefix(rows, keep)
    if B < 2 or best > (1 - LEAST_SAVING) * B * T:
        assert found is None
        return
    assert found is not None and costs[found.length] == best
    for row, owner in zip(rows, found.owner.tolist(), strict=True):
        assert found.ids[owner].tolist() == row[: found.length]
    assert len({tuple(i) for i in found.ids.tolist()}) == len(found.ids)


def contexts() -> dict[str, Tensor]:
    """Two contexts of eight tokens with two and three continuations, padded left."""
    g = torch.Generator().manual_seed(0)
    starts = torch.randint(4, VOCAB, (2, 8), generator=g)
    rows = [(0, 3), (0, 1), (1, 3), (1, 2), (1, 3)]
    batch = make_batch(*(8 + n for _, n in rows))
    for row, (context, n) in enumerate(rows):
        batch["input_ids"][row, 3 - n : 11 - n] = starts[context]
    return {k: v for k, v in batch.items() if k != "position_ids"}


@pytest.mark.parametrize("how", [{}, {"mode": "tail", "tail": 1}, {"mode": "tail", "tail": 3}])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "phi3"])
def test_shared_prefixes_change_nothing(
    kind: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two contexts, five rows: the prefixes run once (each draw), the numbers stay."""
    for layers in (None, tfb.last_layers(1)):
        bayes = tfb.bayesianize(KINDS[kind].build(), layers=layers)
        ids = torch.tensor([7, 9, 11])
        found = bayes.logits(contexts(), DRAWS, ids, **how)
        with monkeypatch.context() as patch:
            patch.setattr(passes, "find_shared_prefix", lambda *_, **__: None)
            plain = bayes.logits(contexts(), DRAWS, ids, **how)
        assert relative(found, plain) < EXACT
        assert relative(found, single_runs(bayes, DRAWS, contexts(), label_ids=ids, **how)) < EXACT


def test_shared_prefixes_are_computed_once() -> None:
    """Sixteen tokens of two contexts in place of forty, then what is left."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    tokens: list[tuple[int, ...]] = []
    embed = bayes.base.get_submodule("model.embed_tokens")
    handle = embed.register_forward_pre_hook(lambda m, a: tokens.append(tuple(a[0].shape)))
    bayes.logits(contexts(), DRAWS)
    assert tokens == [(2, 8), (5, 3)]  # the embedding is below the noise: rows, not draws
    tokens.clear()
    bayes.logits(contexts(), DRAWS, mode="tail", tail=1)
    assert tokens == [(2, 8), (5, 2), (5, S)]
    handle.remove()


def test_windows_shorter_than_the_prompt_are_not_split() -> None:
    """Padding would come to lie between prefix and rest, inside the window."""
    bayes = tfb.bayesianize(KINDS["mistral"].build())
    inputs, _ = bayes.inputs(contexts(), "full")
    assert not passes.may_share(bayes, inputs)
    assert passes.may_share(tfb.bayesianize(KINDS["llama"].build()), inputs)


# --- adaptive draws -------------------------------------------------------------------------------


def adaptive(bayes: Any, batch: dict[str, Tensor], **settings: Any) -> tfb.Predictive:
    found: tfb.Predictive = bayes.predict(batch, Adaptive(**settings))
    return found


def test_rows_stop_by_their_own_error() -> None:
    """Each row's error is within the tolerance or its draws are exhausted, and its result is that
    of predicting with as many draws."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    bayes.sigma = 0.3
    batch = make_batch(11, 6, 9, 4, 8, 10)
    found = adaptive(bayes, batch, tolerance=0.02, most=32)
    assert found.draw_counts is not None and len(set(found.draw_counts.tolist())) > 1
    error = found.standard_error.gather(-1, found.prediction[:, None])[:, 0]
    assert bool(((error <= 0.02) | (found.draw_counts == 32)).all())
    for row, count in enumerate(found.draw_counts.tolist()):
        fixed = bayes.predict(batch, count)
        assert relative(found.probs[row], fixed.probs[row]) < 1e-6
        assert relative(found.standard_error[row], fixed.standard_error[row]) < 1e-5


def test_adaptive_rows_do_not_see_each_other() -> None:
    """Alone, in a batch or in another order, a row gets the same draws and the same result."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    bayes.sigma = 0.3
    batch = make_batch(11, 6, 9, 4, 8, 10)
    whole = adaptive(bayes, batch, tolerance=0.02, most=32)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = adaptive(bayes, {k: v[order] for k, v in batch.items()}, tolerance=0.02, most=32)
    assert whole.draw_counts is not None and turned.draw_counts is not None
    assert turned.draw_counts.equal(whole.draw_counts[order])
    assert relative(turned.probs, whole.probs[order]) < EXACT
    for row in range(6):
        alone = adaptive(
            bayes, {k: v[row : row + 1] for k, v in batch.items()}, tolerance=0.02, most=32
        )
        assert alone.draw_counts is not None
        assert int(alone.draw_counts[0]) == int(whole.draw_counts[row])
        assert relative(alone.probs[0], whole.probs[row]) < EXACT


def test_adaptive_settings() -> None:
    bayes = tfb.bayesianize(KINDS["llama"].build())
    bayes.sigma = 0.3
    batch = batch_of()
    strict = adaptive(bayes, batch, tolerance=1e-12, most=8)
    assert strict.draw_counts is not None and strict.draw_counts.tolist() == [8, 8, 8]
    loose = adaptive(bayes, batch, tolerance=1.0)
    assert loose.draw_counts is not None and loose.draw_counts.tolist() == [4, 4, 4]
    own = torch.tensor([[5, 9], [63, 5], [7, 8]])
    assert bayes.predict(batch, "auto", label_ids=own).probs.shape == (3, 2)
    with pytest.raises(ValueError, match="draws='many'"):
        bayes.predict(batch, "many")
    with pytest.raises(ValueError, match="keep_draws"):
        bayes.predict(batch, "auto", keep_draws=True)
    for bad in ({"tolerance": 0.0}, {"most": 3}, {"first": 3}, {"first": 8, "most": 6}):
        with pytest.raises(ValueError, match="expected"):
            Adaptive(**bad)


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
    assert not tfb.bayesianize(model)._fan_out.head_alone
    model = KINDS["llama"].build("lm_head")
    bayes = tfb.bayesianize(model, layers=tfb.last_layers(0))
    assert bayes._fan_out.head_alone
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    randomize(model, 3, ".other.").double()
    model.base_model.set_adapter(["default", "other"])
    assert not bayes._fan_out.head_alone
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
