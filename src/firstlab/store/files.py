"""Write files so that no reader sees half of one, and let one process at a time hold a directory."""

from __future__ import annotations

import fcntl
import hashlib
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
from typing import Any, TextIO, TypeVar

import yaml

Parsed = TypeVar("Parsed")


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write to a temporary file and rename it: readers see the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(temporary, file)


class _Loader(yaml.SafeLoader):
    """Reads no aliases: some of them, nested, stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*) are not read from saved files")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Writes none."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_yaml(text: str) -> Any:
    """What the text of a saved file stands for: plain data."""
    return yaml.load(text, _Loader)


def yaml_text(value: Any) -> str:
    """Plain data as a text that `read_yaml` reads."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def sealed(text: str) -> str:
    """A YAML file's text with its checksum behind it, by which `read_own` knows that it is as it was written."""
    return f"{text}# sha256 {hashlib.sha256(text.encode()).hexdigest()}\n"


def read_own(
    file: Path,
    parse: Callable[[Any], Parsed],
    remedy: str = "delete it, and result.json if there is one, and give the training command again",
) -> Parsed:
    """What a JSON or `sealed` YAML file of firstlab's stands for; ValueError, with the remedy, if it is damaged."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".yaml":
            return parse(json.loads(text))
        if sealed(text.rpartition("# sha256 ")[0]) != text:
            raise ValueError("its checksum is another one")
        return parse(read_yaml(text))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, yaml.YAMLError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is missing or damaged ({type(error).__name__}: {reason}); {remedy}") from error


def appended(file: Path) -> TextIO:
    """A file opened to append to, never through a link that came with a directory."""
    return open(file, "a+", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


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
    """Hold a directory, which need not exist; `.NAME.lock` beside it names the owner, who may be waited for."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        opened = appended(directory.parent / f".{directory.name}.lock")
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
            remedy = "choose a folder on another one, or mount it with locks (Lustre: -o flock)"
            raise ValueError(f"{directory}: its file system locks no files ({error.strerror}); {remedy}") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        lock.flush()
        yield
