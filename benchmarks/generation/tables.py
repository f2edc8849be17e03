"""Tables of written text: how good it is, what scores tell of it, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from benchmarks.markdown import Row, blocks, spread, table, taken_on, targets

NO_ROWS = "*Not run yet: `python -m benchmarks.generation.study --record` (an hour).*"
NO_DECODING = "*Not run yet: `python -m pytest benchmarks/generation --record`.*"
TASKS = {
    "intent": "intent of an utterance",
    "intent-few": "the same, trained long on a fifth of the rows",
    "sums": "sum of two numbers in words",
}
METHODS = {
    "adapter": "the adapter",
    "temperature": "its temperature",
    "full, S=4": "full, S = 4",
    "full, S=10": "full, S = 10",
    "tail k=1, S=4": "tail k = 1, S = 4",
    "tail k=1, S=10": "tail k = 1, S = 10",
    "the paper's σ, S=10": "the paper's σ (T = 1), S = 10",
}
SCORES = {
    "log_prob": "log-probability of the text",
    "mean_log_prob": "the same, a token",
    "least_log_prob": "the same, of the least probable token",
    "total": "entropy, mean over tokens",
    "total_max": "entropy, largest",
    "epistemic": "epistemic, mean over tokens",
    "epistemic_sum": "epistemic, sum",
    "epistemic_max": "epistemic, largest",
    "information": "log p(text) - mean of the draws' log p(text)",
    "disagreement": "share of draws that write another text",
}
SHOWN = {  # of which methods which scores
    "adapter": ("log_prob", "mean_log_prob", "total"),
    "temperature": ("log_prob", "mean_log_prob", "total"),
    "full, S=10": tuple(SCORES),
    "full, S=4": ("log_prob", "epistemic_sum", "disagreement"),
    "tail k=1, S=10": ("log_prob", "epistemic_sum", "disagreement"),
    "the paper's σ, S=10": ("log_prob", "epistemic_sum", "disagreement"),
}
DECODED = {
    "ours": "full, S = 10",
    "tail": "tail k = 1, S = 10",
    "last": "last layer, S = 10",
    "naive": "ten plain generations, noise materialised; they average nothing",
}


def generation_table(rows: Sequence[Row]) -> str:
    """Return what each method writes and what each score tells, task by task, means over seeds."""
    if not rows:
        return NO_ROWS
    parts = []
    for task, title in TASKS.items():
        own = [r for r in rows if r["point"]["task"] == task]
        texts = {
            method: found
            for method in METHODS
            if (found := [r for r in own if _is(r, "texts", method)]) and _apart(method, found)
        }
        scores = {
            (r["point"]["method"], r["point"]["score"]): r for r in own if r["measure"] == "scores"
        }
        if texts:
            parts += [f"**{title}**", _texts(texts), _scores(scores, texts)]
    return blocks(*parts, LEGEND, taken_on(rows))


def _is(row: Row, measure: str, method: str) -> bool:
    return bool(row["measure"] == measure and row["point"]["method"] == method)


def _apart(method: str, rows: Sequence[Row]) -> bool:
    """Return whether a method is another one than the temperature: with a sigma of 0 it is not."""
    return method in ("adapter", "temperature") or any(r["sigma"] > 0 for r in rows)


def _texts(methods: dict[str, list[Row]]) -> str:
    body = []
    for method, own in methods.items():
        each = "cost_with_each" if any(r["sigma"] > 0 for r in own) else ""
        cost = [f"{mean(r[k] for r in own):.1f}" if k else "" for k in ("cost", each)]
        figures = (100, "exact", ".1f"), (1, "nll", ".3f"), (100, "ece", ".2f")
        cells = [f"{k * mean(r[key] for r in own):{form}}" for k, key, form in figures]
        fitted = [", ".join(f"{r[k]:.2g}" for r in own) for k in ("sigma", "temperature")]
        body.append([METHODS[method], *fitted, *cells, *cost])
    headings = (
        "written by",
        "σ of each adapter",
        "T",
        "right %",
        "NLL a token",
        "ECE of tokens %",
        "cost, in plain generations",
        "with each draw's own text",
    )
    return table(headings, body)


def _scores(rows: dict[tuple[str, str], Row], methods: dict[str, list[Row]]) -> str:
    headings = ("written by", "score", "AUROC, wrong text", "AURC %", "AUROC, out of scope")
    body = [
        [METHODS[method], SCORES[score], *map(_change, _figures(row))]
        for method, scores in SHOWN.items()
        for score in scores
        if method in methods and (row := rows.get((method, score))) is not None
    ]
    return table(headings, body)


def _figures(row: Row) -> list[tuple[dict[str, float], float, int]]:
    """Return figures, by what each is multiplied and its places."""
    return [(row["errors"], 1, 3), (row["aurc"], 100, 1), (row["shift"], 1, 3)]


def _change(figure: tuple[dict[str, float], float, int]) -> str:
    """Return a figure, and the limits of its change where that is not none by definition."""
    found, factor, places = figure
    value, low, high = (factor * found[k] for k in ("value", "low", "high"))
    text = f"{value:.{places}f}"
    if low == high == 0:
        return text
    sure = "*" if low > 0 or high < 0 else ""
    return f"{text} [{low:+.{places}f}, {high:+.{places}f}]{sure}"


LEGEND = (
    "AUROC of telling wrong texts from right ones, and prompts out of scope from those in scope; "
    "AURC of answering the surest texts first (lower is better); in brackets 95 % limits of the "
    "change from the adapter's own log-probability of its text (paired bootstrap over prompts; *: "
    "they exclude 0). Means over three adapters. A method whose every σ is 0 writes what the "
    "temperature does and is left out; for an adapter whose σ is 0 the scores of draws count as a "
    "random order. Cost: of 100 prompts in one batch."
)


def decoding_table(rows: Sequence[Row]) -> str:
    """Return the cost of text in plain generations, by length, and where the time goes."""
    on_gpu = [r for r in rows if r["device"] == "cuda"]
    rows = [r for r in rows if r["device"] == "cpu" and not r["point"].get("graphs")]
    timed = sorted(
        (r for r in rows if r["measure"] == "decode"), key=lambda r: r["point"]["new_tokens"]
    )
    if not timed:
        return NO_DECODING
    ratios = [r["in_units_of"]["ratios"] for r in timed]
    body = [[name, *(spread(u[key]) for u in ratios)] for key, name in DECODED.items()]
    p = timed[0]["point"]
    headings = [f"in plain generations, {r['point']['new_tokens']} new tokens" for r in timed]
    about = f"{p['rows']} prompts of {p['tokens']} tokens, {p['model']}, {timed[0]['device']}."
    parts = (table(["", *headings], body), about, _operators(rows), taken_on(rows))
    return blocks(*parts, _decoded_on_gpu(on_gpu))


def _decoded_on_gpu(rows: Sequence[Row]) -> str:
    """Return plain generations and milliseconds a token, of 8B parameters; "" without rows."""
    timed = [r for r in rows if r["measure"] == "decode"]
    parts = []
    for row in timed:
        units, p = row["in_units_of"]["ratios"], row["point"]
        body = [
            [
                name,
                spread(units[key]) if key in units else "1",
                f"{1e3 * row['contenders'][key]['median'] / p['new_tokens']:.2f}",
            ]
            for key, name in ({"mean": "a plain generation"} | DECODED).items()
            if key in row["contenders"]
        ]
        how = "CUDA graphs" if p.get("graphs") else "no graphs"
        about = f"{p['model']}, {p['rows']} x {p['tokens']} tokens, {p['new_tokens']} new, {how}"
        parts.append(table((about, "in plain generations", "ms a token"), body))
    named = targets(timed, lambda row: row["point"]["model"])
    return blocks(*parts, named, _operators(rows), taken_on(rows)) if timed else ""


def _operators(rows: Sequence[Row]) -> str:
    """Return the shares of the longest operators in ten draws and in a plain generation."""
    times = {r["point"]["step"]: r["kernels"] for r in rows if r["measure"] == "kernels"}
    if set(times) != {"ours", "mean"}:
        return ""
    ours, plain = times["ours"], times["mean"]
    unit = sum(plain.values())
    body = [
        [f"`{name}`", f"{seconds / unit:.2f}", f"{plain[name] / unit:.2f}" if name in plain else ""]
        for name, seconds in ours.items()
    ]
    headings = ("operator", "ten full draws", "one plain generation")
    about = (
        "The longest operators, over all of those of a plain generation (64 new tokens; profiler):"
    )
    return blocks(about, table(headings, body))
