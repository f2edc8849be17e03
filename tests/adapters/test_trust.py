"""A stranger's files: whatever they say, one error in one line, and nothing of theirs is run."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.files import Trap
from support.models import CASES, llama, randomize

import tfb
from tfb import AdapterError
from tfb.adapters import trust
from tfb.adapters.loading import adapter_config, load_adapter, load_base, load_tokenizer
from tfb.demo import digits

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
DEEP = "[" * 100_000 + "]" * 100_000
DEEP_OBJECT = '{"a":' * 100_000 + "1" + "}" * 100_000
HUGE = 10**400

pytestmark = [
    # torch on layers without elements, PEFT and transformers on fields that they do not know
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:The configuration file contains a `runtime_config`"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter to it and a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    randomize(llama(), 0).save_pretrained(folder / "base")
    CASES["llama"].build().save_pretrained(folder / "adapter")
    (folder / "tokenizer").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(digits.BASE) / file, folder / "tokenizer" / file)
    return folder


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(tiny, tmp_path / "own", copy_function=os.link))


def change(path: Path, content: Mapping[str, Any] | str) -> None:
    """Replace a file by a text, or the values of some of its fields."""
    if not isinstance(content, str):
        old = json.loads(path.read_text()) if path.exists() else {}
        content = json.dumps(old | dict(content))
    path.unlink(missing_ok=True)  # a link to the original
    path.write_text(content)


def refused(folder: Path, action: Callable[[], Any], message: str = ".") -> None:
    """One line that names the model or adapter."""
    with pytest.raises(ValueError, match=message) as caught:
        action()
    text = str(caught.value)
    assert folder.name in text and "\n" not in text and len(text) < 1000
    assert folder.name != "base" or isinstance(caught.value, AdapterError)


# --- wrong values -------------------------------------------------------------------------------

BASES: list[tuple[str, Mapping[str, Any] | str]] = [
    *[("config.json", text) for text in (DEEP, DEEP_OBJECT, "null", "[]", "", "{")],
    *[("config.json", {"model_type": kind}) for kind in (None, 5, [], {}, "nope")],
    *[("config.json", {"hidden_size": n}) for n in (0, -1, "x", None, 1.5, HUGE, 10**12)],
    *[("config.json", {"vocab_size": n}) for n in (0, "x", 10**12)],
    *[("config.json", {"num_hidden_layers": n}) for n in (-1, 3, [], 10**9)],
    *[("config.json", {"num_attention_heads": n}) for n in (0, None)],
    *[("config.json", {"num_labels": n}) for n in ("x", 10**9)],
    *[("config.json", {"id2label": x}) for x in (5, {"x": "y"}, [[]])],
    *[("config.json", {"rope_parameters": x}) for x in (5, {"rope_type": "x"}, {"rope_type": []})],
    *[("config.json", {"hidden_act": x}) for x in (5, [], "os.system")],
    *[("config.json", {"quantization_config": x}) for x in (5, {"a": 1}, {"quant_method": []})],
    ("config.json", {"pad_token_id": "x"}),
    ("config.json", {"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]}),
    ("config.json", {"model_type": "gpt2", "n_positions": 10**6, "n_layer": 2}),
    ("config.json", {"architectures": 5, "hidden_size": 2}),
    ("config.json", {"to_dict": 1}),
    *[("generation_config.json", text) for text in (DEEP, "null", "1")],
    *[(INDEX, text) for text in (DEEP, "null", "", "{}")],
    *[(INDEX, {"weight_map": x}) for x in (None, [], {}, {"a": 5}, {"a": []}, {"a": {}})],
    (INDEX, {"weight_map": {"a": "other.safetensors"}, "metadata": 5}),
    *[(MODEL, text) for text in ("", "x" * 100, "\x08" + "\0" * 7 + '{"a":[]}')],
]


@pytest.mark.parametrize(("file", "content"), BASES, ids=lambda x: str(x)[:40])
def test_hostile_base(own: Path, file: str, content: Mapping[str, Any] | str) -> None:
    if file == INDEX:
        (own / "base" / MODEL).rename(own / "base" / "other.safetensors")
    change(own / "base" / file, content)
    refused(own / "base", lambda: load_base(own / "base", own / "adapter"))


ADAPTERS: list[tuple[Mapping[str, Any] | str, str]] = [
    *[(text, "no JSON object") for text in (DEEP, DEEP_OBJECT, "null", "", "{")],
    *[({"peft_type": x}, "peft_type") for x in (None, 5, [], "LOHA", "XLORA", "PREFIX_TUNING")],
    *[({"r": n}, ".") for n in (0, -1, "x", None, 1.5, [])],
    ({"r": HUGE}, "r=1000.*, but the weights have less"),
    ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern=1000000000, but the weights have less"),
    *[({"rank_pattern": x}, ".") for x in (5, {"q_proj": "x"})],
    *[({"alpha_pattern": x}, ".") for x in ([1], {"q_proj": float("inf")})],
    *[({"lora_alpha": x}, ".") for x in ("x", None, float("nan"), HUGE)],
    *[({"target_modules": x}, ".") for x in (5, [5], ["nowhere"])],
    *[({"modules_to_save": x}, ".") for x in (5, ["lm_head"])],
    ({"layers_to_transform": "x"}, "."),
    *[({"init_lora_weights": x}, "init_lora") for x in ("pissa_niter_4", "loftq", [], "x")],
    ({"megatron_config": {"a": 1}}, "megatron_config={'a': 1}, which is not supported"),
    ({"megatron_core": "os"}, "megatron_core='os', which is not supported"),
    ({"layer_replication": [[0, 10**9]]}, "layer_replication="),
    ({"arrow_config": {"top_k": 1}}, "arrow_config="),
    ({"loftq_config": {"loftq_bits": 4}}, "loftq_config="),
    ({"runtime_config": {"ephemeral_gpu_offload": True}}, "runtime_config="),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
    ({"use_qalora": True, "qalora_group_size": 8}, "use_qalora="),
    ({"of_a_newer_peft": 0.5}, "of_a_newer_peft=0.5, .* or remove the field if it changes nothing"),
]


@pytest.mark.parametrize(("content", "message"), ADAPTERS, ids=lambda x: str(x)[:40])
def test_hostile_adapter(own: Path, content: Mapping[str, Any] | str, message: str) -> None:
    change(own / "adapter" / CONFIG, content)
    refused(own / "adapter", lambda: load_adapter(llama(), own / "adapter"), message)


TOKENIZERS: list[tuple[str, Mapping[str, Any] | str]] = [
    *[("tokenizer.json", text) for text in (DEEP, "null", "[]", "", '{"model":5}')],
    *[("tokenizer_config.json", text) for text in (DEEP_OBJECT, "null", "[]", "{")],
    *[("tokenizer_config.json", {"tokenizer_class": x}) for x in (5, {"a": 1})],
    *[("tokenizer_config.json", {"added_tokens_decoder": x}) for x in (5, [1], {"x": 1})],
    *[("special_tokens_map.json", text) for text in (DEEP, "null", "1")],
]


@pytest.mark.parametrize(("file", "content"), TOKENIZERS, ids=lambda x: str(x)[:40])
def test_hostile_tokenizer(own: Path, file: str, content: Mapping[str, Any] | str) -> None:
    if file == "special_tokens_map.json":  # read where the configuration lists no added tokens
        (own / "tokenizer" / "tokenizer_config.json").unlink()
    change(own / "tokenizer" / file, content)
    refused(own / "tokenizer", lambda: load_tokenizer(own / "tokenizer"), "no tokenizer can be")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_other_types(own: Path, dtype: torch.dtype) -> None:
    """torch would cast them in silence."""
    path = own / "adapter" / WEIGHTS
    weights = load_file(path)
    key = next(iter(weights))
    path.unlink()
    save_file(weights | {key: weights[key].to(dtype)}, path)
    refused(own / "adapter", lambda: load_adapter(llama(), own / "adapter"), f"{key} is [IBCF]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "score"])
def test_weights_that_are_not_finite(tmp_path: Path, part: str, value: float) -> None:
    """Neither the adapter's nor those of the head that it brings."""
    case = CASES["llama_classifier"]
    case.build().save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / WEIGHTS
    weights = load_file(path)
    next(weight for key, weight in weights.items() if part in key)[0, 0] = value
    save_file(weights, path)
    with pytest.raises(AdapterError, match=f"{'score.*' * (part == 'score')}NaN or Inf"):
        tfb.bayesianize(load_adapter(case.base(), tmp_path / "adapter"))


# --- patterns -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", r"(.*)*(.*)*(.*)*(.*)*x"),
        ("exclude_modules", r"(\w+\.?)+(\w+\.?)+!"),
        ("rank_pattern", {r"(.|.)(.|.|..)*(.|.)*y": 4}),
        ("modules_to_save", [r"(.+)+(.+)+(.+)+!"]),
    ],
)
def test_patterns_that_never_end(
    own: Path, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "PATIENCE", 0.2)
    change(own / "adapter" / CONFIG, {field: value})
    refused(own / "adapter", lambda: load_adapter(llama(), own / "adapter"), f"{field} of .* takes")


@pytest.mark.parametrize(
    ("field", "value"),
    [("target_modules", "(q_proj"), ("exclude_modules", "[a"), ("alpha_pattern", {"a{2,1}": 1})],
)
def test_patterns_that_are_none(own: Path, field: str, value: Any) -> None:
    change(own / "adapter" / CONFIG, {field: value})
    refused(own / "adapter", lambda: load_adapter(llama(), own / "adapter"), f"{field} of .* holds")


LAYER = r"model\.layers\.(?P<idx>\d+)\.(self_attn|mlp)\.\w+_proj"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r".*\.(self_attn|mlp)\.[a-z]+_proj"},
        {"target_modules": r"(?i).*_PROJ"},
        {
            "target_modules": LAYER,
            "r": 512,
            "rank_pattern": {LAYER: 4},
            "alpha_pattern": {LAYER: 8},
        },
        {"layers_to_transform": [0, 1], "layers_pattern": ["lay(?=e)ers"]},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "x", "unsloth_fixed": True}},
        {"qalora_group_size": 32},
    ],
    ids=str,
)
def test_other_ways_to_say_the_same(own: Path, fields: Mapping[str, Any]) -> None:
    """The same weights as by a list of names."""
    change(own / "adapter" / CONFIG, fields)
    loaded, built = load_adapter(llama(), own / "adapter"), CASES["llama"].build()
    for (key, one), (other, two) in zip(
        loaded.named_parameters(), built.named_parameters(), strict=True
    ):
        assert key == other and ("lora_" not in key or torch.equal(one, two))


# --- code ---------------------------------------------------------------------------------------


def index(name: str) -> str:
    keys = llama().state_dict()
    return json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, name)})


@pytest.mark.parametrize(
    "name",
    ["model-1.bin", "../base.bin", "/elsewhere.safetensors", "../x.safetensors", "a/b.safetensors"],
)
def test_shards_are_safetensors_of_the_folder(own: Path, name: str) -> None:
    """transformers would read a pickle by torch.load, and files elsewhere."""
    weights = own / "base" / MODEL
    target = own / "base" / name.lstrip("/")
    target.parent.mkdir(exist_ok=True)
    if target.suffix == ".bin":
        torch.save(load_file(weights), target)
        weights.unlink()
    else:
        weights.rename(target)
    change(own / "base" / INDEX, index(str(target) if name[0] == "/" else name))
    refused(
        own / "base",
        lambda: load_base(own / "base", own / "adapter"),
        f"{INDEX} names .* which is no",
    )


def test_shards_in_place(own: Path) -> None:
    """Also behind symbolic links, as in the hub's cache."""
    (own / "base" / MODEL).rename(own / "blob")
    (own / "base" / "model-1.safetensors").symlink_to(own / "blob")
    change(own / "base" / INDEX, index("model-1.safetensors"))
    loaded = load_base(own / "base", own / "adapter")
    assert torch.equal(
        loaded.get_parameter("lm_head.weight"), load_file(own / "blob")["lm_head.weight"]
    )


@pytest.mark.parametrize("kept", [True, False])
def test_no_pickle_is_read(own: Path, kept: bool) -> None:
    """Neither beside safetensors nor in their place."""
    ran = own / "ran"
    for file in ("base/pytorch_model.bin", "base/optimizer.pt", "base/training_args.bin"):
        torch.save(Trap(ran), own / file)
    for file in ("adapter/adapter_model.bin", "adapter/training_args.bin", "tokenizer/vocab.pkl"):
        torch.save(Trap(ran), own / file)
    if kept:
        load_adapter(load_base(own / "base", own / "adapter"), own / "adapter")
    else:
        (own / "base" / MODEL).unlink()
        refused(
            own / "base",
            lambda: load_base(own / "base", own / "adapter"),
            r"no model\.safetensors.*Pickled weights are refused",
        )
        (own / "adapter" / WEIGHTS).unlink()
        refused(own / "adapter", lambda: load_adapter(llama(), own / "adapter"), f"no {WEIGHTS}")
    load_tokenizer(own / "tokenizer")
    assert not ran.exists()
    torch.load(own / "base" / "optimizer.pt", weights_only=False).close()  # the trap is one
    assert ran.exists()


def test_modules_that_an_adapter_names_are_not_imported(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT imports ``megatron_core``, which may lie in the working directory."""
    (own / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(own)
    monkeypatch.syspath_prepend(str(own))
    change(own / "adapter" / CONFIG, {"megatron_config": {"a": 1}, "megatron_core": "trap"})
    for action in (
        lambda: load_adapter(llama(), own / "adapter"),
        lambda: load_base(own / "base", own / "adapter"),
        lambda: adapter_config(own / "adapter"),
    ):
        refused(own / "adapter", action, "megatron_co.*, which is not supported")
    assert "trap" not in sys.modules


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "flash_attention_2"},
        {"_attn_implementation_internal": "kernels-community/flash-attn"},
        {"attn_implementation": {"": "sdpa", "text_config": "someone/kernel"}},
        {"experts_implementation": "deepgemm"},
        {"attribute_map": {"a": "_attn_implementation"}, "a": "someone/kernel"},
        {"__dict__": {"a": 1}},
        {"text_config": {"attn_implementation": "someone/kernel"}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"quantization_config": {"quant_method": "fp8"}},
        {"transformers_weights": "pytorch_model.bin"},
        {"transformers_weights": "elsewhere/model.safetensors"},
        {"configuration_files": ["config.9.9.9.json"]},
        {"fusion_config": {"a": True}},
        {"extra_files": ["decision_head.bin"]},
    ],
    ids=str,
)
def test_code_that_a_configuration_names_is_not_fetched(
    own: Path, fields: Mapping[str, Any]
) -> None:
    change(own / "base" / "config.json", fields)
    refused(
        own / "base",
        lambda: load_base(own / "base", own / "adapter"),
        r"config\.json has .* not taken",
    )


NAMES = {0: "__label__a", 1: "__b"} | {i: str(i) for i in range(2, 12_000)}


@pytest.mark.parametrize(
    "fields",
    [
        {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}},
        {"label2id": {"age groups": 20_000}},
        {"num_labels": 12_000},
        {"return_dict": False},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_bases_that_load(own: Path, fields: Mapping[str, Any]) -> None:
    change(own / "base" / "config.json", fields)
    base = load_base(own / "base", own / "adapter")
    assert base(torch.ones(1, 2, dtype=torch.long)).logits.shape == (1, 2, 64)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", None])
def test_built_in_attention(own: Path, implementation: str | None) -> None:
    fields = {"attn_implementation": implementation, "_attn_implementation_autoset": True}
    change(own / "base" / "config.json", fields | {"auto_map": {"AutoConfig": "theirs.Config"}})
    config: Any = load_base(own / "base", own / "adapter").config
    assert config._attn_implementation == (implementation or "sdpa")


def test_bases_that_are_none(own: Path) -> None:
    """transformers takes a file for weights, and loads an adapter that lies in a base's folder."""
    base, adapter = own / "base", own / "adapter"
    shutil.copyfile(base / MODEL, base / "shard-00001-model-00001-of-00001.safetensors")
    refused(base, lambda: load_base(base, adapter), "a training checkpoint")
    shutil.copyfile(adapter / CONFIG, base / CONFIG)
    refused(base, lambda: load_base(base, adapter), f"this is an adapter .{CONFIG}.")
    refused(base, lambda: load_base(base / "config.json", adapter), "this is a file")


def test_the_table_starts_from_what_loads(tiny: Path) -> None:
    base = load_base(tiny / "base", tiny / "adapter")
    load_adapter(copy.deepcopy(base), tiny / "adapter")
    assert isinstance(load_tokenizer(tiny / "tokenizer"), transformers.PreTrainedTokenizerBase)


def test_ranks_of_an_adapter_without_lora() -> None:
    """That its keys do not fit is told later; here nothing is too large."""
    trust.check_ranks("here", {"r": 4}, [])
    with pytest.raises(AdapterError, match="r=1000000000, but the weights have less"):
        trust.check_ranks("here", {"r": 10**9}, [])
