"""Which modules become Bayesian: all, by name, by predicate, by block; never none."""

from __future__ import annotations

from typing import Any

import pytest

import tfb
from tfb.adapters.bridge import LastLayers, block_number, last_layers, select_layers

# Not in order: the adapter's own order is kept, and 10 comes after 9, not after 1.
NAMES = [
    "model.layers.10.mlp.up_proj",
    "model.layers.2.self_attn.q_proj",
    "model.layers.2.mlp.up_proj",
    "model.layers.9.self_attn.q_proj",
    "lm_head",
]


def test_none_is_all() -> None:
    assert select_layers(NAMES, None) == NAMES


def test_regular_expression_searches_the_name() -> None:
    assert select_layers(NAMES, "q_proj") == [NAMES[1], NAMES[3]]
    assert select_layers(NAMES, r"\.2\.") == [NAMES[1], NAMES[2]]
    assert select_layers(NAMES, "^lm_head$") == ["lm_head"]
    assert select_layers(NAMES, "") == NAMES


def test_predicate_of_the_name() -> None:
    assert select_layers(NAMES, lambda name: name.endswith("up_proj")) == [NAMES[0], NAMES[2]]


@pytest.mark.parametrize(
    ("k", "chosen"),
    [(0, [4]), (1, [0, 4]), (2, [0, 3, 4]), (3, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])],
)
def test_last_layers_counts_the_blocks_that_are_adapted(k: int, chosen: list[int]) -> None:
    """Blocks 2, 9 and 10, by number; what stands outside blocks is always kept."""
    assert select_layers(NAMES, last_layers(k)) == [NAMES[i] for i in chosen]


def test_last_layers_is_public_and_comparable() -> None:
    assert tfb.last_layers(2) == LastLayers(2) == last_layers(2) != last_layers(1)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.11.mlp.up_proj", 11),
        ("bert.encoder.layer.0.output.dense", 0),
        ("transformer.h.3.mlp.experts.5.w1", 3),
        ("lm_head", None),
        ("layer7.fc2", None),
        ("", None),
    ],
)
def test_block_number_is_the_first_number(name: str, number: int | None) -> None:
    assert block_number(name) == number


def test_order_and_repeats_of_the_names_are_kept() -> None:
    assert select_layers(["b", "a", "b"], "[ab]") == ["b", "a", "b"]


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (
            "k_proj",
            ValueError,
            "layers='k_proj' selects none of the 5 modules: model.layers.10",
        ),
        (lambda name: False, ValueError, "selects none of the 5 modules"),
        ("(", ValueError, r"layers='\(' is not a regular expression: missing \)"),
        (3, TypeError, r"a predicate of the module's name or tfb.last_layers\(k\), got int"),
        (["lm_head"], TypeError, "expected None, a regular expression, .* got list"),
    ],
)
def test_bad_selection(layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select_layers(NAMES, layers)


def test_nothing_selected_lists_some_names() -> None:
    many = [f"model.layers.{i}.q_proj" for i in range(20)]
    with pytest.raises(ValueError, match="none of the 20 modules") as caught:
        select_layers(many, last_layers(0))
    assert str(caught.value).endswith(", ".join(many[:8]) + ", ...")
    with pytest.raises(ValueError, match=r"none of the 0 modules: $"):
        select_layers([], None)


def test_negative_count() -> None:
    with pytest.raises(ValueError, match=r"last_layers\(-1\): expected k >= 0"):
        last_layers(-1)
