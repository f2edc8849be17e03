"""The sampling states of the calling context: truth for eager code and for ``torch.compile``.

They are a context variable: contexts nest, threads and asyncio tasks do not see each other's.
Dynamo can neither trace ``ContextVar.get`` nor guard on it, but it reads an attribute of a module
by Python's own lookup, when it traces and in the guards of every later call (so it follows the
settings of ``torch.backends.cudnn``), and what traced code assigned is written when the graph has
run. So the variable is reached through a property of a module object: a graph runs only where the
calling context is as it was when the graph was traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar, Token
from types import ModuleType
from typing import Any

_NONE: Mapping[int, Any] = {}
_STATES: ContextVar[Mapping[int, Any]] = ContextVar("tfb_sampling", default=_NONE)


class _Context(ModuleType):
    """A module, since Dynamo would inline a property of any other object, and break there."""

    @property
    def states(self) -> Mapping[int, Any]:
        """The active state of each model, by owner; replaced as a whole, never changed."""
        return _STATES.get()

    @states.setter
    def states(self, states: Mapping[int, Any]) -> None:
        _STATES.set(states)


context = _Context(f"{__name__}.context")


def set_states(states: Mapping[int, Any]) -> Token[Mapping[int, Any]]:
    """Like assigning ``context.states``; the token undoes it."""
    return _STATES.set(states)


def reset_states(token: Token[Mapping[int, Any]]) -> None:
    _STATES.reset(token)
