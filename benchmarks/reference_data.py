"""Where the reference models, adapters and data lie."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.environment import REPOSITORY


def shared_folder() -> Path:
    """TFB_SHARED, or the folder ``shared`` in the repository (a copy that travels with it) or
    beside it.

    Raises:
        FileNotFoundError: none of them holds data.
    """
    configured = os.environ.get("TFB_SHARED")
    nearby = [REPOSITORY / "shared", REPOSITORY.parent / "shared"]
    for folder in [Path(configured)] if configured else nearby:
        if (folder / "data").is_dir():
            return folder
    where = "TFB_SHARED" if configured else "the folder 'shared' in or beside the repository"
    raise FileNotFoundError(
        f"reference models and data not found: {where} has no folder 'data'; set TFB_SHARED to "
        "theirs"
    )
