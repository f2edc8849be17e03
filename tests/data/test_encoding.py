"""Encoding of rows: label tokens, special tokens, merges at the boundary, padding, batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tfb.data.batching import NO_LABEL, EncodedRows, batches
from tfb.data.encoding import LONGEST, RowEncoder
from tfb.data.readers import read_rows
from tfb.data.rows import ANSWERS, PROMPTS, Row, RowError

LETTERS = tuple("ABCDEFGHIJ")


def encode_choices(rows: list[Row], tokenizer: Any, **how: Any) -> EncodedRows:
    return RowEncoder(tokenizer, **how)(rows)


def encode_answers(rows: list[Row], tokenizer: Any, **how: Any) -> EncodedRows:
    return RowEncoder(tokenizer, "SEQ_2_SEQ_LM", **how)(rows)


def encode_texts(rows: list[Row], tokenizer: Any, **how: Any) -> EncodedRows:
    return RowEncoder(tokenizer, "SEQ_CLS", **how)(rows)


def special(template: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2), ("[CLS]", 1), ("[SEP]", 2)]
    )


def marked_bpe(template: str = "<s> $A") -> Any:
    """SentencePiece-like, as Llama 2: '▁' for a space; ' B' is one token, ' A' is two."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *"ABCTopic:?xyz", "▁B", "▁T", "zA"]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "B"), ("▁", "T"), ("z", "A")],
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.post_processor = special(template)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_bpe() -> Any:
    """Byte-level, as GPT-2 and Llama 3: 'Ġ' for a space, ' A' is one token, no special tokens."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "A"), ("Ġ", "B"), ("Ġ", "C"), (":", "Ċ")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *("".join(m) for m in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=20)


def word_level() -> Any:
    """BERT-like: words, [CLS] and [SEP], segment ids."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *"ABC", "book", "a", "table", "Topic"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = special("[CLS] $A [SEP]")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def row(prompt: str, *choices: str, label: int | None = None, id: str = "r") -> Row:
    return Row(id=id, prompt=prompt, choices=choices, label=label, source="f.jsonl:12")


def names(tokenizer: Any, ids: Any) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]


def encode_one(tokenizer: Any, prompt: str, *choices: str, **options: Any) -> tuple[str, list[str]]:
    encoded = encode_choices([row(prompt, *choices)], tokenizer, **options)
    assert encoded.label_ids is not None
    prompt_tokens = names(tokenizer, encoded.input_ids[0])
    return " ".join(prompt_tokens), names(tokenizer, encoded.label_ids[0])


def test_first_tokens_that_all_choices_share_are_read() -> None:
    """' A' is '▁', 'A' and ' C' is '▁', 'C': the mark goes into the prompt, one token is scored."""
    tokenizer = marked_bpe()
    expected = ("<s> ▁T o p i c ▁", ["A", "C"])
    assert encode_one(tokenizer, "Topic", "A", "C") == expected
    assert encode_one(tokenizer, "Topic", " A", " C") == expected
    assert encode_one(tokenizer, "Topic ", "A", "C") == expected


def test_no_token_of_a_choice_is_left_out() -> None:
    """' B' is one token and ' A' two: both are scored by all of theirs after the same prompt."""
    tokenizer = marked_bpe()
    for prompt, choices in (("Topic", "AB"), ("Topic", [" A", " B"]), ("Topic ", "AB")):
        encoded = encode_choices([row(prompt, *choices)], tokenizer)
        assert names(tokenizer, encoded.input_ids[0]) == ["<s>", "▁T", *"opic"]
        assert tokens_of(tokenizer, prompt, *choices) == ["▁ A", "▁B"]


def test_the_last_token_alone() -> None:
    """The convention of the authors' scripts: whatever precedes it in a choice is not read."""
    tokenizer, last = marked_bpe(), {"label_tokens": "last"}
    expected = ("<s> ▁T o p i c", ["A", "▁B"])
    assert encode_one(tokenizer, "Topic", "A", "B", **last) == expected
    assert encode_one(tokenizer, "Topic ", "A", "B", **last) == expected
    assert encode_one(tokenizer, "Topic", "xyA", "xyC", **last)[1] == ["A", "C"]
    message = choice_error(tokenizer, "Topic", "xA", "yA", **last)
    assert "'xA' and 'yA' are the same tokens by label_tokens 'last'" in message
    with pytest.raises(ValueError, match="label_tokens='first': expected one of all, last"):
        RowEncoder(tokenizer, label_tokens="first")


def test_byte_level_space_and_newline() -> None:
    tokenizer = byte_bpe()
    assert encode_one(tokenizer, "x:", "A", "B") == ("x :", ["ĠA", "ĠB"])
    assert encode_one(tokenizer, "x: ", "A", "B") == ("x :", ["ĠA", "ĠB"])
    assert encode_one(tokenizer, "x:\n", "A", "B") == ("x :Ċ", ["A", "B"])  # a prefix as it is


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_special_tokens(template: str) -> None:
    """BOS stays, EOS goes: the model is to continue the prompt."""
    bos = ["<s>"] if template.startswith("<s>") else []
    prompt, choices = encode_one(marked_bpe(template), "Topic", "A", "C")
    assert prompt.split() == [*bos, *["▁T", "o", "p", "i", "c", "▁"]]
    assert choices == ["A", "C"]


def test_whitespace_moves_for_the_whole_row_only() -> None:
    """One choice that merges moves the space of its row; other rows are left alone."""
    rows = [row("Topic ", "A", "C", id="1"), row("Topic ", "A", "B", id="2")]
    encoded = encode_choices(rows, marked_bpe())
    assert len(encoded.input_ids[0]) == len(encoded.input_ids[1]) + 1


def choice_error(tokenizer: Any, prompt: str, *choices: str, **options: Any) -> str:
    with pytest.raises(RowError, match=r"^f\.jsonl:12 \(id 'r'\): ") as caught:
        encode_one(tokenizer, prompt, *choices, **options)
    return str(caught.value)


def tokens_of(tokenizer: Any, prompt: str, *choices: str, **options: Any) -> list[str] | None:
    (found,) = encode_choices([row(prompt, *choices)], tokenizer, **options).choice_ids or [None]
    return None if found is None else [" ".join(names(tokenizer, ids)) for ids in found]


def test_choices_of_several_tokens() -> None:
    """All choices of the row by all of their tokens but the first ones that they share, of which
    each keeps one. One may begin another."""
    tokenizer = marked_bpe()
    assert tokens_of(tokenizer, "Topic", "A", "Toy") == ["▁ A", "▁T o y"]
    assert tokens_of(tokenizer, "Topic", "A", "AB", "B", "BA") == ["▁ A", "▁ A B", "▁B", "▁B A"]
    assert tokens_of(tokenizer, "Topic ", "A", "AB") == ["A", "A B"]
    assert tokens_of(tokenizer, "Topic", "A", "A B") == ["A", "A ▁B"]  # inside, spaces count
    assert tokens_of(byte_bpe(), "x:", "A", "AB") == ["ĠA", "ĠA B"]
    assert tokens_of(byte_bpe(), "x:", "A", "B") is None
    encoded = encode_choices(
        [row("Topic", "A", "AB", id="1"), row("Topic", "A", "C", id="2")], tokenizer
    )
    A, B, C = (tokenizer.convert_tokens_to_ids(t) for t in "ABC")
    assert encoded.choice_ids == [((A,), (A, B)), None]
    assert encoded.label_ids == [(), (A, C)]
    assert encoded.num_choices(0) == encoded.num_choices(1) == 2


def test_several_tokens_that_cannot_be_told_apart() -> None:
    message = choice_error(marked_bpe(), "Topic", "AC", "B", " AC")
    assert "'AC' and ' AC' are the same tokens" in message
    assert "does not know 'AQ'" in choice_error(marked_bpe(), "Topic", "A", "AQ")


def test_a_choices_last_token_is_not_read() -> None:
    """8 tokens and a choice of 3 (' A', 'x', 'y'): the model reads 10."""
    rows = [row("x" * 8, "A", "Axy")]
    assert encode_choices(rows, byte_bpe(), max_length=10).choice_ids is not None
    message = choice_error(byte_bpe(), "x" * 8, "A", "Axy", max_length=9)
    assert "10 tokens, but the model takes 9" in message


def test_choices_that_collide() -> None:
    message = choice_error(marked_bpe(), "Topic", "A", " A")
    assert "'A' and ' A' are the same tokens" in message and "use choices" in message


def test_unknown_choice() -> None:
    assert "does not know 'Q'" in choice_error(marked_bpe(), "Topic", "A", "Q")


def test_long_prompt_is_never_cut() -> None:
    assert len(encode_choices([row("x" * 8, "A", "B")], byte_bpe(), max_length=8).input_ids[0]) == 8
    message = choice_error(byte_bpe(), "x" * 9, "A", "B", max_length=8)
    assert "9 tokens, but the model takes 8" in message
    message = choice_error(byte_bpe(), "x" * 21, "A", "B")  # the tokenizer's own limit
    assert "21 tokens, but the model takes 20" in message


@pytest.mark.parametrize(
    ("side", "kept"), [("left", ["▁", "A", "?", ":"]), ("right", ["▁T", "o", "p", "i"])]
)
def test_a_long_prompt_is_cut_where_it_is_said_to_be(side: str, kept: list[str]) -> None:
    """BOS stays, and so do the choices: 1 + 4 tokens, and a choice of 3, of which 2 are read."""
    rows = [row("Topic A?:", "A", "BA", "B?B"), row("x", "A", "B")]
    tokenizer = marked_bpe()
    encoded = encode_choices(rows, tokenizer, max_length=7, truncate=side)
    assert names(tokenizer, encoded.input_ids[0]) == ["<s>", *kept]
    assert encoded.truncated == [5, 0] and encoded.subset([1]).truncated == [0]
    whole = encode_choices(rows, tokenizer)
    assert encoded.choice_ids == whole.choice_ids and whole.truncated == [0, 0]
    assert len(whole.input_ids[0]) == len(encoded.input_ids[0]) + 5
    with pytest.raises(RowError, match="truncation would leave nothing of the prompt; shorten"):
        encode_choices(rows, tokenizer, max_length=3, truncate=side)


@pytest.mark.parametrize(("side", "kept"), [("left", "a table"), ("right", "book a")])
def test_a_long_text_keeps_its_special_tokens(side: str, kept: str) -> None:
    tokenizer = word_level()
    rows = [Row("1", text="book a table"), Row("2", text="book a")]
    encoded = encode_texts(rows, tokenizer, num_labels=2, max_length=4, truncate=side)
    assert names(tokenizer, encoded.input_ids[0]) == ["[CLS]", *kept.split(), "[SEP]"]
    assert encoded.token_type_ids == [[0] * 4, [0] * 4] and encoded.truncated == [1, 0]
    with pytest.raises(ValueError, match="truncate='top': expected one of left, right, or None"):
        encode_texts(rows, tokenizer, num_labels=2, truncate="top")


def test_a_prompt_that_begins_with_bos_gets_no_second_one() -> None:
    tokenizer = marked_bpe()
    for text in ("Topic", "<s>Topic", "<s><s>Topic"):
        ids = encode_choices([row(text, "A", "C")], tokenizer).input_ids[0]
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    # A tokenizer that adds none leaves the text's own; one inside a text is the text's business.
    bare = encode_choices([row("<s>Topic<s>", "A", "C")], marked_bpe("$A")).input_ids[0]
    assert bare[0] == tokenizer.bos_token_id and bare.count(tokenizer.bos_token_id) == 2


# --- chat -----------------------------------------------------------------------------------------

TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}" + "{{ USER }}{% else %}{{ ANSWER }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ PROMPT }}{% endif %}"
)


def chat(tokenizer: Any, user: str, answer: str, prompt: str = "''") -> Any:
    """The tokenizer with a template made of three expressions."""
    pieces = {"USER": user, "ANSWER": answer, "PROMPT": prompt}
    template = TURNS
    for name, expression in pieces.items():
        template = template.replace(name, expression)
    tokenizer.chat_template = template
    return tokenizer


def asks(*said: str, choices: tuple[str, ...] = ("A", "C")) -> Row:
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(said)]
    return Row("r", choices=choices, messages=tuple(turns), source="f.jsonl:12")


@pytest.mark.parametrize(("bos", "adds"), [("<s>", True), ("<s>", False), ("", True), ("", False)])
def test_messages_go_through_the_template(bos: str, adds: bool) -> None:
    """With the generation prompt, and one BOS whether it is the template's or the tokenizer's; the
    tokens are those of the template's own tokenization."""
    tokenizer = chat(
        marked_bpe("<s> $A" if adds else "$A"), f"'{bos}x' + m.content", "m.content", "':'"
    )
    encoded = encode_choices([asks("Topic")], tokenizer)
    (ids,) = encoded.input_ids
    plain = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Topic"}], add_generation_prompt=True, return_dict=False
    )
    assert ids == ([1] if adds and not bos else []) + plain
    assert ids.count(1) == (adds or bool(bos))
    assert encoded.label_ids == [tuple(tokenizer.convert_tokens_to_ids(["A", "C"]))]


@pytest.mark.parametrize(
    ("between", "labels"), [("' '", ["A", "C"]), ("''", ["A", "C"]), ("'xyz '", ["A", "C"])]
)
def test_an_answer_follows_as_the_template_writes_it(between: str, labels: list[str]) -> None:
    """After "[/INST]" Llama 2 writes a space, others nothing; what is no whitespace is not ours."""
    tokenizer = chat(marked_bpe(), "'x' + m.content + ':'", f"{between} + m.content")
    encoded = encode_choices([asks("Topic"), asks("Topic", "A", "x")], tokenizer)
    mark = ["▁"] if between == "' '" else []
    assert names(tokenizer, encoded.input_ids[0])[-1 - len(mark) :] == [":", *mark]
    assert encoded.label_ids is not None
    assert [names(tokenizer, ids) for ids in encoded.label_ids] == [labels, labels]
    (spaced,) = encode_choices([asks("Topic", choices=(" A", " C"))], tokenizer).input_ids
    assert names(tokenizer, spaced)[-2:] == [":", "▁"]  # a choice that brings its own


def test_an_answer_that_merges_with_the_prompt() -> None:
    """There is a token "zA", and the template writes nothing in front of an answer."""
    tokenizer = chat(marked_bpe(), "m.content", "m.content")
    with pytest.raises(RowError, match="merges with the first of a choice; end the prompt diff"):
        encode_choices([asks("xyz", choices=("A", "B"))], tokenizer)


def test_what_follows_messages_does_not_depend_on_other_rows() -> None:
    """A row whose messages end with an answer comes first: the next one is read as if alone."""
    alternate = "raise_exception('roles') if loop.index0 % 2 else 'x' + m.content + ':'"
    tokenizer = chat(marked_bpe(), alternate, "' ' + m.content")
    rows = [asks("Topic", "A"), asks("Topic")]
    for order in (rows, rows[::-1]):
        encoded = encode_choices(order, tokenizer)
        ids = encoded.input_ids[order.index(rows[1])]
        assert names(tokenizer, ids)[-2:] == [":", "▁"]


def test_shared_tokens_count_where_scores_are_means() -> None:
    tokenizer, how = marked_bpe(), {"length_normalization": "tokens"}
    encoded = encode_choices([row("Topic", "A", "C")], tokenizer, **how)
    assert names(tokenizer, encoded.input_ids[0])[-1] == "c"
    assert tokens_of(tokenizer, "Topic", "A", "C", **how) == ["▁ A", "▁ C"]


def test_an_encoders_positions_are_fewer_than_its_embeddings() -> None:
    """RoBERTa has 514 for 512 tokens, which its tokenizer knows."""

    class Config:
        max_position_embeddings, num_labels = 22, 2

    tokenizer = word_level()
    tokenizer.model_max_length = 20
    assert RowEncoder.of(tokenizer, "SEQ_CLS", Config()).limit == 20
    assert RowEncoder.of(tokenizer, "CAUSAL_LM", Config()).limit == 22


def test_messages_that_no_template_takes() -> None:
    with pytest.raises(RowError, match=r"f\.jsonl:12 .* no chat template; use the chat model's"):
        encode_choices([asks("x")], marked_bpe())
    strict = chat(marked_bpe(), "raise_exception('roles must alternate')", "''")
    with pytest.raises(RowError, match=r"refuses the messages \(roles must alternate\)"):
        encode_choices([asks("x")], strict)
    broken = chat(marked_bpe(), "1 // 0", "''")
    with pytest.raises(RowError, match="refuses the messages"):
        encode_choices([asks("x")], broken)


# --- what is too much -----------------------------------------------------------------------------

LIMIT = LONGEST // 64  # characters; the true bound takes seconds to reach


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The characters of every call of the tokenizer, with small bounds."""
    monkeypatch.setattr("tfb.data.encoding.LONGEST", LIMIT)
    monkeypatch.setattr("tfb.data.encoding.TOGETHER", 16 * LIMIT)
    calls: list[int] = []
    call = PreTrainedTokenizerFast.__call__

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        texts = options.get("text") or options.get("text_target") or args[0]
        calls.append(sum(map(len, texts)))
        return call(self, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    return calls


@pytest.mark.parametrize("truncate", [None, "left", "right"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "messages"])
def test_long_texts_are_refused_unseen(task: str, truncate: str | None, seen: list[int]) -> None:
    """By their characters, whether they would be cut, and however much the model takes."""
    tokenizer, long = chat(marked_bpe(), "'x' + m.content", "m.content"), "x" * LIMIT
    made = row(long, "A", "B")
    if task == "SEQ_CLS":
        made = Row("r", text=long + "x", source="f.jsonl:12")
    elif task == "messages":
        task, made = "CAUSAL_LM", asks("x" * (LIMIT - 1))
    encode = RowEncoder(tokenizer, task, num_labels=2, truncate=truncate)
    seen.clear()
    with pytest.raises(RowError, match=r"^f\.jsonl:12 \(id 'r'\): 65,537 char.*; shorten it$"):
        encode([made])
    assert max(seen, default=0) < 100


def test_choices_count_together(seen: list[int]) -> None:
    """A prompt with every choice may be sixteen times as long as one text."""
    with pytest.raises(RowError, match="1,081,410 with every choice"):
        encode_choices([row("x" * (LIMIT // 2), *map(str, range(10, 43)))], marked_bpe())
    assert max(seen) < 100


@pytest.mark.parametrize("end", [":", "x"])
def test_calls_are_bounded_in_characters(end: str, seen: list[int]) -> None:
    """Spliced, or as whole texts; rows are those of one by one."""
    tokenizer = marked_bpe()
    rows = [row("x" * (LIMIT // 8 - i) + end, *"ABC", id=str(i)) for i in range(20)]
    found = encode_choices(rows, tokenizer)
    assert LIMIT // 2 < max(seen) <= LIMIT
    for i, one in enumerate(rows):
        assert found.subset([i]).content_hash == encode_choices([one], tokenizer).content_hash


@pytest.mark.parametrize(("side", "kept"), [("left", ["<s>", "y"]), ("right", ["<s>", "▁", "x"])])
def test_a_long_document_is_cut(side: str, kept: list[str], seen: list[int]) -> None:
    """As before, up to the bound; its whole texts are not held together."""
    tokenizer, prompt = marked_bpe(), "x" * (LIMIT - 100) + "y"
    made = row(prompt + "\n", *(c + "A" for c in "ABCTopicxyz"))
    encoded = encode_choices([made], tokenizer, max_length=len(kept) + 2, truncate=side)
    assert names(tokenizer, encoded.input_ids[0])[: len(kept)] == kept
    assert max(seen) <= LIMIT and encoded.rows_cut == 1


def test_a_prompt_that_is_too_long_is_tokenized_once(seen: list[int]) -> None:
    """Not with each of its choices, where these may merge with it."""
    made = row("x" * (LIMIT // 2) + "\n", *map(chr, range(65, 85)))
    with pytest.raises(RowError, match="tokens, but the model takes 512; shorten the row"):
        encode_choices([made], marked_bpe(), max_length=512)
    assert sum(seen) < 3 * LIMIT // 2


# --- faults of rows -------------------------------------------------------------------------------


def failing() -> Any:
    """A tokenizer without <unk>, which raises at words that it does not know."""
    tokenizer = word_level()
    words = {w: i for w, i in tokenizer.get_vocab().items() if w != "[UNK]"}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_whatever_a_tokenizer_raises_is_a_fault_of_its_row() -> None:
    encode = RowEncoder(failing(), "SEQ_CLS", num_labels=2)
    texts = ["a", "book a", "strange", "a table", "book \ud800", "Topic"]
    rows = [Row(str(i), text=text, source=f"f:{i}") for i, text in enumerate(texts)]
    encoded, faults = encode.encode(rows)
    assert encoded is not None and encoded.ids == ["0", "1", "3", "5"]
    assert "the tokenizer fails at 'strange' (WordLevel error: Missing [UNK]" in faults[2]
    assert list(faults) == [2, 4]
    with pytest.raises(RowError, match="fails at 'strange'"):
        encode(rows)
    with pytest.raises(RowError, match="fails at 'a strange'"):
        encode_choices([row("a book :", "A", "strange")], failing())


class Panicking(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Rust panics at "zz" and is interrupted at "yy"; neither is an Exception."""

    def __call__(self, text: list[str] | None = None, **options: Any) -> Any:
        if "yy" in (text or []):
            raise KeyboardInterrupt
        if "zz" in (text or []):
            models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], continuing_subword_prefix="é")
        return super().__call__(text, **options)


def test_a_panic_is_a_fault_of_its_row_and_an_interrupt_is_not() -> None:
    encode = RowEncoder(
        Panicking(tokenizer_object=word_level()._tokenizer), "SEQ_CLS", num_labels=2
    )
    rows = [Row(text, text=text, source="f:1") for text in ("a", "zz", "book")]
    encoded, faults = encode.encode(rows)
    assert encoded is not None and encoded.ids == ["a", "book"]
    assert "the tokenizer fails at 'zz' (" in faults[1]
    with pytest.raises(KeyboardInterrupt):
        encode.encode([Row("yy", text="yy")])


def test_all_faults_are_found_at_once() -> None:
    """Among rows that can be encoded; one's reason is that of the row alone."""
    encode = RowEncoder(byte_bpe(), max_length=20)
    rows = [
        *(row("x:", "A", "B", id="good"), row("x" * 30, "A", "B"), row("x:", "A", " A")),
        *(row("x:", "A"), row("x:", "A", "B", label=2), row("x?", "A", "C", id="too")),
    ]
    encoded, faults = encode.encode(rows)
    assert encoded is not None and encoded.ids == ["good", "too"] and [*faults] == [1, 2, 3, 4]
    for i, text in faults.items():
        assert encode.encode([rows[i]]) == (None, {0: text})
    assert encode.encode([]) == (None, {})


def test_rows_of_the_wrong_kind() -> None:
    text = Row(id="r", text="book a table", source="f.jsonl:12")
    with pytest.raises(RowError, match="this is a text row; use rows with 'prompt'"):
        encode_choices([text], byte_bpe())
    with pytest.raises(RowError, match="this is a choice row; use rows with 'text'"):
        encode_texts([row("x", "A", "B")], word_level(), num_labels=2)
    with pytest.raises(RowError, match="empty"):
        encode_choices([row("", "A", "B")], byte_bpe())
    for encode in (encode_choices, lambda r, t: encode_texts(r, t, num_labels=2)):
        with pytest.raises(RowError, match="no rows"):
            encode([], byte_bpe())


def test_texts() -> None:
    tokenizer = word_level()
    rows = [Row("1", text="book a table", label=2), Row("2", text="book", label=None)]
    encoded = encode_texts(rows, tokenizer, num_labels=3)
    assert names(tokenizer, encoded.input_ids[0]) == ["[CLS]", "book", "a", "table", "[SEP]"]
    assert encoded.labels == [2, None] and encoded.label_ids is None and encoded.choices is None
    assert encoded.token_type_ids == [[0] * 5, [0] * 3]
    with pytest.raises(RowError, match=r"label 2 is outside the model's 2 classes; .* 0 to 1"):
        encode_texts(rows, tokenizer, num_labels=2)
    with pytest.raises(RowError, match="5 tokens, but the model takes 4"):
        encode_texts(rows, tokenizer, num_labels=3, max_length=4)
    with pytest.raises(ValueError, match="num_labels"):
        encode_texts(rows, tokenizer, num_labels=1)
    (batch,) = batches(encoded, batch_size=2, pad_token_id=3, padding_side="right")
    assert batch.input_ids.tolist() == [[1, 7, 8, 9, 2], [1, 7, 2, 3, 3]]
    assert batch.model_inputs().keys() == {"input_ids", "attention_mask", "token_type_ids"}
    assert batch.labels.tolist() == [2, NO_LABEL]
    assert batch.label_ids is None


# --- rows to be continued -------------------------------------------------------------------------


def encode_prompts(rows: list[Row], tokenizer: Any, new: int = 3, **how: Any) -> EncodedRows:
    return RowEncoder(tokenizer, PROMPTS, max_new_tokens=new, **how)(rows)


def answered(prompt: str, answer: str) -> Row:
    return Row("r", prompt, answer=answer, source="f.jsonl:12")


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_prompts_are_read_as_they_stand(template: str) -> None:
    """With one BOS and no EOS; a space at the end stays where it is, choices are not looked at."""
    bos = ["<s>"] if template.startswith("<s>") else []
    tokenizer = marked_bpe(template)
    rows = [Row("1", "Topic "), row("<s>Topic" if bos else "Topic", "A", " A", label=9)]
    encoded = encode_prompts(rows, tokenizer)
    assert names(tokenizer, encoded.input_ids[0]) == [*bos, "▁T", *"opic", "▁"]
    assert encoded.input_ids[1] == encoded.input_ids[0][:-1] and encoded.new_tokens == 3
    assert (encoded.label_ids, encoded.choices, encoded.labels) == (None, None, [None, None])


def test_a_space_at_the_end_is_read_as_a_fit_reads_it(shared: Path) -> None:
    """A real tokenizer makes it part of the next word, and so leaves it out; not a line break."""
    tokenizer = AutoTokenizer.from_pretrained(str(shared / "models/stories260K"))
    for prompt in ("Topic:", "Topic: ", "Topic:  ", "Topic:\n"):
        fitted = RowEncoder(tokenizer, ANSWERS)([answered(prompt, "a cat")])
        assert encode_prompts([Row("r", prompt)], tokenizer).input_ids == fitted.input_ids


def test_an_answer_ends_as_the_template_ends_it() -> None:
    """With its special token, if that is what comes next; else with the tokenizer's end token."""
    tokenizer = marked_bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    row = Row("r", messages=asks("Topic").messages, answer="B")
    for after, expected in (("'<|end|>'", end), ("'x<|end|>'", 2), ("''", 2)):
        made = chat(tokenizer, "'x' + m.content", f"':' + m.content + {after}", "':'")
        encoded = RowEncoder(made, ANSWERS)([row])
        (((ids,),),) = [encoded.choice_ids or []]
        assert ids[-1] == expected
    (((ids,),),) = [RowEncoder(made, ANSWERS)([answered("Topic:", "B")]).choice_ids or []]
    assert ids[-1] == 2


def test_prompts_of_chats() -> None:
    tokenizer = chat(marked_bpe(), "'<s>x' + m.content", "' ' + m.content", "':'")
    encoded = encode_prompts([Row("r", messages=asks("Topic").messages)], tokenizer)
    assert names(tokenizer, encoded.input_ids[0]) == ["<s>", "▁", "x", *"Topic", ":"]


def test_a_prompt_leaves_room_for_new_tokens() -> None:
    tokenizer, rows = byte_bpe(), [Row("r", "abcdefgh", source="f:1")]
    assert encode_prompts(rows, tokenizer, max_length=11).truncated == [0]
    message = r"^f:1 \(id 'r'\): 8 tokens and 3 new ones, but the model takes 10; shorten the row, "
    with pytest.raises(RowError, match=message + r"lower max_new_tokens, or let it be cut \(trunc"):
        encode_prompts(rows, tokenizer, max_length=10)
    for side, kept in (("left", [*"bcdefgh"]), ("right", [*"abcdefg"])):
        encoded = encode_prompts(rows, tokenizer, max_length=10, truncate=side)
        assert names(tokenizer, encoded.input_ids[0]) == kept and encoded.truncated == [1]
    for new in (0, 11):
        with pytest.raises(
            ValueError, match=f"max_new_tokens={new}: expected at least 1, and fewer"
        ):
            encode_prompts(rows, tokenizer, new, max_length=11)


def test_prompts_that_nothing_follows() -> None:
    for tokenizer in (byte_bpe(), marked_bpe()):
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
        with pytest.raises(RowError, match=r"f:1 \(id 'r'\): no tokens; write text that the token"):
            encode_prompts([Row("r", "xx", source="f:1")], tokenizer)
    with pytest.raises(RowError, match="this is a text row; use rows with 'prompt' here"):
        encode_prompts([Row("r", text="x")], byte_bpe())
    with pytest.raises(RowError, match="the prompt or a choice is empty"):
        encode_prompts([Row("r", "")], byte_bpe())


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_an_answer_is_the_only_choice(template: str) -> None:
    """All of its tokens, as a choice of that prompt has them, and the end token."""
    tokenizer = marked_bpe(template)
    for prompt in ("Topic", "Topic "):  # the space moves: there is a token "▁B"
        encoded = RowEncoder(tokenizer, ANSWERS, label_tokens="last")([answered(prompt, "B?A")])
        assert names(tokenizer, encoded.input_ids[0])[-5:] == ["▁T", *"opic"]
        (((ids,),),) = [encoded.choice_ids or []]
        assert names(tokenizer, ids) == ["▁B", "?", "A", "</s>"]
        assert (encoded.label_ids, encoded.labels, encoded.choices) == ([()], [None], [("B?A",)])
    rows = [answered("Topic:", f"{c} {d}") for c in "ABC" for d in "xyz"]
    found = RowEncoder(tokenizer, ANSWERS)(rows)
    (batch,) = batches(found, batch_size=9, pad_token_id=0)
    assert batch.label_ids is not None and batch.label_ids.shape == (9, 1, 5)
    for i, one in enumerate(rows):
        with_other = row("Topic:", one.answer or "", "zA")
        wanted = encode_choices([with_other], tokenizer, length_normalization="tokens")
        assert found.input_ids[i] == wanted.input_ids[0] and found.num_choices(i) == 1
        assert found.choice_ids is not None and wanted.choice_ids is not None
        assert found.choice_ids[i] == (((*(wanted.choice_ids[0] or ((),))[0], 2)),)


def test_answers_of_one_token_and_a_byte_tokenizer() -> None:
    tokenizer = byte_bpe()
    tokenizer.eos_token = ":Ċ"
    encoded = RowEncoder(tokenizer, ANSWERS)([answered("x:", "A"), answered("x:\n", "A")])
    ends = [[names(tokenizer, ids) for ids in one or ()] for one in encoded.choice_ids or []]
    assert ends == [[["ĠA", ":Ċ"]], [["A", ":Ċ"]]]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (answered("Topic", "AQ"), "the tokenizer does not know 'AQ'; write text that"),
        (answered("Topic", ""), "the prompt or the answer is empty"),
        (row("Topic", "A", "B"), "the row has no answer; write the text that is right"),
        (
            Row("r", text="x", source="f.jsonl:12"),
            "this is a text row; use rows with 'prompt' and 'answer'",
        ),
        (answered("x" * 9, "yyy"), "15 tokens, but the model takes 13; shorten the row, or let"),
    ],
)
def test_answers_that_cannot_be_learnt_from(made: Row, message: str) -> None:
    with pytest.raises(RowError, match=rf"^f\.jsonl:12 \(id 'r'\): {message}"):
        RowEncoder(marked_bpe(), ANSWERS, max_length=13)([made])
    with pytest.raises(RowError, match="the tokenizer has no end token, which follows an answer"):
        RowEncoder(byte_bpe(), ANSWERS)([answered("x", "y")])
    tokenizer = chat(marked_bpe(), "m.content", "m.content")
    merged = Row("r", messages=asks("xyz").messages, answer="A")
    with pytest.raises(RowError, match="merges with the first of the answer; end the prompt"):
        RowEncoder(tokenizer, ANSWERS)([merged])


def test_rows_without_choices_are_not_scored() -> None:
    for made in (Row("r", "x"), answered("x", "A")):
        with pytest.raises(RowError, match="the choices are None; give a tuple of two or more"):
            encode_choices([made], byte_bpe())


# --- the reference model --------------------------------------------------------------------------


def test_reference_label_tokens(shared: Path) -> None:
    """The label token is the last of 'Topic A': bare for most letters, '▁B' where that exists."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    rows = read_rows(shared / "data" / "clinc-domain" / "test.jsonl")
    encoded = encode_choices(rows, tokenizer, label_tokens="last")
    expected = tuple(tokenizer(f"Topic {letter}")["input_ids"][-1] for letter in LETTERS)
    assert encoded.label_ids == [expected] * 4500
    assert expected == (447, 368, 457, 455, 459, 453, 463, 320, 359, 454)
    assert encoded.input_ids[:50] == tokenizer([r.prompt for r in rows[:50]])["input_ids"]


def test_reference_accuracy_and_nll(shared: Path) -> None:
    """The published figures of the deterministic adapter, with plain transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = shared / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder),
        shared / "adapters" / "stories260K-clinc-domain",
    ).eval()
    rows = read_rows(shared / "data" / "clinc-domain" / "validation.jsonl", limit=1500)
    encoded = encode_choices(rows, tokenizer, label_tokens="last")
    log_probs = torch.empty(1500, 10)
    for batch in batches(encoded, batch_size=100, pad_token_id=0):
        assert batch.label_ids is not None
        with torch.inference_mode():
            position = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(**batch.model_inputs(), position_ids=position).logits[:, -1]
        log_probs[batch.indices] = logits.gather(-1, batch.label_ids).log_softmax(-1)
    labels = torch.tensor([label for label in encoded.labels if label is not None])
    accuracy = (log_probs.argmax(-1) == labels).double().mean().item()
    assert accuracy == pytest.approx(0.7627, abs=1e-3)
    assert torch.nn.functional.nll_loss(log_probs, labels).item() == pytest.approx(0.8803, abs=1e-3)


# --- answers of encoder-decoders ------------------------------------------------------------------


def test_answers_begin_anew() -> None:
    """The encoder reads the prompt with its special tokens, and a choice is what the decoder writes
    first: "▁B" is one token, and of "▁", "A" the last one where that is the convention."""
    tokenizer = marked_bpe("$A </s>")
    found = encode_answers([row("Topic:", "T", "B", label=1), row("x", "B", "T")], tokenizer)
    assert names(tokenizer, found.input_ids[0]) == ["▁T", *"opic:", "</s>"]
    assert names(tokenizer, found.input_ids[1]) == ["▁", "x", "</s>"]
    assert found.label_ids is not None and found.choice_ids is None
    assert [names(tokenizer, ids) for ids in found.label_ids] == [["▁T", "▁B"], ["▁B", "▁T"]]
    assert found.labels == [1, None] and found.choices == [("T", "B"), ("B", "T")]
    last = encode_answers([row("Topic:", "A", "B")], tokenizer, label_tokens="last")
    assert [names(tokenizer, ids) for ids in last.label_ids or []] == [["A", "▁B"]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no rows"),
        ([row("x", "A", "B")], "the choice 'A' is an answer of 2 tokens; name the choices"),
        ([row("x", "B", "B?A")], "the choice 'B[?]A' is an answer of 3 tokens"),
        ([row("x", "B", "B")], "the choices 'B' and 'B' are the same token"),
        ([row("x", "Ω", "B")], "does not know 'Ω'"),
        ([row("x" * 30, "T", "B")], "32 tokens, but the model takes 20; shorten the row"),
        ([Row(id="t", text="x", source="f:1")], "this is a text row"),
    ],
)
def test_answers_that_cannot_be_scored(rows: list[Row], message: str) -> None:
    with pytest.raises(RowError, match=message):
        encode_answers(rows, marked_bpe("$A </s>"), max_length=20)
