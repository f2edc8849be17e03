"""What a prediction is used for: answer or abstain, and sets that hold the right class.

Both rest on labelled calibration rows that nothing else was fitted on, and hold for rows drawn as
those were. Abstention: selection with guaranteed risk (Geifman and El-Yaniv 2017), its thresholds
tested in sequence (Learn then Test, Angelopoulos et al. 2021). Sets: split conformal prediction
(Vovk et al. 2005; Lei et al. 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import numpy as np
from scipy.stats import beta
from torch import Tensor

from tfb.evaluation.compare import LEVEL
from tfb.predictive import as_float32

SHARES = 20  # thresholds on the list: they accept 5 %, 10 %, ... of the calibration rows
ROOMS = (3, 10, 30)  # errors with which the first threshold of a sequence is still accepted


@dataclass(frozen=True)
class Decisions:
    """Thresholds on averaged probabilities, and what they promise; plain JSON by ``asdict``.

    Attributes:
        rows: number of calibration rows.
        draws: draws that their probabilities are averages of.
        target_error: largest share of wrong predictions among accepted rows; None: not asked for.
        threshold: a row is accepted where its largest probability is above it; None: no row is.
        accepted: share of calibration rows that are accepted.
        error: share of wrong predictions among these; None where there are none.
        coverage: least chance that a prediction set holds the right class; None: not asked for.
        quantile: a class is in the set where 1 - its probability is at most this; 1: every class.
        level: probability, over calibration rows, with which the target error holds.
    """

    rows: int
    draws: int
    target_error: float | None = None
    threshold: float | None = None
    accepted: float | None = None
    error: float | None = None
    coverage: float | None = None
    quantile: float | None = None
    level: float = LEVEL

    def __post_init__(self) -> None:
        check_targets(self.target_error, self.coverage)
        if self.rows < 1 or self.draws < 1 or not 0 < self.level < 1:
            raise ValueError(
                f"rows={self.rows}, draws={self.draws}, level={self.level}: expected at least one "
                "row and draw, and a level between 0 and 1"
            )

    @classmethod
    def calibrated(
        cls,
        probs: Tensor,
        labels: Tensor,
        *,
        target_error: float | None = None,
        coverage: float | None = None,
        draws: int = 1,
    ) -> Decisions:
        """Choose the threshold that accepts most rows, and the quantile of the sets.

        Args:
            probs: averaged probabilities [N, K] of calibration rows; 0 for what is no choice.
            labels: [N].
            target_error: between 0 and 1.
            coverage: between 0 and 1.
            draws: draws behind ``probs``.

        Raises:
            ValueError: no rows, neither or an impossible target, labels that are none of the
                classes, or probabilities that are no numbers.
        """
        check_targets(target_error, coverage)
        if not len(labels):
            raise ValueError("no calibration rows; give labelled rows that were not fitted on")
        p = _exact(probs)
        if len(labels) != len(p) or not bool(((labels >= 0) & (labels < p.shape[-1])).all()):
            raise ValueError(
                f"labels: expected {len(p)} between 0 and {p.shape[-1] - 1}, one for each row of "
                "probs"
            )
        if not bool(p.isfinite().all()):
            raise ValueError("probs: NaN or Inf; see to the model first")
        found = cls(len(labels), draws, target_error=target_error, coverage=coverage)
        if target_error is not None:
            wrong = (p.argmax(-1) != labels).numpy()
            found = _with_threshold(found, p.amax(-1).numpy(), wrong)
        if coverage is not None:
            of_labels = p.gather(1, labels[:, None])[:, 0]
            found = replace(found, quantile=_quantile(of_labels, coverage))
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """What is decided: "abstain", "prediction_set" or both."""
        asked = {"abstain": self.target_error, "prediction_set": self.coverage}
        return tuple(name for name, target in asked.items() if target is not None)

    def apply(self, probs: Tensor) -> dict[str, list[Any]]:
        """Decide for probabilities [B, K] of rows that have K choices each.

        Returns:
            By name, for each row: ``abstain``, whether to; ``prediction_set``, its classes, the
            most probable first. The prediction is always in it: no set is empty, and coverage is no
            lower for that.
        """
        p, found = _exact(probs), dict[str, list[Any]]()
        if self.target_error is not None:
            least = math.inf if self.threshold is None else self.threshold
            found["abstain"] = (~(p.amax(-1) > least)).tolist()  # NaN too
        if self.quantile is not None:
            order = p.argsort(dim=-1, descending=True, stable=True)
            sizes = (1 - p <= self.quantile).sum(-1).clamp_min(1)
            rows = zip(order.tolist(), sizes.tolist(), strict=True)
            found["prediction_set"] = [classes[:n] for classes, n in rows]
        return found

    def __str__(self) -> str:
        """Say in words what is promised."""
        lines, rows = [], f"{self.rows} calibration rows"
        if self.target_error is not None and self.threshold is None:
            lines.append(
                f"abstain always: {rows} show for no share of them that at most "
                f"{_percent(self.target_error)} are wrong; give more rows, or allow more errors"
            )
        elif self.threshold == 0.0:
            lines.append(
                f"answer every row: of {rows} {_percent(self.error)} are wrong; of new ones at "
                f"most {_percent(self.target_error)} (level {_percent(self.level)})"
            )
        elif self.target_error is not None:
            lines.append(
                f"abstain at a confidence of {self.threshold:.3g} or less: of {rows} "
                f"{_percent(self.accepted)} are accepted and {_percent(self.error)} of these "
                f"wrong; of new ones at most {_percent(self.target_error)} "
                f"(level {_percent(self.level)})"
            )
        if self.quantile == 1.0:
            lines.append(
                f"prediction sets hold every class: {rows} allow no smaller ones for a coverage of "
                f"{_percent(self.coverage)}; give more rows"
            )
        elif self.quantile is not None:
            lines.append(
                f"prediction sets hold classes of probability {1 - self.quantile:.3g} or more, and "
                f"the right one for {_percent(self.coverage)} of new rows"
            )
        return "\n".join(lines)


def check_targets(target_error: float | None, coverage: float | None) -> None:
    """Refuse targets that no rows can be calibrated for."""
    if target_error is None and coverage is None:
        raise ValueError("nothing to calibrate: give target_error, coverage or both")
    for name, value in (("target_error", target_error), ("coverage", coverage)):
        if value is not None and not 0 < value < 1:
            raise ValueError(f"{name}={value}: expected a number between 0 and 1")


def error_bounds(wrong: np.ndarray, rows: np.ndarray, risk: float) -> np.ndarray:
    """Return Clopper and Pearson's upper limits of error rates, each exceeded with chance ``risk``.

    Args:
        wrong: errors, [...].
        rows: rows among which they are, [...].
        risk: chance that a limit lies below its true rate.
    """
    right = rows - wrong
    limits = beta.ppf(1 - risk, wrong + 1, np.maximum(right, 1))
    return np.asarray(np.where(right > 0, limits, 1.0))


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.3g} %"


def _exact(probs: Tensor) -> Tensor:
    """Return probabilities as results have them, in float32, with room for sums."""
    return as_float32(probs.detach()).double()


def _with_threshold(asked: Decisions, confidence: np.ndarray, wrong: np.ndarray) -> Decisions:
    """Go through a list of thresholds, from few accepted rows to many, while their limits are met.

    To go too far, the first threshold whose true error is above the target has to pass. Its rank is
    fixed by how many rows lie above the critical confidence. Of these a share equal to the target
    is wrong, and of rows below no less, so that it passes with the risk of one test. Three
    sequences share the risk: early starts need few rows, late ones are not ended by a few errors.
    """
    N, risk, target = len(wrong), (1 - asked.level) / len(ROOMS), asked.target_error
    order = np.argsort(-confidence, kind="stable")
    ranked, errors = confidence[order], np.append(0, wrong[order].cumsum())
    ranks = np.unique(np.ceil(N * np.arange(1, SHARES + 1) / SHARES).astype(int))
    thresholds = np.append(ranked, 0.0)[ranks]  # the last accepts everything
    # Strictly above: the row at the threshold chose it. Fewer than the rank where rows are tied.
    accepted = np.searchsorted(-ranked, -thresholds)
    met = error_bounds(errors[accepted], accepted, risk) <= target
    passed: list[int] = []
    for room in ROOMS:
        large = error_bounds(np.array(room), accepted, risk) <= target
        start = int(large.argmax()) if large.any() else len(ranks) - 1
        passed += range(start, start + int(np.logical_and.accumulate(met[start:]).sum()))
    if not passed:
        return replace(asked, accepted=0.0)
    n = int(accepted[max(passed)])
    threshold = float(thresholds[max(passed)])
    return replace(asked, threshold=threshold, accepted=n / N, error=float(errors[n]) / n)


def _quantile(of_labels: Tensor, coverage: float) -> float:
    """Return the ceil((N + 1) coverage)-th smallest score 1 - p(label), 1 where N is too small."""
    N = len(of_labels)
    rank = math.ceil((N + 1) * Decimal(str(coverage)))  # in decimals: 0.95 * 20 is 19, not above
    return float((1 - of_labels).sort().values[rank - 1]) if rank <= N else 1.0
