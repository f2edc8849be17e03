"""The demo's data: scikit-learn's 1,797 handwritten digits as choice rows.

A row's prompt is an 8x8 image as text: eight lines of eight letters ("a" = 0 = blank ... "q" = 16 =
full ink), then a line with "=". The next token is the digit. Splits by one fixed permutation:
"pretrain" trained the base model (tools/train_demo.py), "train" is what the adapter over-fits,
"anchor" fits sigma, "test" is what is reported. "shifted" is the test digits, turned and noisy.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from scipy import ndimage

ASSETS = Path(__file__).parent / "assets"
BASE = ASSETS / "base"
ADAPTER = ASSETS / "adapter"

SIDE = 8
LEVELS = 17
PIXEL_TOKENS = tuple("abcdefghijklmnopq")
ANSWER_TOKEN = "="
CHOICES = tuple("0123456789")

SIZES = {"pretrain": 700, "train": 150, "anchor": 200, "test": 747}
SPLITS = (*SIZES, "shifted")
N_DIGITS = sum(SIZES.values())

SPLIT_SEED = 2412
SHIFT_SEED = 5723
SHIFT_DEGREES = 20.0
SHIFT_NOISE = 2.0


class ChoiceRow(TypedDict):
    """One labelled choice row, as it stands in a JSONL file."""

    id: str
    prompt: str
    choices: list[str]
    label: int


class Digits(NamedTuple):
    """One split as arrays.

    Attributes:
        indices: int [N], position of each digit in scikit-learn's order.
        images: int [N, 8, 8], intensities 0..16.
        labels: int [N], 0..9.
    """

    indices: np.ndarray
    images: np.ndarray
    labels: np.ndarray


@cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """Return all images, int [1797, 8, 8], and labels, int [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the demo's digits come with scikit-learn, which is not installed; "
            'remedy: pip install "tfb[demo]"'
        ) from error
    data: Any = load_digits()
    images = np.asarray(data.images).astype(np.int64)
    labels = np.asarray(data.target).astype(np.int64)
    if images.shape != (N_DIGITS, SIDE, SIDE):
        raise RuntimeError(
            f"scikit-learn's load_digits() gave images of shape {images.shape}, "
            f"expected {(N_DIGITS, SIDE, SIDE)}; the demo's splits hold for that data only"
        )
    return images, labels


def split_indices(name: str) -> np.ndarray:
    """Return the positions of a split's digits in scikit-learn's order; "shifted" has "test"'s.

    Raises:
        ValueError: a name not in SPLITS.
    """
    if name not in SPLITS:
        raise ValueError(f"unknown split {name!r}; the splits are {', '.join(SPLITS)}")
    # RandomState, not default_rng: NumPy freezes its stream, and the shipped adapter depends on it.
    order = np.random.RandomState(SPLIT_SEED).permutation(N_DIGITS)
    wanted = "test" if name == "shifted" else name
    start = 0
    for split, size in SIZES.items():
        if split == wanted:
            break
        start += size
    return order[start : start + SIZES[wanted]]


def rotate(images: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Turn images about their centres, bilinearly, blank beyond the border.

    Args:
        images: [N, 8, 8].
        degrees: [N], positive turns counter-clockwise.

    Returns:
        float64 [N, 8, 8].
    """
    turned = [
        ndimage.rotate(image.astype(float), angle, reshape=False, order=1, mode="grid-constant")
        for image, angle in zip(images, degrees, strict=True)
    ]
    return np.stack(turned)


def shift(images: np.ndarray) -> np.ndarray:
    """Turn images by SHIFT_DEGREES, alternately left and right, and add Gaussian pixel noise.

    The noise depends on the position in the array, so pass a whole split.

    Args:
        images: int [N, 8, 8], 0..16.

    Returns:
        The same shape and range.
    """
    degrees = np.where(np.arange(len(images)) % 2 == 0, SHIFT_DEGREES, -SHIFT_DEGREES)
    noise = np.random.RandomState(SHIFT_SEED).standard_normal(images.shape) * SHIFT_NOISE
    return np.clip(np.rint(rotate(images, degrees) + noise), 0, LEVELS - 1).astype(np.int64)


def digits(name: str) -> Digits:
    """Return one split as arrays.

    Raises:
        ValueError: an unknown name.
        ImportError: scikit-learn is missing.
    """
    indices = split_indices(name)
    images, labels = _load()
    chosen = images[indices]
    return Digits(indices, shift(chosen) if name == "shifted" else chosen, labels[indices])


def to_prompt(image: np.ndarray) -> str:
    """Return one image, int [8, 8], as eight lines of letters and the answer mark.

    Raises:
        ValueError: another shape or an intensity outside 0..16.
    """
    if image.shape != (SIDE, SIDE):
        raise ValueError(f"an image has shape {(SIDE, SIDE)}, got {image.shape}")
    if image.min() < 0 or image.max() >= LEVELS:
        raise ValueError(f"intensities lie in 0..{LEVELS - 1}, got {image.min()}..{image.max()}")
    lines = [" ".join(PIXEL_TOKENS[value] for value in line) for line in image.tolist()]
    return "\n".join([*lines, ANSWER_TOKEN])


def rows(name: str) -> list[ChoiceRow]:
    """Return one split as choice rows; ids are "digits-17", in "shifted" "shifted-17".

    Raises:
        ValueError: an unknown name.
        ImportError: scikit-learn is missing.
    """
    data = digits(name)
    prefix = "shifted" if name == "shifted" else "digits"
    return [
        ChoiceRow(
            id=f"{prefix}-{index}", prompt=to_prompt(image), choices=list(CHOICES), label=label
        )
        for index, image, label in zip(
            data.indices.tolist(), data.images, data.labels.tolist(), strict=True
        )
    ]
