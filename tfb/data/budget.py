"""Batches by a budget of tokens instead of a number of rows."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from tfb.data.batching import EncodedRows

BUCKET = 1.125  # lengths of a bucket differ by less than this factor
FIXED = 256  # tokens that cost about as much as one pass more: padding that is worth saving one


def token_batches(
    encoded: EncodedRows, budget: int, rows: Iterable[int] | None = None, *, copies: int = 1
) -> list[list[int]]:
    """Rows in batches whose rows x longest row stay within ``budget`` tokens; longest rows first.

    Rows of a batch have the same number of choices. They lie in one bucket of lengths, in which
    they are sorted by their tokens: rows that begin alike meet in a batch, where the engine
    computes their prefix once. Then neighbours are joined where the budget holds both and padding
    costs less than one more batch. A row longer than the budget is a batch of its own.

    Args:
        rows: positions to be distributed; None: all. The result depends on them as a set only.
        copies: of every row in a pass, the draws in full mode: they share what a batch costs.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i in sorted(range(len(encoded)) if rows is None else rows):
        bucket = _bucket(len(encoded.input_ids[i]))
        groups.setdefault((-bucket, encoded.num_choices(i)), []).append(i)
    found: list[list[int]] = []
    for _, group in sorted(groups.items()):
        group.sort(key=lambda i: encoded.input_ids[i])
        batch: list[int] = []
        longest = 0
        for i in group:
            length = max(longest, len(encoded.input_ids[i]))
            if batch and length * (len(batch) + 1) > budget:
                found.append(batch)
                batch, length = [], len(encoded.input_ids[i])
            batch.append(i)
            longest = length
        found.append(batch)
    return _joined(encoded, found, budget, FIXED // copies)


def _joined(
    encoded: EncodedRows, found: list[list[int]], budget: int, worth: int
) -> list[list[int]]:
    """Neighbouring batches, longest first, joined where that costs at most ``worth`` tokens."""
    joined: list[list[int]] = []
    for batch in found:
        if joined and encoded.num_choices(joined[-1][0]) == encoded.num_choices(batch[0]):
            both = joined[-1] + batch
            tokens = padded_tokens(encoded, both)
            added = tokens - padded_tokens(encoded, joined[-1]) - padded_tokens(encoded, batch)
            if tokens <= budget and added <= worth:
                both.sort(key=lambda i: encoded.input_ids[i])
                joined[-1] = both
                continue
        joined.append(batch)
    return joined


def padded_tokens(encoded: EncodedRows, batch: list[int]) -> int:
    """Tokens of a batch with its padding: rows x longest row."""
    return len(batch) * max(len(encoded.input_ids[i]) for i in batch)


@cache
def _bucket(length: int) -> int:
    """The number of a length's bucket; buckets widen by ``BUCKET``, by one token at least."""
    bucket, end = 0, 1
    while end < length:
        bucket, end = bucket + 1, max(end + 1, int(end * BUCKET))
    return bucket
