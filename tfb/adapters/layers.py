"""PEFT's LoRA layers while a model is sampling.

Every noisy layer holds a :class:`BayesVariant` in its variant slot
(``module.lora_variant[adapter]``). PEFT consults the slot in forward, merge and unmerge, so
disable_adapter, several adapters and merge_and_unload (which merges the mean) keep their meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tfb.linear import LowRankSampler, is_plain, plain_weight
from tfb.sampling.state import ForwardPass, SamplingState, sampling_state


class BayesVariant(LoraVariant):
    """A LoRA layer's update, drawn from its posterior while its model is sampling."""

    def __init__(self, owner: int, sampler: LowRankSampler) -> None:
        self.owner = owner
        self.sampler = sampler

    # PEFT declares these static; an instance serves as well and can hold the sampler.
    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Add the update to the base layer's ``result``: PEFT's own, or that of the draws."""
        x = module.lora_dropout[active_adapter](x)
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scaling = module.scaling[active_adapter]
        state = sampling_state(self.owner)
        if state is None or state.mean:
            return result + B(A(x)) * scaling  # PEFT's own arithmetic, to the bit
        bias = None if B.bias is None else B.bias * scaling
        return self._sample(x, result, state, bias)

    def merged(self, module: Any, adapter: str, x: Tensor) -> Tensor | None:
        """Compute the layer's output by merged weights, base product and update in one.

        Returns:
            None where there is nothing to sample, or where adding costs less.
        """
        state = sampling_state(self.owner)
        running = None if state is None else state.running
        if state is None or running is None or not _apart(running, x):
            return None
        if module.disable_adapters or module.merged or not _silent(module.lora_dropout[adapter]):
            return None
        (weight, bias), own = _dense(module), module.lora_B[adapter].bias
        rows = x.numel() // max(1, x.shape[-1] * running.draws)
        if weight is None or not self.sampler.merges(x, rows, state.draws, weight, bias, own):
            return None
        if own is not None:
            own = own * module.scaling[adapter]
            bias = (own if bias is None else bias + own).to(weight.dtype)
        y = self.sampler.merged(_by_draw(running, x), weight, bias, state.draws)
        return _as_given(running, y, x)

    def _sample(
        self, x: Tensor, result: Tensor, state: SamplingState, bias: Tensor | None
    ) -> Tensor:
        draws, running = state.draws, state.running
        S, n, m = len(draws), x.shape[-1], result.shape[-1]
        if running is None:
            raise RuntimeError(
                f"{self.sampler.posterior.name}: called outside the model's forward pass while "
                f"sampling {S} draws; call the model, or leave sampling()"
            )
        if running.folded or running.sharing:  # the common rows alone
            y = self.sampler(x.reshape(-1, n), result.reshape(-1, m), draws, bias=bias)
            return y.view(S * x.shape[0], *result.shape[1:])
        if not _apart(running, x):
            raise RuntimeError(
                f"{self.sampler.posterior.name}: got an input of shape {list(x.shape)} while "
                f"sampling {S} draws of {running.batch} rows; the model routes or reshapes rows. "
                "Exclude the layer with layers="
            )
        base = _by_draw(running, result)
        # PEFT made this tensor for us: unless autograd still needs it, it is ours to change.
        inplace = base.is_contiguous() and not result.requires_grad
        y = self.sampler(_by_draw(running, x), base, draws, bias=bias, inplace=inplace)
        return _as_given(running, y, x)

    def _delta(self, module: Any, active_adapter: str, like: Tensor) -> Tensor:
        delta: Tensor = module.get_delta_weight(active_adapter)
        return delta.to(like.dtype)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """Return the weight with the mean update in it."""
        return orig_weight + self._delta(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        """Put the mean update into the weight."""
        # As PEFT does: added in the delta's precision, rounded to the weight's once.
        orig_weight.data += module.get_delta_weight(active_adapter)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """Return the weight without the mean update."""
        return orig_weight - self._delta(module, active_adapter, orig_weight)


def _apart(running: ForwardPass, x: Tensor) -> bool:
    """Tell whether x holds an input of its own for each draw, in the order of a pass."""
    if running.folded or running.sharing:
        return False
    return running.tree or (x.dim() >= 2 and x.shape[0] % running.rows == 0)


def _by_draw(running: ForwardPass, x: Tensor) -> Tensor:
    """Return x as [S, T, n]; a tree's, [B, S * k, n], one draw after the other."""
    S, n = running.draws, x.shape[-1]
    if running.tree:
        x = x.reshape(running.batch, S, -1, n).transpose(0, 1)  # OPT flattens rows and tokens
    return x.reshape(S, -1, n)


def _as_given(running: ForwardPass, y: Tensor, x: Tensor) -> Tensor:
    """Return y [S, T, m] with rows and axes as those of the layer's input x."""
    m = y.shape[-1]
    if running.tree:
        y = y.view(running.draws, running.batch, -1, m).transpose(0, 1).reshape(*x.shape[:-1], m)
        return y.contiguous()  # as a linear layer's output is: some models view it
    return y.view(*x.shape[:-1], m)


def _dense(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return W [m, n] and bias [m] of a LoRA layer's base; W is None if it is no plain matrix."""
    base = module.base_layer  # what PEFT calls: another tuner's layer is none of these
    weight, bias = plain_weight(base, nn.Linear, Conv1D)
    if weight is not None and isinstance(base, Conv1D):
        weight = weight.mT
    return weight, bias


def _silent(dropout: nn.Module) -> bool:
    """Tell whether a layer's dropout changes nothing now."""
    idle = isinstance(dropout, nn.Identity) or not dropout.training
    return idle and is_plain(dropout, nn.Identity, nn.Dropout)


def _same(now: list[Tensor], seen: list[Tensor]) -> bool:
    """Tell whether tensors have the same values; each device is waited for once."""
    equal: dict[torch.device, list[Tensor]] = {}
    if len(now) != len(seen):
        return False
    for a, b in zip(now, seen, strict=True):
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        equal.setdefault(a.device, []).append((a == b).all())
    return all(bool(torch.stack(found).all()) for found in equal.values())


class MergingLinear(LoraLinear):
    """PEFT's LoRA layer, which takes merged weights where these cost less.

    A class, and no ``forward`` of an instance: copies of a module (``nn.DataParallel``) call their
    own.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Multiply by merged weights where that costs less, else do as PEFT does."""
        active = [a for a in self.active_adapters if a in self.lora_A]
        if not args and not kwargs and len(active) == 1:
            variant = self.lora_variant.get(active[0])
            if isinstance(variant, BayesVariant):
                y = variant.merged(self, active[0], x)
                if y is not None:
                    return y
        # Not super(): a hook may hold this method when ``detach`` has taken the class back.
        found: Tensor = LoraLinear.forward(self, x, *args, **kwargs)
        return found


class PeftAttachment:
    """The posterior in the variant slots of one adapter's LoRA layers."""

    def __init__(
        self, model: PeftModel, adapter: str, samplers: Mapping[str, LowRankSampler]
    ) -> None:
        self.model, self.adapter, self.samplers = model, adapter, samplers
        self._base = model.get_base_model()
        # LoRA's weights as last compared with the factors; each layer's dtype then, and what casts
        # explain of their distance.
        self._seen: list[Tensor] = []
        self._agreed: dict[str, tuple[torch.dtype, float]] = {}
        for name, sampler in samplers.items():
            layer: Any = self._base.get_submodule(name)
            dtype = layer.lora_A[adapter].weight.dtype
            self._agreed[name] = dtype, sampler.posterior.rounding(torch.float32)
            layer.lora_variant[adapter] = BayesVariant(self.owner, sampler)
            if type(layer) is LoraLinear:  # others add
                layer.__class__ = MergingLinear

    @property
    def owner(self) -> int:
        """The key of the model's sampling state."""
        return id(self)

    def check(self) -> dict[str, Any]:
        """Return the noisy layers by name, which carry the posterior of their weights, unmerged.

        Raises:
            ValueError: one does not.
        """
        found = {}
        for name in self.samplers:
            layer: Any = self._base.get_submodule(name)
            variant = getattr(layer, "lora_variant", {}).get(self.adapter)
            if getattr(variant, "owner", None) != self.owner:
                raise ValueError(
                    f"{name}: does not carry this posterior any more (remove(), "
                    "merge_and_unload(), delete_adapter(), or a copy of the model): bayesianize "
                    "the model that is to be sampled"
                )
            if getattr(layer, "merged", False):
                raise ValueError(
                    f"{name}: the adapter is merged into the base weight; call "
                    "bayes.model.unmerge_adapter() first"
                )
            found[name] = layer
        self._check_weights(found)
        return found

    def _check_weights(self, layers: Mapping[str, Any]) -> None:
        """Refuse factors that are not those of the weights now; a cast of these may round them."""
        weights = {
            name: [part[self.adapter].weight.detach() for part in (layer.lora_A, layer.lora_B)]
            for name, layer in layers.items()
        }
        now = [weight for pair in weights.values() for weight in pair]
        # Values, not version counters: ``.data`` and some optimizers write past these.
        if not _same(now, self._seen):
            self._agreed = {name: self._compared(name, *pair) for name, pair in weights.items()}
            self._seen = [weight.clone() for weight in now]

    def _compared(self, name: str, A: Tensor, B: Tensor) -> tuple[torch.dtype, float]:
        """Compare weights with the factors; return their dtype, and what casts explain."""
        if A.is_meta or B.is_meta:
            raise ValueError(f"{name}: weights are on the meta device (offloaded); load them first")
        p, (dtype, allowed) = self.samplers[name].posterior, self._agreed[name]
        if A.dtype != dtype:  # nothing else may add to it: small changes would go on for ever
            allowed += p.rounding(A.dtype)
        if not (distance := p.distance(A, B)) <= allowed:
            raise ValueError(
                f"{name}: LoRA's weights have changed since the model was Bayesianized, or were "
                f"cast and cast back (their product by {distance:.3g}, rounding explains "
                f"{allowed:.3g}), and the posterior is that of the old ones; train or cast first, "
                "then call bayes.remove() and tfb.bayesianize (or tfb.from_peft) again"
            )
        return A.dtype, allowed

    def check_saving(self, *, exact: bool) -> None:
        """Refuse a model that an adapter's files and the factors do not tell whole.

        Args:
            exact: the files get the model's weights; those that a cast has rounded are refused.

        Raises:
            ValueError: it does not carry the posterior, another adapter acts too, or such a cast.
        """
        for name, layer in self.check().items():
            if others := [a for a in layer.active_adapters if a != self.adapter]:
                raise ValueError(
                    f"{name}: the adapter {others[0]!r} is active too, and would not be saved; "
                    f"call bayes.model.set_adapter({self.adapter!r}) first"
                )
            p, (A, B) = self.samplers[name].posterior, (layer.lora_A, layer.lora_B)
            A, B = A[self.adapter].weight, B[self.adapter].weight
            if exact and not p.distance(A, B) <= p.rounding(torch.float32):
                raise ValueError(
                    f"{name}: LoRA's weights were cast to {A.dtype} after the model was "
                    "Bayesianized, and its factors were not; save before, or call bayes.remove() "
                    "and tfb.bayesianize (or tfb.from_peft) again"
                )

    def check_sampling(self) -> dict[str, Tensor]:
        """Refuse a model of which draws cannot be sampled now.

        Returns:
            The weight of lora_A of each noisy layer, by name.

        Raises:
            ValueError: the adapter is not active, disabled, merged, rescaled, gone, or has been
                trained since.
        """
        active = getattr(self.model, "active_adapters", [self.adapter])
        active = active() if callable(active) else active
        if self.adapter not in active:
            raise ValueError(
                f"adapter {self.adapter!r} is not active (active: {', '.join(active)}); call "
                f"bayes.model.set_adapter({self.adapter!r}) first"
            )
        weights = {}
        for name, layer in self.check().items():
            if layer.disable_adapters:
                raise ValueError("the adapter is disabled (disable_adapter): nothing to sample")
            if self.adapter not in layer.active_adapters:
                raise ValueError(
                    f"{name}: adapter {self.adapter!r} is not active in this layer; call "
                    f"bayes.model.set_adapter({self.adapter!r}) first"
                )
            now, sampled = layer.scaling[self.adapter], self.samplers[name].posterior.scaling
            if now != sampled:
                raise ValueError(
                    f"{name}: LoRA's scaling is {now:g}, and {sampled:g} in the posterior; set "
                    "it back (rescale_adapter_scale), or call remove() and bayesianize again"
                )
            weights[name] = layer.lora_A[self.adapter].weight
        return weights

    def unmergeable(self) -> list[str]:
        """Return the noisy layers that cannot merge: a foreign forward, or no plain weight."""
        layers: dict[str, Any] = {name: self._base.get_submodule(name) for name in self.samplers}
        return [
            name
            for name, layer in layers.items()
            if type(layer) is not MergingLinear
            or "forward" in vars(layer)
            or _dense(layer)[0] is None
        ]

    def detach(self) -> None:
        """Take the posterior out of the layers again."""
        for name in self.samplers:
            layer: Any = self._base.get_submodule(name)
            variants = getattr(layer, "lora_variant", {})  # an unloaded model has plain layers
            variant = variants.get(self.adapter)
            if isinstance(variant, BayesVariant) and variant.owner == self.owner:
                del variants[self.adapter]
            ours = isinstance(layer, MergingLinear)
            if ours and not any(isinstance(v, BayesVariant) for v in variants.values()):
                layer.__class__ = LoraLinear
