"""Probabilities from rows to scores, against PEFT's model on whole texts.

The reference knows no shared tokens, no padding and no cache: it reads a row's prompt with one
choice at a time and sums the log-probabilities of all tokens after the prompt's.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.architectures import DRAWS, SPLIT, Kind, of
from support.models import naive, relative
from support.tokenizers import (
    ROWS,
    Spec,
    Split,
    is_usable,
    row_of,
    split_of,
    tokenizer_of,
)
from torch import Tensor

import tfb
from tfb import Draws
from tfb.adapters.loading import load_tokenizer
from tfb.data.batching import EncodedRows, batches
from tfb.data.encoding import RowEncoder
from tfb.data.readers import read_rows
from tfb.data.rows import Row
from tfb.evaluation.metrics import evaluate
from tfb.scoring.evaluate import compare_label_tokens, encode, predict_rows

EXACT = 1e-10  # float64, to the last operation
SINGLE = 1e-5  # nats: float32 log-probabilities of size 10, summed and averaged

SPECS = {
    "marked": Spec("prepended"),
    "bytes": Spec("byte-level", template="$A", seed=1),
    "split": Spec("metaspace", template="<s> $A </s>", turn=True, seed=2),
}
# Letters, numbers and words; choices of one length and of several, some of which begin others.
TEXTS: list[tuple[str, list[str]]] = [
    ("Topic is it yes no:", ["A", "B", "C", "D"]),
    ("is it", ["1", "10", "100", "12"]),
    ("bank Answer:", ["yes", "yesterday", "no"]),
    ("a", ["small talk", "small", "banking", "not"]),
    ("Topic ", ["bank", "banking"]),
    ("no no 12?\n", ["A", "AB", "B"]),
    ("Answer", ["21", "22", "23", "24"]),
    ("Topic is it", [" A B", " A C", " A D"]),
    ("yes", ["éa", "éb", "éab"]),
]


@dataclass(frozen=True)
class Setting:
    """A model for a tokenizer, Bayesian, and twins that are not."""

    spec: Spec
    bayes: Any
    sampled: Any
    mean: Any

    @property
    def encoder(self) -> RowEncoder:
        return RowEncoder(tokenizer_of(self.spec))

    def probabilities(self, rows: Sequence[Row], draws: Draws, tail: int | None = None) -> Tensor:
        """The definition, [N, K] with zeros for what a row has not."""
        splits = [split_of(self.spec, row) for row in rows]
        K = max(len(row.choices or ()) for row in rows)

        def probs(model: Any) -> Tensor:
            scores = torch.full((len(rows), K), -math.inf, dtype=torch.float64)
            for i, split in enumerate(splits):
                assert split is not None
                found = by_hand(split, whole(model) if tail is None else self.last(model, tail))
                scores[i, : len(found)] = found
            return scores.softmax(-1)

        return naive(self.sampled, self.bayes.posteriors, draws, probs).mean(0)

    def last(self, sampled: Any, k: int) -> Callable[[Tensor, int], Tensor]:
        """Reads a text with a draw's weights from k tokens before its end; before that, with the
        mean's."""

        def read(ids: Tensor, after: int) -> Tensor:
            first, cache = max(0, ids.shape[1] - after - k), transformers.DynamicCache()
            logits = []
            if first:
                out = self.mean(input_ids=ids[:, :first], past_key_values=cache, use_cache=True)
                logits.append(out.logits)
            position = torch.arange(first, ids.shape[1])[None]
            rest = {"input_ids": ids[:, first:], "position_ids": position}
            out = sampled(**rest, past_key_values=cache, use_cache=True)
            return torch.cat([*logits, out.logits], dim=1)

        return read


@functools.cache
def setting(name: str) -> Setting:
    spec = SPECS[name]
    size = len(tokenizer_of(spec))
    make = of("LlamaConfig:LlamaForCausalLM", vocab_size=size, max_position_embeddings=256)
    kind = Kind(make, SPLIT)
    return Setting(spec, tfb.bayesianize(kind.build(), seed=3), kind.build(), kind.build())


def whole(model: Any) -> Callable[[Tensor, int], Tensor]:
    return lambda ids, after: model(input_ids=ids).logits


@torch.no_grad()
def by_hand(split: Split, read: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Scores [K]: the sum over all tokens that a choice adds to its prompt's.

    ``read(ids, after)``: logits [1, T, V] of ids [1, T], of which the last ``after`` follow on what
    all choices have in common.
    """
    prompt, choices = split
    same = len(prompt) + shared(choices)
    scores = []
    for choice in choices:
        ids = torch.tensor([[*prompt, *choice]])
        log_probs = read(ids[:, :-1], ids.shape[1] - 1 - same).log_softmax(-1)[0]
        at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        scores.append(log_probs[at, torch.tensor(choice)].sum())
    return torch.stack(scores)


def shared(choices: list[list[int]]) -> int:
    """The first tokens that all choices have in common, without the last of any."""
    columns = zip(*(ids[:-1] for ids in choices), strict=False)
    return len([*itertools.takewhile(lambda column: len(set(column)) == 1, columns)])


def predicted(
    bayes: Any, encoded: EncodedRows, draws: Draws, size: int, side: str, **how: Any
) -> Tensor:
    """Probabilities [N, K] from batches, with zeros for what a row has not."""
    N, K = len(encoded), max(map(encoded.num_choices, range(len(encoded))))
    probs = torch.zeros(N, K, dtype=torch.float64)
    for batch in batches(encoded, batch_size=size, pad_token_id=0, padding_side=side):
        found = bayes.predict(batch.model_inputs(), draws, label_ids=batch.label_ids, **how).probs
        probs[batch.indices, : found.shape[1]] = found
    return probs


@functools.cache
def expected(name: str, draws: Draws, tail: int | None = None) -> Tensor:
    return setting(name).probabilities(fixed_rows(name), draws, tail)


@functools.cache
def fixed_rows(name: str) -> list[Row]:
    return [row_of(prompt, choices, i) for i, (prompt, choices) in enumerate(TEXTS)]


# --- random models --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 50])
@pytest.mark.parametrize("name", SPECS)
def test_probabilities_of_whole_texts(name: str, size: int, side: str) -> None:
    """All rows, in any batches; draws do differ from the mean."""
    here = setting(name)
    encoded = here.encoder(fixed_rows(name))
    mean, drawn = expected(name, Draws.mean()), expected(name, DRAWS)
    assert relative(predicted(here.bayes, encoded, Draws.mean(), size, side), mean) < EXACT
    assert relative(predicted(here.bayes, encoded, DRAWS, size, side), drawn) < EXACT
    assert relative(mean, drawn) > 1e-3


@pytest.mark.parametrize("name", SPECS)
def test_the_fixed_rows_are_of_every_kind(name: str) -> None:
    """Rows by columns and rows by several tokens, each with and without first tokens that all
    choices share, and prompts of several lengths."""
    rows, here = fixed_rows(name), setting(name)
    encoded = here.encoder(rows)
    kinds = set()
    for i, row in enumerate(rows):
        split = split_of(here.spec, row)
        assert split is not None
        assert len(encoded.input_ids[i]) == len(split[0]) + shared(split[1])
        kinds.add((encoded.choice_tokens(i) is None, shared(split[1]) > 0))
    assert kinds >= {(False, False), (False, True), (True, False)}
    assert len(set(map(len, encoded.input_ids))) > 3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("name", SPECS)
def test_tails_end_with_what_choices_share(name: str, k: int, side: str) -> None:
    """Noise acts on the last k tokens before choices differ, and on those of the choices."""
    here = setting(name)
    encoded, draws = here.encoder(fixed_rows(name)), DRAWS[:2]
    found = predicted(here.bayes, encoded, draws, 50, side, mode="tail", tail=k)
    assert relative(found, expected(name, draws, k)) < EXACT
    assert relative(found, expected(name, draws)) > 1e-4


@settings(max_examples=25)
@given(
    st.sampled_from([*SPECS]),
    st.lists(ROWS, min_size=1, max_size=2),
    st.sampled_from(["left", "right"]),
    st.sampled_from([None, 1, 3]),
)
def test_drawn_rows(name: str, rows: list[Row], side: str, tail: int | None) -> None:
    here = setting(name)
    rows = [replace(row, id=str(i)) for i, row in enumerate(rows)]
    splits = [split_of(here.spec, row) for row in rows]
    assume(all(split is not None and is_usable(split[1]) for split in splits))
    how = {} if tail is None else {"mode": "tail", "tail": tail}
    draws = DRAWS[:2]
    found = predicted(here.bayes, here.encoder(rows), draws, 2, side, **how)
    assert relative(found, here.probabilities(rows, draws, tail)) < EXACT


# --- a trained model ------------------------------------------------------------------------------

DOMAINS = 6  # of ten; choices "A" to "F"


def of_six(path: Path) -> list[dict[str, Any]]:
    """The rows of the first domains, with their letters alone to choose from."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    short = [row | {"choices": row["choices"][:DOMAINS]} for row in rows]
    return [row for row in short if row["label"] < DOMAINS]


def train(model: Any, pairs: list[tuple[list[int], int]], steps: int, rows: int) -> None:
    """AdamW on the loss of each text's tokens from a number of them on."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(pairs), (rows,), generator=generator).tolist()
        T = max(len(pairs[i][0]) for i in chosen)
        ids = torch.zeros(rows, T, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, i in enumerate(chosen):
            text, first = pairs[i]
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
            labels[row, first : len(text)] = torch.tensor(text[first:])
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()


@pytest.fixture(scope="module")
def trained(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that writes a domain's letter, as it stands in text: " A" is two tokens of this
    tokenizer, " B" is one."""
    source = shared / "models/stories260K"
    tokenizer = load_tokenizer(str(source))
    assert tokenizer.tokenize("Topic A B")[-3:] == ["▁", "A", "▁B"]
    pairs = []
    for row in of_six(shared / "data/clinc-domain/validation.jsonl"):
        prompt = tokenizer(row["prompt"])["input_ids"]
        text = tokenizer(f"{row['prompt']} {row['choices'][row['label']]}")["input_ids"]
        if len(text) <= 28:  # for speed
            pairs.append((text, len(prompt)))
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    config = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules=SPLIT)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(base, config)
    train(model.train(), pairs, steps=120, rows=16)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(folder))
    return folder


def loaded(shared: Path, adapter: Path) -> Any:
    """PEFT's model."""
    base = tfb.load_base(str(shared / "models/stories260K"), str(adapter))
    return tfb.load_adapter(base, str(adapter)).eval()


def test_a_trained_model_and_plain_peft(shared: Path, trained: Path, tmp_path: Path) -> None:
    """Accuracy and NLL are those of summed log-probabilities, or, of last tokens alone, of the
    columns at a prompt's end, by which this adapter knows little."""
    held_out = of_six(shared / "data/clinc-domain/anchor.jsonl")[:80]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in held_out))
    tokenizer = load_tokenizer(str(shared / "models/stories260K"))
    plain = loaded(shared, trained)
    labels = torch.tensor([row["label"] for row in held_out])
    scores, columns = [], []
    for row in held_out:
        prompt = tokenizer(row["prompt"])["input_ids"]
        texts = [tokenizer(f"{row['prompt']} {c}")["input_ids"] for c in row["choices"]]
        assert all(text[: len(prompt)] == prompt for text in texts)
        scores.append(by_hand((prompt, [text[len(prompt) :] for text in texts]), whole(plain)))
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([prompt])).logits[0, -1]
        columns.append(logits[[text[-1] for text in texts]])

    bayes, found = tfb.bayesianize(loaded(shared, trained)), {}
    for name, reference in (("all", scores), ("last", columns)):
        bayes.label_tokens = name
        encoded = encode(bayes, data, tokenizer)
        assert encoded.labels == labels.tolist()
        p = predict_rows(bayes, encoded, Draws.mean(), batch_size=32).probs
        found[name] = evaluate(p, labels)
        log_probs = torch.stack(reference).log_softmax(-1)
        nll = -log_probs[range(len(labels)), labels].mean()
        assert found[name].nll == pytest.approx(float(nll), abs=SINGLE)
        accuracy = (log_probs.argmax(-1) == labels).double().mean()
        assert found[name].accuracy == pytest.approx(float(accuracy), abs=SINGLE)
    assert found["all"].accuracy > 0.5 > found["last"].accuracy + 0.2
    compared, told = compare_label_tokens(bayes, read_rows(data), tokenizer) or ({}, False)
    assert compared == pytest.approx({name: f.nll for name, f in found.items()}, abs=SINGLE)
    assert told and compared["all"] + 1 < compared["last"]


def test_a_model_of_last_tokens(shared: Path) -> None:
    """The reference adapter was trained on single letters right after the prompt."""
    bayes = tfb.bayesianize(loaded(shared, shared / "adapters/stories260K-clinc-domain"))
    tokenizer = load_tokenizer(str(shared / "models/stories260K"))
    rows = read_rows(shared / "data/clinc-domain/anchor.jsonl")[:80]
    assert {row.choices for row in rows} == {tuple("ABCDEFGHIJ")}
    compared, told = compare_label_tokens(bayes, rows, tokenizer) or ({}, False)
    assert told and compared["last"] + 1 < compared["all"]
    few = [row for row in rows if (row.label or 0) < 4]  # four of ten labels do not tell
    assert compare_label_tokens(bayes, few, tokenizer)[1] is False  # type: ignore[index]
    bayes.configure(sigma=0.02, temperature=4.0)  # whatever was fitted before
    assert compare_label_tokens(bayes, rows, tokenizer) == (compared, True)
