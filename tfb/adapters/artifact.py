"""The artifact: an ordinary PEFT adapter folder plus a sidecar, written atomically.

adapter_config.json, adapter_model.safetensors   the adapter, untouched: PEFT loads the folder
README.md        a model card, with the adapter's own below it
tfb.json         configuration, noise version, the fit's record, hashes, library versions
tfb.safetensors  A', B', d of every Bayesian layer: signs and degenerate subspaces of an SVD
                 differ between machines, so seeds alone would not carry
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tfb.adapters.bridge import bayesianize
from tfb.adapters.card import CARD, card_text
from tfb.adapters.loading import (
    adapter_config,
    adapter_folder,
    class_names,
    load_adapter,
    load_base,
    save_adapter,
)
from tfb.atomic import staged_folder, write, write_json
from tfb.data.encoding import check_label_tokens
from tfb.draws import stable_layer_id
from tfb.evaluation.decisions import Decisions
from tfb.model import BayesianModel
from tfb.posterior import AdapterError, LowRankPosterior
from tfb.sampling.config import SamplingConfig
from tfb.search.result import PredictiveFit
from tfb_kernels import NOISE_VERSION

FORMAT_VERSION = 1
SIDECAR, FACTORS, ADAPTER = "tfb.json", "tfb.safetensors", "adapter_model.safetensors"
# What a sidecar must hold to be read, with the types that JSON gives.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "sigma": (int, float),
    "seed": int,
    "mode": str,
    "task": str,
    "layers": dict,
    "adapter_sha256": str,
    "factors_sha256": str,
    "base": dict,
}
_CONFIG = [field.name for field in fields(SamplingConfig)]
_FINGERPRINT_PARAMETERS = 16
_FINGERPRINT_ELEMENTS = 4096
_FINGERPRINT_RTOL = 1e-3  # lets a base be loaded in another dtype, not another set of weights


class ArtifactError(ValueError):
    """An artifact that cannot be written or trusted; the message says what differs."""


def check_output_folder(folder: str | Path) -> Path:
    """Return the folder as a Path; refuse one that holds something already."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"{path} already holds something; choose a new folder or remove it")
    return path


def save(
    bayes: BayesianModel,
    folder: str | Path,
    *,
    fit: PredictiveFit | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **extra: Any,
) -> Path:
    """Write a model with its posterior and configuration to a new folder, all of it or nothing.

    Args:
        bayes: the model; its sigma is set.
        folder: absent or empty.
        fit: the search's record.
        tokenizer: written beside the adapter; None: the base model's is meant.
        extra: JSON values, kept under "extra".

    Returns:
        The folder.

    Raises:
        ArtifactError: the folder holds something, or sigma is not set.
        ValueError: the model no longer carries the posterior, or carries it merged.
    """
    path = check_output_folder(folder)
    if bayes.sigma is None:
        raise ArtifactError(
            "sigma is not set: run tfb.fit_sigma or bayes.configure(sigma=...) first"
        )
    bayes.check_attached()
    with staged_folder(path) as staging:
        save_adapter(bayes.model, bayes.adapter, staging, source=bayes.source)
        tensors: dict[str, torch.Tensor] = {}
        for name, p in bayes.posteriors.items():
            tensors |= {f"{name}.A": p.A, f"{name}.B": p.B, f"{name}.d": p.d}
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(staging / FACTORS))
        sidecar = sidecar_of(bayes, fit, **extra) | {
            "adapter_sha256": file_sha256(staging / ADAPTER),
            "factors_sha256": file_sha256(staging / FACTORS),
        }
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))
        write_json(staging / SIDECAR, sidecar)
        write(staging / CARD, card_text(sidecar, bayes.source).encode())
    return path


def sidecar_of(
    bayes: BayesianModel, fit: PredictiveFit | None = None, **extra: Any
) -> dict[str, Any]:
    """Return what a sidecar tells of a model, beside the hashes of its files."""
    return {
        "format_version": FORMAT_VERSION,
        "noise_version": NOISE_VERSION,
        **asdict(bayes.config),
        "label_tokens": bayes.label_tokens,
        "labels": class_names(bayes.task, bayes.base.config, bayes.labels),
        "task": bayes.task,
        "layers": {name: p.scaling for name, p in bayes.posteriors.items()},
        "base": base_fingerprint(bayes.base) | {"name": _name(bayes.base)},
        "fit": None if fit is None else fit.to_dict(),
        "decisions": None if bayes.decisions is None else asdict(bayes.decisions),
        "extra": extra,
        "versions": library_versions(),
    }


def base_of(folder: str | Path, base: str | Path | None = None) -> str:
    """Return the name of an adapter's base model: the given one, else what its folder says.

    An artifact tells on which model it was fitted, an adapter's configuration on which it was
    trained.

    Args:
        folder: an adapter or artifact, a local folder or a hub name.
        base: a local folder or a hub name.

    Raises:
        AdapterError: no adapter there, or nothing tells its base.
    """
    if base is not None:
        return str(base)
    local = adapter_folder(folder)
    name = None
    if (local / SIDECAR).is_file():
        name = read_sidecar(local)["base"].get("name")
    name = name or adapter_config(local).get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{folder}: does not say what its base model is; give base=NAME")
    return str(name)


def read_sidecar(folder: str | Path) -> dict[str, Any]:
    """Read tfb.json of an artifact; refuse one that is damaged or of another version."""
    path = Path(folder) / SIDECAR
    if not path.is_file():
        what = f"no {SIDECAR}" if Path(folder).is_dir() else "no such folder"
        raise ArtifactError(f"{folder}: {what}; expected a folder written by tfb fit")
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: damaged, not a JSON object")
    for key, ours in (("format_version", FORMAT_VERSION), ("noise_version", NOISE_VERSION)):
        if data.get(key) != ours:
            raise ArtifactError(
                f"{folder}: {key} is {data.get(key)}, this library has {ours}; fit the adapter "
                "again with this version, or use the version that wrote it "
                f"({data.get('versions', {}).get('tfb', 'unknown')})"
            )
    bad = [key for key, types in _FIELDS.items() if not isinstance(data.get(key), types)]
    labels = data.get("labels")
    if labels is not None and not (
        isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    ):
        bad.append("labels")
    if not bad and not (math.isfinite(data["sigma"]) and data["sigma"] >= 0):
        bad = ["sigma"]
    if bad:
        raise ArtifactError(f"{path}: damaged, no usable {', '.join(bad)}; fit again")
    return data


def load(base_model: nn.Module | str | Path, folder: str | Path) -> BayesianModel:
    """Load the :class:`BayesianModel` that was saved: same factors, same noise, same bits.

    Args:
        base_model: the transformers model that the adapter belongs to (changed in place by
            PEFT), or its folder or hub name.
        folder: the artifact.

    Raises:
        ArtifactError: damaged, of another version, or of another base model.
        AdapterError: the adapter does not fit the base model.
    """
    folder = Path(folder)
    sidecar = read_sidecar(folder)
    for file, digest in ((ADAPTER, "adapter_sha256"), (FACTORS, "factors_sha256")):
        if not (folder / file).is_file():
            raise ArtifactError(f"{folder}: {file} is missing")
        if file_sha256(folder / file) != sidecar[digest]:
            raise ArtifactError(f"{folder}: {file} has changed since the fit; fit again")
    try:
        config = SamplingConfig(**{name: sidecar[name] for name in _CONFIG if name in sidecar})
        label_tokens = sidecar.get("label_tokens", "all")
        check_label_tokens(label_tokens)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{folder}: damaged, {SIDECAR} has {error}; fit again") from error
    decisions = saved_decisions(folder, sidecar)
    if not isinstance(base_model, nn.Module):
        base_model = load_base(base_model, folder)
    model = load_adapter(base_model, folder)
    posteriors = _read_posteriors(folder, sidecar)
    bayes = bayesianize(
        model,
        layers=posteriors.__contains__,
        posteriors=posteriors,
        config=config,
        labels=sidecar.get("labels"),
        label_tokens=label_tokens,
        source=folder,
    )
    bayes.decisions = decisions
    _check_fingerprint(folder, sidecar["base"], base_fingerprint(bayes.base))
    if "label_tokens" not in sidecar and bayes.task != "SEQ_CLS":
        warnings.warn(
            f"{folder}: does not say by which tokens choices are scored; all are. Fit again, with "
            "label_tokens='last' for an adapter that was trained on the last token alone",
            stacklevel=2,
        )
    return bayes


def saved_decisions(folder: str | Path, sidecar: dict[str, Any]) -> Decisions | None:
    """Return the decisions that an artifact's sidecar holds; None where it has none."""
    found = sidecar.get("decisions")
    try:
        return None if found is None else Decisions(**found)
    except TypeError as error:
        raise ArtifactError(f"{folder}: damaged, {SIDECAR} has {error}; fit again") from error


def _read_posteriors(folder: Path, sidecar: dict[str, Any]) -> dict[str, LowRankPosterior]:
    """Return the saved factors by module name."""
    tensors, scalings = load_file(str(folder / FACTORS)), sidecar["layers"]
    missing = {f"{n}.{t}" for n in scalings for t in "ABd"} - set(tensors)
    if missing:
        raise ArtifactError(f"{folder}: {FACTORS} lacks {', '.join(sorted(missing)[:4])}")
    # Version 0.1.0 could multiply sigma by layer: noise has the scale sigma / d.
    scales = sidecar.get("layer_scales") or {}
    found = {}
    for name, scaling in scalings.items():
        d, scale = tensors[f"{name}.d"], scales.get(name, 1.0)
        found[name] = LowRankPosterior(
            name=name,
            layer_id=stable_layer_id(name),
            A=tensors[f"{name}.A"],
            B=tensors[f"{name}.B"],
            d=d / scale if scale else torch.zeros_like(d),
            scaling=scaling,
        )
    return found


def _name(base: Any) -> str | None:
    """Return the folder or hub name that a base model was loaded from, if any."""
    name = getattr(base, "name_or_path", None)
    if not name:
        return None
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def base_tensors(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield those that are not an adapter's, under the names that they have without one."""
    for name, tensor in named:
        if not any(part in name for part in ("lora_", "modules_to_save", "original_module")):
            yield name.replace(".base_layer", ""), tensor


def base_fingerprint(base: nn.Module) -> dict[str, Any]:
    """Return what identifies a base model.

    That is its type, its parameters' names and shapes, and the mean magnitude of a few parameters'
    first elements, which does not depend on the dtype it is loaded in.
    """
    shapes, samples = hashlib.sha256(), {}
    parameters = sorted(base_tensors(base.named_parameters()))
    stride = max(1, len(parameters) // _FINGERPRINT_PARAMETERS)
    for i, (name, p) in enumerate(parameters):
        shapes.update(f"{name}:{list(p.shape)}\n".encode())
        if i % stride == 0 and p.is_floating_point():
            samples[name] = float(
                p.detach().flatten()[:_FINGERPRINT_ELEMENTS].double().abs().mean()
            )
    return {
        "model_type": getattr(base.config, "model_type", type(base).__name__),
        "shapes_sha256": shapes.hexdigest(),
        "mean_magnitudes": samples,
    }


def _check_fingerprint(folder: Path, saved: dict[str, Any], found: dict[str, Any]) -> None:
    if saved["shapes_sha256"] != found["shapes_sha256"]:
        raise ArtifactError(
            f"{folder}: fitted on another base model ({saved['model_type']}; this one is "
            f"{found['model_type']} with other parameters); load the base it was fitted on"
        )
    for name, value in saved["mean_magnitudes"].items():
        other = found["mean_magnitudes"].get(name, float("nan"))
        if not abs(other - value) <= _FINGERPRINT_RTOL * abs(value):
            raise ArtifactError(
                f"{folder}: fitted on a base model with other weights (first difference: {name}); "
                "load the base it was fitted on"
            )


def library_versions() -> dict[str, str]:
    """Return the versions of what results depend on."""
    found = {"noise": str(NOISE_VERSION), "torch": torch.__version__}
    for package in ("tfb", "transformers", "peft", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
