"""Rows to result rows: encoded, batched by tokens, predicted. What cannot be scored is an error.

Results depend on the rows that are given together, the model and the settings alone. Only where
memory ran out are batches other ones; results are then the same to rounding, and texts unless two
tokens are nearly as probable.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from tfb.adapters.loading import class_names
from tfb.data.batching import Batch, EncodedRows, batches, padded_tokens, token_batches
from tfb.data.encoding import RowEncoder, characters, chunks
from tfb.data.readers import Record, iter_records
from tfb.data.rows import DEEPEST, PROMPTS, Row, RowError, RowFormat, is_deep, prompt_columns
from tfb.draws import Draws, check_even
from tfb.model import BayesianModel
from tfb.predictive import Predictive, as_float32
from tfb.sampling.adaptive import Adaptive
from tfb.sampling.generate import REFUSED, token_ids

Result = dict[str, Any]
"""A row of the output by column; one with an error has ``id`` and ``error`` alone."""

Item = tuple[Row | None, Result]
"""A record of the input: the row to score, if it is one, and what its result begins with."""

ENTROPIES = ("total", "aleatoric", "epistemic")
UNCERTAINTIES = (*ENTROPIES, "agreement", "standard_error")
BATCH_TOKENS = 4096
NEW_TOKENS = 128  # most of a row that is written
WINDOW = 1024  # rows that are encoded together while streaming
LONGEST_ERROR = 2000  # characters
NOT_FINITE = "the model returned NaN or Inf; check the adapter and the dtype"


def row_format(
    bayes: BayesianModel,
    columns: Mapping[str, str] | None = None,
    *,
    labels: Sequence[str] | None = None,
    optional: Sequence[str] = (),
    task: str | None = None,
) -> RowFormat:
    """Return how data become rows for a model, by its own task and ``labels`` unless given."""
    names = class_names(bayes.task, bayes.base.config, labels or bayes.labels)
    given = prompt_columns(columns or {}) if task == PROMPTS else columns or {}
    return RowFormat(given, names, task or bayes.task, optional)


def row_encoder(
    bayes: BayesianModel,
    tokenizer: PreTrainedTokenizerBase,
    truncate: str | None = None,
    label_tokens: str | None = None,
    task: str | None = None,
    max_new_tokens: int = 0,
) -> RowEncoder:
    """Return what encodes rows for a model, by its own ``label_tokens`` and task unless given."""
    return RowEncoder.of(
        tokenizer,
        task or bayes.task,
        bayes.base.config,
        label_tokens=label_tokens or bayes.label_tokens,
        length_normalization=bayes.config.length_normalization,
        truncate=truncate,
        max_new_tokens=max_new_tokens,
    )


def result_columns(p: Predictive) -> dict[str, Tensor]:
    """Return the computed columns of B rows, [B, ...] in float32 on the CPU.

    ``draw_probs`` are [B, S, K]; the standard error is that of the predicted class.
    """
    counts = p.draw_counts
    found = {
        "prediction": p.prediction,
        "probs": p.probs,
        **{name: getattr(p, name) for name in UNCERTAINTIES},
        "standard_error": p.predicted_error,
        "draws": torch.full_like(p.prediction, len(p.draws)) if counts is None else counts,
    }
    if p.draw_probs is not None:
        found["draw_probs"] = p.draw_probs.transpose(0, 1)
    return {name: as_float32(values) for name, values in found.items()}


def read_item(record: Record | Row, number: int, form: RowFormat, keep: Sequence[str] = ()) -> Item:
    """Make a row of a record, or an error. Its ``number`` is the id of one that brings none."""
    if isinstance(record, Row):
        return record, {"id": record.id}
    begun: Result = {"id": None}
    try:
        if record.fields is None:
            raise RowError(record.fault or "cannot be read")
        begun["id"] = form.row_id(record.fields, record.place, number)
        begun |= _kept(record.fields, keep, record.place)
        return form.row(record.fields, record.place, number), begun
    except RowError as error:
        return None, begun | {"error": _error(str(error), record.place)}


def rows_of(items: Iterable[Item]) -> list[Row]:
    """Return the rows that are to be scored."""
    return [row for row, _ in items if row is not None]


def result_rows(items: Iterable[Item], results: Iterable[Result]) -> list[Result]:
    """Return one result for each item, from the ``results`` of those that hold a row."""
    found = iter(results)
    return [begun if row is None else begun | next(found) for row, begun in items]


def _kept(fields: Mapping[str, Any], keep: Sequence[str], place: str) -> dict[str, Any]:
    kept = {name: fields.get(name) for name in keep}
    for name, value in kept.items():
        try:
            if is_deep(value, DEEPEST):
                raise ValueError(f"nested deeper than {DEEPEST} levels")
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except (TypeError, ValueError) as error:
            fault = f"the column {name!r}, which is to be kept, cannot be written ({error})"
            raise RowError(f"{place}: {fault}; write it as plain text in UTF-8") from error
    return kept


def _error(text: str, place: str) -> str:
    """Return a message that names its place and that any file can hold."""
    text = text if text.startswith(place) else f"{place}: {text}"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= LONGEST_ERROR else text[:LONGEST_ERROR] + " ..."


@dataclass(frozen=True)
class Prepared:
    """The rows that were encoded, and the results of the others, by position among all."""

    rows: list[Row]
    encoded: EncodedRows | None
    faults: dict[int, Result]


class Scorer:
    """Scores rows with one model.

    Args:
        bayes: the model.
        tokenizer: its tokenizer.
        draws: as for ``bayes.predict``, "auto" included.
        batch_tokens: most padded tokens of a batch, of one copy of its rows.
        batch_size: most rows of a batch; None: any number.
        per_draw: keep each draw's probabilities.
        truncate: the side on which rows that are too long are cut; None: they are errors.
        labels: names of the classes of text rows.
        encoder: of rows that are not scored by their choices or classes.

    Raises:
        ValueError: draws that the model cannot sample, or adaptive ones that are to be kept.
    """

    def __init__(
        self,
        bayes: BayesianModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        draws: int | Draws | Adaptive | str = 10,
        batch_tokens: int = BATCH_TOKENS,
        batch_size: int | None = None,
        per_draw: bool = False,
        truncate: str | None = None,
        labels: Sequence[str] | None = None,
        encoder: RowEncoder | None = None,
    ) -> None:
        self.bayes, self.labels, self.per_draw = bayes, labels, per_draw
        self.encoder = encoder or row_encoder(bayes, tokenizer, truncate)
        self.batch_tokens, self.batch_size = batch_tokens, batch_size
        check_draws(draws, kept=per_draw)
        self._draws: Draws | Adaptive
        if isinstance(draws, str | Adaptive):
            bayes.draws(2)  # refuses a model without sigma
            self._draws = draws if isinstance(draws, Adaptive) else Adaptive()
            most = self._draws.most
        else:
            self._draws = bayes.distinct_draws(draws, kept=per_draw)
            most = len(self._draws)
        if encoder is None:
            _check_calibrated(bayes, draws)
        # On a GPU the model would go by the memory that happens to be free, and a pass of another
        # shape rounds differently.
        self._draws_per_pass = None if bayes.device.type == "cpu" else most

    def __call__(self, rows: Sequence[Row]) -> list[Result]:
        """Return one result for each row, in order."""
        return self.compute(self.prepare(rows))

    def prepare(self, rows: Sequence[Row]) -> Prepared:
        """Encode rows. Touches the tokenizer only, so that another thread may do it."""
        encoded, why = self.encoder.encode(rows)
        faults = {i: _fault(rows[i], text) for i, text in why.items()}
        return Prepared([row for i, row in enumerate(rows) if i not in why], encoded, faults)

    def compute(self, prepared: Prepared) -> list[Result]:
        """Predict what was prepared: one result for each row, in order."""
        rows, encoded, faults = prepared.rows, prepared.encoded, prepared.faults
        good = iter([] if encoded is None else self._predict(rows, encoded))
        everywhere = range(len(rows) + len(faults))
        return [faults[i] if i in faults else next(good) for i in everywhere]

    def batches(self, encoded: EncodedRows, rows: Iterable[int] | None = None) -> list[list[int]]:
        """Return the positions of encoded rows (None: of all) as this scorer batches them."""
        found = token_batches(encoded, self.batch_tokens, rows)
        n = self.batch_size or max(1, len(encoded))
        return [batch[start : start + n] for batch in found for start in range(0, len(batch), n)]

    def _predict(self, rows: Sequence[Row], encoded: EncodedRows) -> list[Result]:
        """Return the results in order. Where memory runs out, batches are split."""
        self.bayes.check_sampling()  # else it would be the fault of every row
        results: dict[int, Result] = {}
        waiting = self.batches(encoded)
        while waiting:
            batch = waiting.pop(0)
            half = len(batch) // 2
            try:
                found = self._batch(rows, encoded, batch, self._draws_per_pass)
                if found is None and not half:
                    found = self._batch(rows, encoded, batch, 2)
            except (ValueError, IndexError) as error:  # the model refuses one of the rows
                if half:
                    waiting[:0] = [batch[:half], batch[half:]]
                    continue
                found = {batch[0]: _fault(rows[batch[0]], f"the model refuses it ({error})")}
            if found is not None:
                results |= found
            elif not half:
                fault = "out of memory, even alone in its batch; shorten it"
                results[batch[0]] = _fault(rows[batch[0]], fault)
            else:
                tokens = min(self.batch_tokens, padded_tokens(encoded, batch))
                self.batch_tokens = max(1, tokens // 2)
                waiting = self.batches(encoded, [i for b in [batch, *waiting] for i in b])
        return [results[i] for i in range(len(rows))]

    def _batch(
        self,
        rows: Sequence[Row],
        encoded: EncodedRows,
        at: Sequence[int],
        draws_per_pass: int | None,
    ) -> dict[int, Result] | None:
        """Return the results of one batch by position; None if memory ran out."""
        chosen, pad = encoded.subset(at), self.bayes.pad_token_id
        results: dict[int, Result] = {}
        try:
            for batch in batches(chosen, batch_size=len(at), pad_token_id=pad):
                columns = self._columns(batch, draws_per_pass)
                if self.encoder.truncate is not None:
                    columns["truncated"] = torch.tensor(chosen.truncated)[batch.indices].tolist()
                table = zip(*columns.values(), strict=True)
                for i, values in zip(batch.indices.tolist(), table, strict=True):
                    found = dict(zip(columns, values, strict=True))
                    results[at[i]] = self._result(rows[at[i]], found)
            return results
        except (MemoryError, RuntimeError) as error:
            # A CPU's is a plain RuntimeError.
            known = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not known and "can't allocate memory" not in str(error):
                raise
        # Only now, as the traceback held the tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _columns(self, batch: Batch, draws_per_pass: int | None) -> dict[str, list[Any]]:
        """Return what is computed for the rows of a batch."""
        p = self.bayes.predict(
            batch.model_inputs(),
            self._draws,
            label_ids=batch.label_ids,
            keep_draws=self.per_draw,
            draws_per_pass=draws_per_pass,
        )
        columns = {name: found.tolist() for name, found in result_columns(p).items()}
        return columns | (self.bayes.decisions.apply(p.probs) if self.bayes.decisions else {})

    def _result(self, row: Row, values: Result) -> Result:
        if not all(map(math.isfinite, values["probs"])):
            return _fault(row, NOT_FINITE)
        if math.isnan(values["standard_error"]):  # one independent draw tells of no error
            values["standard_error"] = None
        best, names = values["prediction"], row.choices or self.labels
        choice = None if names is None else names[best]
        if (chosen := values.get("prediction_set")) is not None:
            values["prediction_set"] = [str(i) if names is None else names[i] for i in chosen]
        first = {"id": row.id, "prediction": best, "choice": choice}
        return {**first, **values, "label": row.label, "error": None}


class TextScorer(Scorer):
    """Writes text behind prompts with one model, by greedy decoding of the averaged distribution.

    Of the model's generation_config hold the end tokens, beside the tokenizer's, and what changes
    scores (repetition_penalty, suppress_tokens, ...); nothing is sampled.

    Args:
        bayes: a causal language model.
        tokenizer: its tokenizer.
        truncate: the side on which rows that are too long are cut; None: they are errors.
        max_new_tokens: most tokens of a row; None: ``NEW_TOKENS``.
        stop: texts before which a row ends.
        how: of :class:`Scorer`.

    Raises:
        ValueError: another task, or settings that cannot work.
    """

    def __init__(
        self,
        bayes: BayesianModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        truncate: str | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        **how: Any,
    ) -> None:
        check_writes(bayes.task)
        most = NEW_TOKENS if max_new_tokens is None else max_new_tokens
        encoder = row_encoder(bayes, tokenizer, truncate, task=PROMPTS, max_new_tokens=most)
        super().__init__(bayes, tokenizer, encoder=encoder, **how)
        own = token_ids(bayes.base.generation_config.eos_token_id)
        ends = {*own, *token_ids(tokenizer.eos_token_id)}
        self._stop = tuple(stop or ())
        self._options: dict[str, Any] = {
            "max_new_tokens": most,
            "eos_token_id": sorted(ends) or None,
            "pad_token_id": bayes.pad_token_id,
            "stopping_criteria": _stop_criteria(tokenizer, stop),
            # A model's own would make other text of the same row, or another number of texts, or
            # be refused; a least length counts the padding.
            **{"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "min_length": 0},
            **{"token_healing": False, "use_cache": True},
            **dict.fromkeys(["stop_strings", "max_time", "cache_implementation", *REFUSED]),
        }

    def _columns(self, batch: Batch, draws_per_pass: int | None) -> dict[str, list[Any]]:
        assert isinstance(self._draws, Draws)  # others were refused
        found = self.bayes.generate(batch.model_inputs(), self._draws, **self._options)
        lengths, ended = found.lengths.tolist(), found.ended.tolist()
        new = [ids[:n] for ids, n in zip(found.new_tokens.tolist(), lengths, strict=True)]
        real = {"sequence_uncertainty": found.sequence_uncertainty}
        real |= {name: getattr(found, name).sum(-1) / found.lengths for name in ENTROPIES}
        return {
            "text": [self._text(*row) for row in zip(new, ended, strict=True)],
            "tokens": lengths,
            "finish_reason": ["stop" if done else "length" for done in ended],
            **{name: as_float32(values).tolist() for name, values in real.items()},
            "draws": [len(self._draws)] * len(lengths),
        }

    def _text(self, ids: list[int], ended: bool) -> str:
        """Return new tokens as text, up to the first stop string; the last token may go beyond."""
        decode, plain = self.encoder.tokenizer.decode, {"clean_up_tokenization_spaces": False}
        text = str(decode(ids, skip_special_tokens=True, **plain))
        if not ended:
            return text.rstrip("\ufffd")  # the first bytes of a character
        # Some tokenizers leave the space out that the first token begins with.
        begun = [0 for stop in self._stop if f" {text}".startswith(stop)]
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        return text[: min([*begun, *found], default=None)]

    def _result(self, row: Row, values: Result) -> Result:
        return {"id": row.id, **values, "error": None}


def _fault(row: Row, text: str) -> Result:
    named = text if text.startswith(row.source) else f"{row.source} (id {row.id!r}): {text}"
    return {"id": row.id, "error": _error(named, row.source)}


def check_draws(draws: int | Draws | Adaptive | str, *, kept: bool) -> None:
    """Refuse draws that no model can sample, or that cannot be kept."""
    if isinstance(draws, str) and draws != "auto":
        raise ValueError(f"draws={draws}: expected an even number or auto")
    if kept and isinstance(draws, str | Adaptive):
        raise ValueError("draws=auto: rows have different numbers of draws; keep none of them")
    if isinstance(draws, int):
        check_even(draws)


def check_generate(
    generate: bool,
    draws: int | Draws | Adaptive | str,
    per_draw: bool,
    max_new_tokens: int | None,
    stop: Sequence[str],
) -> None:
    """Refuse settings that do not go with ``generate``, or not without it."""
    if not generate:
        first = stop if isinstance(stop, str) or not stop else stop[0]
        given = {"max_new_tokens": max_new_tokens, "stop": first or None}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}={value!r}: is a setting of generate=True; add that")
        return
    if isinstance(draws, str | Adaptive):
        raise ValueError(
            "draws=auto: not with generate=True, where draws write side by side; give a number"
        )
    if per_draw:
        raise ValueError("per_draw=True: not with generate=True, where all draws write one text")
    if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
        raise ValueError(f"max_new_tokens={max_new_tokens!r}: expected a whole number, at least 1")
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop or ()):
        raise ValueError(f"stop={stop!r}: expected a list of texts, none of them empty")


def _stop_criteria(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]
) -> list[StopStringCriteria]:
    """Return what finds stop strings; refuse a tokenizer with which transformers cannot."""
    try:
        return [StopStringCriteria(tokenizer, list(stop))] if stop else []
    except Exception as error:  # it tries the tokenizer on a text of its own
        raise ValueError(
            f"stop={stop[0]!r}: transformers finds no text in this tokenizer's tokens ({error}); "
            "leave it out"
        ) from error


def check_writes(task: str) -> None:
    """Refuse a model that writes no text."""
    if task != "CAUSAL_LM":
        raise ValueError(f"generate=True: needs a causal language model, and this one is {task}")


def _check_calibrated(bayes: BayesianModel, draws: int | Draws | Adaptive | str) -> None:
    """Warn where decisions were calibrated on averages of another number of draws."""
    if bayes.decisions is None or bayes.sigma == 0.0:
        return
    given = len(draws) if isinstance(draws, Draws) else draws
    if given != bayes.decisions.draws:
        warnings.warn(
            f"draws={given if isinstance(given, int) else 'auto'}: abstention and prediction sets "
            f"were calibrated with {bayes.decisions.draws}, and hold approximately with others",
            stacklevel=3,
        )


def score(
    data: Any,
    bayes: BayesianModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    draws: int | Draws | Adaptive | str = 10,
    batch_size: int = 50,
    per_draw: bool = False,
    columns: Mapping[str, str] | None = None,
    truncate: str | None = None,
    errors: str = "raise",
    generate: bool = False,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[Result]:
    """Stream one result for each row, in order, reading at most ``WINDOW`` rows ahead.

    A result is a dict: id, prediction (index), choice (its text, or the class's name), probs,
    total, aleatoric and epistemic (nats), agreement, standard_error, draws, label (None where there
    is none); with ``truncate`` truncated (tokens left out), with ``per_draw`` draw_probs; where
    the model has decisions for them abstain and prediction_set (of choices, by their text or name).

    With ``generate`` rows are prompts that the model continues, and a result has id, text, tokens
    (how many), finish_reason ("stop" or "length"), sequence_uncertainty, total, aleatoric and
    epistemic (means over tokens; all in nats), and draws.

    Args:
        data: anything that holds rows, see :func:`tfb.data.readers.read_rows`.
        bayes: the model.
        tokenizer: its tokenizer.
        draws: as for ``bayes.predict``, "auto" included.
        batch_size: most rows of a batch.
        per_draw: keep each draw's probabilities.
        columns: for our names of columns those of the data, where they differ.
        truncate: "left" or "right": the side on which rows that are too long are cut.
        errors: "raise", or "rows": a bad row is a result with its reason in ``error``.
        generate: write text behind prompts, by greedy decoding (:class:`TextScorer`).
        max_new_tokens: most tokens of a row that is written. Default: 128.
        stop: texts before which a row ends that is written.

    Raises:
        RowError: a row that cannot be scored, with ``errors="raise"``; a file that cannot be read.
        TypeError: data that holds no rows.
        ValueError: settings that cannot work.
    """
    if errors not in ("raise", "rows"):
        raise ValueError(f"errors={errors!r}: expected 'raise' or 'rows'")
    check_generate(generate, draws, per_draw, max_new_tokens, stop)
    form = row_format(bayes, columns, optional=["label"], task=PROMPTS if generate else None)
    how: dict[str, Any] = {"draws": draws, "batch_size": batch_size, "truncate": truncate}
    how["batch_tokens"] = sys.maxsize
    scorer = (
        TextScorer(bayes, tokenizer, max_new_tokens=max_new_tokens, stop=stop, **how)
        if generate
        else Scorer(bayes, tokenizer, per_draw=per_draw, labels=form.labels, **how)
    )
    return _stream(data, form, scorer, raises=errors == "raise")


def _stream(data: Any, form: RowFormat, scorer: Scorer, *, raises: bool) -> Iterator[Result]:
    items = (read_item(record, n, form) for n, record in enumerate(iter_records(data, form)))
    for window in chunks(items, lambda item: characters(item[0]) if item[0] else 0, WINDOW):
        for result in result_rows(window, scorer(rows_of(window))):
            if raises and (error := result.pop("error")) is not None:
                raise RowError(error)
            yield result
