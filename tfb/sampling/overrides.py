"""Replaced ``forward``: a head of few columns, blocks that run once (docs/design/fan-out.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tfb.sampling.state import Replay, state_of_base
from tfb_kernels.ops import select_columns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST = 0.25  # share of the vocabulary above which the whole product is not slower


@dataclass(frozen=True)
class LabelColumns:
    """Which columns of the head to compute, and where each row's labels are among them."""

    columns: Tensor | None = None  # [C] vocabulary ids; None: all
    position: Tensor | None = None  # [K] or [B, K] among the computed columns; None: all

    @classmethod
    def of(cls, base: PreTrainedModel, label_ids: Tensor, rows: int) -> LabelColumns:
        """Find the columns of label_ids [K] or [B, K]."""
        head: Any = base.get_output_embeddings()
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

    def reduce(self, logits: Tensor) -> Tensor:
        """Return each row's labels [S, B, K] from logits [S, B, 1, C]."""
        logits = logits[:, :, 0]
        return logits if self.position is None else select_columns(logits, self.position)


def install(base: PreTrainedModel, task: str, below: Iterable[nn.Module]) -> None:
    """Replace the forward of a plain head and of blocks below the noise, unless somebody did."""
    head = base.get_output_embeddings() if task != "SEQ_CLS" else None
    if type(head) is nn.Linear:
        _replace(head, _narrowed, base)
    for block in below:
        _replace(block, _replayed, base)


def uninstall(base: PreTrainedModel, below: Iterable[nn.Module]) -> None:
    """Undo ``install``."""
    for module in (base.get_output_embeddings(), *below):
        if module is not None and _replacement(module) in (_narrowed, _replayed):
            del module.forward


def restore(replica: nn.Module) -> None:
    """Take the replaced forwards, which are the original's, out of a copy of its modules."""
    for module in replica.modules():
        if _replacement(module) in (_narrowed, _replayed):
            del module.forward


def is_narrowed(head: nn.Module) -> bool:
    """Tell whether ``install`` did change this head."""
    return _replacement(head) is _narrowed


def _replace(module: nn.Module, forward: Callable[..., Any], base: nn.Module) -> None:
    if "forward" not in vars(module):
        module.forward = partial(forward, module, base)


def _replacement(module: nn.Module) -> Callable[..., Any] | None:
    forward = vars(module).get("forward")
    return forward.func if isinstance(forward, partial) else None


def _narrowed(head: nn.Linear, base: nn.Module, x: Tensor) -> Tensor:
    state = state_of_base(base)
    if state is None or state.columns is None:
        return nn.functional.linear(x, head.weight, head.bias)
    bias = None if head.bias is None else head.bias[state.columns]
    return nn.functional.linear(x, head.weight[state.columns], bias)


def _replayed(block: nn.Module, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return what the last block returned in the first pass, without looking at the input."""
    replay = _replay(block, base)
    if replay is not None and replay.output is not None:
        return replay.output
    output = type(block).forward(block, *args, **kwargs)
    if replay is not None and block is replay.blocks[-1]:
        replay.output = output
    return output


def _replay(block: nn.Module, base: nn.Module) -> Replay | None:
    """Return the state's replay, where the block is given the rows that draws have in common."""
    state = state_of_base(base)
    if state is None or state.replay is None or state.running is None:
        return None
    if torch.compiler.is_compiling():  # what a graph puts out is overwritten when it runs again
        return None
    common = state.running.folded or state.running.draws == 1
    return state.replay if common and block in state.replay.blocks else None
