"""Measure tile configurations and thresholds between paths: ``python -m benchmarks.kernels.sweep``.

Every kernel is timed with about 30 configurations at up to five numbers of rows, then the paths
with the best of them. The answer is a launch.json beside the rows; once float64 has confirmed it,
it replaces ``tfb_kernels/data/launch.json``. Then ``python -m tfb_kernels.aot --write`` says what
the new configurations use. Without a GPU only ``merge_rows`` of a CPU is measured, in float32.
--toy: tiny sizes, a few configurations, also in Triton's interpreter; leaves launch.json alone.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.environment import environment, results_folder
from benchmarks.kernels import contenders, test_predictive
from benchmarks.kernels.tiles import CPU, DRAWS, RANK, TOY, Job, Sizes, Step, distinct, jobs, steps
from benchmarks.timing import Bench, Contender, elapsed, first_line, heading, record
from tfb import atomic
from tfb.draws import Draws
from tfb_kernels import launch, tuning
from tfb_kernels.launch import LaunchConfig

REPLAYS = 5  # whose median counts
SHARED_RANK = 32  # the largest rank that takes what rank 16 found
NEVER = 1 << 30  # rows, and a factor of rows: the other way was slower everywhere


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call, on a GPU without launches."""
    made = Contender(lambda i: call(), 1, device)
    if device.type == "cuda":
        made.capture()
    return median(elapsed(made.run, device) for _ in range(REPLAYS)) / made.repeats


# --- compilation ----------------------------------------------------------------------------------


def compile_ahead(
    job: Job, sizes: Sizes, config: LaunchConfig, *, dtype: torch.dtype
) -> str | None:
    """Launch once in this process, which leaves the binary in Triton's cache.

    Returns:
        Why this configuration is none, if it is: it does not compile, or the gate of
        ``tfb_kernels.aot`` refuses what it would use, in bfloat16, float32 or TF32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        for step in steps(job, sizes, device, dtype).values():
            step(config)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return "; ".join(refused(job.kernel, config)) or None
    except Exception as error:  # of the compiler: a finding about this configuration
        return first_line(error)


def refused(kernel: str, config: LaunchConfig) -> list[str]:
    """Return what the gate says of a configuration, on architectures that it knows."""
    from tfb_kernels import aot

    arch = launch.architecture(torch.device("cuda"))
    if arch not in aot.ARCHITECTURES:
        return []
    rank = 0 if kernel in ("statistics", "mean") else SHARED_RANK  # where it is tightest
    return [
        problem
        for dtype in ("bf16", "fp32", "tf32")
        for case in aot.kernel_cases(arch, kernel, dtype, rank, config)
        for problem in aot.problems(case, aot.resources(case, arch))
    ]


# --- the sweep ------------------------------------------------------------------------------------


def sweep(bench: Bench, sizes: Sizes, workers: int) -> None:
    """Measure all kernels, then the thresholds; write ``tuning.LAUNCH_FILE`` after each kernel.

    The configuration of least time (the geometric mean over shared and per-draw x) becomes that of
    its rows and of ranks up to ``SHARED_RANK``; larger ranks keep theirs. Inputs stay in the L2
    where they fit, as they do in a model, where the layer before has just written them.

    Raises:
        RuntimeError: A kernel of which nothing runs, or a chosen configuration that is wrong.
    """
    arch = launch.architecture(bench.device)
    data = json.loads(tuning.LAUNCH_FILE.read_text())
    before = tuning.entry(arch)
    medians: dict[str, dict[int, dict[str, float]]] = {}
    measured = about() | {"microseconds": medians}
    entry: dict[str, Any] = {"kernels": {}, "paths": before["paths"], "measured": measured}
    data["architectures"][arch] = entry
    # Each has a context on the GPU of its own; a fork would share a broken one.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for job in jobs(sizes, bench.toy):
            made = steps(job, sizes, bench.device, bench.dtype)
            job = replace(job, candidates=tuple(distinct(job.candidates, made)))
            ahead = partial(compile_ahead, job, sizes, dtype=bench.dtype)
            reasons = list(pool.map(ahead, job.candidates))
            best, times = measure(bench, job, made, reasons)
            medians.setdefault(job.kernel, {})[job.rows] = times
            add(entry["kernels"].setdefault(job.kernel, []), job, best)
            if job.max_rows is None:
                finish(entry["kernels"], job.kernel, before["kernels"][job.kernel])
                write(data, tuning.LAUNCH_FILE)
    tuning.reload()
    if faults := wrong(bench, sizes):
        raise RuntimeError("the new configurations are wrong, none was taken: " + faults)
    entry["paths"] = {
        "generate_min_rows": threshold(bench, sizes),
        "merge_rows": merge_factor(bench, sizes),
    }
    write(data, tuning.LAUNCH_FILE)


@torch.no_grad()
def sweep_cpu(bench: Bench) -> None:
    """Measure the one number that a CPU has in ``launch.json``: from where on it merges."""
    found = merge_factor(bench, CPU)
    data = json.loads(tuning.LAUNCH_FILE.read_text())
    data["architectures"]["cpu"] = {"paths": {"merge_rows": found}, "measured": about()}
    write(data, tuning.LAUNCH_FILE)


def wrong(bench: Bench, sizes: Sizes) -> str:
    """Return what float64 says against the table as it is now, at every number of rows; else "".

    Raises:
        AssertionError: predictive_reduction is wrong.
    """
    units = torch.arange(DRAWS, device=bench.device).view(-1, 2)
    test_predictive.check(4 * torch.randn(DRAWS, 3, sizes.vocabulary, device=bench.device), units)
    found = {
        path: contenders.errors(path, bench.device, bench.dtype, sizes.rows)
        for path in launch.PATHS
    }
    found["merge"] = contenders.merge_errors(bench.device, bench.dtype)
    return "; ".join(f"{path}: {fault}" for path, fault in found.items() if fault)


def measure(
    bench: Bench, job: Job, made: Mapping[str, Step], reasons: Sequence[str | None]
) -> tuple[LaunchConfig, dict[str, float]]:
    """Time a job's configurations, record the row, return the fastest and its microseconds.

    Raises:
        RuntimeError: None of them runs.
    """
    times: dict[LaunchConfig, dict[str, float]] = {}
    failed: list[dict[str, Any]] = []
    for config, reason in zip(job.candidates, reasons, strict=True):
        try:
            if reason is None:
                found = {k: seconds(partial(s, config), bench.device) for k, s in made.items()}
                times[config] = found
        except Exception as error:
            reason = first_line(error)
        if reason is not None:
            failed.append({**config._asdict(), "reason": reason})
    if not times:
        raise RuntimeError(f"{job.kernel}, {job.rows} rows: no configuration runs: {failed[:1]}")
    best = min(times, key=lambda c: sum(map(math.log, times[c].values())))
    point = {"rows": job.rows, "r": RANK, "S": DRAWS, "dtype": bench.dtype_name}
    row = heading(bench, "sweep", job.kernel, point) | {
        "medians": [{**c._asdict(), **t} for c, t in times.items()],
        "failed": failed,
        "best": {**best._asdict(), **times[best]},
    }
    record(bench, row)
    shown = ", ".join(f"{k or 'time'} {1e6 * t:.1f} µs" for k, t in times[best].items())
    slowest = max(sum(t.values()) for t in times.values()) / sum(times[best].values())
    print(
        f"{job.kernel:10} {job.rows:5} rows: {shown}; {len(times)} ran, {len(failed)} did not; "
        f"worst {slowest:.1f}x; {best}",
        flush=True,
    )
    return best, {k or "both": round(1e6 * t, 2) for k, t in times[best].items()}


def threshold(bench: Bench, sizes: Sizes) -> int:
    """Return the rows that share a stream from which generating loses least, over all points."""
    draws = Draws.antithetic(DRAWS, contenders.SIGMA)
    times: dict[tuple[int, str], dict[str, float]] = {}
    for rows in sizes.path_rows:
        for kind, (n, m) in (("shared", sizes.shared), ("per-draw", sizes.per_draw)):
            # Of per-draw x two draws, antithetic, share a stream.
            size = (rows,) if kind == "shared" else (DRAWS, rows // 2)
            layer = contenders.make_layer(m, n, RANK, bench.dtype, bench.device)
            x = torch.randn(*size, n, dtype=bench.dtype, device=bench.device)
            base = x.new_zeros(*size, m)
            times[rows, kind] = {
                path: seconds(
                    partial(contenders.op_on_path, layer, x, base, draws, path), bench.device
                )
                for path in launch.PATHS
            }
    found = int(best_threshold({k: (t["fused"], t["generate"]) for k, t in times.items()}))
    point = {"r": RANK, "S": DRAWS, "dtype": bench.dtype_name}
    row = heading(bench, "sweep", "paths", point) | {
        "medians": [{"rows": r, "x": kind, **t} for (r, kind), t in times.items()],
        "generate_min_rows": found,
    }
    record(bench, row)
    for (rows, kind), t in times.items():
        fused, generated = 1e6 * t["fused"], 1e6 * t["generate"]
        print(f"paths {rows:5} rows {kind:8}: fused {fused:.1f} µs, generate {generated:.1f} µs")
    print(f"generate_min_rows: {found}", flush=True)
    return found


def best_threshold(times: Mapping[tuple[float, str], tuple[float, float]]) -> float:
    """Return the size from which on the second way loses least, summed over points.

    Args:
        times: By size and kind of a point, the seconds of both ways.

    Returns:
        The bound; ``NEVER`` where the first way is to be taken always.
    """
    bounds = [*sorted({size for size, _ in times}), NEVER]

    def excess(bound: float) -> float:
        return sum(
            (upper if size >= bound else lower) / min(lower, upper) - 1
            for (size, _), (lower, upper) in times.items()
        )

    return min(bounds, key=excess)


def merge_factor(bench: Bench, sizes: Sizes) -> float:
    """Return ``merge_rows``: the factor of the ratio of bytes from which merging loses least."""
    draws, device = Draws.antithetic(DRAWS, contenders.SIGMA), bench.device
    times: dict[tuple[float, str], tuple[float, float]] = {}
    for kind, (n, m) in (("q", sizes.shared), ("down", sizes.per_draw)):
        layer = contenders.make_layer(m, n, RANK, bench.dtype, device)
        bytes_alone = 2 * n * m / (n + 2 * m)
        for rows in sizes.merge_rows:
            x = torch.randn(DRAWS, rows, n, dtype=bench.dtype, device=device)
            added, merged = (
                seconds(partial(call, layer, x, draws), device)
                for call in (contenders.ours_added, contenders.ours_merged)
            )
            times[round(rows / bytes_alone, 4), kind] = added, merged
            microseconds = f"added {1e6 * added:.1f} µs, merged {1e6 * merged:.1f} µs"
            print(f"merge {rows:5} rows {kind:8}: {microseconds}")
    found = best_threshold(times)
    row = heading(bench, "sweep", "merge", {"r": RANK, "S": DRAWS, "dtype": bench.dtype_name}) | {
        "medians": [
            {"factor": f, "layer": kind, "added": a, "merged": b}
            for (f, kind), (a, b) in times.items()
        ],
        "merge_rows": found,
    }
    record(bench, row)
    print(f"merge_rows: {found}", flush=True)
    return found


# --- launch.json ----------------------------------------------------------------------------------


def about() -> dict[str, Any]:
    """Return what an entry's "measured" says."""
    e = environment()
    return {
        "device": (e["gpu"] or {}).get("name") or e["cpu"]["model"],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": e["commit"]["id"],
        "torch": e["versions"]["torch"],
        "triton": e["versions"]["triton"],
        "rows": "benchmarks/results/sweep.jsonl",
    }


# What a kernel's launcher takes from a configuration (``LaunchConfig``); warps all of them.
USED = {
    "shrink": ("block_t", "block_p", "block_k", "num_stages"),
    "expand": ("block_t", "block_m", "block_k", "num_stages"),
    "generate": ("block_p", "block_k"),
    "merge": ("block_m", "block_n", "block_k", "num_stages"),
    "statistics": ("block_k",),
    "mean": ("block_k",),
}


def add(listed: list[dict[str, Any]], job: Job, best: LaunchConfig) -> None:
    """Append one line to a kernel's list."""
    line: dict[str, Any] = {} if job.max_rows is None else {"max_rows": job.max_rows}
    if job.kernel in ("shrink", "expand", "merge"):
        line["max_rank"] = SHARED_RANK
    values = best._asdict()
    listed.append(line | {k: values[k] for k in (*USED[job.kernel], "num_warps")})


def finish(kernels: dict[str, Any], kernel: str, before: list[dict[str, Any]]) -> None:
    """Keep the lines of ranks that were not measured."""
    if "max_rank" in kernels[kernel][-1]:
        kernels[kernel] += [c for c in before if c.get("max_rank", 1 << 30) > SHARED_RANK]


def write(data: dict[str, Any], file: Path) -> None:
    """Write a configuration a line; the old file stays whole until the new one is."""
    atomic.write(file, f"{formatted(data)}\n".encode())


def formatted(value: Any, indent: str = "") -> str:
    """Return JSON in which an object of plain values takes one line."""
    inner = indent + "  "
    if isinstance(value, dict) and any(isinstance(v, dict | list) for v in value.values()):
        lines = [f"{inner}{json.dumps(str(k))}: {formatted(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + formatted(v, inner) for v in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


# --- command line ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--toy", action="store_true", help="tiny sizes, a few configurations")
    parser.add_argument("--workers", type=int, help="processes that compile (default: up to 16)")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    if options.toy and not (on_gpu or launch.INTERPRET):
        parser.error("--toy runs kernels: without a GPU set TRITON_INTERPRET=1")
    results = results_folder()
    results.mkdir(parents=True, exist_ok=True)
    bench = Bench(results=results, toy=options.toy)
    if not on_gpu and not options.toy:
        sweep_cpu(bench)
        return
    if on_gpu:
        bench = replace(bench, device=torch.device("cuda"), dtype=torch.bfloat16)
    # The table that everything uses changes when its successor has proved right, not before.
    package, tuning.LAUNCH_FILE = tuning.LAUNCH_FILE, results / "launch.json"
    write(json.loads(package.read_text()), tuning.LAUNCH_FILE)
    workers = options.workers or min(16, os.cpu_count() or 1)
    with torch.no_grad():
        sweep(bench, TOY if options.toy else Sizes(), workers)
    if not options.toy:
        write(json.loads(tuning.LAUNCH_FILE.read_text()), package)


if __name__ == "__main__":
    main()
