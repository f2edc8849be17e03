"""The command line as tests call it."""

from __future__ import annotations

from collections.abc import Callable

# Exit status, stdout and stderr of ``tfb`` with these arguments; the fixture is ``tfb_command``.
Run = Callable[..., tuple[int, str, str]]


def fit_command(base: object, adapter: object, data: object, output: object) -> tuple[object, ...]:
    """``tfb fit`` of an adapter whose configuration does not tell its base."""
    return ("fit", adapter, data, "--base", base, "--output", output)
