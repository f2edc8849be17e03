"""``BayesianModel``: a PEFT model whose adapter has a posterior, and its predictions."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from tfb.draws import Draws
from tfb.evaluation.decisions import Decisions
from tfb.linear import MERGING, LowRankSampler
from tfb.posterior import LowRankPosterior
from tfb.predictive import Predictive, log_mean_probs
from tfb.sampling.adaptive import Adaptive, predict_adaptively
from tfb.sampling.config import Configured, SamplingConfig
from tfb.sampling.fan_out import FanOut
from tfb.sampling.forward import (
    align,
    draws_that_fit,
    hidden_norms,
    scored_logits,
    split,
)
from tfb.sampling.generate import Generation, run_generation
from tfb.sampling.kv_cache import why_no_tail
from tfb.sampling.overrides import install, uninstall
from tfb.sampling.state import (
    Batch,
    SamplingState,
    active,
    evaluating,
    loops_around,
    other_owner_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Attachment(Protocol):
    """What the model asks of the adapter's layers (:class:`tfb.adapters.layers.PeftAttachment`)."""

    @property
    def owner(self) -> int:
        """The key of the model's sampling state."""

    def check(self) -> Mapping[str, nn.Module]:
        """Refuse layers that do not carry the posterior now, unmerged."""

    def check_sampling(self) -> Mapping[str, Tensor]:
        """Refuse layers that cannot be sampled now; return their weights by name."""

    def check_saving(self, *, exact: bool) -> None:
        """Refuse what an adapter's files and the factors do not tell whole."""

    def unmergeable(self) -> list[str]:
        """Return the layers that no draw can be merged into."""

    def detach(self) -> None:
        """Take the posterior out of the layers again."""


class BayesianModel(Configured):
    """A PEFT model whose adapter has a posterior. Made by :func:`tfb.bayesianize` or ``tfb.load``.

    Attributes:
        model: the PEFT model. Outside ``sampling`` it behaves exactly as before.
        base: the model inside.
        adapter: the adapter's name.
        task: "CAUSAL_LM", "SEQ_2_SEQ_LM" or "SEQ_CLS".
        samplers: what applies the draws of each Bayesian module, by qualified name.
        labels: names of the classes, or choices of rows that bring none; or None.
        label_tokens: the tokens of a choice that are scored, "all" or "last".
        source: the adapter's folder, or None.
        last_logits: what tells a causal LM that only the last position is scored.
        decisions: when to abstain, and prediction sets, if they were calibrated.
        blocks_below: the blocks below the first noisy module, where passes can be folded.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str,
        attachment: Attachment,
        samplers: Mapping[str, LowRankSampler],
        *,
        task: str,
        config: SamplingConfig,
        labels: Sequence[str] | None = None,
        label_tokens: str = "all",
        source: Path | None = None,
    ) -> None:
        super().__init__(config)
        self.model = model
        self.adapter = adapter
        self.samplers = dict(samplers)
        self.task = task
        self.labels = labels
        self.label_tokens = label_tokens
        self.source = source
        self.decisions: Decisions | None = None
        self.owner = attachment.owner  # the key of the sampling state
        self._attachment = attachment
        self._devices: frozenset[torch.device] = frozenset()  # of the noisy layers
        inner: Any = model.get_base_model()  # type: ignore[operator]
        self.base = inner
        self._forward_names = frozenset(inspect.signature(inner.forward).parameters)
        known = task == "CAUSAL_LM" and "logits_to_keep" in self._forward_names
        self.last_logits = {"logits_to_keep": 1} if known else {}
        self._fan_out = FanOut(self.owner, model, inner, list(samplers))
        self.blocks_below = self._fan_out.below
        install(inner, task, self.blocks_below)

    def __repr__(self) -> str:
        what = f"{self.task}, adapter {self.adapter!r}, {len(self.samplers)} layers"
        return f"BayesianModel({what}, {self.config})"

    def check_config(self, config: SamplingConfig) -> None:
        """Refuse tail mode where the model has no prefix that draws can share."""
        check_possible(config, self.base, self.task)

    def configure(self, **changes: Any) -> BayesianModel:
        """Replace parts of the configuration; what was decided for another one is dropped.

        Args:
            changes: fields of :class:`SamplingConfig`. A new ``mode`` drops ``tail``.

        Raises:
            ValueError: an impossible value, or a mode that the model cannot take.
        """
        before = self.config
        super().configure(**changes)
        if self.config != before:
            self.decisions = None  # they hold for one sigma, T and mode
        return self

    @property
    def merging(self) -> str:
        """Whether layers may multiply by weights that draws are merged into.

        "auto": where each draw has an input of its own and that costs less. "always": wherever
        each draw has an input of its own (not for quantized layers). "never".
        """
        return next(iter(self.samplers.values())).merging

    @merging.setter
    def merging(self, value: str) -> None:
        if value not in MERGING:
            raise ValueError(f"merging={value!r}: expected one of {', '.join(MERGING)}")
        self.check_attached()
        if value == "always" and (names := self._attachment.unmergeable()):
            raise ValueError(
                "merging='always': no draw can be merged into layers that are quantized, hooked or "
                f"no plain nn.Linear: {', '.join(names[:8])}; use merging='auto', which adds there"
            )
        for sampler in self.samplers.values():
            sampler.merging = value

    @property
    def posteriors(self) -> dict[str, LowRankPosterior]:
        """The posterior of each Bayesian module, by qualified name."""
        return {name: s.posterior for name, s in self.samplers.items()}

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model's activations."""
        return self.base.dtype

    @property
    def pad_token_id(self) -> int:
        """The token that fills padding; 0 where the model's configuration has none."""
        value = getattr(self.base.config, "pad_token_id", None)
        return value if isinstance(value, int) else 0

    @contextlib.contextmanager
    def sampling(self, draws: Draws) -> Iterator[BayesianModel]:
        """Run all draws in every ``bayes.model(**batch)`` of this context: [S * B, ...] come out.

        Raises:
            ValueError: the adapter is not active, is disabled, merged, rescaled, gone, or has been
                trained since; another one of the same model is being sampled; or, in the context, a
                pipeline or Trainer calls the model, which would take draws for rows.
        """
        self.check_sampling()
        with self.sampling_as(SamplingState(self.base, draws, loops=loops_around())):
            yield self

    @contextlib.contextmanager
    def sampling_as(self, state: SamplingState) -> Iterator[None]:
        """Sample with everything that a state can say, after ``check_sampling``."""
        for device in self._devices:
            state.draws.tensors(device)  # or a compiled graph would take them for constants
        with active(self.owner, state):
            yield

    def check_sampling(self) -> None:
        """Refuse a model of which draws cannot be sampled now, and put factors on all devices."""
        own, devices = self.dtype, set()  # where compiled graphs read the factors
        for name, weight in self._attachment.check_sampling().items():
            for dtype in {own, weight.dtype}:  # PEFT may cast inputs to the adapter's
                self.samplers[name].factors(weight.device, dtype)
            devices.add(weight.device)
        self._devices = frozenset(devices)
        if other_owner_of(self.base, self.owner):
            raise ValueError(
                "another adapter of this model is being sampled; leave its sampling() first"
            )

    def check_attached(self) -> None:
        """Refuse a model that does not carry this posterior now, unmerged."""
        self._attachment.check()

    def check_saving(self, *, exact: bool = False) -> None:
        """Refuse a model that files cannot tell whole; ``exact``: with the weights that it has."""
        self._attachment.check_saving(exact=exact)

    def distinct_draws(self, n: int | Draws, *, kept: bool = False) -> Draws:
        """Return the draws; at sigma = 0 they are identical, so return one unless ``kept``."""
        draws = self.draws(n)
        equal = not isinstance(n, Draws) and not any(draws.sigmas)
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
        """Compute the logits [S, B, K] of the scored position, in eval mode, without temperature.

        For choices of several tokens they are summed log-probabilities.

        Args:
            batch: a tokenizer's tensors [B, T], with either padding side.
            draws: S draws.
            label_ids: for language models, the vocabulary ids to keep. [K]; or [B, K] for choices
                that differ by row; or [B, K, L] for choices of up to L tokens, -1 after the end of
                shorter ones (causal LMs). None: the whole vocabulary.
            mode: see :meth:`predict`.
            tail: see :meth:`predict`.
            draws_per_pass: most draws in one forward pass. None: as many as fit into memory.

        Raises:
            ValueError: a batch, a mode or label_ids that do not fit the model or each other.
        """
        bayes, mode, tail = self._in_mode(mode, tail)
        inputs = bayes.inputs(batch, mode)
        return scored_logits(bayes, inputs, draws, label_ids, tail, draws_per_pass)

    @torch.no_grad()
    def answer_log_probs(
        self,
        batch: Batch,
        draws: Draws,
        answer_ids: Tensor,
        temperatures: Sequence[float] = (1.0,),
        *,
        mode: str | None = None,
        tail: int | None = None,
    ) -> Tensor:
        """Compute the log-probabilities [S, B, L, G] of answers, token by token, in eval mode.

        Each token is given the prompt and the answer's tokens before it. In tail mode noise acts
        at the last ``tail`` tokens of the prompt and at the answer's.

        Args:
            batch: the prompts, a tokenizer's tensors [B, T], with either padding side.
            draws: S draws.
            answer_ids: [B, L] vocabulary ids, -1 after the end of shorter answers, where 0 is
                returned.
            temperatures: G values of T.
            mode: see :meth:`predict`.
            tail: see :meth:`predict`.

        Raises:
            ValueError: not a causal LM, or a batch, a mode or answer_ids that do not fit the model
                or each other.
        """
        if self.task != "CAUSAL_LM":
            raise ValueError(f"answers: they need a causal language model, not {self.task}")
        bayes, mode, tail = self._in_mode(mode, tail)
        inputs, ids = bayes.inputs(batch, mode), answer_ids[:, None]
        return scored_logits(bayes, inputs, draws, ids, tail, None, temperatures)[:, :, 0]

    def _in_mode(self, mode: str | None, tail: int | None) -> tuple[BayesianModel, str, int | None]:
        """Return the model as it is now, and the mode and tail that are meant; refuse others."""
        bayes = self.frozen()
        config = bayes.config
        if mode is None:
            mode = config.mode
            tail = config.tail if tail is None else tail
        bayes.check_config(replace(config, mode=mode, tail=tail))
        bayes.check_sampling()
        return bayes, mode, tail

    def predictive(self, logits: Tensor, draws: Draws, *, keep_draws: bool = False) -> Predictive:
        """Average the probabilities of logits [S, B, K] at the model's temperature."""
        T = self.config.temperature
        return Predictive.from_logits(logits, draws, keep_draws=keep_draws, temperature=T)

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
        temperature: float | None = None,
    ) -> Predictive:
        """Compute the posterior predictive of a batch.

        Args:
            batch: a tokenizer's tensors [B, T]. An encoder-decoder's may bring decoder_input_ids
                [B, T'] without padding; else the first token of the answer is scored.
            draws: a number of antithetic draws at ``bayes.sigma``; or :class:`Draws`; or "auto" or
                :class:`Adaptive`: for each row as many as its own Monte-Carlo error asks for.
            mode: "full": every draw passes through the whole model. "tail": noise at the last
                ``tail`` positions only, which is cheaper, and another predictive; decoders only.
                None: as configured.
            label_ids: the vocabulary ids of the classes; see :meth:`logits`.
            tail: positions with noise in tail mode.
            keep_draws: keep every draw's probabilities [S, B, K].
            draws_per_pass: most draws in one forward pass. None: as many as fit into memory.
            temperature: T of the likelihood. None: as configured.

        Raises:
            ValueError: sigma not set, odd draws, or what :meth:`logits` refuses.
        """
        if isinstance(draws, str):
            if draws != "auto":
                raise ValueError(f"draws={draws!r}: expected a number, tfb.Draws or 'auto'")
            draws = Adaptive()
        bayes = self.frozen()
        if temperature is not None:
            bayes.configure(temperature=temperature)
        logits_of = partial(bayes.logits, mode=mode, tail=tail, draws_per_pass=draws_per_pass)
        if isinstance(draws, Adaptive):
            if keep_draws:
                raise ValueError("keep_draws: rows have different numbers of draws under 'auto'")
            first = bayes.draws(draws.first)
            T = bayes.config.temperature
            return predict_adaptively(logits_of, batch, label_ids, draws, first, T)
        draws = bayes.draws(draws)
        logits = logits_of(batch, draws, label_ids)
        return bayes.predictive(logits, draws, keep_draws=keep_draws)

    @torch.no_grad()
    def log_probs(self, batch: Batch, draws: Draws) -> Tensor:
        """Compute log mean_s p_s wherever the model has logits, in eval mode.

        Args:
            batch: arguments of the model's forward, [B, T], as the model itself takes them.
            draws: S draws.

        Returns:
            [B, T, V] of a language model, [B, K] of a classifier; at sigma = 0 and T = 1 the
            log-softmax of the adapter's logits.

        Raises:
            ValueError: what :meth:`sampling` refuses.
        """
        self.check_sampling()
        temperature = self.config.temperature
        inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        tokens = int(inputs["input_ids"].numel())
        most = draws_that_fit(self.base, len(draws), tokens, tokens)
        found = []
        with evaluating(self.model):
            for part in split(draws, most, self.device):
                with self.sampling_as(SamplingState(self.base, part)):
                    logits = self.model(**inputs).logits.unflatten(0, (len(part), -1))
                mean = log_mean_probs(logits, temperature)
                found.append(mean + math.log(len(part)))
        return torch.stack(found).logsumexp(0) - math.log(len(draws))

    @torch.no_grad()
    def hidden_norms(self, batch: Batch, draws: Draws) -> Tensor:
        """Compute norms [S, B] of the last hidden state, scored or averaged over tokens."""
        return hidden_norms(self, batch, draws)

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        draws: int | Draws = 10,
        *,
        per_draw: bool = False,
        **options: Any,
    ) -> Generation:
        """Continue prompts with the posterior predictive; every token has the model's temperature.

        In tail mode noise acts at the last ``tail`` tokens of a prompt and at every new one; the
        prompt before them is read once for all draws.

        Args:
            batch: a tokenizer's tensors [B, T], with either padding side.
            draws: S coherent weight samples that decode side by side.
            per_draw: every draw writes its own continuation instead, [S, B, ...].
            options: those of transformers' ``generate`` (max_new_tokens, do_sample, temperature,
                stop_strings with tokenizer, stopping_criteria, ...).

        Raises:
            ValueError: not a causal LM, sigma not set, token noise, NaN, or an option that cannot
                work with several draws.
        """
        bayes = self.frozen()
        return run_generation(bayes, batch, bayes.draws(draws), per_draw, options)

    @property
    def head_alone(self) -> bool:
        """Whether a draw costs an output embedding only."""
        return self._fan_out.head_alone

    def inputs(self, batch: Batch, mode: str) -> dict[str, Any]:
        """Return the aligned batch with what a scoring pass adds."""
        # A sequence of a decoder ends where it is scored: on the left is the padding.
        causal = self.task == "CAUSAL_LM" or mode == "tail"
        inputs = align(batch, "left" if causal else "right", self.device)
        if self.task == "SEQ_CLS":
            # Decoders find a row's last token by the padding's id, not by the mask.
            padding = ~inputs["attention_mask"].bool()
            inputs["input_ids"] = inputs["input_ids"].masked_fill(padding, self.pad_token_id)
        if self.task == "SEQ_2_SEQ_LM" and inputs.get("decoder_input_ids") is None:
            # Scored: the first token of the answer.
            rows, start = inputs["input_ids"].shape[0], self.base.config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.full((rows, 1), start, device=self.device)
        if causal and ("position_ids" in self._forward_names or mode == "tail"):
            position = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
            inputs.setdefault("position_ids", position)
        if self.task != "SEQ_CLS" and "use_cache" in self._forward_names:
            inputs["use_cache"] = False
        return inputs

    def remove(self) -> nn.Module:
        """Undo ``bayesianize``; return the PEFT model, with none of our hooks."""
        self._fan_out.remove()
        uninstall(self.base, self.blocks_below)
        self._attachment.detach()
        for sampler in self.samplers.values():
            sampler.release()
        return self.model


def check_possible(config: SamplingConfig, base: PreTrainedModel, task: str) -> None:
    """Refuse tail mode where a model has no prefix that draws can share."""
    if config.mode == "tail" and (reason := why_no_tail(base, task)):
        raise ValueError(f"mode='tail' is not possible: {reason}")
