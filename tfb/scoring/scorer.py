"""One window of rows to the rows of one part: encode, predict, and errors as rows.

A window's result depends on the window, the model and the settings alone (see
:mod:`tfb.scoring.windows`), so it does not matter which process computes it, or when. Only where memory ran
out are batches other ones; results are then the same to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tfb.data.batching import Batch, EncodedRows, batches, padded_tokens, token_batches
from tfb.data.rows import Row, RowError
from tfb.model import BayesianModel
from tfb.predictive import Predictive
from tfb.sampling.adaptive import MOST
from tfb.scoring.output import UNCERTAINTIES
from tfb.scoring.rows import encoder, pad_token
from tfb.scoring.windows import Item, Window, error_text


@dataclass(frozen=True)
class Prepared:
    """A window, encoded."""

    window: Window
    encoded: EncodedRows | None
    """The rows without an error; None if there are none."""
    positions: list[int]
    """Of the encoded rows in the window."""
    errors: dict[int, str]
    """By position, what is wrong with the others."""


@dataclass(frozen=True)
class Scored:
    """The rows of one part, in the order of the window."""

    number: int
    rows: list[dict[str, Any]]
    errors: int
    tokens: int
    """Of the prompts that were scored."""
    truncated: int
    """Rows that were cut."""
    share: float
    """Of the input, up to the end of this window."""


class Scorer:
    """Scores windows with one model.

    Args:
        draws: antithetic draws of every row, or "auto". budget: padded tokens of a batch, of one
            copy of the rows. per_draw: keep each draw's probabilities. logits: and logits.
        truncate: see :class:`tfb.data.encoding.RowEncoder`. labels: names of the classes of text rows.

    Raises:
        ValueError: ``per_draw`` or ``logits`` with "auto", where rows have different numbers.
    """

    def __init__(
        self,
        bayes: BayesianModel,
        tokenizer: Any,
        *,
        draws: int | str = 10,
        budget: int = 4096,
        per_draw: bool = False,
        logits: bool = False,
        truncate: str | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        if draws == "auto" and (per_draw or logits):
            raise ValueError(
                "draws 'auto': rows have different numbers of draws, keep none of them"
            )
        self.bayes, self.labels = bayes, labels
        self.encoder = encoder(bayes, tokenizer, truncate)
        self.draws, self.per_draw, self.logits = draws, per_draw, logits
        self.budget = budget
        self._pad = pad_token(bayes, tokenizer)
        # On a GPU the engine would go by the memory that happens to be free, and a pass of another
        # shape rounds differently.
        all_draws = MOST if isinstance(draws, str) else draws
        self._draws_per_pass = None if bayes.device.type == "cpu" else all_draws
        self._copies = all_draws if bayes.mode == "full" else 1

    def prepare(self, window: Window) -> Prepared:
        """Encode a window; touches the tokenizer only, so that another thread may do it."""
        errors = {i: item.error for i, item in enumerate(window.items) if item.error is not None}
        rows = {i: item.row for i, item in enumerate(window.items) if item.row is not None}
        encoded, faulty = self._encode(rows)
        if faulty:
            rows = {i: row for i, row in rows.items() if i not in faulty}
            encoded, _ = self._encode(rows)
        return Prepared(window, encoded, list(rows), errors | faulty)

    def compute(self, prepared: Prepared) -> Scored:
        """Predict what was prepared."""
        results: dict[int, dict[str, Any]] = {}
        encoded, tokens, truncated = prepared.encoded, 0, 0
        if encoded is not None:
            tokens = sum(map(len, encoded.input_ids))
            found = self._predict(encoded)
            for i, cut in enumerate(encoded.truncated or ()):
                if "error" not in found[i]:
                    found[i]["truncated"] = cut
                    truncated += cut > 0
            results = {prepared.positions[i]: values for i, values in found.items()}
        failed = {i: {"error": text} for i, text in prepared.errors.items()}
        values = failed | results
        rows = [self._row(item, values[i]) for i, item in enumerate(prepared.window.items)]
        errors = sum(row["error"] is not None for row in rows)
        window = prepared.window
        return Scored(window.number, rows, errors, tokens, truncated, window.share)

    def _encode(self, rows: dict[int, Row]) -> tuple[EncodedRows | None, dict[int, str]]:
        """The rows encoded, or by position what is wrong with some of them, found by halving."""
        if not rows:
            return None, {}
        at = list(rows)
        try:
            encoded = self.encoder(list(rows.values()))
        except RowError as error:
            if len(rows) == 1:
                return None, {at[0]: str(error)}
            half = len(at) // 2
            parts = ({i: rows[i] for i in at[:half]}, {i: rows[i] for i in at[half:]})
            return None, {i: text for part in parts for i, text in self._encode(part)[1].items()}
        empty = [i for i, ids in zip(at, encoded.input_ids, strict=True) if not ids]
        return encoded, dict.fromkeys(empty, "no tokens; write text that the tokenizer knows")

    def batches(self, encoded: EncodedRows, rows: Iterable[int] | None = None) -> list[list[int]]:
        """The rows of a window (positions; None: all) as this scorer batches them."""
        return token_batches(encoded, self.budget, rows, copies=self._copies)

    def _predict(self, encoded: EncodedRows) -> dict[int, dict[str, Any]]:
        """Results by position. Where memory runs out, the batch is split and the budget lowered."""
        results: dict[int, dict[str, Any]] = {}
        waiting = self.batches(encoded)
        while waiting:
            batch = waiting.pop(0)
            try:
                found = self._batch(encoded, batch, self._draws_per_pass)
                if found is None and len(batch) == 1:
                    found = self._batch(encoded, batch, 2)
            except (ValueError, IndexError) as error:  # the engine refuses one of the rows
                half = len(batch) // 2
                if half:
                    waiting[:0] = [batch[:half], batch[half:]]
                else:
                    results[batch[0]] = {"error": f"the model refuses it ({error})"}
                continue
            if found is not None:
                results |= found
            elif len(batch) == 1:
                results[batch[0]] = {"error": "out of memory, even alone in its batch; shorten it"}
            else:
                self.budget = max(1, min(self.budget, padded_tokens(encoded, batch)) // 2)
                left = [i for b in [batch, *waiting] for i in b]
                waiting = self.batches(encoded, left)
        return results

    def _batch(
        self, encoded: EncodedRows, rows: list[int], draws_per_pass: int | None
    ) -> dict[int, dict[str, Any]] | None:
        """Results of one batch; None if memory ran out."""
        results: dict[int, dict[str, Any]] = {}
        chosen = encoded.subset(rows)
        try:
            for batch in batches(chosen, batch_size=len(rows), pad_token_id=self._pad):
                values = self._values(batch, draws_per_pass)
                at = [rows[i] for i in batch.indices.tolist()]
                results |= zip(at, values, strict=True)
            return results
        except torch.OutOfMemoryError:
            pass  # left before the cache is emptied: the traceback holds the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _values(self, batch: Batch, draws_per_pass: int | None) -> list[dict[str, Any]]:
        """The computed columns of each row of a batch."""
        inputs, logits = batch.model_inputs(), None
        if isinstance(self.draws, str):
            p = self.bayes.predict(
                inputs, self.draws, label_ids=batch.label_ids, draws_per_pass=draws_per_pass
            )
        else:
            draws = self.bayes.distinct_draws(self.draws, kept=self.per_draw or self.logits)
            logits = self.bayes.logits(
                inputs, draws, batch.label_ids, draws_per_pass=draws_per_pass
            )
            p = Predictive.from_logits(logits, draws, keep_draws=self.per_draw)
        error = p.standard_error.gather(-1, p.prediction[:, None])[:, 0]
        columns: dict[str, list[Any]] = {
            "prediction": p.prediction.tolist(),
            "probs": p.probs.float().tolist(),
            **{n: getattr(p, n).float().tolist() for n in UNCERTAINTIES[:-1]},
            UNCERTAINTIES[-1]: [None if e != e else e for e in error.float().tolist()],
        }
        counts = p.draw_counts
        columns["draws"] = [len(p.draws)] * len(batch) if counts is None else counts.tolist()
        if p.draw_probs is not None:
            columns["draw_probs"] = p.draw_probs.float().transpose(0, 1).tolist()
        if self.logits and logits is not None:
            columns["draw_logits"] = logits.float().transpose(0, 1).tolist()
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        finite = p.probs.isfinite().all(-1).tolist()
        fault = "the model returned NaN or Inf; check the adapter and the dtype"
        return [row if good else {"error": fault} for row, good in zip(rows, finite, strict=True)]

    def _row(self, item: Item, values: dict[str, Any]) -> dict[str, Any]:
        """A row of the output; columns that are not there are null."""
        row: dict[str, Any] = {"id": item.id, **item.kept, **values}
        error = values.get("error")
        if item.row is not None and error is None:
            row["label"] = item.row.label
            names = item.row.choices or self.labels
            row["choice"] = None if names is None else names[values["prediction"]]
        elif item.row is not None and error and not error.startswith(item.row.source):
            error = f"{item.row.source} (id {item.id!r}): {error}"
        row["error"] = None if error is None else error_text(error)
        return {**row, "key": f"{item.key:016x}"}
