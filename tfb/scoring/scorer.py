"""Rows to result rows: encoded, batched by tokens, predicted. What cannot be scored is an error.

Results depend on the rows that are given together, the model and the settings alone. Only where
memory ran out are batches other ones; results are then the same to rounding.
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
from transformers import PreTrainedTokenizerBase

from tfb.adapters.loading import class_names
from tfb.data.batching import EncodedRows, batches, padded_tokens, token_batches
from tfb.data.encoding import RowEncoder, characters, chunks
from tfb.data.readers import Record, iter_records
from tfb.data.rows import DEEPEST, Row, RowError, RowFormat, is_deep
from tfb.draws import Draws, check_even
from tfb.model import BayesianModel
from tfb.predictive import Predictive, as_float32
from tfb.sampling.adaptive import Adaptive

Result = dict[str, Any]
"""A row of the output by column; one with an error has ``id`` and ``error`` alone."""

Item = tuple[Row | None, Result]
"""A record of the input: the row to score, if it is one, and what its result begins with."""

UNCERTAINTIES = ("total", "aleatoric", "epistemic", "agreement", "standard_error")
BATCH_TOKENS = 4096
WINDOW = 1024  # rows that are encoded together while streaming
LONGEST_ERROR = 2000  # characters
NOT_FINITE = "the model returned NaN or Inf; check the adapter and the dtype"


def row_format(
    bayes: BayesianModel,
    columns: Mapping[str, str] | None = None,
    *,
    labels: Sequence[str] | None = None,
    optional: Sequence[str] = (),
) -> RowFormat:
    """Return how data become rows for a model, by its task and, unless given, its ``labels``."""
    names = class_names(bayes.task, bayes.base.config, labels or bayes.labels)
    return RowFormat(columns or {}, names, bayes.task, optional)


def row_encoder(
    bayes: BayesianModel,
    tokenizer: PreTrainedTokenizerBase,
    truncate: str | None = None,
    label_tokens: str | None = None,
) -> RowEncoder:
    """Return what encodes rows for a model, by its own ``label_tokens`` unless they are given."""
    return RowEncoder.of(
        tokenizer,
        bayes.task,
        bayes.base.config,
        label_tokens=label_tokens or bayes.label_tokens,
        length_normalization=bayes.config.length_normalization,
        truncate=truncate,
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
    ) -> None:
        self.bayes, self.labels, self.per_draw = bayes, labels, per_draw
        self.encoder = row_encoder(bayes, tokenizer, truncate)
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
                p = self.bayes.predict(
                    batch.model_inputs(),
                    self._draws,
                    label_ids=batch.label_ids,
                    keep_draws=self.per_draw,
                    draws_per_pass=draws_per_pass,
                )
                columns = {name: found.tolist() for name, found in result_columns(p).items()}
                if self.encoder.truncate is not None:
                    columns["truncated"] = torch.tensor(chosen.truncated)[batch.indices].tolist()
                if self.bayes.decisions is not None:
                    columns |= self.bayes.decisions.apply(p.probs)
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
) -> Iterator[Result]:
    """Stream one result for each row, in order, reading at most ``WINDOW`` rows ahead.

    A result is a dict: id, prediction (index), choice (its text, or the class's name), probs,
    total, aleatoric and epistemic (nats), agreement, standard_error, draws, label (None where there
    is none); with ``truncate`` truncated (tokens left out), with ``per_draw`` draw_probs; where
    the model has decisions for them abstain and prediction_set (of choices, by their text or name).

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

    Raises:
        RowError: a row that cannot be scored, with ``errors="raise"``; a file that cannot be read.
        TypeError: data that holds no rows.
        ValueError: settings that cannot work.
    """
    if errors not in ("raise", "rows"):
        raise ValueError(f"errors={errors!r}: expected 'raise' or 'rows'")
    form = row_format(bayes, columns, optional=["label"])
    scorer = Scorer(
        bayes,
        tokenizer,
        draws=draws,
        batch_tokens=sys.maxsize,
        batch_size=batch_size,
        per_draw=per_draw,
        truncate=truncate,
        labels=form.labels,
    )
    return _stream(data, form, scorer, raises=errors == "raise")


def _stream(data: Any, form: RowFormat, scorer: Scorer, *, raises: bool) -> Iterator[Result]:
    items = (read_item(record, n, form) for n, record in enumerate(iter_records(data, form)))
    for window in chunks(items, lambda item: characters(item[0]) if item[0] else 0, WINDOW):
        for result in result_rows(window, scorer(rows_of(window))):
            if raises and (error := result.pop("error")) is not None:
                raise RowError(error)
            yield result
