"""The real classes of every supported architecture, tiny, random and in float64.

Norms that compute in float32 whatever the dtype are replaced, so that ``EXACT`` holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.models import FIRST_TOKEN, VOCAB, distilbert, exact, make_batch, randomize, relative
from torch import Tensor

from tfb import Draws

DRAWS = Draws.antithetic(4, 0.2, seed=5)
EXACT = 1e-10
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | {"num_labels": 3}
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT = ["query", "key", "value", "dense"]
# "dense" alone would meet RoBERTa's classifier too.
INSIDE = r".*layer\.\d+\..*(query|key|value|dense)"


@dataclass(frozen=True)
class Kind:
    """A model class, its configuration and what LoRA adapts."""

    make: Callable[[], Any]
    targets: list[str] | str
    task: str = "CAUSAL_LM"
    saved: tuple[str, ...] = ()

    def build(self, *extra: str) -> Any:
        base = randomize(self.make(), 0)
        named = isinstance(self.targets, str)  # a pattern
        config = LoraConfig(
            r=3,
            lora_alpha=6,
            task_type=self.task,
            target_modules=self.targets if named else [*self.targets, *extra],
            modules_to_save=list(self.saved) or None,
        )
        with warnings.catch_warnings():
            # PEFT says that it sets fan_in_fan_out by itself, and how to train tied weights.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            model = get_peft_model(base, config)
        randomize(model, 1, ".default.")
        return exact(model).eval()


def of(name: str, **settings: Any) -> Callable[[], Any]:
    """A maker of ``<name>`` with the common sizes; ``name`` is "Config:Model"."""
    config, _, model = name.partition(":")
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**(SIZES | settings)))


KINDS: dict[str, Kind] = {
    "llama": Kind(of("LlamaConfig:LlamaForCausalLM"), SPLIT),
    "mistral": Kind(of("MistralConfig:MistralForCausalLM", sliding_window=4, head_dim=4), SPLIT),
    "qwen3": Kind(of("Qwen3Config:Qwen3ForCausalLM", head_dim=4), SPLIT),
    "qwen3-window": Kind(
        of(
            "Qwen3Config:Qwen3ForCausalLM",
            head_dim=4,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=1,
        ),
        SPLIT,
    ),
    "gemma3": Kind(
        of(
            "Gemma3TextConfig:Gemma3ForCausalLM",
            head_dim=4,
            sliding_window=4,
            final_logit_softcapping=2.0,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        SPLIT,
    ),
    "phi3": Kind(
        of("Phi3Config:Phi3ForCausalLM"), ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    ),
    "gpt2": Kind(
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCAB,
                n_embd=16,
                n_layer=3,
                n_head=4,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        ["c_attn", "c_proj", "c_fc"],
    ),
    "llama-classifier": Kind(
        of("LlamaConfig:LlamaForSequenceClassification", num_labels=3), SPLIT, "SEQ_CLS", ("score",)
    ),
    "bert": Kind(
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER)),
        BERT,
        "SEQ_CLS",
        ("classifier",),
    ),
    "roberta": Kind(
        lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**ENCODER)
        ),
        INSIDE,
        "SEQ_CLS",
        ("classifier",),
    ),
}


def encoder(name: str, **settings: Any) -> Callable[[], Any]:
    return of(f"{name}Config:{name}ForSequenceClassification", num_labels=3, **settings)


def mixtral() -> Any:
    model = of("MixtralConfig:MixtralForCausalLM", num_local_experts=4)()
    model.set_experts_implementation("eager")  # the grouped product takes no float64
    return model


def t5(kind: str) -> Any:
    """An encoder-decoder, which cannot be folded; its texts end with token 2."""
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        num_labels=3,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return getattr(transformers, f"T5For{kind}")(config)


def varying_angles(kind: str) -> Kind:
    """A Llama whose rotary angles, "longrope" or "dynamic", are others beyond 8 tokens."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0}
    most = 8
    if kind == "longrope":
        rope |= {"short_factor": [1.0, 1.0], "long_factor": [3.0, 9.0]}
        rope |= {"original_max_position_embeddings": 8}
        most = 64
    make = of("LlamaConfig:LlamaForCausalLM", rope_parameters=rope, max_position_embeddings=most)
    return Kind(make, SPLIT)


T5 = ["q", "k", "v", "o", "wi", "wo"]
# The other members of FOLDABLE, and one that is not: checked against the definition only.
OTHERS: dict[str, Kind] = {
    "gemma": Kind(of("GemmaConfig:GemmaForCausalLM", head_dim=4), SPLIT),
    "gemma2": Kind(of("Gemma2Config:Gemma2ForCausalLM", head_dim=4, sliding_window=4), SPLIT),
    "qwen2": Kind(of("Qwen2Config:Qwen2ForCausalLM"), SPLIT),
    "olmo2": Kind(of("Olmo2Config:Olmo2ForCausalLM"), SPLIT),
    "mixtral": Kind(mixtral, SPLIT[:4]),
    # Its MLP is given rows and tokens as one axis.
    "opt": Kind(
        of("OPTConfig:OPTForCausalLM", ffn_dim=32, word_embed_proj_dim=16),
        ["q_proj", "v_proj", "fc1", "fc2"],
    ),
    "electra": Kind(encoder("Electra", embedding_size=16), BERT, "SEQ_CLS", ("classifier",)),
    "xlm-roberta": Kind(encoder("XLMRoberta"), INSIDE, "SEQ_CLS", ("classifier",)),
    "distilbert": Kind(
        distilbert,
        ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
        "SEQ_CLS",
        ("pre_classifier", "classifier"),
    ),
    "t5": Kind(partial(t5, "ConditionalGeneration"), T5, "SEQ_2_SEQ_LM"),
    "t5-classifier": Kind(
        partial(t5, "SequenceClassification"), T5, "SEQ_CLS", ("classification_head",)
    ),
}
DECODERS = [k for k, v in KINDS.items() if k not in ("bert", "roberta")]
CAUSAL = [k for k, v in KINDS.items() if v.task == "CAUSAL_LM"]


def batch_of(pad: str = "left") -> dict[str, Tensor]:
    return make_batch(11, 6, 9, pad=pad)


def single_runs(bayes: Any, draws: Draws, batch: dict[str, Tensor], **how: Any) -> Tensor:
    parts = [bayes.logits(batch, draws[s : s + 1], **how) for s in range(len(draws))]
    return torch.cat(parts)


def last_logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[B, C] of the scored position."""
    logits: Tensor = model(**inputs).logits
    return logits[:, -1] if logits.dim() == 3 else logits


def spread(logits: Tensor) -> float:
    """How far draws are apart: nothing below is true because noise did not reach the model."""
    return relative(logits[0], logits[2])


def prompts(*rows: tuple[int, int], start: int = 6, pad: str = "left") -> dict[str, Tensor]:
    """Rows (context, tokens after it), contexts of ``start`` tokens."""
    batch = make_batch(*(start + n for _, n in rows), pad=pad)
    T = batch["input_ids"].shape[1]
    for row, (context, n) in enumerate(rows):
        g = torch.Generator().manual_seed(100 + context)
        first = T - start - n if pad == "left" else 0
        ids = torch.randint(FIRST_TOKEN, VOCAB, (start,), generator=g)
        batch["input_ids"][row, first : first + start] = ids
    return batch


def tokens_of(
    bayes: Any, batch: dict[str, Tensor], draws: Draws = DRAWS, **how: Any
) -> list[tuple[int, ...]]:
    """Shapes that reach the embedding, call by call."""
    seen: list[tuple[int, ...]] = []
    embed = bayes.base.get_input_embeddings()
    handle = embed.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape)))
    bayes.logits(batch, draws, **how)
    handle.remove()
    return seen


def rows_seen(bayes: Any, names: Sequence[str], call: Callable[[], object]) -> dict[str, list[int]]:
    """Rows of the input of each named module, call by call."""
    seen: dict[str, list[int]] = {n: [] for n in names}
    handles = []
    for name in names:

        def hook(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            seen[name].append(len(value))

        module = bayes.base.get_submodule(name)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    call()
    for handle in handles:
        handle.remove()
    return seen
