"""Mini translation: sentences generated from a grammar, each with exactly one right translation.

An abstract sentence is drawn from a seed, then written down in English, in German and in Chinese. English
carries everything the target needs, so a perfect score is possible. A stand-in for WMT without a network.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from firstlab.data import mini_lexicon as lexicon
from firstlab.data.mini_lexicon import Adjective, Noun, Phrase, Place, Verb
from firstlab.data.prompts import translation_prompt
from firstlab.data.task import Example, Task

LEVELS = (1, 2, 3, 4, 5)
_HELD_OUT_ONE_IN = 20
_TEST_SEED = 20_240_229
_LANGUAGES = {"en-de": "German", "en-zh": "Chinese"}
_MAX_EN_WORDS, _MAX_DE_WORDS = 30, 45

T = TypeVar("T")


# --- abstract syntax ---


@dataclass(frozen=True, slots=True)
class NP:
    """A noun phrase: a noun with its determiner, a name, a pronoun or a coordination of two.

    Attributes:
        det: def, indef, bare, this, some, many, count or a possessor pronoun such as "he"; "" for a name.
        pronoun: I, we, he, she, it, they; `gender` is then the German gender of what it stands for.
        owner: "the dog of the teacher" and "Anna's dog".
        relative: A clause whose `gap` says which constituent this noun is.
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


@dataclass(frozen=True, slots=True)
class PP:
    """A preposition with its noun phrase; `city` takes no article."""

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
    direction: PP | Phrase | None = None
    negated: bool = False
    already: bool = False
    gap: str = ""
    content: Clause | None = None
    weather: tuple[str, ...] = ()
    timeless: bool = False


@dataclass(frozen=True, slots=True)
class Joined:
    """Two clauses: `link` is a conjunction or ".", `first` puts the subordinate clause first."""

    main: Clause
    link: str
    other: Clause
    first: bool = False


Sentence = Clause | Joined

_BE = Verb("be", "", "", "", "sein", "ist", "war", "gewesen", "s", "@", flags="s")
_COST = Verb("cost", "cost", "cost", "", "kosten", "kostet", "kostete", "gekostet", "h", "@", flags="s")

# conjunction: German, Chinese pair when it comes first, Chinese when it comes second
_SUBORDINATORS = {
    "because": ("weil", "因为{}，所以{}", "{}，因为{}"),
    "although": ("obwohl", "虽然{}，但是{}", "{}，尽管{}"),
    "if": ("wenn", "如果{}，{}", ""),
    "before": ("bevor", "在{}之前，{}", ""),
    "while": ("während", "当{}的时候，{}", ""),
}
_COORDINATORS = {"and": ("und", "{}，{}"), "but": ("aber", "{}，但是{}"), "or": ("oder", "{}，或者{}")}

_MODALS = {
    "can": ("can", "cannot", "kann", "können", "能"),
    "must": ("must", "", "muss", "müssen", "必须"),
    "wants": ("wants to", "do not want to", "will", "wollen", "想"),
    "should": ("should", "should not", "sollte", "sollten", "应该"),
    "wanted": ("wanted to", "did not want to", "wollte", "wollten", "想"),
    "had": ("had to", "", "musste", "mussten", "不得不"),
}


# --- English ---

_EN_PRONOUNS = {
    "I": ("I", "me", "my"),
    "we": ("we", "us", "our"),
    "he": ("he", "him", "his"),
    "she": ("she", "her", "her"),
    "it": ("it", "it", "its"),
    "they": ("they", "them", "their"),
}


def _person(np: NP) -> str:
    """Agreement: "I" and "we" for themselves, "sg" and "pl" for third persons."""
    if np.pronoun in ("I", "we"):
        return np.pronoun
    return "pl" if np.plural or np.pronoun == "they" or np.parts else "sg"


def _en_article(phrase: str) -> str:
    vowel = phrase[0].lower() in "aeiou" and not phrase.startswith(("uni", "use"))
    return "an" if vowel or phrase.startswith("honest") else "a"


def _en_np(np: NP, case: str = "acc") -> str:
    if np.parts:
        return " and ".join(_en_np(part, case) for part in np.parts)
    if np.pronoun:
        return _EN_PRONOUNS[np.pronoun][0 if case == "nom" else 1]
    if np.name:
        return np.name.en
    assert np.noun is not None
    word = np.noun.en_plural if np.plural else np.noun.en
    core = " ".join([*(adjective.en for adjective in np.adjectives), word])
    if np.owner and np.owner.name:
        core = f"{np.owner.name.en}'s {core}"
    elif np.det in _EN_PRONOUNS:
        core = f"{_EN_PRONOUNS[np.det][2]} {core}"
    elif np.det == "def":
        core = f"the {core}"
    elif np.det == "indef":
        core = f"{_en_article(core)} {core}"
    elif np.det == "this":
        core = f"{'these' if np.plural else 'this'} {core}"
    elif np.det in ("some", "many"):
        core = f"{np.det} {core}"
    elif np.count:
        core = f"{np.count.en} {core}"
    if np.owner and not np.owner.name:
        core += f" of {_en_np(np.owner)}"
    if np.relative:
        pronoun = "who" if set(np.noun.tags) & set("pk") and np.relative.gap == "subject" else "that"
        core += f" {pronoun} {_en_clause(np.relative)}"
    return core


def _en_third(verb: str) -> str:
    head, _, rest = verb.partition(" ")
    if head == "have":
        head = "has"
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "es" if head.endswith(("s", "sh", "ch", "x", "o")) else "s"
    return f"{head} {rest}".strip()


def _en_pp(pp: PP | Phrase) -> str:
    return pp.en if isinstance(pp, Phrase) else f"{pp.en} {_en_np(pp.np)}"


def _en_verb_group(clause: Clause, person: str) -> str:
    """Finite verb up to the object, with negation and the adverbs that stand before the verb."""
    verb, tense = clause.verb, clause.tense
    assert verb is not None
    third = person == "sg"
    adverb = f"{clause.frequency.en} " if clause.frequency else ""
    if tense in _MODALS:
        plain, negative = _MODALS[tense][:2]
        if tense == "wants":
            plain = plain if third else "want to"
            negative = "does not want to" if third else negative
        return f"{negative if clause.negated else plain} {verb.en}"
    if tense == "fut":
        return f"will {'not ' if clause.negated else adverb}{verb.en}"
    if tense == "perf":
        middle = "not " if clause.negated else "already " if clause.already else ""
        return f"{'has' if third else 'have'} {middle}{verb.en_participle}"
    if verb is _BE:
        form = {"I": "am", "sg": "is"}.get(person, "are")
        if tense == "past":
            form = "was" if person in ("I", "sg") else "were"
        return f"{form} not" if clause.negated else f"{form} {adverb}".strip()
    if clause.negated:
        return f"{'did' if tense == 'past' else 'does' if third else 'do'} not {verb.en}"
    if tense == "past":
        return adverb + verb.en_past
    return adverb + (_en_third(verb.en) if third else verb.en)


_PARTICLES = (" up", " on", " off", " along")
_WITH_TO = ("explain", "recommend", "show", "send", "lend", "read")


def _en_clause(clause: Clause) -> str:
    if clause.weather:
        return clause.weather[1 if clause.tense == "past" else 0]
    assert clause.subject is not None and clause.verb is not None
    words = [] if clause.gap == "subject" else [_en_np(clause.subject, "nom")]
    words.append(_en_verb_group(clause, _person(clause.subject)))
    if clause.recipient and clause.verb.en not in _WITH_TO:
        words.append(_en_np(clause.recipient))
    if clause.verb.preposition:
        words.append(clause.verb.preposition[0])
    if clause.obj and clause.gap != "object":
        words.append(_en_np(clause.obj))
        if clause.obj.pronoun and clause.verb.en.endswith(_PARTICLES):
            verb, particle = words[-2].rsplit(" ", 1)
            words[-2:] = [verb, words[-1], particle]
    if clause.recipient and clause.verb.en in _WITH_TO:
        words += ["to", _en_np(clause.recipient)]
    if clause.predicate:
        words.append(clause.predicate.en)
    if clause.direction:
        words.append(_en_pp(clause.direction))
    for phrase in (clause.means, clause.manner, clause.price):
        if phrase:
            words.append(phrase.en)
    if clause.place:
        words.append(_en_pp(clause.place))
    if clause.time:
        words = [f"{clause.time.en},", *words] if clause.front else [*words, clause.time.en]
    if clause.tense == "perf" and clause.negated:
        words.append("yet")
    if clause.content:
        words.append(f"that {_en_clause(clause.content)}")
    return " ".join(words)


# --- German ---

_CASES = ("nom", "acc", "dat", "gen")
_GENDERS = ("m", "f", "n", "pl")


def _table(rows: str) -> dict[tuple[str, str], str]:
    """Rows are cases, columns genders; `-` is an empty cell."""
    cells = [line.split() for line in rows.strip().splitlines()]
    return {
        (case, gender): "" if cell == "-" else cell
        for case, row in zip(_CASES, cells, strict=True)
        for gender, cell in zip(_GENDERS, row, strict=True)
    }


_DEFINITE = _table("der die das die\n den die das die\n dem der dem den\n des der des der")
_DER_WORD = _table("er e es e\n en e es e\n em er em en\n es er es er")
_EIN_WORD = _table("- e - e\n en e - e\n em er em en\n es er es er")
_WEAK = _table("e e e en\n en e e en\n en en en en\n en en en en")
_MIXED = _table("er e es en\n en e es en\n en en en en\n en en en en")
_STRONG = _table("er e es e\n en e es e\n em er em en\n en er en er")
_RELATIVE = _table("der die das die\n den die das die\n dem der dem denen\n dessen deren dessen deren")
_PERSONAL = _table("er sie es sie\n ihn sie es sie\n ihm ihr ihm ihnen\n - - - -")
_FIRST = {"I": ("ich", "mich", "mir"), "we": ("wir", "uns", "uns")}
_POSSESSIVE = {"I": "mein", "we": "unser", "he": "sein", "she": "ihr", "it": "sein", "they": "ihr"}
_CONTRACTIONS = {"in dem": "im", "an dem": "am", "von dem": "vom", "zu dem": "zum", "zu der": "zur"}


def german_noun(noun: Noun, case: str, plural: bool) -> str:
    """The noun inflected for case ("nom", "acc", "dat", "gen") and number."""
    if plural:
        dative_n = case == "dat" and not noun.de_plural.endswith(("n", "s"))
        return noun.de_plural + ("n" if dative_n else "")
    if noun.weak:
        if case == "nom":
            return noun.de
        return noun.de + ("n" if noun.de.endswith("e") or noun.de in ("Nachbar", "Bauer") else "en")
    if case == "gen" and noun.gender != "f":
        if noun.de.endswith(("s", "ß", "z", "x")):
            return noun.de + "es"
        vowels = sum(
            letter in "aeiouyäöü" and (i == 0 or noun.de[i - 1].lower() not in "aeiouyäöü")
            for i, letter in enumerate(noun.de.lower())
        )
        last = noun.de[-1]
        short = vowels == 1 and last not in "aeiouyäöü" and noun.de not in ("Chef", "Park")
        return noun.de + ("es" if short or noun.de.endswith("mann") else "s")
    return noun.de


def _de_gender(np: NP) -> str:
    if np.plural:
        return "pl"
    return np.noun.gender if np.noun else np.gender


def german_np(np: NP, case: str, negated: bool = False) -> str:
    """The noun phrase in German; `negated` turns "ein" and no article into "kein"."""
    if np.parts:
        return " und ".join(german_np(part, case) for part in np.parts)
    if np.pronoun in _FIRST:
        return _FIRST[np.pronoun][_CASES.index(case)]
    if np.pronoun:
        return _PERSONAL[case, "pl" if np.pronoun == "they" else np.gender]
    if np.name:
        name = np.name.de
        return name.replace("Herr ", "Herrn ") if case != "nom" else name
    assert np.noun is not None
    slot = (case, _de_gender(np))
    endings = _STRONG
    determiner = ""
    if np.owner and np.owner.name:
        name = german_np(np.owner, "gen")
        determiner = name + "s"
    elif np.det in _POSSESSIVE:
        determiner, endings = _POSSESSIVE[np.det] + _EIN_WORD[slot], _MIXED
    elif np.det == "def":
        determiner, endings = _DEFINITE[slot], _WEAK
    elif np.det == "this":
        determiner, endings = "dies" + _DER_WORD[slot], _WEAK
    elif negated and np.det in ("indef", "bare"):
        determiner, endings = "kein" + _EIN_WORD[slot], _MIXED
    elif np.det == "indef":
        determiner, endings = "ein" + _EIN_WORD[slot], _MIXED
    elif np.det in ("some", "many"):
        determiner = {"some": "einig", "many": "viel"}[np.det] + _STRONG[slot]
    elif np.count:
        determiner = np.count.de
    words = [determiner] if determiner else []
    words += [adjective.stem + endings[slot] for adjective in np.adjectives]
    words.append(german_noun(np.noun, case, np.plural))
    text = " ".join(words)
    if np.owner and not np.owner.name:
        text += f" {german_np(np.owner, 'gen')}"
    if np.relative:
        text += f", {_de_relative(np.relative, slot[1])},"
    return text


def _de_relative(clause: Clause, gender: str) -> str:
    verb = clause.verb
    assert verb is not None
    if clause.gap == "subject":
        pronoun = _RELATIVE["nom", gender]
    elif verb.preposition:
        pronoun = f"{verb.preposition[1]} {_RELATIVE[verb.preposition[2], gender]}"
    else:
        pronoun = _RELATIVE["dat" if "d" in verb.flags else "acc", gender]
    return f"{pronoun} {_de_clause(clause, 'final')}"


def _de_finite(verb: Verb, tense: str, person: str) -> str:
    """Finite form without the separable prefix; tense is pres or past."""
    plural = person in ("pl", "we")
    if tense == "past":
        if not plural:
            return verb.de_past
        return verb.de_past + ("n" if verb.de_past.endswith("e") else "en")
    if verb is _BE:
        return {"I": "bin", "sg": "ist"}.get(person, "sind")
    if person == "sg":
        return verb.de_third
    if plural:
        return verb.de
    return verb.de_first or (verb.de[:-2] if verb.de.endswith("en") else verb.de[:-1]) + "e"


def _de_auxiliary(kind: str, person: str) -> str:
    forms = {
        "h": {"I": "habe", "sg": "hat", "pl": "haben"},
        "s": {"I": "bin", "sg": "ist", "pl": "sind"},
        "fut": {"I": "werde", "sg": "wird", "pl": "werden"},
    }
    return forms[kind]["pl" if person == "we" else person]


def _de_pp(pp: PP | Phrase) -> str:
    if isinstance(pp, Phrase):
        return pp.de
    text = f"{pp.de} {german_np(pp.np, pp.case)}"
    if pp.np.det == "def":
        for long, short in _CONTRACTIONS.items():
            if text.startswith(long + " "):
                return short + text[len(long) :]
    return text


def _de_middle(clause: Clause) -> list[str]:
    """Everything between the finite verb and the verbs at the end, without the subject."""
    verb = clause.verb
    assert verb is not None
    pronouns: list[str] = []
    nouns: list[str] = []
    late: list[str] = []
    direct = clause.obj if clause.gap != "object" else None
    kein = False
    if direct and not verb.preposition:
        case = "dat" if "d" in verb.flags else "acc"
        kein = clause.negated and direct.det in ("indef", "bare") and direct.noun is not None
        text = german_np(direct, case, kein)
        if kein and clause.tense == "perf":
            text = f"noch {text}"
        (pronouns if direct.pronoun else nouns).append(text)
    if clause.recipient:
        text = german_np(clause.recipient, "dat")
        if clause.recipient.pronoun:
            pronouns.append(text)
        else:
            nouns.insert(0, text)
    if direct and verb.preposition:
        late.append(f"{verb.preposition[1]} {german_np(direct, verb.preposition[2])}")
    words = list(pronouns)
    if clause.time and not clause.front:
        words.append(clause.time.de)
    if clause.frequency:
        words.append(clause.frequency.de)
    if clause.already:
        words.append("schon")
    words += nouns
    if clause.negated and not kein:
        words.append("noch nicht" if clause.tense == "perf" else "nicht")
    for phrase in (clause.manner, clause.means, clause.price):
        if phrase:
            words.append(phrase.de)
    words += late
    if clause.place:
        words.append(_de_pp(clause.place))
    if clause.direction:
        words.append(_de_pp(clause.direction))
    if clause.predicate:
        words.append(clause.predicate.de)
    return words


def _de_weather(clause: Clause, order: str) -> str:
    _, _, subject, present, past, rest, _ = clause.weather
    verb = past if clause.tense == "past" else present
    words = {"v2": [subject, verb, rest], "v1": [verb, subject, rest], "final": [subject, rest, verb]}[order]
    return " ".join(word for word in words if word)


def _de_clause(clause: Clause, order: str) -> str:
    """Word order "v2" (main clause), "v1" (main clause after a subordinate one) or "final" (subordinate)."""
    if clause.weather:
        return _de_weather(clause, order)
    verb, tense = clause.verb, clause.tense
    assert verb is not None and clause.subject is not None
    person = _person(clause.subject)
    ending: list[str] = []
    if tense in _MODALS:
        _, _, singular, plural, _ = _MODALS[tense]
        finite, ending = (plural if person in ("pl", "we") else singular), [verb.prefix + verb.de]
    elif tense == "fut":
        finite, ending = _de_auxiliary("fut", person), [verb.prefix + verb.de]
    elif tense == "perf":
        finite, ending = _de_auxiliary(verb.auxiliary, person), [verb.de_participle]
    else:
        finite = _de_finite(verb, tense, person)
        if order == "final":
            finite = verb.prefix + finite
        elif verb.prefix:
            ending = [verb.prefix]
    subject = [] if clause.gap == "subject" else [german_np(clause.subject, "nom")]
    middle = _de_middle(clause)
    if order == "final":
        words = [*subject, *middle, *ending, finite]
    elif clause.front and clause.time and order == "v2":
        words = [clause.time.de, finite, *subject, *middle, *ending]
    elif order == "v1":
        words = [finite, *subject, *middle, *ending]
    else:
        words = [*subject, finite, *middle, *ending]
    text = " ".join(words)
    if clause.content:
        text += f", dass {_de_clause(clause.content, 'final')}"
    return text


# --- Chinese ---

_ZH_DIGITS = "零一二三四五六七八九"
_ZH_BARE = tuple("新旧大小老冷热甜脏野")
_ZH_PRONOUNS = {"I": "我", "we": "我们", "he": "他", "she": "她"}


def chinese_number(value: int) -> str:
    """A number from 1 to 99 in Chinese characters."""
    tens, ones = divmod(value, 10)
    head = "" if tens == 0 else "十" if tens == 1 else _ZH_DIGITS[tens] + "十"
    return head + (_ZH_DIGITS[ones] if ones else "")


def _zh_pronoun(np: NP) -> str:
    if np.pronoun == "they":
        return "它们" if not np.human else "她们" if np.gender == "f" else "他们"
    return "它" if np.pronoun == "it" else _ZH_PRONOUNS[np.pronoun]


def _zh_adjectives(np: NP) -> str:
    """Short adjectives of things stand right before the noun, all others come first and take 的."""
    assert np.noun is not None
    human = bool(set(np.noun.tags) & set("pk"))
    with_de = [a.zh + "的" for a in np.adjectives if human or a.zh not in _ZH_BARE]
    bare = [a.zh for a in np.adjectives if not human and a.zh in _ZH_BARE]
    return "".join([*with_de, *bare])


def _zh_np(np: NP) -> str:
    if np.parts:
        return "和".join(_zh_np(part) for part in np.parts)
    if np.pronoun:
        return _zh_pronoun(np)
    if np.name:
        return np.name.zh
    assert np.noun is not None
    noun, human = np.noun, bool(set(np.noun.tags) & set("pk"))
    core = _zh_adjectives(np) + noun.zh
    owner = ""
    if np.owner:
        owner = _zh_np(np.owner) + "的"
    elif np.det in _EN_PRONOUNS:
        owner = {"I": "我", "we": "我们", "he": "他", "she": "她", "it": "它", "they": "他们"}[np.det] + "的"
    relative = f"{_zh_clause(np.relative)}的" if np.relative else ""
    measure = ""
    if np.det == "indef":
        measure = "一" + noun.classifier
    elif np.det == "this":
        measure = "这些" if np.plural else "这" + noun.classifier
    elif np.det == "some":
        measure = "一些"
    elif np.det == "many":
        measure = "很多"
    elif np.count:
        measure = np.count.zh + noun.classifier
    elif np.plural and np.det == "def" and human:
        core += "们"
    elif np.plural and np.det == "def":
        measure = "那些"
    return owner + (measure + relative if np.det == "indef" else relative + measure) + core


def _zh_pp(pp: PP | Phrase) -> str:
    return pp.zh if isinstance(pp, Phrase) else _zh_np(pp.np) + pp.zh_suffix


def _zh_particles(clause: Clause) -> tuple[str, bool]:
    """Words before the verb for tense and negation, and whether 了 follows the verb."""
    verb, tense = clause.verb, clause.tense
    assert verb is not None
    stative = "s" in verb.flags
    if tense in _MODALS:
        return ("不" if clause.negated else "") + _MODALS[tense][4], False
    if tense == "fut":
        return "不会" if clause.negated else "会", False
    if clause.negated:
        if verb.en == "have" and tense in ("pres", "past"):
            return "没", False
        if tense == "perf":
            return "还没", False
        return "没" if tense == "past" and not stative else "不", False
    if tense == "perf":
        return "已经" if clause.already else "", True
    plain = "n" in verb.flags or stative or clause.timeless or clause.gap == "object"
    return "", tense == "past" and not plain


def _zh_clause(clause: Clause) -> str:
    if clause.weather:
        return clause.weather[-1]
    verb = clause.verb
    assert verb is not None and clause.subject is not None
    subject = "" if clause.gap == "subject" else _zh_np(clause.subject)
    time = clause.time.zh if clause.time else ""
    start = f"{time}，{subject}" if clause.front and clause.time else subject + time
    if clause.frequency:
        start += clause.frequency.zh
    if clause.predicate:
        if clause.tense == "fut":
            return start + "会" + clause.predicate.zh.removeprefix("很")
        return start + (clause.negated_zh if clause.negated else clause.predicate.zh)
    if verb is _COST:
        assert clause.price is not None
        return f"{start}的价格是{clause.price.zh}"
    particles, done = _zh_particles(clause)
    start += particles
    for phrase in (clause.manner, clause.means, clause.price):
        if phrase:
            start += phrase.zh
    aspect = "了" if done else ""
    place = f"在{_zh_pp(clause.place)}" if clause.place else ""
    obj = clause.obj if clause.gap != "object" else None
    if obj and clause.negated and obj.det == "indef":
        obj = replace(obj, det="bare")
    direct = _zh_np(obj) if obj else ""
    if "o" in verb.flags:
        return start + verb.zh.replace("@", "") + place
    start += place
    if isinstance(clause.direction, PP) and verb in lexicon.PUT:
        return f"{start}把{direct}放在{aspect}" + _zh_pp(clause.direction)
    other = _zh_np(clause.recipient) if clause.recipient else direct
    text = start + verb.zh.replace("@", aspect)
    if "{}" in text:
        text = text.replace("{}", other) + (direct if clause.recipient else "")
    else:
        text += direct
    if clause.direction:
        text += _zh_pp(clause.direction)
    if clause.content:
        text += _zh_clause(clause.content)
    return text


# --- sentences ---


def _finish(text: str, stop: str) -> str:
    text = text[0].upper() + text[1:]
    return text.rstrip(",") + stop


def english(sentence: Sentence) -> str:
    """The sentence in English."""
    if isinstance(sentence, Clause):
        return _finish(_en_clause(sentence), ".")
    main, other, link = _en_clause(sentence.main), _en_clause(sentence.other), sentence.link
    if link == ".":
        return f"{_finish(main, '.')} {_finish(other, '.')}"
    if link in _COORDINATORS:
        return _finish(f"{main}, {link} {other}", ".")
    return _finish(f"{link} {other}, {main}" if sentence.first else f"{main} {link} {other}", ".")


def german(sentence: Sentence) -> str:
    """The sentence in German."""
    if isinstance(sentence, Clause):
        text = _finish(_de_clause(sentence, "v2"), ".")
    elif sentence.link == ".":
        text = " ".join(_finish(_de_clause(clause, "v2"), ".") for clause in (sentence.main, sentence.other))
    elif sentence.link in _COORDINATORS:
        word = _COORDINATORS[sentence.link][0]
        text = _finish(f"{_de_clause(sentence.main, 'v2')}, {word} {_de_clause(sentence.other, 'v2')}", ".")
    else:
        word, other = _SUBORDINATORS[sentence.link][0], _de_clause(sentence.other, "final")
        if sentence.first:
            text = _finish(f"{word} {other}, {_de_clause(sentence.main, 'v1')}", ".")
        else:
            text = _finish(f"{_de_clause(sentence.main, 'v2')}, {word} {other}", ".")
    return text.replace(",,", ",").replace(", ,", ",").replace(",.", ".")


def chinese(sentence: Sentence) -> str:
    """The sentence in Chinese, without spaces."""
    if isinstance(sentence, Clause):
        return _zh_clause(sentence) + "。"
    main, other = _zh_clause(sentence.main), _zh_clause(sentence.other)
    if sentence.link == ".":
        return f"{main}。{other}。"
    if sentence.link in _COORDINATORS:
        return _COORDINATORS[sentence.link][1].format(main, other) + "。"
    _, before, after = _SUBORDINATORS[sentence.link]
    return (before.format(other, main) if sentence.first else after.format(main, other)) + "。"


# --- drawing sentences ---


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
    return Phrase(en, de, "两" if value == 2 else chinese_number(value))


_COOKABLE = ("potato", "egg", "soup", "rice", "meat", "carrot")
_SPECIAL = {
    "F": [noun for noun in lexicon.NOUNS if noun.en in _COOKABLE],
    "Y": [noun for noun in lexicon.NOUNS if noun.en in ("contract", "letter", "report", "text")],
    "W": [noun for noun in lexicon.NOUNS if "c" in noun.tags],
    "Z": [noun for noun in lexicon.NOUNS if noun.en in ("picture",)],
    "B": [noun for noun in lexicon.NOUNS if noun.en in ("cup", "plate", "glass", "vase", "mirror", "bottle")],
}


@functools.cache
def _nouns(tags: str) -> list[Noun]:
    chosen = [noun for noun in lexicon.NOUNS if set(noun.tags) & set(tags)]
    chosen += [place.noun for place in lexicon.PLACES if "w" in tags]
    for tag in tags:
        chosen += _SPECIAL.get(tag, [])
    return chosen


@functools.cache
def _adjectives(tags: str) -> list[Adjective]:
    return [adjective for adjective in lexicon.ADJECTIVES if set(adjective.tags) & set(tags)]


@functools.cache
def _object_verbs(noun: Noun) -> list[Verb]:
    """Verbs whose object can be the head of a relative clause, in Chinese too."""
    verbs = [verb for verb in lexicon.TRANSITIVE + lexicon.PREPOSITIONAL if "{}" not in verb.zh]
    return [verb for verb in verbs if verb.en != "have" and noun in _nouns(verb.tags)]


@functools.cache
def _colours(tags: str) -> list[Adjective]:
    return [colour for colour in _COLOURS if set(colour.tags) & set(tags)]


_COLOURS = [adjective for adjective in lexicon.ADJECTIVES if adjective.zh.endswith("色")]


_CITY_PLACES = [PP("in", "in", "dat", "", NP(name=city, det="")) for city in lexicon.CITIES]


def _ambiguous(sentence: Sentence | NP | None) -> bool:
    """Whether English leaves the tense open: "they put", "we read"."""
    if sentence is None:
        return False
    if isinstance(sentence, Joined):
        return _ambiguous(sentence.main) or _ambiguous(sentence.other)
    if isinstance(sentence, NP):
        return _ambiguous(sentence.relative)
    verb, subject = sentence.verb, sentence.subject
    if verb and subject and sentence.tense == "pres" and verb.en == verb.en_past and _person(subject) != "sg":
        return verb is not _COST
    return any(_ambiguous(part) for part in (subject, sentence.obj, sentence.content))


def _stative(clause: Clause) -> bool:
    return clause.verb is not None and "s" in clause.verb.flags


def pronoun_np(pronoun: str) -> NP:
    """A pronoun for a person that was not mentioned before."""
    return NP(pronoun=pronoun, det="", gender="f" if pronoun == "she" else "m")


class _Draw:
    """Draws abstract sentences from a random stream."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[self.rng.randrange(len(items))]

    # noun phrases

    def adjective(self, noun: Noun, predicate: bool = False) -> Adjective | None:
        tags = noun.tags.replace("k", "p") + ("P" if predicate and set(noun.tags) & set("pk") else "")
        fitting = _adjectives(tags)
        if noun.mass:
            fitting = [adjective for adjective in fitting if adjective.en not in ("small", "big")]
        return self.pick(fitting) if fitting else None

    def adjectives(self, noun: Noun, level: int) -> tuple[Adjective, ...]:
        if level < 2 or not self.chance(0.5):
            return ()
        first = self.adjective(noun)
        if first is None:
            return ()
        colours = _colours(noun.tags)
        if level >= 3 and colours and first not in _COLOURS and self.chance(0.3):
            return (first, self.pick(colours))
        return (first,)

    def price(self, noun: Noun) -> Phrase:
        if set(noun.tags) & set("hv"):
            value = str(self.rng.randrange(2, 90) * 100)
        elif self.chance(0.3):
            value = f"{self.rng.randrange(1, 60)}.{self.rng.randrange(1, 10)}0"
        else:
            value = str(self.rng.randrange(2, 300))
        return Phrase(f"{value} euros", f"{value.replace('.', ',')} Euro", f"{value}欧元")

    def count(self) -> Phrase:
        value = self.rng.randrange(2, 13) if self.chance(0.6) else self.rng.randrange(13, 100)
        words = number_words(value)
        return words if value < 13 or self.chance(0.5) else Phrase(str(value), str(value), words.zh)

    def named(self) -> NP:
        if self.chance(0.2):
            surname, male = self.pick(lexicon.SURNAMES), self.chance(0.5)
            titles = ("Mr.", "Herr", "先生") if male else ("Ms.", "Frau", "女士")
            name = Phrase(f"{titles[0]} {surname.en}", f"{titles[1]} {surname.de}", surname.zh + titles[2])
            return NP(name=name, det="", gender="m" if male else "f")
        first_name, gender, zh = self.pick(lexicon.NAMES)
        return NP(name=Phrase(first_name, first_name, zh), det="", gender=gender)

    def subject(self, level: int, tags: str = "p") -> NP:
        roll = self.rng.random()
        if tags == "p" and roll < 0.2:
            return self.named()
        if tags == "p" and roll < 0.35:
            return pronoun_np(self.pick(("I", "we", "he", "she", "they")))
        if tags == "p" and level >= 2 and roll < 0.42:
            return self.kin()
        noun = self.pick(_nouns(tags))
        plural = self.chance(0.25)
        det = self.pick(("def", "def", "def", "indef", "this")) if not plural else self.pick(("def", "some", "this"))
        if plural and level >= 2 and self.chance(0.3):
            return NP(noun, "count", True, self.adjectives(noun, level), count=self.count())
        if level >= 3 and tags == "p" and det == "def" and not plural and self.chance(0.12):
            other = self.pick(_nouns("p"))
            if other is not noun:
                return NP(parts=(NP(noun), NP(other)), det="")
        return NP(noun, det, plural, self.adjectives(noun, level))

    def kin(self) -> NP:
        noun = self.pick(_nouns("k"))
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
        if self.chance(0.5):
            while True:
                name = self.named()
                if name.name and " " not in name.name.en:
                    return name
        noun = self.pick(_nouns("p"))
        return NP(noun, self.pick(("def", "def", "indef")))

    def thing(self, tags: str, level: int, possessor: NP | None = None) -> NP:
        noun = self.pick(_nouns(tags))
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

    # clauses

    def place(self, level: int) -> PP:
        if self.chance(0.2):
            return self.pick(_CITY_PLACES)
        place: Place = self.pick(lexicon.PLACES)
        adjectives = self.adjectives(place.noun, level)
        det = "def" if self.chance(0.75) else "indef"
        return PP(
            place.en_preposition,
            place.de_preposition,
            "dat",
            place.zh_suffix,
            NP(place.noun, det, False, adjectives),
        )

    def direction(self, level: int, tense: str) -> PP:
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

    def predicate(self, subject: NP, tense: str, noun: Noun, negated: bool = False, state: bool = False) -> Clause:
        """Subject, "be" and an adjective fit for `noun`; `state` asks for a passing state such as "tired"."""
        adjective = self.pick(_adjectives("P")) if state else self.adjective(noun, predicate=True)
        assert adjective is not None
        colour = adjective.zh.endswith("色")
        zh = f"是{adjective.zh}的" if colour else f"很{adjective.zh}"
        negative = f"不是{adjective.zh}的" if colour else f"不{adjective.zh}"
        return Clause(
            subject,
            _BE,
            tense,
            predicate=Phrase(adjective.en, adjective.de, zh),
            negated=negated,
            negated_zh=negative,
        )

    def tense(self) -> str:
        return self.pick(("pres", "past", "past"))

    def action(self, level: int, tense: str, subject: NP | None = None) -> Clause:
        """A person doing something; `level` bounds how rich the noun phrases are."""
        subject = subject or self.subject(level)
        kinds = ["transitive"] * 6 + ["prepositional", "intransitive", "intransitive", "motion"]
        if level >= 2:
            kinds += ["put", "ditransitive", "ditransitive"]
        kind = self.pick(kinds)
        clause = Clause(subject, tense=tense)
        if kind == "transitive":
            verb = self.pick(lexicon.TRANSITIVE)
            obj = self.object(verb, level, subject)
            price = None
            if level >= 2 and verb.en in ("buy", "sell") and obj.noun and self.chance(0.4):
                amount = self.price(obj.noun)
                zh = f"花{amount.zh}" if verb.en == "buy" else f"以{amount.zh}的价格"
                price = Phrase(f"for {amount.en}", f"für {amount.de}", zh)
            return replace(clause, verb=verb, obj=obj, price=price)
        if kind == "prepositional":
            verb = self.pick(lexicon.PREPOSITIONAL)
            return replace(clause, verb=verb, obj=self.object(verb, level, subject))
        if kind == "intransitive":
            return replace(clause, verb=self.pick(lexicon.INTRANSITIVE), place=self.place(level))
        if kind == "motion":
            verb = self.pick(lexicon.MOTION)
            goal = self.direction(level, tense)
            far = goal.np.name is not None
            if far == (verb.en in ("go", "run")) or (not far and verb.en in ("fly", "travel")):
                verb = next(v for v in lexicon.MOTION if v.en == ("fly" if far else "go"))
            if verb.en == "travel" and level >= 2 and self.chance(0.6):
                clause = replace(clause, means=self.pick(lexicon.MEANS))
            return replace(clause, verb=verb, direction=goal)
        if kind == "put":
            verb = self.pick(lexicon.PUT)
            noun, surface, where = (
                self.pick(_nouns(verb.tags)),
                self.pick(_nouns("u")),
                self.pick(lexicon.POSITIONS),
            )
            obj = NP(noun, "def", self.chance(0.2), self.adjectives(noun, level))
            goal = PP(
                where.en,
                where.de,
                "acc",
                where.zh,
                NP(surface, "def", False, self.adjectives(surface, level)),
            )
            return replace(clause, verb=verb, obj=obj, direction=goal)
        verb = self.pick(lexicon.DITRANSITIVE)
        recipient = self.subject(min(level, 2))
        while recipient.pronoun or recipient.parts or recipient == subject:
            recipient = self.subject(min(level, 2))
        return replace(clause, verb=verb, obj=self.thing(verb.tags, level, subject), recipient=recipient)

    def object(self, verb: Verb, level: int, subject: NP) -> NP:
        if "p" in verb.tags and self.chance(0.5 if set(verb.tags) - set("p") else 1.0):
            while True:
                roll = self.rng.random()
                if roll < 0.15:
                    pronoun = self.pick(("he", "she", "they"))
                    if subject.pronoun in ("I", "we"):
                        return pronoun_np(pronoun)
                if roll < 0.25 and subject.pronoun not in ("I", "we"):
                    return NP(pronoun=self.pick(("I", "we")), det="")
                obj = self.subject(level)
                if not obj.pronoun and obj != subject and not (obj.noun and obj.noun is subject.noun):
                    return obj
        tags = verb.tags.replace("p", "") or verb.tags
        return self.thing(tags, level, subject)

    def time(self, tense: str) -> Phrase:
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

    def enriched(self, level: int) -> Clause:
        """A clause with a time, a negation, a modal, the perfect or the future."""
        kind = self.pick(("time", "time", "modal", "perfect", "negation", "future", "predicate"))
        if kind == "predicate":
            subject = self.subject(level, self.pick(("p", "rctvu", "hw")))
            while subject.noun is None:
                subject = self.subject(level)
            subject = replace(subject, adjectives=())
            return self.predicate(subject, self.tense(), subject.noun or lexicon.NOUNS[0], negated=True)
        if kind == "modal":
            tense = self.pick(tuple(_MODALS))
            negated = bool(_MODALS[tense][1]) and self.chance(0.3)
            clause = self.eventive(level, tense)
        elif kind == "perfect":
            negated = self.chance(0.4)
            clause = self.eventive(level, "perf")
            return replace(clause, negated=negated, already=not negated and self.chance(0.6))
        elif kind == "future":
            clause, negated = self.eventive(level, "fut"), self.chance(0.25)
        elif kind == "negation":
            clause, negated = self.action(level, self.tense()), True
        else:
            clause, negated = self.eventive(level, self.tense()), False
            if clause.tense == "pres" and self.chance(0.4):
                return replace(clause, frequency=self.pick(lexicon.FREQUENCIES))
            if clause.place is None and clause.direction is None and clause.price is None and self.chance(0.2):
                verb = clause.verb
                if verb and "s" not in verb.flags and not verb.preposition and "{}" not in verb.zh:
                    clause = replace(clause, manner=self.pick(lexicon.MANNERS))
            return replace(clause, time=self.time(clause.tense), front=self.chance(0.55))
        if (
            negated
            and clause.obj
            and clause.obj.det in ("some", "many", "count", "indef", "bare")
            and clause.obj.plural
        ):
            clause = replace(clause, obj=replace(clause.obj, det="def", count=None))
        clause = replace(clause, negated=negated)
        if self.chance(0.5) and not _stative(clause):
            clause = replace(clause, time=self.time(clause.tense), front=self.chance(0.5))
        return clause

    def eventive(self, level: int, tense: str) -> Clause:
        """An action that can be wanted or finished: no states."""
        while True:
            clause = self.action(level, tense)
            endless = tense == "perf" and clause.verb and "n" in clause.verb.flags
            if not _stative(clause) and not endless:
                return clause

    def relative(self, noun: Noun) -> Clause | None:
        """A relative clause about the noun."""
        tense = self.pick(("past", "past", "pres"))
        if set(noun.tags) & set("pk") and self.chance(0.6):
            subject = NP(noun)
            if self.chance(0.3):
                where = self.place(2)
                verb = self.pick(
                    [v for v in lexicon.INTRANSITIVE if v.en in ("live", "work", "wait", "sit", "stand", "sing")]
                )
                return Clause(subject, verb, tense, place=where, gap="subject")
            clause = self.action(2, tense, subject)
            return replace(clause, gap="subject") if "{}" not in (clause.verb.zh if clause.verb else "") else None
        verbs = _object_verbs(noun)
        if not verbs:
            return None
        verb = self.pick(verbs)
        subject = self.subject(2)
        while subject.noun is noun:
            subject = self.subject(2)
        clause = Clause(subject, verb, tense, obj=NP(noun), gap="object")
        timed = tense == "past" and not _stative(clause) and self.chance(0.3)
        return replace(clause, time=self.time(tense)) if timed else clause

    def with_relative(self, level: int) -> Clause:
        """A clause one of whose noun phrases has a relative clause."""
        while True:
            clause = self.predicate_clause() if self.chance(0.3) else self.action(2, self.tense())
            slot = self.pick(("subject", "obj"))
            np = clause.subject if slot == "subject" else clause.obj
            if np is None or np.noun is None or np.noun.mass or np.owner or np.det not in ("def", "indef"):
                continue
            head = np.noun
            if slot == "subject" and np.det == "indef":
                np = replace(np, det="def")
            # Nothing may follow the relative clause, in German not even a separated prefix.
            if slot == "obj" and (clause.place or clause.direction or clause.price or clause.recipient):
                continue
            if slot == "obj" and clause.verb and clause.verb.prefix:
                continue
            relative = self.relative(head)
            if relative is None or (relative.subject and relative.subject == clause.subject and slot == "obj"):
                continue
            if relative.gap == "subject":
                relative = replace(relative, subject=NP(head, plural=np.plural))
            np = replace(np, relative=relative)
            clause = replace(clause, subject=np) if slot == "subject" else replace(clause, obj=np)
            if level >= 5 and not _stative(clause) and self.chance(0.3):
                clause = replace(clause, time=self.time(clause.tense), front=True)
            return clause

    def predicate_clause(self, level: int = 2) -> Clause:
        """Somebody or something is some way."""
        while True:
            subject = self.subject(level, self.pick(("p", "rctvu", "a", "hw")))
            if subject.noun:
                subject = replace(subject, adjectives=())
                return self.predicate(subject, self.tense(), subject.noun or lexicon.NOUNS[0])

    def weather(self, tense: str) -> Clause:
        return Clause(tense=tense, weather=tuple(self.pick(lexicon.WEATHER)))

    def referred(self, clause: Clause) -> tuple[NP, Noun | None] | None:
        """A pronoun for the subject or a thing in the object, where its gender is beyond doubt."""
        obj = clause.obj
        if obj and obj.noun and not set(obj.noun.tags) & set("pkaw") and not obj.noun.mass and self.chance(0.5):
            if clause.negated or (clause.subject and clause.subject.plural and obj.plural):
                return None
            pronoun = "they" if obj.plural else "it"
            return NP(pronoun=pronoun, det="", gender=obj.noun.gender, human=False), obj.noun
        subject = clause.subject
        if subject is None or subject.parts:
            return None
        if obj and (obj.name or obj.pronoun or (obj.noun and set(obj.noun.tags) & set("pk"))) or clause.recipient:
            return None
        if subject.pronoun:
            return subject, None
        if subject.name:
            return NP(pronoun="he" if subject.gender == "m" else "she", det="", gender=subject.gender), None
        noun = subject.noun
        if noun is None or noun.gender == "n" or not set(noun.tags) & set("pk"):
            return None
        if subject.plural:
            return NP(pronoun="they", det="", gender=noun.gender), noun
        return NP(pronoun="he" if noun.gender == "m" else "she", det="", gender=noun.gender), noun

    def about(self, pronoun: NP, noun: Noun | None, tense: str) -> Clause:
        """A clause about something mentioned before."""
        person = pronoun.human
        if not person:
            assert noun is not None
            return self.predicate(pronoun, tense, noun)
        if self.chance(0.5):
            return self.predicate(pronoun, tense, noun or lexicon.NOUNS[0], state=True)
        return self.action(2, tense, pronoun)

    def joined(self, level: int) -> Joined | None:
        """A main clause with a subordinate one."""
        tense = self.tense()
        link = self.pick(("because", "because", "although", "if", "before", "while"))
        first = link in ("if", "before", "while") or self.chance(0.5)
        if link == "if":
            tense = "pres"
        one = self.action(2, tense)
        if link in ("before", "while"):
            other = self.action(2, tense)
            shared = self.referred(one) if self.chance(0.6) else None
            if shared and shared[0].human:
                other = self.action(2, tense, shared[0])
            pair = (one, other)
        elif self.chance(0.35) or (link == "if" and self.chance(0.5)):
            pair = (self.weather(tense), one)
            if not first:
                pair = (one, pair[0])
        else:
            shared = self.referred(one)
            if shared is None:
                return None
            pair = (
                one,
                self.action(2, tense, shared[0]) if link == "if" and shared[0].human else self.about(*shared, tense),
            )
        for clause in pair:
            if _stative(clause) and link in ("before", "while", "if") and clause.verb is not _BE:
                return None
        if link in ("before", "while"):
            pair = (replace(pair[0], timeless=True), pair[1])
        return Joined(pair[1], link, pair[0], True) if first else Joined(pair[0], link, pair[1])

    def said(self, content: Clause) -> Clause:
        verb = self.pick(lexicon.SAY)
        subject = self.subject(2 if verb.en in ("say", "claim", "report") else 1)
        return Clause(subject, verb, self.pick(("pres", "past")), content=content)

    def sentence(self, level: int) -> Sentence:
        """One abstract sentence of the level, 1 to 5."""
        while True:
            drawn = self.attempt(level)
            if drawn is not None and not _ambiguous(drawn):
                return drawn

    def attempt(self, level: int) -> Sentence | None:
        if level == 1:
            if self.chance(0.15):
                return self.predicate_clause(1)
            return self.action(1, self.tense())
        if level == 2:
            roll = self.rng.random()
            if roll < 0.12:
                return self.comparison()
            if roll < 0.2:
                noun = self.pick(_nouns("tvrcu"))
                subject = NP(noun, self.pick(("def", "this")), adjectives=self.adjectives(noun, 2))
                amount = self.price(noun)
                return Clause(subject, _COST, "pres", price=amount)
            if roll < 0.26:
                name = self.named()
                en, masculine, feminine, zh = self.pick(lexicon.OCCUPATIONS)
                de = masculine if name.gender == "m" else feminine
                return Clause(name, _BE, predicate=Phrase(f"{_en_article(en)} {en}", de, f"是{zh}"))
            clause = self.action(2, self.tense())
            nps = [np for np in (clause.subject, clause.obj, clause.recipient) if np]
            return clause if any(np.adjectives or np.count or np.owner for np in nps) or clause.price else None
        if level == 3:
            return self.enriched(3)
        if level == 4:
            kind = self.pick(("relative", "joined", "joined", "said"))
            if kind == "relative":
                return self.with_relative(4)
            if kind == "said":
                content = self.predicate_clause() if self.chance(0.4) else self.enriched(2)
                return self.said(replace(content, front=False))
            return self.joined(4)
        kind = self.pick(("relative+", "said", "coordination", "two", "two", "said+"))
        if kind == "two":
            one = self.enriched(3) if self.chance(0.6) else self.with_relative(4)
            if one.tense not in ("pres", "past") or one.negated:
                return None
            shared = self.referred(one)
            if shared is None:
                return None
            two = self.about(*shared, one.tense)
            return None if one.predicate and two.predicate else Joined(one, ".", two)
        if kind == "coordination":
            tense = self.tense()
            one = self.action(2, tense) if self.chance(0.5) else self.with_relative(4)
            two = self.action(2, one.tense)
            return None if one.subject == two.subject else Joined(one, self.pick(("and", "but")), two)
        if kind == "relative+":
            one = self.with_relative(4)
            if self.chance(0.5):
                return Joined(one, self.pick(("because", "although")), self.weather(one.tense), True)
            shared = self.referred(one)
            if shared is None or not shared[0].human:
                return None
            link = self.pick(("because", "although"))
            if self.chance(0.5):
                return Joined(self.about(*shared, one.tense), link, one, True)
            return Joined(one, link, self.about(*shared, one.tense))
        if kind == "said+":
            joined = self.said(replace(self.with_relative(4), front=False))
            return Joined(joined, self.pick(("but", "and")), self.action(2, joined.tense))
        return self.said(self.with_relative(4))

    def comparison(self) -> Clause | None:
        tags = self.pick(("r", "c", "t", "v", "u", "p"))
        one, two = self.pick(_nouns(tags)), self.pick(_nouns(tags))
        fitting = [a for a in lexicon.ADJECTIVES if a.en_comparative and set(a.tags) & set(one.tags) & set(two.tags)]
        if one is two or not fitting:
            return None
        adjective, other = self.pick(fitting), NP(two, self.pick(("def", "this")))
        phrase = Phrase(
            f"{adjective.en_comparative} than {_en_np(other)}",
            f"{adjective.de_comparative} als {german_np(other, 'nom')}",
            f"比{_zh_np(other)}{adjective.zh}",
        )
        return Clause(NP(one, self.pick(("def", "this"))), _BE, self.tense(), predicate=phrase)


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


# --- the task ---


def _held_out(source: str) -> bool:
    return zlib.crc32(source.encode()) % _HELD_OUT_ONE_IN == 0


class MiniTranslation(Task):
    """Generated translation from English to German or Chinese, in five levels of difficulty.

    Level 1 is a short clause; 2 adds adjectives, numbers, prices and possessors; 3 adds time phrases that
    invert the German order, modals, perfect, future and negation; 4 has one subordinate or relative clause; 5
    nests or joins several clauses. A source belongs to the test side or the training side by its checksum, so
    the two never meet.

    Args:
        pair: "en-de" or "en-zh".
        pool_size: Number of examples in `train_pool`.
        test_size: Number of examples in `test`.
        seed: Seed of the training pool; the test set does not depend on it.

    Raises:
        ValueError: The pair is unknown or a size is below 1.
    """

    kind: ClassVar[str] = "translation"

    def __init__(self, pair: str = "en-de", pool_size: int = 6000, test_size: int = 500, seed: int = 0) -> None:
        if pair not in _LANGUAGES:
            raise ValueError(f"pair={pair!r} is unknown; choose one of {', '.join(_LANGUAGES)}.")
        for option, value in (("pool_size", pool_size), ("test_size", test_size)):
            if value < 1:
                raise ValueError(f"{option}={value} is too small; give 1 or more.")
        self.pair, self.pool_size, self.test_size, self.seed = pair, pool_size, test_size, seed
        self.target_language = pair.split("-")[1]

    def train_pool(self) -> list[Example]:
        """`pool_size` training examples."""
        return self.generate(self.pool_size, self.seed)

    def test(self) -> list[Example]:
        """`test_size` held-out examples, from a seed of their own."""
        return self.generate(self.test_size, _TEST_SEED, held_out=True)

    def generate(self, count: int, seed: int, held_out: bool = False) -> list[Example]:
        """Draws `count` examples with distinct sources, levels uniformly mixed.

        Args:
            count: Number of examples.
            seed: Seed of the random stream.
            held_out: Draw from the test side instead of the training side.

        Raises:
            ValueError: `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"count={count} is too small; give 1 or more.")
        draw = _Draw(random.Random(seed))
        write = german if self.pair == "en-de" else chinese
        name = f"mini-{self.pair.replace('-', '')}-{'test' if held_out else 'train'}"
        seen: set[str] = set()
        examples: list[Example] = []
        while len(examples) < count:
            level = draw.pick(LEVELS)
            while True:
                sentence = draw.sentence(level)
                source = english(sentence)
                if source in seen or _held_out(source) != held_out or not 3 <= len(source.split()) <= _MAX_EN_WORDS:
                    continue
                target = write(sentence)
                if len(target.split()) <= _MAX_DE_WORDS:
                    break
            seen.add(source)
            examples.append(Example(f"{name}-{len(examples):06d}", source, (target,), difficulty=level))
        return examples

    def prompt(self, example: Example, source: str | None = None) -> str:
        """The translation prompt of appendix A.6."""
        return translation_prompt(example.source if source is None else source, "English", _LANGUAGES[self.pair])
