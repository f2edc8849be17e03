"""The artifact's README.md: a model card in the hub's format, with the adapter's own below it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from tfb.evaluation.decisions import Decisions
from tfb.search.result import CurvePoint, PredictiveFit

CARD = "README.md"
MARK = "<!-- What follows is the adapter's own card. -->"
TAGS = ("lora", "peft", "tfb", "bayesian", "uncertainty", "calibration")
PIPELINES = {"SEQ_CLS": "text-classification"}  # the others are language models
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#|~!&$])")


def card_text(sidecar: Mapping[str, Any], source: Path | None = None) -> str:
    """Return the card of an artifact.

    It names the data and says how many rows they were; it holds none of their text, and no path.

    Args:
        sidecar: what tfb.json holds.
        source: the adapter's folder, whose card is kept: its text below ours, its metadata in the
            front matter. In an artifact only what stands below our own text is the adapter's.
    """
    theirs, text = _read(source / CARD if source is not None else None)
    base = _hub_name(sidecar["base"].get("name"))
    metadata = theirs | {
        "library_name": "peft",
        "base_model": base or theirs.get("base_model"),
        "pipeline_tag": theirs.get("pipeline_tag")
        or PIPELINES.get(sidecar["task"], "text-generation"),
        "tags": list(dict.fromkeys([*(theirs.get("tags") or ()), *TAGS])),
    }
    fit = None if sidecar["fit"] is None else PredictiveFit.from_dict(sidecar["fit"])
    at = sidecar["sigma"], sidecar["temperature"]
    if fit is not None and (fit.sigma, fit.temperature) != at:
        fit = None  # its figures are not those of what was configured since
    decided = sidecar.get("decisions") is not None
    words = jinja2.Environment(
        loader=jinja2.PackageLoader("tfb.adapters", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown: what users named goes through the filter
    )
    words.filters |= {"markdown": markdown, "number": "{:.3g}".format, "percent": "{:.1%}".format}
    body = words.get_template("card.md.j2").render(
        dict(sidecar),
        decisions=str(Decisions(**sidecar["decisions"])).splitlines() if decided else [],
        hub_base=base,
        record=fit,
        best=None if fit is None else _best(fit),
    )
    card = f"---\n{ModelCardData(**metadata, ignore_metadata_errors=True).to_yaml()}\n---\n\n{body}"
    return f"{card.rstrip()}\n\n{MARK}\n" + (f"\n{text}\n" if text else "")


def markdown(text: object) -> str:
    """Write text of users' so that Markdown shows it as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def _read(path: Path | None) -> tuple[dict[str, Any], str]:
    """Return a card's metadata and its text; where the metadata cannot be read, all as text."""
    if path is None or not path.is_file():
        return {}, ""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    found = text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}"
    try:
        card = ModelCard(found, ignore_metadata_errors=True)
    except (ValueError, TypeError, YAMLError):  # a damaged card is no reason to save nothing
        return {}, text.strip()
    own = card.text.partition(MARK)
    return card.data.to_dict(), own[2 if own[1] else 0].strip()


def _hub_name(name: str | None) -> str | None:
    """Return a base model's name where it is one of the hub's, rather than a folder's."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return name


def _best(fit: PredictiveFit) -> CurvePoint | None:
    """Return the measured point of the answer, if all anchors were measured there."""
    points = [p for p in fit.curve if (p.sigma, p.temperature) == (fit.sigma, fit.temperature)]
    return next((p for p in points if p.anchors in (None, fit.anchors)), None)
