"""Counting passes by tokens."""

from __future__ import annotations

import pytest
import torch

from tfb.search.cost import PassCounter, passes_per_row

LENGTHS = [3, 7, 20]


@pytest.mark.parametrize(
    ("draws", "tail", "passes"),
    [
        (1, None, 1.0),
        (10, None, 10.0),
        (1, 5, 1.0),
        (10, 5, 1 + 9 * (3 + 5 + 5) / 30),
        (10, 1, 1 + 9 * 3 / 30),
        (10, 20, 10.0),
    ],
)
def test_passes_per_row(draws: int, tail: int | None, passes: float) -> None:
    """1 + (S - 1) k / T, k at most the row's length; as the search counts a sweep."""
    assert passes_per_row(LENGTHS, draws, tail) == pytest.approx(passes, rel=1e-14)
    mask = torch.arange(20) < torch.tensor(LENGTHS)[:, None]
    counter = PassCounter([{"input_ids": mask.long(), "attention_mask": mask.long()}], tail)
    counter.spend(torch.arange(3), draws)
    assert counter.passes == pytest.approx(passes, rel=1e-14)
