"""Generated tokenizers, rows made of their words, and what the tokenizers say of them.

A tokenizer is made from a `Spec`: the kind of model and of text around it, pieces drawn at random
from a corpus of the same words that prompts and choices are made of, and special tokens. Merges
are drawn, not counted: in this way pieces that no trainer would choose come up too.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from tfb.data.rows import Row

BOS, EOS = 1, 2
SPECIAL = ["<unk>", "<s>", "</s>"]
# How each takes whitespace beside it: not, on its left, on its right, on both sides.
MARKS = {"<|x|>": (False, False), "<|l|>": (True, False), "<|r|>": (False, True)}
MARKS |= {"<|b|>": (True, True)}
TEMPLATES = ("$A", "<s> $A", "$A </s>", "<s> $A </s>")
GPT = r"'s|'t| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
LETTERS = [*"ABCDEF"]
NUMBERS = ["1", "10", "100", "12", "2", "21"]
WORDS = ["yes", "yesterday", "no", "not", "bank", "banking", "small talk", "A B", "é", "AB", "a"]
ODD = [" ", " A", " B", "  A", "  B", " yes", "\nA", "A ", "\tB", "▁A", "A<|r|> B", "<|l|>A"]
PROMPT = ["Topic", "is it", "yes", "no", "bank", "A", "B", "a", "1", "12", "é", "Answer", "'", "☃"]
ENDS = ["", "", "", ":", "?", "'", " ", "\n", ":\n", "  ", "\t", ": \n ", "▁", "\u200b", *MARKS]


# --- tokenizers -----------------------------------------------------------------------------------


def letters_and_pairs() -> PreTrainedTokenizerFast:
    """64 tokens: letters, some pairs of them, a space, a line break; other characters have none."""
    pairs = [ALPHABET[i] + ALPHABET[(7 * i + 3) % 26] for i in range(26)]
    pieces = ["<pad>", "</s>", "Ġ", "Ċ", *ALPHABET, *pairs, *"ABCDEFGH"]
    merges = [(pair[0], pair[1]) for pair in pairs]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


@dataclass(frozen=True)
class Spec:
    """A tokenizer.

    Attributes:
        kind: a name of `KINDS`.
        over_spaces: whether pieces may run over a space. known: whether every character has a
            token (bytes, if need be), or some are <unk>.
        template: the special tokens around a text. turn: what else a kind may do in two ways.
        seed: of the pieces.
    """

    kind: str
    over_spaces: bool = False
    known: bool = True
    template: str = "<s> $A"
    turn: bool = False
    seed: int = 0

    @property
    def begins(self) -> bool:
        return self.template.startswith("<s>")


def corpus(rng: random.Random) -> list[str]:
    """Texts of the words of prompts and choices."""
    words = [*LETTERS, *NUMBERS, *WORDS, *PROMPT, ":", "?", "\n", "'"]
    return [" ".join(rng.choices(words, k=9)) for _ in range(6)]


def runs_over(piece: str, space: str) -> bool:
    return space in piece.lstrip(space)


def drawn_merges(
    rng: random.Random, texts: Sequence[str], space: str, spec: Spec, n: int = 60
) -> list[tuple[str, str]]:
    """Merges of pairs that stand side by side once the merges before them were made."""
    found: list[tuple[str, str]] = []
    split = [list(text) for text in texts]
    for _ in range(n):
        pairs = {pair for pieces in split for pair in itertools.pairwise(pieces)}
        fit = sorted(p for p in pairs if spec.over_spaces or not runs_over("".join(p), space))
        fit = [p for p in fit if "".join(p) not in map("".join, found)]
        if not fit:
            break
        left, right = pair = rng.choice(fit)
        found.append(pair)
        for pieces in split:
            for i in range(len(pieces) - 1, 0, -1):
                if pieces[i - 1 : i + 1] == [left, right]:
                    pieces[i - 1 : i + 1] = [left + right]
    return found


def numbered(pieces: Sequence[str]) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(dict.fromkeys([*SPECIAL, *pieces]))}


def marked_model(rng: random.Random, spec: Spec) -> models.BPE:
    """BPE over text with '▁' for a space."""
    texts = [f"▁{text.replace(' ', '▁')}" for text in corpus(rng)]
    characters = sorted({c for text in texts for c in text} - {"☃"})
    if not spec.known:
        characters = [c for c in characters if c == "▁" or rng.random() < 0.9]
    texts = ["".join(c for c in text if c in characters) for text in texts]
    merges = drawn_merges(rng, texts, "▁", spec)
    # Bytes as those of Llama, for characters that are no pieces.
    bytes_ = [f"<0x{i:02X}>" for i in range(256)] if spec.known else []
    return models.BPE(
        vocab=numbered([*bytes_, *characters, *map("".join, merges)]),
        merges=merges,
        unk_token="<unk>",
        byte_fallback=spec.known,
        fuse_unk=True,
    )


def prepended(rng: random.Random, spec: Spec) -> Tokenizer:
    """As Llama 2: '▁' in front of each stretch of text, nothing that splits words."""
    made = Tokenizer(marked_model(rng, spec))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return made


def metaspace(rng: random.Random, spec: Spec) -> Tokenizer:
    made = Tokenizer(marked_model(rng, spec))
    made.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme=rng.choice(["always", "first", "never"]), split=spec.turn
    )
    return made


def byte_level(rng: random.Random, spec: Spec) -> Tokenizer:
    """As GPT-2 and Llama 3 (turn: words are split before), or without."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=rng.random() < 0.3, use_regex=False)
    texts = ["".join(piece for piece, _ in level.pre_tokenize_str(t)) for t in corpus(rng)]
    merges = drawn_merges(rng, texts, "Ġ", spec)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(
        models.BPE(
            vocab=numbered([*alphabet, *map("".join, merges)]),
            merges=merges,
            ignore_merges=rng.random() < 0.5,
        )
    )
    if spec.turn:
        split = pre_tokenizers.Split(Regex(GPT), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    else:
        made.pre_tokenizer = level
    return made


def unigram(rng: random.Random, spec: Spec) -> Tokenizer:
    texts = [f"▁{text.replace(' ', '▁')}" for text in corpus(rng)]
    characters = sorted({c for text in texts for c in text} - {"☃"})
    if not spec.known:
        characters = [c for c in characters if c == "▁" or rng.random() < 0.9]
    pieces = []
    for _ in range(150):
        text = rng.choice(texts)
        at = rng.randrange(len(text))
        pieces.append(text[at : at + rng.randint(2, 6)])
    pieces = [p for p in pieces if spec.over_spaces or not runs_over(p, "▁")]
    scored = [(piece, -rng.uniform(1, 12)) for piece in numbered([*characters, *pieces])]
    made = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme=rng.choice(["always", "first"]), split=spec.turn
    )
    return made


def cleaned(rng: random.Random, spec: Spec) -> Tokenizer:
    """As XGLM: characters are made plain first, among them spaces of no width spaces."""
    made = unigram(rng, spec)
    collapsed = normalizers.Replace(Regex(" {2,}"), " ")
    made.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), collapsed])
    return made


def wordpiece(rng: random.Random, spec: Spec) -> Tokenizer:
    words = sorted({word for text in corpus(rng) for word in text.split()})
    pieces = sorted({c for word in words for c in word})
    if not spec.known:
        pieces = [c for c in pieces if rng.random() < 0.9]
    pieces += [f"##{c}" for c in pieces]
    for word in words:
        at = rng.randrange(len(word))
        pieces += [word[: at + 1], f"##{word[at:]}"]
    if spec.over_spaces:  # never met
        pieces.append("a b")
    made = Tokenizer(models.WordPiece(numbered(pieces), unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=spec.turn)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def word_level(rng: random.Random, spec: Spec) -> Tokenizer:
    words = sorted({word for text in corpus(rng) for word in text.split()})
    if not spec.known:
        words = [word for word in words if rng.random() < 0.9]
    if spec.over_spaces:
        words.append("a b")
    made = Tokenizer(models.WordLevel(numbered(words), unk_token="<unk>"))
    plain, split = pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Whitespace()
    made.pre_tokenizer = plain if spec.turn else split
    return made


KINDS = {
    "prepended": prepended,
    "metaspace": metaspace,
    "byte-level": byte_level,
    "unigram": unigram,
    "cleaned": cleaned,
    "wordpiece": wordpiece,
    "word-level": word_level,
}


def wrapped(made: Tokenizer, template: str) -> Any:
    """The tokenizer as transformers', with special tokens and `MARKS`."""
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    marks = [
        AddedToken(name, lstrip=left, rstrip=right, normalized=False, special=True)
        for name, (left, right) in MARKS.items()
    ]
    tokenizer.add_tokens(marks, special_tokens=True)
    return tokenizer


@functools.cache
def tokenizer_of(spec: Spec) -> Any:
    rng = random.Random(f"{spec.kind} {spec.over_spaces} {spec.known} {spec.turn} {spec.seed}")
    return wrapped(KINDS[spec.kind](rng, spec), spec.template)


# --- what the tokenizers say ----------------------------------------------------------------------

Split = tuple[list[int], list[list[int]]]


def tokens_of(spec: Spec, text: str) -> list[int]:
    """The tokens of a text: one <s> in front where the template or the text has one, and no special
    tokens after it but its own."""
    ids = list(tokenizer_of(spec)(text, add_special_tokens=False)["input_ids"])
    if ids[:1] == [BOS]:
        return ids
    return [BOS, *ids] if spec.begins else ids


def joined(row: Row) -> list[str]:
    """The texts of a row, its prompt with each of its choices."""
    assert row.prompt is not None and row.choices is not None
    bare = not row.prompt[-1].isspace()
    return [row.prompt + " " * (bare and not c[0].isspace()) + c for c in row.choices]


def split_of(spec: Spec, row: Row) -> Split | None:
    """The prompt's tokens and those that each choice adds, where the first begin every text."""
    assert row.prompt is not None
    texts = [tokens_of(spec, text) for text in joined(row)]
    for prompt in dict.fromkeys([row.prompt, row.prompt.rstrip()]):
        ids = tokens_of(spec, prompt)
        if ids and all(text[: len(ids)] == ids for text in texts):
            return ids, [text[len(ids) :] for text in texts]
    return None


def is_usable(choices: list[list[int]]) -> bool:
    """Whether choices can be told apart, by tokens that the tokenizer knows."""
    return all(choices) and not any(0 in ids for ids in choices) and not equal(choices)


def equal(choices: Sequence[Sequence[int]]) -> bool:
    return len(set(map(tuple, choices))) < len(choices)


# --- strategies -----------------------------------------------------------------------------------

SPECS = st.builds(
    Spec,
    kind=st.sampled_from([*KINDS]),
    over_spaces=st.sampled_from([False, False, True]),
    known=st.booleans(),
    template=st.sampled_from(TEMPLATES),
    turn=st.booleans(),
    seed=st.integers(0, 5),
)
PROMPTS = st.builds(
    lambda words, gap, end: gap.join(words) + end,
    st.lists(st.sampled_from(PROMPT), min_size=1, max_size=5),
    st.sampled_from([" ", " ", "", "  ", "\n"]),
    st.sampled_from(ENDS),
)
CHOICES = st.one_of(
    *(
        st.lists(st.sampled_from(pool), min_size=2, max_size=4, unique=True)
        for pool in (LETTERS, NUMBERS, WORDS, ODD, [*LETTERS, *NUMBERS, *WORDS, *ODD])
    ),
    # One begins another, or all begin alike.
    st.builds(
        lambda stem, ends: [stem + end for end in ends],
        st.sampled_from([*WORDS, *NUMBERS, " A"]),
        st.lists(st.sampled_from(["", "A", " B", "1", "s", " no"]), min_size=2, unique=True),
    ),
)


def row_of(prompt: str, choices: Sequence[str], number: int = 0) -> Row:
    return Row(id=str(number), prompt=prompt, choices=tuple(choices))


ROWS = st.builds(row_of, PROMPTS, CHOICES)
