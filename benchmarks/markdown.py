"""Markdown from result rows: what the tables of all suites share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in rows)])


def spread(value: dict[str, float], digits: int = 2) -> str:
    """median [q25, q75]."""
    m, low, high = (f"{value[k]:.{digits}f}" for k in ("median", "q25", "q75"))
    return f"{m} [{low}, {high}]"


def taken_on(rows: Sequence[Row]) -> str:
    """One line on hardware, versions and commits."""
    found = []
    for row in rows:
        e = row["environment"]
        device = (e["gpu"] or {}).get("name") or f"{e['cpu']['model']}, {e['cpu']['cores']} cores"
        v = e["versions"]
        found.append(
            f"{device}; torch {v['torch']}, transformers {v['transformers']}, peft {v['peft']}; "
            f"commit {e['commit']['id'][:10]}{', changed' if e['commit']['dirty'] else ''}; "
            f"{row['date'][:10]}"
        )
    return "<sub>" + "<br>".join(dict.fromkeys(found)) + "</sub>"
