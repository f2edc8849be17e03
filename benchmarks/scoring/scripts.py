"""The script that people write: transformers and PEFT, padded batches, a loop over draws.

The noise of a draw is written into lora_A, the labels' columns are taken, probabilities averaged,
and one Parquet file written. It tokenizes the file once, makes the noise of a draw once for all
batches and holds the averages of all rows, so it can hardly be cheaper.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.fixtures import Case
from benchmarks.inference.baselines import forward, lora_a
from benchmarks.scoring.jobs import Task
from benchmarks.timing import elapsed
from tfb.draws import Draws

Noise = Callable[[str, int], Tensor]
"""Standard normals [r, n] of a module, by its name, for a draw."""


def run_script(
    task: Task,
    batch_size: int,
    draws: Draws,
    *,
    by_length: bool,
    noise: Noise | None = None,
    output: Path | None = None,
    limit: int | None = None,
) -> None:
    """Score the task's file with its twin.

    Args:
        task: Model and file.
        batch_size: Rows a batch.
        draws: One pass over all rows for each.
        by_length: Sort rows by their tokens first, which saves padding.
        noise: Of the draws; None: fresh normals.
        output: A Parquet file; None: one that is dropped.
        limit: Read only so many rows.
    """
    with task.rows.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, limit)]
    cases = _cases(task, rows, batch_size, by_length)
    probs = torch.zeros(
        len(rows), len(rows[0]["choices"]), dtype=torch.float64, device=task.bayes.device
    )
    for s, sigma in enumerate(draws.sigmas):
        with _sampled(task, sigma, s, noise):
            for at, case in cases:
                probs[at] += forward(case, task.twin).double() / len(draws)
    if output is not None:
        _write(output, rows, probs)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder) / "results.parquet", rows, probs)


def best_batch_size(
    task: Task, sizes: Sequence[int], *, by_length: bool, limit: int | None = None
) -> int:
    """Return the fastest of some batch sizes, by the better of two scripts of two draws each."""
    draws = Draws.antithetic(2, task.bayes.sigma or 0.0)
    seconds = {
        size: min(
            elapsed(
                lambda: run_script(task, size, draws, by_length=by_length, limit=limit),  # noqa: B023
                task.bayes.device,
            )
            for _ in range(2)
        )
        for size in sizes
    }
    return min(seconds, key=lambda size: seconds[size])


def _cases(
    task: Task, rows: Sequence[dict[str, Any]], batch_size: int, by_length: bool
) -> list[tuple[list[int], Case]]:
    """Return padded batches, each with the positions of its rows."""
    ids = task.tokenizer([row["prompt"] for row in rows])["input_ids"]
    columns = {
        choice: task.tokenizer(choice, add_special_tokens=False)["input_ids"][-1]
        for row in rows
        for choice in row["choices"]
    }
    order = sorted(range(len(rows)), key=lambda i: len(ids[i])) if by_length else range(len(rows))
    found = []
    for start in range(0, len(rows), batch_size):
        at = list(order[start : start + batch_size])
        padded = task.tokenizer.pad(
            {"input_ids": [ids[i] for i in at]}, padding_side="left", return_tensors="pt"
        )
        labels = torch.tensor([[columns[c] for c in rows[i]["choices"]] for i in at])
        device = task.bayes.device
        batch = {k: v.to(device) for k, v in padded.items() if k != "token_type_ids"}
        found.append((at, Case("", task.bayes, task.twin, batch, labels.to(device))))
    return found


@contextmanager
def _sampled(task: Task, sigma: float, draw: int, noise: Noise | None) -> Iterator[None]:
    """Hold A' + sigma / d o E in lora_A."""
    layers = lora_a(task.bayes, task.twin)
    means = {name: weight.clone() for name, (weight, _) in layers.items()}
    for name, (weight, inv_d) in layers.items():
        E = torch.randn_like(weight) if noise is None else noise(name, draw).to(weight)
        weight.add_(sigma * inv_d * E)
    try:
        yield
    finally:
        for name, (weight, _) in layers.items():
            weight.copy_(means[name])


def _write(path: Path, rows: Sequence[dict[str, Any]], probs: Tensor) -> None:
    prediction = probs.argmax(-1).tolist()
    columns = {
        "id": [row["id"] for row in rows],
        "prediction": prediction,
        "choice": [row["choices"][i] for row, i in zip(rows, prediction, strict=True)],
        "probs": probs.tolist(),
    }
    pq.write_table(pa.table(columns), path)
