"""Measure on a GPU what the project promises there: part by part, each in a process of its own, with its targets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from firstlab.bench import gpu_parts
from firstlab.bench.gpu import PARTS, Found, GpuConfig, MissingError, Target, environment
from firstlab.store import machine
from firstlab.store.files import read_own, write_atomically


def run(config: GpuConfig) -> None:
    """Measure the parts that the folder does not hold yet, and list the targets that were missed.

    A single part runs here; several run one after the other in processes of their own, as an error on a GPU can end the
    process that made it. Exits with 1 if a part failed.
    """
    there = torch.cuda.is_available()
    if not there and (config.device == "cuda" or config.preset == "gpu"):
        raise ValueError(f"preset={config.preset}: torch finds no CUDA device; preset=mini runs on a CPU")
    if config.preset == "gpu" and config.device == "cpu":
        raise ValueError("device='cpu' is not allowed: preset=gpu is for a GPU; preset=mini runs on a CPU")
    if len(config.parts) == 1 and _kept(config, config.parts[0]) is None:
        _measure(config, config.parts[0])
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
    with subprocess.Popen(command, env=environment(), start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:  # also where somebody has interrupted this
                os.killpg(process.pid, signal.SIGKILL)


def _measure(config: GpuConfig, part: str) -> None:
    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    start = time.monotonic()
    missing = None
    try:
        found = gpu_parts.MEASURES[part](gpu_parts.sizes_of(config, device), Path(config.out))
    except MissingError as error:
        found, missing = Found({}), str(error)
    record = {
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
    print_targets(part, found.targets)
    print(f"record: {_file(config, part)}")


def print_targets(part: str, targets: Sequence[Target]) -> None:
    """How many were met, and each that was not."""
    missed = [each for each in targets if not each.met]
    if targets:
        print(f"{part}: {len(targets) - len(missed)} of {len(targets)} targets met")
    for each in missed:
        print(f"  missed: {each}")


def _summarize(config: GpuConfig, failed: Sequence[str]) -> None:
    """What all parts came to, printed and in summary.json."""
    records = {part: json.loads(_file(config, part).read_text()) for part in PARTS if _file(config, part).exists()}
    print("\n== all parts ==")
    for part, record in records.items():
        note = f"left out, {record['left_out']}" if record["left_out"] else f"{record['seconds']:.0f} s"
        print(f"{part}: {note}{' (an earlier one; this time it failed)' if part in failed else ''}")
        fields = ("what", "value", "wanted", "at_most")
        print_targets(part, [Target(**{name: each[name] for name in fields}) for each in record["targets"]])
    kept = ("left_out", "seconds", "targets", "revision", "device")
    summary = {part: {name: record[name] for name in kept} for part, record in records.items()}
    write_atomically(Path(config.out) / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    print(f"everything is in {config.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
