"""How many draws fit into one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tfb.draws import Draws

# Bytes of the widest activation of one pass on a CPU. More bring no more speed: the products are
# large enough, and larger activations only leave the caches (DESIGN.md has the measurements).
CPU_BYTES = 12 << 20
_SHARE = 0.6  # of the free memory: fragmentation, attention scores and the caller's own


def draws_that_fit(base: Any, draws: int, input_ids: Tensor, tail: int | None) -> int:
    """At most ``draws``, at least 1: the draws that one pass over ``input_ids`` [B, T] should take.

    tail: positions that each draw adds (tail sampling, noise in the head alone), None where each
    draw takes all T.
    """
    B, T = input_ids.shape
    return draws_of(base, draws, B * (T if tail is None else tail), input_ids.device)


def draws_of(base: Any, draws: int, tokens: int, device: torch.device, scored: int = 0) -> int:
    """``draws_that_fit`` for draws of so many ``tokens`` each, and logits over the whole vocabulary
    at ``scored`` of them."""
    config = base.config.get_text_config()
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    size = next(p.dtype.itemsize for p in base.parameters() if p.is_floating_point())
    if device.type != "cuda":
        return max(1, min(draws, CPU_BYTES // max(tokens * inner * size, 1)))
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    free += reserved - torch.cuda.memory_allocated(device)
    # What lives at once in a decoder block under no_grad: hidden state, residual, q, k, v, MLP.
    each = (tokens * (4 * hidden + 3 * inner) + scored * int(config.vocab_size)) * size
    return max(1, min(draws, int(_SHARE * free) // max(each, 1)))


def chunks(
    base: Any, draws: Draws, input_ids: Tensor, tail: int | None, draws_per_pass: int | None
) -> Iterator[Draws]:
    """The draws in parts that one forward pass takes; every part gives what it would give alone.

    Parts do not split the draws of a stream that stand side by side, which share its noise; except
    on a CPU, where noise is kept from part to part, where a part would be larger than asked for.

    draws_per_pass: None chooses by ``draws_that_fit``.

    Raises:
        ValueError: draws_per_pass below 1.
    """
    S, run = len(draws), draws.tensors().draws_per_stream
    if draws_per_pass is None:
        draws_per_pass = draws_that_fit(base, S, input_ids, tail)
    if draws_per_pass < 1:
        raise ValueError(f"draws_per_pass={draws_per_pass}: expected at least 1")
    kept = draws.noise == "weight" and input_ids.device.type == "cpu"
    if draws_per_pass < run:
        step = draws_per_pass if kept else run
    else:
        step = draws_per_pass // run * run
    for start in range(0, S, step):
        yield draws if step >= S else draws[start : start + step]
