"""Read text, JSON and hub data sets strictly: each error names the file, the place and the way out."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import sys
import unicodedata
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")

_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # Unicode's control and format characters and all its white space
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON escapes can smuggle one in


def warn(message: str) -> None:
    """Print one line on stderr, from the first process alone."""
    from lightning.pytorch.utilities import rank_zero_only  # slow to import

    rank_zero_only(print)(f"warning: {message}", file=sys.stderr, flush=True)


def without_marks(text: str) -> str:
    """`text` without byte order marks, which files joined by `cat` have in their middle, too."""
    return text.replace("\ufeff", "")


def has_text(text: str) -> bool:
    """Whether there is anything to see: not white space and zero-width characters alone."""
    return any(unicodedata.category(character) not in _INVISIBLE for character in text)


def data_files(root: str, names: Sequence[str]) -> list[Path]:
    """Paths of the files `names`, or of NAME.gz, all of which must be in the directory `root`."""
    folder = Path(os.path.expanduser(root))
    wanted = ", ".join(names)
    if not folder.is_dir():
        fault = "is a file, not a directory" if folder.exists() else "does not exist"
        raise ValueError(f"data.root={root} {fault}: set data.root to the directory that holds {wanted}")
    found = {name: folder / each for name in names for each in (f"{name}.gz", name) if (folder / each).is_file()}
    if missing := [name for name in names if name not in found]:
        there = sorted(entry.name for entry in folder.iterdir())
        shown = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
        raise ValueError(
            f"data.root={root} lacks {', '.join(missing)} of the expected {wanted}; the directory holds "
            f"{shown or 'nothing'}. Add the missing files or set data.root to another directory"
        )
    return [found[name] for name in names]


def clean_text(value: object, where: str, what: str, advice: str = "fill it in or remove this entry") -> str:
    """`value` without outer white space, checked to be text that a tokenizer can take.

    A ValueError says `where` it stood, `what` it should be ("source sentence"), and for an empty one the `advice`.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where}: the {what} is {type(value).__name__}, not text; correct or remove this entry")
    text = without_marks(value).strip()
    if not has_text(text):
        raise ValueError(f"{where}: the {what} is empty; {advice}")
    if "\0" in text:
        raise ValueError(f"{where}: the {what} holds a NUL, which no text has; remove that character")
    if _SURROGATE.search(text):
        raise ValueError(f"{where}: the {what} holds half of a surrogate pair; replace that character")
    return text


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, unpacked if gzip packed it, without byte order marks; refused where it is empty."""
    data = path.read_bytes()
    try:
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        text = without_marks(data.decode("utf-8"))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: the gzip file is damaged ({error}); download or create it again") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        advice = "convert the file to UTF-8; if it is compressed, unpack it or use gzip"
        raise ValueError(f"{path}, line {line}: not UTF-8; {advice}") from error
    if not has_text(text):
        raise ValueError(f"{path}: the file is empty; download or create it again")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{path}, line {line}: a NUL, which no text has; if the file is UTF-16, convert it to UTF-8")
    return text


def read_lines(path: Path) -> list[str]:
    r"""The lines of a text file. Only "\n" and "\r\n" end a line.

    `str.splitlines` would also split at U+2028, U+0085 and others, which occur inside sentences, and so shift
    one side of parallel text against the other.
    """
    return [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]


def read_parallel(source: Path, reference: Path, drop_empty: bool = False) -> list[tuple[int, str, str]]:
    """Line-aligned text as (line number, source, reference); `drop_empty` leaves out pairs with an empty side."""
    sources, references = read_lines(source), read_lines(reference)
    if len(sources) != len(references):
        shorter = min(len(sources), len(references))
        raise ValueError(
            f"{source} has {len(sources)} lines but {reference} has {len(references)}: line {shorter + 1} "
            "has no counterpart; parallel text needs line i of one file to translate line i of the other"
        )
    advice = "fill it in, remove the pair, or set data.task.drop_empty=true to leave such pairs out"
    pairs = []
    for number, (text, translation) in enumerate(zip(sources, references, strict=True), start=1):
        if not drop_empty or (has_text(text) and has_text(translation)):
            text = clean_text(text, f"{source}, line {number}", "source sentence", advice)
            translation = clean_text(translation, f"{reference}, line {number}", "reference sentence", advice)
            pairs.append((number, text, translation))
    if len(pairs) < len(sources):
        left_out = len(sources) - len(pairs)
        warn(f"{source} and {reference}: left out {left_out} of {len(sources)} pairs, one side of which is empty")
    return pairs


def members(mapping: object, keys: Sequence[str], where: str) -> list[Any]:
    """`mapping[key]` for every key, or a `ValueError` that says where which are missing and what is there instead."""
    if not isinstance(mapping, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(keys)}, found {type(mapping).__name__}")
    missing = [key for key in keys if key not in mapping]
    if missing:
        raise ValueError(
            f"{where}: missing {', '.join(missing)} (present: {', '.join(mapping) or 'nothing'}); "
            "add what is missing or remove this entry"
        )
    return [mapping[key] for key in keys]


def entries(mapping: object, key: str, where: str) -> list[Any]:
    """The list `mapping[key]`, or a `ValueError` as from `members`."""
    [value] = members(mapping, [key], where)
    if not isinstance(value, list):
        raise ValueError(f"{where}: '{key}' is {type(value).__name__}, not a list")
    return value


def identifier(value: object, where: str, what: str) -> str:
    """An id, a number or text, as text."""
    return clean_text(str(value) if type(value) is int else value, where, what)


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter from thousands of brackets
        line = first_line + getattr(error, "lineno", 1) - 1
        fault = getattr(error, "msg", error)
        raise ValueError(f"{path}, line {line}: invalid JSON ({fault}); correct or remove this line") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return _parse(read_text(path), path, first_line=1)


def read_jsonl(path: Path) -> list[Any]:
    """The values of a file with one JSON value a line; value i stands on line i + 1."""
    return [_parse(line, path, first_line=number) for number, line in enumerate(read_lines(path), start=1)]


def load_hub_split(hub_id: str, config: str | None, split: str, names: Sequence[str]) -> Any:
    """One split of a data set on the Hugging Face hub; `names` are the files that `data.root` could hold instead."""
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

    The head of a list would be one topic, and equal distances would miss what comes at regular ones, such as levels of
    difficulty. The choice is the same for every run.
    """
    total = len(items)
    if count is None or count >= total:
        return list(items)
    generator = random.Random(0)
    bounds = [*(position * total // count for position in range(count)), total]
    return [items[generator.randrange(start, end)] for start, end in pairwise(bounds)]
