"""``BayesLoRALinear``: a linear layer whose low-rank update is drawn from its posterior.

Usable alone, with no PEFT and no transformers. The PEFT bridge (:mod:`tfb.convert`) applies the
same :class:`LowRankSampler` inside PEFT's own layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tfb.draws import Draws
from tfb.posterior import AdapterError, LowRankPosterior
from tfb_kernels import bayes_lora_linear, gaussian_noise

KEPT_STREAMS = 256  # of each layer, r x n float32 each


@dataclass(frozen=True, eq=False)
class Pool:
    """Noise that was generated: E [Q, r, n] float32 of one seed, and where each stream is in it.

    Replaced as a whole, so that a thread never pairs an index with another's noise.
    """

    seed: int
    index: Mapping[int, int]
    E: Tensor


class LowRankSampler:
    """Applies draws of one layer's posterior, keeping what does not change between batches.

    Holds copies of the factors on each device that asked for them, and on a CPU the noise of the
    streams in use, so that fixed draws generate their noise once and not once per batch.
    """

    def __init__(self, posterior: LowRankPosterior) -> None:
        self.posterior = posterior
        self.scale = 1.0
        self._factors: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
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
        """x [T, n] or [S, T, n], base likewise with m -> samples [S, T, m] in base's dtype.

        bias: [m], added to every draw. inplace: write into ``base`` (per-draw x).
        """
        A, B, inv_d = self.factors(x.device)
        t = draws.tensors(x.device)
        # A CPU generates fixed noise once; a GPU makes it again faster than it reads it back, and
        # a compiled graph that looked for it would be compiled again for other streams.
        pooled = draws.noise == "weight" and x.device.type == "cpu"
        pooled = pooled and not torch.compiler.is_compiling()
        return bayes_lora_linear(
            x,
            base,
            A,
            B,
            inv_d,
            t.sigmas,
            t.streams,
            stream_index=t.stream_index,
            draws_per_stream=t.draws_per_stream,
            seed=t.seed,
            layer_id=self.posterior.layer_id,
            scaling=self.posterior.scaling,
            noise=draws.noise,
            pool=self.pool(draws, x.device) if pooled else None,
            bias=bias,
            inplace=inplace,
        )

    def set_scale(self, scale: float) -> None:
        """This layer's noise is ``scale`` (>= 0) times the model's sigma from now on."""
        if scale != self.scale:
            self.scale = scale
            self._factors.clear()

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(A', B', scale/d) on ``device``."""
        found = self._factors.get(device)
        if found is None:
            p = self.posterior
            inv_d = p.inv_d * self.scale
            found = p.A.to(device), p.B.to(device), inv_d.to(device)
            # What a compiled graph puts out need not outlive its next run (CUDA graphs).
            if not torch.compiler.is_compiling():
                self._factors[device] = found
        return found

    def pool(self, draws: Draws, device: torch.device) -> Tensor:
        """E [Q, r, n] of these draws; each stream is generated on first use and kept.

        Streams of one seed gather up to ``KEPT_STREAMS``, so that draws that run in parts, batch
        after batch, generate nothing twice.
        """
        wanted, kept = draws.distinct_streams, self._pool
        empty = Pool(draws.seed, {}, torch.empty(0, device=device))
        if kept is None or (kept.seed, kept.E.device) != (draws.seed, device):
            kept = empty
        new = [q for q in wanted if q not in kept.index]
        if new:
            if len(kept.index) + len(new) > KEPT_STREAMS:
                kept, new = empty, list(wanted)  # start again with these draws alone
            E = gaussian_noise(
                draws.tensors(device).seed, self.posterior.layer_id,
                torch.tensor(new, dtype=torch.int64, device=device), *self.posterior.A.shape,
            )  # fmt: skip
            index = {**kept.index, **{q: len(kept.index) + i for i, q in enumerate(new)}}
            E = torch.cat([kept.E, E]) if kept.index else E
            self._pool = kept = Pool(draws.seed, index, E)
        first = kept.index[wanted[0]]
        if all(kept.index[q] == first + i for i, q in enumerate(wanted)):
            return kept.E[first : first + len(wanted)]  # a view: nothing is copied
        return kept.E[[kept.index[q] for q in wanted]]

    def release(self) -> None:
        """Forget device copies and noise; both come back on the next use."""
        self._factors.clear()
        self._pool = None


class BayesLoRALinear(nn.Module):
    """A frozen linear layer plus a Bayesian low-rank update.

    ``layer(x)`` is the deterministic adapter, ``layer(x, draws)`` S posterior samples.
    """

    def __init__(self, base: nn.Module, posterior: LowRankPosterior) -> None:
        """``base`` maps [..., n] to [..., m] (an nn.Linear, a quantized linear, Conv1D...)."""
        super().__init__()
        self.base = base
        self.sampler = LowRankSampler(posterior)

    @classmethod
    def from_weights(
        cls, base: nn.Module, A: Tensor, B: Tensor, scaling: float, layer_id: int = 0
    ) -> BayesLoRALinear:
        """From LoRA's A [r, n], B [m, r] and scaling (alpha / r).

        ``layer_id`` (unsigned 32 bits) names the layer's noise: give every layer of a model its
        own, for example :func:`tfb.draws.stable_layer_id` of its name.

        Raises:
            AdapterError: weights that do not fit each other or the base, NaN or Inf, B = 0.
        """
        posterior = LowRankPosterior.from_lora(A, B, scaling, layer_id=layer_id)
        for size, attribute in (
            (posterior.in_features, "in_features"),
            (posterior.out_features, "out_features"),
        ):
            expected = getattr(base, attribute, size)
            if expected != size:
                raise AdapterError(f"base.{attribute} is {expected}, but A and B imply {size}")
        return cls(base, posterior)

    @property
    def posterior(self) -> LowRankPosterior:
        return self.sampler.posterior

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Deterministic, or S samples.

        Args:
            x: without draws [..., n]; with draws [T, n], shared by all (the base layer then runs
                once), or [S, T, n], one input for each draw.
            draws: the posterior draws, or None for the mean.

        Returns:
            [..., m], or [S, T, m] with draws.

        Raises:
            ValueError: x has another number of dimensions, or S inputs do not match S draws.
        """
        base = self.base(x)
        if draws is not None:
            return self.sampler(x, base, draws)
        A, B, _ = self.sampler.factors(x.device)
        dtype = torch.promote_types(x.dtype, A.dtype)
        update = (x.to(dtype) @ A.to(dtype).mT) @ B.to(dtype).mT
        return (base + self.posterior.scaling * update).to(base.dtype)

    def extra_repr(self) -> str:
        p = self.posterior
        return f"rank={p.rank}, scaling={p.scaling:g}, layer_id={p.layer_id}"
