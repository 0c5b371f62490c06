"""Draws the parts of a sentence: noun phrases, numbers, prices, places and times."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from recipe.translation import chinese, lexicon
from recipe.translation.lexicon import Adjective, Noun, Phrase
from recipe.translation.meaning import NP, PP

T = TypeVar("T")


def number_words(value: int) -> Phrase:
    """A number from 2 to 99 in words; Chinese uses 两 before a measure word."""
    small, tens = lexicon.NUMBERS[:18], lexicon.NUMBERS[18:]
    if value < 20:
        en, de = small[value - 2]
    else:
        ten, one = divmod(value, 10)
        en, de = tens[ten - 2]
        en_one, de_one = ("one", "ein") if one == 1 else small[one - 2]
        if one:
            en, de = f"{en}-{en_one}", f"{de_one}und{de}"
    return Phrase(en, de, "两" if value == 2 else chinese.number(value))


_IN_CITIES = [PP("in", "in", "dat", "", NP(name=city, det="")) for city in lexicon.CITIES]


def pronoun_np(pronoun: str) -> NP:
    """A pronoun for a person that was not mentioned before."""
    return NP(pronoun=pronoun, det="", gender="f" if pronoun == "she" else "m")


def possessor_pronoun(np: NP) -> str:
    """The pronoun whose possessive fits the noun phrase, "" where German and English genders part ways."""
    if np.pronoun:
        return np.pronoun
    if np.parts:
        return ""
    if np.plural:
        return "they"
    gender = np.noun.gender if np.noun else np.gender
    return {"m": "he", "f": "she", "n": ""}[gender]


class PhraseSampler:
    """Draws what clauses are made of.

    `level` bounds how rich a noun phrase is: from 2 on it may have adjectives, numbers and owners.

    Args:
        rng: The random stream.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def chance(self, probability: float) -> bool:
        """True that often."""
        return self.rng.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.rng.randrange(len(items))]

    def adjective(self, noun: Noun, predicate: bool = False) -> Adjective | None:
        """An adjective that fits the noun; a `predicate` of people may be a passing state such as "tired"."""
        tags = noun.tags.replace("k", "p") + ("P" if predicate and noun.human else "")
        fitting = lexicon.adjectives_tagged(tags)
        if noun.mass:
            fitting = [adjective for adjective in fitting if adjective.en not in ("small", "big")]
        return self.pick(fitting) if fitting else None

    def adjectives(self, noun: Noun, level: int) -> tuple[Adjective, ...]:
        """Adjectives before the noun, at most two."""
        if level < 2 or not self.chance(0.5):
            return ()
        first = self.adjective(noun)
        if first is None:
            return ()
        colours = [colour for colour in lexicon.adjectives_tagged(noun.tags) if colour.is_colour]
        if level >= 3 and colours and not first.is_colour and self.chance(0.3):
            return (first, self.pick(colours))
        return (first,)

    def price(self, noun: Noun) -> Phrase:
        """An amount of money that the thing could cost."""
        if set(noun.tags) & set("hv"):
            value = str(self.rng.randrange(2, 90) * 100)
        elif self.chance(0.3):
            value = f"{self.rng.randrange(1, 60)}.{self.rng.randrange(1, 10)}0"
        else:
            value = str(self.rng.randrange(2, 300))
        return Phrase(f"{value} euros", f"{value.replace('.', ',')} Euro", f"{value}欧元")

    def count(self) -> Phrase:
        """A number from 2 to 99, in words or digits."""
        value = self.rng.randrange(2, 13) if self.chance(0.6) else self.rng.randrange(13, 100)
        words = number_words(value)
        return words if value < 13 or self.chance(0.5) else Phrase(str(value), str(value), words.zh)

    def named(self) -> NP:
        """Someone by name."""
        if self.chance(0.2):
            surname, male = self.pick(lexicon.SURNAMES), self.chance(0.5)
            titles = ("Mr.", "Herr", "先生") if male else ("Ms.", "Frau", "女士")
            name = Phrase(f"{titles[0]} {surname.en}", f"{titles[1]} {surname.de}", surname.zh + titles[2])
            return NP(name=name, det="", gender="m" if male else "f")
        first_name, gender, zh = self.pick(lexicon.NAMES)
        return NP(name=Phrase(first_name, first_name, zh), det="", gender=gender)

    def subject(self, level: int, tags: str = "p") -> NP:
        """Somebody, or something with one of the tags."""
        roll = self.rng.random()
        if tags == "p" and roll < 0.2:
            return self.named()
        if tags == "p" and roll < 0.35:
            return pronoun_np(self.pick(("I", "we", "he", "she", "they")))
        if tags == "p" and level >= 2 and roll < 0.42:
            return self.kin()
        noun = self.pick(lexicon.nouns_tagged(tags))
        plural = self.chance(0.25)
        det = self.pick(("def", "def", "def", "indef", "this")) if not plural else self.pick(("def", "some", "this"))
        if plural and level >= 2 and self.chance(0.3):
            return NP(noun, "count", True, self.adjectives(noun, level), count=self.count())
        if level >= 3 and tags == "p" and det == "def" and not plural and self.chance(0.12):
            other = self.pick(lexicon.nouns_tagged("p"))
            if other is not noun:
                return NP(parts=(NP(noun), NP(other)), det="")
        return NP(noun, det, plural, self.adjectives(noun, level))

    def kin(self) -> NP:
        """Somebody's relative."""
        noun = self.pick(lexicon.nouns_tagged("k"))
        spouse = {"wife": "m", "husband": "f"}.get(noun.en)
        if self.chance(0.4):
            owner = self.owner()
            while spouse and spouse != (owner.noun.gender if owner.noun else owner.gender):
                owner = self.owner()
            return NP(noun, "def", owner=owner)
        return NP(
            noun,
            self.pick({"m": ("he", "I"), "f": ("she", "I")}.get(spouse or "", ("I", "we", "he", "she", "they"))),
        )

    def owner(self) -> NP:
        """Whose something is: a first name or a person."""
        if self.chance(0.5):
            while True:
                name = self.named()
                if name.name and " " not in name.name.en:
                    return name
        noun = self.pick(lexicon.nouns_tagged("p"))
        return NP(noun, self.pick(("def", "def", "indef")))

    def thing(self, tags: str, level: int, possessor: NP | None = None) -> NP:
        """An object with one of the tags; it may belong to the `possessor`."""
        noun = self.pick(lexicon.nouns_tagged(tags))
        adjectives = self.adjectives(noun, level)
        if noun.mass:
            return NP(noun, self.pick(("def", "bare")), adjectives=adjectives)
        roll = self.rng.random()
        if level >= 2 and roll < 0.15:
            return NP(noun, "count", True, adjectives, count=self.count())
        if level >= 2 and roll < 0.22 and possessor is not None and not set(noun.tags) & set("pwf"):
            owner = possessor_pronoun(possessor)
            if owner:
                return NP(noun, owner, self.chance(0.2), adjectives)
        if level >= 2 and roll < 0.32 and not set(noun.tags) & set("pwf"):
            return NP(noun, "def", False, adjectives, owner=self.owner())
        if roll < 0.52:
            return NP(noun, self.pick(("def", "bare", "some", "many", "this")), True, adjectives)
        return NP(noun, self.pick(("def", "def", "indef", "indef", "this")), False, adjectives)

    def place(self, level: int) -> PP:
        """Where something happens."""
        if self.chance(0.2):
            return self.pick(_IN_CITIES)
        place = self.pick(lexicon.PLACES)
        adjectives = self.adjectives(place.noun, level)
        det = "def" if self.chance(0.75) else "indef"
        return PP(
            place.en_preposition,
            place.de_preposition,
            "dat",
            place.zh_suffix,
            NP(place.noun, det, False, adjectives),
        )

    def direction(self, level: int) -> PP:
        """Where somebody goes."""
        if self.chance(0.4):
            return PP("to", "nach", "dat", "", NP(name=self.pick(lexicon.CITIES), det=""))
        place = self.pick(lexicon.PLACES)
        return PP(
            "to",
            "zu",
            "dat",
            "边" if place.zh_suffix == "边" else "",
            NP(place.noun, "def", False, self.adjectives(place.noun, level)),
        )

    def time(self, tense: str) -> Phrase:
        """When, in agreement with the tense."""
        key = {"pres": "p", "past": "a", "wanted": "a", "had": "a"}.get(tense, "f")
        fitting = [phrase for phrase in lexicon.TIMES if key in phrase.tense]
        if tense in ("past", "wanted", "had", "fut") and self.chance(0.2):
            if self.chance(0.5):
                month, day = self.rng.randrange(12), self.rng.randrange(1, 29)
                return Phrase(
                    f"on {lexicon.MONTHS[month][0]} {day}",
                    f"am {day}. {lexicon.MONTHS[month][1]}",
                    f"{month + 1}月{day}日",
                )
            year = self.rng.randrange(1950, 2020) if tense != "fut" else self.rng.randrange(2031, 2060)
            return Phrase(f"in {year}", f"im Jahr {year}", f"{year}年")
        if self.chance(0.2):
            return self.clock()
        return self.pick(fitting)

    def clock(self) -> Phrase:
        """A time of the day."""
        hour = self.rng.randrange(2, 12)
        name = number_words(hour)
        following = number_words(hour + 1).de
        zh = name.zh + "点"
        return self.pick(
            (
                Phrase(f"at {name.en} o'clock", f"um {name.de} Uhr", zh),
                Phrase(f"at half past {name.en}", f"um halb {following}", zh + "半"),
                Phrase(f"at a quarter past {name.en}", f"um Viertel nach {name.de}", zh + "一刻"),
                Phrase(f"at ten past {name.en}", f"um zehn nach {name.de}", zh + "十分"),
            )
        )
