"""Energy of a GPU, by the counter of its driver."""

from __future__ import annotations

import torch


def joules() -> float | None:
    """Return what the first visible GPU has used since its driver was loaded.

    Returns:
        Joules; None without a GPU, without the package nvidia-ml-py, or where NVML has no counter.
    """
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        millijoules = pynvml.nvmlDeviceGetTotalEnergyConsumption(
            pynvml.nvmlDeviceGetHandleByUUID(uuid)
        )
    except pynvml.NVMLError:
        return None
    return float(millijoules) / 1000
