"""Side-by-side timing: all contenders of a point interleaved in one run, one JSON line a point.

Each round times every contender once, in an order that rotates, and ours last by pytest-benchmark
itself. Ratios are taken within rounds, so that what disturbs a whole round cancels. "ours_again"
is ours once more among the contenders: its ratio shows what the method cannot tell apart. A timed
call is ``repeats`` steps over ``copies`` sets of buffers, together larger than the last cache of a
GPU, and lasts at least ``MIN_TIME``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.environment import environment, l2_bytes

MIN_TIME = 2e-3  # seconds of a timed call: far above a launch and the clock's resolution
SLOW = 0.5  # seconds of a step whose first call tells its length well enough
MAX_COPIES = 64
LOSS = 1.03  # a contender faster than ours by more than this is flagged
MAX_REPEATS = 1000
KERNELS = 8  # of a profile
CPU = torch.device("cpu")
QUANTILES = {"median": 0.5, "q10": 0.1, "q25": 0.25, "q75": 0.75, "q90": 0.9}

Step = Callable[[int], object]
"""One operation on buffer set i; what it returns is dropped."""
Row = dict[str, Any]


@dataclass
class Bench:
    """What the points of a session share; without arguments for figures that no clock decides.

    Attributes:
        device: Where everything runs.
        dtype: Of weights and activations.
        toy: Whether sizes are tiny and rows no results.
        seconds: Time for one point's rounds; the number of rounds follows from it.
        results: Folder of the JSON lines; None to write nothing.
        bandwidth: Bytes/s of a copy on the device; read and written bytes both count.
        rows: What was measured so far.
    """

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    toy: bool = False
    seconds: float = 0.0
    results: Path | None = None
    bandwidth: float = math.nan
    rows: list[Row] = field(default_factory=list)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def for_kernels(self) -> Bench:
        """Return the session for suites whose sizes only a GPU can run: toy sizes on a CPU."""
        return self if self.device.type == "cuda" else replace(self, toy=True)

    def copies(self, nbytes: int) -> int:
        """Return how many buffer sets exceed twice the last cache, as far as memory allows."""
        if self.device.type != "cuda":
            return 2
        wanted = math.ceil(2 * l2_bytes() / nbytes)
        memory = torch.cuda.get_device_properties(0).total_memory
        return max(1, min(wanted, MAX_COPIES, int(memory / 4 // nbytes)))


# --- clock ----------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, from an idle device to an idle device.

    The clock is pytest-benchmark's.
    """
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def measure_bandwidth(device: torch.device) -> float:
    """Return the bytes/s of the best of several copies of a large tensor."""
    nbytes = 64 << 20
    if device.type == "cuda":
        nbytes = min(8 << 30, torch.cuda.get_device_properties(0).total_memory // 8)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Many, so that clocks are up.
    return 2 * nbytes / min(elapsed(lambda: target.copy_(source), device) for _ in range(30))


class Contender:
    """A step repeated over rotating buffer sets: called, or replayed as one CUDA graph.

    It is warmed up on every buffer set, then ``repeats`` says how many steps a timed call needs.
    """

    def __init__(self, step: Step, copies: int, device: torch.device) -> None:
        self.step, self.copies, self.device = step, copies, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.repeats = copies
        self.peak_bytes: int | None = None  # of device memory, all tensors alive included
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        once = elapsed(self.run, device) / copies  # compiles, allocates, fills caches
        if device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(device)
        self._repeat(once)

    def _repeat(self, once: float) -> None:
        """Set ``repeats`` so that a call lasts ``MIN_TIME``; ``once``: seconds of a step, or 0."""
        if once < SLOW:
            once = min(elapsed(self.run, self.device) for _ in range(2)) / self.repeats
        self.repeats = max(self.copies, min(math.ceil(MIN_TIME / once), MAX_REPEATS))
        self.seconds = once * self.repeats

    def described(self, rounds: int) -> Row:
        return {"rounds": rounds, "repeats": self.repeats, "peak_bytes": self.peak_bytes}

    def run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for i in range(self.repeats):
            self.step(i % self.copies)

    def capture(self, pool: Any = None) -> None:
        """Replay a CUDA graph from now on, whose memory is that of ``pool`` or its own.

        Two captures: without launches a step may take a tenth of its time, and what lasts
        ``MIN_TIME`` is known only then.
        """
        self.repeats = self.copies
        self._captured(pool)
        self._repeat(0.0)
        self._captured(pool)

    def _captured(self, pool: Any) -> None:
        # A pool none of whose graphs lives cannot be captured into again.
        earlier, self.graph = self.graph, None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.run()
        self.graph = graph
        del earlier

    def kernels(self) -> dict[str, float]:
        """Return the seconds of a step in each of its longest kernels (on a CPU: operators).

        torch.profiler stays attached to the process and slows what is launched later: nothing is
        to be timed after this.
        """
        on_gpu = self.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as p:
            self.run()
            synchronize(self.device)
        times: dict[str, float] = {}
        for e in p.key_averages():
            microseconds = e.self_device_time_total if on_gpu else e.self_cpu_time_total
            times[e.key[:80]] = times.get(e.key[:80], 0.0) + 1e-6 * microseconds
        longest = sorted(times, key=lambda k: -times[k])[:KERNELS]
        return {k: times[k] / self.repeats for k in longest if times[k] > 0}


# --- comparison -----------------------------------------------------------------------------------


def compare(
    benchmark: Any,
    bench: Bench,
    suite: str,
    measure: str,
    point: Mapping[str, Any],
    steps: Mapping[str, Step],
    *,
    copies: int = 1,
    graphs: bool = False,
    unit: str | None = None,
    parts: Collection[str] = (),
    skipped: Mapping[str, str] | None = None,
    least_bytes: float | None = None,
    judge: Callable[[Row], list[Row]] | None = None,
    rounds: tuple[int, int] = (15, 40),
    details: Mapping[str, Any] | None = None,
) -> Row:
    """Time steps side by side, keep the row, and record it if asked to.

    Args:
        benchmark: pytest-benchmark's fixture.
        bench: The session.
        suite: Name of the results file.
        measure: What of the point is timed.
        point: Its configuration.
        steps: The contenders, "ours" among them. What runs out of GPU memory is skipped.
        copies: Sets of buffers that steps take turns with.
        graphs: Replay all as CUDA graphs on a GPU, which leaves launches out.
        unit: A step in whose time the others are expressed as well, paired like the ratios.
        parts: Steps that are part of the work and no rivals, so never a loss.
        skipped: Contenders that are left out, and why.
        least_bytes: What ours must move at least.
        judge: From the finished row to its targets (see :func:`target`).
        rounds: The fewest and the most; between them ``bench.seconds`` decides.
        details: Further fields of the row.

    Returns:
        The row.
    """
    left_out = dict(skipped or {})
    contenders = _start(bench, steps, copies, graphs, left_out)
    times = _times(benchmark, bench, contenders, rounds)
    found: Row = {k: quantiles(v) | contenders[k].described(len(v)) for k, v in times.items()}
    row: Row = {
        **heading(bench, suite, measure, point),
        "contenders": found,
        "ratios": _ratios(times, "ours"),
        "skipped": left_out,
        "graphs": graphs and bench.device.type == "cuda",
        **(details or {}),
    }
    if unit is not None:
        row["in_units_of"] = {"name": unit, "ratios": _ratios(times, unit)}
    if least_bytes is not None:
        least = least_bytes / bench.bandwidth
        fraction = least / found["ours"]["median"]
        row["floor"] = {"seconds": least, "fraction": fraction, "bytes": least_bytes}
    row["losses"] = [
        f"{k} is {1 / r['median']:.2f}x faster"
        for k, r in row["ratios"].items()
        if r["median"] < 1 / LOSS and k not in {"ours_again", unit, *parts}
    ]
    row["targets"] = []
    try:
        if judge:
            row["targets"] = judge(row)
    finally:  # what was measured is kept, whatever is wrong with its targets
        record(bench, row)
    return row


def _start(
    bench: Bench, steps: Mapping[str, Step], copies: int, graphs: bool, left_out: dict[str, str]
) -> dict[str, Contender]:
    """Warm the contenders up, ours first; what does not fit in memory goes to ``left_out``."""
    found: dict[str, Contender] = {}
    # One pool for all graphs: what a step puts out is dropped, so the next may write over it.
    pool = torch.cuda.graph_pool_handle() if graphs and bench.device.type == "cuda" else None
    for name, step in {"ours": steps["ours"], **steps, "ours_again": steps["ours"]}.items():
        try:
            made = Contender(step, copies, bench.device)
            if pool is not None:
                made.capture(pool)
            found[name] = made
        except torch.OutOfMemoryError:
            left_out[name] = "out of memory"
        except RuntimeError as error:
            if pool is None:
                raise
            # After a capture that failed the allocator of this process is not to be trusted.
            pytest.exit(f"the CUDA graph of {name} failed: {error}", returncode=1)
    if "ours" not in found:
        raise RuntimeError(f"ours could not run: {left_out['ours']}")
    return found


def _times(
    benchmark: Any, bench: Bench, contenders: Mapping[str, Contender], rounds: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return each contender's seconds of a step, a value a round."""
    mine = contenders["ours"]
    fewest, most = (3, 3) if bench.toy else rounds
    total = sum(c.seconds for c in contenders.values())
    count = max(fewest, min(most, int(bench.seconds / total)))
    names = [name for name in contenders if name != "ours"]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    turn = 0

    def others() -> None:
        nonlocal turn
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            seconds[name].append(elapsed(contenders[name].run, bench.device))
        turn += 1
        synchronize(bench.device)

    def timed() -> None:
        mine.run()
        synchronize(bench.device)

    benchmark.pedantic(timed, setup=others, rounds=count, iterations=1)
    # Disabled (--benchmark-disable), pytest-benchmark runs once and keeps no time.
    own = [elapsed(timed, bench.device)] if benchmark.disabled else benchmark.stats.stats.data
    seconds["ours"] = list(own)
    return {k: np.array(v) / contenders[k].repeats for k, v in seconds.items()}


def profile(
    bench: Bench,
    suite: str,
    point: Mapping[str, Any],
    step: Step,
    *,
    copies: int = 1,
    graphs: bool = False,
) -> Row:
    """Record the time that a step spends in each kernel; the last thing that a process does."""
    made = Contender(step, copies, bench.device)
    if graphs and bench.device.type == "cuda":
        made.capture()
    return record(bench, heading(bench, suite, "kernels", point) | {"kernels": made.kernels()})


def record_skip(bench: Bench, suite: str, measure: str, point: Mapping[str, Any], why: str) -> None:
    """Record why a point has no measurement."""
    record(bench, heading(bench, suite, measure, point) | {"skipped_point": why})


def heading(bench: Bench, suite: str, measure: str, point: Mapping[str, Any]) -> Row:
    """Return what every row begins with; nothing is compared yet."""
    return {
        "suite": suite,
        "measure": measure,
        "point": dict(point),
        "device": bench.device.type,
        "toy": bench.toy,
        "ratios": {},
        "losses": [],
        "targets": [],
    }


def record(bench: Bench, row: Row) -> Row:
    """Add where and when to a row, keep it, and append it to its suite's file if there is one."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    row |= {"environment": environment(), "date": now}
    bench.rows.append(row)
    if bench.results is not None:
        bench.results.mkdir(parents=True, exist_ok=True)
        with (bench.results / f"{row['suite']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
    return row


def first_line(error: Exception) -> str:
    """Return what went wrong, in a line of a row."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


# --- summaries ------------------------------------------------------------------------------------


def quantiles(values: np.ndarray) -> dict[str, float]:
    return {k: float(np.quantile(values, q)) for k, q in QUANTILES.items()}


def quartiles(values: np.ndarray) -> dict[str, float]:
    return {k: v for k, v in quantiles(values).items() if k in ("median", "q25", "q75")}


def _ratios(times: Mapping[str, np.ndarray], unit: str) -> dict[str, dict[str, float]]:
    return {k: quartiles(v / times[unit]) for k, v in times.items() if k != unit}


def target(name: str, value: float, bound: float, *, at_least: bool) -> Row:
    """Return a target's value and bound, and whether it is met."""
    met = value >= bound if at_least else value <= bound
    return {"name": name, "value": value, "bound": bound, "at_least": at_least, "met": met}
