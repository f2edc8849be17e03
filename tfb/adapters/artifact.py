"""The artifact: an ordinary PEFT adapter folder plus a sidecar, written atomically.

adapter_config.json, adapter_model.safetensors   the adapter, untouched: PEFT loads the folder
README.md        a model card, with the adapter's own below it
tfb.json         configuration, noise version, the fit's record, library versions; the SHA-256 of
                 the other files, of itself, and what identifies the base model
tfb.safetensors  A', B', d of every Bayesian layer: signs and degenerate subspaces of an SVD
                 differ between machines, so seeds alone would not carry
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tfb.adapters.bridge import bayesianize
from tfb.adapters.card import CARD, card_text
from tfb.adapters.loading import (
    CONFIG,
    TASKS,
    WEIGHTS,
    adapter_config,
    adapter_folder,
    adapter_tensor_shapes,
    class_names,
    load_adapter,
    load_base,
    lora_keys,
    save_adapter,
)
from tfb.atomic import staged_folder, write, write_json
from tfb.data.encoding import check_label_tokens
from tfb.draws import stable_layer_id
from tfb.evaluation.decisions import Decisions
from tfb.model import BayesianModel
from tfb.plain import differences, json_sha256, listed, parse_json, shown, typed
from tfb.posterior import AdapterError, LowRankPosterior
from tfb.sampling.config import SamplingConfig
from tfb.search.result import PredictiveFit
from tfb_kernels import NOISE_VERSION

FORMAT_VERSION = 1
SIDECAR, FACTORS = "tfb.json", "tfb.safetensors"
# What transformers reads with a tokenizer wherever it is, so that it counts where it is added.
_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model"]
_TOKENIZER_FILES += ["*.jinja", "additional_chat_templates/*", "merges.txt", "config.json"]
_TOKENIZER_FILES += ["special_tokens_map.json", "added_tokens.json"]
_SAMPLES, _BLOCKS = 1024, 4  # of each tensor of the base, for its fingerprint
_FINGERPRINT_RTOL = 5e-3  # one rounding to bfloat16 (2^-8) and one to float16
_FINGERPRINT_ATOL = 1e-7  # of an element: float16 has none that are smaller
# Of a base's configuration: names, how it is computed, and the special tokens, which Trainer sets.
_HARMLESS = {"architectures", "dtype", "torch_dtype", "use_cache", "quantization_config"}
_HARMLESS |= {"attn_implementation", "experts_implementation", "id2label", "label2id"}
_HARMLESS |= {"pad_token_id", "bos_token_id", "eos_token_id", "problem_type"}
_LONGEST = 200  # of a setting as text; what is longer, such as a thousand classes, is hashed
_OLD_ELEMENTS, _OLD_RTOL = 4096, 1e-3  # of the fingerprints that 0.1.0 wrote


@dataclass(frozen=True)
class _Base:
    """What identifies a base model in a sidecar; ``mean_magnitudes`` are those of 0.1.0."""

    model_type: str
    shapes_sha256: str
    name: str | None = None
    settings: dict[str, Any] | None = None
    tensors: dict[str, tuple[float, ...]] | None = None
    mean_magnitudes: dict[str, float] | None = None


@dataclass(frozen=True)
class _Extra:
    columns: dict[str, str] | None = None


@dataclass(frozen=True)
class _Sidecar:
    """What a sidecar holds, beside SamplingConfig's other fields; 0.1.0 did not write them all."""

    sigma: float
    seed: int
    mode: str
    task: str
    layers: dict[str, float]
    base: _Base
    files: dict[str, str]
    layer_scales: dict[str, float] | None = None
    labels: tuple[str, ...] | None = None
    label_tokens: str = "all"
    decisions: Decisions | None = None
    fit: dict[str, Any] | None = None
    extra: _Extra | None = None
    versions: dict[str, str] | None = None


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
        ValueError: the model no longer carries the posterior of its weights, or carries it merged
            or beside another active adapter.
    """
    path = check_output_folder(folder)
    if bayes.sigma is None:
        raise ArtifactError(
            "sigma is not set: run tfb.fit_sigma or bayes.configure(sigma=...) first"
        )
    bayes.check_saving(exact=bayes.source is None)
    with staged_folder(path) as staging:
        save_adapter(bayes.model, bayes.adapter, staging, source=bayes.source)
        tensors: dict[str, torch.Tensor] = {}
        for name, p in bayes.posteriors.items():
            tensors |= {f"{name}.A": p.A, f"{name}.B": p.B, f"{name}.d": p.d}
        save_file({k: v.contiguous() for k, v in tensors.items()}, str(staging / FACTORS))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))
        saved = sorted(p for p in staging.rglob("*") if p.is_file() and p.name != CARD)
        files = {p.relative_to(staging).as_posix(): file_sha256(p) for p in saved}
        sidecar = sidecar_of(bayes, fit, **extra) | {"files": files}
        _check(sidecar)  # what could not be loaded is not saved
        write_json(staging / SIDECAR, sidecar | {"sha256": json_sha256(sidecar)})
        write(staging / CARD, card_text(sidecar, bayes.source).encode())
    return path


def sidecar_of(
    bayes: BayesianModel, fit: PredictiveFit | None = None, **extra: Any
) -> dict[str, Any]:
    """Return what a sidecar tells of a model, as JSON has it, beside the hashes of its files."""
    sidecar = {
        "format_version": FORMAT_VERSION,
        "noise_version": NOISE_VERSION,
        **asdict(bayes.config),
        "label_tokens": bayes.label_tokens,
        "labels": class_names(bayes.task, bayes.base.config, bayes.labels),
        "task": bayes.task,
        "layers": {name: p.scaling for name, p in bayes.posteriors.items()},
        "base": {
            "name": _name(bayes.base),
            "settings": base_settings(bayes.base),
            **base_fingerprint(bayes.base),
        },
        "fit": None if fit is None else fit.to_dict(),
        "decisions": None if bayes.decisions is None else asdict(bayes.decisions),
        "extra": extra,
        "versions": library_versions(),
    }
    found: dict[str, Any] = json.loads(json.dumps(sidecar, allow_nan=False))
    return found


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
        name = _read(local / SIDECAR)["base"].get("name")
    name = name or adapter_config(local).get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{folder}: does not say what its base model is; give base=NAME")
    return str(name)


def read_sidecar(folder: str | Path) -> dict[str, Any]:
    """Read tfb.json of an artifact, and check all of it and the files that it lists.

    Raises:
        ArtifactError: damaged, of another version, or with a file that is not as it was saved.
    """
    folder = Path(folder)
    sidecar = _read(folder / SIDECAR)
    for name, digest in sidecar["files"].items():
        path = folder / name
        try:
            found = file_sha256(path) if path.is_file() else None
        except OSError as error:
            raise ArtifactError(f"{folder}: cannot read {name}: {error.strerror}") from error
        if found != digest:
            fault = "is missing" if found is None else "has changed since the artifact was saved"
            raise ArtifactError(f"{folder}: {name} {fault}; put the file back, or fit again")
    if "sha256" in sidecar:  # 0.1.0 did not list a tokenizer's files
        there = {p for pattern in _TOKENIZER_FILES for p in folder.glob(pattern) if p.is_file()}
        if added := {p.relative_to(folder).as_posix() for p in there} - sidecar["files"].keys():
            raise ArtifactError(
                f"{folder}: {min(added)} was added since the artifact was saved, and would change "
                "its tokenizer; remove it, or save the artifact with that tokenizer"
            )
    return sidecar


def _read(path: Path) -> dict[str, Any]:
    """Return what a sidecar holds, with every value checked."""
    if not path.is_file():
        what = f"no {SIDECAR}" if path.parent.is_dir() else "no such folder"
        raise ArtifactError(f"{path.parent}: {what}; expected a folder written by tfb fit")
    try:
        data: dict[str, Any] = typed(dict, parse_json(path.read_bytes()))
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged, not JSON as it was saved ({error})") from error
    for key, ours in (("format_version", FORMAT_VERSION), ("noise_version", NOISE_VERSION)):
        if data.get(key) != ours:
            versions = data.get("versions")
            wrote = versions.get("tfb") if isinstance(versions, dict) else "unknown"
            raise ArtifactError(
                f"{path.parent}: {key} is {shown(data.get(key))}, this library has {ours}; fit "
                "the adapter again with this version, or use the version that wrote it "
                f"({wrote})"
            )
    if "files" not in data:  # 0.1.0
        data["files"] = {WEIGHTS: data.get("adapter_sha256"), FACTORS: data.get("factors_sha256")}
    try:
        _check(data)
    except (RecursionError, ValueError) as error:
        raise ArtifactError(f"{path}: damaged, {error}; fit again") from error
    return data


def _check(data: dict[str, Any]) -> None:
    """Refuse a sidecar with a value that cannot be, with a ValueError that names it."""
    found = typed(_Sidecar, data)
    typed(SamplingConfig, data)
    check_label_tokens(found.label_tokens)
    if not found.layers:
        raise ValueError("layers is empty")
    if found.task not in TASKS:
        raise ValueError(f"task={found.task!r}: expected one of {', '.join(TASKS)}")
    if found.fit is not None:
        PredictiveFit.from_dict(found.fit)
    if "sha256" in data:
        if unlisted := {CONFIG, WEIGHTS, FACTORS} - found.files.keys():
            raise ValueError(f"files does not list {min(unlisted)}")
        if data["sha256"] != json_sha256({k: v for k, v in data.items() if k != "sha256"}):
            raise ValueError("its values have changed since it was saved")


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
    posteriors = _read_posteriors(folder, sidecar)
    if not isinstance(base_model, nn.Module):
        base_model = load_base(base_model, folder)
    model = load_adapter(base_model, folder)
    bayes = bayesianize(
        model,
        layers=posteriors.__contains__,
        posteriors=posteriors,
        config=typed(SamplingConfig, sidecar),
        labels=sidecar.get("labels"),
        label_tokens=sidecar.get("label_tokens", "all"),
        source=folder,
    )
    bayes.decisions = typed(Decisions | None, sidecar.get("decisions"))
    check_base(folder, sidecar["base"], bayes.base)
    for name, p in posteriors.items():  # of 0.1.0 the adapter's configuration has no hash
        layer: Any = bayes.base.get_submodule(name)
        if not math.isclose(layer.scaling[bayes.adapter], p.scaling, rel_tol=1e-6):
            raise ArtifactError(
                f"{folder}: {CONFIG} gives {name} the scaling {layer.scaling[bayes.adapter]:.6g}, "
                f"but it was {p.scaling:.6g} at the fit; put the file back, or fit again"
            )
    if "label_tokens" not in sidecar and bayes.task != "SEQ_CLS":
        warnings.warn(
            f"{folder}: does not say by which tokens choices are scored; all are. Fit again, with "
            "label_tokens='last' for an adapter that was trained on the last token alone",
            stacklevel=2,
        )
    return bayes


def _read_posteriors(folder: Path, sidecar: dict[str, Any]) -> dict[str, LowRankPosterior]:
    """Return the saved factors by module name."""
    try:
        tensors = load_file(str(folder / FACTORS))
    except SafetensorError as error:
        raise ArtifactError(f"{folder}: {FACTORS} is damaged: {error}") from error
    names = {f"{n}.{t}" for n in sidecar["layers"] for t in "ABd"}
    for fault, odd in (("lacks", names - set(tensors)), ("has also", set(tensors) - names)):
        if odd:
            raise ArtifactError(f"{folder}: {FACTORS} {fault} {listed(sorted(odd))}")
    # Version 0.1.0 could multiply sigma by layer: noise has the scale sigma / d.
    scales = sidecar.get("layer_scales") or {}
    shapes, found = adapter_tensor_shapes(folder), {}
    for name, scaling in sidecar["layers"].items():
        A, B, d = (tensors[f"{name}.{t}"] for t in "ABd")
        theirs = [shapes.get(key) for key in lora_keys(name)]
        if not _usable(A, B, d) or theirs not in ([None, None], [list(A.shape), list(B.shape)]):
            raise ArtifactError(
                f"{folder}: {FACTORS} is damaged, the factors of {name} are none of this adapter"
            )
        scale = scales.get(name, 1.0)
        found[name] = LowRankPosterior(
            name=name,
            layer_id=stable_layer_id(name),
            A=A,
            B=B,
            d=d / scale if scale else torch.zeros_like(d),
            scaling=float(scaling),
        )
    return found


def _usable(A: Tensor, B: Tensor, d: Tensor) -> bool:
    """Whether factors are those of a posterior: dtypes, shapes, finite numbers, and d >= 0."""
    kinds = A.dtype == B.dtype in (torch.float32, torch.float64) and d.dtype == torch.float64
    sizes = A.dim() == B.dim() == 2 and len(A) == B.shape[1] and list(d.shape) == [len(A)]
    return kinds and sizes and all(bool(t.isfinite().all()) for t in (A, B, d, d.sqrt()))


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


def base_settings(base: Any) -> dict[str, Any]:
    """Return a base model's whole configuration as plain data, but for where it came from."""
    found = json.loads(base.config.to_json_string(use_diff=False))
    for name in ("attn_implementation", "experts_implementation"):  # left out by transformers
        found[name] = getattr(base.config, f"_{name}", None)
    return settings(found, "_name_or_path", "transformers_version")


def settings(values: dict[str, Any], *places: str) -> dict[str, Any]:
    """Return values without those that say where something is; of long ones the hash."""
    found = dict[str, Any]()
    for name in sorted(values.keys() - set(places)):
        value = values[name]
        if isinstance(value, dict) and "model_type" in value:  # a tower's own configuration
            found[name] = settings(value, *places)
        else:
            found[name] = value if len(json.dumps(value)) <= _LONGEST else json_sha256(value)
    return found


def base_fingerprint(base: nn.Module) -> dict[str, Any]:
    """Return what identifies a base model, in whatever dtype it is loaded.

    That is its type, its parameters' names and shapes, and sums over elements of every parameter
    and buffer; see :func:`_sums`.
    """
    shapes = hashlib.sha256()
    tensors = dict(sorted(base_tensors(base.named_parameters())))
    for name, p in tensors.items():
        if p.is_meta:
            raise ArtifactError(f"{name}: weights are on the meta device (offloaded); load them")
        shapes.update(f"{name}:{list(p.shape)}\n".encode())
    buffers = dict(base_tensors(base.named_buffers()))
    for name, buffer in buffers.items():
        # Some models replace their rotary angles while they read; the originals stay.
        original = name.replace("inv_freq", "original_inv_freq")
        if original == name or original not in buffers:
            tensors[name] = buffer
    return {
        "model_type": getattr(base.config, "model_type", type(base).__name__),
        "shapes_sha256": shapes.hexdigest(),
        "tensors": {name: _sums(t) for name, t in tensors.items()},
    }


def _sums(tensor: Tensor) -> list[float]:
    """Return 2 * _BLOCKS sums over blocks of elements that are spread over a tensor.

    Those of magnitudes see another scale. Those of elements times the cosine of their number see
    other signs and another order.
    """
    flat = tensor.detach().flatten()
    x = flat[:: -(-len(flat) // _SAMPLES) | 1].cpu().double()  # odd: it meets all columns
    x = x.nan_to_num(1e30, 1e30, -1e30)  # masks hold infinities, which JSON has not
    turned = x * torch.arange(len(x), dtype=torch.float64).cos()
    blocks = torch.stack([x.abs(), turned]).tensor_split(_BLOCKS, dim=1)
    sums = torch.stack([block.sum(1) for block in blocks], dim=1)
    return [float(f"{value:.6g}") for value in sums.flatten().tolist()]


def check_base(folder: Path, saved: Mapping[str, Any], base: nn.Module) -> None:
    """Refuse another base model than the one whose fingerprint was saved."""
    found = base_fingerprint(base)
    if saved["shapes_sha256"] != found["shapes_sha256"]:
        raise ArtifactError(
            f"{folder}: fitted on another base model ({saved['model_type']}; this one is "
            f"{found['model_type']} with other parameters); load the base it was fitted on"
        )
    was, now = saved.get("settings") or {}, base_settings(base)
    if others := differences(_comparable(was, now), _comparable(now, was)):
        raise ArtifactError(
            f"{folder}: fitted on a base model with another configuration ({listed(others)}); "
            "load the base it was fitted on"
        )
    for name in _differing(typed(_Base, saved), found["tensors"], base):
        raise ArtifactError(
            f"{folder}: fitted on a base model with other weights (first difference: {name}); "
            "load the base it was fitted on"
        )


def _comparable(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that count, of those that another version's configuration has too."""
    found = dict[str, Any]()
    for name in sorted(values.keys() & others.keys() - _HARMLESS):
        value, other = values[name], others[name]
        nested = isinstance(value, Mapping) and isinstance(other, Mapping)
        found[name] = _comparable(value, other) if nested else value
    return found


def _differing(saved: _Base, found: dict[str, list[float]], base: nn.Module) -> Iterator[str]:
    """Yield the names of tensors that are not as they were."""
    # What another version of transformers makes anew need not be there.
    for name, value in (saved.tensors or {}).items():
        if name not in found:
            continue
        if len(value) == len(found[name]):
            was, now = torch.tensor([value, found[name]], dtype=torch.float64)
            magnitudes = was[:_BLOCKS].repeat(2)
            bound = _FINGERPRINT_RTOL * magnitudes + _FINGERPRINT_ATOL * _SAMPLES / _BLOCKS
            if bool(((was - now).abs() <= bound).all()):
                continue
        yield name
    parameters = dict(base_tensors(base.named_parameters()))
    for name, magnitude in (saved.mean_magnitudes or {}).items():
        first = parameters.get(name, torch.empty(0)).detach().flatten()[:_OLD_ELEMENTS]
        if not abs(float(first.double().abs().mean()) - magnitude) <= _OLD_RTOL * abs(magnitude):
            yield name


def library_versions() -> dict[str, str]:
    """Return the versions of what results depend on."""
    found = {"noise": str(NOISE_VERSION), "torch": torch.__version__}
    for package in ("tfb", "transformers", "tokenizers", "peft", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
