"""One table of what is tried and what is promised: the tests make it, docs/promises.md shows it.

``PYTHONPATH=.:tests python -m faults.cases`` writes the page's table anew.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "promises.md"
START, END = "<!-- promises -->", "<!-- /promises -->"
Test = TypeVar("Test", bound=Callable[..., Any])


class Promise(NamedTuple):
    """A row of the table: what one test tries, and what it holds true."""

    kind: str
    cases: tuple[str, ...]
    promise: str
    file: str


TABLE: dict[tuple[str, str], Promise] = {}  # by file and test


def promised(
    kind: str, promise: str, tried: Mapping[str, Any] | Iterable[str]
) -> Callable[[Test], Test]:
    """Put a test into the table; where ``tried`` has values, run it with each as ``fault``."""
    tried = tried if isinstance(tried, Mapping) else tuple(tried)

    def put(test: Test) -> Test:
        file = Path(test.__code__.co_filename).name
        TABLE[file, test.__name__] = Promise(kind, tuple(tried), promise, file)
        if not isinstance(tried, Mapping):
            return test
        return pytest.mark.parametrize("fault", tried.values(), ids=tried.keys())(test)

    return put


def table() -> str:
    """Return the table as Markdown, in parts by file and in the order of the tests."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f"faults.{path.stem}")
    cases: dict[str, dict[tuple[str, str], list[str]]] = {}
    for row in sorted(TABLE.values(), key=lambda row: row.file):
        cases.setdefault(row.file, {}).setdefault((row.kind, row.promise), []).extend(row.cases)
    lines = list[str]()
    for file, rows in cases.items():
        lines += [f"In `tests/faults/{file}`:", "", "| fault | tried | promised |", "|---|---|---|"]
        lines += [f"| {kind} | {'; '.join(c)} | {told} |" for (kind, told), c in rows.items()]
        lines += [""]
    return "\n".join(lines[:-1])


def filled(page: str) -> str:
    """Put the table between the marks of the page."""
    found = re.sub(f"{START}.*{END}", lambda _: f"{START}\n{table()}\n{END}", page, flags=re.DOTALL)
    assert START in found
    return found


if __name__ == "__main__":
    from faults.cases import filled as fill  # what tests register is in the module of that name

    PAGE.write_text(fill(PAGE.read_text()))
