"""What a scoring run is to do, as plain data, and what its results depend on."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tfb.adapters.artifact import (
    SIDECAR,
    base_of,
    base_settings,
    base_tensors,
    file_sha256,
    library_versions,
    load,
    read_sidecar,
    settings,
)
from tfb.adapters.loading import (
    CONFIG,
    FILES,
    base_config,
    check_device,
    class_names,
    local_folder,
    set_padding,
    to_device,
    tokenizer_of,
)
from tfb.data.encoding import check_truncate
from tfb.data.readers import schema_of
from tfb.data.rows import PROMPTS, RowError, RowFormat, prompt_columns
from tfb.evaluation.decisions import Decisions
from tfb.model import BayesianModel
from tfb.plain import typed
from tfb.sampling.adaptive import Adaptive
from tfb.sampling.config import check_mode
from tfb.scoring.output import FORMATS, can_hold
from tfb.scoring.scorer import (
    BATCH_TOKENS,
    ENTROPIES,
    NEW_TOKENS,
    UNCERTAINTIES,
    Item,
    Scorer,
    TextScorer,
    check_draws,
    check_generate,
    check_writes,
)

_TOKENIZER = ["model_max_length", "padding_side", "truncation_side", "chat_template"]
_TOKENIZER += ["add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"]


@dataclass(frozen=True)
class Job:
    """One scoring run.

    Attributes:
        artifact: what ``tfb fit`` wrote, a folder or hub name.
        inputs: files, folders and patterns, see :func:`tfb.data.readers.find_sources`.
        output: the folder of parts.
        base: base model, a folder or hub name; None: the one that the artifact names.
        draws: antithetic draws (even), or "auto".
        tolerance: of ``draws="auto"``, see :class:`Adaptive`; None: its default.
        most: of ``draws="auto"``, likewise.
        mode: how draws reach the model; None: as sigma was searched.
        tail: positions with noise in tail mode.
        format: "parquet" or "jsonl".
        batch_tokens: most padded tokens of a batch, of one copy of its rows.
        part_rows: most rows of a part.
        columns: for our names of columns those of the data, where they differ.
        labels: names of the classes, or choices of rows without any; None: the artifact's.
        truncate: the side on which rows that are too long are cut; None: they are errors.
        keep: columns that pass through.
        per_draw: keep each draw's probabilities.
        generate: write text behind prompts, in place of scoring choices or classes.
        max_new_tokens: most tokens of a row that is written; None: ``NEW_TOKENS``.
        stop: texts before which a row ends that is written.
        limit: records to read, the first ones; None: all.
        device: None: a GPU if there is one.
        workers: models of the engine "ray"; None: as many as fit.
        ray_address: cluster of the engine "ray"; None: this machine.
    """

    artifact: str
    inputs: tuple[str, ...]
    output: str
    base: str | None = None
    draws: int | str = 10
    tolerance: float | None = None
    most: int | None = None
    mode: str | None = None
    tail: int | None = None
    format: str = "parquet"
    batch_tokens: int = BATCH_TOKENS
    part_rows: int = 2048
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    truncate: str | None = None
    keep: tuple[str, ...] = ()
    per_draw: bool = False
    generate: bool = False
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    limit: int | None = None
    device: str | None = None
    workers: int | None = None
    ray_address: str | None = None

    def check(self) -> None:
        """Refuse settings that cannot work, before anything is read."""
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format}: expected one of {', '.join(FORMATS)}")
        check_mode(self.mode or "full", self.tail)
        check_truncate(self.truncate)
        check_generate(self.generate, self.draws, self.per_draw, self.max_new_tokens, self.stop)
        if self.generate and self.labels is not None:
            raise ValueError("generate=True: rows have no choices and no classes; leave out labels")
        check_draws(self.draws, kept=self.per_draw)
        if self.adaptive is None and (self.tolerance, self.most) != (None, None):
            raise ValueError(f"draws={self.draws}: tolerance and most are those of draws=auto")
        check_device(self.device, here=False)
        for name in ("batch_tokens", "part_rows", "limit", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")

    @cached_property
    def folder(self) -> Path:
        """The artifact's local folder."""
        return local_folder(self.artifact, FILES)

    @cached_property
    def sidecar(self) -> dict[str, Any]:
        """What the artifact tells of itself."""
        return read_sidecar(self.folder)

    @property
    def adaptive(self) -> Adaptive | None:
        """What ``draws="auto"`` stands for; None for a number."""
        if self.draws != "auto":
            return None
        asked: dict[str, Any] = {"tolerance": self.tolerance, "most": self.most}
        return Adaptive(**{name: value for name, value in asked.items() if value is not None})

    @cached_property
    def row_format(self) -> RowFormat:
        """How records become rows, by the job's or the artifact's labels and the task."""
        sidecar, base = self.sidecar, base_of(self.folder, self.base)
        if self.generate:
            check_writes(sidecar["task"])
            sidecar = {**sidecar, "task": PROMPTS}
        config = base_config(base, self.folder) if sidecar["task"] == "SEQ_CLS" else None
        return saved_format(sidecar, config, self.columns, self.labels)

    def part_schema(self, sources: Iterable[Path]) -> pa.Schema:
        """Return the columns of a part, after a look at those that files declare.

        What passes through has the type that all files declare, if Parquet has it, else it is
        text.
        """
        number, text, real = pa.int32(), pa.string(), pa.float32()
        declared = {source: schema_of(source) for source in sources}
        for source, schema in declared.items():
            if schema is not None:
                self._check_columns(schema.names, source)
        kept = {}
        for name in self.keep:
            types = {None if s is None else s.field(name).type for s in declared.values()}
            kind = types.pop() if len(types) == 1 else None
            kept[name] = text if kind is None or not can_hold(kind) else kind
        ours = {"prediction": number, "choice": text, "probs": pa.list_(real)}
        ours |= {**dict.fromkeys(UNCERTAINTIES, real), "draws": number, "label": number}
        if self.generate:
            ours = {"text": text, "tokens": number, "finish_reason": text}
            ours |= dict.fromkeys(("sequence_uncertainty", *ENTROPIES), real) | {"draws": number}
        if self.truncate is not None:
            ours["truncated"] = number
        if self.per_draw:
            ours["draw_probs"] = pa.list_(pa.list_(real))
        decided = {"abstain": pa.bool_(), "prediction_set": pa.list_(text)}
        ours |= {name: decided[name] for name in self._decided()}
        if taken := sorted(set(kept) & {"id", *ours, "error"}):
            raise ValueError(f"keep={taken[0]}: the output has a column of that name; rename yours")
        return pa.schema({"id": text, **kept, **ours, "error": text})

    def _decided(self) -> tuple[str, ...]:
        """Return the columns of the artifact's decisions, which hold in its own mode alone."""
        decisions = typed(Decisions | None, self.sidecar.get("decisions"))
        own = (self.sidecar["mode"], self.sidecar.get("tail"))
        if (
            self.generate
            or decisions is None
            or (self.mode is not None and (self.mode, self.tail) != own)
        ):
            return ()
        return tuple(decisions.names)

    def _check_columns(self, names: Sequence[str], source: Path) -> None:
        self.row_format.check(names, str(source))
        if lacks := [name for name in self.keep if name not in names]:
            there = ", ".join(map(repr, names))
            raise RowError(f"{source}: no column {lacks[0]!r} to keep; it has {there}")

    def load(self) -> tuple[BayesianModel, PreTrainedTokenizerBase]:
        """Load the model, on its device and in the job's mode, and the tokenizer."""
        base = base_of(self.folder, self.base)
        tokenizer = tokenizer_of(self.folder, base)
        bayes = load(base, self.folder)
        set_padding(bayes.base, tokenizer)
        if self.mode is not None:
            bayes.configure(mode=self.mode, tail=self.tail)
        to_device(bayes.model, self.device)
        return bayes, tokenizer

    def scorer(self, bayes: BayesianModel, tokenizer: PreTrainedTokenizerBase) -> Scorer:
        """Return what scores this job's rows."""
        how: dict[str, Any] = {"batch_tokens": self.batch_tokens, "truncate": self.truncate}
        how["draws"] = self.adaptive or self.draws
        if self.generate:
            most, stop = self.max_new_tokens, self.stop
            return TextScorer(bayes, tokenizer, max_new_tokens=most, stop=stop, **how)
        labels = self.row_format.labels
        return Scorer(bayes, tokenizer, per_draw=self.per_draw, labels=labels, **how)

    def declared(self) -> dict[str, Any]:
        """Return the part of the configuration that is known before a model is loaded."""
        names = ("draws", "batch_tokens", "part_rows", "format", "per_draw", "truncate", "limit")
        form, adaptive = self.row_format, self.adaptive
        most = NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        writes = {"generate": True, "max_new_tokens": most, "stop": list(self.stop)}
        return {
            **{name: getattr(self, name) for name in names},
            **({} if adaptive is None else asdict(adaptive)),
            **(writes if self.generate else {}),
            "columns": dict(form.columns),
            "labels": None if form.labels is None else list(form.labels),
            "keep": list(self.keep),
            # The first lists the hashes of all files, but not in artifacts of 0.1.0.
            "artifact_sha256": file_sha256(self.folder / SIDECAR),
            "adapter_config_sha256": file_sha256(self.folder / CONFIG),
            "versions": {"python": platform.python_version(), **library_versions()},
        }

    def configuration(
        self, bayes: BayesianModel, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        """Return all that a row's result depends on, beside the rows, as plain data."""
        found = {}
        if self.generate:
            told = json.loads(bayes.base.generation_config.to_json_string())
            found["generation"] = settings(told, "transformers_version")
        return {
            **self.declared(),
            **asdict(bayes.config),
            **found,
            "device": bayes.device.type,
            "dtype": str(bayes.dtype).removeprefix("torch."),
            "model_sha256": model_sha256(bayes.base),
            "base": base_settings(bayes.base),
            "tokenizer": tokenizer_settings(tokenizer),
        }


def saved_format(
    sidecar: Mapping[str, Any],
    config: Any,
    columns: Mapping[str, str],
    labels: Sequence[str] | None,
) -> RowFormat:
    """Return how records become rows: as given, else as an artifact keeps it of its fit.

    Args:
        sidecar: the artifact's.
        config: its base model's, for the names of a classifier's classes.
        columns: for our names of columns those of the data; empty: the artifact's.
        labels: names of the classes; None: the artifact's.
    """
    task = str(sidecar["task"])
    names = class_names(task, config, labels, sidecar.get("labels"))
    known = {} if columns else (sidecar.get("extra") or {}).get("columns") or {}
    if task == PROMPTS:
        columns, known = prompt_columns(columns), prompt_columns(known)
    # What has the columns of the fit's rows need not have ids and labels.
    return RowFormat(columns or known, names, task, ["id", "label"] if known else ())


@dataclass(frozen=True)
class Shard:
    """The unit of a run: records start:stop of one input file, which become one part.

    ``before`` counts the records of the files in front.
    """

    file: int
    start: int
    stop: int
    before: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        """The name of its part, without the suffix."""
        return f"part-{self.file:05d}-{self.start:08d}"


@dataclass(frozen=True)
class Work:
    """A shard and its records, as they were read."""

    shard: Shard
    items: list[Item]


def model_sha256(base: nn.Module) -> str:
    """Hash every parameter and buffer of the base model; the artifact has a hash of its own.

    Takes about a second for each gigabyte.
    """
    digest = hashlib.sha256()
    tensors = base_tensors(chain(base.named_parameters(), base.named_buffers()))
    for name, tensor in sorted(tensors, key=itemgetter(0)):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {list(data.shape)}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a row's tokens depend on: rules or vocabulary, template, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else backend.to_str()
    found = {"rules": rules, **tokenizer.special_tokens_map}
    found |= {name: getattr(tokenizer, name, None) for name in _TOKENIZER}
    return settings(json.loads(json.dumps(found, default=str)))
