"""The forward passes behind a prediction: full or tail, with prefixes that rows share.

    full    [prefixes, S-fold] -> [prompts of several choices, S-fold] -> everything else, S-fold
    tail    [prefixes, once] -> the prompt but its last k tokens, once -> everything else, S-fold

Steps in brackets are left out where nothing is shared. Draws, or choices of several tokens, that do
not fit into one pass run in parts. Blocks below the noise run for the first part of the draws only,
unless there are shared prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tfb.draws import Draws
from tfb.sampling.choices import ChoiceTokens, check_continuable
from tfb.sampling.kv_cache import (
    Inputs,
    SharedPrefix,
    check_angles,
    divisible,
    find_shared_prefix,
    may_share,
    prefix_inputs,
    spread_cache,
    tail_inputs,
)
from tfb.sampling.overrides import LabelColumns
from tfb.sampling.state import (
    Batch,
    ForwardPass,
    Replay,
    SampledModel,
    SamplingState,
    evaluating,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bytes of the widest activation of one pass on a CPU. More bring no more speed: the products are
# large enough, and larger activations only leave the caches.
CPU_BYTES = 12 << 20
# Bytes that choices of several tokens may take in one pass, however many there are.
CHOICE_BYTES = {"cpu": 1 << 29, "cuda": 4 << 30}
_SHARE = 0.6  # of the free memory: fragmentation, attention scores and the caller's own


def align(batch: Batch, side: str, device: torch.device) -> Inputs:
    """Return the batch on ``device`` with its padding on ``side``, position_ids moved along."""
    ids = _input_ids(batch)
    out = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    out.pop("labels", None)
    if out.get("attention_mask") is None:
        out["attention_mask"] = torch.ones_like(out["input_ids"])
    mask = out["attention_mask"]
    if mask.shape != ids.shape:
        raise ValueError(
            f"batch: attention_mask {list(mask.shape)} does not match input_ids {list(ids.shape)}"
        )
    T = ids.shape[1]
    mask = mask.long()
    length = mask.sum(-1)
    if bool((length == 0).any()):
        raise ValueError(f"batch: row {int((length == 0).nonzero()[0])} is empty (no tokens)")
    start = mask.argmax(-1)  # first real token
    position = torch.arange(T, device=device)
    inside = (position >= start[:, None]) & (position < (start + length)[:, None])
    if not bool((inside == mask.bool()).all()):
        row = int((inside != mask.bool()).any(-1).nonzero()[0])
        raise ValueError(f"batch: attention_mask of row {row} has holes; pad on one side only")
    target = T - length if side == "left" else torch.zeros_like(length)
    if bool((start == target).all()):
        return out
    source = (position[None, :] - target[:, None] + start[:, None]) % T
    for name, value in out.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            out[name] = value.gather(1, source)
    return out


def _input_ids(batch: Batch) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch: expected a tokenizer's dict of tensors, got {type(batch).__name__}; write "
            "batch = tokenizer(texts, return_tensors='pt', padding=True)"
        )
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError("batch: needs input_ids [B, T], a tensor (tokenizer return_tensors='pt')")
    if ids.shape[0] == 0:
        raise ValueError("batch: has no rows")
    return ids


def draws_that_fit(base: PreTrainedModel, draws: int, tokens: int, scored: int = 0) -> int:
    """Return how many draws one pass should take, at most ``draws`` and at least 1.

    A draw has ``tokens`` over all rows, ``scored`` of them with logits over the whole vocabulary.
    """
    device, (_, inner) = base.device, _widths(base)
    if device.type != "cuda":
        return max(1, min(draws, CPU_BYTES // max(tokens * inner * base.dtype.itemsize, 1)))
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(draws, int(_SHARE * free) // max(_bytes(base, tokens, scored), 1)))


def _widths(base: PreTrainedModel) -> tuple[int, int]:
    """Return the sizes of a hidden state and of an MLP's."""
    config = base.config.get_text_config()
    hidden = int(config.hidden_size)
    return hidden, int(getattr(config, "intermediate_size", None) or 4 * hidden)


def _bytes(base: PreTrainedModel, tokens: int, scored: int) -> int:
    """Estimate what a pass takes: ``tokens`` in all, ``scored`` of them with logits."""
    (hidden, inner), vocabulary = _widths(base), int(base.config.get_text_config().vocab_size)
    # What lives at once in a decoder block under no_grad: hidden state, residual, q, k, v, MLP.
    return (tokens * (4 * hidden + 3 * inner) + scored * vocabulary) * base.dtype.itemsize


def split(draws: Draws, most: int, device: torch.device) -> list[Draws]:
    """Split draws into parts of at most ``most``; every part gives what it would give alone.

    Draws of one stream that stand side by side share its noise and stay together, even if they
    are more than ``most``. On a CPU, which keeps noise from part to part, they need not.
    """
    if most < 1:
        raise ValueError(f"draws_per_pass={most}: expected at least 1")
    S, run = len(draws), draws.tensors().draws_per_stream
    kept = draws.noise == "weight" and device.type == "cpu"
    whole = max(most // run, 1) * run
    step = most if kept and most < run else whole
    return [draws] if step >= S else [draws[start : start + step] for start in range(0, S, step)]


def scored_logits(
    bayes: SampledModel,
    inputs: Inputs,
    draws: Draws,
    label_ids: Tensor | None,
    tail: int | None,
    draws_per_pass: int | None,
    temperatures: Sequence[float] | None = None,
) -> Tensor:
    """Compute logits [S, B, K] of an aligned batch; see ``BayesianModel.logits``.

    With G temperatures, [S, B, K, L, G] of choices: see ``BayesianModel.answer_log_probs``.
    """
    B, T = inputs["input_ids"].shape
    labels, base = _labels(bayes, inputs, label_ids, temperatures), bayes.base
    columns = labels if isinstance(labels, LabelColumns) else LabelColumns()
    if tail is not None and (tail >= T or bayes.head_alone):
        tail = None  # full mode gives the same: all tokens are tail, or the noise is above
    # Draws of the head alone share the rest of a pass: parts of them would run it again.
    each = 1 if bayes.head_alone and bayes.last_logits else tail or T
    tokens, scored, choices = B * each, 0, list[ChoiceTokens]()
    state = SamplingState(base, draws, columns=columns.columns)
    if isinstance(labels, ChoiceTokens):
        # Whole sequences: a continuation's keys and values of its prompt are copies of its own.
        n, L = len(labels.owner), labels.length
        if _noisy_once(state, tail):
            one = _bytes(base, T, 0) + (draws_per_pass or 1) * _bytes(base, each + L - 1, L)
            n = min(n, max(1, CHOICE_BYTES.get(base.device.type, CHOICE_BYTES["cuda"]) // one))
        choices, tokens, scored = labels.parts(n), n * (each + L - 1), n * L
    with evaluating(bayes.model):
        if draws_per_pass is None:
            draws_per_pass = draws_that_fit(base, len(draws), tokens, scored)
        parts = split(draws, draws_per_pass, base.device)
        return Passes(bayes, inputs, state, tail, columns, choices).run(parts)


def _labels(
    bayes: SampledModel,
    inputs: Inputs,
    label_ids: Tensor | None,
    temperatures: Sequence[float] | None,
) -> LabelColumns | ChoiceTokens:
    if label_ids is None:
        return LabelColumns()
    if bayes.task == "SEQ_CLS":
        raise ValueError("label_ids: only language models have a vocabulary to select from")
    ids, rows = torch.as_tensor(label_ids), len(inputs["input_ids"])  # a list will do
    if ids.dim() != 3:
        return LabelColumns.of(bayes.base, ids, rows)
    check_continuable(inputs, bayes.task)
    how = bayes.config.length_normalization, temperatures
    return ChoiceTokens.of(bayes.base, ids, rows, *how)


@dataclass
class Passes:
    """The forward passes of one batch."""

    bayes: SampledModel
    inputs: Inputs
    state: SamplingState  # what all passes have in common
    tail: int | None  # k; None: full mode
    columns: LabelColumns
    choices: Sequence[ChoiceTokens]  # of several tokens, in parts; none: ``columns`` are scored

    def __post_init__(self) -> None:
        inputs, bayes, base = self.inputs, self.bayes, self.bayes.base
        self.shared: SharedPrefix | None = None
        self._length = self.choices[0].length if self.choices else 1  # L, scored positions
        self._backbone: nn.Module = base.base_model
        may = bayes.task == "CAUSAL_LM" and may_share(inputs, base.config)
        if may and _noisy_once(self.state, self.tail):
            # Two waits for the device, not two a row.
            ids, mask = inputs["input_ids"].cpu(), inputs["attention_mask"].bool().cpu()
            rows = [row[m].tolist() for row, m in zip(ids, mask, strict=True)]
            self.shared = find_shared_prefix(rows, keep=self.tail or 1)
        # Not with prefixes: every part fills a cache of its own, and that from the first block on.
        blocks = bayes.blocks_below if self.shared is None else []
        self._prompts = Replay(blocks)
        self._rest = [Replay(blocks) for _ in range(max(1, len(self.choices)))]
        self._layers: list[Any] = [None] * len(blocks)  # of the prompts' cache

    def run(self, parts: Sequence[Draws]) -> Tensor:
        """Return scores [S, B, K, ...] of the draws, part by part."""
        if self.tail is not None:
            return self._tail(parts, self.tail)
        return _cat([self._full(replace(self.state, draws=draws)) for draws in parts])

    def _full(self, state: SamplingState) -> Tensor:
        rest, cache = self.inputs, None
        if self.shared is not None:
            rest, cache = self._prefixes(self.shared, state)
        if not self.choices:
            return self.columns.reduce(self._logits(rest, cache, state, self._rest[0]))
        B, keep = rest["input_ids"].shape
        # Prompts of several continuations are read once, but for their last token.
        several = sum(len(part.owner) for part in self.choices) > B
        if several and _noisy_once(state, None) and divisible(rest, self.bayes.base.config):
            cache, keep = DynamicCache() if cache is None else cache, 1
            first = prefix_inputs(rest, 1)
            if first["input_ids"].shape[1]:
                self._fill(cache, first, state, self._prompts)
                self._complete(cache)
        found = []
        for part, replay in zip(self.choices, self._rest, strict=True):
            own = None if cache is None else spread_cache(cache, part.owner, B)
            found.append(part.reduce(self._logits(part.extend(rest, keep), own, state, replay)))
        return self._whole(found)

    def _logits(
        self, rest: Inputs, cache: DynamicCache | None, state: SamplingState, replay: Replay
    ) -> Tensor:
        """Return logits [s, N, L, C] of what follows a cache; [s, B, 1, C] without choices."""
        bayes, L = self.bayes, self._length
        rest = {**rest, **dict.fromkeys(bayes.last_logits, L)}
        if cache is not None:
            rest |= {"past_key_values": cache, "use_cache": True}
        with bayes.sampling_as(replace(state, cached=cache is not None, replay=replay)):
            logits: Tensor = bayes.model(**rest).logits
        logits = logits[:, None] if bayes.task == "SEQ_CLS" else logits[:, -L:]
        return logits.unflatten(0, (len(state.draws), -1))

    def _whole(self, found: Sequence[Tensor]) -> Tensor:
        """Return the scores [S, B, K, ...] of all parts of the choices."""
        order = torch.cat([part.place for part in self.choices]).argsort()
        B = len(self.inputs["input_ids"])
        return torch.cat(list(found), 1)[:, order].unflatten(1, (B, -1))

    def _complete(self, cache: DynamicCache) -> None:
        """Fill in the layers of the prompts' cache that replayed blocks have left empty."""
        layers: list[Any] = cache.layers
        for i, kept in enumerate(self._layers):
            if layers[i].is_initialized:
                self._layers[i] = copy(layers[i])
            else:
                layers[i] = copy(kept)

    def _tail(self, parts: Sequence[Draws], k: int) -> Tensor:
        inputs, cache = self.inputs, DynamicCache()
        if self.shared is not None:
            inputs, cache = self._prefixes(self.shared, self.state)
        B, prefix = len(inputs["input_ids"]), prefix_inputs(inputs, k)
        if prefix["input_ids"].shape[1]:
            for rest in [part.extend(inputs, k) for part in self.choices] or [inputs]:
                check_angles(self.bayes.base.config, prefix["position_ids"], rest["position_ids"])
            self._fill(cache, prefix, self.state)
        if not self.choices:
            return _cat([self.columns.reduce(x) for x in self._trees(inputs, cache, k, parts)])
        found = []
        for part in self.choices:
            rest, own = part.extend(inputs, k), spread_cache(cache, part.owner, B)
            found.append(_cat([part.reduce(x) for x in self._trees(rest, own, k, parts)]))
        return self._whole(found)

    def _trees(
        self, rest: Inputs, cache: DynamicCache, k: int, parts: Sequence[Draws]
    ) -> Iterator[Tensor]:
        """Yield logits [s, N, L, C] of each part of the draws, whose tails follow a cache."""
        base, L = self.bayes.base, self._length
        each = k + L - 1  # tokens of one draw
        for draws in parts:
            S = len(draws)
            tokens = tail_inputs(rest, base, each, S)
            tokens |= {"past_key_values": cache, "use_cache": True}
            start = torch.arange(S, device=base.device)[:, None] * each
            scored = (start + torch.arange(k - 1, each, device=base.device)).flatten()
            logits = self._tree_logits(tokens, replace(self.state, draws=draws, tree=True), scored)
            cache.crop(-S * each)  # the draws' own tokens are not the next part's
            yield logits.unflatten(1, (S, L)).transpose(0, 1)

    def _tree_logits(self, tokens: Inputs, state: SamplingState, scored: Tensor) -> Tensor:
        bayes = self.bayes
        if bayes.task == "CAUSAL_LM":
            with bayes.sampling_as(state):
                logits: Tensor = bayes.model(**tokens, logits_to_keep=scored).logits
            return logits
        score: Any = bayes.base.get_submodule("score")
        with bayes.sampling_as(_under_way(state, len(tokens["input_ids"]))):
            found: Tensor = score(self._backbone(**tokens).last_hidden_state[:, scored])
        return found

    def _prefixes(self, shared: SharedPrefix, state: SamplingState) -> tuple[Inputs, DynamicCache]:
        """Return the rest of the batch, and a cache of every row's prefix."""
        # Without the configuration no layer forgets what lies outside its window.
        device, cache = self.bayes.base.device, DynamicCache()
        self._fill(cache, shared.inputs(device), state)
        cache = spread_cache(cache, shared.owner.to(device), len(shared.ids))
        return shared.rest(self.inputs), cache

    def _fill(
        self,
        cache: DynamicCache,
        inputs: Inputs,
        state: SamplingState,
        replay: Replay | None = None,
    ) -> None:
        """Read tokens into a cache: with the draws, or in tail mode with the mean adapter."""
        bayes, inputs = self.bayes, {**inputs, "past_key_values": cache, "use_cache": True}
        if self.tail is None:
            with bayes.sampling_as(replace(state, cached=True, replay=replay)):
                bayes.model(**inputs, **bayes.last_logits)
        else:
            with bayes.sampling_as(mean_state(state, len(inputs["input_ids"]))):
                self._backbone(**inputs)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def mean_state(state: SamplingState, batch: int) -> SamplingState:
    """Return the state for a pass of the mean adapter that enters the backbone with B rows."""
    # One draw, so that layers can be merged, of a stream whose noise is kept anyway.
    draws = Draws((0.0,), state.draws.streams[:1], state.draws.seed)
    return _under_way(SamplingState(state.base, draws, tree=True, mean=True), batch)


def _under_way(state: SamplingState, batch: int) -> SamplingState:
    """Return ``state`` with a pass begun, for calls that enter below the model's entrance."""
    running = ForwardPass(len(state.draws), batch, state.base, tree=True)
    return replace(state, running=running)


def _noisy_once(state: SamplingState, tail: int | None) -> bool:
    # Token noise numbers the tokens of a call: those of two noisy calls would get the same normals.
    # In tail mode only one is noisy.
    return state.draws.noise == "weight" or tail is not None


def hidden_norms(bayes: SampledModel, batch: Batch, draws: Draws) -> Tensor:
    """Compute [S, B] norms of the last hidden state; see ``BayesianModel.hidden_norms``."""
    if getattr(bayes.base.config, "is_encoder_decoder", False):
        raise ValueError(
            "hidden-state norms: an encoder-decoder has two stacks; use metric='nll' or 'accuracy'"
        )
    bayes.check_sampling()
    inputs = bayes.inputs(batch, "full")
    mask, S, rows = inputs["attention_mask"], len(draws), len(inputs["input_ids"])
    with evaluating(bayes.model), bayes.sampling_as(SamplingState(bayes.base, draws)):
        hidden: Tensor = bayes.model(**inputs, output_hidden_states=True).hidden_states[-1]
    if hidden.shape[0] == rows:  # noise in the head alone: below it all draws agree
        hidden = hidden.repeat(S, 1, 1)
    if bayes.task == "CAUSAL_LM":
        pooled = hidden[:, -1]
    else:
        weight = mask.repeat(S, 1)[..., None].to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1)
    return torch.linalg.vector_norm(pooled, dim=-1).unflatten(0, (S, rows))
