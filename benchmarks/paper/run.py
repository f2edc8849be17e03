"""From a setting to result rows: everything is checked first, then one model at a time is measured.

A row is one method ("adapter" or "tfb") of one adapter (task and seed) on one set of rows.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tfb
from benchmarks.calibration.reference_rule import fit_reference
from benchmarks.paper import prompts, tasks
from benchmarks.paper.blob import find_adapter, mean_adapter
from benchmarks.timing import Bench, Row, record
from tfb.adapters.loading import (
    adapter_config,
    adapter_folder,
    load_tokenizer,
    set_padding,
    to_device,
)
from tfb.data.batching import EncodedRows
from tfb.posterior import AdapterError
from tfb.scoring.evaluate import evaluations
from tfb.search.fit import SEARCH_DRAWS, check_arguments, fit_sigma
from tfb.search.loss import AnchorSet
from tfb.search.result import SearchError

KINDS = ("mle", "map", "blob-mean")
CHECKPOINTS = ("peft", "published")


@dataclass(frozen=True)
class Setting:
    """One call of the command.

    Attributes:
        base: Folder or hub name of the base model.
        adapter: The same, or owner/repository/folder/in/it; {task} stands for the task's name in
            the scripts, {seed} for the seed.
        kind: What the adapter was trained by.
        tasks: Whose adapters are evaluated.
        ood: Tasks on which the adapter of OpenBookQA is evaluated too.
        seeds: Of the adapters and of the noise.
        checkpoint: "published" adapters go through :mod:`benchmarks.paper.blob`.
        data: Folder of the tasks' files; None: the hub.
        split: "validation" or "test".
        form: Of the prompts.
        anchors: "train" or "held-out".
        anchor_rows: How many anchors.
        objective: Of the search, which leaves T at 1: the table has no temperature.
        tolerance: Of the search.
        compat: "reference" searches as the authors' scripts do.
        draws: Of the evaluation.
        batch_size: Rows a batch.
        limit: First rows of each evaluated split; such figures are toys.
    """

    base: str
    adapter: str
    kind: str
    tasks: tuple[str, ...]
    ood: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1, 2, 3)
    checkpoint: str = "peft"
    data: Path | None = None
    split: str = "validation"
    form: str = "script"
    anchors: str = "train"
    anchor_rows: int = 500
    objective: str = "max_variance"
    tolerance: float = 0.003
    compat: str | None = None
    draws: int = 10
    batch_size: int = 50
    limit: int | None = None

    def check(self) -> None:
        """Refuse settings that cannot work; read no data and load no model.

        Raises:
            ValueError: A setting cannot work, by name.
        """
        for name in self.tasks:
            tasks.task_of(name, trained=True)
        for name in self.ood:
            tasks.task_of(name)
        for name in self.tasks:
            for on in self.evaluated(name):
                tasks.evaluation_split(on, self.split)
        if self.ood and tasks.OOD_FROM not in self.tasks:
            raise ValueError(f"--ood: it is for the adapter of --task {tasks.OOD_FROM}; add it")
        for name, value in (
            ("--anchor-rows", self.anchor_rows),
            ("--batch-size", self.batch_size),
            ("--limit", 1 if self.limit is None else self.limit),
        ):
            if value < 1:
                raise ValueError(f"{name} {value}: expected at least 1")
        if self.draws < 2 or self.draws % 2:
            raise ValueError(f"--draws {self.draws}: expected a positive even number")
        check_arguments("nll", self.tolerance, "grid", self.objective, SEARCH_DRAWS)
        if self.data is not None and not self.data.is_dir():
            raise ValueError(f"--data {self.data}: there is no such folder")

    def evaluated(self, task: str) -> tuple[str, ...]:
        """Return the tasks whose rows the adapter of ``task`` is evaluated on."""
        shifted = self.ood if task == tasks.OOD_FROM else ()
        return tuple(dict.fromkeys((task, *shifted)))

    def adapter_of(self, task: str, seed: int) -> str:
        """Return the adapter's name.

        Raises:
            ValueError: The pattern has another placeholder than {task} and {seed}.
        """
        try:
            return self.adapter.format(task=tasks.TASKS[task].script, seed=seed)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"--adapter {self.adapter}: only {{task}} and {{seed}} can be filled in"
            ) from error

    def described(self) -> dict[str, Any]:
        """Return what, beside adapter and rows, a figure depends on."""
        names = ("split", "form", "anchors", "anchor_rows", "objective", "tolerance", "compat")
        return {name: getattr(self, name) for name in (*names, "draws", "limit")}


@dataclass(frozen=True)
class Prepared:
    """One task's encoded anchors and the rows of every task it is evaluated on."""

    anchors: EncodedRows
    rows: dict[str, EncodedRows]


def run(setting: Setting, bench: Bench) -> Iterator[Row]:
    """Yield the rows, recorded as they come.

    Raises:
        ValueError: Settings, data or adapters that cannot work, before any weights are loaded; a
            search that finds no sigma.
        ImportError: No ``datasets`` for data from the hub.
    """
    setting.check()
    config, tokenizer = _base(setting.base)
    encoded = {name: _prepare(setting, name, tokenizer, config) for name in setting.tasks}
    with tempfile.TemporaryDirectory(prefix="tfb-paper-") as scratch:
        folders = {
            (task, seed): _adapter(setting, task, seed, Path(scratch))
            for task in setting.tasks
            for seed in setting.seeds
        }
        for folder in dict.fromkeys(folders.values()):
            check_fits(config, folder)
        for (task, seed), folder in folders.items():
            yield from _measure(setting, bench, task, seed, folder, tokenizer, encoded[task])


def _base(name: str) -> tuple[Any, Any]:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False), load_tokenizer(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--base {name}: no configuration and tokenizer to be had ({reason})"
        ) from error


def _prepare(setting: Setting, name: str, tokenizer: Any, config: Any) -> Prepared:
    """Load, choose and encode the rows of a task and of what it is evaluated on."""

    def load(task: str, split: str) -> list[Any]:
        return tasks.load_rows(task, split, setting.data, setting.form)

    splits = {on: tasks.evaluation_split(on, setting.split) for on in setting.evaluated(name)}
    tables = {on: load(on, split) for on, split in splits.items()}
    train = load(name, "train") if setting.anchors == "train" else None
    anchors, tables[name] = tasks.choose_anchors(tables[name], setting.anchor_rows, train)
    encoded = Prepared(
        prompts.encode(anchors, tokenizer, config, setting.form),
        {
            on: prompts.encode(rows[: setting.limit], tokenizer, config, setting.form)
            for on, rows in tables.items()
        },
    )
    AnchorSet.of(encoded.anchors).check("pseudo_nll" if setting.compat else "nll")
    return encoded


def _adapter(setting: Setting, task: str, seed: int, scratch: Path) -> Path:
    """Return the adapter's local folder; a published checkpoint's mean goes to ``scratch``."""
    name = setting.adapter_of(task, seed)
    if setting.checkpoint == "peft":
        return adapter_folder(find_adapter(name))
    target = scratch / f"{task}-{seed}"
    print(f"{name}: {mean_adapter(name, target)}", flush=True)
    return target


def check_fits(config: Any, folder: Path) -> None:
    """Load the adapter onto the base model without weights (torch's device "meta").

    Raises:
        AdapterError: Another task than CAUSAL_LM, or keys or shapes that do not fit.
    """
    if (task := adapter_config(folder).get("task_type")) != "CAUSAL_LM":
        raise AdapterError(f"{folder}: task_type {task}; the table is one of CAUSAL_LM adapters")
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        tfb.load_adapter(base, folder)


def _measure(
    setting: Setting,
    bench: Bench,
    task: str,
    seed: int,
    folder: Path,
    tokenizer: Any,
    encoded: Prepared,
) -> Iterator[Row]:
    """Search sigma on the anchors, then evaluate both methods on every set of rows."""
    model = tfb.load_adapter(tfb.load_base(setting.base, folder), folder)
    bayes = tfb.bayesianize(model, seed=seed)
    set_padding(bayes.base, tokenizer)
    to_device(bayes.model)
    try:
        how: dict[str, Any] = {"tolerance": setting.tolerance, "batch_size": setting.batch_size}
        if setting.compat:
            fit = fit_reference(bayes, encoded.anchors, **how)
        else:
            how |= {"objective": setting.objective, "temperature": False}
            fit = fit_sigma(bayes, encoded.anchors, **how)
    except SearchError as error:
        raise SearchError(f"{task}, seed {seed}: {error}") from error
    for on, rows in encoded.rows.items():
        how = {"draws": setting.draws, "batch_size": setting.batch_size}
        split = tasks.evaluation_split(on, setting.split)
        for evaluation in evaluations(bayes, rows, dataset=on, **how):
            point = {
                "base": shown(setting.base),
                "kind": setting.kind,
                "adapter": shown(setting.adapter),
                "task": task,
                "on": on,
                "seed": seed,
                "method": evaluation.name,
                "setting": setting.described() | {"split": split},
            }
            sampled = evaluation.name == "tfb"
            values = {
                "suite": "paper",
                "measure": "paper",
                "point": point,
                "device": bayes.device.type,
                "toy": bench.toy,
                "dtype": str(bayes.dtype).removeprefix("torch."),
                **evaluation.metrics.to_dict(),
                "anchors": len(encoded.anchors),
                "sigma": fit.sigma if sampled else 0.0,
                "interval": fit.interval if sampled else None,
                "search_passes": fit.passes if sampled else None,
                "notes": list(fit.notes) if sampled else [],
            }
            yield record(bench, values)


def shown(name: str) -> str:
    """Return a hub name as it is, of a local folder its last part: rows carry no path."""
    path = Path(name)
    local = path.is_absolute() or path.is_dir() or path.parent.is_dir()
    return path.name if local else name
