"""Task rows to token ids: what the model reads, and by which tokens a choice is scored.

A choice of a causal language model is scored as the continuation of its prompt. ' A' and 'A' are
different tokens, and which of them follows is the tokenizer's business, so prompt + choice is
tokenized as one text:

1. Join. Where neither the prompt ends nor the choice starts with whitespace, `separator` (one
   space) goes between them: "Topic" + "A" is read as "Topic A". After chat messages it is the
   whitespace that the chat template writes between its generation prompt and an answer.
2. The prompt's tokens must be a prefix of the whole text's tokens. Where they are not ("Answer: "
   + "A", where most tokenizers have a token " A"), the whitespace that ends the prompt is moved
   into the choices, for all choices of the row alike. Where that does not help: `RowError`.
3. All tokens after the prompt's are the choice's: it is scored by the sum of their
   log-probabilities (`tfb.sampling.choices`). First tokens that all choices of a row share are moved into
   the prompt: their probability is a factor of every choice's, so it cancels. Not where sums are
   divided by the number of tokens, which they would change.
   `label_tokens="last"` is the convention of the authors' scripts instead: the last token of each
   choice, right after the prompt.

Where one token of each choice is left, the row is scored by these columns of one position's logits.
For choices of one token that is the same: a softmax over log-probabilities is one over logits.

Special tokens in front (BOS) are kept, exactly one where the text itself begins with it; those at
the end (EOS, SEP) are removed from choice rows, since the model is to continue the prompt. Text
rows keep what the tokenizer adds. Nothing is truncated unless `truncate` says on which side.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NoReturn

from tfb.data.batching import EncodedRows
from tfb.data.rows import Row, RowError

Tokenizer = Any  # a transformers tokenizer; importing its type would import all of transformers
Pair = tuple[str, list[str]]  # a prompt, and its choices as they continue it
Tokens = tuple[list[int], list[list[int]]]  # the same as token ids

LABEL_TOKENS = ("all", "last")
SIDES = ("left", "right")
# Rows tokenized in one call: enough to occupy the tokenizer, small enough for memory.
CHUNK = 1024
_PUNCTUATION = frozenset(string.punctuation)


def check_label_tokens(value: Any) -> None:
    """Raise ValueError for an unknown convention."""
    if value not in LABEL_TOKENS:
        raise ValueError(f"label_tokens={value!r}: expected one of {', '.join(LABEL_TOKENS)}")


def check_truncate(value: Any) -> None:
    """Raise ValueError for an unknown side."""
    if value is not None and value not in SIDES:
        raise ValueError(f"truncate={value!r}: expected one of {', '.join(SIDES)}, or None")


class RowEncoder:
    """Encodes the rows of one task for one tokenizer and one model; the rule is at the top.

    Args:
        tokenizer: of transformers.
        task: "CAUSAL_LM" and "SEQ_2_SEQ_LM" take choice rows, "SEQ_CLS" text rows.
        num_labels: classes of a SEQ_CLS head.
        max_length: the most tokens that the model takes; None: the tokenizer's
            `model_max_length`.
        label_tokens: "all" tokens of a choice, or the "last" one right after the prompt.
        length_normalization: how the tokens of a choice are scored, see :mod:`tfb.sampling.choices`.
        truncate: None: a longer row is an error. "left" or "right": the side on which its prompt
            or text loses tokens; special tokens and choices stay.
        separator: goes between prompt and choice where neither brings whitespace; "" joins them
            directly, for scripts without spaces.

    Raises:
        ValueError: an unknown setting, or fewer than two labels.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        task: str = "CAUSAL_LM",
        *,
        num_labels: int | None = None,
        max_length: int | None = None,
        label_tokens: str = "all",
        length_normalization: str = "none",
        truncate: str | None = None,
        separator: str = " ",
    ) -> None:
        check_label_tokens(label_tokens)
        check_truncate(truncate)
        if task == "SEQ_CLS" and (num_labels is None or num_labels < 2):
            raise ValueError(f"num_labels must be at least 2, got {num_labels}")
        self.tokenizer, self.task, self.num_labels = tokenizer, task, num_labels
        self.label_tokens, self.truncate, self.separator = label_tokens, truncate, separator
        # A tokenizer that knows no limit reports a huge number, which no row exceeds.
        self.limit = int(tokenizer.model_max_length if max_length is None else max_length)
        self._unknown = tokenizer.unk_token_id  # a property that is slow to ask for
        self._shares = length_normalization == "none"
        self._front: list[int] = []
        self._front, self._back = self._around()

    @classmethod
    def of(cls, tokenizer: Tokenizer, task: str, config: Any, **options: Any) -> RowEncoder:
        """For a model's task and configuration; its weights need not be there."""
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and task != "CAUSAL_LM":
            # RoBERTa has 514 positions and takes 512 tokens, which its tokenizer knows.
            limit = min(limit, tokenizer.model_max_length)
        labels = int(config.num_labels) if task == "SEQ_CLS" else None
        return cls(tokenizer, task, num_labels=labels, max_length=limit, **options)

    def __call__(self, rows: Sequence[Row]) -> EncodedRows:
        """Encode rows, in their order.

        Raises:
            RowError: no rows, a row of the other kind, a row longer than the model takes, a label
                outside the classes, a choice with tokens that the tokenizer does not know, two
                choices of the same tokens, a prompt that merges with its choices, messages that
                the chat template refuses, or, of an encoder-decoder, a choice of several tokens.
        """
        if not rows:
            raise RowError("there are no rows to encode; give at least one")
        for row in rows:
            self._check_row(row)
        makers = {"SEQ_CLS": self._texts, "SEQ_2_SEQ_LM": self._answers}
        return makers.get(self.task, self._choices)(rows)

    # --- the three kinds of rows ------------------------------------------------------------------

    def _choices(self, rows: Sequence[Row]) -> EncodedRows:
        """Prompts of a causal language model, and the tokens of their choices."""
        input_ids, cut, continuations = [], [], []
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            for row, tokens in zip(
                chunk, self._tokens([self._pair(row) for row in chunk]), strict=True
            ):
                if tokens is None:
                    _fail(
                        row,
                        "the last token of the prompt merges with the first of a choice",
                        "end the prompt differently, for instance with a colon or a whole word",
                    )
                prompt, choices = tokens
                if self.label_tokens == "last":
                    choices = [ids[-1:] for ids in choices]
                self._check_choices(row, choices)
                # A choice's last token is scored but never read.
                prompt, left_out = self._fit(row, prompt, self.limit + 1 - max(map(len, choices)))
                shared = _shared(choices) if self._shares else 0
                input_ids.append(prompt + choices[0][:shared])
                cut.append(left_out)
                continuations.append(tuple(tuple(ids[shared:]) for ids in choices))
        single = [all(len(ids) == 1 for ids in choices) for choices in continuations]
        kinds = list(zip(continuations, single, strict=True))
        label_ids = [tuple(ids for (ids,) in c) if one else () for c, one in kinds]
        several = None if all(single) else [None if one else c for c, one in kinds]
        return _encoded(rows, input_ids, cut, label_ids=label_ids, choice_ids=several)

    def _answers(self, rows: Sequence[Row]) -> EncodedRows:
        """Prompts as an encoder reads them, and each choice as the first token that a decoder
        writes, where nothing precedes it."""
        texts = list(dict.fromkeys(choice for row in rows for choice in row.choices or ()))
        answers = self.tokenizer(text_target=texts, add_special_tokens=False, verbose=False)
        known = {c: list(ids) for c, ids in zip(texts, answers["input_ids"], strict=True)}
        input_ids, cut, label_ids = [], [], []
        prompts = self._ids([self._pair(row)[0] for row in rows])
        for row, prompt in zip(rows, prompts, strict=True):
            found = [known[choice] for choice in row.choices or ()]
            if self.label_tokens == "last":
                found = [ids[-1:] for ids in found]
            self._check_choices(row, found)
            for choice, ids in zip(row.choices or (), found, strict=True):
                if len(ids) > 1:
                    _fail(
                        row,
                        f"the choice {choice!r} is an answer of {len(ids)} tokens",
                        "name the choices of an encoder-decoder by single tokens, such as letters; "
                        "if it was trained on the last token alone: label_tokens 'last'",
                    )
            label_ids.append(tuple(ids[0] for ids in found))
            prompt, left_out = self._fit(row, prompt, self.limit, self._back)
            input_ids.append(prompt)
            cut.append(left_out)
        return _encoded(rows, input_ids, cut, label_ids=label_ids)

    def _texts(self, rows: Sequence[Row]) -> EncodedRows:
        """Texts for a sequence-classification head."""
        texts = [row.text for row in rows]
        batch = self.tokenizer(texts, return_attention_mask=False, verbose=False)
        found = [self._one_front(ids) for ids in batch["input_ids"]]
        fitted = [
            self._fit(row, ids, self.limit, self._back)
            for row, ids in zip(rows, found, strict=True)
        ]
        input_ids, cut = (list(column) for column in zip(*fitted, strict=True))
        types = batch.get("token_type_ids")
        if types is not None:  # one text a row is one segment: where its types are cut is the same
            types = [list(t)[: len(ids)] for t, ids in zip(types, input_ids, strict=True)]
        return _encoded(rows, input_ids, cut, num_labels=self.num_labels, token_type_ids=types)

    # --- prompts and choices as text --------------------------------------------------------------

    def _pair(self, row: Row) -> Pair:
        """The prompt, and the choices as they continue it."""
        prompt, separator = row.prompt or "", self.separator
        if row.messages is not None:
            prompt = self._rendered(row)
            separator = self._before_answers
        bare = not prompt[-1].isspace()
        choices = row.choices or ()
        return prompt, [separator + c if bare and not c[0].isspace() else c for c in choices]

    def _rendered(self, row: Row) -> str:
        """A row's messages through the tokenizer's chat template, with its generation prompt."""
        if not getattr(self.tokenizer, "chat_template", None):
            _fail(
                row,
                "the row has messages, but the tokenizer has no chat template",
                "use the chat model's tokenizer, or write the text into 'prompt'",
            )
        render = self.tokenizer.apply_chat_template
        try:
            text = str(render(list(row.messages or ()), tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a program that came with the tokenizer
            fault = f"the chat template refuses the messages ({error})"
            _fail(row, fault, "order and name the roles as it expects them")
        if not text:
            fault = "the chat template makes an empty prompt of the messages"
            _fail(row, fault, "check the template, or write the text into 'prompt'")
        return text

    @cached_property
    def _before_answers(self) -> str:
        """The whitespace that the chat template writes between its generation prompt and an
        answer, told by a conversation of its own."""
        question = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": "Answer"}
        render = self.tokenizer.apply_chat_template
        try:
            prompt = str(render([question], tokenize=False, add_generation_prompt=True))
            whole = str(render([question, answer], tokenize=False))
        except Exception:  # a template for other conversations
            return ""
        between = whole[len(prompt) :].partition("Answer")[0]
        return between if whole.startswith(prompt) and between.isspace() else ""

    # --- text to tokens ---------------------------------------------------------------------------

    def _tokens(self, pairs: list[Pair]) -> list[Tokens | None]:
        """Per pair the prompt's tokens and each choice's continuation; None where they merge."""
        found = self._spliced(pairs)
        left = [i for i, tokens in enumerate(found) if tokens is None]
        for i, tokens in zip(left, self._whole([pairs[i] for i in left]), strict=True):
            found[i] = tokens
        left = [i for i in left if found[i] is None and pairs[i][0][-1].isspace()]
        moved = [_move_whitespace(*pairs[i]) for i in left]
        for i, tokens in zip(left, self._whole(moved), strict=True):
            found[i] = tokens
        return found

    def _whole(self, pairs: list[Pair]) -> list[Tokens | None]:
        """``_tokens`` from every text as a whole."""
        if not pairs:
            return []
        texts = [
            text for prompt, choices in pairs for text in (prompt, *map(prompt.__add__, choices))
        ]
        encoded = iter(self._ids(texts, ended=False))
        result: list[Tokens | None] = []
        for _, choices in pairs:
            prompt, *whole = (next(encoded) for _ in range(1 + len(choices)))
            merged = not prompt or any(ids[: len(prompt)] != prompt for ids in whole)
            result.append(None if merged else (prompt, [ids[len(prompt) :] for ids in whole]))
        return result

    def _spliced(self, pairs: list[Pair]) -> list[Tokens | None]:
        """``_whole`` from one text a row and one for each distinct choice, None where that need
        not be the same.

        Between a prompt and a choice that begins with one space, no token and no merge can lie if
        no token of the vocabulary goes on over a space: BPE merges and Unigram paths on the two
        sides are then independent, and words are split there. What a tokenizer does before its
        model sees the text could differ where characters are rewritten or added tokens take the
        spaces beside them: such rows are left out, and every row is checked with one of its
        choices.
        """
        found: list[Tokens | None] = [None] * len(pairs)
        if not self._breaks_at_spaces:
            return found
        able = [
            i
            for i, (prompt, choices) in enumerate(pairs)
            if not prompt.endswith(self._added_tokens)
            and _is_plain(prompt[-1])
            and all(c[:1] == " " and _is_plain(c[1:2]) for c in choices)
        ]
        distinct = list(dict.fromkeys(choice for i in able for choice in pairs[i][1]))
        after = self._whole([("a", distinct)])[0] if distinct else None
        if after is None:
            return found
        known = dict(zip(distinct, after[1], strict=True))
        checked = [pairs[i][1][i % len(pairs[i][1])] for i in able]
        texts = [pairs[i][0] + choice for i, choice in zip(able, checked, strict=True)]
        for i, choice, ids in zip(able, checked, self._ids(texts, ended=False), strict=True):
            end = len(ids) - len(known[choice])
            tokens = [known[c] for c in pairs[i][1]]
            whole = 0 < end < len(ids) and ids[end:] == known[choice]
            # A prompt's last character that has no token may hide what happened to the space.
            if whole and ids[end - 1] not in self._spaces and all(map(self._is_known, tokens)):
                found[i] = ids[:end], tokens
        return found

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return dict(self.tokenizer.get_vocab())

    @cached_property
    def _added_tokens(self) -> tuple[str, ...]:
        return tuple(str(token) for token in self.tokenizer.added_tokens_decoder.values())

    @property
    def _marks(self) -> str:
        """What stands for a space in tokens: "▁" is SentencePiece's, "Ġ" that of bytes."""
        return "▁ " if "▁" in self._vocabulary else "▁Ġ "

    @cached_property
    def _breaks_at_spaces(self) -> bool:
        """Whether no token of the vocabulary goes on over a space (after a line break it may, with
        which no prompt ends here)."""
        over = re.compile(rf"[^{self._marks}\sĊčĉ][{self._marks}]")
        return not any(over.search(token) for token in self._vocabulary)

    @cached_property
    def _spaces(self) -> frozenset[int]:
        """The tokens that are nothing but spaces."""
        found = self._vocabulary.items()
        return frozenset(i for token, i in found if not token.strip(self._marks))

    def _ids(self, texts: list[str], *, ended: bool = True, **options: bool) -> list[list[int]]:
        """Token ids; not ``ended``: without the special tokens at the end."""
        batch = self.tokenizer(
            texts,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # it would warn of long texts, which are checked here
            **options,
        )
        back = 0 if ended else self._back
        return [self._one_front(ids[: len(ids) - back]) for ids in batch["input_ids"]]

    def _one_front(self, ids: Sequence[int]) -> list[int]:
        """The ids without a special token in front that the text brought and the tokenizer added
        once more."""
        found, n = list(ids), len(self._front)
        while n and found[:n] == found[n : 2 * n] == self._front:
            found = found[n:]
        return found

    def _around(self) -> tuple[list[int], int]:
        """The special tokens that the tokenizer puts before a text, and how many after it."""
        for text in self._texts_with_tokens():
            (bare,), (full,) = self._ids([text], add_special_tokens=False), self._ids([text])
            for start in range(len(full) - len(bare) + 1) if bare else ():
                if full[start : start + len(bare)] == bare:
                    return full[:start], len(full) - len(bare) - start
        return [], 0

    def _texts_with_tokens(self) -> Iterator[str]:
        yield "a"
        yield from sorted(self._vocabulary.keys() - {*self._added_tokens})  # alphabets without "a"

    # --- checks -----------------------------------------------------------------------------------

    def _check_row(self, row: Row) -> None:
        """Refuse a row of the other kind, or one by hand that no reader would have made."""
        if self.task == "SEQ_CLS":
            if row.text is None:
                _fail(row, "this is a choice row", "use rows with 'text' for a classification head")
            K, kind = self.num_labels or 0, "model's {} classes"
            other = ", or a model with that class"
        else:
            if row.choices is None:
                _fail(row, "this is a text row", "use rows with 'prompt' and 'choices' here")
            if row.prompt == "" or not all(row.choices):
                _fail(row, "the prompt or a choice is empty", "write some text into it")
            K, kind, other = len(row.choices), "{} choices", ""
            if K < 2:
                _fail(row, f"the choices are {row.choices!r}", "give a tuple of two or more")
        if row.label is not None and not 0 <= row.label < K:
            fault = f"the label {row.label} is outside the {kind.format(K)}"
            _fail(row, fault, f"use an index from 0 to {K - 1}{other}")

    def _check_choices(self, row: Row, found: list[list[int]]) -> None:
        """Refuse choices that have no tokens, unknown tokens, or those of another choice."""
        choices, seen = row.choices or (), dict[tuple[int, ...], int]()
        for i, (choice, ids) in enumerate(zip(choices, found, strict=True)):
            if not ids:
                fault = f"the choice {choice!r} adds no token to this prompt"
                _fail(row, fault, "use choices that the tokenizer has tokens for")
            if not self._is_known(ids):
                fault = f"the tokenizer does not know the choice {choice!r}"
                _fail(row, fault, "use choices that the tokenizer has tokens for")
            first = seen.setdefault(tuple(ids), i)
            if first < i:
                same = "token" if len(ids) == 1 else "tokens"
                last = "" if self.label_tokens == "all" else " by label_tokens 'last'"
                _fail(
                    row,
                    f"the choices {choices[first]!r} and {choice!r} are the same {same}{last} "
                    f"({', '.join(map(str, ids))})",
                    "use choices that differ in more than whitespace, such as letters",
                )

    def _is_known(self, ids: list[int]) -> bool:
        return self._unknown not in ids

    def _fit(self, row: Row, ids: list[int], room: int, back: int = 0) -> tuple[list[int], int]:
        """At most ``room`` tokens of ``ids``, and how many were left out.

        back: special tokens at the end of ``ids``.
        """
        over = len(ids) - room
        if over <= 0:
            return ids, 0
        tokens = len(ids) + self.limit - room
        fault = f"{tokens} tokens, but the model takes {self.limit}"
        if self.truncate is None:
            _fail(row, fault, "shorten the row, or let it be cut (truncate: left or right)")
        front = len(self._front)
        if not front and ids[:1] == [self.tokenizer.bos_token_id]:  # a chat template's own
            front = 1
        body = ids[front : len(ids) - back]
        if over >= len(body):
            _fail(row, f"{fault}, and truncation would leave nothing of the prompt", "shorten it")
        body = body[over:] if self.truncate == "left" else body[: len(body) - over]
        return [*ids[:front], *body, *ids[len(ids) - back :]], over


def _encoded(
    rows: Sequence[Row], input_ids: list[list[int]], truncated: list[int], **fields: Any
) -> EncodedRows:
    found: dict[str, Any] = {"label_ids": None, **fields}
    return EncodedRows(
        ids=[row.id for row in rows],
        input_ids=input_ids,
        labels=[row.label for row in rows],
        choices=None if rows[0].choices is None else [row.choices or () for row in rows],
        truncated=truncated,
        **found,
    )


def _is_plain(character: str) -> bool:
    """Whether no tokenizer takes it for a space, or writes a space with it."""
    return character.isalnum() or character in _PUNCTUATION


def _shared(choices: list[list[int]]) -> int:
    """The number of first tokens that all choices have in common, each keeping one token."""
    most, n = min(map(len, choices)) - 1, 0
    while n < most and len({ids[n] for ids in choices}) == 1:
        n += 1
    return n


def _move_whitespace(prompt: str, choices: list[str]) -> Pair:
    """The same texts, with the whitespace that ends the prompt given to the choices."""
    short = prompt.rstrip()
    return short, [prompt[len(short) :] + choice for choice in choices]


def _fail(row: Row, fault: str, remedy: str) -> NoReturn:
    raise RowError(f"{row.source} (id {row.id!r}): {fault}; {remedy}")
