"""Draws: what the constructors give, how draws group into units, and what is refused."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfb.draws import Draws, check_even, stable_layer_id

TOP = 2**32 - 1


def test_mean_is_one_draw_at_sigma_zero() -> None:
    assert Draws.mean() == Draws((0.0,), (0,), 0, "weight") and len(Draws.mean()) == 1


def test_iid() -> None:
    draws = Draws.iid(3, 0.5, seed=7, noise="token", first_stream=10)
    assert draws == Draws((0.5, 0.5, 0.5), (10, 11, 12), 7, "token")
    assert Draws.iid(1, 0).sigmas == (0.0,)


def test_antithetic_pairs_stand_side_by_side() -> None:
    draws = Draws.antithetic(6, 0.5, seed=-7, noise="token", first_stream=4)
    assert draws == Draws((0.5, -0.5) * 3, (4, 4, 5, 5, 6, 6), -7, "token")


def test_grid_is_stream_major_on_common_streams() -> None:
    draws = Draws.grid([0.1, 0.0, 0.3], 4, seed=2, noise="token", first_stream=8)
    assert draws.sigmas == (0.1, -0.1, 0.0, -0.0, 0.3, -0.3) * 2
    assert draws.streams == (8,) * 6 + (9,) * 6
    assert (draws.seed, draws.noise) == (2, "token")
    iid = Draws.grid([0.1, 0.3], 3, antithetic=False)
    assert iid == Draws((0.1, 0.3) * 3, (0, 0, 1, 1, 2, 2))


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=4),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 100),
)
def test_grid_numbering(sigmas: list[float], pairs: int, antithetic: bool, first: int) -> None:
    """Draw q (G k) + g k + sign has stream q and sigma g; one sigma's draws are the plain ones."""
    k = 2 if antithetic else 1
    draws = Draws.grid(sigmas, pairs * k, antithetic=antithetic, first_stream=first)
    assert len(draws) == len(sigmas) * pairs * k
    make = Draws.antithetic if antithetic else Draws.iid
    for g, sigma in enumerate(sigmas):
        plain = make(pairs * k, sigma, first_stream=first)
        chosen = [q * len(sigmas) * k + g * k + sign for q in range(pairs) for sign in range(k)]
        assert tuple(draws.sigmas[i] for i in chosen) == plain.sigmas
        assert tuple(draws.streams[i] for i in chosen) == plain.streams


def test_distinct_streams_and_units() -> None:
    draws = Draws((0.1,) * 5, (9, 2, 9, TOP, 2))
    assert draws.distinct_streams == (9, 2, TOP)
    assert draws.units == ((0, 2), (1, 4), (3,))
    assert Draws.antithetic(4, 0.1).units == ((0, 1), (2, 3))
    assert Draws.iid(3, 0.1).units == ((0,), (1,), (2,))
    assert Draws.grid([0.1, 0.2], 4).units == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_slices_keep_seed_kind_and_order() -> None:
    draws = Draws.antithetic(8, 0.5, seed=3, noise="token")
    assert draws[2:5] == Draws((0.5, -0.5, 0.5), (1, 1, 2), 3, "token")
    assert draws[:] == draws
    parts = [draws[i : i + 3] for i in range(0, 8, 3)]
    assert sum((p.streams for p in parts), ()) == draws.streams
    assert sum((p.sigmas for p in parts), ()) == draws.sigmas
    assert draws.distinct_streams == (0, 1, 2, 3) and draws[2:5].distinct_streams == (1, 2)
    with pytest.raises(ValueError, match="need S >= 1 sigmas"):
        draws[8:]


def test_equal_draws_are_one_key() -> None:
    """Whatever has been computed and kept from them; seed and kind count."""
    a, b = Draws.antithetic(4, 0.5), Draws.antithetic(4, 0.5)
    a.tensors()
    assert a.units and a == b and hash(a) == hash(b) and len({a, b}) == 1
    assert len({a, Draws.antithetic(4, 0.5, seed=1), Draws.antithetic(4, 0.5, noise="token")}) == 3
    assert pickle.loads(pickle.dumps(a)) == a
    with pytest.raises(AttributeError):
        a.seed = 1  # type: ignore[misc]


def test_tensors() -> None:
    draws = Draws((0.1, -0.2, 0.3, 0.0), (TOP, 5, TOP, 6), seed=-(2**63))
    t = draws.tensors()
    assert t.sigmas.dtype == torch.float64 and t.sigmas.tolist() == list(draws.sigmas)
    assert t.streams.dtype == t.stream_index.dtype == t.seed.dtype == torch.int64
    assert t.streams[t.stream_index].tolist() == list(draws.streams)
    assert tuple(t.streams.tolist()) == draws.distinct_streams
    assert t.seed.shape == () and int(t.seed) == -(2**63)


@pytest.mark.parametrize(
    ("draws", "k"),
    [
        (Draws.iid(3, 0.1), 1),
        (Draws.antithetic(6, 0.1), 2),
        (Draws.grid([0.1, 0.2, 0.3], 4), 6),
        (Draws((0.1,) * 4, (3, 3, 3, 3)), 4),
        (Draws((0.1,) * 4, (3, 5, 3, 5)), 1),  # a stream comes back
        (Draws((0.1,) * 4, (3, 3, 3, 5)), 1),  # unequal runs
        (Draws((0.1,) * 3, (3, 3, 5)), 1),
    ],
)
def test_draws_per_stream_is_the_common_run(draws: Draws, k: int) -> None:
    """k draws of the first stream, then k of the next: true for all, or not promised."""
    t = draws.tensors()
    assert t.draws_per_stream == k
    if k > 1:
        assert t.stream_index.tolist() == [s // k for s in range(len(draws))]


def test_tensors_are_kept_for_each_device() -> None:
    draws = Draws.iid(2, 0.5)
    assert draws.tensors() is draws.tensors("cpu") is draws.tensors(torch.device("cpu"))
    on_meta = draws.tensors("meta")
    assert on_meta.sigmas.device.type == "meta" and draws.tensors("meta") is on_meta
    assert draws.tensors().sigmas.device.type == "cpu"
    assert draws[:1].tensors().sigmas.shape == (1,)  # another object, another cache


def test_unit_tensor() -> None:
    units = Draws.antithetic(4, 0.1).unit_tensor()
    assert units is not None and units.dtype == torch.int64
    assert units.tolist() == [[0, 1], [2, 3]]
    assert Draws((0.1,) * 3, (1, 2, 1)).unit_tensor() is None


# --- layer ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("", 1188227382),
        ("model.layers.0.self_attn.q_proj", 3294320926),
        ("model.layers.31.mlp.down_proj", 3532852384),
        ("bert.encoder.layer.11.output.dense", 2022703403),
        ("größe", 3727841779),
    ],
)
def test_layer_ids_never_change(name: str, number: int) -> None:
    """Numbers as first released: saved seeds mean what they meant."""
    assert stable_layer_id(name) == number


def test_layer_ids_of_a_large_model_differ() -> None:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    ids = {stable_layer_id(f"model.layers.{i}.{k}") for i in range(200) for k in kinds}
    assert len(ids) == 800 and all(0 <= i <= TOP for i in ids)


# --- errors -------------------------------------------------------------------------------------

BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Draws((), ()), "need S >= 1 sigmas and as many streams, got 0 and 0"),
    (lambda: Draws((0.1,), (0, 1)), "need S >= 1 sigmas and as many streams, got 1 and 2"),
    (lambda: Draws((0.1, math.nan), (0, 1)), "sigma=nan is not finite"),
    (lambda: Draws((-math.inf,), (0,)), "sigma=-inf is not finite"),
    (lambda: Draws((0.1,), (-1,)), "stream -1 is not an unsigned 32-bit number"),
    (lambda: Draws((0.1,), (2**32,)), "stream 4294967296 is not an unsigned 32-bit number"),
    (lambda: Draws((0.1,), (0,), 2**63), f"seed={2**63} does not fit a signed 64-bit"),
    (lambda: Draws((0.1,), (0,), -(2**63) - 1), f"seed={-(2**63) - 1} does not fit"),
    (lambda: Draws((0.1,), (0,), 0, "flipout"), "noise='flipout', expected weight or token"),
    (lambda: Draws.iid(0, 0.1), "draws=0: at least one draw is needed"),
    (lambda: Draws.iid(-2, 0.1), "draws=-2: at least one draw is needed"),
    (lambda: Draws.iid(2, -0.1), r"sigma=-0.1: expected a finite number >= 0"),
    (lambda: Draws.iid(2, math.nan), "sigma=nan: expected a finite number >= 0"),
    (lambda: Draws.iid(2, math.inf), "sigma=inf: expected a finite number >= 0"),
    (lambda: Draws.iid(2, 0.1, first_stream=TOP), "stream 4294967296 is not an unsigned"),
    (lambda: Draws.iid(2, 0.1, first_stream=-1), "stream -1 is not an unsigned"),
    (lambda: Draws.iid(2, 0.1, seed=2**64), "seed=18446744073709551616 does not fit"),
    (lambda: Draws.antithetic(0, 0.1), "draws=0: at least one draw is needed"),
    (lambda: Draws.antithetic(5, 0.1), "draws=5: antithetic draws come in pairs, use 6"),
    (lambda: check_even(3, "most"), "most=3: antithetic draws come in pairs, use 4"),
    (lambda: check_even(0, "most"), "most=0: at least one draw is needed"),
    (lambda: Draws.antithetic(2, -0.1), "sigma=-0.1: expected a finite number >= 0"),
    (lambda: Draws.antithetic(2, math.nan), "sigma=nan: expected a finite number >= 0"),
    (lambda: Draws.antithetic(4, 0.1, first_stream=TOP), "stream 4294967296 is not an unsigned"),
    (lambda: Draws.grid([], 2), "the sigma grid is empty"),
    (lambda: Draws.grid([0.1, -0.2], 2), "sigma=-0.2: expected a finite number >= 0"),
    (lambda: Draws.grid([0.1, math.nan], 2), "sigma=nan: expected a finite number >= 0"),
    (lambda: Draws.grid([0.1], 3), "draws=3: antithetic draws come in pairs"),
    (lambda: Draws.grid([0.1], 0, antithetic=False), "draws=0: at least one draw is needed"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=range(len(BAD)))
def test_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
