"""Artifacts: what was saved comes back to the bit, and what cannot be trusted is refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.command import environment
from support.fits import TEMPERED
from support.models import CASES, add_lora, causal, llama, make_batch, randomize, run, sampled

import tfb
from tfb import ArtifactError, BayesianModel, Draws, PredictiveFit
from tfb.adapters.artifact import (
    base_fingerprint,
    base_settings,
    check_base,
    check_output_folder,
    file_sha256,
    read_sidecar,
)
from tfb.adapters.loading import load_tokenizer
from tfb.demo import digits
from tfb.evaluation.decisions import Decisions
from tfb.sampling.config import SamplingConfig
from tfb_kernels import NOISE_VERSION

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DRAWS = Draws((0.05, -0.05, 0.0, 0.1), (0, 0, 1, 9), seed=11)

# PEFT 0.21's own advice while saving; see test_adapters.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* invalid shape:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


def bayesian(kind: str = "llama", **arguments: Any) -> BayesianModel:
    bayes = tfb.bayesianize(CASES[kind].build(), seed=5, **arguments)
    bayes.configure(sigma=0.05)
    return bayes


def base(kind: str = "llama", seed: int = 0) -> Any:
    """The base model alone, as ``bayesian`` has it."""
    return randomize(CASES[kind].base(), seed).to(CASES[kind].base_dtype).eval()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return tfb.save(bayesian(), tmp_path / "artifact", note="kept")


# --- what was saved comes back ------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
def test_round_trip_gives_the_same_bits(tmp_path: Path, kind: str) -> None:
    bayes, batch = bayesian(kind).configure(temperature=1.7), CASES[kind].batch()
    found = tfb.load(base(kind), tfb.save(bayes, tmp_path / "artifact"))
    assert found.config == bayes.config == SamplingConfig(0.05, temperature=1.7, seed=5)
    assert found.task == bayes.task
    assert found.source == tmp_path / "artifact"
    assert list(found.posteriors) == list(bayes.posteriors)
    for name, p in bayes.posteriors.items():
        q = found.posteriors[name]
        assert (q.name, q.layer_id, q.scaling) == (p.name, p.layer_id, p.scaling)
        assert torch.equal(q.A, p.A) and torch.equal(q.B, p.B) and torch.equal(q.d, p.d)
    assert torch.equal(run(found.model, batch), run(bayes.model, batch))
    assert torch.equal(sampled(found, DRAWS, batch), sampled(bayes, DRAWS, batch))
    assert torch.equal(found.predict(batch).probs, bayes.predict(batch).probs)


def test_the_record_of_a_fit_comes_back(tmp_path: Path) -> None:
    """With its temperature, its two points at sigma = 0 and both intervals."""
    bayes = bayesian().configure(sigma=TEMPERED.sigma, temperature=TEMPERED.temperature)
    folder = tfb.save(bayes, tmp_path / "artifact", fit=TEMPERED)
    record = PredictiveFit.from_dict(read_sidecar(folder)["fit"])
    assert record == TEMPERED and record.config.temperature == 1.5
    assert tfb.load(base(), folder).config == replace(record.config, seed=5)  # the model's own


def test_decisions_come_back(tmp_path: Path) -> None:
    """They hold for one sigma, T, mode and seed: another configuration has none."""
    bayes = bayesian()
    assert read_sidecar(tfb.save(bayes, tmp_path / "none"))["decisions"] is None
    bayes.decisions = Decisions(300, 10, target_error=0.1, threshold=0.7, accepted=0.8, error=0.05)
    found = tfb.load(base(), tfb.save(bayes, tmp_path / "artifact"))
    assert found.decisions == bayes.decisions
    assert found.configure(sigma=0.05, mode="full").decisions == bayes.decisions
    assert found.configure(temperature=1.1).decisions is None


def test_only_the_chosen_layers_come_back_bayesian(tmp_path: Path) -> None:
    bayes, batch = bayesian(layers=r"layers\.1"), CASES["llama"].batch()
    found = tfb.load(base(), tfb.save(bayes, tmp_path / "artifact"))
    assert len(found.posteriors) == 7 and found.posteriors.keys() == bayes.posteriors.keys()
    assert torch.equal(found.predict(batch).probs, bayes.predict(batch).probs)


def test_another_process_sees_the_same_values(tmp_path: Path) -> None:
    """To the bit, in two processes that load base and artifact from their folders.

    (A base built in memory may differ in the last bit: its weights lie at other addresses, and
    BLAS treats aligned ones differently.)
    """
    base().save_pretrained(tmp_path / "base")
    tfb.save(bayesian(), tmp_path / "artifact")
    program = (
        "import sys, hashlib, tfb\n"
        "from support.models import make_batch\n"
        "bayes = tfb.load(sys.argv[1], sys.argv[2])\n"
        "probs = bayes.predict(make_batch(5, 2, 4), 6).probs\n"
        "print(hashlib.sha256(probs.numpy().tobytes()).hexdigest())\n"
    )
    folders = [tmp_path / "base", tmp_path / "artifact"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *folders],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    bayes = tfb.load(*folders)
    probs = bayes.predict(make_batch(5, 2, 4), 6).probs
    assert done.stdout.split() == [hashlib.sha256(probs.numpy().tobytes()).hexdigest()]


def test_peft_reads_the_folder(tmp_path: Path) -> None:
    """An ordinary adapter folder; its files are the source's, byte for byte."""
    CASES["llama"].build().save_pretrained(tmp_path / "source")
    bayes = tfb.bayesianize(tfb.load_adapter(base(), tmp_path / "source"))
    bayes.configure(sigma=0.02)
    bayes.source = tmp_path / "source"
    first = tfb.save(bayes, tmp_path / "first")
    again = tfb.load(base(), first)
    second = tfb.save(again, tmp_path / "second")  # a loaded artifact is its own source
    for file in ADAPTER_FILES:
        expected = (tmp_path / "source" / file).read_bytes()
        assert (first / file).read_bytes() == (second / file).read_bytes() == expected
    plain = peft.PeftModel.from_pretrained(base(), str(first))
    batch = CASES["llama"].batch()
    assert torch.equal(run(plain, batch), run(CASES["llama"].build(), batch))
    assert (second / "tfb.safetensors").read_bytes() == (first / "tfb.safetensors").read_bytes()


def test_adapter_of_another_name(tmp_path: Path) -> None:
    """Saved as a plain folder all the same, without the model's other adapters."""
    model = add_lora(randomize(llama(), 0), 1, "mine", **causal())
    model.add_adapter("other", peft.LoraConfig(**causal(r=2)))
    bayes = tfb.bayesianize(model, "mine", seed=5)
    bayes.configure(sigma=0.05)
    folder = tfb.save(bayes, tmp_path / "artifact")
    files = {path.name for path in folder.iterdir()}
    assert files == {*ADAPTER_FILES, "README.md", "tfb.json", "tfb.safetensors"}
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    plain = tmp_path / "plain"
    plain.touch()
    assert modes == {plain.stat().st_mode & 0o777}  # readable as any new file, by servers too
    found, batch = tfb.load(base(), folder), CASES["llama"].batch()
    assert found.adapter == "default"
    assert torch.equal(found.predict(batch).probs, bayes.predict(batch).probs)


def test_sidecar(artifact: Path) -> None:
    sidecar = read_sidecar(artifact)
    assert (sidecar["sigma"], sidecar["seed"], sidecar["mode"]) == (0.05, 5, "full")
    assert sidecar["noise_version"] == NOISE_VERSION and sidecar["fit"] is None
    assert sidecar["extra"] == {"note": "kept"}
    assert sidecar["layers"] == dict.fromkeys(bayesian().posteriors, 2.0)
    assert {"tfb", "torch", "peft", "transformers", "noise"} <= sidecar["versions"].keys()


def test_base_in_another_dtype_is_the_same_base(artifact: Path) -> None:
    batch = CASES["llama"].batch()
    found = tfb.load(base().bfloat16(), artifact).predict(batch).probs
    # bfloat16 has 8 bits: a few per cent of a logit through two blocks.
    torch.testing.assert_close(found, bayesian().predict(batch).probs, rtol=0, atol=0.1)


def test_real_base_in_bfloat16_is_the_same_base(shared: Path, tmp_path: Path) -> None:
    folder, adapter = shared / "models/stories260K", shared / "adapters/stories260K-clinc-domain"
    bayes = tfb.bayesianize(tfb.load_adapter(tfb.load_base(folder, adapter), adapter))
    bayes.configure(sigma=0.01)
    bayes.source = adapter
    tfb.save(bayes, tmp_path / "artifact")
    assert tfb.load(folder, tmp_path / "artifact").sigma == 0.01
    half = tfb.load_base(folder, adapter).bfloat16()
    assert tfb.load(half, tmp_path / "artifact").sigma == 0.01
    same = base_fingerprint(tfb.load_base(folder, adapter))
    assert same == base_fingerprint(bayes.base)  # the adapter is no part of it


# --- writing ------------------------------------------------------------------------------------


def test_output_folder_must_be_free(tmp_path: Path) -> None:
    bayes = bayesian()
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    for name in ("file", "full"):
        with pytest.raises(ArtifactError, match=f"{name} already holds something; choose a new"):
            tfb.save(bayes, tmp_path / name)
    assert (tmp_path / "full/file").read_text() == (tmp_path / "file").read_text() == "x"
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "a/b/c"):
        assert check_output_folder(tmp_path / name) == tmp_path / name
        assert tfb.save(bayes, str(tmp_path / name)) == tmp_path / name
        assert tfb.load(base(), tmp_path / name).sigma == 0.05


def test_sigma_must_be_there(tmp_path: Path) -> None:
    bayes = bayesian().configure(sigma=None)
    with pytest.raises(ArtifactError, match=r"sigma is not set: run tfb\.fit_sigma"):
        tfb.save(bayes, tmp_path / "artifact")
    assert not [*tmp_path.iterdir()]


def test_an_artifact_of_version_0_1_0_gives_the_same_predictions() -> None:
    """Written by 0.1.0 with a search's record and sigma times 0.7 in every third layer.

    It knew no temperature: T = 1. The record's other fields of then are passed over.
    expected.safetensors holds what it predicted then. Rounding: float32 activations of a model of
    this depth, as between processors (tests/test_model.py).
    """
    folder = Path(__file__).parent / "artifact-0.1.0"
    found = tfb.load(base(), folder)
    sidecar = read_sidecar(folder)
    assert "temperature" not in sidecar and found.config.temperature == 1.0
    assert found.config == SamplingConfig(sigma=0.05, seed=5) and found.decisions is None
    factors = load_file(folder / "tfb.safetensors")
    for i, (name, p) in enumerate(found.posteriors.items()):
        assert torch.equal(p.A, factors[f"{name}.A"]) and torch.equal(p.B, factors[f"{name}.B"])
        scale = 1.0 if i % 3 else 0.7
        assert torch.equal(p.d, factors[f"{name}.d"] / scale)  # noise is sigma / d
    expected = load_file(folder / "expected.safetensors")["probs"]
    probs = found.predict(CASES["llama"].batch(), 4).probs
    torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-6)
    written = sidecar["fit"]
    record = PredictiveFit.from_dict(written)
    assert {"two_sided", "family"} <= written.keys() and "change" not in written
    assert (record.temperature, record.change) == (1.0, None)
    kept = record.to_dict()
    for name in kept.keys() & written.keys() - {"curve"}:
        assert kept[name] == written[name]
    assert len(record.curve) == 10
    for point, then in zip(record.curve, written["curve"], strict=True):
        assert (point.sigma, point.loss) == (then["sigma"], then["loss"])
        assert (point.standard_error, point.anchors) == (then["standard_error"], 3)
        assert (point.temperature, point.accuracy) == (1.0, None)
    assert PredictiveFit.from_dict(kept) == record


def test_models_without_the_posterior_are_not_saved(tmp_path: Path) -> None:
    """They would make a folder that no base model fits."""
    bayes: Any = bayesian()
    bayes.model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the base weight; call .*unmerge_adapter"):
        tfb.save(bayes, tmp_path / "artifact")
    bayes.model.unmerge_adapter()
    bayes.remove()
    with pytest.raises(ValueError, match="does not carry this posterior any more"):
        tfb.save(bayes, tmp_path / "artifact")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_no_half_written_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    bayes = bayesian()
    with monkeypatch.context() as patch:
        patch.setattr("tfb.adapters.artifact.save_file", fail)
        with pytest.raises(type(error)):
            tfb.save(bayes, tmp_path / "artifact")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(TypeError, match="not JSON serializable"):
        tfb.save(bayes, tmp_path / "artifact", note=object())
    with pytest.raises(ValueError, match="Out of range float values"):
        tfb.save(bayes, tmp_path / "artifact", note=float("nan"))
    bayes.source = tmp_path / "gone"
    with pytest.raises(FileNotFoundError, match=r"gone/adapter_"):
        tfb.save(bayes, tmp_path / "artifact")
    assert not [*tmp_path.iterdir()]
    bayes.source = None
    tfb.save(bayes, tmp_path / "artifact")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_buffer_may_be_infinite(tmp_path: Path) -> None:
    """As a mask is; a NaN in its place is another base."""
    bayes, mask = bayesian(), torch.zeros(2, 2).fill_diagonal_(-torch.inf)
    bayes.base.register_buffer("mask", mask, persistent=False)
    folder, other = tfb.save(bayes, tmp_path / "artifact"), base()
    other.register_buffer("mask", mask.clone(), persistent=False)
    tfb.load(other, folder)
    other = base()
    other.register_buffer("mask", mask.abs().sqrt().mul(torch.nan), persistent=False)
    with pytest.raises(ArtifactError, match=r"other weights \(first difference: mask\)"):
        tfb.load(other, folder)


# --- reading what cannot be trusted -------------------------------------------------------------


def edit(artifact: Path, **values: Any) -> None:
    """Write other values into a sidecar, as whoever can hash would."""
    file = artifact / "tfb.json"
    data = json.loads(file.read_text()) | values
    if data.pop("sha256", None):
        text = json.dumps(data, sort_keys=True, ensure_ascii=False)
        data["sha256"] = hashlib.sha256(text.encode(errors="replace")).hexdigest()
    file.write_text(json.dumps(data))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def retouch(file: Path) -> None:
    """The least possible change of a weight."""
    tensors = load_file(file)
    tensors[min(tensors)].view(-1)[0] += 1e-6
    save_file(tensors, file)


def refactor(artifact: Path, **changes: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the first layer's factors, and the hashes with them."""
    path = artifact / "tfb.safetensors"
    tensors, sidecar = load_file(path), read_sidecar(artifact)
    first = next(iter(sidecar["layers"]))
    save_file(
        tensors | {f"{first}.{k}": f(tensors[f"{first}.{k}"]) for k, f in changes.items()}, path
    )
    edit(artifact, files=sidecar["files"] | {path.name: file_sha256(path)})


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no sidecar": (
        lambda a: (a / "tfb.json").unlink(),
        "no tfb.json; expected a folder written by tfb fit",
    ),
    "cut": (lambda a: cut(a / "tfb.json"), r"tfb\.json: damaged, not JSON as it was saved \("),
    "binary": (lambda a: (a / "tfb.json").write_bytes(b"\xff\xfe"), "not JSON as it was saved"),
    "list": (lambda a: (a / "tfb.json").write_text("[1]"), r"expected an object, got \[1\]"),
    "deep": (lambda a: (a / "tfb.json").write_text("[" * 10**5), "nested too deep"),
    "twice": (
        lambda a: (a / "tfb.json").write_text('{"sigma": 1, "sigma": 2}'),
        "the key 'sigma' stands twice",
    ),
    "other format": (
        lambda a: edit(a, format_version=2),
        r"format_version is 2, this library has 1; fit the adapter again .*wrote it \(\d.*\)",
    ),
    "other noise": (
        lambda a: edit(a, noise_version=0, versions=3),
        f"noise_version is 0, this library has {NOISE_VERSION}; fit",
    ),
    "edited by hand": (
        lambda a: (a / "tfb.json").write_text((a / "tfb.json").read_text().replace("0.05", "0.5")),
        "damaged, its values have changed since it was saved; fit again",
    ),
    "no adapter": (
        lambda a: (a / "adapter_model.safetensors").unlink(),
        r"adapter_model\.safetensors is missing",
    ),
    "no factors": (lambda a: (a / "tfb.safetensors").unlink(), r"tfb\.safetensors is missing"),
    "other adapter": (
        lambda a: retouch(a / "adapter_model.safetensors"),
        r"adapter_model\.safetensors has changed since the artifact was saved; put the file back",
    ),
    "other factors": (lambda a: retouch(a / "tfb.safetensors"), r"tfb\.safetensors has changed"),
    "cut factors": (lambda a: cut(a / "tfb.safetensors"), r"tfb\.safetensors has changed"),
    "other scaling": (
        lambda a: (a / "adapter_config.json").write_text(
            (a / "adapter_config.json").read_text().replace('"lora_alpha": 8', '"lora_alpha": 9')
        ),
        r"adapter_config\.json has changed",
    ),
    "a file that is nowhere": (
        lambda a: edit(a, files=read_sidecar(a)["files"] | {"/dev/zero": "0"}),
        "/dev/zero is missing",
    ),
    "a name of any length": (
        lambda a: edit(a, files=read_sidecar(a)["files"] | {"x" * 300: "0"}),
        "cannot read x+: File name too long",
    ),
    "unlisted": (
        lambda a: edit(a, files={"tfb.safetensors": "0", "adapter_config.json": "0"}),
        r"files does not list adapter_model\.safetensors",
    ),
    "layers beyond the factors": (
        lambda a: edit(a, layers={"model.layers.7.mlp.up_proj": 2.0}),
        r"tfb\.safetensors lacks model\.layers\.7\.mlp\.up_proj\.A, model",
    ),
    "factors beyond the layers": (
        lambda a: edit(a, layers=dict([*read_sidecar(a)["layers"].items()][1:])),
        r"tfb\.safetensors has also model\.layers\.0\.self_attn\.q_proj\.A, model",
    ),
    "NaN factors": (lambda a: refactor(a, B=lambda t: t * math.nan), "are none of this adapter"),
    "negative d": (lambda a: refactor(a, d=lambda t: -t), "are none of this adapter"),
    "other dtype": (lambda a: refactor(a, A=torch.Tensor.half), "are none of this adapter"),
    "one dimension": (lambda a: refactor(a, d=lambda t: t[0]), "are none of this adapter"),
    "other width": (lambda a: refactor(a, A=lambda t: t[:, 1:].clone()), "are none of this"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_damaged_artifacts(artifact: Path, fault: str) -> None:
    """All of it is read before a model is: there is no such base."""
    spoil, message = SPOILT[fault]
    spoil(artifact)
    with pytest.raises(ArtifactError, match=message) as caught:
        tfb.load("no/such/base", artifact)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


HUGE = 10**400
DECIDED = asdict(Decisions(300, 10, target_error=0.1, threshold=0.7, accepted=0.8, error=0.05))
# By field, what it cannot be.
IMPOSSIBLE: dict[str, list[Any]] = {
    "sigma": [None, "x", True, math.nan, -1, HUGE, [0.1]],
    "temperature": [0, math.nan, "x", HUGE, None],
    "mode": ["half", None, 1],
    "tail": ["x", -3, 0, 1.5, HUGE],
    "seed": ["x", HUGE, -HUGE, 1 << 63, 0.5, True, None],
    "length_normalization": ["words", 1],
    "task": ["TOKEN_CLS", 7, None],
    "layers": [None, [], {}, {"a": "x"}, {"a": math.inf}, {"a": HUGE}, {"a": None}],
    "layer_scales": [3, {"a": "x"}],
    "base": [None, "x", {"model_type": "llama"}],
    "base.model_type": [None, 1],
    "base.shapes_sha256": [None, 1],
    "base.name": [5, ["x"]],
    "base.tensors": [[1.0], {"a": 1.0}, {"a": ["x"]}, {"a": [None]}],
    "base.mean_magnitudes": [[1.0], {"a": "x"}],
    "files": [None, [], {"tfb.safetensors": 3}],
    "labels": ["ab", [1, 2], {"a": 1}],
    "label_tokens": ["first", 1, None],
    "decisions": [[], {"x": 1}, DECIDED | {"threshold": "a"}, DECIDED | {"target_error": 2}]
    + [DECIDED | {"draws": n} for n in (0, "10", HUGE)],
    "fit": [[], {}, "x"],
    "fit.sigma": ["x", None, -1],
    "fit.curve": [[], [3], [{"sigma": 0.0}], [{"sigma": 1, "loss": 1, "standard_error": None}]],
    "fit.interval": [[1], [None, 1.0], 3],
    "fit.notes": ["x", [1]],
    "fit.draws": [2.5, "x"],
    "extra": [[], "x"],
    "extra.columns": [["a"], {"text": 1}],
    "versions": [[], {"tfb": 1}],
}


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_values_that_cannot_be(artifact: Path, field: str) -> None:
    """Each is refused in a line that names the field, though the sidecar has the right hash."""
    edit(artifact, fit=TEMPERED.to_dict(), extra={"columns": {"text": "x"}})
    sidecar, text = read_sidecar(artifact), (artifact / "tfb.json").read_text()
    name, _, inner = field.partition(".")
    for value in IMPOSSIBLE[field]:
        more = {"mode": "tail"} if field == "tail" else {}
        edit(artifact, **more, **{name: sidecar[name] | {inner: value} if inner else value})
        with pytest.raises(ArtifactError, match=rf"damaged.*({name}|no JSON value)") as caught:
            read_sidecar(artifact)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
        (artifact / "tfb.json").write_text(text)
    assert read_sidecar(artifact).keys() == sidecar.keys()


def test_files_of_an_artifact(tmp_path: Path) -> None:
    """Each that a result depends on is listed, the tokenizer's too; a card and Git's files are not.

    What transformers would read with the tokenizer may not be added either.
    """
    tokenizer = load_tokenizer(digits.BASE)
    folder = tfb.save(bayesian(), tmp_path / "artifact", tokenizer=tokenizer)
    listed = read_sidecar(folder)["files"]
    own = {*ADAPTER_FILES, "tfb.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert listed == {name: file_sha256(folder / name) for name in own}
    (folder / ".gitattributes").write_text("x")
    (folder / "README.md").write_text("ours")
    (folder / "scored").mkdir()
    (folder / "scored" / "tokenizer.json").write_text("{}")
    folder.rename(tmp_path / "moved")
    assert read_sidecar(tmp_path / "moved")["files"] == listed
    for name in own:
        path = tmp_path / "moved" / name
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        with pytest.raises(ArtifactError, match=f"moved: {name} has changed"):
            tfb.from_pretrained(tmp_path / "moved", "no/such/base")
        path.write_bytes(before)
    bare = tfb.save(bayesian(), tmp_path / "bare")
    for name in ("tokenizer_config.json", "chat_template.jinja", "config.json"):
        for made in (bare, tmp_path / "moved"):
            if name not in own or made == bare:
                (made / name).write_text("{}")
                with pytest.raises(ArtifactError, match=f"{name} was added since .*; remove it"):
                    tfb.from_pretrained(made, "no/such/base")
                (made / name).unlink()
    assert tfb.load(base(), bare).sigma == tfb.load(base(), tmp_path / "moved").sigma == 0.05


# --- another base model ---------------------------------------------------------------------------

CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "other signs": lambda t: -t,
    "other order": lambda t: t.flip(0),
    "1 % of further training": lambda t: 1.01 * t,
}


@pytest.mark.parametrize("kind", ["llama", "distilbert"])
def test_every_tensor_of_the_base_counts(kind: str) -> None:
    """A change of any one is seen, in whatever dtype a base is loaded; other dtypes are the same.

    Buffers hold the rotary angles, and with them rope_theta.
    """
    model, here = base(kind).float(), Path("here")
    saved = base_fingerprint(model)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name not in saved["tensors"]:
                assert name.endswith(".inv_freq")
                continue
            for change in CHANGES.values():
                before = tensor.clone()
                tensor.copy_(change(before))
                if torch.allclose(tensor.float(), before.float(), rtol=5e-3):
                    continue  # equal or symmetric elements
                with pytest.raises(ArtifactError, match=rf"first difference: {re.escape(name)}\)"):
                    check_base(here, saved, model)
                tensor.copy_(before)
    for dtype in (torch.bfloat16, torch.float16):
        check_base(here, saved, model.to(dtype))
        check_base(here, base_fingerprint(model), base(kind).float())


def test_values_between_two_of_bfloat16_are_the_same_base() -> None:
    """The worst case of rounding: all elements of a tensor by half a unit, to the same side."""
    model = base().float()
    for p in model.parameters():
        torch.nn.init.constant_(p, 1 + 2**-8)
    check_base(Path("here"), base_fingerprint(model), model.bfloat16())


@pytest.mark.parametrize(
    ("field", "value"),
    [("rms_norm_eps", 0.3), ("hidden_act", "relu"), ("max_position_embeddings", 2048)],
)
def test_another_configuration_is_another_base(artifact: Path, field: str, value: Any) -> None:
    other = base()
    setattr(other.config, field, value)
    with pytest.raises(ArtifactError, match=rf"another configuration \({field}: \S+ -> {value}\)"):
        tfb.load(other, artifact)


def test_a_part_has_a_configuration_of_its_own() -> None:
    """Its dtype does not count, its other fields do."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=size, vision_config=vision)
    model = transformers.Gemma3ForConditionalGeneration(config)
    saved = base_fingerprint(model) | {"settings": base_settings(model)}
    config.text_config.dtype = torch.bfloat16
    check_base(Path("here"), saved, model)
    config.text_config.rms_norm_eps = 0.5
    with pytest.raises(ArtifactError, match=r"\(text_config\.rms_norm_eps: 1e-06 -> 0\.5\)"):
        check_base(Path("here"), saved, model)


def test_what_of_a_configuration_does_not_count(artifact: Path) -> None:
    """Padding, names of classes, how attention is computed; fields of other versions."""
    other = base()
    other.config.pad_token_id, other.config.id2label = 3, {0: "a", 1: "b"}
    other.config.bos_token_id, other.config.eos_token_id = 1, 2  # as Trainer leaves them
    other.config.of_a_later_version = True
    tfb.load(other, artifact)


def test_other_weights_are_another_base(artifact: Path) -> None:
    for folder in (artifact, Path(__file__).parent / "artifact-0.1.0"):
        with pytest.raises(ArtifactError, match=r"other weights \(first difference: \S+\); load"):
            tfb.load(base(seed=9), folder)


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    bayes = bayesian()
    bayes.configure(sigma=0.1)
    with pytest.raises(ValueError, match=r"extra\.columns: expected an object"):
        tfb.save(bayes, tmp_path / "made", columns=["a"])
    assert not list(tmp_path.iterdir())


def test_offloaded_weights_have_no_fingerprint() -> None:
    with pytest.raises(ArtifactError, match="weights are on the meta device"):
        base_fingerprint(base().to("meta"))


def test_another_scaling_than_at_the_fit(tmp_path: Path) -> None:
    """An adapter_config.json of 0.1.0 has no hash in the sidecar."""
    folder = shutil.copytree(Path(__file__).parent / "artifact-0.1.0", tmp_path / "old")
    config = json.loads((folder / "adapter_config.json").read_text())
    for change in ({"lora_alpha": 3 * config["lora_alpha"]}, {"use_rslora": True}):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ArtifactError, match=r"the scaling \S+, but it was 2 at the fit; put"):
            tfb.load(base(), folder)


def test_other_shapes_are_another_base(artifact: Path) -> None:
    bigger = randomize(llama(vocab_size=80), 0)  # the adapter alone would fit
    with pytest.raises(
        ArtifactError, match=r"another base model \(llama; this one is llama with other parameters"
    ):
        tfb.load(bigger, artifact)
    wider = randomize(llama(hidden_size=32), 0)
    with pytest.raises(tfb.AdapterError, match="does not fit the base model"):
        tfb.load(wider, artifact)


def test_base_is_not_loaded_twice(artifact: Path) -> None:
    model = base()
    tfb.load(model, artifact)
    with pytest.raises(tfb.AdapterError, match="carries an adapter already"):
        tfb.load(model, artifact)
