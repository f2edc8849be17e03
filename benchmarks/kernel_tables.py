"""Tables of the suites "linear", "predictive" and "model"; only a GPU's rows are results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.markdown import Row, spread, table, taken_on

NOT_MEASURED = "*Not measured on a GPU yet: `benchmarks/gpu.sh --stage {}`.*"


def linear_table(rows: Sequence[Row]) -> str:
    """One layer on a GPU, whole and the update alone; every target missed and point lost is
    listed."""
    rows = [r for r in rows if r["device"] == "cuda" or r["toy"]]
    layers, updates = (
        [r for r in rows if r["measure"] == name and "skipped_point" not in r]
        for name in ("layer", "update")
    )
    if not layers:
        return NOT_MEASURED.format("smoke")
    parts = [
        _layer_rows(layers), _update_rows(updates), _targets(rows, _name),
        "Points that a rival or another path wins:\n\n" + _lost(rows), taken_on(rows),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _name(row: Row) -> str:
    p = row["point"]
    return f"{p['layer']}, {p['T']} rows, {'shared' if p['shared'] else 'per draw'}"


def _microseconds(row: Row, name: str) -> str:
    return f"{1e6 * row['contenders'][name]['median']:.0f}" if name in row["contenders"] else ""


def _layer_rows(rows: Sequence[Row]) -> str:
    names = ("fused", "generate", "baddbmm", "merged", "naive")
    body = [
        [
            _name(r), _microseconds(r, "ours"), spread(r["in_units_of"]["ratios"]["ours"]),
            *(spread(r["ratios"][k]) if k in r["ratios"] else "" for k in names),
        ]
        for r in rows
    ]  # fmt: skip
    headings = ("whole layer, S = 10", "ours, µs", "ours / base product")
    return table((*headings, *(f"{k} / ours" for k in names)), body)


def _update_rows(rows: Sequence[Row]) -> str:
    body = [
        [_name(r), _microseconds(r, "ours"), _microseconds(r, "expand"), _microseconds(r, "base"),
         spread(r["in_units_of"]["ratios"]["ours"], 3), f"{1 / r['floor']['fraction']:.2f}"]
        for r in rows
    ]  # fmt: skip
    headings = (
        "update alone", "ours, µs", "expand in it, µs", "base product, µs", "ours / base product",
        "ours / time of its bytes",
    )  # fmt: skip
    return table(headings, body) if rows else ""


def model_table(rows: Sequence[Row]) -> str:
    """8B parameters on a GPU: passes, milliseconds, rows a second and peak memory; no rows, no
    words, since the table above it says so."""
    rows = [r for r in rows if r["device"] == "cuda" or r["toy"]]
    rows = [r for r in rows if r["measure"] == "predict"]
    if not rows:
        return ""
    body, seen = [], set[str]()
    for row in rows:
        units = row["in_units_of"]["ratios"]
        for key in ("mean", "base", "ours", "naive", "last_100"):
            label = MODEL[row["point"]["way"] if key == "ours" else key]
            if key not in row["contenders"] or label in seen:
                continue
            seen.add(label)
            c = row["contenders"][key]
            peak = "" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 2**30:.1f}"
            body.append([
                label, spread(units[key]) if key in units else "1", f"{1e3 * c['median']:.0f}",
                f"{row['point']['rows'] / c['median']:.1f}", peak,
            ])  # fmt: skip
    p = rows[0]["point"]
    headings = (
        f"{p['model']}, r = {p['rank']} on all linears, {p['rows']} x {p['tokens']} tokens",
        "in passes of the adapter", "ms", "rows/s", "peak GiB",
    )  # fmt: skip
    parts = [table(headings, body), _targets(rows, lambda r: MODEL[r["point"]["way"]])]
    return "\n\n".join([*parts, taken_on(rows)])


MODEL = {
    "mean": "the adapter, one pass", "base": "no adapter, one pass",
    "naive": "naive PEFT loop, S = 10", "last_100": "last layer, S = 100",
    "full": "full, S = 10", "tail": "tail k = 1, S = 10", "last": "last layer, S = 10",
}  # fmt: skip


def _targets(rows: Sequence[Row], name: Callable[[Row], str]) -> str:
    """How many points meet each target, and every point that does not."""
    found = [(t, row) for row in rows for t in row.get("targets", [])]
    kinds = list(dict.fromkeys(t["name"].partition(" (")[0] for t, _ in found))
    body = []
    for kind in kinds:
        own = [t for t, _ in found if t["name"].partition(" (")[0] == kind]
        worst = (min if own[0]["at_least"] else max)(t["value"] for t in own)
        met = sum(t["met"] for t in own)
        body.append([kind, f"{met} of {len(own)}", f"{worst:.3g}"])
    missed = [
        f"- {name(row)}: {t['name']} is {t['value']:.3g}, the target {t['bound']:.3g}"
        for t, row in found
        if not t["met"]
    ]
    skipped = [f"- {name(r)}: {r['skipped_point']}" for r in rows if "skipped_point" in r]
    lists = {"Targets that are missed": missed, "Points that were skipped": skipped}
    text = table(["target", "met", "worst"], body)
    return text + "".join(f"\n\n{k}:\n\n" + "\n".join(v) for k, v in lists.items() if v)


def _lost(rows: Sequence[Row]) -> str:
    lost = [f"- {_name(r)}: {', '.join(r['losses'])}" for r in rows if r.get("losses")]
    return "\n".join(lost) or "none"


def predictive_table(rows: Sequence[Row]) -> str:
    """The reduction on a GPU against torch: time and peak memory."""
    rows = [r for r in rows if r["device"] == "cuda" or r["toy"]]
    if not rows:
        return NOT_MEASURED.format("predict")
    body = []
    for row in rows:
        p, peak = row["point"], row.get("peak_bytes", {})
        memory = " / ".join(f"{peak[k] / 2**20:.0f}" for k in ("ours", "torch") if k in peak)
        body.append([
            f"S={p['S']} B={p['B']} V={p['V']}", _microseconds(row, "ours"),
            *(spread(row["ratios"][k]) if k in row["ratios"] else ""
              for k in ("torch", "torch_all", "compiled")),
            memory, f"{100 * row['floor']['fraction']:.0f} %", ", ".join(row["losses"]) or "none",
        ])  # fmt: skip
    headings = (
        "logits", "ours, µs", "torch / ours", "torch, all results / ours", "compiled / ours",
        "peak MiB, ours / torch", "of the floor", "lost to",
    )  # fmt: skip
    return table(headings, body) + "\n\n" + taken_on(rows)
