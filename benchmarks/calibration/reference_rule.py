"""The sigma search of the authors' scripts to the letter, mistakes included.

Pseudo-labels; -log(p + 1e-12); |change| / l(0) divided by the number of anchors once more; fresh
iid noise at every step; the answer is the smallest sigma that violated, or the upper bound if none
did. Their noise is Flipout, whose marginals are those of token noise, used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import torch
from torch import Tensor

from tfb.draws import Draws
from tfb.model import BayesianModel
from tfb.search.fit import Anchors
from tfb.search.loss import AnchorSet, PassCounter
from tfb.search.result import CurvePoint, PredictiveFit

BOUNDS = (1e-3, 0.015)  # the published runs: low is fixed, high is --bayes-beta
DRAWS = 10
STEPS = 5
TOLERANCE = 0.003
FLOOR = 1e-12


def fit_reference(
    bayes: BayesianModel,
    anchors: Anchors,
    *,
    bounds: tuple[float, float] = BOUNDS,
    draws: int = DRAWS,
    tolerance: float = TOLERANCE,
    batch_size: int = 50,
    progress: Callable[[int], None] | None = None,
) -> PredictiveFit:
    """Search sigma as the scripts do and configure the model with it, and with T = 1.

    Args:
        bayes: the model; its mode and seed count.
        anchors: as in :func:`tfb.fit_sigma`. Labels are not used.
        bounds: the range, which is not extended.
        draws: iid draws at each step.
        tolerance: of the relative change over the number of anchors.
        batch_size: of encoded rows.
        progress: called with finished rows x draws.
    """
    rows = AnchorSet.of(anchors, pad_token_id=bayes.pad_token_id, batch_size=batch_size)
    rows.check("pseudo_nll")
    config, N = bayes.config, len(rows)
    cost, everything = PassCounter(rows.batches, config.tail), torch.arange(N)

    def probabilities(given: Draws) -> Iterator[Tensor]:
        """[B, K] averaged probabilities of each batch."""
        for batch in rows.batches:
            inputs = {k: v for k, v in batch.items() if k not in ("labels", "label_ids")}
            logits = bayes.logits(inputs, given, batch.get("label_ids"))
            yield logits.double().softmax(-1).mean(0).cpu()
            if progress is not None:
                progress(len(given) * len(batch["input_ids"]))
        cost.spend(everything, len(given))

    plain = list(probabilities(Draws.mean()))
    targets = [p.argmax(-1)[:, None] for p in plain]

    def losses(sigma: float, step: int) -> Tensor:
        found: Iterator[Tensor] = iter(plain)
        if sigma > 0:
            first = step * draws
            found = probabilities(
                Draws.iid(draws, sigma, seed=config.seed, noise="token", first_stream=first)
            )
        each = [p.gather(1, y)[:, 0] for p, y in zip(found, targets, strict=True)]
        return -(torch.cat(each) + FLOOR).log()

    best, curve = reference_rule(losses, N, tolerance=tolerance, bounds=bounds)
    base = curve[0].loss
    bayes.configure(sigma=best, temperature=1.0)
    return PredictiveFit(
        **asdict(replace(config, sigma=best, temperature=1.0)),
        metric="pseudo_nll",
        objective="max_variance",
        tolerance=tolerance,
        relative=True,
        search="bisection",
        draws=draws,
        anchors=N,
        anchor_hash=rows.content_hash,
        baseline=base,
        limit=base + tolerance * N * base,
        curve=curve,
        passes=cost.passes,
        stopped="upper bound: nothing violated"
        if best == bounds[1]
        else "smallest violating sigma",
    )


def reference_rule(
    losses: Callable[[float, int], Tensor],
    N: int,
    *,
    tolerance: float = TOLERANCE,
    bounds: tuple[float, float] = BOUNDS,
) -> tuple[float, tuple[CurvePoint, ...]]:
    """Search as the scripts do.

    Args:
        losses: [N] of a sigma, with the noise of a step.
        N: anchors.
        tolerance: of the relative change over N.
        bounds: the range.

    Returns:
        Sigma, and the curve.
    """
    plain = losses(0.0, 0)
    base = float(plain.mean())
    curve = [CurvePoint(0.0, base, 0.0 if N > 1 else None, anchors=N)]
    low, high = bounds
    best = high
    for step in range(STEPS):
        middle = (low + high) / 2
        found = losses(middle, step)
        error = float((found - plain).std() / N**0.5) if N > 1 else None
        curve.append(CurvePoint(middle, float(found.mean()), error, anchors=N))
        if abs(curve[-1].loss - base) / base / N > tolerance:
            best = high = middle
        else:
            low = middle
    return best, tuple(sorted(curve, key=lambda p: p.sigma))
