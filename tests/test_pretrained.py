"""The front door: four lines on the embedded model, and what transformers itself makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.models import CASES, LABELS
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import tfb
from tfb.data.rows import RowError
from tfb.demo import digits
from tfb.pretrained import TfbModel

CLASSIFIERS = ("bert", "llama_classifier")
TEXTS = ["w1 w2 w3", "w5 w9 w1 w2", "w7"]
ROUNDING = 1e-5  # float32 probabilities of a padded batch against rows alone


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of sixty words, within the vocabulary of the tiny models."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i + 2 for i in range(60)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", padding_side="right"
    )


def tiny(name: str, sigma: float = 0.3, temperature: float = 1.3) -> TfbModel:
    m = tfb.from_peft(CASES[name].build(), words(), draws=4)
    m.bayes.configure(sigma=sigma, temperature=temperature)
    return m


def loop(m: TfbModel, batch: Any, draws: tfb.Draws) -> Tensor:
    """Averaged probabilities of one forward pass for each draw."""
    found = []
    for sigma, stream in zip(draws.sigmas, draws.streams, strict=True):
        one = tfb.Draws((sigma,), (stream,), draws.seed)
        with m.bayes.sampling(one), torch.no_grad():
            logits = m.bayes.model(**batch).logits
        found.append((logits / m.bayes.config.temperature).softmax(-1))
    return torch.stack(found).mean(0)


@pytest.fixture(scope="module")
def fitted() -> TfbModel:
    """The embedded model, fitted to rows whose columns have other names."""
    rows = [{"question": r["prompt"], **r} for r in digits.rows("anchor")[:64]]
    for row in rows:
        del row["prompt"]
    m = tfb.from_pretrained(digits.ADAPTER, digits.BASE)
    m.fit(rows, prompt="question", draws=4)
    m.bayes.configure(sigma=0.008)  # so that draws differ whatever the verdict
    return m


def test_four_lines(fitted: TfbModel, tmp_path: Path) -> None:
    """Columns are remembered, also by the artifact, which alone gives the same numbers."""
    rows = [{"question": r["prompt"], "choices": r["choices"]} for r in digits.rows("test")[:6]]
    table = fitted.score(rows)
    assert table.label.isna().all() and (table.draws == 10).all()
    folder = fitted.save_pretrained(tmp_path / "artifact")
    again = tfb.from_pretrained(folder)  # its base by the artifact, its tokenizer its own
    assert (again.columns, again.fitted) == (fitted.columns, fitted.fitted)
    assert again.score(rows).equals(table)
    assert list(again.score(rows, stream=True)) == table.to_dict("records")
    plain = tfb.score(rows, again.bayes, again.tokenizer, columns={"prompt": "question"})
    assert list(plain) == table.to_dict("records")


def test_texts_are_rows(fitted: TfbModel) -> None:
    rows = digits.rows("test")[:3]
    prompts, choices = [row["prompt"] for row in rows], rows[0]["choices"]
    found = fitted.predict(prompts, choices=choices)
    named = [{"question": p, "choices": choices} for p in prompts]
    assert torch.equal(found.probs, fitted.predict(named).probs)
    alone = fitted.predict(prompts[0], choices=choices)
    torch.testing.assert_close(alone.probs, found.probs[:1], atol=ROUNDING, rtol=0)
    with pytest.raises(RowError, match="choices"):
        fitted.predict(prompts)
    assert fitted.predict(named, choices=choices[:2]).probs.shape == (3, 2)  # not the rows' own
    batch = fitted.tokenizer(prompts, return_tensors="pt", padding=True)
    for options in ({"choices": choices}, {"truncate": "left"}):
        with pytest.raises(ValueError, match=r"a batch (has|is)"):
            fitted.predict(batch, **options)


def test_evaluate_and_report(fitted: TfbModel, tmp_path: Path) -> None:
    """The same figures in both; a configuration that nothing was fitted to stands alone."""
    rows = [{"question": r["prompt"], **r} for r in digits.rows("test")[:24]]
    found = fitted.evaluate(rows)
    assert [e.name for e in found.evaluations] == ["adapter", "TFB + T"]
    assert found.recommended in str(found) and found.recommended in ("adapter", "TFB + T")
    with pytest.warns(UserWarning, match="the rows that sigma and T were fitted to"):
        fitted.evaluate([{"question": r["prompt"], **r} for r in digits.rows("anchor")[:64]])
    page = fitted.report(rows, tmp_path / "page.html", shift=rows[:8])
    assert f"{found.evaluations[-1].metrics.nll:.3f}" in page.read_text(encoding="utf-8")
    with pytest.raises(RowError, match=r"no label.*label=NAME"):
        fitted.evaluate([{"question": r["prompt"], "choices": r["choices"]} for r in rows])


def test_evaluate_compares_what_the_fit_measured() -> None:
    m = tfb.from_pretrained(digits.ADAPTER, digits.BASE)
    fit = m.fit(digits.rows("anchor")[:64], sigma=0.0)
    assert m.methods == fit.methods and list(m.methods) == ["temperature"]
    m.bayes.configure(sigma=0.5)
    assert m.methods == {"TFB + T": m.bayes.config}


def test_decisions_see_rows_of_their_own() -> None:
    """Half of the rows are set aside; results say what to do with each."""
    m = tfb.from_pretrained(digits.ADAPTER, digits.BASE)
    rows = digits.rows("anchor")[:128]
    fit = m.fit(rows, sigma=0.0, target_error=0.3, coverage=0.9)
    decisions = m.bayes.decisions
    assert decisions is not None and fit.anchors + decisions.rows == 128
    table = m.score(digits.rows("test")[:4])
    assert table.abstain.dtype == bool
    assert all(r.choice in r.prediction_set for r in table.itertuples())
    again = m.fit(rows, sigma=0.0)
    assert m.bayes.decisions is None and again.anchors == 128  # those were of the fit before
    for options, match in (
        ({"calibration": rows}, "target_error or coverage"),
        ({"calibration": rows[60::-1], "coverage": 0.9}, "61 of its rows are among those"),
        ({"calibration": digits.rows("train")[:9], "coverage": 3.0}, "coverage=3.0"),
    ):
        with pytest.raises(ValueError, match=match):
            m.fit(rows, sigma=0.0, progress=pytest.fail, **options)  # before any pass
    twice = [{k: v for k, v in row.items() if k != "id"} for row in rows[:20] + rows[:20]]
    m.fit(twice, sigma=0.0, coverage=0.5)
    assert m.bayes.decisions is not None and m.bayes.decisions.rows == 20  # ten rows, both copies


def test_label_tokens_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they were given, the anchors tell by which tokens the adapter was trained."""
    from tfb import pretrained

    figures = {"all": 2.0, "last": 1.0}
    for given, told, expected in ((None, True, "last"), (None, False, "all"), ("all", True, "all")):
        monkeypatch.setattr(
            pretrained, "compare_label_tokens", lambda *_, told=told, **__: (figures, told)
        )
        m = tfb.from_pretrained(digits.ADAPTER, digits.BASE, label_tokens=given)
        fit = m.fit(digits.rows("anchor")[:64], sigma=0.0)
        assert m.bayes.label_tokens == expected
        assert any("label_tokens" in note for note in fit.notes) == (given is None)
        assert any("does not tell" in note for note in fit.notes) == (not told)


# --- as a transformers model ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", *CLASSIFIERS])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_called_it_averages(name: str, sigma: float) -> None:
    """Log-probabilities wherever the model has logits: those of a loop over draws."""
    m, batch = tiny(name, sigma), CASES[name].batch(5, 2, 4)
    draws = m.bayes.distinct_draws(4)
    found = m(**batch).logits
    torch.testing.assert_close(found.exp(), loop(m, batch, draws), atol=ROUNDING, rtol=0)
    other = tfb.Draws.iid(3, 0.2, seed=5)
    with m.bayes.sampling(other):
        found = m(**batch).logits
    torch.testing.assert_close(found.exp(), loop(m, batch, other), atol=ROUNDING, rtol=0)


def test_loss_is_that_of_the_average() -> None:
    m, batch = tiny("llama"), CASES["llama"].batch(5, 4)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    out = m(**batch, labels=labels)
    kept = labels[:, 1:] != -100
    chosen = out.logits[:, :-1].gather(-1, labels[:, 1:].clamp_min(0)[..., None])[..., 0]
    torch.testing.assert_close(out.loss, -chosen[kept].mean())
    m, batch = tiny("bert"), CASES["bert"].batch(5, 4)
    out = m(**batch, labels=torch.tensor([2, 0]))
    torch.testing.assert_close(out.loss, -out.logits[[0, 1], [2, 0]].mean())


def test_what_it_cannot_do() -> None:
    m, batch = tiny("llama"), CASES["llama"].batch(5, 4)
    with pytest.raises(ValueError, match=r"then tfb\.from_peft"):
        m.train()(**batch)
    m.eval()
    for more in ({"output_hidden_states": True}, {"logits_to_keep": 1}):
        with pytest.raises(ValueError, match="is not averaged"):
            m(**batch, **more)
    with pytest.raises(ValueError, match="input_ids are missing"):
        m(inputs_embeds=torch.zeros(1, 2, 16))
    assert m(**batch, return_dict=False).logits.shape[0] == 2  # there is one form
    m.bayes.configure(mode="tail", tail=1)
    with pytest.raises(ValueError, match="mode='full'"):
        m(**batch)
    assert m.to("cpu") is m and m.device.type == "cpu" and m.config is m.bayes.base.config
    with pytest.raises(AttributeError, match="nonsense"):
        m.nonsense  # noqa: B018


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_pipeline_averages(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """In the context too, over its draws; of the PEFT model it would keep one draw: refused."""
    m = tiny(name)
    pipe: Any = transformers.pipeline(
        "text-classification", model=m, tokenizer=m.tokenizer, top_k=None
    )
    bare: Any = transformers.pipeline(
        "text-classification", model=m.bayes.model, tokenizer=m.tokenizer, top_k=None
    )
    assert not [r for r in caplog.records if "not supported" in r.message]

    def probs() -> Tensor:
        found = [{d["label"]: d["score"] for d in row} for row in pipe(TEXTS)]
        return torch.tensor([[row[f"LABEL_{k}"] for k in range(LABELS)] for row in found])

    torch.testing.assert_close(probs(), m.predict(TEXTS).probs, atol=ROUNDING, rtol=0)
    draws = tfb.Draws.iid(3, 0.2)
    with m.sampling(draws):
        sampled = probs()
        with pytest.raises(ValueError, match="a pipeline or Trainer called the model"):
            bare(TEXTS)
    torch.testing.assert_close(sampled, m.predict(TEXTS, draws).probs, atol=ROUNDING, rtol=0)
    assert len(bare(TEXTS)) == 3  # outside it is the adapter


LABELLED = [f"w{i} w2 w{i + 3}" for i in range(8)]


class Rows(torch.utils.data.Dataset):
    """Eight labelled texts, tokenized."""

    def __len__(self) -> int:
        return len(LABELLED)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        encoded = words()(LABELLED[i], return_token_type_ids=False)
        return {**{k: torch.tensor(v) for k, v in encoded.items()}, "labels": torch.tensor(i % 3)}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_trainer_predicts_the_average(name: str, tmp_path: Path) -> None:
    """One row for each of its rows; with the PEFT model it would take S: refused."""
    m = tiny(name)
    options = TrainingArguments(
        str(tmp_path), report_to=[], per_device_eval_batch_size=4, disable_tqdm=True, use_cpu=True
    )
    trainer, bare = (
        Trainer(model=model, args=options, processing_class=m.tokenizer)
        for model in (m, m.bayes.model)
    )
    found = trainer.predict(Rows())
    expected = m.predict(LABELLED).probs
    predictions = torch.tensor(found.predictions)
    torch.testing.assert_close(predictions.exp(), expected, atol=ROUNDING, rtol=0)
    nll = -expected[range(8), [i % 3 for i in range(8)]].log().mean()
    assert found.metrics["test_loss"] == pytest.approx(float(nll), abs=ROUNDING)
    with m.sampling(), pytest.raises(ValueError, match="a pipeline or Trainer called the model"):
        bare.predict(Rows())


def test_sampling_inside_a_trainers_callback() -> None:
    """What a callback or metric of a Trainer samples by itself is its own business."""
    m, batch = tiny("bert"), CASES["bert"].batch(5, 4)
    source = "def call(run):\n    return run()"
    trainer: dict[str, Any] = {"__name__": "transformers.trainer"}
    exec(source, trainer)

    def sampled() -> Any:
        with m.sampling(2), torch.no_grad():
            return m.bayes.model(**batch).logits

    assert trainer["call"](sampled).shape == (4, LABELS)


def test_generates_as_transformers_does() -> None:
    m, batch = tiny("llama"), CASES["llama"].batch(5, 4)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = m.bayes.generate(batch, 4, **options)
    assert torch.equal(m.generate(**batch, **options), expected.sequences)
    pad = m.tokenizer.pad_token_id
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)
    assert (
        bool((ids == pad).any())
        and torch.equal(  # without a mask, as transformers finds it
            m.generate(ids, **options)[:, -3:], expected.sequences[:, -3:]
        )
    )
    whole = m.generate(**batch, **options, return_dict_in_generate=True)
    assert isinstance(whole, tfb.Generation)
    assert torch.equal(whole.epistemic, expected.epistemic)
    pipe: Any = transformers.pipeline("text-generation", model=m, tokenizer=m.tokenizer)
    [found] = pipe("w1 w2 w3", max_new_tokens=3, do_sample=False, return_full_text=False)
    ids = m.tokenizer("w1 w2 w3", return_tensors="pt")
    new = m.generate(ids.input_ids, max_new_tokens=3, do_sample=False)[0, 3:]
    assert found["generated_text"] == m.tokenizer.decode(new, skip_special_tokens=True)


# --- artifacts and names --------------------------------------------------------------------------


def test_base_is_named_by_whom(tmp_path: Path) -> None:
    with pytest.raises(tfb.AdapterError, match="give base=NAME"):
        tfb.from_pretrained(digits.ADAPTER)
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in digits.ADAPTER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": str(digits.BASE)}
    config.write_text(json.dumps(named))
    assert tfb.from_pretrained(folder).config.model_type == "llama"
    named["base_model_name_or_path"] = "no/such-model"
    config.write_text(json.dumps(named))
    with pytest.raises((tfb.AdapterError, ValueError), match="no/such-model"):
        tfb.from_pretrained(folder)


def test_an_artifacts_classes_keep_their_places(tmp_path: Path) -> None:
    """Other names for its classes may be given, in its order; what was decided for them goes."""

    def base() -> Any:
        return CASES["bert"].build().unload()

    m = tfb.from_peft(CASES["bert"].build(), words(), labels=["neg", "neu", "pos"])
    m.bayes.configure(sigma=0.3)
    m.bayes.decisions = tfb.Decisions(rows=9, draws=4, coverage=0.9, quantile=0.5)
    folder = m.save_pretrained(tmp_path / "artifact")
    again = tfb.from_pretrained(folder, base(), tokenizer=words())
    assert again.bayes.decisions == m.bayes.decisions and again.draws == 4
    for labels, match in ((["pos", "neg", "neu"], "in another order"), (["a", "b"], "3 classes")):
        with pytest.raises(ValueError, match=match):
            tfb.from_pretrained(folder, base(), tokenizer=words(), labels=labels)
    other = tfb.from_pretrained(folder, base(), tokenizer=words(), labels=["a", "b", "c"])
    assert other.bayes.labels == ("a", "b", "c") and other.bayes.decisions is None


def test_heads_without_one_right_class_are_refused() -> None:
    for change in ({"num_labels": 1}, {"problem_type": "multi_label_classification"}):
        model = CASES["bert"].build()
        for name, value in change.items():
            setattr(model.base_model.model.config, name, value)
        with pytest.raises(tfb.AdapterError, match="one of which is right"):
            tfb.from_peft(model, words())


def test_push_uploads_the_artifact(fitted: TfbModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from tfb import pretrained

    made, sent = [], {}

    class Hub:
        def __init__(self, token: str | None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, **options: Any) -> None:
            made.append((repo_id, options))

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> Any:
            sent.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}"})

    monkeypatch.setattr(pretrained, "HfApi", Hub)
    assert fitted.push_to_hub("me/name", private=True, token="secret") == "https://hub/me/name"
    assert made == [("me/name", {"private": True, "exist_ok": True})]
    assert {"tfb.json", "tfb.safetensors", "adapter_config.json", "README.md"} <= sent.keys()
    assert not [name for name in sent if name.endswith((".bin", ".pt", ".pkl"))]


def test_everything_public_prints_in_a_line(fitted: TfbModel) -> None:
    """And is listed by ``dir(tfb)``."""
    assert set(tfb.__all__) <= set(dir(tfb))
    prompt = fitted.tokenizer(["1 2"], return_tensors="pt")
    shown = [
        fitted,
        fitted.bayes,
        fitted.fitted,
        fitted.bayes.draws(10),
        fitted.predict(prompt, label_ids=torch.tensor([1, 2])),
        fitted.generate(**prompt, max_new_tokens=1, return_dict_in_generate=True),
        next(iter(fitted.bayes.posteriors.values())),
    ]
    for thing in shown:
        assert type(thing).__name__ in repr(thing) and "\n" not in repr(thing)
        assert len(repr(thing)) < 200
