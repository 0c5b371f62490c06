"""Measure on a GPU what the project promises there: part by part, each in a process of its own, with its targets.

`python -m firstlab.benchmark preset=gpu`; torch is imported only to measure, for fast help.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from firstlab.config.compose import settings, store_schema
from firstlab.config.schema import check_options, option
from firstlab.store.files import check_writable, read_own, write_atomically

PARTS = ("tests", "decode", "mixed", "prefill", "train", "run", "quantize")


@dataclass
class GpuConfig:
    """Settings of `python -m firstlab.benchmark preset=gpu`."""

    # mini: the same parts on a tiny model, in minutes on a CPU, to try the command itself.
    preset: str = option("gpu", choices="gpu, mini")
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    device: str = option("auto", choices="auto, cpu, cuda")  # auto is CUDA where there is one
    minutes: float = option(
        20.0, above=0
    )  # for all parts together; a part that takes longer than what is left is ended
    overwrite: bool = False  # measure parts again that the folder holds already
    out: str = "runs/gpu"  # folder of all records and pictures

    def check(self) -> None:
        """Raises ValueError with the option, its value and what is allowed."""
        check_options(self)
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ValueError(f"parts={list(self.parts)} is not allowed: choose from {', '.join(PARTS)}")
        check_writable(Path(self.out), "out")


store_schema("gpu_benchmark_schema", GpuConfig)


def load(composed: DictConfig) -> GpuConfig:
    """The checked settings. Raises ValueError with the option, its value and what is allowed."""
    config = settings(composed, GpuConfig)
    config.check()
    return config


def run(config: GpuConfig) -> None:
    """Measure the parts that the folder does not hold yet, and list the targets that were missed.

    A single part runs here; several run one after the other in processes of their own, as an error on a GPU can end the
    process that made it. Exits with 1 if a part failed.
    """
    import torch

    there = torch.cuda.is_available()
    if not there and (config.device == "cuda" or config.preset == "gpu"):
        raise ValueError(f"preset={config.preset}: torch finds no CUDA device; preset=mini runs on a CPU")
    if config.preset == "gpu" and config.device == "cpu":
        raise ValueError("device='cpu' is not allowed: preset=gpu is for a GPU; preset=mini runs on a CPU")
    if len(config.parts) == 1 and _kept(config, config.parts[0]) is None:
        _measure(config, config.parts[0], "cuda" if there and config.device != "cpu" else "cpu")
        return
    start, failed = time.monotonic(), []
    for part in dict.fromkeys(config.parts):
        if _kept(config, part) is not None:
            print(f"{part}: measured already; overwrite=true measures again", flush=True)
        elif not _measured_apart(config, part, 60 * config.minutes - (time.monotonic() - start)):
            failed.append(part)
    _summarize(config, failed)
    if failed:
        sys.exit(1)


def _file(config: GpuConfig, part: str) -> Path:
    return Path(config.out) / f"{part}.json"


def _kept(config: GpuConfig, part: str) -> dict[str, Any] | None:
    """The record of an earlier call with this preset, if that did not have to leave the part out."""
    file = _file(config, part)
    if config.overwrite or not file.exists():
        return None

    def parsed(record: Any) -> dict[str, Any]:
        if (record["part"], record["preset"]) != (part, config.preset):
            raise ValueError(f"it is no record of preset={config.preset}")
        return dict(record)

    record = read_own(file, parsed, "choose another folder with out=, or delete it")
    return None if record["left_out"] else record


def _measured_apart(config: GpuConfig, part: str, seconds: float) -> bool:
    """Whether another process measured the part within this time."""
    given = {"preset": config.preset, "device": config.device, "overwrite": str(config.overwrite).lower()}
    options = [f"{name}={value}" for name, value in (given | {"out": config.out}).items()]
    command = [sys.executable, "-m", "firstlab.benchmark", f"parts=[{part}]", *options]
    print(f"\n== {part} ==", flush=True)
    if seconds <= 0:
        print(f"{part}: not begun, minutes={config.minutes:g} are over; the same command goes on here")
        return False
    code = _exit_code(command, seconds)
    if code is None:
        print(f"{part}: ended, minutes={config.minutes:g} are over; give parts=[{part}] more of them")
        return False
    if code:
        print(f"{part}: failed with exit code {code}", flush=True)
    return code == 0


def _exit_code(command: Sequence[str], seconds: float) -> int | None:
    """Of a process, which ends with all that it has started; None if it took longer than this."""
    from firstlab.bench.gpu_parts import environment

    with subprocess.Popen(command, env=environment(), start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:  # also where somebody has interrupted this
                os.killpg(process.pid, signal.SIGKILL)


def _measure(config: GpuConfig, part: str, device: str) -> None:
    import torch

    from firstlab.bench import gpu_parts
    from firstlab.store import machine

    start, missing, out = time.monotonic(), None, Path(config.out)
    try:
        found = gpu_parts.MEASURES[part](gpu_parts.sizes_of(config.preset, device, out), out)
    except gpu_parts.MissingError as error:
        found, missing = gpu_parts.Found({}), str(error)
    record: dict[str, Any] = {
        "part": part,
        "preset": config.preset,
        "left_out": missing,
        "seconds": time.monotonic() - start,
        "targets": [{**asdict(each), "met": each.met} for each in found.targets],
        "record": found.record,
        **machine.provenance(torch.device(device)),
    }
    write_atomically(_file(config, part), json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    if missing:
        print(f"{part}: left out, {missing}")
    _print_targets(part, record["targets"])
    print(f"record: {_file(config, part)}")


def _print_targets(part: str, targets: Sequence[dict[str, Any]]) -> None:
    """How many were met, and each that was not."""
    missed = [each for each in targets if not each["met"]]
    if targets:
        print(f"{part}: {len(targets) - len(missed)} of {len(targets)} targets met")
    for each in missed:
        side = "at most" if each["at_most"] else "at least"
        print(f"  missed: {each['what']}: {each['value']:.3g}, wanted {side} {each['wanted']:.3g}")


def _summarize(config: GpuConfig, failed: Sequence[str]) -> None:
    """What all parts came to, printed and in summary.json."""
    records = {part: json.loads(_file(config, part).read_text()) for part in PARTS if _file(config, part).exists()}
    print("\n== all parts ==")
    for part, record in records.items():
        note = f"left out, {record['left_out']}" if record["left_out"] else f"{record['seconds']:.0f} s"
        print(f"{part}: {note}{' (an earlier one; this time it failed)' if part in failed else ''}")
        _print_targets(part, record["targets"])
    kept = ("left_out", "seconds", "targets", "revision", "device")
    summary = {part: {name: record[name] for name in kept} for part, record in records.items()}
    write_atomically(Path(config.out) / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    print(f"everything is in {config.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
