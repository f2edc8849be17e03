"""The sentences of a report: what they state, and when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tfb.evaluation import findings
from tfb.evaluation.compare import Change
from tfb.evaluation.metrics import Evaluation
from tfb.search.fit import CurvePoint, SigmaFit

SAME = Change(0.5, 0.5, 0.0, 0.0, 1000)


def evaluation(name: str = "tfb", rows: int = 1500, **changes: Any) -> Evaluation:
    probs = torch.tensor([[0.75, 0.25]]).repeat(rows, 1)
    labels = (torch.arange(rows) % 4 == 3).long()
    e = Evaluation(name, "test", probs, labels, draws=10, epistemic=torch.zeros(rows))
    return replace(e, **changes)


def fit(**changes: Any) -> dict[str, Any]:
    losses = [(0.0, 0.8), (0.01, 0.7), (0.02, 0.8), (0.021, 0.81)]
    found = SigmaFit(
        sigma=0.02, metric="nll", objective="max_variance", tolerance=0.003, relative=True,
        two_sided=False, search="grid", mode="full", draws=4, seed=0, anchors=600,
        anchor_hash="0" * 64, baseline=0.8, limit=0.8024,
        curve=tuple(CurvePoint(s, loss, 0.01, 0.01) for s, loss in losses),
        passes=14.0, stopped="crossing bracketed", interval=(0.015, 0.025),
    )  # fmt: skip
    return replace(found, **changes).to_dict()


def comparison(**changes: Change) -> findings.Comparison:
    figures = {"accuracy": SAME, "ece": SAME, "nll": SAME, "brier": SAME, **changes}
    return findings.Comparison(evaluation("deterministic", epistemic=None), evaluation(), figures)


# --- results ------------------------------------------------------------------------------------


def test_an_improvement_in_one_sentence() -> None:
    text = findings.sentence(
        comparison(
            ece=Change(0.089, 0.034, -0.07, -0.04, 1000),
            accuracy=Change(0.763, 0.764, -0.01, 0.012, 1000),
            nll=Change(0.88, 0.789, -0.1, -0.05, 1000),
        )
    )
    assert text == (
        "Averaging 10 draws lowered the calibration error (ECE) from 8.9 % to 3.4 % on 1,500 rows "
        "of test; accuracy 76.3 → 76.4 %, a difference within noise; NLL 0.880 → 0.789, a fall "
        "beyond noise."
    )


def test_harm_is_stated_as_plainly() -> None:
    text = findings.sentence(
        comparison(
            ece=Change(0.03, 0.09, 0.04, 0.08, 1000),
            accuracy=Change(0.8, 0.7, -0.15, -0.05, 1000),
            nll=Change(0.7, 0.9, 0.1, 0.3, 1000),
            aurc=Change(0.05, 0.09, 0.01, 0.06, 1000),
        )
    )
    assert "raised the calibration error (ECE) from 3.0 % to 9.0 %" in text
    assert "80.0 → 70.0 %, a fall beyond noise" in text and "a rise beyond noise." in text
    assert text.endswith(
        "Its uncertainty tells right from wrong answers less well: AURC 5.00 → 9.00 %, a rise "
        "beyond noise."
    )


def test_what_chance_explains_is_no_improvement() -> None:
    text = findings.sentence(comparison(ece=Change(0.05, 0.04, -0.02, 0.01, 1000)))
    assert "changed the calibration error (ECE) from 5.0 % to 4.0 %" in text
    assert "within noise; accuracy" in text and "lowered" not in text


def test_no_change_at_all() -> None:
    """So little noise that nothing moves."""
    same = [evaluation("deterministic", epistemic=None), evaluation()]
    compared = findings.comparisons(same)
    assert findings.headline(same, compared) == (
        "Averaging 10 draws changed nothing on 1,500 rows of test: accuracy 75.0 %, calibration "
        "error (ECE) 0.0 %."
    )


def test_no_noise_at_all() -> None:
    found = [evaluation("deterministic", epistemic=None),
             evaluation("tfb", epistemic=None, draws=1)]  # fmt: skip
    assert findings.headline(found, findings.comparisons(found)) == (
        "σ = 0: nothing was averaged, and predictions on 1,500 rows of test are those of the "
        "unchanged adapter: accuracy 75.0 %, calibration error (ECE) 0.0 %."
    )


def test_one_draw_of_noise_is_not_no_noise() -> None:
    other = torch.tensor([[0.25, 0.75]]).repeat(1500, 1)
    found = [evaluation("deterministic", epistemic=None),
             evaluation("tfb", epistemic=None, draws=1, probs=other)]  # fmt: skip
    assert "σ = 0" not in findings.headline(found, findings.comparisons(found))


def test_nothing_to_compare() -> None:
    alone = [evaluation("deterministic", epistemic=None)]
    assert findings.comparisons(alone) == []
    text = findings.headline(alone, [])
    assert text.startswith("deterministic: right on 75.0 % of 1,500 rows of test")
    assert text.endswith("Nothing was compared with it.")


def test_the_headline_is_of_the_first_sampled_method() -> None:
    found = [evaluation("deterministic", epistemic=None), evaluation("scaled", epistemic=None),
             evaluation("tfb"), replace(evaluation("deterministic"), dataset="other"),
             replace(evaluation("tfb"), dataset="other", draws=20)]  # fmt: skip
    compared = findings.comparisons(found)
    assert [(c.before.dataset, c.after.name) for c in compared] == [
        ("test", "scaled"), ("test", "tfb"), ("other", "tfb"),
    ]  # fmt: skip
    assert findings.headline(found, compared).startswith("Averaging 10 draws")
    assert findings.sentence(compared[0]).startswith("scaled changed nothing")
    assert findings.named(compared[0]) == findings.sentence(compared[0])
    assert findings.named(compared[1]) == f"tfb: {findings.sentence(compared[1])}"


def test_claims_and_selective_risk() -> None:
    e = evaluation(rows=8, total=torch.tensor([0.1, 0.1, 0.1, 0.9] * 2))
    assert findings.claims(e) == (
        "On test, tfb claims to be right on 75.0 % of the rows and is right on 75.0 %."
    )
    assert findings.selective(e) == (
        "On test, tfb is wrong on 25.0 % of all rows, and on 0.0 % of the surer half."
    )


def test_cautions() -> None:
    assert findings.cautions([evaluation()]) == []
    assert findings.cautions([evaluation(rows=40)]) == [
        "test has only 40 rows: its figures and intervals are rough."
    ]
    one = replace(evaluation(), labels=torch.zeros(1500, dtype=torch.int64))
    assert "have the same right answer" in findings.cautions([one])[0]


# --- the decision -------------------------------------------------------------------------------


def test_largest_accepted_sigma() -> None:
    assert findings.decision(fit()) == [
        "The search looked for the largest σ that 600 anchor rows tolerate (objective "
        "max_variance). On them the average surprise at the right answer (NLL, in nats) may lie "
        "above the unchanged adapter's 0.8 by at most 0.0024 (a tolerance of 0.3 %).",
        "Up to σ = 0.02 the change is accepted, which is the answer; at the next one measured, "
        "0.021, it is too much.",
        "How sure: other anchor rows and other draws would have given another σ; with 95 % "
        "confidence it lies between 0.015 and 0.025.",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"two_sided": True, "metric": "embedding_norm"}, "may differ from the unchanged"),
        ({"relative": False, "tolerance": 0.0024}, "by at most 0.0024 (the tolerance)"),
        ({"metric": "accuracy"}, "the share of wrong answers (error rate)"),
        ({"metric": "pseudo_nll"}, "at the unchanged adapter's own answer"),
        ({"interval": (0.015, None)}, "it is at least 0.015; what was measured shows no upper end"),
        ({"interval": None}, "was not worked out"),
        ({"curve": (CurvePoint(0.0, 0.8, 0.0, 0.0),)}, "which is the answer."),
        ({"objective": "min_nll", "limit": None}, "(objective min_nll; no tolerance is used)"),
        ({"objective": "min_nll", "limit": None, "sigma": 0.01}, "0.8 it falls to 0.7 at σ = 0.01"),
        ({"objective": "min_nll", "limit": None}, "no σ measured is shown to be worse"),
        (
            {"objective": "min_nll", "limit": None, "interval": (0.0, None)},
            "from 0 upwards, as far as was measured",
        ),
        ({"objective": "min_nll", "limit": None, "sigma": 0.0}, "So σ = 0: no noise"),
        ({"objective": "gvi", "limit": None, "implied_lambda": 0.01}, "a weight λ of about 0.01"),
        (
            {"objective": "gvi", "limit": None, "implied_lambda": 0.01, "kl_weight": 0.0125},
            "a weight λ of 0.0125",
        ),
        ({"objective": "gvi", "limit": None}, "(the KL divergence). Little noise"),
        ({"compat": "reference", "interval": None}, "(compat reference), on 600 anchor rows"),
    ],
)
def test_decision_of_each_kind(changes: dict[str, Any], said: str) -> None:
    text = " ".join(findings.decision(fit(**changes)))
    assert said in text and "None" not in text
