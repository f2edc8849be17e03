"""The measured curve: anchors in blocks, decisions on part of them, corrections, costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.losses import FakeLoss, GaussianLoss, anchor_set, find
from support.models import CASES, FIRST_TOKEN, VOCAB, exact

import tfb
from tfb.data.batching import EncodedRows
from tfb.search.curve import LossCurve
from tfb.search.fit import SEARCHES
from tfb.search.loss import AnchorLoss, AnchorSet, PassCounter

GRID = [0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32]


def curve_of(loss: Any, metric: str = "nll", **changes: Any) -> LossCurve:
    options: dict[str, Any] = {"tolerance": 0.003, "relative": True, "two_sided": False} | changes
    return LossCurve(loss, metric, **options)


def gaussian(seed: int, spread: float = 10.0, rows: int = 400) -> GaussianLoss:
    return GaussianLoss(lambda _: 1.0, spread, anchor_set(rows), 4, seed)


# --- blocks -------------------------------------------------------------------------------------


def test_order_is_a_permutation_that_the_seed_alone_decides() -> None:
    orders = [curve_of(gaussian(seed)).order.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(400)) != orders[0]


def test_blocks_double_up_to_all_anchors() -> None:
    assert curve_of(gaussian(0)).blocks == [25, 50, 100, 200, 400]
    assert curve_of(gaussian(0, rows=40)).blocks == [16, 20, 40]
    assert curve_of(gaussian(0, rows=8)).blocks == [8]


def test_no_row_is_measured_twice_and_the_end_does_not_depend_on_the_way() -> None:
    loss = gaussian(0)
    seen: list[tuple[float, int]] = []
    whole = loss.__call__

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(loss, name)

        def __call__(self, sigmas: list[float], *, rows: torch.Tensor | None = None) -> Any:
            at = torch.arange(400) if rows is None else rows
            assert at.tolist() == sorted(at.tolist())
            seen.extend((s, int(i)) for s in sigmas for i in at)
            return whole(sigmas, rows=rows)

    curve = curve_of(Watched())
    curve.decide([0.01, 0.02], 1 / 8)
    curve.decide([0.01, 0.02, 0.03])
    curve.measure([0.01, 0.02, 0.03, 0.04])
    assert len(seen) == len(set(seen)) == 4 * 400
    straight = curve_of(gaussian(0))
    straight.measure([0.01, 0.02, 0.03, 0.04])
    for s in (0.01, 0.02, 0.03, 0.04):
        # Means of 400 numbers in another order.
        torch.testing.assert_close(curve.left_out(s), straight.left_out(s), rtol=1e-12, atol=0)
        assert torch.equal(curve.points[s].rows, straight.points[s].rows)


def test_what_a_decision_saves_and_that_it_is_the_full_sweeps() -> None:
    """Level .001 for each decision: of 20 x 7 none should differ from all anchors' own."""
    for seed in range(20):
        part, full = curve_of(gaussian(seed)), curve_of(gaussian(seed))
        part.decide(GRID)
        full.measure(GRID)
        for s in GRID:
            assert (part.excess(s) > 0) == (full.excess(s) > 0)
        assert part.points[0.32].count <= 100  # far above the tolerance, ten rows would tell
        assert part.loss.passes < 0.75 * full.loss.passes


def test_a_part_is_corrected_exactly_where_rows_are_linear_in_sigma_squared() -> None:
    """One sigma known on all anchors tells how the part differs, up to where it may speak for."""
    part, full = curve_of(gaussian(1)), curve_of(gaussian(1))
    part.decide(GRID, 1 / 16)
    full.measure(GRID)
    before = [abs(part.change(s) - full.change(s)) for s in GRID]
    part.measure([0.3])
    for s, error in zip(GRID, before, strict=True):
        assert part.change(s) == pytest.approx(full.change(s), rel=1e-9)
        assert error > 1e-3 * full.change(s)
        assert part.part_error(s) < 1e-9  # nothing is left to chance


def rows(n: int, kind: str) -> EncodedRows:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 9, (n,), generator=generator).tolist()
    causal = kind == "llama"
    return EncodedRows(
        ids=[str(i) for i in range(n)],
        input_ids=[
            torch.randint(FIRST_TOKEN, VOCAB, (t,), generator=generator).tolist() for t in lengths
        ],
        label_ids=[(10, 11, 12)] * n if causal else None,
        labels=[i * 3 // n for i in range(n)],  # sorted by label
        choices=[("a", "b", "c")] * n if causal else None,
        num_labels=None if causal else 3,
    )


@pytest.mark.parametrize("mode", [("full", None), ("tail", 2)])
@pytest.mark.parametrize("metric", ["nll", "pseudo_nll"])
@pytest.mark.parametrize("kind", ["llama", "llama_classifier"])
def test_decisions_on_models_are_the_full_sweeps(
    kind: str, metric: str, mode: tuple[str, int | None]
) -> None:
    bayes = tfb.bayesianize(exact(CASES[kind].build()), seed=3)
    bayes.configure(mode=mode[0], tail=mode[1])
    anchors = AnchorSet.of(rows(96, kind), batch_size=32)
    part, full = (
        curve_of(AnchorLoss(bayes, anchors, metric, draws=2), metric, tolerance=0.05)
        for _ in range(2)
    )
    grid = [0.003, 0.03, 0.3, 3.0]
    part.decide(grid)
    full.measure(grid)
    assert [part.excess(s) > 0 for s in grid] == [full.excess(s) > 0 for s in grid]
    assert part.loss.passes < full.loss.passes
    # Where all anchors were taken, results are the same to rounding.
    for s in grid:
        if part.complete(s):
            assert part.change(s) == pytest.approx(full.change(s), abs=1e-10)


# --- cost ---------------------------------------------------------------------------------------


def test_passes_are_counted_in_tokens() -> None:
    """Rows of 2, 5 and 8 tokens: in tail mode k of them belong to a draw, the rest to a sweep."""
    mask = torch.arange(8) < torch.tensor([2, 5, 8])[:, None]
    batch = {"input_ids": torch.zeros(3, 8, dtype=torch.int64), "attention_mask": mask.long()}
    every = torch.arange(3)
    full = PassCounter([batch], None)
    full.spend(every, 4)
    assert full.passes == 4 and full.draw_cost == 1
    full.spend(torch.tensor([0, 2]), 3)
    assert full.passes == 4 + 3 * 10 / 15
    tail = PassCounter([batch], 3)
    tail.spend(every, 1)
    assert tail.passes == 1 and tail.draw_cost == (2 + 3 + 3) / 15
    tail.spend(torch.tensor([1]), 10)
    assert tail.passes == 1 + (2 + 10 * 3) / 15


def test_tail_mode_finds_sigma_zero_in_its_first_sweep() -> None:
    """The prompt runs once for sigma = 0 and all others; rows that are known cost no more of it."""
    bayes = tfb.bayesianize(exact(CASES["llama"].build()), seed=3)
    bayes.configure(mode="tail", tail=1)
    anchors = AnchorSet.of(rows(20, "llama"), batch_size=8)
    loss = AnchorLoss(bayes, anchors, "nll", draws=4)
    assert loss.passes == 0 and not bool(loss.measured.any())
    each, half = loss.cost.draw_cost, torch.arange(0, 20, 2)
    first = loss([0.1, 0.2], rows=half)
    assert loss.measured.nonzero()[:, 0].tolist() == half.tolist()
    loss([0.1], rows=torch.arange(1, 20, 2))
    spent = loss.passes
    loss([0.3])
    assert loss.passes == pytest.approx(spent + 1 + 3 * each, abs=1e-12)
    plain = AnchorLoss(bayes, anchors, "nll", draws=4)
    torch.testing.assert_close(loss.baseline, plain.baseline, rtol=0, atol=1e-10)
    assert plain.passes == 1
    torch.testing.assert_close(first.rows, plain([0.1, 0.2]).rows[:, half], rtol=0, atol=1e-10)


# --- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_budget_and_precision_on_gaussian_losses(seed: int) -> None:
    """sigma to 1 % of this sample's crossing, in 20 deterministic passes, with noise that leaves
    the first block wrong by tens of per cent."""
    fit, loss, _ = find(lambda _: 1.0, spread=60.0, rows=400, make=GaussianLoss, seed=seed)
    assert loss.crossing * 0.99 <= fit.sigma <= loss.crossing
    assert loss.passes <= 20
    at = next(p for p in fit.curve if p.sigma == fit.sigma)
    assert at.anchors == 400


@pytest.mark.parametrize("how", SEARCHES)
def test_an_error_rate_is_bracketed_on_all_anchors(how: str) -> None:
    """Row i is wrong from a sigma of its own on, spread evenly over log sigma: the tolerance of 4 %
    of 400 rows lets 16 of them go wrong."""

    class Steps(FakeLoss):
        def __call__(self, sigmas: Any, **options: Any) -> Any:
            table = super().__call__(sigmas, **options)
            at = options.get("rows")
            at = torch.arange(400) if at is None else at
            edges = 0.002 * 1.02 ** (at * 37 % 400)
            found = (torch.tensor(sigmas)[:, None] > edges).double()
            return type(table)(found, table.left_out)

    fit, _, _ = find(
        lambda _: 0.0, rows=400, make=Steps, metric="accuracy", tolerance=0.04, search=how, steps=60
    )
    edge = 0.002 * 1.02**16
    assert edge / 1.01 <= fit.sigma <= edge
    known = [p for p in fit.curve if p.anchors == 400]
    low = next(p for p in known if p.sigma == fit.sigma)
    high = known[known.index(low) + 1]
    assert high.sigma <= low.sigma * 1.01
    assert low.loss == 16 / 400 and high.loss > 16 / 400


def test_bisection_answers_from_all_anchors_too() -> None:
    fit, loss, _ = find(
        lambda _: 1.0, spread=60.0, rows=400, make=GaussianLoss, search="bisection", steps=60
    )
    assert loss.crossing * 0.99 <= fit.sigma <= loss.crossing
    assert next(p for p in fit.curve if p.sigma == fit.sigma).anchors == 400


def test_noise_free_losses_are_decided_by_one_block() -> None:
    curve = curve_of(FakeLoss(lambda s: 1.0 + s, 0.0, anchor_set(400), 4, 0))
    curve.decide([0.001, 0.01])
    assert [p.count for p in curve.points.values()] == [25, 25]
