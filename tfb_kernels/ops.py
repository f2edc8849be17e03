"""Public functions and their registration as torch custom operators.

Arguments are checked here, once, in the language of the caller; the operators behind them
(``tfb::gaussian_noise``, ``tfb::bayes_lora_linear``) trust what they get. Both have fake
implementations, so ``torch.compile(fullgraph=True)`` and ``torch.export`` see through them.

A new implementation is added in ``_resolve`` and in the operator's body; a new argument in the
public function, the operator's schema and its fake.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tfb_kernels.noise import weight_noise
from tfb_kernels.reference import bayes_lora_linear_reference

IMPLEMENTATIONS = ("auto", "triton", "reference")
NOISE_KINDS = ("weight", "token")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ImplementationUnavailableError(RuntimeError):
    """The implementation that was asked for by name cannot run here."""


def _resolve(impl: str, device: torch.device) -> str:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton":
        raise ImplementationUnavailableError(
            "impl='triton': this version of tfb_kernels has no Triton kernels; "
            "use impl='reference' or impl='auto'"
        )
    return "reference"


def _seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as an int64 scalar on ``device``: a tensor, so that graph replay sees new ones."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed: expected one int64 value, got {seed.dtype} {list(seed.shape)}")
        return seed.reshape(()).to(device)
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed={seed}: expected 64 bits, -2**63 <= seed < 2**64")
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    return torch.tensor(signed, dtype=torch.int64, device=device)


def _stream_tensor(streams: Tensor | Sequence[int], device: torch.device) -> Tensor:
    if not isinstance(streams, Tensor):
        bad = [q for q in streams if not 0 <= q < 1 << 32]
        if bad:
            raise ValueError(f"streams: {bad[0]} is not an unsigned 32-bit number")
        streams = torch.tensor(list(streams), dtype=torch.int64)
    if streams.dim() != 1 or streams.is_floating_point():
        raise ValueError(
            f"streams: expected integers [Q], got {streams.dtype} {list(streams.shape)}"
        )
    return streams.to(device=device, dtype=torch.int64)


def _check_layer_id(layer_id: int) -> None:
    if not 0 <= layer_id < 1 << 32:
        raise ValueError(f"layer_id={layer_id}: expected an unsigned 32-bit number")


# --- gaussian_noise ---------------------------------------------------------------------------


@torch.library.custom_op("tfb::gaussian_noise", mutates_args=())
def _gaussian_noise(seed: Tensor, layer_id: int, streams: Tensor, r: int, n: int) -> Tensor:
    return weight_noise(seed, layer_id, streams, r, n)


@_gaussian_noise.register_fake
def _(seed: Tensor, layer_id: int, streams: Tensor, r: int, n: int) -> Tensor:
    return streams.new_empty((streams.shape[0], r, n), dtype=torch.float32)


def gaussian_noise(
    seed: int | Tensor,
    layer_id: int,
    streams: Tensor | Sequence[int],
    r: int,
    n: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals E [Q, r, n] of the noise contract (see :mod:`tfb_kernels.noise`).

    Args:
        seed: 64 bits, as an int or an int64 tensor of one element.
        layer_id: unsigned 32 bits; two layers with different ids never share noise.
        streams: Q unsigned 32-bit stream numbers.
        r: rank (rows). n: in_features (columns).
        device: where E lives; default the device of ``streams`` if a tensor, else the CPU.

    Returns:
        float32 [Q, r, n]; the same values on every device.

    Raises:
        ValueError: a seed, layer_id or stream outside its range, or a negative size.
    """
    if r < 0 or n < 0:
        raise ValueError(f"r={r}, n={n}: sizes cannot be negative")
    _check_layer_id(layer_id)
    if device is None:
        device = streams.device if isinstance(streams, Tensor) else torch.device("cpu")
    device = torch.device(device)
    return _gaussian_noise(
        _seed_tensor(seed, device), layer_id, _stream_tensor(streams, device), r, n
    )


# --- bayes_lora_linear ------------------------------------------------------------------------


@torch.library.custom_op("tfb::bayes_lora_linear", mutates_args=())
def _bayes_lora_linear(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    inv_d: Tensor,
    sigmas: Tensor,
    streams: Tensor,
    stream_index: Tensor | None,
    seed: Tensor,
    layer_id: int,
    scaling: float,
    noise: str,
    pool: Tensor | None,
) -> Tensor:
    return bayes_lora_linear_reference(
        x, base, A, B, inv_d, sigmas, streams, stream_index, seed, layer_id, scaling, noise, pool
    )


@_bayes_lora_linear.register_fake
def _(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    inv_d: Tensor,
    sigmas: Tensor,
    streams: Tensor,
    stream_index: Tensor | None,
    seed: Tensor,
    layer_id: int,
    scaling: float,
    noise: str,
    pool: Tensor | None,
) -> Tensor:
    return base.new_empty((sigmas.shape[0], base.shape[-2], base.shape[-1]))


def bayes_lora_linear(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    inv_d: Tensor,
    sigmas: Tensor,
    streams: Tensor | Sequence[int],
    *,
    seed: int | Tensor,
    layer_id: int,
    scaling: float,
    noise: str = "weight",
    impl: str = "auto",
    stream_index: Tensor | None = None,
    pool: Tensor | None = None,
) -> Tensor:
    """S posterior samples of a LoRA update, added to a base output (TFB, Theorem 4.1).

        y_s = base + scaling * B (A x + (sigma_s * inv_d) o (E_{q(s)} x))

    where row i of E is standard normal: A + noise has standard deviation sigma * inv_d[i] in row
    i, and the noise of A and its scaling are never materialised. Arithmetic is float32 (float64
    for float64 x) and the result has the dtype of ``base``.

    Args:
        x: [T, n], shared by all draws, or [S, T, n], one input for each draw.
        base: [T, m] for shared x, [S, T, m] otherwise: what the frozen layer gave for x.
        A: [r, n], rows in the SVD basis of B (A' of the paper). B: [m, r] (B').
        inv_d: [r], 1 / d_i; 0 where B has no such direction.
        sigmas: [S] float. Negative values flip the noise (antithetic draws); 0 gives the mean.
        streams: the noise stream of each draw, [S]. Repeats are allowed (pairs, sigma grids).
        seed: 64 bits. layer_id: unsigned 32 bits. scaling: LoRA's alpha / r, any real number.
        noise: "weight": one E for each stream, shared by all tokens. "token": independent noise
            for every token, |x_t| * Xi_t in place of E x_t (same marginals for each token; the
            token's number is its row in the flattened [T, n], so it is not batch-invariant).
        impl: "reference", "triton", or "auto". One that cannot run here is an error.
        stream_index: [S] int64. When given, ``streams`` is [Q] without repeats and draw s has
            stream ``streams[stream_index[s]]``.
        pool: [Q, r, n] float32, ``gaussian_noise`` of these streams, kept by the caller for draws
            that do not change (needs ``stream_index`` and noise="weight").

    Returns:
        y [S, T, m] in the dtype of ``base``.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit, naming the argument.
        ImplementationUnavailableError: ``impl`` was named and cannot run here.
    """
    _resolve(impl, x.device)
    _check_layer_id(layer_id)
    if noise not in NOISE_KINDS:
        raise ValueError(f"noise={noise!r}: expected one of {', '.join(NOISE_KINDS)}")
    streams = _stream_tensor(streams, x.device)
    _check_shapes(x, base, A, B, inv_d, sigmas, streams, stream_index, pool, noise)
    return _bayes_lora_linear(
        x,
        base,
        A,
        B,
        inv_d,
        sigmas,
        streams,
        stream_index,
        _seed_tensor(seed, x.device),
        layer_id,
        float(scaling),
        noise,
        pool,
    )


def _check_shapes(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    inv_d: Tensor,
    sigmas: Tensor,
    streams: Tensor,
    stream_index: Tensor | None,
    pool: Tensor | None,
    noise: str,
) -> None:
    def require(holds: bool, name: str, tensor: Tensor, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {list(tensor.shape)}")

    for name, tensor in (("x", x), ("base", base), ("A", A), ("B", B)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}: {tensor.dtype} is not a supported floating-point dtype")
    require(A.dim() == 2, "A", A, "[r, n]")
    r, n = A.shape
    require(B.dim() == 2 and B.shape[1] == r, "B", B, f"[m, {r}], with A [{r}, {n}]")
    require(inv_d.shape == (r,), "inv_d", inv_d, f"[{r}]")
    require(sigmas.dim() == 1 and len(sigmas) > 0, "sigmas", sigmas, "[S], S at least 1")
    S, m = len(sigmas), B.shape[0]
    require(x.dim() in (2, 3) and x.shape[-1] == n, "x", x, f"[T, {n}] or [{S}, T, {n}]")
    require(x.dim() == 2 or x.shape[0] == S, "x", x, f"[{S}, T, {n}], one input for each draw")
    require(base.shape == (*x.shape[:-1], m), "base", base, f"{[*x.shape[:-1], m]}, like x")
    if stream_index is None:
        require(len(streams) == S, "streams", streams, f"[{S}], one for each of sigmas")
    else:
        require(stream_index.shape == (S,), "stream_index", stream_index, f"[{S}]")
    if pool is not None:
        if stream_index is None or noise != "weight":
            raise ValueError("pool: needs stream_index and noise='weight'")
        require(pool.shape == (len(streams), r, n), "pool", pool, f"[{len(streams)}, {r}, {n}]")
