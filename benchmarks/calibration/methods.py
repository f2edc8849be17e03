"""Every method of the comparison: fits on anchors, predicts the test rows and every shift.

    mle             the adapter as it is
    temperature     mle, one temperature        mc_dropout   dropout as in training, 10 passes
    ensemble        three adapters              laplace      last-layer Laplace, its prior by
                                                             marginal likelihood
    laplace_tuned   last-layer Laplace, its prior by NLL of the anchors
    authors_rule    TFB, sigma by the authors' scripts' rule
    tfb             TFB by the paper's rule: max_variance, nll
    tfb_min_nll     TFB, sigma of least NLL
    tfb_joint       sigma and T of least NLL, T on each draw's logits (the library's default)
    tfb_averaged    the same sigma, T on the averaged probabilities instead
    tfb_tail        sigma and T of least NLL, noise at the last position only

All TFB methods predict with 10 antithetic draws. Fitting sees held-out anchors, or training rows
(laplace), or both (laplace_tuned), never a test row. To add a method: a function here and its line
in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from benchmarks.calibration.laplace import SAMPLES, fit_laplace, sample_laplace, tune_laplace
from benchmarks.calibration.reference_rule import fit_reference
from benchmarks.calibration.setting import (
    GIVEN_DROPOUT,
    Predicted,
    Setting,
    dropped_out,
    features,
    head,
    labels_of,
    sampled,
)
from tfb.data.batching import EncodedRows
from tfb.draws import Draws
from tfb.evaluation.metrics import apply_temperature, fit_temperature
from tfb.sampling.kv_cache import why_no_tail
from tfb.search.fit import fit_sigma
from tfb.search.loss import passes_per_row
from tfb.search.result import PredictiveFit

TAIL = 1


class LeftOut(Exception):
    """The method does not exist for this task; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What a method did.

    Attributes:
        predicted: by set of rows: "test" and the shifts.
        passes: deterministic passes a row of prediction.
        fitting: deterministic passes over the anchors, trained models aside.
        trained: models trained beside the adapter.
        details: sigma, temperature and the like.
    """

    predicted: Mapping[str, Predicted]
    passes: float
    fitting: float = 0.0
    trained: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)


class Methods:
    """The methods on one setting; predictions that several of them need are made once."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def run(self, name: str) -> Outcome:
        """One method by its name.

        Raises:
            LeftOut: it does not exist for this task. tfb.SearchError: its search has no answer.
        """
        return METHODS[name](self)

    # --- one adapter, or several --------------------------------------------------------------

    def mle(self) -> Outcome:
        return Outcome(self._deterministic, passes=1.0)

    def ensemble(self) -> Outcome:
        """Lakshminarayanan et al. 2017: the mean of the members' probabilities."""
        s = self.setting
        members = [
            self._deterministic
            if seed == s.mle_seed
            else self._everywhere(s.model(seed), Draws.mean())
            for seed in s.members
        ]
        predicted = {
            name: Predicted.of_draws(torch.stack([m[name].probs for m in members]))
            for name in s.judged
        }
        return Outcome(
            predicted,
            passes=len(members),
            trained=len(members) - 1,
            details={"members": list(s.members)},
        )

    def mc_dropout(self) -> Outcome:
        s = self.setting
        bayes = s.model()
        config = bayes.model.peft_config[bayes.adapter]
        predicted = {
            name: dropped_out(bayes, rows, s.draws, s.task.seed) for name, rows in s.judged.items()
        }
        rate = config.lora_dropout or GIVEN_DROPOUT
        return Outcome(
            predicted,
            passes=s.draws,
            details={
                "lora_dropout": rate,
                "trained_with_dropout": bool(config.lora_dropout),
            },
        )

    # --- temperature --------------------------------------------------------------------------

    def temperature(self) -> Outcome:
        """Guo et al. 2017."""
        anchors = sampled(self.setting.model(), self.setting.anchors, Draws.mean())
        predicted, T = self._tempered(self._deterministic, anchors)
        return Outcome(predicted, passes=1.0, fitting=1.0, details={"temperature": T})

    def _tempered(
        self, predicted: Mapping[str, Predicted], anchors: Predicted
    ) -> tuple[dict[str, Predicted], float]:
        """Averaged probabilities at the temperature of least NLL on the anchors.

        What draws disagree on is that of before: it is a matter of the weights.
        """
        T = fit_temperature(anchors.log_probs, labels_of(self.setting.anchors))
        scaled = {
            name: Predicted.of_probs(apply_temperature(p.log_probs, T))
            for name, p in predicted.items()
        }
        return {
            name: Predicted(p.probs, p.total, predicted[name].epistemic)
            for name, p in scaled.items()
        }, T

    # --- Laplace ------------------------------------------------------------------------------

    def laplace(self) -> Outcome:
        """Prior precision by marginal likelihood: no held-out rows."""
        return self._laplace(tuned=False)

    def laplace_tuned(self) -> Outcome:
        """Prior precision of least NLL on the anchors, which other methods get as well."""
        return self._laplace(tuned=True)

    def _laplace(self, tuned: bool) -> Outcome:
        s = self.setting
        bayes = s.model()
        try:
            linear = head(bayes, s.train)
        except ValueError as error:
            raise LeftOut(str(error)) from error
        fitted = fit_laplace(linear, features(bayes, s.train), labels_of(s.train))
        if tuned:
            tune_laplace(fitted, features(bayes, s.anchors), labels_of(s.anchors), s.task.seed)
        predicted = {
            name: Predicted.of_draws(
                sample_laplace(fitted, features(bayes, rows), s.task.seed).double()
            )
            for name, rows in s.judged.items()
        }
        details = {"prior_precision": float(fitted.prior_precision), "samples_of_head": SAMPLES}
        fitting = len(s.train) / len(s.anchors) + tuned
        return Outcome(predicted, passes=1.0, fitting=fitting, details=details)

    # --- TFB ----------------------------------------------------------------------------------

    def authors_rule(self) -> Outcome:
        return self._tfb(search=fit_reference)

    def tfb(self) -> Outcome:
        return self._tfb(objective="max_variance")

    def tfb_min_nll(self) -> Outcome:
        return self._tfb(temperature=False)

    def tfb_joint(self) -> Outcome:
        return self._joint

    def tfb_averaged(self) -> Outcome:
        joint, s = self._joint, self.setting
        bayes = s.model()
        sigma = float(joint.details["sigma"])
        draws = Draws.antithetic(s.draws, sigma, seed=s.task.seed) if sigma > 0 else Draws.mean()
        predicted, T = self._tempered(
            self._everywhere(bayes, draws), sampled(bayes, s.anchors, draws)
        )
        details = {"sigma": sigma, "temperature": T}
        return Outcome(predicted, joint.passes, joint.fitting + len(draws), details=details)

    def tfb_tail(self) -> Outcome:
        bayes = self.setting.model()
        if reason := why_no_tail(bayes.base, bayes.task):
            raise LeftOut(reason)
        return self._tfb(mode="tail", tail=TAIL)

    def _tfb(self, search: Callable[..., PredictiveFit] = fit_sigma, **options: Any) -> Outcome:
        """Fit on the anchors, predict with antithetic draws at the T that was found."""
        s = self.setting
        bayes = s.model()
        fit = search(bayes, s.anchors, **options)
        draws = bayes.distinct_draws(s.draws)
        outcome = Outcome(
            self._everywhere(bayes, draws),
            prediction_passes(bayes, s.judged["test"], draws),
            fitting=fit.passes,
            details={
                "sigma": fit.sigma,
                "temperature": fit.temperature,
                "interval": fit.interval,
                "stopped": fit.stopped,
                "objective": fit.objective,
                "metric": fit.metric,
                "mode": fit.mode,
                "search_draws": fit.draws,
                "kl": fit.kl,
                "notes": list(fit.notes),
            },
        )
        # The model is shared, and other methods begin from the defaults.
        bayes.configure(mode="full", temperature=1.0)
        return outcome

    # --- made once ----------------------------------------------------------------------------

    @cached_property
    def _deterministic(self) -> dict[str, Predicted]:
        return self._everywhere(self.setting.model(), Draws.mean())

    @cached_property
    def _joint(self) -> Outcome:
        return self._tfb()

    def _everywhere(self, bayes: Any, draws: Draws) -> dict[str, Predicted]:
        return {name: sampled(bayes, rows, draws) for name, rows in self.setting.judged.items()}


def prediction_passes(bayes: Any, rows: EncodedRows, draws: Draws) -> float:
    """Return the passes a row; tokens before the tail count once."""
    return passes_per_row([len(ids) for ids in rows.input_ids], len(draws), bayes.config.tail)


METHODS: dict[str, Callable[[Methods], Outcome]] = {
    "mle": Methods.mle,
    "temperature": Methods.temperature,
    "mc_dropout": Methods.mc_dropout,
    "ensemble": Methods.ensemble,
    "laplace": Methods.laplace,
    "laplace_tuned": Methods.laplace_tuned,
    "authors_rule": Methods.authors_rule,
    "tfb": Methods.tfb,
    "tfb_min_nll": Methods.tfb_min_nll,
    "tfb_joint": Methods.tfb_joint,
    "tfb_averaged": Methods.tfb_averaged,
    "tfb_tail": Methods.tfb_tail,
}
