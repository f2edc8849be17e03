"""Tables of the suites "predict" and "passes", and of "model", whose results are a GPU's."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.markdown import Row, blocks, missed, spread, spreads, table, taken_on, targets

NO_ROWS = "*No rows yet.*"
ONE_PASS = (
    "Median and quartiles of {rounds} or more interleaved rounds; a pass is one forward of the "
    "deterministic adapter on all rows in one batch, which is also what ours takes by default."
)


# --- predict against loops ------------------------------------------------------------------------


def predict_table(rows: Sequence[Row]) -> str:
    """Return the loops' time over ours, everything in passes, and how each of them ran."""
    if not rows:
        return NO_ROWS
    body = []
    for row in rows:
        units = row["in_units_of"]["ratios"]
        body.append(
            [
                _predict_name(row),
                *spreads(row["ratios"], ("naive", "flipout")),
                *spreads(units, ("ours", "naive", "ours_default")),
                _batches(row),
                spread(units["noise"], 3),
            ]
        )
    headings = (
        "model",
        "naive loop / ours",
        "Flipout loop / ours",
        "ours, in passes",
        "naive, in passes",
        "ours by default, in passes",
        "rows a batch",
        "all noise once, in passes",
    )
    rounds = min(r["contenders"]["ours"]["rounds"] for r in rows)
    return blocks(
        table(headings, body),
        ONE_PASS.format(rounds=rounds),
        missed(rows, _predict_name),
        taken_on(rows),
    )


def _predict_name(row: Row) -> str:
    p, device = row["point"], row["device"]
    if device == "cpu":
        device = f"cpu, threads: {row['environment']['torch_threads']}"
    return f"{p['model']}, {p['rows']} rows x {p['tokens']} tokens ({device})"


def _batches(row: Row) -> str:
    """Return the rows a batch that each contender was fastest with, and ours' draws a pass."""
    if "chosen" not in row:  # from before batches were chosen
        return f"{row['point']['rows']} for all"
    chosen = row["chosen"]
    each = chosen["ours"]["draws_per_pass"] or "default"
    loops = ", ".join(f"{k} {chosen[k]['rows']}" for k in ("naive", "flipout"))
    return f"ours {chosen['ours']['rows']} (draws a pass: {each}), {loops}"


# --- what draws cost in passes --------------------------------------------------------------------

PASSES = {
    "ours": "full, S = 10",
    "full_4": "full, S = 4",
    "full_2": "full, S = 2",
    "quarter_10": "last quarter of the blocks, S = 10",
    "last_10": "last layer, S = 10",
    "last_100": "last layer, S = 100",
    "tail_10": "tail k = 1, S = 10",
    "tail_32": "tail k = 1, S = 32",
    "naive": "naive PEFT loop, S = 10",
    "flipout": "Flipout loop, S = 10",
    "base": "no adapter, one pass",
}


def passes_table(rows: Sequence[Row]) -> str:
    """Return the cost of every way to draw, in deterministic passes, and the targets missed."""
    if not rows:
        return NO_ROWS
    columns: dict[str, Row] = {}
    for row in rows:
        units = dict(row["in_units_of"]["ratios"])
        if row["measure"] == "ways":
            units["tail_10"] = units.pop("ours")
        columns.setdefault(_passes_name(row), {}).update(units)
    body = [
        [label, *(cell for u in columns.values() for cell in spreads(u, [key]))]
        for key, label in PASSES.items()
    ]
    return blocks(
        table(["in passes of the deterministic adapter", *columns], body),
        missed(rows, _passes_name),
        taken_on(rows),
    )


def _passes_name(row: Row) -> str:
    name = "{model}, {adapter}, {rows} x {tokens}".format_map(row["point"])
    return f"{name} ({row['device']})"


# --- 8B parameters on a GPU -----------------------------------------------------------------------

MODEL = {
    "mean": "the adapter, one pass",
    "base": "no adapter, one pass",
    "naive": "naive PEFT loop, S = 10",
    "last_100": "last layer, S = 100",
    "full": "full, S = 10",
    "tail": "tail k = 1, S = 10",
    "last": "last layer, S = 10",
}


def model_table(rows: Sequence[Row]) -> str:
    """Return passes, milliseconds, rows a second and peak memory of 8B parameters.

    Without rows it is empty, since the table above it says that no GPU was there.
    """
    rows = [r for r in rows if r["device"] == "cuda" or r["toy"]]
    rows = [r for r in rows if r["measure"] == "predict"]
    if not rows:
        return ""
    lines: dict[str, list[str]] = {}
    for row in rows:
        units = row["in_units_of"]["ratios"]
        for key in ("mean", "base", "ours", "naive", "last_100"):
            if key not in row["contenders"]:
                continue
            c = row["contenders"][key]
            label = _way(row) if key == "ours" else MODEL[key]
            cells = [
                spread(units[key]) if key in units else "1",
                f"{1e3 * c['median']:.0f}",
                f"{row['point']['rows'] / c['median']:.1f}",
                "" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 2**30:.1f}",
            ]
            lines.setdefault(label, [label, *cells])
    p = rows[0]["point"]
    what = f"{p['model']}, r = {p['rank']} on all linears, {p['rows']} x {p['tokens']} tokens"
    headings = (what, "in passes of the adapter", "ms", "rows/s", "peak GiB")
    return blocks(table(headings, lines.values()), targets(rows, _way), taken_on(rows))


def _way(row: Row) -> str:
    return MODEL[row["point"]["way"]]
