"""All methods on the same rows: ``python -m benchmarks.calibration``.

Trained adapters come from ``python -m benchmarks.calibration.train``. For the tasks whose adapter
is given, seeds choose anchors, test rows and noise; for the others the adapter as well. A (task,
seed) is written as soon as all of its methods are done; --record appends to
benchmarks/results/calibration.jsonl and skips what is there from the same sources and adapters.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import tfb
from benchmarks.calibration.evaluation import differences, figures
from benchmarks.calibration.methods import METHODS, LeftOut, Methods, Outcome
from benchmarks.calibration.setting import Setting
from benchmarks.calibration.tasks import GIVEN, TASKS, load_task
from benchmarks.calibration.train import ADAPTERS, SEEDS, adapter
from benchmarks.environment import REPOSITORY, environment, shared_folder
from benchmarks.timing import Bench, Row, record
from tfb.adapters.artifact import file_sha256
from tfb.adapters.loading import WEIGHTS

RESULTS = REPOSITORY / "benchmarks/results"
SUITE = "calibration"
CLINC = ("clinc-domain", "clinc150", "clinc150-early", "clinc-fewshot", "banking")
ROWS, SHIFT_ROWS = dict.fromkeys(CLINC, 1000), dict.fromkeys(CLINC, 500)
DEFAULT_ROWS, DEFAULT_SHIFT_ROWS, DEFAULT_ANCHORS = 600, 300, 300
REFERENCES = ("mle", "temperature")  # what every method is compared with
# What decides a row's figures; tables and pictures do not.
SOURCES = (
    "tfb",
    "tfb_kernels",
    *(
        f"benchmarks/calibration/{name}.py"
        for name in (
            "__main__",
            "evaluation",
            "families",
            "laplace",
            "methods",
            "questions",
            "reference_rule",
            "setting",
            "stems",
            "tasks",
        )
    ),
)


Hashes = Mapping[str, Mapping[str, str]]
"""By method, of the adapters that its row depends on (:func:`adapter_hashes`)."""


def run(setting: Setting, adapters: Hashes, point: Row, bench: Bench) -> list[Row]:
    """Make one row a method; none is written before all are there.

    Args:
        setting: what the methods share.
        adapters: the methods, and what they use.
        point: the configuration, without the method.
        bench: where rows go.
    """
    methods = Methods(setting)
    outcomes: dict[str, Outcome | str] = {}
    for name in dict.fromkeys((*REFERENCES, *adapters)):
        try:
            outcomes[name] = methods.run(name)
        except (LeftOut, tfb.SearchError) as error:
            outcomes[name] = str(error)
        print(f"{point['task']} {point['seed']} {name}: {_line(outcomes[name])}", flush=True)
    rows = [
        describe(outcomes, name, setting) | {"adapters": dict(hashes)}
        for name, hashes in adapters.items()
    ]
    return [
        record(
            bench,
            {
                "suite": SUITE,
                "measure": "calibration",
                "point": {**point, "method": name},
                "device": bench.device.type,
                "toy": bench.toy,
                **row,
            },
        )
        for name, row in zip(adapters, rows, strict=True)
    ]


def describe(outcomes: dict[str, Outcome | str], name: str, setting: Setting) -> Row:
    """Return figures, cost, details, and differences to the references."""
    outcome = outcomes[name]
    if isinstance(outcome, str):
        return {"left_out": outcome}
    against = {}
    for reference in REFERENCES:
        other = outcomes[reference]
        if reference != name and isinstance(other, Outcome):
            against[reference] = differences(
                outcome.predicted["test"].probs, other.predicted["test"].probs, setting.labels
            )
    return {
        **figures(outcome.predicted, setting.labels),
        "passes": outcome.passes,
        "fitting": outcome.fitting,
        "trained": outcome.trained,
        "details": dict(outcome.details),
        "against": against,
        "sizes": {
            "train": len(setting.train),
            "anchors": len(setting.anchors),
            **{found: len(rows) for found, rows in setting.judged.items()},
        },
    }


def sizes(task: str, options: argparse.Namespace) -> dict[str, int]:
    """Return rows, anchors and shift_rows of a task."""
    return {
        "rows": options.rows or ROWS.get(task, DEFAULT_ROWS),
        "anchors": options.anchors or DEFAULT_ANCHORS,
        "shift_rows": options.shift_rows or SHIFT_ROWS.get(task, DEFAULT_SHIFT_ROWS),
    }


def adapter_hashes(method: str, adapters: Callable[[int], Path], mle_seed: int) -> dict[str, str]:
    """Return the SHA-256 of every adapter that a method's row depends on, by seed.

    Args:
        method: its name.
        adapters: as of a :class:`Setting`.
        mle_seed: as of a :class:`Setting`.

    Raises:
        FileNotFoundError: one is not trained yet.
    """
    used = {mle_seed}  # the reference of all
    if method == "ensemble":
        used |= set(Setting.members)
    return {str(n): file_sha256(adapters(n) / WEIGHTS) for n in sorted(used)}


def finished(point: Row, adapters: Hashes, results: Path) -> bool:
    """Whether rows of all methods are there, made by the same sources and adapters as now."""
    path = results / f"{SUITE}.jsonl"
    if not path.is_file():
        return False
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    own = [r for r in rows if all(r["point"].get(k) == v for k, v in point.items())]
    commits = {r["environment"]["commit"]["id"] for r in own if not _dirty(r)}
    same = {commit for commit in commits if commit and same_sources(commit)}
    there = [
        (r["point"]["method"], r.get("adapters"))
        for r in own
        if r["environment"]["commit"]["id"] in same
    ]
    return all((name, hashes) in there for name, hashes in adapters.items())


def _dirty(row: Row) -> bool:
    return bool(row["environment"]["commit"]["dirty"])


def same_sources(commit: str) -> bool:
    """Whether what decides the figures is now what it was at ``commit``."""
    command = ["git", "-C", str(REPOSITORY), "diff", "--quiet", commit, "--", *SOURCES]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _line(outcome: Outcome | str) -> str:
    if isinstance(outcome, str):
        return f"left out: {outcome}"
    shown = {k: v for k, v in outcome.details.items() if isinstance(v, float)}
    return " ".join([f"{outcome.passes:.2f} passes", *(f"{k}={v:.4g}" for k, v in shown.items())])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seed", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rows", type=int, help="test rows (default: by task)")
    parser.add_argument("--anchors", type=int, help=f"default {DEFAULT_ANCHORS}")
    parser.add_argument("--shift-rows", type=int, help="rows of each shift (default: by task)")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of all adapters")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--again", action="store_true", help="also what is recorded already")
    options = parser.parse_args(arguments)
    if any(m.startswith("laplace") for m in options.method) and not (
        importlib.util.find_spec("laplace")
    ):
        parser.error("last-layer Laplace needs laplace-torch: pip install 'tfb[calibration]'")
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(results=RESULTS if options.record else None)
    environment()  # of the sources that are loaded now; they may change while this runs
    shared = shared_folder()
    wanted = []
    for seed in options.seed:  # all tasks at one seed first
        for name in options.task:
            find = partial(adapter, options.adapters, name)
            own = 0 if name in GIVEN else seed
            # Of all tasks before the first runs: an adapter that is missing ends it here.
            hashes = {m: adapter_hashes(m, find, own) for m in options.method}
            wanted.append((name, seed, sizes(name, options), find, own, hashes))
    for name, seed, size, find, own, hashes in wanted:
        point = {"task": name, "seed": seed, **size}
        if not options.again and finished(point, hashes, RESULTS):
            print(f"{name} {seed}: recorded already", flush=True)
            continue
        task = load_task(name, shared, seed, **size)
        run(Setting(task, adapters=find, mle_seed=own), hashes, point, bench)


if __name__ == "__main__":
    main()
