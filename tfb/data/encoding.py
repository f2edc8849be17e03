"""Task rows to token ids: what the model reads, and by which tokens a choice is scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NoReturn

from tfb.data.batching import EncodedRows
from tfb.data.rows import Row, RowError
from tfb.data.splicing import Splicer, Tokens, Written

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

LABEL_TOKENS = ("all", "last")
SIDES = ("left", "right")
CHUNK = 256  # rows tokenized in one call: enough to occupy the tokenizer, few enough for memory


def check_label_tokens(value: str) -> None:
    """Raise ValueError for an unknown convention."""
    if value not in LABEL_TOKENS:
        raise ValueError(f"label_tokens={value!r}: expected one of {', '.join(LABEL_TOKENS)}")


def check_truncate(value: str | None) -> None:
    """Raise ValueError for an unknown side."""
    if value is not None and value not in SIDES:
        raise ValueError(f"truncate={value!r}: expected one of {', '.join(SIDES)}, or None")


class RowEncoder:
    """Encodes the rows of one task for one tokenizer and one model.

    Which token follows a prompt, ' A' or 'A', is the tokenizer's business. So the prompt and each
    choice of a causal language model are tokenized as one text:

    1. A space joins them where neither brings whitespace; after chat messages, the whitespace that
       the template writes before an answer.
    2. Where the prompt's tokens do not begin the whole text's ("Answer: " + "A", where most
       tokenizers have a token " A"), the whitespace that ends the prompt moves into all choices of
       the row. Where that does not help, the row is an error.
    3. The tokens that follow are the choice's. First tokens that all choices share move into the
       prompt: their probability cancels. Not where scores are divided by the number of tokens.

    One set of special tokens stays in front; those at the end of choice rows are removed.

    Args:
        tokenizer: of transformers.
        task: "CAUSAL_LM" and "SEQ_2_SEQ_LM" take choice rows, "SEQ_CLS" text rows.
        num_labels: classes of a SEQ_CLS head.
        max_length: most tokens that the model takes; None: the tokenizer's `model_max_length`.
        label_tokens: "all" tokens of a choice, or, as in the authors' scripts, the "last" one right
            after the prompt.
        length_normalization: how a choice's tokens are scored, see :mod:`tfb.sampling.choices`.
        truncate: side on which a prompt or text that is too long loses tokens, "left" or "right";
            None: it is an error.

    Raises:
        ValueError: an unknown setting, or fewer than two labels.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: str = "CAUSAL_LM",
        *,
        num_labels: int | None = None,
        max_length: int | None = None,
        label_tokens: str = "all",
        length_normalization: str = "none",
        truncate: str | None = None,
    ) -> None:
        check_label_tokens(label_tokens)
        check_truncate(truncate)
        if task == "SEQ_CLS" and (num_labels is None or num_labels < 2):
            raise ValueError(f"num_labels must be at least 2, got {num_labels}")
        self.tokenizer, self.task, self.num_labels = tokenizer, task, num_labels
        self.label_tokens, self.truncate = label_tokens, truncate
        # A tokenizer that knows no limit reports a huge number, which no row exceeds.
        self.limit = int(tokenizer.model_max_length if max_length is None else max_length)
        self._unknown = tokenizer.unk_token_id  # a property that is slow to ask for
        self._shares = length_normalization == "none"
        self._front: list[int] = []
        self._front, self._back = self._around()
        self._spliced = Splicer(tokenizer, partial(self._ids, ended=False))

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, task: str, config: PreTrainedConfig, **options: Any
    ) -> RowEncoder:
        """Make an encoder for a model's task and configuration; its weights need not be there."""
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and task != "CAUSAL_LM":
            # RoBERTa has 514 positions and takes 512 tokens, which its tokenizer knows.
            limit = min(limit, tokenizer.model_max_length)
        labels = config.num_labels if task == "SEQ_CLS" else None
        return cls(tokenizer, task, num_labels=labels, max_length=limit, **options)

    def __call__(self, rows: Sequence[Row]) -> EncodedRows:
        """Encode rows, in their order.

        Raises:
            RowError: no rows, or one that cannot be scored; the message says why.
        """
        if not rows:
            raise RowError("there are no rows to encode; give at least one")
        for row in rows:
            self._check_row(row)
        columns = self._texts(rows) if self.task == "SEQ_CLS" else self._choices(rows)
        return EncodedRows(
            ids=[row.id for row in rows], labels=[row.label for row in rows], **columns
        )

    # --- the two kinds of rows --------------------------------------------------------------------

    def _texts(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Encode texts for a sequence-classification head."""
        batch = self.tokenizer([row.text for row in rows], verbose=False)
        found = zip(rows, map(self._one_front, batch["input_ids"]), strict=True)
        fitted = [self._fit(row, ids, self.limit, self._back) for row, ids in found]
        input_ids, cut = map(list, zip(*fitted, strict=True))
        types = batch.get("token_type_ids")
        if types is not None:  # one text a row is one segment: where its types are cut is the same
            types = [list(t)[: len(ids)] for t, ids in zip(types, input_ids, strict=True)]
        return {
            "input_ids": input_ids,
            "truncated": cut,
            "label_ids": None,
            "choices": None,
            "num_labels": self.num_labels,
            "token_type_ids": types,
        }

    def _choices(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Encode prompts of a language model, and the tokens of their choices."""
        tokenize = self._answers if self.task == "SEQ_2_SEQ_LM" else self._continuations
        fitted = []
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            fitted += [self._choice_row(*pair) for pair in zip(chunk, tokenize(chunk), strict=True)]
        input_ids, choices, cut = map(list, zip(*fitted, strict=True))
        single = [all(len(ids) == 1 for ids in row) for row in choices]
        kinds = list(zip(choices, single, strict=True))
        return {
            "input_ids": input_ids,
            "truncated": cut,
            "choices": [row.choices for row in rows],
            "label_ids": [tuple(ids for (ids,) in c) if one else () for c, one in kinds],
            "choice_ids": None if all(single) else [None if one else c for c, one in kinds],
        }

    def _choice_row(
        self, row: Row, tokens: Tokens | None
    ) -> tuple[list[int], tuple[tuple[int, ...], ...], int]:
        """Return what the model reads, the tokens of each choice, and how many were left out."""
        if tokens is None:
            fault = "the last token of the prompt merges with the first of a choice"
            _fail(row, fault, "end the prompt differently, for instance with a colon")
        prompt, choices = tokens
        if self.label_tokens == "last":
            choices = [ids[-1:] for ids in choices]
        self._check_choices(row, choices)
        # A choice's last token is scored but never read.
        room = self.limit + 1 - max(map(len, choices))
        back = self._back if self.task == "SEQ_2_SEQ_LM" else 0
        prompt, left_out = self._fit(row, prompt, room, back)
        shared = _shared(choices) if self._shares else 0
        return prompt + choices[0][:shared], tuple(tuple(c[shared:]) for c in choices), left_out

    # --- prompts and choices as text --------------------------------------------------------------

    def _written(self, row: Row) -> Written:
        """Return the prompt, and the whole text with each choice."""
        prompt, between = row.prompt or "", " "
        if row.messages is not None:
            prompt, between = self._rendered(row), self._before_answers
        if prompt[-1:].isspace():
            between = ""
        return prompt, [prompt + between * (not c[0].isspace()) + c for c in row.choices or ()]

    def _rendered(self, row: Row) -> str:
        """Render messages by the tokenizer's chat template, with its generation prompt."""
        if not getattr(self.tokenizer, "chat_template", None):
            fault = "the row has messages, but the tokenizer has no chat template"
            _fail(row, fault, "use the chat model's tokenizer, or write the text into 'prompt'")
        try:
            return self._render([dict(message) for message in row.messages or ()], prompt=True)
        except Exception as error:  # a program that came with the tokenizer
            fault = f"the chat template refuses the messages ({error})"
            _fail(row, fault, "order and name the roles as it expects them")

    @cached_property
    def _before_answers(self) -> str:
        """The whitespace between the chat template's generation prompt and an answer."""
        question = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": "Answer"}
        try:
            prompt = self._render([question], prompt=True)
            whole = self._render([question, answer], prompt=False)
        except Exception:  # a template for other conversations
            return ""
        between = whole[len(prompt) :].partition("Answer")[0]
        return between if whole.startswith(prompt) and between.isspace() else ""

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool) -> str:
        render = self.tokenizer.apply_chat_template
        return str(render(messages, tokenize=False, add_generation_prompt=prompt))

    # --- text to tokens ---------------------------------------------------------------------------

    def _answers(self, rows: Sequence[Row]) -> list[Tokens]:
        """Tokenize prompts for an encoder, and choices as a decoder begins to write them."""
        texts = list(dict.fromkeys(choice for row in rows for choice in row.choices or ()))
        answers = self.tokenizer(text_target=texts, add_special_tokens=False, verbose=False)
        known = dict(zip(texts, map(list, answers["input_ids"]), strict=True))
        prompts = self._ids([self._written(row)[0] for row in rows])
        choices = [[known[choice] for choice in row.choices or ()] for row in rows]
        return list(zip(prompts, choices, strict=True))

    def _continuations(self, rows: Sequence[Row]) -> list[Tokens | None]:
        """Return each prompt's tokens and its choices' continuations; None where they merge."""
        written = [self._written(row) for row in rows]
        found = self._spliced(written)
        left = [i for i, tokens in enumerate(found) if tokens is None]
        for i, tokens in zip(left, self._whole([written[i] for i in left]), strict=True):
            found[i] = tokens
        return found

    def _whole(self, written: list[Written]) -> list[Tokens | None]:
        """Do what ``_continuations`` does from every text as a whole."""
        texts = [text for prompt, whole in written for text in (prompt, prompt.rstrip(), *whole)]
        distinct = list(dict.fromkeys(texts))
        tokens = self._ids(distinct, ended=False) if distinct else []
        known = dict(zip(distinct, tokens, strict=True))

        def split(prompt: str, whole: list[str]) -> Tokens | None:
            for begin in (known[prompt], known[prompt.rstrip()]):
                n = len(begin)
                if n and all(known[text][:n] == begin for text in whole):
                    return begin, [known[text][n:] for text in whole]
            return None

        return [split(*texts) for texts in written]

    def _ids(self, texts: list[str], *, ended: bool = True, **options: bool) -> list[list[int]]:
        """Tokenize texts; not ``ended``: without the special tokens at the end."""
        # Verbose, it would warn of long texts, which are checked here.
        batch = self.tokenizer(texts, return_attention_mask=False, verbose=False, **options)
        back = 0 if ended else self._back
        return [self._one_front(ids[: len(ids) - back]) for ids in batch["input_ids"]]

    def _one_front(self, ids: Sequence[int]) -> list[int]:
        """Remove special tokens in front that the tokenizer added to the text's own."""
        found, n = list(ids), len(self._front)
        while n and found[:n] == found[n : 2 * n] == self._front:
            found = found[n:]
        return found

    def _around(self) -> tuple[list[int], int]:
        """Find the special tokens that the tokenizer puts before a text, and how many after it."""
        for text in self._texts_with_tokens():
            (bare,), (full,) = self._ids([text], add_special_tokens=False), self._ids([text])
            for start in range(len(full) - len(bare) + 1) if bare else ():
                if full[start : start + len(bare)] == bare:
                    return full[:start], len(full) - len(bare) - start
        return [], 0

    def _texts_with_tokens(self) -> Iterator[str]:
        yield "a"
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        yield from sorted(self.tokenizer.get_vocab().keys() - added)  # alphabets without "a"

    # --- checks -----------------------------------------------------------------------------------

    def _check_row(self, row: Row) -> None:
        """Refuse a row of the other kind, or one by hand that no reader would have made."""
        if self.task == "SEQ_CLS":
            if row.text is None:
                _fail(row, "this is a choice row", "use rows with 'text' for a classification head")
            K, classes = self.num_labels or 0, f"model's {self.num_labels} classes"
        else:
            if row.choices is None:
                _fail(row, "this is a text row", "use rows with 'prompt' and 'choices' here")
            if row.prompt == "" or not all(row.choices):
                _fail(row, "the prompt or a choice is empty", "write some text into it")
            K, classes = len(row.choices), f"{len(row.choices)} choices"
            if K < 2:
                _fail(row, f"the choices are {row.choices!r}", "give a tuple of two or more")
        if row.label is not None and not 0 <= row.label < K:
            fault = f"the label {row.label} is outside the {classes}"
            _fail(row, fault, f"use an index from 0 to {K - 1}")

    def _check_choices(self, row: Row, found: list[list[int]]) -> None:
        """Refuse choices that have no tokens, unknown tokens, or those of another choice."""
        seen: dict[tuple[int, ...], str] = {}
        for choice, ids in zip(row.choices or (), found, strict=True):
            if not ids or self._unknown in ids:
                fault = f"the tokenizer does not know the choice {choice!r}"
                _fail(row, fault, "use choices that the tokenizer has tokens for")
            if len(ids) > 1 and self.task == "SEQ_2_SEQ_LM":
                _fail(
                    row,
                    f"the choice {choice!r} is an answer of {len(ids)} tokens",
                    "name the choices of an encoder-decoder by single tokens, such as letters; "
                    "if it was trained on the last token alone: label_tokens 'last'",
                )
            if tuple(ids) in seen:
                last = "" if self.label_tokens == "all" else " by label_tokens 'last'"
                _fail(
                    row,
                    f"the choices {seen[tuple(ids)]!r} and {choice!r} are the same tokens{last}",
                    "use choices that differ in more than whitespace, such as letters",
                )
            seen[tuple(ids)] = choice

    def _fit(self, row: Row, ids: list[int], room: int, back: int) -> tuple[list[int], int]:
        """Cut ids, the last ``back`` of them special, to ``room``; return how many are lost."""
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


def _shared(choices: list[list[int]]) -> int:
    """Count the first tokens that all choices have in common, each keeping one token."""
    most, n = min(map(len, choices)) - 1, 0
    while n < most and len({ids[n] for ids in choices}) == 1:
        n += 1
    return n


def _fail(row: Row, fault: str, remedy: str) -> NoReturn:
    raise RowError(f"{row.source} (id {row.id!r}): {fault}; {remedy}")
