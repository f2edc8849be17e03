"""The ablations: what is shared between settings changes nothing, and what the tables say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
from tfb.search.fit import SEARCH_DRAWS, TOLERANCE

SIZES = Sizes(rows=24, shift_rows=16, anchors=20, counts=(16,))


@pytest.fixture(scope="module")
def study(shared: Path) -> Study:
    return load_study("clinc-domain", Path("nowhere"), SIZES)


def test_settings_differ_and_vary_one_thing() -> None:
    """No point stands twice; a search differs from the paper's rule in what it is named for."""
    points = list(settings(SIZES, 2000, "CAUSAL_LM"))
    shown = [json.dumps([s.ablation, *map(str, s.search()), s.draws]) for s in points]
    assert len(set(shown)) == len(shown)
    assert DEFAULTS["tolerance"] == TOLERANCE and DEFAULTS["draws"] == SEARCH_DRAWS
    for s in points:
        changed = {k for k, v in s.options.items() if v != DEFAULTS.get(k)}
        assert (
            changed
            <= {
                "family": {"objective"},
                "metric": {"metric", "tolerance"},
                "objective": {"objective", "metric", "kl_weight"},
                "tolerance": {"tolerance"},
                "draws": set(),
                "search_draws": {"draws"},
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
    """Every point has a row with its sigma, cost and figures, or with why there is no answer."""
    points = [
        Setting("family", "constant", 16, family="constant", options={"objective": "max_variance"}),
        *(Setting("anchors", 16, 16, subset=i, options={"objective": "min_nll"}) for i in range(3)),
        Setting("tolerance", 0.3, 16, options={"tolerance": 0.3}),
        Setting("tolerance", 0.3, 16, "train", options={"tolerance": 0.3}),
        Setting("tolerance", 1e9, 16, options={"tolerance": 1e9}),
        Setting("tail", 2, 16, tail=2, options={"objective": "min_nll"}),
    ]
    monkeypatch.setattr(ablations, "settings", lambda sizes, training_rows, task: iter(points))
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
    text = ablations_table(rows)
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| clinc")]
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
