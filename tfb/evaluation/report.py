"""One self-contained HTML page: what averaging over draws changed, on which rows, how surely.

Its panels are :mod:`tfb.evaluation.figures`, its words ``report.html.j2``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import torch

from tfb import atomic
from tfb.evaluation import figures
from tfb.evaluation.compare import RESAMPLES, Change, compare_all, compare_auroc
from tfb.evaluation.metrics import BINS, Evaluation, auroc, risk_coverage

PAGE = "index.html"
EXAMPLES = 6  # of each kind
HEAD, TAIL = 90, 150  # characters shown of a long text: its question tends to be at the end


@dataclass(frozen=True)
class Scale:
    """How a metric is written."""

    name: str
    unit: str
    factor: float
    places: int
    more_is_better: bool = False

    def write(self, value: float, sign: str = "") -> str:
        """Return a value, or with sign "+" a change, as text."""
        return f"{self.factor * value:{sign}.{self.places}f}".replace("-", "−")

    def verdict(self, change: Change) -> str:
        """Return "better", "worse", or "within noise"."""
        if not change.significant:
            return "within noise"
        return "better" if (change.change > 0) == self.more_is_better else "worse"


SCALES = {
    "accuracy": Scale("Accuracy", "%", 100, 1, more_is_better=True),
    "nll": Scale("NLL", "nats", 1, 3),
    "ece": Scale("ECE", "%", 100, 1),
    "brier": Scale("Brier score", "", 1, 3),
    "aurc": Scale("AURC", "%", 100, 2),
    "auroc": Scale("AUROC", "%", 100, 1, more_is_better=True),
}


def page_path(output: str | Path, *, overwrite: bool = False) -> Path:
    """Return the file that a report goes to, or say why it cannot, before any long work."""
    figures.require_matplotlib()
    path = Path(output)
    page = path if path.suffix == ".html" else path / PAGE
    if page.is_dir() or page.parent.is_file():
        raise ValueError(
            f"{path}: no page can be written there, something of that name is there already; "
            "choose a folder or an .html file"
        )
    if page.exists() and not overwrite:
        raise ValueError(f"{page} exists already; choose another name, or remove it")
    return page


def write_report(
    output: str | Path,
    evaluations: Sequence[Evaluation],
    fit: Mapping[str, Any] | None = None,
    *,
    title: str,
    ood: Sequence[Evaluation] = (),
    facts: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the page and return its path.

    Args:
        output: an .html file, or a folder for ``index.html``.
        evaluations: labelled. The first two are compared in full, the first of every data set with
            all others of it.
        fit: ``PredictiveFit.to_dict()``.
        title: heading of the page.
        ood: rows unlike those of the first data set, by the same methods.
        facts: how this was made, by name.
        overwrite: replace an earlier page.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no evaluations, one without labels, OOD rows by another method, a page in use.
    """
    path = page_path(output, overwrite=overwrite)
    if not evaluations:
        raise ValueError("a report needs at least one evaluation")
    if bare := [e for e in evaluations if e.labels is None]:
        raise ValueError(f"{bare[0].name} on {bare[0].dataset}: no labels; a report needs them")
    before = evaluations[0]
    usual = {e.name: e for e in evaluations if e.dataset == before.dataset}
    if other := [e.name for e in ood if e.name not in usual]:
        raise ValueError(f"ood: {other[0]} was not evaluated on {before.dataset}")
    after = next((e for e in evaluations[1:2] if e.dataset == before.dataset), before)
    same = after is not before and torch.equal(before.probs, after.probs)
    changes = compare_all(evaluations)
    shown = {"before": before} | ({} if same or after is before else {"after": after})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tfb.evaluation", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        before=before,
        after=after,
        same=same,
        shown=shown,
        rows=len(before.probs),
        one_class=len(before.known_labels.unique()) == 1,
        verdicts=_verdicts(changes[after is not before], before, after, ood),
        others=list(zip(evaluations, changes, strict=True)) if len(evaluations) > 2 else [],
        flipped=_flipped(before, after),
        uncertain=_uncertain(shown),
        reliability={c: figures.reliability_panel(e, c) for c, e in shown.items()},
        risks=_risks(shown),
        uncertainties=_uncertainties(shown, ood),
        fit=fit,
        sigma=None if fit is None else figures.sigma_panel(fit),
        scales=SCALES,
        facts=facts or {},
        resamples=RESAMPLES,
        bins=BINS,
    )
    atomic.write(path, page.encode())
    return path


def facts(sidecar: Mapping[str, Any], draws: int) -> dict[str, str]:
    """Return what an artifact keeps of how it was made, and this report's draws, by name."""
    tail, fit = sidecar.get("tail"), sidecar.get("fit")
    found = {
        "σ": f"{sidecar['sigma']:.6g}",
        "Temperature": f"{sidecar.get('temperature', 1.0):.4g}",
        "Mode": "full" if tail is None else f"tail, last {tail} of the prompt's tokens",
        "Draws": f"{draws}, antithetic; seed {sidecar['seed']}" if sidecar["sigma"] else "none",
        "Model": f"{sidecar['base']['model_type']}, {len(sidecar['layers'])} matrices with noise",
    }
    if fit is not None:
        # An artifact that was saved from Python need not name its file of anchors.
        file = (sidecar.get("extra") or {}).get("anchors")
        anchors = f"{fit['anchors']:,} rows, hash {fit['anchor_hash'][:12]}"
        found["Search"] = (
            f"{fit['search']}, {fit['draws']} draws at each σ, {fit['passes']:.3g} passes over the "
            f"anchors, seed {fit['seed']}; {fit['stopped']}"
        )
        found["Anchors"] = f"{file}, {anchors}" if isinstance(file, str) else anchors
        if fit.get("kl") is not None:
            found["KL"] = f"{fit['kl']:.4g} nats from a prior of scale {fit['prior_sigma']:.4g}"
    if versions := sidecar.get("versions"):
        found["Versions"] = ", ".join(f"{k} {v}" for k, v in versions.items())
    if digest := sidecar.get("files", {}).get("adapter_model.safetensors"):
        found["Adapter"] = f"SHA-256 {digest[:12]}"
    return found


def _verdicts(
    changes: Mapping[str, Change], before: Evaluation, after: Evaluation, ood: Sequence[Evaluation]
) -> list[tuple[str, str, Change]]:
    """Return the key of the scale, OOD data set or "", and change of every metric."""
    found = [(key, "", change) for key, change in changes.items()]
    for dataset in dict.fromkeys(e.dataset for e in ood):
        theirs = {e.name: e for e in ood if e.dataset == dataset and e.total is not None}
        if before.name in theirs and after.name in theirs:
            was, now = ((theirs[e.name], e) for e in (before, after))
            found.append(("auroc", dataset, compare_auroc(was, now)))
    return found


def _flipped(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Return examples of predictions that differ, the largest differences first, and counts."""
    flips = before.probs.argmax(-1) != after.probs.argmax(-1)
    size = (before.probs - after.probs).abs().sum(-1).masked_fill(~flips, -1.0)
    count = int(flips.sum())
    order = size.argsort(descending=True)[: min(count, EXAMPLES)].tolist()
    return {
        "count": count,
        "gained": int((~before.correct & after.correct).sum()),
        "lost": int((before.correct & ~after.correct).sum()),
        "examples": [_example(i, {"before": before, "after": after}) for i in order],
    }


def _uncertain(shown: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Return examples of the rows that the last evaluation is least certain of."""
    e = list(shown.values())[-1]
    total = torch.special.entr(e.probs).sum(-1) if e.total is None else e.total
    order = total.argsort(descending=True)[:EXAMPLES].tolist()
    return [_example(i, shown) for i in order]


def _example(i: int, shown: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return one row as text, with what each evaluation says of it."""
    last = list(shown.values())[-1]
    row = last.rows[i] if last.rows else None
    names = (row.choices if row else None) or last.classes or ()

    def choice(k: int) -> str:
        return _short(names[k]) if k < len(names) else f"class {k}"

    said = [
        (colour, e.name, choice(k), float(e.probs[i, k]), bool(e.correct[i]))
        for colour, e in shown.items()
        for k in [int(e.probs[i].argmax())]
    ]
    chat = str(row.messages[-1]["content"]) if row and row.messages else ""
    return {
        "id": _short(row.id if row else f"row {i}"),
        "text": _short((row.text or row.prompt or chat) if row else ""),
        "label": choice(int(last.known_labels[i])),
        "said": said,
        "total": None if last.total is None else float(last.total[i]),
        "epistemic": None if last.epistemic is None else float(last.epistemic[i]),
    }


def _short(text: str) -> str:
    return text if len(text) <= HEAD + TAIL else f"{text[:HEAD]} […] {text[-TAIL:]}"


def _risks(shown: Mapping[str, Evaluation]) -> dict[str, Any] | None:
    """Return the panel of risk-coverage curves, and of each the risk at full and 80 % coverage."""
    found = {}
    for colour, e in shown.items():
        if e.total is None:
            return None
        risk = risk_coverage(e.total, e.correct).risk
        found[colour] = (float(risk[-1]), float(risk[-(len(risk) // 5) - 1]))
    return {"panel": figures.risk_coverage_panel(shown), "at": found}


def _uncertainties(
    shown: Mapping[str, Evaluation], ood: Sequence[Evaluation]
) -> list[dict[str, Any]]:
    """Return panels of total uncertainty, and of epistemic where there are draws."""
    found = []
    both = product(("total", "epistemic"), shown.values())
    known = [(kind, e) for kind, e in both if getattr(e, kind) is not None]
    size = 12 if len(known) > 2 else 10  # three in a row are drawn smaller
    for kind, e in known:
        values = getattr(e, kind)
        groups = {"right": values[e.correct], "wrong": values[~e.correct]}
        others = [getattr(o, kind) for o in ood if o.name == e.name]
        if others := [v for v in others if v is not None]:
            groups["ood"] = torch.cat(others)
        panel = {
            "name": e.name,
            "kind": kind,
            "panel": figures.uncertainty_panel(groups, kind, size),
            "counts": {colour: len(v) for colour, v in groups.items()},
            "wrong": _auroc(groups["wrong"], groups["right"]),
            "ood": _auroc(groups["ood"], values) if "ood" in groups else None,
        }
        found.append(panel)
    return found


def _auroc(positive: torch.Tensor, negative: torch.Tensor) -> float | None:
    return auroc(positive, negative) if len(positive) and len(negative) else None
