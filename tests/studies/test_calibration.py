"""The comparison of methods: known answers of its figures, its methods' identities, its tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.calibration import __main__ as comparison
from benchmarks.calibration import setting as settings
from benchmarks.calibration import tables
from benchmarks.calibration.evaluation import differences, figures
from benchmarks.calibration.laplace import (
    PRECISIONS,
    SAMPLES,
    fit_laplace,
    sample_laplace,
    tune_laplace,
)
from benchmarks.calibration.methods import LeftOut, Methods, Outcome, prediction_passes
from benchmarks.calibration.setting import Predicted, Setting, features, head, labels_of, sampled
from benchmarks.calibration.tasks import load_task
from benchmarks.calibration.train import adapter
from tfb.draws import Draws
from tfb.evaluation.metrics import fit_temperature

FLOAT32 = 1e-5  # of probabilities: two orders of the same sums


# --- figures --------------------------------------------------------------------------------------


def test_figures_of_a_perfect_method() -> None:
    """Right and sure of it, and unsure out of scope: nothing to lose, everything found."""
    labels = torch.tensor([0, 1, 1])
    sure = torch.nn.functional.one_hot(labels, 2).double()
    found = figures(
        {"test": Predicted.of_probs(sure), "oos": Predicted.of_probs(torch.full((2, 2), 0.5))},
        labels,
    )
    assert (found["accuracy"], found["nll"], found["brier"], found["aurc"]) == (1, 0, 0, 0)
    assert found["auroc"] == {"errors": {"total": None}, "oos": {"total": 1.0}}


def test_epistemic_uncertainty_is_what_members_disagree_on() -> None:
    """Two opposed certain members: entropy and mutual information are both log 2."""
    p = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    found = Predicted.of_draws(p)
    assert found.epistemic is not None
    assert float(found.total[0]) == pytest.approx(math.log(2))
    assert float(found.epistemic[0]) == pytest.approx(math.log(2))


def test_differences_are_recorded_by_figure() -> None:
    """.9 against .5 on every label: log(.5 / .9) in every resample, equal accuracy."""
    labels = torch.arange(400) % 3
    high, low = torch.full((400, 3), 0.05), torch.full((400, 3), 0.25)
    high[torch.arange(400), labels], low[torch.arange(400), labels] = 0.9, 0.5
    found = differences(high, low, labels)
    for key in ("difference", "low", "high"):
        assert found["nll"][key] == pytest.approx(math.log(0.5 / 0.9), abs=FLOAT32)
        assert found["ece"][key] == pytest.approx(0.1 - 0.5, abs=FLOAT32)
        assert found["accuracy"][key] == 0
    assert found["nll"]["significant"] is True and found["accuracy"]["significant"] is False
    assert json.loads(json.dumps(found)) == found


# --- methods on the given adapters ----------------------------------------------------------------


@pytest.fixture(scope="module")
def make(shared: Path) -> Callable[[str], Setting]:
    def of(task: str) -> Setting:
        rows = load_task(task, shared, 0, rows=24, anchors=24, shift_rows=8)
        return Setting(rows, lambda seed: adapter(Path("none"), task, seed), 0, (0,))

    return of


@pytest.fixture(scope="module")
def causal(make: Callable[[str], Setting]) -> Setting:
    return make("clinc-domain")


@pytest.fixture(scope="module")
def classifier(make: Callable[[str], Setting]) -> Setting:
    return make("clinc150")


def test_identities_of_the_methods(causal: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ensemble of one, temperature 1, TFB at sigma 0 and dropout at rate 0 are the adapter."""
    methods = Methods(causal)
    mle = methods.run("mle").predicted["test"].probs
    one = methods.run("ensemble")
    assert torch.equal(one.predicted["test"].probs, mle) and (one.passes, one.trained) == (1, 0)
    monkeypatch.setattr("benchmarks.calibration.methods.fit_temperature", lambda *_: 1.0)
    tempered = methods.run("temperature").predicted["test"].probs
    torch.testing.assert_close(tempered, mle, rtol=0, atol=FLOAT32)
    still = sampled(causal.model(), causal.judged["test"], Draws.antithetic(4, 0.0))
    torch.testing.assert_close(still.probs, mle, rtol=0, atol=FLOAT32)
    assert still.epistemic is not None and float(still.epistemic.max()) < FLOAT32
    monkeypatch.setattr(settings, "GIVEN_DROPOUT", 0.0)
    dropped = methods.run("mc_dropout").predicted["test"]
    torch.testing.assert_close(dropped.probs, mle, rtol=0, atol=FLOAT32)


def test_one_search_three_methods(causal: Setting) -> None:
    """What a method of TFB predicts is what the library predicts at the sigma and T that it found,
    and the shared model has its defaults again."""
    methods = Methods(causal)
    found = {name: methods.run(name) for name in ("tfb", "tfb_min_nll", "tfb_joint", "tfb_tail")}
    bayes, rows = causal.model(), causal.judged["test"]
    before = bayes.config
    assert (before.mode, before.temperature) == ("full", 1.0)
    assert found["tfb"].details["temperature"] == found["tfb_min_nll"].details["temperature"] == 1
    for name, outcome in found.items():
        d = outcome.details
        tail = 1 if name == "tfb_tail" else None
        bayes.configure(sigma=d["sigma"], temperature=d["temperature"], mode=d["mode"], tail=tail)
        draws = bayes.distinct_draws(causal.draws)
        assert torch.equal(outcome.predicted["test"].probs, sampled(bayes, rows, draws).probs)
        assert outcome.passes == prediction_passes(bayes, rows, draws)
    bayes.configure(mode="full", temperature=1.0)


def test_a_temperature_on_averages_is_another_method(causal: Setting) -> None:
    """The same sigma; softmax(log mean p / T), with T of least NLL on the anchors' averages."""
    methods = Methods(causal)
    methods.setting.model().configure(mode="full", temperature=1.0)
    methods.__dict__["_joint"] = Outcome({}, 10.0, details={"sigma": 0.02, "temperature": 1.3})
    found, bayes = methods.run("tfb_averaged"), causal.model()
    draws = Draws.antithetic(causal.draws, 0.02, seed=causal.task.seed)
    anchors, test = (sampled(bayes, r, draws) for r in (causal.anchors, causal.judged["test"]))
    T = fit_temperature(anchors.log_probs, labels_of(causal.anchors))
    assert found.details == {"sigma": 0.02, "temperature": T}
    wanted = (test.log_probs / T).softmax(-1)
    torch.testing.assert_close(found.predicted["test"].probs, wanted, rtol=0, atol=FLOAT32)


def test_dropout_acts_and_leaves_no_trace(causal: Setting) -> None:
    """Passes differ; afterwards the model predicts as before and PEFT's modules are back."""
    bayes, rows = causal.model(), causal.judged["test"]
    before, kinds = sampled(bayes, rows, Draws.mean()), [type(m) for m in bayes.model.modules()]
    found = settings.dropped_out(bayes, rows, 3, seed=0)
    assert found.epistemic is not None and float(found.epistemic.mean()) > 1e-4
    assert torch.equal(sampled(bayes, rows, Draws.mean()).probs, before.probs)
    assert [type(m) for m in bayes.model.modules()] == kinds and not bayes.model.training
    again = settings.dropped_out(bayes, rows, 3, seed=0)
    assert torch.equal(again.probs, found.probs)


@pytest.mark.parametrize("task", ["causal", "classifier"])
def test_head_of_features_is_the_model(task: str, request: pytest.FixtureRequest) -> None:
    """What Laplace is given: the linear head on the features puts out the model's predictions."""
    setting = request.getfixturevalue(task)
    bayes, rows = setting.model(), setting.judged["test"]
    with torch.no_grad():
        found = head(bayes, rows)(features(bayes, rows)).softmax(-1)
    expected = sampled(bayes, rows, Draws.mean()).probs
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=FLOAT32)


def needs_laplace() -> None:
    """Skip where laplace-torch is not installed."""
    pytest.importorskip("opt_einsum")  # of laplace-torch, whose own import warns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.jit.script", lambda f: f)  # deprecated; an import still calls it
        pytest.importorskip("laplace")


def orthogonal_head(generator: torch.Generator, gain: float) -> torch.nn.Linear:
    """Three classes of four features, without a bias; all of it from ``generator``."""
    linear = torch.nn.Linear(4, 3)
    torch.nn.init.orthogonal_(linear.weight, gain=gain, generator=generator)
    torch.nn.init.zeros_(linear.bias)
    return linear


def confident() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Laplace of a confident head that is right on its 90 training rows, their features [90, 4] and
    labels [90]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 4, generator=generator)
    linear = orthogonal_head(generator, gain=3.0)
    labels = linear(x).argmax(-1)
    return fit_laplace(linear, x, labels), x, labels


def test_laplace_of_infinite_prior_precision_is_the_head() -> None:
    """The posterior shrinks to its mean, the trained head; a finite precision has spread."""
    needs_laplace()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)
    labels = torch.randint(0, 3, (60,), generator=generator)
    linear = orthogonal_head(generator, gain=0.5)
    fitted = fit_laplace(linear, x, labels)
    loose = sample_laplace(fitted, x, seed=0)
    assert loose.shape == (SAMPLES, 60, 3) and float(loose.std(0).mean()) > 1e-3
    fitted.prior_precision = 1e12  # standard deviations of 1e-6
    tight = sample_laplace(fitted, x, seed=0)
    expected = linear(x).softmax(-1).detach().expand_as(tight)
    torch.testing.assert_close(tight, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("right", [True, False])
def test_tuned_laplace_has_as_much_spread_as_held_out_rows_ask_for(right: bool) -> None:
    """A confident head that is always right: spread only raises the NLL, so the prior is tight.
    Always wrong: the more spread the better. Random numbers outside are left alone."""
    needs_laplace()
    fitted, x, predicted = confident()
    state = torch.random.get_rng_state()
    tune_laplace(fitted, x, predicted if right else (predicted + 1) % 3, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    precision = float(fitted.prior_precision)
    assert precision > 100 if right else precision < 1


def test_tuned_laplace_takes_the_precision_of_least_nll() -> None:
    """A confident head that is right on nine of ten held-out rows: the least lies inside the grid,
    and no precision of the grid has less, each seen on its own."""
    needs_laplace()
    fitted, x, labels = confident()
    labels = torch.where(torch.arange(90) % 10 == 0, (labels + 1) % 3, labels)
    tune_laplace(fitted, x, labels, seed=0)
    found = {}
    precision = float(fitted.prior_precision)
    for p in (*torch.logspace(*PRECISIONS).tolist(), precision):
        fitted.prior_precision = p
        mean = sample_laplace(fitted, x, seed=0).double().mean(0)
        found[p] = float(-mean.gather(1, labels[:, None]).log().mean())
    assert found[precision] == min(found.values()) and 0.01 < precision < 1e5


def test_passes_are_counted_in_tokens(causal: Setting) -> None:
    """Full: S. Tail k = 1: 1 + (S - 1) / mean length."""
    rows, draws = causal.judged["test"], Draws.antithetic(10, 0.01)
    bayes = causal.model()
    assert prediction_passes(bayes, rows, draws) == 10
    bayes.configure(mode="tail", tail=1)
    length = sum(map(len, rows.input_ids)) / len(rows)
    assert prediction_passes(bayes, rows, draws) == pytest.approx(1 + 9 / length)
    bayes.configure(mode="full")


def test_rows_without_labels_are_no_anchors(causal: Setting) -> None:
    with pytest.raises(ValueError, match="has no label"):
        labels_of(causal.judged["oos"])


def test_a_toy_comparison_end_to_end(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with all figures, differences to both references, and nothing twice."""
    monkeypatch.setattr(comparison, "RESULTS", tmp_path)
    monkeypatch.setattr(comparison, "same_sources", lambda commit: True)
    monkeypatch.setattr(comparison, "_dirty", lambda row: False)
    names = ["mle", "temperature", "tfb_min_nll", "tfb_tail", "tfb"]
    call = [
        "--task",
        "clinc-domain",
        "--seed",
        "0",
        "--rows",
        "20",
        "--anchors",
        "20",
        "--shift-rows",
        "10",
        "--record",
        "--method",
        *names,
    ]
    comparison.main(call)
    lines = (tmp_path / "calibration.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["point"]["method"] for r in rows] == names
    mle, scaled, full, tail, both = rows
    assert set(mle["against"]) == {"temperature"} and set(full["against"]) == set(
        comparison.REFERENCES
    )
    assert scaled["accuracy"] == mle["accuracy"]  # a temperature moves no argmax
    assert set(full["auroc"]["oos"]) >= {"total"} and full["passes"] in (1, 10)
    assert 1 <= tail["passes"] < 2 and both["passes"] == 10
    text = tables.calibration_table(rows)
    assert "### clinc-domain" in text and tables.LABELS["tfb_tail"] in text
    assert list(full["adapters"]) == ["0"]
    comparison.main(call)
    assert (tmp_path / "calibration.jsonl").read_text().splitlines() == lines
    point = {k: v for k, v in mle["point"].items() if k != "method"}
    for hashes, there in ((full["adapters"], True), ({"0": "0" * 64}, False)):
        assert comparison.finished(point, {"tfb_tail": hashes}, tmp_path) == there


def test_an_adapter_that_is_missing_ends_it_before_any_work(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "run", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(FileNotFoundError, match=r"calibration.train .* --seed 1"):
        comparison.main(
            [
                "--task",
                "clinc-domain",
                "--seed",
                "0",
                "1",
                "--rows",
                "20",
                "--method",
                "mle",
                "ensemble",
                "--adapters",
                str(tmp_path),
            ]
        )


# --- tables ---------------------------------------------------------------------------------------


def made_row(method: str, seed: int, nll: float, *, better: bool | None = None, **more: Any) -> Any:
    """A row whose NLL and ECE differ from MLE's significantly (better, worse) or not (None)."""
    difference = {True: -0.1, False: 0.1, None: 0.01}[better]
    compared = {"difference": difference, "low": 0.0, "high": 0.0}
    against = {
        "nll": compared | {"significant": better is not None},
        "ece": compared | {"significant": better is not None},
        "accuracy": {"difference": -0.005, "low": 0.0, "high": 0.0, "significant": False},
    }
    point = {
        "task": "clinc-domain",
        "seed": seed,
        "method": method,
        "rows": 10,
        "anchors": 5,
        "shift_rows": 5,
    }
    environment = {
        "gpu": None,
        "cpu": {"model": "c", "cores": 2},
        "commit": {"id": "0" * 40, "dirty": False},
        "versions": {"torch": "1", "transformers": "1", "peft": "1"},
    }
    return {
        "point": point,
        "nll": nll,
        "ece": nll / 10,
        "accuracy": 0.8,
        "brier": 0.3,
        "aurc": 0.1,
        "miscalibration": 0.1,
        "passes": 1.0,
        "fitting": 0.0,
        "trained": 0,
        "auroc": {"errors": {"total": 0.7}, "oos": {"total": 0.8 + seed / 100}},
        "against": {} if method == "mle" else {"mle": against, "temperature": against},
        "sizes": {"train": 9, "anchors": 5, "test": 10, "oos": 5},
        "environment": environment,
        "date": "2026-01-01",
        **more,
    }


def test_table_means_spreads_and_marks() -> None:
    rows = [made_row("mle", s, 1.0 + s) for s in (0, 1, 2)]
    rows += [made_row("temperature", s, 0.8) for s in (0, 1, 2)]
    rows += [
        made_row("tfb_joint", 0, 0.5, better=True),
        made_row("tfb_joint", 1, 0.7, better=True),
        made_row("tfb_joint", 2, 0.9, better=False),
    ]
    text = tables.calibration_table(rows)
    assert "2.000 ± 1.000 |" in text and "0.700 ± 0.200 (+2 −1)" in text
    assert "seeds 0, 1, 2" in text and "0.810, –" in text  # no epistemic uncertainty
    missed, met = text.split("Targets that are met")
    assert "above temperature scaling's: better in 2, worse in 1 of 3 seeds" in missed
    assert "NLL at most temperature scaling's: 0.700 against 0.800 (-12.5 %)" in met
    assert "accuracy within 1 point of MLE's: -0.50 points" in met
    assert "on average: 12.50 % lower over 1 tasks" in met
    assert tables.calibration_table([]) == tables.evidence_table([]) == tables.NO_ROWS


def test_table_says_what_was_left_out() -> None:
    """A method without figures has a reason; one that failed at one seed keeps the others."""
    rows = [made_row("mle", 0, 1.0), made_row("tfb", 0, 0.5)]
    rows += [
        {
            "point": {**rows[0]["point"], "method": "tfb_tail"},
            "left_out": "an encoder",
            "environment": rows[0]["environment"],
            "date": "2026-01-01",
        }
    ]
    text = tables.calibration_table(rows)
    assert "- TFB, σ and T, tail k=1: an encoder (seeds 0)" in text
    assert "tail k=1" not in tables.evidence_table(rows)


def test_under_confident_adapters_have_a_target_of_their_own() -> None:
    rows = [made_row("mle", 0, 1.0, miscalibration=-0.1), made_row("tfb_joint", 0, 0.8)]
    found = {name: (value, ok) for name, value, ok in tables.judge(rows)}
    assert found["clinc-domain, ECE at most 7 %"] == ("8.0, MLE 10.0", False)
    rows[0]["miscalibration"] = 0.1
    assert "clinc-domain, ECE at most 7 %" not in {name for name, _, _ in tables.judge(rows)}


def test_a_seed_without_an_answer_is_no_success() -> None:
    """Means pair by seed: the temperature's NLL of seeds 0 and 1 is 1.5, of all three 2."""
    rows = [made_row(m, s, 1.0 + s) for m in ("mle", "temperature") for s in (0, 1, 2)]
    rows += [made_row("tfb_joint", s, 0.6, better=True) for s in (0, 1)]
    rows += [
        {
            "point": {**rows[2]["point"], "method": "tfb_joint"},
            "left_out": "no bracket",
            "environment": rows[0]["environment"],
            "date": "2026-01-01",
        }
    ]
    found = {name: (value, ok) for name, value, ok in tables.judge(rows)}
    text, ok = found["clinc-domain, NLL nowhere significantly above temperature scaling's"]
    assert (text, ok) == ("better in 2, worse in 0 of 3 seeds", False)
    assert found["clinc-domain, NLL at most temperature scaling's"][0].startswith(
        "0.600 against 1.5"
    )
    assert not found["clinc-domain, accuracy within 1 point of MLE's"][1]


def test_methods_that_do_not_exist_say_why(
    causal: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.calibration.methods.why_no_tail", lambda *_: "no prefix")
    with pytest.raises(LeftOut, match="no prefix"):
        Methods(causal).run("tfb_tail")

    def no_head(*_: object) -> None:
        raise ValueError("choices that differ")

    monkeypatch.setattr("benchmarks.calibration.methods.head", no_head)
    with pytest.raises(LeftOut, match="choices that differ"):
        Methods(causal).run("laplace")
