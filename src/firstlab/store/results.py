"""`result.json`: one record per run, written last and atomically; and the table of several runs."""

from __future__ import annotations

import base64
import io
import json
import traceback
import zlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from firstlab.store.files import json_text, write_atomically

RESULT = "result.json"
FAILURE = "failure.json"
#: Environment variable that tells the processes of a run that it is a job of a sweep, which wants to know failures.
SWEEP_JOB = "FIRSTLAB_SWEEP_JOB"
ROW_NAMES = {"base": "Base", "base_lora": "Base + LoRA", "router": "Router", "router_lora": "Router + LoRA"}


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
