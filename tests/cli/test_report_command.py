"""What a report's last section says of how it was made."""

from __future__ import annotations

from typing import Any

from tfb.cli.report import facts

FIT: dict[str, Any] = {
    "metric": "nll", "objective": "max_variance", "search": "grid", "tolerance": 0.003,
    "relative": True, "mode": "full", "tail": None, "draws": 4, "seed": 5, "anchors": 500,
    "anchor_hash": "f9f44bf0e20a1234", "kl": 34490.0, "prior_sigma": 0.1221, "compat": None,
}  # fmt: skip
SIDECAR: dict[str, Any] = {
    "sigma": 0.0214928, "seed": 5, "mode": "full", "tail": None, "layers": {"a": 1.0, "b": 1.0},
    "base": {"model_type": "llama"}, "adapter_sha256": "0123456789abcdef", "fit": FIT,
    "extra": {"anchors": "my anchors.jsonl"}, "versions": {"tfb": "0.1.0", "torch": "2.13"},
}  # fmt: skip


def test_facts_name_what_the_artifact_keeps() -> None:
    assert facts(SIDECAR, 10) == {
        "σ": "0.0214928",
        "Mode": "full: noise at every token",
        "Draws": "10 in this report, in pairs of opposite noise; seed 5",
        "Model": "llama, 2 adapted matrices with noise",
        "Search": "grid, 4 draws at each σ, seed 5",
        "Anchors": "my anchors.jsonl, 500 rows, hash f9f44bf0e20a",
        "KL divergence": "3.449e+04 nats from a prior of scale 0.1221",
        "Versions at the fit": "tfb 0.1.0, torch 2.13",
        "Adapter": "SHA-256 0123456789ab",
    }


def test_facts_of_an_artifact_without_a_fit() -> None:
    """Saved from Python: no search, no file of anchors."""
    found = facts({**SIDECAR, "fit": None, "extra": {}, "mode": "tail", "tail": 2}, 10)
    assert found["Mode"] == "tail: noise at the last 2 tokens of a prompt"
    assert not {"Search", "Anchors", "KL divergence"} & set(found)


def test_no_draws_are_claimed_where_sigma_is_zero() -> None:
    assert facts({**SIDECAR, "sigma": 0.0}, 10)["Draws"].startswith("none: ")


def test_multipliers_are_said() -> None:
    adapted = {**SIDECAR, "layer_scales": {"a": 0.5, "b": 2.0}}
    assert facts(adapted, 10)["Layer scales"] == "σ times 0.5 to 2, by layer"
    plain = {**SIDECAR, "layer_scales": {"a": 1.0, "b": 1.0}}
    assert "Layer scales" not in facts(plain, 10)
