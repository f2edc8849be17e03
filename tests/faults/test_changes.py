"""What changes between a run and its resume."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.cases import promised
from safetensors.torch import load_file, save_file
from support.command import Run
from support.files import edit, flip
from support.scoring import DONE, ROWS, files, manifest, small_job, stopping, write

from tfb.data.rows import RowError
from tfb.demo import digits
from tfb.scoring.job import Job
from tfb.scoring.output import Counts
from tfb.scoring.run import run

BASE, ARTIFACT, INPUT, OUTPUT = "base", "artifact", "rows.jsonl", "out"
SIDECAR = r"artifact_sha256|tfb\.json"
Change = Callable[[Path], Any]


@dataclass(frozen=True)
class Fault:
    """A change of one file, and what the refusal says."""

    file: str
    change: Change
    said: str


def value(file: str, said: str = "", **values: Any) -> Fault:
    """Set fields of a JSON file."""
    said = said or "|".join([Path(file).name, *values])
    return Fault(file, lambda path: edit(path, **values), said)


def flipped(file: str, said: str, at: int = -2) -> Fault:
    return Fault(file, lambda path: flip(path, at), said)


def gone(file: str, said: str) -> Fault:
    return Fault(file, Path.unlink, said)


def one_weight(path: Path) -> None:
    """Turn the last bit of one element of the last tensor."""
    tensors = load_file(path)
    last = tensors[max(tensors)].flatten()
    last.view(torch.int32)[last.numel() // 2] ^= 1
    save_file(tensors, path, {"format": "pt"})


def swapped_tokens(path: Path) -> None:
    rules = json.loads(path.read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(rules))


def shortened(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


@pytest.fixture
def begun(artifact: str, tmp_path: Path) -> Job:
    """A job that stopped after its first part, with an artifact and base of its own."""
    shutil.copytree(artifact, tmp_path / ARTIFACT)
    shutil.copytree(digits.BASE, tmp_path / BASE)
    job = replace(small_job(str(tmp_path / ARTIFACT), tmp_path), base=str(tmp_path / BASE))
    assert run(job, report=stopping(1, signal.SIGTERM)).status == "stopped"
    return job


CHANGES = {
    "the input: a byte": flipped(INPUT, r"rows\.jsonl has changed", 40),
    "the input: a row less": Fault(INPUT, shortened, r"rows\.jsonl has changed"),
    "the input: gone": gone(INPUT, r"rows\.jsonl"),
    "the adapter: lora_alpha": value(
        f"{ARTIFACT}/adapter_config.json", "adapter_config", lora_alpha=99
    ),
    "the adapter: use_rslora": value(
        f"{ARTIFACT}/adapter_config.json", "adapter_config", use_rslora=True
    ),
    "the adapter: a weight": flipped(f"{ARTIFACT}/adapter_model.safetensors", "adapter_model"),
    "the artifact: σ": value(f"{ARTIFACT}/tfb.json", SIDECAR, sigma=0.5),
    "the artifact: the mode": value(f"{ARTIFACT}/tfb.json", SIDECAR, mode="tail", tail=2),
    "the artifact: a factor": flipped(f"{ARTIFACT}/tfb.safetensors", r"tfb\.safetensors"),
    "the artifact: a list of hashes": value(f"{ARTIFACT}/tfb.json", SIDECAR, files={}),
    "the artifact: a tokenizer more": Fault(
        f"{ARTIFACT}/tokenizer_config.json", lambda path: path.write_text("{}"), "token"
    ),
    "the base: rms_norm_eps": value(f"{BASE}/config.json", rms_norm_eps=0.1),
    "the base: hidden_act": value(f"{BASE}/config.json", hidden_act="relu"),
    "the base: max_position_embeddings": value(f"{BASE}/config.json", max_position_embeddings=75),
    "the base: rope_theta": value(
        f"{BASE}/config.json", "rope|rotary", rope_parameters={"rope_theta": 5}
    ),
    "the base: one bit of a weight": Fault(f"{BASE}/model.safetensors", one_weight, "model_sha256"),
    "the base: its weights gone": gone(f"{BASE}/model.safetensors", "safetensors"),
    "the tokenizer: two tokens change places": Fault(
        f"{BASE}/tokenizer.json", swapped_tokens, "tokenizer"
    ),
    "the tokenizer: a chat template": value(
        f"{BASE}/tokenizer_config.json", "tokenizer|chat_template", chat_template="{{ messages }}"
    ),
    "manifest.json: a byte": flipped(f"{OUTPUT}/manifest.json", r"manifest\.json", 30),
    "manifest.json: cut": Fault(f"{OUTPUT}/manifest.json", shortened, r"manifest\.json"),
    "manifest.json: the records of a file": Fault(
        f"{OUTPUT}/manifest.json",
        lambda path: path.write_text(path.read_text().replace(": 21", ": 15")),
        r"manifest\.json",
    ),
    "SHA256SUMS: a digit": Fault(
        f"{OUTPUT}/SHA256SUMS",
        lambda path: path.write_text("0" * 64 + path.read_text()[64:]),
        "SHA256SUMS|part-",
    ),
    "SHA256SUMS: gone": gone(f"{OUTPUT}/SHA256SUMS", "SHA256SUMS"),
}


@promised(
    "a file changes between a run and its resume",
    "a refusal that names it, before anything is written; with the file put back the parts are "
    "byte for byte those of an undisturbed run",
    CHANGES,
)
def test_changed_and_resumed(
    begun: Job, whole: dict[str, bytes], tmp_path: Path, fault: Fault
) -> None:
    path, before = tmp_path / fault.file, files(begun)
    was = path.read_bytes() if path.exists() else None
    fault.change(path)
    with pytest.raises(ValueError, match=fault.said):
        run(begun, resume=True)
    assert files(begun) == before
    path.unlink(missing_ok=True) if was is None else path.write_bytes(was)
    assert run(begun, resume=True) == DONE
    assert files(begun) == whole


PARTS: dict[str, Change] = {
    "a bit": lambda path: flip(path, 40),
    "a bit of its end": lambda path: flip(path, -6),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "empty": lambda path: path.write_bytes(b""),
    "another part's rows": lambda path: shutil.copy(max(path.parent.glob("part-*")), path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "of another name": lambda path: path.rename(path.with_stem("part-00009-00000000")),
}


@promised(
    "a part changes",
    "`--resume` and `tfb verify` refuse it by name; removed, its rows are scored again, byte for "
    "byte",
    {
        f"{name} ({kind})": (change, kind)
        for kind in ("jsonl", "parquet")
        for name, change in PARTS.items()
    },
)
def test_changed_parts(job: Job, tfb_command: Run, fault: tuple[Change, str]) -> None:
    change, kind = fault
    job = replace(job, format=kind)
    assert run(job) == DONE
    before = files(job)
    assert tfb_command("verify", job.output)[0] == 0
    path = Path(job.output) / next(iter(before))
    change(path)
    code, out, err = tfb_command("verify", job.output)
    assert code == 1 and "part-0000" in out + err and "Traceback" not in err
    with pytest.raises(ValueError, match=r"part-0000"):
        run(job, resume=True)
    for left in [path, *Path(job.output).glob("part-00009*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    assert run(job, resume=True) == DONE
    assert files(job) == before and tfb_command("verify", job.output)[0] == 0


def others(text: bytes) -> bytes:
    """Other rows in as many lines and bytes."""
    return b"".join(reversed(text.splitlines(keepends=True)))


def in_its_place(path: Path, text: bytes) -> None:
    new = path.with_name("new")
    new.write_bytes(others(text))
    new.replace(path)


WHILE_READ: dict[str, Callable[[Path, bytes], Any]] = {
    "rows taken away": lambda path, text: path.write_bytes(text[:900]),
    "overwritten by as many rows": lambda path, text: path.write_bytes(others(text)),
    "another file of as many rows in its place": in_its_place,
    "removed": lambda path, _: path.unlink(),
}


@promised(
    "the input changes while it is read",
    "a refusal that names it; what was done stays, and with the file as it was the run goes on",
    WHILE_READ,
)
def test_an_input_that_changes_while_it_is_read(
    job: Job, whole: dict[str, bytes], fault: Callable[[Path, bytes], Any]
) -> None:
    path = Path(job.inputs[0])
    text = path.read_bytes()

    def change(counts: Counts, _: int) -> None:
        if counts.rows == 6:
            fault(path, text)

    with pytest.raises(RowError, match=r"rows\.jsonl: has changed while it was read"):
        run(job, report=change)
    assert manifest(job)["status"] == "running"
    assert files(job) and files(job).items() < whole.items()
    with pytest.raises(RowError, match=r"rows\.jsonl( has changed \(|: there is no such file)"):
        run(job, resume=True)
    path.write_bytes(text)
    assert run(job, resume=True) == DONE and files(job) == whole


@promised(
    "ids stand twice",
    "an unchanged input is always gone on with",
    ["good rows of one id", "a faulty and a good row of one id", "with a damaged part removed"],
)
def test_resumed_whatever_the_ids(job: Job) -> None:
    rows = [{**row, "id": str(n % 3)} for n, row in enumerate(ROWS)]
    write(Path(job.inputs[0]), [{"id": "1"}, *rows[:10], {"id": "2", "prompt": ""}, *rows[10:]])
    assert run(job, max_error_rate=1).counts.errors == 2
    before = files(job)
    assert run(job, resume=True, max_error_rate=1).counts.rows == 23
    for name in before:
        (Path(job.output) / name).unlink()
        assert run(job, resume=True, max_error_rate=1).counts.rows == 23
        assert files(job) == before
