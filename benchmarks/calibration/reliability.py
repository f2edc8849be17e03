"""Confidence against accuracy, before and after: ``python -m benchmarks.calibration.reliability``.

Nothing is fitted: σ and T are those of the recorded rows of the default method, and the NLL has to
be theirs again. Appends the bins of each task and seed to benchmarks/results/reliability.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from benchmarks.calibration.setting import Setting, sampled
from benchmarks.calibration.tables import JOINT
from benchmarks.calibration.tasks import GIVEN, TASKS, load_task
from benchmarks.calibration.train import ADAPTERS, adapter
from benchmarks.environment import RESULTS, shared_folder
from benchmarks.markdown import Row
from benchmarks.timing import Bench, heading, record
from tfb.evaluation.metrics import evaluate, reliability

BINS = 10
SAME_NLL = 1e-4  # relative: between machines and versions of torch rounding differs


def measure(bench: Bench, recorded: Row, setting: Setting) -> None:
    """Record the bins of the adapter and of σ and T of a recorded row."""
    bayes, rows = setting.model(), setting.judged["test"]
    own = {k: recorded["point"][k] for k in ("task", "seed", "rows")}
    found = {k: recorded["details"][k] for k in ("sigma", "temperature")}
    for method, config in (("mle", {"sigma": 0.0, "temperature": 1.0}), (JOINT, found)):
        bayes.configure(**config)
        draws = bayes.distinct_draws(setting.draws)
        probs = sampled(bayes, rows, draws).probs
        nll = evaluate(probs, setting.labels).nll
        if method == JOINT and not math.isclose(nll, recorded["nll"], rel_tol=SAME_NLL):
            raise RuntimeError(f"{own}: NLL {nll:.6g}, in the recorded row {recorded['nll']:.6g}")
        bins = asdict(reliability(probs, setting.labels, BINS))
        record(
            bench,
            heading(bench, "reliability", "reliability", {**own, "method": method})
            | {name: value.tolist() for name, value in bins.items()}
            | {"nll": nll},
        )
        print(own, method, f"{nll:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration.reliability")
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of all adapters")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench, shared = Bench(results=RESULTS), shared_folder()
    newest: dict[tuple[str, int], Row] = {}
    for line in (RESULTS / "calibration.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["point"]["method"] == JOINT and row["point"]["task"] in options.task:
            newest[row["point"]["task"], row["point"]["seed"]] = row
    for (name, seed), row in newest.items():
        size = {k: row["point"][k] for k in ("rows", "anchors", "shift_rows")}
        task = load_task(name, shared, seed, **size)
        find = partial(adapter, options.adapters, name)
        measure(bench, row, Setting(task, adapters=find, mle_seed=0 if name in GIVEN else seed))


if __name__ == "__main__":
    main()
