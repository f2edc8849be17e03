"""The loss of anchors as sigma grows: anchor sets, the matrix of their losses, what it costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tfb.data.batching import NO_LABEL, NO_TOKEN, EncodedRows, batches
from tfb.draws import Draws
from tfb.evaluation.metrics import PROBABILITY_FLOOR, fit_temperature
from tfb.model import BayesianModel
from tfb.module import BayesianModule
from tfb.sampling.config import SamplingConfig
from tfb.sampling.state import Batch
from tfb.search.answers import TEMPERATURES, best_temperature, losses_at, token_nll
from tfb.search.result import SearchError
from tfb_kernels.reference import compute_dtype

ROWS_PER_PASS = 1024  # rows x draws in one forward pass: more bring no more speed

SearchedModel = BayesianModel | BayesianModule
LossFunction = Callable[[Tensor, Any], Tensor]  # outputs [S, B, ...] and their batch to losses [B]
MetricLike = str | LossFunction


class Metric(NamedTuple):
    """What a metric needs, whether it is a likelihood, and the paper's tolerance, relative."""

    labelled: bool
    likelihood: bool
    tolerance: float


METRICS = {
    "nll": Metric(labelled=True, likelihood=True, tolerance=0.003),
    "accuracy": Metric(labelled=True, likelihood=False, tolerance=0.01),
    "expected_nll": Metric(labelled=True, likelihood=True, tolerance=0.003),
    "pseudo_nll": Metric(labelled=False, likelihood=True, tolerance=0.003),
    "embedding_norm": Metric(labelled=False, likelihood=False, tolerance=0.003),
}

OF_FUNCTIONS = Metric(labelled=False, likelihood=True, tolerance=0.003)


def metric_of(metric: MetricLike) -> Metric:
    """Return what is known of a metric; a loss function may be minimised, and needs nothing."""
    return METRICS[metric] if isinstance(metric, str) else OF_FUNCTIONS


def name_of(metric: MetricLike) -> str:
    """Return a metric's name; a loss function's is that of the function or its class."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


@dataclass(frozen=True)
class AnchorSet:
    """Anchor rows as ready batches.

    Attributes:
        batches: dicts of tokenizer tensors [B, T], "labels" [B] (class indices) and, for causal
            LMs, "label_ids" [K], [B, K] or [B, K, L] (the tokens of the classes); [B, 1, L] are
            answers, which need no labels. Of a model without PEFT: its arguments, rows in dim 0,
            by name, or by place ("0", "1", ...) where they came as a tuple; "labels" are not given
            to the model.
        content_hash: SHA-256 of the content.
    """

    batches: tuple[Batch, ...]
    content_hash: str

    @classmethod
    def of(
        cls,
        anchors: AnchorSet | EncodedRows | Iterable[Batch | Sequence[Tensor]],
        *,
        pad_token_id: int = 0,
        batch_size: int = 50,
    ) -> AnchorSet:
        """Take encoded rows, or batches.

        Args:
            anchors: the rows.
            pad_token_id: the token that pads encoded rows.
            batch_size: of encoded rows.

        Raises:
            ValueError: no anchors at all, or arguments that differ in their number of rows.
            TypeError: neither batches nor encoded rows.
        """
        if isinstance(anchors, AnchorSet):
            return anchors
        made: list[Batch] = []
        if isinstance(anchors, EncodedRows):
            for b in batches(anchors, batch_size=batch_size, pad_token_id=pad_token_id):
                known = b.labels is not None and bool((b.labels != NO_LABEL).any())
                extra = {"labels": b.labels if known else None, "label_ids": b.label_ids}
                made.append(b.model_inputs() | {k: v for k, v in extra.items() if v is not None})
            digest = anchors.content_hash
        else:
            made = [_with_tensors(batch) for batch in anchors]
            digest = _hash(made)
        if not made:
            raise ValueError("anchors: empty; a search needs rows to measure a loss on")
        return cls(tuple(made), digest)

    def __len__(self) -> int:
        return sum(map(_rows_of, self.batches))

    def __repr__(self) -> str:
        return f"AnchorSet({len(self)} rows, {len(self.batches)} batches, {self.content_hash[:8]})"

    @cached_property
    def labels(self) -> Tensor | None:
        """All labels [N], or None if any row has none."""
        found = [b.get("labels") for b in self.batches]
        if any(y is None for y in found):
            return None
        labels = torch.cat([torch.as_tensor(y).cpu().long() for y in found])
        return None if bool((labels == NO_LABEL).any()) else labels

    @cached_property
    def answers(self) -> bool:
        """Whether any row has an answer of its own to write, in place of choices."""
        return any(_answers_of(batch) is not None for batch in self.batches)

    def check(self, metric: MetricLike) -> None:
        """Refuse what cannot be searched on by a metric: missing labels, one class only."""
        if self.answers:
            if any(_answers_of(batch) is None for batch in self.batches):
                raise ValueError("anchors: some rows have an answer, others have none; part them")
            if metric != "nll":
                raise ValueError(f"metric={name_of(metric)!r}: rows with an answer need 'nll'")
            return
        if not metric_of(metric).labelled:
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


def _with_tensors(batch: Batch | Sequence[Tensor]) -> Batch:
    """Accept arguments by place, and labels and choices that are lists."""
    if isinstance(batch, tuple | list):
        batch = {str(place): value for place, value in enumerate(batch)}
    if not isinstance(batch, Mapping) or not _shapes(batch):
        raise TypeError(
            "anchors: expected encoded rows, or batches (dicts with input_ids and other tensors), "
            f"got {type(batch).__name__}; write anchors = encode(bayes, data, tokenizer) for "
            "files, DataFrames, Datasets and lists of rows"
        )
    names = [n for n in ("labels", "label_ids") if isinstance(batch.get(n), list)]
    batch = {**batch, **{n: torch.tensor(batch[n]) for n in names}} if names else batch
    shapes = _shapes(batch)
    if "input_ids" not in batch and len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"anchors: expected as many rows in dim 0 of each tensor, got {shapes}")
    return batch


def _shapes(batch: Batch) -> dict[str, list[int]]:
    """Return the shapes of tensors that have rows."""
    tensors = {name: v for name, v in batch.items() if isinstance(v, Tensor) and v.dim() > 0}
    return {name: list(v.shape) for name, v in tensors.items()}


def _rows_of(batch: Batch) -> int:
    """Return the number of rows of a batch."""
    shapes = _shapes(batch)
    return shapes.get("input_ids", next(iter(shapes.values())))[0]


def _answers_of(batch: Batch) -> Tensor | None:
    """Return the answers [B, L] of a batch that has such."""
    ids = batch.get("label_ids")
    return ids[:, 0] if isinstance(ids, Tensor) and ids.shape[1:-1] == (1,) else None


def _as_given(batch: Batch) -> Any:
    """Return arguments by place as a tuple again."""
    return tuple(batch.values()) if "0" in batch else batch


def _hash(made: Sequence[Batch]) -> str:
    """Return the SHA-256 of all tensors, with shape and type, and of what else there is."""
    sha = hashlib.sha256()
    for batch in made:
        for key in sorted(batch):
            if not isinstance(value := batch[key], Tensor):
                sha.update(f"{key} {value!r} ".encode())
                continue
            sha.update(f"{key} {list(value.shape)} {value.dtype} ".encode())
            sha.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class PassCounter:
    """What a search spends, in deterministic passes over all anchors, counted in tokens.

    In full mode every draw is a pass. In tail mode a row's first T - k tokens run once in a sweep.
    """

    def __init__(self, batches: Sequence[Batch], tail: int | None) -> None:
        prompts, answers = (torch.cat(n) for n in zip(*map(_tokens_of, batches), strict=True))
        drawn = prompts if tail is None else prompts.clamp_max(tail)
        self._drawn, self._common = drawn + answers, prompts - drawn  # [N]
        self._total = int((prompts + answers).sum())
        self._spent = 0

    @property
    def passes(self) -> float:
        """Passes spent so far."""
        return self._spent / self._total

    def spend(self, rows: Tensor, draws: int) -> None:
        """Count a sweep of ``draws`` draws over ``rows``."""
        self._spent += int((self._common[rows] + draws * self._drawn[rows]).sum())


def _tokens_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Count the tokens of each row, [B], 1 where a model has none, and those of its answer."""
    real: Tensor | None = batch.get("attention_mask")
    if real is None:
        real = torch.ones_like(batch.get("input_ids", torch.ones(_rows_of(batch), 1)))
    prompts, ids = real.sum(1).long().cpu(), _answers_of(batch)
    # An answer's last token is never read.
    return prompts, prompts * 0 if ids is None else (ids != NO_TOKEN).sum(1).cpu() - 1


def passes_per_row(lengths: Sequence[int], draws: int, tail: int | None = None) -> float:
    """Return what draws of prompts of these many tokens cost, as :class:`PassCounter` counts."""
    total = sum(lengths)
    drawn = total if tail is None else sum(min(n, tail) for n in lengths)
    return (total - drawn + draws * drawn) / total


def standard_error(rows: Tensor) -> float:
    """Return the standard error of the mean of rows [n]; inf of one."""
    return float(rows.std()) / len(rows) ** 0.5 if len(rows) > 1 else float("inf")


Point = tuple[float, float, Tensor, Tensor | None]  # sigma, T, losses [n], which rows are right


@dataclass(frozen=True)
class LossMatrix:
    """Losses of n anchors at G points (sigma, T); the first is the adapter's own, (0, 1).

    Attributes:
        points: G pairs, ascending in sigma.
        losses: [G, n] float64.
        correct: [G, n], whether the label is predicted; None without labels.
        plain: the same sigmas at T = 1, where T is fitted.
    """

    points: tuple[tuple[float, float], ...]
    losses: Tensor
    correct: Tensor | None
    plain: LossMatrix | None = None

    @classmethod
    def of(cls, found: Sequence[Point], plain: LossMatrix | None = None) -> LossMatrix:
        """Collect points."""
        sigmas, Ts, losses, right = zip(*found, strict=True)
        correct = None if right[0] is None else torch.stack(right)
        return cls(tuple(zip(sigmas, Ts, strict=True)), torch.stack(losses), correct, plain)

    @cached_property
    def sigmas(self) -> Tensor:
        """The sigma of each point, [G] float64."""
        return torch.tensor([sigma for sigma, _ in self.points], dtype=torch.float64)

    @cached_property
    def means(self) -> Tensor:
        """The mean loss at each point, [G]."""
        return self.losses.mean(1)

    @cached_property
    def still(self) -> float:
        """The least mean loss without noise."""
        return float(self.means[self.sigmas == 0].min())

    def gain(self, a: int, b: int) -> float:
        """Return how far the mean loss falls from point a to point b."""
        return float(self.means[a] - self.means[b])

    def standard_error(self, g: int, other: int = 0) -> float:
        """Return the standard error over anchors of the change from ``other`` to g; inf of one row.

        The first point is the adapter.
        """
        return standard_error(self.losses[g] - self.losses[other])

    def join(self, other: LossMatrix) -> LossMatrix:
        """Add the points of another matrix of the same rows, at sigmas that this one lacks."""
        own = {sigma for sigma, _ in self.points}
        new = [g for g, (sigma, _) in enumerate(other.points) if sigma not in own]
        points = (*self.points, *(other.points[g] for g in new))
        order = sorted(range(len(points)), key=lambda g: points[g][0])  # stable: (0, 1) stays first
        correct = None
        if self.correct is not None and other.correct is not None:
            correct = torch.cat([self.correct, other.correct[new]])[order]
        losses = torch.cat([self.losses, other.losses[new]])[order]
        plain = self.plain.join(other.plain) if self.plain and other.plain else None
        return LossMatrix(tuple(points[g] for g in order), losses, correct, plain)


class AnchorLoss:
    """Measures anchors at any sigmas, all on the same antithetic streams; counts the passes.

    Without common streams the loss is not even monotone in sigma. To add a metric: its line in
    ``METRICS`` and a branch in ``_losses``.
    """

    def __init__(
        self,
        bayes: SearchedModel,
        anchors: AnchorSet,
        metric: MetricLike,
        *,
        draws: int,
        config: SamplingConfig,
        temperature: bool = False,
        progress: Callable[[int], None] | None = None,
        sweeps: MutableMapping[str, Tensor] | None = None,
    ) -> None:
        """Check the anchors.

        Args:
            bayes: the model.
            anchors: the rows.
            metric: of ``METRICS``, or a loss function.
            draws: antithetic draws at each sigma.
            config: mode, tail and seed to sample with.
            temperature: take each sigma at its T of least mean loss (metric "nll").
            progress: called with finished rows x draws.
            sweeps: outputs of finished sweeps over one batch, kept there and found there again.
        """
        anchors.check(metric)
        if isinstance(bayes, BayesianModel) and any("input_ids" not in b for b in anchors.batches):
            raise TypeError("anchors: a language model or classifier needs batches with input_ids")
        self.bayes, self.anchors, self.metric = bayes, anchors, metric
        self.draws, self.config, self.progress = draws, config, progress
        self.temperature, self.sweeps = temperature, sweeps
        self._answers = anchors.answers and not isinstance(bayes, BayesianModule)
        self.cost = PassCounter(anchors.batches, config.tail)
        self._adapter: dict[int, Tensor] = {}  # outputs at sigma = 0 of each batch, full mode
        # Of the adapter on the rows measured last: [n, K], or of answers the losses [n, G].
        self.log_probs: Tensor | None = None
        self.answer_losses: Tensor | None = None

    @property
    def passes(self) -> float:
        """Deterministic passes over all anchors spent so far."""
        return self.cost.passes

    def __call__(self, sigmas: Sequence[float], rows: Tensor | None = None) -> LossMatrix:
        """Measure sigmas > 0 and the adapter on all anchors, or on ascending ``rows``."""
        rows = torch.arange(len(self.anchors)) if rows is None else rows
        wanted = sorted(set(sigmas))
        plain, drawn = [], []
        for number, at, whole in self._pieces(rows):
            zero, out = self._sweep(number, at, whole, wanted)
            plain.append(zero)
            drawn.append(out)
        adapter = _together(plain)  # [1, n, K], [1, n] of norms or losses, [1, n, G] of answers
        if self._answers:
            self.answer_losses = adapter[0]
        elif adapter.dim() == 3:
            self.log_probs = adapter[0].log_softmax(-1)
        targets = self._targets(rows, adapter)
        found: list[Point] = []
        at_one: list[Point] = []
        for g, sigma in enumerate((0.0, *wanted)):
            out = adapter if g == 0 else _together([d[g - 1] for d in drawn])
            fitted = self._temperature(out, targets) if self.temperature else 1.0
            Ts = dict.fromkeys((1.0, fitted))
            both = [(sigma, T, *self._losses(out, T, targets)) for T in Ts]
            at_one.append(both[0])
            found += both if g == 0 else both[-1:]
        return LossMatrix.of(found, LossMatrix.of(at_one) if self.temperature else None)

    def _pieces(self, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the number of each batch that has any of ``rows``, those rows, and all of its."""
        start = 0
        for number, batch in enumerate(self.anchors.batches):
            whole = torch.arange(start, start + _rows_of(batch))
            start += len(whole)
            if len(at := rows[torch.isin(rows, whole)]):
                yield number, at, whole

    def _sweep(
        self, number: int, at: Tensor, whole: Tensor, sigmas: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Return outputs [1, b, ...] at sigma = 0 and [G, S, b, ...] at sigmas, of rows ``at``."""
        batch = self.anchors.batches[number]
        part = batch if len(at) == len(whole) else _take(batch, at - whole[0], len(whole))
        if self.config.mode == "tail":  # sigma = 0 and all others share one prefill
            drawn = self._finished(part, [0.0, *sigmas])
            self.cost.spend(at, (1 + len(sigmas)) * self.draws)
            return drawn[0, :1], drawn[1:]
        if number not in self._adapter:
            self._adapter[number] = self._finished(batch, [])[0]
            self.cost.spend(whole, 1)
        zero = self._adapter[number][:, at - whole[0]]
        self.cost.spend(at, len(sigmas) * self.draws)
        return zero, self._finished(part, sigmas) if sigmas else torch.zeros(0)

    def _finished(self, batch: Batch, sigmas: Sequence[float]) -> Tensor:
        """Return what ``_measure`` does, from ``sweeps`` where it is there already."""
        if self.sweeps is None:
            return self._measure(batch, sigmas)
        made = self.metric if self.metric == "embedding_norm" else "logits"
        how = asdict(replace(self.config, sigma=None, temperature=1.0))
        on = [made, _hash([batch]), list(sigmas), self.draws, how]
        key = hashlib.sha256(json.dumps(on).encode()).hexdigest()
        if key not in self.sweeps:
            self.sweeps[key] = self._measure(batch, sigmas)
        elif self.progress is not None:
            self.progress(len(sigmas) * self.draws * _rows_of(batch))
        return self.sweeps[key]

    def _measure(self, batch: Batch, sigmas: Sequence[float]) -> Tensor:
        """Return outputs [G, S, b, ...] at sigmas; of no sigma the adapter's, [1, 1, b, ...]."""
        if not sigmas:
            return self._reduced(self._outputs(batch, Draws.mean())[None], batch, [0.0])
        rows, found = _rows_of(batch), []
        full = self.config.mode == "full"
        step = max(1, ROWS_PER_PASS // (self.draws * rows)) if full else len(sigmas)
        for g in range(0, len(sigmas), step):
            some = sigmas[g : g + step]
            draws = Draws.grid(some, self.draws, seed=self.config.seed)
            out = self._outputs(batch, draws).unflatten(0, (self.draws // 2, -1, 2))
            out = out.movedim(1, 0).flatten(1, 2)  # stream, sigma, sign -> sigma, draw
            found.append(self._reduced(out, batch, some))
            if self.progress is not None:
                self.progress(len(draws) * rows)
        return torch.cat(found)

    def _outputs(self, batch: Batch, draws: Draws) -> Tensor:
        """Return each draw's logits [S, b, K], norms [S, b] or other outputs, float32 at least.

        Of answers, the log-probabilities [S, b, L, G].
        """
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "label_ids")}
        form: Any = {"mode": self.config.mode, "tail": self.config.tail}
        if isinstance(self.bayes, BayesianModule):
            out = self.bayes.outputs(_as_given(inputs), draws)
            if isinstance(self.metric, str) and out.dim() != 3:
                raise ValueError(
                    f"metric={self.metric!r} needs outputs [S, B, K], got {list(out.shape)}; give "
                    "a loss function for outputs of another form"
                )
        elif self.metric == "embedding_norm":
            out = self.bayes.hidden_norms(inputs, draws)
        elif self._answers:
            ids = batch["label_ids"][:, 0]
            out = self.bayes.answer_log_probs(inputs, draws, ids, TEMPERATURES, **form)
        else:
            out = self.bayes.logits(inputs, draws, batch.get("label_ids"), **form)
        return out.to(compute_dtype(out.dtype))

    @torch.no_grad()
    def _reduced(self, out: Tensor, batch: Batch, sigmas: Sequence[float]) -> Tensor:
        """Return outputs [G, S, b, ...], checked; a loss function makes that losses [G, 1, b].

        Answers have their losses too, [G, 1, b, temperatures].
        """
        who = "the model"
        if self._answers:
            present = batch["label_ids"][:, 0].to(out.device) != NO_TOKEN
            out = torch.stack([token_nll(o, present) for o in out])[:, None]
        elif callable(self.metric):
            who = f"the loss function {name_of(self.metric)}"
            own = {k: v.to(out.device) for k, v in batch.items() if isinstance(v, Tensor)}
            given = _as_given({**batch, **own})
            losses = [self.metric(o, given) for o in out]
            # One draw tells draws from rows where there are as many of both.
            for loss in (losses[0], self.metric(out[0][:1], given)):
                got = list(getattr(loss, "shape", [type(loss).__name__]))
                if got != [_rows_of(batch)]:
                    raise ValueError(
                        f"metric: {who} has to return a tensor of a loss for each row, "
                        f"[{_rows_of(batch)}], got {got}; average over draws, dim 0 of the "
                        "outputs, and leave the rows apart (reduction='none')"
                    )
            out = torch.stack(losses)[:, None].double()
        out = out.cpu().contiguous()
        _check_finite(out.softmax(-1) if out.dim() == 4 else out, sigmas, who)
        return out

    def _targets(self, rows: Tensor, adapter: Tensor) -> Tensor | None:
        """Return what is to be predicted, [n]: labels, or the adapter's own predictions."""
        if callable(self.metric) or self.metric == "embedding_norm" or self._answers:
            return None
        if self.metric == "pseudo_nll":
            return adapter[0].argmax(-1)
        assert self.anchors.labels is not None  # check() said so
        targets, K = self.anchors.labels[rows], adapter.shape[-1]
        if bool(((targets < 0) | (targets >= K)).any()):
            raise ValueError(f"anchors: a label lies outside the {K} choices")
        return targets

    def _temperature(self, logits: Tensor, targets: Tensor | None) -> float:
        """Return the T of least mean NLL of logits [S, n, K], or of answers' losses [1, n, G]."""
        if self._answers:
            return best_temperature(logits[0])
        assert targets is not None
        if bool((logits.softmax(-1).mean(0).argmax(-1) == targets).all()):
            return 1.0  # without a wrong row the likelihood grows for ever as T falls
        return fit_temperature(logits, targets)

    def _losses(
        self, out: Tensor, T: float, targets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return losses [n] of outputs [S, n, ...] at T, and whether each row is right."""
        if self._answers:
            return losses_at(out[0], T), None
        if targets is None:
            return out.mean(0), None
        p = (out / T).softmax(-1)
        mean = p.mean(0)
        right = mean.argmax(-1) == targets
        if self.metric == "accuracy":
            return (~right).double(), right
        each = p if self.metric == "expected_nll" else mean[None]
        index = targets.expand(each.shape[:-1])[..., None]
        losses = -each.gather(-1, index)[..., 0].clamp_min(PROBABILITY_FLOOR).log().mean(0)
        return losses, right if metric_of(self.metric).labelled else None


def _together(parts: Sequence[Tensor]) -> Tensor:
    """Join outputs [S, b, K] or [S, b] of all batches, in float64; classes some lack get -inf."""
    if parts[0].dim() == 3:
        K = max(part.shape[-1] for part in parts)
        parts = [pad(part, (0, K - part.shape[-1]), value=-torch.inf) for part in parts]
    return torch.cat(list(parts), dim=1).double()


def _check_finite(out: Tensor, sigmas: Sequence[float], who: str) -> None:
    """Refuse NaN and Inf in what came out at each sigma, [G, ...]; 0 is always seen first."""
    broken = ~out.isfinite().flatten(1).all(1)
    if not bool(broken.any()):
        return
    least = sigmas[int(broken.nonzero()[0])]
    if least == 0.0:
        raise ValueError(f"anchors: {who} returned NaN or Inf; check weights and inputs")
    raise SearchError(
        f"sigma={least:g}: with so much noise {who} returns NaN or Inf, without noise it does "
        "not; lower bounds[1], or load the model in a wider dtype. Where the range was extended up "
        "to here, no smaller sigma was what the objective looks for: the anchors hardly respond "
        "to the adapter's noise, or the tolerance is too large"
    )


def _take(batch: Batch, rows: Tensor, B: int) -> dict[str, Any]:
    """Return some of a batch's B rows; label_ids [K] hold for all rows."""
    taken = dict(batch)
    for name, value in batch.items():
        least = 2 if name == "label_ids" else 1
        if isinstance(value, Tensor) and value.dim() >= least and len(value) == B:
            taken[name] = value[rows.to(value.device)]
    return taken
