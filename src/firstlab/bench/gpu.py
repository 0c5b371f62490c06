"""Settings, targets and results of `python -m firstlab.benchmark preset=gpu`; imports no torch, for fast help."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from firstlab.config.compose import settings, store_schema
from firstlab.store.files import check_writable

PARTS = ("tests", "decode", "mixed", "prefill", "train", "run", "quantize")
PRESETS = ("gpu", "mini")
DEVICES = ("auto", "cpu", "cuda")


@dataclass
class GpuConfig:
    """Settings of `python -m firstlab.benchmark preset=gpu`."""

    preset: str = "gpu"  # or mini: the same parts on a tiny model, in minutes on a CPU, to try the command itself
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    device: str = "auto"  # "cpu", "cuda", or "auto" for CUDA where there is one
    minutes: float = 20.0  # for all parts together; a part that takes longer than what is left is ended
    overwrite: bool = False  # measure parts again that the folder holds already
    out: str = "runs/gpu"  # folder of all records and pictures

    def check(self) -> None:
        """Raises ValueError with the option, its value and what is allowed."""
        for option, allowed in (("preset", PRESETS), ("device", DEVICES)):
            if getattr(self, option) not in allowed:
                given = getattr(self, option)
                raise ValueError(f"{option}={given!r} is not allowed: choose one of {', '.join(allowed)}")
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ValueError(f"parts={list(self.parts)} is not allowed: choose from {', '.join(PARTS)}")
        if not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes} is not allowed: greater than 0")
        check_writable(Path(self.out), "out")


store_schema("gpu_benchmark_schema", GpuConfig)


@dataclass(frozen=True)
class Target:
    """A number that was measured, and what it should be."""

    what: str
    value: float
    wanted: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """NaN never is."""
        return self.value <= self.wanted if self.at_most else self.value >= self.wanted

    def __str__(self) -> str:
        side = "at most" if self.at_most else "at least"
        return f"{self.what}: {self.value:.3g}, wanted {side} {self.wanted:.3g}"


@dataclass
class Found:
    """What a part measured."""

    record: dict[str, Any]
    targets: list[Target] = field(default_factory=list)


class MissingError(Exception):
    """A part cannot run here: a library or folder is not there."""


def load(composed: DictConfig) -> GpuConfig:
    """The checked settings. Raises ValueError with the option, its value and what is allowed."""
    config = settings(composed, GpuConfig)
    config.check()
    return config


def environment() -> dict[str, str]:
    """Of further processes: they find the package where it is, installed or not, and ask no network."""
    places = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), "HF_HUB_OFFLINE": "1"}
