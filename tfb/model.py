"""``BayesianModel``: a PEFT model whose adapter has a posterior, and its predictions.

How S draws pass through the model: :mod:`tfb.sampling.fan_out` (full), :mod:`tfb.sampling.tail` (tail sampling).
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfb.draws import Draws
from tfb.linear import MERGING, LowRankSampler
from tfb.posterior import LowRankPosterior
from tfb.predictive import Predictive
from tfb.sampling.adaptive import Adaptive, predict_adaptively
from tfb.sampling.choices import ChoiceTokens, check_inputs, run_choices
from tfb.sampling.fan_out import (
    FanOut,
    SamplingState,
    other_owner_of,
    reset_state,
    set_state,
)
from tfb.sampling.forward import hidden_norms, plan, run
from tfb.sampling.generate import Generation, run_generation
from tfb.sampling.inputs import Batch, align, evaluating
from tfb.sampling.memory import chunks
from tfb.sampling.overrides import LabelColumns, narrow_head, restore_head
from tfb.sampling.replay import make_replayable, restore_blocks
from tfb.sampling.tail import why_no_tail

MODES = ("full", "tail")


class BayesianModel:
    """A PEFT model whose adapter has a posterior. Made by :func:`tfb.bayesianize` / ``tfb.load``.

    Attributes:
        model: the PEFT model; outside ``sampling`` it behaves exactly as before.
        adapter: the adapter's name.
        posteriors: one :class:`LowRankPosterior` for each Bayesian module, by qualified name.
        sigma: the posterior's scale, None until ``fit_sigma`` or the caller sets it.
        seed: the default seed of draws.
        family: of the posteriors; see :mod:`tfb.adapters.families`.
        mode, tail: how draws reach the model ("full"; "tail" with k positions); set by the
            search that found sigma, kept in the artifact.
        length_normalization: how choices of several tokens are scored, "none" (sum of
            log-probabilities) or "tokens" (their mean), see :mod:`tfb.sampling.choices`; to be set before
            the search, kept in the artifact.
        label_tokens: by which tokens of a choice rows are scored, "all" or "last", see
            :mod:`tfb.data.encoding`; to be set before rows are encoded, kept in the artifact.
        labels: names of the classes (None: those of the base's configuration, if it has any), or
            choices of rows that bring none; kept in the artifact.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str,
        samplers: Mapping[str, LowRankSampler],
        *,
        task: str,
        seed: int = 0,
        family: str = "low_rank",
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.samplers = dict(samplers)
        self.task = task
        self.seed = seed
        self.family = family
        self.sigma: float | None = None
        self.mode = "full"
        self.tail: int | None = None
        self.length_normalization = "none"
        self.label_tokens = "all"
        self.labels: Sequence[str] | None = None
        self.source: Path | None = None  # the adapter's folder, copied untouched into artifacts
        self._devices: frozenset[torch.device] = frozenset()  # of the noisy layers
        inner: Any = model.get_base_model()  # type: ignore[operator]
        self.base = inner
        self._forward_names = frozenset(inspect.signature(inner.forward).parameters)
        self._fan_out = FanOut(self.owner, model, inner, list(samplers))
        narrow_head(inner, task)
        make_replayable(self.blocks_below, inner)

    @property
    def layer_scales(self) -> dict[str, float]:
        """Multipliers of sigma by module; all 1 unless :mod:`tfb.search.layer_scale` set them."""
        return {name: s.scale for name, s in self.samplers.items()}

    def set_layer_scales(self, scales: Mapping[str, float]) -> None:
        """Multiply sigma in each module; sigma should be searched again.

        Raises:
            ValueError: other modules than the model's, or a negative or non-finite number.
        """
        if set(scales) != set(self.samplers):
            raise ValueError("layer scales: need one for every Bayesian module, by its name")
        if bad := {n: m for n, m in scales.items() if not 0 <= m < math.inf}:
            raise ValueError(f"layer scales: expected finite numbers >= 0, got {bad}")
        for name, sampler in self.samplers.items():
            sampler.set_scale(scales[name])

    @property
    def merging(self) -> str:
        """Whether layers are multiplied by weights that draws are merged into: "auto" (where each
        draw has an input of its own and that costs less), "always" there, or "never".

        In half precision a merged weight is rounded once, as by PEFT's ``merge_adapter``.

        Raises:
            ValueError: when set to an unknown value, or to "always" with layers that have no weight
                to merge into (quantized ones).
        """
        return next(iter(self.samplers.values())).merging

    @merging.setter
    def merging(self, value: str) -> None:
        from tfb.adapters.bridge import without_weights

        if value not in MERGING:
            raise ValueError(f"merging={value!r}: expected one of {', '.join(MERGING)}")
        self.check_attached()
        if value == "always" and (names := without_weights(self)):
            raise ValueError(
                "merging='always': no draw can be merged into layers that are quantized, hooked or "
                f"no plain nn.Linear: {', '.join(names[:8])}; use merging='auto', which adds there"
            )
        for sampler in self.samplers.values():
            sampler.merging = value

    # --- sampling -------------------------------------------------------------------------------

    @property
    def owner(self) -> int:
        """The key of this model's sampling state."""
        return id(self)

    @property
    def posteriors(self) -> dict[str, LowRankPosterior]:
        return {name: s.posterior for name, s in self.samplers.items()}

    @property
    def blocks_below(self) -> list[nn.Module]:
        """The blocks below the first noisy module, where passes can be folded."""
        return self._fan_out.below

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model's activations."""
        return next(p.dtype for p in self.base.parameters() if p.is_floating_point())

    @contextlib.contextmanager
    def sampling(self, draws: Draws) -> Iterator[BayesianModel]:
        """Within this context ``bayes.model(**batch)`` runs all draws: outputs are [S * B, ...].

        Raises:
            ValueError: the adapter is not the active one, is disabled, merged, rescaled or gone:
                the draws would have no or another effect; or another adapter of the same model is
                being sampled.
        """
        self.check_sampling()
        with self.sampling_as(SamplingState(self.base, draws)):
            yield self

    @contextlib.contextmanager
    def sampling_as(self, state: SamplingState) -> Iterator[None]:
        """``sampling`` with everything that a state can say; for the passes of this package, which
        call ``check_sampling`` once for all of them."""
        for device in self._devices:
            state.draws.tensors(device)  # or a compiled graph would take them for constants
        token = set_state(self.owner, state)
        try:
            yield
        finally:
            reset_state(token)

    def check_sampling(self) -> None:
        """Refuse a model of which draws cannot be sampled now (see ``sampling``); have factors on
        every layer's device, where compiled graphs read them."""
        active = getattr(self.model, "active_adapters", [self.adapter])
        active = active() if callable(active) else active
        if self.adapter not in active:
            raise ValueError(
                f"adapter {self.adapter!r} is not active (active: {', '.join(active)}); call "
                f"bayes.model.set_adapter({self.adapter!r}) first"
            )
        own, devices = self.dtype, set()
        for name, layer in self.check_attached().items():
            if layer.disable_adapters:
                raise ValueError("the adapter is disabled (disable_adapter): nothing to sample")
            now, sampled = layer.scaling[self.adapter], self.samplers[name].posterior.scaling
            if now != sampled:
                raise ValueError(
                    f"{name}: LoRA's scaling is {now:g}, and {sampled:g} in the posterior; set "
                    "it back (rescale_adapter_scale), or call remove() and bayesianize again"
                )
            weight = layer.lora_A[self.adapter].weight
            for dtype in {own, weight.dtype}:  # PEFT may cast inputs to the adapter's
                self.samplers[name].factors(weight.device, dtype)
            devices.add(weight.device)
        self._devices = frozenset(devices)
        if other_owner_of(self.base, self.owner):
            raise ValueError(
                "another adapter of this model is being sampled; leave its sampling() first"
            )

    def check_attached(self) -> dict[str, Any]:
        """The noisy layers by name, which carry this posterior now, unmerged.

        Raises:
            ValueError: one is not.
        """
        found = {}
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
            found[name] = layer
        return found

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

    def distinct_draws(self, n: int | Draws, *, kept: bool = False) -> Draws:
        """``draws(n)``; where sigma is 0 the one that all would equal, unless all are ``kept``."""
        draws = self.draws(n)
        equal = self.sigma == 0.0 and not isinstance(n, Draws)
        return Draws.mean() if equal and not kept else draws

    @torch.no_grad()
    def logits(
        self,
        batch: Batch,
        draws: Draws,
        label_ids: Tensor | None = None,
        *,
        mode: str | None = None,
        tail: int | None = None,
        draws_per_pass: int | None = None,
    ) -> Tensor:
        """Logits [S, B, K] of the scored position, model in eval mode for the call; for choices of
        several tokens their summed log-probabilities.

        Args:
            batch: a tokenizer's tensors: input_ids [B, T], attention_mask [B, T] and what else
                the model takes. Either padding side.
            draws: S draws.
            label_ids: for language models, the vocabulary ids to keep: [K], or [B, K] for choices
                that differ by row; only these rows of the output embedding are then computed.
                [B, K, L] for choices of up to L tokens, -1 after the end of shorter ones (causal
                LMs): see :mod:`tfb.sampling.choices`. None keeps all.
            mode, tail: see :meth:`predict`.
            draws_per_pass: most draws in one forward pass; None: see :func:`tfb.sampling.memory.chunks`.

        Raises:
            ValueError: see :func:`tfb.sampling.inputs.align` and :meth:`predict`; label_ids of the wrong
                shape or outside the vocabulary; two equal choices of a row, or a choice without
                tokens.
        """
        mode, tail = self._mode(mode, tail)
        self.check_sampling()
        inputs, rows = self.inputs(batch, mode)
        if self.task == "SEQ_CLS" and label_ids is not None:
            raise ValueError("label_ids: only language models have a vocabulary to select from")
        labels = choices = None
        label_ids = None if label_ids is None else torch.as_tensor(label_ids)  # a list will do
        if label_ids is not None and label_ids.dim() == 3:
            check_inputs(inputs, self.task)
            choices = ChoiceTokens.of(self.base, label_ids, rows, self.length_normalization)
        elif label_ids is not None:
            labels = LabelColumns.of(self.base, label_ids, rows)
        T = inputs["input_ids"].shape[1]
        head_alone = self._fan_out.head_alone
        if tail is not None and (tail >= T or head_alone):
            tail = None  # full mode gives the same: all tokens are tail, or the noise is above
        state = SamplingState(self.base, draws, columns=None if labels is None else labels.columns)
        # Draws of the head alone share the rest of a pass: parts of them would run it again.
        each = 1 if head_alone and self.last_logits else tail
        with evaluating(self.model):
            if choices is not None and draws_per_pass is None:
                draws_per_pass = choices.draws_that_fit(self.base, len(draws), T, each)
            parts = chunks(self.base, draws, inputs["input_ids"], each, draws_per_pass)
            planned = plan(self, inputs, state, tail)
            if choices is not None:
                found = list(run_choices(self, inputs, planned, parts, choices))
            else:
                found = [
                    logits if labels is None else labels.select(logits)
                    for logits in run(self, inputs, planned, parts)
                ]
        return found[0] if len(found) == 1 else torch.cat(found)

    @property
    def last_logits(self) -> dict[str, int]:
        """What tells a causal LM that only the last position is scored."""
        known = self.task == "CAUSAL_LM" and "logits_to_keep" in self._forward_names
        return {"logits_to_keep": 1} if known else {}

    def tree_pass(self, draws: int, batch: int) -> contextlib.AbstractContextManager[None]:
        """See :meth:`tfb.sampling.fan_out.FanOut.tree_pass`."""
        return self._fan_out.tree_pass(draws, batch)

    @contextlib.contextmanager
    def mean_pass(self, draws: Draws, batch: int) -> Iterator[None]:
        """A pass of the mean adapter that enters below the model's entrance: one draw at sigma = 0,
        so that layers can be merged. Its stream is one of ``draws``, whose noise is kept anyway."""
        mean = Draws((0.0,), draws.streams[:1], draws.seed)
        state = SamplingState(self.base, mean, tree=True, mean=True)
        with self.sampling_as(state), self.tree_pass(1, batch):
            yield

    @torch.no_grad()
    def hidden_norms(self, batch: Batch, draws: Draws) -> Tensor:
        """[S, B] Euclidean norm of the last hidden state: at the scored position of a causal LM,
        of the mean over tokens otherwise. The quantity behind ``metric="embedding_norm"``.

        Raises:
            ValueError: ``bayes.mode`` is not "full".
        """
        return hidden_norms(self, batch, draws)

    def set_mode(self, mode: str, tail: int | None = None) -> None:
        """How draws reach the model from now on; sigma should have been searched the same way.

        Raises:
            ValueError: an unknown mode, or one that the model cannot take.
        """
        self.mode, self.tail = self._mode(mode, tail)

    def _mode(self, mode: str | None, tail: int | None) -> tuple[str, int | None]:
        """The mode and its k, the model's own where not given, checked."""
        if mode is None:
            mode, tail = self.mode, self.tail if tail is None else tail
        check_mode(mode, tail)
        if mode == "tail" and (reason := why_no_tail(self.base, self.task)):
            raise ValueError(f"mode='tail' is not possible: {reason}")
        return mode, tail

    def inputs(self, batch: Batch, mode: str) -> tuple[dict[str, Any], int]:
        """The aligned batch with what a scoring pass adds, and its number of rows."""
        # A sequence of a decoder ends where it is scored: on the left is the padding.
        causal = self.task == "CAUSAL_LM" or mode == "tail"
        inputs = align(batch, "left" if causal else "right", self.device)
        pad = getattr(self.base.config, "pad_token_id", None)
        if self.task == "SEQ_CLS" and isinstance(pad, int):
            # Decoders find a row's last token by the padding's id, not by the mask.
            real = inputs["attention_mask"].bool()
            inputs["input_ids"] = inputs["input_ids"].masked_fill(~real, pad)
        if self.task == "SEQ_2_SEQ_LM" and inputs.get("decoder_input_ids") is None:
            # Scored: the first token of the answer.
            rows, start = inputs["input_ids"].shape[0], self.base.config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.full((rows, 1), start, device=self.device)
        if causal and ("position_ids" in self._forward_names or mode == "tail"):
            position = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
            inputs.setdefault("position_ids", position)
        if self.task != "SEQ_CLS" and "use_cache" in self._forward_names:
            inputs["use_cache"] = False
        return inputs, inputs["input_ids"].shape[0]

    def predict(
        self,
        batch: Batch,
        draws: int | Draws | Adaptive | str = 10,
        mode: str | None = None,
        label_ids: Tensor | None = None,
        *,
        tail: int | None = None,
        keep_draws: bool = False,
        draws_per_pass: int | None = None,
    ) -> Predictive:
        """Posterior predictive of a batch.

        Args:
            batch: a tokenizer's output (tensors [B, T]). An encoder-decoder's may bring
                decoder_input_ids [B, T'] without padding; left out, the first token of the answer
                is scored.
            draws: a number of antithetic draws at ``bayes.sigma``; :class:`Draws`; or "auto"
                (an :class:`Adaptive` with other settings): every row gets as many as its own
                Monte-Carlo error asks for, ``Predictive.draw_counts`` says how many.
            mode: "full": every draw passes through the whole model. "tail": noise at the last
                ``tail`` positions only, about 1 + S tail / T passes, decoders only; a different
                predictive, see :mod:`tfb.sampling.tail`. None: ``bayes.mode`` and ``bayes.tail``.
            label_ids: for language models the vocabulary ids of the classes, [K] or [B, K];
                [B, K, L] for choices of several tokens; None: the whole vocabulary. See
                :meth:`logits`.
            tail: positions with noise in tail mode.
            keep_draws: keep every draw's probabilities [S, B, K].
            draws_per_pass: most draws in one forward pass; None: as many as fit into memory.

        Raises:
            ValueError: sigma not set, odd draws, an unknown mode or one that the model cannot
                take, inputs that do not fit.
        """
        if isinstance(draws, str):
            if draws != "auto":
                raise ValueError(f"draws={draws!r}: expected a number, tfb.Draws or 'auto'")
            draws = Adaptive()
        if isinstance(draws, Adaptive):
            if keep_draws:
                raise ValueError("keep_draws: rows have different numbers of draws under 'auto'")
            return predict_adaptively(
                self, batch, draws, label_ids=label_ids, mode=mode, tail=tail,
                draws_per_pass=draws_per_pass,
            )  # fmt: skip
        chosen = self.draws(draws)
        logits = self.logits(
            batch, chosen, label_ids, mode=mode, tail=tail, draws_per_pass=draws_per_pass
        )
        return Predictive.from_logits(logits, chosen, keep_draws=keep_draws)

    # --- generation -----------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        draws: int | Draws = 10,
        *,
        per_draw: bool = False,
        **options: Any,
    ) -> Generation:
        """Continue prompts with the posterior predictive; see :mod:`tfb.sampling.generate`.

        Args:
            batch: a tokenizer's output; either padding side (moved to the left).
            draws: S coherent weight samples that decode side by side.
            per_draw: every draw writes its own continuation instead, [S, B, ...].
            options: those of transformers' ``generate`` (max_new_tokens, do_sample, temperature,
                stopping criteria, streamer, ...).

        Raises:
            ValueError: not a causal LM, sigma not set or searched for tails, token noise, or an
                option that cannot work with several draws (named).
        """
        if self.mode == "tail" and not isinstance(draws, Draws):
            raise ValueError(
                f"generate: sigma was searched with mode='tail' (tail={self.tail}), and generation "
                "has its noise at every token; fit with mode 'full', or accept this sigma there: "
                "bayes.set_mode('full')"
            )
        return run_generation(self, batch, self.draws(draws), per_draw, options)

    # --- life -----------------------------------------------------------------------------------

    def remove(self) -> nn.Module:
        """Undo ``bayesianize``: the PEFT model, with none of our hooks."""
        from tfb.adapters.bridge import detach

        self._fan_out.remove()
        restore_head(self.base)
        restore_blocks(self.blocks_below)
        detach(self)
        for sampler in self.samplers.values():
            sampler.release()
        return self.model

    def save(self, folder: str | Path, **details: Any) -> Path:
        """Write the artifact: see :func:`tfb.adapters.artifact.save`."""
        from tfb.adapters.artifact import save

        return save(self, folder, **details)

    def export(self, folder: str | Path, draws: int | Draws = 10, **details: Any) -> Path:
        """Write sampled adapters for other engines: see :func:`tfb.adapters.export.export`."""
        from tfb.adapters.export import export

        return export(self, folder, draws, **details)


def check_mode(mode: str, tail: int | None = None) -> None:
    """Raise ValueError for an unknown mode, or a ``tail`` that does not belong to it."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if mode == "tail" and (tail is None or tail < 1):
        raise ValueError(
            f"mode='tail' needs tail=k (--tail k), k >= 1 positions with noise, got {tail}"
        )
    if mode != "tail" and tail is not None:
        raise ValueError(f"tail={tail} belongs to mode='tail', not to mode={mode!r}")
