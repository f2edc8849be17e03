"""The same small table in every form that holds rows, and a tokenizer of its words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NAMES = ("bad", "fair", "good")
WORDS = ["a", "b", "c", "d"]
DATA: list[dict[str, Any]] = [
    {"sentence": " ".join(WORDS[: 1 + i % 4]), "gold": NAMES[i % 3], "weight": i} for i in range(9)
]
COLUMNS = {"text": "sentence", "label": "gold"}


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


def tokenizer() -> Any:
    """Return one that knows ``WORDS``."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", *WORDS])}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", pad_token="?")
