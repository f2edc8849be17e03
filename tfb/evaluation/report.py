"""One self-contained HTML page about a fit, with its pictures beside it.

The pictures are :mod:`tfb.evaluation.figures`, the sentences :mod:`tfb.evaluation.findings`.
"""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from tfb.evaluation import figures, findings
from tfb.evaluation.compare import RESAMPLES
from tfb.evaluation.metrics import Evaluation, Metrics, auroc, evaluate, risk_coverage

PICTURES = (
    "sigma_curve.png", "reliability.png", "risk_coverage.png", "uncertainty.png", "shift.png",
)  # fmt: skip
PAGE = "index.html"


def check_report_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """The folder as a Path if a report can be made there; a caller asks before any long work.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: it is a file, holds something else, or a report without ``overwrite``.
    """
    figures.require_matplotlib()
    path = Path(folder)
    held = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if (path.exists() and not path.is_dir()) or (
        held and (not overwrite or held - {*PICTURES, PAGE})
    ):
        raise ValueError(f"{path} already holds something; choose a new folder or remove it")
    return path


def write_report(
    folder: str | Path,
    evaluations: Sequence[Evaluation],
    fit: Mapping[str, Any] | None = None,
    *,
    title: str,
    notes: Sequence[str] = (),
    shifts: Sequence[Evaluation] = (),
    facts: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """The pictures and ``index.html`` (images embedded) in ``folder``; all of them or none.

    Args:
        evaluations: labelled; the first of each data set is what others are compared with.
        fit: ``SigmaFit.to_dict()``, or None. notes: sentences shown under the table.
        shifts: rows of another kind than the first data set's, by the same methods; their labels
            are not used. facts: shown under "How this was made".

    Raises:
        ValueError: no evaluations, or one without labels; shifts by another method; the folder
            holds something else, or already a report without ``overwrite``.
    """
    path = check_report_folder(folder, overwrite=overwrite)
    if not evaluations:
        raise ValueError("a report needs at least one evaluation")
    if bare := [e for e in evaluations if e.labels is None]:
        raise ValueError(f"{bare[0].name} on {bare[0].dataset}: no labels; a report needs them")
    methods = {e.name for e in evaluations if e.dataset == evaluations[0].dataset}
    if other := [e.name for e in shifts if e.name not in methods]:
        raise ValueError(f"shifts: {other[0]} was not evaluated on {evaluations[0].dataset}")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        made = _draw(staging, evaluations, fit, shifts)
        page = _page(
            {n: staging / n for n in made}, evaluations, fit, shifts,
            title=title, notes=list(notes), facts=dict(facts or {}),
        )  # fmt: skip
        (staging / PAGE).write_text(page, encoding="utf-8")
        path.mkdir(exist_ok=True)
        for name in set(PICTURES) - set(made):  # an earlier report's, which this one lacks
            (path / name).unlink(missing_ok=True)
        for name in [*made, PAGE]:  # the page last: it is the sign of a finished report
            os.replace(staging / name, path / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path / PAGE


def _draw(
    folder: Path,
    evaluations: Sequence[Evaluation],
    fit: Mapping[str, Any] | None,
    shifts: Sequence[Evaluation],
) -> list[str]:
    """The pictures that there is something to show in."""
    wanted: dict[str, Callable[[Path], None]] = {
        "reliability.png": lambda p: figures.plot_reliability(evaluations, p)
    }
    if fit is not None:
        wanted["sigma_curve.png"] = lambda p: figures.plot_sigma_curve(fit, p)
    if any(e.total is not None for e in evaluations):
        wanted["risk_coverage.png"] = lambda p: figures.plot_risk_coverage(evaluations, p)
    if any(e.epistemic is not None for e in evaluations):
        wanted["uncertainty.png"] = lambda p: figures.plot_uncertainty(evaluations, p)
    if any(e.epistemic is not None for e in shifts):
        wanted["shift.png"] = lambda p: figures.plot_shift(evaluations, shifts, p)
    for name, draw in wanted.items():
        draw(folder / name)
    return [name for name in PICTURES if name in wanted]


def _page(
    pictures: Mapping[str, Path],
    evaluations: Sequence[Evaluation],
    fit: Mapping[str, Any] | None,
    shifts: Sequence[Evaluation],
    **given: Any,
) -> str:
    compared = findings.comparisons(evaluations)
    headline = findings.headline(evaluations, compared)
    first = [e for e in evaluations if e.dataset == evaluations[0].dataset]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tfb"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.j2").render(
        headline=headline,
        cautions=findings.cautions(evaluations),
        claims=[findings.claims(e) for e in first],
        sentences=[findings.named(c) for c in compared if findings.sentence(c) != headline],
        decision=[] if fit is None else findings.decision(fit),
        selective=[findings.selective(e) for e in first if e.total is not None],
        ranked=[findings.ranked(c) for c in compared if "aurc" in c.changes],
        results=_results(evaluations),
        changes=_changes(compared),
        uncertainties=_uncertainties(evaluations),
        shifts=_shift_table(evaluations, shifts),
        resamples=RESAMPLES,
        fit=fit,
        images={
            name: base64.b64encode(path.read_bytes()).decode("ascii")
            for name, path in pictures.items()
        },
        **given,
    )


def _results(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """A row for each evaluation; the best figures of a data set are marked."""
    rows = []
    for dataset in dict.fromkeys(e.dataset for e in evaluations):
        group = [e for e in evaluations if e.dataset == dataset]
        reference = group[0].probs.argmax(-1)
        measured: list[Metrics] = []
        for e in group:
            assert e.labels is not None
            measured.append(evaluate(e.probs, e.labels, reference_predictions=reference))
        best = {
            "accuracy": max(m.accuracy for m in measured),
            "nll": min(m.nll for m in measured),
            "ece": min(m.ece for m in measured),
            "brier": min(m.brier for m in measured),
        }
        for e, m in zip(group, measured, strict=True):
            cells = [
                (f"{getattr(m, key) * factor:.{places}f}", getattr(m, key) == best[key])
                for key, factor, places in (
                    ("accuracy", 100, 2), ("nll", 1, 4), ("ece", 100, 2), ("brier", 1, 4)
                )
            ]  # fmt: skip
            aurc = None if e.total is None else 100 * risk_coverage(e.total, e.correct).aurc
            cells.append((_number(aurc, ".2f"), False))
            cells.append((f"{100 * m.miscalibration:+.2f}", False))
            cells.append((f"{100 * (m.flip_ratio or 0.0):.2f}", False))
            cells.append((_number(e.passes, ".3g"), False))
            rows.append({"dataset": dataset, "name": e.name, "cells": cells})
    return rows


def _changes(compared: Sequence[findings.Comparison]) -> list[dict[str, Any]]:
    """Changes with their limits; those beyond noise are marked."""
    rows = []
    for c in compared:
        cells = []
        for key, factor, places in (
            ("accuracy", 100, 2), ("nll", 1, 3), ("ece", 100, 2), ("brier", 1, 3), ("aurc", 100, 2)
        ):  # fmt: skip
            if (d := c.changes.get(key)) is None:
                cells.append(("–", "", False))
                continue
            change, low, high = (
                f"{factor * v:+.{places}f}".replace("-", "−") for v in (d.change, d.low, d.high)
            )
            cells.append((change, f"{low} to {high}", d.beyond_noise))
        rows.append({"dataset": c.after.dataset, "name": c.after.name, "cells": cells})
    return rows


def _uncertainties(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Mean uncertainties of all, right and wrong rows for each sampled evaluation."""
    rows = []
    for e in evaluations:
        if e.epistemic is None:
            continue
        for which, mask in (("all", e.correct | ~e.correct), ("right", e.correct),
                            ("wrong", ~e.correct)):  # fmt: skip
            n = int(mask.sum())
            means = [
                f"{float(getattr(e, kind)[mask].mean()):.3f}" if n else "–"
                for kind in figures.KINDS
            ]
            rows.append(
                {"dataset": e.dataset, "name": e.name, "which": which, "cells": [f"{n:,}", *means]}
            )
    return rows


def _shift_table(
    evaluations: Sequence[Evaluation], shifts: Sequence[Evaluation]
) -> list[dict[str, Any]]:
    """How well each uncertainty tells rows of another kind from the usual ones."""
    rows = []
    for e in shifts:
        usual = figures.counterpart(evaluations, e)
        for kind in ("total", "epistemic"):
            theirs, ours = getattr(e, kind), getattr(usual, kind)
            if theirs is None or ours is None:
                continue
            cells = [f"{float(v.mean()):.3f}" for v in (ours, theirs)]
            cells.append(f"{100 * auroc(theirs, ours):.1f}")
            rows.append({
                "usual": usual.dataset, "other": e.dataset, "rows": f"{len(theirs):,}",
                "name": e.name, "kind": kind, "cells": cells,
            })  # fmt: skip
    return rows


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
