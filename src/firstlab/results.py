"""`result.json`: one record per run, written last and atomically; and the table of several runs."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import platform
import resource
import subprocess
import sys
import traceback
import zlib
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firstlab.files import json_text, write_atomically

RESULT = "result.json"
FAILURE = "failure.json"
#: Environment variable that tells the processes of a run that it is a job of a sweep, which wants to know failures.
SWEEP_JOB = "FIRSTLAB_SWEEP_JOB"
_PACKAGES = ("firstlab", "torch", "transformers", "lightning", "peft", "hydra-core", "datasets", "sacrebleu", "numpy")
ROW_NAMES = {"base": "Base", "base_lora": "Base + LoRA", "router": "Router", "router_lora": "Router + LoRA"}


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """Code revision, package versions and machine: its GPU, unless the device is another or there is none."""
    # An installed copy may lie in somebody else's repository.
    ours = bool(_git("ls-files", Path(__file__).name))
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    name = torch.cuda.get_device_name() if _counts_gpu(device) else processor_name()
    return {
        "revision": (_git("rev-parse", "HEAD") or None) if ours else None,
        "uncommitted_changes": ours and bool(_git("status", "--porcelain", "--untracked-files=no")),
        "packages": versions,
        "python": platform.python_version(),
        "device": name,
        "threads": torch.get_num_threads(),
    }


def _git(*arguments: str) -> str:
    """What git says about the folder of this file; nothing where there is no git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def processor_name() -> str:
    """As the system calls the CPU."""
    info = Path("/proc/cpuinfo")
    names = [] if not info.exists() else [x for x in info.read_text().splitlines() if x.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Let `peak_memory_bytes` count from here, for several runs in one process (on Linux and on GPUs)."""
    if _counts_gpu(device):
        torch.cuda.reset_peak_memory_stats()
    counters = Path("/proc/self/clear_refs")
    if counters.exists():
        counters.write_text("5")


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Peak memory: of the GPU if that is the device, or where there is one if none is given; else of the process."""
    if _counts_gpu(device):
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _counts_gpu(device: torch.device | None) -> bool:
    return torch.cuda.is_available() if device is None else device.type == "cuda"


def write(directory: Path, record: dict[str, Any]) -> None:
    """Write result.json; what is not finite is null there."""
    write_atomically(directory / RESULT, json_text(record, indent=2) + "\n")


def read(directory: Path, remedy: str = "pass overwrite=true to run again") -> dict[str, Any] | None:
    """The record of a finished run, or None.

    Args:
        directory: Of the run.
        remedy: What to do about a record that cannot be read.

    Raises:
        ValueError: It cannot be read.
    """
    file = directory / RESULT
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(record, dict) or not isinstance(record.get("variants"), dict):
        raise ValueError(f"{file} is not a result of firstlab (it has no variants); {remedy}")
    return record


def write_failure(directory: Path, error: BaseException) -> None:
    """Record why a run of a sweep ended without a result; `read_failure` reads it, the next try deletes it."""
    text = str(error).strip() or "no message"
    name = type(error).__name__
    record = {
        "error": text.splitlines()[0] if isinstance(error, ValueError) else f"{name}: {text.splitlines()[0]}",
        "traceback": "".join(traceback.format_exception(error)),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_atomically(directory / FAILURE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_failure(directory: Path) -> dict[str, Any] | None:
    """What `write_failure` recorded, or None; of a file that cannot be read, that."""
    file = directory / FAILURE
    if not file.is_file():
        return None
    try:
        failure = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        failure = None
    if isinstance(failure, dict) and isinstance(failure.get("error"), str):
        return failure
    return {"error": f"{file} cannot be read"}


def pack(values: Any) -> str:
    """An array as short text: NumPy's own format, compressed, in base64; int32 where whole, else float32."""
    array = np.asarray(values)
    whole = np.issubdtype(array.dtype, np.integer) or bool(np.all(array == np.floor(array)))
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.int32 if whole else np.float32), allow_pickle=False)
    return base64.b64encode(zlib.compress(buffer.getvalue(), 9)).decode("ascii")


def unpack(text: str) -> np.ndarray:
    """What `pack` was given, as float64.

    Raises:
        ValueError: It is something else.
    """
    try:
        raw = zlib.decompress(base64.b64decode(text, validate=True))
        return np.load(io.BytesIO(raw), allow_pickle=False).astype(np.float64)
    except (zlib.error, ValueError, EOFError) as error:
        raise ValueError(f"per-example numbers cannot be read: {error}") from error


def rate_by_token(rates: np.ndarray, response_tokens: np.ndarray) -> float:
    """Skip rate of the decode steps that give the references' tokens: prompts with long responses weigh more.

    It is what skipping saves of the decode time of a whole test set; the mean over prompts says that only where all
    prompts skip alike. The references' lengths are the same for every method. Without a decode step, the mean.

    Args:
        rates: [N], each prompt's share of skipped layers.
        response_tokens: [N], lengths of the references; the first token of each comes from prefill.
    """
    steps = np.maximum(response_tokens - 1, 0)
    return float((rates * steps).sum() / steps.sum()) if steps.any() else float(rates.mean())


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row per variant of a run, for tables."""
    found = []
    for name, variant in record["variants"].items():
        primary = variant["primary_metric"]
        found.append(
            {
                "variant": name,
                "method": record["method"],
                "label": record["label"],
                "level": record["level"],
                "note": record.get("note"),
                "metric": primary,
                "metrics": variant["metrics"],
                "perplexity": variant.get("perplexity"),
                "skip": variant["skip"],
                "timing": variant.get("timing"),
                "directory": record["directory"],
            }
        )
    return found


def row_title(row: dict[str, Any]) -> str:
    """How a row is called in tables and pictures."""
    dense = row["method"] == "none"
    name = "FiRST" if row["method"] == "first" else row["method"]
    title = ROW_NAMES[row["variant"]] if dense else f"{name} {ROW_NAMES[row['variant']]}"
    details = [each for each in ("" if dense else row["level"], row["note"]) if each]
    return f"{title} ({', '.join(details)})" if details else title


def print_table(title: str, table: Sequence[dict[str, Any]]) -> None:
    """Quality with intervals, skip rate and TPOT ratio side by side."""
    from rich.console import Console
    from rich.table import Table

    names = list(table[0]["metrics"])
    view = Table(title=title, title_justify="left")
    view.add_column("", no_wrap=True)
    for name in names:
        view.add_column(name, justify="right")
    for name in ("skip rate", "by token", "TPOT ratio"):
        view.add_column(name, justify="right")
    for row in table:
        cells = []
        for name in names:
            metric = row["metrics"].get(name)
            interval = f" [{metric['low']:.1f}, {metric['high']:.1f}]" if metric and name == row["metric"] else ""
            cells.append(f"{metric['value']:.1f}{interval}" if metric else "-")
        by_token = row["skip"].get("skip_rate_by_token")  # older records lack it
        cells += [f"{100 * row['skip']['skip_rate']:.1f} %", "-" if by_token is None else f"{100 * by_token:.1f} %"]
        timing = row["timing"]
        cells.append(f"{timing['tpot_ratio']:.2f}x" if timing else "-")
        view.add_row(row_title(row), *cells)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(view)
