"""Loops of PEFT forwards, which people write to predict with S draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.fixtures import Case
from tfb.model import BayesianModel

Statistics = tuple[Tensor, Tensor, Tensor]


def forward(case: Case, model: Any) -> Tensor:
    """Return the probabilities [B, K] of one plain pass, asked for as cheaply as ours asks."""
    inputs: dict[str, Any] = dict(case.batch)
    if case.label_ids is None:
        return model(**inputs).logits.softmax(-1)
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits.gather(-1, case.label_ids).softmax(-1)


def in_parts(parts: Sequence[Case]) -> Callable[[Case, Any], Tensor]:
    """Return ``forward`` of a case, batch by batch."""
    return lambda case, model: torch.cat([forward(part, model) for part in parts])


def summarize(p: Tensor) -> Statistics:
    """Return the mean [B, K] and the two entropies [B] of p [S, B, K]."""
    probs = p.mean(0)
    return probs, torch.special.entr(probs).sum(-1), torch.special.entr(p).sum(-1).mean(0)


def naive_draws(
    case: Case, draws: int, sigma: float, call: Callable[[Case, Any], Tensor]
) -> Iterator[Tensor]:
    """Yield ``call(case, twin)`` for each draw: A' + sigma / d o E in lora_A, then taken back."""
    layers = lora_a(case.bayes, case.twin).values()
    means = [(weight, weight.clone(), sigma * inv_d) for weight, inv_d in layers]
    for _ in range(draws):
        for weight, mean, std in means:
            weight.copy_(mean + std * torch.randn_like(mean))
        yield call(case, case.twin)
        for weight, mean, _std in means:
            weight.copy_(mean)


def naive_loop(
    case: Case, draws: int, sigma: float, call: Callable[[Case, Any], Tensor] = forward
) -> Statistics:
    """Return the statistics of PEFT forwards (``call``) with materialised noise."""
    return summarize(torch.stack(list(naive_draws(case, draws, sigma, call))))


def flipout_loop(
    case: Case, draws: int, sigma: float, call: Callable[[Case, Any], Tensor] = forward
) -> Statistics:
    """Return the statistics of PEFT forwards (``call``) with Flipout noise added after lora_A.

    The authors' scripts apply B to the mean and to the noise apart; here once to their sum, which
    is in the contender's favour.
    """
    found = []
    for _ in range(draws):
        with _flipout(case, sigma):
            found.append(call(case, case.twin))
    return summarize(torch.stack(found))


@contextmanager
def _flipout(case: Case, sigma: float) -> Iterator[None]:
    def add(noise: Tensor, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        sign_in = torch.empty_like(args[0]).uniform_(-1, 1).sign_()
        sign_out = torch.empty_like(output).uniform_(-1, 1).sign_()
        return output + F.linear(args[0] * sign_in, noise) * sign_out

    handles = []
    for name, p in case.bayes.posteriors.items():
        module = case.twin.get_base_model().get_submodule(name).lora_A["default"]
        weight = module.weight
        noise = sigma * p.inv_d[:, None].to(weight) * torch.randn_like(weight)
        handles.append(module.register_forward_hook(partial(add, noise)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lora_a(bayes: BayesianModel, twin: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each sampled layer's lora_A weight [r, n] of the twin, and 1 / d [r, 1], by name."""
    base = twin.get_base_model()
    weights = {
        name: (base.get_submodule(name).lora_A["default"].weight.data, p)
        for name, p in bayes.posteriors.items()
    }
    return {name: (w, p.inv_d[:, None].to(w)) for name, (w, p) in weights.items()}
