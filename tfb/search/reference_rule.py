"""The sigma search of the authors' scripts, mistakes included; for differential tests."""

from __future__ import annotations

from tfb.model import BayesianModel
from tfb.search.loss import AnchorLoss
from tfb.search.result import CurvePoint, SigmaFit

REFERENCE_BOUNDS = (1e-3, 0.015)  # the published runs: low is fixed, high is --bayes-beta


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
        family=bayes.family,
    )
