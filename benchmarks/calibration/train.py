"""Trains the adapters that the shared data lacks: ``python -m benchmarks.calibration.train``.

Plain LoRA as people train it: AdamW, linear decay, a fixed number of epochs, no early stop, no
tuning for any method. An adapter is an ordinary PEFT folder with ``train.json`` beside it:
configuration, losses, versions, seconds. Folders are complete or not there; what is there is not
trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.calibration.tasks import GIVEN, LABEL_TOKENS, TASKS, Task, load_task
from benchmarks.environment import MINILM, environment, shared_folder
from tfb.atomic import staged_folder
from tfb.data.batching import Batch, EncodedRows, batches
from tfb.data.encoding import RowEncoder
from tfb.data.rows import Row

ADAPTERS = Path(__file__).resolve().parent / "adapters"
SEEDS = (0, 1, 2)
LLAMA = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT = ("query", "value", "dense")


@dataclass(frozen=True)
class Recipe:
    """How a task's adapters are trained."""

    targets: tuple[str, ...]
    epochs: int
    learning_rate: float
    batch_size: int = 32
    warmup: float = 0.05
    r: int = 8
    alpha: int = 16
    dropout: float = 0.1


RECIPES = {
    "clinc-domain": Recipe(LLAMA, epochs=20, learning_rate=2e-3),
    "clinc150": Recipe(LLAMA, epochs=6, learning_rate=2e-3, batch_size=64),
    # Stops while the loss still falls fast, which leaves an adapter under-confident.
    "clinc150-early": Recipe(LLAMA, epochs=4, learning_rate=2e-3, batch_size=64),
    "clinc-fewshot": Recipe(BERT, epochs=12, learning_rate=5e-3),
    "exam": Recipe(BERT, epochs=12, learning_rate=3e-3),
    "subject": Recipe(BERT, epochs=12, learning_rate=3e-3, batch_size=16),
    "difficulty": Recipe(BERT, epochs=12, learning_rate=3e-3),
    "banking": Recipe(LLAMA, epochs=12, learning_rate=2e-3),
}


def adapter(root: Path, task: str, seed: int) -> Path:
    """Return an adapter's folder: "<task>-<seed>" in ``root``, or a given one in ``shared``.

    Raises:
        ValueError: an unknown task. FileNotFoundError: not trained yet.
    """
    if task not in TASKS:
        raise ValueError(f"adapter {task}: expected one of {', '.join(TASKS)}")
    if is_given(task, seed):
        return shared_folder() / "adapters" / GIVEN[task]
    folder = root / f"{task}-{seed}"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not trained: python -m benchmarks.calibration.train --root {root} "
            f"--task {task} --seed {seed}"
        )
    return folder


def is_given(task: str, seed: int) -> bool:
    """Whether the adapter comes with the shared data."""
    return task in GIVEN and seed == 0


def train(task: Task, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train one adapter and put it at ``folder``, which must not be there. Returns train.json."""
    torch.manual_seed(task.seed)  # of the head, of LoRA's A and of dropout
    model, tokenizer = lora_model(task.base, recipe, task.task_type, task.classes)
    rows = encoder(task, tokenizer, model.config)(task.train)
    how: dict[str, Any] = {"pad_token_id": int(model.config.pad_token_id)}
    how["padding_side"] = _side(rows)

    def nll(group: list[int]) -> tuple[Tensor, int]:
        (batch,) = batches(rows.subset(group), batch_size=len(group), **how)
        return F.cross_entropy(_logits(model, batch, task), batch.labels), len(batch)

    def figures() -> dict[str, Any]:
        parts = (("train", task.train_anchors), ("held_out", task.anchors))
        return {name: evaluate_rows(model, part, task, tokenizer) for name, part in parts}

    lengths = [len(ids) for ids in rows.input_ids]
    return run(task, recipe, folder, model, lengths, nll, figures)


class Named(Protocol):
    """A task of one seed."""

    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int: ...


def run(
    task: Named,
    recipe: Recipe,
    folder: Path,
    model: Any,
    lengths: Sequence[int],
    nll: Callable[[list[int]], tuple[Tensor, int]],
    figures: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Train fresh LoRA factors and put them at ``folder``; return train.json.

    Args:
        task: What train.json names; its seed is that of the rows' order.
        recipe: How to train.
        folder: Must not be there.
        model: A PEFT model.
        lengths: Tokens of each row.
        nll: Of rows, by their numbers: the mean NLL, and of how many parts that is.
        figures: What train.json tells of the model once it is trained.

    Raises:
        FileExistsError: The folder is there.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it to train again")
    started = time.perf_counter()
    losses = []
    steps = optimization(model, recipe, math.ceil(len(lengths) / recipe.batch_size))
    model.train()
    for epoch in range(recipe.epochs):
        total, count = 0.0, 0
        for group in groups(lengths, recipe.batch_size, f"{task.name} {task.seed} {epoch}"):
            mean, parts = nll(group)
            mean.backward()
            next(steps)
            total, count = total + float(mean.detach()) * parts, count + parts
        losses.append(total / count)
        print(f"{folder.name} epoch {epoch + 1}: {losses[-1]:.4f}", flush=True)
    record = {
        "task": task.name,
        "seed": task.seed,
        "rows": len(lengths),
        "recipe": asdict(recipe),
        "train_loss": losses,
        "figures": figures(),
        "seconds": time.perf_counter() - started,
        "environment": environment(),
    }
    with staged_folder(folder) as made:
        model.save_pretrained(str(made), save_embedding_layers=False)
        (made / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        (made / "train.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def encoder(task: Task, tokenizer: Any, config: Any) -> RowEncoder:
    return RowEncoder.of(tokenizer, task.task_type, config, label_tokens=LABEL_TOKENS)


def evaluate_rows(
    model: Any, rows: Sequence[Row], task: Task, tokenizer: Any
) -> dict[str, float | int]:
    """Accuracy, NLL and mean confidence of the deterministic model."""
    encoded = encoder(task, tokenizer, model.config)(rows)
    model.eval()
    probs, labels = [], []
    pad = int(model.config.pad_token_id)
    for batch in batches(encoded, batch_size=100, pad_token_id=pad, padding_side=_side(encoded)):
        with torch.no_grad():
            probs.append(_logits(model, batch, task).softmax(-1))
        labels.append(torch.as_tensor(batch.labels))
    p, y = torch.cat(probs), torch.cat(labels)
    return {
        "rows": len(y),
        "accuracy": float((p.argmax(-1) == y).float().mean()),
        "nll": float(F.nll_loss(p.clamp_min(1e-12).log(), y)),
        "confidence": float(p.amax(-1).mean()),
    }


def lora_model(
    folder: Path, recipe: Recipe, task_type: str = "CAUSAL_LM", classes: int = 0
) -> tuple[Any, Any]:
    """Return the base model with fresh LoRA factors (and head), and its tokenizer."""
    import transformers
    from peft import LoraConfig, get_peft_model

    base = str(folder)
    causal = task_type == "CAUSAL_LM"
    if causal:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=classes, dtype=torch.float32
        )
    config = LoraConfig(
        task_type=task_type,
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.targets),
        modules_to_save=None if causal else ["classifier", "score"],
    )
    wrapped = get_peft_model(model, config)
    # A name, not a folder of the machine that it was trained on.
    name = MINILM if folder.name == "model" else folder.name
    wrapped.peft_config["default"].base_model_name_or_path = name
    return wrapped, transformers.AutoTokenizer.from_pretrained(base)


def _logits(model: Any, batch: Batch, task: Task) -> Tensor:
    """[B, K] logits of the classes or choices."""
    if batch.label_ids is None:
        return model(**batch.model_inputs()).logits
    position = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(**batch.model_inputs(), position_ids=position, logits_to_keep=1).logits[:, -1]
    return logits.gather(-1, batch.label_ids)


def optimization(model: Any, recipe: Recipe, steps_per_epoch: int) -> Iterator[None]:
    """Each ``next`` is one step of AdamW, with warm-up and linear decay to 0."""
    from transformers import get_linear_schedule_with_warmup

    parameters = [p for p in model.parameters() if p.requires_grad]
    # No decoupled decay: the prior is a term of the loss, and a head has none.
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    steps = recipe.epochs * steps_per_epoch
    schedule = get_linear_schedule_with_warmup(optimizer, int(recipe.warmup * steps), steps)
    for _ in range(steps):
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield


def groups(lengths: Sequence[int], batch_size: int, key: str) -> list[list[int]]:
    """Batches of rows of about one length, as their indices, in random order; every row once."""
    rng = random.Random(key)
    noisy = [length * rng.uniform(0.8, 1.2) for length in lengths]
    order = sorted(range(len(noisy)), key=noisy.__getitem__)
    found = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng.shuffle(found)
    return found


def _side(rows: EncodedRows) -> str:
    """Return the padding's side: decoders' prompts end together, encoders' begin together."""
    return "left" if rows.label_ids is not None else "right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ADAPTERS, help="folder of all adapters")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seed", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--threads", type=int, help="torch's threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    shared = shared_folder()
    for seed in options.seed:  # all of the first seed, so that it can be used
        for name in options.task:
            folder = options.root / f"{name}-{seed}"
            if is_given(name, seed) or folder.is_dir():
                continue
            record = train(load_task(name, shared, seed), RECIPES[name], folder)
            print(f"{folder.name}: {record['seconds']:.0f} s", record["figures"], flush=True)


if __name__ == "__main__":
    main()
