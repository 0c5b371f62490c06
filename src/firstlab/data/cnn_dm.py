"""CNN/DailyMail 3.0.0 news summarization."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, ClassVar

from firstlab.data.files import clean_text, data_files, identifier, load_hub_split, member, read_jsonl, spread
from firstlab.data.prompts import summarization_prompt
from firstlab.data.task import Example, Task

HUB_ID = "abisee/cnn_dailymail"
VERSION = "3.0.0"
FILES = {"train": "train.jsonl", "test": "test.jsonl"}

log = logging.getLogger(__name__)


class CnnDailyMail(Task):
    """Articles with their highlights (paper, section 5).

    Args:
        root: Directory with train.jsonl and test.jsonl, a line `{"article": ..., "highlights": ...}` for
            each article, with an "id", text or a number, or without; None takes the hub's data set.
        pool_size: How many articles of the train split to keep in memory, at even distances; None keeps all
            287,113.

    Raises:
        ValueError: Reading raises it for missing or faulty files and when the hub cannot be reached.
    """

    kind: ClassVar[str] = "summarization"

    def __init__(self, root: str | None = None, pool_size: int | None = 20_000) -> None:
        if pool_size is not None and pool_size < 1:
            raise ValueError(f"data.task.pool_size={pool_size} must be at least 1, or null for every article")
        self.root = root
        self.pool_size = pool_size

    def train_pool(self) -> list[Example]:
        if self.root is not None:
            return spread(self._read_file("train", self.root), self.pool_size)
        rows = load_hub_split(HUB_ID, VERSION, "train", list(FILES.values()))
        rows = rows.select(spread(range(len(rows)), self.pool_size))
        full = [row for row in rows if row["article"].strip() and row["highlights"].strip()]
        if len(full) < len(rows):
            log.warning("%s: left out %d articles without text", HUB_ID, len(rows) - len(full))
        return _examples((f"{HUB_ID} train, {row['id']}", row) for row in full)

    def test(self) -> list[Example]:
        if self.root is not None:
            return self._read_file("test", self.root)
        rows = load_hub_split(HUB_ID, VERSION, "test", list(FILES.values()))
        return _examples((f"{HUB_ID} test, {row['id']}", row) for row in rows)

    def prompt(self, example: Example, source: str | None = None) -> str:
        return summarization_prompt(example.source if source is None else source)

    def _read_file(self, split: str, root: str) -> list[Example]:
        (path,) = data_files(root, [FILES[split]])
        rows = enumerate(read_jsonl(path), start=1)
        return _examples((f"{path}, line {number}", _with_id(row, f"{split}:{number}")) for number, row in rows)


def _with_id(row: Any, default: str) -> Any:
    return {**row, "id": default} if isinstance(row, dict) and row.get("id") is None else row


def _examples(rows: Iterable[tuple[str, Any]]) -> list[Example]:
    return [
        Example(
            source=clean_text(member(row, "article", where), where, "article"),
            id=identifier(member(row, "id", where), where, "id"),
            references=(clean_text(member(row, "highlights", where), where, "highlights"),),
        )
        for where, row in rows
    ]
