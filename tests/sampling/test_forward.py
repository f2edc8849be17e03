"""Draws in parts: any parts give the same numbers, and a part takes what fits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.architectures import DRAWS, EXACT, KINDS, batch_of
from support.models import HIDDEN, relative

import tfb
from tfb import Draws
from tfb.sampling.forward import CPU_BYTES, draws_that_fit, split

S = len(DRAWS)
OWN = torch.tensor([[5, 9], [63, 5], [7, 8]])
TAIL: dict[str, Any] = {"mode": "tail", "tail": 2}
SEQUENCES = {
    "antithetic": Draws.antithetic(10, 0.2, seed=2),
    "iid": Draws.iid(7, 0.2, seed=2),
    "grid": Draws.grid([0.0, 0.1, 0.3], 4, seed=2),
    "mixed": Draws((0.1, 0.2, -0.1, 0.0, 0.3), (4, 0, 4, 1, 0)),
}
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "full": ("llama", (), {}),
    "tail": ("llama", (), TAIL),
    "labels": ("gpt2", (), {"label_ids": OWN}),
    "head": ("llama", ("lm_head",), {}),
    "classifier": ("llama-classifier", (), {}),
    "classifier-tail": ("llama-classifier", (), TAIL),
    "encoder": ("bert", (), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_are_the_whole(case: str) -> None:
    """Every size of a part, divisor or not, in every mode, whatever the order of draws."""
    kind, extra, how = CASES[case]
    layers = tfb.last_layers(0) if extra else None
    bayes = tfb.bayesianize(KINDS[kind].build(*extra), layers=layers)
    for draws in SEQUENCES.values():
        whole = bayes.logits(batch_of(), draws, draws_per_pass=len(draws), **how)
        for size in (1, 3, 4, 100):
            parts = bayes.logits(batch_of(), draws, draws_per_pass=size, **how)
            assert relative(parts, whole) < EXACT


def test_a_part_has_a_draw() -> None:
    bayes = tfb.bayesianize(KINDS["llama"].build())
    with pytest.raises(ValueError, match="draws_per_pass=0: expected at least 1"):
        bayes.logits(batch_of(), DRAWS, draws_per_pass=0)


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 100])
def test_parts_keep_streams_together(name: str, size: int) -> None:
    """In order, nothing twice, no larger than asked for unless one stream's draws are; on a CPU,
    which keeps weight noise from part to part, never larger."""
    run = {"antithetic": 2, "iid": 1, "grid": 6, "mixed": 1}[name]
    draws = SEQUENCES[name]
    kept = list(split(draws, size, torch.device("cpu")))
    assert all(len(p) <= size and (size < run or len(p) % run == 0) for p in kept)
    draws = replace(draws, noise="token")
    parts = list(split(draws, size, torch.device("cpu")))
    assert sum((p.sigmas for p in parts), ()) == draws.sigmas
    assert sum((p.streams for p in parts), ()) == draws.streams
    assert all((p.seed, p.noise) == (draws.seed, draws.noise) for p in parts)
    assert all(len(p) % run == 0 and len(p) <= max(size, run) for p in parts)
    if run > 1:
        assert not any(set(a.streams) & set(b.streams) for a, b in pairwise(parts))


@pytest.mark.parametrize("tokens", [1, 17, 400, 3 * 5000])
def test_draws_that_fit_a_cpu(tokens: int) -> None:
    """As many as the limit allows, never none, never more than there are."""
    each = tokens * 2 * HIDDEN * 4  # bytes
    base = KINDS["llama"].make()
    for draws in (1, 10, 10**6):
        found = draws_that_fit(base, draws, tokens)
        assert 1 <= found <= draws
        assert found * each <= CPU_BYTES or found == 1
        assert found == draws or (found + 1) * each > CPU_BYTES


def test_parts_are_made_without_being_asked_for() -> None:
    """More tokens than a pass takes: the default runs in parts, with the same numbers."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    # 3 rows of 11 tokens, 32 float64 wide: 1,488 draws a pass.
    draws = Draws.antithetic(1500, 0.2)
    calls: list[int] = []
    hook = bayes.base.model.layers[1].mlp.register_forward_pre_hook(
        lambda m, args: calls.append(len(args[0]))
    )
    found = bayes.logits(batch_of(), draws)
    hook.remove()
    most = CPU_BYTES // (3 * 11 * 2 * HIDDEN * 8) // 2 * 2  # whole pairs
    assert calls == [3 * most, 3 * (1500 - most)]
    assert relative(found[:S], bayes.logits(batch_of(), draws[:S])) < EXACT
    assert relative(found[-S:], bayes.logits(batch_of(), draws[-S:])) < EXACT
