"""The paper's table: prompts, both sources of questions, published checkpoints, the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tfb
from benchmarks.calibration import questions
from benchmarks.paper import blob, prompts, run, tables, tasks
from benchmarks.paper.__main__ import main
from tfb.data.rows import RowError
from tfb.posterior import AdapterError

LETTERS = ["A", "B", "C", "D"]
RETURN = "Return the label of the correct answer for the question below.\n\nQuestion: "
ARC_RECORD = {
    "question": "Which is hot?",
    "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
OPENBOOKQA_RECORD = {
    "question_stem": "Predators eat",
    "choices": {"text": ["lions", "humans", "bunnies", "grass"], "label": LETTERS},
    "answerKey": "C",
}
RECORDS: dict[str, dict[str, Any]] = {
    "WG-S": {
        "sentence": "Ann beat Bea as _ was fast.",
        "option1": "Ann",
        "option2": "Bea",
        "answer": "1",
    },
    "ARC-C": ARC_RECORD,
    "OBQA": OPENBOOKQA_RECORD,
    "BoolQ": {"question": "is ice cold", "passage": "Ice is cold." + " " * 2000, "answer": True},
    "Chem": {"question": "What is H2O?", "choices": ["ice", "air", "tin", "tea"], "answer": 0},
}
BOOLQ = (
    "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
    f"Passage: Ice is cold.{' ' * 1012}\nQuestion: is ice cold\nAnswer (true or false):"
)
EXPECTED = {
    ("WG-S", "script"): (
        f"{RETURN}Ann beat Bea as _ was fast.\nChoices:\nA) Ann\nB) Bea\nAnswer:",
        0,
    ),
    ("ARC-C", "script"): (f"{RETURN}Which is hot?\nChoices:\nice) A\nfire) B\nsnow) C\nAnswer:", 1),
    ("ARC-C", "plain"): (f"{RETURN}Which is hot?\nChoices:\nA) ice\nB) fire\nC) snow\nAnswer:", 1),
    ("OBQA", "script"): (
        f"{RETURN}Predators eat\nChioces:\nlions) A\nhumans) B\nbunnies) C\ngrass) D\nAnswer:",
        2,
    ),
    ("OBQA", "plain"): (
        f"{RETURN}Predators eat\nChoices:\nA) lions\nB) humans\nC) bunnies\nD) grass\nAnswer:",
        2,
    ),
    ("BoolQ", "script"): (BOOLQ, 1),
    ("BoolQ", "plain"): (BOOLQ, 0),
    ("Chem", "script"): (
        f"{RETURN}What is H2O?\nChoices:\nA) ice\nB) air\nC) tin\nD) tea\nAnswer:",
        0,
    ),
}


@pytest.mark.parametrize(("name", "form"), EXPECTED)
def test_prompts(name: str, form: str) -> None:
    """The exact string, the choices and the label of one row of each task; the scripts exchange
    BoolQ's labels, and a passage is cut after 1,024 characters."""
    (row,) = tasks.rows_of_records(name, "train", [RECORDS[name]], form)
    prompt, label = EXPECTED[name, form]
    assert row.prompt == prompt and row.label == label and row.id == f"{name}/train/0"
    expected = prompts.TRUE_FALSE if name == "BoolQ" else tuple(LETTERS[: len(row.choices or ())])
    assert row.choices == expected


def hub_records(name: str, found: list[questions.Question]) -> list[dict[str, Any]]:
    """The questions in the columns that the hub has for them."""
    if name.startswith("WG"):
        return [
            {
                "sentence": q.stem,
                "option1": q.choices[0],
                "option2": q.choices[1],
                "answer": str(q.label + 1),
            }
            for q in found
        ]
    if tasks.TASKS[name].hub == "cais/mmlu":
        return [
            {"question": q.stem, "choices": list(q.choices), "answer": q.label, "subject": "x"}
            for q in found
        ]
    stem = "question_stem" if name == "OBQA" else "question"
    return [
        {
            stem: q.stem,
            "choices": {"text": list(q.choices), "label": list(names)},
            "answerKey": names[q.label],
        }
        for i, q in enumerate(found)
        for names in [("ABCDE" if i % 2 else "12345")[: len(q.choices)]]
    ]


@pytest.mark.parametrize(
    "name", ["WG-S", "ARC-C", "ARC-E", "OBQA", "Chem", "Phy", "Chem-HS", "Phy-HS"]
)
def test_hub_and_files_give_equal_rows(
    shared: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row, from records in the hub's columns (letters or numbers for labels) and from the
    files; the hub is asked by its names for the data set, the configuration and the split."""
    task, data = tasks.TASKS[name], shared / "data"
    split = "test" if "test" in task.files else "validation"
    local = tasks.load_rows(name, split, data, "script")
    records = hub_records(name, task.read(data / task.files[split]))
    asked: list[Any] = []

    def load_dataset(*names: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((*names, options))
        return records

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert tasks.load_rows(name, split, None, "script") == local
    assert asked == [(task.hub, task.config, {"split": split})]
    assert len({row.id for row in local}) == len(local)


def test_boolq_files(tmp_path: Path) -> None:
    """BoolQ's own JSONL gives the rows of the hub's records; another shape is named by row."""
    file = tmp_path / "boolq" / "dev.jsonl"
    file.parent.mkdir()
    records = [RECORDS["BoolQ"], RECORDS["BoolQ"] | {"answer": False}]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    for form in prompts.FORMS:
        rows = tasks.load_rows("BoolQ", "validation", tmp_path, form)
        assert rows == tasks.rows_of_records("BoolQ", "validation", records, form)
    file.write_text('{"question": "q", "passage": "p", "answer": "yes"}\n')
    with pytest.raises(ValueError, match=r"dev\.jsonl, row 1: not a row of BoolQ"):
        tasks.load_rows("BoolQ", "validation", tmp_path, "plain")


def test_changed_hub_columns_are_named() -> None:
    with pytest.raises(ValueError, match="allenai/ai2_arc, train row 0: not a row of ARC-C"):
        tasks.rows_of_records("ARC-C", "train", [{"question": "q"}], "plain")


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "tfb\[paper\]".*--data'):
        tasks.load_rows("WG-S", "train", None, "script")


def test_anchors(shared: Path) -> None:
    """On training rows all of the split is evaluated; held-out anchors leave it, so that the two
    are disjoint and together the whole."""
    rows = tasks.load_rows("WG-S", "validation", shared / "data", "plain")
    train = tasks.load_rows("WG-S", "train", shared / "data", "plain")
    anchors, judged = tasks.choose_anchors(rows, 50, train)
    assert judged == rows and len({a.id for a in anchors}) == 50
    # numpy.random.default_rng(42).permutation(640)[:3], as datasets' shuffle(seed=42) has it
    assert [a.id for a in anchors[:3]] == ["WG-S/train/584", "WG-S/train/235", "WG-S/train/393"]
    anchors, judged = tasks.choose_anchors(rows, 50, None)
    ids = {a.id for a in anchors}, {r.id for r in judged}
    assert not ids[0] & ids[1] and ids[0] | ids[1] == {r.id for r in rows}
    with pytest.raises(ValueError, match="--anchor-rows 1267: held-out anchors"):
        tasks.choose_anchors(rows, 1267, None)


def test_label_tokens(shared: Path) -> None:
    """Of the small Llama: all that continue the prompt in form plain; the last token of the letter
    alone in form script, which whole words have not."""
    from transformers import AutoConfig

    model = str(shared / "models/stories260K")
    config, tokenizer = AutoConfig.from_pretrained(model), run.load_tokenizer(model)
    rows = tasks.load_rows("WG-S", "validation", shared / "data", "plain")[:3]
    plain = prompts.encode(rows, tokenizer, config, "plain")
    script = prompts.encode(rows, tokenizer, config, "script")
    alone = [tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in "AB"]
    assert script.label_ids == [tuple(alone)] * 3 and script.input_ids == plain.input_ids
    after = len(tokenizer("a")["input_ids"])
    whole = [tokenizer(f"a {letter}")["input_ids"][after:] for letter in "AB"]
    assert plain.choice_ids == [tuple(map(tuple, whole))] * 3 and alone[0] == whole[0][-1]
    record = {"question": "is ice cold", "passage": "Ice is cold.", "answer": True}
    words = tasks.rows_of_records("BoolQ", "validation", [record], "plain")
    assert prompts.encode(words, tokenizer, config, "plain").choice_ids is not None
    with pytest.raises(RowError, match=r"splits 'True' into \d tokens.*--prompts plain"):
        prompts.encode(words, tokenizer, config, "script")


# --- published checkpoints ------------------------------------------------------------------------


def published(
    plain: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = len
) -> Path:
    """A checkpoint as the authors' wrapper saves it: keys with their prefix twice, a rho for every
    A, and the output embedding's frozen weight."""
    tensors = {}
    for key, value in load_file(plain / "adapter_model.safetensors").items():
        tensors[f"base_model.model.{key}"] = value
        if key.endswith("lora_A.weight"):
            rho = f"base_model.model.{key.removesuffix('.weight')}_rho"
            tensors[rho] = torch.full_like(value, 0.05)
    tensors["base_model.model.base_model.model.lm_head.base_layer.weight"] = torch.zeros(512, 64)
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((plain / "adapter_config.json").read_bytes())
    return folder


@pytest.fixture
def plain(shared: Path) -> Path:
    return shared / "adapters/stories260K-clinc-domain"


def test_published_checkpoint(shared: Path, plain: Path, tmp_path: Path) -> None:
    """The mean loads strictly, where the checkpoint itself is refused, and predicts with the same
    bits as the adapter that it was made from; rho and the base's weight are reported."""
    checkpoint = published(plain, tmp_path / "blob")
    made = blob.mean_adapter(checkpoint, tmp_path / "mean")
    assert made.left_out == {"lora_A_rho": 30, "lm_head": 1} and made.modules == 30
    assert str(made) == "mean A and B of 30 modules; left out: 1 lm_head, 30 lora_A_rho"
    base = shared / "models/stories260K"
    ids = torch.arange(3, 63).reshape(2, 30)

    def logits(folder: Path) -> torch.Tensor:
        model = tfb.load_adapter(tfb.load_base(base, folder), folder)
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids).logits
        return found

    assert torch.equal(logits(made.folder), logits(plain))
    with pytest.raises(AdapterError, match="its keys do not fit the base model"):
        logits(checkpoint)


@pytest.mark.filterwarnings(  # PEFT's advice on wrapping twice and on adapted, tied embeddings
    "ignore:Already found a `peft_config` attribute:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
)
def test_checkpoint_written_by_peft(shared: Path, tmp_path: Path) -> None:
    """What PEFT itself writes of a model wrapped twice, with a rho and an adapted output embedding,
    as the scripts do it: the mean predicts what the wrapped model does, bit for bit."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    model = str(shared / "models/stories260K")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "lm_head"]
    )
    inner: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    wrapped = PeftModel(inner, config, "default").eval()
    torch.manual_seed(0)
    layers: list[Any] = [m for m in wrapped.modules() if isinstance(m, LoraLayer)]
    for module in layers:
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        module.lora_A_rho = torch.nn.ParameterDict({"default": torch.rand_like(A)})
        B.data.normal_(0, 0.02)
    wrapped.save_pretrained(str(tmp_path / "blob"))
    made = blob.mean_adapter(tmp_path / "blob", tmp_path / "mean")
    assert made.left_out == {"lm_head": 1, "lora_A_rho": 11} and made.modules == 11
    loaded = tfb.load_adapter(tfb.load_base(model, made.folder), made.folder)
    ids = torch.arange(3, 63).reshape(2, 30)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, wrapped(input_ids=ids).logits)


def test_checkpoints_that_are_refused(plain: Path, tmp_path: Path) -> None:
    """By the key that is not understood, missing or of another shape; nothing is left behind."""
    prefix = "base_model.model.base_model.model.model.layers.0.self_attn.q_proj"

    def refused(
        number: int, message: str, change: Callable[[dict[str, torch.Tensor]], object]
    ) -> None:
        source = published(plain, tmp_path / f"in-{number}", change)
        with pytest.raises(AdapterError, match=message):
            blob.mean_adapter(source, tmp_path / f"out-{number}")

    vector = f"{prefix}.lora_magnitude_vector"
    message = r"1 keys are not understood: .*q_proj\.lora_magnitude_vector"
    refused(0, message, lambda t: t.update({vector: torch.ones(1)}))
    refused(1, "layers.0.self_attn.q_proj lacks lora_B", lambda t: t.pop(f"{prefix}.lora_B.weight"))
    refused(2, "layers.0.self_attn.q_proj lacks lora_A", lambda t: t.pop(f"{prefix}.lora_A.weight"))
    message = r"q_proj\.lora_A_rho is \[1\], its lora_A \[8, 64\]"
    refused(3, message, lambda t: t.update({f"{prefix}.lora_A_rho": torch.ones(1)}))
    once = f"{prefix.removeprefix('base_model.model.')}.lora_A.weight"
    refused(4, "are the same tensor", lambda t: t.update({once: torch.ones(8, 64)}))
    with pytest.raises(AdapterError, match="an ordinary PEFT adapter; load it as it is"):
        blob.mean_adapter(plain, tmp_path / "out")
    with pytest.raises(ValueError, match="already holds something"):
        blob.mean_adapter(plain, tmp_path / "in-0")
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith("in-")]


def test_mean_adapter_is_whole_or_absent(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails half-way leaves no folder."""
    checkpoint = published(plain, tmp_path / "blob")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(blob.shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space left"):
        blob.mean_adapter(checkpoint, tmp_path / "mean")
    assert [p.name for p in tmp_path.iterdir()] == ["blob"]


# --- the command ----------------------------------------------------------------------------------


def arguments(shared: Path, adapter: Path | str, *more: object) -> list[str]:
    model = shared / "models/stories260K"
    where = ("--base", model, "--adapter", adapter, "--data", shared / "data")
    return list(map(str, (*where, "--limit", 2, "--anchor-rows", 4, *more)))


def test_command(
    shared: Path,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a published checkpoint to recorded rows: two seeds, the trained task and a shifted one.
    The adapter is one for another task, so the figures mean nothing; but those of the deterministic
    adapter do not depend on the seed, and sigma is what changes the others."""
    published(plain, tmp_path / "blob-obqa")
    monkeypatch.setenv("TFB_BENCH_RESULTS", str(tmp_path / "results"))
    options = (
        "--checkpoint published --kind blob-mean --task OBQA --ood Phy --split test --seeds 1 2 "
        "--draws 2 --anchor-rows 2 --objective min_nll --record --json"
    )
    adapters = tmp_path / "blob-{task}"
    main(arguments(shared, adapters, *options.split(), tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    lines = (tmp_path / "results/paper.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    points = [(r["point"]["seed"], r["point"]["on"], r["point"]["method"], r["rows"]) for r in rows]
    methods = ("adapter", "tfb")
    assert points == [(s, on, m, 2) for s in (1, 2) for on in ("OBQA", "Phy") for m in methods]
    assert all(r["toy"] and r["point"]["base"] == "stories260K" for r in rows)
    assert str(tmp_path) not in "".join(lines) and str(shared) not in "".join(lines)
    mean = [r["nll"] for r in rows if r["point"]["method"] == "adapter"]
    assert mean[:2] == mean[2:] and all(r["sigma"] > 0 for r in rows[1::2])
    printed = capsys.readouterr().out
    assert "left out: 1 lm_head, 30 lora_A_rho" in printed and "trained on OBQA" in printed
    with pytest.raises(SystemExit, match=r"error: --json .*rows\.json exists already"):
        main(arguments(shared, plain, "--json", tmp_path / "rows.json"))


REFUSED = {
    "task": (["--task", "WG-XL"], "--task WG-XL: expected one of WG-S, ARC-C"),
    "untrained": (["--task", "Chem"], "--task Chem: expected one of WG-S"),
    "ood": (["--task", "WG-S", "--ood"], "--ood: it is for the adapter of --task OBQA"),
    "split": (["--task", "WG-S", "--split", "test"], "WG-S has no labelled rows .* --split valid"),
    "file": (["--task", "WG-M"], "train_m.jsonl: no such file, so WG-M has no train rows"),
    "arc": (["--task", "ARC-C"], "ARC-C has no validation rows; use --split test"),
    "data": (["--task", "WG-S", "--data", "nowhere"], "--data nowhere: there is no such folder"),
    "draws": (["--draws", "3"], "--draws 3: expected a positive even number"),
    "limit": (["--limit", "0"], "--limit 0: expected at least 1"),
    "tolerance": (["--tolerance", "0"], "tolerance=0.0: expected a positive number"),
    "pattern": (["--task", "WG-S", "--adapter", "a/{sed}"], "only {task} and {seed} can be filled"),
    "base": (["--task", "WG-S", "--base", "nowhere/at-all"], "--base nowhere/at-all: no config"),
    "adapter": (["--task", "WG-S", "--adapter", "nobody/nothing"], "nobody/nothing: no folder"),
    "kind": (["--task", "WG-S", "--checkpoint", "published"], "an ordinary PEFT adapter"),
    "long": (
        ["--task", "OBQA", "--ood", "Phy-HS", "--split", "test", "--limit", "9"],
        "584 tokens, but",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_weights_are_loaded(
    shared: Path, plain: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tfb, "load_base", lambda *_: pytest.fail("weights were loaded"))
    options, message = REFUSED[name]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(arguments(shared, plain, *options))


def test_every_adapter_is_compared_with_the_base_first(
    shared: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second seed's adapter has a layer more than the base, or is a classifier: neither costs
    the first seed's run."""
    monkeypatch.setattr(tfb, "load_base", lambda *_: pytest.fail("weights were loaded"))
    for seed in (1, 2):
        (tmp_path / f"s{seed}").mkdir()
        for file in plain.iterdir():
            (tmp_path / f"s{seed}" / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "s2/adapter_model.safetensors"
    tensors = load_file(weights)
    extra = {k.replace("layers.4", "layers.9"): v.clone() for k, v in tensors.items()}
    save_file(tensors | extra, weights)
    command = arguments(shared, tmp_path / "s{seed}", "--task", "WG-S", "--seeds", 1, 2)
    with pytest.raises(SystemExit, match=r"s2: its keys do not fit the base model.*layers\.9"):
        main(command)
    classifier = shared / "adapters/stories260K-clinc150"
    with pytest.raises(SystemExit, match="task_type SEQ_CLS; the table is one of CAUSAL_LM"):
        main(arguments(shared, classifier, "--task", "WG-S", "--seeds", 1))


# --- tables ---------------------------------------------------------------------------------------


def row(base: str, seed: int, method: str, accuracy: float, **point: Any) -> dict[str, Any]:
    setting = run.Setting("", "", "mle", ()).described()
    return {
        "point": {
            "base": base,
            "kind": "mle",
            "adapter": "a/{seed}",
            "task": "WG-S",
            "on": "WG-S",
            "seed": seed,
            "method": method,
            "setting": setting,
        }
        | point,
        "device": "cuda",
        "accuracy": accuracy,
        "ece": 0.1,
        "nll": 0.5,
        "date": "2026-01-01",
        "environment": {
            "gpu": {"name": "G"},
            "versions": {"torch": "2", "transformers": "5", "peft": "0"},
            "commit": {"id": "0123456789ab", "dirty": False},
        },
    }


def test_table_of_the_base_model_of_the_paper() -> None:
    """Mean ± sample standard deviation over seeds, the published figure in brackets, and no more
    word of a table that was not run; another base has no published figures."""
    name = "meta-llama/Llama-3.1-8B"
    rows = [row(name, 1, "adapter", 0.76), row(name, 2, "adapter", 0.78)]
    text = tables.paper_table(rows)
    assert "| ACC % | MLE | 77.00 ± 1.41 [77.87] | [81.08] |" in text
    assert "has not been run" not in text
    other = tables.paper_table([row("stories", 1, "tfb", 0.5)])
    assert "has not been run here" in other and "| ACC % | MLE + TFB | 50.00 |" in other
    assert "has not been run here" in tables.paper_table([])


def test_adapters_and_settings_are_not_averaged() -> None:
    """Two adapters of one kind have lines of their own; another setting has a table of its own."""
    rows = [row("b", 1, "tfb", 0.5), row("b", 1, "tfb", 0.7, adapter="c/{seed}")]
    text = tables.results(rows)
    assert "MLE (a/{seed}) + TFB | 50.00" in text and "MLE (c/{seed}) + TFB | 70.00" in text
    setting = rows[0]["point"]["setting"] | {"anchors": "held-out"}
    text = tables.results([rows[0], row("b", 1, "tfb", 0.7, setting=setting)])
    assert text.count("**b (cuda)") == 2 and "500 held-out anchors" in text


def test_published_figures_are_of_known_tasks() -> None:
    """Each names a task and a metric of the table, and none stands twice."""
    keys = [(f["task"], f["on"], f["metric"], f["kind"]) for f in tables.PUBLISHED["figures"]]
    assert len(set(keys)) == len(keys)
    assert all(t in tasks.TASKS and m in tables.METRICS for t, _, m, _ in keys)
