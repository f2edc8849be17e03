"""Where the reference models, adapters and data lie."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.environment import REPOSITORY


def shared_folder() -> Path:
    """TFB_SHARED, or the folder ``shared`` beside the repository.

    Raises:
        FileNotFoundError: it holds no data.
    """
    configured = os.environ.get("TFB_SHARED")
    folder = Path(configured) if configured else REPOSITORY.parent / "shared"
    if not (folder / "data").is_dir():
        where = "TFB_SHARED" if configured else "the folder 'shared' beside the repository"
        raise FileNotFoundError(
            f"reference models and data not found: {where} has no folder 'data'; set TFB_SHARED to "
            "theirs"
        )
    return folder
