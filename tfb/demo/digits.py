"""The demo's data: scikit-learn's 1,797 handwritten digits as choice rows.

Each digit is an 8x8 image with intensities 0..16. A row's prompt is the image as text: eight
lines of eight letters ("a" = 0 = blank ... "q" = 16 = full ink), then a line with "=". The next
token is the digit:

    {"id": "digits-17", "prompt": "a a d p ...\\n=", "choices": ["0", ..., "9"], "label": 3}

This is the row format of every other data file of the library, so the demo runs the same code as
a real task does. Five splits, by one fixed permutation:

    pretrain   700  trains the base model (see tools/train_demo.py); the demo itself never reads it
    train      150  the rows the LoRA adapter is fitted to, and over-fits
    anchor     200  held out and labelled: fits sigma and the temperature
    test       747  held out: what is reported
    shifted    747  the same test digits, turned by 20 degrees and with pixel noise

The first four share no digit. scikit-learn is imported when rows are asked for, never on import.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

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

    indices: int [N], position of each digit in scikit-learn's order.
    images:  int [N, 8, 8], intensities 0..16.
    labels:  int [N], 0..9.
    """

    indices: np.ndarray
    images: np.ndarray
    labels: np.ndarray


@cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """All images, int [1797, 8, 8], and labels, int [1797]."""
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
    """Positions of a split's digits in scikit-learn's order: int [N]; "shifted" has "test"'s.

    Raises ValueError for a name not in SPLITS.
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
    """Turn each image about its centre, bilinearly, blank beyond the border.

    images: [N, 8, 8]; degrees: [N], positive turns counter-clockwise. Returns float64 [N, 8, 8].
    Plain NumPy, so that a shifted digit does not depend on an image library's version.
    """
    count = len(images)
    centre = (SIDE - 1) / 2
    angle = np.deg2rad(degrees)[:, None, None]
    row, col = np.meshgrid(np.arange(SIDE) - centre, np.arange(SIDE) - centre, indexing="ij")
    source_row = np.cos(angle) * row + np.sin(angle) * col + centre
    source_col = -np.sin(angle) * row + np.cos(angle) * col + centre
    # A border of two blank pixels lets the four neighbours be read without bounds checks.
    padded = np.pad(images.astype(np.float64), ((0, 0), (2, 2), (2, 2)))
    source_row = np.clip(source_row + 2, 0, SIDE + 2)
    source_col = np.clip(source_col + 2, 0, SIDE + 2)
    top, left = np.floor(source_row).astype(int), np.floor(source_col).astype(int)
    down, right = source_row - top, source_col - left
    which = np.arange(count)[:, None, None]
    upper = (1 - right) * padded[which, top, left] + right * padded[which, top, left + 1]
    lower = (1 - right) * padded[which, top + 1, left] + right * padded[which, top + 1, left + 1]
    return (1 - down) * upper + down * lower


def shift(images: np.ndarray) -> np.ndarray:
    """Turn the images by SHIFT_DEGREES, alternately left and right, and add Gaussian pixel noise.

    images: int [N, 8, 8], 0..16. Returns the same shape and range. The noise depends on the
    position in the array, so pass a whole split.
    """
    degrees = np.where(np.arange(len(images)) % 2 == 0, SHIFT_DEGREES, -SHIFT_DEGREES)
    noise = np.random.RandomState(SHIFT_SEED).standard_normal(images.shape) * SHIFT_NOISE
    return np.clip(np.rint(rotate(images, degrees) + noise), 0, LEVELS - 1).astype(np.int64)


def digits(name: str) -> Digits:
    """One split as arrays.

    Raises ValueError for an unknown name, ImportError without scikit-learn.
    """
    indices = split_indices(name)
    images, labels = _load()
    chosen = images[indices]
    return Digits(indices, shift(chosen) if name == "shifted" else chosen, labels[indices])


def to_prompt(image: np.ndarray) -> str:
    """The text of one image, int [8, 8] with 0..16: eight lines of letters and the answer mark.

    Raises ValueError for another shape or an intensity outside 0..16.
    """
    if image.shape != (SIDE, SIDE):
        raise ValueError(f"an image has shape {(SIDE, SIDE)}, got {image.shape}")
    if image.min() < 0 or image.max() >= LEVELS:
        raise ValueError(f"intensities lie in 0..{LEVELS - 1}, got {image.min()}..{image.max()}")
    lines = [" ".join(PIXEL_TOKENS[value] for value in line) for line in image.tolist()]
    return "\n".join([*lines, ANSWER_TOKEN])


def rows(name: str) -> list[ChoiceRow]:
    """One split as choice rows, in the split's order; ids "digits-17", in "shifted" "shifted-17".

    Raises ValueError for an unknown name, ImportError without scikit-learn.
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


def write_jsonl(
    folder: Path | str, names: tuple[str, ...] = ("train", "anchor", "test", "shifted")
) -> dict[str, Path]:
    """Write splits as FOLDER/NAME.jsonl, one row a line; returns the path of each."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name in names:
        paths[name] = target / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows(name)))
    return paths
