"""The study of decisions: what a split shows, and the table of its rows."""

from __future__ import annotations

import torch

from benchmarks.calibration import decisions

ENVIRONMENT = {
    "cpu": {"model": "a CPU", "cores": 2},
    "gpu": None,
    "commit": {"id": "0" * 40, "dirty": False},
    "versions": {"torch": "1", "transformers": "2", "peft": "3"},
}


def test_halves_do_not_meet() -> None:
    """Where the right class is always the likeliest all is right, and every row is answered."""
    labels = torch.arange(400) % 4
    probs = 0.6 * torch.nn.functional.one_hot(labels, 4) + 0.1
    found = [*decisions.outcomes(probs, labels, 0.1, torch.Generator().manual_seed(0))]
    assert len(found) == decisions.SPLITS
    sure = {"coverage": 1.0, "size": 1.0, "accepted": 1.0, "error": 0.0, "above_target": 0.0}
    assert all(f == sure for f in found)
    assert decisions.summary(found) == sure | {"coverage_sd": 0.0}


def test_a_target_out_of_reach_is_never_answered() -> None:
    labels = torch.arange(400) % 4
    probs = torch.full((400, 4), 0.1).index_fill(1, torch.tensor([0]), 0.7)
    found = [*decisions.outcomes(probs, labels, 0.1, torch.Generator().manual_seed(0))]
    assert {f["accepted"] for f in found} == {f["above_target"] for f in found} == {0.0}
    assert {f["size"] for f in found} == {4.0} and {f["coverage"] for f in found} == {1.0}


def test_table() -> None:
    """One line for each task and predictive, means over seeds, in percent."""
    assert "Not run yet" in decisions.decisions_table([])
    figures = dict.fromkeys(decisions.SHARES, 0.5) | {"size": 1.25}
    rows = [
        figures
        | {"environment": ENVIRONMENT, "date": "2026-01-01"}
        | {"point": point, "accepted": 0.2 + 0.1 * seed}
        for seed in (0, 1)
        for method in decisions.METHODS
        for point in [{"task": "t", "method": method, "seed": seed, "target_error": 0.1}]
    ]
    table = decisions.decisions_table(rows)
    assert table.count("| t |") == 2
    for title in decisions.METHODS.values():
        line = f"| t | {title} | 50.0 | 50.0 ± 50.0 | 1.25 | 10 | 25.0 | 50.0 | 50.0 |"
        assert line in table.splitlines()
