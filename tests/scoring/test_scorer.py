"""Rows to results: the numbers of ``predict``, and errors as rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from support.models import CASES, exact
from transformers import AutoTokenizer

import tfb
from tfb.data.batching import batches
from tfb.data.readers import Record
from tfb.data.rows import Row, RowFormat
from tfb.demo import digits
from tfb.evaluation.decisions import Decisions
from tfb.scoring.evaluate import encode
from tfb.scoring.output import FORMATS, OutputFolder
from tfb.scoring.scorer import DEEPEST, Item, Result, Scorer, read_item, result_rows

SINGLE = 2.0**-24
CLOSE = {"rtol": 4 * SINGLE, "atol": 4 * SINGLE}  # two float32 roundings of a float64 model's value


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(digits.BASE))


@pytest.fixture(scope="module")
def bayes(tokenizer: Any) -> tfb.BayesianModel:
    """A random Llama with the demo's vocabulary, in float64: batches round far below float32."""
    model = tfb.bayesianize(exact(CASES["llama"].build()), seed=3)
    model.configure(sigma=0.1)
    return model


def rows(n: int = 12) -> list[Row]:
    """Prompts of 4 to 26 tokens, with 2, 3 or 4 choices."""
    made = []
    for i in range(n):
        prompt = " ".join("abcdefgh"[(i + j) % 8] for j in range(3 + (i * 7) % 23)) + "\n="
        made.append(Row(f"r{i}", prompt, tuple("0123"[: 2 + i % 3]), None, i % 2, f"f:{i}"))
    return made


def score(bayes: Any, tokenizer: Any, given: list[Row], **how: Any) -> list[Result]:
    return Scorer(bayes, tokenizer, **({"draws": 4} | how))(given)


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        for name, value in one.items():
            if isinstance(value, float | list):
                torch.testing.assert_close(torch.tensor(value), torch.tensor(other[name]), **CLOSE)
            else:
                assert value == other[name], name


MODES = [("full", None), ("tail", 2)]


@pytest.fixture(params=MODES, ids=lambda m: m[0])
def mode(request: pytest.FixtureRequest, bayes: tfb.BayesianModel) -> Iterator[str]:
    bayes.configure(mode=request.param[0], tail=request.param[1])
    yield request.param[0]
    bayes.configure(mode="full")


@pytest.mark.parametrize("draws", [4, "auto"])
def test_values_are_those_of_predict(
    bayes: tfb.BayesianModel, tokenizer: Any, mode: str, draws: int | str
) -> None:
    """Row by row, in the window's order, in both modes and with adaptive draws."""
    given = rows(6)
    found = score(bayes, tokenizer, given, draws=draws, batch_tokens=60)
    encoded = encode(bayes, given, tokenizer)
    for i, (row, values) in enumerate(zip(given, found, strict=True)):
        (batch,) = batches(encoded.subset([i]), batch_size=1, pad_token_id=0)
        p = bayes.predict(batch.model_inputs(), draws, label_ids=batch.label_ids)
        best = int(p.prediction)
        assert (values["id"], values["label"], values["error"]) == (row.id, row.label, None)
        assert values["prediction"] == best and values["choice"] == (row.choices or ())[best]
        assert values["draws"] == (4 if p.draw_counts is None else int(p.draw_counts))
        for name, wanted in (
            ("probs", p.probs[0]),
            ("total", p.total[0]),
            ("aleatoric", p.aleatoric[0]),
            ("epistemic", p.epistemic[0]),
            ("agreement", p.agreement[0]),
            ("standard_error", p.standard_error[0, best]),
        ):
            torch.testing.assert_close(torch.tensor(values[name]), wanted.float(), **CLOSE)


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m[0])
def test_without_noise_one_draw(tokenizer: Any, mode: tuple[str, int | None]) -> None:
    """The deterministic adapter, exactly sure of itself; all draws where they are kept."""
    still = tfb.bayesianize(exact(CASES["llama"].build()), seed=3)
    still.configure(sigma=0.0)
    still.configure(mode=mode[0], tail=mode[1])
    found = score(still, tokenizer, rows(6))
    kept = score(still, tokenizer, rows(6), per_draw=True)
    for one, all_ in zip(found, kept, strict=True):
        assert (one["draws"], all_["draws"], len(all_["draw_probs"])) == (1, 4, 4)
        assert (one["epistemic"], one["standard_error"], one["agreement"]) == (0.0, 0.0, 1.0)
        torch.testing.assert_close(torch.tensor(one["probs"]), torch.tensor(all_["probs"]), **CLOSE)


@pytest.mark.parametrize("budget", [1, 30, 100, 10_000])
def test_budget_and_order_do_not_matter(
    bayes: tfb.BayesianModel, tokenizer: Any, mode: str, budget: int
) -> None:
    given = rows()
    expected = score(bayes, tokenizer, given, batch_tokens=64)
    same(score(bayes, tokenizer, given, batch_tokens=budget), expected)
    same(score(bayes, tokenizer, given, batch_size=1 + budget % 7), expected)
    mixed = [given[i] for i in torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    found = {r["id"]: r for r in score(bayes, tokenizer, mixed, batch_tokens=budget)}
    same([found[r["id"]] for r in expected], expected)


def test_the_same_rows_give_the_same_bits(tokenizer: Any) -> None:
    """In float32, whatever was scored before."""
    single = tfb.bayesianize(CASES["llama"].build(), seed=3)
    single.configure(sigma=0.1)
    first = score(single, tokenizer, rows(), batch_tokens=50)
    score(single, tokenizer, rows(5), batch_tokens=20)
    assert score(single, tokenizer, rows(), batch_tokens=50) == first


def test_draws_on_request(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    found = score(bayes, tokenizer, rows(), per_draw=True)
    plain = score(bayes, tokenizer, rows())
    same([{k: v for k, v in r.items() if k != "draw_probs"} for r in found], plain)
    for row in found:
        draws = torch.tensor(row["draw_probs"], dtype=torch.float64)
        assert draws.shape == (4, len(row["probs"]))
        torch.testing.assert_close(draws.mean(0).float(), torch.tensor(row["probs"]), **CLOSE)
    with pytest.raises(ValueError, match="draws=auto"):
        Scorer(bayes, tokenizer, draws="auto", per_draw=True)


def test_decisions_are_columns(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    """As of the results' own probabilities; sets by the choices' texts, where some have fewer."""
    given = rows()
    plain = score(bayes, tokenizer, given)
    bayes.decisions = Decisions(99, 4, target_error=0.1, threshold=0.4, coverage=0.9, quantile=0.7)
    try:
        found = score(bayes, tokenizer, given)
        with pytest.warns(UserWarning, match=r"draws=6: .* were calibrated with 4, and hold appr"):
            Scorer(bayes, tokenizer, draws=6)
        with pytest.warns(UserWarning, match="draws=auto: abstention"):
            Scorer(bayes, tokenizer, draws="auto")
        bayes.decisions = replace(bayes.decisions, target_error=None, threshold=None)
        sets_alone = score(bayes, tokenizer, given)
    finally:
        bayes.decisions = None
    for row, one, other in zip(given, found, plain, strict=True):
        assert one["abstain"] == (max(other["probs"]) <= 0.4)
        likely = {
            name for name, p in zip(row.choices or (), other["probs"], strict=True) if p > 0.3
        }
        assert set(one["prediction_set"]) == likely | {one["choice"]}
        assert one["prediction_set"][0] == one["choice"]
    assert {row["abstain"] for row in found} == {True, False}
    assert {len(row["prediction_set"]) for row in found} >= {1, 2}
    assert all("abstain" not in row and "prediction_set" in row for row in sets_alone)
    decided = ("abstain", "prediction_set")
    assert [{k: v for k, v in r.items() if k not in decided} for r in found] == plain


def test_bad_rows_are_rows(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    """Those that the tokenizer or the model cannot take; the others are as without them."""
    (a, b, c, d, *_) = rows(6)
    given = [
        a,
        replace(b, id="long", prompt="a " * 90 + "="),
        c,
        replace(d, id="twin", choices=("0", " 0")),
        d,
        Row("t", text="a b", source="f:9"),
    ]
    found = score(bayes, tokenizer, given)
    assert [r["id"] for r in found] == [a.id, "long", c.id, "twin", d.id, "t"]
    errors = [r["error"] for r in found]
    assert [e is None for e in errors] == [True, False] * 3
    assert "f:1 (id 'long'): 92 tokens, but the model takes" in errors[1]
    assert "the same token" in errors[3] or "does not know" in errors[3]
    assert "f:9 (id 't'): this is a text row" in errors[5]
    assert set(found[1]) == {"id", "error"}
    same(found[::2], score(bayes, tokenizer, [a, c, d]))
    assert [r["id"] for r in score(bayes, tokenizer, given[1::2])] == ["long", "twin", "t"]
    assert score(bayes, tokenizer, []) == []


def test_nan_is_an_error_of_its_row(tokenizer: Any) -> None:
    broken = tfb.bayesianize(CASES["llama"].build(), seed=3)
    broken.configure(sigma=0.1)
    given = rows()
    poison = tokenizer.convert_tokens_to_ids("e")
    with torch.no_grad():
        broken.base.model.embed_tokens.weight[poison] = float("nan")
    hit = ["e" in (r.prompt or "") for r in given]
    assert True in hit and False in hit
    for draws in (4, "auto"):
        for row, bad in zip(score(broken, tokenizer, given, draws=draws), hit, strict=True):
            assert (row["error"] is not None) == bad and ("probs" in row) != bad
            assert not bad or f"(id '{row['id']}'): the model returned NaN or Inf" in row["error"]


def test_what_the_engine_refuses_is_an_error_of_its_row(
    bayes: tfb.BayesianModel, tokenizer: Any
) -> None:
    """Here tokens beyond the model's vocabulary, which only a pass finds."""
    given = rows(8)
    scorer = Scorer(bayes, tokenizer, draws=4)
    prepared = scorer.prepare(given)
    assert prepared.encoded is not None
    prepared.encoded.input_ids[3][0] = 9999
    found = scorer.compute(prepared)
    assert [r["id"] for r in found if r["error"]] == ["r3"]
    assert "f:3 (id 'r3'): the model refuses it (index out of range" in found[3]["error"]
    expected = score(bayes, tokenizer, given)
    same(found[:3] + found[4:], expected[:3] + expected[4:])


def test_text_rows(tokenizer: Any) -> None:
    head = tfb.bayesianize(exact(CASES["llama_classifier"].build()), seed=3)
    head.configure(sigma=0.1)
    given = [
        Row(f"t{i}", text=" ".join("abc" * (i + 1)), label=2, source=f"f:{i}") for i in range(4)
    ]
    found = score(head, tokenizer, [*given, Row("x", text="a", label=3, source="f:4")])
    assert "the label 3 is outside" in found[4]["error"]
    for row, values in zip(given, found, strict=False):
        inputs = tokenizer(row.text, return_tensors="pt")
        batch = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        wanted = head.predict(batch, 4).probs[0].float()
        torch.testing.assert_close(torch.tensor(values["probs"]), wanted, **CLOSE)
        assert values["choice"] is None and values["label"] == 2
    head.decisions = Decisions(9, 4, coverage=0.9, quantile=1.0)
    assert sorted(score(head, tokenizer, given)[0]["prediction_set"]) == ["0", "1", "2"]


# --- memory ---------------------------------------------------------------------------------------


class SmallMemory:
    """A model that has no room for more than so many padded tokens (times draws of a pass)."""

    def __init__(self, bayes: tfb.BayesianModel, tokens: int) -> None:
        self._bayes, self._tokens = bayes, tokens
        self.shapes: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bayes, name)

    def predict(self, inputs: Any, draws: Any, *, draws_per_pass: Any = None, **how: Any) -> Any:
        self.shapes.append((*inputs["input_ids"].shape, draws_per_pass))
        if inputs["input_ids"].numel() * (2 if draws_per_pass == 2 else 4) > 4 * self._tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._bayes.predict(inputs, draws, **how)


def test_out_of_memory_splits_the_batch(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    """The same rows come out, and the budget that worked is kept for later rows."""
    given, small = [replace(r, choices=("0", "1")) for r in rows(30)], SmallMemory(bayes, 40)
    scorer = Scorer(small, tokenizer, draws=4, batch_tokens=10_000)  # type: ignore[arg-type]
    found = scorer(given)
    same(found, score(bayes, tokenizer, given, batch_tokens=64))
    assert not any(r["error"] for r in found) and scorer.batch_tokens <= 40
    before = len(small.shapes)
    again = scorer(given)
    same(again, found)
    assert all(b * t <= 40 for b, t, _ in small.shapes[before:])


def test_a_row_that_fails_alone_is_an_error(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    """After a last try with two draws in a pass; the budget does not go down for it."""
    given, small = rows(), SmallMemory(bayes, 10)
    lengths = list(map(len, encode(bayes, given, tokenizer).input_ids))
    scorer = Scorer(small, tokenizer, draws=4, batch_tokens=10)  # type: ignore[arg-type]
    found = scorer(given)
    hopeless = [n > 20 for n in lengths]
    assert any(hopeless) and any(10 < n <= 20 for n in lengths) and min(lengths) <= 10
    assert [r["error"] is not None for r in found] == hopeless
    assert all("out of memory" in r["error"] for r in found if r["error"])
    assert scorer.batch_tokens == 10
    assert {d for b, t, d in small.shapes if b * t > 20} == {None, 2}


def test_a_cpu_that_is_out_of_memory(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    """Torch says so by a plain RuntimeError."""

    class Greedy(SmallMemory):
        def predict(self, *_: Any, **__: Any) -> Any:
            return torch.empty(1 << 58)

    scorer = Scorer(Greedy(bayes, 1), tokenizer, draws=4)  # type: ignore[arg-type]
    assert all("out of memory, even alone" in r["error"] for r in scorer(rows(3)))


def test_windows_are_bounded_in_characters(
    bayes: tfb.BayesianModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long rows are read few at a time; results are those of one window, in order."""
    given = [{"id": r.id, "prompt": r.prompt, "choices": list(r.choices or ())} for r in rows()]
    expected = list(tfb.score(given, bayes, tokenizer, draws=2))
    read: list[int] = []

    def records() -> Iterator[dict[str, Any]]:
        for i, row in enumerate(given):
            read.append(i)
            yield row

    monkeypatch.setattr("tfb.data.encoding.LONGEST", 60)
    found = tfb.score(records(), bayes, tokenizer, draws=2)
    first = next(found)
    assert len(read) < 6
    same([first, *found], expected)


def test_other_failures_are_not_hidden(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    class Broken(SmallMemory):
        def predict(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("CUDA error")

    scorer = Scorer(Broken(bayes, 1), tokenizer, draws=4)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="CUDA error"):
        scorer(rows())


# --- records --------------------------------------------------------------------------------------


def item(fields: dict[str, Any] | None, number: int = 0, keep: tuple[str, ...] = ()) -> Item:
    fault = "not JSON" if fields is None else None
    return read_item(Record("f:1", fields, fault), number, RowFormat(task="SEQ_CLS"), keep)


def test_a_record_is_a_row_or_an_error() -> None:
    """Which keeps what can be told of it."""
    good = item({"id": 7, "text": "a", "tag": 1, "label": 2}, keep=("tag", "none"))
    row = Row("7", text="a", label=2, source="f:1")
    assert good == (row, {"id": "7", "tag": 1, "none": None})
    assert item({"text": "a"}, number=12)[1] == {"id": "12"}
    assert item(None) == (None, {"id": None, "error": "f:1: not JSON"})
    empty, result = item({"id": "x", "text": "", "tag": 1}, keep=("tag",))
    assert empty is None and (result["id"], result["tag"]) == ("x", 1)
    assert "nothing in column 'text'" in result["error"]
    _, surrogate = item({"id": "x\ud800", "text": "a"})
    assert surrogate["id"] is None and "f:1" in surrogate["error"]
    _, kept = item({"id": "x", "text": "a", "tag": "\ud800"}, keep=("tag",))
    assert kept["id"] == "x" and "the column 'tag', which is to be kept, cannot" in kept["error"]


@pytest.mark.parametrize("levels", [101, 490, 960, 20_000])
def test_kept_values_that_are_too_deep(levels: int) -> None:
    """Whatever would not be written, however deep the stack is where that is found out."""
    nested: Any = []
    for i in range(levels):
        nested = {"a": [nested]} if i == 0 else [nested]
    row, result = item({"text": "a", "tag": nested}, keep=("tag",))
    assert (
        row is None
        and "'tag', which is to be kept, cannot be written (nested deeper" in (result["error"])
    )


def test_whatever_is_kept_is_written_or_an_error(tmp_path: Path) -> None:
    """In both formats: odd types, odd keys, 16 MiB, and all the levels that are allowed."""
    nested: Any = 1
    for _ in range(DEEPEST):
        nested = [nested]
    given = [
        *(nested, Decimal("1.50"), date(2024, 2, 29), datetime(9999, 12, 31), time(1, 2), b"\xff"),
        *({1, 2}, {3: {None: 1.5}}, math.nan, [math.inf], 10**30, np.float32(0.5), np.int64(3)),
        *(
            np.array([1, 2]),
            range(3),
            "\x00\u202e",
        ),
        *("x" * (16 << 20), {(1, 2): 3}, "\ud800", {"\ud800": 1}, 10**5000, [[1], "a", None]),
    ]
    items = [item({"text": "a", "tag": value}, keep=("tag",)) for value in given]
    assert [i for i, (row, _) in enumerate(items) if row is None] == [17, 18, 19, 20]
    names = {"id": pa.string(), "tag": pa.string(), "error": pa.string()}
    for kind in FORMATS:
        folder = OutputFolder(tmp_path / kind, pa.schema(names), kind)
        with folder:
            rows = [{"error": None, "draws": 1} | result for _, result in items]
            assert folder.write_part("part-00000-00000000", rows).errors == 4


def test_results_come_beside_what_was_kept() -> None:
    first: Item = (Row("a", text="x"), {"id": "a", "tag": 1})
    items = [first, (None, {"id": None, "tag": 2, "error": "bad"})]
    found = result_rows(items, [{"id": "a", "probs": [1.0], "error": None}])
    assert found == [
        {"id": "a", "tag": 1, "probs": [1.0], "error": None},
        {"id": None, "tag": 2, "error": "bad"},
    ]


def test_error_texts_are_bounded_and_plain() -> None:
    _, long = item({"id": "x" * 10_000, "text": "a", "label": "y"})
    assert len(long["error"]) < 2100
    record = Record("f:1", None, "a\ud800" + "x" * 10_000)
    text = read_item(record, 0, RowFormat())[1]["error"]
    assert text.startswith("f:1: a\\ud800xxx") and text.endswith("x ...") and len(text) < 2100
