"""The table of the suite "layer": S samples of one layer on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.baselines import KEPT, RIVALS
from benchmarks.markdown import Row, spread, table, taken_on

NOT_MEASURED = "*Not measured yet: `python -m pytest benchmarks/test_layer.py --record`.*"
NAMES = {"baddbmm_kept": "baddbmm, kept noise", "naive_kept": "naive loop, kept noise",
         "naive": "naive loop"}  # fmt: skip


def layer_table(rows: Sequence[Row]) -> str:
    """A line for each layer, rank and T, three columns for each S; every point lost is listed."""
    if not rows:
        return NOT_MEASURED
    counts = sorted({r["point"]["S"] for r in rows})
    found = {(*_line(r), r["point"]["S"]): r for r in rows}
    lines = sorted({_line(r) for r in rows})
    body = [
        [
            f"{n} → {m}", str(r), str(T),
            *(cell for S in counts for cell in _cells(found.get((n, m, r, T, S)))),
        ]
        for n, m, r, T in lines
    ]  # fmt: skip
    headings = [
        heading
        for S in counts
        for heading in (f"S = {S}: naive loop / ours", "best rival / ours", "ours, base products")
    ]
    lost = [f"- {_name(r)}: {', '.join(r['losses'])}" for r in rows if r["losses"]]
    rounds = min(r["contenders"]["ours"]["rounds"] for r in rows)
    threads = sorted({r["environment"]["torch_threads"] for r in rows})
    note = (
        f"Median and quartiles of {rounds} or more interleaved rounds, {rows[0]['point']['dtype']}"
        f", torch threads: {', '.join(map(str, threads))}. Points left empty were not measured: a "
        "loop takes seconds there, and more with every rank. The best rival is the fastest of "
        "those that the point's row has."
    )
    parts = [table(("layer", "r", "T", *headings), body), note]
    parts.append("Points that a rival wins:\n\n" + ("\n".join(lost) or "none"))
    return "\n\n".join([*parts, taken_on(rows)])


def _line(row: Row) -> tuple[int, int, int, int]:
    p = row["point"]
    return p["n"], p["m"], p["r"], p["T"]


def _name(row: Row) -> str:
    n, m, r, T = _line(row)
    return f"{n} → {m}, r = {r}, T = {T}, S = {row['point']['S']}"


def _cells(row: Row | None) -> tuple[str, str, str]:
    """The loop's time and the best rival's over ours, and ours in base products."""
    if row is None:
        return "", "", ""
    ratios = {k: v for k, v in row["ratios"].items() if k in RIVALS | KEPT}
    best = min(ratios, key=lambda k: ratios[k]["median"])
    return (
        spread(ratios["naive"]), f"{spread(ratios[best])} {NAMES.get(best, best)}",
        spread(row["in_units_of"]["ratios"]["ours"]),
    )  # fmt: skip
