"""Read energy counters where the device has them: RAPL of the CPU, NVML of the GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")  # the kernel's RAPL counters; often only root may read them


def joules_counter(device: torch.device, powercap: Path = POWERCAP) -> Callable[[], float] | None:
    """Reads joules since some moment, on a CPU of all its packages; None where the device does not report them."""
    return _nvml(device) if device.type == "cuda" else _rapl(powercap)


def _rapl(powercap: Path) -> Callable[[], float] | None:
    # Packages are named intel-rapl:0, on AMD too; their parts, which they include, intel-rapl:0:1.
    packages = [each for each in powercap.glob("intel-rapl:*") if each.name.count(":") == 1]
    try:
        last = {each: int((each / "energy_uj").read_text()) for each in packages}
        ranges = {each: int((each / "max_energy_range_uj").read_text()) for each in packages}
    except OSError:
        return None
    total = 0

    def joules() -> float:
        nonlocal total
        for package in packages:  # each counts microjoules, and starts again after its range
            now = int((package / "energy_uj").read_text())
            total += (now - last[package]) % (ranges[package] + 1)
            last[package] = now
        return total / 1e6

    return joules if packages else None


def _nvml(device: torch.device) -> Callable[[], float] | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")  # part of the driver
    except OSError:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()

    def call(name: str, *arguments: Any) -> bool:
        return getattr(library, name)(*arguments) == 0

    def joules() -> float:
        call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    found = call("nvmlInit_v2") and call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle))
    return joules if found and joules() > 0 else None
