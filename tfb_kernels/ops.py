"""Public functions and their registration as torch custom operators.

Arguments are checked here, once, in the language of the caller; the operators behind them trust
what they get. All have fake implementations, so ``torch.compile(fullgraph=True)`` and
``torch.export`` see through them. A new implementation is added in ``resolve_impl`` and in the
operators' bodies; a new argument in the public function, the operator's schema and its fake.
Triton is imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tfb_kernels.noise import weight_noise
from tfb_kernels.reference import (
    bayes_lora_linear_reference,
    bayes_lora_merge_reference,
    compute_dtype,
    predictive_reduction_reference,
)
from tfb_kernels.samples import SCHEMA, Samples

IMPLEMENTATIONS = ("auto", "triton", "reference")
NOISE_KINDS = ("weight", "token")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A constant and no cached function: torch.compile of 2.11 cannot trace one that calls find_spec.
HAS_TRITON = find_spec("triton") is not None


class ImplementationUnavailableError(RuntimeError):
    """The implementation that was asked for by name cannot run here."""


# --- which implementation -------------------------------------------------------------------------


def _interpreted() -> bool:
    from tfb_kernels.launch import INTERPRET

    return INTERPRET


def why_not_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Tell why the Triton kernels cannot run on ``device`` for x of ``dtype``; None if they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if dtype == torch.float64:
        return "the kernels compute in float32, and x is float64"
    if device.type == "cuda" or (device.type == "cpu" and _interpreted()):
        return None
    return (
        f"the tensors are on {device.type}; the kernels need a CUDA or ROCm GPU (or "
        "TRITON_INTERPRET=1, set before Python starts, for tests)"
    )


def resolve_impl(impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Return "triton" or "reference"; a name that cannot run is an error, never something else.

    Raises:
        ValueError: an unknown name.
        ImplementationUnavailableError: ``impl`` was named and cannot run on ``device``.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference" or (impl == "auto" and device.type != "cuda"):
        return "reference"
    reason = why_not_triton(device, dtype)
    if reason is None:
        return "triton"
    if impl == "auto":
        return "reference"
    raise ImplementationUnavailableError(
        f"impl='triton' cannot run here: {reason}; use impl='reference' or impl='auto'"
    )


def prepared_for(device: torch.device, dtype: torch.dtype) -> tuple[str, torch.dtype]:
    """Return what "auto" takes for weight noise and x of ``dtype``, and the dtype of its factors.

    In that dtype A and B need not be converted at every call.
    """
    impl = resolve_impl("auto", device, dtype)
    return impl, dtype if impl == "triton" else compute_dtype(dtype)


# --- arguments ------------------------------------------------------------------------------------


def _seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """Return the seed as an int64 scalar on ``device``."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed: expected one int64 value, got {seed.dtype} {list(seed.shape)}")
        return seed.reshape(()).to(device)
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed={seed}: expected 64 bits, -2**63 <= seed < 2**64")
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    return torch.tensor(signed, dtype=torch.int64, device=device)


def _stream_tensor(streams: Tensor | Sequence[int], device: torch.device) -> Tensor:
    if isinstance(streams, Tensor) and (streams.dim() != 1 or streams.is_floating_point()):
        raise ValueError(
            f"streams: expected integers [Q], got {streams.dtype} {list(streams.shape)}"
        )
    numbers = _host_numbers(streams)
    if numbers is not None and (bad := [q for q in numbers if not 0 <= q < 1 << 32]):
        raise ValueError(f"streams: {bad[0]} is not an unsigned 32-bit number")
    if not isinstance(streams, Tensor):
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    return streams.to(device=device, dtype=torch.int64).contiguous()


def _host_numbers(streams: Tensor | Sequence[int]) -> list[int] | None:
    """Return the streams as numbers; None if that would wait for a device or break a graph."""
    if not isinstance(streams, Tensor):
        return list(streams)
    if streams.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return streams.tolist()


def _check_layer_id(layer_id: int) -> None:
    if not 0 <= layer_id < 1 << 32:
        raise ValueError(f"layer_id={layer_id}: expected an unsigned 32-bit number")


def by_stream(streams: Sequence[int]) -> tuple[list[int], list[int], int]:
    """Return the distinct streams by first use, each draw's place among them, the common run."""
    order = {q: i for i, q in enumerate(dict.fromkeys(streams))}
    index = [order[q] for q in streams]
    return list(order), index, common_run(index)


def common_run(index: Sequence[int]) -> int:
    """Return how many consecutive draws share a stream, or 1 where that is not the same for all.

    ``index`` [S] is each draw's stream, numbered by first use. [0, 0, 1, 1] has 2; an order in
    which a stream comes back, or with unequal runs, has 1: nothing to rely on.
    """
    run = len(index) // (max(index) + 1)
    return run if all(q == s // run for s, q in enumerate(index)) else 1


# --- gaussian_noise -------------------------------------------------------------------------------


@torch.library.custom_op("tfb::gaussian_noise", mutates_args=())
def _gaussian_noise(seed: Tensor, layer_id: int, streams: Tensor, r: int, n: int) -> Tensor:
    if resolve_impl("auto", streams.device) == "reference":
        return weight_noise(seed, layer_id, streams, r, n)
    from tfb_kernels.launch import architecture, choose_config
    from tfb_kernels.triton_generate import generate

    config = choose_config("generate", rows=0, rank=r, arch=architecture(streams.device))
    with torch.cuda.device_of(streams):
        return generate(None, streams[None], seed, layer_id, r, n, torch.float32, config)[0]


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
    """Return standard normals E [Q, r, n] of the noise contract (:mod:`tfb_kernels.noise`).

    Args:
        seed: 64 bits, as an int or an int64 tensor of one element.
        layer_id: unsigned 32 bits; two layers with different ids never share noise.
        streams: Q unsigned 32-bit stream numbers.
        r: rank (rows).
        n: in_features (columns).
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


# --- bayes_lora_linear ----------------------------------------------------------------------------


def _add(
    x: Tensor,
    base: Tensor,
    samples: Samples,
    noise: str,
    pool: Tensor | None,
    bias: Tensor | None,
    impl: str,
    out: Tensor | None,
) -> Tensor:
    if impl == "triton":
        from tfb_kernels.triton_linear import bayes_lora_linear_triton

        with torch.cuda.device_of(x):  # Triton launches on the current device
            return bayes_lora_linear_triton(x, base, samples, noise, pool, bias, out)
    if torch.is_autocast_enabled(x.device.type):  # has had its say about x
        with torch.autocast(x.device.type, enabled=False):
            return _add(x, base, samples, noise, pool, bias, impl, out)
    return bayes_lora_linear_reference(x, base, samples, noise, pool, bias, out)


def add_samples(
    x: Tensor,
    base: Tensor,
    samples: Samples,
    noise: str,
    pool: Tensor | None,
    bias: Tensor | None,
    impl: str,
    inplace: bool,
) -> Tensor:
    """Compute ``bayes_lora_linear`` for a caller that vouches for its arguments."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if _is_plain(x, base, samples.A, samples.B):
        return _add(x, base, samples, noise, pool, bias, impl, base if inplace else None)
    if inplace:
        _bayes_lora_linear_(x, base, *samples, noise, pool, bias, impl)
        return base
    return _bayes_lora_linear(x, base, *samples, noise, pool, bias, impl)


def _is_plain(*tensors: Tensor) -> bool:
    """Tell whether the operator's registration has nothing to do: no graph, no gradient.

    Going through it costs a tenth of a millisecond a call, in a model of a few hundred layers as
    much as the arithmetic of a small batch.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    gradients = torch.is_grad_enabled()
    for t in tensors:  # no generator: this runs for every layer and call
        if type(t) not in (Tensor, Parameter) or (gradients and t.requires_grad):
            return False
    return True


_ADDED = f"Tensor x, Tensor{{}} base, {SCHEMA}, str noise, Tensor? pool, Tensor? bias, str impl"


@torch.library.custom_op(
    "tfb::bayes_lora_linear", mutates_args=(), schema=f"({_ADDED.format('')}) -> Tensor"
)
def _bayes_lora_linear(x: Tensor, base: Tensor, *rest: Any) -> Tensor:
    *fields, noise, pool, bias, impl = rest
    return _add(x, base, Samples(*fields), noise, pool, bias, impl, None)


@_bayes_lora_linear.register_fake
def _(x: Tensor, base: Tensor, *rest: Any) -> Tensor:
    sigmas = rest[Samples._fields.index("sigmas")]
    return base.new_empty((sigmas.shape[0], *base.shape[-2:]))


@torch.library.custom_op(
    "tfb::bayes_lora_linear_", mutates_args=("base",), schema=f"({_ADDED.format('(a!)')}) -> ()"
)
def _bayes_lora_linear_(x: Tensor, base: Tensor, *rest: Any) -> None:
    *fields, noise, pool, bias, impl = rest
    _add(x, base, Samples(*fields), noise, pool, bias, impl, base)


@_bayes_lora_linear_.register_fake
def _(*arguments: Any) -> None:
    return None


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
    bias: Tensor | None = None,
    inplace: bool = False,
    stream_index: Tensor | None = None,
    draws_per_stream: int = 1,
    pool: Tensor | None = None,
) -> Tensor:
    """Add S posterior samples of a LoRA update to a base output (TFB, Theorem 4.1).

        y_s = base + bias + scaling * B (A x + (sigma_s * inv_d) o (E_{q(s)} x))

    where row i of E is standard normal: A + noise has standard deviation sigma * inv_d[i] in row
    i, and the noise of A and its scaling are never materialised. Arithmetic is float32 (float64
    for float64 x; on a GPU, matrix products take their operands in the dtype of x and accumulate
    in float32) and the result has the dtype of ``base``. Under autocast a float32 x is taken in
    the autocast dtype, as by ``torch.nn.functional.linear``.

    Args:
        x: [T, n], shared by all draws, or [S, T, n], one input for each draw.
        base: [T, m] for shared x, [S, T, m] otherwise: what the frozen layer gave for x.
        A: [r, n], rows in the SVD basis of B (A' of the paper).
        B: [m, r] (B').
        inv_d: [r], 1 / d_i; 0 where B has no such direction.
        sigmas: [S] float. Negative values flip the noise (antithetic draws); 0 gives the mean.
        streams: the noise stream of each draw, [S]. Repeats are allowed (pairs, sigma grids);
            given as a sequence or a CPU tensor, each distinct one is generated once.
        seed: 64 bits, as an int or an int64 tensor of one element.
        layer_id: unsigned 32 bits.
        scaling: LoRA's alpha / r, any real number.
        noise: "weight": one E for each stream, shared by all tokens. "token": independent noise
            for every token, |x_t| * Xi_t in place of E x_t (same marginals for each token; the
            token's number is its row in the flattened [T, n], so it is not batch-invariant).
        impl: "reference", "triton" (noise="weight" without ``pool``), or "auto". One that cannot
            run is an error.
        bias: [m], added to every draw, in the dtype of ``base`` or float32.
        inplace: write the result into ``base`` [S, T, m] (contiguous; per-draw x only).
        stream_index: [S] int64. When given, ``streams`` is [Q] without repeats and draw s has
            stream ``streams[stream_index[s]]``; nothing is then read back from the device, as
            CUDA graphs need it.
        draws_per_stream: with ``stream_index``: k, if it is known to be 0 0 .. 1 1 .. with runs of
            k (so that S = Q k); 1 promises nothing.
        pool: [Q, r, n] float32, ``gaussian_noise`` of these streams, kept by the caller for draws
            that do not change (needs ``stream_index`` and noise="weight").

    Returns:
        y [S, T, m] in the dtype of ``base``.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit, naming the argument.
        ImplementationUnavailableError: ``impl`` was named and cannot run here.
    """
    _check_layer_id(layer_id)
    if noise not in NOISE_KINDS:
        raise ValueError(f"noise={noise!r}: expected one of {', '.join(NOISE_KINDS)}")
    impl = _impl_for(impl, x, noise, pool)
    _check_posterior(A, B, inv_d, sigmas)
    _check_activations(x, base, A, B, sigmas)
    numbered = _numbered(streams, stream_index, draws_per_stream, len(sigmas), x.device)
    if pool is not None:
        _check_pool(pool, A, numbered[0], stream_index is not None and noise == "weight")
    _check_options(base, B, bias, inplace, x.dim() == 3)
    of_layer = (_seed_tensor(seed, x.device), layer_id, float(scaling))
    samples = Samples(A, B, inv_d.contiguous(), sigmas.contiguous(), *numbered, *of_layer)
    bias = None if bias is None else bias.contiguous()
    return add_samples(x, base, samples, noise, pool, bias, impl, inplace)


def _numbered(
    given: Tensor | Sequence[int],
    stream_index: Tensor | None,
    draws_per_stream: int,
    draws: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, int]:
    """Return streams without repeats, each draw's index into them, and the common run.

    Streams that cannot be looked at stay as they are, one for each draw.
    """
    streams = _stream_tensor(given, device)
    if stream_index is None:
        if len(streams) != draws:
            found = list(streams.shape)
            raise ValueError(f"streams: expected [{draws}], one for each of sigmas, got {found}")
        numbers = _host_numbers(given)
        if numbers is None:
            return streams, torch.arange(len(streams), device=device), 1
        distinct, index, run = by_stream(numbers)
        streams = torch.tensor(distinct, dtype=torch.int64, device=device)
        return streams, torch.tensor(index, device=device), run
    if stream_index.shape != (draws,):
        raise ValueError(f"stream_index: expected [{draws}], got {list(stream_index.shape)}")
    if draws_per_stream < 1 or (draws_per_stream > 1 and len(streams) * draws_per_stream != draws):
        raise ValueError(
            f"draws_per_stream={draws_per_stream}: does not divide {draws} draws over "
            f"{len(streams)} streams"
        )
    return streams, stream_index.contiguous(), draws_per_stream


def _impl_for(impl: str, x: Tensor, noise: str, pool: Tensor | None) -> str:
    """Resolve ``impl``; token noise and noise that was kept are for the reference alone."""
    found = resolve_impl(impl, x.device, x.dtype)
    if found == "reference" or (noise == "weight" and pool is None):
        return found
    if impl == "auto":
        return "reference"
    if noise != "weight":
        raise ImplementationUnavailableError(
            "impl='triton' has weight noise only; for noise='token' use impl='reference' or "
            "impl='auto'"
        )
    raise ValueError(
        "pool: impl='triton' makes its noise in registers; leave pool out, or use "
        "impl='reference' or impl='auto'"
    )


def _require(holds: bool, name: str, tensor: Tensor, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {list(tensor.shape)}")


def _require_float(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}: {tensor.dtype} is not a supported floating-point dtype")


def _check_posterior(A: Tensor, B: Tensor, inv_d: Tensor, sigmas: Tensor) -> None:
    _require_float(A=A, B=B)
    _require(A.dim() == 2, "A", A, "[r, n]")
    r, n = A.shape
    _require(r > 0 and n > 0, "A", A, "[r, n], r and n at least 1")
    _require(B.dim() == 2 and B.shape[1] == r, "B", B, f"[m, {r}], with A [{r}, {n}]")
    _require(inv_d.shape == (r,), "inv_d", inv_d, f"[{r}]")
    _require(sigmas.dim() == 1 and len(sigmas) > 0, "sigmas", sigmas, "[S], S at least 1")


def _check_pool(pool: Tensor, A: Tensor, streams: Tensor, ordered: bool) -> None:
    if not ordered:  # the caller's order of streams is not known to be ours
        raise ValueError("pool: needs stream_index and noise='weight'")
    expected = [len(streams), *A.shape]
    _require(list(pool.shape) == expected, "pool", pool, f"{expected}")


def _check_activations(x: Tensor, base: Tensor, A: Tensor, B: Tensor, sigmas: Tensor) -> None:
    _require_float(x=x, base=base)
    S, m, n = len(sigmas), B.shape[0], A.shape[1]
    _require(x.dim() in (2, 3) and x.shape[-1] == n, "x", x, f"[T, {n}] or [{S}, T, {n}]")
    _require(x.dim() == 2 or x.shape[0] == S, "x", x, f"[{S}, T, {n}], one input for each draw")
    _require(base.shape == (*x.shape[:-1], m), "base", base, f"{[*x.shape[:-1], m]}, like x")


def _check_options(
    base: Tensor, B: Tensor, bias: Tensor | None, inplace: bool, per_draw: bool
) -> None:
    if bias is not None and bias.shape != B.shape[:1]:
        raise ValueError(f"bias: expected [{B.shape[0]}], got {list(bias.shape)}")
    if inplace and not (per_draw and base.is_contiguous()):
        raise ValueError("inplace: needs x [S, T, n], one input for each draw, and contiguous base")


# --- bayes_lora_merge -----------------------------------------------------------------------------


def merge_samples(
    weight: Tensor, samples: Samples, pool: Tensor | None, impl: str, out: Tensor | None
) -> Tensor:
    """Compute ``bayes_lora_merge`` for a caller that vouches for its arguments."""
    if _is_plain(weight, samples.A, samples.B):
        return _merge(weight, samples, pool, impl, out)
    merged = _bayes_lora_merge(weight, *samples, pool, impl)
    return merged if out is None else out.copy_(merged)


def _merge(
    weight: Tensor, samples: Samples, pool: Tensor | None, impl: str, out: Tensor | None
) -> Tensor:
    if out is None:
        out = like_weights(weight, len(samples.sigmas))
    if impl == "triton":
        from tfb_kernels.triton_merge import merge

        with torch.cuda.device_of(weight):
            merge(weight, samples, out)  # without a pool: it makes its noise
        return out
    if torch.is_autocast_enabled(weight.device.type):
        with torch.autocast(weight.device.type, enabled=False):
            return _merge(weight, samples, pool, impl, out)
    bayes_lora_merge_reference(weight, samples, pool, out)
    return out


def like_weights(weight: Tensor, draws: int, memory: Tensor | None = None) -> Tensor:
    """Make room for weights [S, m, n], each laid out as ``weight`` is, in ``memory`` [S m n]."""
    turned = weight.mT.is_contiguous() and not weight.is_contiguous()
    shape = (draws, *(weight.mT if turned else weight).shape)
    room = weight.new_empty(shape) if memory is None else memory.view(shape)
    return room.mT if turned else room


@torch.library.custom_op(
    "tfb::bayes_lora_merge",
    mutates_args=(),
    schema=f"(Tensor weight, {SCHEMA}, Tensor? pool, str impl) -> Tensor",
)
def _bayes_lora_merge(weight: Tensor, *rest: Any) -> Tensor:
    *fields, pool, impl = rest
    return _merge(weight, Samples(*fields), pool, impl, None)


@_bayes_lora_merge.register_fake
def _(weight: Tensor, *rest: Any) -> Tensor:
    return like_weights(weight, len(rest[Samples._fields.index("sigmas")]))


def bayes_lora_merge(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    inv_d: Tensor,
    sigmas: Tensor,
    streams: Tensor | Sequence[int],
    *,
    seed: int | Tensor,
    layer_id: int,
    scaling: float,
    impl: str = "auto",
    stream_index: Tensor | None = None,
    draws_per_stream: int = 1,
    pool: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Merge S posterior samples of a LoRA update into S copies of a weight (TFB, Theorem 4.1).

        W_s = W + scaling * B (A + (sigma_s * inv_d) o E_{q(s)})

    with the E of :func:`bayes_lora_linear`, so that x W_s^T is what that function adds up. Where
    each draw has an input of its own and enough rows, merging moves fewer bytes than adding. At
    sigma = 0 W_s is the merged adapter. Arithmetic is float32 (float64 for float64 weights), and
    W_s is rounded once, to the dtype of ``weight``.

    Args:
        weight: W [m, n], of any strides: the transposed view of a [n, m] weight will do.
        A: [r, n], as for :func:`bayes_lora_linear`, like all that is not explained here.
        B: [m, r].
        inv_d: [r].
        sigmas: [S] float.
        streams: [S], or [Q] with ``stream_index``.
        seed: 64 bits.
        layer_id: unsigned 32 bits.
        scaling: LoRA's alpha / r.
        impl: "reference", "triton" (without ``pool``), or "auto".
        stream_index: [S] int64, or None.
        draws_per_stream: with ``stream_index``, the length of its runs; 1 promises nothing.
        pool: [Q, r, n] float32, ``gaussian_noise`` of these streams.
        out: [S, m, n] of the dtype of ``weight``, filled and returned; None: a new tensor in which
            each weight is laid out as ``weight``.

    Returns:
        W_s [S, m, n] in the dtype of ``weight``.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit, naming the argument.
        ImplementationUnavailableError: ``impl`` was named and cannot run here.
    """
    _check_layer_id(layer_id)
    impl = _impl_for(impl, weight, "weight", pool)
    _check_posterior(A, B, inv_d, sigmas)
    _require_float(weight=weight)
    numbered = _numbered(streams, stream_index, draws_per_stream, len(sigmas), weight.device)
    if pool is not None:
        _check_pool(pool, A, numbered[0], stream_index is not None)
    S, m, n = len(sigmas), B.shape[0], A.shape[1]
    _require(weight.shape == (m, n), "weight", weight, f"[{m}, {n}], with A and B")
    if out is not None:
        _require(out.shape == (S, m, n), "out", out, f"[{S}, {m}, {n}]")
        if out.dtype != weight.dtype:
            raise ValueError(f"out: expected {weight.dtype}, the dtype of weight, got {out.dtype}")
    of_layer = (_seed_tensor(seed, weight.device), layer_id, float(scaling))
    samples = Samples(A, B, inv_d.contiguous(), sigmas.contiguous(), *numbered, *of_layer)
    return merge_samples(weight, samples, pool, impl, out)


# --- predictive_reduction -------------------------------------------------------------------------

Reduction = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("tfb::predictive_reduction", mutates_args=())
def _predictive_reduction(logits: Tensor, units: Tensor, impl: str) -> Reduction:
    if impl == "reference":
        return predictive_reduction_reference(logits, units)
    from tfb_kernels.launch import architecture, choose_config
    from tfb_kernels.triton_predictive import predictive_reduction_triton

    rows = logits.shape[0] * logits.shape[1]
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    arch = architecture(logits.device)
    configs = (choose_config(k, rows=rows, rank=0, arch=arch) for k in ("statistics", "mean"))
    with torch.cuda.device_of(logits):
        return predictive_reduction_triton(logits, units, *configs)


@_predictive_reduction.register_fake
def _(logits: Tensor, units: Tensor, impl: str) -> Reduction:
    S, B, V = logits.shape
    dtype = compute_dtype(logits.dtype)
    return (
        logits.new_empty((B, V), dtype=dtype),
        logits.new_empty((B,), dtype=dtype),
        logits.new_empty((B,), dtype=dtype),
        logits.new_empty((S, B), dtype=torch.int64),
        logits.new_empty((B, V), dtype=dtype),
    )


def predictive_reduction(
    logits: Tensor,
    units: Tensor | None = None,
    *,
    label_ids: Tensor | None = None,
    impl: str = "auto",
) -> Reduction:
    """Reduce logits to what the predictive needs, without S B V probabilities in memory.

    Args:
        logits: [S, B, V] of S draws.
        units: [U, D] int64, the draws that form each independent unit of the Monte-Carlo average
            (antithetic pairs: D = 2); every draw in one of them. None: each draw on its own.
        label_ids: [K] or [B, K]: only these columns, renormalised over them.
        impl: "reference", "triton", or "auto".

    Returns:
        Five tensors, float32, or float64 for float64 logits; V is K with ``label_ids``.

        - probs [B, V]: mean over draws of the softmax.
        - total [B]: entropy of probs, nats.
        - expected [B]: mean over draws of each draw's entropy, nats.
        - draw_argmax [S, B] int64: each draw's most probable column.
        - standard_error [B, V]: standard deviation of the units' means / sqrt(U), NaN for U = 1.

    Raises:
        ValueError: shapes that do not fit.
        ImplementationUnavailableError: ``impl`` was named and cannot run here.
    """
    if logits.dim() != 3 or logits.dtype not in FLOAT_DTYPES or 0 in logits.shape[::2]:
        raise ValueError(f"logits: expected floats [S, B, V], got {list(logits.shape)}")
    S, B, _ = logits.shape
    if label_ids is not None:
        logits = select_columns(logits, label_ids)
    if units is None:
        units = torch.arange(S, device=logits.device)[:, None]
    if units.dim() != 2 or units.numel() != S or units.dtype != torch.int64:
        raise ValueError(f"units: expected int64 [U, D] with U D = {S}, got {list(units.shape)}")
    impl = resolve_impl(impl, logits.device, logits.dtype)
    if B == 0:
        impl = "reference"
    return _predictive_reduction(logits, units.to(logits.device), impl)


def select_columns(logits: Tensor, label_ids: Tensor) -> Tensor:
    """Select columns [K] or [B, K] of logits [S, B, V], reading nothing else.

    Raises:
        ValueError: another shape.
    """
    S, B, _ = logits.shape
    ids = label_ids.to(logits.device, torch.int64)
    if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != B) or ids.numel() == 0:
        raise ValueError(f"label_ids: expected [K] or [{B}, K], got {list(label_ids.shape)}")
    if ids.dim() == 1:
        return logits[..., ids]
    return logits.gather(-1, ids.expand(S, *ids.shape))
