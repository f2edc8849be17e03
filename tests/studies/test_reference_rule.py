"""The authors' search to the letter: known curves, and ``predict`` alone on a small model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from support.losses import Curve, power
from support.models import CASES, exact, make_batch

import tfb
from benchmarks.calibration.reference_rule import fit_reference, reference_rule
from tfb import Draws, PredictiveFit
from tfb.search.loss import AnchorSet

N = 8


def authors_rule(loss_at: Callable[[float, int], float], anchors: int, high: float) -> float:
    """The authors' bisection, in their own order of operations; loss_at(sigma, step)."""
    base = loss_at(0.0, -1)
    low, best = 0.001, high
    for step in range(5):
        middle = (low + high) / 2
        if abs(loss_at(middle, step) - base) / base / anchors > 0.003:
            best = high = middle
        else:
            low = middle
    return best


CURVES: dict[str, Curve] = {
    "crossing": power(0.006, rise=0.003 * N),
    "nothing violates": power(0.5),
    "everything violates": lambda s: 1.0 if s == 0 else 2.0,
    "an improvement violates": lambda s: 1.0 - 0.6 * (s > 0.004),
    "not monotone": lambda s: 1.0 + 0.03 * math.sin(700 * s) ** 2,
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("upper", [0.015, 0.1])
def test_known_curves(name: str, upper: float) -> None:
    curve = CURVES[name]
    asked: list[tuple[float, int]] = []

    def losses(sigma: float, step: int) -> torch.Tensor:
        asked.append((sigma, step))
        return torch.full((N,), curve(sigma), dtype=torch.float64)

    sigma, points = reference_rule(losses, N, bounds=(0.001, upper))
    assert sigma == authors_rule(lambda s, _: curve(s), N, upper)
    assert (sigma == upper) == (name == "nothing violates")
    assert [step for _, step in asked] == [0, 0, 1, 2, 3, 4] and asked[0][0] == 0.0
    assert [(p.sigma, p.loss) for p in points] == sorted((s, curve(s)) for s, _ in asked)
    assert all((p.standard_error, p.temperature, p.anchors) == (0.0, 1.0, N) for p in points)


@pytest.mark.parametrize("upper", [0.015, 1.0])
def test_a_model(upper: float) -> None:
    """Their rule with ``predict`` alone: pseudo-labels, fresh iid noise, log(p + 1e-12). It knows
    no temperature: the model's is set to 1."""
    model = tfb.bayesianize(exact(CASES["llama"].build()), seed=3)
    ids = torch.tensor([10, 11, 12])
    anchors = AnchorSet.of([make_batch(4, 3, 5, 2, seed=i) | {"label_ids": ids} for i in (0, 1)])

    def loss_at(sigma: float, step: int) -> float:
        losses = []
        for batch in anchors.batches:
            inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
            plain = model.predict(inputs, Draws.mean(), label_ids=ids)
            p = plain.probs
            if sigma:
                draws = Draws.iid(4, sigma, seed=3, noise="token", first_stream=4 * step)
                p = model.predict(inputs, draws, label_ids=ids).probs
            target = plain.probs.argmax(-1)
            losses += (-(p[torch.arange(4), target] + 1e-12).log()).tolist()
        return sum(losses) / len(losses)

    seen: list[int] = []
    model.configure(temperature=2.0)
    fit = fit_reference(model, anchors, draws=4, bounds=(0.001, upper), progress=seen.append)
    assert fit.config == model.config and fit.temperature == 1.0
    assert fit.sigma == authors_rule(loss_at, 8, upper)
    assert fit.stopped.startswith("upper bound" if fit.sigma == upper else "smallest violating")
    assert (fit.sigma < upper) == (upper == 1.0)  # one case of each kind
    assert fit.passes == 1 + 5 * 4 and sum(seen) == 8 * fit.passes
    again = PredictiveFit.from_dict(json.loads(json.dumps(fit.to_dict(), allow_nan=False)))
    assert again == fit and again.metric == "pseudo_nll"
