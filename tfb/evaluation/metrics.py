"""Calibration metrics of N rows of K classes, through torchmetrics where it has them.

All are fractions or nats, never percent. A row with fewer choices has zeros in the other columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import rankdata
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)

from tfb.data.rows import Row

PROBABILITY_FLOOR = 1e-12  # a probability of 0 on the label costs 27.6 nats, not infinity
BINS = 15  # of the ECE (Guo et al. 2017)
BELOW_ONE = 1 - 2.0**-24  # the float32 before 1
LOG_TEMPERATURE_BOUNDS = (math.log(0.01), math.log(100.0))


@dataclass(frozen=True)
class Metrics:
    """Metrics of labelled rows.

    Attributes:
        ece: expected calibration error, L1, over ``n_bins`` equal bins of confidence.
        brier: squared error summed over classes, 0 to 2.
        miscalibration: mean confidence - accuracy; > 0 is over-confident.
        flip_ratio: share of predictions that differ from the reference's.
    """

    rows: int
    accuracy: float
    nll: float
    ece: float
    brier: float
    miscalibration: float
    flip_ratio: float | None
    n_bins: int = BINS

    def to_dict(self) -> dict[str, float | int | None]:
        """Return plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class ReliabilityBins:
    """Rows, accuracy and mean confidence of equal bins of confidence, [M]; 0 in an empty bin."""

    counts: Tensor
    accuracy: Tensor
    confidence: Tensor


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Selective prediction: the share of rows answered [N], and of those wrong among them [N]."""

    coverage: Tensor
    risk: Tensor

    @property
    def aurc(self) -> float:
        """Area under the curve, the mean risk; lower is better."""
        return float(self.risk.mean())


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One method's probabilities on one data set.

    Attributes:
        name: the method.
        probs: [N, K].
        labels: [N].
        total: uncertainty [N] in nats; so is its epistemic part.
        draws: posterior draws averaged; 1 at sigma = 0.
        passes: deterministic-pass equivalents a row.
        rows: the N task rows, for a report's examples.
        classes: names of the classes of rows that bring no choices.
    """

    name: str
    dataset: str
    probs: Tensor
    labels: Tensor | None = None
    total: Tensor | None = None
    epistemic: Tensor | None = None
    draws: int | None = None
    passes: float | None = None
    rows: Sequence[Row] = ()
    classes: Sequence[str] | None = None

    @property
    def correct(self) -> Tensor:
        """Whether each row's prediction is its label, [N]."""
        return self.probs.argmax(-1) == self.known_labels

    @property
    def metrics(self) -> Metrics:
        """What :func:`evaluate` says."""
        return evaluate(self.probs, self.known_labels)

    @property
    def known_labels(self) -> Tensor:
        """The labels [N]; a ValueError where there are none."""
        if self.labels is None:
            raise ValueError(f"{self.name} on {self.dataset}: no labels, so no metrics")
        return self.labels


def evaluate(
    probs: Tensor,
    labels: Tensor,
    *,
    n_bins: int = BINS,
    reference_predictions: Tensor | None = None,
) -> Metrics:
    """Return all metrics.

    Args:
        probs: [N, K].
        labels: [N].
        n_bins: of the ECE.
        reference_predictions: [N] classes, for ``flip_ratio``.

    Raises:
        ValueError: empty input, NaN, rows that do not sum to 1, labels out of range, shapes.
    """
    _check(probs, labels)
    p, N, K = probs.double(), *probs.shape
    accuracy = float(multiclass_accuracy(p, labels, num_classes=K, average="micro"))
    confidence, prediction = p.max(-1)
    flips = None
    if reference_predictions is not None:
        if (shape := reference_predictions.shape) != labels.shape:
            raise ValueError(f"reference_predictions: expected [{N}], got {list(shape)}")
        flips = float((prediction != reference_predictions).double().mean())
    # torchmetrics gives a confidence of 1 a bin of its own, and takes a softmax of everything where
    # rounding left a probability above 1.
    ece = multiclass_calibration_error(p.clamp_max(BELOW_ONE), labels, num_classes=K, n_bins=n_bins)
    return Metrics(
        rows=N,
        accuracy=accuracy,
        nll=float(nll_of_rows(p, labels).mean()),
        ece=float(ece),
        brier=float(brier_of_rows(p, labels).mean()),
        miscalibration=float(confidence.mean()) - accuracy,
        flip_ratio=flips,
        n_bins=n_bins,
    )


def nll_of_rows(probs: Tensor, labels: Tensor) -> Tensor:
    """Return -log p(label) [N] in nats, from probs [N, K] and labels [N]."""
    return -probs.gather(1, labels[:, None])[:, 0].clamp_min(PROBABILITY_FLOOR).log()


def brier_of_rows(probs: Tensor, labels: Tensor) -> Tensor:
    """Return the squared error summed over classes [N], from probs [N, K] and labels [N]."""
    return (probs - torch.nn.functional.one_hot(labels, probs.shape[1])).square().sum(-1)


def reliability(probs: Tensor, labels: Tensor, n_bins: int = BINS) -> ReliabilityBins:
    """Return the reliability diagram of probs [N, K] against labels [N]."""
    _check(probs, labels)
    confidence, prediction = probs.double().max(-1)
    bins = confidence_bins(confidence, n_bins)
    counts = bins.bincount(minlength=n_bins)

    def mean(values: Tensor) -> Tensor:
        return bins.bincount(values, minlength=n_bins) / counts.clamp_min(1)

    return ReliabilityBins(counts, mean((prediction == labels).double()), mean(confidence))


def confidence_bins(confidence: Tensor, n_bins: int = BINS) -> Tensor:
    """Return each confidence's bin of the ECE [N]: [edge, next edge), the last one closed.

    In float32, as torchmetrics has it: a confidence of 0.6 belongs to the bin that starts there.
    """
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float32)
    return (torch.bucketize(confidence.float(), edges, right=True) - 1).clamp(0, n_bins - 1)


def risk_coverage(uncertainty: Tensor, correct: Tensor) -> RiskCoverage:
    """Return the risk of answering only the least uncertain rows (El-Yaniv and Wiener 2010).

    Args:
        uncertainty: [N], on any scale.
        correct: [N] bool.

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
    N = len(correct)
    coverage = torch.arange(1, N + 1, dtype=torch.float64) / N
    return RiskCoverage(coverage, torch.from_numpy(risks(uncertainty.numpy(), ~correct.numpy())))


def risks(uncertainty: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Return the risk at each coverage of any number of sets of rows, all [..., N].

    The errors of rows of equal uncertainty are spread evenly over them: the mean over their orders.
    """
    order = uncertainty.argsort(-1)
    ranked = np.take_along_axis(uncertainty, order, -1)
    first = np.ones(ranked.shape, dtype=bool)  # of its group of equals
    first[..., 1:] = ranked[..., 1:] != ranked[..., :-1]
    group = first.cumsum() - 1
    errors = np.take_along_axis(wrong, order, -1).ravel()
    share = np.bincount(group, errors) / np.bincount(group)
    answered: np.ndarray = np.arange(1, ranked.shape[-1] + 1)
    return share[group].reshape(ranked.shape).cumsum(-1) / answered


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Return the chance that a positive scores above a negative; ties count half.

    Args:
        positive: scores [P].
        negative: scores [M].

    Raises:
        ValueError: either is empty or holds NaN.
    """
    for name, scores in (("positive", positive), ("negative", negative)):
        if not len(scores) or bool(scores.isnan().any()):
            raise ValueError(f"{name}: expected at least one score and no NaN")
    return float(aurocs(positive.numpy(), negative.numpy()))


def aurocs(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Return the AUROC of any number of sets of scores [..., P] and [..., M], from their ranks.

    torchmetrics would take scores outside [0, 1] for logits, and round their sigmoid.
    """
    P, M = positive.shape[-1], negative.shape[-1]
    ranks = rankdata(np.concatenate((positive, negative), axis=-1), axis=-1)
    u: np.ndarray = ranks[..., :P].sum(-1) - P * (P + 1) / 2
    return u / (P * M)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T of least NLL of mean_s softmax(logits_s / T).

    For one model it is that of Guo et al. 2017.

    Args:
        logits: [N, K], or of S draws [S, N, K]; log-probabilities will do; -inf where a row has no
            such class.
        labels: [N].

    Raises:
        ValueError: empty input, NaN, labels out of range, shapes.
    """
    scores = logits.double()[None] if logits.dim() == 2 else logits.double()
    _check(scores.softmax(-1).mean(0), labels)

    def nll(log_t: float) -> float:
        probs = (scores / math.exp(log_t)).softmax(-1).mean(0)
        return float(nll_of_rows(probs, labels).mean())

    found = minimize_scalar(nll, bounds=LOG_TEMPERATURE_BOUNDS, method="bounded")
    return math.exp(float(found.x))


def apply_temperature(log_probs: Tensor, temperature: float) -> Tensor:
    """Return softmax(log_probs / temperature), [N, K]."""
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
