"""Full and tail sampling on the real class of every supported architecture, tiny and random.

In float64: an S-fold pass equals S single-draw passes and the naive definition to 1e-9 of the
largest logit. Norms that compute in float32 whatever the dtype would bound that at 1e-6: they round
equal inputs alike, so S-fold and single passes still agree; against the naive models the budget is
float32's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from models import FIRST_TOKEN, VOCAB, make_batch, naive, randomize, relative
from peft import LoraConfig, get_peft_model
from torch import Tensor

import tfb
from tfb import Draws

DRAWS = Draws.antithetic(4, 0.2, seed=5)
EXACT = 1e-9
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | {"num_labels": 3}
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT = ["query", "key", "value", "dense"]


@dataclass(frozen=True)
class Kind:
    """A model class, its configuration and what LoRA adapts."""

    make: Callable[[], Any]
    targets: list[str]
    task: str = "CAUSAL_LM"
    saved: tuple[str, ...] = ()

    def build(self, *extra: str) -> Any:
        base = randomize(self.make(), 0)
        config = LoraConfig(
            r=3, lora_alpha=6, task_type=self.task, target_modules=[*self.targets, *extra],
            modules_to_save=list(self.saved) or None,
        )  # fmt: skip
        with warnings.catch_warnings():
            # PEFT says that it sets fan_in_fan_out by itself, and how to train tied weights.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            model = get_peft_model(base, config)
        randomize(model, 1, ".default.")
        return model.double().eval()


def of(name: str, **settings: Any) -> Callable[[], Any]:
    """A maker of ``<name>`` with the common sizes; ``name`` is "Config:Model"."""
    config, _, model = name.partition(":")
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**(SIZES | settings)))


KINDS: dict[str, Kind] = {
    "llama": Kind(of("LlamaConfig:LlamaForCausalLM"), SPLIT),
    "mistral": Kind(of("MistralConfig:MistralForCausalLM", sliding_window=4, head_dim=4), SPLIT),
    "qwen3": Kind(of("Qwen3Config:Qwen3ForCausalLM", head_dim=4), SPLIT),
    "qwen3-window": Kind(
        of("Qwen3Config:Qwen3ForCausalLM", head_dim=4, use_sliding_window=True, sliding_window=4,
           max_window_layers=1), SPLIT,
    ),
    "gemma3": Kind(
        of("Gemma3TextConfig:Gemma3ForCausalLM", head_dim=4, sliding_window=4,
           layer_types=["sliding_attention", "full_attention", "sliding_attention"]), SPLIT,
    ),
    "phi3": Kind(
        of("Phi3Config:Phi3ForCausalLM"), ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    ),
    "gpt2": Kind(
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=3, n_head=4,
                                    n_positions=64, bos_token_id=1, eos_token_id=2)
        ), ["c_attn", "c_proj", "c_fc"],
    ),
    "llama-classifier": Kind(
        of("LlamaConfig:LlamaForSequenceClassification", num_labels=3), SPLIT, "SEQ_CLS", ("score",)
    ),
    "bert": Kind(
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER)),
        BERT, "SEQ_CLS", ("classifier",),
    ),
    "roberta": Kind(
        lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**ENCODER)
        ), BERT[:3], "SEQ_CLS", ("classifier",),
    ),
}  # fmt: skip
DECODERS = [k for k, v in KINDS.items() if k not in ("bert", "roberta")]
CAUSAL = [k for k, v in KINDS.items() if v.task == "CAUSAL_LM"]


def batch_of(pad: str = "left") -> dict[str, Tensor]:
    return make_batch(11, 6, 9, pad=pad)


def single_runs(bayes: Any, draws: Draws, batch: dict[str, Tensor], **how: Any) -> Tensor:
    parts = [bayes.logits(batch, draws[s : s + 1], **how) for s in range(len(draws))]
    return torch.cat(parts)


def spread(logits: Tensor) -> float:
    """How far draws are apart: nothing below is true because noise did not reach the model."""
    return relative(logits[0], logits[2])


# --- full mode ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_equals_single_draws(kind: str, layers: str) -> None:
    """Whatever the draws have in common is computed once and changes nothing."""
    chosen = tfb.last_layers(1) if layers == "last" else None
    bayes = tfb.bayesianize(KINDS[kind].build(), layers=chosen)
    together = bayes.logits(batch_of(), DRAWS)
    assert relative(together, single_runs(bayes, DRAWS, batch_of())) < EXACT
    assert relative(together, bayes.logits(batch_of("right"), DRAWS)) < EXACT
    assert spread(together) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_full_is_the_definition(kind: str) -> None:
    """Each draw's weights, materialised in a model that was never Bayesianized."""
    bayes, batch = tfb.bayesianize(KINDS[kind].build()), batch_of()
    inputs, _ = bayes.inputs(batch, "full")

    def call(model: Any) -> Tensor:
        logits: Tensor = model(**inputs).logits
        return logits[:, -1] if logits.dim() == 3 else logits

    expected = naive(KINDS[kind].build(), bayes.posteriors, DRAWS, call)
    assert relative(bayes.logits(batch, DRAWS), expected) < 1e-5


@pytest.mark.parametrize("kind", CAUSAL)
def test_last_layer_alone(kind: str) -> None:
    """Noise in the output embedding only: one backbone pass, S heads, also for many draws."""
    bayes = tfb.bayesianize(KINDS[kind].build("lm_head"), layers=tfb.last_layers(0))
    assert list(bayes.posteriors) == ["lm_head"]
    together = bayes.logits(batch_of(), DRAWS)
    assert relative(together, single_runs(bayes, DRAWS, batch_of())) < EXACT
    many = Draws.antithetic(200, 0.2, seed=5)
    assert relative(bayes.logits(batch_of(), many)[:4], together) < EXACT


# --- tail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS)
def test_tail_equals_single_draws(kind: str) -> None:
    """Draws side by side under a tree mask do not see each other, whatever the window."""
    bayes = tfb.bayesianize(KINDS[kind].build())
    for k in (1, 3):
        together = bayes.logits(batch_of(), DRAWS, mode="tail", tail=k)
        single = single_runs(bayes, DRAWS, batch_of(), mode="tail", tail=k)
        assert relative(together, single) < EXACT
        right = bayes.logits(batch_of("right"), DRAWS, mode="tail", tail=k)
        assert relative(together, right) < EXACT
        assert spread(together) > 1e-3


@pytest.mark.parametrize("kind", DECODERS)
def test_tail_of_the_whole_prompt_is_full(kind: str) -> None:
    """k >= T is full sampling, and sigma = 0 the deterministic adapter for every k."""
    bayes, batch = tfb.bayesianize(KINDS[kind].build()), batch_of()
    full = bayes.logits(batch, DRAWS)
    for k in (11, 50):
        assert bayes.logits(batch, DRAWS, mode="tail", tail=k).equal(full)
    mean = bayes.logits(batch, Draws.mean())
    for k in (1, 4, 10):
        assert relative(bayes.logits(batch, Draws.mean(), mode="tail", tail=k), mean) < 1e-6
    # All but one position: still not full, unless nothing looks back that far.
    almost = bayes.logits(make_batch(11, 11), DRAWS, mode="tail", tail=10)
    differ = relative(almost, bayes.logits(make_batch(11, 11), DRAWS))
    assert differ > 1e-4 or kind == "mistral"


@pytest.mark.parametrize("kind", CAUSAL)
def test_tail_is_the_definition(kind: str) -> None:
    """Keys and values of the prefix from the mean adapter, the last k tokens with a draw's weights:
    computed here with PEFT models, one row and one draw at a time."""
    k, batch = 3, make_batch(11)
    bayes, twin = tfb.bayesianize(KINDS[kind].build()), KINDS[kind].build()
    ids = batch["input_ids"]

    @torch.no_grad()
    def call(sampled: Any) -> Tensor:
        cache = transformers.DynamicCache()
        KINDS[kind].build()(input_ids=ids[:, :-k], past_key_values=cache, use_cache=True)
        # One token after another: no mask of ours and none of several queries.
        for t in range(11 - k, 11):
            out = sampled(
                input_ids=ids[:, t : t + 1], position_ids=torch.tensor([[t]]),
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
        logits: Tensor = out.logits[:, -1]
        return logits

    expected = naive(twin, bayes.posteriors, DRAWS[:2], call)
    found = bayes.logits(batch, DRAWS[:2], mode="tail", tail=k)
    assert relative(found, expected) < 1e-5


def test_encoders_have_no_tail() -> None:
    for kind in ("bert", "roberta"):
        bayes = tfb.bayesianize(KINDS[kind].build())
        with pytest.raises(ValueError, match="an encoder sees the whole text"):
            bayes.logits(batch_of(), DRAWS, mode="tail", tail=1)


def test_modes_are_checked() -> None:
    bayes = tfb.bayesianize(KINDS["llama"].build())
    for mode, tail, message in (
        ("half", None, "mode='half'"),
        ("tail", None, "needs tail=k"),
        ("tail", 0, "needs tail=k"),
        ("full", 3, "belongs to mode='tail'"),
    ):
        with pytest.raises(ValueError, match=message):
            bayes.logits(batch_of(), DRAWS, mode=mode, tail=tail)
        with pytest.raises(ValueError, match=message):
            bayes.set_mode(mode, tail)
    bayes.base.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="takes no mask of draws"):
        bayes.set_mode("tail", 1)


def test_eager_attention_takes_the_same_mask() -> None:
    """Additive masks of the eager kernel and boolean ones of sdpa say the same.

    In float32: transformers' eager attention makes NaN of padding in float64.
    """
    found = []
    for kind in ("sdpa", "eager"):
        model = KINDS["llama"].build().float()
        model.get_base_model().set_attn_implementation(kind)
        bayes = tfb.bayesianize(model)
        found.append(bayes.logits(batch_of(), DRAWS, mode="tail", tail=2))
    assert relative(found[0], found[1]) < 1e-5


def test_mode_goes_with_the_artifact(tmp_path: Any) -> None:
    """A search in tail mode is used, saved and loaded in tail mode."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    batch: dict[str, Any] = make_batch(5, 5, 5, 5)
    batch |= {"labels": torch.tensor([0, 1, 0, 1]), "label_ids": torch.tensor([7, 9])}
    fit = tfb.fit_sigma(bayes, [batch], tolerance=0.05, draws=2, mode="tail", tail=2)
    assert (bayes.mode, bayes.tail) == (fit.mode, fit.tail) == ("tail", 2)
    folder = bayes.save(tmp_path / "artifact", fit=fit)
    base = randomize(KINDS["llama"].make(), 0).double()
    again = tfb.load(base, folder)
    assert (again.mode, again.tail) == ("tail", 2)
    draws = Draws.antithetic(2, fit.sigma)
    expected = bayes.logits(batch_of(), draws, mode="tail", tail=2)
    assert relative(again.logits(batch_of(), draws), expected) < 1e-6


def test_first_token_is_above_the_special_ones() -> None:
    """The suite's own premise: no prompt holds padding or end tokens."""
    assert int(batch_of()["input_ids"][batch_of()["attention_mask"].bool()].min()) >= FIRST_TOKEN
