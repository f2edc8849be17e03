"""Generation from the posterior predictive: transformers' loop over scores averaged over draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StoppingCriteria, StopStringCriteria
from transformers.cache_utils import DynamicLayer

from tfb.draws import Draws
from tfb.predictive import tempered
from tfb.sampling.forward import align, mean_state
from tfb.sampling.kv_cache import Inputs, check_angles, prefix_inputs
from tfb.sampling.state import Batch, SampledModel, SamplingState, evaluating

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

# Arguments of ``generate`` that move rows between draws or need a second model.
REFUSED = {
    "assistant_model": "assisted decoding verifies the tokens of another model",
    "assistant_early_exit": "assisted decoding verifies the tokens of fewer layers",
    "prompt_lookup_num_tokens": "assisted decoding verifies tokens that were guessed",
    "penalty_alpha": "contrastive search reorders the cache",
    "dola_layers": "DoLa reads scores below the posterior",
    "guidance_scale": "guidance runs a second prompt, whose scores would count as a step's",
    "past_key_values": "a cache from elsewhere does not hold the draws' keys and values",
    "streamer": "how sure a continuation is, is known at its end only; read what is returned",
}
ROOM = 64  # tokens that a layer of the cache grows by, at least
# Of these a layer takes its rows from the first keys it is given: S * B, or B below the noise.
CACHES = ("dynamic", "static")


@dataclass(frozen=True, repr=False)
class Generation:
    """B continuations, the probability of every token, and its distribution's uncertainty, in nats.

    What is [B, L] is of the averaged distribution that each new token was taken from, before the
    processors of ``generate`` (its own temperature, top-k, ...), and 0 after a row's end. With
    ``per_draw`` everything has S in front and is of each draw's own distribution.

    Attributes:
        sequences: [B, T + L] token ids, prompts first, padded after a row's end.
        lengths: [B] int64, each row's new tokens, the one that ended it included.
        ended: [B] bool, whether an end token, a stop string or a stopping criterion ended the row;
            else the limit of tokens or of time did.
        log_probs: [B, L], of the new tokens.
        total: [B, L], entropy of the averaged distribution.
        aleatoric: [B, L], mean entropy of the draws' distributions.
        epistemic: [B, L], their difference.
    """

    sequences: Tensor
    lengths: Tensor
    ended: Tensor
    log_probs: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor

    def __repr__(self) -> str:
        return f"Generation(sequences {list(self.sequences.shape)}, with uncertainties)"

    @property
    def new_tokens(self) -> Tensor:
        """[B, L] token ids, the sequences without their prompts."""
        return self.sequences[..., -self.log_probs.shape[-1] :]

    @property
    def sequence_uncertainty(self) -> Tensor:
        """[B], in nats: minus the log-probability of the whole continuation."""
        return -self.log_probs.sum(-1)


class Recorder(StoppingCriteria):
    """Averages the draws at every step, and keeps what is known of the token that was taken.

    Args:
        draws: S; 1 where each draw writes by itself.
        temperature: the model's T.
        ends: end tokens [E], on the device of the sequences.
        stops: stopping criteria, of stop strings and the caller's own.
    """

    def __init__(self, draws: int, temperature: float, ends: Tensor, stops: Sequence[Any]) -> None:
        self.draws, self.temperature, self.ends, self.stops = draws, temperature, ends, stops
        self._step: tuple[Tensor, Tensor] | None = None  # log p of the draws and their mean
        self._kept: list[Tensor] = []  # [3, B] of each token: log-probability, total, aleatoric
        self._done: list[Tensor] = []  # [B] after each token
        self._prompt = 0  # T

    def average(self, logits: Tensor) -> Tensor:
        """Reduce logits [S * B, L, V] to scores [B, L, V].

        With l_s the logits over T, score = log mean_s softmax(l_s) + mean_s logsumexp(l_s). The
        second term changes no probability. With it, scores at sigma = 0 are l itself, whose sign
        some processors look at.
        """
        apart = tempered(logits, self.temperature).unflatten(0, (self.draws, -1))  # [S, B, L, V]
        normalizer = apart.logsumexp(-1, keepdim=True)
        log_p = apart - normalizer
        mean = log_p[0] if self.draws == 1 else log_p.logsumexp(0) - math.log(self.draws)
        # A prompt that is read in chunks comes by several times; only its last part gives a token.
        self._step = log_p[:, :, -1], mean[:, -1]
        return apart[0] if self.draws == 1 else mean + normalizer.mean(0)

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        """Keep what is known of the last token [B]; return which rows are done."""
        assert self._step is not None  # a token comes after its scores
        token, (log_p, mean) = input_ids[:, -1:], self._step
        self._step = None  # a compiled model's memory, which its next run writes over
        taken = mean.gather(-1, token)[:, 0]
        total = torch.special.entr(mean.exp()).sum(-1)
        aleatoric = torch.special.entr(log_p.exp()).sum(-1).mean(0)
        if not self._kept:
            self._prompt = input_ids.shape[1] - 1
        self._kept.append(torch.stack([taken, total, aleatoric]))
        done = torch.isin(token[:, 0], self.ends)
        # A stop string that the prompt began is none of the text.
        new = input_ids[:, self._prompt :]
        for stop in self.stops:
            seen = new if isinstance(stop, StopStringCriteria) else input_ids
            done = done | torch.as_tensor(stop(seen, scores, **options), device=done.device)
        self._done.append(done if not self._done else done | self._done[-1])
        return self._done[-1]

    def generation(self, sequences: Tensor, padding: int) -> Generation:
        """Return sequences [B, T + L] and what was kept."""
        # Where transformers asks late whether all rows are done, it takes the last token back.
        length = sequences.shape[1] - self._prompt
        done = torch.stack(self._done[:length], -1)
        running = torch.cat([torch.zeros_like(done[:, :1]), done[:, :-1]], -1).logical_not()
        kept = torch.where(running, torch.stack(self._kept[:length], -1), 0.0)
        if not bool(kept.isfinite().all()):
            raise ValueError(
                "generate: the model returned NaN or Inf, so no token is the most probable; check "
                "the adapter, sigma and the dtype"
            )
        # transformers pads rows only where there are end tokens.
        prompt, new = sequences.split([self._prompt, length], 1)
        new = new.masked_fill(~running, padding)
        log_probs, total, aleatoric = kept
        return Generation(
            sequences=torch.cat([prompt, new], 1),
            lengths=running.sum(-1),
            ended=done[:, -1],
            log_probs=log_probs,
            total=total,
            aleatoric=aleatoric,
            epistemic=(total - aleatoric).clamp_min(0.0),
        )


class DrawsLayer(DynamicLayer):
    """Keys and values that grow in place, and are repeated where S draws of B prompts go on.

    transformers' own layer copies them all at every token: with ten draws a tenth of the time on a
    CPU (docs/design/choices.md).
    """

    _rooms: tuple[Tensor | None, Tensor | None] = (None, None)  # keys and values begin them

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [S * B, heads, tokens, size]; return them all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        keys = _appended(self.keys, self._rooms[0], key_states, start)
        values = _appended(self.values, self._rooms[1], value_states, start)
        self._rooms, stop = (keys, values), start + key_states.shape[-2]
        self.keys, self.values = keys[:, :, :stop], values[:, :, :stop]
        return self.keys, self.values


def _appended(known: Any, room: Tensor | None, new: Tensor, start: int) -> Tensor:
    """Put new keys or values behind the first ``start``; return the room that holds all of them.

    One that is too small, of fewer rows, or no longer that of the known ones is replaced.
    """
    rows, heads, tokens, size = new.shape
    stop = start + tokens
    own = room is not None and room.data_ptr() == known.data_ptr() and len(room) == rows
    if room is None or not own or stop > room.shape[2]:
        room = new.new_empty(rows, heads, stop + max(ROOM, stop // 4), size)
        if start:
            room[:, :, :start] = known.repeat(rows // len(known), 1, 1, 1)
    room[:, :, start:stop] = new
    return room


def _growing_cache(base: PreTrainedModel, setting: Setting) -> Cache | None:
    """Return transformers' dynamic cache with layers of ours; None where another kind is used."""
    static = setting("cache_implementation") == "static"
    if static or setting("use_cache") is False or base._is_stateful:
        return None
    cache = DynamicCache(config=base.config)
    # Others forget what lies outside a window, or hold a state.
    cache.layers = [DrawsLayer() if type(one) is DynamicLayer else one for one in cache.layers]
    return cache


Setting = Callable[[str], Any]


def _setting(options: dict[str, Any], own: GenerationConfig, name: str) -> Any:
    """Return what ``generate`` goes by: an argument, its generation_config, or the model's own."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(own, name, None) if given is None else given


def _check_arguments(setting: Setting, tail: bool) -> None:
    """Refuse, by name, what cannot work with several draws."""
    for name, reason in REFUSED.items():
        if setting(name) is not None:
            raise ValueError(f"generate({name}=...): {reason}; not possible while sampling")
    cache = setting("cache_implementation")
    if cache not in (None, "hybrid", *CACHES):  # a model's own "hybrid" is dynamic to transformers
        raise ValueError(
            f"generate(cache_implementation={cache!r}): expected one of {', '.join(CACHES)} while "
            "sampling"
        )
    if cache == "static" and tail:
        raise ValueError(
            "generate(cache_implementation='static'): in tail mode prompts are read once for all "
            "draws, into a cache that grows; leave it out"
        )
    if cache == "static" and setting("prefill_chunk_size") is not None:
        raise ValueError(
            "generate(prefill_chunk_size=...): makes a static cache of one row a prompt, where "
            "draws need S; leave one of the two out"
        )
    beams = setting("num_beams") or 1
    if beams > 1:
        raise ValueError(
            f"generate(num_beams={beams}): beam search reorders the cache between rows, which "
            "holds every draw's keys and values; use greedy search or sampling"
        )


@torch.no_grad()
def run_generation(
    bayes: SampledModel, batch: Batch, draws: Draws, per_draw: bool, options: dict[str, Any]
) -> Generation:
    """Continue prompts; see ``BayesianModel.generate``, whose arguments these are."""
    if bayes.task != "CAUSAL_LM":
        raise ValueError(f"generate: needs a causal language model, not {bayes.task}")
    if draws.noise != "weight":
        raise ValueError("generate: needs weight noise, one weight sample for all steps")
    model: Any = bayes.model
    setting = partial(_setting, options, bayes.base.generation_config)
    _check_arguments(setting, bayes.config.mode == "tail")
    inputs, S = align(batch, "left", bayes.base.device), len(draws)
    ends = token_ids(setting("eos_token_id"))
    padding = token_ids(setting("pad_token_id")) or ends or [0]
    stops = _stop_strings(options, setting("stop_strings"))
    stops += options.pop("stopping_criteria", None) or ()
    stop_at = torch.tensor(ends, dtype=torch.int64, device=bayes.base.device)
    recorder = Recorder(1 if per_draw else S, bayes.config.temperature, stop_at, stops)
    state = SamplingState(
        bayes.base, draws, cached=True, diverged=per_draw, reduce=recorder.average
    )
    # transformers compiles the model by itself where a cache is static.
    options.setdefault("disable_compile", True)
    bayes.check_sampling()
    with evaluating(model):
        k = bayes.config.tail
        # Full mode gives the same where all tokens are tail, or the noise is above.
        if k is not None and k < inputs["input_ids"].shape[1] and not bayes.head_alone:
            options["use_cache"] = True  # whatever the configuration says: the prefix is in it
            options["past_key_values"] = _prefix_cache(bayes, inputs, state, k, setting)
        elif (cache := _growing_cache(bayes.base, setting)) is not None:
            options["past_key_values"] = cache
        if per_draw:
            inputs = {
                name: v.repeat(S, *([1] * (v.dim() - 1))) if isinstance(v, Tensor) else v
                for name, v in inputs.items()
            }
        with bayes.sampling_as(state):
            found = model.generate(**inputs, stopping_criteria=[recorder], **options)
    sequences = getattr(found, "sequences", found)
    generation = recorder.generation(sequences, padding[0])
    if not per_draw:
        return generation
    apart = {f.name: getattr(generation, f.name).unflatten(0, (S, -1)) for f in fields(generation)}
    return Generation(**apart)


def _prefix_cache(
    bayes: SampledModel, inputs: Inputs, state: SamplingState, k: int, setting: Setting
) -> Cache:
    """Read all but the last k tokens of the prompts, once for all draws, with the mean adapter."""
    position = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    inputs = {"position_ids": position, **inputs}
    prefix, cache = prefix_inputs(inputs, k), Cache(layer_class_to_replicate=DrawsLayer)
    rows, T = position.shape
    most = setting("max_new_tokens")  # that will follow
    most = (setting("max_length") or T) - T if most is None else most
    check_angles(bayes.base.config, prefix["position_ids"], inputs["position_ids"] + most)
    backbone: nn.Module = bayes.base.base_model
    with bayes.sampling_as(mean_state(state, rows)):
        backbone(**prefix, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(setting("num_return_sequences") or 1)
    return cache


def token_ids(value: int | Sequence[int] | None) -> list[int]:
    """Return token ids as a list."""
    return [] if value is None else [value] if isinstance(value, int) else [int(v) for v in value]


def _stop_strings(options: dict[str, Any], strings: list[str] | None) -> list[StoppingCriteria]:
    """Return what finds the stop strings, and take them from the options."""
    if not strings:
        return []
    options["stop_strings"] = None  # else transformers would make a second one
    if options.get("tokenizer") is None:
        raise ValueError("generate(stop_strings=...): needs the tokenizer too; add tokenizer=...")
    return [StopStringCriteria(options["tokenizer"], strings)]
