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
from typing import Any

import torch
from torch import Tensor

NO_LABEL = -100
"""Marks an unlabelled row in `Batch.labels`; torch's losses ignore it."""
NO_TOKEN = -1
"""Fills `label_ids` [B, K, L] where a choice has fewer than L tokens."""


@dataclass(frozen=True)
class EncodedRows:
    """N rows as token ids, in the rows' order. Lists run over rows and are not to be changed."""

    ids: list[str]
    input_ids: list[list[int]]
    label_ids: list[tuple[int, ...]] | None
    """Per row the vocabulary ids of its choices, length K_i; () for rows that are in `choice_ids`;
    None for text rows."""
    labels: list[int | None]
    """Index into the row's choices, or the class; None where the row is unlabelled."""
    choices: list[tuple[str, ...]] | None
    num_labels: int | None = None
    """Number of classes of text rows; None for choice rows."""
    token_type_ids: list[list[int]] | None = None
    """Segment ids, for tokenizers that yield them (BERT)."""
    choice_ids: list[tuple[tuple[int, ...], ...] | None] | None = None
    """Per row the tokens of each of its K_i choices, for rows with a choice of several tokens; None
    for any other row, or for all of them."""
    truncated: list[int] | None = None
    """Per row how many tokens were left out; None: none of any."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def rows_cut(self) -> int:
        """The number of rows of which tokens were left out."""
        return sum(cut > 0 for cut in self.truncated or ())

    def num_choices(self, index: int) -> int:
        """Number of classes the row at `index` is scored over."""
        if (choices := self.choice_tokens(index)) is not None:
            return len(choices)
        if self.label_ids is not None:
            return len(self.label_ids[index])
        assert self.num_labels is not None  # one of the two is always there
        return self.num_labels

    def choice_tokens(self, index: int) -> tuple[tuple[int, ...], ...] | None:
        """The row's entry of `choice_ids`."""
        return None if self.choice_ids is None else self.choice_ids[index]

    def subset(self, indices: Iterable[int]) -> EncodedRows:
        """The rows at `indices`, in that order."""
        keep = list(indices)
        return replace(
            self,
            ids=[self.ids[i] for i in keep],
            input_ids=[self.input_ids[i] for i in keep],
            label_ids=None if self.label_ids is None else [self.label_ids[i] for i in keep],
            labels=[self.labels[i] for i in keep],
            choices=None if self.choices is None else [self.choices[i] for i in keep],
            token_type_ids=None
            if self.token_type_ids is None
            else [self.token_type_ids[i] for i in keep],
            choice_ids=None if self.choice_ids is None else [self.choice_ids[i] for i in keep],
            truncated=None if self.truncated is None else [self.truncated[i] for i in keep],
        )

    @cached_property
    def content_hash(self) -> str:
        """SHA-256, in hex, of all that a model could see or be judged by, in the rows' order."""
        digest = hashlib.sha256(json.dumps(["tfb-rows-1", self.num_labels]).encode())
        for i, row_id in enumerate(self.ids):
            row: list[Any] = [
                row_id,
                self.input_ids[i],
                None if self.label_ids is None else self.label_ids[i],
                self.labels[i],
                None if self.choices is None else self.choices[i],
                None if self.token_type_ids is None else self.token_type_ids[i],
            ]
            if (tokens := self.choice_tokens(i)) is not None:
                row.append(tokens)  # for these rows alone: the hash of others stays what it was
            digest.update(json.dumps(row, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()


@dataclass(frozen=True)
class Batch:
    """B rows padded to T tokens. All tensors are int64."""

    input_ids: Tensor
    """[B, T]"""
    attention_mask: Tensor
    """[B, T], 1 at tokens and 0 at padding."""
    indices: Tensor
    """[B], positions of the rows in the `EncodedRows`; restores their order."""
    label_ids: Tensor | None = None
    """[B, K], head columns of the choices; [B, K, L] for choices of several tokens (NO_TOKEN after
    the end of shorter ones); None for text rows."""
    labels: Tensor | None = None
    """[B], NO_LABEL where a row is unlabelled; None where none of the batch has a label."""
    token_type_ids: Tensor | None = None
    """[B, T], only from tokenizers that yield them."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def position_ids(self) -> Tensor:
        """[B, T], counted from the row's first token: decoders need them under left padding."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    def model_inputs(self) -> dict[str, Tensor]:
        """What the tokenizer would have returned: input_ids, attention_mask[, token_type_ids]."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = self.token_type_ids
        return inputs

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: t.to(device) for name, t in tensors.items() if t is not None}
        return replace(self, **moved)


def batches(
    encoded: EncodedRows,
    *,
    batch_size: int,
    pad_token_id: int,
    padding_side: str = "left",
    sort_by_length: bool = False,
) -> Iterator[Batch]:
    """Batches of at most `batch_size` rows, all with the same number of choices, and all or none of
    them with choices of several tokens.

    Groups of one kind come in the order of their first row, rows of a group in the rows' order, or,
    with `sort_by_length`, longest first: less padding, and a batch too large for memory fails at
    once. `Batch.indices` restores the order either way.

    Raises:
        ValueError: `batch_size` below 1, or a `padding_side` other than "left" and "right".
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    return _batches(encoded, batch_size, pad_token_id, padding_side == "left", sort_by_length)


def _batches(
    encoded: EncodedRows, batch_size: int, pad_token_id: int, left: bool, sort_by_length: bool
) -> Iterator[Batch]:
    groups: dict[tuple[int, bool], list[int]] = {}
    for i in range(len(encoded)):
        kind = encoded.num_choices(i), encoded.choice_tokens(i) is None
        groups.setdefault(kind, []).append(i)
    for group in groups.values():
        if sort_by_length:
            group.sort(key=lambda i: -len(encoded.input_ids[i]))  # stable: ties keep their order
        for start in range(0, len(group), batch_size):
            yield _collate(encoded, group[start : start + batch_size], pad_token_id, left)


def _collate(encoded: EncodedRows, rows: list[int], pad_token_id: int, left: bool) -> Batch:
    length = max(len(encoded.input_ids[i]) for i in rows)

    def pad(sequences: list[list[int]], value: int) -> Tensor:
        gaps = [[value] * (length - len(s)) for s in sequences]
        pairs = zip(gaps, sequences, strict=True)
        return torch.tensor([gap + s if left else s + gap for gap, s in pairs], dtype=torch.int64)

    tokens = [encoded.input_ids[i] for i in rows]
    types = encoded.token_type_ids
    labels = [encoded.labels[i] for i in rows]
    labelled = any(label is not None for label in labels)
    return Batch(
        input_ids=pad(tokens, pad_token_id),
        attention_mask=pad([[1] * len(s) for s in tokens], 0),
        indices=torch.tensor(rows, dtype=torch.int64),
        label_ids=_label_ids(encoded, rows),
        labels=torch.tensor([NO_LABEL if y is None else y for y in labels]) if labelled else None,
        token_type_ids=None if types is None else pad([types[i] for i in rows], 0),
    )


def _label_ids(encoded: EncodedRows, rows: list[int]) -> Tensor | None:
    choices = [c for c in map(encoded.choice_tokens, rows) if c is not None]
    if choices:
        return pad_choices(choices)
    columns = encoded.label_ids
    return None if columns is None else torch.tensor([columns[i] for i in rows])


def pad_choices(rows: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """[B, K, L] int64: the tokens of each row's K choices, NO_TOKEN after the end of short ones."""
    L = max(len(tokens) for row in rows for tokens in row)
    padded = [[[*tokens, *[NO_TOKEN] * (L - len(tokens))] for tokens in row] for row in rows]
    return torch.tensor(padded, dtype=torch.int64)
