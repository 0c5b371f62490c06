"""English grammar: writes a sentence's meaning in English."""

from __future__ import annotations

from recipe.translation import lexicon
from recipe.translation.meaning import NP, PP, Clause, Sentence

_PRONOUNS = {
    "I": ("I", "me", "my"),
    "we": ("we", "us", "our"),
    "he": ("he", "him", "his"),
    "she": ("she", "her", "her"),
    "it": ("it", "it", "its"),
    "they": ("they", "them", "their"),
}
_PARTICLES = (" up", " on", " off", " along")
_WITH_TO = ("explain", "recommend", "show", "send", "lend", "read")


def article(phrase: str) -> str:
    """ "a" or "an", whichever goes before the phrase."""
    vowel = phrase[0].lower() in "aeiou" and not phrase.startswith(("uni", "use"))
    return "an" if vowel or phrase.startswith("honest") else "a"


def noun_phrase(np: NP, case: str = "acc") -> str:
    """The noun phrase in English; `case` "nom" is a subject's, which pronouns show."""
    if np.parts:
        return " and ".join(noun_phrase(part, case) for part in np.parts)
    if np.pronoun:
        return _PRONOUNS[np.pronoun][0 if case == "nom" else 1]
    if np.name:
        return np.name.en
    assert np.noun is not None
    word = np.noun.en_plural if np.plural else np.noun.en
    core = " ".join([*(adjective.en for adjective in np.adjectives), word])
    if np.owner and np.owner.name:
        core = f"{np.owner.name.en}'s {core}"
    elif np.det in _PRONOUNS:
        core = f"{_PRONOUNS[np.det][2]} {core}"
    elif np.det == "def":
        core = f"the {core}"
    elif np.det == "indef":
        core = f"{article(core)} {core}"
    elif np.det == "this":
        core = f"{'these' if np.plural else 'this'} {core}"
    elif np.det in ("some", "many"):
        core = f"{np.det} {core}"
    elif np.count:
        core = f"{np.count.en} {core}"
    if np.owner and not np.owner.name:
        core += f" of {noun_phrase(np.owner)}"
    if np.relative:
        pronoun = "who" if np.noun.human and np.relative.gap == "subject" else "that"
        core += f" {pronoun} {_clause(np.relative)}"
    return core


def _third_person(verb: str) -> str:
    head, _, rest = verb.partition(" ")
    if head == "have":
        head = "has"
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "es" if head.endswith(("s", "sh", "ch", "x", "o")) else "s"
    return f"{head} {rest}".strip()


def _prepositional(pp: PP) -> str:
    return f"{pp.en} {noun_phrase(pp.np)}"


def _verb_group(clause: Clause, person: str) -> str:
    """Finite verb up to the object, with negation and the adverbs that stand before the verb."""
    verb, tense = clause.verb, clause.tense
    assert verb is not None
    third = person == "sg"
    adverb = f"{clause.frequency.en} " if clause.frequency else ""
    if tense in lexicon.MODALS:
        plain, negative = lexicon.MODALS[tense].en, lexicon.MODALS[tense].en_negated
        if tense == "wants":
            plain = plain if third else "want to"
            negative = "does not want to" if third else negative
        return f"{negative if clause.negated else plain} {verb.en}"
    if tense == "fut":
        return f"will {'not ' if clause.negated else adverb}{verb.en}"
    if tense == "perf":
        middle = "not " if clause.negated else "already " if clause.already else ""
        return f"{'has' if third else 'have'} {middle}{verb.en_participle}"
    if verb is lexicon.BE:
        form = {"I": "am", "sg": "is"}.get(person, "are")
        if tense == "past":
            form = "was" if person in ("I", "sg") else "were"
        return f"{form} not" if clause.negated else f"{form} {adverb}".strip()
    if clause.negated:
        return f"{'did' if tense == 'past' else 'does' if third else 'do'} not {verb.en}"
    if tense == "past":
        return adverb + verb.en_past
    return adverb + (_third_person(verb.en) if third else verb.en)


def _clause(clause: Clause) -> str:
    if clause.weather:
        return clause.weather[1 if clause.tense == "past" else 0]
    assert clause.subject is not None and clause.verb is not None
    words = [] if clause.gap == "subject" else [noun_phrase(clause.subject, "nom")]
    words.append(_verb_group(clause, clause.subject.person))
    if clause.recipient and clause.verb.en not in _WITH_TO:
        words.append(noun_phrase(clause.recipient))
    if clause.verb.preposition:
        words.append(clause.verb.preposition[0])
    if clause.obj and clause.gap != "object":
        words.append(noun_phrase(clause.obj))
        if clause.obj.pronoun and clause.verb.en.endswith(_PARTICLES):
            verb, particle = words[-2].rsplit(" ", 1)
            words[-2:] = [verb, words[-1], particle]
    if clause.recipient and clause.verb.en in _WITH_TO:
        words += ["to", noun_phrase(clause.recipient)]
    if clause.predicate:
        words.append(clause.predicate.en)
    if clause.direction:
        words.append(_prepositional(clause.direction))
    for phrase in (clause.means, clause.manner, clause.price):
        if phrase:
            words.append(phrase.en)
    if clause.place:
        words.append(_prepositional(clause.place))
    if clause.time:
        words = [f"{clause.time.en},", *words] if clause.front else [*words, clause.time.en]
    if clause.tense == "perf" and clause.negated:
        words.append("yet")
    if clause.content:
        words.append(f"that {_clause(clause.content)}")
    return " ".join(words)


def _finish(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def write(sentence: Sentence) -> str:
    """The sentence in English."""
    if isinstance(sentence, Clause):
        return _finish(_clause(sentence))
    main, other, link = _clause(sentence.main), _clause(sentence.other), sentence.link
    if link == ".":
        return f"{_finish(main)} {_finish(other)}"
    if link in lexicon.COORDINATORS:
        return _finish(f"{main}, {link} {other}")
    return _finish(f"{link} {other}, {main}" if sentence.first else f"{main} {link} {other}")
