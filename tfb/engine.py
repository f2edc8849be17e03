"""Whole-model sampling: one call of the model gives the outputs of S posterior draws.

Inside ``bayes.sampling(draws)`` every input row is repeated S times at the model's entrance, draw
by draw, and each Bayesian layer treats the S parts as its draws: rows come out draw-major,
[S * B, ...]. Which draws are active is a context variable keyed by the model, so contexts nest,
threads do not see each other, and two models never share a state. A thread started inside a
context begins without one (Python's rule for context variables).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfb.draws import Draws
from tfb.linear import LowRankSampler
from tfb.posterior import LowRankPosterior
from tfb.predictive import Predictive
from tfb_kernels.ops import select_columns

MODES = ("full",)
# Arguments of a forward pass that run over positions, not rows; never repeated for the draws.
SHARED_ARGUMENTS = frozenset({"cache_position", "logits_to_keep"})
Batch = Mapping[str, Any]

_STATES: ContextVar[Mapping[int, SamplingState]] = ContextVar("tfb_sampling")


@dataclass(frozen=True)
class SamplingState:
    """The active draws of one model, and the forward pass under way if there is one.

    Attributes:
        base: the base model that is sampled.
        draws: S draws.
        rows: S * B while a pass runs, else 0.
        entrance: the module whose call fanned the batch out.
    """

    base: nn.Module
    draws: Draws
    rows: int = 0
    entrance: nn.Module | None = None


def sampling_state(owner: int) -> SamplingState | None:
    """The innermost active state of the model identified by ``owner``, if there is one."""
    return _STATES.get({}).get(owner)


class BayesianModel:
    """A PEFT model whose adapter has a posterior. Made by :func:`tfb.bayesianize` / ``tfb.load``.

    Attributes:
        model: the PEFT model; outside ``sampling`` it behaves exactly as before.
        adapter: the adapter's name.
        posteriors: one :class:`LowRankPosterior` for each Bayesian module, by qualified name.
        sigma: the posterior's scale, None until ``fit_sigma`` or the caller sets it.
        seed: the default seed of draws.
        mode: how draws reach the model; kept in the artifact.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str,
        samplers: Mapping[str, LowRankSampler],
        *,
        task: str,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.samplers = dict(samplers)
        self.task = task
        self.seed = seed
        self.sigma: float | None = None
        self.mode = "full"
        self.source: Path | None = None  # the adapter's folder, copied untouched into artifacts
        self._handles: list[Any] = []
        inner: Any = model.get_base_model()  # type: ignore[operator]
        self.base = inner
        self._forward_names = frozenset(inspect.signature(inner.forward).parameters)
        # PEFT versions differ in whether they call the inner model or its forward; whichever of
        # the two modules is entered first fans the batch out, and the other sees rows > 0.
        for module in dict.fromkeys((model, inner)):
            self._handles.append(
                module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
            )
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    # --- sampling -------------------------------------------------------------------------------

    @property
    def owner(self) -> int:
        """The key of this model's sampling state."""
        return id(self)

    @property
    def posteriors(self) -> dict[str, LowRankPosterior]:
        return {name: s.posterior for name, s in self.samplers.items()}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextlib.contextmanager
    def sampling(self, draws: Draws) -> Iterator[BayesianModel]:
        """Within this context ``bayes.model(**batch)`` runs all draws: outputs are [S * B, ...].

        Raises:
            ValueError: the adapter is not the active one, is disabled, merged or gone: the draws
                would have no effect; or another adapter of the same model is being sampled.
        """
        self._check_active()
        for owner, state in _STATES.get({}).items():
            if owner != self.owner and state.base is self.base:
                raise ValueError(
                    "another adapter of this model is being sampled; leave its sampling() first"
                )
        token = self._set(SamplingState(self.base, draws))
        try:
            yield self
        finally:
            _STATES.reset(token)

    def _check_active(self) -> None:
        active = getattr(self.model, "active_adapters", [self.adapter])
        active = active() if callable(active) else active
        if self.adapter not in active:
            raise ValueError(
                f"adapter {self.adapter!r} is not active (active: {', '.join(active)}); call "
                f"bayes.model.set_adapter({self.adapter!r}) first"
            )
        self.check_attached()
        for name in self.samplers:
            if getattr(self.base.get_submodule(name), "disable_adapters", False):
                raise ValueError("the adapter is disabled (disable_adapter): nothing to sample")

    def check_attached(self) -> None:
        """The base model still carries this posterior, unmerged.

        Raises:
            ValueError: it does not.
        """
        for name in self.samplers:
            layer: Any = self.base.get_submodule(name)
            variant = getattr(layer, "lora_variant", {}).get(self.adapter)
            if getattr(variant, "owner", None) != self.owner:
                raise ValueError(
                    f"{name}: does not carry this posterior any more (remove(), "
                    "merge_and_unload(), delete_adapter(), or a copy of the model): bayesianize "
                    "the model that is to be sampled"
                )
            if getattr(layer, "merged", False):
                raise ValueError(
                    f"{name}: the adapter is merged into the base weight; call "
                    "bayes.model.unmerge_adapter() first"
                )

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: repeat the batch S times, draw-major."""
        state = sampling_state(self.owner)
        # A pass under way that meets its entrance again was interrupted: a KeyboardInterrupt
        # passes by torch's hooks, so _leave never saw it.
        if state is None or (state.rows and state.entrance is not module):
            return None
        if kwargs.get("past_key_values") is not None:
            raise NotImplementedError(
                "sampling with a KV cache: keys and values of one draw are invalid for another; "
                "pass whole sequences without past_key_values, or generate outside sampling()"
            )
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "sampling with adapter_names (mixed batches): sample one adapter at a time"
            )
        S = len(state.draws)
        rows = _batch_rows(args, kwargs)
        self._set(replace(state, rows=S * rows, entrance=module))

        def fan_out(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows:
                return value.repeat(S, *([1] * (value.dim() - 1)))
            return value

        kwargs = {k: v if k in SHARED_ARGUMENTS else fan_out(v) for k, v in kwargs.items()}
        return tuple(fan_out(a) for a in args), kwargs

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: the module that fanned the batch out ends the pass, also on an error."""
        state = sampling_state(self.owner)
        if state is not None and state.entrance is module:
            self._set(replace(state, rows=0, entrance=None))

    def _set(self, state: SamplingState) -> Token[Mapping[int, SamplingState]]:
        return _STATES.set({**_STATES.get({}), self.owner: state})

    # --- prediction -----------------------------------------------------------------------------

    def draws(self, n: int | Draws) -> Draws:
        """``n`` antithetic draws at ``self.sigma``, or the given draws unchanged.

        Raises:
            ValueError: sigma not set yet, n odd or < 1.
        """
        if isinstance(n, Draws):
            return n
        if self.sigma is None:
            raise ValueError(
                "sigma is not set: run tfb.fit_sigma(bayes, anchors), assign bayes.sigma, or pass "
                "tfb.Draws"
            )
        return Draws.antithetic(n, self.sigma, seed=self.seed)

    @torch.no_grad()
    def logits(self, batch: Batch, draws: Draws, label_ids: Tensor | None = None) -> Tensor:
        """Logits [S, B, K] of the scored position, model in eval mode for the call.

        Args:
            batch: a tokenizer's tensors: input_ids [B, T], attention_mask [B, T] and what else
                the model takes. Either padding side.
            draws: S draws.
            label_ids: for causal LMs, the vocabulary ids to keep: [K], or [B, K] for choices that
                differ by row. None keeps all.

        Raises:
            ValueError: see :func:`align`; label_ids of the wrong shape or outside the vocabulary.
        """
        inputs, rows = self._inputs(batch)
        causal = self.task == "CAUSAL_LM"
        if causal and "logits_to_keep" in self._forward_names:
            inputs["logits_to_keep"] = 1
        elif not causal and label_ids is not None:
            raise ValueError("label_ids: only causal language models have a vocabulary to select")
        with _evaluating(self.model), self.sampling(draws):
            logits: Tensor = self.model(**inputs).logits
        if causal:
            logits = logits[:, -1]
        logits = logits.unflatten(0, (len(draws), rows))
        return logits if label_ids is None else _select_labels(logits, label_ids)

    @torch.no_grad()
    def hidden_norms(self, batch: Batch, draws: Draws) -> Tensor:
        """[S, B] Euclidean norm of the last hidden state: at the scored position of a causal LM,
        of the mean over tokens otherwise. The quantity behind ``metric="embedding_norm"``."""
        inputs, rows = self._inputs(batch)
        mask = inputs["attention_mask"]
        with _evaluating(self.model), self.sampling(draws):
            hidden = self.model(**inputs, output_hidden_states=True).hidden_states[-1]
        if self.task == "CAUSAL_LM":
            pooled = hidden[:, -1]
        else:
            weight = mask.repeat(len(draws), 1)[..., None].to(hidden.dtype)
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        return torch.linalg.vector_norm(pooled, dim=-1).unflatten(0, (len(draws), rows))

    def _inputs(self, batch: Batch) -> tuple[dict[str, Any], int]:
        """The aligned batch with what a scoring pass adds, and its number of rows."""
        causal = self.task == "CAUSAL_LM"
        inputs = align(batch, "left" if causal else "right", self.device)
        if causal:
            if "position_ids" in self._forward_names:
                position = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
                inputs.setdefault("position_ids", position)
            if "use_cache" in self._forward_names:
                inputs["use_cache"] = False
        return inputs, inputs["input_ids"].shape[0]

    def predict(
        self,
        batch: Batch,
        draws: int | Draws = 10,
        mode: str | None = None,
        label_ids: Tensor | None = None,
        *,
        keep_draws: bool = False,
    ) -> Predictive:
        """Posterior predictive of a batch.

        Args:
            batch: a tokenizer's output (tensors [B, T]).
            draws: a number of antithetic draws at ``bayes.sigma``, or :class:`Draws`.
            mode: "full": every draw passes through the whole model. None: ``bayes.mode``.
            label_ids: for causal LMs the vocabulary ids of the classes, [K] or [B, K]; None: the
                whole vocabulary.
            keep_draws: keep every draw's probabilities [S, B, K].

        Raises:
            ValueError: sigma not set, odd draws, an unknown mode, inputs that do not fit.
        """
        check_mode(mode or self.mode)
        chosen = self.draws(draws)
        return Predictive.from_logits(
            self.logits(batch, chosen, label_ids), chosen, keep_draws=keep_draws
        )

    # --- life -----------------------------------------------------------------------------------

    def remove(self) -> nn.Module:
        """Undo ``bayesianize``: the PEFT model, with none of our hooks."""
        from tfb.convert import detach

        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        detach(self)
        return self.model

    def save(self, folder: str | Path, **details: Any) -> Path:
        """Write the artifact: see :func:`tfb.artifact.save`."""
        from tfb.artifact import save

        return save(self, folder, **details)


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")


def _batch_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(kwargs.get(name), Tensor):
            return int(kwargs[name].shape[0])
    for value in args:
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(value.shape[0])
    raise ValueError("sampling: the model was called with neither input_ids nor inputs_embeds")


def align(batch: Batch, side: str, device: torch.device) -> dict[str, Any]:
    """The batch on ``device`` with its padding on ``side`` ("left" or "right").

    A model then sees the same rows whatever side the tokenizer padded on, so results do not
    depend on it. position_ids are moved along with the tokens.

    Raises:
        ValueError: no input_ids [B, T], no rows, a mask of another shape, holes inside a row's
            mask, an empty row.
    """
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


def _select_labels(logits: Tensor, label_ids: Tensor) -> Tensor:
    """Columns [K] or [B, K] of logits [S, B, V]."""
    V = logits.shape[-1]
    if bool(((label_ids < 0) | (label_ids >= V)).any()):
        raise ValueError(f"label_ids: outside the vocabulary of {V}")
    return select_columns(logits, label_ids)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
