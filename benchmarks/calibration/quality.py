"""What draws buy beside what they cost, on a real adapter: ``python -m benchmarks.quality``.

stories260K with the clinc-domain adapter. sigma is searched for each mode on 150 held-out rows
(objective min_nll), the figures are on 250 others: NLL, ECE, accuracy, the mean squared error of
averaged probabilities against 512 antithetic draws of the same predictive (other streams), and the
cost, timed in this run, in passes of the deterministic adapter. Errors of few draws are averaged
over replicates on streams of their own.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor

import tfb
from benchmarks.environment import shared_folder
from benchmarks.timing import Bench, Row, record
from tfb.data.batching import EncodedRows
from tfb.data.readers import read_rows
from tfb.draws import Draws
from tfb.evaluation.metrics import evaluate
from tfb.scoring.evaluate import encode, predict_rows

FOLDER = Path(__file__).resolve().parent
ROWS, ANCHORS, REFERENCE, REPLICATES = 250, 150, 512, 3
FAR = 1 << 20  # streams of the reference and of replicates do not meet


def setting(shared: Path, layers: Any) -> tuple[Any, EncodedRows, EncodedRows]:
    """The Bayesian model, anchors, and rows to judge by."""
    from transformers import AutoTokenizer

    base, adapter = shared / "models/stories260K", shared / "adapters/stories260K-clinc-domain"
    bayes = tfb.bayesianize(tfb.load_adapter(tfb.load_base(base, adapter), adapter), layers=layers)
    bayes.label_tokens = "last"  # as the adapter was trained
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    # The file is sorted by label: take rows from all over it, anchors and rows in turn.
    rows = read_rows(shared / "data/clinc-domain/validation.jsonl")
    judged, held = rows[::12][:ROWS], rows[5::20][:ANCHORS]
    return bayes, encode(bayes, held, tokenizer), encode(bayes, judged, tokenizer)


def families() -> dict[str, tuple[Any, str, int | None, Callable[..., Draws], tuple[int, ...]]]:
    """name: (layers, mode, tail, constructor, numbers of draws)."""
    few = (2, 4, 10, 20)
    return {
        "full, iid": (None, "full", None, Draws.iid, few),
        "full, antithetic": (None, "full", None, Draws.antithetic, few),
        "tail k=1": (None, "tail", 1, Draws.antithetic, few),
        "tail k=4": (None, "tail", 4, Draws.antithetic, (4, 10)),
        "tail k=16": (None, "tail", 16, Draws.antithetic, (4, 10)),
        "last block": (tfb.last_layers(1), "full", None, Draws.antithetic, few),
    }


def measure(shared: Path, bench: Bench) -> list[Row]:
    """All rows of the table."""
    found: list[Row] = []
    sigmas: dict[tuple[Any, ...], tuple[float, Tensor]] = {}
    for family, (layers, mode, tail, make, counts) in families().items():
        bayes, anchors, rows = setting(shared, layers)
        labels = torch.tensor(rows.labels)
        bayes.configure(mode=mode, tail=tail)

        def predict(draws: Draws, bayes: Any = bayes, rows: Any = rows) -> Tensor:
            return predict_rows(bayes, rows, draws, batch_size=100).probs

        key = (str(layers), mode, tail)
        if key not in sigmas:
            sigma = tfb.fit_sigma(bayes, anchors, objective="min_nll", draws=4).sigma
            exact = predict(Draws.antithetic(REFERENCE, sigma, first_stream=FAR))
            sigmas[key] = sigma, exact
        sigma, exact = sigmas[key]
        if not found:
            mean = predict(Draws.mean())
            found.append(row("deterministic", "deterministic", 1.0, mean, labels, None, 0.0, bench))
        for S in counts:
            cost, errors, probs = [], [], None
            for i in range(REPLICATES):
                unit = clock(partial(predict, Draws.mean()))[0]
                draws = make(S, sigma, first_stream=FAR * (2 + i))
                taken, p = clock(partial(predict, draws))
                cost.append(taken / unit)
                errors.append(float((p - exact).square().mean()))
                probs = p if probs is None else probs
            assert probs is not None
            error = sum(errors) / len(errors)
            found.append(
                row(family, f"{family}, S={S}", median(cost), probs, labels, error, sigma, bench)
            )
            print(f"{family} S={S}: {median(cost):.2f} passes, MSE {error:.2e}", flush=True)
    return found


def clock(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def row(
    family: str,
    method: str,
    passes: float,
    probs: Tensor,
    labels: Tensor,
    mse: float | None,
    sigma: float,
    bench: Bench,
) -> Row:
    m = evaluate(probs, labels)
    point = {"family": family, "method": method, "sigma": sigma, "rows": len(labels),
             "anchors": ANCHORS, "reference_draws": REFERENCE,
             "replicates": REPLICATES}  # fmt: skip
    values = {"suite": "quality", "measure": "quality", "point": point, "device": "cpu",
              "toy": False, "passes": passes, "nll": m.nll, "ece": m.ece, "brier": m.brier,
              "accuracy": m.accuracy, "mse": mse}  # fmt: skip
    return record(bench, values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    try:
        shared = shared_folder()
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    bench = Bench.untimed(FOLDER / "results" if options.record else None)
    measure(shared, bench)


if __name__ == "__main__":
    main()
