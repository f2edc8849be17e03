"""Full and tail sampling on the real class of every supported architecture, tiny and random.

In float64, to the last operation (norms that compute in float32 whatever the dtype are replaced):
an S-fold pass equals S single-draw passes and the naive definition to 1e-10 of the largest logit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.architectures import (
    CAUSAL,
    DECODERS,
    DRAWS,
    ENCODER,
    EXACT,
    KINDS,
    OTHERS,
    Kind,
    batch_of,
    last_logits,
    single_runs,
    spread,
    varying_angles,
)
from support.models import (
    FIRST_TOKEN,
    VOCAB,
    exact,
    make_batch,
    naive,
    randomize,
    relative,
    rows_of,
)
from torch import Tensor

import tfb
from tfb import AdapterError, Draws
from tfb.data.batching import EncodedRows
from tfb.sampling.fan_out import FOLDABLE
from tfb.scoring.evaluate import predict_rows

# --- full mode ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_equals_single_draws(kind: str, layers: str) -> None:
    """Whatever the draws have in common is computed once and changes nothing."""
    chosen = tfb.last_layers(1) if layers == "last" else None
    bayes = tfb.bayesianize(KINDS[kind].build(), layers=chosen)
    together = bayes.logits(batch_of(), DRAWS)
    assert relative(together, single_runs(bayes, DRAWS, batch_of())) < EXACT
    assert relative(together, bayes.logits(batch_of("right"), DRAWS)) < EXACT
    assert spread(together) > 1e-3


@pytest.mark.parametrize("merging", ["always", "never"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_is_the_definition(kind: str, merging: str) -> None:
    """Each draw's weights, materialised in a model that was never Bayesianized."""
    bayes, batch = tfb.bayesianize(KINDS[kind].build()), batch_of()
    bayes.merging = merging
    inputs = bayes.inputs(batch, "full")
    twin = KINDS[kind].build()
    expected = naive(twin, bayes.posteriors, DRAWS, lambda m: last_logits(m, inputs))
    assert relative(bayes.logits(batch, DRAWS), expected) < EXACT
    with torch.no_grad():  # sigma = 0 is the adapter itself
        mean = last_logits(twin, inputs)
    assert relative(bayes.logits(batch, Draws.mean())[0], mean) < EXACT


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_are_the_definition(kind: str) -> None:
    """All of the noise, or the last block's alone; folded or, for T5, not."""
    batch, bound = batch_of(), EXACT
    if kind == "gemma2":
        # Eager attention only: its softmax is float32, and NaN for padding in float64.
        batch, bound = make_batch(9, 9, 9), 1e-5
    if kind.startswith("t5"):
        batch["input_ids"][:, -1] = 2
    for layers in (None, tfb.last_layers(1)):
        bayes = tfb.bayesianize(OTHERS[kind].build(), layers=layers)
        inputs = bayes.inputs(batch, "full")
        expected = naive(
            OTHERS[kind].build(), bayes.posteriors, DRAWS, lambda m, i=inputs: last_logits(m, i)
        )
        together = bayes.logits(batch, DRAWS)
        assert relative(together, expected) < bound
        assert relative(together, single_runs(bayes, DRAWS, batch)) < bound
        if bayes.task == "CAUSAL_LM":
            how: dict[str, Any] = {"mode": "tail", "tail": 3}
            tail = bayes.logits(batch, DRAWS, **how)
            assert relative(tail, single_runs(bayes, DRAWS, batch, **how)) < bound
    assert spread(together) > 1e-3


def test_every_foldable_architecture_is_tested() -> None:
    kinds = {**KINDS, **OTHERS}.values()
    assert {k.make().config.model_type for k in kinds} >= set(FOLDABLE)


@pytest.mark.parametrize("kind", ["t5", "t5-classifier"])
def test_encoder_decoders_have_no_tails(kind: str) -> None:
    bayes = tfb.bayesianize(OTHERS[kind].build())
    with pytest.raises(ValueError, match="an encoder-decoder sees the whole prompt in both"):
        bayes.predict(batch_of(), DRAWS, mode="tail", tail=1)
    with pytest.raises(ValueError, match="an encoder-decoder has two stacks"):
        bayes.hidden_norms(batch_of(), DRAWS)


def test_answers_of_encoder_decoders() -> None:
    """Label columns of the first answer token; another position through decoder_input_ids."""
    bayes, batch = tfb.bayesianize(OTHERS["t5"].build()), batch_of()
    whole, labels = bayes.logits(batch, DRAWS), torch.tensor([9, 4, 30])
    assert whole.shape == (len(DRAWS), 3, VOCAB)
    assert relative(bayes.logits(batch, DRAWS, labels), whole[..., labels]) < EXACT
    start = torch.zeros(3, 1, dtype=torch.int64)
    longer = {**batch, "decoder_input_ids": torch.cat([start, start + 7], dim=1)}
    after = bayes.logits(longer, DRAWS)
    assert relative(after, whole) > 1e-3
    assert relative(after, single_runs(bayes, DRAWS, longer)) < EXACT
    with pytest.raises(ValueError, match="needs a causal language model, not SEQ_2_SEQ_LM"):
        bayes.generate(batch, DRAWS)


def test_encoder_decoders_from_rows_to_artifacts(tmp_path: Path) -> None:
    """Rows with label tokens are scored like the batch they make; an artifact loads again."""
    bayes, batch = tfb.bayesianize(OTHERS["t5"].build()), batch_of()
    lengths = batch["attention_mask"].sum(1).tolist()
    ids = [row[-n:].tolist() for row, n in zip(batch["input_ids"], lengths, strict=True)]
    labels = [(9, 4), (4, 30), (9, 30)]
    rows = EncodedRows(
        ids=["a", "b", "c"],
        input_ids=ids,
        label_ids=labels,
        labels=[0, 1, 1],
        choices=[("x", "y")] * 3,
    )
    probs = bayes.predict(batch, DRAWS, label_ids=torch.tensor(labels)).probs
    assert relative(predict_rows(bayes, rows, DRAWS, batch_size=2).probs, probs) < 1e-6
    bayes.configure(sigma=0.1)
    tfb.save(bayes, tmp_path / "artifact")
    again = tfb.load(exact(randomize(OTHERS["t5"].make(), 0)), tmp_path / "artifact")
    found = again.predict(batch, DRAWS, label_ids=torch.tensor(labels)).probs
    assert relative(found, probs) < 1e-6  # factors are kept in float32


def test_other_tasks_are_refused() -> None:
    kind = Kind(
        lambda: transformers.BertForTokenClassification(transformers.BertConfig(**ENCODER)),
        ["query"],
        "TOKEN_CLS",
    )
    with pytest.raises(AdapterError, match="task_type TOKEN_CLS; supported: CAUSAL_LM, SEQ_2_SEQ"):
        tfb.bayesianize(kind.build())


@pytest.mark.parametrize("kind", CAUSAL)
def test_last_layer_alone(kind: str) -> None:
    """Noise in the output embedding only: one backbone pass, S heads, also for many draws."""
    bayes = tfb.bayesianize(KINDS[kind].build("lm_head"), layers=tfb.last_layers(0))
    assert list(bayes.posteriors) == ["lm_head"]
    together = bayes.logits(batch_of(), DRAWS)
    assert relative(together, single_runs(bayes, DRAWS, batch_of())) < EXACT
    many = Draws.antithetic(200, 0.2, seed=5)
    assert relative(bayes.logits(batch_of(), many)[:4], together) < EXACT
    # Nothing below the head has noise, so that a tail of any length is the same.
    for k in (1, 3):
        assert relative(bayes.logits(batch_of(), DRAWS, mode="tail", tail=k), together) < EXACT


# --- tail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS)
def test_tail_equals_single_draws(kind: str) -> None:
    """Draws side by side under a tree mask do not see each other, whatever the window."""
    bayes = tfb.bayesianize(KINDS[kind].build())
    for k in (1, 3):
        together = bayes.logits(batch_of(), DRAWS, mode="tail", tail=k)
        single = single_runs(bayes, DRAWS, batch_of(), mode="tail", tail=k)
        assert relative(together, single) < EXACT
        right = bayes.logits(batch_of("right"), DRAWS, mode="tail", tail=k)
        assert relative(together, right) < EXACT
        assert spread(together) > 1e-3


@pytest.mark.parametrize("kind", DECODERS)
def test_tail_of_the_whole_prompt_is_full(kind: str) -> None:
    """k >= T is full sampling, and sigma = 0 the deterministic adapter for every k."""
    bayes, batch = tfb.bayesianize(KINDS[kind].build()), batch_of()
    full = bayes.logits(batch, DRAWS)
    for k in (11, 50):
        tail = bayes.logits(batch, DRAWS, mode="tail", tail=k)
        # A classifier's padding is on the other side in full mode: sums in another order.
        assert tail.equal(full) or (kind == "llama-classifier" and relative(tail, full) < EXACT)
    mean = bayes.logits(batch, Draws.mean())
    for k in (1, 4, 10):
        assert relative(bayes.logits(batch, Draws.mean(), mode="tail", tail=k), mean) < EXACT
    # All but one position: still not full, unless nothing looks back that far.
    almost = bayes.logits(make_batch(11, 11), DRAWS, mode="tail", tail=10)
    differ = relative(almost, bayes.logits(make_batch(11, 11), DRAWS))
    assert differ > 1e-4 or kind == "mistral"


@pytest.mark.parametrize("kind", CAUSAL)
def test_tail_is_the_definition(kind: str) -> None:
    """Keys and values of the prefix from the mean adapter, the last k tokens with a draw's weights:
    computed here with PEFT models, one row and one draw at a time."""
    k, batch = 3, make_batch(11)
    bayes, twin = tfb.bayesianize(KINDS[kind].build()), KINDS[kind].build()
    mean, ids = KINDS[kind].build(), batch["input_ids"]

    @torch.no_grad()
    def call(sampled: Any) -> Tensor:
        cache = transformers.DynamicCache()
        mean(input_ids=ids[:, :-k], past_key_values=cache, use_cache=True)
        # One token after another: no mask of ours and none of several queries.
        for t in range(11 - k, 11):
            out = sampled(
                input_ids=ids[:, t : t + 1],
                position_ids=torch.tensor([[t]]),
                past_key_values=cache,
                use_cache=True,
            )
        logits: Tensor = out.logits[:, -1]
        return logits

    expected = naive(twin, bayes.posteriors, DRAWS[:2], call)
    found = bayes.logits(batch, DRAWS[:2], mode="tail", tail=k)
    assert relative(found, expected) < EXACT


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", DECODERS)
def test_tail_of_padded_rows_is_the_definition(kind: str, k: int) -> None:
    """Each row of a padded batch like itself alone; one that is all tail is sampled in full.

    Here the last k tokens go through transformers' own mask together.
    """
    lengths = (7, 2, 5)
    batch = make_batch(*lengths)
    bayes = tfb.bayesianize(KINDS[kind].build())
    mean, twin = KINDS[kind].build(), KINDS[kind].build()

    @torch.no_grad()
    def call(sampled: Any) -> Tensor:
        rows = []
        for row, n in enumerate(lengths):
            ids, cache = rows_of(batch, row)["input_ids"][:, -n:], transformers.DynamicCache()
            if n > k:
                mean(input_ids=ids[:, :-k], past_key_values=cache, use_cache=True)
            kept = min(n, k)
            position = torch.arange(n - kept, n)[None]
            rest = {"input_ids": ids[:, -kept:], "position_ids": position}
            rows.append(last_logits(sampled, {**rest, "past_key_values": cache, "use_cache": True}))
        return torch.cat(rows)

    expected = naive(twin, bayes.posteriors, DRAWS[:2], call)
    found = bayes.logits(batch, DRAWS[:2], mode="tail", tail=k)
    assert relative(found, expected) < EXACT
    full = bayes.logits(batch, DRAWS[:2])
    assert (relative(found[:, 1], full[:, 1]) < EXACT) == (k >= 2)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_tails_where_angles_change_with_the_length(kind: str) -> None:
    """Beyond 8 tokens all angles are others. A prefix within, of a prompt beyond, is refused;
    elsewhere sigma = 0 is the deterministic adapter, as for every model."""
    bayes = tfb.bayesianize(varying_angles(kind).build())
    refused = [(9, 1), (11, 3)] + ([(20, 3)] if kind == "dynamic" else [])
    allowed = [(8, 1), (5, 3), (11, 11)] + ([(20, 3)] if kind == "longrope" else [])
    for length, k in allowed:
        batch = make_batch(length, 4)
        mean = bayes.logits(batch, Draws.mean())
        assert relative(bayes.logits(batch, Draws.mean(), mode="tail", tail=k), mean) < EXACT
    for length, k in refused:
        with pytest.raises(ValueError, match=rf"rope_type='{kind}'\) change beyond 8 tokens"):
            bayes.logits(make_batch(length, 4), Draws.mean(), mode="tail", tail=k)
    # Padding is no length: both rows are short.
    padded = make_batch(6, 4, width=12)
    mean = bayes.logits(padded, Draws.mean())
    assert relative(bayes.logits(padded, Draws.mean(), mode="tail", tail=2), mean) < EXACT


def test_encoders_have_no_tail() -> None:
    for kind in ("bert", "roberta"):
        bayes = tfb.bayesianize(KINDS[kind].build())
        with pytest.raises(ValueError, match="an encoder sees the whole text"):
            bayes.logits(batch_of(), DRAWS, mode="tail", tail=1)


def test_modes_are_checked() -> None:
    bayes = tfb.bayesianize(KINDS["llama"].build())
    for mode, tail, message in (
        ("half", None, "mode='half'"),
        ("tail", None, "needs k >= 1 positions"),
        ("tail", 0, "needs k >= 1 positions"),
        ("full", 3, "belongs to mode='tail'"),
    ):
        with pytest.raises(ValueError, match=message):
            bayes.logits(batch_of(), DRAWS, mode=mode, tail=tail)
        with pytest.raises(ValueError, match=message):
            bayes.configure(mode=mode, tail=tail)
    bayes.base.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="takes no mask of draws"):
        bayes.configure(mode="tail", tail=1)


def test_eager_attention_takes_the_same_mask() -> None:
    """Additive masks of the eager kernel and boolean ones of sdpa say the same.

    In float32: transformers' eager attention makes NaN of padding in float64.
    """
    found = []
    for kind in ("sdpa", "eager"):
        model = KINDS["llama"].build().float()
        model.get_base_model().set_attn_implementation(kind)
        bayes = tfb.bayesianize(model)
        found.append(bayes.logits(batch_of(), DRAWS, mode="tail", tail=2))
    assert relative(found[0], found[1]) < 1e-5


def test_mode_goes_with_the_artifact(tmp_path: Any) -> None:
    """A search in tail mode is used, saved and loaded in tail mode."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    batch: dict[str, Any] = make_batch(5, 5, 5, 5)
    batch |= {"labels": torch.tensor([0, 1, 0, 1]), "label_ids": torch.tensor([7, 9])}
    fit = tfb.fit_sigma(bayes, [batch], tolerance=0.05, draws=2, mode="tail", tail=2)
    assert (bayes.config.mode, bayes.config.tail) == (fit.mode, fit.tail) == ("tail", 2)
    folder = tfb.save(bayes, tmp_path / "artifact", fit=fit)
    base = exact(randomize(KINDS["llama"].make(), 0))
    again = tfb.load(base, folder)
    assert (again.config.mode, again.config.tail) == ("tail", 2)
    draws = Draws.antithetic(2, fit.sigma)
    expected = bayes.logits(batch_of(), draws, mode="tail", tail=2)
    assert relative(again.logits(batch_of(), draws), expected) < EXACT


def test_first_token_is_above_the_special_ones() -> None:
    """The suite's own premise: no prompt holds padding or end tokens."""
    assert int(batch_of()["input_ids"][batch_of()["attention_mask"].bool()].min()) >= FIRST_TOKEN
