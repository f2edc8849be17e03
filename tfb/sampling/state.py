"""The sampling states of the calling context, for eager code and for ``torch.compile``.

They live in a context variable: contexts nest, threads and asyncio tasks do not see each other's,
and a thread started inside a context begins without one. Two models never share a state.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from tfb.draws import Draws
from tfb.sampling.config import SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, Any]
LOOPS = ("transformers.pipelines.base", "transformers.trainer")


@dataclass(eq=False)
class ForwardPass:
    """A pass under way: S draws of B rows."""

    draws: int  # S
    batch: int  # B
    entrance: nn.Module  # whose call began the pass
    tree: bool = False  # draws lie along the sequence axis, [B, S * k, ...], as in tail mode
    folding: bool = False  # the backbone was given the B common rows
    folded: bool = False  # tensors still hold the B common rows
    sharing: bool = False  # the module under way was given the B common rows of an input
    common: Tensor | None = None  # the input of the first noisy module, S equal parts
    # Pairs of what goes to every block, and its copies.
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """S * B."""
        return self.draws * self.batch

    def repeat(self, value: Any, *, keep: bool = False) -> Any:
        """Return S copies, draw-major, of every tensor of B rows in an argument of a module."""
        if isinstance(value, tuple):
            return tuple(self.repeat(v, keep=keep) for v in value)
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != self.batch:
            return value
        for known, copy in self.copies:
            if known is value:
                return copy
        copy = value.repeat(self.draws, *([1] * (value.dim() - 1)))
        if keep:
            self.copies.append((value, copy))
        return copy

    def fold(self, value: Any) -> Any:
        """Return the B common rows of a tensor of S * B."""
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.rows:
            return value[: self.batch]
        return value


@dataclass(eq=False)
class Replay:
    """Several passes over one batch: the blocks below the noise, and what the last one returned."""

    blocks: Sequence[nn.Module]
    output: Any = None


@dataclass(frozen=True)
class SamplingState:
    """The active draws of one model."""

    base: nn.Module  # the base model
    draws: Draws
    columns: Tensor | None = None  # [K] rows of the output embedding to compute; None: all
    tree: bool = False  # see ForwardPass; the caller has then laid out the input itself
    mean: bool = False  # the one draw is the mean: PEFT's own arithmetic where not merged
    cached: bool = False  # past_key_values of this very state come with the call
    diverged: bool = False  # rows differ from draw to draw already: S * B come in
    reduce: Callable[[Tensor], Tensor] | None = None  # of the logits [S * B, ...] at the exit
    replay: Replay | None = None  # of passes over one batch, none of which fills a KV cache
    running: ForwardPass | None = None  # the pass under way
    loops: int | None = None  # of transformers around ``sampling``; None: a prediction of ours


def loops_around() -> int:
    """Count the calls of transformers' loops, which take one output for each of their rows."""
    frame, found = inspect.currentframe(), 0
    while frame is not None:
        found += frame.f_globals.get("__name__") in LOOPS
        frame = frame.f_back
    return found


States = Mapping[int, SamplingState]
_NONE: States = {}
_STATES: ContextVar[States] = ContextVar("tfb_sampling", default=_NONE)


class _Context(ModuleType):
    # Dynamo can neither trace nor guard on a ContextVar, but reads attributes of a module by
    # Python's own lookup; a property of any other object it would inline, and break there
    # (docs/design/torch-compile.md).

    @property
    def states(self) -> States:
        """The active state of each model, by owner; replaced as a whole, never changed."""
        return _STATES.get()

    @states.setter
    def states(self, states: States) -> None:
        _STATES.set(states)


_sampled: list[int] = []  # the owners of all states of this process, of every thread
context = _Context(f"{__name__}.context")


def sampling_state(owner: int) -> SamplingState | None:
    """Return the innermost active state of the model identified by ``owner``, if there is one."""
    return context.states.get(owner)


def state_of_base(base: nn.Module) -> SamplingState | None:
    """Return the active state of a base model, whichever adapter is sampled."""
    return next((s for s in context.states.values() if s.base is base), None)


def other_owner_of(base: nn.Module, owner: int) -> bool:
    """Tell whether another BayesianModel is sampling the same base model."""
    return any(o != owner and s.base is base for o, s in context.states.items())


def is_sampled(owner: int) -> bool:
    """Tell whether any thread is sampling the model."""
    return owner in _sampled


@contextlib.contextmanager
def active(owner: int, state: SamplingState) -> Iterator[None]:
    """Make ``state`` the owner's within this context."""
    token = _STATES.set({**_STATES.get(), owner: state})
    _sampled.append(owner)
    try:
        yield
    finally:
        _sampled.remove(owner)
        _STATES.reset(token)


_held: dict[int, int] = {}  # predictions under way, by id of each module that will train again
_lock = threading.Lock()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; what was training before is again after.

    Predictions may nest and run in several threads: the first takes a module out of train mode, the
    last one puts it back. Meanwhile it is in eval mode for everybody: train, or call ``train()``
    and ``eval()``, before or after.

    Raises:
        RuntimeError: a module was put in train mode meanwhile, so its dropout may have acted.
    """
    modules = list(model.modules())
    with _lock:
        held = [m for m in modules if m.training or id(m) in _held]
        for module in held:
            module.training = False
            _held[id(module)] = _held.get(id(module), 0) + 1
    try:
        yield
        if any(m.training for m in modules):
            raise RuntimeError(
                "train() was called on the model while it predicted, so dropout may have changed "
                "the result; do one after the other, or train a copy"
            )
    finally:
        with _lock:
            for module in held:
                _held[id(module)] -= 1
                if not _held[id(module)]:
                    del _held[id(module)]
                    module.training = True


class SampledModel(Protocol):
    """What sampling asks of a :class:`tfb.model.BayesianModel`, which says what each means."""

    model: nn.Module
    base: PreTrainedModel
    task: str
    blocks_below: list[nn.Module]
    last_logits: dict[str, int]

    @property
    def config(self) -> SamplingConfig:
        """How the model samples."""

    @property
    def head_alone(self) -> bool:
        """Whether a draw costs an output embedding only."""

    def inputs(self, batch: Batch, mode: str) -> dict[str, Any]:
        """Return the aligned batch with what a scoring pass adds."""

    def check_sampling(self) -> None:
        """Refuse a model of which draws cannot be sampled now."""

    def sampling_as(self, state: SamplingState) -> contextlib.AbstractContextManager[None]:
        """Sample with everything that a state can say."""
