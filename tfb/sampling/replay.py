"""Blocks below the noise run once for all passes over a batch.

Draws that do not fit into one pass run in several, and up to the first noisy block all of these
compute the same. The last block below the noise leaves its output in the state's
:class:`~tfb.sampling.fan_out.Replay`; in later passes every block below returns that output without looking
at its input. Like the output embedding's (:mod:`tfb.sampling.overrides`), the blocks' ``forward`` is replaced by
one that looks at the sampling state and does what it always did where there is nothing to replay.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from tfb.sampling.fan_out import Replay, state_of_base


def make_replayable(blocks: Iterable[nn.Module], base: nn.Module) -> None:
    """Let blocks of ``base`` answer from the state's replay. Those whose ``forward`` is somebody
    else's already stay as they are: they run in every pass."""
    for block in blocks:
        if "forward" not in vars(block):
            block.forward = partial(_forward, block, base)


def restore_blocks(blocks: Iterable[nn.Module]) -> None:
    """Undo ``make_replayable``."""
    for block in blocks:
        forward = vars(block).get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            del block.forward


def _forward(block: nn.Module, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
    replay = _replay(block, base)
    if replay is not None and replay.output is not None:
        return replay.output
    output = type(block).forward(block, *args, **kwargs)
    if replay is not None and block is replay.blocks[-1]:
        replay.output = output
    return output


def _replay(block: nn.Module, base: nn.Module) -> Replay | None:
    """The state's replay, where the block is given the rows that all draws have in common."""
    state = state_of_base(base)
    if state is None or state.replay is None or state.running is None:
        return None
    if torch.compiler.is_compiling():  # what a graph puts out is overwritten when it runs again
        return None
    common = state.running.folded or state.running.draws == 1
    return state.replay if common and any(block is b for b in state.replay.blocks) else None
