"""Sigma and T fitted to answers: the loss of their tokens, known models, and a small real one."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from support.command import Run, fit_command
from support.files import edit
from support.models import CASES, FIRST_TOKEN, VOCAB, exact, make_batch
from torch import Tensor

import tfb
from tfb import Draws
from tfb.data.batching import NO_TOKEN, EncodedRows
from tfb.data.rows import Row
from tfb.demo import digits
from tfb.sampling.config import SamplingConfig
from tfb.scoring.evaluate import encode
from tfb.search.answers import TEMPERATURES, best_temperature, losses_at, surprise, token_nll
from tfb.search.loss import AnchorLoss, AnchorSet

EXACT = 1e-10
LENGTHS, ANSWERS = (5, 2, 7, 4, 7, 3, 2), (1, 4, 2, 3, 4, 2, 1)


def rows() -> EncodedRows:
    """Seven random prompts with answers of one to four tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(FIRST_TOKEN, VOCAB, (n,), generator=generator).tolist()

    return EncodedRows(
        ids=[f"r{i}" for i in range(7)],
        input_ids=[ids(n) for n in LENGTHS],
        label_ids=[()] * 7,
        labels=[0] * 7,
        choices=[("answer",)] * 7,
        choice_ids=[(tuple(ids(n)),) for n in ANSWERS],
    )


def build() -> tfb.BayesianModel:
    return tfb.bayesianize(exact(CASES["llama"].build()), seed=3)


# --- any temperature from a grid ------------------------------------------------------------------


def mixture(scale: float) -> tuple[Tensor, Tensor]:
    """Logits [S, n, L, V] of four draws, and tokens [n, L] drawn from T = 1.7 of their mean."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    mean = normal(50, 5, 300)
    y = torch.multinomial((mean / 1.7).softmax(-1).flatten(0, 1), 1, generator=generator)
    return mean + 0.5 * normal(4, 50, 5, 300), y.view(50, 5)


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
def test_the_temperature_of_least_loss(scale: float) -> None:
    """Against the formula, minimised directly. The spline's error is of order h^4 l''''/ 384 with
    h = log 4 / 6: some 3e-5 nats where l'''' is 4, for single rows some times that."""
    logits, y = mixture(scale)

    def loss(T: float) -> Tensor:
        p = (logits / T).softmax(-1).mean(0)
        return -p.gather(-1, y[..., None])[..., 0].log().mean(1)

    def log_probs(T: float) -> Tensor:
        return (logits / T).log_softmax(-1).gather(-1, y.expand(4, 50, 5)[..., None])

    every = torch.cat([log_probs(T) for T in TEMPERATURES], -1)
    grid = token_nll(every, torch.ones(50, 5, dtype=torch.bool))
    for g, T in enumerate(TEMPERATURES):
        torch.testing.assert_close(grid[:, g], loss(T), rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(losses_at(grid, T), loss(T), rtol=EXACT, atol=EXACT)
    best = minimize_scalar(
        lambda t: float(loss(math.exp(t)).mean()), bounds=(-1, 1.3), method="bounded"
    )
    T = best_temperature(grid)
    assert abs(math.log(T) - best.x) < 1e-3
    assert float(loss(T).mean()) - best.fun < 1e-6
    torch.testing.assert_close(losses_at(grid, T), loss(T), rtol=0, atol=3e-4)
    assert abs(float(losses_at(grid, T).mean() - loss(T).mean())) < 3e-5


def test_without_a_wrong_token_there_is_no_temperature() -> None:
    """The loss would fall for ever with T; one that is 0 at every T has no least. With wrong tokens
    the least T that is tried is the best of them."""
    T = torch.tensor(TEMPERATURES, dtype=torch.float64)
    sure = torch.log1p(torch.exp(-torch.tensor([3.0, 8.0])[:, None] / T))  # of two tokens
    assert best_temperature(sure) == best_temperature(torch.zeros(3, len(T)).double()) == 1.0
    logits, y = mixture(3.0)
    log_p = [(logits[0] / 20 / T).log_softmax(-1) for T in TEMPERATURES]  # the best T is about 1/10
    every = torch.stack([-p.gather(-1, y[..., None])[..., 0].mean(1) for p in log_p], -1)
    assert best_temperature(every) == pytest.approx(TEMPERATURES[0])


def test_the_slope_is_the_loss_beyond_the_entropy() -> None:
    logits, y = mixture(3.0)
    log_p = [(logits[0] / T).log_softmax(-1) for T in TEMPERATURES]
    grid = torch.stack([-p.gather(-1, y[..., None])[..., 0].mean(1) for p in log_p], -1)
    at_one = logits[0].log_softmax(-1)
    entropy = torch.special.entr(at_one.exp()).sum(-1).mean(1)
    torch.testing.assert_close(surprise(grid), losses_at(grid, 1.0) - entropy, rtol=0, atol=5e-3)


# --- the loss of a model --------------------------------------------------------------------------


def by_hand(bayes: tfb.BayesianModel, draws: Draws, T: float) -> Tensor:
    """[7] losses from ``log_probs`` of every whole text alone."""
    encoded, found = rows(), []
    bayes.configure(temperature=T)
    for prompt, answers in zip(encoded.input_ids, encoded.choice_ids or [], strict=True):
        assert answers is not None
        (answer,) = answers
        text = {"input_ids": torch.tensor([[*prompt, *answer]])}
        log_probs = bayes.log_probs(text, draws)[0, len(prompt) - 1 : -1]
        found.append(-log_probs[range(len(answer)), list(answer)].mean())
    return torch.stack(found)


def loss_of(bayes: tfb.BayesianModel, **how: Any) -> AnchorLoss:
    config = SamplingConfig(seed=5, **how)
    anchors = AnchorSet.of(rows(), batch_size=3)
    return AnchorLoss(bayes, anchors, "nll", draws=4, config=config, temperature=True)


def order() -> list[int]:
    """The rows as their batches have them."""
    return sorted(range(7), key=lambda i: -LENGTHS[i])


def test_the_loss_is_that_of_the_average_token_by_token() -> None:
    """Batches, padding and answers of several lengths change nothing; at sigma = 0 it is the
    adapter's own loss, as transformers has it."""
    bayes, twin = build(), exact(CASES["llama"].build())
    loss = loss_of(bayes)
    found, part = loss([0.1, 0.3]), loss([0.3], torch.tensor([0, 2, 5]))
    assert [s for s, _ in found.points] == [0.0, 0.0, 0.1, 0.3] and found.correct is None
    plain = found.plain
    assert plain is not None and plain.points == ((0.0, 1.0), (0.1, 1.0), (0.3, 1.0))
    for g, sigma in enumerate((0.0, 0.1, 0.3)):
        draws = Draws.antithetic(4, sigma, seed=5)
        expected = by_hand(bayes, draws, 1.0)[order()]
        torch.testing.assert_close(plain.losses[g], expected, rtol=EXACT, atol=EXACT)
        T = found.points[g + 1][1]
        expected = by_hand(bayes, draws, T)[order()]
        torch.testing.assert_close(found.losses[g + 1], expected, rtol=0, atol=1e-3)
        assert float(found.means[g + 1]) < float(plain.means[g])
    assert part.plain is not None
    expected = plain.losses[2][[0, 2, 5]]
    torch.testing.assert_close(part.plain.losses[1], expected, rtol=EXACT, atol=EXACT)
    first, (answer,) = rows().input_ids[1], (rows().choice_ids or [])[1] or ((),)
    ids = torch.tensor([[*first, *answer]])
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(first), -100)
    own = twin(input_ids=ids, labels=labels).loss
    assert float(plain.losses[0, order().index(1)]) == pytest.approx(own.item(), rel=1e-6)


def test_tails_end_with_the_answer() -> None:
    """Noise acts at the last tokens of a prompt and at the answer's, as with choices; that is what
    passes are counted by, in tokens that are read."""
    bayes = build()
    loss = loss_of(bayes, mode="tail", tail=2)
    found = loss([0.3]).plain
    assert found is not None
    for number, batch in enumerate(loss.anchors.batches):
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        for g, sigma in enumerate((0.0, 0.3)):
            draws, ids = Draws.antithetic(4, sigma, seed=5), batch["label_ids"][:, 0]
            each = bayes.answer_log_probs(inputs, draws, ids, mode="tail", tail=2)[..., 0]
            expected = -each.exp().mean(0).log().sum(1) / (ids != NO_TOKEN).sum(1)
            at = found.losses[g, 3 * number : 3 * number + len(ids)]
            torch.testing.assert_close(at, expected, rtol=EXACT, atol=EXACT)
    prompts, answers = sum(LENGTHS), sum(n - 1 for n in ANSWERS)
    drawn = 7 * 2 + answers
    assert loss.passes == (prompts - 7 * 2 + 8 * drawn) / (prompts + answers)


def test_what_cannot_be_fitted_is_refused() -> None:
    encoded = rows()
    for metric in ("accuracy", "pseudo_nll", lambda out, _: out.mean(0)[:, 0]):
        with pytest.raises(ValueError, match=r"metric='.*': rows with an answer need 'nll'"):
            AnchorSet.of(encoded).check(metric)  # type: ignore[arg-type]
    choices = make_batch(2, 2) | {"labels": [0, 1], "label_ids": [8, 9]}
    both = [*AnchorSet.of(encoded).batches, choices]
    with pytest.raises(ValueError, match="some rows have an answer, others have none; part them"):
        AnchorSet.of(both).check("nll")


# --- a known predictive ---------------------------------------------------------------------------


class KnownModel:
    """Two tokens a row, each one of two: their logits are [0, x + 50 s sigma], s = +-1."""

    posteriors = build().posteriors
    pad_token_id = 0

    def __init__(self, x: Tensor) -> None:
        self.x, self.config = x, tfb.SamplingConfig()

    def configure(self, **changes: Any) -> None:
        self.config = replace(self.config, **changes)

    def answer_log_probs(
        self, batch: Any, draws: Draws, ids: Tensor, temperatures: Any, **_: Any
    ) -> Tensor:
        shift = 50.0 * torch.tensor(draws.sigmas, dtype=torch.float64)[:, None, None]
        second = self.x[batch["input_ids"][:, 0]] + shift
        signed = torch.where(ids == 1, second, -second)[..., None]
        return torch.nn.functional.logsigmoid(signed / torch.tensor(temperatures))


def known(T: float, noise: float = 0.0, n: int = 1500) -> tuple[KnownModel, list[dict[str, Any]]]:
    """Tokens drawn from softmax(logits / T), averaged over logits that are ``noise`` more or less;
    held-out answers, as good as the model is."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    p = (((x + noise) / T).sigmoid() + ((x - noise) / T).sigmoid()) / 2
    y = (torch.rand(n, 2, generator=generator, dtype=torch.float64) < p).long()
    return KnownModel(x), [{"input_ids": torch.arange(n)[:, None], "label_ids": y[:, None]}]


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0])
def test_the_temperature_of_a_known_predictive_is_found(T: float) -> None:
    """Within four standard errors of the maximum likelihood estimate."""
    model, anchors = known(T)
    fit = tfb.fit_sigma(model, anchors, draws=2)  # type: ignore[arg-type]
    z = model.x / T
    p = z.sigmoid()
    error = float((z * z * p * (1 - p)).sum()) ** -0.5
    assert abs(math.log(fit.temperature / T)) < 4 * error < 0.2 and fit.sigma == 0.0
    assert fit.stopped.startswith("keep the adapter" if T == 1.0 else "the loss falls by")
    assert not fit.notes and "accuracy" not in str(fit)
    alone = tfb.fit_sigma(model, anchors, sigma=0.0)  # type: ignore[arg-type]
    assert (alone.sigma, alone.passes) == (0.0, 1.0)
    assert T == 1.0 or alone.temperature == fit.temperature


def test_noise_is_found_where_it_is_the_truth() -> None:
    model, anchors = known(1.0, noise=4.0)
    fit = tfb.fit_sigma(model, anchors, draws=2)  # type: ignore[arg-type]
    assert fit.sigma == pytest.approx(4 / 50, rel=100 ** (1 / 16) - 1)
    assert fit.change is not None and fit.change[1] < 0 and list(fit.methods)[-1] == "TFB + T"
    proper = tfb.fit_sigma(model, anchors, draws=2, temperature=False)  # type: ignore[arg-type]
    assert proper.temperature == 1.0 and proper.sigma > 0
    model, anchors = known(1.0)  # where noise only hurts
    wide = tfb.fit_sigma(model, anchors, draws=2, tolerance=0.003)  # type: ignore[arg-type]
    assert wide.objective == "max_variance" and wide.sigma > 0 and wide.limit is not None


def test_training_rows_are_not_fitted_to() -> None:
    """Tokens that are nearly sure, and right as often as that: nothing is to be learned of T."""
    model, anchors = known(1.0)
    model.x = model.x.sign() * (6 + model.x.abs())
    anchors[0]["label_ids"] = (model.x > 0).long()[:, None]
    fit = tfb.fit_sigma(model, anchors, draws=2)  # type: ignore[arg-type]
    assert (fit.sigma, fit.temperature) == (0.0, 1.0)
    assert any("look like rows that the adapter was trained on" in note for note in fit.notes)


# --- a small real model ---------------------------------------------------------------------------


def pairs(n: int) -> list[dict[str, str]]:
    """Digits with their name as the text to write."""
    found = digits.rows("anchor")[:n]
    return [{"prompt": row["prompt"], "target": row["choices"][row["label"]]} for row in found]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' base model, whose tokenizer ends texts by padding, as many do."""
    folder = Path(shutil.copytree(digits.BASE, tmp_path_factory.mktemp("made") / "base"))
    edit(folder / "tokenizer_config.json", eos_token="<pad>")
    return folder


def test_from_rows_to_an_artifact(base: Path, tfb_command: Run, tmp_path: Path) -> None:
    """The library and the command find the same; the answer is no column of other calls."""
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs(24))))
    m = tfb.from_pretrained(digits.ADAPTER, base)
    encoded = encode(m.bayes, pairs(24), m.tokenizer, columns={"answer": "target"})
    assert {len(answer) for answers in encoded.choice_ids or () for answer in answers or ()} == {2}
    found = m.fit(pairs(24), answer="target", sigma=0.05, draws=2, batch_size=20)
    loss = AnchorLoss(m.bayes, AnchorSet.of(encoded), "nll", draws=2, config=m.bayes.config)
    assert found.baseline == pytest.approx(float(loss([]).means[0]), rel=1e-6)
    assert (m.columns, found.anchors, found.metric) == ({}, 24, "nll")
    assert found.anchor_hash == encoded.content_hash
    assert all(point.accuracy is None for point in found.curve)
    command = fit_command(base, digits.ADAPTER, tmp_path / "pairs.jsonl", tmp_path / "made")
    options = ("--columns", "answer=target", "--sigma", 0.05, "--draws", 2, "--batch-size", 20)
    code, out, err = tfb_command(*command, *options)
    assert code == 0, err
    record = json.loads((tmp_path / "made/tfb.json").read_text())
    assert record["fit"] == found.to_dict() and str(found).splitlines()[0] in out
    assert "columns" not in record["extra"]


def test_what_the_rows_do_not_allow_is_said(base: Path, tfb_command: Run, tmp_path: Path) -> None:
    m = tfb.from_pretrained(digits.ADAPTER, base)
    with pytest.raises(ValueError, match="coverage needs rows with choices or classes, not ans"):
        m.fit(pairs(9), answer="target", coverage=0.9)
    with pytest.raises(ValueError, match="metric='accuracy': rows with an answer need 'nll'"):
        m.fit(pairs(9), answer="target", metric="accuracy")
    m.columns = {"choices": "options", "label": "gold"}  # of a fit before, which reads no answers
    m.fit(pairs(24), answer="target", sigma=0.05, draws=2)
    assert m.columns == {}
    with pytest.raises(ValueError, match="prompts with answers can be fitted to"):
        m.fit([{"prompt": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="choices"):
        m.predict([Row("1", prompt="a", answer="b")])  # there is nothing to choose from
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs(9))))
    command = fit_command(base, digits.ADAPTER, tmp_path / "pairs.jsonl", tmp_path / "made")
    for options, fault in (
        (("--target-error", 0.1), "needs rows with choices or classes, not answers"),
        (("--metric", "accuracy"), "--metric accuracy: rows with an answer need 'nll'"),
    ):
        code, out, err = tfb_command(*command, "--columns", "answer=target", *options)
        assert code and not out and fault in err
