"""Every method of the comparison: fits on anchors, predicts the test rows and every shift.

    mle             the adapter as it is            map          trained with a Gaussian prior
    temperature     mle, one temperature            mc_dropout   dropout as in training, 10 passes
    ensemble        three adapters                  laplace      last-layer Laplace, its prior
                                                                 by marginal likelihood
    laplace_tuned   last-layer Laplace, its prior by NLL of the anchors
    authors_rule    TFB, sigma by the authors' scripts' rule
    tfb             TFB by the paper's objective: max_variance, nll, 10 antithetic draws
    tfb_min_nll     sigma of least NLL (default)    tfb_gvi      of least l + KL / |D|, on training
                                                                 rows
    tfb_tail        min_nll, noise at the last position only
    tfb_last        min_nll, noise in the last block only
    tfb_layers      min_nll, layer-adaptive: a multiplier for each module
    tfb_temperature tfb_min_nll, then a temperature

Fitting sees held-out anchors, or training rows (gvi, laplace), or both (laplace_tuned), never a
test row. To add a method: a function here and its line in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

import tfb
from benchmarks.calibration.laplace import SAMPLES, fit_laplace, sample_laplace, tune_laplace
from benchmarks.calibration.layer_scale import scale_layers
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
from tfb.search.result import SigmaFit

TAIL = 1
SENSITIVITY_SIGMA = 0.01  # at which modules are measured where min_nll finds no noise good


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

    def map(self) -> Outcome:
        bayes = self.setting.model("map", self.setting.task.seed)
        return Outcome(self._everywhere(bayes, Draws.mean()), passes=1.0, trained=1)

    def ensemble(self) -> Outcome:
        """Lakshminarayanan et al. 2017: the mean of the members' probabilities."""
        s = self.setting
        members = [
            self._deterministic
            if seed == s.mle_seed
            else self._everywhere(s.model("mle", seed), Draws.mean())
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

    def tfb_temperature(self) -> Outcome:
        plain, draws = self._min_nll
        anchors = sampled(self.setting.model(), self.setting.anchors, draws)
        predicted, T = self._tempered(plain.predicted, anchors)
        return Outcome(
            predicted,
            plain.passes,
            fitting=plain.fitting + plain.passes,
            details={**plain.details, "temperature": T},
        )

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
        return self._tfb(self.setting.anchors, search=fit_reference)[0]

    def tfb(self) -> Outcome:
        return self._tfb(self.setting.anchors, objective="max_variance")[0]

    def tfb_min_nll(self) -> Outcome:
        return self._min_nll[0]

    def tfb_gvi(self) -> Outcome:
        s = self.setting
        outcome, _ = self._tfb(
            s.train_anchors, objective="gvi", metric="expected_nll", kl_weight=1 / len(s.train)
        )
        return outcome

    def tfb_tail(self) -> Outcome:
        bayes = self.setting.model()
        if reason := why_no_tail(bayes.base, bayes.task):
            raise LeftOut(reason)
        return self._tfb(self.setting.anchors, objective="min_nll", mode="tail", tail=TAIL)[0]

    def tfb_last(self) -> Outcome:
        bayes = self.setting.model(layers=tfb.last_layers(1))
        return self._tfb(self.setting.anchors, bayes=bayes, objective="min_nll")[0]

    def tfb_layers(self) -> Outcome:
        s = self.setting
        sigma = float(self._min_nll[0].details["sigma"]) or SENSITIVITY_SIGMA
        own = s.model(layers=lambda name: True)  # its posteriors are replaced
        bayes, scales = scale_layers(own, s.anchors, sigma=sigma)
        outcome, _ = self._tfb(s.anchors, bayes=bayes, objective="min_nll")
        m = scales.multipliers.values()
        return replace(
            outcome,
            fitting=outcome.fitting + scales.passes + self._min_nll[0].fitting,
            details={**outcome.details, "least_multiplier": min(m), "largest_multiplier": max(m)},
        )

    def _tfb(
        self,
        anchors: EncodedRows,
        *,
        bayes: Any = None,
        search: Callable[..., SigmaFit] = fit_sigma,
        **options: Any,
    ) -> tuple[Outcome, Draws]:
        """Search sigma, predict with antithetic draws."""
        s = self.setting
        bayes = s.model() if bayes is None else bayes
        fit = search(bayes, anchors, **options)
        draws = bayes.draws(s.draws) if fit.sigma > 0 else Draws.mean()
        passes = prediction_passes(bayes, s.judged["test"], draws)
        outcome = Outcome(
            self._everywhere(bayes, draws),
            passes,
            fitting=fit.passes * len(anchors) / len(s.anchors),
            details={
                "sigma": fit.sigma,
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
        bayes.configure(mode="full")  # the model is shared, and every method's default is full
        return outcome, draws

    # --- made once ----------------------------------------------------------------------------

    @cached_property
    def _deterministic(self) -> dict[str, Predicted]:
        return self._everywhere(self.setting.model(), Draws.mean())

    @cached_property
    def _min_nll(self) -> tuple[Outcome, Draws]:
        return self._tfb(self.setting.anchors, objective="min_nll")

    def _everywhere(self, bayes: Any, draws: Draws) -> dict[str, Predicted]:
        return {name: sampled(bayes, rows, draws) for name, rows in self.setting.judged.items()}


def prediction_passes(bayes: Any, rows: EncodedRows, draws: Draws) -> float:
    """Return the passes a row; blocks below the noise and tokens before the tail count once."""
    S = len(draws)
    if bayes.config.mode == "tail":
        return passes_per_row([len(ids) for ids in rows.input_ids], S, bayes.config.tail)
    share = len(bayes.blocks_below) / bayes.base.config.num_hidden_layers
    return share + S * (1 - share)


METHODS: dict[str, Callable[[Methods], Outcome]] = {
    "mle": Methods.mle,
    "map": Methods.map,
    "temperature": Methods.temperature,
    "mc_dropout": Methods.mc_dropout,
    "ensemble": Methods.ensemble,
    "laplace": Methods.laplace,
    "laplace_tuned": Methods.laplace_tuned,
    "authors_rule": Methods.authors_rule,
    "tfb": Methods.tfb,
    "tfb_min_nll": Methods.tfb_min_nll,
    "tfb_gvi": Methods.tfb_gvi,
    "tfb_tail": Methods.tfb_tail,
    "tfb_last": Methods.tfb_last,
    "tfb_layers": Methods.tfb_layers,
    "tfb_temperature": Methods.tfb_temperature,
}
