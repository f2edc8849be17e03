"""The demo's data: five fixed splits of the handwritten digits, as text and back."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest

from tfb.data.readers import read_rows
from tfb.demo import digits

# SHA-256 of the images and labels as bytes. They must not change: the shipped adapter was fitted
# to "train", and the README's figures are over "test" and "shifted".
GOLDEN = {
    "pretrain": "3959dba05b7b78508da3ecbcc486d5dbedf139c3722a965871473ad1ac26dc6e",
    "train": "501f38d73601b1f0884b53da88c7e3cdd0bbd7bf53d2f8452005cd1214762072",
    "anchor": "e1cfa67231343cf471cb7ce39117596ad16ac26897eb4311463403e1fc8cc45b",
    "test": "0a4686656d22b6af076cfc7c99e1144caaf76555242486332d35961e288cdfa3",
    "shifted": "671f7cdf9774d4ea4b67339732544accfaa863b64d81cd0b1c14168c71cfb567",
}


def from_prompt(prompt: str) -> np.ndarray:
    """The image that ``to_prompt`` wrote, by the rule in the module's docstring."""
    *lines, answer = prompt.split("\n")
    assert answer == "="
    return np.array([["abcdefghijklmnopq".index(c) for c in line.split(" ")] for line in lines])


def test_splits_share_no_digit_and_use_all() -> None:
    sizes = {name: len(digits.split_indices(name)) for name in digits.SPLITS}
    assert sizes == {"pretrain": 700, "train": 150, "anchor": 200, "test": 747, "shifted": 747}
    members = {name: set(digits.split_indices(name).tolist()) for name in digits.SIZES}
    assert all(not members[a] & members[b] for a, b in combinations(members, 2))
    assert set().union(*members.values()) == set(range(1797))
    assert np.array_equal(digits.split_indices("shifted"), digits.split_indices("test"))


@pytest.mark.parametrize("name", digits.SPLITS)
def test_splits_never_change(name: str) -> None:
    data = digits.digits(name)
    content = data.images.astype("u1").tobytes() + data.labels.astype("u1").tobytes()
    assert hashlib.sha256(content).hexdigest() == GOLDEN[name]
    assert data.images.min() == 0 and data.images.max() == 16
    assert set(data.labels.tolist()) == set(range(10))  # every class in every split


def test_shifted_digits_are_the_test_digits_turned_and_noisy() -> None:
    test, shifted = digits.digits("test"), digits.digits("shifted")
    assert np.array_equal(test.labels, shifted.labels)
    assert np.array_equal(test.indices, shifted.indices)
    assert np.array_equal(shifted.images, digits.shift(test.images))
    assert all(not np.array_equal(a, b) for a, b in zip(test.images, shifted.images, strict=True))


def test_rotation() -> None:
    """A quarter turn permutes pixels exactly up to rounding, none leaves the image as it is, and
    what turns in from beyond the border is blank."""
    images = digits.digits("test").images[:6]
    np.testing.assert_array_equal(digits.rotate(images, np.zeros(6)), images)
    turned = digits.rotate(images, np.full(6, 90.0))
    np.testing.assert_allclose(turned, np.rot90(images, 1, axes=(1, 2)), atol=1e-10)
    full = np.full((1, 8, 8), 16)
    corner = digits.rotate(full, np.array([45.0]))[0]
    assert corner[0, 0] == 0 and corner[4, 4] == 16


@pytest.mark.parametrize("name", digits.SPLITS)
def test_prompts_round_trip(name: str) -> None:
    data, rows = digits.digits(name), digits.rows(name)
    prefix = "shifted" if name == "shifted" else "digits"
    for row, index, image, label in zip(rows, *data, strict=True):
        assert row["id"] == f"{prefix}-{index}" and row["label"] == label
        assert row["choices"] == list("0123456789")
        np.testing.assert_array_equal(from_prompt(row["prompt"]), image)


def test_splits_are_ordinary_rows() -> None:
    """Their ids differ over all splits."""
    rows = read_rows([row for name in digits.SPLITS for row in digits.rows(name)])
    labels = [label for name in digits.SPLITS for label in digits.digits(name).labels.tolist()]
    assert [row.label for row in rows] == labels and len({row.id for row in rows}) == 1797 + 747


def test_bad_input() -> None:
    for ask in (digits.split_indices, digits.digits, digits.rows):
        with pytest.raises(ValueError, match="unknown split 'val'; the splits are pretrain, train"):
            ask("val")
    with pytest.raises(ValueError, match=r"an image has shape \(8, 8\), got \(4, 4\)"):
        digits.to_prompt(np.zeros((4, 4), dtype=int))
    for value in (-1, 17):
        with pytest.raises(ValueError, match=r"intensities lie in 0..16, got"):
            digits.to_prompt(np.full((8, 8), value))


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits._load.cache_clear()
    with pytest.raises(ImportError, match=r'scikit-learn, which .*pip install "tfb\[demo\]"'):
        digits.rows("test")


def test_import_does_not_need_scikit_learn() -> None:
    code = (
        "import sys, tfb.demo.digits; sys.exit('sklearn' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_assets_are_small() -> None:
    """2 MB at most, safetensors and text only."""
    files = [p for p in digits.ASSETS.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md"}
    assert 0 < sum(p.stat().st_size for p in files) <= 2_000_000
    assert digits.BASE / "model.safetensors" in files
    assert digits.ADAPTER / "adapter_model.safetensors" in files
