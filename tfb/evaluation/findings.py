"""What a report says, as sentences for a reader who has not heard of TFB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tfb.evaluation.compare import Change, compare
from tfb.evaluation.metrics import Evaluation, risk_coverage

FEW_ROWS = 100
LOSSES = {
    "nll": "average surprise at the right answer (NLL, in nats)",
    "expected_nll": "average surprise of single draws at the right answer (expected NLL, in nats)",
    "pseudo_nll": "average surprise at the unchanged adapter's own answer (pseudo-label NLL)",
    "accuracy": "share of wrong answers (error rate)",
    "embedding_norm": "length of the model's last hidden state (embedding norm)",
}


@dataclass(frozen=True, eq=False)
class Comparison:
    """A method beside the first one of its data set."""

    before: Evaluation
    after: Evaluation
    changes: dict[str, Change]


def comparisons(evaluations: Sequence[Evaluation]) -> list[Comparison]:
    """Every other method against the first of its data set, on the same rows."""
    first: dict[str, Evaluation] = {}
    found = []
    for e in evaluations:
        before = first.setdefault(e.dataset, e)
        if before is not e:
            found.append(Comparison(before, e, compare(before, e)))
    return found


def headline(evaluations: Sequence[Evaluation], compared: Sequence[Comparison]) -> str:
    """The result in one or two sentences: the first sampled method on the first data set."""
    main = next((c for c in compared if c.after.epistemic is not None or c.after.draws == 1), None)
    if main is None:
        e = evaluations[0]
        return (
            f"{e.name}: right on {percent(e.metrics.accuracy)} of {count(e)}, with a calibration "
            f"error (ECE) of {percent(e.metrics.ece)}. Nothing was compared with it."
        )
    return sentence(main)


def sentence(c: Comparison) -> str:
    """What one method changed, and whether chance explains it."""
    accuracy, ece, nll = (c.changes[k] for k in ("accuracy", "ece", "nll"))
    subject = c.after.name
    if c.after.epistemic is not None:
        subject = f"Averaging {c.after.draws or 'several'} draws"
    if c.after.draws == 1 and torch.equal(c.after.probs, c.before.probs):
        return (
            f"σ = 0: nothing was averaged, and predictions on {count(c.after)} are those of the "
            f"unchanged adapter: accuracy {percent(accuracy.after)}, calibration error (ECE) "
            f"{percent(ece.after)}."
        )
    if all(change.change == 0 for change in c.changes.values()):
        return (
            f"{subject} changed nothing on {count(c.after)}: accuracy {percent(accuracy.after)}, "
            f"calibration error (ECE) {percent(ece.after)}."
        )
    verb = "changed"
    if ece.beyond_noise:
        verb = "lowered" if ece.change < 0 else "raised"
    aurc, ranking = c.changes.get("aurc"), ""
    if aurc is not None and aurc.beyond_noise:
        better = "better" if aurc.change < 0 else "less well"
        ranking = f" Its uncertainty tells right from wrong answers {better}: {_ranking(aurc)}."
    doubt = "" if ece.beyond_noise else ", a difference within noise"
    return (
        f"{subject} {verb} the calibration error (ECE) from {percent(ece.before)} to "
        f"{percent(ece.after)} on {count(c.after)}{doubt}; accuracy {100 * accuracy.before:.1f} → "
        f"{percent(accuracy.after)}, {judged(accuracy)}; NLL {nll.before:.3f} → {nll.after:.3f}, "
        f"{judged(nll)}.{ranking}"
    )


def named(c: Comparison) -> str:
    """The sentence, with the method's name in front where it does not begin with it."""
    said = sentence(c)
    return said if said.startswith(c.after.name) else f"{c.after.name}: {said}"


def _ranking(aurc: Change) -> str:
    return f"AURC {100 * aurc.before:.2f} → {100 * aurc.after:.2f} %, {judged(aurc)}"


def judged(change: Change) -> str:
    """Whether the 95 % limits of a change leave 0 out."""
    if change.change == 0:
        return "unchanged"
    if not change.beyond_noise:
        return "a difference within noise"
    return "a rise beyond noise" if change.change > 0 else "a fall beyond noise"


def claims(e: Evaluation) -> str:
    """Mean confidence beside accuracy."""
    m = e.metrics
    return (
        f"On {e.dataset}, {e.name} claims to be right on {percent(m.accuracy + m.miscalibration)} "
        f"of the rows and is right on {percent(m.accuracy)}."
    )


def selective(e: Evaluation) -> str:
    """The error rate of the surer half beside that of all rows."""
    assert e.total is not None
    curve = risk_coverage(e.total, e.correct)
    half = curve.risk[(len(curve.risk) + 1) // 2 - 1]
    return (
        f"On {e.dataset}, {e.name} is wrong on {percent(float(curve.risk[-1]))} of all rows, and "
        f"on {percent(float(half))} of the surer half."
    )


def ranked(c: Comparison) -> str:
    """The AURC of two methods."""
    return f"{c.after.name} against {c.before.name} on {c.after.dataset}: " + (
        f"{_ranking(c.changes['aurc'])}."
    )


def cautions(evaluations: Sequence[Evaluation]) -> list[str]:
    """What makes the figures themselves doubtful."""
    found = []
    for dataset in dict.fromkeys(e.dataset for e in evaluations):
        e = next(e for e in evaluations if e.dataset == dataset)
        assert e.labels is not None
        if len(e.labels) < FEW_ROWS:
            found.append(f"{dataset} has only {count(e, '')}: its figures and intervals are rough.")
        if len(e.labels.unique()) == 1:
            found.append(
                f"All rows of {dataset} have the same right answer: a model that always gives it "
                "would look perfect."
            )
    return found


def decision(fit: Mapping[str, Any]) -> list[str]:
    """How sigma was chosen: what was looked for, where it was found, how sure that is."""
    objective = "reference" if fit.get("compat") else fit["objective"]
    return [*_CHOICES[objective](fit), *_sureness(fit)]


def _largest_accepted(fit: Mapping[str, Any]) -> list[str]:
    loss, sigma = LOSSES[fit["metric"]], fit["sigma"]
    allowed = abs(fit["limit"] - fit["baseline"])
    size = f"a tolerance of {100 * fit['tolerance']:.3g} %" if fit["relative"] else "the tolerance"
    way = "differ from" if fit["two_sided"] else "lie above"
    found = [
        f"The search looked for the largest σ that {fit['anchors']:,} anchor rows tolerate "
        f"(objective max_variance). On them the {loss} may {way} the unchanged adapter's "
        f"{fit['baseline']:.4g} by at most {allowed:.2g} ({size})."
    ]
    beyond = [p for p in fit["curve"] if p["sigma"] > sigma]
    after = ""
    if beyond and abs(beyond[0]["loss"] - fit["baseline"]) > allowed:
        after = f"; at the next one measured, {beyond[0]['sigma']:.4g}, it is too much"
    found.append(f"Up to σ = {sigma:.4g} the change is accepted, which is the answer{after}.")
    return found


def _least_loss(fit: Mapping[str, Any]) -> list[str]:
    start = (
        f"The search looked for the σ of least {LOSSES[fit['metric']]} on {fit['anchors']:,} "
        "anchor rows (objective min_nll; no tolerance is used)."
    )
    if fit["sigma"] == 0:
        return [
            start,
            f"No σ had less than the unchanged adapter's {fit['baseline']:.4g}. So σ = 0: no "
            "noise, and the predictions stay those of the unchanged adapter.",
        ]
    least = next((p["loss"] for p in fit["curve"] if p["sigma"] == fit["sigma"]), None)
    to = "" if least is None else f" to {least:.4g}"
    return [
        start,
        f"From the unchanged adapter's {fit['baseline']:.4g} it falls{to} at σ = "
        f"{fit['sigma']:.4g}, and no σ measured has less.",
    ]


def _variational(fit: Mapping[str, Any]) -> list[str]:
    weight, implied = fit.get("kl_weight"), fit.get("implied_lambda")
    said = "" if implied is None else f" with a weight λ of about {implied:.2g}"  # earlier records
    said = said if weight is None else f" with a weight λ of {weight:.4g}"
    return [
        "The search weighed two things against each other (objective gvi; no tolerance is used): "
        f"the {LOSSES[fit['metric']]} on {fit['anchors']:,} anchor rows, and how far the weights' "
        f"distribution is from its prior (the KL divergence){said}. Little noise is far from the "
        "prior, much noise costs loss.",
        f"Their sum is least at σ = {fit['sigma']:.4g}.",
    ]


def _reference(fit: Mapping[str, Any]) -> list[str]:
    return [
        "The rule of the authors' published scripts was followed to the letter (compat reference), "
        f"on {fit['anchors']:,} anchor rows: it divides the change by the number of rows once "
        "more, and halves a fixed range.",
        f"Its answer is σ = {fit['sigma']:.4g} ({fit['stopped']}).",
    ]


_CHOICES = {
    "max_variance": _largest_accepted,
    "min_nll": _least_loss,
    "gvi": _variational,
    "reference": _reference,
}


def _sureness(fit: Mapping[str, Any]) -> list[str]:
    if fit.get("interval") is None:
        return ["How much σ depends on the anchor rows and draws was not worked out."]
    low, high = fit["interval"]
    if fit["objective"] != "max_variance":
        end = "upwards, as far as was measured" if high is None else f"to {high:.4g}"
        return [
            f"How sure: from {low:.4g} {end}, no σ measured is shown to be worse (paired test, "
            "95 %, over anchor rows and draws)."
        ]
    end = f"is at least {low:.4g}; what was measured shows no upper end"
    if high is not None:
        end = f"lies between {low:.4g} and {high:.4g}"
    return [
        f"How sure: other anchor rows and other draws would have given another σ; with 95 % "
        f"confidence it {end}."
    ]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def count(e: Evaluation, of: str | None = None) -> str:
    """ "1,500 rows of validation"; ``of``: said after the number in place of the data set."""
    n = len(e.probs)
    rows = f"{n:,} row" if n == 1 else f"{n:,} rows"
    return f"{rows} of {e.dataset}" if of is None else f"{rows}{of}"
