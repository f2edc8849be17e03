"""Loading and saving of base models, tokenizers and LoRA adapters, strictly.

PEFT loads a checkpoint whose keys it does not know as a silent no-op; here that is an error.
safetensors only, never pickle, and never a repository's own code.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from tfb.posterior import AdapterError

TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What is fetched of an adapter or artifact on the hub: never a pickled file.
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt", "README.md"]
# Names of the last linear layer of transformers' classifiers. DistilBERT's "pre_classifier" and
# RoBERTa's "classifier.dense" come before it and have hidden_size rows.
_HEADS = ("score", "classifier", "out_proj")


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """Read adapter_config.json of an adapter folder or hub name, through PEFT."""
    if Path(folder).is_dir():
        _require(Path(folder), CONFIG, folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.peft_type is None:
            raise ValueError("no peft_type")
    except (KeyError, TypeError, ValueError) as error:  # PEFT does not check before it reads
        raise AdapterError(
            f"{folder}: {CONFIG} is not a PEFT configuration ({type(error).__name__}: {error})"
        ) from error
    return dict(config.to_dict())


def adapter_tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Read the tensor names and shapes of a local adapter, without loading it."""
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            return {key: list(file.get_slice(key).get_shape()) for key in keys}
    except SafetensorError as error:
        raise AdapterError(f"{path}: damaged, not a safetensors file: {error}") from error


def adapter_folder(adapter: str | Path) -> Path:
    """Return the local folder of an adapter, with both of its files there."""
    folder = local_folder(adapter, FILES)
    for file in (CONFIG, WEIGHTS):
        _require(folder, file, adapter)
    try:
        json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise AdapterError(f"{adapter}: {CONFIG} is not JSON: {error}") from error
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
    try:
        found: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            str(model), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = _reason(model, error)
        raise ValueError(
            f"model={model}: no tokenizer can be loaded from it; name a local folder with one, "
            f"or a hub model ({reason})"
        ) from error
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


def _reason(name: str | Path, error: Exception) -> str:
    """Return why a model cannot be loaded, in a line."""
    path = Path(name)
    if not path.exists() and (str(name).count("/") > 1 or str(name)[:1] in "./~"):
        return "no such folder"  # and no hub name either, which is what transformers says
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def set_padding(base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a base model a padding token: a SEQ_CLS head finds a row's last token by it."""
    config: Any = base.config
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def check_device(device: str | None, *, here: bool = True) -> None:
    """Refuse a name that is no device's, or one of a GPU that this machine has to have."""
    try:
        chosen = torch.device(device or "cpu")
    except RuntimeError as error:
        raise ValueError(f"device={device}: expected cpu, cuda or cuda:0, ...") from error
    if here and chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device}: torch sees no GPU here; use device=cpu")


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
        AdapterError: no adapter there, no safetensors, keys or shapes that do not fit, or a base
            that carries an adapter already.
    """
    folder = adapter_folder(adapter)
    adapter_config(folder)
    stored = adapter_tensor_shapes(folder)
    # PEFT would put both into one model: same names overwrite, others act together.
    if any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
        raise AdapterError(
            f"{adapter}: the base model carries an adapter already (an earlier load, finished or "
            "not); load a fresh base model, or add a second adapter with PeftModel.load_adapter"
        )
    try:
        with warnings.catch_warnings():
            # Missing keys are errors below; PEFT would only warn.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base_model, str(folder), adapter_name=name)
    except KeyError as error:  # PEFT looks a saved head's tensors up without asking
        raise AdapterError(f"{adapter}: lacks the tensor {error} of its modules_to_save") from error
    except (RuntimeError, TypeError, ValueError) as error:  # sizes (torch), settings (PEFT)
        lines = str(error).splitlines()
        more = f"\n\t... and {len(lines) - 3} more" if len(lines) > 3 else ""
        reason = "\n".join(lines[:3]) + more
        raise AdapterError(f"{adapter}: does not fit the base model: {reason}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on saving embeddings; nothing is saved here
        plain = set(_keys(model, name, embeddings=False))
        allowed = plain | set(_keys(model, name, embeddings=True))
    missing, unexpected = sorted(plain - set(stored)), sorted(set(stored) - allowed)
    if missing or unexpected:
        lines = [
            f"{label} ({len(keys)}): {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
            for label, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise AdapterError(
            f"{adapter}: its keys do not fit the base model, so parts of it would be ignored.\n  "
            + "\n  ".join(lines)
            + "\nUse the base model that the adapter was trained on, or rename the keys."
        )
    model.eval()
    return model


def load_base(name: str | Path, adapter: str | Path) -> nn.Module:
    """Load the base model of an adapter, in eval mode; in float32 where there is no GPU.

    Args:
        name: a local folder or a hub name.
        adapter: whose task_type decides the class, and whose head the number of labels.

    Raises:
        AdapterError: no adapter there, an unsupported task, no head weights in a SEQ_CLS adapter,
            or no base model in safetensors that transformers' own code can load.
    """
    # Left alone, transformers keeps a checkpoint's bfloat16, which CPUs are slow at.
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    folder, task = _task(adapter)
    classes = {
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    }
    return _pretrained(classes[task], name, dtype=dtype, **_head(adapter, folder, task))


def base_config(name: str | Path, adapter: str | Path) -> Any:
    """Load the configuration that an adapter's base model will have, without its weights."""
    head = _head(adapter, *_task(adapter))
    try:
        return transformers.AutoConfig.from_pretrained(str(name), trust_remote_code=False, **head)
    except (OSError, ValueError) as error:
        reason = _reason(name, error)
        raise AdapterError(
            f"{name}: no base model's configuration can be loaded from it ({reason}); give "
            "base=NAME"
        ) from error


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


def _pretrained(kind: Any, name: str | Path, **options: Any) -> nn.Module:
    """Load a model by transformers' own code (it would ask at a terminal), from safetensors."""
    options |= {"use_safetensors": True, "trust_remote_code": False}
    try:
        model: nn.Module = kind.from_pretrained(str(name), **options)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        reason = _reason(name, error)
        raise AdapterError(
            f"{name}: no base model can be loaded from it ({reason}); give base=NAME. Models are "
            "read from safetensors by transformers' own classes: pickled weights and a "
            "repository's own code are refused"
        ) from error
    return model.eval()


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


def _keys(model: nn.Module, adapter: str, *, embeddings: bool) -> list[str]:
    return list(
        get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=embeddings)
    )


def save_adapter(
    model: nn.Module, adapter: str, folder: Path, *, source: Path | None = None
) -> None:
    """Write an adapter as an ordinary PEFT folder; from ``source`` its files as they are."""
    if source is not None:
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
