"""The ablations: what is shared between settings changes nothing, and what the tables say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.calibration import ablations
from benchmarks.calibration.ablation_tables import ablations_table, plot_ablations
from benchmarks.calibration.ablations import (
    DEFAULTS,
    Setting,
    Sizes,
    Study,
    load_study,
    measure,
    settings,
)
from benchmarks.timing import Bench
from tfb.draws import Draws
from tfb.evaluation.metrics import auroc, evaluate
from tfb.scoring.evaluate import predict_rows
from tfb.search.fit import SEARCH_DRAWS
from tfb.search.loss import METRICS
from tfb.search.result import PredictiveFit

SIZES = Sizes(rows=24, shift_rows=16, anchors=20, counts=(16,))


@pytest.fixture(scope="module")
def study(shared: Path) -> Study:
    return load_study("clinc-domain", Path("nowhere"), SIZES)


def test_settings_differ_and_vary_one_thing() -> None:
    """No point stands twice; a search differs from the paper's rule in what it is named for."""
    points = list(settings(SIZES, 2000, "CAUSAL_LM"))
    shown = [json.dumps([s.ablation, *map(str, s.search()), s.draws]) for s in points]
    assert len(set(shown)) == len(shown)
    assert DEFAULTS["tolerance"] == METRICS["nll"].tolerance
    searched = {s.options["draws"] for s in points if s.ablation == "search_draws"}
    assert searched > {DEFAULTS["draws"], SEARCH_DRAWS}  # the paper's rule, and the library's
    assert {s.value for s in points if s.ablation == "metric"} == set(METRICS)
    for s in points:
        changed = {k for k, v in s.options.items() if v != DEFAULTS.get(k)}
        assert (
            changed
            <= {
                "family": {"objective"},
                "metric": {"metric", "tolerance"},
                "objective": {"objective", "metric", "kl_weight", "temperature"},
                "tolerance": {"tolerance"},
                "draws": set(),
                "search_draws": {"draws", "objective"},
                "anchors": {"objective"},
                "tail": {"objective"},
            }[s.ablation]
        )


def test_samples_of_anchors_share_no_row(study: Study) -> None:
    samples = [set(study.anchors(Setting("anchors", 16, 16, subset=i)).ids) for i in range(3)]
    assert len(set().union(*samples)) == 48


def test_figures(study: Study) -> None:
    """sigma = 0 is the deterministic adapter for any number of draws; few draws are the first of
    many; a sigma within 5 % of another is the same prediction."""
    zero = study.figures("low_rank", 0.0, 2)
    assert zero["auroc_epistemic"] is None
    assert study.figures("full_rank", 0.0, 2)["nll"] == pytest.approx(zero["nll"], rel=1e-5)
    two = study.figures("low_rank", 0.02, 2)
    four = study.figures("low_rank", 0.02, 4)
    assert len(study.predicted["low_rank", None, two["sigma_tested"] or 0.0]["test"]) == 4
    again = study.figures("low_rank", 0.0201, 2)
    assert again == pytest.approx(two, rel=1e-5) and four["nll"] != two["nll"]
    assert abs((two["sigma_tested"] or 0.0) / 0.02 - 1) <= 0.05


@pytest.mark.parametrize("sigma", [0.0, 0.02])
def test_figures_at_a_temperature(study: Study, sigma: float) -> None:
    """Those of a model that is configured with T, though draws are kept at T = 1; what the model
    was configured with before does not matter."""
    T, bayes = 1.7, study.model("low_rank")
    study.predicted.clear()
    bayes.configure(temperature=3.0)
    found = study.figures("low_rank", sigma, 4, temperature=T)
    plain = study.figures("low_rank", sigma, 4)
    bayes.configure(temperature=T)
    draws = Draws.antithetic(4, found["sigma_tested"] or 0.0, seed=bayes.config.seed)
    test, oos = (predict_rows(bayes, study.encoded[name], draws) for name in ("test", "oos"))
    labels = torch.tensor(study.encoded["test"].labels)
    wanted = evaluate(test.probs, labels)
    # Probabilities are float32: they may exchange two ranks that are next to each other.
    pair = 1 / (len(labels) * len(study.encoded["oos"]))
    for name in ("accuracy", "nll", "ece", "brier"):
        assert found[name] == pytest.approx(getattr(wanted, name), rel=1e-5)
    assert found["auroc_total"] == pytest.approx(auroc(oos.total, test.total), abs=pair)
    if sigma > 0:
        wanted_epistemic = auroc(oos.epistemic, test.epistemic)
        assert found["auroc_epistemic"] == pytest.approx(wanted_epistemic, abs=pair)
    assert found["nll"] != pytest.approx(plain["nll"], rel=1e-3)
    bayes.configure(temperature=1.0)
    nll = evaluate(predict_rows(bayes, study.encoded["test"], draws).probs, labels).nll
    assert plain["nll"] == pytest.approx(nll, rel=1e-5)


def test_noise_at_all_positions_is_full_mode(study: Study) -> None:
    """A tail as long as the longest prompt is full mode, with fewer positions it is another
    prediction; full mode afterwards is what it was before."""
    full = study.figures("low_rank", 0.02, 2)
    study.predicted.clear()
    long = study.figures("low_rank", 0.02, 2, tail=max(map(len, study.encoded["test"].input_ids)))
    short = study.figures("low_rank", 0.02, 2, tail=1)
    assert long == pytest.approx(full, rel=1e-4) and short["nll"] != pytest.approx(full["nll"])
    assert study.figures("low_rank", 0.02, 2) == pytest.approx(full, rel=1e-5)


def test_rows_and_tables(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every point has a row with its sigma, T, cost and figures, or with why there is no answer."""
    points = [
        Setting("family", "constant", 16, family="constant", options={"objective": "max_variance"}),
        *(Setting("anchors", 16, 16, subset=i, options={"objective": "min_nll"}) for i in range(3)),
        Setting("objective", "min_nll", 16, options={"objective": "min_nll"}),
        Setting("tolerance", 0.3, 16, options={"tolerance": 0.3}),
        Setting("tolerance", 0.3, 16, "train", options={"tolerance": 0.3}),
        Setting("tolerance", 1e9, 16, options={"tolerance": 1e9}),
        Setting("tail", 2, 16, tail=2, options={"objective": "min_nll"}),
    ]
    monkeypatch.setattr(ablations, "settings", lambda sizes, training_rows, task: iter(points))
    found = study.fit(points[1])
    assert isinstance(found, PredictiveFit)
    # With so few anchors an answer may well be to keep the adapter.
    monkeypatch.setitem(study.fits, points[1].search(), replace(found, sigma=0.02, temperature=1.7))
    bench = Bench(toy=True, results=tmp_path)
    measure(study, bench)
    rows = [json.loads(x) for x in (tmp_path / "ablations.jsonl").read_text().splitlines()]
    assert len(rows) == len(points) + 1
    failed = [r for r in rows if r["sigma"] is None]
    assert [r["point"]["value"] for r in failed] == [1e9] and "unbracketed" in failed[0]["error"]
    for row in rows:
        assert row["environment"]["commit"] and row["point"]["task"] == "clinc-domain"
        if row["sigma"] is not None:
            assert 0 <= row["accuracy"] <= 1 and row["nll"] > 0
    tempered = next(r for r in rows if r["measure"] == "objective")
    figures = study.figures("low_rank", 0.02, 10, temperature=1.7)
    assert {k: tempered[k] for k in figures} == pytest.approx(figures, rel=1e-5)
    for row in rows:
        if row["point"].get("options", {}).get("objective") == "max_variance":
            assert row["temperature"] == 1.0
    text = ablations_table(rows)
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| clinc")]
    assert next(c for c in lines if c[1] == "min_nll, held-out anchors")[2:4] == ["0.02", "1.7"]
    samples = next(cells for cells in lines if cells[1] == "16, min_nll")
    assert samples[2].count("±") == 1
    assert next(c for c in lines if c[1] == "1e+11 %, held-out anchors")[2] == "no answer"
    tail = next(r for r in rows if r["measure"] == "tail")
    length = sum(map(len, study.encoded["test"].input_ids)) / 24
    assert tail["prediction_passes"] == pytest.approx(1 + 9 * 2 / length)
    assert any(c[1] == f"last 2 ({1 + 18 / length:.2f} passes a row)" for c in lines)
    plot_ablations(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_too_few_rows_are_refused(shared: Path) -> None:
    assert "Not run yet" in ablations_table([])
    with pytest.raises(ValueError, match="training rows are too few"):
        load_study("clinc-domain", Path("nowhere"), Sizes(10, 10, 600, (16,)))
