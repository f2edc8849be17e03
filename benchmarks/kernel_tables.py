"""Tables of the kernel suites, "linear" and "predictive"; only a GPU's rows are results."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.markdown import Row, spread, table, taken_on

NOT_MEASURED = "*Not measured on a GPU yet: `benchmarks/gpu.sh` does it in one command.*"


def linear_table(rows: Sequence[Row]) -> str:
    """Kernels on a GPU: layer, update and paths; every target missed and point lost is listed."""
    rows = [r for r in rows if r["device"] == "cuda" or r["toy"]]
    by_measure = {
        name: [r for r in rows if r["measure"] == name and "skipped_point" not in r]
        for name in ("layer", "op", "paths")
    }
    if not by_measure["layer"]:
        return NOT_MEASURED
    parts = [
        _layer_rows(by_measure["layer"]), _op_rows(by_measure["op"]),
        _path_rows(by_measure["paths"]),
        _targets(rows), "Points that a rival wins:\n\n" + _lost(rows), taken_on(rows),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _name(row: Row) -> str:
    p = row["point"]
    kind = ("shared" if p["shared"] else "per draw") + (", iid" if p["draws"] == "iid" else "")
    return f"{p['layer']} r={p['r']} S={p['S']} T={p['T']} {kind}"


def _microseconds(row: Row, name: str) -> str:
    return f"{1e6 * row['contenders'][name]['median']:.0f}" if name in row["contenders"] else ""


def _layer_rows(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        rivals = {k: r for k, r in row["ratios"].items() if not k.startswith("ours")}
        best = min(rivals, key=lambda k: rivals[k]["median"])
        body.append([
            _name(row), _microseconds(row, "ours"), _microseconds(row, "ours_graph"),
            spread(rivals["naive"]) if "naive" in rivals else "", best, spread(rivals[best]),
            f"{100 * row['floor']['fraction']:.0f} %",
        ])  # fmt: skip
    headings = (
        "whole layer", "ours, µs", "as a graph, µs", "naive / ours", "best rival",
        "best rival / ours", "of the floor",
    )  # fmt: skip
    return table(headings, body)


def _op_rows(rows: Sequence[Row]) -> str:
    body = [
        [_name(r), _microseconds(r, "ours"), _microseconds(r, "ours_graph"),
         _microseconds(r, "base"), spread(r["in_units_of"]["ratios"]["ours"], 3),
         f"{100 * r['floor']['fraction']:.0f} %"]
        for r in rows
    ]  # fmt: skip
    headings = (
        "update alone", "ours, µs", "as a graph, µs", "base product, µs", "ours / base product",
        "of the floor",
    )  # fmt: skip
    return table(headings, body) if rows else ""


def _path_rows(rows: Sequence[Row]) -> str:
    """fused against generate by rows to a stream, and the threshold that follows."""
    if not rows:
        return ""
    rows = sorted(rows, key=lambda r: (r["point"]["rows"], r["point"]["r"]))
    times = []
    for r in rows:
        graph = "_graph" if "fused_graph" in r["contenders"] else ""
        times.append([r["contenders"][f"{k}{graph}"]["median"] for k in ("fused", "generate")])
    body = [
        [str(r["point"]["rows"]), _name(r), f"{1e6 * fused:.0f}", f"{1e6 * generate:.0f}",
         f"{generate / fused:.2f}"]
        for r, (fused, generate) in zip(rows, times, strict=True)
    ]  # fmt: skip
    headings = ("rows to a stream", "update alone", "fused, µs", "generate, µs", "ratio")
    # The threshold that loses least: the summed excess over the faster path of each point.
    counts = sorted({r["point"]["rows"] for r in rows})
    excess = {
        bound: sum(
            (generate if r["point"]["rows"] >= bound else fused) / min(fused, generate) - 1
            for r, (fused, generate) in zip(rows, times, strict=True)
        )
        for bound in [*counts, counts[-1] + 1]
    }
    best = min(excess, key=lambda bound: excess[bound])
    said = f"`paths.generate_min_rows` that loses least here: {best}"
    return table(headings, body) + f"\n\n{said} ({100 * excess[best] / len(rows):.1f} % a point)."


def _targets(rows: Sequence[Row]) -> str:
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
        f"- {_name(row)}: {t['name']} is {t['value']:.3g}, the target {t['bound']:.3g}"
        for t, row in found
        if not t["met"]
    ]
    skipped = [f"- {_name(r)}: {r['skipped_point']}" for r in rows if "skipped_point" in r]
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
        return NOT_MEASURED
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
