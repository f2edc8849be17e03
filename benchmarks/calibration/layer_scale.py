"""Layer-adaptive sigma: module l gets m_l times the one global sigma, which is searched on top.

Small noise in module l alone worsens the loss by a_l sigma_l^2, its sensitivity a_l being measured
with antithetic draws at one sigma on part of the anchors. Given a total sum_l a_l sigma_l^2, the
posterior of largest entropy, sum_l n_l log sigma_l with n_l noisy entries, has

    sigma_l^2 = const * n_l / a_l,      m_l = sqrt(n_l / a_l) / weighted geometric mean

so that every entry costs the same, and the mean of log m_l over entries is 0: sigma keeps its
meaning, and the volume that it had. The loss is pseudo_nll, how far predictions move from the
adapter's own: it needs no labels, and does not turn negative where variance helps calibration.

A study: a posterior with multipliers is not the paper's, and of five over-confident adapters it
gave one a lower NLL than one sigma for all, and four a higher one. Noise is sigma / d, so the
multiplier of a module divides its d.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.calibration.families import with_posteriors
from tfb.adapters.bridge import block_number
from tfb.data.batching import EncodedRows
from tfb.model import BayesianModel
from tfb.search.curve import FEWEST, SHARES
from tfb.search.loss import AnchorLoss, AnchorSet

WIDEST = 4.0  # multipliers lie within 1 / WIDEST and WIDEST: a sensitivity is itself uncertain


@dataclass(frozen=True)
class LayerScales:
    """What was measured, by module name.

    Attributes:
        multipliers: m_l.
        sensitivities: a_l, nats per sigma^2.
        passes: deterministic passes over the anchors.
    """

    multipliers: dict[str, float]
    sensitivities: dict[str, float]
    passes: float


def scale_layers(
    bayes: BayesianModel,
    anchors: EncodedRows,
    *,
    sigma: float,
    group: str = "module",
    draws: int = 4,
    batch_size: int = 50,
) -> tuple[BayesianModel, LayerScales]:
    """Measure sensitivities; return the model with multiplied noise, in the place of ``bayes``.

    Args:
        bayes: the model, which is removed.
        anchors: as many as the first block of a search, in a seeded order, are measured.
        sigma: at which each group alone is measured.
        group: "module", or "block" for one multiplier for all modules of a block. Each costs
            1 + ``draws`` passes over those anchors.
        draws: antithetic draws of each measurement.
        batch_size: of the anchors.

    Raises:
        ValueError: no positive sigma, an unknown group.
    """
    if group not in ("module", "block"):
        raise ValueError(f"group={group!r}: expected module or block")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma={sigma}: sensitivities are measured at a positive sigma")
    N = len(anchors)
    count = min(N, max(math.ceil(N * SHARES[0]), FEWEST))
    drawn = sorted(random.Random(bayes.config.seed).sample(range(N), count))
    part = AnchorSet.of(
        anchors.subset(drawn), pad_token_id=bayes.pad_token_id, batch_size=batch_size
    )
    posteriors, passes = bayes.posteriors, 0.0
    members: dict[Any, list[str]] = {}
    for name in posteriors:
        block = block_number(name)
        members.setdefault(name if group == "module" or block is None else block, []).append(name)
    sensitivities, entries = {}, {}
    for key, names in members.items():
        bayes = with_posteriors(bayes, {n: posteriors[n] for n in names})
        loss = AnchorLoss(bayes, part, "pseudo_nll", draws=draws)
        change = loss([sigma]).rows[0] - loss.baseline
        passes += loss.passes * count / N
        sensitivities[key] = float(change.mean()) / sigma**2
        entries[key] = sum(posteriors[n].effective_rank * posteriors[n].in_features for n in names)
    by_group = multipliers(sensitivities, entries)
    found = LayerScales(
        {n: by_group[key] for key, names in members.items() for n in names},
        {n: sensitivities[key] for key, names in members.items() for n in names},
        passes,
    )
    scaled = {n: replace(p, d=p.d / found.multipliers[n]) for n, p in posteriors.items()}
    return with_posteriors(bayes, scaled), found


def multipliers(sensitivities: Mapping[Any, float], entries: Mapping[Any, int]) -> dict[Any, float]:
    """Return m = sqrt(n / a), of geometric mean 1 over entries.

    A sensitivity of 0 or less is as good as the smallest that the limits allow.
    """
    raw = {k: math.sqrt(entries[k] / a) if a > 0 else math.inf for k, a in sensitivities.items()}
    finite = [k for k in raw if raw[k] < math.inf]
    if not finite:
        return dict.fromkeys(raw, 1.0)
    centre = _log_mean({k: raw[k] for k in finite}, entries)
    clipped = {k: min(max(m / centre, 1 / WIDEST), WIDEST) for k, m in raw.items()}
    centre = _log_mean(clipped, entries)
    return {k: m / centre for k, m in clipped.items()}


def _log_mean(values: Mapping[Any, float], entries: Mapping[Any, int]) -> float:
    total = sum(entries[k] for k in values)
    return math.exp(sum(entries[k] * math.log(m) for k, m in values.items()) / total)
