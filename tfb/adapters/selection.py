"""Which adapted modules become Bayesian: the ``layers=`` argument of ``tfb.bayesianize``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LayerPredicate = Callable[[str], bool]


@dataclass(frozen=True)
class LastLayers:
    """The adapted modules of the last k transformer blocks, and whatever comes after them."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ValueError(f"last_layers({self.k}): expected k >= 0")


def last_layers(k: int) -> LastLayers:
    """Only the last ``k`` blocks that the adapter touches, and modules outside blocks (a head).

    ``last_layers(0)`` keeps only modules outside any block: last-layer TFB. Blocks are numbered
    by the first number in a module's qualified name ("model.layers.11.mlp.up_proj": block 11).
    """
    return LastLayers(k)


def block_number(name: str) -> int | None:
    """The first numeric component of a qualified name, or None (an embedding, a head)."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def select_layers(
    names: Sequence[str], layers: str | LayerPredicate | LastLayers | None
) -> list[str]:
    """The names that ``layers`` selects, in order.

    Args:
        names: qualified names of all adapted modules.
        layers: None (all), a regular expression (``re.search`` on the name), a predicate of the
            name, or :func:`last_layers`.

    Raises:
        ValueError: a broken regular expression, or nothing selected (the names are listed).
        TypeError: anything else.
    """
    if layers is None:
        chosen = list(names)
    elif isinstance(layers, LastLayers):
        blocks = sorted({b for b in map(block_number, names) if b is not None})
        keep = set(blocks[-layers.k :]) if layers.k else set()
        chosen = [n for n in names if (b := block_number(n)) is None or b in keep]
    elif isinstance(layers, str):
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise ValueError(f"layers={layers!r} is not a regular expression: {error}") from error
        chosen = [n for n in names if pattern.search(n)]
    elif callable(layers):
        chosen = [n for n in names if layers(n)]
    else:
        raise TypeError(
            f"layers: expected None, a regular expression, a predicate of the module's name or "
            f"tfb.last_layers(k), got {type(layers).__name__}"
        )
    if not chosen:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(f"layers={layers!r} selects none of the {len(names)} modules: {shown}")
    return chosen
