"""German grammar: writes a sentence's meaning in German, with cases, endings and word order."""

from __future__ import annotations

from recipe.translation import lexicon
from recipe.translation.lexicon import Noun, Verb
from recipe.translation.meaning import NP, PP, Clause, Sentence

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


def inflected(noun: Noun, case: str, plural: bool) -> str:
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


def _gender(np: NP) -> str:
    if np.plural:
        return "pl"
    return np.noun.gender if np.noun else np.gender


def noun_phrase(np: NP, case: str, negated: bool = False) -> str:
    """The noun phrase in German; `negated` turns "ein" and no article into "kein"."""
    if np.parts:
        return " und ".join(noun_phrase(part, case) for part in np.parts)
    if np.pronoun in _FIRST:
        return _FIRST[np.pronoun][_CASES.index(case)]
    if np.pronoun:
        return _PERSONAL[case, "pl" if np.pronoun == "they" else np.gender]
    if np.name:
        name = np.name.de
        return name.replace("Herr ", "Herrn ") if case != "nom" else name
    assert np.noun is not None
    slot = (case, _gender(np))
    endings = _STRONG
    determiner = ""
    if np.owner and np.owner.name:
        name = noun_phrase(np.owner, "gen")
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
    words.append(inflected(np.noun, case, np.plural))
    text = " ".join(words)
    if np.owner and not np.owner.name:
        text += f" {noun_phrase(np.owner, 'gen')}"
    if np.relative:
        text += f", {_relative_clause(np.relative, slot[1])},"
    return text


def _relative_clause(clause: Clause, gender: str) -> str:
    verb = clause.verb
    assert verb is not None
    if clause.gap == "subject":
        pronoun = _RELATIVE["nom", gender]
    elif verb.preposition:
        pronoun = f"{verb.preposition[1]} {_RELATIVE[verb.preposition[2], gender]}"
    else:
        pronoun = _RELATIVE["dat" if "d" in verb.flags else "acc", gender]
    return f"{pronoun} {_clause(clause, 'final')}"


def _finite(verb: Verb, tense: str, person: str) -> str:
    """Finite form without the separable prefix; tense is pres or past."""
    plural = person in ("pl", "we")
    if tense == "past":
        if not plural:
            return verb.de_past
        return verb.de_past + ("n" if verb.de_past.endswith("e") else "en")
    if verb is lexicon.BE:
        return {"I": "bin", "sg": "ist"}.get(person, "sind")
    if person == "sg":
        return verb.de_third
    if plural:
        return verb.de
    return verb.de_first or (verb.de[:-2] if verb.de.endswith("en") else verb.de[:-1]) + "e"


def _auxiliary(kind: str, person: str) -> str:
    forms = {
        "h": {"I": "habe", "sg": "hat", "pl": "haben"},
        "s": {"I": "bin", "sg": "ist", "pl": "sind"},
        "fut": {"I": "werde", "sg": "wird", "pl": "werden"},
    }
    return forms[kind]["pl" if person == "we" else person]


def _prepositional(pp: PP) -> str:
    text = f"{pp.de} {noun_phrase(pp.np, pp.case)}"
    if pp.np.det == "def":
        for long, short in _CONTRACTIONS.items():
            if text.startswith(long + " "):
                return short + text[len(long) :]
    return text


def _middle_field(clause: Clause) -> list[str]:
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
        text = noun_phrase(direct, case, kein)
        if kein and clause.tense == "perf":
            text = f"noch {text}"
        (pronouns if direct.pronoun else nouns).append(text)
    if clause.recipient:
        text = noun_phrase(clause.recipient, "dat")
        if clause.recipient.pronoun:
            pronouns.append(text)
        else:
            nouns.insert(0, text)
    if direct and verb.preposition:
        late.append(f"{verb.preposition[1]} {noun_phrase(direct, verb.preposition[2])}")
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
        words.append(_prepositional(clause.place))
    if clause.direction:
        words.append(_prepositional(clause.direction))
    if clause.predicate:
        words.append(clause.predicate.de)
    return words


def _weather(clause: Clause, order: str) -> str:
    _, _, subject, present, past, rest, _ = clause.weather
    verb = past if clause.tense == "past" else present
    words = {"v2": [subject, verb, rest], "v1": [verb, subject, rest], "final": [subject, rest, verb]}[order]
    return " ".join(word for word in words if word)


def _clause(clause: Clause, order: str) -> str:
    """Word order "v2" (main clause), "v1" (main clause after a subordinate one) or "final" (subordinate)."""
    if clause.weather:
        return _weather(clause, order)
    verb, tense = clause.verb, clause.tense
    assert verb is not None and clause.subject is not None
    person = clause.subject.person
    ending: list[str] = []
    if tense in lexicon.MODALS:
        modal = lexicon.MODALS[tense]
        finite, ending = (modal.de_plural if person in ("pl", "we") else modal.de), [verb.prefix + verb.de]
    elif tense == "fut":
        finite, ending = _auxiliary("fut", person), [verb.prefix + verb.de]
    elif tense == "perf":
        finite, ending = _auxiliary(verb.auxiliary, person), [verb.de_participle]
    else:
        finite = _finite(verb, tense, person)
        if order == "final":
            finite = verb.prefix + finite
        elif verb.prefix:
            ending = [verb.prefix]
    subject = [] if clause.gap == "subject" else [noun_phrase(clause.subject, "nom")]
    middle = _middle_field(clause)
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
        text += f", dass {_clause(clause.content, 'final')}"
    return text


def _finish(text: str) -> str:
    return (text[0].upper() + text[1:]).rstrip(",") + "."


def write(sentence: Sentence) -> str:
    """The sentence in German."""
    if isinstance(sentence, Clause):
        text = _finish(_clause(sentence, "v2"))
    elif sentence.link == ".":
        text = " ".join(_finish(_clause(clause, "v2")) for clause in (sentence.main, sentence.other))
    elif sentence.link in lexicon.COORDINATORS:
        word = lexicon.COORDINATORS[sentence.link].de
        text = _finish(f"{_clause(sentence.main, 'v2')}, {word} {_clause(sentence.other, 'v2')}")
    else:
        word, other = lexicon.SUBORDINATORS[sentence.link].de, _clause(sentence.other, "final")
        if sentence.first:
            text = _finish(f"{word} {other}, {_clause(sentence.main, 'v1')}")
        else:
            text = _finish(f"{_clause(sentence.main, 'v2')}, {word} {other}")
    return text.replace(",,", ",").replace(", ,", ",").replace(",.", ".")
