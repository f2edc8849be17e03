"""Whether the uncertainty of a written text tells right from wrong.

    python -m benchmarks.generation.study --record

Of every task and seed sigma and T are fitted to held-out answers. Each method then writes its own
answers to the same prompts, greedily, and its scores are judged by whether these are right, and by
whether the prompt was in scope. Texts that end too late are cut and so wrong.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional.classification import binary_calibration_error
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

import tfb
from benchmarks.environment import environment, results_folder, shared_folder
from benchmarks.generation.tasks import (
    ADAPTERS,
    TASKS,
    Example,
    Task,
    adapter_folder,
    exact,
    load_task,
)
from benchmarks.generation.tasks import tokens as tokens_of
from benchmarks.timing import CPU, Bench, elapsed, heading, record
from tfb.draws import Draws
from tfb.evaluation.metrics import BELOW_ONE, BINS, auroc, risk_coverage
from tfb.model import BayesianModel
from tfb.sampling.config import SamplingConfig
from tfb.sampling.generate import Generation

SUITE = "generation"
SEEDS = (0, 1, 2)
BATCH, NEW_TOKENS, TAIL = 100, 32, 1
RESAMPLES, ROUNDS = 500, 5
PLAIN = ("adapter", "log_prob")  # the strongest that everyone has without us

METHODS = {  # the key of each in ``Subject.configs``, and S
    "adapter": ("adapter", 1),
    "temperature": ("temperature", 1),
    "full, S=4": ("full", 4),
    "full, S=10": ("full", 10),
    "tail k=1, S=4": ("tail", 4),
    "tail k=1, S=10": ("tail", 10),
    "the paper's σ, S=10": ("paper", 10),
}


@dataclass(frozen=True)
class Subject:
    """An adapter of one task and seed, with its sampling configurations by name."""

    task: Task
    bayes: BayesianModel
    tokenizer: Any
    configs: dict[str, SamplingConfig]

    @classmethod
    def of(cls, task: Task, folder: Path) -> Subject:
        base = AutoModelForCausalLM.from_pretrained(str(task.base), dtype=torch.float32)
        bayes = tfb.bayesianize(PeftModel.from_pretrained(base, str(folder)))
        tokenizer = AutoTokenizer.from_pretrained(str(task.base))
        anchors = [
            prompts | {"label_ids": answers[:, None]}
            for prompts, answers in teacher_batches(task.anchors, tokenizer)
        ]
        configs = {"adapter": SamplingConfig(sigma=0.0)}
        options: dict[str, dict[str, Any]] = {
            "temperature": {"mode": "full", "sigma": 0.0},
            "full": {"mode": "full"},
            "tail": {"mode": "tail", "tail": TAIL},
            "paper": {"mode": "full", "objective": "max_variance"},
        }
        for name, how in options.items():
            configs[name] = tfb.fit_sigma(bayes, anchors, **how).config
        return cls(task, bayes, tokenizer, configs)

    def draws(self, method: str) -> Draws:
        """Configure the model for a method and return its draws."""
        name, S = METHODS[method]
        self.bayes.configure(**vars(self.configs[name]))
        return Draws.mean() if S == 1 else self.bayes.distinct_draws(S)


def batch_of(prompts: Sequence[str], tokenizer: Any) -> dict[str, Tensor]:
    return dict(tokenizer(list(prompts), padding=True, return_tensors="pt"))


def teacher_batches(
    examples: Sequence[Example], tokenizer: Any
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield batches of prompts, and the tokens [B, L] of their answers, -1 after the end."""
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        answers = [torch.tensor(tokens_of(e, tokenizer)[1]) for e in part]
        yield batch_of([e.prompt for e in part], tokenizer), pad_sequence(answers, True, -1)


# --- what a method writes, and how sure it is -----------------------------------------------------


def written(subject: Subject, prompts: Sequence[str], method: str) -> tuple[list[str], Scores]:
    """Return the texts that a method writes, and its scores [N] by name; larger is less sure."""
    draws = subject.draws(method)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts, found = [], []
    for start in range(0, len(order), BATCH):
        batch = batch_of([prompts[i] for i in order[start : start + BATCH]], subject.tokenizer)
        out = subject.bayes.generate(batch, draws, **GREEDY)
        texts += subject.tokenizer.batch_decode(out.new_tokens, skip_special_tokens=True)
        found.append(scores_of(subject.bayes, batch, draws, out))
    back = np.argsort(order)
    scores = {name: np.concatenate([f[name] for f in found])[back] for name in found[0]}
    return [texts[i] for i in back], scores


OF_DRAWS = ("epistemic", "epistemic_sum", "epistemic_max", "information", "disagreement")
Scores = dict[str, np.ndarray]
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


def scores_of(
    bayes: BayesianModel, batch: dict[str, Tensor], draws: Draws, out: Generation
) -> Scores:
    n = out.lengths
    found = {
        "log_prob": -out.log_probs.sum(1),
        "mean_log_prob": -out.log_probs.sum(1) / n,
        "least_log_prob": (-out.log_probs).amax(1),
        "total": out.total.sum(1) / n,
        "total_max": out.total.amax(1),
    }
    if len(draws) > 1:
        found |= {
            "epistemic": out.epistemic.sum(1) / n,
            "epistemic_sum": out.epistemic.sum(1),
            "epistemic_max": out.epistemic.amax(1),
            "information": information(bayes, batch, draws, out),
            "disagreement": 1 - agreement(bayes, batch, draws, out),
        }
    else:  # without noise there is one draw, which agrees with itself
        found |= dict.fromkeys(OF_DRAWS, torch.zeros(len(n)))
    return {name: value.double().numpy() for name, value in found.items()}


def information(
    bayes: BayesianModel, batch: dict[str, Tensor], draws: Draws, out: Generation
) -> Tensor:
    """Return log p(y) - mean_s log p_s(y) of the text y that was written, [B].

    Its mean over texts is the reverse mutual information (Malinin and Gales 2021).
    """
    position = torch.arange(out.new_tokens.shape[1])
    answer = out.new_tokens.masked_fill(position >= out.lengths[:, None], -1)
    each = bayes.answer_log_probs(batch, draws, answer, (bayes.config.temperature,))[..., 0]
    return out.log_probs.sum(1) - each.sum(-1).mean(0)


def agreement(
    bayes: BayesianModel, batch: dict[str, Tensor], draws: Draws, out: Generation
) -> Tensor:
    """Return the share of draws [B] that write the same text by themselves."""
    own = bayes.generate(batch, draws, per_draw=True, **GREEDY).new_tokens
    L = max(own.shape[-1], out.new_tokens.shape[-1])
    ours, theirs = (torch.nn.functional.pad(t, (0, L - t.shape[-1])) for t in (out.new_tokens, own))
    return (theirs == ours).all(-1).double().mean(0)


class Forced(LogitsProcessor):
    """Writes the right answers [B, L]; keeps how sure the model was, and whether it would have."""

    def __init__(self, answers: Tensor) -> None:
        self.answers, self.kept = answers, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        right = self.answers[:, len(self.kept) : len(self.kept) + 1]
        p = scores.double().softmax(-1)
        own = p.gather(-1, right.clamp_min(0))[:, 0]
        confidence, choice = p.max(-1)
        self.kept.append(torch.stack([own, confidence, (choice == right[:, 0]).double()], -1))
        return torch.full_like(scores, -torch.inf).scatter(-1, right.clamp_min(0), 0.0)


def forced(subject: Subject, method: str) -> dict[str, float]:
    """Return NLL and ECE of the tokens of the right answers, each given the right ones before."""
    draws, found = subject.draws(method), []
    for batch, answers in teacher_batches(subject.task.test, subject.tokenizer):
        force = Forced(answers)
        how: dict[str, Any] = GREEDY | {"max_new_tokens": answers.shape[1], "eos_token_id": None}
        subject.bayes.generate(batch, draws, logits_processor=[force], **how)
        found.append(torch.stack(force.kept, 1)[answers >= 0])
    own, confidence, right = torch.cat(found).unbind(-1)
    ece = binary_calibration_error(confidence.clamp_max(BELOW_ONE), right.int(), n_bins=BINS)
    return {"nll": float(-own.log().mean()), "ece": float(ece), "tokens": len(own)}


def costs(subject: Subject) -> dict[str, list[float]]:
    """Return the time of each method, and of the draws' own texts, in plain generations."""
    batch = batch_of([e.prompt for e in subject.task.test[:BATCH]], subject.tokenizer)
    bayes, found = subject.bayes, dict[str, list[float]]()
    adapted: Any = bayes.model

    def plain() -> object:
        return adapted.generate(**batch, **GREEDY)

    for _ in range(ROUNDS):
        unit = elapsed(plain, CPU)
        for method in METHODS:
            draws = subject.draws(method)
            calls = {method: lambda d=draws: bayes.generate(batch, d, **GREEDY)}
            if len(draws) > 1:
                calls[f"{method}, each"] = lambda d=draws: bayes.generate(
                    batch, d, per_draw=True, **GREEDY
                )
            for name, call in calls.items():
                found.setdefault(name, []).append(elapsed(call, CPU) / unit)
    return found


# --- judging --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """One method at one seed: which texts are right [N], and scores of prompts in and out of scope.

    Those in scope have N of each score, the others M.
    """

    right: np.ndarray
    scores: Scores
    shift: Scores


def judge(judged: Judged, name: str, rows: Any = slice(None), out: Any = slice(None)) -> Tensor:
    """Return [AUROC of wrong texts, AURC, AUROC of prompts out of scope] of a score."""
    score, right = torch.from_numpy(judged.scores[name][rows]), torch.from_numpy(judged.right[rows])
    shift = torch.from_numpy(judged.shift[name][out])
    wrong = auroc(score[~right], score[right])
    return torch.tensor([wrong, risk_coverage(score, right).aurc, auroc(shift, score)])


FIGURES = ("errors", "aurc", "shift")


def resampled(by_seed: Sequence[dict[str, Judged]], method: str, name: str) -> np.ndarray:
    """Return the figures of a score, means over seeds: of all rows, then of each resample.

    Resamples are the same rows for every score, so that figures can be compared in pairs.
    """
    generator, found = np.random.default_rng(0), []
    for number in range(1 + RESAMPLES):
        each = []
        for own in (one[method] for one in by_seed):
            N, M = len(own.right), len(own.shift[name])
            at: Any = slice(None), slice(None)
            if number:
                at = generator.integers(N, size=N), generator.integers(M, size=M)
            each.append(judge(own, name, *at))
        found.append(torch.stack(each).mean(0).numpy())
    return np.stack(found)  # [1 + RESAMPLES, 3]


def summary(found: np.ndarray, plain: np.ndarray) -> dict[str, dict[str, float]]:
    """Return each figure, and its change from ``PLAIN`` with 95 % limits.

    Limits are of a paired percentile bootstrap over rows, of these adapters.
    """
    change = found - plain
    low, high = np.percentile(change[1:], (2.5, 97.5), axis=0)
    return {
        figure: {
            "value": float(found[0, i]),
            "change": float(change[0, i]),
            "low": float(low[i]),
            "high": float(high[i]),
        }
        for i, figure in enumerate(FIGURES)
    }


def measure(task_name: str, adapters: Path, shared: Path, bench: Bench) -> None:
    """Record every method at every seed, and what scores tell over all seeds."""
    by_seed: list[dict[str, Judged]] = []
    for seed in SEEDS:
        task = load_task(task_name, shared, seed)
        subject = Subject.of(task, adapter_folder(adapters, task_name, seed))
        timed, found = costs(subject), dict[str, Judged]()
        for method in METHODS:
            texts, scores = written(subject, [e.prompt for e in task.test], method)
            right = np.array([exact(t, e.answer) for t, e in zip(texts, task.test, strict=True)])
            found[method] = Judged(right, scores, written(subject, task.shift, method)[1])
            config = subject.configs[METHODS[method][0]]
            point = {
                "task": task_name,
                "seed": seed,
                "method": method,
                "rows": len(task.test),
                "shift": len(task.shift),
                "anchors": len(task.anchors),
                "new_tokens": NEW_TOKENS,
            }
            values = {
                "exact": float(right.mean()),
                **forced(subject, method),
                "sigma": config.sigma,
                "temperature": config.temperature,
                "cost": median(timed[method]),
                "cost_with_each": median(timed[method]) + median(timed.get(f"{method}, each", [0])),
            }
            record(bench, heading(bench, SUITE, "texts", point) | values)
            print(point, values, flush=True)
        by_seed.append(found)
    plain = resampled(by_seed, *PLAIN)
    for method in METHODS:
        for name in by_seed[0][method].scores:
            point = {"task": task_name, "method": method, "score": name, "seeds": len(SEEDS)}
            point |= {"rows": len(by_seed[0][method].right), "resamples": RESAMPLES}
            found_all = summary(resampled(by_seed, method, name), plain)
            record(bench, heading(bench, SUITE, "scores", point) | found_all)
            print(point, found_all, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation.study", description=__doc__
    )
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of all adapters")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS)
    options = parser.parse_args()
    environment()  # of the sources that are loaded now; they may change while this runs
    bench = Bench(results=results_folder() if options.record else None)
    for task in options.task:
        measure(task, options.adapters, shared_folder(), bench)


if __name__ == "__main__":
    main()
