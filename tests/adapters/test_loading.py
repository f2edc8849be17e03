"""Strict loading: an adapter loads as PEFT loads it, or an error says what does not fit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from support.files import edit
from support.models import CASES, LABELS, add_lora, encoder, llama, randomize, run

import tfb
from tfb import AdapterError
from tfb.adapters.loading import (
    FILES,
    adapter_config,
    adapter_tensor_shapes,
    class_names,
    load_adapter,
    load_base,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# PEFT 0.21's own advice while saving.
pytestmark = [
    # it takes every lora_B.bias for a tensor of a wrong shape
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* invalid shape:UserWarning"),
    # LoRA on lm_head stores the head itself too
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


def write(folder: Path, kind: str = "llama") -> tuple[Path, Path]:
    """Folders of a base model and of an adapter to it."""
    case = CASES[kind]
    randomize(case.base(), 0).to(case.base_dtype).save_pretrained(folder / "base")
    case.build().save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


@pytest.fixture(scope="module")
def llama_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama"))[1]


@pytest.fixture
def adapter(llama_adapter: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (CONFIG, WEIGHTS):
        (folder / file).write_bytes((llama_adapter / file).read_bytes())
    return folder


Tensors = dict[str, torch.Tensor]


def change_weights(adapter: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)


# --- what fits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
def test_loaded_adapter_is_the_saved_one(tmp_path: Path, kind: str) -> None:
    """Base and adapter from folders: the same bits as before saving, for every kind of head."""
    base_folder, folder = write(tmp_path, kind)
    base = load_base(base_folder, folder)
    assert {p.dtype for p in base.parameters()} == {torch.float32}  # on a CPU
    model = load_adapter(base.to(CASES[kind].base_dtype), folder)
    assert not any(m.training for m in model.modules())
    batch = CASES[kind].batch()
    assert torch.equal(run(model, batch), run(CASES[kind].build(), batch))


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "llama_classifier"])
def test_the_adapters_head_sets_the_number_of_labels(tmp_path: Path, kind: str) -> None:
    """DistilBERT's and RoBERTa's heads hold another linear layer, with hidden_size rows."""
    base, adapter = write(tmp_path, kind)
    config: Any = load_base(str(base), str(adapter)).config
    assert config.num_labels == LABELS


def test_name_of_the_adapter(llama_adapter: Path) -> None:
    model: Any = load_adapter(randomize(llama(), 0), llama_adapter, "mine")
    assert list(model.peft_config) == ["mine"]
    assert tfb.bayesianize(model, "mine").adapter == "mine"


@pytest.mark.parametrize(
    ("adapter", "task", "layers"), [("clinc-domain", "CAUSAL_LM", 30), ("clinc150", "SEQ_CLS", 30)]
)
def test_real_adapters_load(shared: Path, adapter: str, task: str, layers: int) -> None:
    folder = shared / f"adapters/stories260K-{adapter}"
    bayes = tfb.bayesianize(load_adapter(load_base(shared / "models/stories260K", folder), folder))
    assert bayes.task == task == adapter_config(folder)["task_type"]
    assert len(bayes.posteriors) == layers
    assert all(p.effective_rank == p.rank == 8 for p in bayes.posteriors.values())
    if task == "SEQ_CLS":
        head: Any = bayes.base.get_submodule("score")
        assert head.modules_to_save["default"].weight.shape[0] == 150


# --- which checkpoints a base model may come from -----------------------------------------------

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SIZES | {"intermediate_size": 32, "max_position_embeddings": 64}
GROUPED = WIDE | {"num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = SIZES | {"ffn_dim": 32, "max_position_embeddings": 64, "word_embed_proj_dim": 16}
DISTIL = {"vocab_size": 64, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 4}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
UNTIED = {"tie_word_embeddings": False}
CHECKPOINTS: dict[str, tuple[str, str, dict[str, Any], str, str | None]] = {
    # saved as, the adapter's class, sizes, LoRA on, what is missing
    "Llama": ("ForCausalLM", "ForSequenceClassification", GROUPED, "q_proj", None),
    "Llama bare": ("Model", "ForSequenceClassification", GROUPED, "q_proj", None),
    "Llama bare, tied": (
        "Model",
        "ForCausalLM",
        GROUPED | {"tie_word_embeddings": True},
        "q_proj",
        None,
    ),
    "Llama bare, untied": (
        "Model",
        "ForCausalLM",
        GROUPED | UNTIED,
        "q_proj",
        "1 .*lm_head.weight",
    ),
    "Qwen3": ("ForCausalLM", "ForSequenceClassification", GROUPED, "q_proj", None),
    "Mistral": ("ForCausalLM", "ForSequenceClassification", GROUPED, "q_proj", None),
    "Gemma": ("ForCausalLM", "ForCausalLM", GROUPED, "q_proj", None),
    "GPT2": ("LMHeadModel", "ForSequenceClassification", GPT2, "c_attn", None),
    "OPT": ("ForCausalLM", "ForSequenceClassification", OPT, "q_proj", None),
    "Bert bare": ("Model", "ForSequenceClassification", WIDE, "query", None),
    "Bert masked": ("ForMaskedLM", "ForSequenceClassification", WIDE, "query", "2 .*pooler.dense"),
    "Bert tokens": (
        "ForTokenClassification",
        "ForSequenceClassification",
        WIDE,
        "query",
        "2 .*pool",
    ),
    "Bert labels": ("ForSequenceClassification", "ForSequenceClassification", WIDE, "query", None),
    "Roberta bare": ("Model", "ForSequenceClassification", WIDE, "query", None),
    "Roberta masked": ("ForMaskedLM", "ForSequenceClassification", WIDE, "query", None),
    "Roberta tokens": ("ForTokenClassification", "ForSequenceClassification", WIDE, "query", None),
    "DistilBert": ("ForMaskedLM", "ForSequenceClassification", DISTIL, "q_lin", None),
    "T5": ("ForConditionalGeneration", "ForConditionalGeneration", T5, "q", None),
    "T5 bare": ("Model", "ForConditionalGeneration", T5, "q", None),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_of_other_tasks(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight is the checkpoint's, or its head's of the adapter, or the model is refused."""
    saved, used, sizes, target, missing = CHECKPOINTS[case]
    name = case.split()[0]
    config = getattr(transformers, f"{name}Config")(**sizes)
    getattr(transformers, name + saved)(config).save_pretrained(tmp_path / "base")
    task = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
    config.num_labels = 5
    trained = add_lora(
        getattr(transformers, name + used)(config),
        task_type=task.get(used, "SEQ_2_SEQ_LM"),
        target_modules=[target],
        fan_in_fan_out=name == "GPT2",
    )
    trained.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    if missing is None:
        base: Any = load_base(tmp_path / "base", tmp_path / "adapter")
        assert "LOAD REPORT" not in caplog.text  # it alarms, and names what the adapter brings
        load_adapter(base, tmp_path / "adapter")
        prefix = base.base_model_prefix
        backbone = getattr(transformers, name + "Model").from_pretrained(tmp_path / "base")
        loaded = {k.replace(".base_layer", ""): v for k, v in base.state_dict().items()}
        for key, value in backbone.state_dict().items():
            if "pooler" not in key or f"{prefix}.{key}" in loaded:
                assert torch.equal(loaded.get(f"{prefix}.{key}", loaded.get(key)), value), key
        missing = "have no place in .*[.]1[.]"
        change = {"num_hidden_layers": 1, "n_layer": 1, "n_layers": 1, "num_layers": 1}
        file = tmp_path / "base/config.json"
        told = json.loads(file.read_text())
        told = {k: v for k, v in told.items() if k not in ("layer_types", "num_decoder_layers")}
        file.write_text(json.dumps({k: change.get(k, v) for k, v in told.items()}))
    with pytest.raises(AdapterError, match=missing):
        load_base(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {}, "lacks 21 of LlamaForCausalLM's tensors, which would be random: lm_head"),
        (
            lambda t: t | {"lm_head.weight": t["lm_head.weight"][:-1].clone()},
            r"\[63, 16\], not \[64",
        ),
        (
            lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)},
            "1 of the checkpoint's tensors have no place in LlamaForCausalLM .*q_proj.bias",
        ),
        (
            lambda t: {k: v for k, v in t.items() if "norm" not in k},
            "lacks 5 .*, \\.\\.\\.; download .* or save those modules with the adapter",
        ),
    ],
)
def test_incomplete_base(
    tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    """transformers fills what is missing at random, and ignores what it does not know."""
    base, adapter = write(tmp_path)
    tensors = load_file(base / "model.safetensors")
    save_file(change(tensors), base / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match=message):
        load_base(base, adapter)


def test_constants_of_older_versions(tmp_path: Path) -> None:
    """They lie in the checkpoint's blocks, some as integers, and are made anew.

    What lies in no module, such as BART's final_logits_bias, is a head's.
    """
    base, adapter = write(tmp_path)
    tensors = load_file(base / "model.safetensors")
    names = ("attn.bias", "attn.attention.masked_bias", "attn.causal_mask", "maybe.inv_freq")
    for name in (*names, "rotary_emb.cos_cached", "rotary_emb.sin_cached", "version"):
        tensors[f"model.layers.1.{name}"] = torch.ones(1, 1, dtype=torch.uint8)
    tensors["final_logits_bias"] = torch.ones(1, 64)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    loaded = load_base(base, adapter).state_dict()
    assert loaded.keys() <= tensors.keys()
    assert all(torch.equal(value, tensors[key].float()) for key, value in loaded.items())


def test_a_head_that_the_adapter_brings_in_part(tmp_path: Path) -> None:
    base, adapter = write(tmp_path, "roberta")
    for folder, file in ((base, "model.safetensors"), (adapter, WEIGHTS)):
        tensors = load_file(folder / file)
        gone = "classifier.dense.bias"
        kept = {k: v for k, v in tensors.items() if not k.endswith(gone)}
        assert len(kept) < len(tensors)
        save_file(kept, folder / file, {"format": "pt"})
    with pytest.raises(AdapterError, match=r"lacks 1 of .* random: classifier\.dense\.bias;"):
        load_base(base, adapter)


# --- what does not ------------------------------------------------------------------------------


def refused(adapter: Path | str, message: str, base: Callable[[], Any] = llama) -> None:
    with pytest.raises(AdapterError, match=message):
        load_adapter(base(), adapter)


def test_missing_keys(adapter: Path) -> None:
    """PEFT would leave B = 0 there and say nothing worse than a warning."""
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    change_weights(adapter, lambda t: {k: v for k, v in t.items() if k != key})
    refused(adapter, rf"missing \(1\): {key}; use the base model that the adapter was trained on")


def test_unexpected_keys(adapter: Path) -> None:
    """A renamed prefix, as in checkpoints of wrapped models, would load as nothing at all."""

    def rename(tensors: Tensors) -> Tensors:
        old, new = "base_model.model.model.", "base_model.model.language_model."
        return {key.replace(old, new): value for key, value in tensors.items()}

    change_weights(adapter, rename)
    refused(
        adapter,
        r"missing \(28\): base_model\.model\.model\..*, \.\.\.; "
        r"unexpected \(28\): base_model\.model\.language_model.*, or rename the keys",
    )


def test_deeper_adapter_than_base(adapter: Path) -> None:
    refused(adapter, r"unexpected \(14\): .*layers\.1\.", lambda: llama(num_hidden_layers=1))


def test_shallower_adapter_than_base(adapter: Path) -> None:
    refused(adapter, r"missing \(14\): .*layers\.2\.", lambda: llama(num_hidden_layers=3))


def test_missing_head(tmp_path: Path) -> None:
    _, adapter = write(tmp_path, "bert")
    change_weights(adapter, lambda t: {k: v for k, v in t.items() if "classifier" not in k})
    refused(
        adapter,
        r"lacks the tensor '.*classifier\.weight' of its modules_to",
        lambda: encoder("Bert"),
    )
    with pytest.raises(AdapterError, match=r"without its head \(modules_to_save\)"):
        load_base(tmp_path / "base", adapter)


def test_wrong_shapes(adapter: Path) -> None:
    refused(
        adapter,
        r"does not fit the base model \(Error.* size mismatch for \S+q_proj\.lora_A",
        lambda: llama(hidden_size=32),
    )


def test_other_architecture(adapter: Path) -> None:
    refused(
        adapter,
        r"does not fit the base model \(Target modules .* not found",
        lambda: encoder("Bert"),
    )


def test_base_that_carries_an_adapter_already(adapter: Path) -> None:
    """PEFT would overwrite the first or let both act; also after a load that failed half-way."""
    base = llama()
    load_adapter(base, adapter)
    refused(adapter, "carries an adapter already .* load a fresh base model", lambda: base)
    base = llama(num_hidden_layers=3)
    refused(adapter, r"missing \(14\)", lambda: base)
    refused(adapter, "carries an adapter already", lambda: base)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", f"{CONFIG} is no JSON object"),
        ("", f"{CONFIG} is no JSON object"),
        ("[]", f"{CONFIG} is no JSON object .content: expected an object"),
        ("{}", rf"{CONFIG} is not a LoRA configuration of PEFT \(peft_type None\)"),
        (
            '{"peft_type": "NOPE"}',
            rf"{CONFIG} is not a LoRA configuration of PEFT \(peft_type 'NOPE'\)",
        ),
    ],
)
def test_damaged_configuration(adapter: Path, text: str, message: str) -> None:
    (adapter / CONFIG).write_text(text)
    refused(adapter, message)
    with pytest.raises(AdapterError, match=message):
        load_base(adapter.parent, adapter)


def test_settings_that_peft_cannot_use(adapter: Path) -> None:
    edit(adapter / CONFIG, r="eight")
    refused(adapter, r"does not fit the base model \(TypeError: '<=' not supported")


def test_task_without_a_base_class(adapter: Path) -> None:
    edit(adapter / CONFIG, task_type="TOKEN_CLS")
    with pytest.raises(AdapterError, match="task_type TOKEN_CLS; supported: CAUSAL_LM, SEQ_2_SEQ"):
        load_base(adapter.parent, adapter)


def test_damaged_weights(adapter: Path) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    for cut in (0, 100, len(whole) - 1):
        (adapter / WEIGHTS).write_bytes(whole[:cut])
        refused(adapter, f"{WEIGHTS}: damaged, not a safetensors file")


def test_pickles_are_not_read(adapter: Path) -> None:
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    refused(adapter, rf"no {WEIGHTS}; .*adapter_model\.bin files are not read: convert them")
    with pytest.raises(AdapterError, match=f"no {WEIGHTS}"):
        load_base(adapter.parent, adapter)


def test_a_pickled_base_model_is_not_read(tmp_path: Path) -> None:
    base, adapter = write(tmp_path, "llama")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no model\.safetensors.*Pickled weights are refused"):
        load_base(base, adapter)


def test_a_base_models_own_code_is_not_run(tmp_path: Path) -> None:
    """Nor is the user asked for leave to."""
    base, adapter = write(tmp_path, "llama")
    (base / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((base / "config.json").read_text())
    code = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    config |= {"model_type": "theirs", "auto_map": code}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"own code is refused"):
        load_base(base, adapter)
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_is_no_adapter_is_named_so(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"{tmp_path.name}: no {CONFIG}; expected a PEFT"):
        adapter_config(tmp_path)


def test_folder_without_an_adapter(tmp_path: Path) -> None:
    refused(tmp_path, f"no {CONFIG}; expected a PEFT adapter folder")


@pytest.mark.parametrize("name", ["nobody/nothing", "no/such/folder/here", "/no/such/folder"])
def test_names_that_cannot_be_reached(name: str) -> None:
    """The suite runs offline, like a cluster node."""
    refused(name, f"{name}: no folder of this name is here")
    with pytest.raises(AdapterError, match="the hub has none or cannot be reached"):
        load_base("anything", name)


def test_what_is_fetched_of_a_hub_artifact() -> None:
    """Every file of a tokenizer that tfb.json may list; no pickle."""
    files = ["tokenizer.json", "vocab.txt", "vocab.bpe", "bpe.codes", "tokenizer.spm"]
    files += ["tokenizer.tiktoken", "spiece.model", "additional_chat_templates/tool.jinja"]
    fetched = list(filter_repo_objects([*files, "a.bin", "vocab.pkl"], allow_patterns=FILES))
    assert fetched == files


def test_shapes_are_read_without_loading(adapter: Path) -> None:
    shapes = adapter_tensor_shapes(adapter)
    assert shapes == {k: list(v.shape) for k, v in load_file(adapter / WEIGHTS).items()}
    assert len(shapes) == 28


def test_names_in_a_configuration() -> None:
    class Config:
        id2label: Any = None
        num_labels = 2

    found = Config()
    for names, expected in (
        ({0: "LABEL_0", 1: "LABEL_1"}, None),
        ({1: "neg", 0: "pos"}, ("pos", "neg")),
        ({0: "one"}, None),
        (None, None),
    ):
        found.id2label = names
        assert class_names("SEQ_CLS", found) == expected
        assert class_names("SEQ_CLS", found, ["a", "b"]) == ("a", "b")
        assert class_names("CAUSAL_LM", found) is None
    assert class_names("CAUSAL_LM", None, "abc") == ("a", "b", "c")
    with pytest.raises(ValueError, match="labels: 3 names, but the head has 2 classes; name all"):
        class_names("SEQ_CLS", found, "abc")
    assert class_names("SEQ_CLS", found, None, "xy") == ("x", "y")
    with pytest.raises(ValueError, match="labels: the artifact has these names in another order"):
        class_names("SEQ_CLS", found, "yx", "xy")
