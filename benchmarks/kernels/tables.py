"""Tables of the suites "layer" (on a CPU), "linear" and "predictive" (results on a GPU alone)."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.kernels.contenders import KEPT, RIVALS
from benchmarks.markdown import Row, blocks, lost, spread, spreads, table, taken_on, targets

NOT_MEASURED = "*Not measured yet: `python -m pytest benchmarks/kernels/test_layer.py --record`.*"
NOT_ON_A_GPU = "*Not measured on a GPU yet: `benchmarks/gpu.sh --stage {}`.*"
NAMES = {
    "baddbmm_kept": "baddbmm, kept noise",
    "naive_kept": "naive loop, kept noise",
    "naive": "naive loop",
}
NOTE = (
    "Median and quartiles of {rounds} or more interleaved rounds, {dtype}, torch threads: "
    "{threads}. Points left empty were not measured: a loop takes seconds there, and more with "
    "every rank. The best rival is the fastest of those that the point's row has."
)


# --- S samples of one layer on a CPU --------------------------------------------------------------


def layer_table(rows: Sequence[Row]) -> str:
    """Return a line for each layer, rank and T, three columns for each S, and every point lost."""
    if not rows:
        return NOT_MEASURED
    counts = sorted({r["point"]["S"] for r in rows})
    found = {(*_layer(r), r["point"]["S"]): r for r in rows}
    body = []
    for n, m, r, T in sorted({_layer(r) for r in rows}):
        cells = (cell for S in counts for cell in _cells(found.get((n, m, r, T, S))))
        body.append([f"{n} → {m}", str(r), str(T), *cells])
    headings = [
        heading
        for S in counts
        for heading in (f"S = {S}: naive loop / ours", "best rival / ours", "ours, base products")
    ]
    note = NOTE.format(
        rounds=min(r["contenders"]["ours"]["rounds"] for r in rows),
        dtype=rows[0]["point"]["dtype"],
        threads=", ".join(map(str, sorted({r["environment"]["torch_threads"] for r in rows}))),
    )
    return blocks(
        table(("layer", "r", "T", *headings), body),
        note,
        lost("Points that a rival wins:", rows, _layer_name),
        taken_on(rows),
    )


def _layer(row: Row) -> tuple[int, int, int, int]:
    p = row["point"]
    return p["n"], p["m"], p["r"], p["T"]


def _layer_name(row: Row) -> str:
    n, m, r, T = _layer(row)
    return f"{n} → {m}, r = {r}, T = {T}, S = {row['point']['S']}"


def _cells(row: Row | None) -> tuple[str, str, str]:
    """Return the loop's time and the best rival's over ours, and ours in base products."""
    if row is None:
        return "", "", ""
    ratios = {k: v for k, v in row["ratios"].items() if k in RIVALS | KEPT}
    best = min(ratios, key=lambda k: ratios[k]["median"])
    rival = f"{spread(ratios[best])} {NAMES.get(best, best)}"
    return spread(ratios["naive"]), rival, spread(row["in_units_of"]["ratios"]["ours"])


# --- one layer on a GPU ---------------------------------------------------------------------------


def linear_table(rows: Sequence[Row]) -> str:
    """Return one layer, whole and the update alone, every target missed and every point lost."""
    rows = [r for r in rows if r["device"] == "cuda" or r["toy"]]
    layers, updates = (
        [r for r in rows if r["measure"] == name and "skipped_point" not in r]
        for name in ("layer", "update")
    )
    if not layers:
        return NOT_ON_A_GPU.format("smoke")
    return blocks(
        _layer_rows(layers),
        _update_rows(updates),
        targets(rows, _name),
        lost("Points that a rival or another path wins:", rows, _name),
        taken_on(rows),
    )


def _name(row: Row) -> str:
    p = row["point"]
    return f"{p['layer']}, S = {p['S']}, {p['T']} rows, {'shared' if p['shared'] else 'per draw'}"


def _microseconds(row: Row, name: str) -> str:
    return f"{1e6 * row['contenders'][name]['median']:.0f}" if name in row["contenders"] else ""


def _layer_rows(rows: Sequence[Row]) -> str:
    names = ("fused", "generate", "baddbmm", "merged", "naive")
    body = []
    for r in rows:
        unit = spread(r["in_units_of"]["ratios"]["ours"])
        body.append([_name(r), _microseconds(r, "ours"), unit, *spreads(r["ratios"], names)])
    headings = ("whole layer", "ours, µs", "ours / base product")
    return table((*headings, *(f"{k} / ours" for k in names)), body)


def _update_rows(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    body = []
    for r in rows:
        times = [_microseconds(r, name) for name in ("ours", "expand", "base")]
        unit = spread(r["in_units_of"]["ratios"]["ours"], 3)
        body.append([_name(r), *times, unit, f"{1 / r['floor']['fraction']:.2f}"])
    headings = ("ours", "expand in it", "base product")
    return table(
        (
            "update alone",
            *(f"{k}, µs" for k in headings),
            "ours / base product",
            "ours / time of its bytes",
        ),
        body,
    )


# --- the predictive reduction ---------------------------------------------------------------------


def predictive_table(rows: Sequence[Row]) -> str:
    """Return time and peak memory of the reduction on a GPU, against torch."""
    rows = [r for r in rows if r["device"] == "cuda" or r["toy"]]
    if not rows:
        return NOT_ON_A_GPU.format("predict")
    body = []
    for row in rows:
        p, peak = row["point"], row.get("peak_bytes", {})
        body.append(
            [
                f"S={p['S']} B={p['B']} V={p['V']}",
                _microseconds(row, "ours"),
                *spreads(row["ratios"], ("torch", "torch_all", "compiled")),
                " / ".join(f"{peak[k] / 2**20:.0f}" for k in ("ours", "torch") if k in peak),
                f"{100 * row['floor']['fraction']:.0f} %",
                ", ".join(row["losses"]) or "none",
            ]
        )
    headings = (
        "logits",
        "ours, µs",
        "torch / ours",
        "torch, all results / ours",
        "compiled / ours",
        "peak MiB, ours / torch",
        "of the floor",
        "lost to",
    )
    return blocks(table(headings, body), taken_on(rows))
