"""Batches by token budget: every row once, within the budget, whatever the order."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfb.data.batching import BUCKET, FIXED, EncodedRows, padded_tokens, token_batches

ROWS = st.lists(
    st.tuples(st.lists(st.integers(4, 6), min_size=1, max_size=40), st.integers(2, 3)), max_size=30
)


def encoded(rows: list[tuple[list[int], int]]) -> EncodedRows:
    return EncodedRows(
        ids=[str(i) for i in range(len(rows))],
        input_ids=[ids for ids, _ in rows],
        label_ids=[tuple(range(k)) for _, k in rows],
        labels=[None] * len(rows),
        choices=None,
    )


@given(ROWS, st.integers(1, 200))
def test_every_row_once_within_the_budget(rows: list[tuple[list[int], int]], budget: int) -> None:
    data = encoded(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tfb.data.batching.FIXED", 0)  # joined only where nothing is padded
        apart = token_batches(data, budget)
    for batch in apart:
        lengths = [len(data.input_ids[i]) for i in batch]
        # One bucket: what padding adds is bounded.
        assert max(lengths) <= max(min(lengths), min(lengths) * BUCKET)
    found = token_batches(data, budget)
    # Every batch that is saved costs so much padding at most.
    more = sum(padded_tokens(data, b) for b in found) - sum(padded_tokens(data, b) for b in apart)
    assert 0 <= more <= FIXED * (len(apart) - len(found))
    assert sorted(i for batch in found for i in batch) == list(range(len(rows)))
    for batch in found:
        assert len(batch) == 1 or padded_tokens(data, batch) <= budget
        assert len({data.num_choices(i) for i in batch}) == 1
    # Longest first: a batch that is too large fails at once.
    longest = [max(len(data.input_ids[i]) for i in batch) for batch in found]
    assert all(later <= first for first, later in pairwise(longest))


@given(ROWS, st.integers(1, 200), st.randoms(use_true_random=False))
def test_rows_are_a_set(rows: list[tuple[list[int], int]], budget: int, random: object) -> None:
    data = encoded(rows)
    some = list(range(0, len(rows), 2))
    mixed = list(some)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert token_batches(data, budget, mixed) == token_batches(data, budget, some)


def test_rows_that_begin_alike_meet() -> None:
    """Two preambles, alternating in the input: each gets batches of its own, where the budget does
    not hold both."""
    rows = [([5] * 8 + [i % 3 + 4], 2) if i % 2 else ([6] * 8 + [i % 3 + 4], 2) for i in range(12)]
    data = encoded(rows)
    for batch in token_batches(data, 6 * 9):
        assert len({tuple(data.input_ids[i][:8]) for i in batch}) == 1
