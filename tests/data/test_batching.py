"""Batches: every row once, padded as models read them, within a budget, whatever the order."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfb.data.batching import (
    NO_LABEL,
    NO_TOKEN,
    PADDING,
    EncodedRows,
    batches,
    padded_tokens,
    token_batches,
)

# Of one token and of several, of two and of three choices.
MIXED = EncodedRows(
    ids=["a", "b", "c", "d"],
    input_ids=[[5, 6, 7], [5], [8, 6, 7, 9], [6, 6]],
    label_ids=[(1, 2), (1, 2, 3), (3, 1), ()],
    labels=[1, None, 0, None],
    choices=[("A", "B"), ("A", "B", "C"), ("C", "A"), ("A", "Bx")],
    choice_ids=[None, None, None, ((1,), (2, 9))],
    truncated=[0, 0, 2, 0],
)


def test_batches_of_one_kind() -> None:
    """Rows of another number of choices, or scored by several tokens, never share a batch."""
    two, three, several = batches(MIXED, batch_size=8, pad_token_id=0)
    assert [b.indices.tolist() for b in (two, three, several)] == [[2, 0], [1], [3]]
    assert two.input_ids.tolist() == [[8, 6, 7, 9], [0, 5, 6, 7]]
    assert two.attention_mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert two.label_ids is not None and two.label_ids.tolist() == [[3, 1], [1, 2]]
    assert two.labels.tolist() == [0, 1]
    assert three.labels.tolist() == [NO_LABEL] and len(three) == 1
    assert several.label_ids is not None
    assert several.label_ids.tolist() == [[[1, NO_TOKEN], [2, 9]]]
    longest = next(batches(MIXED, batch_size=1, pad_token_id=0))
    assert longest.indices.tolist() == [2]
    assert [MIXED.num_choices(i) for i in range(4)] == [2, 3, 2, 2]


def test_prompts_have_room_for_what_is_written() -> None:
    """They have no choices, share batches, and new tokens count in the budget."""
    prompts = EncodedRows(list("abcd"), [[5] * 10] * 4, None, [None] * 4, None, new_tokens=5)
    assert prompts.num_choices(0) == 0 and prompts.choice_tokens(0) is None
    (batch,) = batches(prompts, batch_size=4, pad_token_id=0)
    assert batch.label_ids is None and batch.labels.tolist() == [NO_LABEL] * 4
    assert token_batches(prompts, 60) == [[0, 1, 2, 3]] and padded_tokens(prompts, [0, 1]) == 30
    assert token_batches(prompts, 59) == [[0, 1, 2], [3]]
    assert token_batches(prompts, 1) == [[0], [1], [2], [3]]
    unequal = replace(prompts, input_ids=[[5] * n for n in (1, 4, 8, 10)], new_tokens=100)
    (one,) = token_batches(unequal, 440)  # of which little is padding
    assert sorted(one) == [0, 1, 2, 3]


def test_batch_arguments() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        batches(MIXED, batch_size=0, pad_token_id=0)


def test_subset_and_content_hash() -> None:
    """The hash follows all that is read or judged, and is that of 0.1.0."""
    assert MIXED.subset(range(4)) == MIXED and MIXED.rows_cut == 1
    found = MIXED.subset([3, 0])
    assert found.ids == ["d", "a"] and found.labels == [None, 1] and len(found) == 2
    assert found.choice_ids == [((1,), (2, 9)), None] and found.truncated == [0, 0]
    plain = MIXED.subset([0])
    before = hashlib.sha256(json.dumps(["tfb-rows-1", None]).encode())
    fields = ["a", [5, 6, 7], [1, 2], 1, ["A", "B"], None]
    before.update(json.dumps(fields, separators=(",", ":")).encode() + b"\n")
    assert plain.content_hash == before.hexdigest()
    assert replace(plain, choice_ids=None).content_hash == plain.content_hash
    others = [
        MIXED,
        found,
        MIXED.subset([0, 3]),
        replace(plain, labels=[0]),
        replace(plain, ids=["b"]),
        replace(plain, input_ids=[[1]]),
        replace(plain, label_ids=[(1, 3)]),
        *(
            replace(plain, label_ids=[()], choice_ids=[ids])
            for ids in (((1,), (2, 3)), ((1,), (2, 4)), ((1, 2), (3,)))
        ),
    ]
    assert len({e.content_hash for e in [plain, *others]}) == 1 + len(others)


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


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(2, 4)), min_size=1, max_size=20),
    batch_size=st.integers(1, 6),
    side=st.sampled_from(["left", "right"]),
)
def test_batches_hold_every_row_once(
    shapes: list[tuple[int, int]], batch_size: int, side: str
) -> None:
    rows = [([100 * i + t for t in range(1, n + 1)], k) for i, (n, k) in enumerate(shapes)]
    data = encoded(rows)
    seen: list[int] = []
    for batch in batches(data, batch_size=batch_size, pad_token_id=0, padding_side=side):
        assert 1 <= len(batch) <= batch_size
        assert batch.attention_mask.sum(-1).max() == batch.input_ids.shape[1]
        for ids, mask, index in zip(
            batch.input_ids, batch.attention_mask, batch.indices.tolist(), strict=True
        ):
            assert ids[mask.bool()].tolist() == data.input_ids[index]
            assert mask[-1 if side == "left" else 0] == 1
            seen.append(index)
    assert sorted(seen) == list(range(len(shapes)))


@given(ROWS, st.integers(1, 200))
def test_every_row_once_within_the_budget(rows: list[tuple[list[int], int]], budget: int) -> None:
    data = encoded(rows)
    found = token_batches(data, budget)
    assert sorted(i for batch in found for i in batch) == list(range(len(rows)))
    for batch in found:
        assert len(batch) == 1 or padded_tokens(data, batch) <= budget
        tokens = sum(len(data.input_ids[i]) for i in batch)
        assert tokens >= (1 - PADDING) * padded_tokens(data, batch)
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
