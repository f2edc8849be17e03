"""Predictions over an encoded set, as tensors in the rows' order, and what is measured by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tfb.data.batching import EncodedRows, batches
from tfb.data.encoding import LABEL_TOKENS
from tfb.data.readers import read_rows
from tfb.data.rows import Row, RowError, fitted_task, task_of
from tfb.draws import Draws, check_even
from tfb.evaluation.decisions import Decisions, check_targets
from tfb.evaluation.metrics import Evaluation, nll_of_rows
from tfb.model import BayesianModel
from tfb.predictive import Predictive
from tfb.sampling.adaptive import Adaptive
from tfb.sampling.config import SamplingConfig
from tfb.scoring.scorer import NOT_FINITE, row_encoder, row_format
from tfb.search.loss import passes_per_row


def encode(
    bayes: BayesianModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str] | None = None,
    truncate: str | None = None,
) -> EncodedRows:
    """Read and encode rows for the model's task, by its ``label_tokens`` and ``labels``.

    Args:
        bayes: the model.
        data: anything that holds rows, see :func:`tfb.data.readers.read_rows`.
        tokenizer: the model's.
        columns: for our names of columns those of the data, where they differ; with "answer",
            rows are prompts with an answer, for a fit.
        truncate: "left" or "right": the side on which rows that are too long are cut.

    Raises:
        RowError: a row that the task, the tokenizer or the model cannot take.
        ValueError: another number of labels than the model has classes.
    """
    task = fitted_task(bayes.task, columns or {})
    rows = read_rows(data, row_format(bayes, columns, task=task))
    return row_encoder(bayes, tokenizer, truncate, task=task_of(rows, task))(rows)


def predict_rows(
    bayes: BayesianModel,
    encoded: EncodedRows,
    draws: int | Draws | Adaptive | str = 10,
    *,
    batch_size: int = 50,
    keep_draws: bool = False,
    temperature: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Predictive:
    """Predict every encoded row; in float32 on the CPU.

    Classes that a row does not have, where another has more, are zeros.

    Args:
        bayes: the model.
        encoded: the rows.
        draws: as for ``bayes.predict``; at sigma = 0 a number is one draw, unless kept.
        batch_size: most rows of a batch.
        keep_draws: keep each draw's probabilities.
        temperature: T of the likelihood. None: as configured.
        progress: gets the number of rows just finished.

    Raises:
        ValueError: the model returned NaN or Inf; names the row.
    """
    chosen = draws
    if not isinstance(draws, str | Adaptive):
        chosen = bayes.distinct_draws(draws, kept=keep_draws)
    found: list[tuple[Tensor, Predictive]] = []
    for batch in batches(encoded, batch_size=batch_size, pad_token_id=bayes.pad_token_id):
        p = bayes.predict(
            batch.model_inputs(),
            chosen,
            label_ids=batch.label_ids,
            keep_draws=keep_draws,
            temperature=temperature,
        )
        if not bool(p.probs.isfinite().all()):
            bad = int(batch.indices[(~p.probs.isfinite()).any(-1).cpu()][0])
            raise ValueError(f"row {encoded.ids[bad]}: {NOT_FINITE}")
        found.append((batch.indices, p.to_cpu()))
        if progress is not None:
            progress(len(batch))
    return Predictive.gather(found)


def evaluations(
    bayes: BayesianModel,
    encoded: EncodedRows,
    *,
    dataset: str,
    draws: int,
    batch_size: int,
    configs: Mapping[str, SamplingConfig] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Evaluation]:
    """Evaluate rows by the deterministic adapter (sigma = 0, T = 1), and by the predictive.

    At sigma = 0 that is one pass, without epistemic uncertainty. The model's configuration stays.

    Args:
        bayes: the model.
        encoded: the rows, all or none of them labelled.
        dataset: their name.
        draws: antithetic draws of each row.
        batch_size: most rows of a batch.
        configs: sigma and T to evaluate, by name; None: {"tfb": bayes.config}.
        progress: gets the number of rows just finished, once for each evaluation that runs.

    Raises:
        ValueError: a sigma that is not set, or odd draws.
    """
    own = bayes.config
    methods = {"tfb": own} if configs is None else configs
    for name, config in methods.items():
        if config.sigma is None:
            raise ValueError(f"{name}: sigma is not set; fit it, or configure it")
    check_even(draws)
    labels = None if None in encoded.labels else torch.tensor(encoded.labels)
    cost = passes_per_row([len(ids) for ids in encoded.input_ids], draws, own.tail)

    def evaluation(name: str, sigma: float, temperature: float) -> Evaluation:
        # The model keeps its configuration: other threads may be using it.
        noise = Draws.antithetic(draws, sigma, seed=own.seed) if sigma else Draws.mean()
        p = predict_rows(
            bayes,
            encoded,
            noise,
            batch_size=batch_size,
            temperature=temperature,
            progress=progress,
        )
        found = Evaluation(name, dataset, p.probs, labels, total=p.total, draws=len(noise))
        return replace(found, epistemic=p.epistemic if sigma else None, passes=cost if sigma else 1)

    adapter = evaluation("adapter", 0.0, 1.0)
    found = [adapter]
    for name, config in methods.items():
        at = (config.sigma or 0.0, config.temperature)
        same = at == (0.0, 1.0)  # there is nothing to draw and nothing to divide by
        found.append(replace(adapter, name=name) if same else evaluation(name, *at))
    return found


def fit_decisions(
    bayes: BayesianModel,
    encoded: EncodedRows,
    *,
    target_error: float | None = None,
    coverage: float | None = None,
    draws: int = 10,
) -> Decisions:
    """Calibrate abstention and prediction sets on labelled rows; the model keeps them.

    Args:
        bayes: the model, fitted on other rows.
        encoded: the calibration rows.
        target_error: largest share of wrong predictions among accepted rows.
        coverage: least chance that a prediction set holds the right class.
        draws: antithetic draws of each row; later predictions should have as many.

    Raises:
        ValueError: a row without a label, or targets that cannot be.
    """
    check_targets(target_error, coverage)
    if None in encoded.labels:
        raise ValueError("calibration: every row needs a label")
    found = Decisions.calibrated(
        predict_rows(bayes, encoded, draws).probs,
        torch.tensor(encoded.labels),
        target_error=target_error,
        coverage=coverage,
        draws=draws,
    )
    bayes.decisions = found
    return found


def compare_label_tokens(
    bayes: BayesianModel,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    truncate: str | None = None,
    batch_size: int = 50,
) -> tuple[dict[str, float], bool] | None:
    """Compare the adapter, at T = 1, by each of ``LABEL_TOKENS`` on labelled choice rows.

    Returns:
        The NLL by each, in nats, and whether that tells which one the adapter was trained for. It
        does not where they are within two standard errors, where neither is better than a guess,
        or where no more than half of the labels occur: then a model that always says the same may
        have the lower NLL. None where both give the same tokens, or one cannot be used.
    """
    found: dict[str, EncodedRows] = {}
    for name in LABEL_TOKENS:
        try:
            found[name] = row_encoder(bayes, tokenizer, truncate, name)(rows)
        except RowError:
            return None
    if len({encoded.content_hash for encoded in found.values()}) == 1:
        return None
    losses: dict[str, Tensor] = {}
    for name, encoded in found.items():
        p = predict_rows(bayes, encoded, Draws.mean(), batch_size=batch_size, temperature=1.0)
        losses[name] = nll_of_rows(p.probs.double(), torch.tensor(encoded.labels))
    all_, last = (losses[name] for name in LABEL_TOKENS)
    guess = sum(math.log(len(row.choices or ())) for row in rows) / len(rows)
    unsure = 2 * float((all_ - last).std()) / math.sqrt(len(rows)) if len(rows) > 1 else math.inf
    figures = {name: float(loss.mean()) for name, loss in losses.items()}
    told = abs(figures["all"] - figures["last"]) > unsure and min(figures.values()) < guess
    most = max(len(row.choices or ()) for row in rows)
    return figures, told and len({row.label for row in rows}) > most / 2
