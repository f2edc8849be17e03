"""``torch.compile`` under sampling: no graph break of ours, and the state of whoever calls."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.models import CASES, Case, causal, exact, llama, relative
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

import tfb
from tfb import BayesLoRALinear, Draws
from tfb.linear import MERGING
from tfb.sampling.state import context
from tfb_kernels import tuning

EXACT = 1e-10
# One block: tracing takes seconds, and a second one shows nothing new.
SMALL = Case(lambda: llama(num_hidden_layers=1), causal(target_modules=["q_proj", "v_proj"]))
DRAWS = Draws.antithetic(4, 0.2)
OTHERS = [
    Draws.antithetic(4, 0.3, seed=9, first_stream=5),
    Draws((0.0, 0.1, -0.4, 0.2), (7, 7, 2, 2), seed=-1),
]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """A model's plain call, eager and compiled in one graph, in float64."""

    def __init__(self, case: Case = SMALL, layers: Any = None, fullgraph: bool = True) -> None:
        self.bayes = tfb.bayesianize(exact(case.build()), layers=layers)
        causal = self.bayes.task == "CAUSAL_LM"
        options: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1} if causal else {}
        self.batch = options | case.batch()
        self.graphs = CompileCounterWithBackend("eager")
        self.call = torch.compile(self._call, fullgraph=fullgraph, backend=self.graphs)

    def _call(self, **batch: Any) -> Tensor:
        logits: Tensor = self.bayes.model(**batch).logits
        return logits

    @torch.no_grad()
    def eager(self, draws: Draws | None = None) -> Tensor:
        if draws is None:
            return self._call(**self.batch)
        with self.bayes.sampling(draws):
            return self._call(**self.batch)

    @torch.no_grad()
    def inside(self) -> Tensor:
        """In whatever context the caller is."""
        logits: Tensor = self.call(**self.batch)
        return logits

    def compiled(self, draws: Draws | None = None) -> Tensor:
        if draws is None:
            return self.inside()
        with self.bayes.sampling(draws):
            return self.inside()


@pytest.mark.parametrize(
    ("kind", "layers", "first"),
    [
        ("llama", tfb.last_layers(1), DRAWS),
        ("lm_head", tfb.last_layers(0), None),
        ("bert", None, DRAWS),
    ],
)
def test_one_graph_for_all_draws(kind: str, layers: Any, first: Draws | None) -> None:
    """A graph with draws and one without, whichever is traced first; new sigmas, streams and seeds
    are arguments of the graph. ``fullgraph`` would not let a break pass."""
    c = Compiled(CASES[kind], layers)
    for draws in (first, DRAWS, None, *OTHERS, None, DRAWS):
        assert relative(c.compiled(draws), c.eager(draws)) < EXACT
    assert c.graphs.frame_count == 2
    assert relative(c.eager(OTHERS[0]), c.eager(DRAWS)) > 1e-3
    assert not context.states


def test_the_caller_decides_between_graphs() -> None:
    """Threads, tasks and copied contexts get their own draws from one compiled function."""
    c = Compiled()
    wanted = {d: c.eager(d) for d in (None, DRAWS, OTHERS[0])}
    for draws in wanted:
        c.compiled(draws)
    errors: list[float] = []

    def check(draws: Draws | None) -> None:
        errors.append(relative(c.inside(), wanted[draws]))

    def run(*work: Callable[[], None]) -> None:
        threads = [threading.Thread(target=w) for w in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

    with c.bayes.sampling(DRAWS):
        copied = contextvars.copy_context()
        check(DRAWS)
        run(lambda: check(None))  # a thread begins without draws
        run(lambda: copied.run(check, DRAWS))
        with c.bayes.sampling(OTHERS[0]):
            check(OTHERS[0])
            copied.run(check, DRAWS)
        check(DRAWS)
    copied.run(check, DRAWS)
    check(None)
    assert c.graphs.frame_count == 2

    gate = threading.Barrier(3)

    def together(draws: Draws | None) -> None:
        if draws is None:
            gate.wait(60)
            check(None)
            return
        with c.bayes.sampling(draws):
            gate.wait(60)
            check(draws)

    run(*[lambda d=d: together(d) for d in wanted])

    async def task(draws: Draws) -> None:
        with c.bayes.sampling(draws):
            await asyncio.sleep(0)  # the others enter theirs
            check(draws)
            await asyncio.to_thread(check, draws)
            later = asyncio.create_task(asyncio.to_thread(check, draws))
        check(None)
        await later  # has the draws of the context it was made in

    async def tasks() -> None:
        await asyncio.gather(task(DRAWS), task(OTHERS[0]))
        check(None)

    asyncio.run(tasks())
    # Not how many graphs: Dynamo may compile one again when threads check its guards at once.
    assert len(errors) == 20 and max(errors) < EXACT


def test_a_model_compiled_in_place() -> None:
    """``model.compile()``: what ``predict`` calls, with label columns and in tail mode."""
    bayes, batch = tfb.bayesianize(exact(SMALL.build())), SMALL.batch()
    ways: list[dict[str, Any]] = [
        {"label_ids": torch.tensor([5, 9, 63])},
        {"mode": "tail", "tail": 2},
    ]
    expected = [bayes.logits(batch, d, **how) for how in ways for d in (DRAWS, OTHERS[0])]
    graphs = CompileCounterWithBackend("eager")
    bayes.model.compile(fullgraph=True, backend=graphs)
    found = [bayes.logits(batch, d, **how) for how in ways for d in (DRAWS, OTHERS[0])]
    assert all(relative(f, e) < EXACT for f, e in zip(found, expected, strict=True))
    assert graphs.frame_count


def test_parts_of_the_draws_are_not_replayed_from_graphs() -> None:
    """What a graph puts out may be overwritten: blocks below the noise run in each part then."""
    case = Case(llama, causal(target_modules=["q_proj", "v_proj"]))
    bayes, batch = tfb.bayesianize(exact(case.build()), layers=tfb.last_layers(1)), case.batch()
    expected = bayes.logits(batch, DRAWS)
    bayes.model.compile(fullgraph=True, backend="eager")
    assert relative(bayes.logits(batch, DRAWS, draws_per_pass=2), expected) < EXACT


@pytest.mark.parametrize("layers", [None, tfb.last_layers(1), tfb.last_layers(0)], ids=str)
def test_decoding_that_transformers_compiles(layers: Any) -> None:
    """What a static cache turns on there: every step and other draws run the same graphs, one for
    the model and one each for the hooks around it."""
    bayes, batch = tfb.bayesianize(exact(CASES["lm_head"].build()), layers=layers), SMALL.batch()
    batch = {k: batch[k] for k in ("input_ids", "attention_mask")}
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    how = CompileConfig(fullgraph=True, mode=None, backend=backend)
    how._compile_all_devices = True  # else only on GPUs
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    for draws in (DRAWS, OTHERS[0]):
        eager = bayes.generate(batch, draws, **options)
        found = bayes.generate(
            batch,
            draws,
            cache_implementation="static",
            disable_compile=False,
            compile_config=how,
            **options,
        )
        assert found.sequences.equal(eager.sequences)
        for name in ("log_probs", "total", "aleatoric"):
            assert relative(getattr(found, name), getattr(eager, name)) < EXACT
        assert len(graphs) == 3
    assert float(eager.epistemic.max()) > 1e-3


def test_adapters_change_after_compilation() -> None:
    """Bayesianized, disabled or removed later: the graph that was traced before is not run."""
    c = Compiled()
    model: Any = c.bayes.model
    plain = c.eager()
    c.bayes.remove()
    assert relative(c.inside(), plain) < EXACT
    c.bayes = tfb.bayesianize(model)
    assert relative(c.compiled(DRAWS), c.eager(DRAWS)) < EXACT
    with c.bayes.sampling(DRAWS), model.disable_adapter():
        base = c.inside()
        assert len(base) == 4 * len(plain)
        assert relative(base[: len(plain)], base[-len(plain) :]) == 0
    c.bayes.remove()
    assert relative(c.inside(), plain) < EXACT


def test_breaks_and_interrupts_of_others() -> None:
    """Code of others that breaks the graph, and is interrupted there: the next passes are right."""
    c = Compiled(CASES["lm_head"], tfb.last_layers(0), fullgraph=False)
    plain, wanted = c.eager(), c.eager(DRAWS)
    raising = False

    @torch.compiler.disable
    def breaks(*_: Any) -> None:
        if raising:
            raise KeyboardInterrupt

    # The backbone, in a graph of its own, has left the rows that all draws share.
    c.bayes.base.lm_head.register_forward_pre_hook(breaks)
    assert relative(c.compiled(DRAWS), wanted) < EXACT
    assert c.graphs.frame_count != 1  # torch 2.11 then runs all of it eagerly
    raising = True
    with c.bayes.sampling(DRAWS):
        with pytest.raises(KeyboardInterrupt):
            c.inside()
        raising = False
        assert relative(c.inside(), wanted) < EXACT
    assert relative(c.eager(), plain) < EXACT
    assert not context.states


def test_a_bad_batch_leaves_the_state_alone() -> None:
    c = Compiled()
    with c.bayes.sampling(DRAWS):
        before = c.inside()
        with torch.no_grad(), pytest.raises(IndexError):
            c.call(**c.batch | {"input_ids": c.batch["input_ids"] + 1000})
        assert context.states[c.bayes.owner].running is None
        assert c.inside().equal(before)


@pytest.mark.parametrize("noise", ["weight", "token"])
def test_a_layer_alone(noise: str) -> None:
    """Draws that are on the device are arguments of the graph; others its constants, not kept."""
    g = torch.Generator().manual_seed(0)
    A, B, x = (torch.randn(*shape, generator=g).double() for shape in ((3, 6), (5, 3), (4, 6)))
    layer = BayesLoRALinear.from_weights(nn.Linear(6, 5).double(), A, B, 2.0, 7)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled: Callable[[Tensor, Draws], Tensor] = torch.compile(
        layer, fullgraph=True, backend=graphs
    )
    draws = [Draws.iid(4, s, seed=n, noise=noise) for n, s in enumerate((0.1, 0.3, 0.2))]
    with torch.no_grad():
        expected = [layer(x, d) for d in draws]
        for d, e in zip(draws, expected, strict=True):
            assert relative(compiled(x, d), e) < EXACT
        assert graphs.frame_count == 1
        for d, e in zip(draws, expected, strict=True):
            fresh = Draws(d.sigmas, d.streams, d.seed, noise)
            assert relative(compiled(x, fresh), e) < EXACT
            assert not fresh._tensors


@pytest.mark.parametrize("merging", MERGING)
def test_a_layer_that_has_never_run(merging: str) -> None:
    """A graph does not trace how thresholds and factors come about."""
    g = torch.Generator().manual_seed(0)
    A, B, x = (torch.randn(*shape, generator=g).double() for shape in ((3, 6), (5, 3), (4, 20, 6)))
    layer = BayesLoRALinear.from_weights(nn.Linear(6, 5).double(), A, B, 2.0, 7)
    layer.sampler.merging = merging
    draws = Draws.antithetic(4, 0.2)
    tuning.reload()
    with torch.no_grad():
        found = torch.compile(layer, fullgraph=True, backend="eager")(x, draws)
        assert relative(found, layer(x, draws)) < EXACT


@pytest.mark.parametrize(
    "how",
    [
        {"draws_per_pass": 2},
        {"mode": "tail", "tail": 2},
        {"mode": "tail", "tail": 2, "draws_per_pass": 2},
    ],
    ids=str,
)
def test_parts_of_draws_and_prompts_of_tails_are_arguments_too(how: dict[str, Any]) -> None:
    """Blocks that are compiled one by one see the same graphs for other streams and sigmas."""
    bayes = tfb.bayesianize(exact(SMALL.build()))
    counter = CompileCounterWithBackend("eager")
    (block,) = bayes.base.model.layers
    block.compile(fullgraph=True, backend=counter)
    bayes.logits(SMALL.batch(), DRAWS, **how)
    graphs = counter.frame_count
    for first in (7, 11, 20):
        bayes.logits(SMALL.batch(), Draws.antithetic(4, 0.1 + first, first_stream=first), **how)
    assert counter.frame_count == graphs > 0
