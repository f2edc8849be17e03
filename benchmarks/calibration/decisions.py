"""Whether abstention and prediction sets keep their promise, on held-out rows.

    python -m benchmarks.calibration.decisions --record

Sigma and T are fitted on the anchors by default. The test rows are then split in two at random,
many times: one half calibrates, the other judges. Predictions are made once a seed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor

import tfb
from benchmarks.calibration.setting import Setting
from benchmarks.calibration.tasks import GIVEN, load_task
from benchmarks.calibration.train import ADAPTERS, SEEDS, adapter
from benchmarks.environment import environment, results_folder, shared_folder
from benchmarks.markdown import Row, blocks, table, taken_on
from benchmarks.timing import Bench, heading, record
from tfb.draws import Draws
from tfb.evaluation.decisions import Decisions
from tfb.scoring.evaluate import predict_rows

SUITE = "decisions"
# Those whose base model is quick, and the error that is asked for: less than that of all rows.
TASKS = {"clinc-domain": 0.1, "clinc150": 0.25, "clinc150-early": 0.25, "banking": 0.1}
COVERAGE, SPLITS, DRAWS = 0.9, 100, 10
SHARES = ("accuracy", "coverage", "coverage_sd", "accepted", "error", "above_target")
METHODS = {"adapter": "adapter as it is", "fitted": "σ and T fitted"}
NO_ROWS = "*Not run yet: `python -m benchmarks.calibration.decisions --record` (ten minutes).*"


def measure(setting: Setting, point: Row, bench: Bench) -> None:
    """Record the adapter as it is and the fitted predictive on one (task, seed)."""
    bayes, rows, labels = setting.model(), setting.judged["test"], setting.labels
    bayes.configure(sigma=0.0, temperature=1.0)
    plain = predict_rows(bayes, rows, Draws.mean()).probs
    fit = tfb.fit_sigma(bayes, setting.anchors)
    fitted = predict_rows(bayes, rows, DRAWS).probs
    for method, probs in zip(METHODS, (plain, fitted), strict=True):
        generator = torch.Generator().manual_seed(setting.task.seed)
        values = summary([*outcomes(probs, labels, point["target_error"], generator)])
        values |= {"accuracy": float((probs.argmax(-1) == labels).double().mean())}
        if method == "fitted":
            values |= {"sigma": fit.sigma, "temperature": fit.temperature}
        where = {**point, "method": method, "rows": len(rows), "anchors": len(setting.anchors)}
        record(bench, heading(bench, SUITE, SUITE, where) | values)
        print(where["task"], where["seed"], method, values, flush=True)


def outcomes(
    probs: Tensor, labels: Tensor, target_error: float, generator: torch.Generator
) -> Iterator[dict[str, float]]:
    """Yield what the judging half shows, split by split.

    Args:
        probs: [N, K].
        labels: [N].
        target_error: of abstention.
        generator: of the splits.
    """
    half = len(labels) // 2
    for _ in range(SPLITS):
        order = torch.randperm(len(labels), generator=generator)
        own, others = order[:half], order[half:]
        made = Decisions.calibrated(
            probs[own], labels[own], target_error=target_error, coverage=COVERAGE, draws=DRAWS
        )
        decided = made.apply(probs[others])
        abstain, sets = torch.tensor(decided["abstain"]), decided["prediction_set"]
        right = labels[others].tolist()
        wrong = (probs[others].argmax(-1) != labels[others])[~abstain]
        yield {
            "coverage": mean(float(y in s) for y, s in zip(right, sets, strict=True)),
            "size": mean(float(len(s)) for s in sets),
            "accepted": len(wrong) / len(right),
            "error": (error := float(wrong.double().mean()) if len(wrong) else 0.0),
            "above_target": float(error > target_error),
        }


def summary(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return means over splits, and the standard deviation of the coverage."""
    values = {name: mean(f[name] for f in found) for name in found[0]}
    return values | {"coverage_sd": stdev(f["coverage"] for f in found)}


def decisions_table(rows: Sequence[Row]) -> str:
    """Return one line for each task and method, means over seeds."""
    if not rows:
        return NO_ROWS
    body = []
    for task in dict.fromkeys(r["point"]["task"] for r in rows):
        for method, title in METHODS.items():
            own = [r for r in rows if (r["point"]["task"], r["point"]["method"]) == (task, method)]
            percent = {name: f"{100 * mean(r[name] for r in own):.1f}" for name in SHARES}
            body.append(
                [
                    task,
                    title,
                    percent["accuracy"],
                    f"{percent['coverage']} ± {percent['coverage_sd']}",
                    f"{mean(r['size'] for r in own):.2f}",
                    f"{100 * own[0]['point']['target_error']:g}",
                    *(percent[name] for name in ("accepted", "error", "above_target")),
                ]
            )
    sets = ("task", "predictive", "accuracy %", f"coverage of {100 * COVERAGE:g} % sets", "classes")
    answers = ("target error %", "accepted %", "error of these %", "halves above the target %")
    return blocks(table((*sets, *answers), body), taken_on(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of all adapters")
    options = parser.parse_args()
    environment()  # of the sources that are loaded now; they may change while this runs
    bench = Bench(results=results_folder() if options.record else None)
    shared = shared_folder()
    for seed in SEEDS:
        for name, target in TASKS.items():
            setting = Setting(
                load_task(name, shared, seed),
                adapters=partial(adapter, options.adapters, name),
                mle_seed=0 if name in GIVEN else seed,
                draws=DRAWS,
            )
            point = {"task": name, "seed": seed, "draws": DRAWS, "splits": SPLITS}
            measure(setting, point | {"target_error": target, "coverage": COVERAGE}, bench)


if __name__ == "__main__":
    main()
