"""What replaces a module's forward: a head of label columns alone, blocks below the noise."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.architectures import DRAWS, KINDS, SPLIT, Kind, batch_of, of, rows_seen
from support.models import HIDDEN, VOCAB, exact, make_batch, randomize, relative
from torch import Tensor, nn

import tfb
from tfb import Draws
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
    assert labels.reduce(logits[:, :, None]).equal(logits[..., [1, 2, 0, 1]])
    own = LabelColumns.of(base, OWN, rows=B)
    assert own.columns is not None
    assert own.columns[own.position].equal(OWN)
    assert LabelColumns.of(base, torch.arange(17), rows=B).columns is None


def test_a_head_that_is_written_to_is_the_head() -> None:
    """Its columns are taken at every pass: nothing is kept of the weights before."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    before = bayes.logits(batch_of(), DRAWS, COMMON)
    with torch.no_grad():
        bayes.base.lm_head.weight.mul_(2.0)
    assert bayes.logits(batch_of(), DRAWS, COMMON).equal(2 * before)


# --- several on one model -------------------------------------------------------------------------


def test_two_posteriors_on_one_model() -> None:
    """Each has its own columns while the other is there, and after it is gone."""
    model = KINDS["llama"].build()
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model.add_adapter("other", config)
    randomize(model, 3, ".other.")
    exact(model).eval()
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


# --- blocks that are replayed ---------------------------------------------------------------------


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
    inputs = bayes.inputs(batch_of(), "full")
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


# --- replicas -------------------------------------------------------------------------------------


def replica(model: nn.Module) -> Any:
    """A copy as ``nn.DataParallel`` makes it for another GPU; here its weights are halved."""
    copies: dict[nn.Module, Any] = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else copies[child]
        for name, p in module._parameters.items():
            setattr(twin, name, None if p is None else p.detach() / 2)
    return copies[model]


def test_replicas_use_their_own_weights() -> None:
    """A head and blocks below the noise, whose forward is replaced, too."""
    model = KINDS["llama"].build()
    bayes = tfb.bayesianize(model, layers=tfb.last_layers(1))
    inputs = bayes.inputs(batch_of(), "full")
    with torch.no_grad():
        halved = copy.deepcopy(model)
        for p in halved.parameters():
            p.div_(2)
        expected = halved(**inputs).logits
        assert relative(replica(model)(**inputs).logits, expected) < EXACT


def test_replicas_are_not_sampled() -> None:
    """They run in threads, which have no draws: an error, not the mean."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    inputs = bayes.inputs(batch_of(), "full")
    with (
        bayes.sampling(DRAWS),
        ThreadPoolExecutor(1) as pool,
        pytest.raises(ValueError, match=r"nn\.DataParallel runs its copies .*call bayes\.model"),
    ):
        pool.submit(lambda: replica(bayes.model)(**inputs)).result()
    replica(bayes.model)(**inputs)
