"""Choices of several tokens: each is scored by its summed log-probability after the prompt.

For draw s and a choice of tokens c_1 .. c_L, over the whole vocabulary,

    score_s(c) = sum_t log p_s(c_t | prompt, c_1 .. c_t-1)

and the draw's probabilities are the softmax of its scores over the K choices of the row. They are
averaged over draws as probabilities, as everywhere. For choices of one token that is the softmax
of the label columns. A sum favours short choices; ``length_normalization="tokens"`` divides it by
L (rows are then to be encoded with all tokens of their choices, see :mod:`tfb.data.encoding`).

    [prefixes that rows share] -> the prompt but its last token, once for a draw -> continuations

The last token of a prompt and all but the last of a choice make a *continuation*, which is read
against the keys and values of its prompt. A continuation that begins another one of its row is
read with it, so letters cost one for all of them. Continuations of a batch have one length:
shorter ones are filled up with tokens that nothing before them can see.

In tail mode the noise acts at the last k tokens of the prompt and at the tokens of the choice,
which come after them; so for choices of one token it is tail sampling as in :mod:`tfb.sampling.tail`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tfb.data.batching import NO_TOKEN
from tfb.draws import Draws
from tfb.sampling.fan_out import Replay, SamplingState
from tfb.sampling.forward import (
    DIVISIBLE,
    Plan,
    check_angles,
    divisible,
    noisy_once,
    run_prefixes,
)
from tfb.sampling.kv_cache import spread_cache
from tfb.sampling.memory import draws_of
from tfb.sampling.tail import prefix_inputs, tail_inputs
from tfb_kernels.reference import compute_dtype

LENGTH_NORMALIZATIONS = ("none", "tokens")


def check_length_normalization(value: Any) -> None:
    """Raise ValueError for an unknown one."""
    if value not in LENGTH_NORMALIZATIONS:
        raise ValueError(
            f"length_normalization={value!r}: expected one of {', '.join(LENGTH_NORMALIZATIONS)}"
        )


@dataclass(frozen=True)
class ChoiceTokens:
    """The choices of B rows as N continuations.

    Attributes:
        tokens: [B, K, L] vocabulary ids, 0 after the end of a choice.
        present: [B, K, L] bool, where a choice has a token.
        read: [N, L - 1] tokens to read after a prompt, 0 after the end. lengths: [N], their number.
        owner: [N], the row of each continuation.
        source: [B, K], the continuation that holds a choice.
        length_normalization: "none", or "tokens": scores are divided by the number of tokens.
    """

    tokens: Tensor
    present: Tensor
    read: Tensor
    lengths: Tensor
    owner: Tensor
    source: Tensor
    length_normalization: str = "none"

    @classmethod
    def of(
        cls, base: Any, choice_ids: Tensor, rows: int, length_normalization: str = "none"
    ) -> ChoiceTokens:
        """For choice_ids [B, K, L] with ``NO_TOKEN`` after the end of shorter choices.

        Raises:
            ValueError: another shape, a choice without tokens or with a gap, ids outside the
                vocabulary, two equal choices of a row, or an unknown normalization.
        """
        check_length_normalization(length_normalization)
        head = base.get_output_embeddings().weight
        V, ids = int(head.shape[0]), choice_ids.cpu().to(torch.int64)
        if ids.shape[0] != rows or not ids.numel():
            raise ValueError(f"label_ids: expected [{rows}, K, L], got {list(ids.shape)}")
        present = ids != NO_TOKEN
        if bool(((ids < 0) & present | (ids >= V)).any()):
            raise ValueError(f"label_ids: outside the vocabulary of {V}")
        if not bool(present[..., 0].all()) or bool((present[..., 1:] > present[..., :-1]).any()):
            raise ValueError(
                f"label_ids: every choice needs a token, and {NO_TOKEN} stands after its last only"
            )
        read: list[tuple[int, ...]] = []
        owner: list[int] = []
        source: list[list[int]] = []
        for b, row in enumerate(ids.tolist()):
            choices = [tuple(t for t in choice if t != NO_TOKEN) for choice in row]
            if len(set(choices)) < len(choices):
                raise ValueError(f"label_ids: row {b} has two equal choices")
            found = _longest([choice[:-1] for choice in choices])
            source.append(
                [
                    len(read) + next(i for i, c in enumerate(found) if _begins(choice[:-1], c))
                    for choice in choices
                ]
            )
            read += found
            owner += [b] * len(found)
        L = ids.shape[-1]
        filled = [[*c, *[0] * (L - 1 - len(c))] for c in read]
        return cls(
            tokens=ids.clamp_min(0).to(head.device),
            present=present.to(head.device),
            read=torch.tensor(filled, dtype=torch.int64, device=head.device).view(len(read), L - 1),
            lengths=torch.tensor([len(c) for c in read], device=head.device),
            owner=torch.tensor(owner, device=head.device),
            source=torch.tensor(source, device=head.device),
            length_normalization=length_normalization,
        )

    @property
    def length(self) -> int:
        """L, the tokens of the longest choice, and the positions of a continuation."""
        return self.tokens.shape[-1]

    def draws_that_fit(self, base: Any, draws: int, prompt: int, each: int | None) -> int:
        """See :func:`tfb.sampling.memory.draws_that_fit`; prompts have ``prompt`` tokens, of which ``each``
        are those of one draw."""
        # Whole sequences: a continuation's keys and values of its prompt are copies of its own.
        N = len(self.owner)
        tokens = N * ((prompt if each is None else each) + self.length - 1)
        return draws_of(base, draws, tokens, self.tokens.device, scored=N * self.length)

    def reduce(self, logits: Tensor) -> Tensor:
        """Scores [s, B, K] from logits [s, N, L, V], float32 at least."""
        dtype = compute_dtype(logits.dtype)
        # Draw by draw: in another dtype each is a copy of the largest tensor there is.
        total = torch.stack([x.to(dtype).logsumexp(-1) for x in logits])
        position = torch.arange(self.length, device=logits.device)
        source = self.source[..., None]
        each = logits[:, source, position, self.tokens].to(dtype) - total[:, source, position]
        score = torch.where(self.present, each, 0.0).sum(-1)
        return score if self.length_normalization == "none" else score / self.present.sum(-1)


def _begins(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return b[: len(a)] == a


def _longest(sequences: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of ``sequences`` that do not begin another one, without repetition."""
    order = sorted(set(sequences))  # a sequence stands right before those that it begins
    return [a for a, b in pairwise(order) if not _begins(a, b)] + order[-1:]


def check_inputs(inputs: dict[str, Any], task: str) -> None:
    """Refuse what cannot be continued by the tokens of a choice.

    Raises:
        ValueError: an encoder-decoder, or arguments over tokens beyond ids, mask and positions.
    """
    if task != "CAUSAL_LM":
        raise ValueError(
            "choices of several tokens: they continue the prompt of a causal language model, not "
            "of an encoder-decoder; use label_ids [B, K], choices of one token"
        )
    T = inputs["input_ids"].shape[1]
    over = [
        name
        for name, value in inputs.items()
        if name not in DIVISIBLE and isinstance(value, Tensor) and value.shape[1:2] == (T,)
    ]
    if over:
        raise ValueError(
            f"choices of several tokens: the batch has {', '.join(over)}, which is not known for "
            "the tokens of a choice; leave it out"
        )


def run_choices(
    bayes: Any,
    inputs: dict[str, Any],
    plan: Plan,
    parts: Iterable[Draws],
    choices: ChoiceTokens,
) -> Iterator[Tensor]:
    """Scores [s, B, K] of the choices, for each part of the draws.

    inputs, plan: of the prompts [B, T], padded on the left.
    """
    if plan.tail is not None:
        yield from _tail(bayes, inputs, plan, parts, choices)
        return
    # Not with prefixes, as in passes.run.
    below = BlocksBelow(bayes.blocks_below if plan.shared is None else [])
    for draws in parts:
        step = replace(plan, state=replace(plan.state, draws=draws))
        yield _full(bayes, inputs, step, choices, below)


class BlocksBelow:
    """What the blocks below the noise give in all parts of the draws: what they return for the
    prompts and for the continuations, and the prompts' keys and values."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.prompts, self.continuations = Replay(blocks), Replay(blocks)
        self.layers: list[Any] = [None] * len(blocks)

    def complete(self, cache: Any) -> None:
        """Blocks that were replayed have left their layers of the prompts' cache empty."""
        for i, kept in enumerate(self.layers):
            if cache.layers[i].is_initialized:
                self.layers[i] = copy(cache.layers[i])
            else:
                cache.layers[i] = copy(kept)


def _full(
    bayes: Any, inputs: dict[str, Any], plan: Plan, choices: ChoiceTokens, below: BlocksBelow
) -> Tensor:
    rest, cache = inputs, None
    if plan.shared is not None:
        rest, cache = run_prefixes(bayes, inputs, plan)
    B, N, L = len(inputs["input_ids"]), len(choices.owner), choices.length
    if N > B and noisy_once(plan.state, None) and divisible(bayes, rest):
        cache = DynamicCache() if cache is None else cache
        first = prefix_inputs(rest, 1)
        if first["input_ids"].shape[1]:
            with bayes.sampling_as(replace(plan.state, cached=True, replay=below.prompts)):
                bayes.model(**first, past_key_values=cache, **bayes.last_logits)
            below.complete(cache)
        keep = 1
    else:
        keep = rest["input_ids"].shape[1]
    rest = _continue(rest, choices, keep)
    if bayes.last_logits:
        rest["logits_to_keep"] = L
    if cache is not None:
        spread_cache(cache, choices.owner, B)
        rest |= {"past_key_values": cache, "use_cache": True}
    state = replace(plan.state, cached=cache is not None, replay=below.continuations)
    with bayes.sampling_as(state):
        logits: Tensor = bayes.model(**rest).logits
    return choices.reduce(logits[:, -L:].unflatten(0, (len(plan.state.draws), N)))


def _tail(
    bayes: Any,
    inputs: dict[str, Any],
    plan: Plan,
    parts: Iterable[Draws],
    choices: ChoiceTokens,
) -> Iterator[Tensor]:
    assert plan.tail is not None
    k, L, config, cache = plan.tail, choices.length, bayes.base.config, DynamicCache()
    if plan.shared is not None:
        inputs, cache = run_prefixes(bayes, inputs, plan)
    B, N = len(inputs["input_ids"]), len(choices.owner)
    prefix = prefix_inputs(inputs, k)
    rest = _continue(inputs, choices, k)
    if prefix["input_ids"].shape[1]:
        check_angles(config, prefix["position_ids"], rest["position_ids"])
        with bayes.mean_pass(plan.state.draws, B):
            getattr(bayes.base, bayes.base.base_model_prefix)(**prefix, past_key_values=cache)
    spread_cache(cache, choices.owner, B)
    each = k + L - 1
    for draws in parts:
        S = len(draws)
        scored = torch.arange(k - 1, each, device=bayes.device)
        scored = (torch.arange(S, device=bayes.device)[:, None] * each + scored).flatten()
        several = tail_inputs(rest, config, each, S, bayes.dtype)
        state: SamplingState = replace(plan.state, draws=draws, tree=True)
        with bayes.sampling_as(state):
            out = bayes.model(**several, past_key_values=cache, logits_to_keep=scored)
        cache.crop(-S * each)  # the draws' own tokens are not the next part's
        yield choices.reduce(out.logits.view(N, S, L, -1).transpose(0, 1))


def _continue(inputs: dict[str, Any], choices: ChoiceTokens, keep: int) -> dict[str, Any]:
    """The last ``keep`` tokens of each continuation's prompt, and its own tokens after them.

    attention_mask [B, P + T] of ``inputs`` may begin with P columns of a cache; those of all
    columns before the kept ones stay.
    """
    B, owner, N = len(inputs["input_ids"]), choices.owner, len(choices.owner)
    out = {
        name: value[owner] if isinstance(value, Tensor) and value.shape[:1] == (B,) else value
        for name, value in inputs.items()
    }
    out["input_ids"] = torch.cat([out["input_ids"][:, -keep:], choices.read], dim=1)
    mask = out["attention_mask"]
    # Filling counts as tokens: it lies behind all that is scored, and so every continuation of a
    # batch ends in the same column.
    out["attention_mask"] = torch.cat([mask, mask.new_ones(N, choices.length - 1)], dim=1)
    if "position_ids" in out:
        position = out["position_ids"]
        after = torch.arange(1, choices.length, device=position.device)
        # Filling stays at the last position, which the model is known to have.
        after = torch.minimum(after, choices.lengths[:, None])
        out["position_ids"] = torch.cat([position[:, -keep:], position[:, -1:] + after], dim=1)
    return out
