"""The command line as tests call it, and the processes that they start."""

from __future__ import annotations

import os
from collections.abc import Callable

from benchmarks.environment import REPOSITORY

# Exit status, stdout and stderr of ``tfb`` with these arguments; the fixture is ``tfb_command``.
Run = Callable[..., tuple[int, str, str]]


def fit_command(base: object, adapter: object, data: object, output: object) -> tuple[object, ...]:
    """``tfb fit`` of an adapter whose configuration does not tell its base."""
    return ("fit", adapter, data, "--base", base, "--output", output)


def environment() -> dict[str, str]:
    """That of a process which finds what is tested and its helpers, with one thread."""
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, paths))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
