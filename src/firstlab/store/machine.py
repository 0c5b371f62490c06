"""Record the code, packages and machine of a measurement, and the memory it took."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("firstlab", "torch", "transformers", "lightning", "peft", "hydra-core", "datasets", "sacrebleu", "numpy")


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """Code revision, package versions and machine: its GPU, unless the device is another or there is none."""
    # An installed copy may lie in somebody else's repository.
    ours = bool(_git("ls-files", Path(__file__).name))
    versions = {name: "not installed" for name in _PACKAGES}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "revision": (_git("rev-parse", "HEAD") or None) if ours else None,
        "uncommitted_changes": ours and bool(_git("status", "--porcelain", "--untracked-files=no")),
        "packages": versions,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if _counts_gpu(device) else processor_name(),
        "threads": torch.get_num_threads(),
    }


def _git(*arguments: str) -> str:
    """What git says about the folder of this file; "" without git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def processor_name() -> str:
    """The system's name of the CPU."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:(.*)", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Let `peak_memory_bytes` count from here (on Linux and on GPUs)."""
    if _counts_gpu(device):
        torch.cuda.reset_peak_memory_stats()
    counters = Path("/proc/self/clear_refs")
    if counters.exists():
        counters.write_text("5")


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Peak memory of the GPU if that is the device (by default where there is one), else of the process."""
    if _counts_gpu(device):
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _counts_gpu(device: torch.device | None) -> bool:
    return torch.cuda.is_available() if device is None else device.type == "cuda"
