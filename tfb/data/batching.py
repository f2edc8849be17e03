"""Encoded rows, and the padded batches a model reads.

Glossary: N rows, B rows of one batch, T tokens of its longest row, K choices (or classes) of a row,
L tokens of a choice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

NO_LABEL = -100
"""Marks an unlabelled row in `Batch.labels`; torch's losses ignore it."""
NO_TOKEN = -1
"""Fills `label_ids` [B, K, L] where a choice has fewer than L tokens."""
PADDING = 0.1
"""Most of a batch of `token_batches` that may be padding."""


@dataclass(frozen=True, repr=False)
class EncodedRows:
    """N rows as token ids, in the rows' order. Lists run over rows and are not to be changed.

    Attributes:
        ids: the rows' own.
        input_ids: what the model reads.
        label_ids: vocabulary ids of the choices, length K_i; () for rows that are in `choice_ids`;
            None for text rows and prompts.
        labels: index of the right choice or class; None where a row is unlabelled.
        choices: as text, an answer as the only one; None for text rows and prompts.
        num_labels: classes of text rows; None for any other.
        token_type_ids: segment ids, from tokenizers that yield them (BERT).
        choice_ids: tokens of each of the K_i choices, for rows with a choice of several tokens;
            None for any other row, or for all of them.
        truncated: how many tokens were left out; None: none of any row.
        new_tokens: how many the model may write behind each row.
    """

    ids: list[str]
    input_ids: list[list[int]]
    label_ids: list[tuple[int, ...]] | None
    labels: list[int | None]
    choices: list[tuple[str, ...]] | None
    num_labels: int | None = None
    token_type_ids: list[list[int]] | None = None
    choice_ids: list[tuple[tuple[int, ...], ...] | None] | None = None
    truncated: list[int] | None = None
    new_tokens: int = 0

    def __repr__(self) -> str:
        return f"EncodedRows({len(self)} rows, {sum(map(len, self.input_ids))} tokens)"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def rows_cut(self) -> int:
        """The number of rows of which tokens were left out."""
        return sum(cut > 0 for cut in self.truncated or ())

    def num_choices(self, index: int) -> int:
        """Return the number of choices or classes of the row at `index`; 0 for a prompt."""
        if (choices := self.choice_tokens(index)) is not None:
            return len(choices)
        if self.label_ids is not None:
            return len(self.label_ids[index])
        return self.num_labels or 0

    def choice_tokens(self, index: int) -> tuple[tuple[int, ...], ...] | None:
        """Return the entry of `choice_ids` of the row at `index`."""
        return None if self.choice_ids is None else self.choice_ids[index]

    def subset(self, indices: Iterable[int]) -> EncodedRows:
        """Return the rows at `indices`, in that order."""
        keep, columns = list(indices), {f.name: getattr(self, f.name) for f in fields(self)}
        lists = {name: column for name, column in columns.items() if isinstance(column, list)}
        kept: dict[str, Any] = {name: [column[i] for i in keep] for name, column in lists.items()}
        return replace(self, **kept)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256, in hex, of all that a model could see or be judged by, in the rows' order."""
        digest = hashlib.sha256(json.dumps(["tfb-rows-1", self.num_labels]).encode())
        columns = (self.label_ids, self.labels, self.choices, self.token_type_ids)
        for i, row_id in enumerate(self.ids):
            row: list[Any] = [row_id, self.input_ids[i]]
            row += [None if column is None else column[i] for column in columns]
            if (tokens := self.choice_tokens(i)) is not None:
                row.append(tokens)  # for these rows alone: the hash of others stays what it was
            digest.update(json.dumps(row, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()


@dataclass(frozen=True)
class Batch:
    """B rows padded to T tokens. All tensors are int64.

    Attributes:
        input_ids: [B, T].
        attention_mask: [B, T], 1 at tokens and 0 at padding.
        indices: [B], positions of the rows in the `EncodedRows`; restores their order.
        labels: [B], NO_LABEL where a row is unlabelled.
        label_ids: [B, K], head columns of the choices; [B, K, L] for choices of several tokens
            (NO_TOKEN after the end of shorter ones); None for text rows and prompts.
        token_type_ids: [B, T], only from tokenizers that yield them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    indices: Tensor
    labels: Tensor
    label_ids: Tensor | None = None
    token_type_ids: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def model_inputs(self) -> dict[str, Tensor]:
        """Return what a tokenizer would: input_ids, attention_mask[, token_type_ids]."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = self.token_type_ids
        return inputs


def batches(
    encoded: EncodedRows,
    *,
    batch_size: int,
    pad_token_id: int,
    padding_side: str = "left",
) -> Iterator[Batch]:
    """Pad rows to batches of one kind: as many choices, and all or none of several tokens.

    Kinds come in the order of their first row; of each, the longest rows come first, so that a
    batch too large for memory fails at once. `Batch.indices` restores the rows' order.

    Args:
        encoded: the rows.
        batch_size: most rows of a batch.
        pad_token_id: fills the shorter rows.
        padding_side: "left" or "right".

    Raises:
        ValueError: `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    kinds: dict[tuple[int, bool], list[int]] = {}
    for i in range(len(encoded)):
        kinds.setdefault((encoded.num_choices(i), encoded.choice_tokens(i) is None), []).append(i)
    for rows in kinds.values():
        rows.sort(key=lambda i: -len(encoded.input_ids[i]))
    return (
        _collate(encoded, rows[start : start + batch_size], pad_token_id, padding_side)
        for rows in kinds.values()
        for start in range(0, len(rows), batch_size)
    )


def _collate(encoded: EncodedRows, rows: list[int], pad_token_id: int, side: str) -> Batch:
    def pad(sequences: list[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(s, dtype=torch.int64) for s in sequences]
        return pad_sequence(tensors, True, value, padding_side=side)

    chosen = encoded.subset(rows)
    ids, types, label_ids = chosen.input_ids, chosen.token_type_ids, None
    if several := [choices for choices in chosen.choice_ids or () if choices is not None]:
        label_ids = pad_choices(several)
    elif chosen.label_ids is not None:
        label_ids = torch.tensor(chosen.label_ids)
    return Batch(
        input_ids=pad(ids, pad_token_id),
        attention_mask=pad([[1] * len(s) for s in ids], 0),
        indices=torch.tensor(rows),
        labels=torch.tensor([NO_LABEL if label is None else label for label in chosen.labels]),
        label_ids=label_ids,
        token_type_ids=None if types is None else pad(types, 0),
    )


def pad_choices(rows: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Return [B, K, L] int64: the tokens of each row's K choices, NO_TOKEN after short ones."""
    L = max(len(tokens) for row in rows for tokens in row)
    padded = [[[*tokens, *[NO_TOKEN] * (L - len(tokens))] for tokens in row] for row in rows]
    return torch.tensor(padded, dtype=torch.int64)


# --- batches by a budget of tokens ----------------------------------------------------------------


def token_batches(
    encoded: EncodedRows, budget: int, rows: Iterable[int] | None = None
) -> list[list[int]]:
    """Part rows into batches of at most ``budget`` tokens, padding and new ones included.

    Batches of the longest rows come first. Rows of a batch have the same number of choices and
    similar lengths. Among rows of similar length, those that begin alike meet in a batch: the
    engine computes their prefix once.

    Args:
        encoded: the rows.
        budget: most tokens of a batch; a row that is longer is a batch of its own.
        rows: positions to be distributed, in any order; None: all.
    """
    ids, num_choices = encoded.input_ids, encoded.num_choices

    def length(i: int) -> int:
        return len(ids[i]) + encoded.new_tokens

    def order(i: int) -> tuple[int, int, list[int], int]:
        bucket = int(log(length(i), 1 / (1 - PADDING)))  # its lengths differ by less than PADDING
        return num_choices(i), -bucket, ids[i], i

    found: list[list[int]] = []
    longest = tokens = 0
    for i in sorted(range(len(encoded)) if rows is None else rows, key=order):
        batch, n = found[-1] if found else [], length(i)
        longest, tokens = max(longest, n), tokens + n
        padded = longest * (len(batch) + 1)
        joins = padded <= budget and tokens >= (1 - PADDING) * padded
        if batch and joins and num_choices(batch[0]) == num_choices(i):
            batch.append(i)
        else:
            found.append([i])
            longest = tokens = n
    return sorted(found, key=lambda batch: -max(map(length, batch)))


def padded_tokens(encoded: EncodedRows, batch: list[int]) -> int:
    """Return the tokens of a batch, with padding and new ones: rows x longest row."""
    return len(batch) * (max(len(encoded.input_ids[i]) for i in batch) + encoded.new_tokens)
