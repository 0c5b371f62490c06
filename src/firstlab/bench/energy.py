"""Read energy counters where the device has them: RAPL of the CPU, NVML of the GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")


def joules_counter(device: torch.device, powercap: Path = POWERCAP) -> Callable[[], float] | None:
    """Reads energy in joules since some fixed moment; None where the device does not report it.

    Args:
        device: A CPU counts all its packages, and whatever else runs on them.
        powercap: Folder of the kernel's RAPL counters; often only root may read them.
    """
    return _nvml(device) if device.type == "cuda" else _rapl(powercap)


class _Rapl:
    """Sum over packages of counters in microjoules, each of which starts again after its range."""

    def __init__(self, packages: list[Path]) -> None:
        self.files = [package / "energy_uj" for package in packages]
        self.ranges = [int((package / "max_energy_range_uj").read_text()) for package in packages]
        self.last = self._read()
        self.total = 0

    def _read(self) -> list[int]:
        return [int(file.read_text()) for file in self.files]

    def __call__(self) -> float:
        now = self._read()
        self.total += sum((new - old) % (size + 1) for new, old, size in zip(now, self.last, self.ranges, strict=True))
        self.last = now
        return self.total / 1e6


def _rapl(powercap: Path) -> _Rapl | None:
    # Packages are named intel-rapl:0, on AMD too; their parts, which they include, intel-rapl:0:1.
    packages = sorted(each for each in powercap.glob("intel-rapl:*") if each.name.count(":") == 1)
    try:
        return _Rapl(packages) if packages else None
    except OSError:
        return None


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
