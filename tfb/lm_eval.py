"""The model ``tfb`` of lm-evaluation-harness: log-probabilities of the posterior predictive.

    python -m tfb.lm_eval --model tfb --model_args pretrained=M,artifact=DIR,draws=10 --tasks ...

Tokenization, windows, truncation, stop sequences and chat templates are the harness's own (its
HFLM), so that at sigma = 0 results are those of model ``hf``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        f'tfb.lm_eval needs lm-evaluation-harness ({error}): pip install "tfb[lm-eval]"'
    ) from error

from tfb.adapters.artifact import load
from tfb.draws import Draws
from tfb.model import BayesianModel
from tfb.predictive import tempered
from tfb.sampling.forward import draws_that_fit, split
from tfb.sampling.state import evaluating
from tfb_kernels import NOISE_VERSION

log = logging.getLogger(__name__)
Encoded = tuple[list[int], list[int]]  # tokens of the context and of its continuation

_MOST = 1 << 28  # log-probabilities of one pass: 1 GiB of float32


@register_model("tfb")
class BayesianLM(HFLM):
    """A :class:`BayesianModel` as the harness sees a causal language model.

    A draw is one weight sample for all tokens of a continuation, and for all windows of a text:
    log-likelihoods are log mean_s prod_t p_s(token t | what is before it), p_s at the model's
    temperature. Greedy is a continuation whose every token is the most likely one of mean_s p_s, as
    ``bayes.generate`` writes it.
    """

    def __init__(
        self,
        pretrained: str | BayesianModel,
        artifact: str | Path | None = None,
        *,
        tokenizer: Any = None,
        draws: int | Draws = 10,
        draws_per_pass: int | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        device: str | None = None,
    ) -> None:
        """Load an artifact, or wrap a model.

        Args:
            pretrained: the base model's folder or hub name; or a BayesianModel, with ``tokenizer``.
            artifact: the folder written by ``tfb fit``, with the base model's name.
            tokenizer: a tokenizer or the name of one. Default: the base model's.
            draws: a number of antithetic draws at the artifact's sigma and seed, or Draws.
            draws_per_pass: most draws in one forward pass. None: as many as fit into memory.
            batch_size: rows in a pass, a number ("auto" is not supported).
            max_length: as for the harness's model ``hf``.
            add_bos_token: likewise.
            prefix_token_id: likewise.
            device: where to move the model. None, or a GPU that is not there: where it is.
        """
        if isinstance(pretrained, BayesianModel):
            bayes = pretrained
            if artifact is not None or tokenizer is None:
                raise ValueError("tfb: a BayesianModel comes with a tokenizer, without an artifact")
        else:
            if artifact is None:
                raise ValueError("tfb: artifact is missing; name the folder written by tfb fit")
            bayes = load(pretrained, artifact)
            tokenizer = pretrained if tokenizer is None else tokenizer
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"tfb: batch_size={batch_size!r} is not supported; give a number")
        self.bayes = bayes
        self.draws = bayes.draws(draws)
        self.draws_per_pass = draws_per_pass
        _check(bayes, self.draws)
        if device is not None and not torch.cuda.is_available() and device.startswith("cuda"):
            # The harness asks for "cuda:0" where its user asked for nothing.
            log.warning("no %s here: the model stays on %s", device, bayes.device)
        elif device is not None:
            bayes.model.to(device)
        super().__init__(
            # Not the model itself: HFLM would tie its weights again, which fails where a tied
            # output embedding carries an adapter.
            pretrained=SimpleNamespace(config=bayes.base.config, device=bayes.device),
            backend="causal",
            tokenizer=tokenizer,
            batch_size=int(batch_size),
            max_length=max_length,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
        )
        self._model = bayes.base

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside its results, and what was sampled."""
        posterior = {
            "sigma": sorted({abs(sigma) for sigma in self.draws.sigmas}),
            "temperature": self.bayes.config.temperature,
            "seed": self.draws.seed,
            "draws": len(self.draws),
            "noise_version": NOISE_VERSION,
        }
        return {**super().get_model_info(), "posterior": posterior}

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        by_draw, greedy = self.score([(context, rest) for _, context, rest in requests])
        found = list(zip(_averaged(by_draw).tolist(), greedy, strict=True))
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the texts' log-probabilities."""
        windows: list[Encoded] = []
        owner: list[int] = []
        for i, request in enumerate(requests):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += (new := [make_disjoint_window(pair) for pair in parts])
            owner += [i] * len(new)
        by_draw, _ = self.score(windows)
        whole = torch.zeros(len(self.draws), len(requests), dtype=torch.float64)
        whole.index_add_(1, torch.tensor(owner, dtype=torch.int64), by_draw)
        found: list[float] = _averaged(whole).tolist()
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    @torch.no_grad()
    def score(self, requests: Sequence[Encoded]) -> tuple[Tensor, list[bool]]:
        """Score continuations; those that differ in their last token alone share a row.

        Returns:
            The log-probability of each under each draw, [S, N] float64 on the CPU; and whether
            greedy decoding from the averaged distribution would write it.
        """
        shared: dict[tuple[int, ...], list[int]] = {}
        for i, (context, rest) in enumerate(requests):
            if not context or not rest or len(rest) > self.max_length:
                raise ValueError(
                    f"tfb: request {i} has {len(context)} tokens of context and {len(rest)} of "
                    f"continuation; expected at least 1 and 1, and at most {self.max_length}"
                )
            tokens = (context + rest)[-(self.max_length + 1) :]
            shared.setdefault(tuple(tokens[:-1]), []).append(i)
        if cut := sum(len(c) + len(rest) > self.max_length + 1 for c, rest in requests):
            told = "%d of %d requests are cut from the left to %d tokens"
            log.warning(told, cut, len(requests), self.max_length)
        by_draw = torch.zeros(len(self.draws), len(requests), dtype=torch.float64)
        greedy = [False] * len(requests)
        rows = sorted(shared, key=len, reverse=True)  # what is too large for memory fails first
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            asked = [(j, i) for j, row in enumerate(part) for i in shared[row]]
            targets = {i: torch.tensor(requests[i][1]) for _, i in asked}
            keep = max(map(len, targets.values()))
            mean, done = torch.tensor(-math.inf), 0
            for log_p in self._log_probabilities(part, keep):  # [s, B, keep, V]
                for j, i in asked:
                    own = log_p[:, j, -len(targets[i]) :]
                    target = targets[i].to(own.device).expand(len(own), -1)[..., None]
                    each = own.gather(-1, target).double().sum((1, 2))
                    by_draw[done : done + len(own), i] = each.cpu()
                done += len(log_p)
                mean = torch.logaddexp(mean.to(log_p), log_p.logsumexp(0))
            best = mean.argmax(-1).cpu()
            for j, i in asked:
                greedy[i] = best[j, -len(targets[i]) :].equal(targets[i])
        return by_draw, greedy

    def _log_probabilities(self, rows: Sequence[tuple[int, ...]], keep: int) -> Iterator[Tensor]:
        """Yield [s, B, keep, V] for parts of the draws, after the last ``keep`` tokens of a row."""
        bayes = self.bayes
        ids = [torch.tensor(row) for row in rows]
        mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        batch = {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask}
        inputs = bayes.inputs(batch, "full")
        last = dict.fromkeys(bayes.last_logits, keep)
        fit = draws_that_fit(bayes.base, len(self.draws), mask.numel())
        vocabulary = int(bayes.base.config.get_text_config().vocab_size)
        most = self.draws_per_pass or max(1, min(fit, _MOST // (len(rows) * keep * vocabulary)))
        with evaluating(bayes.model):
            for draws in split(self.draws, most, bayes.device):
                with bayes.sampling(draws):
                    logits = bayes.model(**inputs, **last).logits[:, -keep:]
                log_p = tempered(logits, bayes.config.temperature).log_softmax(-1)
                yield log_p.unflatten(0, (len(draws), -1))

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Return whole sequences [B, T + L]."""
        if not options.get("do_sample"):
            options |= {"do_sample": False}
            options.pop("temperature", None)  # greedy decoding has none
        batch = {"input_ids": context, "attention_mask": options.pop("attention_mask")}
        stopping = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], len(context))
        return self.bayes.generate(
            batch,
            self.draws,
            max_length=max_length,
            stopping_criteria=stopping,
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        ).sequences


def _check(bayes: BayesianModel, draws: Draws) -> None:
    if bayes.task != "CAUSAL_LM":
        raise ValueError(f"tfb: needs a causal language model, not {bayes.task}")
    if bayes.config.mode != "full":
        raise ValueError(
            f"tfb: sigma was searched with mode={bayes.config.mode!r}, noise at the last positions "
            "of a prompt only, which continuations of several tokens do not have; fit with "
            "mode 'full'"
        )
    if draws.noise != "weight":
        raise ValueError("tfb: needs weight noise, one weight sample for all tokens")


def _averaged(by_draw: Tensor) -> Tensor:
    """Compute log mean_s exp: [S, N] -> [N]."""
    return torch.logsumexp(by_draw, 0) - math.log(len(by_draw))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
