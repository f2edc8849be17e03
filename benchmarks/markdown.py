"""Markdown from result rows: what the tables of all suites share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Name = Callable[[Row], str]
"""What a row is called in lists beside its table."""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in rows)])


def blocks(*parts: str) -> str:
    """Join the parts that are not empty."""
    return "\n\n".join(filter(None, parts))


def bullets(title: str, lines: Sequence[str]) -> str:
    """Return a titled list, or nothing where there are no lines."""
    return blocks(title, "\n".join(f"- {line}" for line in lines)) if lines else ""


def spread(value: dict[str, float], digits: int = 2) -> str:
    """Return "median [q25, q75]"."""
    m, low, high = (f"{value[k]:.{digits}f}" for k in ("median", "q25", "q75"))
    return f"{m} [{low}, {high}]"


def spreads(ratios: Row, names: Iterable[str]) -> list[str]:
    """Return a cell for each name, empty where it was not measured."""
    return [spread(ratios[k]) if k in ratios else "" for k in names]


def missed(rows: Iterable[Row], name: Name, digits: str = ".2f") -> str:
    """Return a list of the targets that rows miss."""
    lines = [
        f"{name(row)}: {t['name']} is {t['value']:{digits}}, the target {t['bound']:{digits}}"
        for row in rows
        for t in row.get("targets", [])
        if not t["met"]
    ]
    return bullets("Targets that are missed:", lines)


def lost(title: str, rows: Iterable[Row], name: Name) -> str:
    """Return a list of the rows in which others are faster, or "none"."""
    lines = [f"{name(r)}: {', '.join(r['losses'])}" for r in rows if r.get("losses")]
    return bullets(title, lines) or blocks(title, "none")


def targets(rows: Sequence[Row], name: Name) -> str:
    """Return how many points meet each target, and every point that does not."""
    found = [t for row in rows for t in row.get("targets", [])]
    body = []
    for kind in dict.fromkeys(t["name"].partition(" (")[0] for t in found):
        own = [t for t in found if t["name"].partition(" (")[0] == kind]
        worst = (min if own[0]["at_least"] else max)(t["value"] for t in own)
        body.append([kind, f"{sum(t['met'] for t in own)} of {len(own)}", f"{worst:.3g}"])
    skipped = [f"{name(r)}: {r['skipped_point']}" for r in rows if "skipped_point" in r]
    return blocks(
        table(["target", "met", "worst"], body),
        missed(rows, name, ".3g"),
        bullets("Points that were skipped:", skipped),
    )


def taken_on(rows: Iterable[Row]) -> str:
    """Return one line on hardware, versions and commits."""
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
