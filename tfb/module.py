"""``BayesianModule``: a module of one's own, whose ``BayesLoRALinear`` layers are sampled.

Needs neither PEFT nor transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tfb.draws import Draws, stable_layer_id
from tfb.linear import BayesLoRALinear
from tfb.posterior import AdapterError, LowRankPosterior
from tfb.predictive import Predictive
from tfb.sampling.config import Configured, SamplingConfig
from tfb.sampling.state import (
    ForwardPass,
    SamplingState,
    active,
    context,
    evaluating,
    sampling_state,
)

Rows = Mapping[str, Any] | Sequence[Any] | Tensor  # arguments of the module, or its only one


def bayesian_layers(module: nn.Module) -> dict[str, BayesLoRALinear]:
    """Return the :class:`BayesLoRALinear` layers of a module, by qualified name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, BayesLoRALinear)}


class BayesianModule(Configured):
    """A module that holds :class:`BayesLoRALinear` layers, and its predictions.

    Made by :func:`tfb.bayesianize`. Each layer's noise is named by the layer's qualified name:
    results depend neither on the order in which layers were made nor on what they are copies of.

    Attributes:
        model: the module. Outside ``sampling`` it computes what it did before.
        layers: those with noise, by qualified name.
        pad_token_id: what fills padding where rows are encoded; 0.
    """

    pad_token_id = 0

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        config: SamplingConfig | None = None,
    ) -> None:
        """Take the layers over.

        Args:
            model: the module. Its tensor arguments and its layers' inputs have rows in dim 0.
            layers: names of the layers that get noise. None: all.
            config: how the module samples.

        Raises:
            AdapterError: no BayesLoRALinear at all, one of another BayesianModule, or two names
                with the same noise identity.
            KeyError: ``layers`` names none.
            ValueError: tail mode.
        """
        found = bayesian_layers(model)
        if not found:
            raise AdapterError(
                f"{type(model).__name__} holds no tfb.BayesLoRALinear; put one in the place of "
                "each adapted layer: tfb.BayesLoRALinear.from_weights(layer, A, B, scaling)"
            )
        super().__init__(SamplingConfig() if config is None else config)
        self.model = model
        self.layers = {name: found[name] for name in (found if layers is None else layers)}
        self.check_config(self.config)
        ids = {stable_layer_id(name): name for name in self.layers}
        for name, layer in self.layers.items():
            if layer.active_draws is not None:
                raise AdapterError(
                    f"{name}: already Bayesianized; call remove() on the first BayesianModule"
                )
            if (other := ids[stable_layer_id(name)]) != name:
                raise AdapterError(
                    f"{name!r} and {other!r} have the same 32-bit noise identity; rename one, or "
                    "exclude it with layers="
                )
        self._found = {name: layer.posterior for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            layer.posterior = replace(layer.posterior, name=name, layer_id=stable_layer_id(name))
            layer.active_draws = self._active_draws
        self._handles = (
            model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._leave, always_call=True),
        )

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        return f"BayesianModule({kind}, {len(self.layers)} layers, {self.config})"

    def check_config(self, config: SamplingConfig) -> None:
        """Refuse tail mode."""
        if config.mode != "full":
            raise ValueError(
                f"mode={config.mode!r} is not possible: a BayesianModule knows nothing of tokens; "
                "use mode='full'"
            )

    @property
    def posteriors(self) -> dict[str, LowRankPosterior]:
        """The posterior of each noisy layer, by qualified name."""
        return {name: layer.posterior for name, layer in self.layers.items()}

    @property
    def device(self) -> torch.device:
        """The device of the module's first parameter."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @contextlib.contextmanager
    def sampling(self, draws: int | Draws) -> Iterator[BayesianModule]:
        """Run all draws in every ``bayes.model(...)`` of this context: [S * B, ...] come out.

        Every tensor argument has B rows in dim 0; tensors without dimensions pass as they are. The
        rows are repeated S times, draw-major, and every noisy layer finds them in dim 0 of its
        input.

        Raises:
            ValueError: a layer is not this object's any more (``remove``, another module in its
                place, or a copy); in the context, arguments or outputs that are not of these rows.
            RuntimeError: in the context, a layer whose input is not of these rows.
        """
        now = bayesian_layers(self.model)
        for name, layer in self.layers.items():
            if now.get(name) is not layer or layer.active_draws != self._active_draws:
                raise ValueError(
                    f"{name}: not sampled by this BayesianModule any more (remove(), another "
                    "module in its place, or a copy); bayesianize the module that is to be sampled"
                )
        with active(id(self), SamplingState(self.model, self.draws(draws))):
            yield self

    @torch.no_grad()
    def outputs(self, batch: Rows, draws: int | Draws) -> Tensor:
        """Compute the module's outputs [S, B, ...] in eval mode.

        Args:
            batch: B rows. A mapping of the module's arguments by name, of which "labels" is left
                out; a tuple or list of its arguments; or its only argument.
            draws: S draws.

        Raises:
            TypeError: the module returns something else than one tensor.
            ValueError: what :meth:`sampling` refuses.
        """
        draws = self.draws(draws)
        args, kwargs = _arguments(batch, self.device)
        with evaluating(self.model), self.sampling(draws):
            found = self.model(*args, **kwargs)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"{type(self.model).__name__} returns {type(found).__name__}; expected one tensor "
                "[B, ...]: bayesianize a module around it that picks one"
            )
        return found.unflatten(0, (len(draws), -1))

    def predict(self, batch: Rows, draws: int | Draws = 10) -> Predictive:
        """Compute the posterior predictive of outputs [S, B, K] that are logits.

        Args:
            batch: see :meth:`outputs`.
            draws: a number of antithetic draws at ``bayes.sigma``, or :class:`Draws`.

        Raises:
            ValueError: sigma not set, odd draws, outputs that are not [S, B, K].
        """
        frozen = self.frozen()
        draws = frozen.draws(draws)
        logits = self.outputs(batch, draws)
        return Predictive.from_logits(logits, draws, temperature=frozen.config.temperature)

    def remove(self) -> nn.Module:
        """Undo ``bayesianize``; return the module, its layers with the noise that they had."""
        for handle in self._handles:
            handle.remove()
        for name, layer in self.layers.items():
            if layer.active_draws == self._active_draws:
                was = self._found[name]
                layer.active_draws = None
                layer.posterior = replace(layer.posterior, name=was.name, layer_id=was.layer_id)
        return self.model

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Repeat the rows S times, draw-major."""
        state = sampling_state(id(self))
        if state is None:
            return None
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
        rows = {len(t) for t in given}
        if len(rows) != 1 or 0 in rows:
            raise ValueError(
                f"sampling: expected tensor arguments of {type(module).__name__} with as many rows "
                f"in dim 0 each, got shapes {[list(t.shape) for t in given]}"
            )
        running = ForwardPass(len(state.draws), rows.pop(), module)
        self._run(state, running)
        changed: tuple[Any, Any] = tree_map(running.repeat, (args, kwargs))
        return changed

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """End the pass, also on an error."""
        state = sampling_state(id(self))
        if state is None or state.running is None:
            return
        running = state.running
        self._run(state, None)
        if isinstance(output, Tensor) and (output.dim() == 0 or len(output) != running.rows):
            raise ValueError(
                f"sampling: {type(module).__name__} returned {list(output.shape)} for "
                f"{running.draws} draws of {running.batch} rows; expected rows in dim 0, "
                f"[{running.rows}, ...]"
            )

    def _run(self, state: SamplingState, running: ForwardPass | None) -> None:
        context.states = {**context.states, id(self): replace(state, running=running)}

    def _active_draws(self, name: str, x: Tensor) -> Draws | None:
        """Return what a noisy layer is to draw for its input x; None outside ``sampling``."""
        state = sampling_state(id(self))
        if state is None:
            return None
        running = state.running
        if running is None:
            raise RuntimeError(
                f"{name}: called outside the module's forward pass while sampling "
                f"{len(state.draws)} draws; call bayes.model, or leave sampling()"
            )
        if x.dim() < 2 or len(x) != running.rows:
            raise RuntimeError(
                f"{name}: got an input of shape {list(x.shape)} while sampling {running.draws} "
                f"draws of {running.batch} rows; a noisy layer needs all {running.rows} in dim 0, "
                "[B, T, n] rather than [B * T, n] or [T, B, n]. Change that, or exclude the layer "
                "with layers="
            )
        return state.draws


def _arguments(batch: Rows, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as arguments on the module's device."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = {k: v for k, v in batch.items() if k != "labels"}
    elif isinstance(batch, Tensor | list | tuple):
        args = (batch,) if isinstance(batch, Tensor) else tuple(batch)
    else:
        raise TypeError(
            "batch: expected a mapping of tensors, a tuple of tensors or one tensor, got "
            f"{type(batch).__name__}"
        )
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, (args, kwargs))
