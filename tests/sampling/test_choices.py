"""Choices of several tokens: the definition, computed with PEFT one choice at a time; then the ways
in which prompts and continuations are shared, none of which may change it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.architectures import (
    CAUSAL,
    DRAWS,
    KINDS,
    Kind,
    prompts,
    rows_seen,
    single_runs,
    tokens_of,
    varying_angles,
)
from support.command import Run, fit_command
from support.models import CASES, HIDDEN, exact, make_batch, naive, randomize, relative, rows_of
from torch import Tensor

import tfb
from tfb import Draws
from tfb.data.batching import NO_TOKEN, EncodedRows, pad_choices
from tfb.data.encoding import RowEncoder
from tfb.data.readers import read_rows
from tfb.sampling.adaptive import Adaptive
from tfb.sampling.choices import ChoiceTokens
from tfb.sampling.forward import CHOICE_BYTES
from tfb.scoring.evaluate import predict_rows
from tfb.search.loss import AnchorLoss, AnchorSet

EXACT = 1e-10
SINGLE = 1e-6  # probabilities are kept in float32: eps, with room for a ratio
LENGTHS = (7, 2, 5)
TAILS: list[dict[str, Any]] = [{}, {"mode": "tail", "tail": 1}, {"mode": "tail", "tail": 3}]
# Four choices of each row. Row 0: (9,) begins (9, 5), and (9, 5, 8) and (9, 5, 6) differ in their
# last token alone. Row 1: all of one length. Row 2: single tokens beside a long choice.
CHOICES = [
    [(9,), (9, 5), (9, 5, 8), (9, 5, 6)],
    [(7, 20), (20, 7), (7, 7), (30, 31)],
    [(11,), (12,), (40, 41, 42, 43), (13,)],
]
IDS = pad_choices(CHOICES)
LETTERS = torch.tensor([[5, 9, 63], [7, 8, 20], [40, 41, 42]])


def batch_of(pad: str = "left") -> dict[str, Tensor]:
    return make_batch(*LENGTHS, pad=pad)


@functools.cache
def bayesian(kind: str = "llama", blocks: int | None = None, *extra: str) -> Any:
    layers = None if blocks is None else tfb.last_layers(blocks)
    bayes = tfb.bayesianize(KINDS[kind].build(*extra), layers=layers, seed=3)
    bayes.configure(sigma=0.3)
    return bayes


@torch.no_grad()
def by_hand(
    batch: dict[str, Tensor],
    choices: Sequence[Sequence[tuple[int, ...]]],
    read: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Scores [B, K]. ``read(ids, n)``: logits [1, n, V] after the last n of ids [1, T]."""
    scores = []
    for row, found in enumerate(choices):
        prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        for choice in found:
            ids = torch.cat([prompt, torch.tensor(choice)])[None]
            log_probs = read(ids[:, :-1], len(choice)).log_softmax(-1)[0]
            scores.append(log_probs[range(len(choice)), list(choice)].sum())
    return torch.stack(scores).view(len(choices), -1)


def whole(model: Any) -> Callable[[Tensor, int], Tensor]:
    return lambda ids, n: model(input_ids=ids).logits[:, -n:]


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "blocks"), [*((kind, None) for kind in CAUSAL), ("llama", 1), ("gemma3", 1)]
)
def test_full_is_the_definition(kind: str, blocks: int | None) -> None:
    """Every prompt with each of its choices through each draw's weights; sigma = 0 is the adapter.

    Among the kinds: grouped queries, sliding windows shorter than a prompt, softcapped logits.
    """
    bayes, twin, batch = bayesian(kind, blocks), KINDS[kind].build(), batch_of()
    expected = naive(twin, bayes.posteriors, DRAWS, lambda m: by_hand(batch, CHOICES, whole(m)))
    found = bayes.logits(batch, DRAWS, IDS)
    assert found.shape == (len(DRAWS), 3, 4)
    assert relative(found, expected) < EXACT
    assert relative(found, bayes.logits(batch_of("right"), DRAWS, IDS)) < EXACT
    assert relative(found[0], found[2]) > 1e-3  # the draws do differ
    mean = by_hand(batch, CHOICES, whole(twin))
    assert relative(bayes.logits(batch, Draws.mean(), IDS)[0], mean) < EXACT


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", CAUSAL)
def test_tail_is_the_definition(kind: str, k: int) -> None:
    """Keys and values of a prompt but its last k tokens from the mean adapter; its last k tokens
    and the choice with a draw's weights."""
    bayes, batch = bayesian(kind), batch_of()
    mean, twin = KINDS[kind].build(), KINDS[kind].build()

    def in_two(sampled: Any) -> Callable[[Tensor, int], Tensor]:
        def read(ids: Tensor, n: int) -> Tensor:
            T, cache = ids.shape[1], transformers.DynamicCache()
            first = max(0, T - (k + n - 1))
            if first:
                mean(input_ids=ids[:, :first], past_key_values=cache, use_cache=True)
            position = torch.arange(first, T)[None]
            out = sampled(
                input_ids=ids[:, first:],
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            logits: Tensor = out.logits[:, -n:]
            return logits

        return read

    expected = naive(
        twin, bayes.posteriors, DRAWS[:2], lambda m: by_hand(batch, CHOICES, in_two(m))
    )
    found = bayes.logits(batch, DRAWS[:2], IDS, mode="tail", tail=k)
    assert relative(found, expected) < EXACT
    right = bayes.logits(batch_of("right"), DRAWS[:2], IDS, mode="tail", tail=k)
    assert relative(found, right) < EXACT
    exact = bayes.logits(batch, Draws.mean(), IDS)
    assert relative(bayes.logits(batch, Draws.mean(), IDS, mode="tail", tail=k), exact) < EXACT


def test_tail_of_the_whole_prompt_is_full() -> None:
    bayes, full = bayesian(), bayesian().logits(batch_of(), DRAWS, IDS)
    assert bayes.logits(batch_of(), DRAWS, IDS, mode="tail", tail=7).equal(full)
    assert relative(bayes.logits(batch_of(), DRAWS, IDS, mode="tail", tail=6), full) > 1e-6


@pytest.mark.parametrize("how", TAILS)
@pytest.mark.parametrize("extra", [(), ("lm_head",)])
def test_one_token_is_a_label_column(extra: tuple[str, ...], how: dict[str, Any]) -> None:
    """Softmax over log-probabilities is softmax over logits, for each draw; so the odds of two
    letters do not change when a choice of several tokens stands beside them."""
    bayes, batch = bayesian("llama", None, *extra), batch_of()
    columns = bayes.logits(batch, DRAWS, LETTERS, **how)
    scores = bayes.logits(batch, DRAWS, LETTERS[..., None], **how)
    assert relative(scores.softmax(-1), columns.softmax(-1)) < EXACT
    assert relative(scores.exp().sum(-1), torch.ones(4, 3).double()) > 1e-2  # not all there is
    longer = pad_choices([[*((i,) for i in row), (33, 34)] for row in LETTERS.tolist()])
    beside = bayes.logits(batch, DRAWS, longer, **how)[..., :3]
    assert relative(beside, scores) < EXACT
    a, b = (
        bayes.predict(batch, DRAWS, label_ids=LETTERS, **how),
        bayes.predict(batch, DRAWS, label_ids=LETTERS[..., None], **how),
    )
    assert relative(a.probs, b.probs) < EXACT and relative(a.total, b.total) < EXACT


def test_probabilities_are_averaged_over_draws() -> None:
    """Never scores: the mean of each draw's softmax over the row's choices."""
    bayes = bayesian()
    found = bayes.predict(batch_of(), DRAWS, label_ids=IDS, keep_draws=True)
    each = bayes.logits(batch_of(), DRAWS, IDS).softmax(-1)
    assert relative(found.probs, each.mean(0)) < EXACT
    assert found.draw_probs is not None and relative(found.draw_probs, each) < EXACT


def test_scores_of_low_precision_are_float32() -> None:
    """Logits of bfloat16 are normalised and summed in float32, to its rounding."""
    model = KINDS["llama"].build().to(torch.bfloat16)
    bayes = tfb.bayesianize(model)
    found = bayes.logits(batch_of(), Draws.mean(), IDS)
    assert found.dtype == torch.float32
    choices = ChoiceTokens.of(bayes.base, IDS, 3)
    logits = torch.randn(2, len(choices.owner), 4, 64, generator=torch.Generator().manual_seed(0))
    low = choices.reduce(logits.bfloat16())
    exact = choices.reduce(logits.bfloat16().double())
    assert low.dtype == torch.float32 and relative(low, exact) < 1e-6


# --- what may not matter --------------------------------------------------------------------------


@pytest.mark.parametrize("how", TAILS)
def test_parts_of_the_draws(how: dict[str, Any]) -> None:
    bayes, together = bayesian(), bayesian().logits(batch_of(), DRAWS, IDS, **how)
    assert relative(together, single_runs(bayes, DRAWS, batch_of(), label_ids=IDS, **how)) < EXACT
    for most in (1, 2, 3):
        parts = bayes.logits(batch_of(), DRAWS, IDS, draws_per_pass=most, **how)
        assert relative(parts, together) < EXACT


@pytest.mark.parametrize("how", TAILS)
@pytest.mark.parametrize(("kind", "blocks"), [("mistral", None), ("gpt2", 1)])
def test_parts_of_the_choices(
    kind: str, blocks: int | None, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory bounds the continuations of a pass: one, or as many as fit, score what all would."""
    bayes, name = bayesian(kind, blocks), "transformer.h.2" if kind == "gpt2" else "model.layers.2"
    together = bayes.logits(batch_of(), DRAWS, IDS, **how)
    for bytes_, most in ((1, 1), (25_000, 4)):
        monkeypatch.setitem(CHOICE_BYTES, "cpu", bytes_)
        seen = rows_seen(
            bayes, [name], lambda: bayes.logits(batch_of(), DRAWS[:1], IDS, draws_per_pass=1, **how)
        )
        assert max(seen[name][1:]) <= most and sum(seen[name]) == 3 + 5
        for size in (None, 3):
            parts = bayes.logits(batch_of(), DRAWS, IDS, draws_per_pass=size, **how)
            assert relative(parts, together) < EXACT


def test_token_noise_is_not_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It numbers the tokens of a call: choices of two calls would get the same noise."""
    token = Draws.iid(2, 0.2, noise="token")
    together = bayesian().logits(batch_of(), token, IDS)
    monkeypatch.setitem(CHOICE_BYTES, "cpu", 1)
    assert bayesian().logits(batch_of(), token, IDS).equal(together)


@pytest.mark.parametrize("how", TAILS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_a_row_is_itself_in_any_company(kind: str, how: dict[str, Any]) -> None:
    """Alone, where its longest choice is shorter, and in another order of rows and choices."""
    bayes = bayesian(kind)
    together = bayes.logits(batch_of(), DRAWS, IDS, **how)
    for row, choices in enumerate(CHOICES):
        alone = bayes.logits(rows_of(batch_of(), row), DRAWS, pad_choices([choices]), **how)
        assert relative(alone[:, 0], together[:, row]) < EXACT
    order, turn = [2, 0, 1], [3, 1, 0, 2]
    turned = bayes.logits(rows_of(batch_of(), *order), DRAWS, IDS[order][:, turn], **how)
    assert relative(turned, together[:, order][:, :, turn]) < EXACT


@pytest.mark.parametrize("how", TAILS)
def test_adaptive_draws(how: dict[str, Any]) -> None:
    bayes, settings = bayesian(), Adaptive(tolerance=0.02, most=16)
    found = bayes.predict(batch_of(), settings, label_ids=IDS, **how)
    assert found.draw_counts is not None and len(set(found.draw_counts.tolist())) > 1
    for row, n in enumerate(found.draw_counts.tolist()):
        alone = bayes.predict(rows_of(batch_of(), row), n, label_ids=IDS[row : row + 1], **how)
        assert relative(alone.probs[0], found.probs[row]) < EXACT


# --- what is shared -------------------------------------------------------------------------------


def test_prompts_are_read_once() -> None:
    """Embeddings see each prompt once, not once for each choice nor (below all noise) each draw;
    then 1 + 3 + 1 continuations of 4 columns: row 0's choices are all read with its longest, row
    1's two that begin with token 7 are one, row 2's letters cost nothing."""
    bayes = bayesian("llama", 1)
    choices = ChoiceTokens.of(bayes.base, IDS, 3)
    assert choices.read.tolist() == [[9, 5, 0], [7, 0, 0], [20, 0, 0], [30, 0, 0], [40, 41, 42]]
    assert choices.owner.tolist() == [0, 1, 1, 1, 2]
    assert choices.source.tolist() == [0, 0, 0, 0, 1, 2, 1, 3, 4, 4, 4, 4]
    assert tokens_of(bayes, batch_of(), label_ids=IDS) == [(3, 6), (5, 4)]
    token = Draws.iid(4, 0.2, noise="token")  # numbers the tokens of a call: prompts stay whole
    assert tokens_of(bayes, batch_of(), token, label_ids=IDS) == [(5, 7 + 3)]
    # Tail mode reads the last k tokens of a prompt once for each of its continuations and draws.
    tail = tokens_of(bayes, batch_of(), label_ids=IDS, mode="tail", tail=2)
    assert tail == [(3, 5), (5, 4 * (2 + 3))]
    # One continuation for each row: a single pass.
    letters = tokens_of(bayes, batch_of(), label_ids=LETTERS[..., None])
    assert letters == [(3, 7)]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_blocks_below_the_noise_run_once_for_all_parts(kind: str, size: int) -> None:
    """On prompts and on continuations; their keys and values serve every part."""
    bayes = bayesian(kind, 1)
    draws = Draws.iid(4, 0.2)
    together = bayes.logits(batch_of(), draws, IDS, draws_per_pass=4)
    name = next(n for n in bayes.samplers if n.endswith(("down_proj", "c_fc")) and ".2." in n)
    names = [name.replace(".2.", f".{i}.") for i in range(3)]
    seen: dict[str, list[int]] = {n: [] for n in names}
    handles = [
        bayes.base.get_submodule(n).register_forward_pre_hook(
            lambda m, args, n=n: seen[n].append(args[0].shape[0])
        )
        for n in names
    ]
    parts = bayes.logits(batch_of(), draws, IDS, draws_per_pass=size)
    for handle in handles:
        handle.remove()
    assert relative(parts, together) < EXACT
    assert [seen[n] for n in names[:2]] == [[3, 5], [3, 5]]
    assert seen[names[2]] == [3 * size, 5 * size] * (4 // size)


@pytest.mark.parametrize("how", TAILS)
def test_prefixes_of_several_prompts(how: dict[str, Any]) -> None:
    """A context of three prompts runs once, each prompt's rest once, then the continuations."""
    bayes, batch = bayesian(), prompts((0, 3), (0, 4), (0, 5))
    k = how.get("tail", 1)
    shapes = tokens_of(bayes, batch, label_ids=IDS, **how)
    c = shapes[0][1]
    assert shapes[0] == (1, c) and shapes[1] == (3, 11 - c - k)
    found = bayes.logits(batch, DRAWS, IDS, **how)
    for row in range(3):
        alone = bayes.logits(rows_of(batch, row), DRAWS, IDS[row : row + 1], **how)
        assert relative(alone[:, 0], found[:, row]) < EXACT


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_angles_that_change_with_the_length(kind: str) -> None:
    """Such prompts are not taken apart: whole sequences give what each gives by itself, also where
    a choice crosses the length at which the angles change."""
    build = varying_angles(kind).build
    bayes, batch, choices = tfb.bayesianize(build()), make_batch(7, 7), [CHOICES[1]] * 2
    expected = naive(build(), bayes.posteriors, DRAWS, lambda m: by_hand(batch, choices, whole(m)))
    assert relative(bayes.logits(batch, DRAWS, pad_choices(choices)), expected) < EXACT
    assert tokens_of(bayes, batch, label_ids=pad_choices(choices)) == [(6, 8)]
    with pytest.raises(ValueError, match="change beyond 8 tokens"):
        longer = pad_choices([[(7, 7, 7), (8, 8, 8)]] * 2)
        bayes.logits(batch, DRAWS, longer, mode="tail", tail=1)


def test_filling_stays_within_the_models_positions() -> None:
    """A short choice beside a long prompt: GPT-2 has no position for the filling of its row."""
    bayes = bayesian("gpt2")
    batch = make_batch(64, 3)
    ids = pad_choices([[(5,), (6,)], [(7, 8, 9), (9, 8, 7)]])
    found = bayes.logits(batch, DRAWS, ids)
    for row in range(2):
        alone = bayes.logits(rows_of(batch, row), DRAWS, ids[row : row + 1])
        assert relative(alone[:, 0], found[:, row]) < EXACT


def test_noise_in_the_head_alone() -> None:
    """The backbone runs on common rows, in all passes; a thousand draws are heads."""
    bayes = bayesian("llama", 0, "lm_head")
    assert list(bayes.posteriors) == ["lm_head"]
    together = bayes.logits(batch_of(), DRAWS, IDS)
    assert relative(together, single_runs(bayes, DRAWS, batch_of(), label_ids=IDS)) < EXACT
    many = Draws.antithetic(100, 0.2, seed=5)
    assert relative(bayes.logits(batch_of(), many, IDS)[:4], together) < EXACT
    assert relative(bayes.logits(batch_of(), DRAWS, IDS, mode="tail", tail=1), together) < EXACT


def test_draws_of_a_pass_follow_the_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five continuations of a 7-token prompt and up to 3 tokens: 50 tokens a draw; and half as
    many where only a tail of them differs. Prompts, then continuations, part by part."""
    bayes, draws = bayesian(), Draws.iid(8, 0.2)
    token = 2 * HIDDEN * 8  # bytes of the MLP's activation in float64
    monkeypatch.setattr("tfb.sampling.forward.CPU_BYTES", 4 * 50 * token)

    def rows(**how: Any) -> list[int]:
        name = "model.layers.2.mlp"
        return rows_seen(bayes, [name], lambda: bayes.logits(batch_of(), draws, IDS, **how))[name]

    assert rows() == [3 * 4, 5 * 4] * 2
    assert rows(mode="tail", tail=2) == [3, 5]
    monkeypatch.setattr("tfb.sampling.forward.CPU_BYTES", 4 * 25 * token)
    assert rows(mode="tail", tail=2) == [3, 5, 5]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[:2], r"label_ids: expected \[3, K, L\], got \[2, 4, 4\]"),
        (torch.zeros(3, 0, 2), r"label_ids: expected \[3, K, L\], got"),
        (IDS.masked_fill(IDS == 43, 64), "outside the vocabulary of 64"),
        (IDS.masked_fill(IDS == 43, -2), "outside the vocabulary of 64"),
        (IDS.masked_fill(IDS == 41, NO_TOKEN), "-1 stands after its last only"),
        (torch.full((3, 2, 2), NO_TOKEN), "every choice needs a token"),
        (IDS.masked_fill(IDS == 6, 8), "row 0 has two equal choices"),
    ],
)
def test_choices_that_do_not_fit(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bayesian().predict(batch_of(), DRAWS, label_ids=ids.long())


def test_what_cannot_be_continued() -> None:
    typed = {**batch_of(), "token_type_ids": torch.zeros(3, 7, dtype=torch.int64)}
    with pytest.raises(ValueError, match="the batch has token_type_ids, which is not known for"):
        bayesian("gpt2").logits(typed, DRAWS, IDS)
    bayes = tfb.bayesianize(CASES["bert"].build())
    with pytest.raises(ValueError, match="only language models have a vocabulary"):
        bayes.logits(CASES["bert"].batch(), DRAWS, IDS)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    make = functools.partial(transformers.T5ForConditionalGeneration, config)
    bayes = tfb.bayesianize(Kind(make, ["q", "v"], "SEQ_2_SEQ_LM").build())
    with pytest.raises(ValueError, match="not of an encoder-decoder; use label_ids"):
        bayes.logits(batch_of("right"), DRAWS, IDS)


def test_positions_of_the_callers_own() -> None:
    """They go on from the last one of a prompt, whether or not it is counted from 0."""
    bayes, batch = bayesian("gpt2"), batch_of()
    shifted = {**batch, "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0) + 3}
    found = bayes.logits(shifted, DRAWS[:1], IDS)
    moved = {
        "input_ids": torch.tensor([[*batch["input_ids"][0].tolist(), 9]]),
        "position_ids": torch.arange(3, 11)[None],
    }
    log_probs = bayes.logits(moved, DRAWS[:1]).log_softmax(-1)[0, 0]
    # Choices (9, 5) and (9, 5, 8), (9,): log p(5 | prompt, 9) is what the second token adds.
    assert relative((found[0, 0, 1] - found[0, 0, 0])[None], log_probs[5][None]) < EXACT


def test_length_normalization() -> None:
    """The mean of a choice's log-probabilities in place of their sum; of one token the same."""
    bayes, how = tfb.bayesianize(KINDS["llama"].build(), seed=3), TAILS[1]
    number = (IDS != NO_TOKEN).sum(-1)
    for mode in ({}, how):
        bayes.configure(length_normalization="none")
        total = bayes.logits(batch_of(), DRAWS, IDS, **mode)
        bayes.configure(length_normalization="tokens")
        assert relative(bayes.logits(batch_of(), DRAWS, IDS, **mode), total / number) < EXACT
    with pytest.raises(ValueError, match="length_normalization='characters': expected one of none"):
        bayes.configure(length_normalization="characters")


# --- rows, anchors, the command line --------------------------------------------------------------

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [17, 18, 19], [20]]
# Rows 0 and 3 by label columns, the others by several tokens, of three and of two choices.
MIXED = EncodedRows(
    ids=[f"r{i}" for i in range(5)],
    input_ids=PROMPTS,
    label_ids=[(30, 31, 32), (), (), (33, 34, 35), ()],
    labels=[0, 1, 2, 1, 0],
    choices=[("a", "b", "c")] * 4 + [("a", "b")],
    choice_ids=[
        None,
        ((30,), (31, 32), (33, 34, 35)),
        ((40, 41), (40, 42), (43,)),
        None,
        ((50, 51), (52, 53)),
    ],
)


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_rows_of_both_kinds(batch_size: int) -> None:
    """Every row as itself alone, in the original order."""
    bayes, draws = bayesian(), Draws.antithetic(4, 0.3, seed=5)
    found = predict_rows(bayes, MIXED, draws, batch_size=batch_size, keep_draws=True)
    assert found.probs.shape == (5, 3) and found.draw_probs is not None
    for i, prompt in enumerate(PROMPTS):
        several = MIXED.choice_tokens(i)
        ids = torch.tensor([MIXED.label_ids[i]]) if several is None else pad_choices([several])
        alone = bayes.predict({"input_ids": torch.tensor([prompt])}, draws, label_ids=ids)
        k = MIXED.num_choices(i)
        assert relative(found.probs[i, :k], alone.probs[0].float()) < SINGLE
        assert not found.probs[i, k:].any()


@pytest.mark.parametrize("metric", ["nll", "pseudo_nll", "accuracy"])
def test_anchors_of_both_kinds(metric: str) -> None:
    """Labels and pseudo-labels index the choices; losses are those of predict."""
    bayes = bayesian()
    anchors = AnchorSet.of(MIXED, batch_size=2)
    loss = AnchorLoss(bayes, anchors, metric, draws=4, config=tfb.SamplingConfig(seed=5))
    matrix = loss([0.3])
    assert matrix.points == ((0.0, 1.0), (0.3, 1.0))
    draws, expected = Draws.antithetic(4, 0.3, seed=5), []
    for batch in anchors.batches:
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "label_ids")}
        probs = bayes.predict(inputs, draws, label_ids=batch["label_ids"]).probs
        mean = bayes.predict(inputs, Draws.mean(), label_ids=batch["label_ids"]).probs
        target = mean.argmax(-1) if metric == "pseudo_nll" else batch["labels"]
        p = probs.gather(-1, target[:, None])[:, 0]
        expected.append(-p.log() if metric != "accuracy" else (probs.argmax(-1) != target).double())
    assert relative(matrix.losses[1], torch.cat(expected)) < EXACT


def test_sigma_is_searched_and_kept_with_the_normalization(tmp_path: Path) -> None:
    kind = KINDS["llama"]
    bayes = tfb.bayesianize(kind.build())
    bayes.configure(length_normalization="tokens")
    # Pseudo-labels: the only loss that a random model is sure to worsen with noise.
    fit = tfb.fit_sigma(bayes, MIXED, "pseudo_nll", 0.05, draws=2, mode="tail", tail=2)
    assert bayes.sigma == fit.sigma > 0
    folder = tfb.save(bayes, tmp_path / "artifact", fit=fit)
    again = tfb.load(exact(randomize(kind.make(), 0)), folder)
    assert again.config.length_normalization == "tokens"
    draws = Draws.antithetic(2, fit.sigma)
    assert relative(again.logits(batch_of(), draws, IDS), bayes.logits(batch_of(), draws, IDS)) == 0
    sidecar = json.loads((folder / "tfb.json").read_text())
    del sidecar["sha256"]
    for value, message in ((None, "none"), ("words", "length_normalization='words'")):
        # Artifacts from before there was a choice lack the field.
        sidecar |= {"length_normalization": value}
        kept = {k: v for k, v in sidecar.items() if v is not None or k != "length_normalization"}
        (folder / "tfb.json").write_text(json.dumps(kept))
        base = exact(randomize(kind.make(), 0))
        if value is None:
            assert tfb.load(base, folder).config.length_normalization == message
        else:
            with pytest.raises(ValueError, match=message):
                tfb.load(base, folder)


TOPICS = {"C": "banking", "E": "kitchen", "H": "travel"}
WORDS = [*TOPICS.values(), "the weather"]


def spelled_out(source: Path, target: Path, rows: int) -> Path:
    """Rows of three topics with their names in place of letters; every third row keeps letters."""
    lines = []
    for line in source.read_text().splitlines():
        row = json.loads(line)
        letter = row["choices"][row["label"]]
        if letter in TOPICS:
            choices = [*TOPICS, "Z"] if len(lines) % 3 == 0 else WORDS
            lines.append(json.dumps(row | {"choices": choices, "label": [*TOPICS].index(letter)}))
        if len(lines) == rows:
            break
    target.write_text("\n".join(lines) + "\n")
    return target


def test_command_line(shared: Path, tmp_path: Path, tfb_command: Run) -> None:
    """fit, evaluate and score on spelled-out choices; the deterministic figures are those of
    PEFT's model on every prompt with every choice."""
    model, adapter = (
        str(shared / p) for p in ("models/stories260K", "adapters/stories260K-clinc-domain")
    )
    data = spelled_out(shared / "data/clinc-domain/validation.jsonl", tmp_path / "rows.jsonl", 24)
    made, figures, scored = (tmp_path / name for name in ("artifact", "figures.json", "scored"))
    fit = fit_command(model, adapter, data, made)
    for call in (
        (*fit, "--tolerance", 0.1, "--length-normalization", "tokens", "--label-tokens", "all"),
        ("evaluate", made, data, "--json", figures),
        ("score", made, data, "--output", scored, "--format", "jsonl"),
    ):
        status, _, told = tfb_command(*call, "--draws", 2)
        assert status == 0, (call, told)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    encoded = RowEncoder(tokenizer)(read_rows(data))
    assert encoded.choice_ids is not None
    plain = tfb.load_adapter(tfb.load_base(model, adapter), adapter).eval()
    losses = []
    for i, ids in enumerate(encoded.input_ids):
        choices = encoded.choice_tokens(i) or tuple((t,) for t in encoded.label_ids[i])
        batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
        score = by_hand(batch, [choices], whole(plain))[0]
        score = score / torch.tensor([len(c) for c in choices])
        losses.append(-score.log_softmax(-1)[encoded.labels[i]])
    nll = json.loads(figures.read_text())["methods"]["adapter"]["nll"]
    # Sums of at most ten log-probabilities of size 10 in float32, in another order.
    assert nll == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
    results = [
        json.loads(x) for x in (scored / "part-00000-00000000.jsonl").read_text().splitlines()
    ]
    assert [len(r["probs"]) for r in results] == [4] * 24
    assert {r["choice"] for r in results} <= {*WORDS, *TOPICS, "Z"}


def test_command_line_checks_the_normalization_first(tmp_path: Path, tfb_command: Run) -> None:
    call = fit_command("none", "none", "none", tmp_path / "new")
    status, _, told = tfb_command(*call, "--length-normalization", "words")
    assert status == 1 and "--length-normalization words" in told
