"""Calibration metrics of predicted probabilities, through torchmetrics where it has them.

All are fractions or nats, never percent. N rows, K classes (padded with zero columns for rows
with fewer choices).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from scipy.optimize import minimize_scalar
from scipy.stats import mannwhitneyu
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)

NLL_PROBABILITY_FLOOR = 1e-12  # a probability of 0 on the label costs 27.6 nats, not infinity
BELOW_ONE = 1 - 2.0**-24  # the float32 before 1
LOG_TEMPERATURE_BOUNDS = (math.log(0.01), math.log(100.0))


@dataclass(frozen=True)
class Metrics:
    """Figures over N labelled rows.

    Attributes:
        accuracy: share of rows whose argmax is the label. nll: mean -log p(label), nats.
        ece: expected calibration error, L1, ``n_bins`` equal bins of confidence (Guo et al. 2017).
        brier: mean over rows of the summed squared error over classes, 0 to 2.
        miscalibration: mean confidence - accuracy; > 0 is over-confident.
        flip_ratio: share of rows whose prediction differs from the reference's, or None.
    """

    rows: int
    accuracy: float
    nll: float
    ece: float
    brier: float
    miscalibration: float
    flip_ratio: float | None
    n_bins: int = 15

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


@dataclass(frozen=True)
class ReliabilityBins:
    """A reliability diagram: M bins of confidence. Empty bins have accuracy and confidence 0.

    edges [M + 1]; counts [M] int; accuracy, confidence [M].
    """

    edges: Tensor
    counts: Tensor
    accuracy: Tensor
    confidence: Tensor

    @property
    def ece(self) -> float:
        """sum_m counts_m / N |accuracy_m - confidence_m|."""
        weight = self.counts.double() / self.counts.sum()
        return float((weight * (self.accuracy - self.confidence).abs()).sum())


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Selective prediction: answer the surest rows only, from one of them to all N.

    coverage, risk [N]: the share of rows answered, ascending to 1, and the share of those answered
    that are wrong.
    """

    coverage: Tensor
    risk: Tensor

    @property
    def aurc(self) -> float:
        """Area under the risk-coverage curve, the mean risk over the N coverages (Geifman, Uziel
        and El-Yaniv, ICLR 2019); lower is better, an order at random gives the error rate."""
        return float(self.risk.mean())


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One method's probabilities on one data set.

    Attributes:
        name: the method. dataset: the rows. probs: [N, K]. labels: [N] or None.
        total, aleatoric, epistemic: [N] nats, or None.
        draws: posterior draws that were averaged (1: none were, sigma is 0), or None. passes:
            deterministic-pass equivalents a row (:mod:`tfb.search.cost`), or None.
    """

    name: str
    dataset: str
    probs: Tensor
    labels: Tensor | None = None
    total: Tensor | None = None
    aleatoric: Tensor | None = None
    epistemic: Tensor | None = None
    draws: int | None = None
    passes: float | None = None

    @property
    def correct(self) -> Tensor:
        """[N] bool. Raises ValueError without labels."""
        if self.labels is None:
            raise ValueError(f"{self.name} on {self.dataset}: no labels, so none is right or wrong")
        return self.probs.argmax(-1) == self.labels

    @property
    def metrics(self) -> Metrics:
        """Raises ValueError without labels."""
        if self.labels is None:
            raise ValueError(f"{self.name} on {self.dataset}: no labels, so no metrics")
        return evaluate(self.probs, self.labels)


def evaluate(
    probs: Tensor,
    labels: Tensor,
    *,
    n_bins: int = 15,
    reference_predictions: Tensor | None = None,
) -> Metrics:
    """All metrics of probs [N, K] against labels [N].

    Args:
        reference_predictions: [N] argmax of the deterministic adapter, for ``flip_ratio``.

    Raises:
        ValueError: empty input, NaN, rows that do not sum to 1, labels out of range, shapes.
    """
    _check(probs, labels)
    p, N = probs.double(), len(labels)
    prediction = p.argmax(-1)
    if reference_predictions is not None and reference_predictions.shape != labels.shape:
        raise ValueError(
            f"reference_predictions: expected [{N}], got {list(reference_predictions.shape)}"
        )
    accuracy = float(multiclass_accuracy(p, labels, num_classes=p.shape[1], average="micro"))
    confidence = p.amax(-1)
    # torchmetrics puts a confidence of exactly 1 into a bin of its own, beyond the last, and takes
    # a softmax of everything if rounding left one probability above 1: stay one ulp below.
    below_one = p.clamp_max(BELOW_ONE)
    return Metrics(
        rows=N,
        accuracy=accuracy,
        nll=float(-p.gather(1, labels[:, None]).clamp_min(NLL_PROBABILITY_FLOOR).log().mean()),
        ece=float(
            multiclass_calibration_error(
                below_one, labels, num_classes=p.shape[1], n_bins=n_bins, norm="l1"
            )
        ),
        brier=float((p - torch.nn.functional.one_hot(labels, p.shape[1])).square().sum(-1).mean()),
        miscalibration=float(confidence.mean()) - accuracy,
        flip_ratio=(
            None
            if reference_predictions is None
            else float((prediction != reference_predictions).double().mean())
        ),
        n_bins=n_bins,
    )


def reliability(probs: Tensor, labels: Tensor, n_bins: int = 15) -> ReliabilityBins:
    """The reliability diagram behind the ECE: bins [edge_m, edge_m+1), the last one closed."""
    _check(probs, labels)
    confidence, prediction = probs.double().max(-1)
    correct = (prediction == labels).double()
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float32)
    index = bin_of_confidence(confidence, n_bins)
    counts = torch.zeros(n_bins, dtype=torch.int64).index_add_(0, index, torch.ones_like(index))
    total = counts.clamp_min(1).double()

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(n_bins, dtype=torch.float64).index_add_(0, index, values) / total

    return ReliabilityBins(edges, counts, mean(correct), mean(confidence))


def risk_coverage(uncertainty: Tensor, correct: Tensor) -> RiskCoverage:
    """The risk of answering only the rows of least uncertainty (El-Yaniv and Wiener, JMLR 2010).

    Rows of equal uncertainty are in no order: their errors count as spread evenly over them, which
    is the mean over all of their orders.

    Args:
        uncertainty: [N], any scale (1 - confidence, entropy, mutual information), larger is less
            sure. correct: [N] bool.

    Raises:
        ValueError: empty input, shapes, NaN.
    """
    if uncertainty.dim() != 1 or uncertainty.shape != correct.shape or not len(correct):
        raise ValueError(
            f"expected uncertainty [N] and correct [N], N at least 1, got "
            f"{list(uncertainty.shape)} and {list(correct.shape)}"
        )
    if bool(uncertainty.isnan().any()):
        raise ValueError("uncertainty: holds NaN; check the model's outputs")
    _, group, size = uncertainty.unique(return_inverse=True, return_counts=True)
    wrong = (~correct.bool()).double()
    share = torch.zeros(len(size), dtype=torch.float64).index_add_(0, group, wrong) / size
    answered = torch.arange(1, len(correct) + 1, dtype=torch.float64)
    errors = share.repeat_interleave(size).cumsum(0)
    return RiskCoverage(answered / len(correct), errors / answered)


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The chance that a row of ``positive`` [P] scores above one of ``negative`` [M], ties half:
    the area under the ROC curve, as Mann and Whitney's U.

    Raises:
        ValueError: either is empty or holds NaN.
    """
    for name, scores in (("positive", positive), ("negative", negative)):
        if not len(scores) or bool(scores.isnan().any()):
            raise ValueError(f"{name}: expected at least one score and no NaN")
    u = mannwhitneyu(positive.numpy(), negative.numpy(), method="asymptotic").statistic
    return float(u) / (len(positive) * len(negative))


def bin_of_confidence(confidence: Tensor, n_bins: int = 15) -> Tensor:
    """[N] int64, the bin of the ECE that each confidence [N] belongs to."""
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float32)
    # In float32, as torchmetrics has it: a confidence of 0.6 belongs to the bin that starts there.
    return (torch.bucketize(confidence.float(), edges, right=True) - 1).clamp(0, n_bins - 1)


def fit_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the NLL of softmax(log_probs / T) (Guo et al. 2017).

    Args:
        log_probs: [N, K] log-probabilities or logits. labels: [N].

    Raises:
        ValueError: empty input, NaN or Inf, labels out of range, shapes.
    """
    _check(log_probs.softmax(-1), labels)
    scores = log_probs.double()

    def nll(log_t: float) -> float:
        return float(
            torch.nn.functional.cross_entropy(scores / math.exp(log_t), labels, reduction="mean")
        )

    found = minimize_scalar(nll, bounds=LOG_TEMPERATURE_BOUNDS, method="bounded")
    return math.exp(float(found.x))


def apply_temperature(log_probs: Tensor, temperature: float) -> Tensor:
    """softmax(log_probs / T) [N, K]."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a positive number")
    return (log_probs / temperature).softmax(-1)


def _check(probs: Tensor, labels: Tensor) -> None:
    if probs.dim() != 2 or labels.shape != probs.shape[:1] or not len(probs) or probs.shape[1] < 2:
        raise ValueError(
            f"expected probs [N, K] and labels [N], N at least 1 and K at least 2, got "
            f"{list(probs.shape)} and {list(labels.shape)}"
        )
    if not bool(probs.isfinite().all()):
        raise ValueError("probs: hold NaN or Inf; check the model's outputs")
    if bool(((probs.double().sum(-1) - 1).abs() > 1e-3).any()) or bool((probs < 0).any()):
        raise ValueError("probs: rows must be probabilities that sum to 1; apply softmax first")
    if bool(((labels < 0) | (labels >= probs.shape[1])).any()):
        raise ValueError(f"labels: must lie in [0, {probs.shape[1]})")
