"""Task rows to token ids: which tokens the model reads, and which head columns are the choices.

Choice rows (causal language models). A choice is scored by the tokens that continue the prompt with
it. ' A' and 'A' are different tokens, and which of them follows the prompt is the tokenizer's
business, so prompt + choice is tokenized as one text and what follows the prompt's own tokens is
taken:

1. Join. Where neither the prompt ends nor the choice starts with whitespace, `separator` (one
   space) goes between them. "Topic" + "A" is read as "Topic A".
2. The prompt's tokens must be a prefix of the whole text's tokens. Where they are not ("Answer: "
   + "A", where most tokenizers have a token " A"), the whitespace that ends the prompt is moved
   into the choices, for all choices of the row alike. Where that does not help: `RowError`.
3. Tokens that are whitespace alone and lead the continuation are dropped: a tokenizer without a
   token for " A" writes it as " ", "A", and the choice is told apart by the second one.
4. What remains differs from choice to choice, and holds no unknown token.

Where one token of each choice remains, these are the row's *label tokens*: it is scored by their
columns of the logits right after the prompt. A row with a longer choice is scored by summed
log-probabilities (`tfb.choices`), all of its choices alike. For choices of one token that is the
same thing: a softmax over log-probabilities is a softmax over logits. Step 3 is the same for both
kinds of rows for that reason: what is dropped is neither read nor scored, so that the odds of two
letters do not change because a third choice of the row is a word. One choice may be the beginning
of another; its summed log-probability is then never the smaller one.

Special tokens in front (BOS) are kept, those at the end (EOS, SEP) are removed from choice rows:
the model is to continue the prompt. Text rows keep what the tokenizer adds.

Nothing is ever truncated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from tfb.batching import EncodedRows
from tfb.rows import Row, RowError

Tokenizer = Any  # a transformers tokenizer; importing its type would import all of transformers

# Rows tokenized in one call: enough to occupy the tokenizer, small enough for memory.
CHUNK = 1024
# What stands for whitespace inside tokens: SentencePiece's mark, the byte-level alphabet's space,
# newline, tab and return, and byte fallback.
_SPACE_MARKS = "▁ĠĊĉč \t\n\r"
_SPACE_BYTES = {"<0x09>", "<0x0A>", "<0x0D>", "<0x20>"}


def encode_choices(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    separator: str = " ",
) -> EncodedRows:
    """Token ids of the prompts and of the choices; the rule is at the top of the file.

    Args:
        rows: choice rows; the number of choices may differ from row to row.
        max_length: the most tokens a prompt may have, the model's number of positions;
            None: the tokenizer's own `model_max_length`.
        separator: goes between prompt and choice where neither brings whitespace; "" joins them
            directly, for scripts without spaces.

    Raises:
        RowError: no rows, a text row, a prompt with its choices longer than `max_length`, a choice
            with tokens unknown to the tokenizer, two choices of the same tokens, or a prompt that
            merges with its choices.
    """
    _check_choice_rows(rows)
    tail = _added_at_end(tokenizer)
    input_ids: list[list[int]] = []
    continuations: list[tuple[tuple[int, ...], ...]] = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        pairs = [_join(row, separator) for row in chunk]
        found = _split(tokenizer, tail, pairs)
        retry = [i for i, row in enumerate(found) if row is None and pairs[i][0][-1].isspace()]
        moved = _split(tokenizer, tail, [_move_whitespace(*pairs[i]) for i in retry])
        found = list(found)
        for i, again in zip(retry, moved, strict=True):
            found[i] = again
        for row, tokens in zip(chunk, found, strict=True):
            if tokens is None:
                _fail(
                    row,
                    "the last token of the prompt merges with the first of a choice",
                    "end the prompt differently, for instance with a colon or a whole word",
                )
            input_ids.append(tokens[0])
            continuations.append(_choice_tokens(row, tokens[1], tokenizer))
    # A choice's last token is scored but never read.
    longest = [max(map(len, choices)) for choices in continuations]
    lengths = [len(ids) + n - 1 for ids, n in zip(input_ids, longest, strict=True)]
    _check_lengths(rows, lengths, tokenizer, max_length)
    return EncodedRows(
        ids=[row.id for row in rows],
        input_ids=input_ids,
        label_ids=[
            tuple(ids for (ids,) in choices) if n == 1 else ()
            for choices, n in zip(continuations, longest, strict=True)
        ],
        labels=[row.label for row in rows],
        choices=[row.choices or () for row in rows],
        choice_ids=None
        if max(longest) == 1
        else [None if n == 1 else c for c, n in zip(continuations, longest, strict=True)],
    )


def encode_answers(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int | None = None
) -> EncodedRows:
    """Token ids of the prompts as an encoder reads them, and the label token of each choice as the
    first token of a decoder's answer, where nothing precedes it.

    Raises:
        RowError: no rows, a text row, a prompt longer than `max_length` (None: the tokenizer's own
            `model_max_length`), a choice of more than one token, or one that is unknown or the
            same as another.
    """
    _check_choice_rows(rows)
    input_ids = _token_ids(tokenizer, [row.prompt or "" for row in rows])
    texts = list(dict.fromkeys(choice for row in rows for choice in row.choices or ()))
    answers = tokenizer(text_target=texts, add_special_tokens=False, verbose=False)["input_ids"]
    known = dict(zip(texts, answers, strict=True))
    label_ids = []
    for row in rows:
        found = _choice_tokens(row, [list(known[c]) for c in row.choices or ()], tokenizer)
        for choice, ids in zip(row.choices or (), found, strict=True):
            if len(ids) > 1:
                _fail(
                    row,
                    f"the choice {choice!r} is an answer of {len(ids)} tokens",
                    "name the choices of an encoder-decoder by single tokens, such as letters",
                )
        label_ids.append(tuple(ids for (ids,) in found))
    _check_lengths(rows, [len(ids) for ids in input_ids], tokenizer, max_length)
    return EncodedRows(
        ids=[row.id for row in rows],
        input_ids=input_ids,
        label_ids=label_ids,
        labels=[row.label for row in rows],
        choices=[row.choices or () for row in rows],
    )


def encode_texts(
    rows: Sequence[Row], tokenizer: Tokenizer, *, num_labels: int, max_length: int | None = None
) -> EncodedRows:
    """Token ids of text rows, for a sequence-classification head of `num_labels` classes.

    Raises:
        RowError: no rows, a choice row, a label outside [0, num_labels), or a text longer than
            `max_length` (None: the tokenizer's own `model_max_length`).
        ValueError: `num_labels` below 2.
    """
    if num_labels < 2:
        raise ValueError(f"num_labels must be at least 2, got {num_labels}")
    if not rows:
        raise RowError("there are no rows to encode; give at least one")
    for row in rows:
        if row.text is None:
            _fail(row, "this is a choice row", "use rows with 'text' for a classification head")
        if row.label is not None and not 0 <= row.label < num_labels:
            _fail(
                row,
                f"the label {row.label} is outside the model's {num_labels} classes",
                f"use an index from 0 to {num_labels - 1}, or a model with that class",
            )
    batch = tokenizer([row.text for row in rows], return_attention_mask=False, verbose=False)
    input_ids = [list(ids) for ids in batch["input_ids"]]
    types = batch.get("token_type_ids")
    _check_lengths(rows, [len(ids) for ids in input_ids], tokenizer, max_length)
    return EncodedRows(
        ids=[row.id for row in rows],
        input_ids=input_ids,
        label_ids=None,
        labels=[row.label for row in rows],
        choices=None,
        num_labels=num_labels,
        token_type_ids=None if types is None else [list(ids) for ids in types],
    )


def _check_choice_rows(rows: Sequence[Row]) -> None:
    if not rows:
        raise RowError("there are no rows to encode; give at least one")
    for row in rows:
        if row.prompt is None or row.choices is None:
            _fail(row, "this is a text row", "use rows with 'prompt' and 'choices' here")
        if not row.prompt or not all(row.choices):
            _fail(row, "the prompt or a choice is empty", "write some text into it")


def _join(row: Row, separator: str) -> tuple[str, list[str]]:
    """The prompt, and its choices as they continue it."""
    prompt, choices = row.prompt or "", row.choices or ()
    bare = not prompt[-1].isspace()
    return prompt, [separator + c if bare and not c[0].isspace() else c for c in choices]


def _move_whitespace(prompt: str, choices: list[str]) -> tuple[str, list[str]]:
    """The same texts, with the whitespace that ends the prompt given to the choices."""
    short = prompt.rstrip()
    return short, [prompt[len(short) :] + choice for choice in choices]


def _split(
    tokenizer: Tokenizer, tail: int, pairs: list[tuple[str, list[str]]]
) -> list[tuple[list[int], list[list[int]]] | None]:
    """Per pair the prompt's tokens and each choice's continuation; None where they merge.

    Every text is tokenized whole. Remembering a choice's tokens from another prompt would be right
    only for tokenizers that always break at whitespace, which cannot be seen from outside.
    """
    if not pairs:
        return []
    texts = [text for prompt, choices in pairs for text in (prompt, *(prompt + c for c in choices))]
    encoded = _token_ids(tokenizer, texts)
    result: list[tuple[list[int], list[list[int]]] | None] = []
    position = 0
    for _, choices in pairs:
        prompt, *whole = (
            ids[: len(ids) - tail] for ids in encoded[position : position + 1 + len(choices)]
        )
        position += 1 + len(choices)
        merged = not prompt or any(ids[: len(prompt)] != prompt for ids in whole)
        result.append(None if merged else (prompt, [ids[len(prompt) :] for ids in whole]))
    return result


def _choice_tokens(
    row: Row, continuations: list[list[int]], tokenizer: Tokenizer
) -> tuple[tuple[int, ...], ...]:
    """The tokens by which each choice is scored."""
    found: list[tuple[int, ...]] = []
    for choice, ids in zip(row.choices or (), continuations, strict=True):
        rest = tuple(ids)
        while len(rest) > 1 and _is_space(tokenizer, rest[0]):
            rest = rest[1:]
        if not rest:
            _fail(row, f"the choice {choice!r} adds no token to this prompt", "use other choices")
        if tokenizer.unk_token_id in rest:
            _fail(row, f"the tokenizer does not know the choice {choice!r}", "use other choices")
        if rest in found:
            other = (row.choices or ())[found.index(rest)]
            same = "token" if len(rest) == 1 else "tokens"
            _fail(
                row,
                f"the choices {other!r} and {choice!r} are the same {same} "
                f"({', '.join(map(str, rest))})",
                "use choices that differ in more than whitespace, such as letters",
            )
        found.append(rest)
    return tuple(found)


def _is_space(tokenizer: Tokenizer, token_id: int) -> bool:
    token = tokenizer.convert_ids_to_tokens(token_id)
    return token in _SPACE_BYTES or (isinstance(token, str) and not token.strip(_SPACE_MARKS))


def _token_ids(tokenizer: Tokenizer, texts: list[str], **options: bool) -> list[list[int]]:
    batch = tokenizer(
        texts,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # it would warn of long texts, which are checked here
        **options,
    )
    return [list(ids) for ids in batch["input_ids"]]


def _added_at_end(tokenizer: Tokenizer) -> int:
    """How many special tokens (EOS, SEP) the tokenizer puts after a text."""
    (bare,) = _token_ids(tokenizer, ["a"], add_special_tokens=False)
    (full,) = _token_ids(tokenizer, ["a"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return len(full) - len(bare) - start
    return 0


def _check_lengths(
    rows: Sequence[Row], lengths: Sequence[int], tokenizer: Tokenizer, max_length: int | None
) -> None:
    """Raise for the first row of which the model would read too many tokens."""
    # A tokenizer that knows no limit reports a huge number, which no row exceeds.
    limit = tokenizer.model_max_length if max_length is None else max_length
    for row, length in zip(rows, lengths, strict=True):
        if length > limit:
            _fail(
                row,
                f"{length} tokens, but the model takes {int(limit)}",
                "shorten the row; nothing is truncated silently",
            )


def _fail(row: Row, fault: str, remedy: str) -> NoReturn:
    raise RowError(f"{row.source} (id {row.id!r}): {fault}; {remedy}")
