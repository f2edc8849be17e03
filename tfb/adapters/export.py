"""Sampled adapters for other engines: every draw is an ordinary PEFT adapter folder.

``export.json`` holds sigma, seed and noise version, stream and sign of each draw, and hashes.
``draw-00``, ``draw-01``, ... hold an adapter each; antithetic draws stand side by side.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfb.adapters.artifact import (
    FACTORS,
    SIDECAR,
    ArtifactError,
    check_output_folder,
    file_sha256,
    library_versions,
)
from tfb.adapters.loading import CONFIG, WEIGHTS, lora_keys, save_adapter
from tfb.atomic import staged_folder, write_json
from tfb.draws import Draws
from tfb.model import BayesianModel
from tfb.posterior import AdapterError, LowRankPosterior, product_norm
from tfb_kernels import NOISE_VERSION

FORMAT_VERSION = 1
MANIFEST = "export.json"
DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")


def export(
    bayes: BayesianModel,
    folder: str | Path,
    draws: int | Draws = 10,
    *,
    dtype: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write sampled adapters to a new folder, all of them or nothing.

    A draw of weight noise is a LoRA of the same rank and scaling: lora_B = B', lora_A = A' +
    (sigma / d) o E. So a server of many LoRA adapters serves the posterior by one request for each
    draw, whose probabilities (never logits) are averaged. Everything else of the adapter is copied.
    At a temperature T other than 1, which export.json says, they are those of logits / T.

    B' and A' are another factorization than the adapter's own, so a file in fewer bits rounds the
    adapter anew. "rounding" in export.json is the root mean square of the updates' rounding over
    that of their noise: at 0.1 it adds a hundredth to the variance.

    Args:
        bayes: the model with its posterior.
        folder: absent or empty.
        draws: a number of antithetic draws at the model's sigma and seed, or the draws themselves
            (weight noise). ``bayes.predict`` with the same draws gives the same probabilities.
        dtype: of the sampled weights. "auto": the posterior's own, float32, or float64 for a
            float64 adapter. Or float16, bfloat16, float32, float64.
        progress: gets 1 after each adapter.

    Returns:
        The folder.

    Raises:
        ArtifactError: the folder holds something, sigma belongs to tail mode, or a weight overflows
            ``dtype``.
        ValueError: sigma not set, an odd number of draws, token noise, an unknown ``dtype``, or a
            model that no longer carries the posterior.
    """
    path = check_output_folder(folder)
    check_dtype(dtype)
    check_exportable(bayes.config.mode, bayes.config.tail)
    chosen = bayes.draws(draws)
    if chosen.noise != "weight":
        raise ValueError("export: needs weight noise; token noise is not a sample of weights")
    bayes.check_saving()
    with staged_folder(path) as staging:
        mean = staging / "mean"
        mean.mkdir()
        save_adapter(bayes.model, bayes.adapter, mean, source=bayes.source)
        stored, config = load_file(str(mean / WEIGHTS)), (mean / CONFIG).read_bytes()
        adapter_hash = file_sha256(mean / WEIGHTS)
        shutil.rmtree(mean)
        _check_names(bayes, stored)
        width = max(2, len(str(len(chosen) - 1)))
        rounding, written = Rounding(), []
        for i, (sigma, stream) in enumerate(zip(chosen.sigmas, chosen.streams, strict=True)):
            name = f"draw-{i:0{width}d}"
            (staging / name).mkdir()
            (staging / name / CONFIG).write_bytes(config)
            sampled = _sampled(bayes, sigma, stream, chosen.seed, dtype, rounding)
            save_file(stored | sampled, str(staging / name / WEIGHTS), {"format": "pt"})
            written.append(
                {
                    "folder": name,
                    "sigma": sigma,
                    "stream": stream,
                    "sign": (sigma > 0) - (sigma < 0),
                    "sha256": file_sha256(staging / name / WEIGHTS),
                }
            )
            if progress is not None:
                progress(1)
        sigmas = {abs(s) for s in chosen.sigmas}
        manifest = {
            "format_version": FORMAT_VERSION,
            "noise_version": NOISE_VERSION,
            "base_model": json.loads(config).get("base_model_name_or_path"),
            "sigma": sigmas.pop() if len(sigmas) == 1 else None,
            "seed": chosen.seed,
            "temperature": bayes.config.temperature,
            "dtype": sorted({str(t.dtype).removeprefix("torch.") for t in sampled.values()}),
            "rounding": rounding.ratio,
            "adapter_sha256": adapter_hash,
            "artifact_sha256": _artifact_hashes(bayes.source),
            "draws": written,
            "versions": library_versions(),
        }
        write_json(staging / MANIFEST, manifest)
    return path


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that is not one of ``DTYPES``."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")


def check_exportable(mode: str, tail: int | None) -> None:
    """Refuse a sigma of tail mode: a sampled adapter has its noise at every token."""
    if mode != "full":
        raise ArtifactError(
            f"sigma was searched with mode={mode!r} (tail={tail}), noise at the last positions "
            "only; an exported adapter has its noise at every token. Fit with mode 'full', or "
            "accept this sigma there: bayes.configure(mode='full')"
        )


@dataclass
class Rounding:
    """Sums of squares, over modules and draws, of the updates' rounding and of their noise."""

    error: float = 0.0
    noise: float = 0.0

    def add(self, p: LowRankPosterior, exact: Tensor, A: Tensor, B: Tensor) -> None:
        """Add one draw of one module: A' + noise as it is, A and B as they are written."""
        A, B, B0 = A.double(), B.double(), p.B.double()
        # B A - B' exact = [B - B', B'] [A; A - exact], whose norm needs the small products only.
        left, right = torch.cat([B - B0, B0], 1), torch.cat([A, A - exact])
        self.error += (p.scaling * product_norm(left, right)) ** 2
        self.noise += p.scaling**2 * float((p.d[:, None] * (exact - p.A.double())).square().sum())

    @property
    def ratio(self) -> float | None:
        """The root of error over noise; None without noise."""
        return math.sqrt(self.error / self.noise) if self.noise else None


def _sampled(
    bayes: BayesianModel, sigma: float, stream: int, seed: int, dtype: str, rounding: Rounding
) -> dict[str, Tensor]:
    """Return the sampled modules' tensors of one draw, by their names in the file."""
    found: dict[str, Tensor] = {}
    for name, p in bayes.posteriors.items():
        kind = p.A.dtype if dtype == "auto" else getattr(torch, dtype)
        exact = p.sample_A(sigma, stream, seed)
        A, B = exact.to(kind), p.B.to(kind)
        if not bool(A.isfinite().all() and B.isfinite().all()):
            raise ArtifactError(f"{name}: weights overflow {kind}; choose bfloat16 or float32")
        rounding.add(p, exact, A, B)
        found |= zip(lora_keys(name), (A.contiguous(), B.contiguous()), strict=True)
    return found


def _check_names(bayes: BayesianModel, stored: dict[str, Tensor]) -> None:
    """Refuse an adapter's file that names weights in another way."""
    for name, p in bayes.posteriors.items():
        for key, like in zip(lora_keys(name), (p.A, p.B), strict=True):
            if key not in stored or stored[key].shape != like.shape:
                raise AdapterError(f"{name}: the adapter's file has no {key} {list(like.shape)}")


def _artifact_hashes(source: Path | None) -> dict[str, Any] | None:
    """Return the SHA-256 of the artifact's own files; None for a posterior that was not saved."""
    if source is None or not (source / SIDECAR).is_file():
        return None
    return {file: file_sha256(source / file) for file in (SIDECAR, FACTORS)}
