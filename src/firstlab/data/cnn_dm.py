"""CNN/DailyMail 3.0.0 news summarization."""

from __future__ import annotations

from typing import Any

from firstlab.data.files import (
    clean_text,
    data_files,
    has_text,
    identifier,
    load_hub_split,
    members,
    read_jsonl,
    spread,
    warn,
)
from firstlab.data.prompts import Summarization
from firstlab.data.task import Example

HUB_ID = "abisee/cnn_dailymail"
VERSION = "3.0.0"
FILES = {"train": "train.jsonl", "test": "test.jsonl"}


class CnnDailyMail(Summarization):
    """Articles with their highlights (paper, section 5).

    `root` has train.jsonl and test.jsonl, a line `{"article": ..., "highlights": ...}` for each article, perhaps with
    an "id"; None takes the hub's data set. Of its train split, `pool_size` articles are kept, evenly spread, or all.
    """

    def __init__(self, root: str | None = None, pool_size: int | None = 20_000) -> None:
        if pool_size is not None and pool_size < 1:
            raise ValueError(f"data.task.pool_size={pool_size} must be at least 1, or null for every article")
        self.root, self.pool_size = root, pool_size

    def train_pool(self) -> list[Example]:
        if self.root is not None:
            return spread(self._read_file("train", self.root), self.pool_size)
        rows = load_hub_split(HUB_ID, VERSION, "train", list(FILES.values()))
        rows = rows.select(spread(range(len(rows)), self.pool_size))
        full = [row for row in rows if has_text(row["article"]) and has_text(row["highlights"])]
        if len(full) < len(rows):
            warn(f"{HUB_ID}: left out {len(rows) - len(full)} articles without text")
        return [_example(row, f"{HUB_ID} train, {row['id']}", row["id"]) for row in full]

    def test(self) -> list[Example]:
        if self.root is not None:
            return self._read_file("test", self.root)
        rows = load_hub_split(HUB_ID, VERSION, "test", list(FILES.values()))
        return [_example(row, f"{HUB_ID} test, {row['id']}", row["id"]) for row in rows]

    def _read_file(self, split: str, root: str) -> list[Example]:
        (path,) = data_files(root, [FILES[split]])
        rows = enumerate(read_jsonl(path), start=1)
        return [_example(row, f"{path}, line {number}", f"{split}:{number}") for number, row in rows]


def _example(row: Any, where: str, default_id: str) -> Example:
    article, highlights = members(row, ["article", "highlights"], where)
    own_id = row.get("id")
    return Example(
        id=identifier(default_id if own_id is None else own_id, where, "id"),
        source=clean_text(article, where, "article"),
        references=(clean_text(highlights, where, "highlights"),),
    )
