"""The lm-evaluation-harness model: the posterior predictive's log-probabilities, by definition."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import add_lora, causal, exact, llama, randomize

import tfb
from tfb import BayesianModel, Draws
from tfb.adapters.loading import load_tokenizer
from tfb.data.batching import batches
from tfb.data.encoding import RowEncoder
from tfb.data.readers import read_rows

pytest.importorskip("lm_eval", reason='lm-evaluation-harness is an extra: "tfb[lm-eval]"')

import lm_eval
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tfb.lm_eval import BayesianLM

SIGMA, SEED, DRAWS = 0.03, 3, 4
# float64 to the last operation, sums in another order: see test_convert.
EXACT = 1e-9
PAIRS = [
    ("how would you say fly in italian? Topic", " A"),
    ("how would you say fly in italian? Topic", " B"),
    ("Once upon a time", " there was a little girl"),
    ("Once upon a time ", "there was a little dog who"),
    ("", "Once upon a time"),
    ("The", "re"),
]


def model_of(shared: Path, *, double: bool = True) -> Any:
    base = shared / "models" / "stories260K"
    adapter = shared / "adapters" / "stories260K-clinc-domain"
    model = tfb.load_adapter(tfb.load_base(base, adapter), adapter)
    return exact(model) if double else model


@pytest.fixture(scope="module")
def bayes(shared: Path) -> BayesianModel:
    made = tfb.bayesianize(model_of(shared), seed=SEED)
    made.configure(sigma=SIGMA)
    return made


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> Any:
    return load_tokenizer(str(shared / "models" / "stories260K"))


def requests(arguments: list[Any]) -> list[Any]:
    """What the harness hands over, as far as a model looks at it."""
    return [SimpleNamespace(args=tuple(a), task_name="local") for a in arguments]


@torch.no_grad()
def by_definition(
    bayes: BayesianModel, draws: Draws, context: list[int], rest: list[int], T: float = 1.0
) -> tuple[torch.Tensor, bool]:
    """Each draw's log-probability of ``rest`` [S], one row and draw at a time, and is_greedy;
    every token's logits over T."""
    ids = torch.tensor([context + rest])
    log_p = []
    for s in range(len(draws)):
        with bayes.sampling(draws[s : s + 1]):
            log_p.append((bayes.model(input_ids=ids).logits[0] / T).log_softmax(-1))
    after = torch.stack(log_p)[:, len(context) - 1 : -1]  # [S, L, V]
    target = torch.tensor(rest)
    each = after.gather(-1, target.expand(len(draws), -1)[..., None])[..., 0].sum(-1)
    return each, bool((after.exp().mean(0).argmax(-1) == target).all())


def average(each: torch.Tensor) -> float:
    return float(each.exp().mean().log())


# --- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"batch_size": 4}, {"batch_size": 3, "draws_per_pass": 2}])
def test_loglikelihood_is_the_definition(
    bayes: BayesianModel, tokenizer: Any, how: dict[str, Any]
) -> None:
    """log of the mean of the draws' products, whatever shares a batch or a pass."""
    lm = BayesianLM(bayes, tokenizer=tokenizer, draws=DRAWS, **how)
    draws = Draws.antithetic(DRAWS, SIGMA, seed=SEED)
    for (context, rest), (found, greedy) in zip(
        PAIRS, lm.loglikelihood(requests(PAIRS), disable_tqdm=True), strict=True
    ):
        if context:
            pair = lm._encode_pair(context, rest)
        else:  # the harness begins with the token that begins every text
            pair = [lm.prefix_token_id], lm.tok_encode(rest, add_special_tokens=False)
        each, expected_greedy = by_definition(bayes, draws, *pair)
        assert found == pytest.approx(average(each), abs=EXACT)
        assert greedy == expected_greedy
        if len(pair[1]) > 1:  # not the mean of logarithms
            assert abs(found - float(each.mean())) > 1e-6


@pytest.mark.parametrize("T", [0.6, 1.8])
def test_the_temperature_divides_every_tokens_logits(
    bayes: BayesianModel, tokenizer: Any, T: float
) -> None:
    """log mean_s prod_t softmax(z_st / T)[token]; greedy as generate writes it at T; told of."""
    draws = Draws.antithetic(DRAWS, SIGMA, seed=SEED)
    bayes.configure(temperature=T)
    try:
        lm = BayesianLM(bayes, tokenizer=tokenizer, draws=DRAWS, batch_size=3, draws_per_pass=2)
        found = lm.loglikelihood(requests(PAIRS), disable_tqdm=True)
        (rolling,) = lm.loglikelihood_rolling(requests([("The end",)]))
        told = lm.get_model_info()["posterior"]
        prompt = lm.tok_encode("Once upon a time")
        out = bayes.generate(
            {"input_ids": torch.tensor([prompt])}, DRAWS, max_new_tokens=6, do_sample=False
        )
        written = out.sequences[0, len(prompt) :].tolist()
        _, [greedy] = lm.score([(prompt, written)])
    finally:
        bayes.configure(temperature=1.0)
    assert greedy and told["temperature"] == T
    for (context, rest), (value, best) in zip(PAIRS, found, strict=True):
        first, then = [lm.prefix_token_id], lm.tok_encode(rest, add_special_tokens=False)
        if context:
            first, then = lm._encode_pair(context, rest)
        each, expected_best = by_definition(bayes, draws, first, then, T)
        assert value == pytest.approx(average(each), abs=EXACT) and best == expected_best
        assert abs(value - average(by_definition(bayes, draws, first, then)[0])) > 1e-3
    each, _ = by_definition(bayes, draws, [lm.prefix_token_id], lm.tok_encode("The end"), T)
    assert rolling == pytest.approx(average(each), abs=EXACT)


def test_greedy_is_what_generate_writes(bayes: BayesianModel, tokenizer: Any) -> None:
    """What generate writes is a greedy continuation; with another last token it is not."""
    lm = BayesianLM(bayes, tokenizer=tokenizer, draws=DRAWS)
    prompt = lm.tok_encode("Once upon a time")
    out = bayes.generate(
        {"input_ids": torch.tensor([prompt])}, DRAWS, max_new_tokens=6, do_sample=False
    )
    written = out.sequences[0, len(prompt) :].tolist()
    other = [*written[:-1], (written[-1] + 1) % len(tokenizer)]
    _, greedy = lm.score([(prompt, written), (prompt, other), (prompt, written[:2])])
    assert greedy == [True, False, True]


def test_rolling_keeps_a_draw_through_all_windows(bayes: BayesianModel, tokenizer: Any) -> None:
    """Windows of 8 tokens: products over a text's windows come before the average."""
    lm = BayesianLM(bayes, tokenizer=tokenizer, draws=DRAWS, max_length=8, batch_size=2)
    draws = Draws.antithetic(DRAWS, SIGMA, seed=SEED)
    texts = ["Once upon a time there was a little girl named Lily.", "The end", ""]
    found = lm.loglikelihood_rolling(requests([(t,) for t in texts]))
    for text, value in zip(texts, found, strict=True):
        tokens = [lm.prefix_token_id, *lm.tok_encode(text)]
        total, start = torch.zeros(DRAWS, dtype=torch.float64), 1
        while start < len(tokens):
            stop = min(start + 8, len(tokens))
            # The first window predicts 8 tokens; later ones see as much as fits before theirs.
            first = 0 if start == 1 else stop - 9
            each, _ = by_definition(bayes, draws, tokens[first:start], tokens[start:stop])
            total += each
            start = stop
        assert value == pytest.approx(average(total), abs=EXACT)
    assert len(lm.tok_encode(texts[0])) > 8


# --- sigma = 0 is the harness's own model ---------------------------------------------------------


def test_without_noise_it_is_the_model_hf(
    shared: Path, bayes: BayesianModel, tokenizer: Any
) -> None:
    """Log-probabilities, greediness, rolling windows and generated texts, in float64."""
    hf = HFLM(pretrained=model_of(shared).get_base_model(), tokenizer=tokenizer, batch_size=2)
    ours = BayesianLM(bayes, tokenizer=tokenizer, draws=Draws.mean(), batch_size=2)
    for (found, greedy), (expected, its) in zip(
        ours.loglikelihood(requests(PAIRS)), hf.loglikelihood(requests(PAIRS)), strict=True
    ):
        assert found == pytest.approx(expected, abs=EXACT) and greedy == its
    texts = requests([("Once upon a time there was a little girl.",), ("The end",)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        hf.loglikelihood_rolling(texts), abs=EXACT
    )
    options = {"until": ["."], "max_gen_toks": 12}
    prompts = requests([("Once upon a time", options), ("Lily and her dog", options)])
    assert ours.generate_until(prompts) == hf.generate_until(prompts)


# --- generation -----------------------------------------------------------------------------------


def test_generate_until_is_the_librarys_generation(bayes: BayesianModel, tokenizer: Any) -> None:
    """Greedy from the averaged distribution, cut at the stop sequence."""
    lm = BayesianLM(bayes, tokenizer=tokenizer, draws=DRAWS, batch_size=2)
    prompts = ["Once upon a time", "Lily and her dog"]
    found = lm.generate_until(
        requests([(p, {"until": ["\n"], "max_gen_toks": 10}) for p in prompts])
    )
    for prompt, text in zip(prompts, found, strict=True):
        batch = tokenizer(prompt, return_tensors="pt")
        out = bayes.generate(batch, DRAWS, max_new_tokens=10, do_sample=False)
        new = out.sequences[0, batch["input_ids"].shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]
    with pytest.raises(ValueError, match=r"generate\(num_beams=2\)"):
        lm.generate_until(requests([("a", {"until": [], "max_gen_toks": 2, "num_beams": 2})]))


# --- a task ---------------------------------------------------------------------------------------


@pytest.fixture
def task(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A multiple-choice task over local rows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tmp_path / "rows.jsonl"
    lines = (shared / "data" / "clinc-domain" / "test.jsonl").read_text().splitlines()[::50][:40]
    rows.write_text("".join(line + "\n" for line in lines))
    (tmp_path / "clinc_local.yaml").write_text(
        json.dumps(  # JSON is YAML
            {
                "task": "clinc_local",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(rows)}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{prompt}}",
                "doc_to_choice": "choices",
                "doc_to_target": "label",
                "metric_list": [{"metric": "acc"}],
            }
        )
    )
    yield "clinc_local"


def test_figures_of_a_task_are_our_own(
    shared: Path, task: str, tokenizer: Any, tmp_path: Path
) -> None:
    """From an artifact and an argument string, as on the command line: the harness's probability of
    " A", which this tokenizer writes as two tokens where " B" is one, is the mean over draws of
    exp(tfb's score); without noise, normalized over the choices, it is tfb's prediction."""
    model = shared / "models" / "stories260K"
    made = tfb.bayesianize(model_of(shared, double=False), seed=SEED)
    made.configure(sigma=SIGMA)
    made.source = shared / "adapters" / "stories260K-clinc-domain"
    tfb.save(made, tmp_path / "artifact")
    results = lm_eval.simple_evaluate(
        model="tfb",
        model_args=f"pretrained={model},artifact={tmp_path / 'artifact'},draws={DRAWS}",
        tasks=[task],
        batch_size=8,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    encoded = RowEncoder(tokenizer)(read_rows(tmp_path / "rows.jsonl"))
    assert encoded.choice_ids is not None and None not in encoded.choice_ids
    hits = 0
    values: dict[int, list[float]] = {}
    for batch in batches(encoded, batch_size=8, pad_token_id=made.pad_token_id):
        # Not normalized over the choices in each draw: the harness compares them as they are.
        scores = made.logits(batch.model_inputs(), made.draws(DRAWS), batch.label_ids)
        assert batch.labels is not None
        chosen = scores.logsumexp(0) - math.log(DRAWS)
        hits += int((chosen.argmax(1) == batch.labels).sum())
        values |= dict(zip(batch.indices.tolist(), chosen.tolist(), strict=True))
    assert results["results"][task]["acc,none"] == hits / len(encoded)
    assert 0 < hits < len(encoded) == 40
    expected_info = {"sigma": [SIGMA], "temperature": 1.0, "seed": SEED, "draws": DRAWS}
    expected_info |= {"noise_version": 1}
    assert results["config"]["posterior"] == expected_info
    for sample in results["samples"][task]:
        found = [float(answer[0]) for answer in sample["filtered_resps"]]
        # float32 through five blocks, in batches of other widths.
        assert found == pytest.approx(values[sample["doc_id"]], abs=1e-3)
    hf = HFLM(pretrained=model_of(shared, double=True), tokenizer=tokenizer, batch_size=8)
    plain = lm_eval.simple_evaluate(
        model=hf,
        tasks=[task],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    made = tfb.bayesianize(model_of(shared, double=True))
    results = tfb.score(tmp_path / "rows.jsonl", made, tokenizer, draws=Draws.mean())
    for sample, ours in zip(plain["samples"][task], results, strict=True):
        scores = torch.tensor([float(answer[0]) for answer in sample["filtered_resps"]])
        assert ours["probs"] == pytest.approx(scores.double().softmax(0).tolist(), abs=1e-6)


# --- arguments ------------------------------------------------------------------------------------


def test_it_is_registered() -> None:
    assert get_model("tfb") is BayesianLM


def test_refusals(bayes: BayesianModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, *arguments: Any, **named: Any) -> None:
        with pytest.raises(ValueError, match=message):
            BayesianLM(*arguments, **named)

    refused("artifact is missing", "some/model")
    refused("comes with a tokenizer", bayes)
    refused("batch_size='auto' is not supported", bayes, tokenizer=tokenizer, batch_size="auto")
    refused("draws=3: antithetic draws come in pairs", bayes, tokenizer=tokenizer, draws=3)
    token = Draws.antithetic(2, SIGMA, noise="token")
    refused("needs weight noise", bayes, tokenizer=tokenizer, draws=token)
    bayes.configure(mode="tail", tail=1)
    refused("mode='tail', noise at the last positions", bayes, tokenizer=tokenizer)
    bayes.configure(mode="full")
    with monkeypatch.context() as patch:
        patch.setattr(bayes, "task", "SEQ_CLS")
        refused("a causal language model, not SEQ_CLS", bayes, tokenizer=tokenizer)
    lm = BayesianLM(bayes, tokenizer=tokenizer, draws=2, max_length=4)
    for pair in (([], [5]), ([5], []), ([5], [6] * 5)):
        with pytest.raises(ValueError, match=r"request 0 has \d tokens of context"):
            lm.score([pair])


def test_an_adapted_tied_output_embedding(tokenizer: Any) -> None:
    """HFLM ties weights as it starts, which such a model does not survive."""
    base = randomize(llama(vocab_size=512, tie_word_embeddings=True), 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        model = add_lora(base, **causal(target_modules=["v_proj", "lm_head"]))
    made = tfb.bayesianize(model)
    draws = Draws.antithetic(2, SIGMA)
    lm = BayesianLM(made, tokenizer=tokenizer, draws=draws, device="cuda:7")
    found, _ = lm.score([([5, 6], [7, 8])])
    expected, _ = by_definition(made, draws, [5, 6], [7, 8])
    assert found[:, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-4)  # float32


def test_long_contexts_are_cut_from_the_left_and_said_to_be(
    bayes: BayesianModel, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lm = BayesianLM(bayes, tokenizer=tokenizer, draws=2, max_length=6)
    tokens = list(range(10, 22))
    whole, _ = lm.score([(tokens[:-2], tokens[-2:])])
    assert "1 of 1 requests are cut from the left to 6 tokens" in caplog.text
    cut, _ = lm.score([(tokens[-7:-2], tokens[-2:])])
    assert torch.equal(whole, cut) and math.isfinite(float(whole.sum()))
