"""Task rows to token ids: what the model reads, and by which tokens a choice is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tfb.data.batching import EncodedRows
from tfb.data.rows import ANSWERS, PROMPTS, Row, RowError
from tfb.data.splicing import Splicer, Tokens, Written
from tfb.plain import shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

LABEL_TOKENS = ("all", "last")
SIDES = ("left", "right")
CHUNK = 256  # rows tokenized in one call: enough to occupy the tokenizer, few enough for memory
# Characters of one call, and of one text: more than a model's context has, and 0.8 GB as tokens.
LONGEST = 4 << 20
TOGETHER = 64 << 20  # characters of a prompt with each of its choices: a minute for a tokenizer

T = TypeVar("T")
# What a model reads, how many tokens were left out, and those of the choices (or segment ids).
Found = tuple[list[int], int, Any]


def characters(row: Row) -> int:
    """Count the characters of a row."""
    said = [str(message.get("content")) for message in row.messages or ()]
    behind = row.choices or (row.answer or "",)
    return sum(map(len, (row.text or row.prompt or "", *said, *behind)))


def chunks(items: Iterable[T], size: Callable[[T], int], most: int = CHUNK) -> Iterator[list[T]]:
    """Part items into chunks of at most ``most``, and of ``LONGEST`` characters or one item."""
    chunk, total = list[T](), 0
    for item in items:
        n = size(item)
        if chunk and total + n > LONGEST:
            yield chunk
            chunk, total = [], 0
        chunk.append(item)
        total += n
        if len(chunk) == most:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


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

    An answer is tokenized as a choice is, and an end token follows: for chats their template's, if
    it has one, else the tokenizer's. Of a prompt that the model is to continue, whitespace at the
    end is left out by rule 2.

    One set of special tokens stays in front; those at the end are removed, except in text rows and
    an encoder-decoder's prompts.

    Args:
        tokenizer: of transformers.
        task: "CAUSAL_LM" and "SEQ_2_SEQ_LM" take choice rows, "SEQ_CLS" text rows. ``ANSWERS``
            (rows with an answer) and ``PROMPTS`` (any with a prompt) need a causal language model.
        num_labels: classes of a SEQ_CLS head.
        max_length: most tokens that the model takes; None: the tokenizer's `model_max_length`.
        label_tokens: "all" tokens of a choice, or, as in the authors' scripts, the "last" one right
            after the prompt.
        length_normalization: how a choice's tokens are scored, see :mod:`tfb.sampling.choices`.
        truncate: side on which a prompt or text that is too long loses tokens, "left" or "right";
            None: it is an error.
        max_new_tokens: how many tokens the model may write behind each of ``PROMPTS``.

    Raises:
        ValueError: an unknown setting, fewer than two labels, or no new tokens.
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
        max_new_tokens: int = 0,
    ) -> None:
        check_label_tokens(label_tokens)
        check_truncate(truncate)
        if task == "SEQ_CLS" and (num_labels is None or num_labels < 2):
            raise ValueError(f"num_labels must be at least 2, got {num_labels}")
        self.tokenizer, self.task, self.num_labels = tokenizer, task, num_labels
        self.label_tokens, self.truncate = label_tokens, truncate
        self.max_new_tokens = max_new_tokens
        # A tokenizer that knows no limit reports a huge number, which no row exceeds.
        self.limit = int(tokenizer.model_max_length if max_length is None else max_length)
        if task == PROMPTS and not 1 <= max_new_tokens < self.limit:
            raise ValueError(
                f"max_new_tokens={max_new_tokens}: expected at least 1, and fewer than the "
                f"{self.limit} tokens that the model takes, prompt included"
            )
        self._unknown = tokenizer.unk_token_id  # a property that is slow to ask for
        self._shares = length_normalization == "none"
        self._front: list[int] = []
        self._front, self._back = self._around()
        self._spliced = Splicer(tokenizer, lambda texts: list(self._ids(texts, ended=False)))

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, task: str, config: PreTrainedConfig, **options: Any
    ) -> RowEncoder:
        """Make an encoder for a model's task and configuration; its weights need not be there."""
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and task in ("SEQ_CLS", "SEQ_2_SEQ_LM"):
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
        encoded, faults = self.encode(rows)
        if encoded is None or faults:
            raise RowError(faults[min(faults)])
        return encoded

    def encode(self, rows: Sequence[Row]) -> tuple[EncodedRows | None, dict[int, str]]:
        """Encode the rows that can be scored, and tell by position why others cannot."""
        found = [one for chunk in chunks(rows, characters) for one in self._chunk(chunk)]
        faults = {i: one for i, one in enumerate(found) if isinstance(one, str)}
        good = [
            (row, one) for row, one in zip(rows, found, strict=True) if not isinstance(one, str)
        ]
        return self._columns(*zip(*good, strict=True)) if good else None, faults

    def _chunk(self, rows: Sequence[Row]) -> list[Found | str]:
        """Encode rows whose texts are tokenized together; where that fails, each by itself."""
        kinds: dict[str, tuple[Callable[[Sequence[Row]], Sequence[Any]], Callable[..., Found]]] = {
            "SEQ_CLS": (self._texts, self._text_row),
            "SEQ_2_SEQ_LM": (self._decoded, self._choice_row),
            PROMPTS: (self._prompts, self._prompt_row),
        }
        tokenize, finish = kinds.get(self.task, (self._continuations, self._choice_row))
        try:
            for row in rows:
                self._check_row(row)
            tokens = tokenize(rows)
        except RowError as error:
            return [str(error)] if len(rows) == 1 else [self._chunk([row])[0] for row in rows]
        found = list[Found | str]()
        for row, one in zip(rows, tokens, strict=True):
            try:
                found.append(finish(row, one))
            except RowError as error:
                found.append(str(error))
        return found

    def _columns(self, rows: Sequence[Row], found: Sequence[Found]) -> EncodedRows:
        input_ids, cut, more = map(list, zip(*found, strict=True))
        ids, labels = [row.id for row in rows], [row.label for row in rows]
        if self.task == "SEQ_CLS":
            encoded = EncodedRows(ids, input_ids, None, labels, None, self.num_labels)
            return replace(encoded, token_type_ids=more if all(more) else None, truncated=cut)
        if self.task == PROMPTS:
            encoded = EncodedRows(ids, input_ids, None, [None] * len(ids), None, truncated=cut)
            return replace(encoded, new_tokens=self.max_new_tokens)
        single = [all(len(ids) == 1 for ids in choices) for choices in more]
        kinds = list(zip(more, single, strict=True))
        return EncodedRows(
            ids=ids,
            input_ids=input_ids,
            label_ids=[tuple(ids for (ids,) in c) if one else () for c, one in kinds],
            labels=labels,
            choices=[self._ends(row) for row in rows],
            choice_ids=None if all(single) else [None if one else c for c, one in kinds],
            truncated=cut,
        )

    # --- the three kinds of rows ------------------------------------------------------------------

    def _text_row(self, row: Row, tokens: tuple[list[int], list[int]]) -> Found:
        """Return what the model reads, how many tokens were left out, and segment ids."""
        ids, left_out = self._fit(row, tokens[0], self.limit, self._back)
        # One text is one segment: where its types are cut is the same.
        return _some(row, ids), left_out, tokens[1][: len(ids)]

    def _prompt_row(self, row: Row, ids: list[int]) -> Found:
        """Return what the model is to continue, and how many tokens were left out."""
        some = _some(row, [] if ids == self._front else ids)
        return *self._fit(row, some, self.limit - self.max_new_tokens, 0), None

    def _choice_row(self, row: Row, tokens: Tokens | None) -> Found:
        """Return what the model reads, how many tokens were left out, and those of each choice."""
        if tokens is None:
            fault = f"the last token of the prompt merges with the first of {self._end}"
            _fail(row, fault, "end the prompt differently, for instance with a colon")
        prompt, choices = tokens
        if self.label_tokens == "last" and self.task != ANSWERS:
            choices = [ids[-1:] for ids in choices]
        self._check_choices(row, choices)
        if self.task == ANSWERS:
            choices = [[*choices[0], self._end_token(row)]]
        # A choice's last token is scored but never read.
        room = self.limit + 1 - max(map(len, choices))
        back = self._back if self.task == "SEQ_2_SEQ_LM" else 0
        prompt, left_out = self._fit(row, prompt, room, back)
        shared = _shared(choices) if self._shares and len(choices) > 1 else 0
        rest = [tuple(ids[shared:]) for ids in choices]
        return _some(row, prompt + choices[0][:shared]), left_out, tuple(rest)

    # --- prompts and choices as text --------------------------------------------------------------

    def _written(self, row: Row) -> Written:
        """Return the prompt, and the text of each choice behind it."""
        prompt, between = row.prompt or "", " "
        if row.messages is not None:
            prompt, between = self._rendered(row), self._around_answers[0]
            self._check_length(row, prompt)
        if prompt[-1:].isspace():
            between = ""
        return prompt, [between * (not end[0].isspace()) + end for end in self._ends(row)]

    def _ends(self, row: Row) -> tuple[str, ...]:
        """Return what may stand behind the prompt."""
        answer = () if row.answer is None else (row.answer,)
        return {PROMPTS: (), ANSWERS: answer}.get(self.task, row.choices or ())

    @property
    def _end(self) -> str:
        """What messages call the text behind a prompt."""
        return "the answer" if self.task == ANSWERS else "a choice"

    def _end_token(self, row: Row) -> int:
        """Return the token that ends an answer."""
        if row.messages is not None and self._template_end is not None:
            return self._template_end
        if self.tokenizer.eos_token_id is None:
            _fail(row, "the tokenizer has no end token, which follows an answer", "set eos_token")
        return int(self.tokenizer.eos_token_id)

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
    def _template_end(self) -> int | None:
        """The special token that a chat template puts right after an answer, if it does."""
        after = self._tokenized([self._around_answers[1]], add_special_tokens=False)["input_ids"][0]
        return after[0] if after and after[0] in self.tokenizer.all_special_ids else None

    @cached_property
    def _around_answers(self) -> tuple[str, str]:
        """The whitespace that a chat template puts before an answer, and what it puts after it."""
        question = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": "Answer"}
        try:
            prompt = self._render([question], prompt=True)
            whole = self._render([question, answer], prompt=False)
        except Exception:  # a template for other conversations
            return "", ""
        if not whole.startswith(prompt):
            return "", ""
        between, _, end = whole[len(prompt) :].partition("Answer")
        return between if between.isspace() else "", end

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool) -> str:
        render = self.tokenizer.apply_chat_template
        return str(render(messages, tokenize=False, add_generation_prompt=prompt))

    # --- text to tokens ---------------------------------------------------------------------------

    def _texts(self, rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
        """Tokenize texts for a sequence-classification head: tokens, and segment ids if any."""
        batch = self._tokenized([row.text or "" for row in rows])
        types = batch.get("token_type_ids") or [[] for _ in rows]
        return [
            (self._one_front(ids), list(t))
            for ids, t in zip(batch["input_ids"], types, strict=True)
        ]

    def _prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """Tokenize prompts, without whitespace at the end that belongs to what will follow.

        That is where a fit has it too: see rule 2.
        """
        texts = [self._written(row)[0] for row in rows]
        found = list(self._ids(texts, ended=False))
        for i, text in enumerate(texts):
            if text[-1:].isspace():
                bare, probe = self._ids([text.rstrip(), f"{text}a"], ended=False)
                if probe[: len(found[i])] != found[i] and probe[: len(bare)] == bare:
                    found[i] = bare
        return found

    def _decoded(self, rows: Sequence[Row]) -> list[Tokens]:
        """Tokenize prompts for an encoder, and choices as a decoder begins to write them."""
        texts = list(dict.fromkeys(choice for row in rows for choice in row.choices or ()))
        answers = self._tokenized(texts, "text_target", add_special_tokens=False)
        known = dict(zip(texts, map(list, answers["input_ids"]), strict=True))
        prompts = self._ids([self._written(row)[0] for row in rows])
        choices = [[known[choice] for choice in row.choices or ()] for row in rows]
        return list(zip(prompts, choices, strict=True))

    def _continuations(self, rows: Sequence[Row]) -> list[Tokens | None]:
        """Return each prompt's tokens and its choices' continuations; None where they merge."""
        written = [self._written(row) for row in rows]
        found = self._spliced(written)
        left = [i for i, tokens in enumerate(found) if tokens is None]
        whole = self._whole([rows[i] for i in left], [written[i] for i in left])
        for i, tokens in zip(left, whole, strict=True):
            found[i] = tokens
        return found

    def _whole(self, rows: Sequence[Row], written: Sequence[Written]) -> Iterator[Tokens | None]:
        """Do what ``_continuations`` does from every text as a whole, one after the other."""
        prompts = [dict.fromkeys((prompt, prompt.rstrip())) for prompt, _ in written]
        firsts = self._ids(chain.from_iterable(prompts), ended=False)
        begins = [list(islice(firsts, len(texts))) for texts in prompts]
        if self.truncate is None:  # before a long prompt is tokenized with every choice
            for row, found in zip(rows, begins, strict=True):
                self._fit(row, min(found, key=len), self.limit, 0)
        texts = self._ids((prompt + end for prompt, ends in written for end in ends), ended=False)
        for found, (_, ends) in zip(begins, written, strict=True):
            rests: list[list[list[int]]] = [[] for _ in found]
            for ids in islice(texts, len(ends)):
                for begin, rest in zip(found, rests, strict=True):
                    if begin and ids[: len(begin)] == begin:
                        rest.append(ids[len(begin) :])
            split = zip(found, rests, strict=True)
            yield next((tokens for tokens in split if len(tokens[1]) == len(ends)), None)

    def _ids(
        self, texts: Iterable[str], *, ended: bool = True, **options: Any
    ) -> Iterator[list[int]]:
        """Tokenize texts; not ``ended``: without the special tokens at the end."""
        back = 0 if ended else self._back
        for part in chunks(texts, len):
            batch = self._tokenized(part, return_attention_mask=False, **options)
            for ids in batch["input_ids"]:
                yield self._one_front(ids[: len(ids) - back])

    def _tokenized(self, texts: list[str], kind: str = "text", **options: Any) -> Any:
        """Call the tokenizer. Whatever it fails with is the fault of a text."""
        try:
            # Verbose, it would warn of long texts, which are checked here.
            return self.tokenizer(**{kind: texts}, verbose=False, **options)
        except BaseException as error:  # a panic of Rust is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            for text in texts if len(texts) > 1 else ():
                self._tokenized([text], kind, **options)
            fault = f"the tokenizer fails at {shown(texts[0])} ({error})"
            raise RowError(f"{fault}; write another text, or use another tokenizer") from error

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
            self._check_ends(row)
            K, classes = len(self._ends(row)), f"{len(self._ends(row))} choices"
        if K and row.label is not None and not 0 <= row.label < K:
            fault = f"the label {row.label} is outside the {classes}"
            _fail(row, fault, f"use an index from 0 to {K - 1}")
        self._check_length(row, row.text or row.prompt or "")

    def _check_ends(self, row: Row) -> None:
        """Refuse a row without a prompt, or without what is to stand behind it."""
        ends, behind = self._ends(row), {PROMPTS: "", ANSWERS: "answer"}.get(self.task, "choices")
        if row.text is not None:
            needed = " and ".join(f"'{name}'" for name in ("prompt", behind) if name)
            _fail(row, "this is a text row", f"use rows with {needed} here")
        if row.prompt == "" or not all(ends):
            _fail(row, f"the prompt or {self._end} is empty", "write some text into it")
        if behind == "choices" and len(ends) < 2:
            _fail(row, f"the choices are {row.choices!r}", "give a tuple of two or more")
        if behind == "answer" and not ends:
            _fail(row, "the row has no answer", "write the text that is right into 'answer'")

    def _check_length(self, row: Row, text: str) -> None:
        """Refuse what would fill the memory as tokens, whatever the model's limit is."""
        choices = self._ends(row) or ("",)
        longest = len(text) + max(map(len, choices))
        if longest > LONGEST or longest * len(choices) > TOGETHER:
            fault = f"{longest:,} characters, {longest * len(choices):,} with every choice"
            limits = f"more than are tokenized ({LONGEST:,}, and {TOGETHER:,} with every choice)"
            _fail(row, f"{fault}, are {limits}", "shorten it")

    def _check_choices(self, row: Row, found: list[list[int]]) -> None:
        """Refuse choices that have no tokens, unknown tokens, or those of another choice."""
        seen: dict[tuple[int, ...], str] = {}
        for choice, ids in zip(self._ends(row), found, strict=True):
            if not ids or self._unknown in ids:
                fault = f"the tokenizer does not know {choice!r}"
                _fail(row, fault, "write text that the tokenizer has tokens for")
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
        tokens, fewer = f"{len(ids) + self.limit - room} tokens", ""
        if new := self.max_new_tokens:
            tokens, fewer = f"{len(ids)} tokens and {new} new ones", "lower max_new_tokens, "
        fault = f"{tokens}, but the model takes {self.limit}"
        if self.truncate is None:
            _fail(row, fault, f"shorten the row, {fewer}or let it be cut (truncate: left or right)")
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


def _some(row: Row, ids: list[int]) -> list[int]:
    if not ids:
        _fail(row, "no tokens", "write text that the tokenizer knows")
    return ids


def _fail(row: Row, fault: str, remedy: str) -> NoReturn:
    raise RowError(f"{row.source} (id {row.id!r}): {fault}; {remedy}")
