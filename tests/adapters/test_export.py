"""Sampled adapters: PEFT, which knows nothing of a posterior, computes the engine's draws."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import Run
from support.models import (
    CASES,
    LLAMA,
    Case,
    causal,
    exact,
    llama,
    naive,
    randomize,
    relative,
    run,
    sampled,
)
from torch import Tensor

import tfb
from tfb import AdapterError, ArtifactError, BayesianModel, Draws
from tfb.adapters import export as exporting
from tfb.adapters.artifact import file_sha256, read_sidecar
from tfb.adapters.loading import load_tokenizer
from tfb.data.readers import read_rows
from tfb.demo import digits
from tfb.scoring.evaluate import encode, predict_rows
from tfb_kernels import NOISE_VERSION, gaussian_noise

# PEFT 0.21's own advice while saving; see test_adapters.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter '.*'. .* invalid shape:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]

# Two orders of operations on the same float64 numbers: see test_convert.
EXACT = 1e-10
SIGMA, SEED = 0.05, 5
# k and v have 8 rows, fewer than the rank: directions that B does not span get no noise.
ALL = {**CASES, "rank_above_rows": Case(llama, causal(r=12))}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def bayesian(kind: str = "llama", *, double: bool = False, **arguments: Any) -> BayesianModel:
    model = ALL[kind].build()
    bayes = tfb.bayesianize(exact(model) if double else model, seed=SEED, **arguments)
    bayes.configure(sigma=SIGMA)
    return bayes


def base(kind: str = "llama", *, double: bool = False) -> Any:
    """The base model alone, as ``bayesian`` has it."""
    model = randomize(ALL[kind].base(), 0).to(ALL[kind].base_dtype).eval()
    return exact(model) if double else model


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return found


def draw_folders(folder: Path) -> list[Path]:
    return [folder / draw["folder"] for draw in manifest(folder)["draws"]]


def serve(base_model: Any, folders: list[Path], call: Callable[[Any], Tensor]) -> Tensor:
    """``call`` of each adapter [S, ...], all of them in one PEFT model, as a server holds them."""
    model = peft.PeftModel.from_pretrained(base_model, folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(folder, folder.name)
    found = []
    for folder in folders:
        # PEFT may save an adapted output embedding's base weight beside the adapter's own tensors.
        needed, known = (
            peft.get_peft_model_state_dict(
                model, adapter_name=folder.name, save_embedding_layers=embeddings
            )
            for embeddings in (False, True)
        )
        assert needed.keys() <= load_file(folder / WEIGHTS).keys() <= needed.keys() | known.keys()
        model.set_adapter(folder.name)
        found.append(call(model.eval()))
    return torch.stack(found)


def scored(logits: Tensor) -> Tensor:
    """[..., K] of the scored position: left-padded causal models have it last."""
    return logits[..., -1, :] if logits.dim() == 4 else logits


# --- they are the engine's draws ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_each_adapter_is_a_draw_of_the_engine(tmp_path: Path, kind: str) -> None:
    """Logits of every draw, and the averaged probabilities, in float64."""
    bayes, batch = bayesian(kind, double=True), ALL[kind].batch()
    folder = tfb.export(bayes, tmp_path / "out", draws=4)
    logits = serve(base(kind, double=True), draw_folders(folder), lambda m: run(m, batch))
    draws = Draws.antithetic(4, SIGMA, seed=SEED)
    expected = sampled(bayes, draws, batch)
    assert relative(logits, expected) < EXACT
    assert relative(expected[0], expected[2]) > 1e-3  # the noise did reach the model
    mean = scored(logits).softmax(-1).mean(0)
    assert relative(mean, bayes.predict(batch, draws).probs) < EXACT


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama_classifier"])
def test_float32_files_cost_no_accuracy(tmp_path: Path, kind: str) -> None:
    """No further from the float64 truth than twice the engine's own float32 rounding.

    The typical (geometric mean) row of several models is compared: see test_convert.
    """
    case, draws = ALL[kind], Draws.antithetic(2, SIGMA, seed=SEED)
    engine, files = [], []
    for seed in range(0, 40, 10):
        batch = case.batch(*[3, 5, 7, 4] * 2, seed=seed)
        bayes = tfb.bayesianize(case.build(seed), seed=SEED)
        folder = tfb.export(bayes, tmp_path / str(seed), draws)
        truth = naive(
            exact(case.build(seed)), bayes.posteriors, draws, lambda m, b=batch: run(m, b)
        )
        found = serve(
            randomize(case.base(), seed).eval(), draw_folders(folder), lambda m, b=batch: run(m, b)
        )
        for errors, logits in ((files, found), (engine, sampled(bayes, draws, batch))):
            errors.append((logits.double() - truth).flatten(2).abs().amax(-1).flatten())
    tiny = torch.finfo(torch.float32).eps
    ours, budget = ((torch.cat(e) + tiny).log().mean().exp() for e in (files, engine))
    assert ours <= 2 * budget


def test_a_pair_is_the_mean_and_twice_the_noise(tmp_path: Path) -> None:
    """lora_A of +sigma and -sigma: half their sum is A', half their difference (sigma / d) o E."""
    bayes = bayesian("rank_above_rows")
    plus, minus = (
        load_file(f / WEIGHTS) for f in draw_folders(tfb.export(bayes, tmp_path / "out", 2))
    )
    assert plus.keys() == minus.keys()
    silent = 0
    for name, p in bayes.posteriors.items():
        key = f"base_model.model.{name}.lora_"
        A, B = (tensors[f"{key}A.weight"].double() for tensors in (plus, minus))
        ulp = torch.finfo(torch.float32).eps * torch.maximum(A.abs(), B.abs())
        assert bool(((A + B) / 2 - p.A.double()).abs().le(ulp).all())
        E = gaussian_noise(SEED, p.layer_id, (0,), *p.A.shape)[0].double()
        noise = SIGMA * p.inv_d[:, None] * E
        assert bool(((A - B) / 2 - noise).abs().le(ulp).all())
        silent += int((noise == 0).all(1).sum())
        assert torch.equal(plus[f"{key}B.weight"], p.B)
        assert torch.equal(minus[f"{key}B.weight"], p.B)
    assert silent == 2 * 2 * 4  # rank 12, 8 rows, k and v of two blocks


def test_sigma_zero_is_the_adapter(tmp_path: Path) -> None:
    bayes, batch = bayesian(double=True), CASES["llama"].batch()
    bayes.configure(sigma=0.0)
    folder = tfb.export(bayes, tmp_path / "out", 2)
    assert manifest(folder)["rounding"] is None
    assert [d["sign"] for d in manifest(folder)["draws"]] == [0, 0]
    logits = serve(base(double=True), draw_folders(folder), lambda m: run(m, batch))
    mean = run(exact(CASES["llama"].build()), batch)
    assert relative(logits, torch.stack([mean, mean])) < EXACT


# --- what is copied -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rslora", "patterns", "gpt2", "llama_classifier", "lora_bias"])
def test_all_but_the_sampled_weights_is_the_sources(tmp_path: Path, kind: str) -> None:
    """Configuration, modules without noise, biases and heads, byte for byte."""
    source = tmp_path / "source"
    ALL[kind].build().save_pretrained(source)
    bayes = tfb.bayesianize(tfb.load_adapter(base(kind), source), layers=r"\.1\.")
    bayes.configure(sigma=SIGMA)
    bayes.source = source
    stored = load_file(source / WEIGHTS)
    keys = {f"base_model.model.{n}.lora_{x}.weight" for n in bayes.posteriors for x in "AB"}
    assert keys < stored.keys()
    for folder in draw_folders(tfb.export(bayes, tmp_path / "out", 2)):
        assert {p.name for p in folder.iterdir()} == {CONFIG, WEIGHTS}
        assert (folder / CONFIG).read_bytes() == (source / CONFIG).read_bytes()
        found = load_file(folder / WEIGHTS)
        assert found.keys() == stored.keys()
        for key, tensor in stored.items():
            if key not in keys:
                assert torch.equal(found[key], tensor)
            elif "lora_A" in key:  # B' is B where the rank is 1
                assert not torch.equal(found[key], tensor)


def test_an_adapter_of_another_name(tmp_path: Path) -> None:
    """PEFT saves it in a subfolder; the files name no adapter."""
    model = peft.get_peft_model(
        randomize(llama(), 0), peft.LoraConfig(**causal()), adapter_name="other"
    )
    bayes = tfb.bayesianize(randomize(model, 1, ".other.").eval(), "other")
    folder = tfb.export(bayes, tmp_path / "out", Draws.antithetic(2, SIGMA))
    batch = CASES["llama"].batch()
    logits = serve(base(), draw_folders(folder), lambda m: run(m, batch))
    assert relative(logits, sampled(bayes, Draws.antithetic(2, SIGMA), batch)) < 1e-4


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "written"),
    [
        ("auto", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("float32", torch.float32),
        ("float64", torch.float64),
    ],
)
def test_precision_of_the_files(tmp_path: Path, dtype: str, written: torch.dtype) -> None:
    """Of the sampled weights; rounding over noise is that of the dense updates."""
    source = tmp_path / "source"
    CASES["llama_classifier"].build().save_pretrained(source)
    stored = {k: v.bfloat16() for k, v in load_file(source / WEIGHTS).items()}
    save_file(stored, source / WEIGHTS, {"format": "pt"})
    bayes = tfb.bayesianize(tfb.load_adapter(base("llama_classifier"), source))
    bayes.source = source
    draws = Draws.antithetic(2, SIGMA, seed=SEED)
    folder = tfb.export(bayes, tmp_path / "out", draws, dtype=dtype)
    assert manifest(folder)["dtype"] == [str(written).removeprefix("torch.")]
    assert manifest(folder)["temperature"] == 1.0
    error = noise = 0.0
    for draw, sigma in zip(draw_folders(folder), draws.sigmas, strict=True):
        found = load_file(draw / WEIGHTS)
        for key, tensor in found.items():
            assert tensor.dtype == (written if "lora_" in key else torch.bfloat16)
        for name, p in bayes.posteriors.items():
            A, B = (found[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
            sample = p.sample(sigma, 0, SEED)
            error += float((p.scaling * (B @ A) - sample).square().sum())
            noise += float((sample - p.mean()).square().sum())
    # The squares themselves are float64 roundings where nothing is rounded.
    assert manifest(folder)["rounding"] == pytest.approx(
        (error / noise) ** 0.5, rel=1e-6, abs=1e-12
    )


def test_overflow_is_refused(tmp_path: Path) -> None:
    bayes = bayesian()
    bayes.configure(sigma=1e6)
    with pytest.raises(ArtifactError, match=r"overflow torch.float16; choose bfloat16 or float32"):
        tfb.export(bayes, tmp_path / "out", 2, dtype="float16")
    assert list(tmp_path.iterdir()) == []


# --- the manifest ---------------------------------------------------------------------------------


def test_manifest_says_what_was_sampled(tmp_path: Path) -> None:
    bayes = bayesian()
    artifact = tfb.save(bayes, tmp_path / "artifact")
    loaded = tfb.load(base(), artifact)
    folder = tfb.export(loaded, tmp_path / "out", 12)
    found = manifest(folder)
    assert {p.name for p in folder.iterdir()} == {"export.json"} | {
        f"draw-{i:02d}" for i in range(12)
    }
    assert (found["sigma"], found["seed"], found["noise_version"]) == (SIGMA, SEED, NOISE_VERSION)
    assert found["adapter_sha256"] == read_sidecar(artifact)["files"][WEIGHTS]
    assert found["artifact_sha256"] == {
        name: file_sha256(artifact / name) for name in ("tfb.json", "tfb.safetensors")
    }
    draws = Draws.antithetic(12, SIGMA, seed=SEED)
    assert [d["sigma"] for d in found["draws"]] == list(draws.sigmas)
    assert [d["stream"] for d in found["draws"]] == list(draws.streams)
    assert [d["sign"] for d in found["draws"]] == [1, -1] * 6
    for draw in found["draws"]:
        assert draw["sha256"] == file_sha256(folder / draw["folder"] / WEIGHTS)
    # The same draws are the same files; another seed shares none of them.
    again = manifest(tfb.export(bayes, tmp_path / "again", draws))
    assert [d["sha256"] for d in again["draws"]] == [d["sha256"] for d in found["draws"]]
    assert again["artifact_sha256"] is None  # that model was not loaded from one
    other = manifest(tfb.export(bayes, tmp_path / "other", Draws.antithetic(2, SIGMA, seed=6)))
    assert {d["sha256"] for d in other["draws"]}.isdisjoint(d["sha256"] for d in found["draws"])


def test_base_model_is_named(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    name, bayes = str(tmp_path / "base"), bayesian()
    bayes.model.peft_config["default"].base_model_name_or_path = name
    tfb.save(bayes, tmp_path / "artifact")
    folder = tfb.export(tfb.load(name, tmp_path / "artifact"), tmp_path / "out", 2)
    assert manifest(folder)["base_model"] == name


# --- refusals -------------------------------------------------------------------------------------


def test_refusals_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bayes, out = bayesian(), tmp_path / "out"

    def refused(error: type[Exception], message: str, *draws: Any, **arguments: Any) -> None:
        with pytest.raises(error, match=message):
            tfb.export(bayes, out, *draws, **arguments)
        assert list(tmp_path.iterdir()) == []

    refused(ValueError, "draws=3: antithetic draws come in pairs", 3)
    refused(ValueError, "at least one draw", 0)
    refused(ValueError, "dtype='int8': expected one of auto, float16", 2, dtype="int8")
    refused(ValueError, "needs weight noise", Draws.antithetic(2, SIGMA, noise="token"))
    bayes.configure(sigma=None)
    refused(ValueError, "sigma is not set", 2)
    bayes.configure(sigma=SIGMA)
    bayes.configure(mode="tail", tail=1)
    refused(ArtifactError, r"searched with mode='tail' \(tail=1\), noise at the last", 2)
    bayes.configure(mode="full")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "lora_keys", lambda name: (f"{name}.down", f"{name}.up"))
        refused(AdapterError, r"layers.0.self_attn.q_proj: the adapter's file has no .*down", 2)
    bayes.remove()
    refused(ValueError, "does not carry this posterior any more", 2)


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def save(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(exporting, "save_file", save)
    with pytest.raises(OSError, match="No space left"):
        tfb.export(bayesian(), tmp_path / "out", 4)
    assert len(written) == 2 and list(tmp_path.iterdir()) == []


def test_folders_that_hold_something_are_kept(tmp_path: Path) -> None:
    held, empty = tmp_path / "held", tmp_path / "empty"
    held.mkdir()
    empty.mkdir()
    (held / "kept").write_text("mine")
    with pytest.raises(ArtifactError, match="already holds something"):
        tfb.export(bayesian(), held, 2)
    assert [p.name for p in held.iterdir()] == ["kept"]
    assert len(draw_folders(tfb.export(bayesian(), empty, 2))) == 2


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def command(tfb_command: Run) -> Run:
    """Exit status, stdout and stderr of ``tfb export`` in this process."""
    return partial(tfb_command, "export")


def test_command_line_round_trip(shared: Path, tmp_path: Path, command: Run) -> None:
    """A real adapter: plain PEFT over the files predicts what tfb predicts, row by row."""
    model = shared / "models" / "stories260K"
    adapter = shared / "adapters" / "stories260K-clinc-domain"
    bayes = tfb.bayesianize(tfb.load_adapter(tfb.load_base(model, adapter), adapter))
    bayes.configure(sigma=0.012)
    bayes.source, bayes.label_tokens = adapter, "last"
    tfb.save(bayes, tmp_path / "artifact")
    code, out, err = command(
        tmp_path / "artifact",
        "--output",
        tmp_path / "out",
        "--draws",
        4,
        "--seed",
        7,
    )
    assert code == 0 and "4 adapters, sigma = 0.012; rounding " in out, err
    assert manifest(tmp_path / "out")["base_model"] == "stories260K"

    tokenizer = load_tokenizer(str(model))
    rows = read_rows(shared / "data" / "clinc-domain" / "test.jsonl", limit=30)
    encoded = encode(bayes, rows, tokenizer)
    draws = Draws.antithetic(4, 0.012, seed=7)
    expected = predict_rows(bayes, encoded, draws).probs

    @torch.no_grad()
    def labels(served: Any) -> Tensor:
        found = []
        assert encoded.label_ids is not None
        for ids, columns in zip(encoded.input_ids, encoded.label_ids, strict=True):
            logits = served(input_ids=torch.tensor([ids])).logits[0, -1]
            found.append(logits[list(columns)].softmax(-1))
        return torch.stack(found)

    served = serve(tfb.load_base(model, adapter), draw_folders(tmp_path / "out"), labels)
    # Probabilities: float32 through five blocks of width 64, amplified by attention.
    assert float((served.mean(0) - expected).abs().max()) < 1e-4
    assert float((served[0] - served[2]).abs().max()) > 1e-2


def test_command_line_refuses_before_it_loads(
    tmp_path: Path,
    command: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tfb.load_adapter(tfb.load_base(digits.BASE, digits.ADAPTER), digits.ADAPTER)
    bayes = tfb.bayesianize(model)
    bayes.configure(sigma=0.008)
    bayes.source = Path(digits.ADAPTER)
    bayes.configure(mode="tail", tail=1)
    tfb.save(bayes, tmp_path / "tail")

    def loaded(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tfb.adapters.artifact.load", loaded)
    common = (tmp_path / "tail",)
    for arguments, message in (
        (("--output", tmp_path), "already holds something"),
        (("--output", tmp_path / "o", "--draws", 5), "--draws 5: antithetic draws come in pairs"),
        (("--output", tmp_path / "o", "--dtype", "int8"), "--dtype int8: expected one of"),
        (("--output", tmp_path / "o"), "noise at the last positions only"),
        (("--output", tmp_path / "o", "--mode", "full", "--seed", 1 << 63), "signed 64-bit"),
    ):
        code, _, err = command(*common, *arguments)
        assert code == 1 and message in err, err
    assert not (tmp_path / "o").exists()
    monkeypatch.undo()
    code, _, err = command(*common, "--mode", "full", "--draws", 2, "--output", tmp_path / "o")
    assert code == 0 and len(draw_folders(tmp_path / "o")) == 2, err


def test_llama_targets_are_all_exported(tmp_path: Path) -> None:
    """The suite's own premise: every linear layer of a block is sampled."""
    posteriors = bayesian().posteriors
    assert {n.rsplit(".", 1)[1] for n in posteriors} == set(LLAMA)
