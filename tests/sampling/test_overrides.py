"""The narrowed head: label columns are the whole head's, and only they are computed; and draws
that run in parts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.models import HIDDEN, VOCAB, make_batch, randomize, relative
from test_architectures import DRAWS, KINDS, SPLIT, Kind, batch_of, in_double, of
from torch import Tensor, nn

import tfb
from tfb import Draws
from tfb.sampling.memory import CPU_BYTES, chunks, draws_that_fit
from tfb.sampling.overrides import LabelColumns, is_narrowed

EXACT = 1e-10
S, B = len(DRAWS), 3
COMMON = torch.tensor([7, 63, 0, 7])
OWN = torch.tensor([[5, 9], [63, 5], [7, 8]])
TIED = Kind(of("LlamaConfig:LlamaForCausalLM", tie_word_embeddings=True), SPLIT)
CAPPED = KINDS["gemma3"]  # tied too, and tanh over the logits
TAIL: dict[str, Any] = {"mode": "tail", "tail": 2}


class Columns:
    """Rows of the output embedding that torch.nn.functional.linear multiplied, call by call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, counted: tuple[int, ...]) -> None:
        self.seen: list[int] = []
        linear = torch.nn.functional.linear

        def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            # No other matrix of these models has so many rows, all of HIDDEN columns.
            if weight.shape[1] == HIDDEN and weight.shape[0] in counted:
                self.seen.append(weight.shape[0])
            return linear(x, weight, bias)

        monkeypatch.setattr(torch.nn.functional, "linear", spy)


def check_columns(bayes: Any, batch: dict[str, Tensor] | None = None) -> None:
    """Labels [K] and [B, K] in both modes against the whole head."""
    batch = batch_of() if batch is None else batch
    for how in ({}, TAIL):
        everything = bayes.logits(batch, DRAWS, **how)
        assert everything.shape[-1] == VOCAB
        found = bayes.logits(batch, DRAWS, COMMON, **how)
        assert relative(found, everything[..., COMMON]) < EXACT
        found = bayes.logits(batch, DRAWS, OWN, **how)
        assert relative(found, everything.gather(-1, OWN.expand(S, B, 2))) < EXACT


# --- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        (KINDS["llama"], ()),
        (KINDS["llama"], ("lm_head",)),
        (TIED, ()),
        (TIED, ("lm_head",)),
        (CAPPED, ()),
        (CAPPED, ("lm_head",)),
        (KINDS["gpt2"], ()),
        (KINDS["phi3"], ()),
    ],
    ids=["llama", "llama-lora", "tied", "tied-lora", "capped", "capped-lora", "gpt2", "phi3"],
)
def test_label_columns_are_the_whole_heads(kind: Kind, extra: tuple[str, ...]) -> None:
    """Tied or not, capped or not; an adapted head is not narrowed and serves all the same."""
    bayes = tfb.bayesianize(kind.build(*extra))
    assert is_narrowed(bayes.base.get_output_embeddings()) == (not extra)
    check_columns(bayes)


def test_capping_is_at_work() -> None:
    """The premise above: the cap of 2 is felt, in labels alone too."""
    bayes = tfb.bayesianize(CAPPED.build())
    assert 1 < float(bayes.logits(batch_of(), DRAWS, COMMON).abs().max()) < 2


def test_a_biased_head() -> None:
    base = randomize(KINDS["llama"].make(), 0)
    base.lm_head = nn.Linear(HIDDEN, VOCAB)
    nn.init.normal_(base.lm_head.bias)
    check_columns(tfb.bayesianize(Kind(lambda: base, SPLIT).build()))


@pytest.mark.parametrize("how", [{}, TAIL])
@pytest.mark.parametrize("kind", [KINDS["llama"], TIED, CAPPED], ids=["llama", "tied", "capped"])
def test_only_needed_rows_are_multiplied(
    kind: Kind, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distinct labels, once a pass; above a quarter of the vocabulary all of it."""
    bayes = tfb.bayesianize(kind.build())
    # LoRA's rank is 3 and k and v have 8 rows: numbers of labels are neither.
    columns = Columns(monkeypatch, (5, 6, 9, 15, VOCAB))
    bayes.logits(batch_of(), DRAWS, torch.tensor([7, 63, 0, 7, 1, 2]), **how)
    bayes.logits(batch_of(), DRAWS, OWN, **how)  # 5, 7, 8, 9, 63
    assert columns.seen == [5, 5]
    columns.seen.clear()
    bayes.logits(batch_of(), DRAWS, torch.arange(15), draws_per_pass=2, **how)
    bayes.logits(batch_of(), DRAWS, torch.arange(17), **how)  # 17 > 64 / 4
    bayes.logits(batch_of(), DRAWS, **how)
    assert columns.seen == [15, 15, VOCAB, VOCAB]
    columns.seen.clear()
    with torch.no_grad():
        bayes.model(**make_batch(5, 5, 5))  # not sampling
    assert columns.seen == [VOCAB]


def test_which_columns() -> None:
    base = tfb.bayesianize(KINDS["llama"].build()).base
    labels = LabelColumns.of(base, COMMON, rows=B)
    assert labels.columns is not None and labels.columns.tolist() == [0, 7, 63]
    assert labels.position.tolist() == [1, 2, 0, 1]
    logits = torch.arange(2 * B * 3.0).view(2, B, 3)
    assert labels.select(logits).equal(logits[..., [1, 2, 0, 1]])
    own = LabelColumns.of(base, OWN, rows=B)
    assert own.columns is not None
    assert own.columns[own.position].equal(OWN)
    assert LabelColumns.of(base, torch.arange(17), rows=B).columns is None


# --- several on one model -------------------------------------------------------------------------


def test_two_posteriors_on_one_model() -> None:
    """Each has its own columns while the other is there, and after it is gone."""
    model = KINDS["llama"].build()
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model.add_adapter("other", config)
    randomize(model, 3, ".other.")
    in_double(model).eval()
    first, second = tfb.bayesianize(model), tfb.bayesianize(model, "other")
    kept = first.logits(batch_of(), DRAWS, COMMON)
    check_columns(first)
    model.set_adapter("other")
    check_columns(second)
    assert relative(second.logits(batch_of(), DRAWS, COMMON), kept) > 1e-3
    second.remove()
    model.set_adapter("default")
    check_columns(first)
    assert relative(first.logits(batch_of(), DRAWS, COMMON), kept) < EXACT
    first.remove()
    assert "forward" not in vars(model.get_base_model().lm_head)


def test_labels_inside_a_context_of_all_columns() -> None:
    """predict() within sampling() narrows its own pass only."""
    bayes, batch = tfb.bayesianize(KINDS["llama"].build()), make_batch(5, 5, 5)
    expected = bayes.logits(batch, DRAWS, COMMON)
    with torch.no_grad(), bayes.sampling(DRAWS):
        before = bayes.model(**batch).logits
        assert bayes.logits(batch, DRAWS, COMMON).equal(expected)
        assert bayes.model(**batch).logits.equal(before)
    assert before.shape[-1] == VOCAB


@pytest.mark.parametrize("extra", [(), ("lm_head",)])
def test_remove_gives_the_head_back(extra: tuple[str, ...]) -> None:
    model, batch = KINDS["llama"].build(*extra), make_batch(5, 5, 5)
    with torch.no_grad():
        plain = model(**batch).logits
        bayes = tfb.bayesianize(model)
        assert model(**batch).logits.equal(plain)  # bit for bit while nothing is sampled
        head = bayes.base.get_output_embeddings()
        bayes.logits(batch, DRAWS, COMMON)
        assert bayes.remove() is model
        assert "forward" not in vars(head) and not is_narrowed(head)
        assert model(**batch).logits.equal(plain)
    again = tfb.bayesianize(model)
    assert is_narrowed(head) == (not extra)
    check_columns(again)


def test_a_forward_of_someone_elses_stays() -> None:
    """A head whose forward was replaced before is not touched."""
    model = KINDS["llama"].build()
    head = model.get_base_model().lm_head
    theirs = head.forward
    head.forward = theirs
    bayes = tfb.bayesianize(model)
    check_columns(bayes)
    bayes.remove()
    assert vars(head)["forward"] is theirs


# --- draws in parts -------------------------------------------------------------------------------

SEQUENCES = {
    "antithetic": Draws.antithetic(10, 0.2, seed=2),
    "iid": Draws.iid(7, 0.2, seed=2),
    "grid": Draws.grid([0.0, 0.1, 0.3], 4, seed=2),
    "mixed": Draws((0.1, 0.2, -0.1, 0.0, 0.3), (4, 0, 4, 1, 0)),
}
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "full": ("llama", (), {}),
    "tail": ("llama", (), TAIL),
    "labels": ("gpt2", (), {"label_ids": OWN}),
    "head": ("llama", ("lm_head",), {}),
    "classifier": ("llama-classifier", (), {}),
    "classifier-tail": ("llama-classifier", (), TAIL),
    "encoder": ("bert", (), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_are_the_whole(case: str) -> None:
    """Every size of a part, divisor or not, in every mode, whatever the order of draws."""
    kind, extra, how = CASES[case]
    layers = tfb.last_layers(0) if extra else None
    bayes = tfb.bayesianize(KINDS[kind].build(*extra), layers=layers)
    for draws in SEQUENCES.values():
        whole = bayes.logits(batch_of(), draws, draws_per_pass=len(draws), **how)
        for size in (1, 3, 4, 100):
            parts = bayes.logits(batch_of(), draws, draws_per_pass=size, **how)
            assert relative(parts, whole) < EXACT


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 100])
def test_parts_keep_streams_together(name: str, size: int) -> None:
    """In order, nothing twice, no larger than asked for unless one stream's draws are; on a CPU,
    which keeps weight noise from part to part, never larger."""
    ids = torch.zeros(2, 3, dtype=torch.int64)
    run = {"antithetic": 2, "iid": 1, "grid": 6, "mixed": 1}[name]
    draws = SEQUENCES[name]
    kept = list(chunks(None, draws, ids, None, size))
    assert all(len(p) <= size and (size < run or len(p) % run == 0) for p in kept)
    draws = replace(draws, noise="token")
    parts = list(chunks(None, draws, ids, None, size))
    assert sum((p.sigmas for p in parts), ()) == draws.sigmas
    assert sum((p.streams for p in parts), ()) == draws.streams
    assert all((p.seed, p.noise) == (draws.seed, draws.noise) for p in parts)
    assert all(len(p) % run == 0 and len(p) <= max(size, run) for p in parts)
    if run > 1:
        assert not any(set(a.streams) & set(b.streams) for a, b in pairwise(parts))


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("tokens", [1, 17, 5000])
@pytest.mark.parametrize("tail", [None, 1, 4])
def test_draws_that_fit_a_cpu(rows: int, tokens: int, tail: int | None) -> None:
    """As many as the limit allows, never none, never more than there are."""
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    each = rows * (tokens if tail is None else tail) * 2 * HIDDEN * 4  # bytes
    base = KINDS["llama"].make()
    for draws in (1, 10, 10**6):
        found = draws_that_fit(base, draws, ids, tail)
        assert 1 <= found <= draws
        assert found * each <= CPU_BYTES or found == 1
        assert found == draws or (found + 1) * each > CPU_BYTES


def test_parts_are_made_without_being_asked_for() -> None:
    """More tokens than a pass takes: the default runs in parts, with the same numbers."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    # 3 rows of 11 tokens, 32 float64 wide: 1,488 draws a pass.
    draws = Draws.antithetic(1500, 0.2)
    calls: list[int] = []
    hook = bayes.base.model.layers[1].mlp.register_forward_pre_hook(
        lambda m, args: calls.append(len(args[0]))
    )
    found = bayes.logits(batch_of(), draws)
    hook.remove()
    most = CPU_BYTES // (3 * 11 * 2 * HIDDEN * 8) // 2 * 2  # whole pairs
    assert calls == [3 * most, 3 * (1500 - most)]
    assert relative(found[:S], bayes.logits(batch_of(), draws[:S])) < EXACT
    assert relative(found[-S:], bayes.logits(batch_of(), draws[-S:])) < EXACT
