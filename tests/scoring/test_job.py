"""What a run's configuration holds: all that a result depends on, and nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.files import edit
from support.scoring import DONE, small_job

import tfb
from tfb import ArtifactError
from tfb.adapters.loading import load_tokenizer
from tfb.demo import digits
from tfb.plain import differences
from tfb.scoring.job import base_settings, tokenizer_settings
from tfb.scoring.output import OutputError
from tfb.scoring.run import run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the digits model to edit."""
    return Path(shutil.copytree(digits.BASE, tmp_path / "base"))


def old(artifact: Path, target: Path) -> Path:
    """An artifact as 0.1.0 wrote it, without a list of its files."""
    shutil.copytree(artifact, target)
    sidecar = json.loads((target / "tfb.json").read_text())
    files = sidecar.pop("files")
    del sidecar["sha256"]
    sidecar["adapter_sha256"] = files["adapter_model.safetensors"]
    sidecar["factors_sha256"] = files["tfb.safetensors"]
    (target / "tfb.json").write_text(json.dumps(sidecar))
    return target


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", 0.5),
        ("hidden_act", "relu"),
        ("max_position_embeddings", 64),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        ("pad_token_id", 2),
        ("bos_token_id", 2),
        ("sliding_window", 4),
        ("attn_implementation", "eager"),
        ("id2label", {str(i): f"class {i}" for i in range(99)}),
    ],
)
def test_the_bases_whole_configuration(base: Path, field: str, value: Any) -> None:
    """Any field of its config.json is in it, by name; other places of the same model are not."""
    before = base_settings(tfb.load_base(digits.BASE, digits.ADAPTER))
    here = tfb.load_base(base, digits.ADAPTER)
    assert before == base_settings(here) == json.loads(json.dumps(before))
    if field == "attn_implementation":
        here.set_attn_implementation(value)  # type: ignore[operator]
    else:
        edit(base / "config.json", **{field: value})
        here = tfb.load_base(base, digits.ADAPTER)
    found = differences(before, base_settings(here))
    assert found and all(change.startswith((field, "num_labels", "label2id")) for change in found)
    assert max(map(len, found)) < 200  # many classes are told by a hash


TOKENIZER: dict[str, tuple[str, dict[str, Any]]] = {
    "model_max_length": ("tokenizer_config.json", {"model_max_length": 64}),
    "pad_token": ("tokenizer_config.json", {"pad_token": "<unk>"}),
    "unk_token": ("tokenizer_config.json", {"unk_token": "<pad>"}),
    "eos_token": ("tokenizer_config.json", {"eos_token": "<bos>"}),
    "padding_side": ("tokenizer_config.json", {"padding_side": "right"}),
    "truncation_side": ("tokenizer_config.json", {"truncation_side": "left"}),
    "clean_up_tokenization_spaces": (
        "tokenizer_config.json",
        {"clean_up_tokenization_spaces": True},
    ),
    "chat_template": ("tokenizer_config.json", {"chat_template": "{{ messages }}"}),
    "rules": ("tokenizer.json", {"post_processor": None}),
}


@pytest.mark.parametrize("name", TOKENIZER)
def test_the_whole_tokenizer(base: Path, name: str) -> None:
    before = tokenizer_settings(load_tokenizer(digits.BASE))
    assert before == tokenizer_settings(load_tokenizer(base)) == json.loads(json.dumps(before))
    file, values = TOKENIZER[name]
    edit(base / file, **values)
    (change, *_) = differences(before, tokenizer_settings(load_tokenizer(base)))
    assert change.startswith(f"{name}: ")


def test_an_added_token_is_another_tokenizer() -> None:
    tokenizer = load_tokenizer(digits.BASE)
    before = tokenizer_settings(tokenizer)
    tokenizer.add_tokens(["new"])
    (change,) = differences(before, tokenizer_settings(tokenizer))
    assert change.startswith("rules: ")


def test_resume_goes_on_with_the_same_alone(artifact: str, base: Path, tmp_path: Path) -> None:
    """Other places, a card and Git's files change nothing; each part of the configuration does."""
    made = Path(artifact)
    for own in (made, old(made, tmp_path / "old")):
        job = replace(small_job(str(own), tmp_path), base=str(base), limit=2)
        job = replace(job, output=str(tmp_path / f"out-{own.name}"))
        assert run(job).status == DONE.status
        moved = Path(shutil.copytree(own, tmp_path / f"moved-{own.name}"))
        (moved / "README.md").write_text("ours")
        (moved / ".gitattributes").write_text("x")
        same = replace(job, artifact=str(moved), base=str(digits.BASE))
        assert run(same, resume=True).status == DONE.status
        for file, values, message in (
            ("config.json", {"rms_norm_eps": 0.5}, r"rms_norm_eps: 1e-06 -> 0\.5"),
            ("tokenizer_config.json", {"padding_side": "right"}, r"tokenizer\.padding_side: left"),
        ):
            before = (base / file).read_text()
            edit(base / file, **values)
            with pytest.raises(ValueError, match=f"another configuration .*{message}"):
                run(job, resume=True)
            (base / file).write_text(before)
        for values in ({"lora_alpha": 99}, {"use_rslora": True}):
            before = (moved / "adapter_config.json").read_text()
            edit(moved / "adapter_config.json", **values)
            kind, message = (ArtifactError, "adapter_config.json has changed")
            if own != made:
                kind, message = OutputError, "adapter_config_sha256: "
            with pytest.raises(kind, match=message):
                run(replace(same), resume=True)
            (moved / "adapter_config.json").write_text(before)


def test_an_artifact_is_checked_before_anything_is_loaded(artifact: str, tmp_path: Path) -> None:
    own = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    (own / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"adapter_config\.json has changed since"):
        run(replace(small_job(str(own), tmp_path), base="no/such/base"))
    assert not (tmp_path / "out").exists()
