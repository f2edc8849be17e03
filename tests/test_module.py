"""``BayesianModule``: a module of one's own is sampled as a loop over its draws says."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from support.models import relative
from torch import Tensor, nn
from torch.nn.functional import linear

import tfb
from tfb import BayesianModule, BayesLoRALinear, Draws, SamplingConfig
from tfb.draws import stable_layer_id
from tfb.posterior import AdapterError

N, H, K, B, T = 6, 8, 3, 4, 5
F64 = torch.float64
EXACT = 1e-12  # float64 sums of at most 20 terms in another order, through two layers
DRAWS = Draws((0.2, -0.2, 0.0, 0.4, 0.2), (0, 0, 1, 9, 1), seed=11)


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def adapted(n: int, m: int, seed: int = 0) -> BayesLoRALinear:
    base = nn.Linear(n, m, dtype=F64).requires_grad_(False)
    base.weight.copy_(randn(m, n, seed=seed) / n**0.5)
    base.bias.copy_(randn(m, seed=seed + 1))
    return BayesLoRALinear.from_weights(base, randn(2, n, seed=2), randn(m, 2, seed=3), 0.5)


class Net(nn.Module):
    """Tokens [B, T, n] and their weights [B, T] to logits [B, K]; a dropout, two noisy layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = adapted(N, H), nn.Dropout(0.5), adapted(H, K, 7)

    def forward(self, x: Tensor, weights: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.drop(torch.tanh(self.first(x)))
        return scale * self.last((hidden * weights[..., None]).sum(1))


X, WEIGHTS = randn(B, T, N), randn(B, T, seed=1).softmax(-1)


def make(sigma: float | None = 0.2, **changes: Any) -> BayesianModule:
    bayes: Any = tfb.bayesianize(Net())
    assert isinstance(bayes, BayesianModule)
    return bayes.configure(sigma=sigma, **changes)


def loop(bayes: BayesianModule, draws: Draws = DRAWS, noisy: tuple[str, ...] = ()) -> Tensor:
    """The net with each draw's own weights, one draw after the other: [S, B, K]."""
    outputs = []
    for sigma, stream in zip(draws.sigmas, draws.streams, strict=True):

        def apply(name: str, x: Tensor, at: Any = (sigma, stream)) -> Tensor:
            layer = bayes.model.get_submodule(name)
            p = layer.posterior
            own = not noisy or name in noisy
            change = p.sample(*at, seed=draws.seed) if own else p.mean()
            return linear(x, layer.base.weight + change, layer.base.bias)

        hidden = torch.tanh(apply("first", X))
        outputs.append(apply("last", (hidden * WEIGHTS[..., None]).sum(1)))
    return torch.stack(outputs)


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        {"x": X, "weights": WEIGHTS, "labels": torch.zeros(B)},
        {"x": X, "weights": WEIGHTS, "scale": torch.tensor(1.0, dtype=F64)},
        (X, WEIGHTS),
        [X, WEIGHTS, 1.0],
    ],
)
def test_outputs_are_a_loop_over_draws(batch: Any) -> None:
    bayes = make()
    assert bayes.model.training
    found = bayes.outputs(batch, DRAWS)
    assert found.shape == (5, B, K) and relative(found, loop(bayes)) < EXACT
    assert all(m.training for m in bayes.model.modules())


def test_layers_that_merge_are_the_same_draws() -> None:
    bayes = make()
    for layer in bayes.layers.values():
        layer.sampler.merging = "always"
    assert relative(bayes.outputs((X, WEIGHTS), DRAWS), loop(bayes)) < EXACT


def test_in_sampling_the_module_returns_all_draws() -> None:
    bayes = make()
    bayes.model.eval()
    before = bayes.model(X, WEIGHTS)
    with torch.no_grad(), bayes.sampling(DRAWS) as same:
        rows = bayes.model(X, weights=WEIGHTS)
        assert same is bayes and rows.shape == (5 * B, K)
        with bayes.sampling(DRAWS[:2]):
            inner = bayes.model(X, WEIGHTS)
    assert relative(rows.unflatten(0, (5, B)), loop(bayes)) < EXACT
    assert relative(inner, rows[: 2 * B]) < EXACT
    assert torch.equal(bayes.model(X, WEIGHTS), before)
    assert relative(bayes.outputs((X, WEIGHTS), Draws.mean())[0], before) < EXACT


def test_one_argument_one_layer_is_normal() -> None:
    """y = W'x + s sigma U E x: mean and covariance of 4000 draws of the layer alone as module."""
    bayes: Any = tfb.bayesianize(adapted(N, K))
    x, sigma, S = randn(1, N), 0.3, 4000
    y = bayes.outputs(x, Draws.iid(S, sigma))[:, 0]
    exact = bayes.model.posterior.column_covariance(sigma) * float(x.square().sum())
    centred = y - bayes.model(x)
    # Of normals: a mean has variance C_ii / S, a covariance (C_ij^2 + C_ii C_jj) / S.
    spread = exact.diagonal()
    assert bool((centred.mean(0).abs() <= 4.5 * (spread / S).sqrt()).all())
    error = ((exact.square() + spread[:, None] * spread) / S).sqrt()
    assert bool(((centred.mT @ centred / S - exact).abs() <= 4.5 * error).all())


def test_predictions_average_tempered_probabilities() -> None:
    bayes = make(temperature=1.7, seed=3)
    draws = bayes.draws(6)
    assert draws == Draws.antithetic(6, 0.2, seed=3)
    pred = bayes.predict({"x": X, "weights": WEIGHTS}, draws=6)
    p = (loop(bayes, draws) / 1.7).softmax(-1)
    assert relative(pred.probs, p.mean(0)) < EXACT
    assert relative(pred.aleatoric, torch.special.entr(p).sum(-1).mean(0)) < EXACT


def test_chosen_layers_alone_are_noisy() -> None:
    bayes: Any = tfb.bayesianize(Net(), layers="last", config=SamplingConfig(sigma=0.2))
    assert list(bayes.posteriors) == ["last"]
    assert relative(bayes.outputs((X, WEIGHTS), DRAWS), loop(bayes, noisy=("last",))) < EXACT


# --- whose noise --------------------------------------------------------------------------------


def test_names_are_the_noise() -> None:
    """Copies of one layer draw independently; the order in which layers were made is nothing."""
    one = adapted(N, N)
    nets = [
        nn.Sequential(one, deepcopy(one)),
        nn.Sequential(adapted(N, N), adapted(N, N)),
    ]
    several: list[Any] = [tfb.bayesianize(net) for net in nets]
    found = [bayes.outputs(X[:, 0], DRAWS) for bayes in several]
    assert torch.equal(*found)
    for bayes in several:
        ids = {name: p.layer_id for name, p in bayes.posteriors.items()}
        assert ids == {name: stable_layer_id(name) for name in ("0", "1")}
        assert [p.name for p in bayes.posteriors.values()] == ["0", "1"]


def test_a_state_dict_brings_weights_and_leaves_names() -> None:
    """Loaded before or after: into a sampled module, and from one that was never sampled."""
    source = Net()
    with torch.no_grad():
        source.first.posterior = adapted(N, H, 5).posterior
        source.first.base.weight.mul_(2.0)
    bayes = make()
    before = bayes.outputs((X, WEIGHTS), DRAWS)
    bayes.model.load_state_dict(source.state_dict())
    after: Any = tfb.bayesianize(source)
    found = bayes.outputs((X, WEIGHTS), DRAWS)
    assert torch.equal(found, after.outputs((X, WEIGHTS), DRAWS))
    assert relative(found, before) > 0.01 and relative(found, loop(bayes)) < EXACT


def test_remove_gives_the_module_back() -> None:
    net = Net()
    ids = [net.first.posterior.layer_id, net.last.posterior.layer_id]
    bayes: Any = tfb.bayesianize(net)
    assert bayes.remove() is net
    assert [net.first.posterior.layer_id, net.last.posterior.layer_id] == ids
    assert not net._forward_pre_hooks and not net._forward_hooks
    with pytest.raises(ValueError, match=r"first: not sampled by this BayesianModule any more"):
        bayes.outputs((X, WEIGHTS), DRAWS)
    again: Any = tfb.bayesianize(net)
    assert torch.equal(again.outputs((X, WEIGHTS), DRAWS), make().outputs((X, WEIGHTS), DRAWS))


def test_a_copy_is_a_module_of_its_own() -> None:
    """It computes the mean while the original is sampled, and can be sampled itself."""
    bayes = make()
    copy = deepcopy(bayes.model).eval()
    mean = copy(X, WEIGHTS)
    with bayes.sampling(DRAWS):
        assert torch.equal(copy(X, WEIGHTS), mean)
    own: Any = tfb.bayesianize(copy)
    expected = bayes.outputs((X, WEIGHTS), DRAWS)
    assert torch.equal(own.outputs((X, WEIGHTS), DRAWS), expected)


# --- what is refused ----------------------------------------------------------------------------


class Reshaping(nn.Module):
    """Hands its layer rows in some other shape."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change, self.layer = change, adapted(N, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.change(x))


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda x: x.flatten(0, 1), r"\[100, 6\]"),  # [S * B * T, n]
        (lambda x: x.transpose(0, 1), r"\[5, 20, 6\]"),  # [T, S * B, n]
        (lambda x: x[: len(x) // 2], r"\[10, 5, 6\]"),
        (lambda x: x[0, 0], r"\[6\]"),
        (lambda x: x.sum((0, 1))[:1].expand(20), r"\[20\]"),  # no rows, but as many numbers
    ],
)
def test_layers_that_do_not_see_the_rows(change: Callable[[Tensor], Tensor], shape: str) -> None:
    bayes: Any = tfb.bayesianize(Reshaping(change))
    with pytest.raises(RuntimeError, match=f"layer: got an input of shape {shape} .* all 20 in"):
        bayes.outputs(X, DRAWS)
    bayes.model.change = nn.Identity()
    assert bayes.outputs(X, DRAWS).shape == (5, B, T, K)  # no pass is left under way


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        ((X, WEIGHTS[:1]), ValueError, r"of Net with as many rows in dim 0 each, got .*\[1, 5\]"),
        ((X[:0], WEIGHTS[:0]), ValueError, "as many rows in dim 0"),
        ({"scale": 2.0}, ValueError, r"got shapes \[\]"),
        ("text", TypeError, "batch: expected a mapping of tensors, a tuple of tensors or one"),
    ],
)
def test_batches_without_common_rows(batch: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make().outputs(batch, DRAWS)


def test_outputs_without_the_rows() -> None:
    pooled: Any = tfb.bayesianize(nn.Sequential(adapted(N, K), nn.Flatten(0)))
    with pytest.raises(ValueError, match=r"Sequential returned \[300\] for 5 draws of 4 rows"):
        pooled.outputs(X, DRAWS)
    several: Any = tfb.bayesianize(nn.Sequential(adapted(N, N), nn.LSTM(N, K, dtype=F64)))
    with pytest.raises(TypeError, match="returns tuple; expected one tensor"):
        several.outputs(X, DRAWS)
    with pytest.raises(ValueError, match=r"expected \[S=5, B, K\]"):
        tfb.bayesianize(Reshaping(nn.Identity())).predict(X, DRAWS)


def test_layers_called_outside_the_module() -> None:
    bayes = make()
    with bayes.sampling(DRAWS), pytest.raises(RuntimeError, match="first: called outside the"):
        bayes.model.first(X)


def test_a_module_that_was_changed() -> None:
    bayes = make()
    bayes.model.last = adapted(H, K)
    with pytest.raises(ValueError, match="last: not sampled by this BayesianModule any more"):
        bayes.outputs((X, WEIGHTS), DRAWS)


def test_modules_and_options_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdapterError, match=r"expected a peft.PeftModel, .*tfb.BayesLoRALinear"):
        tfb.bayesianize(nn.Linear(N, K))
    with pytest.raises(AdapterError, match=r"Linear holds no tfb.BayesLoRALinear; put one"):
        BayesianModule(nn.Linear(N, K))
    bayes = make(sigma=None)
    with pytest.raises(AdapterError, match=r"first: already Bayesianized; call remove\(\)"):
        tfb.bayesianize(bayes.model)
    with pytest.raises(ValueError, match=r"sigma is not set: run tfb.fit_sigma"):
        bayes.predict((X, WEIGHTS))
    with pytest.raises(ValueError, match="mode='tail' is not possible"):
        bayes.configure(mode="tail", tail=1)
    with pytest.raises(ValueError, match="only for PEFT's models"):
        tfb.bayesianize(Net(), labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="selects none of the 2 modules: first, last"):
        tfb.bayesianize(Net(), layers="attention")
    monkeypatch.setattr("tfb.module.stable_layer_id", lambda name: 7)
    with pytest.raises(AdapterError, match="the same 32-bit noise identity"):
        tfb.bayesianize(Net())


def test_it_says_what_it_is() -> None:
    assert repr(make(sigma=None)) == "BayesianModule(Net, 2 layers, not fitted)"
    assert repr(make(sigma=0.25)) == "BayesianModule(Net, 2 layers, sigma=0.25, T=1)"
    assert make().pad_token_id == 0
