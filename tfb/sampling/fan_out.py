"""One forward pass for S posterior draws, paying once for everything the draws have in common.

Inside ``bayes.sampling(draws)`` rows come out draw-major, [S * B, ...]. The model's own code sees
S * B rows at its entrance and after its backbone; in between, whatever lies below the first noisy
module runs on the B rows that all draws share:

    entrance        B rows -> S * B (token ids: cheap), for the code outside the backbone
    backbone        S * B -> B ("folded"): embeddings, masks, rotary tables, blocks without noise
    first noisy     B -> S * B at the entrance of the block that holds the first noisy module;
    block           modules that are given the very tensor that the first noisy one was given
                    (q, k and v) still read it once and write S outputs
    later blocks    S * B; what the backbone hands to every block (masks, tables) is repeated once

Draws that run in several passes share a :class:`Replay`: blocks below the noise then run in the
first pass only (:mod:`tfb.sampling.replay`).

Draws that are active are a context variable keyed by the model (:mod:`tfb.sampling.state`), so contexts
nest, threads do not see each other, and two models never share a state. A thread started inside a
context begins without one (Python's rule for context variables).

To support another architecture: see ``FOLDABLE``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import Token
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from tfb.draws import Draws
from tfb.sampling.state import context, reset_states, set_states

# Arguments of a forward pass that run over positions, not rows; never repeated for the draws.
SHARED_ARGUMENTS = frozenset({"cache_position", "logits_to_keep"})

# config.model_type of the architectures whose backbone hands its blocks tensors with rows first
# (or a first axis of 1), which is what folding relies on. Any other architecture is sampled all
# the same, with all of its blocks run for every draw.
FOLDABLE = {
    "bert", "distilbert", "electra", "gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral",
    "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "roberta", "xlm-roberta",
}  # fmt: skip


# --- state ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class ForwardPass:
    """A pass under way: S draws of B rows.

    Attributes:
        entrance: the module whose call began it.
        tree: the draws lie along the sequence axis, [B, S * k, ...] (tail sampling), not rows.
        folding: the backbone was given the B common rows. folded: tensors still hold B rows.
        sharing: the module under way was given the B common rows of an input.
        common: the input of the first noisy module, S equal parts.
    """

    draws: int
    batch: int
    entrance: nn.Module
    tree: bool = False
    folding: bool = False
    folded: bool = False
    sharing: bool = False
    common: Tensor | None = None
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """S * B."""
        return self.draws * self.batch

    def repeat(self, value: Any, *, keep: bool) -> Any:
        """S copies, draw-major, of every tensor of B rows in ``value`` (tuples are entered).

        keep: remember the copies, for what is handed to every block.
        """
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
        """The B common rows of a tensor of S * B."""
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
    """The active draws of one model.

    Attributes:
        base: the base model that is sampled. draws: S draws.
        columns: [K] rows of the output embedding to compute, None for all.
        tree: see :class:`ForwardPass`; the caller has then laid out the input itself.
        mean: the one draw is the mean adapter: PEFT's own arithmetic where it is not merged.
        cached: past_key_values of this very state come with the call.
        diverged: rows differ from draw to draw at the entrance already: S * B come in.
        reduce: what becomes of the logits [S * B, ...] at the exit (generation), or None.
        replay: shared by passes over the same batch, none of which fills a KV cache; or None.
        running: the pass under way.
    """

    base: nn.Module
    draws: Draws
    columns: Tensor | None = None
    tree: bool = False
    mean: bool = False
    cached: bool = False
    diverged: bool = False
    reduce: Callable[[Tensor], Tensor] | None = None
    replay: Replay | None = None
    running: ForwardPass | None = None


def sampling_state(owner: int) -> SamplingState | None:
    """The innermost active state of the model identified by ``owner``, if there is one."""
    return context.states.get(owner)


def set_state(owner: int, state: SamplingState) -> Token[Mapping[int, SamplingState]]:
    """Make ``state`` the owner's; the token undoes it."""
    return set_states({**context.states, owner: state})


def reset_state(token: Token[Mapping[int, SamplingState]]) -> None:
    reset_states(token)


def state_of_base(base: nn.Module) -> SamplingState | None:
    """The active state of a base model, whichever adapter is sampled."""
    return next((s for s in context.states.values() if s.base is base), None)


def other_owner_of(base: nn.Module, owner: int) -> bool:
    """Whether another BayesianModel is sampling the same base model."""
    return any(o != owner and s.base is base for o, s in context.states.items())


# --- hooks ----------------------------------------------------------------------------------------


class FanOut:
    """The hooks that carry S draws through a model; one for each BayesianModel."""

    def __init__(self, owner: int, model: nn.Module, base: Any, noisy: Sequence[str]) -> None:
        """``model``: the PEFT model; ``base``: the model inside; ``noisy``: names in ``base``."""
        self.owner = owner
        self.base = base
        self.handles: list[Any] = []
        self._outside, self.below, self._blocks, self._first = _layout(base, noisy)
        # PEFT versions differ in whether they call the inner model or its forward; whichever of
        # the two modules is entered first fans the batch out, and the other sees a running pass.
        for module in dict.fromkeys((model, base)):
            self._before(module, self._enter)
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))
        if self._blocks is None:
            return
        backbone = getattr(base, base.base_model_prefix)
        self._before(backbone, self._fold)
        self.handles.append(backbone.register_forward_hook(self._unfold))
        for block in self._blocks:
            self._before(block, self._open_block)
        for name in self._first:
            module = base.get_submodule(name)
            self._before(module, self._share)
            self.handles.append(module.register_forward_hook(self._unshare, always_call=True))

    def _before(self, module: nn.Module, hook: Any) -> None:
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @property
    def head_alone(self) -> bool:
        """Whether a draw costs an output embedding only: the backbone runs on the common rows."""
        return self._blocks == [] and bool(self._outside) and self._may_fold()

    @contextlib.contextmanager
    def tree_pass(self, draws: int, batch: int) -> Iterator[None]:
        """A pass that enters below the model's entrance, draws along the sequence axis."""
        state = sampling_state(self.owner)
        assert state is not None
        running = ForwardPass(draws, batch, self.base, tree=True)
        token = set_state(self.owner, replace(state, running=running))
        try:
            yield
        finally:
            reset_state(token)

    def _running(self) -> ForwardPass | None:
        state = sampling_state(self.owner)
        return None if state is None else state.running

    def _run(self, state: SamplingState, running: ForwardPass | None) -> None:
        # torch.compile follows an assignment; it breaks the graph at set_state.
        context.states = {**context.states, self.owner: replace(state, running=running)}

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Repeat the batch S times, draw-major."""
        state = sampling_state(self.owner)
        # A pass under way that meets its entrance again was interrupted: a KeyboardInterrupt
        # passes by torch's hooks, so _leave never saw it.
        if state is None or (state.running is not None and state.running.entrance is not module):
            return None
        if kwargs.get("past_key_values") is not None and not (state.tree or state.cached):
            raise NotImplementedError(
                "sampling with a KV cache: keys and values of one draw are invalid for another; "
                "pass whole sequences without past_key_values, or use bayes.generate"
            )
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "sampling with adapter_names (mixed batches): sample one adapter at a time"
            )
        S, rows = len(state.draws), _batch_rows(args, kwargs)
        if state.diverged and rows % S:
            raise ValueError(f"sampling: {rows} rows are not a whole number for each of {S} draws")
        batch = rows // S if state.diverged else rows
        running = ForwardPass(S, batch, module, tree=state.tree)
        self._run(state, running)
        if state.tree or state.diverged:
            return None
        fan = _each(lambda value: running.repeat(value, keep=False))
        return fan(args, kwargs)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The module that fanned the batch out ends the pass, also on an error."""
        state = sampling_state(self.owner)
        if state is None or state.running is None or state.running.entrance is not module:
            return None
        self._run(state, None)
        if state.reduce is not None and getattr(output, "logits", None) is not None:
            output.logits = state.reduce(output.logits)
        return output

    def _fold(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        state, running = sampling_state(self.owner), self._running()
        if state is None or running is None or state.tree or state.diverged:
            return None
        if running.draws == 1 or not self._may_fold():
            return None
        running.folding = running.folded = True
        return _each(running.fold)(args, kwargs)

    def _open_block(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        running = self._running()
        if running is None or not running.folding:
            return None
        if running.folded:
            # The hidden state is used once; what the backbone hands to all blocks, many times.
            running.folded = False
            if args:
                args = (running.repeat(args[0], keep=False), *args[1:])
            else:
                hidden = running.repeat(kwargs["hidden_states"], keep=False)
                kwargs = {**kwargs, "hidden_states": hidden}
        return _each(lambda value: running.repeat(value, keep=True))(args, kwargs)

    def _unfold(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A backbone without noise leaves B rows; only a noisy head right after takes them so."""
        running = self._running()
        if running is None or not running.folded or self._outside:
            return None
        running.folded = False
        if isinstance(output, tuple):
            return (running.repeat(output[0], keep=False), *output[1:])
        for name in ("last_hidden_state", "pooler_output"):
            if isinstance(getattr(output, name, None), Tensor):
                output[name] = running.repeat(output[name], keep=False)
        return output

    def _share(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give the module the common rows if its input is the first noisy module's."""
        running = self._running()
        if running is None or not running.folding or running.folded or not args:
            return None
        x = args[0]
        if running.common is None:
            running.common = x
        if x is not running.common:
            return None
        running.sharing = True
        return (x[: running.batch], *args[1:]), kwargs

    def _unshare(self, module: nn.Module, args: Any, output: Any) -> None:
        running = self._running()
        if running is not None:
            running.sharing = False

    def _may_fold(self) -> bool:
        """With two active adapters a layer adds results of other rows, and with a disabled one it
        does not fan out: nothing is folded then."""
        names = self._first or self._outside
        if not names:
            return True
        layer: Any = self.base.get_submodule(names[0])
        return len(layer.active_adapters) == 1 and not layer.disable_adapters


def _layout(
    base: Any, noisy: Sequence[str]
) -> tuple[list[str], list[nn.Module], list[nn.Module] | None, list[str]]:
    """(noisy modules outside the backbone, blocks below the first noisy one, blocks from it on,
    noisy modules of that block); the latter blocks are None where nothing can be folded."""
    prefix = getattr(base, "base_model_prefix", "")
    backbone = getattr(base, prefix, None) if prefix else None
    if getattr(base.config, "model_type", "") not in FOLDABLE or not isinstance(
        backbone, nn.Module
    ):
        return [], [], None, []
    lists = [n for n, m in base.named_modules() if isinstance(m, nn.ModuleList)]
    inside = [n for n in noisy if n.startswith(f"{prefix}.")]
    outside = [n for n in noisy if n not in inside]
    # Only the output embedding is known to be given the backbone's rows and nothing else.
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not (len(outside) == 1 and base.get_submodule(outside[0]) is head):
        outside = []
    if not inside:
        return outside, [], [], []
    owners = {n: next((x for x in lists if n.startswith(f"{x}.")), None) for n in inside}
    stacks = set(owners.values())
    if len(stacks) != 1 or None in stacks:
        return [], [], None, []
    stack = stacks.pop()
    assert stack is not None
    number = {n: int(n.removeprefix(f"{stack}.").partition(".")[0]) for n in inside}
    start = min(number.values())
    blocks = list(base.get_submodule(stack))
    return outside, blocks[:start], blocks[start:], [n for n in inside if number[n] == start]


def _each(
    change: Callable[[Any], Any],
) -> Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    """``change`` applied to all arguments that run over rows."""

    def apply(
        args: Iterable[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {k: v if k in SHARED_ARGUMENTS else change(v) for k, v in kwargs.items()}
        return tuple(change(a) for a in args), named

    return apply


def _batch_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(kwargs.get(name), Tensor):
            return int(kwargs[name].shape[0])
    for value in args:
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(value.shape[0])
    raise ValueError("sampling: the model was called with neither input_ids nor inputs_embeds")
