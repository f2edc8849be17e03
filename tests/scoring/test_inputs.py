"""encode and score take everything that holds rows."""

from __future__ import annotations

from typing import Any

import pytest
from support import tables
from support.models import CASES, LABELS
from support.tables import COLUMNS, DATA, IN_MEMORY, NAMES, as_dataset

import tfb
from tfb.adapters.loading import load_tokenizer
from tfb.data.encoding import RowEncoder
from tfb.data.rows import Row, RowError
from tfb.demo import digits
from tfb.scoring.evaluate import encode


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tables.tokenizer()


@pytest.fixture
def bayes() -> tfb.BayesianModel:
    """A classifier of three classes."""
    assert len(NAMES) == LABELS
    made = tfb.bayesianize(CASES["llama_classifier"].build(), seed=3)
    made.configure(sigma=0.1)
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


def test_what_cannot_be_used_names_the_line_to_write(
    bayes: tfb.BayesianModel, tokenizer: Any
) -> None:
    with pytest.raises(RowError, match=r"Row\('good'\): .* write Row\(id='1', text='\.\.\.'\)"):
        Row("good")
    wrong = r"write anchors = encode\(bayes, data, tokenizer\)"
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
