"""Predictions for many rows: over an encoded set, or streaming.

Rows go out in the order they came in. From files to files: :mod:`tfb.scoring.run`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tfb.adapters.loading import class_names
from tfb.data.batching import EncodedRows, batches
from tfb.data.encoding import LABEL_TOKENS, RowEncoder
from tfb.data.readers import iter_rows, read_rows
from tfb.data.rows import Row, RowError, RowFormat
from tfb.draws import Draws
from tfb.evaluation.metrics import Evaluation, apply_temperature
from tfb.model import BayesianModel
from tfb.sampling.adaptive import Adaptive
from tfb.search.cost import passes_per_row
from tfb.search.loss import PROBABILITY_FLOOR

WINDOW = 1024  # rows encoded at a time while streaming


@dataclass(frozen=True)
class Predictions:
    """N rows, in the rows' order; K is the widest number of choices, padded with zeros.

    probs [N, K]; total, aleatoric, epistemic [N] nats; agreement [N]; standard_error [N], of the
    predicted class's probability; draw_probs [S, N, K] or None.
    """

    probs: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    agreement: Tensor
    standard_error: Tensor
    draw_probs: Tensor | None = None


def pad_token(bayes: BayesianModel, tokenizer: Any = None) -> int:
    """The token that fills padding (its value never matters behind the mask, except for the
    SEQ_CLS heads that look for it, which have it in the model's configuration)."""
    for owner in (bayes.base.config, tokenizer):
        value = getattr(owner, "pad_token_id", None)
        if isinstance(value, int):
            return value
    return 0


def to_device(bayes: BayesianModel, device: str | None = None) -> None:
    """Move the model to ``device``; None: to a GPU if there is one."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if bayes.device.type != chosen.type:
        bayes.model.to(chosen)


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a local folder or hub model, by transformers' own code.

    Raises:
        ValueError: none can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        # transformers explains itself over several lines, and not always by the model's name.
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--model {model}: no tokenizer can be loaded from it; name a local folder with one, "
            f"or a hub model ({reason})"
        ) from error


def set_padding(bayes: BayesianModel, tokenizer: Any) -> None:
    """Give the model a padding token: a SEQ_CLS head finds a row's last token by it."""
    if bayes.base.config.pad_token_id is None:
        bayes.base.config.pad_token_id = tokenizer.pad_token_id


def encode(
    bayes: BayesianModel,
    data: Any,
    tokenizer: Any,
    *,
    columns: Mapping[str, str] | None = None,
    truncate: str | None = None,
) -> EncodedRows:
    """Read and encode rows for the model's task, by its ``label_tokens`` and ``labels``.

    Args:
        data: anything that holds rows, see :func:`tfb.data.readers.iter_rows`. columns: for our names
            those of the data. truncate: see :class:`RowEncoder`.

    Raises:
        RowError: a row that the task, the tokenizer or the model cannot take. ValueError: another
            number of labels than the model has classes.
    """
    return encoder(bayes, tokenizer, truncate)(read_rows(data, form(bayes, columns)))


def form(bayes: BayesianModel, columns: Mapping[str, str] | None = None) -> RowFormat:
    """How data become rows for a model."""
    return RowFormat(
        columns or {}, class_names(bayes.task, bayes.base.config, bayes.labels), bayes.task
    )


def encoder(
    bayes: BayesianModel,
    tokenizer: Any,
    truncate: str | None = None,
    label_tokens: str | None = None,
) -> RowEncoder:
    """What encodes rows for a model, by its own ``label_tokens`` or the given ones."""
    return RowEncoder.of(
        tokenizer,
        bayes.task,
        bayes.base.config,
        label_tokens=label_tokens or bayes.label_tokens,
        length_normalization=bayes.length_normalization,
        truncate=truncate,
    )


def compare_label_tokens(
    bayes: BayesianModel,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    truncate: str | None = None,
    batch_size: int = 50,
) -> dict[str, float] | None:
    """Measure by which tokens of the choices an adapter was trained: its NLL on labelled rows by
    each of ``LABEL_TOKENS``, in nats. One pass each.

    Returns:
        None where both give the same tokens, one of them cannot be used, their difference is
        within two standard errors, neither is better than a guess, or no more than half of the
        labels occur: then a model that always says the same may have the lower NLL.
    """
    found: dict[str, EncodedRows] = {}
    for name in LABEL_TOKENS:
        try:
            found[name] = encoder(bayes, tokenizer, truncate, name)(rows)
        except RowError:
            return None
    if len({encoded.content_hash for encoded in found.values()}) == 1:
        return None
    pad, losses = pad_token(bayes, tokenizer), {}
    for name, encoded in found.items():
        p = predict_rows(bayes, encoded, Draws.mean(), batch_size=batch_size, pad_token_id=pad)
        chosen = p.probs.double().gather(1, torch.tensor(encoded.labels)[:, None])[:, 0]
        losses[name] = -chosen.clamp_min(PROBABILITY_FLOOR).log()
    all_, last = (losses[name] for name in LABEL_TOKENS)
    guess = sum(math.log(len(row.choices or ())) for row in rows) / len(rows)
    unsure = 2 * float((all_ - last).std()) / math.sqrt(len(rows)) if len(rows) > 1 else math.inf
    figures = {name: float(loss.mean()) for name, loss in losses.items()}
    told = abs(figures["all"] - figures["last"]) > unsure and min(figures.values()) < guess
    most = max(len(row.choices or ()) for row in rows)
    return figures if told and len({row.label for row in rows}) > most / 2 else None


def predict_rows(
    bayes: BayesianModel,
    encoded: EncodedRows,
    draws: int | Draws | Adaptive | str = 10,
    *,
    batch_size: int = 50,
    pad_token_id: int = 0,
    keep_draws: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """Posterior predictions of every encoded row; ``progress`` gets the rows just finished.

    ``draws``: as for ``bayes.predict``; "auto" (:class:`Adaptive`) goes without ``keep_draws``. A
    number of draws at sigma = 0 is one draw, unless they are kept.
    """
    adaptive = isinstance(draws, str | Adaptive)
    chosen: Any = draws
    if not adaptive:
        chosen = bayes.distinct_draws(draws, kept=keep_draws)  # type: ignore[arg-type]
    N, K = len(encoded), max(encoded.num_choices(i) for i in range(len(encoded)))
    probs = torch.zeros(N, K)
    columns = torch.zeros(5, N)
    kept = torch.zeros(len(chosen), N, K) if keep_draws and not adaptive else None
    for batch in batches(
        encoded, batch_size=batch_size, pad_token_id=pad_token_id, sort_by_length=True
    ):
        p = bayes.predict(
            batch.model_inputs(), chosen, label_ids=batch.label_ids, keep_draws=keep_draws
        )
        at, k = batch.indices, p.probs.shape[-1]
        if not bool(p.probs.isfinite().all()):
            bad = int(at[(~p.probs.isfinite()).any(-1).cpu()][0])
            raise ValueError(f"row {encoded.ids[bad]}: the model returned NaN or Inf")
        probs[at, :k] = p.probs.float().cpu()
        deviation = p.standard_error.gather(-1, p.prediction[:, None])[:, 0]
        for i, value in enumerate((p.total, p.aleatoric, p.epistemic, p.agreement, deviation)):
            columns[i, at] = value.float().cpu()
        if kept is not None and p.draw_probs is not None:
            kept[:, at, :k] = p.draw_probs.float().cpu()
        if progress is not None:
            progress(len(batch))
    total, aleatoric, epistemic, agreement, error = columns
    return Predictions(probs, total, aleatoric, epistemic, agreement, error, kept)


def score(
    data: Any,
    bayes: BayesianModel,
    tokenizer: Any,
    *,
    draws: int | Draws | Adaptive | str = 10,
    batch_size: int = 50,
    per_draw: bool = False,
    columns: Mapping[str, str] | None = None,
    truncate: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Stream one result for each row, in order, reading at most ``WINDOW`` rows ahead.

    Args:
        data, columns, truncate: see :func:`encode`. draws: as for ``bayes.predict``,
            "auto" included.

    Raises:
        RowError: a row that cannot be used; the command line (:mod:`tfb.scoring.run`) makes rows with
            an error of them. TypeError: data that holds no rows.

    Yields:
        dicts: id, prediction (index), choice (its text, or the class's name if it has one), probs,
        total, aleatoric, epistemic (nats), agreement, standard_error, label (None where there is
        none), truncated (tokens left out) with ``truncate``, draw_probs if ``per_draw``.
    """
    reading = form(bayes, columns)
    stream = iter_rows(data, reading)
    make, pad = encoder(bayes, tokenizer, truncate), pad_token(bayes, tokenizer)
    while window := list(islice(stream, WINDOW)):
        encoded = make(window)
        out = predict_rows(
            bayes, encoded, draws, batch_size=batch_size, pad_token_id=pad, keep_draws=per_draw
        )
        for i, row in enumerate(window):
            k = encoded.num_choices(i)
            best = int(out.probs[i].argmax())
            names = row.choices or reading.labels
            result: dict[str, Any] = {"id": row.id, "prediction": best}
            result["choice"] = None if names is None else names[best]
            result["probs"] = out.probs[i, :k].tolist()
            for name in ("total", "aleatoric", "epistemic", "agreement", "standard_error"):
                value = float(getattr(out, name)[i])
                result[name] = None if value != value else value
            result["label"] = row.label
            if truncate is not None and encoded.truncated is not None:
                result["truncated"] = encoded.truncated[i]
            if out.draw_probs is not None:
                result["draw_probs"] = out.draw_probs[:, i, :k].tolist()
            yield result


def evaluations(
    bayes: Any,
    encoded: Any,
    *,
    dataset: str,
    draws: int,
    batch_size: int,
    pad: int,
    temperature: float | None = None,
    sigmas: dict[str, float] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Evaluation]:
    """Deterministic, optionally temperature-scaled, and TFB evaluations of labelled rows.

    ``sigmas``: a name for each sigma to sample at; default {"tfb": bayes.sigma}. At sigma = 0 it is
    one pass, the deterministic one, without epistemic uncertainty.
    """
    common: dict[str, Any] = {"batch_size": batch_size, "pad_token_id": pad, "progress": progress}
    mean = predict_rows(bayes, encoded, Draws.mean(), **common)
    labels = torch.tensor([-1 if y is None else y for y in encoded.labels])
    known = None if bool((labels < 0).any()) else labels
    found = [Evaluation("deterministic", dataset, mean.probs, known, total=mean.total, passes=1.0)]
    if temperature is not None:
        scaled = apply_temperature(mean.probs.clamp_min(1e-30).log(), temperature)
        entropy = torch.special.entr(scaled).sum(-1)
        found.append(
            Evaluation("temperature-scaled", dataset, scaled, known, total=entropy, passes=1.0)
        )
    passes = passes_per_row([len(ids) for ids in encoded.input_ids], draws, bayes.tail)
    for name, sigma in (sigmas or {"tfb": bayes.sigma}).items():
        if sigma == 0.0:  # there is nothing to draw
            found.append(
                Evaluation(name, dataset, mean.probs, known, total=mean.total, draws=1, passes=1.0)
            )
            continue
        chosen = Draws.antithetic(draws, sigma, seed=bayes.seed)
        p = predict_rows(bayes, encoded, chosen, **common)
        found.append(
            Evaluation(name, dataset, p.probs, known, total=p.total, aleatoric=p.aleatoric,
                       epistemic=p.epistemic, draws=draws, passes=passes)
        )  # fmt: skip
    return found
