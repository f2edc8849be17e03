"""The sigma search: the largest posterior scale that the anchors tolerate (TFB, section 3.3).

    max_variance   the largest sigma, connected to 0, with l(sigma) - l(0) <= tolerance
    min_nll        the sigma of least loss (for held-out anchors)
    gvi            the sigma of least l(sigma) + lambda KL(q || p) (Theorem 4.2)

Only a worse loss counts as degradation unless ``two_sided``. All sigmas share antithetic streams
(common random numbers), without which the curve is not even monotone. ``grid`` sweeps a geometric
grid in batched passes, brackets the crossing, refines inside it, interpolates linearly and
measures the result; ``bisection`` halves. A range that does not bracket is extended, and an error
after that; the answer is always a sigma that was measured and accepted, never a bound.

To add an objective: a branch in ``_Search.run`` and its rule below; a metric: :mod:`tfb.anchor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from tfb.anchor import METRICS, AnchorLoss, AnchorSet
from tfb.engine import BayesianModel
from tfb.posterior import default_prior_sigma

OBJECTIVES = ("max_variance", "min_nll", "gvi")
SEARCHES = ("grid", "bisection")
NLL_FLOOR = 0.01  # nats: below this a relative tolerance on the NLL is ill-conditioned
MAX_EXTENSIONS = 4
MIN_RESOLUTION = 1e-9  # a bracket cannot be narrower than a few ulp
SIGMA_LIMITS = (1e-8, 1e4)
DEFAULT_BOUNDS = (1e-3, 0.1)
REFERENCE_BOUNDS = (1e-3, 0.015)  # the published runs: low is fixed, high is --bayes-beta


class SearchError(ValueError):
    """The search has no answer to give; the message says why and what to change."""


@dataclass(frozen=True)
class CurvePoint:
    """One measured sigma.

    Attributes:
        loss: mean over anchors. standard_error: of its paired difference to sigma = 0, over
            anchors. draw_standard_error: jackknife over streams (NaN: one stream only).
    """

    sigma: float
    loss: float
    standard_error: float
    draw_standard_error: float


@dataclass(frozen=True)
class SigmaFit:
    """What a search found and how; JSON-serialisable through ``to_dict``.

    Attributes:
        sigma: the answer (also set on the model). 0 when no variance is best (min_nll).
        curve: every measured point, sigma = 0 first, ascending.
        baseline: l(0). limit: the largest accepted loss (max_variance), else None.
        passes: forward passes over the anchors, the deterministic one included.
        stopped: why it stopped. notes: doubts worth reading.
        kl, prior_sigma: KL(q || p) in nats at sigma and the prior's scale; None at sigma = 0.
        implied_lambda: -l'(sigma) / KL'(sigma), the lambda for which this sigma solves GVI
            (Theorem 4.2; 1 / anchors is ordinary variational inference).
    """

    sigma: float
    metric: str
    objective: str
    tolerance: float
    relative: bool
    two_sided: bool
    search: str
    mode: str
    draws: int
    seed: int
    anchors: int
    anchor_hash: str
    baseline: float
    limit: float | None
    curve: tuple[CurvePoint, ...]
    passes: float
    stopped: str
    compat: str | None = None
    tail: int | None = None
    prior_sigma: float | None = None
    kl: float | None = None
    implied_lambda: float | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; NaN becomes None."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(v) for v in value]
            return None if isinstance(value, float) and math.isnan(value) else value

        return {str(k): plain(v) for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SigmaFit:
        """The inverse of ``to_dict``."""
        points = [
            CurvePoint(**{k: float("nan") if v is None else v for k, v in p.items()})
            for p in data["curve"]
        ]
        return cls(**{**data, "curve": tuple(points), "notes": tuple(data.get("notes", ()))})


def fit_sigma(
    bayes: BayesianModel,
    anchors: Any,
    metric: str = "nll",
    tolerance: float = 0.003,
    search: str = "grid",
    *,
    objective: str = "max_variance",
    relative: bool = True,
    two_sided: bool | None = None,
    draws: int = 10,
    bounds: tuple[float, float] | None = None,
    points: int = 8,
    resolution: float = 0.01,
    steps: int = 12,
    prior_sigma: float | None = None,
    kl_weight: float | None = None,
    seed: int | None = None,
    batch_size: int = 50,
    mode: str | None = None,
    tail: int | None = None,
    compat: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> SigmaFit:
    """Search sigma on anchors and set ``bayes.sigma``, ``bayes.mode`` and ``bayes.tail``.

    Args:
        bayes: the model. anchors: an :class:`AnchorSet`, encoded rows, or batches (dicts of
            tokenizer tensors with "labels" and, for causal LMs, "label_ids").
        metric: "nll" (labels), "accuracy" (labels; the loss is the error rate), "pseudo_nll" (the
            deterministic prediction as label), "embedding_norm" (no labels; always two-sided).
        tolerance: accepted degradation; ``relative`` to l(0) (for accuracy: to the accuracy),
            with a floor of 0.01 nats under a relative NLL, or absolute in the loss's units.
        search: "grid" or "bisection" (max_variance only). draws: antithetic draws per sigma.
        objective: see the head of this file. two_sided: also count an improved loss as change.
        bounds: the first range of sigma, default (0.001, 0.1), extended by itself (compat: the
            scripts' fixed range, default (0.001, 0.015)). points: grid size. resolution:
            relative width at which refinement stops. steps: most bisection steps.
        prior_sigma: the prior's scale for KL; default: the adapter's own scale
            (:func:`tfb.posterior.default_prior_sigma`). kl_weight: lambda of gvi, default 1 / N.
        mode, tail: how draws reach the model, in the search as in later predictions ("full";
            "tail" with k positions, see :meth:`BayesianModel.predict`); default: the model's own.
        seed: default ``bayes.seed``. compat: "reference" follows the authors' scripts to the
            letter, mistakes included (see :func:`reference_rule`), for differential tests.
        progress: called with finished rows x draws.

    Returns:
        :class:`SigmaFit`.

    Raises:
        ValueError: arguments out of range, empty, unlabelled or one-class anchors.
        SearchError: nothing brackets the tolerance, also in the extended range.
    """
    if bounds is None:
        bounds = REFERENCE_BOUNDS if compat == "reference" else DEFAULT_BOUNDS
    check_arguments(metric, tolerance, search, objective, draws, bounds, points, compat)
    if not MIN_RESOLUTION <= resolution < 1:
        raise ValueError(f"resolution={resolution}: expected {MIN_RESOLUTION:g} to 1")
    for name, value in (("steps", steps), ("prior_sigma", prior_sigma), ("kl_weight", kl_weight)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: expected a positive number")
    pad = getattr(bayes.base.config, "pad_token_id", None) or 0
    anchor_set = AnchorSet.of(anchors, pad_token_id=pad, batch_size=batch_size)
    seed = bayes.seed if seed is None else seed
    before = bayes.mode, bayes.tail
    if mode is not None or tail is not None:
        bayes.set_mode(bayes.mode if mode is None else mode, tail)
    try:
        if metric == "embedding_norm" and bayes.mode != "full":
            raise ValueError(f"metric='embedding_norm' needs mode='full', not {bayes.mode!r}")
        if compat == "reference":
            loss = AnchorLoss(
                bayes, anchor_set, "pseudo_nll", draws=draws, seed=seed, noise="token",
                progress=progress, additive_floor=True,
            )  # fmt: skip
            fit = reference_rule(loss, bayes, tolerance=tolerance, lower=bounds[0], upper=bounds[1])
        else:
            loss = AnchorLoss(bayes, anchor_set, metric, draws=draws, seed=seed, progress=progress)
            run = _Search(
                loss=loss,
                bayes=bayes,
                metric=metric,
                tolerance=tolerance,
                relative=relative,
                two_sided=metric == "embedding_norm" if two_sided is None else two_sided,
                bounds=bounds,
                points=points,
                resolution=resolution,
                steps=steps,
                prior_sigma=prior_sigma or default_prior_sigma(list(bayes.posteriors.values())),
                kl_weight=kl_weight if kl_weight is not None else 1.0 / len(anchor_set),
            )
            fit = run.run(objective, search)
    except BaseException:
        bayes.mode, bayes.tail = before  # a sigma of an earlier search belongs to that mode
        raise
    bayes.sigma = fit.sigma
    return fit


def check_arguments(
    metric: str,
    tolerance: float,
    search: str,
    objective: str,
    draws: int,
    bounds: tuple[float, float] = DEFAULT_BOUNDS,
    points: int = 8,
    compat: str | None = None,
) -> None:
    """Refuse what no search can work with; needs no model, so the CLI asks before it loads one."""
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: expected one of {', '.join(METRICS)}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}: expected one of {', '.join(OBJECTIVES)}")
    if search not in SEARCHES:
        raise ValueError(f"search={search!r}: expected one of {', '.join(SEARCHES)}")
    if compat not in (None, "reference"):
        raise ValueError(f"compat={compat!r}: expected None or 'reference'")
    if objective != "max_variance" and search != "grid":
        raise ValueError(f"objective={objective!r} is a minimisation: use search='grid'")
    if objective in ("min_nll", "gvi") and metric not in ("nll", "pseudo_nll"):
        raise ValueError(f"objective={objective!r} needs metric='nll' (or 'pseudo_nll')")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance={tolerance}: expected a positive number")
    if draws < 2 or draws % 2:
        raise ValueError(f"draws={draws}: the search uses antithetic pairs, pass an even number")
    if not 0 < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"bounds={bounds}: expected 0 < lower < upper")
    if points < 3:
        raise ValueError(f"points={points}: a grid needs at least 3")


@dataclass
class _Search:
    """State of one search: the measured curve grows, nothing is measured twice."""

    loss: AnchorLoss
    bayes: BayesianModel
    metric: str
    tolerance: float
    relative: bool
    two_sided: bool
    bounds: tuple[float, float]
    points: int
    resolution: float
    steps: int
    prior_sigma: float
    kl_weight: float

    def __post_init__(self) -> None:
        base = self.loss.baseline
        self.baseline = float(base.mean())
        self.curve: dict[float, CurvePoint] = {0.0: CurvePoint(0.0, self.baseline, 0.0, 0.0)}
        scale = {"accuracy": 1.0 - self.baseline, "embedding_norm": self.baseline}.get(
            self.metric, max(self.baseline, NLL_FLOOR)
        )
        self.allowed = self.tolerance * scale if self.relative else self.tolerance

    # --- measuring ------------------------------------------------------------------------------

    def measure(self, sigmas: Sequence[float]) -> None:
        new = [s for s in dict.fromkeys(sigmas) if s not in self.curve]
        if not new:
            return
        table = self.loss(new)
        paired = table.rows - self.loss.baseline
        N = paired.shape[1]
        error = paired.std(1) / N**0.5 if N > 1 else torch.full((len(new),), math.nan)
        for g, sigma in enumerate(new):
            self.curve[sigma] = CurvePoint(
                sigma,
                float(table.rows[g].mean()),
                float(error[g]),
                float(table.draw_standard_error[g]),
            )

    def excess(self, sigma: float) -> float:
        """Degradation beyond what is allowed; <= 0 is accepted."""
        change = self.curve[sigma].loss - self.baseline
        return (abs(change) if self.two_sided else change) - self.allowed

    def crossing(self) -> tuple[float, float | None]:
        """(largest accepted sigma connected to 0, next measured sigma: a violation, or None)."""
        accepted = 0.0
        for sigma in sorted(self.curve):
            if self.excess(sigma) > 0:
                return accepted, sigma
            accepted = sigma
        return accepted, None

    # --- objectives -----------------------------------------------------------------------------

    def run(self, objective: str, search: str) -> SigmaFit:
        if objective == "max_variance":
            sigma, stopped = self._grid() if search == "grid" else self._bisection()
        else:
            sigma, stopped = self._minimise(self._objective(objective))
        fit = SigmaFit(
            sigma=sigma,
            metric=self.metric,
            objective=objective,
            tolerance=self.tolerance,
            relative=self.relative,
            two_sided=self.two_sided,
            search=search,
            mode=self.bayes.mode,
            tail=self.bayes.tail,
            draws=self.loss.n,
            seed=self.loss.seed,
            anchors=len(self.loss.anchors),
            anchor_hash=self.loss.anchors.content_hash,
            baseline=self.baseline,
            limit=self.baseline + self.allowed if objective == "max_variance" else None,
            curve=tuple(self.curve[s] for s in sorted(self.curve)),
            passes=self.loss.passes,
            stopped=stopped,
        )
        return replace(
            fit, notes=_notes(fit, self.allowed), **_variational(fit, self.bayes, self.prior_sigma)
        )

    def _bracket(self) -> tuple[float, float]:
        """Extend the range until it holds an accepted sigma > 0 and a violation."""
        low, high = self.bounds
        for _ in range(MAX_EXTENSIONS + 1):
            accepted, violating = self.crossing()
            if violating is None:
                low, high = high, min(high * 8, SIGMA_LIMITS[1])
            elif accepted == 0.0:
                low, high = max(low / 32, SIGMA_LIMITS[0]), min(violating, low)
            else:
                return accepted, violating
            if low >= high:  # both at a limit
                break
            self.measure(_geometric(low, high, self.points))
        accepted, violating = self.crossing()
        if violating is None:
            raise SearchError(
                f"unbracketed: even sigma={accepted:g} changes the loss by less than the "
                f"tolerance ({self.allowed:.3g}); the anchors do not respond to the adapter's "
                "noise, or the tolerance is too large"
            )
        if accepted == 0.0:
            raise SearchError(
                f"unbracketed: even sigma={violating:g} worsens the loss by "
                f"{self.curve[violating].loss - self.baseline:.3g}, more than the "
                f"{self.allowed:.3g} allowed; raise the tolerance or use more anchors"
            )
        return accepted, violating

    def _grid(self) -> tuple[float, str]:
        self.measure(_geometric(*self.bounds, self.points))
        low, high = self._bracket()
        while high / low - 1 > self.resolution:
            if high / low - 1 <= self.resolution * 8:
                a, b = self.excess(low), self.excess(high)
                sigma = low + (high - low) * (-a / (b - a))
                self.measure([sigma])
                if self.excess(sigma) <= 0:
                    where = f"[{low:.6g}, {high:.6g}]"
                    return sigma, f"crossing bracketed in {where}, linear interpolation, measured"
                high = sigma  # a concave or stepped curve: the chord overshoots
            # Linear inside the bracket: a few points at once, one batched pass.
            inner = max(2, self.points // 3)
            width = (high - low) / (inner + 1)
            self.measure([low + width * (i + 1) for i in range(inner)])
            low, high = self.crossing()  # type: ignore[assignment]
        return low, f"bracket [{low:.6g}, {high:.6g}] within resolution"

    def _bisection(self) -> tuple[float, str]:
        self.measure([self.bounds[1]])
        low, high = 0.0, self.bounds[1]
        extensions = 0
        while self.excess(high) <= 0:
            if extensions == MAX_EXTENSIONS:
                low, high = self._bracket()  # reaches further, or raises
                break
            low, high = high, high * 4
            extensions += 1
            self.measure([high])
        for step in range(self.steps):
            if low > 0 and high / low - 1 <= self.resolution:
                return low, f"bracket [{low:.6g}, {high:.6g}] within resolution, {step} steps"
            middle = (low + high) / 2
            self.measure([middle])
            low, high = (middle, high) if self.excess(middle) <= 0 else (low, middle)
        if low == 0.0:
            raise SearchError(
                f"unbracketed: no sigma down to {high:.3g} was accepted in {self.steps} steps; "
                "lower bounds[1], raise steps or the tolerance"
            )
        return low, f"{self.steps} steps; largest accepted, violated at {high:.6g}"

    def _objective(self, objective: str) -> Callable[[float], float]:
        if objective == "min_nll":
            return lambda sigma: self.curve[sigma].loss
        posteriors = self.bayes.posteriors.values()

        def gvi(sigma: float) -> float:
            if sigma == 0.0:
                return math.inf  # KL diverges
            kl = sum(p.kl(sigma, self.prior_sigma) for p in posteriors)
            return self.curve[sigma].loss + self.kl_weight * kl

        return gvi

    def _minimise(self, value: Callable[[float], float]) -> tuple[float, str]:
        self.measure(_geometric(*self.bounds, self.points))
        for _ in range(MAX_EXTENSIONS):
            best, lowest = min(self.curve, key=value), min(s for s in self.curve if s > 0)
            if best == max(self.curve):
                self.measure([best * f for f in (2.0, 4.0)])
            elif best == 0.0 and self.excess(lowest) > 0:
                # Already past the tolerance at the lower end: an improvement may lie below it.
                self.measure([lowest / 8])
            else:
                break
        best = min(self.curve, key=value)
        if best == max(self.curve):
            raise SearchError(
                f"unbracketed: the objective still falls at sigma={best:g}; widen bounds"
            )
        if best == 0.0:
            return 0.0, "no sigma measured has a lower loss than the deterministic adapter"
        while True:
            order = sorted(self.curve)
            i = order.index(best)
            left, right = order[i - 1], order[i + 1]
            if right / max(left, 1e-300) - 1 <= max(self.resolution * 8, 0.25):
                return best, f"least measured value, neighbours {left:.6g} and {right:.6g}"
            if left == 0.0 and best / 8 < SIGMA_LIMITS[0]:
                return best, "least measured value"
            self.measure([(left or best / 2 + best / 4) ** 0.5 * best**0.5,
                          (best * right) ** 0.5])  # fmt: skip
            if left == 0.0:
                self.measure([best / 2])
            best = min(self.curve, key=value)
            if best == 0.0:
                return 0.0, "no sigma measured has a lower loss than the deterministic adapter"


def _geometric(low: float, high: float, points: int) -> list[float]:
    """A geometric grid whose ends are ``low`` and ``high`` to the bit, so that no end of an
    extended range is measured twice."""
    inner = torch.logspace(math.log10(low), math.log10(high), points, dtype=torch.float64)
    return [low, *inner[1:-1].tolist(), high]


def _notes(fit: SigmaFit, allowed: float) -> tuple[str, ...]:
    """Doubts that the numbers raise."""
    notes = []
    near = [p for p in fit.curve if p.sigma > 0]
    if near and fit.objective == "max_variance":
        at = min(near, key=lambda p: abs(p.sigma - fit.sigma))
        if at.standard_error > allowed:
            notes.append(
                f"the tolerance ({allowed:.3g}) is below one standard error over anchors "
                f"({at.standard_error:.3g}) at sigma: use more anchors for a sharper answer"
            )
        inside = [p for p in near if p.sigma <= fit.sigma]
        if any(b.loss < a.loss for a, b in pairwise(near)):
            notes.append("the loss is not monotone in sigma")
        if inside and min(p.loss for p in inside) < fit.baseline - 2 * at.standard_error:
            notes.append(
                "the loss first falls below the deterministic one: objective='min_nll' would stop "
                "at its least value"
            )
    if fit.sigma == 0.0:
        notes.append("variance does not help on these anchors")
    return tuple(notes)


def _variational(fit: SigmaFit, bayes: BayesianModel, prior_sigma: float) -> dict[str, Any]:
    """KL and implied lambda at the answer (Theorem 4.2)."""
    if fit.sigma <= 0.0:
        return {"prior_sigma": prior_sigma}
    posteriors = list(bayes.posteriors.values())
    entries = sum(p.effective_rank * p.in_features for p in posteriors)
    slope_kl = entries * (fit.sigma / prior_sigma**2 - 1.0 / fit.sigma)
    # The answer's neighbours on the curve: a difference across it, not to one side. Objectives
    # all end with a measured point beyond the answer.
    a = max((p for p in fit.curve if p.sigma < fit.sigma), key=lambda p: p.sigma)
    b = min((p for p in fit.curve if p.sigma > fit.sigma), key=lambda p: p.sigma)
    slope_loss = (b.loss - a.loss) / (b.sigma - a.sigma)
    return {
        "prior_sigma": prior_sigma,
        "kl": sum(p.kl(fit.sigma, prior_sigma) for p in posteriors),
        "implied_lambda": -slope_loss / slope_kl if slope_kl != 0.0 else None,
    }


def reference_rule(
    loss: AnchorLoss,
    bayes: BayesianModel,
    *,
    tolerance: float,
    lower: float,
    upper: float,
    steps: int = 5,
) -> SigmaFit:
    """The bisection of the authors' scripts, mistakes included; for differential tests.

    Pseudo-labels; |change| / l(0) divided by the number of anchors once more; fresh iid noise at
    every step; the answer is the smallest sigma that violated, or ``upper`` if none did. Their
    noise is Flipout, whose marginals are those of token noise, used here.
    """
    base = float(loss.baseline.mean())
    N = len(loss.anchors)
    curve = [CurvePoint(0.0, base, 0.0, 0.0)]
    low, high, best = lower, upper, upper
    for step in range(steps):
        middle = (low + high) / 2
        table = loss([middle], antithetic=False, first_stream=step * loss.n)
        value = float(table.rows.mean())
        paired = table.rows[0] - loss.baseline
        curve.append(
            CurvePoint(
                middle, value, float(paired.std() / N**0.5), float(table.draw_standard_error[0])
            )
        )
        if abs(value - base) / base / N > tolerance:
            best = high = middle
        else:
            low = middle
    return SigmaFit(
        sigma=best,
        metric="pseudo_nll",
        objective="max_variance",
        tolerance=tolerance,
        relative=True,
        two_sided=True,
        search="bisection",
        mode=bayes.mode,
        tail=bayes.tail,
        draws=loss.n,
        seed=loss.seed,
        anchors=N,
        anchor_hash=loss.anchors.content_hash,
        baseline=base,
        limit=base + tolerance * N * base,
        curve=tuple(sorted(curve, key=lambda p: p.sigma)),
        passes=loss.passes,
        stopped="upper bound: nothing violated" if best == upper else "smallest violating sigma",
        compat="reference",
    )
