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
    LossFunction,
    MetricLike,
    PassCounter,
    SearchedModel,
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


def build_module() -> tfb.BayesianModule:
    generator = torch.Generator().manual_seed(0)
    W, A, B = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 5), (2, 5), (3, 2))
    )
    base = torch.nn.Linear(5, 3, bias=False, dtype=torch.float64)
    base.weight.data = W

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = tfb.BayesLoRALinear.from_weights(base, A, B, 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    return tfb.bayesianize(Module())  # type: ignore[return-value]


def loss_of(
    bayes: SearchedModel,
    anchors: Any = MIXED,
    metric: MetricLike = "nll",
    n: int = 6,
    **kwargs: Any,
) -> AnchorLoss:
    batch_size = kwargs.pop("batch_size", 3)
    kwargs.setdefault("config", SamplingConfig(seed=5))
    return AnchorLoss(
        bayes, AnchorSet.of(anchors, batch_size=batch_size), metric, draws=n, **kwargs
    )


# --- anchor sets --------------------------------------------------------------------------------


def test_encoded_rows_become_batches_of_one_number_of_choices() -> None:
    anchors = AnchorSet.of(MIXED, batch_size=3, pad_token_id=9)
    assert len(anchors) == 7 and AnchorSet.of(anchors) is anchors
    for batch in anchors.batches:
        B, T = batch["input_ids"].shape
        assert B <= 3 and batch["attention_mask"].shape == (B, T)
        assert batch["label_ids"].shape[0] == len(batch["labels"]) == B
        assert bool((batch["input_ids"][batch["attention_mask"] == 0] == 9).all())
    assert anchors.labels is not None and anchors.labels.dtype == torch.int64
    assert sorted(anchors.labels.tolist()) == sorted(y for y in MIXED.labels if y is not None)
    assert AnchorSet.of(MIXED, batch_size=2).content_hash == anchors.content_hash


def test_batches_are_taken_from_any_iterable_and_lists_are_tensors() -> None:
    made = [{"input_ids": torch.ones(2, 3), "labels": [i, 0], "label_ids": [5, 6]} for i in (0, 1)]
    found = AnchorSet.of(iter(made))
    assert len(found) == 4 and found.batches[1]["label_ids"].tolist() == [5, 6]
    assert found.labels is not None and found.labels.tolist() == [0, 0, 1, 0]
    tensors = [m | {k: torch.tensor(m[k]) for k in ("labels", "label_ids")} for m in made]
    assert AnchorSet.of(tensors).content_hash == found.content_hash
    for row in ([0, None], [0, NO_LABEL]):
        labels = None if None in row else torch.tensor(row)
        assert AnchorSet.of([make_batch(2, 2) | {"labels": labels}]).labels is None


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
        rows(labels=[0] * 6 + [1]).content_hash,
    ]
    assert len({same[0], *others}) == len(others) + 1


def test_a_fault_is_named_with_its_remedy() -> None:
    with pytest.raises(TypeError, match=r"got Row; write anchors = encode\(bayes, data"):
        AnchorSet.of([Row("a", text="b")])  # type: ignore[list-item]
    for empty in ([], EncodedRows(ids=[], input_ids=[], label_ids=[], labels=[], choices=[])):
        with pytest.raises(ValueError, match="anchors: empty; a search needs rows"):
            AnchorSet.of(empty)
    for uneven in ({"x": torch.ones(3, 2), "labels": [0, 1]}, (torch.ones(3), torch.ones(2, 3))):
        with pytest.raises(ValueError, match="as many rows in dim 0 of each tensor, got"):
            AnchorSet.of([uneven])
    with pytest.raises(TypeError, match="classifier needs batches with input_ids"):
        loss_of(build(), [{"x": torch.ones(3, 2)}], "pseudo_nll")
    bare = AnchorSet.of(rows(labels=[None] * 7))
    one = AnchorSet.of(EncodedRows(["a", "b"], [[4], [5]], [(8, 9)] * 2, [1, 1], [("A", "B")] * 2))
    for metric in ("nll", "accuracy"):
        with pytest.raises(ValueError, match="needs a label on every anchor; add labels or use ps"):
            bare.check(metric)
        with pytest.raises(ValueError, match=r"all 2 rows have label 1; .* add rows of other"):
            one.check(metric)
    for metric in ("pseudo_nll", "embedding_norm"):
        for anchors in (bare, one):
            anchors.check(metric)
    # The right answer may stand first in every row, of choices of its own.
    AnchorSet.of(rows(labels=[0] * 7)).check("nll")


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


@pytest.mark.parametrize(
    ("metric", "mode"),
    [(m, ("full", None)) for m in METRICS]
    + [(m, ("tail", 2)) for m in METRICS if m != "embedding_norm"],
)
def test_row_losses_are_those_of_predict_on_the_same_draws(
    metric: str, mode: tuple[str, int | None]
) -> None:
    """At every sigma the streams are those of Draws.antithetic: common random numbers."""
    bayes = build().configure(mode=mode[0], tail=mode[1], seed=5)
    loss = loss_of(bayes, metric=metric, config=bayes.config)
    found = loss(SIGMAS)
    assert [s for s, _ in found.points] == [0.0, *SIGMAS] and found.losses.dtype == torch.float64
    for g, sigma in enumerate([0.0, *SIGMAS]):
        draws = Draws.antithetic(6, sigma, seed=5)
        wanted = torch.cat([explicit(bayes, b, draws, metric) for b in loss.anchors.batches])
        torch.testing.assert_close(found.losses[g], wanted, rtol=EXACT, atol=EXACT)
    if metric in ("nll", "embedding_norm"):  # noise has an effect
        assert float((found.losses[1:] - found.losses[0]).abs().min()) > 1e3 * EXACT


def test_rows_are_right_where_predict_is(bayes: tfb.BayesianModel) -> None:
    loss = loss_of(bayes)
    found = loss(SIGMAS)
    assert found.correct is not None
    for g, sigma in enumerate([0.0, *SIGMAS]):
        draws = Draws.antithetic(6, sigma, seed=5)
        wrong = torch.cat([explicit(bayes, b, draws, "accuracy") for b in loss.anchors.batches])
        assert torch.equal(found.correct[g], wrong == 0)
    assert loss_of(bayes, metric="pseudo_nll")(SIGMAS).correct is None


@pytest.mark.parametrize("anchors", [MIXED, rows()], ids=["mixed", "equal"])
def test_each_sigma_has_the_temperature_of_least_nll(
    bayes: tfb.BayesianModel, anchors: EncodedRows
) -> None:
    """The losses are predict's at that T, and stationary in it, by a difference whose error is
    of third order: |l'(log T)| <= l'' h / 2 at an answer that is right to h."""
    loss = loss_of(bayes, anchors, temperature=True)
    found = loss([0.05, 0.2])
    assert [s for s, _ in found.points] == [0.0, 0.0, 0.05, 0.2] and found.points[0][1] == 1.0
    plain = loss_of(bayes, anchors)([0.05, 0.2])
    assert torch.equal(found.losses[0], plain.losses[0])
    for (sigma, T), losses, at_one in zip(
        found.points[1:], found.losses[1:], plain.losses, strict=True
    ):

        def nll(T: float, sigma: float = sigma) -> Tensor:
            tempered = build().configure(temperature=T)
            draws = Draws.antithetic(6, sigma, seed=5)
            batches = loss.anchors.batches
            return torch.cat([explicit(tempered, b, draws, "nll") for b in batches])

        torch.testing.assert_close(losses, nll(T), rtol=EXACT, atol=EXACT)
        assert float(losses.mean()) < float(at_one.mean())
        h = 1e-3
        assert float(losses.mean()) < float(nll(T * (1 + h)).mean())
        assert float(losses.mean()) < float(nll(T / (1 + h)).mean())


def test_without_a_wrong_row_there_is_no_temperature(bayes: tfb.BayesianModel) -> None:
    """The likelihood would grow for ever as T falls."""
    loss = loss_of(bayes, rows(), temperature=True)
    loss([])
    assert loss.log_probs is not None
    right = iter(loss.log_probs.argmax(-1).tolist())
    known = [dict(b) | {"labels": [next(right) for _ in b["labels"]]} for b in loss.anchors.batches]
    assert loss_of(bayes, known, temperature=True)([1e-6]).points == ((0.0, 1.0), (1e-6, 1.0))


def test_classification_head() -> None:
    bayes = build("llama_classifier")
    text = EncodedRows(
        [str(i) for i in range(7)], rows().input_ids, None, [0, 1, 2, 0, 1, 2, 0], None, 3
    )
    for metric in ("nll", "accuracy", "pseudo_nll"):
        loss = loss_of(bayes, text, metric)
        draws = Draws.antithetic(6, 0.1, seed=5)
        wanted = torch.cat([explicit(bayes, b, draws, metric) for b in loss.anchors.batches])
        torch.testing.assert_close(loss([0.1]).losses[1], wanted, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("metric", ["nll", "accuracy", "pseudo_nll", "own"])
def test_a_module_of_ones_own(metric: str) -> None:
    """As a classifier whose logits are its outputs; a pass is counted in rows."""
    module = build_module()
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    batches = [{"x": x[s], "labels": labels[s]} for s in (slice(4), slice(4, 7))]

    def squares(outputs: Tensor, batch: Any) -> Tensor:
        assert outputs.shape[0] in (1, 6) and set(batch) == {"x", "labels"}
        return (outputs - batch["x"][:, :3]).square().mean((0, 2))

    loss = loss_of(module, batches, squares if metric == "own" else metric)
    found = loss(SIGMAS)
    assert loss.passes == 1 + 3 * 6
    plain = module.outputs({"x": x}, Draws.mean())[0]
    for g, sigma in enumerate([0.0, *SIGMAS]):
        out = module.outputs({"x": x}, Draws.antithetic(6, sigma, seed=5))
        probs = out.softmax(-1).mean(0)
        wanted = {
            "nll": -probs[torch.arange(7), labels].log(),
            "accuracy": (probs.argmax(-1) != labels).double(),
            "pseudo_nll": -probs[torch.arange(7), plain.argmax(-1)].log(),
            "own": (out - x[:, :3]).square().mean((0, 2)),
        }[metric]
        torch.testing.assert_close(found.losses[g], wanted, rtol=EXACT, atol=EXACT)
    some = loss(SIGMAS[:1], torch.tensor([0, 2, 5]))
    torch.testing.assert_close(some.losses, found.losses[:2, [0, 2, 5]], rtol=EXACT, atol=EXACT)


def test_arguments_by_place_come_as_they_were_given() -> None:
    module, x = build_module(), torch.ones(3, 5, dtype=torch.float64)

    def first(outputs: Tensor, batch: Any) -> Tensor:
        assert isinstance(batch, tuple) and torch.equal(batch[0], x)
        return outputs.mean((0, 2))

    by_place, by_name = (
        AnchorLoss(module, AnchorSet.of([b]), m, draws=2, config=SamplingConfig())([0.1]).losses
        for b, m in (((x,), first), ({"x": x}, lambda o, _: o.mean((0, 2))))
    )
    assert torch.equal(by_place, by_name)


def test_unlabelled_anchors_have_the_unsupervised_losses(bayes: tfb.BayesianModel) -> None:
    bare = rows(labels=[None] * 7)
    for metric in ("pseudo_nll", "embedding_norm"):
        labelled, unlabelled = (loss_of(bayes, a, metric)(SIGMAS).losses for a in (rows(), bare))
        assert torch.equal(labelled, unlabelled)


# --- the matrix ---------------------------------------------------------------------------------


def test_losses_at_one_are_at_hand_beside_those_at_each_temperature(
    bayes: tfb.BayesianModel,
) -> None:
    """Bit for bit those of a search without T, also where matrices are joined."""
    loss, alone = (loss_of(bayes, temperature=fitted) for fitted in (True, False))
    joined, plain = loss([0.05]).join(loss([0.02, 0.2])).plain, alone(SIGMAS)
    joined_alone = alone([0.05]).join(alone([0.02, 0.2]))
    assert joined is not None and joined.points == plain.points and plain.plain is None
    assert torch.equal(joined.losses, joined_alone.losses)
    assert joined.correct is not None and torch.equal(joined.correct, joined_alone.correct)  # type: ignore[arg-type]


def test_join_keeps_the_adapter_first_and_every_sigma_once(bayes: tfb.BayesianModel) -> None:
    loss = loss_of(bayes, temperature=True)
    joined = loss([0.05]).join(loss([0.02, 0.05, 0.2]))
    whole = loss([0.02, 0.05, 0.2])
    assert joined.points == whole.points and [s for s, _ in joined.points][:2] == [0.0, 0.0]
    torch.testing.assert_close(joined.losses, whole.losses, rtol=EXACT, atol=EXACT)
    assert joined.correct is not None and torch.equal(joined.correct, whole.correct)  # type: ignore[arg-type]


# --- passes, batches and chunks -----------------------------------------------------------------


@pytest.mark.parametrize("mode", [("full", None), ("tail", 2)])
def test_sigmas_rows_and_chunks_do_not_matter(
    mode: tuple[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bayes = build().configure(mode=mode[0], tail=mode[1])
    whole = loss_of(bayes, config=bayes.config)(SIGMAS)
    monkeypatch.setattr(anchor, "ROWS_PER_PASS", 36)  # two sigmas of 6 draws on 3 rows
    loss = loss_of(bayes, config=bayes.config)
    torch.testing.assert_close(loss(SIGMAS).losses, whole.losses, rtol=EXACT, atol=EXACT)
    some = torch.tensor([0, 2, 3, 6])
    alone = loss([SIGMAS[1]], some)
    torch.testing.assert_close(alone.losses[0], whole.losses[0, some], rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(alone.losses[1], whole.losses[2, some], rtol=EXACT, atol=EXACT)


def test_batch_size_in_float32_stays_in_the_budget(bayes: tfb.BayesianModel) -> None:
    """Budget: twice the error of a float32 pass against the float64 model of the same weights."""
    single = build(double=False)
    truth = loss_of(bayes, batch_size=50)(SIGMAS).losses
    found = {size: loss_of(single, batch_size=size)(SIGMAS).losses for size in (1, 2, 50)}
    eager = float((found[50] - truth).abs().max())
    assert 0 < eager < 1e-3
    for size in (1, 2):
        assert float((found[size] - truth).abs().max()) <= 2 * eager


def test_passes_and_progress_are_counted(bayes: tfb.BayesianModel) -> None:
    """Full mode: 1 + 3 x 6, the adapter's once. Tail mode: sigma = 0 is one of a sweep's draws,
    which share 1 - k / T of each row."""
    seen: list[int] = []
    loss = loss_of(bayes, progress=seen.append)
    loss(SIGMAS)
    assert loss.passes == 1 + 3 * 6 and sum(seen) == 3 * 6 * 7
    loss([0.3], torch.tensor([LENGTHS.index(2)]))
    assert loss.passes > 1 + 3 * 6 and sum(seen) == 3 * 6 * 7 + 6
    tail = loss_of(bayes, config=SamplingConfig(mode="tail", tail=2))
    tail(SIGMAS)
    assert tail.passes == pytest.approx(passes_per_row(LENGTHS, 4 * 6, 2), rel=1e-14)


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


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_nan_is_refused(metric: str) -> None:
    broken = build()
    with torch.no_grad():
        broken.base.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="the model returned NaN or Inf; check weights and inputs"):
        loss_of(broken, metric=metric)([0.1])


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


RETURNS: list[tuple[LossFunction, str]] = [
    (
        lambda out, _: out.mean(),
        r"<lambda> has to return a tensor of a loss for each row, \[3\], got",
    ),
    (lambda out, _: out.mean(-1), r"got \[1, 3\]; average over draws, dim 0"),
    (lambda out, _: 1.0, r"got \['float'\]"),
    (lambda out, _: out.mean((0, 2)) / 0, "the loss function <lambda> returned NaN or Inf; check"),
]


@pytest.mark.parametrize(("function", "message"), RETURNS, ids=range(len(RETURNS)))
def test_a_loss_function_returns_a_loss_of_each_row(
    bayes: tfb.BayesianModel, function: LossFunction, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(bayes, rows(), function)([0.1])


def test_named_metrics_need_logits() -> None:
    class Rows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_module().remove()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mean(-1)  # type: ignore[no-any-return]

    module: Any = tfb.bayesianize(Rows())
    anchors = [{"x": torch.ones(2, 5, dtype=torch.float64), "labels": [0, 1]}]
    with pytest.raises(
        ValueError, match=r"needs outputs \[S, B, K\], got \[1, 2\]; give a loss fun"
    ):
        loss_of(module, anchors)([0.1])
