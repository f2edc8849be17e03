"""Energy of a GPU over a stretch of code: its power draw, sampled in a thread."""

from __future__ import annotations

import subprocess
import threading
import time
from itertools import pairwise
from types import TracebackType

import torch

PERIOD = 0.5  # seconds between two samples


class EnergyMeter:
    """Within this context the power of the first GPU is sampled; ``joules`` is its integral, None
    without a GPU, or where neither NVML nor nvidia-smi tells."""

    def __init__(self) -> None:
        self.joules: float | None = None
        self._samples: list[tuple[float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="energy", daemon=True)

    def __enter__(self) -> EnergyMeter:
        if torch.cuda.is_available() and (watts := power_draw()) is not None:
            self._samples.append((time.perf_counter(), watts))
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if not self._samples:
            return
        self._done.set()
        self._thread.join()
        self._note()
        self.joules = integral(self._samples)

    def _sample(self) -> None:
        while not self._done.wait(PERIOD):
            self._note()

    def _note(self) -> None:
        if (watts := power_draw()) is not None:
            self._samples.append((time.perf_counter(), watts))


def integral(samples: list[tuple[float, float]]) -> float:
    """Of (seconds, watts) by the trapezoidal rule: joules."""
    return sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in pairwise(samples))


def power_draw() -> float | None:
    """Watts of the first visible GPU; None where unknown."""
    try:
        return torch.cuda.power_draw() / 1000  # milliwatts; needs NVML's Python module
    except Exception:  # NVML's errors have no other base
        pass
    command = ["nvidia-smi", "-i", "0", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return float(done.stdout.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
