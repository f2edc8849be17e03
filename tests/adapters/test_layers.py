"""Factors belong to the weights they were made from: other weights are seen and refused, whoever
wrote them, and casts and moves are not taken for a change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import CASES, add_lora, causal, exact, llama, randomize, relative, run, sampled
from torch import Tensor

import tfb
from tfb import AdapterError, Draws

DRAWS = Draws.antithetic(4, 0.05, seed=3)
NAME = "model.layers.1.mlp.up_proj"
CHANGED = rf"{NAME}: LoRA's weights have changed since .* call bayes\.remove\(\) and tfb\.bay"


def parameters(bayes: Any) -> tuple[Any, Any]:
    layer = bayes.base.get_submodule(NAME)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def load(bayes: Any) -> None:
    state = copy.deepcopy(bayes.model.state_dict())
    key = next(k for k in state if f"{NAME}.lora_A" in k)
    state[key][0, 0] += 1e-3
    bayes.model.load_state_dict(state)


def step(bayes: Any) -> None:
    A, B = parameters(bayes)
    optimizer = torch.optim.AdamW([A, B], lr=1e-4)
    bayes.model(**CASES["llama"].batch()).logits.sum().backward()
    optimizer.step()


def assign(bayes: Any) -> None:
    part = bayes.base.get_submodule(NAME).lora_A["default"]
    part.weight = torch.nn.Parameter(part.weight + 1e-3)


def hidden(bayes: Any) -> None:
    with torch.inference_mode():
        parameters(bayes)[0].data.mul_(1.001)


def initialized(bayes: Any) -> None:
    bayes.base.get_submodule(NAME).reset_lora_parameters("default", True)


def other_rank(bayes: Any) -> None:
    layer = bayes.base.get_submodule(NAME)
    for part, size in ((layer.lora_A, (2, 16)), (layer.lora_B, (32, 2))):
        part["default"].weight = torch.nn.Parameter(torch.ones(*size))


CHANGES: dict[str, Callable[[Any], object]] = {
    "load_state_dict": load,
    "a step of training": step,
    "another parameter": assign,
    "past the version counter": hidden,
    "one entry": lambda bayes: parameters(bayes)[1].data[3, 2].add_(1e-3),
    "signs": lambda bayes: parameters(bayes)[1].data.neg_(),
    "order": lambda bayes: parameters(bayes)[1].data.copy_(parameters(bayes)[1].data.flip(0)),
    "initialized": initialized,
    "another rank": other_rank,
    "NaN": lambda bayes: parameters(bayes)[0].data[0, 0].fill_(torch.nan),
    "infinite": lambda bayes: parameters(bayes)[1].data[0, 0].fill_(torch.inf),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_are_refused(change: str, tmp_path: Path) -> None:
    """At every door, and again: a refusal takes nothing for seen. The old weights serve again."""
    bayes, batch = tfb.bayesianize(CASES["llama"].build()), CASES["llama"].batch()
    bayes.configure(sigma=0.05)
    expected, state = bayes.predict(batch, 2).probs, copy.deepcopy(bayes.model.state_dict())
    CHANGES[change](bayes)
    doors: list[Callable[[], object]] = [
        lambda: bayes.predict(batch, 2),
        lambda: sampled(bayes, DRAWS, batch),
        lambda: bayes.generate(batch, 2, max_new_tokens=1),
        lambda: bayes.log_probs(batch, DRAWS),
        lambda: bayes.hidden_norms(batch, DRAWS),
        lambda: tfb.save(bayes, tmp_path / "saved"),
        lambda: tfb.export(bayes, tmp_path / "exported", 2),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=CHANGED):
            door()
    assert not list(tmp_path.iterdir())
    if change != "another rank":
        bayes.model.load_state_dict(state)
        assert bayes.predict(batch, 2).probs.equal(expected)


def test_the_remedy() -> None:
    """Removed and Bayesianized again after training: the posterior of the new weights."""
    bayes, batch = tfb.bayesianize(exact(CASES["llama"].build())), CASES["llama"].batch()
    sampled(bayes, DRAWS, batch)
    step(bayes)
    again = tfb.bayesianize(bayes.remove())
    assert relative(sampled(again, Draws.mean(), batch)[0], run(again.model, batch)) < 1e-10


def test_weights_changed_before_the_first_sample() -> None:
    bayes = tfb.bayesianize(CASES["llama"].build())
    step(bayes)
    with pytest.raises(ValueError, match=CHANGED):
        bayes.logits(CASES["llama"].batch(), DRAWS)


def test_factors_of_other_weights() -> None:
    """Given from elsewhere: those of another adapter of the same shape."""
    other = tfb.bayesianize(CASES["llama"].build(1)).posteriors
    bayes = tfb.bayesianize(CASES["llama"].build(), posteriors=other)
    with pytest.raises(ValueError, match="q_proj: LoRA's weights have changed"):
        bayes.logits(CASES["llama"].batch(), DRAWS)


def test_the_same_update_in_another_basis() -> None:
    bayes, batch = tfb.bayesianize(CASES["llama"].build()), CASES["llama"].batch()
    expected = bayes.logits(batch, DRAWS)
    A, B = parameters(bayes)
    A.data.mul_(2.0)
    B.data.mul_(0.5)
    assert bayes.logits(batch, DRAWS).equal(expected)


@pytest.mark.parametrize("tiny", [1.0, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_are_no_change(dtype: torch.dtype, tiny: float) -> None:
    """Nor where an entry underflows. A step of training after a cast is one."""
    model = CASES["llama"].build()
    for name, p in model.named_parameters():
        p.data.mul_(tiny if "lora_B" in name else 1.0)
    bayes, batch = tfb.bayesianize(model), CASES["llama"].batch()
    bayes.logits(batch, DRAWS)
    bayes.model.to(dtype)
    bayes.logits(batch, DRAWS)
    bayes.model.cpu()
    bayes.logits(batch, DRAWS)
    bayes.model.bfloat16()
    bayes.logits(batch, DRAWS)
    if tiny == 1.0:
        parameters(bayes)[1].data.mul_(1.05)
        with pytest.raises(ValueError, match=CHANGED):
            bayes.logits(batch, DRAWS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_in_few_bits_hides_no_step(dtype: torch.dtype) -> None:
    """One place of the last digit is seen in a dtype that the weights had from the start."""
    model = CASES["llama"].build().to(dtype)
    bayes, batch = tfb.bayesianize(model), CASES["llama"].batch()
    bayes.logits(batch, DRAWS)
    B = parameters(bayes)[1]
    B.data.add_(B.data.sign() * torch.finfo(dtype).eps * B.data.abs().max())
    with pytest.raises(ValueError, match=CHANGED):
        bayes.logits(batch, DRAWS)


def test_small_changes_do_not_add_up() -> None:
    """Each is below the rounding of float32; what they come to is refused."""
    bayes = tfb.bayesianize(CASES["llama"].build())
    bayes.check_sampling()
    with pytest.raises(ValueError, match=CHANGED):
        for _ in range(100):
            parameters(bayes)[0].data.mul_(1 + 4e-7)
            bayes.check_sampling()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_cast_has_rounded_is_not_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    """Its factors would not be those of the weights beside them, when the artifact is loaded."""
    bayes = tfb.bayesianize(CASES["llama"].build())
    bayes.configure(sigma=0.05)
    bayes.model.to(dtype)
    bayes.check_sampling()
    with pytest.raises(ValueError, match=f"were cast to {dtype} after the model was Bayesianized"):
        tfb.save(bayes, tmp_path / "made")
    again = tfb.bayesianize(bayes.remove())
    again.configure(sigma=0.05)
    tfb.save(again, tmp_path / "made")
    base = randomize(CASES["llama"].base(), 0).to(dtype)
    assert tfb.load(base, tmp_path / "made").logits(CASES["llama"].batch(), DRAWS).isfinite().all()


def test_other_active_adapters(tmp_path: Path) -> None:
    """One in a layer's place is not sampled; one beside ours is, and would be lost in files."""
    model = CASES["llama"].build()
    model.add_adapter("other", model.peft_config["default"])
    bayes = tfb.bayesianize(model)
    bayes.configure(sigma=0.05)
    bayes.base.get_submodule(NAME).set_adapter("other")
    with pytest.raises(ValueError, match=f"{NAME}: adapter 'default' is not active in this layer"):
        bayes.logits(CASES["llama"].batch(), DRAWS)
    model.base_model.set_adapter(["default", "other"])
    bayes.check_sampling()
    for door in (tfb.save, tfb.export):
        with pytest.raises(ValueError, match="adapter 'other' is active too, and would"):
            door(bayes, tmp_path / "made")


def test_offloaded_weights_are_refused() -> None:
    bayes = tfb.bayesianize(CASES["llama"].build())
    layer = bayes.base.get_submodule(NAME)
    layer.lora_A["default"].to("meta")
    with pytest.raises(ValueError, match=f"{NAME}: weights are on the meta device"):
        bayes.logits(CASES["llama"].batch(), DRAWS)


def test_what_is_no_change() -> None:
    """Merging and taking it back, the same state again, another adapter, training of the head."""
    model = add_lora(
        randomize(llama(), 0), **causal(modules_to_save=["lm_head"], target_modules=["v_proj"])
    )
    bayes, batch = tfb.bayesianize(exact(model)), CASES["llama"].batch()

    def same(expected: Tensor) -> None:
        assert relative(bayes.logits(batch, DRAWS), expected) < 1e-10

    expected = bayes.logits(batch, DRAWS)
    model.merge_adapter()
    model.unmerge_adapter()
    same(expected)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    same(expected)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    model.set_adapter("default")
    same(expected)
    with torch.no_grad():
        for p in bayes.base.lm_head.modules_to_save["default"].parameters():
            p.mul_(2.0)
    same(2 * expected)


@pytest.mark.parametrize("changed", ["head", "unsampled layer", "folder"])
def test_files_that_are_not_the_model_are_not_saved(changed: str, tmp_path: Path) -> None:
    """An artifact copies the files that its adapter came from: what is live has to be in them."""
    base = randomize(llama(), 0)
    config = causal(target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head"])
    model = add_lora(base, **config)
    model.save_pretrained(tmp_path / "adapter")
    bayes = tfb.bayesianize(model, layers="q_proj", source=tmp_path / "adapter")
    bayes.configure(sigma=0.05)
    tfb.save(bayes, tmp_path / "before")
    layer = base.model.layers[0].self_attn
    weight = {
        "head": base.lm_head.modules_to_save["default"].weight,
        "unsampled layer": layer.o_proj.lora_B["default"].weight,
        "folder": layer.q_proj.lora_A["default"].weight,
    }[changed]
    weight.data.mul_(2.0)
    if changed == "folder":
        model.save_pretrained(tmp_path / "adapter")
        weight.data.mul_(0.5)
    for door in (tfb.save, tfb.export):
        with pytest.raises(
            AdapterError, match=r"whose files would be copied; .* bayes\.source = None"
        ):
            door(bayes, tmp_path / "after")
    bayes.source = None
    tfb.save(bayes, tmp_path / "after")
    batch = CASES["llama"].batch()
    loaded = tfb.load(randomize(llama(), 0), tmp_path / "after")
    # torch multiplies by weights that are to be trained in another order.
    found, expected = loaded.logits(batch, DRAWS), bayes.logits(batch, DRAWS)
    assert relative(found, expected) < 100 * torch.finfo(torch.float32).eps
