"""The loss as a function of sigma, measured progressively.

Anchors are taken in a seeded order, in blocks that grow, until a sigma's paired difference to
sigma = 0 tells accepted from violating. What a part of them says is corrected by sigmas measured on
all, which show how that part differs (a control variate, linear in sigma^2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from scipy import stats
from torch import Tensor

from tfb.search.loss import AnchorLoss, jackknife_error
from tfb.search.result import CurvePoint

LIKELIHOODS = ("nll", "pseudo_nll", "expected_nll")
NLL_FLOOR = 0.01  # nats: below this a relative tolerance on the NLL is ill-conditioned
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the anchors, cumulative
FEWEST = 16  # rows in the first block: fewer say little about their own spread
HIDING = 1.6  # ratio of two sigmas that make one in between unnecessary
FARTHEST = 1.5  # times the correction at the last sigma: it says little of those far beyond
SURE = 3.3  # standard errors, for a corrected value
DECIDED = 0.001  # two-sided level at which a part of the anchors decides


def standard_error(rows: Tensor, of_one: float = math.inf) -> float:
    """Return the standard error of a mean over rows."""
    return float(rows.std()) / len(rows) ** 0.5 if len(rows) > 1 else of_one


@dataclass
class Point:
    """A sigma's losses [N], NaN where not measured, and their mean without each stream [U]."""

    rows: Tensor
    left_out: Tensor
    count: int = 0


@dataclass
class LossCurve:
    """The measured curve, by sigma, and what the tolerance says of it."""

    loss: AnchorLoss
    metric: str
    tolerance: float
    relative: bool
    two_sided: bool
    points: dict[float, Point] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.N = len(self.loss.anchors)
        generator = torch.Generator().manual_seed(self.loss.config.seed)
        self.order = torch.randperm(self.N, generator=generator)
        sizes = [min(self.N, max(math.ceil(self.N * s), FEWEST)) for s in SHARES]
        self.blocks = list(dict.fromkeys(sizes))  # cumulative counts

    def measure(self, sigmas: Sequence[float], share: float = 1.0) -> None:
        """Measure sigmas on all anchors, or on a ``share`` of them (at least the first block)."""
        self._reach(sigmas, self._up_to(share)[-1])

    def measure_further(self, sigmas: Sequence[float]) -> None:
        """Measure sigmas on the next block for the least known of them."""
        known = min(self._count(s) for s in sigmas)
        self._reach(sigmas, min(b for b in self.blocks if b > known))

    def _reach(self, sigmas: Sequence[float], target: int) -> None:
        """Measure sigmas on the first ``target`` anchors of the order."""
        wanted = [s for s in dict.fromkeys(sigmas) if self._count(s) < target]
        # Sigmas begun on the same part go on together, the least known first: in tail mode that
        # sweep finds the losses at sigma = 0 for the others.
        for count in sorted({self._count(s) for s in wanted}):
            self._extend([s for s in wanted if self._count(s) == count], count, target)

    def decide(self, sigmas: Sequence[float], share: float = 1.0) -> None:
        """Measure sigmas on as many anchors as their decision takes, at most a ``share``."""
        for count in self._up_to(share):
            self._reach([s for s in sigmas if not (self._count(s) and self.decided(s))], count)

    def _up_to(self, share: float) -> list[int]:
        """Return the blocks within a share of the anchors, at least the first."""
        return [b for b in self.blocks if b <= max(self.blocks[0], math.ceil(share * self.N))]

    def _count(self, sigma: float) -> int:
        if sigma == 0.0:
            return self.N
        return self.points[sigma].count if sigma in self.points else 0

    def _extend(self, sigmas: list[float], start: int, stop: int) -> None:
        rows = self.order[start:stop].sort().values
        table = self.loss(sigmas, rows=None if stop - start == self.N else rows)
        for g, sigma in enumerate(sigmas):
            nothing = torch.full((self.N,), math.nan, dtype=torch.float64)
            unknown = torch.zeros(self.streams, dtype=torch.float64)
            point = self.points.setdefault(sigma, Point(nothing, unknown))
            point.rows[rows] = table.rows[g]
            old = start / stop
            point.left_out = point.left_out * old + table.left_out[g] * (1 - old)
            point.count = stop

    @property
    def baseline(self) -> float:
        """l(0), on the anchors where it is known."""
        return float(self.loss.baseline_of(self.loss.measured.nonzero()[:, 0]).mean())

    @property
    def allowed(self) -> float:
        """The change of loss that the tolerance allows."""
        return self._allowed(self.baseline)

    def _allowed(self, baseline: float) -> float:
        if not self.relative:
            return self.tolerance
        if self.metric in LIKELIHOODS:
            return self.tolerance * max(baseline, NLL_FLOOR)
        return self.tolerance * (1.0 - baseline if self.metric == "accuracy" else baseline)

    def complete(self, sigma: float) -> bool:
        """Whether sigma was measured on all anchors (sigma = 0 always is, in the end)."""
        return self._count(sigma) == self.N

    @property
    def whole(self) -> list[float]:
        """The sigmas known on all anchors, ascending, 0 first."""
        return [0.0, *(s for s in sorted(self.points) if self.complete(s))]

    def differences(self, sigma: float, count: int | None = None) -> Tensor:
        """Return paired differences to sigma = 0 of the first ``count`` anchors of the order."""
        rows = self.order[: self._count(sigma) if count is None else count]
        if sigma == 0.0:
            return torch.zeros(len(rows), dtype=torch.float64)
        return self.points[sigma].rows[rows] - self.loss.baseline_of(rows)

    def change(self, sigma: float) -> float:
        """Return l(sigma) - l(0), corrected where it was measured on part of the anchors."""
        if sigma == 0.0:
            return 0.0
        count = self._count(sigma)
        return float(self.differences(sigma).mean()) + sum(
            weight * float(self.differences(s).mean() - self.differences(s, count).mean())
            for s, weight in self._neighbours(sigma)
        )

    def _neighbours(self, sigma: float) -> list[tuple[float, float]]:
        """Return (sigma, weight) to correct ``sigma`` by, linear in sigma^2."""
        known = self.whole[1:]
        if self.complete(sigma) or not known:
            return []
        x = sigma * sigma
        below = max((s for s in known if s < sigma), default=0.0)
        above = min((s for s in known if s > sigma), default=0.0)
        if not above:
            return [(below, min(x / below**2, FARTHEST))]
        share = (x - below**2) / (above**2 - below**2)
        return [(above, share), *([(below, 1 - share)] if below else [])]

    def part_error(self, sigma: float) -> float:
        """Return the standard error that is left where a part of the anchors stands for all."""
        count = self._count(sigma)
        if count == self.N:
            return 0.0
        left = self.differences(sigma)
        for s, weight in self._neighbours(sigma):
            left = left - weight * self.differences(s, count)
        return float(left.std()) * math.sqrt((1 - count / self.N) / count) if count > 1 else 0.0

    def excess(self, sigma: float) -> float:
        """Return the degradation beyond what is allowed; <= 0 is accepted."""
        change = self.change(sigma)
        return (abs(change) if self.two_sided else change) - self.allowed

    def excess_rows(self, sigma: float) -> Tensor:
        """Return each measured anchor's part in the excess; the allowance varies with l(0) too."""
        count = self._count(sigma)
        change = self.differences(sigma) * self.sign(sigma)
        baseline = self.loss.baseline_of(self.order[:count])
        mean = float(baseline.mean())
        if not self.relative or (self.metric in LIKELIHOODS and mean < NLL_FLOOR):
            return change - self._allowed(mean)
        scale = 1.0 - baseline if self.metric == "accuracy" else baseline
        return change - self.tolerance * scale

    def sure(self, sigma: float) -> bool:
        """Whether all anchors would accept or violate ``sigma`` as what was measured says."""
        if self.complete(sigma) or self.metric == "accuracy":  # which moves in steps
            return self.complete(sigma)
        return abs(self.excess(sigma)) > SURE * self.part_error(sigma)

    def sign(self, sigma: float) -> float:
        """Return the direction of the change at ``sigma`` that is degradation."""
        return -1.0 if self.two_sided and self.change(sigma) < 0 else 1.0

    def decided(self, sigma: float) -> bool:
        """Whether the anchors measured so far, a sample without replacement, tell its side of 0."""
        rows = self.excess_rows(sigma)
        n = len(rows)
        if n == self.N:
            return True
        if n < 2:
            return False
        error = float(rows.std()) * math.sqrt((1 - n / self.N) / n)
        margin = float(stats.t.ppf(1 - DECIDED / 2, n - 1)) * error
        if self.metric == "accuracy":  # n rows without an error leave a rate of so much possible
            margin = max(margin, -math.log(DECIDED) / n)
        return abs(float(rows.mean())) > margin

    def crossing(self) -> tuple[float, float | None]:
        """Return the largest accepted sigma connected to 0, and the violation next to it or None.

        One known on part of the anchors is passed over where others stand close on both sides.
        """
        hidden = [(a, b) for a, b in pairwise(self.whole[1:]) if b <= a * HIDING]
        accepted = 0.0
        for sigma in sorted(self.points):
            violates = self.excess(sigma) > 0
            if any(a < sigma < b for a, b in hidden) and not (violates and self.sure(sigma)):
                continue
            if violates:
                return accepted, sigma
            accepted = sigma
        return accepted, None

    @property
    def streams(self) -> int:
        """Antithetic pairs of draws."""
        return self.loss.n // 2

    def left_out(self, sigma: float) -> Tensor:
        """Return the mean loss without each stream, [U], on the anchors measured."""
        if sigma == 0.0:
            return torch.full((self.streams,), self.baseline, dtype=torch.float64)
        return self.points[sigma].left_out

    def draw_standard_error(self, sigma: float) -> float:
        """Return the jackknife error over streams of the mean loss; NaN: one stream only."""
        return float(jackknife_error(self.left_out(sigma)))

    def reported(self) -> tuple[CurvePoint, ...]:
        """Return the curve, sigma = 0 first."""
        found = [CurvePoint(0.0, self.baseline, 0.0, 0.0, self.N)]
        for sigma in sorted(self.points):
            differences = self.differences(sigma)
            loss = self.baseline + self.change(sigma)
            if self.complete(sigma):
                loss = float(self.points[sigma].rows.mean())
            errors = standard_error(differences, math.nan), self.draw_standard_error(sigma)
            found.append(CurvePoint(sigma, loss, *errors, len(differences)))
        return tuple(found)
