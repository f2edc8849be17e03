"""The front door: an adapter, its tokenizer and its posterior in one :class:`TfbModel`."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput

from tfb.adapters.artifact import SIDECAR, base_of, load, read_sidecar, save, sidecar_of
from tfb.adapters.bridge import LastLayers, LayerPredicate, bayesianize
from tfb.adapters.loading import (
    FILES,
    adapter_folder,
    base_config,
    check_device,
    class_names,
    load_adapter,
    load_base,
    local_folder,
    set_padding,
    to_device,
    tokenizer_of,
)
from tfb.data.batching import EncodedRows
from tfb.data.encoding import LABEL_TOKENS, check_label_tokens, check_truncate
from tfb.data.readers import read_rows
from tfb.data.rows import ANSWERS, Row, check_labels, fitted_task, prompt_columns, task_of
from tfb.draws import Draws, check_even
from tfb.evaluation.compare import Comparison
from tfb.evaluation.decisions import check_targets
from tfb.evaluation.metrics import Evaluation
from tfb.evaluation.report import facts, page_path, write_report
from tfb.model import BayesianModel
from tfb.predictive import Predictive, log_mean_probs
from tfb.sampling.adaptive import Adaptive
from tfb.sampling.config import SamplingConfig
from tfb.sampling.generate import Generation
from tfb.sampling.state import sampling_state
from tfb.scoring.evaluate import compare_label_tokens, evaluations, fit_decisions, predict_rows
from tfb.scoring.scorer import Result, row_encoder, row_format, score
from tfb.search.fit import fit_sigma
from tfb.search.loss import METRICS, MetricLike
from tfb.search.result import PredictiveFit

DRAWS = 10


@dataclass
class AveragedOutput(ModelOutput):
    """What ``m(**batch)`` returns.

    Attributes:
        loss: mean NLL of the labels, in nats, where there are any.
        logits: log of the averaged probabilities, [B, K] or [B, T, V].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class TfbModel(nn.Module):
    """An adapter with its tokenizer and posterior; made by ``from_pretrained`` or ``from_peft``.

    Called as a transformers model it returns the log of the averaged probabilities, so that
    transformers' ``pipeline`` and ``Trainer.predict`` average too. What it does not define, such as
    ``config`` or ``device``, is the base model's.

    Attributes:
        bayes: the :class:`BayesianModel` beneath: sigma, T, draws of every layer.
        tokenizer: the tokenizer.
        columns: the data's names of columns that were given last.
        fitted: what :meth:`fit` found; None before, and for an artifact without a record.
        extra: JSON values that the artifact keeps.
    """

    def __init__(
        self, bayes: BayesianModel, tokenizer: PreTrainedTokenizerBase, *, draws: int = DRAWS
    ) -> None:
        super().__init__()
        self.model = bayes.model
        self.bayes, self.tokenizer, self.draws = bayes, tokenizer, draws
        self.columns: dict[str, str] = {}
        self.fitted: PredictiveFit | None = None
        self.extra: dict[str, Any] = {}
        self._choose_label_tokens = False
        self.training = False  # whatever the PEFT model's mode, predictions are made in eval mode
        set_padding(bayes.base, tokenizer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "bayes":  # not made yet, as while unpickling
                raise
            return getattr(self.bayes.base, name)

    def __repr__(self) -> str:
        return f"TfbModel({self.config.model_type}, {self.bayes!r})"

    @property
    def draws(self) -> int:
        """Posterior draws of a prediction, an even number, unless it is given others."""
        return self._draws

    @draws.setter
    def draws(self, draws: int) -> None:
        check_even(draws)
        self._draws = draws

    # --- data -------------------------------------------------------------------------------------

    def _rows(
        self,
        data: Any,
        columns: Mapping[str, str] | None = None,
        *,
        labels: Sequence[str] | None = None,
        optional: Sequence[str] = (),
        task: str | None = None,
    ) -> list[Row]:
        names = self._named(columns, task)
        form = row_format(self.bayes, names, labels=labels, optional=optional, task=task)
        return read_rows(data, form)

    def _named(self, columns: Mapping[str, str] | None, task: str | None = None) -> dict[str, str]:
        """Return the given names of columns, and remembered ones that rows of a task have."""
        known = prompt_columns(self.columns) if task == ANSWERS else self.columns
        return known | dict(columns or {})

    def _encoded(
        self, rows: Sequence[Row], truncate: str | None, task: str | None = None
    ) -> EncodedRows:
        return row_encoder(self.bayes, self.tokenizer, truncate, task=task)(rows)

    # --- fit --------------------------------------------------------------------------------------

    def fit(
        self,
        data: Any,
        *,
        text: str | None = None,
        label: str | None = None,
        prompt: str | None = None,
        choices: str | None = None,
        messages: str | None = None,
        answer: str | None = None,
        id: str | None = None,
        truncate: str | None = None,
        target_error: float | None = None,
        coverage: float | None = None,
        calibration: Any = None,
        **search: Any,
    ) -> PredictiveFit:
        """Fit sigma and T to held-out labelled rows, and with them, where asked for, decisions.

        Args:
            data: a path or pattern (JSONL, JSON, CSV, Parquet, Arrow), a DataFrame, a
                ``datasets.Dataset``, or a list of dicts.
            text: the data's name of the column with a classifier's text; as the names below it is
                remembered for later calls.
            label: of the column with the right class or choice, an index or its name.
            prompt: of the column that choices continue.
            choices: of the column with the choices.
            messages: of the column with a chat in place of a prompt.
            answer: of the column with the correct text after a prompt, in place of choices. Name it
                in every call.
            id: of the column with the rows' ids.
            truncate: "left" or "right": the side on which rows that are too long are cut.
            target_error: the share of wrong answers to allow among rows that are not abstained
                from; see :class:`tfb.evaluation.decisions.Decisions`.
            coverage: the share of rows whose prediction set is to hold the right answer.
            calibration: rows for these two, other ones than ``data``. Default: a random half of
                ``data``, which sigma and T then do not see.
            search: options of :func:`tfb.fit_sigma`, such as sigma=0 (T alone),
                temperature=False (sigma alone), objective, mode and tail, draws, progress.

        Returns:
            The fit; ``print`` gives the verdict.

        Raises:
            RowError: a row that cannot be used, or lacks its label; named by file and line.
            ValueError: options out of range, or rows that no search can work with.
            SearchError: the objective has no answer on these rows.
        """
        named = {"text": text, "label": label, "prompt": prompt, "choices": choices}
        named |= {"messages": messages, "answer": answer, "id": id}
        check_truncate(truncate)
        decide = target_error is not None or coverage is not None
        if decide:
            check_targets(target_error, coverage)
        elif calibration is not None:
            raise ValueError("calibration: give target_error or coverage, which are fitted to it")
        given = {ours: theirs for ours, theirs in named.items() if theirs is not None}
        task = fitted_task(self.bayes.task, given)
        columns = self._named(given, task)
        rows, held_out = self._rows(data, columns, task=task), []
        task = task_of(rows, task)
        check_fit_rows(rows, task, search.get("metric", "nll"), *_LABELLED, decide=decide)
        if calibration is not None:
            held_out = self._rows(calibration, columns)
            _check_apart(rows, held_out)
        elif decide:
            rows, held_out = _halves(rows, self.bayes.config.seed)
        check_labels(held_out, *_LABELLED)
        notes = self._find_label_tokens(rows, truncate)
        apart = self._encoded(held_out, truncate) if decide else None  # refused before the search
        found = fit_sigma(self.bayes, self._encoded(rows, truncate, task), **search)
        self.columns, self.fitted = columns, replace(found, notes=(*notes, *found.notes))
        self.columns.pop("answer", None)  # no other call reads it
        self.extra = {"anchors": Path(data).name} if isinstance(data, str | Path) else {}
        if apart is not None:
            targets: dict[str, Any] = {"target_error": target_error, "coverage": coverage}
            fit_decisions(self.bayes, apart, **targets, draws=self.draws)
        return self.fitted

    def _find_label_tokens(self, rows: Sequence[Row], truncate: str | None) -> list[str]:
        """Choose the tokens by which choices are scored, unless that was said; return a note."""
        asked = self._choose_label_tokens and self.bayes.task != "SEQ_CLS"
        if not asked or any(row.label is None for row in rows):
            return []
        compared = compare_label_tokens(self.bayes, rows, self.tokenizer, truncate=truncate)
        if compared is None:
            return []
        nll, told = compared
        if told:
            self.bayes.label_tokens = min(nll, key=nll.__getitem__)
        chosen = self.bayes.label_tokens
        figures = " and ".join(f"{value:.3g} with {name!r}" for name, value in nll.items())
        doubt = "" if told else ", which does not tell; give label_tokens as it was trained"
        return [f"label_tokens={chosen!r}: the adapter's NLL is {figures}{doubt}"]

    # --- predictions ------------------------------------------------------------------------------

    def predict(
        self,
        inputs: Any,
        draws: int | Draws | Adaptive | str | None = None,
        *,
        choices: Sequence[str] | None = None,
        truncate: str | None = None,
        **options: Any,
    ) -> Predictive:
        """Predict texts, rows or a batch.

        Args:
            inputs: texts, or prompts of a language model; anything else that holds rows; or a
                tokenizer's batch [B, T].
            draws: as for :meth:`BayesianModel.predict`; default: ``m.draws``.
            choices: a language model's answers to all prompts, in place of the rows' own and of
                ``labels`` of the model.
            truncate: "left" or "right": the side on which rows that are too long are cut.
            options: with a batch, those of :meth:`BayesianModel.predict`; else of
                :func:`tfb.scoring.evaluate.predict_rows`.

        Raises:
            RowError: a row that cannot be used.
            ValueError: sigma is not set, or draws or options out of range.
        """
        chosen = self.draws if draws is None else draws
        batch = isinstance(inputs, Mapping) and isinstance(inputs.get("input_ids"), Tensor)
        if choices is not None and (batch or self.bayes.task == "SEQ_CLS"):
            raise ValueError("choices: a batch has label_ids, and a classifier its own classes")
        if batch and truncate is not None:
            raise ValueError("truncate: a batch is tokenized already; cut it there")
        if batch:
            return self.bayes.predict(inputs, chosen, **options)
        data = [inputs] if isinstance(inputs, str) else inputs
        rows = self._rows(data, labels=choices, optional=["label"])
        if choices is not None:
            rows = [replace(row, choices=tuple(choices), label=None) for row in rows]
        return predict_rows(self.bayes, self._encoded(rows, truncate), chosen, **options)

    def score(
        self,
        data: Any,
        draws: int | Draws | Adaptive | str | None = None,
        *,
        stream: bool = False,
        columns: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Any:
        """Score rows into a ``pandas.DataFrame``, one row for each.

        Args:
            data: anything that holds rows, as for :meth:`fit`.
            draws: as for :meth:`BayesianModel.predict`, "auto" included; default: ``m.draws``.
            stream: return an iterator of dicts, for more rows than fit into memory.
            columns: for our names of columns the data's; default: those given to :meth:`fit`.
            options: those of :func:`tfb.score` (batch_size, per_draw, truncate, errors; generate,
                max_new_tokens and stop to write text behind prompts).

        Raises:
            RowError: a row that cannot be scored, unless ``errors="rows"``.
            ValueError: settings that cannot work.
        """
        found: Iterator[Result] = score(
            data,
            self.bayes,
            self.tokenizer,
            draws=self.draws if draws is None else draws,
            columns=self._named(columns),
            **options,
        )
        if stream:
            return found
        import pandas as pd

        return pd.DataFrame(list(found))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> AveragedOutput:
        """Average the draws as a transformers model: logits are log mean_s p_s.

        Inside ``sampling`` its draws are averaged, else ``m.draws`` at the model's sigma.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T].
            token_type_ids: [B, T].
            position_ids: [B, T].
            decoder_input_ids: [B, T'].
            labels: [B] classes, or token ids [B, T], -100 where there is none.
            others: more arguments of the base model's forward.

        Raises:
            ValueError: sigma is not set, or was searched for tails, which scores at every token
                do not have; or gradients are asked for.
        """
        if self.training and torch.is_grad_enabled():
            raise ValueError(
                "TfbModel predicts and cannot be trained: train the PEFT model, then tfb.from_peft"
            )
        if input_ids is None or (asked := sorted(_NOT_AVERAGED & others.keys())):
            what = "input_ids are missing" if input_ids is None else f"{asked[0]} is not averaged"
            raise ValueError(f"{what}; call m.bayes.model for what is not an average of draws")
        bayes, state = self.bayes, sampling_state(self.bayes.owner)
        draws = bayes.distinct_draws(self.draws) if state is None else state.draws
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "decoder_input_ids": decoder_input_ids,
            **others,
        }
        batch = {k: v for k, v in given.items() if v is not None and k not in _IGNORED}
        if bayes.task == "SEQ_CLS":
            scores = log_mean_probs(bayes.logits(batch, draws), bayes.config.temperature)
            return AveragedOutput(_nll(scores, labels), scores)
        if bayes.config.mode == "tail" and bayes.sigma:
            raise ValueError(
                "sigma was searched with mode='tail', and logits of all tokens have noise at all "
                "of them: fit with mode='full', or use predict or score"
            )
        if labels is not None and bayes.task == "SEQ_2_SEQ_LM" and decoder_input_ids is None:
            shifted = bayes.base.prepare_decoder_input_ids_from_labels(labels=labels)
            batch["decoder_input_ids"] = shifted
        scores = bayes.log_probs(batch, draws)
        shift = int(bayes.task == "CAUSAL_LM")  # a token is predicted one position before
        targets = labels if labels is None else labels[:, shift:]
        return AveragedOutput(_nll(scores[:, : scores.shape[1] - shift], targets), scores)

    def generate(
        self, inputs: Any = None, draws: int | Draws | None = None, **options: Any
    ) -> Tensor | Generation:
        """Continue prompts with the averaged predictive, called as transformers' ``generate``.

        For text in and text out, chats included: :meth:`score` with ``generate=True``.

        Args:
            inputs: input ids [B, T] or a tokenizer's batch; or None, with input_ids among the
                options.
            draws: draws that decode side by side; default: ``m.draws``.
            options: a batch (input_ids, attention_mask) and options of ``generate``.

        Returns:
            Token ids [B, T + L]; with ``return_dict_in_generate=True`` a :class:`Generation`, with
            the uncertainty of every token and of the whole text.

        Raises:
            ValueError: what :meth:`BayesianModel.generate` refuses.
        """
        options |= inputs if isinstance(inputs, Mapping) else {}
        batch = {name: options.pop(name) for name in _PROMPT if options.get(name) is not None}
        if isinstance(inputs, Tensor):
            batch["input_ids"] = inputs
        if not isinstance(batch.get("input_ids"), Tensor):
            raise TypeError(
                "generate: needs token ids; write m.generate(**m.tokenizer(texts, "
                "return_tensors='pt', padding=True)), or m.score(texts, generate=True) to have text"
            )
        ids, pad = batch["input_ids"], self.tokenizer.pad_token_id
        if "attention_mask" not in batch and pad not in (None, self.tokenizer.eos_token_id):
            batch["attention_mask"] = ids.ne(pad)  # as transformers does
        config = options.get("generation_config")
        whole = options.pop("return_dict_in_generate", None)
        whole = getattr(config, "return_dict_in_generate", False) if whole is None else whole
        chosen = self.bayes.distinct_draws(self.draws if draws is None else draws)
        found = self.bayes.generate(batch, chosen, **{"tokenizer": self.tokenizer, **options})
        return found if whole else found.sequences

    @contextlib.contextmanager
    def sampling(self, draws: int | Draws | None = None) -> Iterator[TfbModel]:
        """Average these draws in every ``m(**batch)`` of this context.

        Args:
            draws: a number of antithetic draws, or :class:`Draws`; default: ``m.draws``.
        """
        with self.bayes.sampling(self.bayes.draws(self.draws if draws is None else draws)):
            yield self

    @property
    def methods(self) -> Mapping[str, SamplingConfig]:
        """What :meth:`evaluate` compares the adapter with, simplest first, the model's own last."""
        fitted, own = self.fitted, self.bayes.config
        if fitted is None or replace(fitted.config, seed=own.seed) != own:
            return {"TFB + T": own}
        return fitted.methods

    # --- evidence ---------------------------------------------------------------------------------

    def evaluate(
        self,
        data: Any,
        draws: int | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        truncate: str | None = None,
        batch_size: int = 50,
    ) -> Comparison:
        """Compare the adapter, a temperature, TFB and TFB with T on labelled rows.

        Args:
            data: labelled rows that nothing was fitted to.
            draws: antithetic draws of a row; default: ``m.draws``.
            columns: for our names of columns the data's; default: those given to :meth:`fit`.
            truncate: "left" or "right": the side on which rows that are too long are cut.
            batch_size: most rows of a batch.

        Returns:
            Metrics and changes with 95 % intervals, and a recommendation; prints as a table.

        Raises:
            RowError: a row that cannot be used, or lacks its label.
            ValueError: sigma is not set.
        """
        return Comparison.of(self._evaluations(data, draws, columns, truncate, batch_size))

    def report(
        self,
        data: Any,
        output: str | Path,
        *,
        shift: Any = None,
        draws: int | None = None,
        columns: Mapping[str, str] | None = None,
        truncate: str | None = None,
        batch_size: int = 50,
        overwrite: bool = False,
    ) -> Path:
        """Write one self-contained HTML page: what the fit changed, on which rows, how surely.

        Args:
            data: labelled rows that nothing was fitted to.
            output: an .html file, or a folder for ``index.html``.
            shift: rows of another kind, whose labels are not used.
            draws: antithetic draws of a row; default: ``m.draws``.
            columns: for our names of columns the data's; default: those given to :meth:`fit`.
            truncate: "left" or "right": the side on which rows that are too long are cut.
            batch_size: most rows of a batch.
            overwrite: replace an earlier page.

        Returns:
            The page.

        Raises:
            ImportError: matplotlib is missing.
            RowError: a row that cannot be used, or lacks its label.
            ValueError: sigma is not set, or a page in use.
        """
        page_path(output, overwrite=overwrite)
        options = (draws, columns, truncate, batch_size)
        adapter, *others, ours = self._evaluations(data, *options)
        return write_report(
            output,
            [adapter, ours, *others],
            None if self.fitted is None else self.fitted.to_dict(),
            title="The adapter and its predictive",
            ood=() if shift is None else self._evaluations(shift, *options, labelled=False),
            facts=facts(sidecar_of(self.bayes, self.fitted), draws or self.draws),
            overwrite=overwrite,
        )

    def _evaluations(
        self,
        data: Any,
        draws: int | None,
        columns: Mapping[str, str] | None,
        truncate: str | None,
        batch_size: int,
        *,
        labelled: bool = True,
    ) -> list[Evaluation]:
        check_even(chosen := self.draws if draws is None else draws)
        self.bayes.draws(chosen)  # refuses a sigma that is not set
        rows = self._rows(data, columns, optional=[] if labelled else ["label"])
        if labelled:
            check_labels(rows, *_LABELLED)
        encoded = self._encoded(rows, truncate)
        if self.fitted is not None and encoded.content_hash == self.fitted.anchor_hash:
            warnings.warn(
                "these are the rows that sigma and T were fitted to, where every method looks "
                "better than on new ones; give held-out rows",
                stacklevel=3,
            )
        found = evaluations(
            self.bayes,
            encoded,
            dataset=Path(data).stem if isinstance(data, str | Path) else "rows",
            draws=chosen,
            batch_size=batch_size,
            configs=self.methods,
        )
        names = row_format(self.bayes).labels
        return [replace(e, rows=rows, classes=names) for e in found]

    # --- artifacts --------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, **unused: Any) -> Path:
        """Write adapter, posterior, tokenizer and record to a new folder, all of it or nothing.

        Args:
            folder: absent or empty.
            unused: options of transformers' method of this name, which do not apply.

        Returns:
            The folder, which :func:`from_pretrained` and plain PEFT load.

        Raises:
            ArtifactError: the folder holds something, or sigma is not set.
        """
        extra = self.extra | ({"columns": self.columns} if self.columns else {})
        return save(self.bayes, folder, fit=self.fitted, tokenizer=self.tokenizer, **extra)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the artifact to the hub, with its model card.

        Args:
            repo_id: "me/name"; made if it is not there.
            private: of a new repository.
            token: of the hub; default: the one that is logged in.

        Returns:
            The commit's address.

        Raises:
            ArtifactError: sigma is not set.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            made = self.save_pretrained(Path(folder) / "artifact")
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=made).commit_url)


class TfbConfig(PreTrainedConfig):
    """Stands for :class:`TfbModel` where transformers lists what its pipelines take."""

    model_type = "tfb"


# Else every pipeline says that it does not support the model, and goes on.
for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):
    kind.register(TfbConfig, TfbModel)

# Arguments of a forward pass: without meaning for an average, and those that ask for more.
_IGNORED = ("return_dict", "use_cache")
_NOT_AVERAGED = {"inputs_embeds", "past_key_values", "logits_to_keep"}
_NOT_AVERAGED |= {"output_attentions", "output_hidden_states"}
_LABELLED = "every row needs one here", "say label=NAME"
_PROMPT = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


def check_fit_rows(
    rows: Sequence[Row],
    task: str | None,
    metric: MetricLike,
    needed: str,
    remedy: str,
    *,
    decide: bool,
) -> None:
    """Refuse rows that lack what a fit needs of them.

    Args:
        rows: the rows.
        task: what they are, see :class:`RowFormat`.
        metric: of the search.
        needed: see :func:`check_labels`.
        remedy: see :func:`check_labels`.
        decide: whether a target error or coverage is fitted too.

    Raises:
        RowError: a row without a label that the metric needs.
        ValueError: answers, of which no decision can be fitted.
    """
    if task == ANSWERS:
        if decide:
            raise ValueError(
                "a target error or coverage needs rows with choices or classes, not answers"
            )
    elif isinstance(metric, str) and metric in METRICS and METRICS[metric].labelled:
        check_labels(rows, needed, remedy)


def _check_apart(rows: Sequence[Row], held_out: Sequence[Row]) -> None:
    known = {row.question for row in rows}
    if shared := [row.source for row in held_out if row.question in known]:
        raise ValueError(
            f"calibration: {len(shared)} of its rows are among those that sigma and T are fitted "
            f"to, where errors are fewer than on new ones (first: {shared[0]}); give other rows"
        )


def _halves(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Return two random halves of rows; equal ones are in the same."""
    asked = list(dict.fromkeys(row.question for row in rows))
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(seed)).tolist()
    first = {asked[i] for i in order[len(asked) // 2 :]}
    both = [[row for row in rows if (row.question in first) == side] for side in (True, False)]
    return both[0], both[1]


def _nll(scores: Tensor, labels: Tensor | None) -> Tensor | None:
    """Return the mean NLL of log-probabilities [..., K]; labels of -100 do not count."""
    if labels is None:
        return None
    flat = labels.to(scores.device, torch.int64).flatten()
    return nn.functional.nll_loss(scores.flatten(0, -2), flat)


def from_pretrained(
    path: str | Path,
    base: str | Path | nn.Module | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | None = None,
    labels: Sequence[str] | None = None,
    label_tokens: str | None = None,
    layers: str | LayerPredicate | LastLayers | None = None,
    seed: int = 0,
    draws: int | None = None,
) -> TfbModel:
    """Load a finished LoRA adapter, or an artifact of :meth:`TfbModel.save_pretrained`.

    Args:
        path: a local folder or a hub name.
        base: the base model, a folder, a hub name or the model itself. Default: the one that the
            adapter was trained, or the artifact fitted on.
        tokenizer: default: the adapter's own, else the base model's.
        device: such as "cpu" or "cuda:0". Default: a GPU if there is one.
        labels: names of the classes in the head's order; of a language model the choices of rows
            that bring none. Default: the artifact's, else those of the base's configuration.
        label_tokens: the tokens of a choice that are scored, "all" or "last". Default: the
            artifact's; for an adapter :meth:`TfbModel.fit` finds out.
        layers: which adapted modules get noise, see :func:`tfb.bayesianize`; of an adapter only.
        seed: of the draws; of an adapter only.
        draws: posterior draws of a prediction, an even number. Default: 10, or as many as an
            artifact's decisions were calibrated with.

    Raises:
        AdapterError: no adapter there, one that does not fit its base, or an unsupported kind.
        ArtifactError: an artifact that is damaged, of another version, or of another base model.
        ValueError: a device, labels or layers that cannot be.
    """
    check_device(device)
    check_even(DRAWS if draws is None else draws)
    check_label_tokens(label_tokens or LABEL_TOKENS[0])
    folder = local_folder(path, FILES)
    sidecar = read_sidecar(folder) if (folder / SIDECAR).is_file() else None
    model = base if isinstance(base, nn.Module) else base_of(folder, base)
    if isinstance(model, str):
        base_config(model, folder)  # names a base that is not there
    if tokenizer is None:
        name = model if isinstance(model, str) else str(getattr(model, "name_or_path", folder))
        tokenizer = tokenizer_of(folder, name)
    if sidecar is not None:
        if layers is not None or seed != 0:
            raise ValueError("layers, seed: an artifact has its own; load the adapter to change it")
        bayes = load(model, folder)
    else:
        source = adapter_folder(folder)
        inner = load_base(model, source) if isinstance(model, str) else model
        bayes = bayesianize(load_adapter(inner, source), layers=layers, seed=seed, source=source)
    if labels is not None and list(labels) != list(bayes.labels or ()):
        bayes.labels = class_names(bayes.task, bayes.base.config, labels, bayes.labels)
        bayes.decisions = None  # these were made for other choices
    to_device(bayes.model, device)
    if draws is None:
        draws = DRAWS if bayes.decisions is None else bayes.decisions.draws
    m = TfbModel(bayes, tokenizer, draws=draws)
    if sidecar is None:
        m._choose_label_tokens = label_tokens is None
    else:
        _resume(m, sidecar)
    if label_tokens not in (None, bayes.label_tokens):
        bayes.label_tokens, bayes.decisions = label_tokens, None
    return m


def _resume(m: TfbModel, sidecar: Mapping[str, Any]) -> None:
    """Give a model what its artifact recorded."""
    m.fitted = None if sidecar.get("fit") is None else PredictiveFit.from_dict(sidecar["fit"])
    m.extra = dict(sidecar.get("extra") or {})
    m.columns = dict(m.extra.pop("columns", None) or {})


def from_peft(
    peft_model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapter: str = "default",
    labels: Sequence[str] | None = None,
    label_tokens: str | None = None,
    layers: str | LayerPredicate | LastLayers | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> TfbModel:
    """Take a PEFT model whose LoRA adapter is trained, in place; see :func:`tfb.bayesianize`.

    Args:
        peft_model: a ``peft.PeftModel``.
        tokenizer: its tokenizer.
        adapter: the adapter's name.
        labels: as for :func:`from_pretrained`.
        label_tokens: as for :func:`from_pretrained`.
        layers: as for :func:`from_pretrained`.
        seed: of the draws.
        draws: posterior draws of a prediction, an even number.

    Raises:
        AdapterError: what :func:`tfb.bayesianize` refuses.
        ValueError: labels or layers that cannot be.
    """
    check_even(draws)
    bayes = bayesianize(
        peft_model,
        adapter,
        layers,
        seed,
        labels=labels,
        label_tokens=label_tokens or LABEL_TOKENS[0],
    )
    m = TfbModel(bayes, tokenizer, draws=draws)
    m._choose_label_tokens = label_tokens is None
    return m
