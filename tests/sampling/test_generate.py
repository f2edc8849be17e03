"""Generation: several weight samples decode side by side, next tokens from their average."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from support.architectures import CAUSAL, DRAWS, KINDS, varying_angles
from support.models import make_batch, relative
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)
from transformers.cache_utils import DynamicLayer

import tfb
from tfb import Draws
from tfb.sampling import generate
from tfb.sampling.generate import DrawsLayer, Recorder

NEW = 6
EXACT = 1e-10
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def prompts() -> dict[str, Tensor]:
    return {k: v for k, v in make_batch(7, 4, 6).items() if k != "position_ids"}


def endless(kind: str, **how: Any) -> Any:
    """A Bayesian model that no token ends."""
    bayes = tfb.bayesianize(KINDS[kind].build(), **how)
    bayes.base.generation_config.eos_token_id = None
    return bayes


@pytest.mark.parametrize("kind", CAUSAL)
def test_greedy_is_the_average_of_full_passes(kind: str) -> None:
    """Against a loop that recomputes everything with predict at every step; uncertainties too."""
    for layers in (None, tfb.last_layers(1)):
        bayes = endless(kind, layers=layers)
        found = bayes.generate(prompts(), DRAWS, **OPTIONS)
        batch = prompts()
        for step in range(NEW):
            p = bayes.predict(batch, DRAWS)
            for name in ("total", "aleatoric", "epistemic"):
                mine, theirs = getattr(found, name)[:, step], getattr(p, name)
                assert float((mine - theirs).abs().max()) < EXACT
            log_p = p.confidence.log()
            assert float((found.log_probs[:, step] - log_p).abs().max()) < EXACT
            one = torch.ones(3, 1, dtype=torch.int64)
            batch = {
                "input_ids": torch.cat([batch["input_ids"], p.prediction[:, None]], 1),
                "attention_mask": torch.cat([batch["attention_mask"], one], 1),
            }
        assert found.sequences.equal(batch["input_ids"])


# --- tail mode ----------------------------------------------------------------------------------


OTHERS = [
    (kind, *how) for kind in ("llama", "mistral") for how in ((1, False), (None, True), (1, True))
]


@pytest.mark.parametrize(
    ("kind", "layers", "per_draw"), [*((kind, None, False) for kind in CAUSAL), *OTHERS]
)
def test_tail_mode_is_the_average_of_growing_tails(
    kind: str, layers: int | None, per_draw: bool
) -> None:
    """Noise at the prompt's last k tokens and at every new one is predict's tail of k + t tokens,
    whose draws lie side by side under a mask; rows of 4, 6 and 7 tokens, so k = 5 is all of one."""
    bayes = endless(kind, layers=None if layers is None else tfb.last_layers(layers))
    for k in (5, 1):
        bayes.configure(mode="tail", tail=k)
        found = bayes.generate(prompts(), DRAWS, per_draw=per_draw, **OPTIONS)
        for s in range(len(DRAWS) if per_draw else 1):
            draws = DRAWS[s : s + 1] if per_draw else DRAWS
            sequences = found.sequences[s] if per_draw else found.sequences
            for step in range(NEW):
                seen, width = sequences[:, : 7 + step], 7 + step
                mask = torch.cat([prompts()["attention_mask"], torch.ones(3, step)], 1).long()
                batch = {"input_ids": seen, "attention_mask": mask}
                p = bayes.predict(batch, draws, mode="tail", tail=k + step)
                assert p.prediction.equal(sequences[:, width])
                for name in ("total", "aleatoric"):
                    value = getattr(found, name)[s] if per_draw else getattr(found, name)
                    assert float((value[:, step] - getattr(p, name)).abs().max()) < EXACT


def test_a_tail_of_all_tokens_is_full_mode() -> None:
    bayes = endless("llama")
    full = bayes.generate(prompts(), DRAWS, **OPTIONS)
    for k, same in ((1, False), (7, True), (99, True)):
        tail = bayes.configure(mode="tail", tail=k).generate(prompts(), DRAWS, **OPTIONS)
        assert tail.total.equal(full.total) == same


def test_tail_mode_reads_a_prompt_once() -> None:
    """The first block sees B rows of T - k tokens, then S B rows (B below the noise) of k and 1."""
    for layers, rows in ((None, 3 * len(DRAWS)), (tfb.last_layers(1), 3)):
        bayes = endless("llama", layers=layers).configure(mode="tail", tail=2)
        found: list[tuple[int, ...]] = []
        bayes.base.model.layers[0].self_attn.register_forward_pre_hook(
            lambda m, a, k, found=found: found.append(tuple(k["hidden_states"].shape[:2])),
            with_kwargs=True,
        )
        bayes.generate(prompts(), DRAWS, use_cache=False, **OPTIONS)  # trainers save that
        assert found == [(3, 5), (rows, 2), *[(rows, 1)] * (NEW - 1)]


def test_tail_mode_refuses_angles_that_change_while_it_writes() -> None:
    """Beyond its limit of 8 tokens longrope turns by others, and transformers reads all again."""
    bayes = tfb.bayesianize(varying_angles("longrope").build()).configure(mode="tail", tail=1)
    bayes.generate(prompts(), DRAWS, **OPTIONS | {"max_new_tokens": 1})
    for options in ({"max_new_tokens": 2}, {"max_new_tokens": None, "max_length": 9}):
        with pytest.raises(ValueError, match="mode='tail': rotary angles of this model"):
            bayes.generate(prompts(), DRAWS, **OPTIONS | options)


def test_tail_mode_without_noise_is_the_models_own_generate() -> None:
    """Also several sequences a prompt, in transformers' order."""
    bayes = endless("llama").configure(mode="tail", tail=2)
    options = OPTIONS | {"do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(0)
    expected = bayes.model.generate(**prompts(), **options)
    torch.manual_seed(0)
    assert bayes.generate(prompts(), Draws.iid(3, 0.0), **options).sequences.equal(expected)


# --- no noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 0.7, "top_k": 9}, {"repetition_penalty": 1.7}],
)
@pytest.mark.parametrize("kind", CAUSAL)
def test_sigma_zero_is_the_models_own_generate(kind: str, options: dict[str, Any]) -> None:
    """Greedy, sampled with the same random state, and with a processor that looks at signs."""
    bayes = tfb.bayesianize(KINDS[kind].build())
    arguments = OPTIONS | options
    torch.manual_seed(0)
    expected = bayes.model.generate(**prompts(), **arguments)
    torch.manual_seed(0)
    assert bayes.generate(prompts(), Draws.mean(), **arguments).sequences.equal(expected)
    torch.manual_seed(0)
    again = bayes.generate(prompts(), Draws.iid(3, 0.0), **arguments)
    assert again.sequences.equal(expected)
    assert float(again.epistemic.abs().max()) < EXACT


# --- temperature --------------------------------------------------------------------------------


class Record(LogitsProcessor):
    """Keeps the scores that reach a processor and leaves them as they are."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores.double())
        return scores

    def error(self, step: int, probs: Tensor) -> float:
        """The largest difference from ``probs``, over what rounding of the scores explains.

        transformers rounds them to float32, by up to |score| 2^-24; relative to a probability
        that counts twice, in its numerator and in what all are divided by.
        """
        scores = self.scores[step]
        budget = 2 * float(scores.abs().max()) * 2.0**-24
        return float((scores.softmax(-1) - probs).abs().max()) / budget


def unpadded() -> dict[str, Tensor]:
    """Prompts of one length, which a plain call needs no positions for."""
    return {k: v for k, v in make_batch(5, 5, 5).items() if k != "position_ids"}


@torch.no_grad()
def next_token(bayes: Any, ids: Tensor, draws: Draws, T: float) -> Tensor:
    """softmax(z_s / T) of every draw [S, B, V], from the model's own logits of whole rows."""
    with bayes.sampling(draws):
        logits = bayes.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
    return (logits / T).softmax(-1).unflatten(0, (len(draws), -1))


@pytest.mark.parametrize("T", [0.4, 2.5])
@pytest.mark.parametrize("kind", CAUSAL)
def test_the_temperature_divides_the_logits_of_every_token(kind: str, T: float) -> None:
    """Scores are those of mean_s softmax(z_s / T), as are the tokens and the uncertainties."""
    bayes, record = endless(kind).configure(temperature=T), Record()
    processors = LogitsProcessorList([record])
    found = bayes.generate(unpadded(), DRAWS, logits_processor=processors, **OPTIONS)
    ids, apart = unpadded()["input_ids"], []
    for step in range(NEW):
        p = next_token(bayes, ids, DRAWS, T)  # [S, B, V]
        mean = p.mean(0)
        assert record.error(step, mean) < 1
        total, aleatoric = (torch.special.entr(q).sum(-1) for q in (mean, p))
        wanted = (total, aleatoric.mean(0), total - aleatoric.mean(0))
        for name, value in zip(("total", "aleatoric", "epistemic"), wanted, strict=True):
            assert float((getattr(found, name)[:, step] - value).abs().max()) < EXACT
        untempered = next_token(bayes, ids, DRAWS, 1.0).mean(0)
        apart.append(float((untempered - mean).abs().max()))
        ids = torch.cat([ids, mean.argmax(-1)[:, None]], 1)
    assert found.sequences.equal(ids)
    assert min(apart) > 1e-3  # T = 1 would not have passed


@pytest.mark.parametrize(
    ("T", "own", "together"), [(4.0, None, 4.0), (0.1, None, 0.1), (4.0, 0.1, 0.4)]
)
@pytest.mark.parametrize("kind", CAUSAL)
def test_without_noise_it_is_the_temperature_of_transformers(
    kind: str, T: float, own: float | None, together: float
) -> None:
    """With the same random state; one given to generate comes on top."""
    bayes = endless(kind).configure(temperature=T)
    options = OPTIONS | {"do_sample": True, "top_k": 9}
    given = {} if own is None else {"temperature": own}
    for draws in (Draws.mean(), Draws.iid(3, 0.0)):
        torch.manual_seed(0)
        expected = bayes.model.generate(**prompts(), temperature=together, **options)
        torch.manual_seed(0)
        assert bayes.generate(prompts(), draws, **options, **given).sequences.equal(expected)


def test_each_draw_has_the_temperature() -> None:
    """per_draw: the scores of S B rows are those of softmax(z_s / T); at sigma = 0 what is drawn
    is what transformers draws for as many prompts at its temperature."""
    T, S, record = 2.5, len(DRAWS), Record()
    bayes = endless("llama").configure(temperature=T)
    found = bayes.generate(
        unpadded(), DRAWS, per_draw=True, logits_processor=LogitsProcessorList([record]), **OPTIONS
    )
    seen: list[list[Tensor]] = [[] for _ in range(NEW)]
    for s in range(S):
        ids = unpadded()["input_ids"]
        for step in range(NEW):
            p = next_token(bayes, ids, DRAWS[s : s + 1], T)[0]
            seen[step].append(p)
            ids = torch.cat([ids, p.argmax(-1)[:, None]], 1)
        assert found.sequences[s].equal(ids)
    for step in range(NEW):
        assert record.error(step, torch.cat(seen[step])) < 1
    options = OPTIONS | {"do_sample": True}
    repeated = {k: v.repeat(3, 1) for k, v in prompts().items()}
    torch.manual_seed(0)
    expected = bayes.model.generate(**repeated, temperature=T, **options)
    torch.manual_seed(0)
    drawn = bayes.generate(prompts(), Draws.iid(3, 0.0), per_draw=True, **options)
    assert drawn.sequences.flatten(0, 1).equal(expected)
    assert len({tuple(row.tolist()) for row in expected}) > 3  # drawn, not one row three times


def test_a_model_in_few_bits_divides_in_float32() -> None:
    """As softmax is taken; bfloat16 would round z / T to 8 bits."""
    bayes = tfb.bayesianize(KINDS["llama"].build().bfloat16()).configure(temperature=1.3)
    logits: list[Tensor] = []
    head = bayes.base.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: logits.append(out[:, -1]))
    for per_draw in (False, True):
        record = Record()
        options = OPTIONS | {"max_new_tokens": 1, "logits_processor": [record]}
        bayes.generate(unpadded(), DRAWS[:1], per_draw=per_draw, **options)
        assert logits[-1].dtype == torch.bfloat16
        expected = (logits[-1].double() / 1.3).softmax(-1)
        # A handful of float32 roundings of about a score's size; one to bfloat16 is 2^15 of them.
        assert record.error(0, expected) < 16


# --- draws and rows -----------------------------------------------------------------------------


def test_continuations_of_each_draw() -> None:
    """per_draw: S B continuations, each that of generating with this draw alone."""
    bayes = endless("llama", layers=tfb.last_layers(2))
    found = bayes.generate(prompts(), DRAWS, per_draw=True, **OPTIONS)
    assert found.sequences.shape == (len(DRAWS), 3, 7 + NEW)
    for s in range(len(DRAWS)):
        alone = bayes.generate(prompts(), DRAWS[s : s + 1], **OPTIONS)
        assert found.sequences[s].equal(alone.sequences) and alone.epistemic.eq(0).all()
        for name in ("log_probs", "total", "aleatoric"):
            assert relative(getattr(found, name)[s], getattr(alone, name)) < EXACT
    assert len({tuple(x.flatten().tolist()) for x in found.sequences}) > 1


def test_a_row_does_not_see_its_neighbours() -> None:
    bayes = endless("llama")
    whole = bayes.generate(prompts(), DRAWS, **OPTIONS)
    for row, length in enumerate((7, 4, 6)):
        own = {k: v[row : row + 1, 7 - length :] for k, v in prompts().items()}
        alone = bayes.generate(own, DRAWS, **OPTIONS)
        assert alone.sequences[0, length:].equal(whole.sequences[row, 7:])
        assert relative(alone.total[0], whole.total[row]) < EXACT


def test_a_token_that_transformers_takes_back_is_not_kept() -> None:
    """Where it asks a step late whether all rows are done, as on an Apple GPU (5.23)."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4 * 2, 1, 9, generator=g)  # 3 steps, S = 4, B = 2
    ids = torch.tensor([[7, 7, 1, 2, 0], [7, 7, 3, 2, 0]])  # T = 2, both rows end with 2

    def steps(count: int) -> Recorder:
        recorder = Recorder(4, 1.0, torch.tensor([2]), [])
        for step in range(count):
            recorder.average(logits[step])
            done = recorder(ids[:, : 3 + step], None)
        assert done.all()
        return recorder

    on_time, late = (steps(count).generation(ids[:, :4], 0) for count in (2, 3))
    for name in ("sequences", "lengths", "ended", "log_probs", "total", "aleatoric"):
        assert getattr(late, name).equal(getattr(on_time, name))
    assert late.new_tokens.tolist() == [[1, 2], [3, 2]] and late.lengths.tolist() == [2, 2]


def test_ended_rows_are_padded_and_certain() -> None:
    """After a row's end token there is padding, and no uncertainty is claimed."""
    bayes = endless("llama")
    free = bayes.generate(prompts(), DRAWS, **OPTIONS)
    end = int(free.sequences[1, 8])  # the second row's second new token
    found = bayes.generate(prompts(), DRAWS, eos_token_id=end, **OPTIONS)
    new = found.sequences[:, 7:]
    for row in range(3):
        ends = (new[row] == end).nonzero()
        stop = int(ends[0]) + 1 if len(ends) else new.shape[1]
        assert bool((new[row, stop:] == 0).all())
        assert bool((found.total[row, stop:] == 0).all())
        assert bool((found.total[row, :stop] > 0).all())
    assert int((new[1] != 0).sum()) <= 2
    known = (new != 0).sum(1)
    assert found.lengths.equal(known) and found.ended.equal((new == end).any(1))
    assert found.new_tokens.equal(new)
    assert relative(-found.sequence_uncertainty, found.log_probs.sum(1)) < EXACT


def word_tokenizer() -> Any:
    """A token for every id of the tiny models, as a word of three characters."""
    words = {"abcdef": 0} | {f"t{i:02}": i for i in range(1, 64)}  # the first is transformers' own
    made = Tokenizer(models.WordLevel(words, unk_token="abcdef"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="abcdef")


@pytest.mark.parametrize("ends", [True, False])
def test_stop_strings_and_criteria_end_rows(ends: bool) -> None:
    """The row that wrote one is padded and certain from there on, with and without end tokens."""
    bayes = endless("llama")
    free = bayes.generate(prompts(), DRAWS, **OPTIONS)
    named, watched = int(free.new_tokens[1, 2]), int(free.new_tokens[0, 1])
    options = OPTIONS | ({"eos_token_id": 62} if ends else {})
    assert not free.new_tokens.eq(62).any()

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return input_ids[:, -1] == watched

    found = bayes.generate(
        prompts(),
        DRAWS,
        stop_strings=[f"t{named:02}"],
        tokenizer=word_tokenizer(),
        stopping_criteria=[Stop()],
        **options,
    )
    for row in range(3):
        new = free.new_tokens[row].tolist()
        stops = [i for i, token in enumerate(new) if token in (named, watched)]
        length = stops[0] + 1 if stops else NEW
        assert found.lengths[row] == length and bool(found.ended[row]) == bool(stops)
        after = found.new_tokens.shape[1] - length  # all rows may have ended
        assert found.new_tokens[row].tolist() == new[:length] + [0] * after
        assert relative(found.total[row, :length], free.total[row, :length]) < EXACT
        assert found.log_probs[row, length:].eq(0).all()
    assert found.lengths.unique().numel() > 1


def test_a_stop_string_is_part_of_the_text() -> None:
    """What the prompt begins of it does not count."""
    bayes, tokenizer = endless("llama"), word_tokenizer()
    free = bayes.generate(prompts(), DRAWS, **OPTIONS)
    last, first, second = free.sequences[1, 6:9].tolist()
    for stop, length in ((f"t{last:02} t{first:02}", NEW), (f"t{first:02} t{second:02}", 2)):
        found = bayes.generate(
            prompts(), DRAWS, stop_strings=[stop], tokenizer=tokenizer, **OPTIONS
        )
        assert int(found.lengths[1]) == length


def test_blocks_below_the_noise_keep_one_cache() -> None:
    """The first block's keys are held for B rows, the last block's for S B."""
    bayes = endless("llama", layers=tfb.last_layers(1))
    found = []
    block = bayes.base.model.layers
    handles = [
        block[i].self_attn.register_forward_pre_hook(
            lambda m, a, k: found.append((m.layer_idx, len(k["hidden_states"]))), with_kwargs=True
        )
        for i in (0, 2)
    ]
    bayes.generate(prompts(), DRAWS, **OPTIONS)
    for handle in handles:
        handle.remove()
    assert found == [(0, 3), (2, 3 * len(DRAWS))] * NEW


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt2"])
def test_static_caches_follow_the_fan_out(kind: str, layers: str) -> None:
    """S * B rows of keys above the noise, B below; full and windowed layers."""
    bayes = endless(kind, layers=tfb.last_layers(1) if layers == "last" else None)
    dynamic = bayes.generate(prompts(), DRAWS, **OPTIONS)
    static = bayes.generate(prompts(), DRAWS, cache_implementation="static", **OPTIONS)
    assert static.sequences.equal(dynamic.sequences)
    assert static.epistemic is not None and dynamic.epistemic is not None
    assert float((static.epistemic - dynamic.epistemic).abs().max()) < EXACT
    assert float(dynamic.epistemic.max()) > 1e-3
    each = bayes.generate(prompts(), DRAWS, per_draw=True, cache_implementation="static", **OPTIONS)
    assert each.sequences.equal(
        bayes.generate(prompts(), DRAWS, per_draw=True, **OPTIONS).sequences
    )


def test_generate_options_pass_through() -> None:
    """A dictionary result and several sequences a prompt, as transformers has them."""
    bayes = endless("llama")
    plain = bayes.generate(prompts(), DRAWS, **OPTIONS)
    named = bayes.generate(prompts(), DRAWS, return_dict_in_generate=True, **OPTIONS)
    assert named.sequences.equal(plain.sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, r"num_beams=3\): beam search"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"cache_implementation": "quantized"}, "expected one of dynamic, static"),
        ({"cache_implementation": "static", "prefill_chunk_size": 2}, "prefill_chunk_size"),
        ({"penalty_alpha": 0.5}, "penalty_alpha"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"dola_layers": "low"}, "dola_layers"),
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"guidance_scale": 1.5}, r"guidance_scale=\.\.\.\): guidance runs a second prompt"),
        ({"streamer": object()}, r"streamer=\.\.\.\): how sure a continuation is"),
        ({"stop_strings": ["a"]}, r"stop_strings=\.\.\.\): needs the tokenizer"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    bayes = tfb.bayesianize(KINDS["llama"].build())
    with pytest.raises(ValueError, match=message):
        bayes.generate(prompts(), DRAWS, **OPTIONS | options)


def test_other_refusals() -> None:
    bayes = tfb.bayesianize(KINDS["llama"].build())
    with pytest.raises(ValueError, match="weight noise"):
        bayes.generate(prompts(), Draws.iid(2, 0.1, noise="token"), **OPTIONS)
    with pytest.raises(ValueError, match="sigma is not set"):
        bayes.generate(prompts(), 4, **OPTIONS)
    bayes.configure(mode="tail", tail=1)
    with pytest.raises(ValueError, match=r"cache_implementation='static'\): in tail mode"):
        bayes.generate(prompts(), DRAWS, cache_implementation="static", **OPTIONS)
    classifier = tfb.bayesianize(KINDS["llama-classifier"].build())
    with pytest.raises(ValueError, match="causal language model"):
        classifier.generate(prompts(), DRAWS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 3}, r"num_beams=3\): beam search"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
    ],
)
def test_a_generation_config_is_looked_into(settings: dict[str, Any], message: str) -> None:
    """What an argument may not say, a configuration may not either; nor the model's own beams."""
    bayes = tfb.bayesianize(KINDS["llama"].build())
    config = GenerationConfig(max_new_tokens=NEW, pad_token_id=0, **settings)
    with pytest.raises(ValueError, match=message):
        bayes.generate(prompts(), DRAWS, generation_config=config)
    bayes.base.generation_config.guidance_scale = 1.5
    with pytest.raises(ValueError, match="guidance_scale"):
        bayes.generate(prompts(), DRAWS, **OPTIONS)
    bayes.base.generation_config.guidance_scale = None
    bayes.base.generation_config.num_beams = 3
    with pytest.raises(ValueError, match=r"num_beams=3\): beam search"):
        bayes.generate(prompts(), DRAWS, **OPTIONS)
    assert bayes.generate(prompts(), DRAWS, num_beams=1, **OPTIONS).sequences.shape[0] == 3


def end_of_second_row(bayes: Any) -> int:
    """The second row's second new token."""
    return int(bayes.generate(prompts(), DRAWS, **OPTIONS).sequences[1, 8])


@pytest.mark.parametrize("where", ["argument", "list", "configuration", "model"])
def test_end_tokens_are_found_where_generate_finds_them(where: str) -> None:
    bayes = endless("llama")
    end = end_of_second_row(bayes)
    options: dict[str, Any] = dict(OPTIONS)
    if where == "argument":
        options["eos_token_id"] = end
    elif where == "list":
        options["eos_token_id"] = [1, end]
    elif where == "configuration":
        options = {"generation_config": GenerationConfig(eos_token_id=end, **OPTIONS)}
    else:
        bayes.base.generation_config.eos_token_id = end
    found = bayes.generate(prompts(), DRAWS, **options)
    assert found.sequences[1, 9:].eq(0).all()
    for name in ("total", "aleatoric", "epistemic"):
        value = getattr(found, name)
        assert bool((value[1, :2] > 0).all()) and bool((value[1, 2:] == 0).all())
    assert bool((found.total[:, 0] > 0).all())


def test_end_tokens_can_be_taken_away() -> None:
    """eos_token_id=None as an argument outranks the model's."""
    bayes = endless("llama")
    free = bayes.generate(prompts(), DRAWS, **OPTIONS)
    bayes.base.generation_config.eos_token_id = int(free.sequences[1, 8])
    found = bayes.generate(prompts(), DRAWS, eos_token_id=None, **OPTIONS)
    assert found.sequences.equal(free.sequences) and found.total.equal(free.total)


def test_draws_end_by_themselves() -> None:
    """per_draw: a draw whose row has ended is padded while others go on."""
    bayes = endless("llama")
    free = bayes.generate(prompts(), DRAWS, per_draw=True, **OPTIONS).sequences
    end = int(free[2, 1, 9])
    found = bayes.generate(prompts(), DRAWS, per_draw=True, eos_token_id=end, **OPTIONS).sequences
    for s in range(len(DRAWS)):
        for row in range(3):
            new, mine = free[s, row, 7:].tolist(), found[s, row, 7:].tolist()
            stop = new.index(end) + 1 if end in new else NEW
            assert mine == new[:stop] + [0] * (len(mine) - stop)


@pytest.mark.parametrize("layers", ["all", "last", "head"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma3"])
def test_continuations_of_each_draw_elsewhere(kind: str, layers: str) -> None:
    """With windows, fused projections, and noise in the head alone."""
    k = {"all": 3, "last": 1, "head": 0}[layers]
    bayes = tfb.bayesianize(KINDS[kind].build("lm_head"), layers=tfb.last_layers(k))
    bayes.base.generation_config.eos_token_id = None
    found = bayes.generate(prompts(), DRAWS, per_draw=True, **OPTIONS)
    for s in range(len(DRAWS)):
        alone = bayes.generate(prompts(), DRAWS[s : s + 1], **OPTIONS)
        assert found.sequences[s].equal(alone.sequences)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_does_not_change_a_row(kind: str) -> None:
    """On the left, on the right, more than needed; with positions given or not; in any order."""
    bayes = endless(kind)
    expected = bayes.generate(prompts(), DRAWS, **OPTIONS)
    for pad in ("left", "right"):
        for width in (7, 10):
            batch = make_batch(7, 4, 6, pad=pad, width=width, extras=("position_ids",))
            plain = {k: v for k, v in batch.items() if k != "position_ids"}
            for given in (batch, plain):
                found = bayes.generate(given, DRAWS, **OPTIONS)
                assert found.sequences[:, -NEW:].equal(expected.sequences[:, -NEW:])
                assert relative(found.total, expected.total) < EXACT
    order = [2, 0, 1, 0]
    turned = bayes.generate({k: v[order] for k, v in prompts().items()}, DRAWS, **OPTIONS)
    assert turned.sequences.equal(expected.sequences[order])
    assert relative(turned.epistemic, expected.epistemic[order]) < EXACT


def test_prompts_read_in_chunks() -> None:
    """The forward passes over a prompt's first parts give no token, and no uncertainty."""
    bayes = endless("llama")
    whole = bayes.generate(prompts(), DRAWS, **OPTIONS)
    parts = bayes.generate(prompts(), DRAWS, prefill_chunk_size=3, **OPTIONS)
    assert parts.sequences.equal(whole.sequences)
    assert relative(parts.total, whole.total) < EXACT
    assert relative(parts.aleatoric, whole.aleatoric) < EXACT


def test_the_cache_grows_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' layer does, however little room there is, and after others changed it."""
    monkeypatch.setattr(generate, "ROOM", 2)
    generator, ours, theirs = torch.Generator().manual_seed(0), DrawsLayer(), DynamicLayer()

    def append(rows: int, tokens: int) -> None:
        keys, values = torch.randn(2, rows, 2, tokens, 4, generator=generator)
        for found, expected in zip(
            ours.update(keys, values), theirs.update(keys, values), strict=True
        ):
            assert found.equal(expected)

    for tokens in (3, 1, 1, 1, 5, 1, 1):
        append(2, tokens)
    for change in ("crop", "batch_repeat_interleave"):
        for layer in (ours, theirs):
            getattr(layer, change)(-2 if change == "crop" else 2)
        append(2 if change == "crop" else 4, 1)
    theirs.keys, theirs.values = (t.repeat(3, 1, 1, 1) for t in (theirs.keys, theirs.values))
    append(12, 1)  # draw-major copies of what was common so far
    bayes = endless("llama")
    small = bayes.generate(prompts(), DRAWS, **OPTIONS)
    monkeypatch.setattr(generate, "ROOM", 64)
    assert bayes.generate(prompts(), DRAWS, **OPTIONS).total.equal(small.total)


def test_without_a_cache_the_same_tokens() -> None:
    bayes = endless("llama", layers=tfb.last_layers(1))
    found = bayes.generate(prompts(), DRAWS, use_cache=False, **OPTIONS)
    expected = bayes.generate(prompts(), DRAWS, **OPTIONS)
    assert found.sequences.equal(expected.sequences)
    assert relative(found.total, expected.total) < EXACT


@pytest.mark.parametrize("named", [False, True])
def test_several_continuations_of_a_prompt(named: bool) -> None:
    """num_return_sequences repeats rows: at sigma = 0 those of transformers, in its order."""
    bayes = endless("llama")
    options = OPTIONS | {"do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(0)
    expected = bayes.model.generate(**prompts(), **options)
    torch.manual_seed(0)
    found = bayes.generate(
        prompts(), Draws.iid(3, 0.0), return_dict_in_generate=named, output_scores=named, **options
    )
    assert found.sequences.equal(expected) and found.total.shape == (6, NEW)


def test_processors_and_uncertainty() -> None:
    """A processor sees B rows of averaged scores; uncertainties are those before it."""
    bayes = endless("llama")
    shapes = []

    class Ban(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            shapes.append(tuple(scores.shape))
            return scores.index_fill(-1, banned, float("-inf"))

    free = bayes.generate(prompts(), DRAWS, **OPTIONS)
    banned = free.sequences[:, 7].unique()
    found = bayes.generate(
        prompts(), DRAWS, logits_processor=LogitsProcessorList([Ban()]), **OPTIONS
    )
    assert shapes == [(3, 64)] * NEW
    assert not bool(torch.isin(found.sequences[:, 7:], banned).any())
    assert relative(found.total[:, 0], free.total[:, 0]) < EXACT


def test_state_and_mode_after_generation() -> None:
    """Training modes, plain calls and sampling are as before, also after an error."""
    bayes = endless("llama")
    batch = make_batch(5, 5, 5)
    with torch.no_grad():
        plain = bayes.model(**batch).logits
    bayes.model.train()
    bayes.generate(prompts(), DRAWS, **OPTIONS)
    assert bayes.model.training
    steps: list[int] = []

    def fail(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt

    handle = bayes.base.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        bayes.generate(prompts(), DRAWS, **OPTIONS)
    handle.remove()
    assert bayes.model.training
    bayes.model.eval()
    with torch.no_grad():
        assert bayes.model(**batch).logits.equal(plain)


def test_scores_that_are_no_numbers_give_no_text() -> None:
    """Where logits are NaN, and where draws are so far out that they overflow."""
    bayes = endless("llama")
    with pytest.raises(ValueError, match="generate: the model returned NaN or Inf, so no token is"):
        bayes.generate(prompts(), Draws.antithetic(2, 1e300), **OPTIONS)
    with torch.no_grad():
        bayes.base.lm_head.weight[5].fill_(torch.nan)
    with pytest.raises(ValueError, match="generate: the model returned NaN or Inf, so no token is"):
        bayes.generate(prompts(), DRAWS, **OPTIONS)


def test_threads_generate_side_by_side() -> None:
    """Other draws of one model at once, averaged and each by itself: what each call gives alone."""
    bayes = endless("llama")
    calls = [
        partial(bayes.generate, prompts(), DRAWS, **OPTIONS),
        partial(bayes.generate, prompts(), Draws.antithetic(2, 0.3, seed=4), **OPTIONS),
        partial(bayes.generate, prompts(), DRAWS, per_draw=True, **OPTIONS),
    ]
    expected = [call().sequences for call in calls]
    gate = threading.Barrier(len(calls))

    def work(i: int) -> bool:
        torch.set_num_threads(1)  # each thread's own
        gate.wait(60)
        return all(calls[i]().sequences.equal(expected[i]) for _ in range(2))

    with ThreadPoolExecutor(len(calls)) as pool:
        assert all(pool.map(work, range(len(calls))))
