"""What a scoring run is to do, as plain data, and what its results depend on."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tfb.adapters.artifact import SIDECAR, file_sha256, library_versions, load, read_sidecar
from tfb.adapters.loading import base_config, class_names
from tfb.data.encoding import check_truncate
from tfb.data.readers import Source, schema_of
from tfb.data.rows import RowError, RowFormat
from tfb.model import BayesianModel
from tfb.sampling.config import check_mode
from tfb.scoring.output import FORMATS
from tfb.scoring.rows import load_tokenizer, set_padding, to_device
from tfb.scoring.scorer import Scorer
from tfb.scoring.windows import Reading


@dataclass(frozen=True)
class Job:
    """One scoring run.

    Attributes:
        model: base model, a folder or hub name. artifact: folder written by ``tfb fit``.
        inputs: files, folders and patterns, see :mod:`tfb.data.readers`. output: the folder of parts.
        draws: antithetic draws (even), or "auto". mode, tail: None: as sigma was searched.
        file_format: "parquet" or "jsonl". batch_tokens: padded tokens of a batch (of one copy of
            its rows). part_rows: most rows of a part. keep: columns that pass through.
        columns, labels: see :class:`tfb.data.rows.RowFormat`; labels None: the artifact's. truncate:
            see :class:`tfb.data.encoding.RowEncoder`.
        per_draw, logits: keep every draw's probabilities, logits. limit: records to read.
        device: None: a GPU if there is one. workers, ray_address: of the engine "ray", see
            :class:`tfb.scoring.ray.RayEngine`.
    """

    model: str
    artifact: str
    inputs: tuple[str, ...]
    output: str
    draws: int | str = 10
    mode: str | None = None
    tail: int | None = None
    file_format: str = "parquet"
    batch_tokens: int = 4096
    part_rows: int = 2048
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    truncate: str | None = None
    keep: tuple[str, ...] = ()
    per_draw: bool = False
    logits: bool = False
    limit: int | None = None
    device: str | None = None
    workers: int | None = None
    ray_address: str | None = None

    def check(self) -> None:
        """Raise ValueError for settings that cannot work, named as the command line names them."""
        if self.file_format not in FORMATS:
            raise ValueError(f"--format {self.file_format}: expected one of {', '.join(FORMATS)}")
        check_mode(self.mode or "full", self.tail)
        check_truncate(self.truncate)
        if isinstance(self.draws, str):
            if self.draws != "auto":
                raise ValueError(f"--draws {self.draws}: expected an even number or auto")
            if self.per_draw or self.logits:
                raise ValueError("--draws auto: rows have different numbers of draws; keep none")
        elif self.draws < 2 or self.draws % 2:
            raise ValueError(
                f"--draws {self.draws}: expected a positive even number (antithetic pairs) or auto"
            )
        for name, value in (
            ("--batch-tokens", self.batch_tokens),
            ("--part-rows", self.part_rows),
            ("--limit", 1 if self.limit is None else self.limit),
            ("--workers", 1 if self.workers is None else self.workers),
        ):
            if value < 1:
                raise ValueError(f"{name} {value}: expected at least 1")

    def reading(self, sources: list[Source]) -> Reading:
        """How the input is read, its columns checked where a file declares them.

        Raises:
            RowError: a declared file lacks a column, or there are no rows at all.
            ArtifactError: no artifact.
        """
        form = self.form
        reading = Reading(sources, form, b"", self.keep, self.limit)
        for source in sources:
            names = getattr(schema_of(source), "names", None)
            if names is not None:
                form.check(names, str(source))
                if lacks := [name for name in self.keep if name not in names]:
                    raise RowError(
                        f"{source}: no column {lacks[0]!r} to keep; it has "
                        f"{', '.join(map(repr, names))}"
                    )
        if next(reading.records(), None) is None:
            raise RowError(f"{', '.join(map(str, sources))}: the input holds no rows; add some")
        return reading

    @cached_property
    def form(self) -> RowFormat:
        """How records become rows: the columns' names, the classes' names (given here, or the
        artifact's) and the task.

        Raises:
            ValueError: another number of names than the artifact's head has classes.
        """
        sidecar = read_sidecar(self.artifact)
        task, saved = str(sidecar["task"]), sidecar.get("labels")
        config = base_config(self.model, self.artifact) if task == "SEQ_CLS" else None
        return RowFormat(self.columns, class_names(task, config, self.labels, saved), task)

    def load(self) -> tuple[BayesianModel, Any]:
        """The model, on its device and in the job's mode, and the tokenizer."""
        tokenizer = load_tokenizer(self.model)
        bayes = load(self.model, self.artifact)
        set_padding(bayes, tokenizer)
        if self.mode is not None:
            bayes.configure(mode=self.mode, tail=self.tail)
        to_device(bayes, self.device)
        return bayes, tokenizer

    def scorer(self, bayes: BayesianModel, tokenizer: Any) -> Scorer:
        """What scores this job's windows."""
        return Scorer(
            bayes,
            tokenizer,
            draws=self.draws,
            budget=self.batch_tokens,
            per_draw=self.per_draw,
            logits=self.logits,
            truncate=self.truncate,
            labels=self.form.labels,
        )

    def declared(self) -> dict[str, Any]:
        """The part of the configuration that is known before a model is loaded."""
        names = ("draws", "batch_tokens", "part_rows", "file_format", "per_draw", "logits",
                 "truncate")  # fmt: skip
        labels = self.form.labels
        return {
            **{name: getattr(self, name) for name in names},
            "columns": dict(self.columns),
            "labels": None if labels is None else list(labels),
            "keep": list(self.keep),
            "artifact_sha256": file_sha256(Path(self.artifact) / SIDECAR),
            "versions": {"python": platform.python_version(), **library_versions()},
        }

    def configuration(self, bayes: BayesianModel, tokenizer: Any) -> dict[str, Any]:
        """All that a row's result depends on, beside the row."""
        return {
            **self.declared(),
            "task": bayes.task,
            "sigma": bayes.sigma,
            "seed": bayes.config.seed,
            "mode": bayes.config.mode,
            "tail": bayes.config.tail,
            "label_tokens": bayes.label_tokens,
            "device": bayes.device.type,
            "dtype": str(bayes.dtype).removeprefix("torch."),
            "model_sha256": model_sha256(bayes.base),
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
        }


def kept_types(sources: list[Source], keep: tuple[str, ...]) -> dict[str, Any]:
    """Arrow types of the columns that pass through: those that all files declare, else text."""
    import pyarrow as pa

    schemas = [schema_of(source) for source in sources]
    found = {}
    for name in keep:
        types = {None if schema is None else schema.field(name).type for schema in schemas}
        found[name] = types.pop() if len(types) == 1 and None not in types else pa.string()
    return found


def configuration_sha256(configuration: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of a configuration."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields of ``now`` that were something else, as "field: was -> now"."""
    before, after = dict(_flat(was)), dict(_flat(now))
    # A field that is gone counts only where its group is there to be compared.
    groups = tuple(f"{name}." for name, value in now.items() if isinstance(value, Mapping))
    names = [*after, *(n for n in before if n not in after and groups and n.startswith(groups))]
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def model_sha256(base: nn.Module) -> str:
    """SHA-256, in hex, of every parameter and buffer of the base model, adapters left out.

    About a second for each gigabyte.
    """
    digest = hashlib.sha256()
    tensors = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        if any(part in name for part in ("lora_", "modules_to_save", "original_module")):
            continue
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name.replace('.base_layer', '')} {data.dtype} {list(data.shape)}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256, in hex, of a tokenizer's rules (or its vocabulary, where they cannot be written),
    and of its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = (
        json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    )
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256((text + str(template or "")).encode()).hexdigest()
