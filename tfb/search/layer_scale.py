"""Layer-adaptive sigma: module l gets m_l times the one global sigma, which is searched on top.

Small noise in module l alone worsens the loss by a_l sigma_l^2, its sensitivity a_l being measured
with antithetic draws at one sigma on part of the anchors. Given a total sum_l a_l sigma_l^2, the
posterior of largest entropy, sum_l n_l log sigma_l with n_l noisy entries, has

    sigma_l^2 = const * n_l / a_l,      m_l = sqrt(n_l / a_l) / weighted geometric mean

so that every entry costs the same, and the mean of log m_l over entries is 0: sigma keeps its
meaning, and the volume that it had. The loss is pseudo_nll, how far predictions move from the
adapter's own: it needs no labels, and does not turn negative where variance helps calibration.

Off by default: a posterior with multipliers is not the paper's, and of five over-confident
adapters it gave one a lower NLL than one sigma for all, and four a higher one
(benchmarks/calibration). KL is to the same isotropic prior as without.

    fit_layer_scales(bayes, anchors, sigma=0.01); fit = fit_sigma(bayes, anchors)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tfb.adapters.selection import block_number
from tfb.model import BayesianModel
from tfb.scoring.rows import pad_token
from tfb.search.curve import LossCurve
from tfb.search.loss import AnchorLoss, AnchorSet

WIDEST = 4.0  # multipliers lie within 1 / WIDEST and WIDEST: a sensitivity is itself uncertain


@dataclass(frozen=True)
class LayerScales:
    """Multipliers m_l and sensitivities a_l (nats per sigma^2) by module name.

    passes: deterministic-pass equivalents over the anchors, see :mod:`tfb.search.cost`.
    """

    multipliers: dict[str, float]
    sensitivities: dict[str, float]
    sigma: float
    passes: float


def fit_layer_scales(
    bayes: BayesianModel,
    anchors: Any,
    *,
    sigma: float | None = None,
    group: str = "module",
    draws: int = 4,
    seed: int | None = None,
    batch_size: int = 50,
) -> LayerScales:
    """Measure sensitivities and set ``bayes.layer_scales``; search sigma after that.

    Args:
        anchors: as in :func:`tfb.fit_sigma`; labels are not used. The first block of their seeded
            permutation is measured.
        sigma: at which each group alone is measured; default ``bayes.sigma``.
        group: "module", or "block" for one multiplier for all modules of a block: fewer passes.
            Each group costs ``draws`` passes over a sixteenth of the anchors.

    Raises:
        ValueError: no sigma, an unknown group.
    """
    if group not in ("module", "block"):
        raise ValueError(f"group={group!r}: expected module or block")
    sigma = bayes.sigma if sigma is None else sigma
    if sigma is None or not 0 < sigma < math.inf:
        raise ValueError(f"sigma={sigma}: sensitivities are measured at a positive sigma")
    pad = pad_token(bayes)
    loss = AnchorLoss(
        bayes, AnchorSet.of(anchors, pad_token_id=pad, batch_size=batch_size), "pseudo_nll",
        draws=draws, seed=bayes.seed if seed is None else seed,
    )  # fmt: skip
    curve = LossCurve(loss, "pseudo_nll", 1.0, True, False)
    rows = curve.order[: curve.blocks[0]].sort().values
    members: dict[Any, list[str]] = {}
    for name in bayes.samplers:
        block = block_number(name)
        members.setdefault(name if group == "module" or block is None else block, []).append(name)
    sensitivities, entries = {}, {}
    for key, names in members.items():
        with _only(bayes, names):
            table = loss([sigma], rows=rows)
        change = table.rows[0] - loss.baseline_of(rows)
        sensitivities[key] = float(change.mean()) / sigma**2
        posteriors = [bayes.samplers[n].posterior for n in names]
        entries[key] = sum(p.effective_rank * p.in_features for p in posteriors)
    by_group = multipliers(sensitivities, entries)
    found = LayerScales(
        {n: by_group[key] for key, names in members.items() for n in names},
        {n: sensitivities[key] for key, names in members.items() for n in names},
        sigma,
        loss.passes,
    )
    bayes.set_layer_scales(found.multipliers)
    return found


def multipliers(sensitivities: Mapping[Any, float], entries: Mapping[Any, int]) -> dict[Any, float]:
    """m = sqrt(n / a), of geometric mean 1 over entries; a sensitivity of 0 or less is as good as
    the smallest that the limits allow."""
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


@contextmanager
def _only(bayes: BayesianModel, names: list[str]) -> Iterator[None]:
    """Noise in these modules alone, as the model has it without multipliers."""
    before = bayes.layer_scales
    bayes.set_layer_scales({n: float(n in names) for n in bayes.samplers})
    try:
        yield
    finally:
        bayes.set_layer_scales(before)
