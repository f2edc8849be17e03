"""Tables of the calibration rows, mean and standard deviation over seeds, and the targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.markdown import Row, table, taken_on

LABELS = {
    "mle": "MLE (the adapter)",
    "temperature": "temperature scaling",
    "mc_dropout": "MC dropout",
    "ensemble": "ensemble of 3",
    "laplace": "last-layer Laplace",
    "laplace_tuned": "last-layer Laplace, prior tuned on anchors",
    "authors_rule": "TFB, the authors' rule",
    "tfb": "TFB, the paper's rule (max_variance)",
    "tfb_min_nll": "TFB, min_nll, T = 1",
    "tfb_joint": "TFB, σ and T (the default)",
    "tfb_averaged": "the same σ, T on the averaged probabilities",
    "tfb_tail": "TFB, σ and T, tail k=1",
}
TASKS = {
    "clinc-domain": "clinc-domain: stories260K, next token, 10 domains",
    "clinc150": "clinc150: stories260K, classifier, 150 intents",
    "clinc150-early": "clinc150-early: the same, training stopped early (under-confident)",
    "clinc-fewshot": "clinc-fewshot: MiniLM, classifier, 150 intents, 10 rows each",
    "exam": "exam: MiniLM, classifier, three sources of science questions",
    "subject": "subject: MiniLM, classifier, four subjects of MMLU, few rows",
    "difficulty": "difficulty: MiniLM, classifier, easy or hard questions of ARC (new)",
    "banking": "banking: stories260K, next token, 15 intents of one domain (new)",
}
SHORT = (
    "mle",
    "temperature",
    "ensemble",
    "laplace_tuned",
    "tfb",
    "tfb_min_nll",
    "tfb_joint",
    "tfb_tail",
)
JOINT = "tfb_joint"
LOWER = ("nll", "ece")  # figures of which less is better
ACCURACY_MARGIN, TAIL_NLL, GAIN, UNDER_CONFIDENT_ECE = 0.01, 0.02, 0.01, 0.07
NO_ROWS = (
    "*Not run yet: `python -m benchmarks.calibration.train`, then "
    "`python -m benchmarks.calibration --record`.*"
)
Rows = dict[str, dict[str, list[Row]]]
"""By task and method the rows of all seeds, in the order of ``TASKS`` and ``LABELS``."""


def calibration_table(rows: Sequence[Row]) -> str:
    """All figures of all methods, a table for each task, and the targets."""
    if not rows:
        return NO_ROWS
    parts = []
    for task, methods in group(rows).items():
        shifts = _shifts(methods)
        headings = (
            "method",
            "NLL",
            "ECE %",
            "accuracy %",
            "Brier",
            "AURC %",
            *(f"AUROC {name}: total, epistemic" for name in ("errors", *shifts)),
            "passes",
            "fitting",
        )
        measured = {name: own for name in methods if (own := _measured(methods[name]))}
        body = [
            [
                _label(name, methods),
                marked(own, "nll", 3),
                marked(own, "ece", 1, 100),
                marked(own, "accuracy", 1, 100),
                over(own, lambda r: r["brier"], 3),
                over(own, lambda r: r["aurc"], 1, 100),
                *(_aurocs(own, found) for found in ("errors", *shifts)),
                over(own, lambda r: r["passes"], 1, spread=False),
                _fitting(own),
            ]
            for name, own in measured.items()
        ]
        parts.append(f"### {TASKS[task]}\n\n{_sizes(methods)}\n\n{table(headings, body)}")
        if missing := _left_out(methods):
            parts.append(missing)
    return "\n\n".join([*parts, LEGEND, targets(rows), taken_on(rows)])


def methods_table(rows: Sequence[Row]) -> str:
    """Average the methods over tasks: the README's table."""
    if not rows:
        return NO_ROWS
    tasks = group(rows)
    seeds = sum(len(_measured(methods.get("mle", []))) for methods in tasks.values())
    body = []
    for name in SHORT:
        found = [
            {m: _measured(methods.get(m, [])) for m in (name, "mle", "temperature")}
            for methods in tasks.values()
        ]
        if found := [one for one in found if all(one.values())]:
            own = [r for one in found for r in one[name]]
            gap = "" if len(own) == seeds else f" ({len(own)} of {seeds} fits)"
            better, worse = votes(own, "nll", "temperature")
            sure = "–" if name == "temperature" else f"{better} / {worse}"
            body.append([LABELS[name] + gap, *_averages(found, name, gap=bool(gap)), sure])
    headings = (
        "method",
        "NLL, to temperature scaling's",
        "ECE %",
        "accuracy, to the adapter's",
        "passes a row",
        "NLL significantly better / worse than temperature scaling",
    )
    legend = (
        f"Mean over {len(tasks)} tasks of the mean over seeds: {seeds} fits, each on held-out rows "
        "and judged on others. In brackets the adapter's own ECE, where a method has not all fits. "
        "Significant: a paired bootstrap over the test rows of one fit (95 %)."
    )
    return "\n\n".join([table(headings, body), legend])


def _averages(tasks: Sequence[dict[str, list[Row]]], name: str, *, gap: bool) -> list[str]:
    """Return a method's means over tasks, each over the seeds that it has."""
    ratios, changes, ece, adapter = [], [], [], []
    for one in tasks:
        own, scaled = _paired(one[name], one["temperature"])
        ratios.append(mean(r["nll"] for r in own) / mean(r["nll"] for r in scaled) - 1)
        own, mle = _paired(one[name], one["mle"])
        changes.append(mean(r["accuracy"] for r in own) - mean(r["accuracy"] for r in mle))
        ece.append(mean(r["ece"] for r in own))
        adapter.append(mean(r["ece"] for r in mle))
    passes = mean(mean(r["passes"] for r in one[name]) for one in tasks)
    return [
        "–" if name == "temperature" else f"{100 * mean(ratios):+.1f} %",
        f"{100 * mean(ece):.1f}" + (f" ({100 * mean(adapter):.1f})" if gap else ""),
        "–" if name == "mle" else f"{round(100 * mean(changes), 1) + 0:+.1f} points",
        f"{passes:.1f}",
    ]


def evidence_table(rows: Sequence[Row]) -> str:
    """Make the short table of every task: fewer methods, fewer columns."""
    if not rows:
        return NO_ROWS
    body = []
    for task, methods in group(rows).items():
        for name in SHORT:
            own = _measured(methods.get(name, []))
            if own:
                body.append(
                    [
                        task if name == SHORT[0] else "",
                        _label(name, methods),
                        marked(own, "nll", 3),
                        marked(own, "ece", 1, 100),
                        marked(own, "accuracy", 1, 100),
                        " / ".join(_auroc(own, shift, "total") for shift in _shifts(methods)),
                        over(own, lambda r: r["passes"], 1, spread=False),
                    ]
                )
    headings = ("task", "method", "NLL", "ECE %", "accuracy %", "AUROC out of scope", "passes")
    missed = targets(rows, met=False)
    return "\n\n".join([table(headings, body), SHORT_LEGEND, missed, taken_on(rows)])


SHORT_LEGEND = (
    "Mean ± standard deviation over seeds of training (where the adapter is ours), anchors, test "
    "rows (all but subject's) and noise. "
    "(+a −b): better than MLE in a, worse in b of the seeds by a paired bootstrap over test rows "
    "(95 %). AUROC: rows out of scope told from test rows by the entropy of the averaged "
    "prediction. difficulty and banking were made after the defaults were fixed; what their first "
    "run changed is in benchmarks/NOTES.md."
)
LEGEND = (
    SHORT_LEGEND + " AURC: mean error rate of the most certain rows, over coverage. Passes: "
    "deterministic passes a row. Fitting: passes over the anchors, and models trained beside the "
    "adapter. The three members of the ensemble are the same at every seed; on clinc-domain and "
    "clinc150 two of them are of our training, and better than the given adapter. The seeds of "
    "subject, a small data set, share their anchors and test rows: only adapters and noise differ, "
    "and its ensemble is one sample. All TFB rows predict with 10 antithetic draws of weight "
    "noise, or once where σ is 0."
)


# --- targets --------------------------------------------------------------------------------------


def targets(rows: Sequence[Row], *, met: bool = True) -> str:
    """List the targets of the comparison that are missed and, with ``met``, those that are met."""
    lines: dict[bool, list[str]] = {False: [], True: []}
    for name, value, ok in judge(rows):
        lines[ok].append(f"- {name}: {value}")
    titles = {False: "Targets that are missed:", True: "Targets that are met:"}
    return "\n\n".join(
        f"{titles[ok]}\n\n" + "\n".join(lines[ok])
        for ok in ((False, True) if met else (False,))
        if lines[ok]
    )


def judge(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """(target, what was found, met) of every task, and of all."""
    found, ratios = [], {}
    for task, methods in group(rows).items():
        mle, own, scaled, tail = (
            _measured(methods.get(name, [])) for name in ("mle", JOINT, "temperature", "tfb_tail")
        )
        if not mle or not own:
            continue
        complete = len(own) == len(mle)  # a seed without an answer has not met a target
        if scaled:
            better, worse = votes(own, "nll", "temperature")
            text = f"better in {better}, worse in {worse} of {len(mle)} seeds"
            ok = worse == 0 and complete
            found.append(
                (f"{task}, NLL nowhere significantly above temperature scaling's", text, ok)
            )
            both = _paired(own, scaled)
            ours, theirs = (mean(r["nll"] for r in part) for part in both)
            ratios[task] = ours / theirs - 1
            text = f"{ours:.3f} against {theirs:.3f} ({100 * ratios[task]:+.1f} %)"
            found.append((f"{task}, NLL at most temperature scaling's", text, ours <= theirs))
        lost = mean(_vs_mle(r, "accuracy")["difference"] for r in own)
        ok = complete and lost >= -ACCURACY_MARGIN
        found.append((f"{task}, accuracy within 1 point of MLE's", f"{100 * lost:+.2f} points", ok))
        if mean(r["miscalibration"] for r in mle) < 0:
            ece = [100 * mean(r["ece"] for r in part) for part in (mle, own)]
            ok = complete and ece[1] <= 100 * UNDER_CONFIDENT_ECE
            found.append((f"{task}, ECE at most 7 %", f"{ece[1]:.1f}, MLE {ece[0]:.1f}", ok))
        if tail:
            some, full = _paired(tail, own)
            ratio = mean(r["nll"] for r in some) / mean(r["nll"] for r in full) - 1
            ok = len(tail) == len(mle) and ratio <= TAIL_NLL
            found.append((f"{task}, tail within 2 % NLL of full", f"{100 * ratio:+.2f} %", ok))
    if ratios:
        gain = -mean(ratios.values())
        text = f"{100 * gain:.2f} % lower over {len(ratios)} tasks"
        found.append(
            ("NLL at least 1 % below temperature scaling's on average", text, gain >= GAIN)
        )
    return found


# --- parts ----------------------------------------------------------------------------------------


def group(rows: Sequence[Row]) -> Rows:
    """By task and method, the newest row of each seed."""
    newest = {(r["point"]["task"], r["point"]["method"], r["point"]["seed"]): r for r in rows}
    return {
        task: {
            method: own
            for method in LABELS
            if (
                own := [
                    r
                    for (t, m, _seed), r in sorted(newest.items(), key=lambda i: i[0])
                    if (t, m) == (task, method)
                ]
            )
        }
        for task in TASKS
        if any(t == task for t, _m, _seed in newest)
    }


def votes(rows: Sequence[Row], name: str, reference: str = "mle") -> tuple[int, int]:
    """In how many seeds a figure is significantly (better, worse) than the reference's."""
    better = worse = 0
    for row in rows:
        if reference in row["against"] and row["against"][reference][name]["significant"]:
            lower = row["against"][reference][name]["difference"] < 0
            good = lower == (name in LOWER)
            better, worse = better + good, worse + (not good)
    return better, worse


def marked(rows: Sequence[Row], name: str, digits: int, factor: float = 1.0) -> str:
    """Return mean ± standard deviation, and in how many seeds it differs from MLE's."""
    text = over(rows, lambda r: r[name], digits, factor)
    better, worse = votes(rows, name)
    marks = " ".join([*([f"+{better}"] if better else []), *([f"−{worse}"] if worse else [])])
    return f"{text} ({marks})" if marks else text


def over(
    rows: Sequence[Row],
    value: Callable[[Row], float],
    digits: int,
    factor: float = 1.0,
    *,
    spread: bool = True,
) -> str:
    """Return mean ± standard deviation over seeds; the mean alone of one."""
    values = [factor * value(r) for r in rows]
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if spread and len(values) > 1 else text


def _label(name: str, methods: dict[str, list[Row]]) -> str:
    """Return the method's label, and how many of MLE's seeds it has figures of if not all."""
    own, seeds = (len(_measured(methods.get(m, []))) for m in (name, "mle"))
    return LABELS[name] + ("" if own >= seeds else f" ({own} of {seeds} seeds)")


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if "left_out" not in r]


def _paired(a: Sequence[Row], b: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Of both the rows of the seeds that both have: means over other seeds do not compare."""
    of_a, of_b = ({r["point"]["seed"]: r for r in rows} for rows in (a, b))
    both = [seed for seed in of_a if seed in of_b]
    return [of_a[s] for s in both], [of_b[s] for s in both]


def _vs_mle(row: Row, name: str) -> dict[str, Any]:
    return dict(row["against"]["mle"][name])


def _shifts(methods: dict[str, list[Row]]) -> list[str]:
    first = next(r for own in methods.values() for r in own if "left_out" not in r)
    return [name for name in first["auroc"] if name != "errors"]


def _auroc(rows: Sequence[Row], found: str, kind: str) -> str:
    values = [r["auroc"][found].get(kind) for r in rows]
    return f"{mean(values):.3f}" if values and None not in values else "–"


def _aurocs(rows: Sequence[Row], found: str) -> str:
    return ", ".join(_auroc(rows, found, kind) for kind in ("total", "epistemic"))


def _fitting(rows: Sequence[Row]) -> str:
    passes = over(rows, lambda r: r["fitting"], 0, spread=False)
    trained = max(r["trained"] for r in rows)
    return f"{trained} trained" if trained else passes


def _sizes(methods: dict[str, list[Row]]) -> str:
    rows = [r for own in methods.values() for r in own]
    sizes = next(r["sizes"] for r in rows if "sizes" in r)
    shifts = ", ".join(f"{sizes[name]} of {name}" for name in _shifts(methods))
    seeds = ", ".join(map(str, sorted({r["point"]["seed"] for r in rows})))
    return (
        f"{sizes['test']} test rows, {sizes['anchors']} anchors; out of scope: {shifts}; "
        f"{sizes['train']} training rows; seeds {seeds}."
    )


def _left_out(methods: dict[str, list[Row]]) -> str:
    """Why methods have no figures, and for which seeds."""
    reasons: dict[str, list[int]] = {}
    for name, own in methods.items():
        for r in own:
            if "left_out" in r:
                reasons.setdefault(f"{LABELS[name]}: {r['left_out']}", []).append(
                    r["point"]["seed"]
                )
    lines = [f"- {why} (seeds {', '.join(map(str, s))})" for why, s in reasons.items()]
    return "Left out:\n\n" + "\n".join(lines) if lines else ""
