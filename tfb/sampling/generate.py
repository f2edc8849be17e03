"""Generation from the posterior predictive: transformers' loop over scores averaged over draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tfb.draws import Draws
from tfb.predictive import tempered
from tfb.sampling.forward import align
from tfb.sampling.state import Batch, SampledModel, SamplingState, evaluating

if TYPE_CHECKING:
    from transformers import GenerationConfig

# Arguments of ``generate`` that move rows between draws or need a second model.
REFUSED = {
    "assistant_model": "assisted decoding verifies the tokens of another model",
    "assistant_early_exit": "assisted decoding verifies the tokens of fewer layers",
    "prompt_lookup_num_tokens": "assisted decoding verifies tokens that were guessed",
    "penalty_alpha": "contrastive search reorders the cache",
    "dola_layers": "DoLa reads scores below the posterior",
    "guidance_scale": "guidance runs a second prompt, whose scores would count as a step's",
    "past_key_values": "a cache from elsewhere does not hold the draws' keys and values",
}
# Of these a layer takes its rows from the first keys it is given: S * B, or B below the noise.
CACHES = ("dynamic", "static")


@dataclass(frozen=True, repr=False)
class Generation:
    """B continuations and the uncertainty of every token's distribution, in nats.

    Uncertainties [B, L] are those of the averaged distribution that each new token was taken from,
    before the processors of ``generate`` (its own temperature, top-k, ...). They are 0 after a
    row's end token, and None for continuations by draw.

    Attributes:
        sequences: [B, T + L] token ids, prompts first ([S, B, T + L] for continuations by draw).
        total: entropy of the averaged distribution.
        aleatoric: mean entropy of the draws' distributions.
        epistemic: their difference.
    """

    sequences: Tensor
    total: Tensor | None = None
    aleatoric: Tensor | None = None
    epistemic: Tensor | None = None

    def __repr__(self) -> str:
        known = "" if self.total is None else ", with uncertainties"
        return f"Generation(sequences {list(self.sequences.shape)}{known})"


@dataclass
class Averager:
    """Reduces a step's logits [S * B, L, V] to scores [B, L, V] and keeps the uncertainties.

    With l_s the logits over the model's temperature, score = log mean_s softmax(l_s) + mean_s
    logsumexp(l_s). The second term changes no probability. With it, scores at sigma = 0 are l
    itself, whose sign some processors look at.
    """

    draws: int
    temperature: float
    kept: list[Tensor] = field(default_factory=list)  # total and aleatoric [2, B] of each step

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the scores."""
        apart = tempered(logits, self.temperature).unflatten(0, (self.draws, -1))  # [S, B, L, V]
        normalizer = apart.logsumexp(-1, keepdim=True)
        log_p = apart - normalizer
        mean = torch.logsumexp(log_p, 0) - math.log(self.draws)
        total = torch.special.entr(mean[:, -1].exp()).sum(-1)
        aleatoric = torch.special.entr(log_p[:, :, -1].exp()).sum(-1).mean(0)
        self.kept.append(torch.stack([total, aleatoric]))
        return mean + normalizer.mean(0)

    def generation(self, sequences: Tensor, prompt: int, ends: Sequence[int]) -> Generation:
        """Return sequences [B, prompt + L] and what was kept, 0 after the first of ``ends``."""
        new = sequences[:, prompt:]
        # A prompt that is read in chunks comes by several times; only its last part gives a token.
        kept = torch.stack(self.kept[-new.shape[1] :], -1)
        ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device))
        running = ended.cumsum(1) - ended.long() == 0  # the end itself was drawn
        total, aleatoric = torch.where(running, kept, 0.0)
        if not bool((total + aleatoric).isfinite().all()):
            raise ValueError(
                "generate: the model returned NaN or Inf, so no token is the most probable; check "
                "the adapter, sigma and the dtype"
            )
        return Generation(sequences, total, aleatoric, (total - aleatoric).clamp_min(0.0))


def _setting(options: dict[str, Any], name: str, default: Any = None) -> Any:
    """Return what ``generate`` goes by: the argument, else its generation_config's."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return default if given is None else given


def _check_arguments(options: dict[str, Any], config: GenerationConfig) -> None:
    """Refuse, by name, what cannot work with several draws."""
    for name, reason in REFUSED.items():
        if _setting(options, name) is not None:
            raise ValueError(f"generate({name}=...): {reason}; not possible while sampling")
    cache = _setting(options, "cache_implementation")
    if cache is not None and cache not in CACHES:
        raise ValueError(
            f"generate(cache_implementation={cache!r}): expected one of {', '.join(CACHES)} while "
            "sampling"
        )
    if cache == "static" and _setting(options, "prefill_chunk_size") is not None:
        raise ValueError(
            "generate(prefill_chunk_size=...): makes a static cache of one row a prompt, where "
            "draws need S; leave one of the two out"
        )
    beams = _setting(options, "num_beams", config.num_beams) or 1
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
    defaults: Any = bayes.base.generation_config
    _check_arguments(options, defaults)
    inputs = align(batch, "left", bayes.base.device)
    T, S = inputs["input_ids"].shape[1], len(draws)
    temperature = bayes.config.temperature
    averager = None if per_draw else Averager(S, temperature)
    plain = None if temperature == 1.0 else partial(tempered, temperature=temperature)
    reduce = averager or plain
    state = SamplingState(bayes.base, draws, cached=True, diverged=per_draw, reduce=reduce)
    if per_draw:
        inputs = {
            k: v.repeat(S, *([1] * (v.dim() - 1))) if isinstance(v, Tensor) else v
            for k, v in inputs.items()
        }
    # transformers compiles the model by itself where a cache is static.
    options.setdefault("disable_compile", True)
    bayes.check_sampling()
    with evaluating(model), bayes.sampling_as(state):
        found = model.generate(**inputs, **options)
    sequences = getattr(found, "sequences", found)
    if averager is None:
        return Generation(sequences.unflatten(0, (S, -1)))
    end = _setting(options, "eos_token_id", defaults.eos_token_id)
    ends = [] if end is None else [end] if isinstance(end, int) else [int(e) for e in end]
    return averager.generation(sequences, T, ends)
