"""Write files so that no reader sees half of one, and let one process at a time hold a directory."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

Parsed = TypeVar("Parsed")


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write to a temporary file and rename it: readers see the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(temporary, file)


def read_own(
    file: Path,
    parse: Callable[[Any], Parsed],
    remedy: str = "delete it, and result.json if there is one, and give the training command again",
) -> Parsed:
    """What a JSON or YAML file that firstlab wrote stands for; a kill or a hand may have damaged it since.

    Raises:
        ValueError: The file cannot be read, or `parse` refuses what it holds; the message ends with the remedy.
    """
    try:
        text = file.read_text(encoding="utf-8")
        return parse(yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, yaml.YAMLError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is missing or damaged ({type(error).__name__}: {reason}); {remedy}") from error


def check_writable(directory: Path, option: str) -> None:
    """Make a directory and try a file in it before the work whose result goes there; ValueError if that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{option}={directory} cannot be written ({reason}); choose another folder") from error


def remove_torn(directory: Path) -> None:
    """Delete what a process that was killed while writing left in a run directory."""
    for folder in (directory, *directory.glob("*"), *directory.glob("checkpoints/*")):
        for file in folder.glob(".*.tmp"):
            if re.search(r"\.\d+\.tmp$", file.name) and file.is_file():
                file.unlink()


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON; numbers that JSON does not know (NaN, infinity) become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def claimed(directory: Path, wait: bool = True) -> Iterator[None]:
    """Hold a directory, which need not exist, until the process ends; `.NAME.lock` beside it names the owner.

    Raises:
        ValueError: Another process holds it and `wait` is false, or nothing can be locked there.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        opened = (directory.parent / f".{directory.name}.lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{directory} cannot be written ({error.strerror}); choose another directory") from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            message = f"{directory} is in use by {lock.read().strip() or 'another process'}"
            if not wait:
                raise ValueError(f"{message}; start again when it has finished") from None
            print(f"{message}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"{directory}: its file system locks no files ({error.strerror}); choose a folder on another one, or "
                "mount it with locks (Lustre: -o flock)"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        lock.flush()
        yield
