"""What a stranger's files may say, checked before transformers or PEFT acts on it.

Both libraries import, fetch, unpickle or allocate whatever a configuration names, and raise
anything over values of a wrong type. What they are given is named here, the rest is refused.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import safe_open
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from tfb.plain import parse_json, shown, told, typed
from tfb.posterior import AdapterError

CONFIG = "adapter_config.json"
_SHARD = re.compile(r"[\w.-]+\.safetensors")
# What of an adapter_config.json reaches PEFT with any value; all else has to be off.
_LORA = re.compile(
    "peft_type|task_type|base_model_name_or_path|revision|inference_mode|peft_version|r|"
    "lora_alpha|lora_dropout|lora_bias|bias|fan_in_fan_out|use_rslora|use_dora|target_modules|"
    "exclude_modules|target_parameters|modules_to_save|layers_to_transform|layers_pattern|"
    "rank_pattern|alpha_pattern|init_lora_weights|eva_config|trainable_token_indices|"
    "ensure_weight_tying|auto_mapping|qalora_group_size"  # two that AutoPeftModel, QALoRA act upon
)
# Others draw at random, quantize, or need data, each time that an adapter is loaded.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "pissa", "olora")
# Fields that PEFT takes for regular expressions, and what it makes of them: the whole of a text,
# else each key or element.
_PATTERNS = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}
_MATCH = """
import json, re, sys
form, patterns, names = json.load(sys.stdin)
for pattern in (re.compile(form.replace("{}", p)) for p in patterns):
    for name in names:
        pattern.fullmatch(name) if form == "{}" else pattern.match(name)
"""
PATIENCE = 10.0  # seconds for one field's patterns on all module names; usual ones take .1

# Fields of a model's config.json that lead to other files, or change how the rest is read.
_REFUSED = {"transformers_weights", "extra_files", "configuration_files", "fusion_config"}
_REFUSED |= {"attribute_map"}
# Others, flash_attention_2 too where its package is missing, are fetched from the hub and run.
_BUILT_IN = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
_QUANTIZED = ("bitsandbytes", "gptq", "hqq")
# Numbers of what is built one by one, before any weight is read.
_COUNT = re.compile(
    r"(layers?|blocks|block_sizes|block_repeats|depths?|labels|experts|groups|group_num|"
    r"attention_types)$"
)
_MOST, _MOST_LABELS = 10_000, 1_000_000
_SPARE = 2**28  # elements that need not be in a checkpoint: buffers, heads


@contextmanager
def refusing(what: str, advice: str = "", kind: type[ValueError] = AdapterError) -> Iterator[None]:
    """Raise one error of one line for whatever a library raises over a stranger's file.

    They check few types before they use them, and raise KeyError, AttributeError, RecursionError
    and so on, or their own; a panic of tokenizers is no Exception at all.
    """
    try:
        yield
    except (AdapterError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise kind(f"{what} ({told(error)}){advice}") from error


def read_object(path: Path, name: str | Path) -> dict[str, Any]:
    """Read a file that has to hold one JSON object."""
    with refusing(f"{name}: {path.name} is no JSON object"):
        return dict(typed(dict, parse_json(path.read_bytes())))


def check_adapter(name: str | Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter's configuration that asks PEFT for more than plain LoRA.

    Among the rest are fields that import modules (megatron_core), and those that a newer PEFT
    knows and this one would drop in silence.
    """
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterError(
            f"{name}: {CONFIG} is not a LoRA configuration of PEFT (peft_type {kind!r})"
        )
    defaults = LoraConfig().to_dict()
    for field, value in config.items():
        off = value in (None, False, "", [], {}) or value == defaults.get(field)
        if not (off or _LORA.fullmatch(field)):
            raise AdapterError(
                f"{name}: {CONFIG} has {field}={shown(value)}, which is not supported; "
                "save the adapter as plain LoRA, or remove the field if it changes nothing"
            )
    if (init := config.get("init_lora_weights")) not in _INITS:
        raise AdapterError(
            f"{name}: init_lora_weights={shown(init)} changes the base model again whenever the "
            "adapter is loaded; save it as plain LoRA, with PEFT's save_pretrained("
            "path_initial_model_for_weight_conversion=...)"
        )
    for keys, value in _values({f: config.get(f) for f in ("lora_alpha", "alpha_pattern")}):
        if isinstance(value, float) and not math.isfinite(value):
            raise AdapterError(f"{name}: {keys[0]}={value}: expected a finite number")


def check_ranks(name: str | Path, config: Mapping[str, Any], stored: Iterable[int]) -> None:
    """Refuse ranks far above those of the stored weights: PEFT allocates before it compares.

    An ``r`` that is larger has no effect where a rank_pattern names every module.
    """
    most = 16 * max([64, *stored])
    for keys, value in _values({f: config.get(f) for f in ("r", "rank_pattern")}):
        if isinstance(value, int) and value > most:
            raise AdapterError(f"{name}: {keys[0]}={shown(value)}, but the weights have less")


def check_patterns(name: str | Path, config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Refuse regular expressions that are none, or that take for ever on a model's module names.

    Python's re cannot be interrupted, so they are tried in another process. Plain names, which are
    the usual case, are not.
    """
    names = list(modules)
    for field, form in _PATTERNS.items():
        value: Any = config.get(field)
        listed = value if isinstance(value, Iterable) and form != "{}" else ()
        found = [value] if isinstance(value, str) else listed
        patterns = [p for p in found if isinstance(p, str) and set(p) & set("*+?{|(\\[")]
        if not patterns:
            continue
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _MATCH],
                input=json.dumps([form, patterns, names]),
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            raise AdapterError(
                f"{name}: {field} of {CONFIG} holds a regular expression that takes too "
                f"long on this model's names: {shown(patterns[0])}; list the modules' names"
            ) from error
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [""])[-1]
            raise AdapterError(
                f"{name}: {field} of {CONFIG} holds no regular expression: {reason[:300]}"
            )


def check_base(name: str | Path) -> None:
    """Refuse a base model's config.json that leads to other files or to code.

    A folder without one is left to transformers, which says so. Classes may have any name.
    """
    path = _find(name, "config.json")
    for keys, value in _values(read_object(path, name)) if path else ():
        if _is_refused(keys, value):
            raise AdapterError(
                f"{name}: config.json has {'.'.join(keys)}={shown(value)}, which is not taken "
                "from a file; remove it, or load the model and give that as the base"
            )


def _is_refused(keys: tuple[str, ...], value: Any) -> bool:
    """Tell whether a value of a config.json leads elsewhere, to code, or to endless parts."""
    if value is None or not keys or {"id2label", "label2id"} & {*keys}:
        return False
    if any(key in _REFUSED or (key[:2] == "__" and key != "__float__") for key in keys):
        return True
    if isinstance(value, str):
        how = any("_implementation" in key for key in keys)
        known = keys[-1] != "quant_method" or value in _QUANTIZED
        return not known or (how and value not in _BUILT_IN)
    most = _MOST_LABELS if keys[-1].endswith("labels") else _MOST
    return isinstance(value, int) and value > most and any(map(_COUNT.search, keys))


def stored_weights(name: str | Path) -> tuple[int, dict[str, str]]:
    """Return the size in bytes of a base model's weights on disk, and the type of each tensor.

    Raises:
        AdapterError: other files than safetensors, or a tensor in another shard than the index
            says, or in two, of which transformers takes one. One that is nowhere is its business:
            indices of converted models name tied weights.
    """
    files, places = _weight_files(name)
    kinds = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if places.setdefault(key, path.name) != path.name:
                    raise AdapterError(
                        f"{name}: {key} stands in {path.name}, but its place is {places[key]}; "
                        "download the model again"
                    )
                kinds[key] = file.get_slice(key).get_dtype()
    return sum(path.stat().st_size for path in files), kinds


def _weight_files(name: str | Path) -> tuple[list[Path], dict[str, str]]:
    """Return the files of a base model's weights, and the shard that an index gives each tensor.

    transformers looks for one file first, then for an index, whose shards may have any name: one
    of a pickle, or of a file elsewhere.
    """
    folder = Path(name)
    if folder.is_file() or _find(name, CONFIG):
        what = "a file" if folder.is_file() else f"an adapter ({CONFIG})"
        raise AdapterError(f"{name}: this is {what}; name the folder of a base model")
    if shard := next(folder.glob("shard-*-model-*.safetensors"), None):
        raise AdapterError(f"{name}: {shard.name}: a training checkpoint; save it as one model")
    if whole := _find(name, "model.safetensors"):
        return [whole], {}
    index = _find(name, "model.safetensors.index.json")
    if index is None:
        raise AdapterError(
            f"{name}: no base model can be loaded from it (no model.safetensors); give base=NAME. "
            "Pickled weights are refused: convert them with save_pretrained"
        )
    shards = read_object(index, name).get("weight_map")
    if not (isinstance(shards, dict) and shards):
        raise AdapterError(f"{name}: {index.name} names no shard (weight_map)")
    for shard in shards.values():
        if not (isinstance(shard, str) and _SHARD.fullmatch(shard)):
            raise AdapterError(
                f"{name}: {index.name} names {shown(shard)}, which is no safetensors file of this "
                "folder"
            )
    found, _ = get_checkpoint_shard_files(str(name), str(index))
    return [Path(path) for path in found], shards


def check_size(name: str | Path, elements: int, stored: int) -> None:
    """Refuse a configuration of a model far larger than its weights, of ``stored`` bytes.

    A weight takes a quarter of a byte or more. transformers allocates what is missing, or has
    another shape, before it says so.
    """
    if elements > 4 * stored + _SPARE:
        raise AdapterError(
            f"{name}: config.json describes {elements:.3g} weights, but the checkpoint has "
            f"{stored:.3g} bytes"
        )


def _find(name: str | Path, file: str) -> Path | None:
    """Return a file of a folder or hub model as transformers finds it, or None."""
    try:
        found = cached_file(str(name), file)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def _values(config: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each plain value with the keys that lead to it; no recursion, files nest deeply."""
    pending: list[tuple[tuple[str, ...], Any]] = [((), config)]
    while pending:
        keys, value = pending.pop()
        if isinstance(value, dict):
            pending += [((*keys, key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(keys, inner) for inner in value]
        else:
            yield keys, value
