"""``bayesianize``: a posterior for the LoRA adapter of a PEFT model.

Layers of PEFT that do not consult the variant slot, or whose slot is taken, are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from tfb.adapters.layers import BayesVariant, MergingLinear, PeftAttachment
from tfb.adapters.loading import TASKS
from tfb.data.encoding import check_label_tokens
from tfb.draws import stable_layer_id
from tfb.linear import LowRankSampler
from tfb.model import BayesianModel, check_possible
from tfb.module import BayesianModule, bayesian_layers
from tfb.posterior import AdapterError, LowRankPosterior
from tfb.sampling.config import SamplingConfig

# LoRA layer classes whose forward consults the variant slot (read in peft 0.18 - 0.21).
SUPPORTED_LAYERS = frozenset(
    {"Linear", "Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "HqqLoraLinear"}
)
LayerPredicate = Callable[[str], bool]


@dataclass(frozen=True)
class LastLayers:
    """The adapted modules of the last k transformer blocks, and whatever comes after them."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ValueError(f"last_layers({self.k}): expected k >= 0")


def last_layers(k: int) -> LastLayers:
    """Select the last ``k`` blocks that the adapter touches, and modules outside blocks (a head).

    ``last_layers(0)`` keeps only modules outside any block: last-layer TFB. Blocks are numbered
    by the first number in a module's qualified name ("model.layers.11.mlp.up_proj": block 11).
    """
    return LastLayers(k)


def block_number(name: str) -> int | None:
    """Return the first number in a qualified name, or None (an embedding, a head)."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def select_layers(
    names: Sequence[str], layers: str | LayerPredicate | LastLayers | None
) -> list[str]:
    """Return the names that ``layers`` of :func:`bayesianize` selects, in order."""
    if layers is None:
        chosen = list(names)
    elif isinstance(layers, LastLayers):
        blocks = sorted({b for b in map(block_number, names) if b is not None})
        keep = set(blocks[-layers.k :]) if layers.k else set()
        chosen = [n for n in names if (b := block_number(n)) is None or b in keep]
    elif isinstance(layers, str):
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise ValueError(f"layers={layers!r} is not a regular expression: {error}") from error
        chosen = [n for n in names if pattern.search(n)]
    elif callable(layers):
        chosen = [n for n in names if layers(n)]
    else:
        raise TypeError(
            f"layers: expected None, a regular expression, a predicate of the module's name or "
            f"tfb.last_layers(k), got {type(layers).__name__}"
        )
    if not chosen:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(f"layers={layers!r} selects none of the {len(names)} modules: {shown}")
    return chosen


def bayesianize(
    peft_model: nn.Module,
    adapter: str = "default",
    layers: str | LayerPredicate | LastLayers | None = None,
    seed: int = 0,
    *,
    posteriors: Mapping[str, LowRankPosterior] | None = None,
    config: SamplingConfig | None = None,
    labels: Sequence[str] | None = None,
    label_tokens: str = "all",
    source: Path | None = None,
) -> BayesianModel:
    """Give a PEFT LoRA model's adapter a posterior, in place (TFB, section 3).

    A module of one's own, without PEFT, holds :class:`tfb.BayesLoRALinear` layers instead: they
    bring their posteriors, and a :class:`tfb.BayesianModule` comes out.

    Outside ``bayes.sampling`` the model computes what it did before, bit for bit. Only mixed
    batches (adapter_names) on a half-precision base agree to rounding: there PEFT rounds a plain
    adapter's product once more than a variant's.

    Args:
        peft_model: a ``peft.PeftModel`` for CAUSAL_LM, SEQ_2_SEQ_LM or SEQ_CLS with a trained LoRA
            adapter; or a module of one's own, for which ``layers``, ``seed`` and ``config`` count.
        adapter: its name.
        layers: which adapted modules get noise; the others stay deterministic. A regular
            expression (``re.search`` on the name), a predicate of the name, or
            :func:`last_layers`. None: all.
        seed: of the draws.
        posteriors: factors by module name, an artifact's or a study's. Default: computed here.
        config: how the model samples, in place of ``seed`` and the defaults.
        labels: names of the classes, or choices of rows that bring none. Default: those of the
            base's configuration.
        label_tokens: the tokens of a choice that are scored, "all" or "last".
        source: the adapter's folder, from which artifacts copy its files untouched.

    Returns:
        The model's :class:`BayesianModel`, or the module's :class:`tfb.BayesianModule`. Its sigma
        is None until it is fitted or configured.

    Raises:
        AdapterError: no such adapter, not LoRA, an unsupported kind of layer or LoRA variant
            (named), an untrained, merged, damaged or already Bayesianized adapter.
        ValueError: ``layers`` selects nothing, or the model cannot sample as ``config`` says.
    """
    config = SamplingConfig(seed=seed) if config is None else config
    plain = isinstance(peft_model, nn.Module) and not isinstance(peft_model, PeftModel)
    if plain and (own := list(bayesian_layers(peft_model))):
        if any(option is not None for option in (posteriors, labels, source)):
            raise ValueError("posteriors, labels, source: only for PEFT's models")
        # The declared type is that of PEFT's models, which offers more.
        return cast(Any, BayesianModule(peft_model, select_layers(own, layers), config))
    check_label_tokens(label_tokens)
    task = _check_adapter(peft_model, adapter)
    assert isinstance(peft_model, PeftModel)  # _check_adapter said so
    base: Any = peft_model.get_base_model()
    adapted = _adapted_modules(base, adapter)
    if task == "SEQ_CLS":
        _check_head(base.config)
    names = select_layers(list(adapted), layers)
    _check_layers({name: adapted[name] for name in names}, adapter)
    if posteriors is None:
        posteriors = {name: _posterior(name, adapted[name], adapter) for name in names}
    elif set(posteriors) != set(names):
        odd = sorted(set(posteriors) ^ set(names))
        raise AdapterError(f"saved posterior and adapter differ in modules: {', '.join(odd[:8])}")
    samplers = {name: LowRankSampler(posteriors[name]) for name in names}
    check_possible(config, base, task)
    return BayesianModel(
        peft_model,
        adapter,
        PeftAttachment(peft_model, adapter, samplers),
        samplers,
        task=task,
        config=config,
        labels=labels,
        label_tokens=label_tokens,
        source=source,
    )


def _check_head(config: Any) -> None:
    """Refuse a head whose outputs are no logits of one class among several."""
    kind, classes = getattr(config, "problem_type", None), getattr(config, "num_labels", 2)
    if classes < 2 or kind in ("regression", "multi_label_classification"):
        raise AdapterError(
            f"the head has {classes} outputs and problem_type {kind}; probabilities are averaged "
            "over two or more classes, one of which is right (single_label_classification)"
        )


def _check_layers(layers: Mapping[str, Any], adapter: str) -> None:
    """Refuse layers that cannot be sampled, all of them in one message."""
    problems = [p for name, layer in layers.items() if (p := _refusal(name, layer, adapter))]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise AdapterError(
            f"adapter {adapter!r} cannot be Bayesianized: {'; '.join(problems[:8])}{more}; exclude "
            "modules that should stay deterministic with layers="
        )
    seen: dict[int, str] = {}
    for name in layers:
        other = seen.setdefault(stable_layer_id(name), name)
        if other != name:
            raise AdapterError(
                f"modules {other!r} and {name!r} have the same 32-bit noise identity; exclude one "
                "with layers="
            )


def _check_adapter(model: nn.Module, adapter: str) -> str:
    if not isinstance(model, PeftModel):
        raise AdapterError(
            f"expected a peft.PeftModel, got {type(model).__name__}; load the adapter with "
            "PeftModel.from_pretrained or tfb.load_adapter; a module of your own has to hold "
            "tfb.BayesLoRALinear layers"
        )
    if adapter not in model.peft_config:
        raise AdapterError(f"no adapter {adapter!r}; the model has: {', '.join(model.peft_config)}")
    config = model.peft_config[adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise AdapterError(f"adapter {adapter!r} is {kind}; only LORA adapters have this posterior")
    task = str(getattr(config.task_type, "value", config.task_type))
    if task not in TASKS:
        raise AdapterError(
            f"adapter {adapter!r} has task_type {task}; supported: {', '.join(TASKS)} (set it in "
            "the adapter's LoraConfig)"
        )
    return task


def _adapted_modules(base: nn.Module, adapter: str) -> dict[str, Any]:
    """Return every module of ``base`` that carries weights of ``adapter``, by qualified name."""
    found = {}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and any(
            adapter in getattr(module, slot, {})
            for slot in ("lora_A", "lora_embedding_A", "lora_magnitude_vector")
        ):
            found[name] = module
    if not found:
        raise AdapterError(f"adapter {adapter!r} touches no module of this model")
    return found


def _refusal(name: str, module: Any, adapter: str) -> str | None:
    """Return why this module cannot be sampled, or None."""
    kind = type(module).__name__
    if kind not in SUPPORTED_LAYERS and not isinstance(module, MergingLinear):
        return (
            f"{name}: LoRA on {kind} is not supported (PEFT's {kind} does not offer the hook, or "
            "it is not a linear map of activations)"
        )
    if "experts" in name.split("."):
        return f"{name}: mixture-of-experts layers see routed rows, which sampling cannot follow"
    held = module.lora_variant.get(adapter)
    if isinstance(held, BayesVariant):
        return f"{name}: already Bayesianized; call remove() on the first BayesianModel"
    if held is not None:
        return f"{name}: LoRA variant {type(held).__name__} is not plain LoRA"
    if module.use_dora.get(adapter, False):
        return f"{name}: DoRA is not plain LoRA"
    if module.merged:
        return f"{name}: the adapter is merged into the base; call unmerge_adapter() first"
    return None


def _posterior(name: str, module: Any, adapter: str) -> LowRankPosterior:
    A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    if A.is_meta or B.is_meta:
        raise AdapterError(f"{name}: weights are on the meta device; load them first")
    return LowRankPosterior.from_lora(
        A, B, module.scaling[adapter], name=name, layer_id=stable_layer_id(name)
    )
