"""Hooks that run S posterior draws in one forward pass (docs/design/fan-out.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tfb.sampling.overrides import restore
from tfb.sampling.state import (
    ForwardPass,
    SamplingState,
    context,
    is_sampled,
    loops_around,
    sampling_state,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Arguments of a forward pass that run over positions, not rows; never repeated for the draws.
SHARED_ARGUMENTS = frozenset({"cache_position", "logits_to_keep"})

# config.model_type of the architectures whose backbone hands its blocks tensors with rows first
# (or a first axis of 1). All blocks of any other run for every draw.
FOLDABLE = {"bert", "distilbert", "electra", "roberta", "xlm-roberta"}
FOLDABLE |= {"gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "mixtral", "olmo2"}
FOLDABLE |= {"phi3", "qwen2", "qwen3"}

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Call = tuple[Args, Kwargs] | None  # what a hook puts in place of a module's arguments


@dataclass(frozen=True)
class Layout:
    """Where the noise of a model is."""

    outside: Sequence[str] = ()  # noisy modules outside the backbone
    below: list[nn.Module] = field(default_factory=list)  # blocks below the first noisy one
    blocks: Sequence[nn.Module] | None = None  # those from it on; None: nothing can be folded
    first: Sequence[str] = ()  # the noisy modules of its block

    @classmethod
    def of(cls, base: PreTrainedModel, noisy: Sequence[str]) -> Layout:
        """Find the noisy modules, by their names, in the stack of the backbone's blocks."""
        prefix = base.base_model_prefix
        if base.config.model_type not in FOLDABLE or not hasattr(base, prefix):
            return cls()
        inside = [n for n in noisy if n.startswith(f"{prefix}.")]
        outside = [n for n in noisy if n not in inside]
        # Only the output embedding is known to be given the backbone's rows and nothing else.
        if [base.get_submodule(n) for n in outside] != [base.get_output_embeddings()]:
            outside = []
        if not inside:
            return cls(outside, blocks=())
        lists = {n: m for n, m in base.named_modules() if isinstance(m, nn.ModuleList)}
        owners = {n: next((x for x in lists if n.startswith(f"{x}.")), "") for n in inside}
        stack = owners[inside[0]]
        if not stack or set(owners.values()) != {stack}:
            return cls()
        number = {n: int(n.removeprefix(f"{stack}.").partition(".")[0]) for n in inside}
        start = min(number.values())
        blocks, first = list(lists[stack]), [n for n in inside if number[n] == start]
        return cls(outside, blocks[:start], blocks[start:], first)


class FanOut:
    """The hooks that carry S draws through a model; one for each BayesianModel."""

    def __init__(
        self, owner: int, model: nn.Module, base: PreTrainedModel, noisy: Sequence[str]
    ) -> None:
        self._owner = owner
        self._base = base
        self._handles: list[RemovableHandle] = []
        self._layout = layout = Layout.of(base, noisy)
        self.below = layout.below
        # PEFT versions differ in whether they call the inner model or its forward; whichever of
        # the two modules is entered first fans the batch out, and the other sees a running pass.
        for module in dict.fromkeys((model, base)):
            self._before(module, self._enter)
            self._after(module, self._leave, always_call=True)
        if layout.blocks is None:
            return
        backbone = base.base_model
        self._before(backbone, self._fold)
        self._after(backbone, self._unfold)
        for block in layout.blocks:
            self._before(block, self._open_block)
        for name in layout.first:
            module = base.get_submodule(name)
            self._before(module, self._share)
            self._after(module, self._unshare, always_call=True)

    def _before(self, module: nn.Module, hook: Callable[..., Call]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))

    def _after(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> None:
        self._handles.append(module.register_forward_hook(hook, **options))

    def remove(self) -> None:
        """Take the hooks out again."""
        for handle in self._handles:
            handle.remove()

    @property
    def head_alone(self) -> bool:
        """Whether a draw costs an output embedding only: the backbone runs on the common rows."""
        alone = self._layout.blocks is not None and not self._layout.blocks
        return alone and bool(self._layout.outside) and self._may_fold()

    def _running(self) -> ForwardPass | None:
        state = sampling_state(self._owner)
        return None if state is None else state.running

    def _run(self, state: SamplingState, running: ForwardPass | None) -> None:
        # An assignment: torch.compile would break the graph at ``active``.
        context.states = {**context.states, self._owner: replace(state, running=running)}

    def _enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Call:
        """Repeat the batch S times, draw-major."""
        if getattr(module, "_is_replica", False):
            if is_sampled(self._owner):
                raise ValueError(
                    "sampling: nn.DataParallel runs its copies of the model in threads of their "
                    "own, which see no draws; call bayes.model itself, one process for each GPU"
                )
            restore(module)
        state = sampling_state(self._owner)
        # A pass under way that meets its entrance again was interrupted: a KeyboardInterrupt
        # passes by torch's hooks, so _leave never saw it.
        if state is None or (state.running is not None and state.running.entrance is not module):
            return None
        _check_call(state, kwargs)
        S, rows = len(state.draws), _batch_rows(args, kwargs)
        batch = rows // S if state.diverged else rows
        running = ForwardPass(S, batch, module, tree=state.tree)
        self._run(state, running)
        if state.tree or state.diverged:
            return None
        return _change_rows(running.repeat, args, kwargs)

    def _leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """End the pass where the batch was fanned out, also on an error."""
        state = sampling_state(self._owner)
        if state is None or state.running is None or state.running.entrance is not module:
            return None
        self._run(state, None)
        if state.reduce is not None and getattr(output, "logits", None) is not None:
            output.logits = state.reduce(output.logits)
        return output

    def _fold(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Call:
        """Give the backbone the common rows."""
        state = sampling_state(self._owner)
        if state is None or state.running is None or state.tree or state.diverged:
            return None
        running = state.running
        if running.draws == 1 or not self._may_fold():
            return None
        running.folding = running.folded = True
        return _change_rows(running.fold, args, kwargs)

    def _open_block(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Call:
        """Repeat the rows at the first noisy block, and what comes with them at every one."""
        running = self._running()
        if running is None or not running.folding:
            return None
        if running.folded:
            # The hidden state is used once; what the backbone hands to all blocks, many times.
            running.folded = False
            if args:
                args = (running.repeat(args[0]), *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": running.repeat(kwargs["hidden_states"])}
        return _change_rows(partial(running.repeat, keep=True), args, kwargs)

    def _unfold(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Repeat the rows that a backbone without noise leaves, except for a noisy head."""
        running = self._running()
        if running is None or not running.folded or self._layout.outside:
            return None
        running.folded = False
        if isinstance(output, tuple):
            return (running.repeat(output[0]), *output[1:])
        for name in ("last_hidden_state", "pooler_output"):
            if isinstance(getattr(output, name, None), Tensor):
                output[name] = running.repeat(output[name])
        return output

    def _share(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Call:
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

    def _unshare(self, module: nn.Module, args: Args, output: Any) -> None:
        running = self._running()
        if running is not None:
            running.sharing = False

    def _may_fold(self) -> bool:
        # With two active adapters a layer adds results of other rows, and with a disabled one it
        # does not fan out.
        names = self._layout.first or self._layout.outside
        if not names:
            return True
        layer: Any = self._base.get_submodule(names[0])
        return len(layer.active_adapters) == 1 and not layer.disable_adapters


def _check_call(state: SamplingState, kwargs: Kwargs) -> None:
    loops = state.loops
    if loops is not None and not torch.compiler.is_compiling() and loops_around() > loops:
        raise ValueError(
            f"sampling: a pipeline or Trainer called the model, and would take {len(state.draws)} "
            "draws of each row for rows of its own; give it a TfbModel (tfb.from_peft), which "
            "averages them"
        )
    if kwargs.get("past_key_values") is not None and not (state.tree or state.cached):
        raise NotImplementedError(
            "sampling with a KV cache: keys and values of one draw are invalid for another; "
            "pass whole sequences without past_key_values, or use bayes.generate"
        )
    if kwargs.get("adapter_names") is not None:
        raise NotImplementedError(
            "sampling with adapter_names (mixed batches): sample one adapter at a time"
        )


def _change_rows(change: Callable[[Any], Any], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    named = {k: v if k in SHARED_ARGUMENTS else change(v) for k, v in kwargs.items()}
    return tuple(change(a) for a in args), named


def _batch_rows(args: Args, kwargs: Mapping[str, Any]) -> int:
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args):
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(value.shape[0])
    raise ValueError("sampling: the model was called with neither input_ids nor inputs_embeds")
