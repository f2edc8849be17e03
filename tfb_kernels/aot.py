"""Ahead-of-time compilation of every kernel, with no GPU: ``python -m tfb_kernels.aot``.

Compiles each kernel in each shipped configuration for NVIDIA sm_80 and sm_90 and AMD gfx942 and
reads the resources from the binaries: registers, shared memory, stack, spills, and whether the
tensor cores' warpgroup product (wgmma) is there; and what a normal and an output cost in
instructions. ``--write`` updates ``data/resources.json``,
``--check`` fails where a kernel uses stack or spills, or a product lost its wgmma.

    python -m tfb_kernels.aot [--arch sm_90 ...] [--kernel shrink ...] [--dtype bf16] [--check]

To add a kernel: a case in ``cases``. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tfb_kernels import launch
from tfb_kernels.triton_expand import TRITON_DTYPES, expand_kernel
from tfb_kernels.triton_generate import generate_kernel
from tfb_kernels.triton_noise import normals4, seed_words
from tfb_kernels.triton_predictive import mean_kernel, statistics_kernel
from tfb_kernels.triton_shrink import padded_rank, shrink_kernel, token_shrink_kernel

ARCHITECTURES = ("sm_80", "sm_90", "gfx942")
DTYPES = ("bf16", "fp16", "fp32")
RANKS = (8, 16, 32, 64, 256)
RESOURCES = Path(__file__).parent / "data" / "resources.json"
# Largest dynamic shared memory of a block, bytes: A100 163 KiB, H100 227 KiB, MI300 64 KiB.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Case:
    """One compilation: a kernel, the types of its arguments and its constants."""

    kernel: str
    function: Any
    dtype: str
    rank: int
    shared: bool
    config: launch.LaunchConfig
    signature: dict[str, str]
    constants: dict[str, Any]

    @property
    def label(self) -> str:
        c = self.config
        tile = f"t{c.block_t} m{c.block_m} p{c.block_p} k{c.block_k} s{c.splits} w{c.num_warps}"
        sharing = " shared" if self.shared else ""
        return f"{self.kernel} {self.dtype} r{self.rank}{sharing} [{tile} n{c.num_stages}]"


@dataclass(frozen=True)
class Resources:
    """What one binary uses. Registers a thread, bytes a block; spills are spill instructions."""

    case: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int
    wgmma: bool


# --- cases ----------------------------------------------------------------------------------------


def cases(
    arch: str,
    kernels: Sequence[str] = launch.KERNELS,
    dtypes: Sequence[str] = DTYPES,
    *,
    largest_only: bool = False,
) -> Iterator[Case]:
    """Every kernel x configuration of ``arch`` x dtype, at each rank that it serves.

    largest_only: only the largest of those ranks, where resources are tightest.
    """
    for kernel in kernels:
        for dtype in dtypes:
            # Configurations for few rows and for any number each go through the ranks once.
            lowest: dict[int, int] = {}
            for max_rows, max_rank, config in launch.configurations(arch, kernel):
                served = [r for r in RANKS if lowest.get(max_rows, 0) < r <= max_rank]
                lowest[max_rows] = max_rank
                if kernel in ("statistics", "mean"):
                    served = [0]
                for rank in served[-1:] if largest_only or kernel == "generate" else served:
                    yield from kernel_cases(arch, kernel, dtype, rank, config)


def kernel_cases(
    arch: str, kernel: str, dtype: str, rank: int, config: launch.LaunchConfig
) -> Iterator[Case]:
    """One kernel in one configuration: twice where shared and per-draw x differ."""
    math = "libm" if arch.startswith("gfx") else "cuda"
    tensor = f"*{dtype}"
    dot = {"PRECISION": "ieee", "UPCAST": False}
    noise = {"streams": "*i64", "seed": "*i64", "layer": "i32"}
    sizes = {"R": rank, "RP": padded_rank(rank)} if rank else {}
    tile_t, tile_k = {"BLOCK_T": config.block_t}, {"BLOCK_K": config.block_k}
    if kernel == "shrink":
        signature = {"x": tensor, "a": "*fp32", "out": "*fp32", **noise, "T": "i32", "n": "i32",
                     "Q": "i32", "p_blocks": "i32", "split_size": "i32", "stride_xg": "i64",
                     "stride_xt": "i64"}  # fmt: skip
        constants = {"stride_xn": 1, **sizes, "SPLITS": config.splits, **tile_t, **tile_k,
                     "BLOCK_P": config.block_p, "MATH": math, **dot}  # fmt: skip
        yield _case(kernel, shrink_kernel, dtype, rank, False, config, signature, constants)
    elif kernel == "token_shrink":
        signature = {"x": tensor, "a": "*fp32", "out": "*fp32", "streams": "*i64",
                     "stream_slot": "*i64", "seed": "*i64", "layer": "i32", "rows": "i32",
                     "T": "i32", "n": "i32", "Q": "i32", "stride_xt": "i64"}  # fmt: skip
        constants = {"stride_xn": 1, **sizes, **tile_t, **tile_k, "MATH": math, **dot}
        for shared in (True, False):
            yield _case(kernel, token_shrink_kernel, dtype, rank, shared, config, signature,
                        constants | {"SHARED": shared})  # fmt: skip
    elif kernel == "expand":
        signature = {"z": "*fp32", "b": "*fp32", "base": tensor, "bias": tensor, "y": tensor,
                     "sigmas": "*fp64", "inv_d": "*fp64", "stream_index": "*i64",
                     "scaling": "fp32", "rows": "i32", "T": "i32", "m": "i32", "S": "i32",
                     "m_blocks": "i32", "z_row": "i32", "split_stride": "i64",
                     "stride_base": "i64"}  # fmt: skip
        names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        operand = {str(k).removeprefix("torch."): v for k, v in TRITON_DTYPES.items()}[names[dtype]]
        splits = max(c.splits for _, _, c in launch.configurations(arch, "shrink"))
        constants = {"R": rank, "RB": min(padded_rank(rank), config.block_k),
                     "SPLITS": splits if config.block_t <= 16 else 1, "HAS_BIAS": True, **tile_t,
                     "BLOCK_M": config.block_m, "DOT": operand, "PRECISION": "ieee"}  # fmt: skip
        for shared in (True, False):
            yield _case(kernel, expand_kernel, dtype, rank, shared, config, signature,
                        constants | {"SHARED": shared})  # fmt: skip
    elif kernel == "generate":
        signature = {"a": "*fp32", "out": tensor, **noise, "n": "i32", "Q": "i32", "rows": "i32"}
        constants = {"R": rank, "WITH_A": 1, "BLOCK_R": config.block_p, **tile_k, "MATH": math}
        yield _case(kernel, generate_kernel, dtype, rank, False, config, signature, constants)
    elif kernel == "statistics":
        signature = {"logits": tensor, "largest": "*fp32", "exponentials": "*fp32",
                     "weighted": "*fp32", "best": "*i32", "B": "i32", "V": "i32",
                     "part_size": "i32", "stride_s": "i64", "stride_b": "i64"}  # fmt: skip
        yield _case(kernel, statistics_kernel, dtype, 0, False, config, signature,
                    {"BLOCK_V": config.block_k})  # fmt: skip
    else:
        signature = {"logits": tensor, "log_normalizer": "*fp32", "order": "*i64",
                     "probs": "*fp32", "error": "*fp32", "entropy": "*fp32", "B": "i32",
                     "V": "i32", "U": "i32", "D": "i32", "stride_s": "i64",
                     "stride_b": "i64"}  # fmt: skip
        yield _case(kernel, mean_kernel, dtype, 0, False, config, signature,
                    {"BLOCK_V": config.block_k})  # fmt: skip


def _case(
    kernel: str,
    function: Any,
    dtype: str,
    rank: int,
    shared: bool,
    config: launch.LaunchConfig,
    types: dict[str, str],
    constants: dict[str, Any],
) -> Case:
    # In the order of the kernel's own arguments, which is how the compiler counts them.
    signature = {n: types.get(n, "constexpr") for n in function.arg_names}
    missing = [n for n, t in signature.items() if t == "constexpr" and n not in constants]
    if missing or set(types) - set(signature):
        raise ValueError(f"{kernel}: aot.cases and the kernel differ in {missing or set(types)}")
    return Case(kernel, function, dtype, rank, shared, config, signature, constants)


# --- compilation ----------------------------------------------------------------------------------


def compile_case(case: Case, arch: str) -> Any:
    """Triton's compiled kernel (``.asm`` holds its texts and binary) as for aligned tensors."""
    aligned = [["tt.divisibility", 16]]
    names = list(case.signature)
    attributes = {
        (i,): aligned
        for i, name in enumerate(names)
        if case.signature[name].startswith("*") or name in ("n", "m") or name.startswith("stride")
    }
    source = ASTSource(
        fn=case.function, signature=case.signature, constexprs=case.constants, attrs=attributes
    )
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    return triton.compile(source, target=target(arch), options=options)


def target(arch: str) -> GPUTarget:
    """Triton's name for an architecture."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def resources(case: Case, arch: str) -> Resources:
    """Compile one case and read what it uses."""
    compiled = compile_case(case, arch)
    shared = int(compiled.metadata.shared)
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"\.{name}:\s*(\d+)", text)
            return int(found.group(1)) if found else 0

        return Resources(
            case=case.label, arch=arch, registers=field("vgpr_count"), shared_bytes=shared,
            stack_bytes=field("private_segment_fixed_size"),
            spills=field("vgpr_spill_count") + field("sgpr_spill_count"), wgmma=False,
        )  # fmt: skip
    usage = _nvidia_tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    numbers = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = [name.partition(".")[0] for name in sass(compiled.asm["cubin"])]
    return Resources(
        case=case.label, arch=arch, registers=numbers["REG"], shared_bytes=shared,
        stack_bytes=numbers["STACK"] + numbers["LOCAL"],
        spills=opcodes.count("STL") + opcodes.count("LDL"), wgmma="wgmma" in compiled.asm["ptx"],
    )  # fmt: skip


def sass(cubin: bytes) -> list[str]:
    """Opcodes of a cubin in order, predicates left out; a label is ".L_x_0:", with its colon."""
    listing = _nvidia_tool("nvdisasm", "-c", cubin)
    address = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/")
    found = []
    for line in listing.splitlines():
        words = address.sub("", line).split()
        if re.match(r"\.L_\w+:", line):
            found.append(words[0])
        elif words and address.match(line):
            opcode = words[1] if words[0].startswith("@") else words[0]
            # A branch keeps its target.
            found.append(" ".join([opcode, *re.findall(r"\.L_\w+", line)]).rstrip(";"))
    return found


def instructions(cubin: bytes) -> tuple[int, int]:
    """(outside its longest loop, inside it) SASS instructions of a kernel, by their listing.

    Both sides of a branch count, so it is what a thread executes or a little more.
    """
    longest, total, labels = 0, 0, dict[str, int]()
    for word in sass(cubin):
        opcode, _, target_label = word.partition(" ")
        if opcode.endswith(":"):
            labels[opcode[:-1]] = total
            continue
        if opcode == "NOP":
            continue
        total += 1
        start = labels.get(target_label)
        # The jump to itself after EXIT only fills the last cache line.
        if opcode == "BRA" and start is not None and total - start > 1:
            longest = max(longest, total - start)
    return total - longest, longest


def expand_instructions(arch: str, dtype: str, rank: int, rows: int, draws: int | None) -> float:
    """SASS instructions a thread spends on one element of expand's output.

    rows: of z. draws: S, which share a base output; None: each row of base has its own draw.
    """
    config = launch.choose_config("expand", rows=rows, rank=rank, arch=arch)
    shared = draws is not None
    (case,) = (c for c in kernel_cases(arch, "expand", dtype, rank, config) if c.shared == shared)
    outside, inside = instructions(compile_case(case, arch).asm["cubin"])
    threads = 32 * config.num_warps / (config.block_t * config.block_m)
    return threads * (outside / draws + inside if draws else outside + inside)


def _nvidia_tool(name: str, flag: str, cubin: bytes) -> str:
    """Output of a binary tool that Triton's wheel carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [str(tool), flag, file.name], capture_output=True, text=True, check=True
        ).stdout


def problems(case: Case, found: Resources) -> list[str]:
    """What the gate refuses in one result."""
    faults = []
    if found.stack_bytes or found.spills:
        faults.append(f"stack {found.stack_bytes} B, spills {found.spills}")
    if found.shared_bytes > SHARED_LIMIT[found.arch]:
        faults.append(f"shared memory {found.shared_bytes} B is over the limit")
    if wants_wgmma(case, found.arch) and not found.wgmma:
        faults.append("no wgmma, which the shape allows")
    return [f"{found.arch} {found.case}: {fault}" for fault in faults]


def wants_wgmma(case: Case, arch: str) -> bool:
    """Whether Hopper's warpgroup product must be there: half operands, 64 rows, 4 warps."""
    return (
        arch == "sm_90"
        and case.kernel in ("shrink", "token_shrink")
        and case.dtype != "fp32"
        and case.config.block_t >= 64
    )


# --- cost of a normal -----------------------------------------------------------------------------


@triton.jit
def _noise_probe(out, seed, CALLS: tl.constexpr, MATH: tl.constexpr):
    i = tl.program_id(0) * 128 + tl.arange(0, 128)
    word = i.to(tl.uint32, bitcast=True)
    k0, k1 = seed_words(seed)
    total = tl.zeros((128,), tl.float32)
    for c in tl.static_range(CALLS):
        n0, n1, n2, n3 = normals4(word + c, word, word, word, k0, k1, MATH)
        total += (n0 + n1) + (n2 + n3)
    tl.store(out + i, total)


def instructions_per_normal(arch: str = "sm_90") -> float:
    """SASS instructions that one more normal costs, counted in two binaries that differ by four
    normals a thread (the additions that consume them included)."""
    counts = []
    for calls in (1, 2):
        signature = {"out": "*fp32", "seed": "*i64", "CALLS": "constexpr", "MATH": "constexpr"}
        source = ASTSource(
            fn=_noise_probe, signature=signature, constexprs={"CALLS": calls, "MATH": "cuda"}
        )
        compiled = triton.compile(source, target=target(arch), options={"num_warps": 4})
        counts.append(sum(instructions(compiled.asm["cubin"])))
    return (counts[1] - counts[0]) / 4


# --- command line ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table; with --check the exit status is 1 where the gate refuses."""
    parser = argparse.ArgumentParser(prog="python -m tfb_kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--kernel", nargs="+", default=launch.KERNELS, choices=launch.KERNELS)
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--check", action="store_true", help="fail on stack, spills, lost wgmma")
    parser.add_argument("--write", action="store_true", help=f"write {RESOURCES.name}")
    parser.add_argument("--quick", action="store_true", help="only each largest rank")
    options = parser.parse_args(arguments)
    if options.quick and options.write:
        parser.error("--write wants every rank; leave --quick out")
    if launch.INTERPRET:
        parser.error("TRITON_INTERPRET is set, which leaves nothing to compile; unset it")
    found, faults = [], []
    print(f"{'arch':8}{'regs':>5}{'shared':>8}{'stack':>6}{'spill':>6}  wgmma  case")
    for arch in options.arch:
        for case in cases(arch, options.kernel, options.dtype, largest_only=options.quick):
            r = resources(case, arch)
            print(
                f"{r.arch:8}{r.registers:5}{r.shared_bytes:8}{r.stack_bytes:6}{r.spills:6}"
                f"  {'yes' if r.wgmma else '-':5}  {r.case}",
                flush=True,
            )
            found.append(r)
            faults += problems(case, r)
    for arch in (a for a in options.arch if a.startswith("sm_")):
        print(f"{arch}: {instructions_per_normal(arch):g} SASS instructions a normal")
        for draws, kind in ((10, "shared x"), (None, "per-draw x")):
            each = expand_instructions(arch, "bf16", 16, 4096, draws)
            print(f"{arch}: {each:.1f} SASS instructions an output of expand, {kind}")
    if options.write:
        rows = [json.dumps(asdict(r)) for r in found]
        header = json.dumps({"triton": triton.__version__})
        RESOURCES.write_text("[\n" + ",\n".join([header, *rows]) + "\n]\n")
    for fault in faults:
        print(f"REFUSED {fault}", file=sys.stderr)
    return 1 if options.check and faults else 0


if __name__ == "__main__":
    sys.exit(main())
