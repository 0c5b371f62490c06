"""Tasks whose examples are generated: how splits are drawn from seeds, and how training and test are kept apart.

All texts come from `random.Random` alone, so that they are the same on every machine. A text belongs to the
test side or the training side by its checksum: no seed can bring a test text into a training set.
"""

from __future__ import annotations

import random
import zlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

from firstlab.data.task import Example, Task

LEVELS = 5  # difficulties run from 1 to this
TEST_SHARE = 20  # one text in twenty belongs to the test side

Split = Literal["train", "test", "extra", "held-out"]


def is_held_out(source: str) -> bool:
    """Whether a text may only be used for testing."""
    return zlib.crc32(source.encode()) % TEST_SHARE == 0


class Built(NamedTuple):
    """A generated example before it has a name; see `GeneratedExample`."""

    source: str
    question: str
    references: tuple[str, ...]
    more: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class GeneratedExample(Example):
    """An example with `more` (question, answer) pairs on the same source, for training a model to read."""

    more: tuple[tuple[str, str], ...] = ()


class GeneratedTask(Task):
    """A task that builds its examples. A subclass has a `name` and says how to `build` one.

    Args:
        pool_size: Examples in `train_pool`.
        test_size: Examples in `test`: the first of one fixed list, whatever the seed.
        seed: Chooses the training pool.

    Raises:
        ValueError: a size is smaller than 1.
    """

    #: Start of the ids.
    name: str

    def __init__(self, pool_size: int = 6000, test_size: int = 500, seed: int = 0) -> None:
        for option, value in (("pool_size", pool_size), ("test_size", test_size)):
            if value < 1:
                raise ValueError(f"{option}={value} must be at least 1")
        self.pool_size = pool_size
        self.test_size = test_size
        self.seed = seed

    @abstractmethod
    def build(self, rng: random.Random, level: int, split: Split) -> Built | None:
        """Makes one example of a difficulty from a random stream; None where what was drawn is of no use."""

    def level(self, rng: random.Random, index: int) -> int:
        """The difficulty of the example at a position: 1, 2, ..., 5, 1, 2, ..."""
        return index % LEVELS + 1

    def stream(self, split: Split, seed: int) -> tuple[str | int, str]:
        """The seed of the random stream that a split is drawn from, and the start of its ids."""
        name = f"{self.name}-{split}"
        if split == "test":
            return name, name
        return f"{name}-{seed}", name if split == "train" else f"{name}-{seed}"

    def train_pool(self) -> list[Example]:
        """`pool_size` examples; none of their sources is held out for testing."""
        return self._draw(self.pool_size, "train", self.seed)

    def test(self) -> list[Example]:
        """`test_size` examples with held-out sources."""
        return self._draw(self.test_size, "test", self.seed)

    def generate(self, count: int, seed: int, held_out: bool = False) -> list[Example]:
        """More examples from a stream of their own.

        Args:
            count: How many.
            seed: Names the stream.
            held_out: Sources of the test side instead of the training side.

        Raises:
            ValueError: count < 1.
        """
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        return self._draw(count, "held-out" if held_out else "extra", seed)

    def _draw(self, count: int, split: Split, seed: int) -> list[Example]:
        """Examples of one side; no two share source and question."""
        start, prefix = self.stream(split, seed)
        rng = random.Random(start)
        held_out = split in ("test", "held-out")
        seen: set[tuple[str, str]] = set()
        examples: list[Example] = []
        while len(examples) < count:
            level = self.level(rng, len(examples))
            built = self.build(rng, level, split)
            while built is None or is_held_out(built.source) != held_out or built[:2] in seen:
                built = self.build(rng, level, split)
            seen.add((built.source, built.question))
            name = f"{prefix}-{len(examples):06d}"
            examples.append(
                GeneratedExample(name, built.source, built.references, built.question, level, more=built.more)
            )
        return examples
