"""Ahead-of-time compilation of every kernel, with no GPU: ``python -m tfb_kernels.aot``.

Compiles each kernel in each shipped configuration for NVIDIA sm_80 and sm_90 and AMD gfx942, and
reads from the binaries: registers, shared memory, stack and spills, and what a normal, a block of
x and an output cost in instructions. To add a kernel: a branch in ``_planned``.

    python -m tfb_kernels.aot [--arch sm_90 ...] [--kernel shrink ...] [--dtype bf16] [--check]
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

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tfb_kernels import launch, triton_expand, triton_merge, triton_shrink
from tfb_kernels.triton_generate import generate_kernel
from tfb_kernels.triton_noise import normals4, seed_words
from tfb_kernels.triton_predictive import mean_kernel, statistics_kernel

ARCHITECTURES = ("sm_80", "sm_90", "gfx942")
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,  # float32 whose products may be TF32, on NVIDIA's cards
}
PRODUCTS = ("shrink", "expand", "merge")
KERNELS = (*launch.KERNELS, "finalise")  # which has no configuration
WAVE = 132  # multiprocessors of an H100 or H200
RANKS = (8, 16, 32, 64, 256)
WRITTEN = (["bf16"], [16, 256])  # dtypes and ranks of the committed table
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
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def label(self) -> str:
        """The case in words: kernel, dtype, rank, tile, warps and stages."""
        tile = " ".join(
            f"{'tail' if k == 'TAIL' else k.removeprefix('BLOCK_').lower()}{v}"
            for k, v in self.constants.items()
            if k.startswith("BLOCK_") or (k == "TAIL" and v)
        )
        shared = " shared" if self.constants.get("SHARED") else ""
        size = f"[{tile} w{self.num_warps} n{self.num_stages}]"
        return f"{self.kernel} {self.dtype} r{self.rank}{shared} {size}"


@dataclass(frozen=True)
class Resources:
    """What one binary uses: registers a thread, bytes a block, spill instructions."""

    case: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int


# --- cases ----------------------------------------------------------------------------------------


def cases(
    arch: str,
    kernels: Sequence[str] = KERNELS,
    dtypes: Sequence[str] = tuple(DTYPES),
    ranks: Sequence[int] = RANKS,
) -> Iterator[Case]:
    """Yield every kernel x configuration of ``arch`` x dtype x rank."""
    for kernel in kernels:
        for dtype in dtypes:
            if dtype == "tf32" and (arch.startswith("gfx") or kernel not in PRODUCTS):
                continue
            if kernel == "finalise":
                listed = [(0, 1 << 62, launch.LaunchConfig())]
            else:
                listed = list(launch.configurations(arch, kernel))
            # Configurations for few rows and for any number each go through the ranks once.
            lowest: dict[int, int] = {}
            for max_rows, max_rank, config in listed:
                served = [r for r in ranks if lowest.get(max_rows, 0) < r <= max_rank]
                lowest[max_rows] = max_rank
                if kernel in ("statistics", "mean"):
                    served = served[-1:]
                for rank in served:
                    yield from kernel_cases(arch, kernel, dtype, rank, config)


# Arguments of the kernels by their type as Triton writes it; "tensor" has the dtype of the case.
ARGUMENTS = {
    "tensor": "a b base bias logits out weight x y z",
    "*fp32": "entropy error exponentials largest log_normalizer probs weighted",
    "*fp64": "inv_d sigmas",
    "*i64": "order seed stream_index streams",
    "*i32": "best",
    "fp32": "scaling",
    "i32": "B D K Q T U V layer m n n_blocks p_blocks part_size row_blocks rows run split_size"
    " stride_base stride_om stride_os stride_wm z_row",
    "i64": "split_stride stride_b stride_s stride_xg stride_xt",
}
TYPES = {name: kind for kind, names in ARGUMENTS.items() for name in names.split()}
# Sums that are not rounded yet.
UNROUNDED = {"shrink": {"out": "*fp32"}, "finalise": {"z": "*fp32"}}


def kernel_cases(
    arch: str, kernel: str, dtype: str, rank: int, config: launch.LaunchConfig
) -> Iterator[Case]:
    """Yield one kernel in one configuration, twice where shared and per-draw x differ.

    As its launcher plans it for a layer 4096 -> 4096 with ten draws.
    """
    stored, precision = ("fp32", "tf32") if dtype == "tf32" else (dtype, "ieee")
    math = {"MATH": "libm" if arch.startswith("gfx") else "cuda", "UPCAST": False}
    for function, planned in _planned(kernel, rank, DTYPES[dtype], precision, config):
        constants = planned | {k: v for k, v in math.items() if k in function.arg_names}
        warps: dict[str, Any] = {
            k: constants.pop(k, getattr(config, k)) for k in ("num_warps", "num_stages")
        }
        # In the order of the kernel's own arguments, which is how the compiler counts them.
        types = {name: TYPES.get(name, "constexpr") for name in function.arg_names}
        types |= UNROUNDED.get(kernel, {})
        types = {name: f"*{stored}" if t == "tensor" else t for name, t in types.items()}
        missing = [n for n, t in types.items() if t == "constexpr" and n not in constants]
        if missing:
            raise ValueError(f"{kernel}: ARGUMENTS and the kernel differ in {missing}")
        yield Case(kernel, function, dtype, rank, types, constants, **warps)


def _planned(
    kernel: str, rank: int, dtype: torch.dtype, precision: str, config: launch.LaunchConfig
) -> list[tuple[Any, dict[str, Any]]]:
    """Return a kernel and the constants of each of its launches."""
    product = (rank, dtype, precision, config)
    if kernel == "shrink":
        groups = ((1, 5), (5, 1))  # of rows that share their streams, and streams of each
        plans = [triton_shrink.plan(g, 4096, 4096, q, *product, WAVE) for g, q in groups]
        return [(triton_shrink.shrink_kernel, p.constants) for p in plans]
    if kernel == "finalise":
        sizes = triton_expand.finalise_constants(rank, 64)
        return [(triton_expand.finalise_kernel, sizes | {"SHARED": s}) for s in (True, False)]
    if kernel == "expand":
        return [
            (
                triton_expand.expand_kernel,
                triton_expand.plan(10, 4096, 4096, *product, WAVE, shared=s, bias=True).constants,
            )
            for s in (True, False)
        ]
    if kernel == "generate":
        tile = {"BLOCK_R": config.block_p, "BLOCK_K": config.block_k}
        return [(generate_kernel, {"R": rank, "WITH_A": 1, **tile})]
    if kernel == "merge":
        plan = triton_merge.plan(10, 2, 4096, 4096, *product)
        return [(triton_merge.merge_kernel, {**plan.constants, "stride_wn": 1, "stride_on": 1})]
    function = statistics_kernel if kernel == "statistics" else mean_kernel
    return [(function, {"BLOCK_V": config.block_k})]


# --- compilation ----------------------------------------------------------------------------------


def compile_case(case: Case, arch: str) -> Any:
    """Return Triton's compiled kernel for aligned tensors; ``.asm`` holds its texts and binary."""
    wide = ("n", "m", *(k for k in case.signature if k.startswith(("stride", "split"))))
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(case.signature.items())
        if kind.startswith("*") or (name in wide and kind != "constexpr")
    }
    source = ASTSource(
        fn=case.function, signature=case.signature, constexprs=case.constants, attrs=attributes
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=target(arch), options=options)


def target(arch: str) -> GPUTarget:
    """Return Triton's name for an architecture."""
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

        registers, stack = field("vgpr_count"), field("private_segment_fixed_size")
        spills = field("vgpr_spill_count") + field("sgpr_spill_count")
        return Resources(case.label, arch, registers, shared, stack, spills)
    usage = _nvidia_tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    numbers = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = [name.partition(".")[0] for name in sass(compiled.asm["cubin"])]
    stack, spills = numbers["STACK"] + numbers["LOCAL"], opcodes.count("STL") + opcodes.count("LDL")
    return Resources(case.label, arch, numbers["REG"], shared, stack, spills)


def sass(cubin: bytes) -> list[str]:
    """List a cubin's opcodes in order, without predicates; a label is ".L_x_0:"."""
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


def loop(cubin: bytes) -> tuple[list[str], list[str]]:
    """List the SASS opcodes of a kernel, and those of its longest loop.

    Both sides of a branch count, so it is what a thread executes or a little more.
    """
    longest, found, labels = list[str](), list[str](), dict[str, int]()
    for word in sass(cubin):
        opcode, _, target_label = word.partition(" ")
        if opcode.endswith(":"):
            labels[opcode[:-1]] = len(found)
            continue
        if opcode == "NOP":
            continue
        found.append(opcode)
        start = labels.get(target_label, len(found))
        # The jump to itself after EXIT only fills the last cache line.
        if opcode == "BRA" and len(found) - start > max(1, len(longest)):
            longest = found[start:]
    return found, longest


def shrink_instructions(arch: str, dtype: str, rank: int, *, shared: bool) -> float:
    """Count SASS instructions that four warps spend each in shrink's loop on a block of x.

    The block is 128 rows x 64 columns, with ten antithetic draws; each block of F's rows counts as
    the most expensive one.
    """
    config = launch.choose_config("shrink", rows=4096, rank=rank, arch=arch)
    case = list(kernel_cases(arch, "shrink", dtype, rank, config))[not shared]
    _, inside = loop(compile_case(case, arch).asm["cubin"])
    c, rows = case.constants, (6 if shared else 2) * rank
    tiles = -(-128 // c["BLOCK_T"]) * -(-rows // c["BLOCK_P"]) * 64 / c["BLOCK_K"]
    return len(inside) * tiles * case.num_warps / 4


def expand_instructions(arch: str, dtype: str, rank: int, rows: int, *, shared: bool) -> float:
    """Count SASS instructions of a thread for one element of expand's output of ``rows`` rows."""
    config = launch.choose_config("expand", rows=rows, rank=rank, arch=arch)
    found = (c for c in kernel_cases(arch, "expand", dtype, rank, config))
    case = next(c for c in found if c.constants["SHARED"] == shared)
    every, inside = loop(compile_case(case, arch).asm["cubin"])
    steps = -(-rank // case.constants["RB"])
    outputs = case.constants["BLOCK_T"] * case.constants["BLOCK_M"]
    return 32 * case.num_warps * (len(every) + (steps - 1) * len(inside)) / outputs


def _nvidia_tool(name: str, flag: str, cubin: bytes) -> str:
    """Return the output of a binary tool that Triton's wheel carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [str(tool), flag, file.name], capture_output=True, text=True, check=True
        ).stdout


def problems(case: Case, found: Resources) -> list[str]:
    """List what the gate refuses in one result."""
    faults = []
    if found.stack_bytes or found.spills:
        faults.append(f"stack {found.stack_bytes} B, spills {found.spills}")
    if found.shared_bytes > SHARED_LIMIT[found.arch]:
        faults.append(f"shared memory {found.shared_bytes} B is over the limit")
    return [f"{found.arch} {found.case}: {fault}" for fault in faults]


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
    """Count SASS instructions of one more normal, the addition that consumes it included.

    Two binaries are compared that differ by four normals a thread.
    """
    counts = []
    for calls in (1, 2):
        signature = {"out": "*fp32", "seed": "*i64", "CALLS": "constexpr", "MATH": "constexpr"}
        source = ASTSource(
            fn=_noise_probe, signature=signature, constexprs={"CALLS": calls, "MATH": "cuda"}
        )
        compiled = triton.compile(source, target=target(arch), options={"num_warps": 4})
        counts.append(len(loop(compiled.asm["cubin"])[0]))
    return (counts[1] - counts[0]) / 4


# --- command line ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table; with --check the exit status is 1 where the gate refuses."""
    parser = argparse.ArgumentParser(prog="python -m tfb_kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--kernel", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--rank", nargs="+", type=int, default=RANKS)
    parser.add_argument("--check", action="store_true", help="fail on stack and spills")
    parser.add_argument("--write", action="store_true", help=f"write {RESOURCES.name}")
    options = parser.parse_args(arguments)
    if launch.INTERPRET:
        parser.error("TRITON_INTERPRET is set, which leaves nothing to compile; unset it")
    if options.write:
        options.dtype, options.rank = WRITTEN
    found, faults = [], []
    print(f"{'arch':8}{'regs':>5}{'shared':>8}{'stack':>6}{'spill':>6}  case")
    for arch in options.arch:
        for case in cases(arch, options.kernel, options.dtype, options.rank):
            r = resources(case, arch)
            print(
                f"{r.arch:8}{r.registers:5}{r.shared_bytes:8}{r.stack_bytes:6}{r.spills:6}"
                f"  {r.case}",
                flush=True,
            )
            found.append(r)
            faults += problems(case, r)
    for arch in (a for a in options.arch if a.startswith("sm_")):
        print(f"{arch}: {instructions_per_normal(arch):g} SASS instructions a normal")
        for shared, kind in ((True, "shared x"), (False, "per-draw x")):
            block = shrink_instructions(arch, "bf16", 16, shared=shared)
            each = expand_instructions(arch, "bf16", 16, 4096, shared=shared)
            print(f"{arch}: {block:g} SASS instructions a block of shrink, {kind}")
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
