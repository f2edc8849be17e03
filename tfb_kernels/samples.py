"""``Samples``: what every implementation of the operators is told of a layer and of its draws."""

from typing import NamedTuple

from torch import Tensor


class Samples(NamedTuple):
    """S draws from one layer's posterior: its factors, and which noise each draw has.

    The operators' schemas list these fields in this order.

    Attributes:
        A: [r, n], A' of the paper.
        B: [m, r], B' of the paper.
        inv_d: [r], 1 / d_i.
        sigmas: [S] float, contiguous.
        streams: [Q] int64, without repeats.
        stream_index: [S] int64, each draw's place in ``streams``.
        run: consecutive draws that share a stream, S = Q * run; 1: ``stream_index`` is arbitrary.
        seed: int64 scalar; a tensor, so that the replay of a graph sees new ones.
        layer_id: unsigned 32 bits.
        scaling: LoRA's alpha / r.
    """

    A: Tensor
    B: Tensor
    inv_d: Tensor
    sigmas: Tensor
    streams: Tensor
    stream_index: Tensor
    run: int
    seed: Tensor
    layer_id: int
    scaling: float


# The fields as a torch operator's schema names them: "Tensor A, Tensor B, ...". It needs the
# annotations as classes, so this file does not import annotations from __future__.
SCHEMA = ", ".join(f"{kind.__name__} {name}" for name, kind in Samples.__annotations__.items())
