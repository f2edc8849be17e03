"""Shared prefixes: the best length, the saving it promises, and predictions that do not change."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import DRAWS, KINDS, SIZES, Kind, of, prompts, single_runs, tokens_of
from support.models import make_batch, relative

import tfb
from tfb.sampling import forward as passes
from tfb.sampling.kv_cache import LEAST_SAVING, find_shared_prefix, spread_cache

EXACT = 1e-10
S = len(DRAWS)
LABELS = torch.tensor([7, 9, 11])
MODES: list[dict[str, Any]] = [{}, {"mode": "tail", "tail": 1}, {"mode": "tail", "tail": 4}]


def unshared(monkeypatch: pytest.MonkeyPatch, call: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(passes, "find_shared_prefix", lambda *_, **__: None)
        return call()


# --- the search -----------------------------------------------------------------------------------

A, C = [1] * 8, [2] * 8  # two contexts


@pytest.mark.parametrize(
    ("rows", "keep", "length", "owner"),
    [
        ([[*A, 3], [*A, 4]], 1, 8, [0, 0]),
        ([[*A, 3, 5, 6], [*A, 3, 5, 6]], 1, 10, [0, 0]),  # equal rows share all but the last
        ([[*A, 3, 5, 6], [*A, 3, 5, 6]], 3, 8, [0, 0]),  # or all but the tail
        ([[*C, 3], [*A, 3], [*C, 4], [*A, 4]], 1, 8, [1, 0, 1, 0]),  # interleaved
        ([[*A, 3], [*A, 4], [*C, 3]], 1, 8, [0, 0, 1]),  # a row of its own among them
        ([A + [3] * 9, [*A, 4]], 1, 8, [0, 0]),  # unequal lengths: the shorter one bounds
        # Two levels: all begin alike for 4 tokens, pairs for 8. The longer is the cheaper one.
        (
            [
                [9] * 4 + [1] * 4 + [3],
                [9] * 4 + [1] * 4 + [4],
                [9] * 4 + [2] * 4 + [3],
                [9] * 4 + [2] * 4 + [4],
            ],
            1,
            8,
            [0, 0, 1, 1],
        ),
    ],
)
def test_known_prefixes(rows: list[list[int]], keep: int, length: int, owner: list[int]) -> None:
    found = find_shared_prefix(rows, keep)
    assert found is not None
    assert found.length == length and found.owner.tolist() == owner
    firsts = {o: rows[b][:length] for b, o in reversed(list(enumerate(owner)))}
    assert found.ids.tolist() == [firsts[o] for o in sorted(firsts)]


@pytest.mark.parametrize(
    ("rows", "keep"),
    [
        ([[*A, 3]], 1),  # a single row
        ([[1, 2], [3, 4]], 1),  # nothing in common
        ([[1], [1]], 1),  # nothing but the token that is scored
        ([A, A], 8),  # nothing but the tail
        ([A, [1]], 1),  # a row of one token
        ([[1] + [3] * 9, [1] + [4] * 9], 1),  # 1 of 20 tokens
    ],
)
def test_no_prefix(rows: list[list[int]], keep: int) -> None:
    assert find_shared_prefix(rows, keep) is None


row_lists = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 8), st.lists(st.integers(0, 1), max_size=4)).map(
        lambda t: [5 + t[0]] * t[1] + t[2]
    ),
    min_size=1,
    max_size=8,
).filter(lambda rows: all(rows))


@given(row_lists, st.integers(1, 4))
def test_the_best_saving_is_found_and_kept(rows: list[list[int]], keep: int) -> None:
    """Brute force over every length; the tokens that are left are those that were promised."""
    B, T = len(rows), max(map(len, rows))
    lengths = range(1, min(map(len, rows)) - keep + 1)
    cost = {c: len({tuple(r[:c]) for r in rows}) * c + B * (T - c) for c in lengths}
    found = find_shared_prefix(rows, keep)
    if found is None:
        assert B == 1 or min(cost.values(), default=B * T) > (1 - LEAST_SAVING) * B * T
        return
    left = found.ids.numel() + B * (T - found.length)
    assert left == cost[found.length] == min(cost.values()) <= (1 - LEAST_SAVING) * B * T
    assert found.ids.shape[1] == found.length <= min(map(len, rows)) - keep
    assert len({tuple(i) for i in found.ids.tolist()}) == len(found.ids)
    assert [found.ids[o].tolist() for o in found.owner] == [r[: found.length] for r in rows]


@pytest.mark.parametrize("draws", [1, 3])
def test_spreading_a_cache(draws: int) -> None:
    """Row b of draw s gets what prefix owner[b] of draw s has."""
    owner, groups = torch.tensor([1, 0, 1, 1]), 2
    cache = transformers.DynamicCache()
    keys = torch.arange(draws * groups * 6.0).view(draws * groups, 1, 3, 2)
    cache.update(keys, -keys, 0)
    cache.update(keys[:groups], keys[:groups] + 1, 1)  # a layer that all draws have in common
    spread = spread_cache(cache, owner, groups)
    expected = keys.unflatten(0, (draws, groups))[:, owner].flatten(0, 1)
    assert spread.layers[0].keys.equal(expected) and spread.layers[0].values.equal(-expected)
    assert spread.layers[1].keys.equal(keys[owner])
    assert spread.layers[1].values.equal(keys[owner] + 1)
    assert cache.layers[0].keys.equal(keys)


# --- predictions ----------------------------------------------------------------------------------

GROUPS = {
    "one context": [(0, 3), (0, 1), (0, 2)],
    "interleaved": [(0, 2), (1, 5), (0, 4), (2, 1), (1, 1), (2, 6)],
    "many rows": [(b % 3, 1 + b % 4) for b in range(17)],
    "one of its own": [(0, 2), (0, 2), (0, 3), (0, 1), (1, 9)],
}


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_predictions_do_not_change(
    kind: str, groups: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the groups, the lengths and the padding; for a draw by itself too."""
    bayes = tfb.bayesianize(KINDS[kind].build())
    for pad in ("left", "right"):
        batch = prompts(*GROUPS[groups], pad=pad)
        found = bayes.logits(batch, DRAWS, LABELS, **how)
        plain = unshared(monkeypatch, lambda b=batch: bayes.logits(b, DRAWS, LABELS, **how))
        assert relative(found, plain) < EXACT
    if groups == "interleaved":
        single = single_runs(bayes, DRAWS, batch, label_ids=LABELS, **how)
        assert relative(found, single) < EXACT


@functools.cache
def upper_blocks() -> Any:
    """One model for all examples: shared blocks below, noisy ones above."""
    return tfb.bayesianize(KINDS["llama"].build(), layers=tfb.last_layers(2))


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=2, max_size=6),
    st.integers(1, 7),
    st.sampled_from(MODES),
)
def test_any_groups_at_all(groups: list[tuple[int, int]], start: int, how: dict[str, Any]) -> None:
    bayes, batch = upper_blocks(), prompts(*groups, start=start)
    found = bayes.logits(batch, DRAWS, **how)
    rows = [
        bayes.logits({k: v[b : b + 1] for k, v in batch.items()}, DRAWS, **how)
        for b in range(len(groups))
    ]
    assert relative(found, torch.cat(rows, 1)) < EXACT


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_prefix_is_computed_once(kind: str) -> None:
    """The embedding sees every context once and every continuation once, whatever S."""
    bayes = tfb.bayesianize(KINDS[kind].build())
    batch = prompts(*GROUPS["interleaved"])
    assert tokens_of(bayes, batch) == [(3, 6), (6, 6)]
    # T = 12; the tail of 4 may begin inside a context, which is then shared up to there.
    shortest = 6 + 1
    for k in (1, 4):
        c = min(6, shortest - k)
        assert tokens_of(bayes, batch, mode="tail", tail=k) == [(3, c), (6, 12 - c - k), (6, S * k)]
    # Draws in two parts: once for each part.
    assert tokens_of(bayes, batch, draws_per_pass=2) == [(3, 6), (6, 6)] * 2


def test_token_noise_reads_prompts_in_one_call() -> None:
    """In two noisy calls the first tokens of both would get the same normals."""
    bayes, batch = tfb.bayesianize(KINDS["llama"].build()), prompts(*GROUPS["interleaved"])
    draws = tfb.Draws.iid(4, 0.2, noise="token")
    assert tokens_of(bayes, batch, draws) == [(6, 12)]
    tail = tokens_of(bayes, batch, draws, mode="tail", tail=1)
    assert tail == [(3, 6), (6, 5), (6, 4)]


def test_blocks_see_prefixes_of_every_draw_only_where_there_is_noise() -> None:
    bayes = tfb.bayesianize(KINDS["llama"].build(), layers=tfb.last_layers(1))
    seen: list[tuple[int, int, int]] = []
    for i in (0, 2):
        bayes.base.model.layers[i].mlp.register_forward_pre_hook(
            lambda m, args, i=i: seen.append((i, *args[0].shape[:2]))
        )
    bayes.logits(prompts(*GROUPS["one context"]), DRAWS)
    assert seen == [(0, 1, 6), (2, S, 6), (0, 3, 3), (2, 3 * S, 3)]


def test_equal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the last token is one prefix."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    batch = {k: v.repeat(4, 1) for k, v in make_batch(9).items()}
    assert tokens_of(bayes, batch) == [(1, 8), (4, 1)]
    plain = unshared(monkeypatch, lambda: bayes.logits(batch, DRAWS))
    assert relative(bayes.logits(batch, DRAWS), plain) < EXACT


# --- where rows are left whole --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "qwen3-window"])
def test_windows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding would come to lie inside a window of 4; prompts within the window are split."""
    bayes = tfb.bayesianize(KINDS[kind].build())
    long, short = prompts(*GROUPS["one context"]), prompts((0, 1), (0, 2), (0, 1), start=2)
    assert tokens_of(bayes, long) == [(3, 9)]
    assert tokens_of(bayes, short) == [(1, 2), (3, 2)]
    for batch in (long, short):
        for how in MODES:
            plain = unshared(monkeypatch, lambda b=batch, h=how: bayes.logits(b, DRAWS, **h))
            assert relative(bayes.logits(batch, DRAWS, **how), plain) < EXACT


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_positions_of_the_callers_own(
    kind: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix's positions are counted from 0; rows that say otherwise are left whole."""
    bayes = tfb.bayesianize(KINDS[kind].build())
    batch = prompts(*GROUPS["interleaved"])
    counted = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    usual = bayes.logits(batch, DRAWS, **how)
    assert relative(bayes.logits({**batch, "position_ids": counted}, DRAWS, **how), usual) < EXACT
    spaced = {**batch, "position_ids": 2 * counted + 3}
    found = bayes.logits(spaced, DRAWS, **how)
    plain = unshared(monkeypatch, lambda: bayes.logits(spaced, DRAWS, **how))
    assert relative(found, plain) < EXACT and relative(found, usual) > 1e-3
    assert tokens_of(bayes, {**batch, "position_ids": counted})[0] == (3, 6)
    assert tokens_of(bayes, spaced) == [(6, 12)]


ROPE: dict[str, dict[str, Any]] = {
    "longrope": {
        "short_factor": [1.0, 1.0],
        "long_factor": [3.0, 9.0],
        "factor": 8.0,
        "original_max_position_embeddings": 8,
    },
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("rope", ROPE)
def test_angles_that_change_with_the_length(rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a short prefix by itself are not those within a long prompt."""
    parameters = {"rope_type": rope, "rope_theta": 10000.0, **ROPE[rope]}
    most = SIZES["max_position_embeddings"] if rope == "longrope" else 8
    make = of(
        "LlamaConfig:LlamaForCausalLM", rope_parameters=parameters, max_position_embeddings=most
    )
    bayes = tfb.bayesianize(Kind(make, ["q_proj", "v_proj"]).build())
    batch = prompts(*GROUPS["one context"])
    assert tokens_of(bayes, batch) == [(3, 9)]
    plain = unshared(monkeypatch, lambda: bayes.logits(batch, DRAWS))
    assert relative(bayes.logits(batch, DRAWS), plain) < EXACT


def test_what_is_not_understood_is_left_whole() -> None:
    """Arguments beyond ids, mask and positions run over tokens too; classifiers pool them."""
    bayes = tfb.bayesianize(KINDS["gpt2"].build())
    batch = prompts(*GROUPS["one context"])
    assert tokens_of(bayes, batch)[0] == (1, 6)
    typed = {**batch, "token_type_ids": torch.full_like(batch["input_ids"], 5)}
    assert (1, 6) not in tokens_of(bayes, typed)
    classifier = tfb.bayesianize(KINDS["llama-classifier"].build())
    assert tokens_of(classifier, batch) == [(3, 9)]
