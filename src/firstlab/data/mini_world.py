"""Names, things and numbers that the generated English tasks talk about, and how a split is drawn.

All texts come from `random.Random` alone, so that they are the same on every machine. A text belongs to the
test side or the training side by its checksum: no seed can bring a test text into a training set.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import NamedTuple

from firstlab.data.task import Example


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

TEST_SHARE = 20  # one text in twenty belongs to the test side


def is_held_out(source: str) -> bool:
    """Whether a text may only be used for testing."""
    return zlib.crc32(source.encode()) % TEST_SHARE == 0


def with_article(phrase: str) -> str:
    """`amber lamp` becomes `an amber lamp`, by the sound of its start."""
    vowel = phrase[0].lower() in "aeiou" and not phrase.startswith(("once", "one-", "use", "uni"))
    return f"{'an' if vowel else 'a'} {phrase}"


def sentence(text: str) -> str:
    """The text with a capital at its start; the rest is left alone."""
    return text[0].upper() + text[1:]


class Built(NamedTuple):
    """A generated example before it has a name; see `Example`."""

    source: str
    question: str
    references: tuple[str, ...]
    more: tuple[tuple[str, str], ...] = ()


def draw(
    build: Callable[[random.Random, int], Built],
    count: int,
    stream: str,
    prefix: str,
    held_out: bool,
    levels: int = 5,
) -> list[Example]:
    """Draws examples whose difficulty runs 1, 2, ..., levels, 1, 2, ...; no two share source and question.

    Args:
        build: Makes an example from a random stream and a difficulty.
        count: How many examples, at least 1.
        stream: Name of the random stream: same name, same examples.
        prefix: Start of the ids.
        held_out: Draw from the test side instead of the training side.
        levels: Number of difficulties.

    Raises:
        ValueError: count < 1.
    """
    if count < 1:
        raise ValueError(f"count={count}: ask for at least 1 example")
    rng = random.Random(stream)
    seen: set[tuple[str, str]] = set()
    examples: list[Example] = []
    while len(examples) < count:
        level = len(examples) % levels + 1
        built = build(rng, level)
        key = (built.source, built.question)
        if is_held_out(built.source) != held_out or key in seen:
            continue
        seen.add(key)
        name = f"{prefix}-{len(examples):06d}"
        examples.append(Example(name, built.source, built.references, built.question, level, built.more))
    return examples


def check_sizes(**sizes: int) -> None:
    """Raises ValueError, naming the option, for a split smaller than 1."""
    for option, value in sizes.items():
        if value < 1:
            raise ValueError(f"{option}={value}: a split needs at least 1 example")
