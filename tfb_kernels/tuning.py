"""What was measured of each card, from ``data/launch.json``, and which card a device is.

One entry for each architecture ("sm_90", "gfx942", ..., and "cpu"), and "default" for every one
that has none. ``benchmarks/gpu.sh --stage sweep`` measures a GPU and writes its entry.

    kernels.<kernel>   tile sizes (see launch.py)
    paths              thresholds: ``Paths``
    measured           device, date, commit and medians behind an entry; null: chosen by counting

Needs no Triton: plain torch asks here too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

LAUNCH_FILE = Path(__file__).parent / "data" / "launch.json"
PROCESSORS_OF_A_CPU = 4  # what the interpreter fills: few, and yet in_features is split

_P = ParamSpec("_P")
_T = TypeVar("_T")
_caches: list[Any] = []


def cached(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Remember what was decided from the data file, until ``reload``."""
    _caches.append(lru_cache(maxsize=4096)(function))
    found: Callable[_P, _T] = _caches[-1]
    return found


def reload() -> None:
    """Forget everything that was read from ``LAUNCH_FILE`` or decided from it."""
    for cache in _caches:
        cache.cache_clear()


# --- the device -----------------------------------------------------------------------------------


def architecture(device: torch.device) -> str:
    """Return "sm_90", "gfx942", ... of this very device; "cpu" for what is no GPU."""
    return _gpu(_index(device))[0] if device.type == "cuda" else "cpu"


def processors(device: torch.device) -> int:
    """Return how many multiprocessors (compute units) this very device has."""
    return _gpu(_index(device))[1] if device.type == "cuda" else PROCESSORS_OF_A_CPU


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cached
def _gpu(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = str(properties.gcnArchName).partition(":")[0]
    else:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
    return name, int(properties.multi_processor_count)


# --- the data file --------------------------------------------------------------------------------


@cached
def table() -> dict[str, Any]:
    """Read the data file, by architecture."""
    data: dict[str, Any] = json.loads(LAUNCH_FILE.read_text())["architectures"]
    return data


def entry(arch: str) -> dict[str, Any]:
    """Return an architecture's own settings, those it does not name from "default"."""
    default, own = table()["default"], table().get(arch, {})
    return {part: default[part] | own.get(part, {}) for part in ("kernels", "paths")}


@dataclass(frozen=True)
class Paths:
    """Where one way of computing the same begins to beat another.

    Attributes:
        generate_min_rows: rows that share a stream from which noise is written once and multiplied
            by the vendor's library; below, registers make it again for each block of rows.
        merge_rows: see ``merge_min_rows``.
    """

    generate_min_rows: int
    merge_rows: float


@cached
def paths(arch: str) -> Paths:
    """Return the thresholds of an architecture."""
    return Paths(**entry(arch)["paths"])


def merge_min_rows(m: int, n: int, device: torch.device) -> float:
    """Return the rows of a draw from which merging its update into W [m, n] beats adding it.

    Merging reads and writes the weight, 2 n m numbers; adding reads x and the base output and
    writes the result, n + 2 m a row. ``merge_rows`` is what was measured of that ratio.
    """
    return paths(architecture(device)).merge_rows * 2 * n * m / (n + 2 * m)


# A graph takes the answer and does not trace how a file is read: what
# torch.compiler.assume_constant_result does, without its import of Dynamo and Triton.
merge_min_rows._dynamo_marked_constant = True  # type: ignore[attr-defined]
