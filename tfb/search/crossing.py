"""Searches for the largest accepted sigma: where l(sigma) - l(0) crosses the tolerance.

Each is a solver of one state, a bracket: ``init`` finds one, ``step`` measures and narrows it,
``terminate`` says why it is narrow enough (None: it is not).

    grid       a geometric grid on part of the anchors, then few sigmas on all of them, where
               interpolation in sigma^2 says (antithetic pairs leave the noise's even terms, so
               the loss is nearly linear in sigma^2); in tail mode several sigmas in one sweep
    root       the same start, then SciPy's bracketing root finder (Brent) in sigma^2
    bisection  halves; a sigma takes as many anchors as its decision needs

All extend a range that does not bracket and raise an error after that. The answer is the lower end
of the final bracket, accepted by all anchors, and never a bound; the upper end violates on all of
them, or on a part that with its neighbours' help is sure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from scipy import optimize

from tfb.search.bracket import (
    CLOSE,
    COARSE_SHARE,
    MAX_EXTENSIONS,
    SIGMA_LIMITS,
    Bracket,
    geometric,
    line,
    locate,
    predict,
    sweep,
    whole,
)
from tfb.search.curve import LossCurve
from tfb.search.result import SearchError

MAX_STEPS = 200
CONFIRMING_SHARE = 1 / 4  # of the anchors
SPAN = 1.9  # how far such a sweep reaches in both directions, while the crossing is uncertain


class Search(Protocol):
    """What a search for the crossing provides."""

    def init(self, curve: LossCurve) -> Bracket: ...

    def step(self, curve: LossCurve, state: Bracket) -> Bracket: ...

    def terminate(self, curve: LossCurve, state: Bracket) -> str | None: ...


def find_crossing(search: Search, curve: LossCurve) -> tuple[float, str]:
    """(largest accepted sigma, why the search stopped).

    Raises:
        SearchError: nothing brackets the tolerance, or the bracket does not get narrow.
    """
    state = search.init(curve)
    while (stopped := search.terminate(curve, state)) is None:
        if state.steps == MAX_STEPS:
            raise SearchError(f"no crossing settled in {MAX_STEPS} steps; lower the resolution")
        state = search.step(curve, state)
    return state.low, stopped


# --- grid ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GridSearch:
    """Grid on part of the anchors, then interpolation on all."""

    bounds: tuple[float, float]
    points: int
    resolution: float

    def init(self, curve: LossCurve) -> Bracket:
        share, points = COARSE_SHARE, self.points
        if sweep(curve) > 1:  # draws are cheap and sweeps are not: begin nearer
            share, points = 2 * share, 2 * points - 1
        curve.decide(geometric(*self.bounds, points), share)
        return Bracket(*locate(curve, share))

    def step(self, curve: LossCurve, state: Bracket) -> Bracket:
        low, tight = state.low, 1 + 0.99 * self.resolution
        root = predict(curve, low, state.high)
        if curve.complete(low) and low < root <= low * (1 + 0.75 * self.resolution):
            # Only the violation just above is missing. With a neighbour known on all anchors, part
            # of them tells; if it is accepted after all, it is the new lower end and needs all.
            above = low * tight
            curve.decide([above], CONFIRMING_SHARE)
            violates = curve.excess(above) > 0 and curve.sure(above)
            curve.measure([] if violates else [above])
        else:
            wanted = self._sigmas(curve, state, root, tight)
            new = [s for s in wanted if not curve.complete(s)]
            curve.measure(new or [(low * state.high) ** 0.5])
        return Bracket(*locate(curve), state.steps + 1)

    def terminate(self, curve: LossCurve, state: Bracket) -> str | None:
        low, high = state.low, state.high
        if not (curve.complete(low) and curve.sure(high)):
            return None
        if high / low - 1 <= self.resolution:
            return f"bracket [{low:.6g}, {high:.6g}] within resolution"
        # An error rate has steps, between which there is nothing to interpolate.
        if curve.metric == "accuracy" or high / low > 2 * CLOSE:
            return None
        if not curve.complete(high) and high / low > CLOSE:
            return None
        near = [s for s in whole(curve) if s < low <= s * CLOSE]
        ahead = line(curve, near[-1], low) if near else math.inf
        across = line(curve, low, high)
        if (high / low <= CLOSE or ahead < math.inf) and (
            max(across, ahead if near else 0.0) <= low * (1 + 0.75 * self.resolution)
        ):
            return f"crossing interpolated in [{low:.6g}, {high:.6g}], measured below it"
        return None

    def _sigmas(self, curve: LossCurve, state: Bracket, root: float, tight: float) -> list[float]:
        """What to measure next, on all anchors."""
        low, high = state.low, state.high
        if state.steps % 2 and state.steps >= (1 if curve.metric == "accuracy" else 6):
            return [(low * high) ** 0.5]  # interpolation does not get there: halve now and then
        both = curve.complete(low) and curve.sure(high)
        if sweep(curve) > 1:
            if both:  # one of these brackets is the last, if all is smooth
                around = [root * tight**e for e in (-1.8, -0.8, 0.2, 1.2)]
                return [s for s in around if low < s < high] or [(low * high) ** 0.5]
            return geometric(root / SPAN, root * SPAN, sweep(curve))
        if curve.complete(high) and high > root >= high / (1 + 0.25 * self.resolution):
            aim = high / tight
        else:
            aim = root * (1 - self.resolution / 2)
        # An end that is known on part of the anchors only, and that close, is measured itself.
        for end in (low, high):
            if not curve.complete(end) and end / tight <= aim <= end * tight:
                return [end]
        if not both:
            return [aim]
        return [min(max(aim, low * (1 + self.resolution / 4)), high / (1 + self.resolution / 4))]


# --- root ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RootSearch:
    """Brent's method in sigma^2, on all anchors, from the grid's bracket."""

    bounds: tuple[float, float]
    points: int
    resolution: float

    def init(self, curve: LossCurve) -> Bracket:
        curve.decide(geometric(*self.bounds, self.points), COARSE_SHARE)
        return Bracket(*locate(curve))

    def step(self, curve: LossCurve, state: Bracket) -> Bracket:
        """One run of the root finder, from the largest sigma known to be accepted (0 is)."""
        low, high = state.low, state.high
        if not curve.complete(high):
            high = predict(curve, low, high)
            curve.measure([high])
            while curve.excess(high) <= 0 and high < SIGMA_LIMITS[1]:
                high *= CLOSE
                curve.measure([high])
            if curve.excess(high) <= 0:
                return Bracket(*locate(curve), state.steps + 1)  # which raises
        low = max(s for s in (0.0, *curve.points) if s < high and curve.complete(s)
                  and curve.excess(s) <= 0)  # fmt: skip
        sigma_of = {low * low: low, high * high: high}

        def excess(x: float) -> float:
            sigma = sigma_of.get(x, math.sqrt(x))
            curve.measure([sigma])
            return curve.excess(sigma) or -1e-300  # 0 is accepted: the search goes on above it

        # Brent stops at a bracket of so much of x = sigma^2; a tenth narrower than asked for.
        rtol = 1 - (1 + 0.9 * self.resolution) ** -2
        optimize.brentq(excess, low * low, high * high, xtol=1e-300, rtol=rtol)
        accepted, violating = locate(curve)
        # Other sigmas may lie in between, known on part of the anchors.
        curve.measure([s for s in (accepted, violating) if not curve.complete(s)])
        return Bracket(*locate(curve), state.steps + 1)

    def terminate(self, curve: LossCurve, state: Bracket) -> str | None:
        low, high = state.low, state.high
        done = curve.complete(low) and curve.complete(high)
        if not done or high / low - 1 > self.resolution:
            return None
        return f"Brent's method: bracket [{low:.6g}, {high:.6g}] within resolution"


# --- bisection ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bisection:
    """Halving, from 0 and the range's upper end."""

    bounds: tuple[float, float]
    points: int
    resolution: float
    most: int

    def init(self, curve: LossCurve) -> Bracket:
        low, high = 0.0, self.bounds[1]
        curve.decide([high])
        for _ in range(MAX_EXTENSIONS):
            if curve.excess(high) > 0:
                break
            low, high = high, high * 4
            curve.decide([high])
        # Further out, or an error.
        return Bracket(*(locate(curve) if curve.excess(high) <= 0 else (low, high)))

    def step(self, curve: LossCurve, state: Bracket) -> Bracket:
        low, high = state.low, state.high
        if self._narrow(state):  # an end that part of the anchors decided is not an answer yet
            curve.measure([s for s in (low, high) if not curve.complete(s)])
            accepted, violating = curve.crossing()
            return Bracket(accepted, violating or locate(curve)[1], state.steps)
        middle = (low + high) / 2
        curve.decide([middle])
        low, high = (middle, high) if curve.excess(middle) <= 0 else (low, middle)
        return Bracket(low, high, state.steps + 1)

    def terminate(self, curve: LossCurve, state: Bracket) -> str | None:
        low, high, steps = state.low, state.high, state.steps
        if not self._narrow(state):
            return None
        if low == 0.0:
            raise SearchError(
                f"unbracketed: no sigma down to {high:.3g} was accepted in {self.most} steps; "
                "lower bounds[1], raise steps or the tolerance"
            )
        if not (curve.complete(low) and curve.complete(high)):
            return None
        if high / low - 1 <= self.resolution:
            return f"bracket [{low:.6g}, {high:.6g}] within resolution, {steps} steps"
        return f"{steps} steps; largest accepted, violated at {high:.6g}"

    def _narrow(self, state: Bracket) -> bool:
        return state.steps >= self.most or (
            state.low > 0 and state.high / state.low - 1 <= self.resolution
        )
