"""Prefixes that rows share, tails that draws do not (docs/design/tail-sampling.md)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

ATTENTION = ("sdpa", "eager")  # kernels that take a mask of draws
LEAST_SAVING = 0.1  # of the tokens; below, a second pass costs more than it saves
# What a batch may hold for its sequences to be read in two calls.
DIVISIBLE = frozenset({"input_ids", "attention_mask", "position_ids", "use_cache"})

Inputs = dict[str, Any]


@dataclass(frozen=True)
class SharedPrefix:
    """Rows [B] as U distinct prefixes of ``length`` tokens and what follows."""

    length: int
    ids: Tensor  # [U, length]
    owner: Tensor  # [B], the prefix of each row

    def inputs(self, device: torch.device) -> Inputs:
        """Return the arguments of the prefixes' pass."""
        ids = self.ids.to(device)
        position = torch.arange(self.length, device=device).expand_as(ids)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": position}

    def rest(self, inputs: Inputs) -> Inputs:
        """Return the arguments of the pass after it, from left-padded ``inputs`` [B, T]."""
        c, T, mask = self.length, inputs["input_ids"].shape[1], inputs["attention_mask"]
        column = torch.arange(T, device=mask.device)
        # Token c of a row lies at column T - length + c.
        seen = (column < c) | (column >= T - mask.sum(1, keepdim=True) + c)
        return {
            **inputs,
            "input_ids": inputs["input_ids"][:, c:],
            "attention_mask": seen.to(mask.dtype),
            "position_ids": inputs["position_ids"][:, c:],
        }


def find_shared_prefix(rows: Sequence[Sequence[int]], keep: int = 1) -> SharedPrefix | None:
    """Find the prefix length that leaves the fewest tokens to compute; ``keep`` stay out."""
    B, T = len(rows), max(map(len, rows))
    longest = min(map(len, rows)) - keep
    if B < 2 or longest < 1:
        return None
    order = sorted(range(B), key=lambda b: list(rows[b]))
    # Rows in lexicographic order: a new prefix of c tokens begins where two neighbours agree on
    # fewer than c. Only such lengths, and the longest possible, can be best.
    agree = [_common(rows[a], rows[b], longest) for a, b in pairwise(order)]
    best, cost = 0, float(B * T)
    for c in sorted({longest, *agree} - {0}):
        found = (1 + sum(n < c for n in agree)) * c + B * (T - c)
        if found < cost:
            best, cost = c, found
    if cost > (1 - LEAST_SAVING) * B * T:
        return None
    owner, firsts = [0] * B, [order[0]]
    for previous, b in enumerate(order[1:]):
        if agree[previous] < best:
            firsts.append(b)
        owner[b] = len(firsts) - 1
    ids = torch.tensor([list(rows[b][:best]) for b in firsts])
    return SharedPrefix(best, ids, torch.tensor(owner))


def _common(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """Count the tokens on which a and b agree from the start, at most ``limit``."""
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def spread_cache(cache: DynamicCache, owner: Tensor, groups: int) -> DynamicCache:
    """Return a cache with the keys and values of each row's prefix ``owner`` [B] of ``groups``."""
    spread = copy(cache)
    spread.layers = [copy(layer) for layer in cache.layers]
    layers: list[Any] = spread.layers
    for layer in layers:
        draws = layer.keys.shape[0] // groups  # 1 below the noise
        start = torch.arange(draws, device=owner.device)[:, None] * groups
        index = (start + owner[None, :]).flatten()
        layer.keys, layer.values = layer.keys[index], layer.values[index]
    return spread


def indivisible(inputs: Inputs) -> list[str]:
    """Return the arguments over tokens that are not known how to split."""
    T = inputs["input_ids"].shape[1]
    return [
        name
        for name, value in inputs.items()
        if name not in DIVISIBLE and isinstance(value, Tensor) and value.shape[1:2] == (T,)
    ]


def divisible(inputs: Inputs, config: PreTrainedConfig) -> bool:
    """Tell whether a batch, and the model's angles, let sequences be read in two calls."""
    known = not set(inputs) - DIVISIBLE and "position_ids" in inputs
    return known and not varying_angles(config)


def may_share(inputs: Inputs, config: PreTrainedConfig) -> bool:
    """Tell whether rows of a causal LM's batch may be split into prefix and rest."""
    if not divisible(inputs, config):
        return False
    # A prefix's tokens are counted from 0; positions of the caller's own may say otherwise.
    mask, position = inputs["attention_mask"], inputs["position_ids"]
    counted = mask.cumsum(-1) - 1
    if position.shape != mask.shape or bool(((position != counted) & mask.bool()).any()):
        return False
    # Padding comes to lie between prefix and rest, and a window counts columns, not tokens.
    window = getattr(config, "sliding_window", None)
    return window is None or inputs["input_ids"].shape[1] <= window


def varying_angles(config: PreTrainedConfig) -> list[tuple[str, int]]:
    """Return the kinds of rotary embedding whose angles are others beyond a number of tokens."""
    given = getattr(config, "rope_parameters", None) or {}
    found = []
    for p in (given, *given.values()):  # one for all layers, or one for each kind of layer
        kind = p.get("rope_type") if isinstance(p, dict) else None
        if kind == "longrope":
            found.append((kind, int(p["original_max_position_embeddings"])))
        elif kind == "dynamic":
            found.append((kind, int(config.max_position_embeddings)))
    return found


def check_angles(config: PreTrainedConfig, prefix: Tensor, rest: Tensor) -> None:
    """Refuse tail mode where a prefix by itself would turn by other angles."""
    for kind, limit in varying_angles(config):
        first, whole = int(prefix.max()) + 1, int(rest.max()) + 1
        # longrope has two sets of angles, dynamic one for each length beyond the limit.
        if whole > limit and (kind == "dynamic" or first <= limit):
            raise ValueError(
                f"mode='tail': rotary angles of this model (rope_type={kind!r}) change beyond "
                f"{limit} tokens, so the first {first} of {whole} cannot be computed by "
                "themselves; use mode='full'"
            )


def why_no_tail(base: PreTrainedModel, task: str) -> str | None:
    """Say why tail sampling is not possible with this model, or return None."""
    config = base.config
    if getattr(config, "is_encoder_decoder", False):
        return "the encoder of an encoder-decoder sees the whole prompt in both directions"
    if task == "SEQ_CLS" and not hasattr(base, "score"):
        return "an encoder sees the whole text in both directions, so it has no prefix to share"
    kind = getattr(config, "_attn_implementation", "eager")
    if kind not in ATTENTION:
        return (
            f"attn_implementation={kind!r} takes no mask of draws; load the model with "
            f"attn_implementation={ATTENTION[0]!r}"
        )
    stateful = {"linear_attention", "chunked_attention", "conv"}
    if stateful & set(getattr(config, "layer_types", None) or ()):
        return "layers without ordinary attention carry a state from which draws cannot branch"
    return None


def prefix_inputs(inputs: Inputs, k: int) -> Inputs:
    """Return the arguments of the prefix's pass: all but the last k of left-padded tokens."""
    if names := indivisible(inputs):
        raise ValueError(
            f"mode='tail': the batch has {', '.join(names)}, which tail sampling does not know how "
            "to split; use mode='full'"
        )
    # The mask [B, P + T] may begin with the P columns of a cache, which stay with the prefix.
    parts = {n: inputs[n][:, :-k] for n in ("input_ids", "attention_mask", "position_ids")}
    return {**inputs, **parts}


def tail_inputs(inputs: Inputs, base: PreTrainedModel, k: int, draws: int) -> Inputs:
    """Return the arguments of the tail's pass: the last k tokens, once for each draw."""
    return {
        **inputs,
        "input_ids": inputs["input_ids"][:, -k:].repeat(1, draws),
        "attention_mask": _masks(base, inputs["attention_mask"], k, draws),
        "position_ids": inputs["position_ids"][:, -k:].repeat(1, draws),
    }


def _masks(
    base: PreTrainedModel, attention_mask: Tensor, k: int, draws: int
) -> Tensor | dict[str, Tensor]:
    """Return ``tree_mask`` as the model wants it: one tensor, or one for each kind of layer."""
    config, dtype = base.config, base.dtype

    def make(window: int | None) -> Tensor:
        mask = tree_mask(attention_mask, k, draws, window)
        if config._attn_implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        return {kind: make(window if kind == "sliding_attention" else None) for kind in kinds}
    return make(None if kinds == {"full_attention"} else window)


def tree_mask(attention_mask: Tensor, k: int, draws: int, window: int | None) -> Tensor:
    """Return who sees whom of a mask [B, T]: bool [B, 1, S * k, P + S * k] with P = T - k."""
    T, device = attention_mask.shape[1], attention_mask.device
    P = T - k
    position = torch.arange(P, T, device=device).repeat(draws)  # [S * k] column of each query
    draw = torch.arange(draws, device=device).repeat_interleave(k)
    key_position = torch.cat([torch.arange(P, device=device), position])
    key_draw = torch.cat([torch.full((P,), -1, device=device), draw])
    sees = (key_draw[None, :] == -1) | (key_draw[None, :] == draw[:, None])
    sees &= key_position[None, :] <= position[:, None]
    if window is not None:  # tokens that a layer looks back, itself included
        sees &= position[:, None] - key_position[None, :] < window
    present = attention_mask.bool()
    real = torch.cat([present[:, :P], present[:, P:].repeat(1, draws)], dim=1)
    mask = sees[None] & real[:, None, :]
    # A padding token in the tail (its row is shorter than k) sees itself: a row of nothing but
    # minus infinity would be NaN. No real token sees it.
    own = torch.arange(draws * k, device=device)
    mask[:, own, P + own] = True
    return mask[:, None]
