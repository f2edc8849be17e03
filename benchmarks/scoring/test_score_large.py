"""Hours and energy of a million prompts: jobs at Llama-3.1-8B's shape on a GPU, random weights.

1,000 prompts of lognormal lengths, 300 tokens on average, in words of a tokenizer made here. The
slower ways score the first of them (``SHARES``), and their seconds are scaled by tokens. Each runs
once, after a warm-up, and its row is kept at once. Energy is that of the GPU's own counter; of the
machine around it nothing is known.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tfb
from benchmarks.fixtures import GPU, TOY, copy_of, random_model, reparameterized
from benchmarks.scoring import jobs
from benchmarks.scoring.energy import joules
from benchmarks.scoring.jobs import Task
from benchmarks.scoring.scripts import best_batch_size, run_script
from benchmarks.timing import Bench, Row, elapsed, heading, record
from tfb.draws import Draws

DRAWS, SIGMA = 10, 0.01
ADAPTER = "r8-q,v,head"
PROMPTS, MEAN, SPREAD, LONGEST = 1000, 300, 0.5, 1500  # tokens; of the logarithm
SHARES = {"full": 200, "tail": 1000, "last": 1000, "naive": 80}  # prompts
WARM_UP = 40  # prompts: several batches
SIZES = (4, 8, 16)
MILLION = 1_000_000
CHOICES = ("A", "B", "C", "D")


def word_tokenizer(vocabulary: int) -> Any:
    """Return a tokenizer with one token for each word "w5" and each choice."""
    names = ["<pad>", "<unk>", *CHOICES]
    names += [f"w{i}" for i in range(min(vocabulary, 4096) - len(names))]
    made = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def prompts(count: int, mean: int, longest: int, words: int) -> list[dict[str, Any]]:
    """Make rows of random words, no two of which begin alike for long."""
    generator = random.Random(0)
    median = mean / math.exp(SPREAD**2 / 2)
    found = []
    for i in range(count):
        length = jobs.lognormal_length(generator, median, SPREAD, 4, longest)
        text = " ".join(f"w{generator.randrange(words)}" for _ in range(length))
        found.append({"id": f"p{i}", "prompt": text, "choices": list(CHOICES)})
    return found


def large_tasks(bench: Bench, folder: Path) -> tuple[Task, Task]:
    """Put noise into all layers, and into the head alone; both and the twin share the weights."""
    shape = TOY if bench.toy else replace(GPU, tokens=LONGEST)
    source = random_model(shape, ADAPTER, bench)
    plain, head_only = copy_of(source), copy_of(source)
    # PEFT would add the whole output embedding, a gigabyte.
    source.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)

    def saved(bayes: Any, name: str) -> Path:
        bayes.configure(sigma=SIGMA)
        return Path(tfb.save(bayes, folder / name))

    bayes = tfb.bayesianize(source, source=folder / "adapter")
    last = tfb.bayesianize(head_only, layers=tfb.last_layers(0), source=folder / "adapter")
    tokenizer = word_tokenizer(shape.vocabulary)
    mean, longest = (12, 28) if bench.toy else (MEAN, LONGEST)
    rows = prompts(8 if bench.toy else PROMPTS, mean, longest, len(tokenizer) - 8)
    path = jobs.write_rows(folder / "rows.jsonl", rows)
    full = Task(
        shape.name, bayes, reparameterized(plain, bayes), tokenizer, saved(bayes, "full"), path
    )
    return full, replace(full, bayes=last, artifact=saved(last, "last"))


def measured(call: Callable[[int], object], rows: int, tokens: list[int], bench: Bench) -> Row:
    """Run the first ``rows`` prompts once, and tell what a million of all would take."""
    before = joules()
    seconds = elapsed(lambda: call(rows), bench.device)
    after = joules()
    used = None if before is None or after is None else after - before
    scale = MILLION * (sum(tokens) / len(tokens)) / sum(tokens[:rows])
    return {
        "prompts": rows,
        "tokens": sum(tokens[:rows]),
        "seconds": seconds,
        "joules": used,
        "prompts_per_second": MILLION / (seconds * scale),
        "hours_a_million": seconds * scale / 3600,
        "kwh_a_million": None if used is None else used * scale / 3.6e6,
    }


def test_a_million_prompts(benchmark: Any, bench: Bench, tmp_path: Path) -> None:
    if bench.device.type != "cuda" and not bench.toy:
        pytest.skip("8B parameters: on a GPU")
    task, last = large_tasks(bench, tmp_path)
    tokens, draws = task.lengths(), Draws.antithetic(DRAWS, SIGMA)
    size = best_batch_size(task, SIZES[:1] if bench.toy else SIZES, by_length=False, limit=32)

    def job(which: Task, **options: Any) -> Callable[[int], object]:
        return lambda rows: jobs.run_job(which, draws=DRAWS, limit=rows, **options)

    calls: dict[str, tuple[Task, Callable[[int], object]]] = {
        "tail": (task, job(task, tail=1)),
        "last": (last, job(last)),  # noise in the head alone
        "full": (task, job(task)),
        "naive": (task, lambda n: run_script(task, size, draws, by_length=False, limit=n)),
    }
    point = {
        "model": task.model,
        "adapter": ADAPTER,
        "rows": len(tokens),
        "tokens": sum(tokens),
        "draws": DRAWS,
        "dtype": bench.dtype_name,
        "batch_tokens": jobs.Job.batch_tokens,
    }

    def run_all() -> None:
        for name, (which, call) in calls.items():
            with jobs.preloaded(which):
                # Kernels are compiled and chosen, memory is taken, as by batches of full size.
                call(min(WARM_UP, len(tokens)))
                run = measured(call, min(SHARES[name], len(tokens)), tokens, bench)
            row = heading(bench, "score", "million", point | {"way": name})
            record(bench, row | {"run": run, "script_batch_rows": size})

    benchmark.pedantic(run_all, rounds=1, iterations=1)
