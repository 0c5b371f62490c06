"""Tasks whose examples are generated: how splits are drawn from seeds, how training and test are kept apart, and the
names, things and numbers that the English ones talk about.

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


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WOMEN = _words(
    "Ada Amara Anya Asha Astrid Beatriz Carmen Chiara Clara Daria Elena Elif Emma Farah Freya Grace "
    "Hana Helga Ines Ingrid Irina Jana Keiko Laila Lena Leila Lucia Maja Mara Marta Mei Mina Mira Nadia "
    "Naomi Nia Nina Olga Petra Priya Rosa Ruth Salma Sara Selma Sofia Sunita Tara Vera Yuki Zara Zofia"
)
MEN = _words(
    "Adam Ahmed Aldo Amir Anton Arjun Ben Boris Bruno Carlos Chen Dario David Diego Emil Erik Felix "
    "Finn Georg Goran Hamid Hugo Igor Ivan Jakob Jamal Jonas Juan Karim Kenji Kofi Kwame Lars Leon Luca "
    "Marco Mateo Milan Nils Noah Omar Oscar Pavel Pedro Rafael Ravi Samir Simon Tariq Tomas Victor "
    "Yusuf"
)
SURNAMES = _words(
    "Abbas Adler Bauer Berg Bianchi Brandt Castro Cohen Costa Diallo Dubois Farkas Fischer Garcia Gomez "
    "Gupta Haddad Hansen Holm Ito Ivanov Jensen Kaya Keller Khan Kim Kovac Lang Larsen Lind Lopez "
    "Mendes Mensah Meyer Moreau Mori Nagy Novak Okafor Olsen Patel Peters Popov Rossi Sato Silva Singh "
    "Sorensen Tanaka Torres Vidal Wagner Weber Wong Yilmaz Zhang"
)
TOWNS = _words(
    "Alder Ashford Bellano Bergen Brackwater Calder Castra Corvo Dalby Dorset Eastwick Elmore Fairhaven "
    "Farrow Galway Glenmoor Granby Hadley Harrow Highmoor Iverness Jarrow Kelso Kirkby Lakeport Landau "
    "Linden Lorca Marlow Millford Minden Newport Norwood Oakham Orsova Pella Porto Quarry Ravenna "
    "Redhill Rosedale Salta Selby Sandport Stonebridge Tamar Tarn Thornby Torvik Umbra Valdez Verona "
    "Vinland Waldorf Westbury Winslow Yarrow Zadar"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
COLOURS = ("black", "blue", "brown", "green", "grey", "red", "white", "yellow")
NUMBER_WORDS = _words(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)


def with_article(phrase: str) -> str:
    """`amber lamp` becomes `an amber lamp`, by the sound of its start."""
    vowel = phrase[0].lower() in "aeiou" and not phrase.startswith(("once", "one-", "use", "uni"))
    return f"{'an' if vowel else 'a'} {phrase}"


def capitalized(text: str) -> str:
    """The text with a capital at its start; the rest is left alone."""
    return text[0].upper() + text[1:]
