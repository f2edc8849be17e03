"""``BayesLoRALinear``, and the sampler that PEFT's layers share; needs no PEFT or transformers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module

from tfb.draws import Draws
from tfb.posterior import AdapterError, LowRankPosterior
from tfb_kernels import gaussian_noise
from tfb_kernels.ops import add_samples, like_weights, merge_samples, prepared_for
from tfb_kernels.samples import Samples
from tfb_kernels.tuning import merge_min_rows

KEPT_STREAMS = 256  # of each layer, r x n float32 each
# Merged weights at a time, bytes: as many draws as stay in a CPU's cache; on a GPU enough that
# launches do not count, and still small beside the model.
MERGED_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20}
MERGING = ("auto", "always", "never")
# What a BayesLoRALinear adds to its state_dict, and the dtypes in which that means something.
STATE: Mapping[str, tuple[torch.dtype, ...]] = {
    "A": (torch.float32, torch.float64),
    "B": (torch.float32, torch.float64),
    "d": (torch.float64,),
    "scaling": (torch.float64,),
    "layer_id": (torch.int64,),
}
_ids = itertools.count(1 << 31)  # far from the small numbers that people choose


class Pool(NamedTuple):
    """Noise E [Q, r, n] of one seed; replaced as a whole, so that a thread never mixes two."""

    seed: int
    places: Mapping[int, int]  # of streams in E
    E: Tensor


class Factors(NamedTuple):
    """A layer's factors A' [r, n], B' [m, r] and 1 / d [r] on a device, and what takes them."""

    A: Tensor
    B: Tensor
    inv_d: Tensor
    impl: str
    merge_rows: float  # of a draw, from which merging costs less than adding


class LowRankSampler:
    """Applies draws of one layer's posterior, keeping what does not change between batches."""

    def __init__(self, posterior: LowRankPosterior) -> None:
        self.posterior = posterior
        self.merging = "auto"
        self._factors: dict[tuple[torch.device, torch.dtype], Factors] = {}
        self._pool: Pool | None = None

    def __call__(
        self,
        x: Tensor,
        base: Tensor,
        draws: Draws,
        *,
        bias: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """Add sampled updates to the base layer's output: [S, T, m] in base's dtype.

        x is [T, n], shared by all draws, or [S, T, n]; base [T, m] or [S, T, m], which ``inplace``
        overwrites; bias [m] is added to every draw.
        """
        samples, pool, impl = self._samples(x, draws)
        impl = impl if draws.noise == "weight" else "reference"  # there is no kernel for tokens
        return add_samples(x, base, samples, draws.noise, pool, bias, impl, inplace)

    def merges(
        self, x: Tensor, rows: int, draws: Draws, weight: Tensor, *biases: Tensor | None
    ) -> bool:
        """Tell whether to multiply by merged weights; each draw has ``rows`` of its own in x."""
        if self.merging == "never" or draws.noise != "weight" or x.dtype != weight.dtype:
            return False
        if self.merging == "auto" and rows < self.factors(x.device, x.dtype).merge_rows:
            return False
        if torch.is_autocast_enabled(x.device.type):
            return False  # it would round W_s again
        # Gradients pass through the base layer alone.
        return not torch.is_grad_enabled() or not any(
            t is not None and t.requires_grad for t in (x, weight, *biases)
        )

    def merged(self, x: Tensor, weight: Tensor, bias: Tensor | None, draws: Draws) -> Tensor:
        """Compute x_s W_s^T + bias [S, T, m] from x [S, T, n], with draw s merged into W_s."""
        samples, pool, impl = self._samples(x, draws)
        S, m, run = len(draws), len(weight), samples.run
        limit = MERGED_BYTES.get(x.device.type, MERGED_BYTES["cuda"])
        fit = max(1, limit // (weight.numel() * weight.itemsize))
        # Whole streams, or equal parts of one.
        step = fit // run * run or next(k for k in range(fit, 0, -1) if run % k == 0)
        parts = [slice(start, min(start + step, S)) for start in range(0, S, step)]
        multiply: Any = torch.bmm if bias is None else partial(torch.baddbmm, bias)
        if torch.compiler.is_compiling() or _transformed(x):  # no memory of ours to write into
            merged = (merge_samples(weight, *_part(samples, pool, p), impl, None) for p in parts)
            return torch.cat([multiply(x[p], W.mT) for p, W in zip(parts, merged, strict=True)])
        scratch, y = _scratch(weight, min(step, S)), x.new_empty((S, x.shape[1], m))
        for p in parts:
            room = scratch[: p.stop - p.start]
            W = merge_samples(weight, *_part(samples, pool, p), impl, room)
            multiply(x[p], W.mT, out=y[p])
        return y

    def _samples(self, x: Tensor, draws: Draws) -> tuple[Samples, Tensor | None, str]:
        """Return what the operators are told, kept noise if there is any, the implementation."""
        device = x.device
        A, B, inv_d, impl, _ = self.factors(device, x.dtype)
        p = self.posterior
        samples = Samples(A, B, inv_d, *draws.tensors(device), p.layer_id, p.scaling)
        # A CPU generates fixed noise once. A GPU makes it again faster than it reads it back, and a
        # compiled graph that looked for it would be compiled again for other streams.
        kept = draws.noise == "weight" and device.type == "cpu"
        pool = self.pool(draws, device) if kept and not torch.compiler.is_compiling() else None
        return samples, pool, impl

    def factors(self, device: torch.device, dtype: torch.dtype) -> Factors:
        """Return the factors as the operators take them fastest where x has ``dtype``."""
        key = device, dtype
        found = self._factors.get(key)
        if found is None:
            p, (impl, inner) = self.posterior, prepared_for(device, dtype)
            found = Factors(
                p.A.to(device, inner).contiguous(),
                p.B.to(device, inner).contiguous(),
                p.inv_d.to(device),
                impl,
                merge_min_rows(p.out_features, p.in_features, device),
            )
            # What a compiled graph puts out need not outlive its next run (CUDA graphs).
            if not torch.compiler.is_compiling():
                self._factors[key] = found
        return found

    def pool(self, draws: Draws, device: torch.device) -> Tensor:
        """Return E [Q, r, n] of these draws; each stream is generated on first use and kept."""
        wanted, kept = draws.distinct_streams, self._pool
        empty = Pool(draws.seed, {}, torch.empty(0, device=device))
        if kept is None or (kept.seed, kept.E.device) != (draws.seed, device):
            kept = empty
        new = [q for q in wanted if q not in kept.places]
        if new:
            if len(kept.places) + len(new) > KEPT_STREAMS:
                kept, new = empty, list(wanted)  # start again with these draws alone
            seed, streams = draws.tensors(device).seed, torch.tensor(new, device=device)
            E = gaussian_noise(seed, self.posterior.layer_id, streams, *self.posterior.A.shape)
            places = {q: i for i, q in enumerate([*kept.places, *new])}
            E = torch.cat([kept.E, E]) if kept.places else E
            self._pool = kept = Pool(draws.seed, places, E)
        found = [kept.places[q] for q in wanted]
        first, end = found[0], found[0] + len(found)
        if found == list(range(first, end)):
            return kept.E[first:end]  # a view: nothing is copied
        return kept.E[found]

    def release(self) -> None:
        """Forget device copies, noise and this thread's scratch; all come back on the next use."""
        self._factors.clear()
        self._pool = None
        _threads.scratch = None


def _part(samples: Samples, pool: Tensor | None, part: slice) -> tuple[Samples, Tensor | None]:
    """Return whole streams, or a part of one (or any draws, where ``run`` is 1)."""
    run, sigmas = samples.run, samples.sigmas[part]
    if run == 1:
        return samples._replace(sigmas=sigmas, stream_index=samples.stream_index[part]), pool
    of = slice(part.start // run, -(-part.stop // run))
    found = samples._replace(
        sigmas=sigmas,
        streams=samples.streams[of],
        stream_index=samples.stream_index[: part.stop - part.start],
        run=min(run, part.stop - part.start),
    )
    return found, None if pool is None else pool[of]


def _transformed(x: Tensor) -> bool:
    """Tell whether x is inside a ``torch.func`` transform, or has a tangent."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return wrapped or forward_ad.unpack_dual(x).tangent is not None


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Tell whether a module is one of ``kinds`` itself, and calling it runs nobody's hook."""
    held: Any = module
    hooks = held._forward_hooks or held._forward_pre_hooks
    hooks = hooks or every_module._global_forward_hooks or every_module._global_forward_pre_hooks
    return type(module) in kinds and not hooks and "forward" not in vars(module)


def plain_weight(base: nn.Module, *kinds: type[nn.Module]) -> tuple[Tensor | None, Tensor | None]:
    """Return (weight, bias) of a layer that ``is_plain``; Nones if it, or a tensor, is not."""
    held: Any = base
    if not is_plain(base, *kinds) or type(held.weight) is not nn.Parameter:
        return None, None
    return held.weight, held.bias


_threads = threading.local()


def _scratch(weight: Tensor, draws: int) -> Tensor:
    """Return room for [draws, m, n], laid out as ``weight``."""
    if weight.device.type != "cpu":
        return like_weights(weight, draws)
    nbytes, kept = draws * weight.numel() * weight.itemsize, getattr(_threads, "scratch", None)
    # All layers of a thread share it: fresh pages cost as much as writing to them.
    if kept is None or len(kept) < nbytes:
        with torch.inference_mode(False):  # or it could be written in that mode alone
            kept = _threads.scratch = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    return like_weights(weight, draws, kept[:nbytes].view(weight.dtype))


class BayesLoRALinear(nn.Module):
    """A frozen linear layer (quantized, Conv1D, ...) plus a Bayesian low-rank update.

    ``layer(x)`` is the deterministic adapter, ``layer(x, draws)`` S posterior samples.

    The ``state_dict`` holds the posterior beside the base: A', B', d, scaling and layer_id, as
    tensors on the CPU. Casting or moving the module leaves them as they are. A deep copy has the
    noise of the original until :func:`tfb.bayesianize` names both.

    Attributes:
        base: the layer that is adapted.
        sampler: what applies the draws.
        active_draws: the draws of a call without any, from the layer's name and its input; None
            outside a :class:`tfb.BayesianModule`, which sets it.
    """

    def __init__(self, base: nn.Module, posterior: LowRankPosterior) -> None:
        super().__init__()
        self.base = base
        self.sampler = LowRankSampler(posterior)
        self.active_draws: Callable[[str, Tensor], Draws | None] | None = None

    @classmethod
    def from_weights(
        cls, base: nn.Module, A: Tensor, B: Tensor, scaling: float, layer_id: int | None = None
    ) -> BayesLoRALinear:
        """Make the layer from LoRA's weights.

        Args:
            base: the layer that LoRA adapts.
            A: [r, n].
            B: [m, r].
            scaling: LoRA's scaling (alpha / r).
            layer_id: names the layer's noise, unsigned 32 bits; for example
                :func:`tfb.draws.stable_layer_id` of its name. None: the next number of this
                process, so that no two layers share their noise.

        Raises:
            AdapterError: weights that do not fit each other or the base, NaN or Inf, B = 0.
        """
        layer_id = next(_ids) if layer_id is None else layer_id
        posterior = LowRankPosterior.from_lora(A, B, scaling, layer_id=layer_id)
        for attribute in ("in_features", "out_features"):
            size = getattr(posterior, attribute)
            expected = getattr(base, attribute, size)
            if expected != size:
                raise AdapterError(f"base.{attribute} is {expected}, but A and B imply {size}")
        return cls(base, posterior)

    @property
    def posterior(self) -> LowRankPosterior:
        """The posterior of the layer's update."""
        return self.sampler.posterior

    @posterior.setter
    def posterior(self, posterior: LowRankPosterior) -> None:
        self.sampler.posterior = posterior
        self.sampler.release()

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Compute the deterministic output [..., m], or S samples [S, T, m].

        Args:
            x: without draws [..., n]. With draws [T, n], shared by all (the base layer then runs
                once), or [S, T, n], one input for each draw.
            draws: the posterior draws. None: the mean; or, while a :class:`tfb.BayesianModule`
                around the layer is sampling, its draws, with x and the output [S * B, ...].
        """
        if draws is None and self.active_draws is not None:
            active = self.active_draws(self.posterior.name, x)
            if active is not None:
                each = x.reshape(len(active), -1, x.shape[-1])
                return self.forward(each, active).reshape(*x.shape[:-1], -1)
        if draws is not None:
            if x.dim() not in (2, 3) or (x.dim() == 3 and len(x) != len(draws)):
                S, n, found = len(draws), self.posterior.in_features, list(x.shape)
                raise ValueError(
                    f"x: expected [T, {n}] or [{S}, T, {n}], one input for each draw, got {found}"
                )
            weight, bias = plain_weight(self.base, nn.Linear) if x.dim() == 3 else (None, None)
            if weight is not None and self.sampler.merges(x, x.shape[1], draws, weight, bias):
                return self.sampler.merged(x, weight, bias, draws)
            return self.sampler(x, self.base(x), draws)
        base = self.base(x)
        dtype = torch.promote_types(x.dtype, self.posterior.A.dtype)
        A, B, *_ = self.sampler.factors(x.device, dtype)
        update = (x.to(dtype) @ A.to(dtype).mT) @ B.to(dtype).mT
        return (base + self.posterior.scaling * update).to(base.dtype)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the posterior as what ``STATE`` names."""
        p = self.posterior
        scaling = torch.tensor(p.scaling, dtype=torch.float64, device="cpu")
        layer_id = torch.tensor(p.layer_id, dtype=torch.int64, device="cpu")
        return {"A": p.A, "B": p.B, "d": p.d, "scaling": scaling, "layer_id": layer_id}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # No buffers: these would be cast with the module.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: t for name, t in self._tensors().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {k: state_dict.pop(k) for k in [prefix + n for n in STATE] if k in state_dict}
        lists = strict, missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *lists)
        held, before = nn.Module(), len(error_msgs)  # torch's own rules and words, kept dtypes
        for name, tensor in self._tensors().items():
            held.register_buffer(name, tensor.clone())
        assign = {"assign_to_params_buffers": True}
        held._load_from_state_dict(given, prefix, assign, *lists)
        if len(given) < len(STATE) or len(error_msgs) > before:
            return
        found = {n: t.detach().to("cpu") for n, t in held.named_buffers()}
        if problems := [f"{prefix}{n}: {p}" for n, t in found.items() if (p := _damage(n, t))]:
            error_msgs.extend(problems)
            return
        if not local_metadata.get("assign_to_params_buffers", False):
            found = {n: t.clone() for n, t in found.items()}
        named = self.active_draws is not None  # by a BayesianModule, wherever the tensors are from
        self.posterior = replace(
            self.posterior,
            A=found["A"],
            B=found["B"],
            d=found["d"],
            scaling=float(found["scaling"]),
            layer_id=self.posterior.layer_id if named else int(found["layer_id"]),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: it belongs to no BayesianModule."""
        return {**self.__dict__, "active_draws": None}

    def extra_repr(self) -> str:
        """Say rank, scaling and noise identity."""
        p = self.posterior
        return f"rank={p.rank}, scaling={p.scaling:g}, layer_id={p.layer_id}"


def _damage(name: str, tensor: Tensor) -> str | None:
    """Return why a tensor of a state_dict cannot be part of a posterior, or None."""
    if tensor.dtype not in STATE[name]:
        expected = " or ".join(map(str, STATE[name]))
        return f"expected {expected}, got {tensor.dtype}; a rounded posterior is another one"
    if not bool(tensor.isfinite().all()):
        return "holds NaN or Inf; the file is damaged, use another one"
    if name == "layer_id" and not 0 <= int(tensor) < 1 << 32:
        return f"{int(tensor)} is not an unsigned 32-bit number"
    return None
