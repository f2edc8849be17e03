"""Whole-model sampling: a draw is a draw whatever runs beside it, state never leaks, and inputs
that cannot be sampled or scored are refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import (
    CASES,
    HIDDEN,
    LABELS,
    VOCAB,
    exact,
    make_batch,
    naive,
    relative,
    rows_of,
    run,
    sampled,
)
from torch import Tensor

import tfb
from tfb import BayesianModel, Draws, Predictive
from tfb.data.readers import read_rows
from tfb.model import align

EXACT = 1e-10  # float64 sums in another order; see test_convert
DRAWS = Draws((0.05, -0.05, 0.0, 0.1, 0.05), (0, 0, 1, 9, 1), seed=11)


def bayesian(kind: str = "llama", seed: int = 0) -> BayesianModel:
    """Float64, sigma set."""
    bayes = tfb.bayesianize(exact(CASES[kind].build(seed)), seed=5)
    bayes.configure(sigma=0.05)
    return bayes


def scored(bayes: BayesianModel, batch: dict[str, Tensor], draws: Draws = DRAWS) -> Tensor:
    return bayes.logits(batch, draws)


# --- a draw is a draw ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta", "llama_classifier"])
def test_a_draw_does_not_depend_on_its_company(kind: str) -> None:
    """Not on the other draws, the other rows, the batch size, padding or its side."""
    bayes, case = bayesian(kind), CASES[kind]
    batch = case.batch(5, 2, 4)
    together = scored(bayes, batch)
    assert together.shape == (5, 3, VOCAB if bayes.task == "CAUSAL_LM" else LABELS)
    for s in range(len(DRAWS)):
        assert relative(scored(bayes, batch, DRAWS[s : s + 1])[0], together[s]) < EXACT
    for row, length in enumerate((5, 2, 4)):
        alone = {
            k: v[:, -length:] if case.pad == "left" else v[:, :length]
            for k, v in rows_of(batch, row).items()
        }
        assert relative(scored(bayes, alone)[:, 0], together[:, row]) < EXACT
    doubled = rows_of(batch, 2, 0, 1, 0, 2)
    assert relative(scored(bayes, doubled), together[:, [2, 0, 1, 0, 2]]) < EXACT
    for pad in ("left", "right"):
        extras = tuple(e for e in case.extras if e != "position_ids")
        wide = make_batch(5, 2, 4, pad=pad, width=9, extras=extras)
        assert relative(scored(bayes, wide), together) < EXACT


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_positions_count_from_the_first_token(kind: str) -> None:
    """Given or not, moved with their tokens or made: a padded row is the unpadded one."""
    bayes = bayesian(kind)
    alone = torch.stack(
        [
            bayes.logits(
                {"input_ids": make_batch(5, 2, 4, pad="right")["input_ids"][i : i + 1, :n]}, DRAWS
            )[:, 0]
            for i, n in enumerate((5, 2, 4))
        ],
        1,
    )
    for pad in ("left", "right"):
        for extras in ((), ("position_ids",)):
            batch = make_batch(5, 2, 4, pad=pad, extras=extras)
            assert relative(scored(bayes, batch), alone) < EXACT
    shifted = make_batch(5, 2, 4, pad="right", extras=("position_ids",))
    shifted["position_ids"] = shifted["position_ids"] + 3  # the caller's own positions are kept
    if kind == "gpt2":  # absolute ones: the result must differ
        assert relative(scored(bayes, shifted), alone) > 1e-3
    else:  # rotary ones are relative; angles, up to 8, are float32 (an error of 8 * 6e-8)
        assert relative(scored(bayes, shifted), alone) < 1e-4


def test_rows_come_out_draw_by_draw() -> None:
    bayes, batch = bayesian(), CASES["llama"].batch()
    with bayes.sampling(DRAWS):
        out = bayes.model(**batch)
    assert out.logits.shape == (15, 5, VOCAB)
    for s in range(len(DRAWS)):
        with bayes.sampling(DRAWS[s : s + 1]):
            single = run(bayes.model, batch)
        mask = batch["attention_mask"][..., None]
        assert relative(out.logits[3 * s : 3 * s + 3] * mask, single) < EXACT


def test_inputs_reach_the_model_by_any_door() -> None:
    """Positional, keyword or embedded; through PEFT's model or the inner one; with labels."""
    bayes, batch = bayesian(), CASES["llama"].batch()
    expected = sampled(bayes, DRAWS, batch).flatten(0, 1)
    mask, positions = batch["attention_mask"], batch["position_ids"]
    embedded = bayes.base.get_input_embeddings()(batch["input_ids"])
    keep = mask.repeat(5, 1)[..., None]
    with torch.no_grad(), bayes.sampling(DRAWS):
        for out in (
            bayes.model(batch["input_ids"], mask, position_ids=positions),
            bayes.model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions),
            bayes.base(**batch),
            bayes.base(batch["input_ids"], mask, positions),
        ):
            assert relative(out.logits * keep, expected) < EXACT
        loss = bayes.model(**batch, labels=batch["input_ids"]).loss
        with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
            bayes.model(attention_mask=mask)
    assert loss.isfinite()


def test_arguments_over_positions_are_not_repeated() -> None:
    """Also where they are as long as the batch has rows."""
    bayes, batch = bayesian(), make_batch(3, 3, 3)
    keep, cache_position = torch.tensor([2, 0, 1]), torch.arange(3)
    seen: dict[str, Any] = {}
    forward = bayes.base.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return forward(*args, **kwargs)

    bayes.base.forward = spy  # a hook would not do: PEFT 0.20 calls ``forward`` itself
    with torch.no_grad(), bayes.sampling(DRAWS):
        full = bayes.model(**batch).logits
        part = bayes.model(**batch, logits_to_keep=keep, cache_position=cache_position).logits
    assert seen["logits_to_keep"] is keep and seen["cache_position"] is cache_position
    assert seen["input_ids"].shape == (15, 3)
    assert relative(part, full[:, keep]) < EXACT


def test_antithetic_pairs_average_to_the_mean_to_second_order() -> None:
    """A pair's average leaves the mean by O(sigma^2), one draw by O(sigma)."""
    bayes, batch = bayesian(), CASES["llama"].batch()
    errors = []
    mean = scored(bayes, batch, Draws.mean())[0]
    for sigma in (1e-3, 1e-4):
        pair = scored(bayes, batch, Draws.antithetic(2, sigma))
        assert relative(pair[0], mean) > sigma / 10
        errors.append(relative(pair.mean(0), mean))
    # Third-order terms cancel too, so the ratio is 100 up to O(sigma^2); 1 % is generous.
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.01)


def test_models_do_not_share_a_state() -> None:
    first, second = bayesian(), bayesian()
    batch = CASES["llama"].batch()
    plain = run(second.model, batch)
    with first.sampling(DRAWS):
        assert torch.equal(run(second.model, batch), plain)
        with second.sampling(DRAWS[:2]):
            assert len(run(second.model, batch)) == 2 * 3
            assert len(run(first.model, batch)) == 5 * 3
        assert torch.equal(run(second.model, batch), plain)


# --- the noise of tokens ------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["weight", "token"])
def test_marginal_variance_of_an_output_is_the_theorems(noise: str) -> None:
    """cov(y) = s^2 sigma^2 |x|^2 U U^T for one token; tokens are independent under token noise.

    Only lm_head is sampled, so its input x is known and the outputs are exactly Gaussian. Bounds
    are five standard errors: a true moment falls outside once in 1.7 million.
    """
    bayes = tfb.bayesianize(exact(CASES["lm_head"].build()), layers="lm_head")
    (posterior,) = bayes.posteriors.values()
    batch, S, sigma = make_batch(3, 3), 3000, 0.05
    inputs = []
    hook = bayes.base.lm_head.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    mean = run(bayes.model, batch)
    hook.remove()
    x = inputs[0].flatten(0, 1)  # [T, n], T = 2 rows of 3 tokens
    y = sampled(bayes, Draws.iid(S, sigma, seed=1, noise=noise), batch)
    noise_of = (y - mean).flatten(1, 2)  # [S, T, m]
    covariance = posterior.column_covariance(sigma)  # for |x| = 1
    variance = x.pow(2).sum(-1)[:, None] * covariance.diagonal()  # [T, m]
    standard = noise_of / variance.sqrt()
    assert float(standard.mean(0).abs().max()) < 5 / S**0.5
    assert float((standard.pow(2).mean(0) - 1).abs().max()) < 5 * (2 / S) ** 0.5
    # Between two tokens: correlated like their inputs, or not at all.
    cosine = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(x, dim=-1).mT
    expected = cosine if noise == "weight" else torch.eye(len(x), dtype=x.dtype)
    found = torch.einsum("sim,sjm->ijm", standard, standard) / S
    bound = 5 * ((1 + expected**2) / S).sqrt()  # Isserlis: var(uv) = 1 + rho^2
    assert bool(((found - expected[..., None]).abs() < bound[..., None]).all())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_token_noise_reaches_the_whole_model(kind: str) -> None:
    bayes, batch = bayesian(kind), CASES[kind].batch()
    draws = Draws.antithetic(4, 0.05, noise="token")
    found = sampled(bayes, draws, batch)
    assert bool(found.isfinite().all())
    assert all(relative(found[i], found[j]) > 1e-3 for i in range(4) for j in range(i))
    quiet = sampled(bayes, Draws((0.0,), (3,), noise="token"), batch)
    assert relative(quiet[0], run(bayes.model, batch)) < EXACT
    assert relative(sampled(bayes, draws, batch), found) == 0  # a function of the seed


# --- contexts, threads, errors ------------------------------------------------------------------


def test_contexts_nest() -> None:
    bayes, batch = bayesian(), CASES["llama"].batch()
    plain = run(bayes.model, batch)
    outer, inner = sampled(bayes, DRAWS, batch), sampled(bayes, DRAWS[:2], batch)
    with bayes.sampling(DRAWS) as entered:
        assert entered is bayes
        assert torch.equal(run(bayes.model, batch), outer.flatten(0, 1))
        with bayes.sampling(DRAWS[:2]):
            assert torch.equal(run(bayes.model, batch), inner.flatten(0, 1))
        assert torch.equal(run(bayes.model, batch), outer.flatten(0, 1))
        bayes.predict(batch, 2)  # its own context
        assert torch.equal(run(bayes.model, batch), outer.flatten(0, 1))
    assert torch.equal(run(bayes.model, batch), plain)


def test_threads_do_not_see_each_other() -> None:
    """Threads sample one model with other draws at the same time; one more uses it plainly."""
    bayes, batch = bayesian(), CASES["llama"].batch()
    chosen = [DRAWS, DRAWS[:2], Draws.antithetic(4, 0.1, seed=3)]
    expected = [sampled(bayes, draws, batch).flatten(0, 1) for draws in chosen]
    expected.append(run(bayes.model, batch))
    wrong: list[str] = []
    gate = threading.Barrier(4)

    def work(number: int) -> None:
        def check() -> None:
            gate.wait(60)  # all inside their contexts before the first pass
            for _ in range(8):
                found = run(bayes.model, batch)
                if found.shape != expected[number].shape:
                    wrong.append(f"{number}: shape {list(found.shape)}")
                elif relative(found, expected[number]) > EXACT:
                    wrong.append(f"{number}: other values")

        try:
            if number < 3:
                with bayes.sampling(chosen[number]):
                    check()
            else:
                check()
        except Exception as error:
            wrong.append(f"{number}: {error!r}")

    with bayes.sampling(DRAWS):  # a thread does not inherit its parent's context
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def in_threads(*works: Callable[[], None]) -> None:
    """Run all at once, each with one thread of the library's, and raise what one raised."""

    def one(work: Callable[[], None]) -> None:
        torch.set_num_threads(1)  # each thread's own
        work()

    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(one, work) for work in works]:
            done.result(60)


def test_predictions_of_many_kinds_at_once() -> None:
    """Draws, modes, labels and temperatures of several threads: to the bit what each gets alone."""
    bayes, batch = bayesian(), CASES["llama"].batch()
    labels = torch.tensor([7, 63, 0])
    calls: list[dict[str, Any]] = [
        {"draws": 4},
        {"draws": 4, "mode": "tail", "tail": 2},
        {"draws": DRAWS, "label_ids": labels},
        {"draws": Draws.antithetic(2, 0.2, seed=8), "label_ids": labels[:2], "temperature": 3.0},
        {"draws": 2, "draws_per_pass": 1, "mode": "full"},
        {"draws": "auto", "label_ids": labels},
    ]
    expected = [bayes.predict(batch, **call).probs for call in calls]
    bayes.model.train()
    gate = threading.Barrier(len(calls))

    def work(call: dict[str, Any], alone: Tensor) -> None:
        for _ in range(4):
            gate.wait(60)
            assert bayes.predict(batch, **call).probs.equal(alone)

    in_threads(*map(partial(partial, work), calls, expected))


def test_overlapping_predictions_of_a_model_in_train_mode() -> None:
    """The first to begin ends first, while the second is inside: its dropout stays silent, and the
    last one puts every module back."""
    model = exact(CASES["rslora"].build())  # dropout 0.3
    bayes, batch = tfb.bayesianize(model), CASES["rslora"].batch()
    expected = bayes.predict(batch, DRAWS).probs
    model.train()
    model.get_base_model().lm_head.eval()
    modes = [m.training for m in model.modules()]
    second_inside, first_done = threading.Event(), threading.Event()
    ids: dict[int, str] = {}

    def order(*_: Any) -> None:
        if ids[threading.get_ident()] == "first":
            assert second_inside.wait(60)
        else:
            second_inside.set()
            assert first_done.wait(60)

    def work(name: str) -> None:
        ids[threading.get_ident()] = name
        assert bayes.predict(batch, DRAWS).probs.equal(expected)
        if name == "first":
            assert not model.training
            first_done.set()

    hook = bayes.base.get_input_embeddings().register_forward_pre_hook(order)
    in_threads(partial(work, "first"), partial(work, "second"))
    hook.remove()
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("training", [True, False])
def test_training_begun_during_a_prediction_is_an_error(training: bool) -> None:
    """Dropout may have acted, so there is no result; the mode is the one asked for."""
    model = exact(CASES["rslora"].build())
    bayes, batch = tfb.bayesianize(model), CASES["rslora"].batch()
    model.train(training)
    embed = bayes.base.get_input_embeddings()
    hook = embed.register_forward_pre_hook(lambda *_: model.train() and None)
    with pytest.raises(RuntimeError, match=r"train\(\) was called on the model while it predicted"):
        bayes.predict(batch, DRAWS)
    hook.remove()
    assert all(m.training for m in model.modules())
    bayes.predict(batch, DRAWS)


def test_a_prediction_has_one_configuration() -> None:
    """That of its beginning, whatever others configure while it runs."""
    batch = CASES["llama"].batch()
    choices = torch.tensor([[[5, 6], [7, -1]]] * 3)
    other = {"sigma": 0.4, "temperature": 5.0, "seed": 8, "length_normalization": "tokens"}

    calls: list[Callable[[BayesianModel], Any]] = [
        lambda bayes: bayes.predict(batch, 4, label_ids=choices).probs,
        lambda bayes: bayes.predict(batch, "auto", label_ids=choices).probs,
        lambda bayes: bayes.logits(batch, DRAWS, choices, draws_per_pass=2),
        lambda bayes: bayes.log_probs(batch, bayes.draws(2)),
        lambda bayes: bayes.generate(batch, 2, max_new_tokens=2).total,
    ]
    for call in calls:
        bayes = bayesian()
        expected = call(bayes)
        bayes.base.get_input_embeddings().register_forward_pre_hook(
            lambda *_, bayes=bayes: bayes.configure(**other, mode="tail", tail=1) and None
        )
        assert torch.equal(call(bayes), expected) and bayes.sigma == 0.4


@pytest.mark.parametrize("place", ["embedding", "sampled layer", "after the last layer"])
def test_errors_leave_the_state_clean(place: str) -> None:
    bayes, batch = bayesian(), CASES["llama"].batch()
    expected = sampled(bayes, DRAWS, batch)
    module = {
        "embedding": bayes.base.model.embed_tokens,
        "sampled layer": bayes.base.model.layers[1].mlp.up_proj,
        "after the last layer": bayes.base.lm_head,
    }[place]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt  # not even an Exception

    with bayes.sampling(DRAWS):
        hook = module.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            run(bayes.model, batch)
        hook.remove()
        assert torch.equal(run(bayes.model, batch), expected.flatten(0, 1))
    plain = run(bayes.model, batch)
    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        bayes.predict(batch)
    hook.remove()
    assert torch.equal(run(bayes.model, batch), plain)
    assert torch.equal(sampled(bayes, DRAWS, batch), expected)


def test_caches_and_mixed_batches_are_refused() -> None:
    bayes, batch = bayesian(), CASES["llama"].batch()
    cache = transformers.DynamicCache()
    with bayes.sampling(DRAWS):
        with pytest.raises(NotImplementedError, match="keys and values of one draw are invalid"):
            bayes.model(**batch, past_key_values=cache)
        with pytest.raises(NotImplementedError, match="sample one adapter at a time"):
            bayes.model(**batch, adapter_names=["default"] * 3)
        with pytest.raises(NotImplementedError, match=r"use bayes\.generate"):
            bayes.model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert len(run(bayes.model, batch)) == 15  # refusals leave the state clean
    out = bayes.model(**batch, past_key_values=cache)
    assert out.logits.shape == (3, 5, VOCAB) and cache.get_seq_length() == 5


# --- prediction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_label_columns_are_the_vocabularys(kind: str) -> None:
    bayes, batch = bayesian(kind), CASES[kind].batch()
    everything = bayes.logits(batch, DRAWS)
    columns = torch.tensor([7, 63, 0, 7])
    assert relative(bayes.logits(batch, DRAWS, columns), everything[..., columns]) < EXACT
    by_row = torch.tensor([[1, 2], [3, 4], [63, 0]])
    found = bayes.logits(batch, DRAWS, by_row)
    assert found.shape == (5, 3, 2)
    for row in range(3):
        assert relative(found[:, row], everything[:, row, by_row[row]]) < EXACT
    pred = bayes.predict(batch, DRAWS, label_ids=by_row, keep_draws=True)
    probs = found.softmax(-1)
    assert relative(pred.probs, probs.mean(0)) < EXACT
    assert pred.draw_probs is not None and relative(pred.draw_probs, probs) < EXACT


SHAPES = r"label_ids: expected \[K\], \[3, K\] or \[3, K, L\], got"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, VOCAB]), f"outside the vocabulary of {VOCAB}"),
        (torch.tensor([-1, 0]), f"outside the vocabulary of {VOCAB}"),
        (torch.zeros(2, 4, dtype=torch.int64), SHAPES),
        (torch.zeros(3, 1, 1, 1, dtype=torch.int64), SHAPES),
        (torch.tensor(3), SHAPES + r" \[\]"),
        (torch.zeros(0, dtype=torch.int64), SHAPES + r" \[0\]"),
    ],
)
def test_label_ids_that_do_not_fit(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bayesian().predict(CASES["llama"].batch(), label_ids=ids)


def test_a_classifier_has_no_label_ids() -> None:
    with pytest.raises(ValueError, match="only language models have a vocabulary"):
        bayesian("bert").predict(CASES["bert"].batch(), label_ids=torch.tensor([0, 1]))


@pytest.mark.parametrize("kind", ["llama", "llama_classifier", "bert"])
def test_predict_is_the_predictive_of_the_logits(kind: str) -> None:
    """A number of draws means antithetic ones at the model's sigma and seed."""
    bayes, batch = bayesian(kind), CASES[kind].batch()
    draws = Draws.antithetic(6, 0.05, seed=5)
    pred = bayes.predict(batch, 6)
    expected = Predictive.from_logits(scored(bayes, batch, draws), draws)
    assert pred.draws == draws and pred.probs.dtype == torch.float64
    for name in ("probs", "total", "aleatoric", "agreement", "standard_error"):
        assert torch.equal(getattr(pred, name), getattr(expected, name)), name
    assert bayes.predict(batch).draws == Draws.antithetic(10, 0.05, seed=5)
    labelled = batch | {"labels": torch.zeros(3, dtype=torch.int64)}  # ignored
    assert torch.equal(bayes.predict(labelled, 6).probs, pred.probs)


def test_draws_that_cannot_be_made() -> None:
    bayes, batch = bayesian(), CASES["llama"].batch()
    with pytest.raises(ValueError, match="draws=3: antithetic draws come in pairs, use 4"):
        bayes.predict(batch, 3)
    with pytest.raises(ValueError, match="draws=0: at least one draw"):
        bayes.predict(batch, 0)
    with pytest.raises(ValueError, match="mode='half': expected one of full"):
        bayes.predict(batch, mode="half")
    with pytest.raises(ValueError, match="mode='quarter'"):
        bayes.configure(mode="quarter")
    assert bayes.config.mode == "full"  # a refused change changes nothing
    bayes.configure(sigma=None)
    with pytest.raises(ValueError, match=r"sigma is not set: run tfb\.fit_sigma.* or pass tfb\.Dr"):
        bayes.predict(batch)
    assert bayes.predict(batch, DRAWS).probs.shape == (3, VOCAB)  # explicit draws need none


BATCHES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no ids": (lambda b: b.pop("input_ids"), r"needs input_ids \[B, T\], a tensor"),
    "a list": (
        lambda b: b.update(input_ids=b["input_ids"].tolist()),
        r"needs input_ids \[B, T\], a tensor",
    ),
    "one row without a batch": (
        lambda b: b.update(input_ids=b["input_ids"][0]),
        r"needs input_ids \[B, T\], a tensor",
    ),
    "no rows": (lambda b: b.update(rows_of(b)), "batch: has no rows"),
    "other mask": (
        lambda b: b.update(attention_mask=b["attention_mask"][:, 1:]),
        r"attention_mask \[3, 4\] does not match input_ids \[3, 5\]",
    ),
    "empty row": (lambda b: b["attention_mask"][1].zero_(), r"row 1 is empty \(no tokens\)"),
    "hole": (
        lambda b: b["attention_mask"].__setitem__((0, 2), 0),
        "attention_mask of row 0 has holes; pad on one side only",
    ),
}


@pytest.mark.parametrize("fault", BATCHES)
def test_batches_that_cannot_be_scored(fault: str) -> None:
    spoil, message = BATCHES[fault]
    batch: dict[str, Any] = dict(CASES["llama"].batch())
    spoil(batch)
    with pytest.raises(ValueError, match=message):
        bayesian().predict(batch)


def test_aligning_moves_all_that_runs_over_tokens() -> None:
    left = make_batch(5, 2, 4, pad="left", extras=("token_type_ids", "position_ids"))
    right = make_batch(5, 2, 4, pad="right", extras=("token_type_ids", "position_ids"))
    other = torch.arange(3)
    for source, side, target in ((left, "right", right), (right, "left", left)):
        kept = {name: value.clone() for name, value in source.items()}
        found = align({**source, "labels": other, "other": other}, side, torch.device("cpu"))
        assert "labels" not in found and torch.equal(found["other"], other)
        real = target["attention_mask"].bool()
        assert torch.equal(found["attention_mask"], target["attention_mask"])
        for name in ("input_ids", "token_type_ids", "position_ids"):
            assert torch.equal(found[name][real], target[name][real]), name
        assert all(torch.equal(source[name], value) for name, value in kept.items())
    ids = left["input_ids"][:1]
    assert torch.equal(align({"input_ids": ids}, "left", ids.device)["attention_mask"], ids * 0 + 1)


def test_training_mode_is_restored_and_dropout_inactive() -> None:
    model = exact(CASES["rslora"].build())  # dropout 0.3
    bayes, batch = tfb.bayesianize(model), CASES["rslora"].batch()
    expected = bayes.predict(batch, DRAWS).probs
    model.train()
    model.get_base_model().lm_head.eval()  # a module of its own mode
    modes = [m.training for m in model.modules()]
    assert torch.equal(bayes.predict(batch, DRAWS).probs, expected)
    assert torch.equal(bayes.hidden_norms(batch, DRAWS), bayes.hidden_norms(batch, DRAWS))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        bayes.predict(batch, DRAWS, label_ids=torch.tensor([VOCAB]))
    assert [m.training for m in model.modules()] == modes
    assert relative(sampled(bayes, DRAWS, batch), sampled(bayes, DRAWS, batch)) > 1e-3  # its own


def test_prediction_keeps_no_graph() -> None:
    bayes = bayesian()
    with torch.enable_grad():
        assert not bayes.logits(CASES["llama"].batch(), DRAWS).requires_grad


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_hidden_norms(kind: str) -> None:
    """The norm of the scored position's last hidden state, or of the mean over real tokens."""
    bayes, twin = bayesian(kind), exact(CASES[kind].build())
    batch = CASES[kind].batch(5, 2, 4)

    def norms(model: Any) -> Tensor:
        rows = []
        for row, length in enumerate((5, 2, 4)):
            real = batch["attention_mask"][row].bool()
            alone = {name: value[:, real] for name, value in rows_of(batch, row).items()}
            hidden = model(**alone, output_hidden_states=True).hidden_states[-1][0]
            assert hidden.shape == (length, HIDDEN)
            rows.append((hidden[-1] if kind == "llama" else hidden.mean(0)).norm())
        return torch.stack(rows)

    expected = naive(twin, bayes.posteriors, DRAWS, norms)
    assert relative(bayes.hidden_norms(batch, DRAWS), expected) < EXACT


# --- a real adapter -----------------------------------------------------------------------------


def test_real_adapter_predicts_like_a_naive_loop(shared: Path) -> None:
    """stories260K on intent domains: 20 rows, 4 antithetic draws, float64 throughout."""
    base, adapter = shared / "models/stories260K", shared / "adapters/stories260K-clinc-domain"
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    # The file is sorted by domain: every 150th row.
    rows = read_rows(shared / "data/clinc-domain/validation.jsonl")[::150]
    prompts = [str(row.prompt) for row in rows]
    batch = dict(tokenizer(prompts, padding=True, return_tensors="pt"))
    labels = torch.tensor([tokenizer(f"{prompts[0]} {c}")["input_ids"][-1] for c in "ABCDEFGHIJ"])
    model, twin = (exact(tfb.load_adapter(tfb.load_base(base, adapter), adapter)) for _ in "12")
    bayes = tfb.bayesianize(model, seed=2)
    bayes.configure(sigma=0.01)

    def one_by_one(m: Any) -> Tensor:
        ids = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in prompts]
        return torch.cat([m(input_ids=i).logits[:, -1, labels].softmax(-1) for i in ids])

    draws = Draws.antithetic(4, 0.01, seed=2)
    expected = naive(twin, bayes.posteriors, draws, one_by_one)
    pred = bayes.predict(batch, 4, label_ids=labels, keep_draws=True)
    assert pred.draw_probs is not None
    torch.testing.assert_close(pred.draw_probs, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(pred.probs, expected.mean(0), rtol=0, atol=1e-9)
    accuracy = (pred.prediction == torch.tensor([row.label for row in rows])).double().mean()
    assert accuracy > 0.5  # ten classes: the adapter is at work
