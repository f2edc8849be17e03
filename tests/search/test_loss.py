"""Anchor sets, and the loss that is traced on them: each row's loss is what ``predict`` implies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import CASES, FIRST_TOKEN, VOCAB, exact, make_batch
from torch import Tensor

import tfb
from tfb import Draws
from tfb.data.batching import NO_LABEL, EncodedRows
from tfb.data.rows import Row
from tfb.sampling.config import SamplingConfig
from tfb.search import loss as anchor
from tfb.search.loss import (
    METRICS,
    AnchorLoss,
    AnchorSet,
    PassCounter,
    jackknife_error,
    passes_per_row,
)

# The same float64 sums in another order, through two blocks of width 16: some hundred roundings
# of 1.1e-16, amplified by norms and softmax. A single float32 rounding (6e-8) would show.
EXACT = 1e-10
SIGMAS = [0.02, 0.05, 0.2]
LENGTHS = (5, 2, 7, 4, 7, 3, 2)


def rows(
    choices: tuple[int, ...] = (3, 3, 3, 3, 3, 3, 3), labels: list[int | None] | None = None
) -> EncodedRows:
    """Seven random rows of mixed lengths; row i has ``choices[i]`` choices."""
    generator = torch.Generator().manual_seed(0)
    columns = [tuple(range(10 + i % 2, 10 + i % 2 + k)) for i, k in enumerate(choices)]
    return EncodedRows(
        ids=[f"r{i}" for i in range(7)],
        input_ids=[
            torch.randint(FIRST_TOKEN, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS
        ],
        label_ids=columns,
        labels=[0, 1, 2, 0, 1, 2, 0] if labels is None else labels,
        choices=[tuple(map(str, c)) for c in columns],
    )


MIXED = rows((3, 4, 3, 5, 4, 3, 3))


def build(kind: str = "llama", *, double: bool = True) -> tfb.BayesianModel:
    model = CASES[kind].build()
    return tfb.bayesianize(exact(model) if double else model, seed=3)


@pytest.fixture(scope="module")
def bayes() -> tfb.BayesianModel:
    return build()


def loss_of(
    bayes: tfb.BayesianModel, anchors: Any = MIXED, metric: str = "nll", n: int = 6, **kwargs: Any
) -> AnchorLoss:
    batch_size = kwargs.pop("batch_size", 3)
    kwargs.setdefault("config", SamplingConfig(seed=5))
    return AnchorLoss(
        bayes, AnchorSet.of(anchors, batch_size=batch_size), metric, draws=n, **kwargs
    )


# --- anchor sets --------------------------------------------------------------------------------


def test_encoded_rows_become_batches_of_one_number_of_choices() -> None:
    anchors = AnchorSet.of(MIXED, batch_size=3, pad_token_id=9)
    assert len(anchors) == 7 and anchors.content_hash == MIXED.content_hash
    for batch in anchors.batches:
        B, T = batch["input_ids"].shape
        assert B <= 3 and batch["attention_mask"].shape == (B, T)
        assert batch["label_ids"].shape[0] == len(batch["labels"]) == B
        assert bool((batch["input_ids"][batch["attention_mask"] == 0] == 9).all())
    assert anchors.labels is not None
    assert sorted(anchors.labels.tolist()) == sorted(y for y in MIXED.labels if y is not None)
    assert AnchorSet.of(anchors) is anchors
    assert AnchorSet.of(MIXED, batch_size=2).content_hash == anchors.content_hash


def test_batches_are_taken_as_they_are_from_any_iterable() -> None:
    made = [make_batch(3, 2, seed=i) | {"labels": torch.tensor([i, 0])} for i in (0, 1)]
    anchors = AnchorSet.of(iter(made))
    assert len(anchors) == 4 and anchors.batches[1] is made[1]
    assert anchors.labels is not None and anchors.labels.tolist() == [0, 0, 1, 0]


def changed(key: str, change: Callable[[Tensor], Tensor]) -> str:
    batch = make_batch(3, 3) | {"labels": torch.tensor([0, 1])}
    return AnchorSet.of([batch | {key: change(batch[key])}]).content_hash


def test_hash_follows_content() -> None:
    same = [changed("labels", lambda y: y) for _ in range(2)]
    assert same[0] == same[1]
    others = [
        changed("labels", lambda y: 1 - y),
        changed("input_ids", lambda x: x.flip(1)),
        changed("input_ids", lambda x: x.view(3, 2)),  # equal bytes in another shape
        changed("labels", lambda y: y.int()),
        changed("labels", lambda y: y.bool()),
        rows().content_hash,
        rows(labels=[0] * 6 + [1]).content_hash,
    ]
    assert len({same[0], *others}) == len(others) + 1


def test_labels_are_none_if_any_row_lacks_one() -> None:
    assert AnchorSet.of(rows(labels=[0, 1, None, 0, 1, 0, 1])).labels is None
    assert AnchorSet.of([make_batch(2)]).labels is None
    assert AnchorSet.of([make_batch(2) | {"labels": torch.tensor([NO_LABEL])}]).labels is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_are_int64_on_the_cpu(dtype: torch.dtype) -> None:
    """Losses index float64 probabilities on the CPU by them, whatever the batches hold."""
    labels = torch.tensor([0, 2, 1, 0], dtype=dtype)
    found = AnchorSet.of([{"input_ids": torch.ones(4, 2), "labels": labels}]).labels
    assert found is not None and found.tolist() == [0, 2, 1, 0]
    assert found.dtype == torch.int64 and found.device.type == "cpu"


def test_lists_are_tensors_and_rows_are_named() -> None:
    lists = {"input_ids": torch.ones(2, 3), "labels": [0, 1], "label_ids": [5, 6]}
    found = AnchorSet.of([lists])
    assert found.batches[0]["label_ids"].tolist() == [5, 6] and len(found) == 2
    assert found.labels is not None and found.labels.tolist() == [0, 1]
    assert (
        found.content_hash
        == AnchorSet.of(
            [lists | {"labels": torch.tensor([0, 1]), "label_ids": torch.tensor([5, 6])}]
        ).content_hash
    )
    with pytest.raises(TypeError, match=r"got Row; write anchors = encode\(bayes, data"):
        AnchorSet.of([Row("a", text="b")])  # type: ignore[list-item]


def test_empty_anchors_are_refused() -> None:
    nothing = EncodedRows(ids=[], input_ids=[], label_ids=[], labels=[], choices=[])
    for empty in ([], nothing):
        with pytest.raises(ValueError, match="anchors: empty; a search needs rows"):
            AnchorSet.of(empty)


def test_check_names_the_fault_and_the_remedy() -> None:
    bare = AnchorSet.of(rows(labels=[None] * 7))
    one = AnchorSet.of(EncodedRows(["a", "b"], [[4], [5]], [(8, 9)] * 2, [1, 1], [("A", "B")] * 2))
    text = AnchorSet.of(EncodedRows(["a", "b"], [[4], [5]], None, [1, 1], None, num_labels=3))
    for metric in ("nll", "accuracy"):
        with pytest.raises(ValueError, match="needs a label on every anchor; add labels or use ps"):
            bare.check(metric)
        for anchors in (one, text):
            with pytest.raises(ValueError, match=r"all 2 rows have label 1; .* add rows of other"):
                anchors.check(metric)
    for metric in ("pseudo_nll", "embedding_norm"):
        for anchors in (bare, one, text):
            anchors.check(metric)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_equal_labels_of_different_choices_are_not_one_class(batch_size: int) -> None:
    """The right answer may stand first in every row."""
    AnchorSet.of(rows(labels=[0] * 7), batch_size=batch_size).check("nll")


# --- the loss of each row -----------------------------------------------------------------------


def explicit(bayes: tfb.BayesianModel, batch: Any, draws: Draws, metric: str) -> Tensor:
    """[B] float64 losses of one batch, from the public API alone."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "label_ids")}
    ids = batch.get("label_ids")
    if metric == "embedding_norm":
        position = inputs["attention_mask"].cumsum(-1).sub(1).clamp_min(0)
        with torch.no_grad(), bayes.sampling(draws):
            out = bayes.model(**inputs, position_ids=position, output_hidden_states=True)
        hidden = out.hidden_states[-1][:, -1].unflatten(0, (len(draws), -1))
        return hidden.square().sum(-1).sqrt().mean(0)
    probs = bayes.predict(inputs, draws, label_ids=ids).probs
    assert probs.dtype == torch.float64
    if metric == "accuracy":
        return (probs.argmax(-1) != batch["labels"]).double()
    if metric == "expected_nll":
        each = bayes.predict(inputs, draws, label_ids=ids, keep_draws=True).draw_probs
        assert each is not None
        return -each[:, torch.arange(len(probs)), batch["labels"]].log().mean(0)
    if metric == "nll":
        target = batch["labels"]
    else:
        target = bayes.predict(inputs, Draws.mean(), label_ids=ids).probs.argmax(-1)
    return -probs[torch.arange(len(probs)), target].log()


@pytest.mark.parametrize("metric", METRICS)
def test_row_losses_are_those_of_predict_on_the_same_draws(
    bayes: tfb.BayesianModel, metric: str
) -> None:
    """At every sigma the streams are those of Draws.antithetic: common random numbers."""
    loss = loss_of(bayes, metric=metric)
    table = loss(SIGMAS)
    for g, sigma in enumerate([0.0, *SIGMAS]):
        draws = Draws.antithetic(6, sigma, seed=5)
        wanted = torch.cat([explicit(bayes, b, draws, metric) for b in loss.anchors.batches])
        found = table.rows[g - 1] if g else loss.baseline
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)
    if metric in ("nll", "embedding_norm"):
        assert float((table.rows - loss.baseline).abs().min()) > 1e3 * EXACT  # noise has an effect


def test_losses_are_those_at_the_models_temperature() -> None:
    bayes = build().configure(temperature=1.7, seed=5)
    loss = loss_of(bayes, config=None)
    draws = Draws.antithetic(6, 0.1, seed=5)
    wanted = torch.cat([explicit(bayes, b, draws, "nll") for b in loss.anchors.batches])
    torch.testing.assert_close(loss([0.1]).rows[0], wanted, rtol=EXACT, atol=EXACT)
    assert float((loss.baseline - loss_of(bayes).baseline).abs().min()) > 1e3 * EXACT


def test_classification_head() -> None:
    bayes = build("llama_classifier")
    text = EncodedRows(
        [str(i) for i in range(7)], rows().input_ids, None, [0, 1, 2, 0, 1, 2, 0], None, 3
    )
    for metric in ("nll", "accuracy", "pseudo_nll"):
        loss = loss_of(bayes, text, metric)
        draws = Draws.antithetic(6, 0.1, seed=5)
        wanted = torch.cat([explicit(bayes, b, draws, metric) for b in loss.anchors.batches])
        torch.testing.assert_close(loss([0.1]).rows[0], wanted, rtol=EXACT, atol=EXACT)


def test_unlabelled_anchors_have_the_unsupervised_losses(bayes: tfb.BayesianModel) -> None:
    bare = rows(labels=[None] * 7)
    for metric in ("pseudo_nll", "embedding_norm"):
        labelled, unlabelled = (loss_of(bayes, a, metric)(SIGMAS).rows for a in (rows(), bare))
        assert torch.equal(labelled, unlabelled)


def test_probability_floor(bayes: tfb.BayesianModel) -> None:
    """-log max(p, 1e-12)."""
    loss = loss_of(bayes, rows())
    sure = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    loss._mean = sure.expand(7, 3)
    assert loss.baseline.tolist() == [
        pytest.approx(0.0 if y == 0 else 27.631021115928547) for y in loss.anchors.labels.tolist()
    ]


# --- passes, batches and chunks -----------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_sigmas_together_are_each_alone(
    bayes: tfb.BayesianModel, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = loss_of(bayes, metric=metric)
    together = loss(SIGMAS)
    for g, sigma in enumerate(SIGMAS):
        alone = loss([sigma])
        torch.testing.assert_close(alone.rows[0], together.rows[g], rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(
            jackknife_error(alone.left_out)[0],
            jackknife_error(together.left_out)[g],
            rtol=1e-6,
            atol=EXACT,
        )
    monkeypatch.setattr(anchor, "ROWS_PER_PASS", 36)  # two sigmas of 6 draws on 3 rows
    chunked = loss(SIGMAS)
    torch.testing.assert_close(chunked.rows, together.rows, rtol=EXACT, atol=EXACT)


def test_batch_size_does_not_matter(bayes: tfb.BayesianModel) -> None:
    """Rows of one K are sorted by length whatever the batch size, so their order is the same."""
    whole = loss_of(bayes, batch_size=50)(SIGMAS)
    for batch_size in (1, 2, 4):
        table = loss_of(bayes, batch_size=batch_size)(SIGMAS)
        torch.testing.assert_close(table.rows, whole.rows, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(
            jackknife_error(table.left_out), jackknife_error(whole.left_out), rtol=1e-6, atol=EXACT
        )


def test_batch_size_in_float32_stays_in_the_budget(bayes: tfb.BayesianModel) -> None:
    """Budget: twice the error of a float32 pass against the float64 model of the same weights."""
    single = build(double=False)
    truth = loss_of(bayes, batch_size=50)(SIGMAS).rows
    found = {size: loss_of(single, batch_size=size)(SIGMAS).rows for size in (1, 2, 50)}
    eager = float((found[50] - truth).abs().max())
    assert 0 < eager < 1e-3
    for size in (1, 2):
        assert float((found[size] - truth).abs().max()) <= 2 * eager


def test_passes_and_progress_are_counted(bayes: tfb.BayesianModel) -> None:
    seen: list[int] = []
    loss = loss_of(bayes, progress=seen.append)
    assert loss.passes == 1 and sum(seen) == 0
    assert loss.baseline.shape == (7,) and loss.passes == 1
    loss(SIGMAS)
    assert loss.passes == 1 + 3 * 6 and sum(seen) == 3 * 6 * 7


PROMPTS = [3, 7, 20]


@pytest.mark.parametrize(
    ("draws", "tail", "passes"),
    [
        (1, None, 1.0),
        (10, None, 10.0),
        (1, 5, 1.0),
        (10, 5, 1 + 9 * (3 + 5 + 5) / 30),
        (10, 1, 1 + 9 * 3 / 30),
        (10, 20, 10.0),
    ],
)
def test_passes_per_row(draws: int, tail: int | None, passes: float) -> None:
    """1 + (S - 1) k / T, k at most the row's length; as the search counts a sweep."""
    assert passes_per_row(PROMPTS, draws, tail) == pytest.approx(passes, rel=1e-14)
    mask = torch.arange(20) < torch.tensor(PROMPTS)[:, None]
    counter = PassCounter([{"input_ids": mask.long(), "attention_mask": mask.long()}], tail)
    counter.spend(torch.arange(3), draws)
    assert counter.passes == pytest.approx(passes, rel=1e-14)


# --- the standard error over draws --------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_draw_standard_error_is_the_jackknife_over_streams(
    bayes: tfb.BayesianModel, metric: str
) -> None:
    """Leave out one stream (a pair), average the rest, take the loss."""
    loss = loss_of(bayes, metric=metric)
    error = jackknife_error(loss([0.1, 0.3]).left_out)
    for g, sigma in enumerate((0.1, 0.3)):
        draws = Draws.antithetic(6, sigma, seed=5)
        left_out = []
        for unit in draws.units:
            keep = [s for s in range(6) if s not in unit]
            rest = Draws(
                tuple(draws.sigmas[s] for s in keep), tuple(draws.streams[s] for s in keep), seed=5
            )
            rows_ = [explicit(bayes, b, rest, metric) for b in loss.anchors.batches]
            left_out.append(float(torch.cat(rows_).mean()))
        U = len(left_out)
        centre = sum(left_out) / U
        wanted = ((U - 1) / U * sum((x - centre) ** 2 for x in left_out)) ** 0.5
        assert float(error[g]) == pytest.approx(wanted, rel=1e-6, abs=EXACT)


def test_draw_standard_error_of_one_stream_is_unknown(bayes: tfb.BayesianModel) -> None:
    assert bool(jackknife_error(loss_of(bayes, n=2)(SIGMAS).left_out).isnan().all())


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_nan_is_refused(metric: str) -> None:
    broken = build()
    with torch.no_grad():
        broken.base.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="the model returned NaN or Inf; check weights and inputs"):
        loss_of(broken, metric=metric)


@pytest.mark.parametrize("metric", METRICS)
def test_nan_at_a_sampled_sigma_is_refused(bayes: tfb.BayesianModel, metric: str) -> None:
    """What fails with noise alone is not blamed on the weights."""
    loss = loss_of(bayes, metric=metric)
    with pytest.raises(tfb.SearchError, match=r"sigma=1e\+300: with so much noise .* NaN or Inf"):
        loss([0.1, 1e300])


@pytest.mark.parametrize("label", [3, -1])
def test_label_outside_the_choices_is_refused(bayes: tfb.BayesianModel, label: int) -> None:
    for metric in ("nll", "accuracy"):
        loss = loss_of(bayes, rows(labels=[0, 1, label, 0, 1, 2, 0]), metric)
        with pytest.raises(ValueError, match="anchors: a label lies outside the 3 choices"):
            loss([0.1])
