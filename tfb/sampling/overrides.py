"""The scoring head: only those rows of the output embedding that the labels need.

A vocabulary of 128,000 columns costs as much as many layers, and most of it in memory; a
multiple-choice row needs a handful. The output embedding's ``forward`` is replaced by one that
looks at the sampling state; without columns there it computes what it always did.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tfb.sampling.fan_out import state_of_base
from tfb_kernels.ops import select_columns

_MOST = 0.25  # share of the vocabulary above which the whole product is not slower


@dataclass(frozen=True)
class LabelColumns:
    """Which columns of the head to compute, and where each row's labels are among them.

    Attributes:
        columns: [C] vocabulary ids, or None: all.
        position: [K] or [B, K] indices into the computed columns.
    """

    columns: Tensor | None
    position: Tensor

    @classmethod
    def of(cls, base: Any, label_ids: Tensor, rows: int) -> LabelColumns:
        """For label_ids [K] or [B, K].

        Raises:
            ValueError: another shape, or ids outside the vocabulary.
        """
        head = base.get_output_embeddings()
        V = int(head.weight.shape[0])
        ids = label_ids.to(head.weight.device, torch.int64)
        if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != rows) or not ids.numel():
            raise ValueError(
                f"label_ids: expected [K], [{rows}, K] or [{rows}, K, L], got {list(ids.shape)}"
            )
        if bool(((ids < 0) | (ids >= V)).any()):
            raise ValueError(f"label_ids: outside the vocabulary of {V}")
        columns, position = torch.unique(ids, return_inverse=True)
        if not is_narrowed(head) or len(columns) > _MOST * V:
            return cls(None, ids)
        return cls(columns, position)

    def select(self, logits: Tensor) -> Tensor:
        """Each row's labels [S, B, K] from logits [S, B, C]."""
        return select_columns(logits, self.position)


def narrow_head(base: Any, task: str) -> None:
    """Let the output embedding of a language model compute the state's columns alone.

    Modules that are not plain ``nn.Linear`` (quantized, or adapted themselves) stay as they are.
    """
    head = base.get_output_embeddings() if task != "SEQ_CLS" else None
    if type(head) is nn.Linear and "forward" not in vars(head):
        head.forward = partial(_forward, head, base)  # type: ignore[method-assign]


def is_narrowed(head: nn.Module) -> bool:
    """Whether ``narrow_head`` did change this module."""
    forward = vars(head).get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def restore_head(base: Any) -> None:
    """Undo ``narrow_head``."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is not None and is_narrowed(head):
        del head.forward


def _forward(head: nn.Linear, base: Any, x: Tensor) -> Tensor:
    state = state_of_base(base)
    if state is None or state.columns is None:
        return nn.functional.linear(x, head.weight, head.bias)
    bias = None if head.bias is None else head.bias[state.columns]
    return nn.functional.linear(x, head.weight[state.columns], bias)
