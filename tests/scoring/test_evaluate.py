"""Rows of an encoded set and of a stream: the numbers of ``predict``, in the rows' order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import CASES, FIRST_TOKEN, VOCAB, exact
from transformers import AutoTokenizer

import tfb
from tfb import Draws, SamplingConfig
from tfb.data.batching import EncodedRows
from tfb.data.rows import Row, RowError
from tfb.demo import digits
from tfb.evaluation.decisions import Decisions
from tfb.scoring import scorer as scoring
from tfb.scoring.evaluate import encode, evaluations, fit_decisions, predict_rows
from tfb.scoring.scorer import UNCERTAINTIES, score

SINGLE = 2.0**-24  # results are float32: one rounding of a float64 model's probability
COLUMNS = UNCERTAINTIES


@pytest.fixture(scope="module")
def bayes() -> tfb.BayesianModel:
    model = tfb.bayesianize(exact(CASES["llama"].build()), seed=3)
    model.configure(sigma=0.1)
    return model


@pytest.fixture(scope="module")
def demo() -> tuple[tfb.BayesianModel, Any]:
    """The embedded model with its tokenizer."""
    base = tfb.load_base(digits.BASE, digits.ADAPTER)
    model = tfb.bayesianize(tfb.load_adapter(base, digits.ADAPTER))
    model.configure(sigma=0.01)
    return model, AutoTokenizer.from_pretrained(str(digits.BASE))


LENGTHS = (5, 2, 7, 4, 7, 3, 2, 6)
CHOICES = (3, 4, 3, 2, 4, 4, 3, 2)


def tokens() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(FIRST_TOKEN, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


MIXED = EncodedRows(
    ids=[f"r{i}" for i in range(8)],
    input_ids=tokens(),
    label_ids=[tuple(range(10 + i, 10 + i + k)) for i, k in enumerate(CHOICES)],
    labels=[0, None, 1, 0, 1, 2, None, 1],
    choices=[tuple(map(str, range(k))) for k in CHOICES],
)


def digit_rows(n: int, *, labels: bool = True) -> list[Row]:
    """Test digits; every third is cut to fewer lines, every other has fewer choices."""
    made = []
    for i, r in enumerate(digits.rows("test")[:n]):
        lines = r["prompt"].split("\n")
        prompt = "\n".join(lines[i % 3 * 2 :])
        choices = tuple(r["choices"][: 10 if i % 2 else 4])
        label = r["label"] if labels and r["label"] < len(choices) else None
        made.append(Row(r["id"], prompt, choices, None, label, f"digits:{i}"))
    return made


# --- evaluations --------------------------------------------------------------------------------

HOW: dict[str, Any] = {"dataset": "d", "draws": 4, "batch_size": 3}


def logits_of(bayes: tfb.BayesianModel, i: int, draws: Draws) -> torch.Tensor:
    """The model's own logits of one row of MIXED, alone, [S, K]."""
    ids = torch.tensor([MIXED.input_ids[i]])
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert MIXED.label_ids is not None
    return bayes.logits(row, draws, torch.tensor(MIXED.label_ids[i]))[:, 0]


def test_sigma_zero_is_the_deterministic_evaluation(bayes: tfb.BayesianModel) -> None:
    """The same bits, of one pass, and no rounding sold as disagreement of draws."""
    configs = {"zero": SamplingConfig(sigma=0.0), "tfb": SamplingConfig(sigma=0.1)}
    plain, zero, noisy = evaluations(bayes, MIXED, configs=configs, **HOW)
    assert [e.name for e in (plain, zero, noisy)] == ["adapter", "zero", "tfb"]
    assert torch.equal(zero.probs, plain.probs) and torch.equal(zero.total, plain.total)  # type: ignore[arg-type]
    assert (zero.draws, zero.passes, zero.epistemic) == (1, 1.0, None)
    assert (noisy.draws, noisy.passes) == (4, 4.0) and float(noisy.epistemic.min()) > 0  # type: ignore[union-attr]


def test_the_deterministic_adapter_has_no_temperature(bayes: tfb.BayesianModel) -> None:
    """The bits of the model at sigma = 0 and T = 1, whatever it is configured to be."""
    before = bayes.config
    try:
        bayes.configure(sigma=0.0)
        plain = predict_rows(bayes, MIXED, 4, batch_size=3)
        bayes.configure(sigma=0.2, temperature=2.0)
        found = evaluations(bayes, MIXED, **HOW)
        sampled = predict_rows(bayes, MIXED, 4, batch_size=3)
    finally:
        bayes.configure(sigma=before.sigma, temperature=1.0)
    assert torch.equal(found[0].probs, plain.probs) and torch.equal(found[0].total, plain.total)  # type: ignore[arg-type]
    assert [e.name for e in found] == ["adapter", "tfb"]
    assert torch.equal(found[1].probs, sampled.probs)
    assert torch.equal(found[1].epistemic, sampled.epistemic)  # type: ignore[arg-type]


@pytest.mark.parametrize("T", [0.5, 1.7])
def test_sigma_zero_with_a_temperature_is_temperature_scaling(
    bayes: tfb.BayesianModel, T: float
) -> None:
    """softmax(log p / T), and its entropy; the same as the model's logits divided by T."""
    configs = {"scaled": SamplingConfig(sigma=0.0, temperature=T)}
    plain, scaled = evaluations(bayes, MIXED, configs=configs, **HOW)
    assert (scaled.draws, scaled.passes, scaled.epistemic) == (1, 1.0, None)
    expected = (plain.probs.double().log() / T).softmax(-1)
    # In float32: log p and log p / T are off by a rounding of numbers up to |log p| / T, a
    # softmax doubles that, and an entropy weighs it with at most |log p| / T + 1.
    largest = max(1.0, 1 / T) * float(-plain.probs[plain.probs > 0].double().log().min())
    budget = 8 * SINGLE * largest
    assert float((scaled.probs.double() - expected).abs().max()) < budget
    assert scaled.total is not None
    entropy = torch.special.entr(expected).sum(-1)
    assert float((scaled.total.double() - entropy).abs().max()) < budget * (largest + 1) * 4
    for i, k in enumerate(CHOICES):
        direct = (logits_of(bayes, i, Draws.mean())[0] / T).softmax(-1)
        assert float((scaled.probs[i, :k].double() - direct).abs().max()) < budget
        assert not scaled.probs[i, k:].any()


def test_each_configuration_is_the_model_so_configured(bayes: tfb.BayesianModel) -> None:
    """mean_s softmax(z_s / T) at each sigma and T by name; afterwards the model is as it was."""
    before = bayes.configure(seed=3).config
    configs = {
        "noise": SamplingConfig(sigma=0.1),
        "both": SamplingConfig(sigma=0.1, temperature=1.7),
        "more": SamplingConfig(sigma=0.3, temperature=0.5),
    }
    found = evaluations(bayes, MIXED, configs=configs, **HOW)
    assert bayes.config == before
    assert [e.name for e in found] == ["adapter", *configs]
    for e in found[1:]:
        config = configs[e.name]
        assert config.sigma is not None
        draws = Draws.antithetic(4, config.sigma, seed=3)
        for i, k in enumerate(CHOICES):
            each = (logits_of(bayes, i, draws) / config.temperature).softmax(-1)
            mean = each.mean(0)
            assert float((e.probs[i, :k].double() - mean).abs().max()) <= 2 * SINGLE
            assert e.total is not None and e.epistemic is not None
            total = torch.special.entr(mean).sum()
            aleatoric = torch.special.entr(each).sum(-1).mean()
            # Entropies of up to four classes, below 2 nats.
            assert abs(float(e.total[i]) - float(total)) <= 8 * SINGLE
            assert abs(float(e.epistemic[i]) - float(total - aleatoric)) <= 8 * SINGLE


def test_decisions_are_those_of_the_predictions(demo: tuple[tfb.BayesianModel, Any]) -> None:
    """Of a model that keeps them, also through an evaluation at other sigmas."""
    bayes, tokenizer = demo
    encoded = encode(bayes, digits.rows("anchor")[:60], tokenizer)
    p = predict_rows(bayes, encoded, 4)
    asked: dict[str, Any] = {"target_error": 0.4, "coverage": 0.8, "draws": 4}
    made = fit_decisions(bayes, encoded, **asked)
    expected = Decisions.calibrated(p.probs, torch.tensor(encoded.labels), **asked)
    assert made == expected == bayes.decisions and made.rows == 60
    evaluations(bayes, encoded.subset(range(4)), **HOW)
    assert bayes.decisions == made
    with pytest.raises(ValueError, match="calibration: every row needs a label"):
        fit_decisions(bayes, replace(encoded, labels=[None] * 60), coverage=0.9)
    with pytest.raises(ValueError, match="give target_error, coverage or both"):
        fit_decisions(bayes, encoded)
    bayes.decisions = None


def test_the_models_configuration_survives_an_error(bayes: tfb.BayesianModel) -> None:
    """In the deterministic pass, in one at another sigma, and where a configuration has none."""
    before = bayes.config
    configs = {"other": SamplingConfig(sigma=0.3, temperature=1.7)}
    for batches in (1, 4):  # three batches are the deterministic evaluation
        seen: list[int] = []

        def fail(rows: int, seen: list[int] = seen, batches: int = batches) -> None:
            seen.append(rows)
            if len(seen) == batches:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluations(bayes, MIXED, configs=configs, progress=fail, **HOW)
        assert bayes.config == before
    with pytest.raises(ValueError, match="sigma is not set"):
        evaluations(bayes, MIXED, configs={"bare": SamplingConfig()}, **HOW)
    assert bayes.config == before


def test_no_noise_is_one_draw_unless_draws_are_kept() -> None:
    """The same bits as the deterministic adapter, no disagreement and no Monte-Carlo error."""
    still = tfb.bayesianize(exact(CASES["llama"].build()), seed=3)
    still.configure(sigma=0.0)
    plain, found = (predict_rows(still, MIXED, d) for d in (Draws.mean(), 4))
    for name in ("probs", *COLUMNS):
        assert torch.equal(getattr(found, name), getattr(plain, name))
    assert not found.epistemic.any() and not found.standard_error.any()
    kept = predict_rows(still, MIXED, 4, keep_draws=True).draw_probs
    assert kept is not None and len(kept) == 4


# --- predict_rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 50])
@pytest.mark.parametrize("draws", [4, Draws.mean(), Draws.iid(3, 0.2, seed=9)])
def test_rows_are_predicted_as_each_alone(
    bayes: tfb.BayesianModel, batch_size: int, draws: int | Draws
) -> None:
    """In the original order, whatever the lengths, numbers of choices and batches."""
    seen: list[int] = []
    found = predict_rows(
        bayes, MIXED, draws, batch_size=batch_size, keep_draws=True, progress=seen.append
    )
    assert sum(seen) == 8 and max(seen) <= batch_size
    S = draws if isinstance(draws, int) else len(draws)
    assert found.probs.shape == (8, 4) and found.draw_probs is not None
    assert found.draw_probs.shape == (S, 8, 4)
    for i, k in enumerate(CHOICES):
        ids = torch.tensor([MIXED.input_ids[i]])
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        p = bayes.predict(row, draws, label_ids=torch.tensor(MIXED.label_ids[i]), keep_draws=True)
        close = {"rtol": 2 * SINGLE, "atol": 2 * SINGLE}
        torch.testing.assert_close(found.probs[i, :k], p.probs[0].float(), **close)
        assert p.draw_probs is not None
        torch.testing.assert_close(found.draw_probs[:, i, :k], p.draw_probs[:, 0].float(), **close)
        assert not found.probs[i, k:].any() and not found.draw_probs[:, i, k:].any()
        best = int(p.prediction)
        wanted = (p.total, p.aleatoric, p.epistemic, p.agreement, p.standard_error[:, best])
        of_best = {"standard_error": found.standard_error[:, best]}
        for name, value in zip(COLUMNS, wanted, strict=True):
            values = of_best.get(name, getattr(found, name))
            torch.testing.assert_close(
                values[i], value[0].float(), rtol=8 * SINGLE, atol=8 * SINGLE
            )


def test_adaptive_draws(bayes: tfb.BayesianModel) -> None:
    """ "auto" gives each row what ``predict`` gives it alone; no draws can be kept."""
    found = predict_rows(bayes, MIXED, "auto", batch_size=3)
    for i, k in enumerate(CHOICES):
        ids = torch.tensor([MIXED.input_ids[i]])
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        p = bayes.predict(row, "auto", label_ids=torch.tensor(MIXED.label_ids[i]))
        torch.testing.assert_close(
            found.probs[i, :k], p.probs[0].float(), rtol=2 * SINGLE, atol=2 * SINGLE
        )
    with pytest.raises(ValueError, match="keep_draws: rows have different numbers of draws"):
        predict_rows(bayes, MIXED, "auto", keep_draws=True)


def test_draws_average_to_the_prediction(bayes: tfb.BayesianModel) -> None:
    found = predict_rows(bayes, MIXED, 6, keep_draws=True)
    assert found.draw_probs is not None
    torch.testing.assert_close(
        found.draw_probs.double().mean(0).float(), found.probs, rtol=2 * SINGLE, atol=2 * SINGLE
    )
    assert predict_rows(bayes, MIXED, 6).draw_probs is None


def test_batch_size_in_float32_stays_in_the_budget(bayes: tfb.BayesianModel) -> None:
    """Budget: twice the error of a float32 pass against the float64 model of the same weights."""
    single = tfb.bayesianize(CASES["llama"].build(), seed=3)
    draws = Draws.antithetic(4, 0.1, seed=3)
    truth = predict_rows(bayes, MIXED, draws).probs
    eager = predict_rows(single, MIXED, draws).probs
    budget = 2 * float((eager - truth).abs().max()) + SINGLE
    for batch_size in (1, 3):
        found = predict_rows(single, MIXED, draws, batch_size=batch_size).probs
        assert float((found - truth).abs().max()) <= budget < 1e-4


def test_classification_rows(bayes: tfb.BayesianModel) -> None:
    head = tfb.bayesianize(exact(CASES["llama_classifier"].build()), seed=3)
    text = EncodedRows(MIXED.ids, MIXED.input_ids, None, [None] * 8, None, num_labels=3)
    draws = Draws.antithetic(4, 0.1)
    found = predict_rows(head, text, draws, batch_size=3)
    assert found.probs.shape == (8, 3)
    for i, ids in enumerate(MIXED.input_ids):
        row = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        torch.testing.assert_close(
            found.probs[i],
            head.predict(row, draws).probs[0].float(),
            rtol=2 * SINGLE,
            atol=2 * SINGLE,
        )


def test_nan_names_the_row() -> None:
    broken = tfb.bayesianize(CASES["llama"].build(), seed=3)
    bad = MIXED.input_ids[4][0]  # poison one token of row r4, which others may share
    with torch.no_grad():
        broken.base.model.embed_tokens.weight[bad] = float("nan")
    hit = [i for i, ids in enumerate(MIXED.input_ids) if bad in ids]
    with pytest.raises(ValueError, match=r"row r[0-7]: the model returned NaN or Inf") as caught:
        predict_rows(broken, MIXED, Draws.mean())
    assert str(caught.value)[5] in map(str, hit)


# --- score --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([3], r"row 0: expected a dict, a string or a Row, got int; write \[{'text'"),
        (3, "int holds no rows; give a path, a DataFrame"),
        ({"test": []}, r"dict holds no rows.* \(of a dict of splits one, such as data\['test'\]"),
        (["a.jsonl"], "a list of strings is a list of texts, but 'a.jsonl' looks like a file"),
    ],
)
def test_what_is_no_row_is_named(
    demo: tuple[tfb.BayesianModel, Any], rows: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        next(score(rows, *demo))


def test_scores_are_those_of_predict_rows(demo: tuple[tfb.BayesianModel, Any]) -> None:
    model, tokenizer = demo
    rows = digit_rows(20)
    results = list(score(rows, model, tokenizer, draws=4, batch_size=7, per_draw=True))
    encoded = encode(model, rows, tokenizer)
    found = predict_rows(model, encoded, 4, batch_size=7, keep_draws=True)
    alone = predict_rows(model, encoded, 4, batch_size=1).probs
    budget = 2 * float((alone - found.probs).abs().max()) + 2 * SINGLE  # of float32, as above
    assert budget < 1e-4
    assert [r["id"] for r in results] == [r.id for r in rows]
    for i, (row, result) in enumerate(zip(rows, results, strict=True)):
        assert row.choices is not None and found.draw_probs is not None
        k = len(row.choices)
        wanted = found.probs[i, :k].tolist()
        assert result["probs"] == pytest.approx(wanted, abs=budget)
        assert sum(result["probs"]) == pytest.approx(1, abs=k * SINGLE)
        assert result["prediction"] == max(range(k), key=result["probs"].__getitem__)
        assert result["choice"] == row.choices[result["prediction"]]
        assert result["label"] == row.label
        draws = torch.tensor(result["draw_probs"])
        torch.testing.assert_close(draws, found.draw_probs[:, i, :k], rtol=0, atol=budget)
        assert result["draws"] == 4 and 0.25 <= result["agreement"] <= 1
    assert {r.label for r in rows} >= {None, 0, 1, 2, 3}


@pytest.mark.parametrize("per_draw", [False, True])
def test_columns(demo: tuple[tfb.BayesianModel, Any], per_draw: bool) -> None:
    """Unlabelled rows have a null label; one stream has no standard error."""
    model, tokenizer = demo
    (result,) = score(digit_rows(1, labels=False), model, tokenizer, draws=2, per_draw=per_draw)
    assert list(result) == [
        "id",
        "prediction",
        "choice",
        "probs",
        *COLUMNS,
        "draws",
        *["draw_probs"] * per_draw,
        "label",
    ]
    assert result["label"] is None and result["standard_error"] is None


def test_a_bad_row_is_raised_or_a_row(demo: tuple[tfb.BayesianModel, Any], tmp_path: Any) -> None:
    """Whatever is wrong with it, in data of any kind; the rows before it come first."""
    model, tokenizer = demo
    good, long = digits.rows("test")[0], {**digits.rows("test")[1], "prompt": "a " * 400 + "="}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good)}\n{{oops\n{json.dumps(long)}\n")
    in_memory = [good, {"id": "bare"}, long]
    for data, name, fault in (
        (in_memory, "bare", "row 1: no column 'prompt'"),
        (tmp_path / "rows.jsonl", None, r"rows.jsonl:2: not valid JSON"),
    ):
        stream = score(data, model, tokenizer, draws=2)
        assert "error" not in next(stream)
        with pytest.raises(RowError, match=fault):
            next(stream)
        first, second, third = score(data, model, tokenizer, draws=2, errors="rows")
        assert first["error"] is None and first["id"] == good["id"]
        assert list(second) == ["id", "error"] and second["id"] == name
        assert "tokens, but the model takes" in third["error"] and third["id"] == long["id"]
    with pytest.raises(ValueError, match="errors='drop': expected 'raise' or 'rows'"):
        score([], model, tokenizer, errors="drop")


def test_settings_are_checked_first(demo: tuple[tfb.BayesianModel, Any]) -> None:
    model, tokenizer = demo
    for how, message in (
        ({"draws": 3}, "draws"),
        ({"draws": "many"}, "draws=many"),
        ({"draws": "auto", "per_draw": True}, "draws=auto"),
    ):
        with pytest.raises(ValueError, match=message):
            score(["never read"], model, tokenizer, **how)
    bare = tfb.bayesianize(CASES["llama"].build())
    for draws in (2, "auto"):
        with pytest.raises(ValueError, match="sigma is not set"):
            score([], bare, tokenizer, draws=draws)


def test_scores_stream_in_order_one_window_ahead(
    demo: tuple[tfb.BayesianModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = demo
    monkeypatch.setattr(scoring, "WINDOW", 4)
    rows, taken = digit_rows(10), 0

    def source() -> Iterator[Row]:
        nonlocal taken
        for row in rows:
            taken += 1
            yield row

    for i, result in enumerate(score(source(), model, tokenizer, draws=2)):
        assert result["id"] == rows[i].id
        assert i < taken <= i + 4
    assert taken == 10


def test_window_size_does_not_matter(
    demo: tuple[tfb.BayesianModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other windows make other batches; budget as above, from a pass of each row alone."""
    model, tokenizer = demo
    rows = digit_rows(10)
    encoded = encode(model, rows, tokenizer)
    whole = predict_rows(model, encoded, 4).probs
    budget = 2 * float((predict_rows(model, encoded, 4, batch_size=1).probs - whole).abs().max())
    monkeypatch.setattr(scoring, "WINDOW", 3)
    for i, result in enumerate(score(rows, model, tokenizer, draws=4)):
        difference = torch.tensor(result["probs"]) - whole[i, : len(result["probs"])]
        assert float(difference.abs().max()) <= budget + 2 * SINGLE < 1e-4


def test_classification_results_name_the_class() -> None:
    """Where somebody gave names; else only its index."""
    head = tfb.bayesianize(CASES["llama_classifier"].build(), seed=3)
    head.configure(sigma=0.1)
    tokenizer = AutoTokenizer.from_pretrained(str(digits.BASE))
    rows = [Row("t1", text="a b c", label=2), Row("t2", text="q p o n m l")]
    results = list(score(rows, head, tokenizer, draws=4))
    assert [(r["id"], r["label"]) for r in results] == [("t1", 2), ("t2", None)]
    assert all(r["choice"] is None and len(r["probs"]) == 3 for r in results)
    names = ["bad", "fair", "good"]
    head.labels = names
    named = list(score(["a b c", "q p o n m l"], head, tokenizer, draws=4))
    assert [r["choice"] for r in named] == [names[r["prediction"]] for r in results]
    assert [r["probs"] for r in named] == [r["probs"] for r in results]
    draws = Draws.antithetic(4, 0.1, seed=3)
    batch = tokenizer(["a b c", "q p o n m l"], return_tensors="pt", padding=True)
    wanted = head.predict({k: batch[k] for k in ("input_ids", "attention_mask")}, draws).probs
    for result, p in zip(results, wanted, strict=True):
        assert result["probs"] == pytest.approx(p.tolist(), abs=1e-5)
