"""Anchor sets: the labelled (or unlabelled) rows on which a loss is traced as sigma grows.

``AnchorLoss`` evaluates many sigmas at once on common antithetic streams, and keeps per-row
losses, so that every difference to sigma = 0 is a paired one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tfb.batching import NO_LABEL, EncodedRows, batches
from tfb.draws import Draws
from tfb.engine import BayesianModel

METRICS = ("nll", "accuracy", "pseudo_nll", "embedding_norm")
SUPERVISED = ("nll", "accuracy")
PROBABILITY_FLOOR = 1e-12  # as in the authors' scripts; keeps log finite
ROWS_PER_PASS = 1024  # rows x draws in one forward pass


@dataclass(frozen=True)
class AnchorSet:
    """Anchor rows as ready batches.

    Attributes:
        batches: dicts of tokenizer tensors [B, T], with "labels" [B] (class index) and, for
            causal LMs, "label_ids" ([K], [B, K] or [B, K, L], the vocabulary ids of the classes).
        content_hash: SHA-256 of the content, kept in the artifact.
    """

    batches: tuple[Mapping[str, Any], ...]
    content_hash: str

    @classmethod
    def of(
        cls,
        anchors: AnchorSet | EncodedRows | Iterable[Mapping[str, Any]],
        *,
        pad_token_id: int = 0,
        batch_size: int = 50,
    ) -> AnchorSet:
        """From encoded rows, or from an iterable of batches.

        Raises:
            ValueError: no anchors at all.
        """
        if isinstance(anchors, AnchorSet):
            return anchors
        if isinstance(anchors, EncodedRows):
            made: list[Mapping[str, Any]] = []
            for b in batches(
                anchors, batch_size=batch_size, pad_token_id=pad_token_id, sort_by_length=True
            ):
                extra = {"labels": b.labels, "label_ids": b.label_ids}
                made.append(b.model_inputs() | {k: v for k, v in extra.items() if v is not None})
            digest = anchors.content_hash
        else:
            made = list(anchors)
            sha = hashlib.sha256()
            for batch in made:
                for key in sorted(batch):
                    if isinstance(value := batch[key], Tensor):
                        # Shape and type too: the same bytes as other rows are other content.
                        sha.update(f"{key} {list(value.shape)} {value.dtype} ".encode())
                        sha.update(value.cpu().flatten().view(torch.uint8).numpy().tobytes())
            digest = sha.hexdigest()
        if not made:
            raise ValueError("anchors: empty; a search needs rows to measure a loss on")
        return cls(tuple(made), digest)

    def __len__(self) -> int:
        return sum(int(b["input_ids"].shape[0]) for b in self.batches)

    @cached_property
    def labels(self) -> Tensor | None:
        """[N] int64 in batch order, or None if any row is unlabelled."""
        found = [b.get("labels") for b in self.batches]
        if any(y is None for y in found):
            return None
        labels = torch.cat([torch.as_tensor(y) for y in found])
        return None if bool((labels == NO_LABEL).any()) else labels

    def check(self, metric: str) -> None:
        """Refuse what cannot be searched on, before any forward pass.

        Raises:
            ValueError: an unknown metric, missing labels, one class only.
        """
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r}: expected one of {', '.join(METRICS)}")
        if metric not in SUPERVISED:
            return
        if self.labels is None:
            raise ValueError(
                f"metric={metric!r} needs a label on every anchor; add labels or use pseudo_nll "
                "or embedding_norm"
            )
        # Class index alone tells nothing when each row has its own choices.
        ids = [b["label_ids"] for b in self.batches if b.get("label_ids") is not None]
        choices = {str(row) for i in ids for row in (i if i.dim() > 1 else i[None]).tolist()}
        if len(choices) <= 1 and len(self.labels.unique()) == 1:
            raise ValueError(
                f"anchors: all {len(self)} rows have label {int(self.labels[0])}; a loss on one "
                "class says nothing about calibration, add rows of other classes"
            )


@dataclass(frozen=True)
class LossTable:
    """Losses of N anchors at G sigmas.

    Attributes:
        rows: [G, N] float64, each anchor's loss.
        draw_standard_error: [G] float64, jackknife over streams of the mean loss; NaN when there
            is one stream only.
    """

    rows: Tensor
    draw_standard_error: Tensor


class AnchorLoss:
    """The anchors' loss as a function of sigma; counts the passes it spends."""

    def __init__(
        self,
        bayes: BayesianModel,
        anchors: AnchorSet,
        metric: str,
        *,
        draws: int,
        seed: int,
        noise: str = "weight",
        progress: Callable[[int], None] | None = None,
        additive_floor: bool = False,
    ) -> None:
        """``progress`` is called with the rows finished (rows x draws) after each pass.

        ``additive_floor``: the loss is -log(p + floor), as in the authors' scripts, where
        -log(max(p, floor)) is the default.
        """
        anchors.check(metric)
        self.bayes, self.anchors, self.metric = bayes, anchors, metric
        self.n, self.seed, self.noise = draws, seed, noise
        self.progress, self.additive_floor = progress, additive_floor
        self.passes = 0.0  # whole-set forward passes, one for each draw
        self._mean = self._deterministic()

    @property
    def baseline(self) -> Tensor:
        """[N] float64, losses at sigma = 0."""
        return self._losses(self._mean[None], 0, len(self.anchors))[0]

    @property
    def correct(self) -> float:
        """Share of anchors the deterministic adapter gets right (supervised metrics)."""
        return 1.0 - float(self.baseline.mean())

    def __call__(
        self, sigmas: Sequence[float], *, antithetic: bool = True, first_stream: int = 0
    ) -> LossTable:
        """Losses at ``sigmas`` (> 0), all on the same streams."""
        k = 2 if antithetic else 1
        units = self.n // k
        G = len(sigmas)
        rows, held_out, start = [], torch.zeros(G, units, dtype=torch.float64), 0
        for batch in self.anchors.batches:
            B = int(batch["input_ids"].shape[0])
            per_pass = max(1, ROWS_PER_PASS // (self.n * B))
            parts = []
            for g in range(0, G, per_pass):
                draws = Draws.grid(
                    sigmas[g : g + per_pass],
                    self.n,
                    antithetic=antithetic,
                    seed=self.seed,
                    noise=self.noise,
                    first_stream=first_stream,
                )
                out = self._outputs(batch, draws)  # [units * g * k, B, ...]
                parts.append(out.unflatten(0, (units, -1, k)).mean(2))
                if self.progress is not None:
                    self.progress(len(draws) * B)
            per_unit = torch.cat(parts, dim=1)  # [units, G, B, ...]
            mean = per_unit.mean(0)
            rows.append(self._losses(mean, start, start + B))
            if units > 1:
                for u in range(units):
                    without = (mean * units - per_unit[u]) / (units - 1)
                    held_out[:, u] += self._losses(without, start, start + B).sum(-1)
            start += B
        self.passes += G * self.n
        spread = held_out / len(self.anchors)
        error = torch.full((G,), float("nan"), dtype=torch.float64)
        if units > 1:
            error = ((units - 1) * spread.var(1, unbiased=False)).sqrt()
        return LossTable(torch.cat(rows, dim=1), error)

    def _deterministic(self) -> Tensor:
        """[N, K] probabilities (padded to the widest K) or [N] norms at sigma = 0."""
        parts = [self._outputs(b, Draws.mean())[0] for b in self.anchors.batches]
        self.passes += 1
        if self.metric == "embedding_norm":
            return torch.cat(parts)
        K = max(p.shape[-1] for p in parts)
        return torch.cat([torch.nn.functional.pad(p, (0, K - p.shape[-1])) for p in parts])

    def _outputs(self, batch: Mapping[str, Any], draws: Draws) -> Tensor:
        """Each draw's probabilities [S, B, K], or hidden-state norms [S, B], in float64 on CPU."""
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "label_ids")}
        if self.metric == "embedding_norm":
            out = self.bayes.hidden_norms(inputs, draws).double().cpu()
        else:
            logits = self.bayes.logits(inputs, draws, batch.get("label_ids"))
            out = logits.double().softmax(-1).cpu()
        if not bool(out.isfinite().all()):
            raise ValueError("anchors: the model returned NaN or Inf; check weights and inputs")
        return out

    def _losses(self, out: Tensor, start: int, stop: int) -> Tensor:
        """[..., N'] losses from averaged outputs [..., N', K] of rows start..stop."""
        if self.metric == "embedding_norm":
            return out
        if self.metric == "pseudo_nll":
            target = self._mean[start:stop].argmax(-1)
        else:
            labels = self.anchors.labels
            assert labels is not None  # check() said so
            target = labels[start:stop]
            if bool(((target < 0) | (target >= out.shape[-1])).any()):
                raise ValueError(f"anchors: a label lies outside the {out.shape[-1]} choices")
        if self.metric == "accuracy":
            return (out.argmax(-1) != target).double()
        index = target.expand(out.shape[:-1])[..., None]
        p = out.gather(-1, index)[..., 0]
        if self.additive_floor:
            return -(p + PROBABILITY_FLOOR).log()
        return -p.clamp_min(PROBABILITY_FLOOR).log()
