"""Whole scoring jobs in this process, the engine beneath them, and the files that they score.

A job is :func:`tfb.scoring.run.run` into a fresh folder; the engine is ``bayes.predict`` on the
batches of that job, made beforehand. Both have a model that is loaded already.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import torch

from tfb.data.batching import Batch, batches
from tfb.data.readers import read_rows
from tfb.model import BayesianModel
from tfb.scoring import run as offline
from tfb.scoring.evaluate import encode
from tfb.scoring.job import Job
from tfb.scoring.scorer import Scorer


@dataclass(frozen=True, eq=False)
class Task:
    """A model in both forms, and a file that it is to score.

    Attributes:
        model: The base's folder, or a name where no job loads it.
        bayes: See :class:`benchmarks.fixtures.Case`.
        twin: The same.
        tokenizer: The model's.
        artifact: ``bayes``, saved.
        rows: JSONL; all rows have as many choices.
    """

    model: str
    bayes: BayesianModel
    twin: Any
    tokenizer: Any
    artifact: Path
    rows: Path

    def job(self, output: Path, *, tail: int | None = None, **options: Any) -> Job:
        """Return a job in tail mode, or in full mode without ``tail``."""
        mode, inputs = "full" if tail is None else "tail", (str(self.rows),)
        files = (str(self.artifact), inputs, str(output))
        return Job(*files, base=self.model, mode=mode, tail=tail, **options)

    def configure(self, tail: int | None) -> None:
        """Put the model into tail mode, or into full mode without ``tail``."""
        self.bayes.configure(mode="full" if tail is None else "tail", tail=tail)

    def lengths(self) -> list[int]:
        """Return the tokens of each prompt."""
        texts = [str(row.prompt) for row in read_rows(self.rows)]
        return [len(ids) for ids in self.tokenizer(texts)["input_ids"]]


# --- jobs and the engine --------------------------------------------------------------------------


@contextmanager
def preloaded(task: Task) -> Iterator[None]:
    """Let jobs take the model of ``task`` within this context, in place of loading one.

    They leave out the hash of its weights, which takes as long as reading them.
    """

    def load(job: Job) -> tuple[BayesianModel, Any]:
        task.configure(job.tail)
        return task.bayes, task.tokenizer

    unhashed = patch("tfb.scoring.job.model_sha256", return_value="not computed")
    with unhashed, patch.object(Job, "load", load):
        yield


def run_job(task: Task, **options: Any) -> None:
    """Run one job, within ``preloaded``; its folder is dropped."""
    with tempfile.TemporaryDirectory() as folder:
        finish(task.job(Path(folder) / "out", **options))


def finish(job: Job, **how: Any) -> None:
    """Run a job to its end, without errors."""
    outcome = offline.run(job, **how)
    if outcome.status != offline.COMPLETE or outcome.counts.errors:
        raise RuntimeError(f"the job ended as {outcome}")


def read_probs(paths: Iterable[Path]) -> torch.Tensor:
    """Return the probabilities [N, K] of all rows in float64, in the order of their ids."""
    rows = [r for path in paths for r in pq.read_table(path, partitioning=None).to_pylist()]
    rows.sort(key=lambda row: str(row["id"]))
    return torch.tensor([row["probs"] for row in rows], dtype=torch.float64)


def engine_batches(task: Task, draws: int, tail: int | None = None) -> list[Batch]:
    """Return the batches of a job whose rows fit into one part."""
    task.configure(tail)
    encoded = encode(task.bayes, task.rows, task.tokenizer)
    pad = task.bayes.pad_token_id
    return [
        batch
        for rows in Scorer(task.bayes, task.tokenizer, draws=draws).batches(encoded)
        for batch in batches(encoded.subset(rows), batch_size=len(rows), pad_token_id=pad)
    ]


def run_engine(task: Task, made: Sequence[Batch], draws: int, tail: int | None = None) -> None:
    """Predict batches as a job does, and drop the results."""
    mode = "full" if tail is None else "tail"
    each = None if task.bayes.device.type == "cpu" else draws
    for batch in made:
        task.bayes.predict(
            batch.model_inputs(), draws, mode, batch.label_ids, tail=tail, draws_per_pass=each
        )


# --- files ----------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shuffled_rows(source: Path, count: int) -> list[dict[str, Any]]:
    """Return ``count`` rows of a JSONL file in random order, always the same."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    return rows[:count]


def skewed_rows(source: Path, count: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Return rows whose lengths in tokens are lognormal, 16 to 480.

    Other utterances are put in front, and words of the front left out. The median is 80, the
    standard deviation of the logarithm .9.
    """
    rows = shuffled_rows(source, count)
    texts = [row["prompt"].removesuffix(" Topic") for row in rows]
    generator = random.Random(1)
    found = []
    for i, row in enumerate(rows):
        wanted = lognormal_length(generator, 80, 0.9, 16, 480)
        words = row["prompt"].split()
        while len(tokenizer(" ".join(words))["input_ids"]) < wanted:
            words = [*generator.choice(texts).split(), *words]
        while len(words) > 1 and len(tokenizer(" ".join(words))["input_ids"]) > wanted:
            words = words[1:]
        found.append({**row, "id": f"skewed-{i}", "prompt": " ".join(words), "label": None})
    return found


def lognormal_length(
    generator: random.Random, median: float, sigma: float, least: int, most: int
) -> int:
    return round(min(most, max(least, generator.lognormvariate(math.log(median), sigma))))
