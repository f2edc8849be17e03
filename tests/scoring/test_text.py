"""Text behind prompts: what `bayes.generate` writes row by row, and runs over files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.models import CASES, exact
from support.scoring import ROWS, files, manifest, needs_ray, results, write
from support.tokenizers import ALPHABET, letters_and_pairs
from transformers import PreTrainedTokenizerFast

import tfb
from tfb.data.rows import Row, RowError
from tfb.demo import digits
from tfb.scoring.job import Job
from tfb.scoring.output import OutputError
from tfb.scoring.run import run, verify
from tfb.scoring.scorer import Result, TextScorer

SINGLE = 2.0**-24
NEW, END = 6, 1
REAL = ("sequence_uncertainty", "total", "aleatoric", "epistemic")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return letters_and_pairs()


@pytest.fixture
def bayes() -> tfb.BayesianModel:
    """A random Llama in float64, so that batches round far below float32."""
    model = tfb.bayesianize(exact(CASES["llama"].build()), seed=3)
    model.configure(sigma=0.1)
    model.base.generation_config.eos_token_id = END
    return model


def rows(n: int = 6) -> list[Row]:
    """Prompts of 3 to 25 tokens."""
    made = (
        "".join(ALPHABET[(5 * i + j + i * j) % 26] for j in range(3 + i * 7 % 23)) for i in range(n)
    )
    return [Row(f"r{i}", f"{text}\n", source=f"f:{i}") for i, text in enumerate(made)]


def written(bayes: Any, tokenizer: Any, given: list[Row], **how: Any) -> list[Result]:
    return TextScorer(bayes, tokenizer, **({"draws": 4, "max_new_tokens": NEW} | how))(given)


def same(found: list[Result], expected: list[Result]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert {**one, **dict.fromkeys(REAL)} == {**other, **dict.fromkeys(REAL)}
        for name in REAL:
            assert one[name] == pytest.approx(other[name], rel=4 * SINGLE, abs=4 * SINGLE)


def by_hand(bayes: Any, tokenizer: Any, row: Row, stop: str | None = None) -> Result:
    """One row through ``bayes.generate``, without padding."""
    ids = tokenizer(row.prompt, return_tensors="pt")
    how = {"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}
    batch = {name: ids[name] for name in ("input_ids", "attention_mask")}
    found = bayes.generate(batch, 4, do_sample=False, max_new_tokens=NEW, **how)
    n = int(found.lengths)
    new = found.sequences[0, ids["input_ids"].shape[1] :][:n].tolist()
    ends, text = new[-1] == END, tokenizer.decode([i for i in new if i > END])
    return {
        "id": row.id,
        "text": text.partition(stop)[0] if stop else text,
        "tokens": len(new),
        "finish_reason": "stop" if ends or (stop or "\0") in text else "length",
        "sequence_uncertainty": -float(found.log_probs[0, :n].sum()),
        **{k: float(getattr(found, k)[0, :n].mean()) for k in ("total", "aleatoric", "epistemic")},
        "draws": 4,
        "error": None,
    }


@pytest.mark.parametrize(("mode", "tail"), [("full", None), ("tail", 2)])
def test_rows_are_those_of_generate_one_by_one(
    bayes: tfb.BayesianModel, tokenizer: Any, mode: str, tail: int | None
) -> None:
    """In batches of unequal prompts, of any size, to the limit or to a stop string."""
    bayes.configure(mode=mode, tail=tail)
    given = rows(5)
    plain = [by_hand(bayes, tokenizer, row) for row in given]
    for budget in (1, 60):
        same(written(bayes, tokenizer, given, batch_tokens=budget), plain)
    long = [row["text"] for row in plain if row["finish_reason"] == "length"]
    stop = next(c for c in ALPHABET if 1 <= sum(c in text for text in long) < len(long))
    stopped = [by_hand(bayes, tokenizer, row, stop) for row in given]
    same(written(bayes, tokenizer, given, stop=[stop], batch_size=3), stopped)
    assert {row["finish_reason"] for row in stopped} == {"stop", "length"}
    assert not any(stop in row["text"] for row in stopped)


def test_chats_are_written_behind_their_template(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    """As the same text in a prompt; through ``tfb.score`` too, whose rows may be plain texts."""
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    prompts = [str(row.prompt) for row in rows()]
    chats = [{"messages": [{"role": "user", "content": text[:-1]}]} for text in prompts]
    how: dict[str, Any] = {"draws": 4, "generate": True, "max_new_tokens": NEW}
    found, plain = (list(tfb.score(data, bayes, tokenizer, **how)) for data in (chats, prompts))
    assert found == plain and len(found) == len(prompts)
    same(
        [row | {"id": f"r{i}", "error": None} for i, row in enumerate(found)],
        written(bayes, tokenizer, rows()),
    )


def test_end_tokens_are_the_models_and_the_tokenizers(
    bayes: tfb.BayesianModel, tokenizer: Any
) -> None:
    """Of both it is no text, and the row is what it would have been up to there."""
    (plain,) = written(bayes, tokenizer, rows(1))
    letters = tokenizer(plain["text"])["input_ids"]
    at = next(i for i in range(2, NEW) if letters[i] not in letters[:i])
    for own, name in ((letters[at], "</s>"), ([5, letters[at]], "</s>"), (None, None)):
        bayes.base.generation_config.eos_token_id = own
        other = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
        other.eos_token = name or tokenizer.convert_ids_to_tokens(letters[at])
        (found,) = written(bayes, other, rows(1))
        assert (found["tokens"], found["finish_reason"]) == (at + 1, "stop")
        assert plain["text"].startswith(found["text"])
    bayes.base.generation_config.eos_token_id = None
    assert written(bayes, tokenizer, rows(1)) == [plain]


def test_nothing_is_sampled(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    """Whatever generation_config.json says; what it says of scores holds, as in `generate`."""
    plain, config = written(bayes, tokenizer, rows()), bayes.base.generation_config
    config.do_sample, config.temperature, config.top_p, config.top_k = True, 9.0, 0.9, 40
    config.num_beams, config.num_return_sequences, config.max_time = 3, 2, 1e-9
    config.stop_strings, config.max_length = ["a"], 5
    assert written(bayes, tokenizer, rows()) == plain
    config.num_beams, config.num_return_sequences, config.max_time = 1, 1, None
    config.stop_strings = None
    config.repetition_penalty = 3.0
    penalized = written(bayes, tokenizer, rows())
    assert [row["text"] for row in penalized] != [row["text"] for row in plain]
    same(penalized, [by_hand(bayes, tokenizer, row) for row in rows()])


@pytest.mark.parametrize("tail", [None, 2])
def test_other_ways_to_decode_are_not_taken(
    bayes: tfb.BayesianModel, tokenizer: Any, tail: int | None
) -> None:
    """A model's own settings that no draws allow, or that would read a prompt another way."""
    bayes.configure(mode="full" if tail is None else "tail", tail=tail)
    plain, config = written(bayes, tokenizer, rows(3)), bayes.base.generation_config
    config.guidance_scale, config.penalty_alpha, config.token_healing = 1.5, 0.6, True
    config.cache_implementation, config.use_cache, config.min_length = "offloaded", False, 40
    assert written(bayes, tokenizer, rows(3)) == plain


def test_without_noise_it_is_the_adapters_own_text(tokenizer: Any) -> None:
    bayes = tfb.bayesianize(exact(CASES["llama"].build()), seed=3)
    bayes.configure(sigma=0.0)
    for row, found in zip(rows(3), written(bayes, tokenizer, rows(3)), strict=True):
        ids = tokenizer(row.prompt, return_tensors="pt")["input_ids"]
        wanted = bayes.model.generate(
            input_ids=ids, max_new_tokens=NEW, do_sample=False, eos_token_id=END
        )
        assert found["text"] == tokenizer.decode(
            wanted[0, ids.shape[1] :], skip_special_tokens=True
        )
        assert (found["draws"], found["epistemic"]) == (1, 0.0)


def test_bad_rows_are_rows(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    """The others are as without them."""
    with torch.no_grad():
        bayes.base.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("H")] = float("nan")
    a, b, c, *_ = rows()
    bad = [replace(a, prompt=text) for text in ("é", "a" * 60, "xHx")]
    given = [a, bad[0], b, bad[1], bad[2], c, Row("t", text="a", source="f:9")]
    found = written(bayes, tokenizer, given)
    same([found[i] for i in (0, 2, 5)], written(bayes, tokenizer, [a, b, c]))
    for i, fault in (
        (1, "f:0 (id 'r0'): no tokens; write text that the tokenizer knows"),
        (3, "f:0 (id 'r0'): 60 tokens and 6 new ones, but the model takes 64; shorten the row, "),
        (4, "f:0 (id 'r0'): the model refuses it (generate: the model returned NaN or Inf"),
        (6, "f:9 (id 't'): this is a text row; use rows with 'prompt' here"),
    ):
        assert set(found[i]) == {"id", "error"} and found[i]["error"].startswith(fault)
    cut = written(bayes, tokenizer, [bad[1], a], truncate="left")
    assert [row["truncated"] for row in cut] == [2, 0]
    assert cut[0] == written(bayes, tokenizer, [replace(a, prompt="a" * 58)], truncate="left")[
        0
    ] | {"truncated": 2}
    data = [{"prompt": a.prompt}, {"question": "x"}]
    with pytest.raises(RowError, match="row 1: no column 'prompt'; there are 'question'"):
        list(tfb.score(data, bayes, tokenizer, draws=2, generate=True, max_new_tokens=2))


def test_a_batch_too_large_for_memory_is_split(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    """New tokens count in it."""
    shapes: list[tuple[int, int]] = []

    class SmallMemory:
        def __getattr__(self, name: str) -> Any:
            return getattr(bayes, name)

        def generate(self, inputs: Any, *args: Any, **options: Any) -> Any:
            rows, tokens = inputs["input_ids"].shape
            shapes.append((rows, tokens + options["max_new_tokens"]))
            if rows * (tokens + options["max_new_tokens"]) > 80:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return bayes.generate(inputs, *args, **options)

    scorer = TextScorer(SmallMemory(), tokenizer, draws=4, max_new_tokens=NEW)  # type: ignore[arg-type]
    given = [Row(str(i), "abcd" + c) for i, c in enumerate(ALPHABET[:8])]
    same(scorer(given), written(bayes, tokenizer, given))
    assert scorer.batch_tokens <= 80 < max(n * t for n, t in shapes)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"draws": "auto"}, "draws=auto: not with generate=True, where draws write side by side"),
        ({"draws": tfb.Adaptive()}, "draws=auto: not with generate=True"),
        ({"per_draw": True}, "per_draw=True: not with generate=True"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected a whole number, at least 1"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens=2\.5: expected a whole number"),
        ({"max_new_tokens": 64}, "max_new_tokens=64: expected .* fewer than the 64 tokens that"),
        ({"stop": "."}, r"stop='\.': expected a list of texts, none of them empty"),
        ({"stop": ["", "a"]}, r"stop=\['', 'a'\]: expected a list"),
        ({"draws": 3}, "draws=3"),
        ({"generate": False, "max_new_tokens": 128}, "max_new_tokens=128: is a setting of gener"),
        ({"generate": False, "stop": ["a"]}, "stop='a': is a setting of generate=True; add that"),
        ({"columns": {"text": "a"}}, "columns: 'text' is none of id, prompt, messages"),
    ],
)
def test_settings_that_cannot_work(
    bayes: tfb.BayesianModel, tokenizer: Any, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small = {} if how.get("generate") is False else {"generate": True, "max_new_tokens": NEW}
        tfb.score([], bayes, tokenizer, **(small | how))


def test_models_and_tokenizers_that_cannot_work(bayes: tfb.BayesianModel, tokenizer: Any) -> None:
    head = tfb.bayesianize(CASES["llama_classifier"].build(), seed=3)
    head.configure(sigma=0.1)
    with pytest.raises(
        ValueError, match=r"generate=True: needs a causal language .* one is SEQ_CLS"
    ):
        tfb.score([], head, tokenizer, generate=True)
    words = PreTrainedTokenizerFast.from_pretrained(str(digits.BASE))  # that knows no "abcdef"
    with pytest.raises(ValueError, match="stop='a': transformers finds no text in this tokenizer"):
        tfb.score([], bayes, words, generate=True, max_new_tokens=NEW, stop=["a"])


# --- runs over files ------------------------------------------------------------------------------


@pytest.fixture
def writing(job: Job, tmp_path: Path) -> Job:
    """Digits to be continued by three tokens, the last one of them broken."""
    inputs = (str(write(tmp_path / "prompts.jsonl", [*ROWS[:13], {"id": "none"}])),)
    return replace(job, inputs=inputs, generate=True, max_new_tokens=3, keep=("tag",))


def test_a_run_is_resumed_to_the_same_bytes(
    writing: Job, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are those of ``tfb.score``, and the manifest holds what a text depends on."""
    done = run(writing, max_error_rate=1.0)
    assert (done.counts.rows, done.counts.errors, done.counts.draws) == (14, 1, 26)
    whole, found = files(writing), results(writing)
    assert verify(Path(writing.output))[1] == []
    scored = tfb.score(ROWS[:13], *loaded, draws=2, generate=True, max_new_tokens=3)
    for one, other, row in zip(found[:13], scored, ROWS, strict=False):
        assert one["tag"] == row["tag"] and one["text"] == other["text"] != ""
        assert one["tokens"] == other["tokens"] and one["finish_reason"] == "length"
        assert one["total"] == pytest.approx(other["total"], abs=1e-5)
    assert "no column 'prompt'; there are 'id'" in found[13]["error"]
    told = manifest(writing)["configuration"]
    assert (told["generate"], told["max_new_tokens"], told["stop"]) == (True, 3, [])
    assert told["generation"]["pad_token_id"] == loaded[0].base.generation_config.pad_token_id
    (Path(writing.output) / "part-00000-00000006.jsonl").unlink()
    assert run(writing, resume=True, max_error_rate=1.0) == done and files(writing) == whole
    for change, match in (
        ({"max_new_tokens": 4}, "max_new_tokens: 3 -> 4"),
        ({"stop": ("a",)}, "stop"),
        ({"generate": False, "max_new_tokens": None}, "schema.text: string -> None"),
    ):
        with pytest.raises(OutputError, match=match):
            run(replace(writing, **change), resume=True)  # type: ignore[arg-type]
    monkeypatch.setattr(loaded[0].base.generation_config, "repetition_penalty", 2.0)
    with pytest.raises(OutputError, match=r"generation\.repetition_penalty: None -> 2\.0"):
        run(writing, resume=True)


def test_parts_of_parquet(writing: Job, loaded: tuple[Any, Any]) -> None:
    run(replace(writing, format="parquet", truncate="left", limit=4))
    schema = pq.read_schema(next(Path(writing.output).glob("part-*")))
    reals = dict.fromkeys(REAL, "float")
    assert {column.name: str(column.type) for column in schema} == {
        **{"id": "string", "tag": "string", "text": "string", "tokens": "int32"},
        **{"finish_reason": "string", **reals, "draws": "int32", "truncated": "int32"},
        "error": "string",
    }
    texts = tfb.score(ROWS[:4], *loaded, draws=2, generate=True, max_new_tokens=3)
    found = [(row["text"], row["truncated"]) for row in results(writing)]
    assert found == [(row["text"], 0) for row in texts]


def test_job_settings_that_cannot_work(writing: Job, artifact: str) -> None:
    for change, message in (
        ({"draws": "auto"}, "draws=auto: not with generate=True"),
        ({"per_draw": True}, "per_draw=True: not with"),
        ({"labels": ("a", "b")}, "generate=True: rows have no choices and no classes"),
        ({"generate": False}, "max_new_tokens=3: is a setting of generate=True"),
        ({"keep": ("text",)}, "keep=text: the output has a column of that name"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(writing, **change))  # type: ignore[arg-type]
    assert not Path(writing.output).exists()


def test_an_artifact_of_another_task_is_refused_before_loading(
    writing: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {**writing.sidecar, "task": "SEQ_2_SEQ_LM"}
    monkeypatch.setattr(Job, "sidecar", told)
    monkeypatch.setattr(Job, "load", lambda _: pytest.fail("loads the weights"))
    with pytest.raises(ValueError, match=r"generate=True: needs a causal .* this one is SEQ_2_SEQ"):
        run(replace(writing))


@needs_ray
def test_ray_writes_the_same_bytes(writing: Job, cluster: str) -> None:
    run(writing, max_error_rate=1.0)
    job = replace(writing, output=f"{writing.output}2", workers=1, ray_address=cluster)
    run(job, engine="ray", max_error_rate=1.0)
    assert files(job) == files(writing)
