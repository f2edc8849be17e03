"""Loading and saving of base models, tokenizers and LoRA adapters, strictly.

PEFT loads a checkpoint whose keys it does not know as a silent no-op; here that is an error.
safetensors only, never pickle, and never a repository's own code.
"""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from tfb.adapters.trust import (
    CONFIG,
    check_adapter,
    check_base,
    check_patterns,
    check_ranks,
    check_size,
    read_object,
    refusing,
    stored_weights,
)
from tfb.plain import listed
from tfb.posterior import AdapterError

TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS")
WEIGHTS = "adapter_model.safetensors"
# What is fetched of an adapter or artifact on the hub: never a pickled file.
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt", "README.md"]
FILES += ["*.spm", "*.tiktoken", "*.bpe", "bpe.codes", "dict.txt"]
_FLOATS = ("F64", "F32", "F16", "BF16")
# Constants of a block that older versions of transformers saved: masks, positions and so on.
_CONSTANT = re.compile(
    r"(^|\.)(masked_bias|causal_mask|inv_freq|(cos|sin)_cached|version|position_ids|attn\.bias)$"
)
# Names of the last linear layer of transformers' classifiers. DistilBERT's "pre_classifier" and
# RoBERTa's "classifier.dense" come before it and have hidden_size rows.
_HEADS = ("score", "classifier", "out_proj")
_ADVICE = (
    "; give base=NAME. Models are loaded by transformers' own classes: a repository's own code is "
    "refused"
)


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """Read adapter_config.json of an adapter folder or hub name, through PEFT."""
    local = local_folder(folder, FILES)
    _require(local, CONFIG, folder)
    check_adapter(folder, read_object(local / CONFIG, folder))
    with refusing(f"{folder}: {CONFIG} is not a PEFT configuration"):
        return dict(PeftConfig.from_pretrained(str(local)).to_dict())


def adapter_tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Read the tensor names and shapes of a local adapter, without loading it."""
    path = folder / WEIGHTS
    with refusing(f"{path}: damaged, not a safetensors file"), safe_open(path, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        for key, found in slices.items():
            if (kind := found.get_dtype()) not in _FLOATS:
                raise AdapterError(f"{path}: {key} is {kind}; expected F32, F16, BF16 or F64")
        return {key: list(found.get_shape()) for key, found in slices.items()}


def adapter_folder(adapter: str | Path) -> Path:
    """Return the local folder of an adapter, with both of its files there."""
    folder = local_folder(adapter, FILES)
    for file in (CONFIG, WEIGHTS):
        _require(folder, file, adapter)
    return folder


def _require(folder: Path, file: str, adapter: str | Path) -> None:
    """Refuse a folder without ``file``, by the name that the adapter was given."""
    if not (folder / file).is_file():
        raise AdapterError(
            f"{adapter}: no {file}; expected a PEFT adapter folder (pickled adapter_model.bin "
            "files are not read: convert them to safetensors with PEFT)"
        )


def lora_keys(module: str) -> tuple[str, str]:
    """Return the names of a base module's lora_A and lora_B in an adapter file."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local folder or hub model, by transformers' own code."""
    what = (
        f"model={model}: no tokenizer can be loaded from it; name a local folder with one, or a "
        "hub model"
    )
    with refusing(what, kind=ValueError):
        _check_there(model)
        found: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            str(model), trust_remote_code=False
        )
    return found


def tokenizer_of(folder: str | Path, base: str | Path) -> PreTrainedTokenizerBase:
    """Load an adapter's own tokenizer where its folder holds one, else its base model's.

    Args:
        folder: an adapter or artifact, a local folder or a hub name.
        base: the base model, a local folder or a hub name.

    Raises:
        ValueError: neither has a tokenizer that transformers can load.
    """
    own = local_folder(folder, FILES)
    return load_tokenizer(own if (own / "tokenizer_config.json").is_file() else base)


def _check_there(name: str | Path) -> None:
    """Refuse a folder that is not there: transformers would say that it is no hub name."""
    if not Path(name).exists() and (str(name).count("/") > 1 or str(name)[:1] in "./~"):
        raise FileNotFoundError("no such folder")


def set_padding(base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a base model a padding token: a SEQ_CLS head finds a row's last token by it."""
    config: Any = base.config
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def check_device(device: str | None, *, here: bool = True) -> None:
    """Refuse what is neither the CPU nor a GPU, and a GPU that this machine has to have."""
    if device is None:
        return
    expected = f"device={device}: expected cpu, cuda or cuda:0, ..."
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(expected) from error
    if chosen.type not in ("cpu", "cuda") or str(chosen) != str(
        device
    ):  # "cuda:256" is torch's cuda:0
        raise ValueError(expected)
    gpus = torch.cuda.device_count()
    if here and chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        seen = f"the last GPU here is cuda:{gpus - 1}" if gpus else "torch sees no GPU here"
        raise ValueError(f"device={device}: {seen}; use {'that one or ' * (gpus > 0)}device=cpu")


def to_device(model: nn.Module, device: str | None = None) -> None:
    """Move a model to ``device``, by default to a GPU if there is one."""
    check_device(device)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if next(model.parameters()).device.type != chosen.type:
        model.to(chosen)


def load_adapter(base_model: nn.Module, adapter: str | Path, name: str = "default") -> nn.Module:
    """Load a LoRA adapter onto a base model, strictly.

    PEFT loads a checkpoint whose keys it does not know as a silent no-op; here missing and
    unexpected keys are errors.

    Args:
        base_model: a transformers model; changed in place by PEFT, also where this fails.
        adapter: a local folder or a hub name.
        name: the adapter's name in the model.

    Returns:
        The ``peft.PeftModel`` in eval mode.

    Raises:
        AdapterError: no adapter there, no safetensors, more than plain LoRA, keys, shapes or types
            that do not fit, weights that are not finite, or a base that carries an adapter already.
    """
    folder = adapter_folder(adapter)
    config, stored = adapter_config(folder), adapter_tensor_shapes(folder)
    check_ranks(adapter, config, (s[0] for k, s in stored.items() if ".lora_A." in k and s))
    # PEFT would put both into one model: same names overwrite, others act together.
    if any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
        raise AdapterError(
            f"{adapter}: the base model carries an adapter already (an earlier load, finished or "
            "not); load a fresh base model, or add a second adapter with PeftModel.load_adapter"
        )
    check_patterns(adapter, config, (key for key, _ in base_model.named_modules()))
    with refusing(f"{adapter}: does not fit the base model"), warnings.catch_warnings():
        # Missing keys are errors below; PEFT would only warn.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        try:
            model = PeftModel.from_pretrained(base_model, str(folder), adapter_name=name)
        except KeyError as error:  # PEFT looks a saved head's tensors up without asking
            raise AdapterError(
                f"{adapter}: lacks the tensor {error} of its modules_to_save"
            ) from error
        warnings.simplefilter("ignore")  # PEFT's advice on saving embeddings; nothing is saved here
        plain = _tensors(model, name, embeddings=False)
        allowed = plain | _tensors(model, name, embeddings=True)
    wrong = {"missing": plain.keys() - stored, "unexpected": stored.keys() - allowed}
    if faults := [f"{k} ({len(v)}): {listed(sorted(v))}" for k, v in wrong.items() if v]:
        raise AdapterError(
            f"{adapter}: its keys do not fit the base model, so parts of it would be ignored; "
            f"{'; '.join(faults)}; use the base model that the adapter was trained on, or rename "
            "the keys"
        )
    for key in stored:  # LoRA weights are looked at when their posterior is made
        if "lora_" not in key and not bool(allowed[key].isfinite().all()):
            raise AdapterError(f"{adapter}: {key}: NaN or Inf among the weights")
    model.eval()
    return model


def load_base(name: str | Path, adapter: str | Path) -> nn.Module:
    """Load the base model of an adapter, in eval mode; in float32 where there is no GPU.

    Args:
        name: a local folder or a hub name.
        adapter: whose task_type decides the class, and whose head the number of labels.

    Raises:
        AdapterError: no adapter there, an unsupported task, no head weights in a SEQ_CLS adapter,
            no base model in safetensors that transformers' own code can load, or one whose weights
            and configuration do not fit each other.
    """
    # Left alone, transformers keeps a checkpoint's bfloat16, which CPUs are slow at.
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    folder, task = _task(adapter)
    classes = {
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    }
    kind: Any = classes[task]
    config = base_config(name, adapter)
    with refusing(f"{name}: no base model can be loaded from it", _ADVICE), _NoReport():
        stored, kinds = stored_weights(name)
        with torch.device("meta"):
            empty = kind.from_config(config)
        elements = sum(t.numel() for t in (*empty.parameters(), *empty.buffers()))
        check_size(name, elements, stored)
        if not getattr(config, "quantization_config", None):
            _check_types(name, empty, kinds)
        model, report = kind.from_pretrained(
            str(name),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,  # by default it asks at a terminal
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below
            return_dict=True,
            **_head(adapter, folder, task),
        )
    saved = [key for key in adapter_tensor_shapes(folder) if "lora_" not in key]
    _check_report(name, model, report, {key.removeprefix("base_model.model.") for key in saved})
    return model.eval()


class _NoReport(logging.Filter):
    """Keeps transformers' report of missing weights from the log while a model loads.

    It alarms those whose adapter brings the head, and what it tells is checked.
    """

    log = logging.getLogger("transformers.modeling_utils")

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or "CONVERSION" in text

    def __enter__(self) -> None:
        self.log.addFilter(self)

    def __exit__(self, *_: object) -> None:
        self.log.removeFilter(self)


def _check_types(name: str | Path, model: Any, kinds: dict[str, str]) -> None:
    """Refuse weights that are no floats: transformers would cast what nobody quantized."""
    prefix = f"{model.base_model_prefix}."
    weights = {f for key, _ in model.named_parameters() for f in (key, key.removeprefix(prefix))}
    for key, kind in kinds.items():
        if kind not in _FLOATS and (key in weights or key.endswith(".weight")):
            raise AdapterError(
                f"{name}: {key} is {kind}; expected F32, F16, BF16 or F64, as config.json has no "
                "quantization_config"
            )


def _check_report(name: str | Path, model: Any, report: Any, brought: set[str]) -> None:
    """Refuse a base model with random weights, or with parts of its checkpoint left out.

    Args:
        name: of the base model.
        model: as it was loaded.
        report: transformers' loading info.
        brought: the keys of weights that the adapter brings itself.
    """
    kind = type(model).__name__
    shapes = {
        key: f" {[*theirs]}, not {[*ours]}" for key, theirs, ours in report["mismatched_keys"]
    }
    if lacking := sorted({*report["missing_keys"], *shapes} - brought):
        raise AdapterError(
            f"{name}: the checkpoint lacks {len(lacking)} of {kind}'s tensors, which would be "
            f"random: {listed([key + shapes.get(key, '') for key in lacking])}; download it "
            "again, give the base model that the adapter was trained on, or save those modules "
            "with the adapter (modules_to_save)"
        )
    if ignored := sorted({*_ignored(model, report["unexpected_keys"], brought)}):
        raise AdapterError(
            f"{name}: {len(ignored)} of the checkpoint's tensors have no place in {kind} as "
            f"config.json describes it: {listed(ignored)}; download the model again"
        )


def _ignored(model: Any, unknown: Iterable[str], brought: set[str]) -> Iterator[str]:
    """Yield those keys of a checkpoint that lie in a block or a module that the model has.

    Elsewhere are heads of other tasks, poolers and towers. A bare model's keys lack the prefix.
    Constants, such as masks, are made anew; a head that the adapter brings is replaced.
    """
    modules, buffers = dict(model.named_modules()), dict(model.named_buffers())
    for key in (k for k in unknown if "." in k and not _CONSTANT.search(k)):
        for full in (key, f"{model.base_model_prefix}.{key}"):
            *parents, owner = accumulate(full.split(".")[:-1], "{}.{}".format)
            replaced = full in buffers or any(b.startswith(f"{owner}.") for b in brought)
            inside = owner in modules or any(
                isinstance(modules.get(parent), nn.ModuleList) for parent in parents
            )
            if inside and not replaced:
                yield key


def base_config(name: str | Path, adapter: str | Path) -> Any:
    """Load the configuration that an adapter's base model will have, without its weights."""
    head = _head(adapter, *_task(adapter))
    what = f"{name}: no base model's configuration can be loaded from it"
    with refusing(what, _ADVICE):
        _check_there(name)
        check_base(name)
        return transformers.AutoConfig.from_pretrained(str(name), trust_remote_code=False, **head)


def class_names(
    task: str,
    config: Any,
    given: Sequence[str] | None = None,
    saved: Sequence[str] | None = None,
) -> tuple[str, ...] | None:
    """Return the names of a classifier's classes in the head's order, or None if nobody gave any.

    Those given come before an artifact's, and these before the configuration's. Other tasks have
    no classes: theirs are choices of rows that bring none.
    """
    if given is None:
        given = saved
    elif saved and sorted(given) == sorted(saved) and list(given) != list(saved):
        raise ValueError(
            "labels: the artifact has these names in another order, its head's; leave them out"
        )
    if task != "SEQ_CLS":
        return None if given is None else tuple(given)
    if given is not None:
        if len(given) != config.num_labels:
            raise ValueError(
                f"labels: {len(given)} names, but the head has {config.num_labels} classes; name "
                "all of them in order"
            )
        return tuple(given)
    names = getattr(config, "id2label", None) or {}
    found = tuple(str(names.get(i)) for i in range(len(names)))
    made_up = all(name == f"LABEL_{i}" for i, name in enumerate(found))
    return None if made_up or len(set(found)) < 2 else found


def _task(adapter: str | Path) -> tuple[Path, str]:
    """Return the local folder of an adapter, and its task."""
    folder = adapter_folder(adapter)
    task = str(adapter_config(folder).get("task_type"))
    if task not in TASKS:
        raise AdapterError(f"{adapter}: task_type {task}; supported: {', '.join(TASKS)}")
    return folder, task


def _head(adapter: str | Path, folder: Path, task: str) -> dict[str, int]:
    """Return the number of labels of a SEQ_CLS adapter's head, as transformers takes it."""
    if task != "SEQ_CLS":
        return {}
    heads = [
        shape[0]
        for key, shape in adapter_tensor_shapes(folder).items()
        if "lora_" not in key and key.split(".")[-2:] in [[head, "weight"] for head in _HEADS]
    ]
    if not heads:
        raise AdapterError(
            f"{adapter}: a SEQ_CLS adapter without its head (modules_to_save); the labels' number "
            "and weights are unknown"
        )
    return {"num_labels": heads[-1]}


def local_folder(name: str | Path, patterns: list[str]) -> Path:
    """Return a local folder as it is, a hub name's from huggingface_hub's cache."""
    path = Path(name)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:
        raise AdapterError(
            f"{name}: no folder of this name is here, and the hub has none or cannot be reached; "
            "name a folder with adapter_config.json, or a hub model"
        ) from error


def _tensors(model: nn.Module, adapter: str, *, embeddings: bool) -> dict[str, torch.Tensor]:
    return dict(
        get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=embeddings)
    )


def save_adapter(
    model: nn.Module, adapter: str, folder: Path, *, source: Path | None = None
) -> None:
    """Write an adapter as an ordinary PEFT folder; from ``source`` its files as they are.

    Raises:
        AdapterError: the files of ``source`` are not the weights that the model has.
    """
    if source is not None:
        _check_source(model, adapter, source)
        shutil.copyfile(source / CONFIG, folder / CONFIG)
        shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
        return
    assert isinstance(model, PeftModel)
    model.save_pretrained(str(folder), selected_adapters=[adapter], safe_serialization=True)
    nested = folder / adapter  # PEFT puts adapters not called "default" in a subfolder
    if adapter != "default" and nested.is_dir():
        for path in nested.iterdir():
            path.rename(folder / path.name)
        nested.rmdir()


def _check_source(model: nn.Module, adapter: str, source: Path) -> None:
    """Refuse files that a model was loaded from, and has other weights than."""
    now = _tensors(model, adapter, embeddings=False)
    with safe_open(source / WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            weight, tensor = now.get(key), file.get_tensor(key)
            if weight is not None and not torch.equal(tensor.to(weight.dtype), weight.cpu()):
                raise AdapterError(
                    f"{key}: the model's weight is not the one in {source}, whose files would be "
                    "copied; put the one or the other back, or set bayes.source = None to save "
                    "what the model has"
                )
