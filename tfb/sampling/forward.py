"""The forward passes behind a prediction: full or tail, with prefixes that rows share.

    full    [prefixes, S-fold, once each] -> everything else, S-fold; without prefixes, blocks below
            the noise run once, whatever the number of parts
    tail    [prefixes, once each] -> the prompt but its last k tokens, once -> the tail, S-fold

Without shared prefixes the first step is left out. All passes give logits [S, B, C].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tfb.draws import Draws
from tfb.sampling.fan_out import Replay, SamplingState
from tfb.sampling.inputs import Batch, evaluating
from tfb.sampling.kv_cache import SharedPrefix, find_shared_prefix, spread_cache
from tfb.sampling.tail import prefix_inputs, tail_inputs

# What a batch may hold for its rows to be taken apart; more than this is passed on as it is.
DIVISIBLE = {"input_ids", "attention_mask", "position_ids", "use_cache"}


@dataclass(frozen=True)
class Plan:
    """How a batch runs: its state, k (None: full), and the prefixes its rows share (None: none)."""

    state: SamplingState
    tail: int | None = None
    shared: SharedPrefix | None = None


def plan(bayes: Any, inputs: dict[str, Any], state: SamplingState, tail: int | None) -> Plan:
    """Look for shared prefixes where the model allows it."""
    found = None
    if noisy_once(state, tail) and may_share(bayes, inputs):
        mask = inputs["attention_mask"].bool()
        rows = [ids[m].tolist() for ids, m in zip(inputs["input_ids"], mask, strict=True)]
        found = find_shared_prefix(rows, keep=tail or 1)
    return Plan(state, tail, found)


def noisy_once(state: SamplingState, tail: int | None) -> bool:
    """Whether a prompt may be read in two calls. Token noise numbers the tokens of a call, so that
    those of two noisy ones would get the same normals; in tail mode only one is noisy."""
    return state.draws.noise == "weight" or tail is not None


def divisible(bayes: Any, inputs: dict[str, Any]) -> bool:
    """Whether what a batch holds, and the model's angles, let sequences be read in two calls."""
    known = not set(inputs) - DIVISIBLE and "position_ids" in inputs
    return known and not varying_angles(bayes.base.config)


def may_share(bayes: Any, inputs: dict[str, Any]) -> bool:
    """Whether rows of this batch may be split into prefix and rest."""
    if bayes.task != "CAUSAL_LM" or not divisible(bayes, inputs):
        return False
    # A prefix's tokens are counted from 0; positions of the caller's own may say otherwise.
    mask, position = inputs["attention_mask"], inputs["position_ids"]
    counted = mask.cumsum(-1) - 1
    if position.shape != mask.shape or bool(((position != counted) & mask.bool()).any()):
        return False
    # Padding comes to lie between prefix and rest, and a window counts columns, not tokens.
    window = getattr(bayes.base.config, "sliding_window", None)
    return window is None or inputs["input_ids"].shape[1] <= window


def varying_angles(config: Any) -> list[tuple[str, int]]:
    """(kind, tokens): rotary embeddings whose angles are others in calls of more tokens, so that
    the keys of a prefix computed by itself may differ from those within its prompt."""
    given = getattr(config, "rope_parameters", None) or {}
    found = []
    for p in (given, *given.values()):  # one for all layers, or one for each kind of layer
        kind = p.get("rope_type") if isinstance(p, dict) else None
        if kind == "longrope":
            found.append((kind, int(p["original_max_position_embeddings"])))
        elif kind == "dynamic":
            found.append((kind, int(config.max_position_embeddings)))
    return found


def check_angles(config: Any, prefix: Tensor, rest: Tensor) -> None:
    """Refuse tail sampling where positions of the prefix would turn by other angles.

    Raises:
        ValueError: they would.
    """
    for kind, limit in varying_angles(config):
        first, whole = int(prefix.max()) + 1, int(rest.max()) + 1
        # longrope has two sets of angles, dynamic one for each length beyond the limit.
        if whole > limit and (kind == "dynamic" or first <= limit):
            raise ValueError(
                f"mode='tail': rotary angles of this model (rope_type={kind!r}) change beyond "
                f"{limit} tokens, so the first {first} of {whole} cannot be computed by "
                "themselves; use mode='full'"
            )


def run(bayes: Any, inputs: dict[str, Any], plan: Plan, parts: Iterable[Draws]) -> Iterator[Tensor]:
    """Logits [s, B, C] of the scored position, for each part of the draws."""
    if plan.tail is not None:
        yield from _tail(bayes, inputs, plan, parts)
        return
    # Not with prefixes: every part fills a cache of its own, and that from the first block on.
    replay = Replay(bayes.blocks_below) if plan.shared is None else None
    state = replace(plan.state, replay=replay)
    for draws in parts:
        step, rest, cache = replace(plan, state=replace(state, draws=draws)), inputs, None
        if plan.shared is not None:
            rest, cache = run_prefixes(bayes, inputs, step)
        yield _full(bayes, rest, step.state, cache)


def run_prefixes(
    bayes: Any, inputs: dict[str, Any], plan: Plan
) -> tuple[dict[str, Any], DynamicCache]:
    """The rest of the batch, and a cache of every row's prefix."""
    assert plan.shared is not None
    c, device = plan.shared.length, bayes.device
    ids, owner = plan.shared.ids.to(device), plan.shared.owner.to(device)
    # Without the configuration no layer forgets what lies outside its window.
    cache = DynamicCache()
    first = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(c, device=device).expand(len(ids), c),
        "use_cache": True,
        "past_key_values": cache,
    }
    backbone = getattr(bayes.base, bayes.base.base_model_prefix)
    if plan.tail is not None:
        with bayes.mean_pass(plan.state.draws, len(ids)):
            backbone(**first)
    else:
        with bayes.sampling_as(replace(plan.state, cached=True)):
            bayes.model(**first, **bayes.last_logits)
    spread_cache(cache, owner, len(ids))
    mask = inputs["attention_mask"]
    length = mask.sum(1)
    T = int(inputs["input_ids"].shape[1])
    # Left-padded rows: token c of a row lies at column T - length + c.
    column = torch.arange(c, T, device=device)[None, :]
    real = column >= T - length[:, None] + c
    rest = {
        **inputs,
        "input_ids": inputs["input_ids"][:, c:],
        "attention_mask": torch.cat([torch.ones_like(mask[:, :c]), real.to(mask.dtype)], dim=1),
        "position_ids": inputs["position_ids"][:, c:],
        "use_cache": True,
    }
    return rest, cache


def _full(
    bayes: Any, inputs: dict[str, Any], state: SamplingState, cache: DynamicCache | None
) -> Tensor:
    extra: dict[str, Any] = dict(bayes.last_logits)
    if cache is not None:
        extra["past_key_values"] = cache
    with bayes.sampling_as(replace(state, cached=cache is not None)):
        logits: Tensor = bayes.model(**inputs, **extra).logits
    if bayes.task != "SEQ_CLS":
        logits = logits[:, -1]
    return logits.unflatten(0, (len(state.draws), -1))


def _tail(
    bayes: Any, inputs: dict[str, Any], plan: Plan, parts: Iterable[Draws]
) -> Iterator[Tensor]:
    """See :mod:`tfb.sampling.tail`. The prompt runs once, whatever the number of parts."""
    assert plan.tail is not None
    k, config, cache = plan.tail, bayes.base.config, DynamicCache()
    if plan.shared is not None:
        inputs, cache = run_prefixes(bayes, inputs, plan)
    backbone = getattr(bayes.base, bayes.base.base_model_prefix)
    prefix = prefix_inputs(inputs, k)
    if prefix["input_ids"].shape[1]:
        check_angles(config, prefix["position_ids"], inputs["position_ids"])
        with bayes.mean_pass(plan.state.draws, len(prefix["input_ids"])):
            backbone(**prefix, past_key_values=cache)
    for draws in parts:
        S, B = len(draws), inputs["input_ids"].shape[0]
        rest = tail_inputs(inputs, config, k, S, bayes.dtype)
        last = torch.arange(1, S + 1, device=bayes.device) * k - 1
        with bayes.sampling_as(replace(plan.state, draws=draws, tree=True)):
            if bayes.task == "CAUSAL_LM":
                logits = bayes.model(**rest, past_key_values=cache, logits_to_keep=last).logits
            else:
                with bayes.tree_pass(S, B):
                    hidden = backbone(**rest, past_key_values=cache).last_hidden_state
                    logits = bayes.base.score(hidden[:, last])
        cache.crop(-S * k)  # the draws' own tokens are not the next part's
        yield logits.transpose(0, 1)


def hidden_norms(bayes: Any, batch: Batch, draws: Draws) -> Tensor:
    """See ``BayesianModel.hidden_norms``."""
    if bayes.mode != "full":
        raise ValueError(f"hidden-state norms need mode='full', not {bayes.mode!r}")
    if getattr(bayes.base.config, "is_encoder_decoder", False):
        raise ValueError(
            "hidden-state norms: an encoder-decoder has two stacks; use metric='nll' or 'accuracy'"
        )
    inputs, rows = bayes.inputs(batch, "full")
    mask = inputs["attention_mask"]
    S = len(draws)
    with evaluating(bayes.model), bayes.sampling(draws):
        hidden = bayes.model(**inputs, output_hidden_states=True).hidden_states[-1]
    if hidden.shape[0] == rows:  # noise in the head alone: below it all draws agree
        hidden = hidden.repeat(S, 1, 1)
    if bayes.task == "CAUSAL_LM":
        pooled = hidden[:, -1]
    else:
        weight = mask.repeat(S, 1)[..., None].to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1)
    return torch.linalg.vector_norm(pooled, dim=-1).unflatten(0, (S, rows))
