"""Files of strangers: refused in one line, or read; never run, never a crash."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from faults.cases import promised
from faults.strategies import DAMAGE, SIMPLE, csv_file, damaged, json_list, jsonl, nested, typed
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.children import Answer, Children
from support.files import Trap, edit
from support.scoring import write

import tfb
from tfb.adapters.loading import load_adapter, load_base, load_tokenizer
from tfb.cli import app as cli
from tfb.data.readers import count_records, read
from tfb.demo import digits

FUZZED = int(os.environ.get("TFB_FUZZ", "10000")) // 50  # files of each format
REFUSALS = {"AdapterError", "ArtifactError", "RowError", "OutputError"}


@pytest.fixture
def folder(artifact: str, tmp_path: Path) -> Path:
    """A base, its adapter and an artifact of both, to be spoilt."""
    for name, source in (
        ("base", digits.BASE),
        ("adapter", digits.ADAPTER),
        ("artifact", artifact),
    ):
        shutil.copytree(source, tmp_path / name)
    return tmp_path


def load_all(folder: str, of: str = "", hexed: str | None = None) -> str:
    """Load what is in a folder, where a user would stand, with the bytes of one file replaced."""
    os.chdir(folder)
    sys.path[0] = ""  # as with python -m tfb
    if hexed is not None:
        Path(of).write_bytes(bytes.fromhex(hexed))
    load_tokenizer("base")
    if not of or of.startswith("adapter"):
        tfb.bayesianize(load_adapter(load_base("base", "adapter"), "adapter"))
    if not of.startswith("adapter"):
        tfb.load("base", "artifact")
    return "loaded"


def run_command(folder: str, *words: str) -> list[Any]:
    """Exit status of the command, what it leaves as a traceback included, and what it says."""
    os.chdir(folder)
    sys.argv = ["tfb", *words]
    os.environ["COLUMNS"] = "10000"
    with Path("said.txt").open("w") as said:
        os.dup2(said.fileno(), 2)
    try:
        cli.main()
    except SystemExit as left:
        sys.stderr.flush()
        return [left.code or 0, Path("said.txt").read_text()]


def refused(answer: Answer, said: str) -> None:
    """The answer is one of our errors, and its message holds one of these words."""
    assert answer.error is not None and answer.signal is None, answer
    assert "ValueError" in answer.kinds, answer
    assert any(word in answer.error for word in said.split("|")), (said, answer.error)


# --- what would run code --------------------------------------------------------------------------


def trap(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps({"x": Trap(mark)}))


def module(folder: Path, mark: Path, name: str) -> None:
    """A package in the present folder, whose import is seen."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(f"open({str(mark)!r}, 'w')\n")


def pickled_adapter(folder: Path, mark: Path) -> None:
    (folder / "adapter/adapter_model.safetensors").unlink()
    trap(folder / "adapter/adapter_model.bin", mark)


def pickled_base(folder: Path, mark: Path) -> None:
    (folder / "base/model.safetensors").unlink()
    trap(folder / "base/pytorch_model.bin", mark)


def pickles_of_another_name(folder: Path, mark: Path) -> None:
    trap(folder / "base/model.safetensors", mark)


def index(folder: Path, shard: str) -> None:
    """Let an index name the file of every weight."""
    weights = folder / "base/model.safetensors"
    keys = load_file(weights)
    weights.rename(folder / "base/1.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, shard)})
    (folder / "base/model.safetensors.index.json").write_text(text)


def index_to_a_pickle(folder: Path, mark: Path) -> None:
    index(folder, "weights.bin")
    trap(folder / "base/weights.bin", mark)


def index_out_of_the_folder(folder: Path, mark: Path) -> None:
    shutil.copy(folder / "base/model.safetensors", folder / "elsewhere.safetensors")
    index(folder, "../elsewhere.safetensors")


def absolute_index(folder: Path, mark: Path) -> None:
    shutil.copy(folder / "base/model.safetensors", folder / "elsewhere.safetensors")
    index(folder, str(folder / "elsewhere.safetensors"))


def own_code(folder: Path, mark: Path) -> None:
    (folder / "base/theirs.py").write_text(f"open({str(mark)!r}, 'w')\n")
    code = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}
    edit(folder / "base/config.json", model_type="theirs", auto_map=code)


def own_tokenizer(folder: Path, mark: Path) -> None:
    (folder / "base/theirs.py").write_text(f"open({str(mark)!r}, 'w')\n")
    code = {"AutoTokenizer": ["theirs.T", None]}
    edit(folder / "base/tokenizer_config.json", tokenizer_class="Theirs", auto_map=code)
    edit(folder / "base/config.json", model_type="theirs")


def megatron(folder: Path, mark: Path) -> None:
    module(folder, mark, "theirs")
    edit(folder / "adapter/adapter_config.json", megatron_config={"a": 1}, megatron_core="theirs")


def default_megatron(folder: Path, mark: Path) -> None:
    module(folder, mark, "megatron")
    (folder / "megatron/core.py").write_text("")
    edit(folder / "adapter/adapter_config.json", megatron_config={"a": 1})


def kernels(field: str) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, mark: Path) -> None:
        module(folder, mark, "kernels")
        edit(folder / "base/config.json", **{field: "somebody/kernels"})

    return spoil


TRAPS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a pickled adapter": (pickled_adapter, "adapter_model.safetensors"),
    "a pickled base": (pickled_base, "model.safetensors"),
    "a pickle named `model.safetensors`": (pickles_of_another_name, "base"),
    "`model.safetensors.index.json` to a .bin": (index_to_a_pickle, "weights.bin"),
    "`model.safetensors.index.json` to ../": (index_out_of_the_folder, "elsewhere"),
    "`model.safetensors.index.json` to /": (absolute_index, "index.json"),
    "a model's own code": (own_code, "base"),
    "a tokenizer's own code": (own_tokenizer, "base"),
    "`megatron_core`": (megatron, "megatron"),
    "`megatron_config`": (default_megatron, "megatron"),
    **{
        f"`{field}`": (kernels(field), field)
        for field in ("attn_implementation", "_attn_implementation", "experts_implementation")
    },
}


@promised("a file would run code", "a refusal that names it; nothing is run or unpickled", TRAPS)
def test_traps(
    folder: Path, in_child: Children, fault: tuple[Callable[[Path, Path], None], str]
) -> None:
    spoil, said = fault
    spoil(folder, folder / "ran")
    refused(in_child("faults.test_hostile_files:load_all", str(folder)), said)
    assert not (folder / "ran").exists()


@promised("a file would run code", "it loads; nothing is imported", ["`auto_mapping`"])
def test_auto_mapping(folder: Path, in_child: Children) -> None:
    """Only PEFT's AutoPeftModel acts upon it."""
    module(folder, folder / "ran", "theirs")
    named = {"base_model_class": "Theirs", "parent_library": "theirs"}
    edit(folder / "adapter/adapter_config.json", auto_mapping=named)
    answer = in_child("faults.test_hostile_files:load_all", str(folder))
    assert answer.value == "loaded" and not (folder / "ran").exists(), answer


# --- weights that are none ------------------------------------------------------------------------


def changed(change: Callable[[torch.Tensor], torch.Tensor], of: str = "lora_A") -> Any:
    """Change the first tensor of a name in the adapter."""

    def spoil(folder: Path) -> None:
        path = folder / "adapter/adapter_model.safetensors"
        tensors = load_file(path)
        key = next(key for key in sorted(tensors) if of in key)
        save_file({**tensors, key: change(tensors[key])}, path, {"format": "pt"})

    return spoil


def of_base(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Any:
    def spoil(folder: Path) -> None:
        path = folder / "base/model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return spoil


def twice_in_shards(folder: Path) -> None:
    """The other one holds zeros."""
    index(folder, "1.safetensors")
    zeros = torch.zeros_like(load_file(folder / "base/1.safetensors")[NORM])
    save_file({NORM: zeros}, folder / "base/2.safetensors", {"format": "pt"})
    path = folder / "base/model.safetensors.index.json"
    edit(path, weight_map=json.loads(path.read_text())["weight_map"] | {"x": "2.safetensors"})


NORM, MORE = "model.norm.weight", "model.layers.0.self_attn.q_norm.weight"
WEIGHTS: dict[str, tuple[Callable[[Path], None], str]] = {
    **{
        f"LoRA weights in {kind}": (changed(lambda t, to=kind: t.to(getattr(torch, to))), "lora_A")
        for kind in ("int8", "bool", "uint8", "int64", "complex64")
    },
    "LoRA weights with NaN": (changed(lambda t: t.mul(torch.nan)), "lora_A"),
    "LoRA weights with Inf": (changed(lambda t: t + torch.inf), "lora_A"),
    "LoRA weights of another shape": (changed(lambda t: t[:, :-1].contiguous()), "lora_A"),
    "LoRA weights without rows": (changed(lambda t: t[:0].contiguous()), "lora_A|adapter"),
    "a base that lacks a tensor": (
        of_base(lambda t: {k: v for k, v in t.items() if k != NORM}),
        NORM,
    ),
    "a base without any": (of_base(lambda t: {"x": torch.zeros(1)}), "base"),
    "a base with a tensor more in a block": (of_base(lambda t: {**t, MORE: torch.zeros(1)}), MORE),
    "a base with a tensor of another shape": (
        of_base(lambda t: {**t, NORM: torch.zeros(3)}),
        NORM,
    ),
    **{
        f"a base with weights in {kind}": (
            of_base(lambda t, to=kind: {**t, NORM: t[NORM].to(getattr(torch, to))}),
            f"{NORM} is",
        )
        for kind in ("int8", "bool", "complex64")
    },
    "a base with a tensor in two shards": (twice_in_shards, f"{NORM} stands in"),
    "a base whose layers are less": (
        lambda folder: edit(folder / "base/config.json", num_hidden_layers=1),
        "base|layers",
    ),
    "a base whose layers are more": (
        lambda folder: edit(folder / "base/config.json", num_hidden_layers=30),
        "base|layers",
    ),
}


@promised(
    "weights are not what they should be",
    "a refusal that names the tensor; no weight is made up, none is passed over",
    WEIGHTS,
)
def test_weights(folder: Path, in_child: Children, fault: tuple[Any, str]) -> None:
    spoil, said = fault
    spoil(folder)
    refused(in_child("faults.test_hostile_files:load_all", str(folder)), said)


# --- JSON -----------------------------------------------------------------------------------------

TEXTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"a": ',
    "a list": b"[]",
    "null": b"null",
    "deep": nested(100_000).encode(),
    "deep within": b'{"x": ' + nested(100_000).encode() + b"}",
    "no UTF-8": b'{"x": "\xff"}',
    "UTF-16": '{"x": 1}'.encode("utf-16"),
    "NUL": b"\0" * 100,
    "many digits": b'{"r": ' + b"9" * 10_000 + b"}",
}
VALUES: list[Any] = [None, True, -1, 0, 10**9, 10**30, 1e308, "x", "", [], [[1]], {}, {"a": {}}]
JSON_FILES = [
    *("base/config.json", "base/tokenizer.json", "base/tokenizer_config.json"),
    *("base/generation_config.json", "adapter/adapter_config.json", "artifact/tfb.json"),
]


def spoilt(file: str, path: Path) -> list[tuple[str, bytes]]:
    """Texts in place of a JSON file: those of ``TEXTS``, and the file with a value exchanged."""
    values = json.loads(path.read_text())
    pairs = [(field, value) for field in values for value in VALUES]
    chosen = random.Random(file).sample(pairs, min(len(pairs), max(1, FUZZED // 4)))
    texts = [(f"{f}={v!r}", json.dumps({**values, f: v}).encode()) for f, v in chosen]
    return [*TEXTS.items(), *texts]


@promised(
    "a JSON file is none, or holds values of wrong types",
    "it is read, or refused with an error of one line that names the folder or file; no traceback, "
    "no hang, in less than 4 GiB",
    {f"`{name}`": name for name in JSON_FILES},
)
def test_json(folder: Path, in_child: Children, fault: str) -> None:
    texts = spoilt(fault, folder / fault)
    calls = [(str(folder), fault, data.hex()) for _, data in texts]
    wrong = []
    answers = in_child.each("faults.test_hostile_files:load_all", calls)
    for (name, _), answer in zip(texts, answers, strict=True):
        named = any(part in str(answer.error) for part in Path(fault).parts)
        ours = answer.value == "loaded" or ("ValueError" in answer.kinds and named)
        if answer.signal or not ours:
            wrong.append((name, answer))
    assert not wrong, (len(wrong), wrong[:5])


# --- the command ----------------------------------------------------------------------------------

SCORE = ("score", "artifact", "rows.jsonl", "--output", "out", "--base", "base", "--draws", "2")
FIT = ("fit", "adapter", "rows.jsonl", "--base", "base", "--output", "new", "--draws", "2")


def sidecar(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "artifact/tfb.json", **values)


def text(file: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes(data)


def looped(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data/loop").symlink_to(".")
    (folder / "data/rows[1].jsonl").write_text('{"id": 1}\n')


COMMANDS: dict[str, tuple[Callable[[Path], Any], Sequence[str], str]] = {
    "`--device cuda` without CUDA": (lambda _: None, (*SCORE, "--device", "cuda"), "cuda"),
    "`--device gpu`": (lambda _: None, (*SCORE, "--device", "gpu"), "gpu"),
    "`--input ''`": (lambda _: None, ("score", "artifact", "", "--output", "out"), "empty"),
    "a sidecar of σ = 10^400": (sidecar(sigma=10**400), SCORE, "sigma|tfb.json"),
    "a sidecar of tail x": (sidecar(tail="x", mode="tail"), SCORE, "tail|tfb.json"),
    "a deep sidecar": (text("artifact/tfb.json", nested(10**5).encode()), SCORE, "tfb.json"),
    "a deep `adapter_config.json`": (
        text("adapter/adapter_config.json", nested(10**5).encode()),
        FIT,
        "adapter_config.json",
    ),
    "a regular expression that is none": (
        lambda folder: edit(folder / "adapter/adapter_config.json", target_modules="(["),
        FIT,
        "target_modules",
    ),
    "a regular expression without an end": (
        lambda folder: edit(
            folder / "adapter/adapter_config.json", target_modules="((([a-z._0-9]+)+)+)+$!"
        ),
        FIT,
        "target_modules",
    ),
    "`[` in a file's name": (
        looped,
        ("score", "artifact", "data/rows[1].jsonl", "--output", "out", "--base", "base"),
        "rows",
    ),
    "a link to itself under `**`": (
        looped,
        ("score", "artifact", "data/**/*.csv", "--output", "out", "--base", "base"),
        "data/**/*.csv",
    ),
    "a column twice in Parquet": (
        lambda folder: twice(folder / "rows.parquet"),
        ("score", "artifact", "rows.parquet", "--output", "out", "--base", "base"),
        "prompt",
    ),
    "a CSV header that is open": (
        text("rows.csv", b'id,"prompt\nx,y\n'),
        ("score", "artifact", "rows.csv", "--output", "out", "--base", "base"),
        "rows.csv",
    ),
}


def twice(path: Path) -> None:
    columns = [pa.array(["a b =", "b c ="])] * 2 + [pa.array([["0", "1"]] * 2)]
    pq.write_table(pa.table(columns, ["prompt", "prompt", "choices"]), path)


@promised(
    "the command gets what it cannot use",
    "it is named in one line; the exit status is 1 (2: usage, 3: rows are errors); no traceback",
    COMMANDS,
)
def test_commands(folder: Path, in_child: Children, fault: Any) -> None:
    spoil, words, said = fault
    write(folder / "rows.jsonl", digits.rows("anchor")[:30])
    spoil(folder)
    answer = in_child("faults.test_hostile_files:run_command", str(folder), *words)
    assert answer.value is not None, answer
    code, err = answer.value
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code in (1, 3) and len(told) == 1) or (code == 2 and "Usage" in err), answer
    assert "Traceback" not in err and any(word in err for word in said.split("|")), err


# --- bytes ----------------------------------------------------------------------------------------


def read_rows(path: str) -> list[int]:
    """Read a file twice, as a run does."""
    return [count_records(Path(path)), sum(1 for _ in read(Path(path)))]


ROW_FILES = {
    ".jsonl": lambda: jsonl(SIMPLE[:20], ["plain"] * 20).data,
    ".json": lambda: json_list(SIMPLE[:20], 7).data,
    ".csv": lambda: csv_file(SIMPLE[:20], ["quoted"] * 20).data,
    **{
        suffix: (lambda s=suffix: typed(SIMPLE[:20], ["plain"] * 20, s, 8).data)
        for suffix in (".parquet", ".feather", ".arrow")
    },
}


def fuzz(count: int, call: Callable[[list[Any]], None]) -> None:
    """Call with lists of damages, ``count`` in all."""
    each = 20
    made = settings(
        max_examples=max(1, count // each),
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    made(given(st.lists(DAMAGE, min_size=each, max_size=each))(call))()


@promised(
    "bytes of a file of rows change, 200 times",
    "the rows that are counted are read, or the file is refused by name; only Arrow's own parsers "
    "may end the process",
    {
        f"{s.removeprefix('.')}": s
        for s in (*ROW_FILES, ".jsonl.gz", ".csv.zst", ".jsonl.bz2", ".csv.lz4")
    },
)
def test_damaged_rows(tmp_path: Path, in_child: Children, fault: str) -> None:
    path = tmp_path / f"rows{fault}"
    codec = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}.get(path.suffix)
    whole = ROW_FILES[path.suffixes[0]]()
    if codec:
        with pa.output_stream(str(path), compression=codec) as file:
            file.write(whole)
        whole = path.read_bytes()
    crashed = 0

    def call(damages: list[Any]) -> None:
        nonlocal crashed
        paths = [tmp_path / f"rows-{n}{fault}" for n in range(len(damages))]
        for path, damage in zip(paths, damages, strict=True):
            path.write_bytes(damaged(whole, damage))
        answers = in_child.each("faults.test_hostile_files:read_rows", [[str(p)] for p in paths])
        for path, damage, answer in zip(paths, damages, answers, strict=True):
            if answer.signal is not None and fault in (".parquet", ".feather", ".arrow"):
                assert answer.signal != "SIGALRM", damage
                crashed += 1
            elif answer.value is not None:
                counted, found = answer.value
                assert counted == found, damage
            else:
                refused(answer, path.name)
                assert answer.kinds[0] == "RowError", (damage, answer)

    fuzz(FUZZED, call)
    assert crashed <= FUZZED // 20


@promised(
    "bytes of an artifact's or adapter's weights change, 100 times",
    "they are refused by name; of an adapter without hashes a changed number may load",
    {
        f"`{name}`": name
        for name in ("artifact/tfb.safetensors", "adapter/adapter_model.safetensors")
    },
)
def test_damaged_weights(folder: Path, in_child: Children, fault: str) -> None:
    whole = (folder / fault).read_bytes()

    def call(damages: list[Any]) -> None:
        made = [data for data in (damaged(whole, d) for d in damages) if data != whole]
        calls = [(str(folder), fault, data.hex()) for data in made]
        for answer in in_child.each("faults.test_hostile_files:load_all", calls):
            if answer.value is None or not fault.startswith("adapter"):
                refused(answer, "safetensors|adapter")
                assert answer.kinds[0] in REFUSALS, answer

    fuzz(FUZZED // 2, call)
