"""Strict readers of text, JSON and hub data sets: every fault names its file, its place and the way out."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON escapes can smuggle one in


def data_files(root: str, names: Sequence[str]) -> list[Path]:
    """Paths of the files `names` in the directory `root`.

    Raises:
        ValueError: `root` is no directory, or a file is missing; lists what was expected and what is there.
    """
    folder = Path(root).expanduser()
    wanted = ", ".join(names)
    if not folder.is_dir():
        fault = "is a file, not a directory" if folder.exists() else "does not exist"
        raise ValueError(f"data.root={root} {fault}: set data.root to the directory that holds {wanted}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        found = sorted(entry.name for entry in folder.iterdir())
        shown = ", ".join(found[:20]) + (f" and {len(found) - 20} more" if len(found) > 20 else "")
        raise ValueError(
            f"data.root={root} lacks {', '.join(missing)} of the expected {wanted}; the directory holds "
            f"{shown or 'nothing'}. Add the missing files or set data.root to another directory"
        )
    return [folder / name for name in names]


def clean_text(value: object, where: str, what: str) -> str:
    """`value` without outer white space, checked to be text that a tokenizer can take.

    Args:
        value: What stood in the file.
        where: Where it stood, for the message.
        what: What it should be, for instance "source sentence".

    Raises:
        ValueError: No string, nothing but white space, or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where}: the {what} is {type(value).__name__}, not text; correct or remove this entry")
    if not value.strip():
        raise ValueError(f"{where}: the {what} is empty; fill it in or remove this entry")
    if _SURROGATE.search(value):
        raise ValueError(f"{where}: the {what} holds half of a surrogate pair; replace that character")
    return value.strip()


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, without a byte order mark.

    Raises:
        ValueError: The file is empty, not UTF-8, or holds a NUL.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Positions count from behind a byte order mark, as `error.object` does.
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; convert the file to UTF-8") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; download or create it again")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{path}, line {line}: a NUL, which no text has; if the file is UTF-16, convert it to UTF-8")
    return text


def read_lines(path: Path) -> list[str]:
    r"""The lines of a text file. Only "\n" and "\r\n" end a line.

    `str.splitlines` would also split at U+2028, U+0085 and others, which occur inside sentences, and so shift
    one side of parallel text against the other.

    Raises:
        ValueError: As `read_text`, or the lines end in "\r" alone.
    """
    text = read_text(path)
    if "\n" not in text and "\r" in text.rstrip("\r"):
        raise ValueError(f"{path}, line 1: lines end in CR alone; convert them to LF or CRLF")
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_parallel(source: Path, reference: Path) -> list[tuple[str, str]]:
    """Line-aligned pairs (source, reference).

    Raises:
        ValueError: An empty file or line, or files of different length.
    """
    sources, references = read_lines(source), read_lines(reference)
    if len(sources) != len(references):
        shorter = min(len(sources), len(references))
        raise ValueError(
            f"{source} has {len(sources)} lines but {reference} has {len(references)}: line {shorter + 1} "
            "has no counterpart; parallel text needs line i of one file to translate line i of the other"
        )
    return [
        (
            clean_text(text, f"{source}, line {number}", "source sentence"),
            clean_text(translation, f"{reference}, line {number}", "reference sentence"),
        )
        for number, (text, translation) in enumerate(zip(sources, references, strict=True), start=1)
    ]


def member(mapping: object, key: str, where: str) -> Any:
    """`mapping[key]`, or a `ValueError` that says where the key is missing and what is there instead."""
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where}: expected an object with the key '{key}', found {type(mapping).__name__}")
    if key not in mapping:
        present = ", ".join(map(str, mapping)) or "none"
        raise ValueError(f"{where}: the key '{key}' is missing (present: {present}); add it or remove this entry")
    return mapping[key]


def identifier(value: object, where: str, what: str) -> str:
    """An id, a number or text, as text.

    Raises:
        ValueError: As `clean_text`.
    """
    return clean_text(str(value) if type(value) is int else value, where, what)


def members(mapping: object, key: str, where: str) -> list[Any]:
    """`mapping[key]` that must be a list, or a `ValueError`."""
    value = member(mapping, key, where)
    if not isinstance(value, list):
        raise ValueError(f"{where}: '{key}' is {type(value).__name__}, not a list")
    return value


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}, line {line}: invalid JSON ({error.msg}); correct or remove this line") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise ValueError(f"{path}, line {first_line}: JSON beyond Python's limits ({error}); correct it") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: The file is empty, not UTF-8 or not JSON.
    """
    return _parse(read_text(path), path, first_line=1)


def read_jsonl(path: Path) -> list[Any]:
    """The values of a file with one JSON value a line; value i stands on line i + 1.

    Raises:
        ValueError: The file or a line is empty, or a line is not JSON.
    """
    values = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            raise ValueError(f"{path}, line {number}: the line is empty; remove it")
        values.append(_parse(line, path, first_line=number))
    return values


def load_hub_split(hub_id: str, config: str | None, split: str, names: Sequence[str]) -> Any:
    """One split of a data set on the Hugging Face hub, from the local cache or the network.

    Args:
        hub_id: Owner and name.
        config: Configuration (version) of the data set.
        split: "train", "validation" or "test".
        names: The files that `data.root` would have to hold instead, for the message.

    Raises:
        ValueError: The data set cannot be had.
    """
    from datasets import load_dataset  # slow to import and not needed with data.root

    try:
        return load_dataset(hub_id, config, split=split)
    except Exception as error:  # the hub client's errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot load {hub_id} from the Hugging Face hub ({reason}). Without a connection set "
            f"data.root=DIR, a directory with {' and '.join(names)}"
        ) from error


def spread(items: Sequence[Item], count: int | None) -> list[Item]:
    """`count` items in their order, one from each of as many equal stretches; all when `count` is None or too large.

    A head of the list would be one topic: test sets are ordered by document and source. Equal distances would miss
    what comes at regular ones: levels of difficulty, questions on one passage. The choice is the same for every run.
    """
    total = len(items)
    if count is None or count >= total:
        return list(items)
    generator = random.Random(0)
    bounds = [position * total // count for position in range(count + 1)]
    return [items[generator.randrange(start, end)] for start, end in pairwise(bounds)]
