"""The low-rank Gaussian posterior of one adapted layer (docs/mathematics.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tfb.draws import Draws
from tfb_kernels import gaussian_noise


class AdapterError(ValueError):
    """An adapter that cannot be Bayesianized; the message names the module and the remedy."""


@dataclass(frozen=True, eq=False, repr=False)
class LowRankPosterior:
    """Frozen SVD factors of one layer; saved with an artifact, since SVD signs are not portable.

    Attributes:
        name: the module's qualified name in the base model, e.g. "model.layers.0.mlp.up_proj".
        layer_id: the 32-bit noise identity of the layer (:func:`tfb.draws.stable_layer_id`).
        A: A' [r, n], float32, or float64 for a float64 adapter.
        B: B' [m, r], likewise.
        d: [r] float64, singular values of B, descending; 0 where B is rank-deficient.
        scaling: LoRA's scaling s (alpha / r, or alpha / sqrt(r) for rsLoRA).
    """

    name: str
    layer_id: int
    A: Tensor
    B: Tensor
    d: Tensor
    scaling: float

    def __repr__(self) -> str:
        m, n = self.out_features, self.in_features
        return f"LowRankPosterior({self.name!r}, {n} -> {m}, rank {self.rank})"

    @classmethod
    def from_lora(
        cls, A: Tensor, B: Tensor, scaling: float, *, name: str = "", layer_id: int = 0
    ) -> LowRankPosterior:
        """Reparameterize LoRA's factors; the SVD is done in float64 on the CPU.

        Signs are canonical: the entry of largest magnitude in each column of U is positive.

        Args:
            A: [r, n].
            B: [m, r].
            scaling: LoRA's scaling.
            name: for messages and artifacts.
            layer_id: the layer's noise identity, unsigned 32 bits.

        Raises:
            AdapterError: shapes that do not chain, NaN or Inf weights, or B = 0 (untrained).
        """
        where = f"adapter of {name!r}" if name else "adapter"
        if A.dim() != 2 or B.dim() != 2 or B.shape[1] != A.shape[0] or 0 in (*A.shape, *B.shape):
            raise AdapterError(
                f"{where}: expected A [r, n] and B [m, r], got {list(A.shape)} and {list(B.shape)}"
            )
        dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
        A64, B64 = (t.detach().to("cpu", torch.float64) for t in (A, B))
        for label, t in (("A", A64), ("B", B64)):
            if not bool(t.isfinite().all()):
                raise AdapterError(
                    f"{where}: lora_{label} holds NaN or Inf; the checkpoint is damaged or its "
                    "training diverged, use another one"
                )
        m, r = B64.shape
        # For m < r the full V completes a basis of R^r, so that A' keeps LoRA's shape.
        U, d, Vh = torch.linalg.svd(B64, full_matrices=m < r)
        if float(d[0]) == 0.0:
            raise AdapterError(
                f"{where}: lora_B is zero, so the adapter does nothing and has no posterior; it "
                "was never trained, or its weights were not loaded (check the checkpoint's keys)"
            )
        sign = torch.sign(U.gather(0, U.abs().argmax(0, keepdim=True)))
        Vh[: d.numel()] *= sign.mT
        d = torch.cat([d, d.new_zeros(r - d.numel())])
        d = torch.where(d <= _rank_tolerance(B64, B.dtype, float(d[0])), torch.zeros_like(d), d)
        return cls(
            name=name,
            layer_id=layer_id,
            A=(Vh @ A64).to(dtype),
            B=(B64 @ Vh.mT).to(dtype),  # = U diag(d), also where d was set to zero
            d=d,
            scaling=float(scaling),
        )

    @property
    def rank(self) -> int:
        """r, LoRA's rank."""
        return self.A.shape[0]

    @property
    def effective_rank(self) -> int:
        """Directions that carry noise: the number of d_i > 0."""
        return int((self.d > 0).sum())

    @property
    def in_features(self) -> int:
        """n, the layer's inputs."""
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        """m, the layer's outputs."""
        return self.B.shape[0]

    @property
    def inv_d(self) -> Tensor:
        """[r] float64: 1 / d_i, and 0 where d_i is 0."""
        return torch.where(self.d > 0, 1.0 / self.d, torch.zeros_like(self.d))

    def distance(self, A: Tensor, B: Tensor) -> float:
        """Compute ||B A - B' A'||_F for LoRA's weights A [k, n] and B [m, k]; NaN if one is."""
        A, B, A0, B0 = (t.detach().to("cpu", torch.float64) for t in (A, B, self.A, self.B))
        return product_norm(torch.cat([B, -B0], 1), torch.cat([A, A0]))

    def rounding(self, dtype: torch.dtype) -> float:
        """Return a bound for what weights in ``dtype`` may add to :meth:`distance`.

        An entry is off by eps / 2 of itself, or of the least normal number. By Cauchy and Schwarz
        the product is off by eps ||B|| ||A||. It is doubled for the factors' own float32.
        """
        info = torch.finfo(dtype)
        least = info.smallest_normal
        a, b = (float(t.double().norm()) + least * t.numel() ** 0.5 for t in (self.A, self.B))
        return 2 * max(info.eps, torch.finfo(torch.float32).eps) * a * b

    def mean(self) -> Tensor:
        """Compute E[dW] = s B' A' [m, n] float64."""
        return self.scaling * (self.B.double() @ self.A.double())

    def column_covariance(self, sigma: float) -> Tensor:
        """Compute s^2 sigma^2 U U^T [m, m] float64, the covariance of a column of dW."""
        U = self.B.double() * self.inv_d
        return (self.scaling * sigma) ** 2 * (U @ U.mT)

    def sample(self, sigma: float, stream: int, seed: int = 0) -> Tensor:
        """Compute one dW [m, n] float64: exactly the draw (sigma, stream) of weight noise."""
        return self.scaling * (self.B.double() @ self.sample_A(sigma, stream, seed))

    def sample_A(self, sigma: float, stream: int, seed: int = 0) -> Tensor:
        """Compute A' + (sigma / d) o E [r, n] float64; with B' it is the same draw as a LoRA."""
        draws = Draws((sigma,), (stream,), seed=seed)
        E = gaussian_noise(draws.seed, self.layer_id, draws.streams, *self.A.shape)[0].double()
        return self.A.double() + sigma * self.inv_d[:, None] * E

    def mean_square(self) -> float:
        """Sum (d_i A'_ij)^2 over noisy rows; in units of sigma squared."""
        return float(((self.d[:, None] * self.A.double()) ** 2).sum())

    def kl(self, sigma: float, prior_sigma: float) -> float:
        """Compute KL(q || p) in nats, for the prior p: A'_ij ~ N(0, (prior_sigma / d_i)^2).

        Raises:
            ValueError: sigma or prior_sigma not positive.
        """
        if not (sigma > 0 and prior_sigma > 0):
            raise ValueError(f"KL needs sigma > 0 and prior_sigma > 0, got {sigma}, {prior_sigma}")
        ratio = sigma / prior_sigma
        each = ratio * ratio / 2 - 0.5 - math.log(ratio)
        entries = self.effective_rank * self.in_features
        return entries * each + self.mean_square() / (2 * prior_sigma**2)


def product_norm(left: Tensor, right: Tensor) -> float:
    """Compute ||left right||_F of float64 [m, k] and [k, n] from products [k, k] alone."""
    square = float(((left.mT @ left) * (right @ right.mT)).sum())
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.nan


def _rank_tolerance(B: Tensor, stored: torch.dtype, d_max: float) -> float:
    """Return the bound below which singular values of B [m, r] are rounding, not signal."""
    m, r = B.shape
    svd = max(m, r) * torch.finfo(torch.float64).eps * d_max
    # Storage perturbs entries independently by about eps |b_ij|. The common rule,
    # max(m, r) eps d_max, would silence a whole bfloat16 adapter of width 4096.
    rms = float(B.norm()) / (m * r) ** 0.5
    return max(svd, torch.finfo(stored).eps * rms * (m**0.5 + r**0.5))


def default_prior_sigma(posteriors: list[LowRankPosterior]) -> float:
    """Return the prior_sigma of least summed KL as sigma goes to 0 (empirical Bayes)."""
    entries = sum(p.effective_rank * p.in_features for p in posteriors)
    return math.sqrt(sum(p.mean_square() for p in posteriors) / entries)
