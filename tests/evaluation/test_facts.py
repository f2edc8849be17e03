"""What a report's last section says of how it was made."""

from __future__ import annotations

from typing import Any

from tfb.evaluation.report import facts

FIT: dict[str, Any] = {
    "search": "grid",
    "draws": 4,
    "seed": 5,
    "anchors": 500,
    "anchor_hash": "f9f44bf0e20a1234",
    "kl": 34490.0,
    "prior_sigma": 0.1221,
    "passes": 14.0,
    "stopped": "least measured",
}
SIDECAR: dict[str, Any] = {
    "sigma": 0.0214928,
    "seed": 5,
    "mode": "full",
    "tail": None,
    "layers": {"a": 1.0, "b": 1.0},
    "base": {"model_type": "llama"},
    "files": {"adapter_model.safetensors": "0123456789abcdef"},
    "fit": FIT,
    "extra": {"anchors": "my anchors.jsonl"},
    "versions": {"tfb": "0.1.0", "torch": "2.13"},
}


def test_facts_name_what_the_artifact_keeps() -> None:
    assert facts(SIDECAR, 10) == {
        "σ": "0.0214928",
        "Temperature": "1",
        "Mode": "full",
        "Draws": "10, antithetic; seed 5",
        "Model": "llama, 2 matrices with noise",
        "Search": "grid, 4 draws at each σ, 14 passes over the anchors, seed 5; least measured",
        "Anchors": "my anchors.jsonl, 500 rows, hash f9f44bf0e20a",
        "KL": "3.449e+04 nats from a prior of scale 0.1221",
        "Versions": "tfb 0.1.0, torch 2.13",
        "Adapter": "SHA-256 0123456789ab",
    }


def test_facts_of_an_artifact_without_a_fit() -> None:
    """Saved from Python: no search, no file of anchors."""
    found = facts({**SIDECAR, "fit": None, "extra": {}, "mode": "tail", "tail": 2}, 10)
    assert found["Mode"] == "tail, last 2 of the prompt's tokens"
    assert not {"Search", "Anchors", "KL"} & set(found)


def test_the_temperature_is_told() -> None:
    """To four digits; the record above, as 0.1.0 wrote it, names none: T = 1."""
    assert facts({**SIDECAR, "temperature": 1.73205}, 10)["Temperature"] == "1.732"


def test_no_draws_are_claimed_where_sigma_is_zero() -> None:
    assert facts({**SIDECAR, "sigma": 0.0}, 10)["Draws"] == "none"
