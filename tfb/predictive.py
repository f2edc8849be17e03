"""The posterior predictive: probabilities averaged over draws, and what the draws disagree on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tfb.draws import Draws
from tfb_kernels import predictive_reduction
from tfb_kernels.reference import compute_dtype, unit_standard_error


@dataclass(frozen=True, eq=False, repr=False)
class Predictive:
    """Predictions for B rows over K classes from S draws. Entropies are in nats.

    Where the model returned NaN, or its logits overflowed, a row's probabilities are NaN.

    Attributes:
        probs: [B, K], the mean over draws, float32 (float64 for float64 logits).
        total: [B], entropy of ``probs``.
        aleatoric: [B], mean over draws of each draw's entropy.
        agreement: [B], share of draws whose own argmax is the mean's argmax.
        standard_error: [B, K], Monte-Carlo error of ``probs``; NaN with a single stream (unknown).
        draws: the draws behind it; with ``draw_counts``, of the rows that had the most.
        draw_probs: [S, B, K] if it was asked for, else None.
        draw_counts: [B] int64, each row's number of draws where they differ, else None.
    """

    probs: Tensor
    total: Tensor
    aleatoric: Tensor
    agreement: Tensor
    standard_error: Tensor
    draws: Draws
    draw_probs: Tensor | None = None
    draw_counts: Tensor | None = None

    @classmethod
    def from_logits(
        cls, logits: Tensor, draws: Draws, *, keep_draws: bool = False, temperature: float = 1.0
    ) -> Predictive:
        """Average the softmax of each draw's logits over T, in float32 at least.

        Args:
            logits: [S, B, K].
            draws: the S draws, in the order of ``logits``.
            keep_draws: keep every draw's probabilities.
            temperature: T.
        """
        if logits.dim() != 3 or logits.shape[0] != len(draws):
            raise ValueError(f"logits: expected [S={len(draws)}, B, K], got {list(logits.shape)}")
        if temperature != 1.0:
            logits = tempered(logits, temperature)
        units = draws.unit_tensor(logits.device)
        if keep_draws or units is None:
            p = logits.to(compute_dtype(logits.dtype)).softmax(-1)
            return cls.from_probs(p, draws, keep_draws=keep_draws)
        probs, total, aleatoric, choices, error = predictive_reduction(logits, units)
        return cls(
            probs=probs,
            total=total,
            aleatoric=aleatoric,
            agreement=_agreement(choices, probs),
            standard_error=_exact_or(error, draws),
            draws=draws,
        )

    @classmethod
    def from_probs(cls, p: Tensor, draws: Draws, *, keep_draws: bool = False) -> Predictive:
        """Average each draw's probabilities.

        Args:
            p: [S, B, K].
            draws: the S draws, in the order of ``p``.
            keep_draws: keep ``p``.
        """
        if p.dim() != 3 or p.shape[0] != len(draws):
            raise ValueError(f"p: expected [S={len(draws)}, B, K], got {list(p.shape)}")
        probs = p.mean(0)
        units = draws.unit_tensor(p.device)
        if units is None:  # streams of unequal weight: no simple unbiased estimate
            error = torch.full_like(probs, float("nan"))
        else:
            error = unit_standard_error(p, units)
        return cls(
            probs=probs,
            total=torch.special.entr(probs).sum(-1),
            aleatoric=torch.special.entr(p).sum(-1).mean(0),
            agreement=_agreement(p.argmax(-1), probs),
            standard_error=_exact_or(error, draws),
            draws=draws,
            draw_probs=p if keep_draws else None,
        )

    def rows(self, which: Tensor) -> Predictive:
        """Return some of the rows (an index or mask [B])."""
        return replace(
            self,
            **{name: getattr(self, name)[which] for name in _ROW_FIELDS},
            draw_probs=None if self.draw_probs is None else self.draw_probs[:, which],
        )

    def to_cpu(self) -> Predictive:
        """Return it on the CPU, in float32."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {n: as_float32(v) for n, v in values.items() if isinstance(v, Tensor)}
        return Predictive(**values)

    @classmethod
    def gather(cls, parts: Sequence[tuple[Tensor, Predictive]]) -> Predictive:
        """Put together pairs of row numbers and their predictions.

        Classes that the rows of a part lack are zeros.
        """
        order = torch.cat([index for index, _ in parts]).argsort()
        widest = max(p.probs.shape[-1] for _, p in parts)

        def whole(name: str, rows: int = 0) -> Tensor | None:
            found = [getattr(p, name) for _, p in parts]
            if found[0] is None:
                return None
            wide = [pad(t, (0, widest - t.shape[-1])) if t.dim() > 1 else t for t in found]
            return torch.cat(wide, rows).index_select(rows, order)

        columns: dict[str, Any] = {name: whole(name) for name in _ROW_FIELDS}
        return cls(
            **columns,
            draws=max((p.draws for _, p in parts), key=len),
            draw_probs=whole("draw_probs", 1),
            draw_counts=whole("draw_counts"),
        )

    def __repr__(self) -> str:
        rows, classes = self.probs.shape
        return f"Predictive({rows} rows, {classes} classes, {len(self.draws)} draws)"

    @cached_property
    def prediction(self) -> Tensor:
        """[B] int64, argmax of ``probs``; -1 where they are NaN."""
        return self.probs.argmax(-1).masked_fill(self.probs.isnan().any(-1), -1)

    @cached_property
    def predicted_error(self) -> Tensor:
        """[B], the standard error of the predicted class's probability; NaN where that is."""
        at = self.prediction.clamp_min(0)[:, None]
        return self.standard_error.gather(-1, at)[:, 0].masked_fill(self.prediction < 0, torch.nan)

    @cached_property
    def confidence(self) -> Tensor:
        """[B], the largest of ``probs``."""
        return self.probs.amax(-1)

    @cached_property
    def epistemic(self) -> Tensor:
        """[B], mutual information between label and weights: total - aleatoric."""
        return (self.total - self.aleatoric).clamp_min(0.0)  # by Jensen: only rounding is below


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / T, in float32 at least: half precision would round them once more."""
    return logits.to(compute_dtype(logits.dtype)) / temperature


def log_mean_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute log mean_s softmax(z_s / T) of logits [S, ...], over their last dimension."""
    log_p = tempered(logits, temperature).log_softmax(-1)
    return log_p.logsumexp(0) - math.log(len(log_p))


def as_float32(values: Tensor) -> Tensor:
    """Return values on the CPU, numbers with a point in float32."""
    return (values.float() if values.is_floating_point() else values).cpu()


_ROW_FIELDS = ("probs", "total", "aleatoric", "agreement", "standard_error")


def _agreement(choices: Tensor, probs: Tensor) -> Tensor:
    """Return the share of choices [S, B] that are the argmax of probs [B, K]."""
    share = (choices == probs.argmax(-1)).to(probs.dtype).mean(0)
    return share.masked_fill(probs.isnan().any(-1), float("nan"))


def _exact_or(error: Tensor, draws: Draws) -> Tensor:
    """Return no error for draws that are all at sigma = 0, which are exact."""
    return torch.zeros_like(error) if all(s == 0.0 for s in draws.sigmas) else error
