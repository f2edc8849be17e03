"""One reader for everything that holds rows, from Python and from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from conftest import Run
from support.models import CASES, LABELS, randomize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tfb
from tfb.data.encoding import RowEncoder
from tfb.data.readers import iter_rows, read_rows
from tfb.data.rows import Row, RowError, RowFormat
from tfb.demo import digits
from tfb.scoring.rows import encode, load_tokenizer

NAMES = ("bad", "fair", "good")
WORDS = ["a", "b", "c", "d"]
DATA: list[dict[str, Any]] = [
    {"sentence": " ".join(WORDS[: 1 + i % 4]), "gold": NAMES[i % 3], "weight": i} for i in range(9)
]
COLUMNS = {"text": "sentence", "label": "gold"}
FORM = RowFormat(COLUMNS, NAMES, "SEQ_CLS")
EXPECTED = [(str(i), row["sentence"], i % 3) for i, row in enumerate(DATA)]


def table() -> pa.Table:
    return pa.Table.from_pylist(DATA)


def jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in DATA))
    return path


def written(path: Path) -> Path:
    writers: dict[str, Callable[[], Any]] = {
        ".jsonl": lambda: jsonl(path),
        ".json": lambda: path.write_text(json.dumps(DATA, indent=2)),
        ".csv": lambda: pyarrow.csv.write_csv(table(), path),
        ".parquet": lambda: pq.write_table(table(), path),
        ".feather": lambda: pyarrow.feather.write_feather(table(), path),
    }
    writers[path.suffix]()
    return path


def as_pandas() -> Any:
    return pytest.importorskip("pandas", "2.2").DataFrame(DATA)


def as_polars() -> Any:
    return pytest.importorskip("polars").DataFrame(DATA)


def as_dataset() -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(DATA)


def as_stream() -> Any:
    return as_dataset().to_iterable_dataset()


IN_MEMORY: dict[str, Callable[[], Any]] = {
    "list of dicts": lambda: DATA,
    "generator of dicts": lambda: iter(DATA),
    "pyarrow table": table,
    "pandas": as_pandas,
    "polars": as_polars,
    "Dataset": as_dataset,
    "IterableDataset": as_stream,
}
FILES = ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.feather")


def told(rows: list[Row]) -> list[tuple[str, str | None, int | None]]:
    return [(row.id, row.text, row.label) for row in rows]


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_rows_in_memory(kind: str) -> None:
    rows = read_rows(IN_MEMORY[kind](), FORM)
    assert told(rows) == EXPECTED
    assert [row.source for row in rows] == [f"row {i}" for i in range(9)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("as_path", [str, Path])
def test_rows_of_files(tmp_path: Path, name: str, as_path: Callable[[Path], Any]) -> None:
    path = written(tmp_path / name)
    rows = read_rows(as_path(path), FORM, limit=5)
    assert told(rows) == EXPECTED[:5]
    assert all(row.source.startswith(f"{path}:") for row in rows)


def test_several_files_folders_and_patterns(tmp_path: Path) -> None:
    both = [written(tmp_path / name) for name in ("a.csv", "b.parquet")]
    for data in (both, tmp_path, str(tmp_path / "*")):
        rows = read_rows(data, FORM)
        assert [row.text for row in rows] == 2 * [row["sentence"] for row in DATA]
        assert [row.id for row in rows] == [str(i) for i in range(18)]


def test_strings_are_texts_or_prompts() -> None:
    texts = ["book a table", "see notes.csv, please"]
    assert [row.text for row in read_rows(texts)] == texts
    prompts = read_rows(texts, RowFormat(labels=["yes", "no"], task="CAUSAL_LM"))
    assert [(row.prompt, row.choices) for row in prompts] == [(t, ("yes", "no")) for t in texts]
    with pytest.raises(RowError, match=r"row 0: no column 'choices'.* the same by labels"):
        read_rows(texts, RowFormat(task="CAUSAL_LM"))


def test_rows_by_hand_pass_through() -> None:
    rows = [Row("1", text="a"), Row("2", text="b")]
    assert list(iter_rows(iter(rows), FORM)) == rows


def test_rows_are_read_when_they_are_asked_for() -> None:
    def stream() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise AssertionError("read ahead")

    assert next(iter_rows(stream())).text == "a"


def test_a_file_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    for name, kind in (("rows.parquet", "a Parquet file"), ("rows.feather", "an Arrow file")):
        wrong = written(tmp_path / name).rename(tmp_path / "wrong.jsonl")
        with pytest.raises(
            RowError, match=rf"wrong\.jsonl: is {kind}, which its name does not say"
        ):
            read_rows(wrong)
    (tmp_path / "list.json").write_text('[{"text": "a"}, 3]')
    with pytest.raises(RowError, match=r"list\.json:2: expected a JSON object"):
        read_rows(tmp_path / "list.json")
    (tmp_path / "list.json").write_text('[{"text": "a"}')
    with pytest.raises(RowError, match=r"list\.json: not a JSON list .*; write one object a line"):
        read_rows(tmp_path / "list.json")


def test_ids_that_stand_twice() -> None:
    with pytest.raises(RowError, match="row 1: the id 'x' was already used at row 0; give every"):
        read_rows([{"id": "x", "text": "a"}, {"id": "x", "text": "b"}])


# --- with a model, from Python --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", *WORDS])}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", pad_token="?")


@pytest.fixture
def bayes() -> tfb.BayesianModel:
    """A classifier of three classes."""
    assert len(NAMES) == LABELS
    made = tfb.bayesianize(CASES["llama_classifier"].build(), seed=3)
    made.sigma = 0.1
    return made


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_encode_and_score_take_anything(
    bayes: tfb.BayesianModel, tokenizer: Any, kind: str
) -> None:
    data = IN_MEMORY[kind]
    bayes.labels = NAMES
    encoded = encode(bayes, data(), tokenizer, columns=COLUMNS)
    assert encoded.labels == [i % 3 for i in range(9)]
    found = list(tfb.score(data(), bayes, tokenizer, draws=2, columns=COLUMNS))
    assert [(r["id"], r["label"]) for r in found] == [(str(i), i % 3) for i in range(9)]
    assert all(r["choice"] == NAMES[r["prediction"]] for r in found)
    rows = [Row(str(i), text=row["sentence"]) for i, row in enumerate(DATA)]
    plain = list(tfb.score(rows, bayes, tokenizer, draws=2))
    assert [r["probs"] for r in found] == [r["probs"] for r in plain]


def test_classes_of_a_dataset_are_mapped_by_name(tmp_path: Path) -> None:
    """Its indices count its own names, which need not stand in the model's order."""
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["good", "bad", "fair"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    rows = {"text": ["x", "y", "z"], "label": [0, 1, None]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(tmp_path / "saved")
    files = (tmp_path / "rows.parquet", tmp_path / "saved")
    for given in (data, data.to_iterable_dataset(), data.with_format("numpy"), *files):
        named = read_rows(given, RowFormat(labels=NAMES, task="SEQ_CLS"))
        assert [row.label for row in named] == [2, 0, None]
        assert [row.label for row in read_rows(given)] == [0, 1, None]
    with pytest.raises(RowError, match=r"'good' is none of the classes \['a', 'b', 'c'\]"):
        read_rows(data, RowFormat(labels=["a", "b", "c"], task="SEQ_CLS"))


def test_tables_that_are_none() -> None:
    pandas = pytest.importorskip("pandas", "2.2")
    assert [r.text for r in read_rows(pandas.Series(["a", "b"]))] == ["a", "b"]
    mixed = pandas.DataFrame({"text": ["a", 1]})
    with pytest.raises(TypeError, match="DataFrame: is no table of one type a column"):
        read_rows(mixed)
    with pytest.raises(RowError, match="the DataFrame: no column 'gld'; there are 'sentence'"):
        read_rows(as_pandas(), RowFormat({"text": "sentence", "label": "gld"}))


def test_what_cannot_be_used_names_the_line_to_write(
    bayes: tfb.BayesianModel, tokenizer: Any
) -> None:
    with pytest.raises(RowError, match=r"Row\('good'\): .* write Row\(id='1', text='\.\.\.'\)"):
        Row("good")
    wrong = r"write anchors = tfb\.scoring\.encode\(bayes, data, tokenizer\)"
    for data in (DATA, "rows.jsonl", [Row("1", text="a")], as_dataset()):
        with pytest.raises(TypeError, match=wrong):
            tfb.fit_sigma(bayes, data)
    with pytest.raises(
        TypeError, match=r"got list; write batch = tokenizer\(texts, return_tensors"
    ):
        bayes.predict(["a text"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"one, such as data\['test'\]"):
        encode(bayes, {"train": DATA, "test": DATA}, tokenizer)
    with pytest.raises(TypeError, match=r"DatasetDict holds no rows.*such as data\['test'\]"):
        datasets = pytest.importorskip("datasets")
        encode(bayes, datasets.DatasetDict({"test": as_dataset()}), tokenizer)
    with pytest.raises(RowError, match=r"row 0: no column 'text'.* there are 'sentence'"):
        encode(bayes, DATA, tokenizer)
    with pytest.raises(RowError, match="the label 'bad' is text; classes lack names"):
        encode(bayes, DATA, tokenizer, columns=COLUMNS)
    with pytest.raises(
        RowError, match=r"row 0 .* 3 tokens, but the model takes 2; shorten the row"
    ):
        bayes.base.config.max_position_embeddings = 2
        encode(bayes, ["a b c"], tokenizer)


def test_rows_by_hand_are_checked_too() -> None:
    for row, message in (
        (Row("1", "x", ("0", "1"), label=2), "the label 2 is outside the 2 choices"),
        (Row("1", "x", ("0", "1"), label=-1), "the label -1 is outside the 2 choices"),
        (Row("1", "x", ("0",)), r"the choices are \('0',\); give a tuple of two or more"),
        (Row("1", "x", ()), r"the choices are \(\); give a tuple"),
    ):
        with pytest.raises(RowError, match=message):
            RowEncoder(load_tokenizer(str(digits.BASE)))([row])


def test_names_of_classes_are_counted(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    bayes.labels = NAMES[:2]
    for use in (lambda: encode(bayes, ["a"], tokenizer), lambda: list(tfb.score("x", bayes, None))):
        with pytest.raises(ValueError, match="labels: 2 names, but the head has 3 classes"):
            use()


def test_truncation_is_said_in_results(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    bayes.base.config.max_position_embeddings = 2
    found = list(tfb.score(["a b c", "b c"], bayes, tokenizer, draws=2, truncate="left"))
    assert [r["truncated"] for r in found] == [1, 0] and found[0]["probs"] == found[1]["probs"]
    encoded = encode(bayes, ["a b c"], tokenizer, truncate="right")
    assert encoded.input_ids == [[1, 2]] and encoded.truncated == [1]


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a base model with its tokenizer, and of a SEQ_CLS adapter with its head."""
    folder = tmp_path_factory.mktemp("classifier")
    case = CASES["llama_classifier"]
    randomize(case.base(), 0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    case.build().save_pretrained(folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


@pytest.mark.parametrize("name", FILES)
def test_every_command_reads_every_file(
    tfb_command: Run, classifier: tuple[str, str], tmp_path: Path, name: str
) -> None:
    """Columns and names of classes are given to fit; the artifact keeps the names."""
    model, adapter = classifier
    data, artifact = written(tmp_path / name), tmp_path / "artifact"
    columns = ("--columns", "text=sentence, label=gold")
    names = tmp_path / "names.txt" if name == "rows.csv" else "bad, fair,good"
    (tmp_path / "names.txt").write_text("bad\nfair\n\ngood\n")
    common = ("--model", model, "--artifact", artifact, *columns, "--draws", 2)
    steps = {
        "fit": ("--model", model, "--adapter", adapter, "--anchors", data, "--out", artifact,
                *columns, "--labels", names, "--draws", 2, "--objective", "min_nll"),
        "evaluate": (*common, "--data", data, "--json", tmp_path / "figures.json"),
        "score": (*common, "--input", data, "--output", tmp_path / "out", "--keep", "weight"),
        "report": (*common, "--data", data, "--output", tmp_path / "page"),
    }  # fmt: skip
    for command, options in steps.items():
        code, _, err = tfb_command(command, *options)
        assert code == 0, (command, err)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["metrics"]["tfb"]["rows"] == 9 and figures["truncated"] == 0
    scored = pq.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    assert [(r["id"], r["label"], int(r["weight"])) for r in scored] == [
        (str(i), i % 3, i) for i in range(9)
    ]
    assert all(r["choice"] == NAMES[r["prediction"]] and r["error"] is None for r in scored)
    hits = sum(r["prediction"] == r["label"] for r in scored)
    assert figures["metrics"]["tfb"]["accuracy"] == pytest.approx(hits / 9)
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())["configuration"]
    assert told["labels"] == list(NAMES) and told["truncate"] is None


def test_what_the_options_cannot_be(
    tfb_command: Run, classifier: tuple[str, str], tmp_path: Path
) -> None:
    model, adapter = classifier
    data = written(tmp_path / "rows.csv")
    fit = (
        "fit",
        "--model",
        model,
        "--adapter",
        adapter,
        "--anchors",
        data,
        "--out",
        tmp_path / "o",
    )
    for options, message in (
        (("--columns", "text"), "--columns 'text': expected name=column, such as text=sentence"),
        (("--columns", "text="), "--columns 'text=': expected name=column"),
        (("--columns", "text=a,text=b"), "--columns text=b: 'text' is named twice"),
        (("--columns", "text=a,id=a"), "columns: 'a' is named twice"),
        (("--columns", "prompt=sentence"), "'prompt' is none of id, text, label"),
        ((), "rows.csv: no column 'text'"),
        (("--columns", "text=sentence"), "no label; metric nll needs one on every row"),
        (("--columns", "text=sentence,label=gold"), "the label 'bad' is text; classes lack names"),
        (("--labels", "yes,no,"), "labels: a name is empty"),
        (("--labels", "a,b"), "labels: 2 names, but the head has 3 classes"),
        (("--labels", "a,a,b"), "'a' stands twice"),
        (("--truncate", "top"), "truncate='top': expected one of left, right"),
        (("--label-tokens", "first"), "label_tokens='first': expected one of all, last"),
    ):
        code, out, err = tfb_command(*fit, *options)
        assert code == 1 and out == "" and message in err, (options, err)
    assert not (tmp_path / "o").exists()
    made = tfb.bayesianize(tfb.load_adapter(tfb.load_base(model, adapter), adapter))
    made.sigma, made.source = 0.1, Path(adapter)
    made.save(tmp_path / "artifact")
    job = ("score", "--model", model, "--artifact", tmp_path / "artifact", "--input", data,
           "--output", tmp_path / "out", "--columns", "text=sentence")  # fmt: skip
    code, _, err = tfb_command(*job, "--labels", "a,b")
    assert code == 1 and "labels: 2 names, but the head has 3 classes" in err
    assert not (tmp_path / "out").exists()


def test_truncation_is_said_by_every_command(
    tfb_command: Run, classifier: tuple[str, str], tmp_path: Path
) -> None:
    """Rows that are cut are counted; a resumed run counts those of earlier parts."""
    model, adapter = classifier
    data, artifact = tmp_path / "rows.csv", tmp_path / "artifact"
    rows = "".join(f"{'a b c d ' * (40 if i % 3 == 0 else 1)},{i % 3}\n" for i in range(8))
    data.write_text("text,label\n" + rows)
    fit = ("fit", "--model", model, "--adapter", adapter, "--anchors", data, "--out", artifact,
           "--objective", "min_nll", "--draws", 2)  # fmt: skip
    code, _, err = tfb_command(*fit)
    assert code == 1 and "160 tokens, but the model takes" in err and "truncate" in err
    limit = CASES["llama_classifier"].base().config.max_position_embeddings
    code, _, err = tfb_command(*fit, "--truncate", "left")
    assert code == 0 and f"note: 3 of 8 rows were cut on the left to {limit} tokens" in err
    common = ("--model", model, "--artifact", artifact, "--truncate", "right", "--draws", 2)
    code, _, err = tfb_command("evaluate", *common, "--data", data)
    assert code == 0 and f"3 of 8 rows were cut on the right to {limit} tokens" in err
    score = ("score", *common, "--input", data, "--output", tmp_path / "out", "--part-rows", 4)
    code, out, err = tfb_command(*score)
    assert code == 0 and "8 rows, 0 of them errors, 3 cut on the right: " in out, err
    (tmp_path / "out" / "part-00001.parquet").unlink()
    code, out, err = tfb_command(*score, "--resume")
    assert code == 0 and "3 cut on the right" in out, err
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert counts == {"rows": 8, "errors": 0, "truncated": 3, "parts": 2}
    parts = sorted((tmp_path / "out").glob("part-*"))
    cut = [r["truncated"] for p in parts for r in pq.read_table(p).to_pylist()]
    assert cut == [160 - limit, 0, 0, 160 - limit, 0, 0, 160 - limit, 0]
    code, _, err = tfb_command("score", *common[:4], *score[-6:], "--draws", 2, "--resume")
    assert code == 1 and "truncate: right -> None" in err
