"""Confidence limits and notes: what is claimed about sigma holds as often as claimed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from support.losses import FakeLoss, GaussianLoss, anchor_set, find, power
from transformers import AutoTokenizer

import tfb
from tfb.data.batching import EncodedRows
from tfb.data.readers import read_rows
from tfb.scoring.evaluate import encode
from tfb.search.confidence import crossing_interval, doubts
from tfb.search.curve import LossCurve
from tfb.search.fit import SEARCHES
from tfb.search.loss import AnchorLoss, AnchorSet

TRAINED = "look like rows that the adapter was trained on"


# --- intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("spread", "stream"), [(30.0, 0.0), (10.0, 3.0)])
def test_coverage_over_seeds(spread: float, stream: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval holds the population's sigma in 95 % of 200 samples, within three binomial
    standard errors below. Over streams alone it rests on few degrees of freedom and on the mean of
    a part of the uncertainty, so that it may only be too wide."""
    monkeypatch.setattr(GaussianLoss, "STREAM", stream)
    inside = 0
    for seed in range(200):
        loss = GaussianLoss(lambda _: 1.0, spread, anchor_set(100), 8, seed)
        curve = LossCurve(loss, "nll", 0.003, True, False)  # type: ignore[arg-type]
        curve.measure([loss.crossing * f for f in (0.7, 0.999, 1.3)])
        low, high = crossing_interval(curve, loss.crossing * 0.999)
        inside += low <= loss.truth and (high is None or loss.truth <= high)
    error = (0.95 * 0.05 / 200) ** 0.5
    assert 0.95 - 3 * error <= inside / 200
    if stream == 0.0:
        assert inside / 200 <= 0.95 + 3 * error


def test_interval_of_a_parabola_in_closed_form() -> None:
    """Rows c_i sigma^2: |mean(c) x - a| = t SE(c) x, so that x = a / (mean -+ t SE). Three points
    are known on all anchors; limits lie between and beyond them."""
    loss = GaussianLoss(lambda _: 1.0, 10.0, anchor_set(400), 2, 5)
    loss.b = torch.ones(400, dtype=torch.float64)
    curve = LossCurve(loss, "nll", 0.003, True, False)  # type: ignore[arg-type]
    sigma = float((0.003 / (loss.c.mean() + loss.g.mean())) ** 0.5)
    curve.measure([sigma * 0.9, sigma, sigma * 1.01])
    low, high = crossing_interval(curve, sigma)
    centre = float(loss.c.mean() + loss.g.mean())
    half = float(stats.t.ppf(0.975, 399) * loss.c.std() / 20)
    assert low == pytest.approx((0.003 / (centre + half)) ** 0.5, rel=1e-6)
    assert high == pytest.approx((0.003 / (centre - half)) ** 0.5, rel=1e-6)


def test_interval_holds_the_answer_and_shrinks_with_anchors() -> None:
    widths = []
    for rows in (100, 400, 1600):
        fit, loss, _ = find(lambda _: 1.0, spread=20.0, rows=rows, make=GaussianLoss, draws=20)
        assert fit.interval is not None and fit.interval[1] is not None
        low, high = fit.interval
        assert low < fit.sigma < high
        assert loss.draw_error(fit) == pytest.approx(
            next(p.draw_standard_error for p in fit.curve if p.sigma == fit.sigma), rel=1e-9
        )
        widths.append(high / low)
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize("how", SEARCHES)
def test_no_spread_no_width(how: str) -> None:
    fit, _, _ = find(power(0.02), search=how, steps=60)
    assert fit.interval is not None
    assert fit.interval == pytest.approx((0.02, 0.02), rel=0.012)


def test_interval_of_a_minimum_is_what_is_not_worse() -> None:
    """Noise of .02 times +-1 on eight anchors cancels in paired differences: the limits are the
    answer's neighbours. Differences that vary leave more in."""

    class Uneven(FakeLoss):
        def __call__(self, sigmas: Any, **options: Any) -> Any:
            table = super().__call__(sigmas, **options)
            x = torch.tensor(sigmas, dtype=torch.float64)[:, None]
            return type(table)(table.rows + 2 * self.sign * x, table.left_out)

    def well(s: float) -> float:
        return 1.0 - 0.4 * (s / 0.013) ** 2 + 0.2 * (s / 0.013) ** 4

    fit, _, _ = find(well, objective="min_nll", spread=0.02)
    order = [p.sigma for p in fit.curve]
    i = order.index(fit.sigma)
    assert fit.interval == (order[i - 1], order[i + 1])
    wide, _, _ = find(well, objective="min_nll", spread=30.0, make=Uneven)
    assert wide.interval is not None and wide.interval[0] < order[i - 1]


# --- notes --------------------------------------------------------------------------------------


class Wiggly(FakeLoss):
    """Each row has an error of its own at each sigma, ``spread`` large: noise, not shape."""

    def __call__(self, sigmas: Any, **options: Any) -> Any:
        rows = options.get("rows")
        rows = torch.arange(self.N) if rows is None else rows
        found = torch.stack(
            [
                self.curve(s)
                + self.sign.abs()[rows]
                * torch.randn(self.N, generator=torch.Generator().manual_seed(int(s * 1e9)))[rows]
                for s in sigmas
            ]
        )
        self.passes += len(sigmas)
        return type(super().__call__(sigmas, **options))(found, found.mean(1, keepdim=True))


def test_noise_is_not_called_a_shape() -> None:
    for seed in range(5):
        fit, _, _ = find(power(0.02), spread=0.002, rows=64, make=Wiggly, draws=2, seed=seed)
        losses = [p.loss for p in fit.curve]
        assert losses != sorted(losses)  # it does fall here and there
        assert not any("not monotone" in note for note in fit.notes)


def test_a_fall_after_a_rise_is() -> None:
    def hump(s: float) -> float:
        return 1.0 + 0.5 * (0.003 < s < 0.02) + 5 * (s > 0.06)

    fit, _, _ = find(hump, spread=0.1)
    assert any("not monotone in sigma: it falls from sigma=0.0158" in n for n in fit.notes)


def test_draws_that_cannot_tell_the_tolerance_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GaussianLoss, "STREAM", 30.0)
    fit, _, _ = find(lambda _: 1.0, spread=0.1, rows=400, make=GaussianLoss, seed=3)
    assert any("below one standard error over draws" in note for note in fit.notes)
    assert not any("over anchors" in note for note in fit.notes)


def certain(wrong: int, sureness: float, rise: float, classes: int = 4) -> list[str]:
    """Notes on 400 anchors of four classes, the first ``classes`` of which occur; ``wrong`` have
    another label than the adapter gives the probability ``sureness``; the loss rises by ``rise``
    sigma^2."""
    labels = torch.arange(400) % classes
    probs = torch.full((400, 4), (1 - sureness) / 3, dtype=torch.float64)
    probs[torch.arange(400), (labels + (torch.arange(400) < wrong)) % 4] = sureness
    loss = FakeLoss(lambda s: 1.0 + rise * s * s, 0.0, anchor_set(400), 4, 0)
    loss.probabilities = probs  # type: ignore[assignment]
    loss.anchors = AnchorSet((dict(loss.anchors.batches[0]) | {"labels": labels},), "")
    curve = LossCurve(loss, "nll", 0.003, True, False)  # type: ignore[arg-type]
    curve.measure([0.01, 0.1])
    return doubts(curve, "max_variance", 0.01, (0.0, None))


def among(notes: list[str], text: str) -> bool:
    return any(text in note for note in notes)


def test_training_rows_are_known_by_three_signs() -> None:
    # Nearly all right, as sure as that, and variance hurts.
    assert among(certain(2, 0.99, rise=1.0), TRAINED)
    assert not among(certain(40, 0.99, rise=1.0), TRAINED)  # wrong more often than it expects
    # As often as it expects, but not nearly perfect.
    assert not among(certain(100, 0.75, rise=1.0), TRAINED)
    assert not among(certain(2, 0.99, rise=-1.0), TRAINED)  # variance helps


def test_labels_that_a_shuffled_file_would_have() -> None:
    """400 rows of four classes: each would be missing with a probability of .75^400."""
    assert among(certain(40, 0.9, 1.0, classes=3), "only 3 of 4 labels occur among the 400")
    assert not among(certain(40, 0.9, 1.0), "labels occur")


def test_an_adapter_that_guesses() -> None:
    """.9 on a wrong label in half of the rows: NLL (.11 + 3.4) / 2 = 1.75 > log 4."""
    assert among(certain(200, 0.9, rise=1.0), "no better than a guess")
    assert not among(certain(40, 0.9, rise=1.0), "no better than a guess")  # .44


@pytest.mark.parametrize(
    ("limits", "said"),
    [((0.0, 0.1), "reaches 0"), ((0.01, None), "no upper end"), ((0.01, 0.1), None)],
)
def test_limits_that_tell_nothing(limits: tuple[float, float | None], said: str | None) -> None:
    loss = FakeLoss(lambda s: 1.0 - s, 0.0, anchor_set(8), 4, 0)
    curve = LossCurve(loss, "nll", 0.003, True, False)  # type: ignore[arg-type]
    curve.measure([0.01, 0.1])
    notes = doubts(curve, "min_nll", 0.01, limits)
    assert among(notes, said) if said else not among(notes, "95 % interval")


# --- a real adapter -----------------------------------------------------------------------------


def rows_of(shared: Path, file: str, n: int) -> tuple[tfb.BayesianModel, EncodedRows]:
    base, adapter = shared / "models/stories260K", shared / "adapters/stories260K-clinc-domain"
    bayes = tfb.bayesianize(tfb.load_adapter(tfb.load_base(base, adapter), adapter))
    bayes.label_tokens = "last"  # as the adapter was trained
    rows = read_rows(shared / "data/clinc-domain" / file)
    return bayes, encode(bayes, rows[:: len(rows) // n][:n], AutoTokenizer.from_pretrained(base))


@pytest.mark.parametrize("mode", [("full", None), ("tail", 1)])
def test_real_training_rows_in_few_passes(shared: Path, mode: tuple[str, int | None]) -> None:
    """20 deterministic passes in full mode, 4 in tail mode; sigma is right to 1 % on its curve."""
    bayes, rows = rows_of(shared, "anchor.jsonl", 125)
    fit = tfb.fit_sigma(bayes, rows, tolerance=0.003, mode=mode[0], tail=mode[1])
    assert fit.passes <= {"full": 20, "tail": 4}[mode[0]]
    assert any(TRAINED in note for note in fit.notes)
    assert fit.interval is not None and fit.interval[0] < fit.sigma
    loss = AnchorLoss(bayes, AnchorSet.of(rows), "nll", draws=fit.draws)
    table = loss([fit.sigma, fit.sigma * 1.01])
    assert fit.limit is not None
    # Float32 sums of other batches: 1e-6 of the loss, a thousandth of the tolerance.
    room = 1e-6 * fit.baseline
    assert float(table.rows[0].mean()) <= fit.limit + room
    assert float(table.rows[1].mean()) > fit.limit - room


def test_real_held_out_rows_raise_no_alarm_and_expose_training_rows(shared: Path) -> None:
    bayes, held_out = rows_of(shared, "validation.jsonl", 125)
    fit = tfb.fit_sigma(bayes, held_out, mode="tail", tail=1)
    assert not any(TRAINED in note for note in fit.notes)
    _, training = rows_of(shared, "anchor.jsonl", 125)
    told = tfb.fit_sigma(bayes, training, held_out=held_out)
    said = [n for n in told.notes if "lies far below that of the held-out rows" in n]
    assert len(said) == 1 and "as on the adapter's own training rows" in said[0]
    other = tfb.fit_sigma(bayes, held_out, held_out=training)
    assert not any("lies far below" in note for note in other.notes)


def test_held_out_rows_need_labels(shared: Path) -> None:
    bayes, rows = rows_of(shared, "anchor.jsonl", 10)
    bare = EncodedRows(rows.ids, rows.input_ids, rows.label_ids, [None] * 10, rows.choices)
    for anchors, held_out in ((rows, bare), (bare, rows)):
        with pytest.raises(ValueError, match="needs a label on every anchor"):
            tfb.fit_sigma(bayes, anchors, "pseudo_nll", held_out=held_out)
