"""Tables of the paper's form: mean ± standard deviation over seeds, published figures in brackets.

In-distribution columns are the six trained tasks, shifted ones what OpenBookQA's adapter was
evaluated on. Runs of other settings (anchors, objective, prompts, ...) have tables of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.markdown import Row, table, taken_on
from benchmarks.paper.tasks import OOD_FROM, TASKS, TRAINED

PUBLISHED: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parent / "published.json").read_text(encoding="utf-8")
)
METRICS = {"ACC": ("accuracy", 100, 2), "ECE": ("ece", 100, 2), "NLL": ("nll", 1, 3)}
"""Heading: the row's field, its factor, decimals."""
UNITS = {"ACC": "ACC %", "ECE": "ECE %", "NLL": "NLL"}
KINDS = {"mle": "MLE", "map": "MAP", "blob-mean": "BLoB-mean"}
METHODS = {"adapter": "", "tfb": " + TFB"}
NOT_RUN = (
    "*The table of Llama-3.1-8B has not been run here: neither the model nor the hub could be "
    "reached. The published figures that we have, ours to stand beside them:*"
)


def line(row: Row) -> str:
    """Return one row, as it is measured."""
    p = row["point"]
    figures = ", ".join(f"{UNITS[m]} {_figure(m, row[f])}" for m, (f, _, _) in METRICS.items())
    name = KINDS[p["kind"]] + METHODS[p["method"]]
    shift = "" if p["on"] == p["task"] else f" on {p['on']}"
    return f"{p['task']}{shift}, seed {p['seed']}, {name}: {figures}; sigma {row['sigma']:.4g}"


def results(rows: Sequence[Row]) -> str:
    """Return all tables of these rows, each setting and base model apart."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        p = row["point"]
        setting = {k: v for k, v in p["setting"].items() if k != "split"}
        key = json.dumps([p["base"], row["device"], setting], sort_keys=True)
        groups.setdefault(key, []).append(row)
    parts = []
    for group in groups.values():
        parts += [f"**{_heading(group)}**", _table(group, TRAINED, None)]
        shifted = [r for r in group if r["point"]["task"] == OOD_FROM]
        if any(r["point"]["on"] != OOD_FROM for r in shifted):
            shifts = (OOD_FROM, *(name for name in TASKS if name != OOD_FROM))
            parts += [f"trained on {OOD_FROM}:", _table(shifted, shifts, OOD_FROM)]
    return "\n\n".join(parts)


def paper_table(rows: Sequence[Row]) -> str:
    """Return what stands in README.md here: it says so where Llama-3.1-8B has not been run."""
    parts = []
    if not any(r["point"]["base"] in PUBLISHED["base"] for r in rows):
        parts += [NOT_RUN, _table([], TRAINED, None, base=PUBLISHED["base"][0])]
    if rows:
        parts += [results(rows), "mean ± standard deviation over seeds", taken_on(rows)]
    return "\n\n".join([*parts, f"<sub>[ ] {PUBLISHED['paper']}. {PUBLISHED['note']}</sub>"])


def _heading(group: Sequence[Row]) -> str:
    p = group[0]["point"]
    s = p["setting"]
    rule = "the scripts' rule" if s["compat"] else s["objective"]
    if s["compat"] or rule == "max_variance":
        rule += f", tolerance {s['tolerance']:g}"
    splits = sorted({r["point"]["setting"]["split"] for r in group})
    cut = "" if s["limit"] is None else f", first {s['limit']} rows only"
    return (
        f"{p['base']} ({group[0]['device']}): {s['anchor_rows']} {s['anchors']} anchors, {rule}, "
        f"{s['draws']} draws, prompts {s['form']}, {' and '.join(splits)} rows{cut}"
    )


def _table(
    rows: Sequence[Row], columns: Sequence[str], trained_on: str | None, base: str | None = None
) -> str:
    """Return metrics and methods down, tasks across.

    Args:
        rows: Of one setting.
        columns: The tasks.
        trained_on: The adapter's task; None: each task's own adapter.
        base: The base model's name, for a table without rows.
    """
    base = rows[0]["point"]["base"] if rows else base
    measured = {(r["point"]["task"], r["point"]["on"]) for r in rows}
    complete = trained_on is None and base in PUBLISHED["base"]
    used = [c for c in columns if complete or (trained_on or c, c) in measured]
    sources = {(r["point"]["kind"], r["point"]["adapter"]) for r in rows} or {("mle", None)}
    body = []
    for metric in METRICS:
        for kind, adapter in sorted(sources, key=lambda s: (list(KINDS).index(s[0]), s[1])):
            alone = [k for k, _ in sources].count(kind) == 1
            name = KINDS[kind] if alone else f"{KINDS[kind]} ({adapter})"
            own = [r for r in rows if r["point"]["adapter"] == adapter]
            for method, suffix in METHODS.items():
                cells = (_cell(own, base, metric, kind, method, trained_on or c, c) for c in used)
                body.append([UNITS[metric], name + suffix, *cells])
    return table(["", "", *used], body)


def _cell(
    rows: Sequence[Row],
    base: str | None,
    metric: str,
    kind: str,
    method: str,
    task: str,
    on: str,
) -> str:
    """Return the cell "mean ± sd [published]"; either may be missing."""
    wanted = {"kind": kind, "method": method, "task": task, "on": on}
    field, factor, digits = METRICS[metric]
    values = [
        factor * row[field]
        for row in rows
        if all(row["point"][name] == value for name, value in wanted.items())
    ]
    ours = f"{mean(values):.{digits}f}" if values else ""
    if len(values) > 1:
        ours += f" ± {stdev(values):.{digits}f}"
    theirs = [
        f"[{f[method]:.2f}]"
        for f in PUBLISHED["figures"]
        if base in PUBLISHED["base"]
        and (f["metric"], f["kind"], f["task"], f["on"]) == (metric, kind, task, on)
    ]
    return " ".join(filter(None, [ours, *theirs]))


def _figure(metric: str, value: float) -> str:
    _, factor, digits = METRICS[metric]
    return f"{factor * value:.{digits}f}"
