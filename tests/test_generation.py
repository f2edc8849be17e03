"""Generation: several weight samples decode side by side, next tokens from their average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import make_batch, relative
from test_architectures import CAUSAL, DRAWS, KINDS
from torch import Tensor

import tfb
from tfb import Draws

NEW = 6
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def prompts() -> dict[str, Tensor]:
    return {k: v for k, v in make_batch(7, 4, 6).items() if k != "position_ids"}


def endless(kind: str, **how: Any) -> Any:
    """A Bayesian model that no token ends."""
    bayes = tfb.bayesianize(KINDS[kind].build(), **how)
    bayes.base.generation_config.eos_token_id = None
    return bayes


@pytest.mark.parametrize("kind", CAUSAL)
def test_greedy_is_the_average_of_full_passes(kind: str) -> None:
    """Against a loop that recomputes everything with predict at every step; uncertainties too."""
    for layers in (None, tfb.last_layers(1)):
        bayes = endless(kind, layers=layers)
        found = bayes.generate(prompts(), DRAWS, **OPTIONS)
        batch = prompts()
        for step in range(NEW):
            p = bayes.predict(batch, DRAWS)
            for name in ("total", "aleatoric", "epistemic"):
                mine, theirs = getattr(found, name)[:, step], getattr(p, name)
                assert float((mine - theirs).abs().max()) < 1e-5
            one = torch.ones(3, 1, dtype=torch.int64)
            batch = {
                "input_ids": torch.cat([batch["input_ids"], p.prediction[:, None]], 1),
                "attention_mask": torch.cat([batch["attention_mask"], one], 1),
            }
        assert found.sequences.equal(batch["input_ids"])


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 0.7, "top_k": 9}, {"repetition_penalty": 1.7}],
)
@pytest.mark.parametrize("kind", CAUSAL)
def test_sigma_zero_is_the_models_own_generate(kind: str, options: dict[str, Any]) -> None:
    """Greedy, sampled with the same random state, and with a processor that looks at signs."""
    bayes = tfb.bayesianize(KINDS[kind].build())
    arguments = OPTIONS | options
    torch.manual_seed(0)
    expected = bayes.model.generate(**prompts(), **arguments)
    torch.manual_seed(0)
    assert bayes.generate(prompts(), Draws.mean(), **arguments).sequences.equal(expected)
    torch.manual_seed(0)
    again = bayes.generate(prompts(), Draws.iid(3, 0.0), **arguments)
    assert again.sequences.equal(expected)
    assert float(again.epistemic.abs().max()) < 1e-6


def test_continuations_of_each_draw() -> None:
    """per_draw: S B continuations, each that of generating with this draw alone."""
    bayes = endless("llama", layers=tfb.last_layers(2))
    found = bayes.generate(prompts(), DRAWS, per_draw=True, **OPTIONS)
    assert found.sequences.shape == (len(DRAWS), 3, 7 + NEW) and found.total is None
    for s in range(len(DRAWS)):
        alone = bayes.generate(prompts(), DRAWS[s : s + 1], **OPTIONS)
        assert found.sequences[s].equal(alone.sequences)
    assert len({tuple(x.flatten().tolist()) for x in found.sequences}) > 1


def test_a_row_does_not_see_its_neighbours() -> None:
    bayes = endless("llama")
    whole = bayes.generate(prompts(), DRAWS, **OPTIONS)
    for row, length in enumerate((7, 4, 6)):
        own = {k: v[row : row + 1, 7 - length :] for k, v in prompts().items()}
        alone = bayes.generate(own, DRAWS, **OPTIONS)
        assert alone.sequences[0, length:].equal(whole.sequences[row, 7:])
        assert relative(alone.total[0], whole.total[row]) < 1e-6


def test_ended_rows_are_padded_and_certain() -> None:
    """After a row's end token there is padding, and no uncertainty is claimed."""
    bayes = endless("llama")
    free = bayes.generate(prompts(), DRAWS, **OPTIONS)
    end = int(free.sequences[1, 8])  # the second row's second new token
    found = bayes.generate(prompts(), DRAWS, eos_token_id=end, **OPTIONS)
    new = found.sequences[:, 7:]
    for row in range(3):
        ends = (new[row] == end).nonzero()
        stop = int(ends[0]) + 1 if len(ends) else new.shape[1]
        assert bool((new[row, stop:] == 0).all())
        assert bool((found.total[row, stop:] == 0).all())
        assert bool((found.total[row, :stop] > 0).all())
    assert int((new[1] != 0).sum()) <= 2


def test_blocks_below_the_noise_keep_one_cache() -> None:
    """The first block's keys are held for B rows, the last block's for S B."""
    bayes = endless("llama", layers=tfb.last_layers(1))
    found = []
    block = bayes.base.model.layers
    handles = [
        block[i].self_attn.register_forward_pre_hook(
            lambda m, a, k: found.append((m.layer_idx, len(k["hidden_states"]))), with_kwargs=True
        )
        for i in (0, 2)
    ]
    bayes.generate(prompts(), DRAWS, **OPTIONS)
    for handle in handles:
        handle.remove()
    assert found == [(0, 3), (2, 3 * len(DRAWS))] * NEW


def test_generate_options_pass_through() -> None:
    """A dictionary result and several sequences a prompt, as transformers has them."""
    bayes = endless("llama")
    plain = bayes.generate(prompts(), DRAWS, **OPTIONS)
    named = bayes.generate(prompts(), DRAWS, return_dict_in_generate=True, **OPTIONS)
    assert named.sequences.equal(plain.sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, r"num_beams=3\): beam search"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"penalty_alpha": 0.5}, "penalty_alpha"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    bayes = tfb.bayesianize(KINDS["llama"].build())
    with pytest.raises(ValueError, match=message):
        bayes.generate(prompts(), DRAWS, **OPTIONS | options)


def test_other_refusals() -> None:
    bayes = tfb.bayesianize(KINDS["llama"].build())
    with pytest.raises(ValueError, match="weight noise"):
        bayes.generate(prompts(), Draws.iid(2, 0.1, noise="token"), **OPTIONS)
    with pytest.raises(ValueError, match="sigma is not set"):
        bayes.generate(prompts(), 4, **OPTIONS)
    classifier = tfb.bayesianize(KINDS["llama-classifier"].build())
    with pytest.raises(ValueError, match="causal language model"):
        classifier.generate(prompts(), DRAWS)
