"""Predictions for many rows: over an encoded set, or streaming from files to a file.

Rows go out in the order they came in. Output files appear whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfb.batching import EncodedRows, batches
from tfb.draws import Draws
from tfb.encoding import encode_answers, encode_choices, encode_texts
from tfb.engine import BayesianModel
from tfb.rows import Row

WINDOW = 1024  # rows encoded at a time while streaming
FORMATS = ("jsonl", "parquet")


@dataclass(frozen=True)
class Predictions:
    """N rows, in the rows' order; K is the widest number of choices, padded with zeros.

    probs [N, K]; total, aleatoric, epistemic [N] nats; agreement [N]; standard_error [N], of the
    predicted class's probability; draw_probs [S, N, K] or None.
    """

    probs: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    agreement: Tensor
    standard_error: Tensor
    draw_probs: Tensor | None = None


def pad_token(bayes: BayesianModel, tokenizer: Any = None) -> int:
    """The token that fills padding (its value never matters behind the mask, except for the
    SEQ_CLS heads that look for it, which have it in the model's configuration)."""
    for owner in (bayes.base.config, tokenizer):
        value = getattr(owner, "pad_token_id", None)
        if isinstance(value, int):
            return value
    return 0


def encode(bayes: BayesianModel, rows: Sequence[Row], tokenizer: Any) -> EncodedRows:
    """Encode rows for the model's task, refusing prompts longer than the model.

    Raises:
        RowError: a row that the task, the tokenizer or the model cannot take.
    """
    return encode_rows(rows, tokenizer, bayes.task, bayes.base.config)


def encode_rows(rows: Sequence[Row], tokenizer: Any, task: str, config: Any) -> EncodedRows:
    """``encode`` without the model: its task and its configuration are enough."""
    limit = getattr(config, "max_position_embeddings", None)
    if task == "CAUSAL_LM":
        return encode_choices(rows, tokenizer, max_length=limit)
    if task == "SEQ_2_SEQ_LM":
        return encode_answers(rows, tokenizer, max_length=limit)
    return encode_texts(rows, tokenizer, num_labels=int(config.num_labels), max_length=limit)


def check_rows(rows: Iterable[Row], tokenizer: Any, task: str, config: Any) -> int:
    """Encode every row and keep none; their number.

    Tokenizing costs little beside S forward passes, and a bad row at the end of a long file is
    found before the first of them.

    Raises:
        RowError: the first row that cannot be read or encoded.
    """
    stream, count = iter(rows), 0
    while window := list(islice(stream, WINDOW)):
        encode_rows(window, tokenizer, task, config)
        count += len(window)
    return count


def predict_rows(
    bayes: BayesianModel,
    encoded: EncodedRows,
    draws: int | Draws = 10,
    *,
    batch_size: int = 50,
    pad_token_id: int = 0,
    keep_draws: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """Posterior predictions of every encoded row; ``progress`` gets the rows just finished."""
    chosen = bayes.draws(draws)
    N, K = len(encoded), max(encoded.num_choices(i) for i in range(len(encoded)))
    probs = torch.zeros(N, K)
    columns = torch.zeros(5, N)
    kept = torch.zeros(len(chosen), N, K) if keep_draws else None
    for batch in batches(
        encoded, batch_size=batch_size, pad_token_id=pad_token_id, sort_by_length=True
    ):
        p = bayes.predict(
            batch.model_inputs(), chosen, label_ids=batch.label_ids, keep_draws=keep_draws
        )
        at, k = batch.indices, p.probs.shape[-1]
        if not bool(p.probs.isfinite().all()):
            bad = int(at[(~p.probs.isfinite()).any(-1).cpu()][0])
            raise ValueError(f"row {encoded.ids[bad]}: the model returned NaN or Inf")
        probs[at, :k] = p.probs.float().cpu()
        deviation = p.standard_error.gather(-1, p.prediction[:, None])[:, 0]
        for i, value in enumerate((p.total, p.aleatoric, p.epistemic, p.agreement, deviation)):
            columns[i, at] = value.float().cpu()
        if kept is not None and p.draw_probs is not None:
            kept[:, at, :k] = p.draw_probs.float().cpu()
        if progress is not None:
            progress(len(batch))
    total, aleatoric, epistemic, agreement, error = columns
    return Predictions(probs, total, aleatoric, epistemic, agreement, error, kept)


def score(
    rows: Iterable[Row],
    bayes: BayesianModel,
    tokenizer: Any,
    *,
    draws: int | Draws = 10,
    batch_size: int = 50,
    per_draw: bool = False,
) -> Iterator[dict[str, Any]]:
    """Stream one result for each row, in order, reading at most ``WINDOW`` rows ahead.

    Yields:
        dicts: id, prediction (index), choice (text, choice rows), probs, total, aleatoric,
        epistemic (nats), agreement, standard_error, label if given, draw_probs if ``per_draw``.
    """
    stream = iter(rows)
    pad = pad_token(bayes, tokenizer)
    while window := list(islice(stream, WINDOW)):
        encoded = encode(bayes, window, tokenizer)
        out = predict_rows(
            bayes, encoded, draws, batch_size=batch_size, pad_token_id=pad, keep_draws=per_draw
        )
        for i, row in enumerate(window):
            k = encoded.num_choices(i)
            best = int(out.probs[i].argmax())
            result: dict[str, Any] = {"id": row.id, "prediction": best}
            if row.choices is not None:
                result["choice"] = row.choices[best]
            result["probs"] = out.probs[i, :k].tolist()
            for name in ("total", "aleatoric", "epistemic", "agreement", "standard_error"):
                value = float(getattr(out, name)[i])
                result[name] = None if value != value else value
            result["label"] = row.label
            if out.draw_probs is not None:
                result["draw_probs"] = out.draw_probs[:, i, :k].tolist()
            yield result


def write_results(results: Iterable[dict[str, Any]], path: Path, file_format: str) -> int:
    """Write results to ``path`` ("jsonl" or "parquet") by way of a temporary file; their number.

    Raises:
        ValueError: another format, or no results at all for Parquet, which has then no columns.
    """
    if file_format not in FORMATS:
        raise ValueError(f"format {file_format!r}: expected one of {', '.join(FORMATS)}")
    temporary = path.with_name(f".{path.name}.partial")
    count = 0
    try:
        if file_format == "jsonl":
            with temporary.open("w", encoding="utf-8") as file:
                for result in results:
                    count += 1
                    file.write(json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")
        else:
            count = _write_parquet(results, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _write_parquet(results: Iterable[dict[str, Any]], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream, count, writer = iter(results), 0, None
    schema = None
    try:
        while block := list(islice(stream, WINDOW)):
            if schema is None:
                # Fixed here, not inferred: a first block without labels must not type the column.
                real, reals = pa.float32(), pa.list_(pa.float32())
                types = {
                    "id": pa.string(),
                    "prediction": pa.int32(),
                    "choice": pa.string(),
                    "probs": reals,
                    "label": pa.int32(),
                    "draw_probs": pa.list_(reals),
                }
                schema = pa.schema([(k, types.get(k, real)) for k in block[0]])
                writer = pq.ParquetWriter(str(path), schema)
            assert writer is not None
            writer.write_table(pa.Table.from_pylist(block, schema=schema))
            count += len(block)
        if writer is None:
            raise ValueError("no results, so nothing to write as Parquet")
    finally:
        if writer is not None:
            writer.close()
    return count
