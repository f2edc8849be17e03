"""What each choice of the search is worth: ``python -m benchmarks.calibration.ablations``.

One thing is varied at a time, from the paper's rule (metric nll, objective max_variance, tolerance
0.3 %, 4 draws) on held-out anchors, with 10 draws in prediction:

    family       low_rank (TFB), constant, full_rank (families.py), two objectives
    metric       every metric of fit_sigma, max_variance
    objective    max_variance, min_nll with and without T, gvi; held-out and training anchors
    tolerance    0.1 % to 30 %, held-out and training anchors
    draws        of the prediction, at the sigma of that rule
    search_draws of the search, two objectives
    anchors      50 to 1,000, three disjoint samples of each size, two objectives
    tail         positions that get noise, min_nll; causal language models alone

The two objectives are max_variance, at T = 1, and min_nll, which fits T too. A row is one sigma and
T, sigma's interval, what the search cost, and the figures on test and out-of-scope rows. Those are
predicted once for each family and power of 1.1 next to sigma, which is at most 5 % off; T then
divides each draw's log-probabilities, as if its logits.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor

import tfb
from benchmarks.calibration.families import FAMILIES, with_family
from benchmarks.calibration.tasks import LABEL_TOKENS, Task, load_task
from benchmarks.calibration.train import ADAPTERS, adapter
from benchmarks.environment import shared_folder
from benchmarks.timing import Bench, Row, record
from tfb.adapters.loading import load_tokenizer
from tfb.data.batching import EncodedRows
from tfb.draws import Draws
from tfb.evaluation.metrics import apply_temperature, auroc, evaluate
from tfb.model import BayesianModel
from tfb.scoring.evaluate import encode, predict_rows
from tfb.search.loss import METRICS, passes_per_row
from tfb.search.result import PredictiveFit, SearchError

RESULTS = Path(__file__).resolve().parents[1] / "results"
TOLERANCES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
DRAWS = (2, 4, 10, 20, 40)
SEARCH_DRAWS = (4, 8, 16)
TAILS = (1, 2, 4, 8)
OBJECTIVES = ("max_variance", "min_nll")
DEFAULTS: dict[str, Any] = {
    "metric": "nll",
    "objective": "max_variance",
    "tolerance": 0.003,
    "draws": 4,
}
SUBSETS = 3
BATCH = 50
STEP = 1.1  # between sigmas that are predicted with


@dataclass(frozen=True)
class Sizes:
    """Rows of each kind, and the numbers of anchors compared."""

    rows: int
    shift_rows: int
    anchors: int
    counts: tuple[int, ...]


SIZES = {
    "clinc-domain": Sizes(600, 300, 500, (50, 100, 200, 500, 1000)),
    "clinc-fewshot": Sizes(300, 150, 150, (50, 100, 200)),
}


@dataclass(frozen=True)
class Setting:
    """One search and one prediction.

    Attributes:
        ablation: which table the row belongs to.
        value: what the ablation varies.
        count: anchors.
        source: "held_out" or "train" anchors.
        subset: which of the disjoint samples of anchors.
        family: of the posterior.
        draws: of the prediction.
        tail: positions with noise, None: all.
        options: of ``fit_sigma``.
    """

    ablation: str
    value: str | int | float
    count: int
    source: str = "held_out"
    subset: int = 0
    family: str = "low_rank"
    draws: int = 10
    tail: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def search(self) -> tuple[Any, ...]:
        """Return what the answer of the search depends on."""
        options = DEFAULTS | self.options
        return (
            self.family,
            self.tail,
            self.source,
            self.count,
            self.subset,
            *sorted(options.items()),
        )


def settings(sizes: Sizes, training_rows: int, task_type: str) -> Iterator[Setting]:
    """Yield all points of the study."""
    n = sizes.anchors
    for family, objective in product(FAMILIES, OBJECTIVES):
        yield Setting("family", family, n, family=family, options={"objective": objective})
    for metric in METRICS:
        options = {"metric": metric, "tolerance": METRICS[metric].tolerance}
        yield Setting("metric", metric, n, options=options)
    yield from _by_source(n, "held_out", n)
    yield from _by_source(n, "train", training_rows)
    for draws in DRAWS:
        yield Setting("draws", draws, n, draws=draws)
    for draws, objective in product(SEARCH_DRAWS, OBJECTIVES):
        options = {"objective": objective, "draws": draws}
        yield Setting("search_draws", draws, n, options=options)
    for count, subset, objective in product(sizes.counts, range(SUBSETS), OBJECTIVES):
        yield Setting("anchors", count, count, subset=subset, options={"objective": objective})
    for tail in TAILS if task_type == "CAUSAL_LM" else ():
        yield Setting("tail", tail, n, tail=tail, options={"objective": "min_nll"})


def _by_source(n: int, source: str, likelihood_rows: int) -> Iterator[Setting]:
    """Yield what is compared on held-out and on training anchors."""
    for objective in OBJECTIVES:
        yield Setting("objective", objective, n, source, options={"objective": objective})
    options: dict[str, Any] = {"objective": "min_nll", "temperature": False}
    yield Setting("objective", "min_nll at T = 1", n, source, options=options)
    # Ordinary variational inference: lambda is one over the rows of the likelihood.
    options = {"objective": "gvi", "metric": "expected_nll", "kl_weight": 1 / likelihood_rows}
    yield Setting("objective", "gvi", n, source, options=options)
    for tolerance in TOLERANCES:
        yield Setting("tolerance", tolerance, n, source, options={"tolerance": tolerance})


@dataclass
class Study:
    """One task: models by family, rows, and what was already searched or predicted."""

    task: Task
    folder: Path
    sizes: Sizes
    models: dict[str, BayesianModel] = field(default_factory=dict)
    fits: dict[tuple[Any, ...], PredictiveFit | str] = field(default_factory=dict)
    predicted: dict[tuple[str, int | None, float], dict[str, Tensor]] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(str(self.task.base))

    def model(self, family: str) -> BayesianModel:
        if family not in self.models:
            base = tfb.load_base(self.task.base, self.folder)
            model = tfb.load_adapter(base, self.folder)
            bayes = tfb.bayesianize(model, label_tokens=LABEL_TOKENS)
            self.models[family] = with_family(bayes, family)
        return self.models[family]

    @cached_property
    def encoded(self) -> dict[str, EncodedRows]:
        rows = {
            "held_out": self.task.anchors,
            "train": self.task.train_anchors,
            "test": self.task.test,
            "oos": self.task.shifts["oos"],
        }
        return {k: encode(self.model("low_rank"), v, self.tokenizer) for k, v in rows.items()}

    def anchors(self, setting: Setting) -> EncodedRows:
        """Return the first rows of a subset; subsets are disjoint, as far as the rows go."""
        rows = self.encoded[setting.source]
        start = min(setting.subset * max(self.sizes.counts), len(rows) - setting.count)
        return rows.subset(range(start, start + setting.count))

    def fit(self, setting: Setting) -> PredictiveFit | str:
        """Return the search's answer, or why it has none."""
        key = setting.search()
        if key not in self.fits:
            bayes = self.model(setting.family)
            try:
                options = DEFAULTS | setting.options
                self.fits[key] = tfb.fit_sigma(
                    bayes, self.anchors(setting), **_mode(setting.tail), **options
                )
            except SearchError as error:
                self.fits[key] = str(error)
        return self.fits[key]

    def figures(
        self,
        family: str,
        sigma: float,
        draws: int,
        tail: int | None = None,
        temperature: float = 1.0,
    ) -> dict[str, float | None]:
        """Judge test rows, and how well uncertainty tells out-of-scope rows from them.

        Sigma = 0 has no epistemic uncertainty, so no AUROC of it. Draws are kept at T = 1, for any
        other T.
        """
        rounded = STEP ** round(math.log(sigma, STEP)) if sigma > 0 else 0.0
        found = self.predicted.get((family, tail, rounded), {})
        if not found or len(found["test"]) < draws:
            self.model(family).configure(temperature=1.0, **_mode(tail))
            found = {name: self._draws(family, rounded, draws, name) for name in ("test", "oos")}
            self.predicted[family, tail, rounded] = found
        probs, total, epistemic = _summary(found["test"][:draws], temperature)
        _, oos_total, oos_epistemic = _summary(found["oos"][:draws], temperature)
        m = evaluate(probs, torch.tensor(self.encoded["test"].labels))
        return {
            "sigma_tested": rounded,
            "accuracy": m.accuracy,
            "nll": m.nll,
            "ece": m.ece,
            "brier": m.brier,
            "auroc_total": auroc(oos_total, total),
            "auroc_epistemic": auroc(oos_epistemic, epistemic) if sigma > 0 else None,
        }

    def _draws(self, family: str, sigma: float, draws: int, rows: str) -> Tensor:
        """Each draw's probabilities [S, N, K]; the first of many draws are those of few."""
        bayes = self.model(family)
        found = predict_rows(
            bayes,
            self.encoded[rows],
            Draws.antithetic(draws, sigma, seed=bayes.config.seed),
            batch_size=BATCH,
            keep_draws=True,
        )
        assert found.draw_probs is not None
        return found.draw_probs


def _mode(tail: int | None) -> dict[str, Any]:
    """How draws reach the model: arguments of ``fit_sigma`` and ``configure``."""
    return {"mode": "full" if tail is None else "tail", "tail": tail}


def _summary(p: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [N, K], its entropy [N], and mutual information [N] of p [S, N, K] brought to T."""
    p = p.double()
    if temperature != 1.0:  # a draw's log-probabilities are its logits up to a constant
        p = apply_temperature(p.log(), temperature)
    probs = p.mean(0)
    total = torch.special.entr(probs).sum(-1)
    return probs, total, (total - torch.special.entr(p).sum(-1).mean(0)).clamp_min(0.0)


def measure(study: Study, bench: Bench) -> None:
    """All rows of one task, the deterministic adapter's first."""
    task, sizes = study.task, study.sizes
    common = {
        "task": task.name,
        "seed": task.seed,
        "rows": len(task.test),
        "shift_rows": len(task.shifts["oos"]),
    }
    point = common | {"value": "deterministic"}
    values: dict[str, Any] = {"sigma": 0.0, "temperature": 1.0}
    _record(bench, "deterministic", point, values | study.figures("low_rank", 0.0, 2))
    for s in settings(sizes, len(task.train), task.task_type):
        point = common | {
            "value": s.value,
            "anchors": s.count,
            "source": s.source,
            "subset": s.subset,
            "family": s.family,
            "draws": s.draws,
            "tail": s.tail,
            "options": s.options,
        }
        fit = study.fit(s)
        if isinstance(fit, str):
            values = {"sigma": None, "error": fit}
        else:
            values = {
                "sigma": fit.sigma,
                "temperature": fit.temperature,
                "interval": fit.interval,
                "passes": fit.passes,
                "notes": len(fit.notes),
            }
            values |= study.figures(s.family, fit.sigma, s.draws, s.tail, fit.temperature)
            if s.tail is not None:
                lengths = [len(ids) for ids in study.encoded["test"].input_ids]
                values["prediction_passes"] = passes_per_row(lengths, s.draws, s.tail)
        _record(bench, s.ablation, point, values)


def _record(bench: Bench, ablation: str, point: Row, values: Row) -> None:
    head = {
        "suite": "ablations",
        "measure": ablation,
        "point": point,
        "device": "cpu",
        "toy": bench.toy,
    }
    record(bench, head | values)
    shown = {k: round(v, 4) for k, v in values.items() if isinstance(v, float)}
    print(point["task"], ablation, point["value"], shown, flush=True)


def load_study(name: str, root: Path, sizes: Sizes) -> Study:
    """Load the task at seed 0 with as many anchors as all subsets take.

    Raises:
        ValueError: the task has fewer anchors or training rows than that.
    """
    wanted = max(SUBSETS * max(sizes.counts), sizes.anchors)
    task = load_task(
        name, shared_folder(), 0, rows=sizes.rows, anchors=wanted, shift_rows=sizes.shift_rows
    )
    for what, rows, least in (
        ("anchors", task.anchors, wanted - 4),
        ("training rows", task.train_anchors, sizes.anchors),
    ):
        if len(rows) < least:
            raise ValueError(f"{name}: {len(rows)} {what} are too few for {sizes}")
    return Study(task, adapter(root, name, 0), sizes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of all adapters")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--record", action="store_true", help="append rows to benchmarks/results")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(results=RESULTS if options.record else None)
    studies = [load_study(name, options.adapters, SIZES[name]) for name in options.task]
    for study in studies:
        measure(study, bench)


if __name__ == "__main__":
    main()
