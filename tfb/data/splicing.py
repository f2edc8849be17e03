"""Prompts and choices tokenized apart, where that gives what tokenizing them together does.

A row of K choices then costs one text in place of K + 1, which is most of what a job of short rows
spends outside the model (docs/design/tokens.md).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Written = tuple[str, list[str]]  # a prompt, and the text of each choice behind it
Tokens = tuple[list[int], list[list[int]]]  # of a prompt, and of its choices as they continue it


class Splicer:
    """Joins the tokens of prompts with those of the choices that continue them.

    Where no token of the vocabulary goes on over a space, no token and no merge lies between a
    prompt and a choice that begins with one. Characters that are rewritten and added tokens that
    take the spaces beside them could still tell: such rows are left out, and every other row is
    checked with one of its choices.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokenize: Callable[[list[str]], list[list[int]]],
    ) -> None:
        self._tokenizer, self._tokenize = tokenizer, tokenize
        self._unknown = tokenizer.unk_token_id

    def __call__(self, rows: Sequence[Written]) -> list[Tokens | None]:
        """Return each row's tokens; None where they could be others."""
        found: list[Tokens | None] = [None] * len(rows)
        able = {i: row[1] for i, row in enumerate(rows) if self._is_able(*row)}
        distinct = list(dict.fromkeys(chain.from_iterable(able.values())))
        if not distinct:
            return found
        letter, *after = self._tokenize(["a", *(f"a{end}" for end in distinct)])
        if any(ids[: len(letter)] != letter for ids in after):
            return found
        known = {end: ids[len(letter) :] for end, ids in zip(distinct, after, strict=True)}
        checked = {i: ends[i % len(ends)] for i, ends in able.items()}
        texts = self._tokenize([rows[i][0] + end for i, end in checked.items()])
        for (i, end), ids in zip(checked.items(), texts, strict=True):
            prompt, tokens = ids[: -len(known[end])], [known[e] for e in able[i]]
            whole = prompt and prompt + known[end] == ids
            # A prompt's last character that has no token may hide what happened to the space.
            if whole and prompt[-1] not in self._spaces and self._unknown not in chain(*tokens):
                found[i] = prompt, tokens
        return found

    def _is_able(self, prompt: str, ends: list[str]) -> bool:
        """Tell whether a prompt and what stands behind it may be tokenized apart."""
        return (
            self._breaks_at_spaces
            and not prompt.endswith(self._added_tokens)
            and _is_plain(prompt[-1:])
            and all(end[0] == " " and _is_plain(end[1:2]) for end in ends)
        )

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())

    @cached_property
    def _added_tokens(self) -> tuple[str, ...]:
        return tuple(str(token) for token in self._tokenizer.added_tokens_decoder.values())

    @property
    def _marks(self) -> str:
        """What stands for a space in tokens: SentencePiece's "▁", or "Ġ" of bytes."""
        return "▁ " if "▁" in self._vocabulary else "▁Ġ "

    @cached_property
    def _breaks_at_spaces(self) -> bool:
        """Whether no token goes on over a space; after a line break it may: no prompt ends so."""
        over = re.compile(rf"[^{self._marks}\sĊčĉ][{self._marks}]")
        return not any(over.search(token) for token in self._vocabulary)

    @cached_property
    def _spaces(self) -> frozenset[int]:
        """The tokens that are nothing but spaces."""
        found = self._vocabulary.items()
        return frozenset(i for token, i in found if not token.strip(self._marks))


def _is_plain(character: str) -> bool:
    """Tell whether no tokenizer takes it for a space, or writes a space with it."""
    return character.isalnum() or (character != "" and character in string.punctuation)
