"""Choices of several tokens, scored as continuations of their prompts (docs/design/choices.md)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tfb.data.batching import NO_TOKEN
from tfb.predictive import tempered
from tfb.sampling.kv_cache import Inputs, indivisible
from tfb_kernels.reference import compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class ChoiceTokens:
    """M = B * K choices as N continuations of one length: all of their tokens but the last."""

    tokens: Tensor  # [M, L] vocabulary ids, 0 after the end of a choice
    present: Tensor  # [M, L] bool, where a choice has a token
    place: Tensor  # [M], where a choice stands among all of the batch
    source: Tensor  # [M], the continuation that holds it
    read: Tensor  # [N, L - 1] tokens to read after a prompt, 0 after the end
    lengths: Tensor  # [N], their number
    owner: Tensor  # [N], the row of each continuation
    length_normalization: str
    temperatures: Sequence[float] | None  # score each token at these; None: whole choices at T = 1

    @classmethod
    def of(
        cls,
        base: PreTrainedModel,
        choice_ids: Tensor,
        rows: int,
        length_normalization: str = "none",
        temperatures: Sequence[float] | None = None,
    ) -> ChoiceTokens:
        """Find the continuations of choice_ids [B, K, L]; ``NO_TOKEN`` fills shorter choices up."""
        head: Any = base.get_output_embeddings()
        device, ids = head.weight.device, choice_ids.cpu().to(torch.int64)
        _check_ids(ids, rows, int(head.weight.shape[0]))
        read: list[Tokens] = []
        owner: list[int] = []
        source: list[int] = []
        for b, row in enumerate(ids.tolist()):
            choices = [tuple(t for t in choice if t != NO_TOKEN) for choice in row]
            if len(set(choices)) < len(choices):
                raise ValueError(f"label_ids: row {b} has two equal choices")
            found = _longest([choice[:-1] for choice in choices])
            # In order, what a sequence begins comes right behind it.
            source += [len(read) + bisect_left(found, choice[:-1]) for choice in choices]
            read += found
            owner += [b] * len(found)
        L = ids.shape[-1]
        filled = [[*c, *[0] * (L - 1 - len(c))] for c in read]
        return cls(
            tokens=ids.clamp_min(0).flatten(0, 1).to(device),
            present=(ids != NO_TOKEN).flatten(0, 1).to(device),
            place=torch.arange(len(source), device=device),
            source=torch.tensor(source, device=device),
            read=torch.tensor(filled, dtype=torch.int64, device=device).view(len(read), L - 1),
            lengths=torch.tensor([len(c) for c in read], device=device),
            owner=torch.tensor(owner, device=device),
            length_normalization=length_normalization,
            temperatures=temperatures,
        )

    @property
    def length(self) -> int:
        """L, the tokens of the longest choice, and the positions of a continuation."""
        return self.tokens.shape[-1]

    def parts(self, most: int) -> list[ChoiceTokens]:
        """Split into parts of at most ``most`` continuations, with the choices that they hold."""
        found = []
        for start in range(0, len(self.owner), most):
            part, own = slice(start, start + most), self.source // most == start // most
            choices = {name: getattr(self, name)[own] for name in ("tokens", "present", "place")}
            rows = {name: getattr(self, name)[part] for name in ("read", "lengths", "owner")}
            found.append(replace(self, source=self.source[own] - start, **choices, **rows))
        return found

    def extend(self, inputs: Inputs, keep: int) -> Inputs:
        """Return the last ``keep`` of a left-padded prompt's tokens, and a continuation's."""
        B, owner = len(inputs["input_ids"]), self.owner
        out = {
            name: value[owner] if isinstance(value, Tensor) and value.shape[:1] == (B,) else value
            for name, value in inputs.items()
        }
        out["input_ids"] = torch.cat([out["input_ids"][:, -keep:], self.read], dim=1)
        mask = out["attention_mask"]  # all of it: its first columns may be those of a cache
        # Filling counts as tokens: it lies behind all that is scored, and so every continuation of
        # a batch ends in the same column.
        after = mask.new_ones(len(owner), self.length - 1)
        out["attention_mask"] = torch.cat([mask, after], dim=1)
        if "position_ids" in out:
            position = out["position_ids"]
            step = torch.arange(1, self.length, device=position.device)
            # Filling stays at the last position, which the model is known to have.
            step = torch.minimum(step, self.lengths[:, None])
            out["position_ids"] = torch.cat([position[:, -keep:], position[:, -1:] + step], dim=1)
        return out

    def reduce(self, logits: Tensor) -> Tensor:
        """Return the scores [S, M] of logits [S, N, L, V], in float32 at least.

        With G temperatures: the log-probability of each token, [S, M, L, G]; 0 after the last.
        """
        if self.temperatures is not None:
            return torch.stack([self._log_probs(logits, T) for T in self.temperatures], -1)
        score = self._log_probs(logits, 1.0).sum(-1)
        return score if self.length_normalization == "none" else score / self.present.sum(-1)

    def _log_probs(self, logits: Tensor, T: float) -> Tensor:
        dtype = compute_dtype(logits.dtype)
        # Draw by draw: in another dtype, or at another T, each is a copy of the largest tensor.
        scaled = (x.to(dtype) if T == 1.0 else tempered(x, T) for x in logits)
        total = torch.stack([x.logsumexp(-1) for x in scaled])
        position = torch.arange(self.length, device=logits.device)
        source = self.source[..., None]
        own = logits[:, source, position, self.tokens].to(dtype) / T
        return torch.where(self.present, own - total[:, source, position], 0.0)


def check_continuable(inputs: Inputs, task: str) -> None:
    """Refuse what cannot be continued by the tokens of a choice."""
    if task != "CAUSAL_LM":
        raise ValueError(
            "choices of several tokens: they continue the prompt of a causal language model, not "
            "of an encoder-decoder; use label_ids [B, K], choices of one token"
        )
    if names := indivisible(inputs):
        raise ValueError(
            f"choices of several tokens: the batch has {', '.join(names)}, which is not known for "
            "the tokens of a choice; leave it out"
        )


def _check_ids(ids: Tensor, rows: int, vocabulary: int) -> None:
    if ids.shape[0] != rows or not ids.numel():
        raise ValueError(f"label_ids: expected [{rows}, K, L], got {list(ids.shape)}")
    present = ids != NO_TOKEN
    if bool(((ids < 0) & present | (ids >= vocabulary)).any()):
        raise ValueError(f"label_ids: outside the vocabulary of {vocabulary}")
    if not bool(present[..., 0].all()) or bool((present[..., 1:] > present[..., :-1]).any()):
        raise ValueError(
            f"label_ids: every choice needs a token, and {NO_TOKEN} stands after its last only"
        )


def _longest(sequences: Sequence[Tokens]) -> list[Tokens]:
    """Return those of ``sequences`` that do not begin another one, without repetition."""
    order = sorted(set(sequences))  # a sequence stands right before those that it begins
    return [a for a, b in pairwise(order) if b[: len(a)] != a] + order[-1:]
