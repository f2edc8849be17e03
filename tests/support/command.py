"""The command line as tests call it."""

from __future__ import annotations

from collections.abc import Callable

# Exit status, stdout and stderr of ``tfb`` with these arguments; the fixture is ``tfb_command``.
Run = Callable[..., tuple[int, str, str]]


def fit_command(model: object, adapter: object, anchors: object, out: object) -> tuple[object, ...]:
    """The arguments of ``tfb fit`` that it cannot do without."""
    options = ("--model", model, "--adapter", adapter, "--anchors", anchors, "--out", out)
    return ("fit", *options)
