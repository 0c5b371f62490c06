"""The bundled tasks' examples, read from `assets/mini`; `experiments/nano` holds the code that generated them."""

from __future__ import annotations

import functools
import json
import lzma
from pathlib import Path

from firstlab.data.task import Example, Task

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "mini"
LARGEST = {"pool_size": 6000, "test_size": 2000}


class BundledTask(Task):
    """A task whose examples come with the package, in five levels of difficulty; a subclass has a `name`.

    `train_pool` and `test` are the first `pool_size` and `test_size` of two fixed lists without a common source.
    """

    #: Name of the file, and start of the ids.
    name: str

    def __init__(self, pool_size: int = 6000, test_size: int = 500) -> None:
        for option, value in (("pool_size", pool_size), ("test_size", test_size)):
            if not 1 <= value <= LARGEST[option]:
                raise ValueError(f"{option}={value} must be from 1 to {LARGEST[option]}, the examples that are bundled")
        self.pool_size, self.test_size = pool_size, test_size

    def train_pool(self) -> list[Example]:
        return self._of_split("train")[: self.pool_size]

    def test(self) -> list[Example]:
        return self._of_split("test")[: self.test_size]

    def _of_split(self, split: str) -> list[Example]:
        return [example for example in _read(self.name) if example.id.startswith(f"{self.name}-{split}-")]


@functools.cache
def _read(name: str) -> tuple[Example, ...]:
    with lzma.open(FOLDER / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return tuple(Example(**{**row, "references": tuple(row["references"])}) for row in rows)
