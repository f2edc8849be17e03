"""Accuracy, ECE and NLL of adapters with and without TFB, on the tasks of the paper's table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks.environment import results_folder
from benchmarks.paper import run, tables, tasks
from benchmarks.paper.prompts import FORMS
from benchmarks.timing import Bench
from tfb.atomic import write_json

DEFAULTS = run.Setting("", "", "mle", tasks.TRAINED)
NAMES = tuple(field.name for field in fields(run.Setting))


def parser() -> argparse.ArgumentParser:
    """Return a parser whose options have the names of a setting's fields."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    made.set_defaults(**{name: getattr(DEFAULTS, name) for name in NAMES})
    add = made.add_argument
    add("--base", required=True, help="base model: folder or hub name")
    add(
        "--adapter",
        required=True,
        help="folder, hub name or owner/repository/folder; {task} and {seed} are filled in",
    )
    add("--kind", choices=run.KINDS, help=f"what trained it (default: {DEFAULTS.kind})")
    add(
        "--checkpoint",
        choices=run.CHECKPOINTS,
        help="published: the authors' files, of which the mean is taken",
    )
    add(
        "--task",
        dest="tasks",
        nargs="+",
        metavar="TASK",
        help=f"default: {' '.join(tasks.TRAINED)}",
    )
    add(
        "--ood",
        nargs="*",
        metavar="TASK",
        help=f"evaluate {tasks.OOD_FROM}'s adapter on these too; without a name: "
        f"{' '.join(tasks.OOD)}",
    )
    add("--seeds", nargs="+", type=int)
    add("--data", type=Path, help="folder of the tasks' files; default: from the hub")
    add(
        "--split",
        choices=("validation", "test"),
        help="evaluated rows; validation, as the scripts, by default",
    )
    add(
        "--prompts",
        dest="form",
        choices=FORMS,
        help="script: as published adapters were trained; plain: without the scripts' slips",
    )
    add(
        "--anchors",
        choices=tasks.ANCHORS,
        help="train: training rows, as the paper; held-out: taken out of the evaluated rows",
    )
    add("--anchor-rows", type=int)
    add("--objective", help="max_variance, min_nll or gvi; T stays 1")
    add("--tolerance", type=float)
    add("--compat", choices=("reference",), help="reference: search as the authors' scripts do")
    add("--draws", type=int, help="posterior draws of the evaluation")
    add("--batch-size", type=int)
    add("--limit", type=int, help="first rows of each evaluated split: to try it out, no result")
    add("--json", type=Path, help="also write this run's rows to a new file")
    add("--record", action="store_true", help="append the rows to benchmarks/results/paper.jsonl")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the arguments say and print its tables; a mistake ends in one line and status 1."""
    options = parser().parse_args(arguments)
    if options.ood == []:
        options.ood = tasks.OOD
    for name in ("tasks", "ood", "seeds"):
        setattr(options, name, tuple(dict.fromkeys(getattr(options, name))))
    setting = run.Setting(**{name: getattr(options, name) for name in NAMES})
    results = results_folder() if options.record else None
    bench = Bench(results=results, toy=options.limit is not None)
    found = []
    try:
        if options.json is not None and options.json.exists():
            raise ValueError(f"--json {options.json} exists already; choose another name")
        for row in run.run(setting, bench):
            found.append(row)
            print(tables.line(row), flush=True)
        if options.json is not None:
            write_json(options.json, found)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        raise SystemExit(f"error: {error}") from error
    print("\n" + tables.results(found))


if __name__ == "__main__":
    main()
