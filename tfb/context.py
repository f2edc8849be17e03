"""The sampling states of the calling context: truth for eager code and for ``torch.compile``.

They are a context variable, so contexts nest, and threads and asyncio tasks do not see each other's.
Dynamo can neither trace ``ContextVar.get`` nor guard on it, but it reads an attribute of a module
through Python's own lookup, when it traces and again in the guards of every call (that is how it
follows the settings of ``torch.backends.cudnn``), and it writes what traced code assigned when the
graph has run. So the variable is reached through a property of a module object: a graph is run
only where the calling context says what it said when the graph was traced.
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
