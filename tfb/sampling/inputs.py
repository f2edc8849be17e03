"""A batch as the model's passes need it: checked, padded on one side; the model in eval mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]


def align(batch: Batch, side: str, device: torch.device) -> dict[str, Any]:
    """The batch on ``device`` with its padding on ``side`` ("left" or "right").

    A model then sees the same rows whatever side the tokenizer padded on, so results do not
    depend on it. position_ids are moved along with the tokens.

    Raises:
        TypeError: no dict.
        ValueError: no input_ids [B, T], no rows, a mask of another shape, holes inside a row's
            mask, an empty row.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch: expected a tokenizer's dict of tensors, got {type(batch).__name__}; write "
            "batch = tokenizer(texts, return_tensors='pt', padding=True)"
        )
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError("batch: needs input_ids [B, T], a tensor (tokenizer return_tensors='pt')")
    out = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    out.pop("labels", None)
    mask = out.get("attention_mask")
    if mask is None:
        mask = out["attention_mask"] = torch.ones_like(out["input_ids"])
    if mask.shape != ids.shape:
        raise ValueError(
            f"batch: attention_mask {list(mask.shape)} does not match input_ids {list(ids.shape)}"
        )
    if ids.shape[0] == 0:
        raise ValueError("batch: has no rows")
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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; what was training before is again after."""
    training = [m for m in model.modules() if m.training]
    if training:  # eval() walks all modules once more, at every batch
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
