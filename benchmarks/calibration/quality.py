"""What draws buy beside what they cost, on a real adapter.

    python -m benchmarks.calibration.quality --record

Sigma is searched for each mode on held-out rows (objective min_nll, T = 1), the figures are on
others, and the cost is timed in this run, in passes of the deterministic adapter. Errors are those
of averaged probabilities to 512 antithetic draws of the same predictive, averaged over replicates.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor
from transformers import AutoTokenizer

import tfb
from benchmarks.environment import results_folder, shared_folder
from benchmarks.fixtures import STORIES, stories_model
from benchmarks.timing import Bench, heading, record
from tfb.data.readers import read_rows
from tfb.draws import Draws
from tfb.evaluation.metrics import evaluate
from tfb.model import BayesianModel
from tfb.scoring.evaluate import encode, predict_rows

ROWS, ANCHORS, REFERENCE, REPLICATES = 250, 150, 512, 3
FAR = 1 << 20  # streams of the reference and of replicates do not meet
FEW = (2, 4, 10, 20)


@dataclass(frozen=True)
class Family:
    """A way to draw, at several numbers of draws."""

    mode: str = "full"
    tail: int | None = None
    layers: Any = None
    draws: Callable[..., Draws] = Draws.antithetic
    counts: tuple[int, ...] = FEW

    def model(self, shared: Path) -> BayesianModel:
        bayes = tfb.bayesianize(stories_model(shared), layers=self.layers, label_tokens="last")
        bayes.configure(mode=self.mode, tail=self.tail)
        return bayes


FAMILIES = {
    "full, iid": Family(draws=Draws.iid),
    "full, antithetic": Family(),
    "tail k=1": Family("tail", 1),
    "tail k=4": Family("tail", 4, counts=(4, 10)),
    "tail k=16": Family("tail", 16, counts=(4, 10)),
    "last block": Family(layers=tfb.last_layers(1)),
}


def measure(shared: Path, bench: Bench) -> None:
    """Record every family at every number of draws, and the deterministic adapter first."""
    tokenizer = AutoTokenizer.from_pretrained(str(shared / STORIES))
    # The file is sorted by label: take rows from all over it, anchors and rows in turn.
    rows = read_rows(shared / "data/clinc-domain/validation.jsonl")
    judged, held = rows[::12][:ROWS], rows[5::20][:ANCHORS]
    for name, family in FAMILIES.items():
        bayes = family.model(shared)
        anchors, encoded = (encode(bayes, part, tokenizer) for part in (held, judged))
        labels = torch.tensor(encoded.labels)
        fit = tfb.fit_sigma(bayes, anchors, objective="min_nll", temperature=False, draws=4)

        def predict(draws: Draws, bayes: Any = bayes, rows: Any = encoded) -> tuple[float, Tensor]:
            start = time.perf_counter()
            probs = predict_rows(bayes, rows, draws, batch_size=100).probs
            return time.perf_counter() - start, probs

        if name == next(iter(FAMILIES)):
            keep(bench, ("deterministic", "deterministic"), 0.0, labels, predict(Draws.mean())[1])
        exact = predict(Draws.antithetic(REFERENCE, fit.sigma, first_stream=FAR))[1]
        for S in family.counts:
            costs, found = [], []
            for i in range(REPLICATES):
                unit = predict(Draws.mean())[0]
                seconds, probs = predict(family.draws(S, fit.sigma, first_stream=FAR * (2 + i)))
                costs.append(seconds / unit)
                found.append(probs)
            error = mean(float((p - exact).square().mean()) for p in found)
            cost = median(costs)
            keep(bench, (name, f"{name}, S={S}"), fit.sigma, labels, found[0], cost, error)


def keep(
    bench: Bench,
    names: tuple[str, str],
    sigma: float,
    labels: Tensor,
    probs: Tensor,
    passes: float = 1.0,
    mse: float | None = None,
) -> None:
    """Print and record one line of the table; ``names``: the family's and the method's."""
    m = evaluate(probs, labels)
    family, method = names
    point = {
        "family": family,
        "method": method,
        "sigma": sigma,
        "rows": len(labels),
        "anchors": ANCHORS,
        "reference_draws": REFERENCE,
        "replicates": REPLICATES,
    }
    values = {
        "passes": passes,
        "nll": m.nll,
        "ece": m.ece,
        "brier": m.brier,
        "accuracy": m.accuracy,
        "mse": mse,
    }
    record(bench, heading(bench, "quality", "quality", point) | values)
    print(f"{method}: {passes:.2f} passes, NLL {m.nll:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    try:
        shared = shared_folder()
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    measure(shared, Bench(results=results_folder() if options.record else None))


if __name__ == "__main__":
    main()
