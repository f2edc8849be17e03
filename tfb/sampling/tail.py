"""Tail sampling: noise at the last k positions of a decoder's prompt only.

    prefix   all but the last k tokens, once for each row, with the mean adapter; its keys and
             values are kept
    tail     the last k tokens, S-fold, against those keys and values, which are neither copied
             nor repeated: the draws lie side by side on the sequence axis, [B, S * k], and a mask
             lets each draw see the prefix and its own tokens

Cost about 1 + S k / T passes for prompts of T tokens, where ``mode="full"`` takes S. It is another
posterior predictive than that of full sampling: keys and values of the prefix are those of the
mean adapter. sigma is searched under the mode it is used in, and the artifact keeps the mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ATTENTION = ("sdpa", "eager")  # kernels that take a mask of this shape


def why_no_tail(base: Any, task: str) -> str | None:
    """Why tail sampling is not possible with this model, or None."""
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
    if {"linear_attention", "chunked_attention"} & set(getattr(config, "layer_types", None) or ()):
        return "layers without ordinary attention carry a state from which draws cannot branch"
    return None


def tree_mask(attention_mask: Tensor, k: int, draws: int, window: int | None) -> Tensor:
    """Who sees whom, bool [B, 1, S * k, P + S * k] with P = T - k.

    Args:
        attention_mask: [B, T], 1 at tokens. k: tail positions. draws: S.
        window: tokens that a sliding-window layer looks back, itself included; None: all.
    """
    T = attention_mask.shape[1]
    P = T - k
    device = attention_mask.device
    position = torch.arange(P, T, device=device).repeat(draws)  # [S * k] column of each query
    draw = torch.arange(draws, device=device).repeat_interleave(k)
    key_position = torch.cat([torch.arange(P, device=device), position])
    key_draw = torch.cat([torch.full((P,), -1, device=device), draw])
    sees = (key_draw[None, :] == -1) | (key_draw[None, :] == draw[:, None])
    sees &= key_position[None, :] <= position[:, None]
    if window is not None:
        sees &= position[:, None] - key_position[None, :] < window
    present = attention_mask.bool()
    real = torch.cat([present[:, :P], present[:, P:].repeat(1, draws)], dim=1)
    mask = sees[None] & real[:, None, :]
    # A padding token in the tail (its row is shorter than k) sees itself: a row of nothing but
    # minus infinity would be NaN. No real token sees it.
    own = torch.arange(draws * k, device=device)
    mask[:, own, P + own] = True
    return mask[:, None]


def masks(config: Any, attention_mask: Tensor, k: int, draws: int, dtype: torch.dtype) -> Any:
    """``tree_mask`` as the model wants it: one tensor, or one for each kind of layer."""

    def make(window: int | None) -> Tensor:
        mask = tree_mask(attention_mask, k, draws, window)
        if config._attn_implementation == "sdpa":
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(dtype).min
        )

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        return {kind: make(window if kind == "sliding_attention" else None) for kind in kinds}
    return make(None if kinds == {"full_attention"} else window)


def prefix_inputs(inputs: dict[str, Any], k: int) -> dict[str, Any]:
    """Arguments of the prefix's pass, from left-padded inputs [B, T] with position ids, k <= T.

    attention_mask [B, P' + T] may begin with P' columns of a cache that is there already.

    Raises:
        ValueError: an argument over tokens that is not known how to split.
    """
    T = inputs["input_ids"].shape[1]
    rest = {
        name: value
        for name, value in inputs.items()
        if name not in ("input_ids", "attention_mask", "position_ids", "use_cache")
        and isinstance(value, Tensor)
        and value.dim() >= 2
        and value.shape[1] == T
    }
    if rest:
        raise ValueError(
            f"mode='tail': the batch has {', '.join(rest)}, which tail sampling does not know how "
            "to split; use mode='full'"
        )
    # [:, :-k] of the mask keeps a cache's columns with the prefix.
    parts = {n: inputs[n][:, :-k] for n in ("input_ids", "attention_mask", "position_ids")}
    return {**inputs, **parts, "use_cache": True}


def tail_inputs(
    inputs: dict[str, Any], config: Any, k: int, draws: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of the tail's pass: the last k tokens of ``inputs``, once for each draw."""
    return {
        **inputs,
        "input_ids": inputs["input_ids"][:, -k:].repeat(1, draws),
        "attention_mask": masks(config, inputs["attention_mask"], k, draws, dtype),
        "position_ids": inputs["position_ids"][:, -k:].repeat(1, draws),
        "use_cache": True,
    }
