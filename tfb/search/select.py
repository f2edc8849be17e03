"""Where the answer lies: two levels of one parallel grid, or a bisection, and two rules.

The rules: the least of an objective, or the largest sigma that the tolerance accepts. Level 1 is
nine sigmas on part of the anchors, level 2 five around its answer on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from tfb.evaluation.compare import mean_limits, percentile_limits
from tfb.search.loss import LossMatrix, standard_error
from tfb.search.result import SearchError

COARSE, FINE = 9, 5  # sigmas of the two levels
SHARE, FEWEST = 4, 64  # level 1 sees a quarter of the anchors, at least so many
EXTENSIONS = (2, 16)  # most of each level: to 10^3 and 10^-7 by default, and by a factor of 100
RESOLUTION = 0.01  # of a bisection: far below the width of any interval
SIGNIFICANT = 0.05  # level of the test that accuracy has fallen

Measure = Callable[[list[float], Tensor | None], LossMatrix]
Limits = tuple[float, float | None]


class Rule(Protocol):
    """What is looked for."""

    def end(self, matrix: LossMatrix, first: bool) -> int:
        """Return 0 where the points hold the answer, -1 or 1 where it lies below or above them."""

    def centre(self, matrix: LossMatrix) -> float:
        """Return the sigma > 0 around which all anchors are to be measured."""

    def limits(self, matrix: LossMatrix, seen: LossMatrix | None) -> Limits:
        """Return 95 % limits of sigma over anchors; an upper None: beyond what was measured.

        Where resamples reach the last sigma of level 2, ``seen``, level 1, may tell an end.
        """


@dataclass(frozen=True)
class Least:
    """The point of least l + penalty.

    Attributes:
        penalty: of a sigma; infinite at 0 for gvi.
        guarded: leave out points whose accuracy is significantly below the adapter's.
        margin: relative change of the loss that matters: noise costs passes, and has to gain more.
    """

    penalty: Callable[[float], float]
    guarded: bool
    margin: float

    def offsets(self, matrix: LossMatrix, *, guarded: bool = True) -> Tensor:
        """Return what is added to the mean losses, [G]; infinite where none may be chosen."""
        least = self.margin * abs(matrix.still)
        found = [self.penalty(sigma) + (least if sigma else 0.0) for sigma, _ in matrix.points]
        if self.guarded and guarded:
            found = [math.inf if less_accurate(matrix, g) else v for g, v in enumerate(found)]
        return torch.tensor(found, dtype=torch.float64)

    def best(self, matrix: LossMatrix, *, guarded: bool = True) -> int:
        """Return the number of the point."""
        return int((matrix.means + self.offsets(matrix, guarded=guarded)).argmin())

    def end(self, matrix: LossMatrix, first: bool) -> int:
        """Look further where the least is at an end of what was measured."""
        sigma = float(matrix.sigmas[self.best(matrix)])
        positive = matrix.sigmas[matrix.sigmas > 0]
        if sigma == positive.max():
            return 1
        if sigma > 0 or not first:
            return -1 if sigma == positive.min() else 0
        # Where even the smallest sigma seen hurts, a smaller one may help.
        least = float(matrix.means[matrix.sigmas == positive.min()])
        return -1 if least - matrix.still > self.margin * abs(matrix.still) else 0

    def centre(self, matrix: LossMatrix) -> float:
        """Return the best sigma; where it is 0, the one that is the least surely worse."""
        if sigma := float(matrix.sigmas[self.best(matrix)]):
            return sigma
        values = (matrix.means + self.offsets(matrix)).tolist()
        positive = [g for g, (sigma, _) in enumerate(matrix.points) if sigma > 0]
        return matrix.points[min(positive, key=lambda g: values[g] - matrix.standard_error(g))][0]

    def limits(self, matrix: LossMatrix, seen: LossMatrix | None = None) -> Limits:
        """Return where the least lies in 95 % of resamples of the anchors."""
        losses, sigmas = matrix.losses.numpy(), matrix.sigmas.numpy()
        offsets = self.offsets(matrix).numpy()

        def least(rows: np.ndarray, axis: int) -> np.ndarray:
            means = np.moveaxis(losses[:, rows].mean(-1), 0, -1)
            return sigmas[(means + offsets).argmin(-1)][None]

        [(low, high)] = percentile_limits(least, losses.shape[1])
        positive = sigmas[sigmas > 0]
        # At the least sigma that was measured it may as well be smaller.
        low = 0.0 if low <= positive.min() else low
        if high < positive.max():
            return low, high
        return low, None if seen is None else _worse(seen, high, seen.losses[self.best(seen)], 0.0)


@dataclass(frozen=True)
class Crossing:
    """The largest sigma connected to 0 whose degradation is within the tolerance.

    Between measured sigmas the loss is linear in sigma^2, as antithetic pairs leave it to leading
    order: their average has no odd terms of the noise.

    Attributes:
        allowed: the change of loss allowed at mean losses l(0), an array.
        two_sided: an improvement counts as degradation too.
    """

    allowed: Callable[[np.ndarray], np.ndarray]
    two_sided: bool

    def find(self, sigmas: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return crossings [...] of mean losses [..., G] at ascending sigmas, 0 first.

        Also the place among ``sigmas`` of the violation behind each; G: none violates, and the
        crossing is the last sigma.
        """
        change = means - means[..., :1]
        excess = (abs(change) if self.two_sided else change) - self.allowed(means[..., :1])
        violates = excess > 0
        G = len(sigmas)
        place = np.where(violates.any(-1), violates.argmax(-1), G)
        high = np.minimum(place, G - 1)
        b = np.take_along_axis(excess, high[..., None], -1)[..., 0]
        a = np.take_along_axis(excess, high[..., None] - 1, -1)[..., 0]
        x, y = sigmas[high - 1] ** 2, sigmas[high] ** 2
        share = np.where(place < G, -a / np.where(b > a, b - a, 1.0), 1.0)
        return np.sqrt(x + share * (y - x)), place

    def crossing(self, matrix: LossMatrix) -> tuple[float, int]:
        """Return the crossing, and the number of the violation behind it."""
        sigma, place = self.find(matrix.sigmas.numpy(), matrix.means.numpy())
        return float(sigma), int(place)

    def end(self, matrix: LossMatrix, first: bool) -> int:
        """Look further where no sigma violates, or none is accepted."""
        _, place = self.crossing(matrix)
        return 1 if place == len(matrix.points) else -1 if place == 1 else 0

    def centre(self, matrix: LossMatrix) -> float:
        """Return the crossing."""
        return self.crossing(matrix)[0]

    def limits(self, matrix: LossMatrix, seen: LossMatrix | None = None) -> Limits:
        """Return where the crossing lies in 95 % of resamples of the anchors."""
        losses, sigmas = matrix.losses.numpy(), matrix.sigmas.numpy()

        def crossing(rows: np.ndarray, axis: int) -> np.ndarray:
            return self.find(sigmas, np.moveaxis(losses[:, rows].mean(-1), 0, -1))[0][None]

        [(low, high)] = percentile_limits(crossing, losses.shape[1])
        if high < sigmas[-1]:
            return low, high
        if seen is None:
            return low, None
        return low, _worse(seen, high, seen.losses[0], self.allowed(seen.means[:1].numpy()).item())


def _worse(seen: LossMatrix, edge: float, reference: Tensor, allowed: float) -> float | None:
    """Return the first sigma beyond ``edge`` that is worse by two standard errors, or None."""
    for sigma, losses in zip(seen.sigmas.tolist(), seen.losses, strict=True):
        change = losses - reference
        if sigma > 1.01 * edge and float(change.mean()) - allowed > 2 * standard_error(change):
            return float(sigma)
    return None


def less_accurate(matrix: LossMatrix, g: int) -> bool:
    """Whether point g is right significantly less often than the adapter (McNemar, one-sided)."""
    if matrix.correct is None:
        return False
    before, after = matrix.correct[0], matrix.correct[g]
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    if lost <= gained:
        return False
    return bool(binomtest(lost, lost + gained, alternative="greater").pvalue < SIGNIFICANT)


def geometric(low: float, high: float, points: int) -> list[float]:
    """Return a geometric grid; its ends are exact, so that they are not measured twice."""
    inner = np.geomspace(low, high, points)[1:-1].tolist()
    return [low, *inner, high]


def by_grid(
    measure: Measure, rule: Rule, part: Tensor, bounds: tuple[float, float]
) -> tuple[LossMatrix, LossMatrix]:
    """Measure both levels; return their matrices.

    Args:
        measure: measures sigmas on some anchors, or (None) on all.
        rule: what is looked for.
        part: the anchors of level 1.
        bounds: the first range.

    Raises:
        SearchError: no range that was tried holds the answer.
    """
    low, high = bounds
    ratio = high / low

    def further(edge: float, side: int) -> list[float]:
        if side < 0:
            return geometric(edge / ratio, edge, COARSE)[:-1]
        return geometric(edge, edge * ratio, COARSE)[1:]

    seen = _extended(measure, rule, part, geometric(low, high, COARSE), further, first=True)
    step = ratio ** (1 / (COARSE - 1))
    centre = rule.centre(seen)
    fine = geometric(centre / step, centre * step, FINE)
    whole = _extended(
        measure,
        rule,
        None,
        fine,
        lambda edge, side: [edge * step ** (side / 2)],
        first=False,
    )
    return seen, whole


def _extended(
    measure: Measure,
    rule: Rule,
    rows: Tensor | None,
    sigmas: list[float],
    further: Callable[[float, int], list[float]],
    *,
    first: bool,
    below: bool = True,
) -> LossMatrix:
    """Measure sigmas, and ``further`` ones beyond the end at which the answer lies."""
    matrix = measure(sigmas, rows)
    most = EXTENSIONS[0 if first else 1]
    for extensions in range(most + 1):
        side = rule.end(matrix, first)
        if side == 0 or (side < 0 and not below):
            return matrix
        positive = matrix.sigmas[matrix.sigmas > 0]
        edge = float(positive.min() if side < 0 else positive.max())
        if extensions < most:
            matrix = matrix.join(measure(further(edge, side), rows))
    raise _unbracketed(matrix)


def _unbracketed(matrix: LossMatrix) -> SearchError:
    """Say that no sigma that was tried is the answer."""
    positive = matrix.sigmas > 0
    sigmas, means = matrix.sigmas[positive].tolist(), matrix.means[positive].tolist()
    return SearchError(
        f"unbracketed: from sigma={sigmas[0]:.3g} to {sigmas[-1]:.3g} the loss goes from "
        f"{means[0]:.4g} to {means[-1]:.4g}, and the adapter has "
        f"{float(matrix.means[0]):.4g}; the anchors hardly respond to noise, or the tolerance does "
        "not fit: change it or bounds"
    )


def by_bisection(measure: Measure, rule: Crossing, high: float, steps: int) -> LossMatrix:
    """Halve a bracket of the crossing, on all anchors; return what was measured.

    Raises:
        SearchError: nothing up to 4^4 times ``high`` violates, or nothing down to it / 2^steps is
            accepted.
    """
    matrix = _extended(
        measure, rule, None, [high], lambda edge, _: [4 * edge], first=False, below=False
    )
    for _ in range(steps):
        _, place = rule.crossing(matrix)
        below, above = matrix.sigmas[place - 1 : place + 1].tolist()
        if below > 0 and above / below - 1 <= RESOLUTION:
            break
        matrix = matrix.join(measure([(below + above) / 2], None))
    if rule.end(matrix, first=False) < 0:
        raise _unbracketed(matrix)
    return matrix


def change_limits(matrix: LossMatrix, g: int) -> tuple[float, float] | None:
    """Return 95 % limits of the change of the mean loss from the adapter to point g."""
    change = (matrix.losses[g] - matrix.losses[0]).numpy()
    if len(change) == 1:
        return None
    return mean_limits(change)


def part_of(anchors: int, seed: int) -> Tensor:
    """Return the anchors of level 1, ascending: a random quarter, at least ``FEWEST``."""
    generator = torch.Generator().manual_seed(seed)
    count = min(anchors, max(math.ceil(anchors / SHARE), FEWEST))
    return torch.randperm(anchors, generator=generator)[:count].sort().values
