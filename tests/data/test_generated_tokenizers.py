"""Encoding of choice rows under generated tokenizers, against what they say themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st
from support.tokenizers import (
    BOS,
    KINDS,
    MARKS,
    ROWS,
    SPECIAL,
    SPECS,
    TEMPLATES,
    Spec,
    equal,
    is_usable,
    joined,
    numbered,
    row_of,
    split_of,
    tokenizer_of,
    tokens_of,
    wrapped,
)
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from tfb.data.batching import EncodedRows
from tfb.data.encoding import RowEncoder
from tfb.data.rows import Row, RowError


def choices_of(encoded: EncodedRows) -> list[list[int]]:
    """The tokens of the choices of the only row."""
    assert encoded.label_ids is not None and len(encoded) == 1
    several = encoded.choice_tokens(0)
    if several is None:
        return [[token] for token in encoded.label_ids[0]]
    assert encoded.label_ids[0] == ()
    return [list(ids) for ids in several]


def outcome(encoder: RowEncoder, rows: Sequence[Row]) -> EncodedRows | str:
    """What comes of the rows: their tokens, or the message of a RowError."""
    try:
        return encoder(rows)
    except RowError as error:
        return str(error)


def slow(tokenizer: Any, **settings: Any) -> RowEncoder:
    """An encoder that tokenizes every text as a whole."""
    encoder = RowEncoder(tokenizer, **settings)
    encoder._spliced._breaks_at_spaces = False
    return encoder


# --- the fast way and the slow one ----------------------------------------------------------------


@settings(max_examples=1000)
@given(SPECS, ROWS, st.sampled_from(["all", "last"]))
# A mark begins a new stretch of text, in front of which a '▁' goes.
@example(Spec("prepended", known=False), row_of("no<|x|>", "AB"), "last")
# The space is the mark's, two spaces as well.
@example(Spec("byte-level"), row_of("no<|r|>", [" A", "  B"]), "all")
# A prompt that ends with what its tokenizer writes for a space, or takes for one.
@example(Spec("prepended", known=False), row_of("Topic▁", "AB"), "all")
@example(Spec("cleaned"), row_of("Topic\u200b", "AB"), "all")
def test_splicing_changes_nothing(spec: Spec, row: Row, label_tokens: str) -> None:
    """One text of a row and one of each choice give what all texts give. The first row's text is
    that of its first choice, so each choice is put first."""
    tokenizer = tokenizer_of(spec)
    fast, whole = (make(tokenizer, label_tokens=label_tokens) for make in (RowEncoder, slow))
    for turn in range(len(row.choices or ())):
        turned = row_of(row.prompt or "", (row.choices or ())[turn:] + (row.choices or ())[:turn])
        found = outcome(fast, [turned])
        assert found == outcome(whole, [turned])
    event("an error" if isinstance(found, str) else "tokens")


@settings(max_examples=200)
@given(SPECS, st.lists(ROWS, min_size=2, max_size=6))
def test_a_row_is_itself_in_any_company(spec: Spec, rows: list[Row]) -> None:
    """The tokens of several rows, or the error of the first that has one, are those of each."""
    tokenizer = tokenizer_of(spec)
    rows = [row_of(row.prompt or "", row.choices or (), i) for i, row in enumerate(rows)]
    alone = [outcome(slow(tokenizer), [row]) for row in rows]
    errors = [found for found in alone if isinstance(found, str)]
    together = outcome(RowEncoder(tokenizer), rows)
    if errors:
        assert together == errors[0]
        return
    assert isinstance(together, EncodedRows)
    for i, found in enumerate(alone):
        part = together.subset([i])
        assert isinstance(found, EncodedRows) and part.content_hash == found.content_hash


# --- the definition -------------------------------------------------------------------------------


@settings(max_examples=1000)
@given(SPECS, ROWS)
def test_all_tokens_are_those_of_the_whole_text(spec: Spec, row: Row) -> None:
    """What is read and a choice's tokens make up the text, no more and no less; an error is only
    raised where that is not possible, or choices are the same or unknown."""
    split = split_of(spec, row)
    found = outcome(RowEncoder(tokenizer_of(spec)), [row])
    if split is None or not is_usable(split[1]):
        assert isinstance(found, str)
        assert ("merges with" in found) == (split is None)
        return
    assert isinstance(found, EncodedRows), found
    choices = choices_of(found)
    whole = [tokens_of(spec, text) for text in joined(row)]
    assert [found.input_ids[0] + ids for ids in choices] == whole
    assert all(choices) and not equal(choices)
    assert 1 in map(len, choices) or len({ids[0] for ids in choices}) > 1
    event(f"tokens dropped: {max(map(len, split[1])) > max(map(len, choices))}")


@settings(max_examples=1000)
@given(SPECS, ROWS)
def test_last_tokens_come_right_after_the_prompt(spec: Spec, row: Row) -> None:
    """The prompt is read alone; a label is the whole text's last token."""
    split = split_of(spec, row)
    encoder = RowEncoder(tokenizer_of(spec), label_tokens="last")
    found = outcome(encoder, [row])
    if split is None or not is_usable([ids[-1:] for ids in split[1]]):
        assert isinstance(found, str)
        return
    assert isinstance(found, EncodedRows), found
    assert found.input_ids == [split[0]]
    assert found.choice_ids is None
    texts = joined(row)
    assert found.label_ids == [tuple(tokens_of(spec, text)[-1] for text in texts)]


@settings(max_examples=200)
@given(SPECS, ROWS, st.sampled_from(["all", "last"]))
def test_one_special_token_in_front(spec: Spec, row: Row, label_tokens: str) -> None:
    """Of a prompt that brings <s> itself, as chat templates write it."""
    brought = row_of(f"<s>{row.prompt}", row.choices or ())
    encoder = RowEncoder(tokenizer_of(spec), label_tokens=label_tokens)
    found = outcome(encoder, [brought])
    assume(isinstance(found, EncodedRows))
    assert isinstance(found, EncodedRows)
    assert found.input_ids[0][0] == BOS and found.input_ids[0].count(BOS) == 1
    if spec.begins:  # the same without
        assert found.input_ids == [tokens_of(spec, row.prompt or "")[:1] + found.input_ids[0][1:]]


@settings(max_examples=600)
@given(
    SPECS,
    ROWS,
    st.sampled_from(["all", "last"]),
    st.sampled_from(["left", "right"]),
    st.integers(1, 14),
    st.booleans(),
)
def test_truncation(
    spec: Spec, row: Row, label_tokens: str, side: str, most: int, brings: bool
) -> None:
    """Prompts lose tokens on one side, after <s>; choices lose none."""
    row = row_of(f"<s>{row.prompt}" if brings else row.prompt or "", row.choices or ())
    how: dict[str, Any] = {"label_tokens": label_tokens}
    free = outcome(RowEncoder(tokenizer_of(spec), **how), [row])
    split = split_of(spec, row)
    assume(isinstance(free, EncodedRows) and split is not None)
    assert isinstance(free, EncodedRows) and split is not None
    assert free.truncated == [0]
    prompt, choices = split
    if label_tokens == "last":
        choices = [ids[-1:] for ids in choices]
    front = int(prompt[0] == BOS)
    body = prompt[front:]
    # The last token of a choice is not read.
    over = len(prompt) + max(map(len, choices)) - 1 - most
    found = outcome(RowEncoder(tokenizer_of(spec), max_length=most, truncate=side, **how), [row])
    if over >= len(body) and over > 0:
        assert isinstance(found, str) and "would leave nothing" in found
        return
    assert isinstance(found, EncodedRows), found
    kept = choices_of(found)
    assert kept == choices_of(free)
    assert len(found.input_ids[0]) + max(map(len, kept)) - 1 <= most
    assert found.truncated == [max(over, 0)]
    moved = free.input_ids[0][len(prompt) :]  # first tokens that all choices share
    left = body[over:] if side == "left" else body[: len(body) - over]
    expected = left if over > 0 else body
    assert found.input_ids == [prompt[:front] + expected + moved]
    if over > 0:
        refused = outcome(RowEncoder(tokenizer_of(spec), max_length=most, **how), [row])
        assert isinstance(refused, str) and f"the model takes {most}" in refused
    event(f"left out: {max(over, 0) > 0}")


@pytest.mark.parametrize("first", [*SPECIAL, *MARKS, "C"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_special_tokens_of_an_alphabet_of_its_own(
    template: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other character has no token, not even <unk>; BOS stays and EOS goes all the same,
    whatever the order in which the tokenizer names its tokens (it is another one every time)."""
    vocabulary = numbered([*"CGTA"])
    tokenizer = wrapped(Tokenizer(models.BPE(vocab=vocabulary, merges=[])), template)
    named = tokenizer.get_vocab()
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {first: named[first]} | named)
    found = RowEncoder(tokenizer)([row_of("GATTAC", "AG")])
    front = [BOS] if template.startswith("<s>") else []
    assert found.input_ids == [[*front, *(vocabulary[c] for c in "GATTAC")]]
    assert found.label_ids == [(vocabulary["A"], vocabulary["G"])]


def bare(pieces: str, merges: list[tuple[str, str]], **how: Any) -> Any:
    """As Llama 2, over a small alphabet."""
    vocabulary = {piece: i for i, piece in enumerate(pieces.split())}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **how))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=how.get("unk_token"))


@pytest.mark.parametrize("choices", ["AB", "BA"])
def test_a_prompts_last_character_without_a_token(choices: str) -> None:
    """It may vanish, so that spaces meet over it, or become one <unk> with a space."""
    merges = [("▁", "B"), ("▁", "▁"), ("▁", "A")]
    for tokenizer, prompt in (
        (bare("▁ A B a x ▁B ▁▁ ▁A", merges), "x q"),
        (bare("<unk> x A B a", [], unk_token="<unk>", fuse_unk=True), "xq"),
    ):
        rows = [row_of(prompt, choices)]
        found = outcome(RowEncoder(tokenizer), rows)
        assert found == outcome(slow(tokenizer), rows)


# --- the generated tokenizers are what they should be ---------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_vocabularies(kind: str) -> None:
    """Pieces run over spaces where they may, and those of several characters are used."""
    plain, over = (
        [tokenizer_of(Spec(kind, over_spaces=may, seed=seed)) for seed in range(4)]
        for may in (False, True)
    )
    assert all(RowEncoder(tokenizer)._spliced._breaks_at_spaces for tokenizer in plain)
    assert not any(RowEncoder(tokenizer)._spliced._breaks_at_spaces for tokenizer in over)
    text = "Topic is it yes no bank Answer banking"
    assert any(len(t.tokenize(text)) < len(text) * 0.8 for t in plain)
