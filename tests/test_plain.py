"""Plain data: what was written comes back, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfb.plain import json_sha256, listed, parse_json, shown, typed

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    LEAVES | TEXT,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3),
    max_leaves=6,
)


@dataclass(frozen=True)
class Inner:
    share: float
    pair: tuple[int, str] | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    many: tuple[Inner, ...] = ()
    by_name: dict[str, float] | None = None
    any: Any = None


def test_records_come_back() -> None:
    made = Outer("a", (Inner(0.5, (1, "x")), Inner(1.0)), {"b": 2.0}, [1, {}])
    assert typed(Outer, asdict(made) | {"unknown": 1}) == made
    assert typed(Outer, {"name": "a", "many": [{"share": 1}]}).many[0] == Inner(1.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"content: expected an object, got \[\]"),
        ({}, "name is missing"),
        ({"name": 1}, "name: expected text, got 1"),
        ({"name": "a", "many": {}}, r"many: expected a list, got \{\}"),
        ({"name": "a", "many": [{}]}, r"many\.share is missing"),
        ({"name": "a", "many": [{"share": True}]}, r"many\.share: expected a finite number"),
        ({"name": "a", "many": [{"share": 1, "pair": [1]}]}, r"many\.pair: expected a list"),
        (
            {"name": "a", "many": [{"share": 1, "pair": [1.0, "x"]}]},
            r"many\.pair: expected a whole number",
        ),
        ({"name": "a", "by_name": {"b": 10**309}}, r"by_name\.b: expected a finite number"),
        ({"name": "a", "by_name": {"b": float("nan")}}, r"by_name\.b: expected a finite number"),
    ],
)
def test_other_types_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        typed(Outer, value)


@settings(max_examples=30)
@given(VALUES)
def test_json_comes_back(value: Any) -> None:
    found = parse_json(json.dumps(value).encode())
    assert found == value and json_sha256(found) == json_sha256(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**5, "nested too deep"),
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "the key 'a' stands twice"),
        ("1" * 5000, "integer string conversion"),
        ("[1,]", "Expecting value|Illegal trailing comma"),
        ("", "Expecting value"),
    ],
)
def test_what_nobody_wrote_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_values_in_a_message() -> None:
    assert shown("a" * 100) == "'aaaaaaaaaaaa...aaaaaaaaaaaaa'" and shown([1]) == "[1]"
    assert shown(10**5000) == "a value of type int"
    assert listed("abcd") == "a, b, c, d" and listed("abcde") == "a, b, c, d, ..."
