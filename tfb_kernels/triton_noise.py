"""Triton device functions of the noise contract (:mod:`tfb_kernels.noise` has the formulas).

    normals4(group, row, stream, layer, key) -> columns 4g, 4g+1, 4g+2, 4g+3 of one row
    noise_tile(first column, rows, streams, layer, key) -> [rows, columns] of E

MATH picks the transcendentals, the dominant cost of a normal:

    "cuda"  libdevice's fast_logf, fast_sinf, fast_cosf: a few MUFU instructions each
    "libm"  tl.log, tl.sin, tl.cos: AMD GPUs and the interpreter, which have no libdevice
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

ROUNDS = tl.constexpr(10)
M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)
TWO_NEG_32 = tl.constexpr(2.0**-32)
TWO_NEG_33 = tl.constexpr(2.0**-33)
# pi * 2**-31 rounded to float32; written out, since a longer constant would make the product
# float64 in some front ends.
ANGLE = tl.constexpr(1.4629180792671596e-09)


@triton.jit
def seed_words(seed_pointer):
    """Load the seed's (low, high) words, an int64 in memory: graph replay reads a new one."""
    seed = tl.load(seed_pointer).to(tl.uint64)
    return (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def layer_words(layer):
    """Return the layer id as a uint32 block [1, 1].

    It comes as a signed 32-bit argument, so that one compiled kernel serves every layer.
    """
    return tl.full((1, 1), layer, tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Compute Philox4x32-10 on uint32 blocks that broadcast against each other."""
    for _ in tl.static_range(ROUNDS):
        # One 32 x 32 -> 64 product gives both halves (IMAD.WIDE.U32).
        p0 = c0.to(tl.uint64) * M0
        p1 = c2.to(tl.uint64) * M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + W0
        k1 = k1 + W1
    return c0, c1, c2, c3


@triton.jit
def box_muller(radius_word, angle_word, MATH: tl.constexpr):
    """Turn two uint32 words into two standard normals, float32."""
    u = radius_word.to(tl.float32) * TWO_NEG_32 + TWO_NEG_33
    theta = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * ANGLE
    if MATH == "cuda":
        # The fast logarithm may come out a hair above 0 next to u = 1.
        radius = tl.sqrt(tl.maximum(-2.0 * libdevice.fast_logf(u), 0.0))
        return radius * libdevice.fast_cosf(theta), radius * libdevice.fast_sinf(theta)
    else:
        radius = tl.sqrt(tl.maximum(-2.0 * tl.log(u), 0.0))
        return radius * tl.cos(theta), radius * tl.sin(theta)


@triton.jit
def normals4(group, row, stream, layer, k0, k1, MATH: tl.constexpr):
    """Return four normals for each broadcast element of (group, row, stream, layer), uint32."""
    w0, w1, w2, w3 = philox4x32(group, row, stream, layer, k0, k1)
    n0, n1 = box_muller(w0, w1, MATH)
    n2, n3 = box_muller(w2, w3, MATH)
    return n0, n1, n2, n3


@triton.jit
def noise_tile(column, row, stream, layer, k0, k1, BLOCK_K: tl.constexpr, MATH: tl.constexpr):
    """Return E [rows, BLOCK_K] from ``column``, a multiple of 4; row, stream: uint32 [rows]."""
    group = (column // 4 + tl.arange(0, BLOCK_K // 4)).to(tl.uint32)
    n0, n1, n2, n3 = normals4(group[None, :], row[:, None], stream[:, None], layer, k0, k1, MATH)
    # join appends an axis: [..., low, high] runs over n0 n1 n2 n3, in the thread's own registers.
    return tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(row.shape[0], BLOCK_K)
