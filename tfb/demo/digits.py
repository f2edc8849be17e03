"""The demo's data: scikit-learn's 1,797 handwritten digits as choice rows.

A prompt is an 8x8 image: eight lines of eight letters ("a" = blank ... "q" = full ink), then "=".
Splits: "pretrain" trained the base model (tools/train_demo.py), the adapter over-fits "train",
"anchor" fits sigma, "test" is reported; "shifted" is the test digits, turned and noisy.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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


class Digits(NamedTuple):
    """One split: places in scikit-learn's order [N], images [N, 8, 8] of 0..16, labels [N]."""

    indices: np.ndarray
    images: np.ndarray
    labels: np.ndarray


@cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """Return all images and labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the demo's digits come with scikit-learn, which is not installed; "
            'remedy: pip install "tfb[demo]"'
        ) from error
    data: Any = load_digits()
    return data.images.astype(np.int64), data.target.astype(np.int64)


def split_indices(name: str) -> np.ndarray:
    """Return the places of a split's digits in scikit-learn's order; "shifted" has "test"'s."""
    if name not in SPLITS:
        raise ValueError(f"unknown split {name!r}; the splits are {', '.join(SPLITS)}")
    # RandomState, not default_rng: NumPy freezes its stream, and the shipped adapter depends on it.
    order = np.random.RandomState(SPLIT_SEED).permutation(N_DIGITS)
    parts = np.split(order, np.cumsum(list(SIZES.values())))
    return parts[list(SIZES).index("test" if name == "shifted" else name)]


def rotate(images: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Turn images [N, 8, 8] counter-clockwise, bilinearly, blank beyond the border."""
    turned = [
        ndimage.rotate(image.astype(float), angle, reshape=False, order=1, mode="grid-constant")
        for image, angle in zip(images, degrees, strict=True)
    ]
    return np.stack(turned)


def shift(images: np.ndarray) -> np.ndarray:
    """Turn a whole split's images alternately left and right, and add Gaussian pixel noise."""
    degrees = np.where(np.arange(len(images)) % 2 == 0, SHIFT_DEGREES, -SHIFT_DEGREES)
    noise = np.random.RandomState(SHIFT_SEED).standard_normal(images.shape) * SHIFT_NOISE
    return np.clip(np.rint(rotate(images, degrees) + noise), 0, LEVELS - 1).astype(np.int64)


def digits(name: str) -> Digits:
    """Return one split as arrays."""
    indices = split_indices(name)
    images, labels = _load()
    chosen = images[indices]
    return Digits(indices, shift(chosen) if name == "shifted" else chosen, labels[indices])


def to_prompt(image: np.ndarray) -> str:
    """Return one image as eight lines of letters and the answer mark."""
    if image.shape != (SIDE, SIDE):
        raise ValueError(f"an image has shape {(SIDE, SIDE)}, got {image.shape}")
    if image.min() < 0 or image.max() >= LEVELS:
        raise ValueError(f"intensities lie in 0..{LEVELS - 1}, got {image.min()}..{image.max()}")
    lines = [" ".join(PIXEL_TOKENS[value] for value in line) for line in image.tolist()]
    return "\n".join([*lines, ANSWER_TOKEN])


def rows(name: str) -> list[dict[str, Any]]:
    """Return one split as choice rows; ids are "digits-17", in "shifted" "shifted-17"."""
    data, prefix = digits(name), "shifted" if name == "shifted" else "digits"
    return [
        {"id": f"{prefix}-{i}", "prompt": to_prompt(x), "choices": [*CHOICES], "label": int(y)}
        for i, x, y in zip(*data, strict=True)
    ]
