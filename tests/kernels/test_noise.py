"""The noise contract: Philox to the bit, the normals to an ulp, and nothing but coordinates in."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from tfb_kernels import NOISE_VERSION, gaussian_noise, noise

MASK = 0xFFFFFFFF
TOP = 2**32 - 1
TOKEN = 1 << 31
EPS = torch.finfo(torch.float64).eps
WORDS = st.integers(0, TOP)
# 5 standard errors, two-sided: what a correct generator exceeds once in 1.7 million statistics
BOUND = 5.0

Noise = Callable[[int, int, list[int], int, int], Tensor]


# --- the contract once more, with Python's integers and floats alone ----------------------------


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 as in the paper: multiply, split into halves, swap, bump the key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        rk0, rk1 = (k0 + round_ * 0x9E3779B9) & MASK, (k1 + round_ * 0xBB67AE85) & MASK
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ rk0, b & MASK, (a >> 32) ^ c3 ^ rk1, a & MASK
    return c0, c1, c2, c3


def float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def normal(seed: int, layer: int, stream: int, row: int, column: int, domain: int) -> float:
    """One number of the contract; log, sin and cos in float64 of float32 u and theta."""
    key = (seed & MASK, seed >> 32 & MASK)
    words = philox((column // 4 + domain, row, stream, layer), key)
    radius_word, angle_word = words[0:2] if column % 4 < 2 else words[2:4]
    u = float32(float32(radius_word) * 2**-32 + 2**-33)
    signed = angle_word - 2**32 if angle_word >= 2**31 else angle_word
    theta = float32(float32(signed) * float32(math.pi * 2**-31))
    turn = math.cos(theta) if column % 2 == 0 else math.sin(theta)
    return math.sqrt(-2.0 * math.log(u)) * turn


def contract(
    seed: int, layer: int, streams: list[int], rows: int, columns: int, domain: int = 0
) -> Tensor:
    cells = product(streams, range(rows), range(columns))
    flat = [normal(seed, layer, q, i, j, domain) for q, i, j in cells]
    return torch.tensor(flat, dtype=torch.float32).view(len(streams), rows, columns)


def within_one_ulp(actual: Tensor, expected: Tensor) -> None:
    """Two libm differ in float64's last bits, which may turn the one rounding to float32."""
    assert actual.dtype == expected.dtype == torch.float32
    np.testing.assert_array_max_ulp(actual.numpy(), expected.numpy(), maxulp=1)


def weight(seed: int, layer: int, streams: list[int], r: int, n: int) -> Tensor:
    return noise.weight_noise(torch.tensor(seed), layer, torch.tensor(streams), r, n)


def token(seed: int, layer: int, streams: list[int], tokens: int, r: int) -> Tensor:
    return noise.token_noise(torch.tensor(seed), layer, torch.tensor(streams), tokens, r)


def words_of(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    def tensors(words: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(w, dtype=torch.int64) for w in words)

    out = noise.philox4x32(tensors(counter), tensors(key))  # type: ignore[arg-type]
    return tuple(int(w) for w in out)


# --- Philox -------------------------------------------------------------------------------------

# Random123's kat_vectors: "philox4x32 10 counter key words"
KNOWN_ANSWERS = [
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]


@pytest.mark.parametrize("line", KNOWN_ANSWERS)
def test_known_answers(line: str) -> None:
    words = tuple(int(w, 16) for w in line.split())
    counter, key, answer = words[:4], words[4:6], words[6:]
    assert words_of(counter, key) == answer
    assert philox(counter, key) == answer


@given(st.tuples(WORDS, WORDS, WORDS, WORDS), st.tuples(WORDS, WORDS))
def test_philox_to_the_bit(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    assert words_of(counter, key) == philox(counter, key)


# --- the whole contract -------------------------------------------------------------------------

COORDINATES = [
    (0, 0, [0]),
    (1, 2, [3, 0, 3]),
    (-1, TOP, [TOP, 0]),
    (-(2**63), 1, [2**31, 7]),
    (2**63 - 1, 2**31, [TOP - 1]),
    (0x0123456789ABCDEF, 0xDEADBEEF, [123456789, 1]),
]
SIZES = [(1, 1), (2, 3), (3, 4), (1, 5), (5, 7), (4, 16)]


@pytest.mark.parametrize(("seed", "layer", "streams"), COORDINATES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_contract_element_by_element(
    seed: int, layer: int, streams: list[int], rows: int, columns: int
) -> None:
    expected = contract(seed, layer, streams, rows, columns)
    within_one_ulp(weight(seed, layer, streams, rows, columns), expected)
    expected = contract(seed, layer, streams, rows, columns, TOKEN)
    within_one_ulp(token(seed, layer, streams, rows, columns), expected)


@given(
    st.integers(-(2**63), 2**63 - 1),
    WORDS,
    st.lists(WORDS, min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 9),
)
def test_contract_anywhere(seed: int, layer: int, streams: list[int], r: int, n: int) -> None:
    within_one_ulp(weight(seed, layer, streams, r, n), contract(seed, layer, streams, r, n))
    within_one_ulp(token(seed, layer, streams, r, n), contract(seed, layer, streams, r, n, TOKEN))


GOLDEN_WEIGHT = [
    [1.54737639, 0.307769328, 0.17230387, 1.99207747, -0.172889948],
    [-0.724683166, 0.0196271241, 0.221145436, 0.100244239, 0.600247562],
    [-0.602707565, -1.00301051, -1.61083043, 1.29941928, -0.515266299],
    [-0.233121008, 0.563019037, 1.92913973, -0.166509315, -0.0100087132],
]
GOLDEN_TOKEN = [
    [-0.898598969, -1.41005623, 1.51503849, -2.05863595, -1.51074982],
    [2.21582246, 0.414678514, -0.264949441, 0.250769526, 0.0280599222],
    [0.547534347, -0.393183559, -0.280519187, 1.63059068, -0.716977835],
    [1.40980387, 0.479058206, 0.412961602, -0.0973916799, -2.41528869],
]


def test_golden() -> None:
    """Numbers of version 1 as first released: a change of them is a new noise version."""
    assert NOISE_VERSION == 1
    within_one_ulp(weight(42, 7, [0, TOP], 2, 5), torch.tensor(GOLDEN_WEIGHT).view(2, 2, 5))
    within_one_ulp(token(42, 7, [0, TOP], 2, 5), torch.tensor(GOLDEN_TOKEN).view(2, 2, 5))


def test_public_function_is_the_contract() -> None:
    """Any form of the arguments; an unsigned seed is its two's complement."""
    expected = weight(-3, TOP, [9, 4], 3, 6)
    for seed in (-3, 2**64 - 3, torch.tensor(-3), torch.tensor([-3])):
        assert torch.equal(gaussian_noise(seed, TOP, [9, 4], 3, 6), expected)
    for streams in (torch.tensor([9, 4]), torch.tensor([9, 4], dtype=torch.int32), (9, 4)):
        E = gaussian_noise(-3, TOP, streams, 3, 6, device="cpu")
        assert torch.equal(E, expected) and E.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_empty_sizes(shape: tuple[int, int, int]) -> None:
    for make in (weight, token):
        E = make(0, 0, list(range(shape[0])), *shape[1:])
        assert E.shape == shape and E.dtype == torch.float32


def test_ends_of_the_words() -> None:
    """u is never 0: the words at both ends give finite normals, the largest 6.76 wide."""
    words = torch.tensor([0, 1, 2**24, 2**31 - 1, 2**31, TOP - 1, TOP])
    radius_words, angle_words = (w.flatten() for w in torch.meshgrid(words, words, indexing="ij"))
    n0, n1 = noise._box_muller(radius_words, angle_words)
    radius = torch.hypot(n0, n1)
    assert bool(radius.isfinite().all())
    widest = torch.full((7,), math.sqrt(66 * math.log(2)), dtype=torch.float64)  # u = 2^-33
    torch.testing.assert_close(radius.view(7, 7)[0], widest, rtol=8 * EPS, atol=0)
    assert bool((radius.view(7, 7)[-1] == 0.0).all())  # u = 1


# --- independence of everything else ------------------------------------------------------------


@pytest.mark.parametrize("make", [weight, token])
def test_slices_agree(make: Noise) -> None:
    """A number does not know how many streams, rows or columns were asked for."""
    whole = make(11, 5, [8, 2, 900, 2], 6, 13)
    assert torch.equal(whole[1], whole[3])
    for q, stream in enumerate([8, 2, 900]):
        assert torch.equal(make(11, 5, [stream], 6, 13)[0], whole[q])
    for rows, columns in ((1, 1), (2, 13), (6, 4), (5, 6), (3, 11)):
        part = make(11, 5, [900, 8], rows, columns)
        assert torch.equal(part, whole[[2, 0], :rows, :columns])


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_slab_size_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weight(3, 1, [0, 4, 5], 9, 50), token(3, 1, [0, 4, 5], 9, 50)
    monkeypatch.setattr(noise, "_CHUNK", chunk)
    assert torch.equal(weight(3, 1, [0, 4, 5], 9, 50), whole[0])
    assert torch.equal(token(3, 1, [0, 4, 5], 9, 50), whole[1])


def test_global_state_neither_read_nor_written() -> None:
    expected = weight(3, 1, [6], 4, 9)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(weight(3, 1, [6], 4, 9), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


def counters(
    monkeypatch: pytest.MonkeyPatch,
    make: Noise,
    layer: int,
) -> list[tuple[int, ...]]:
    """Every counter that reaches Philox for 3 streams, 4 rows and 21 columns."""
    seen: list[tuple[int, ...]] = []
    original = noise.philox4x32

    def spy(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        stacked = torch.stack(torch.broadcast_tensors(*counter), -1)
        seen.extend(tuple(row) for row in stacked.view(-1, 4).tolist())
        return original(counter, key)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(noise, "philox4x32", spy)
        make(1, layer, [0, 1, TOP], 4, 21)
    return seen


def test_no_counter_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, rows, column groups, layers and the two kinds of noise never meet."""
    every = [counters(monkeypatch, make, layer) for make in (weight, token) for layer in (0, TOP)]
    flat = [counter for part in every for counter in part]
    assert len(flat) == 4 * 3 * 4 * 6 == len(set(flat))
    assert all(c[0] < TOKEN for part in every[:2] for c in part)
    assert all(TOKEN <= c[0] <= TOP for part in every[2:] for c in part)
    assert all(0 <= word <= TOP for c in flat for word in c)


# --- distribution -------------------------------------------------------------------------------


def correlation_in_standard_errors(a: Tensor, b: Tensor) -> float:
    """Correlation of standard normals (known mean and variance), times sqrt(N)."""
    return float((a.double() * b.double()).mean()) * math.sqrt(a.numel())


def squares(e: Tensor) -> Tensor:
    """(e^2 - 1) / sqrt 2: mean 0 and variance 1 for standard normals."""
    return (e.double() ** 2 - 1) / math.sqrt(2)


@pytest.mark.parametrize("make", [weight, token])
def test_moments(make: Noise) -> None:
    """Raw moments of N numbers: (1/N) sum e^k has variance (E e^2k - (E e^k)^2) / N."""
    e = make(2024, 3, list(range(4)), 64, 512).double().flatten()
    root = math.sqrt(e.numel())
    for k, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        z = (float((e**k).mean()) - expected) * root / math.sqrt(variance)
        assert abs(z) < BOUND, f"moment {k}: {z} standard errors"
    p = stats.kstest(e.numpy(), "norm").pvalue
    assert p > 2 * stats.norm.sf(BOUND)


def test_neighbours_are_uncorrelated() -> None:
    """Across every word of the counter and key, for the numbers and for their squares."""
    streams = [0, 1, 2, 3]
    E = weight(5, 9, streams, 32, 256)
    pairs = {f"columns {lag} apart": (E[..., lag:], E[..., :-lag]) for lag in (1, 2, 3, 4, 8)}
    pairs |= {
        "cos and sin": (E[..., 0::2], E[..., 1::2]),
        "rows": (E[:, 1:], E[:, :-1]),
        "streams": (E[1:], E[:-1]),
        "layers": (E, weight(5, 10, streams, 32, 256)),
        "low seed words": (E, weight(6, 9, streams, 32, 256)),
        "high seed words": (E, weight(5 + 2**32, 9, streams, 32, 256)),
        "kinds": (E, token(5, 9, streams, 32, 256)),
        "row against stream": (E[0, 1:4], E[1:4, 0]),
        "stream against layer": (weight(5, 1, [2], 32, 256), weight(5, 2, [1], 32, 256)),
    }
    for name, (a, b) in pairs.items():
        assert abs(correlation_in_standard_errors(a, b)) < BOUND, name
        z = correlation_in_standard_errors(squares(a), squares(b))
        assert abs(z) < BOUND, f"squares: {name}"
