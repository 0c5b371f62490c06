"""What a sentence says, before any language: noun phrases, places, clauses and pairs of clauses.

The samplers build these; `english`, `german` and `chinese` write them down.
"""

from __future__ import annotations

from dataclasses import dataclass

from recipe.translation.lexicon import Adjective, Noun, Phrase, Verb


@dataclass(frozen=True, slots=True)
class NP:
    """A noun phrase: a noun with its determiner, a name, a pronoun or a coordination of two.

    Attributes:
        det: def, indef, bare, this, some, many, count or a possessor pronoun such as "he"; "" for a name.
        pronoun: I, we, he, she, it, they; `gender` is then the German gender of what it stands for.
        owner: "the dog of the teacher" and "Anna's dog".
        relative: A clause whose `gap` says which constituent this noun is.
        human: Whether a pronoun stands for people.
    """

    noun: Noun | None = None
    det: str = "def"
    plural: bool = False
    adjectives: tuple[Adjective, ...] = ()
    count: Phrase | None = None
    owner: NP | None = None
    relative: Clause | None = None
    name: Phrase | None = None
    gender: str = "m"
    pronoun: str = ""
    human: bool = True
    parts: tuple[NP, ...] = ()

    @property
    def person(self) -> str:
        """What a verb agrees with: "I" and "we" for themselves, "sg" and "pl" for third persons."""
        if self.pronoun in ("I", "we"):
            return self.pronoun
        return "pl" if self.plural or self.pronoun == "they" or self.parts else "sg"


@dataclass(frozen=True, slots=True)
class PP:
    """A preposition with its noun phrase.

    Attributes:
        en, de: The preposition.
        case: What it governs in German.
        zh_suffix: The Chinese localizer after the noun, or "".
    """

    en: str
    de: str
    case: str
    zh_suffix: str
    np: NP


@dataclass(frozen=True, slots=True)
class Clause:
    """A clause.

    Attributes:
        tense: pres, past, perf, fut or a modal (can, must, wants, wanted, should, had).
        predicate: Predicate of "be", a phrase in three languages (the Chinese one with its copula).
        time: Time phrase; `front` puts it first.
        direction: Goal of a motion or of "put".
        gap: "subject" or "object" in relative clauses.
        content: A that-clause.
        weather: A fixed clause, a row of the lexicon.
        timeless: No 了, as inside 在…之前 and 当…的时候.
    """

    subject: NP | None = None
    verb: Verb | None = None
    tense: str = "pres"
    obj: NP | None = None
    recipient: NP | None = None
    predicate: Phrase | None = None
    negated_zh: str = ""
    time: Phrase | None = None
    front: bool = False
    frequency: Phrase | None = None
    manner: Phrase | None = None
    means: Phrase | None = None
    price: Phrase | None = None
    place: PP | None = None
    direction: PP | None = None
    negated: bool = False
    already: bool = False
    gap: str = ""
    content: Clause | None = None
    weather: tuple[str, ...] = ()
    timeless: bool = False

    @property
    def stative(self) -> bool:
        """Whether the verb tells of a state, not of an event."""
        return self.verb is not None and "s" in self.verb.flags


@dataclass(frozen=True, slots=True)
class Joined:
    """Two clauses: `link` is a conjunction or ".", `first` puts the subordinate clause first."""

    main: Clause
    link: str
    other: Clause
    first: bool = False


Sentence = Clause | Joined
