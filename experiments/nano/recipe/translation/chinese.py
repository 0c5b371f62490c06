"""Chinese grammar: writes a sentence's meaning in Chinese, with measure words, aspect and word order."""

from __future__ import annotations

from dataclasses import replace

from recipe.translation import lexicon
from recipe.translation.meaning import NP, PP, Clause, Sentence

_DIGITS = "零一二三四五六七八九"
_BARE = tuple("新旧大小老冷热甜脏野")
_PRONOUNS = {"I": "我", "we": "我们", "he": "他", "she": "她"}
_POSSESSIVE = {"I": "我的", "we": "我们的", "he": "他的", "she": "她的", "it": "它的", "they": "他们的"}


def number(value: int) -> str:
    """A number from 1 to 99 in Chinese characters."""
    tens, ones = divmod(value, 10)
    head = "" if tens == 0 else "十" if tens == 1 else _DIGITS[tens] + "十"
    return head + (_DIGITS[ones] if ones else "")


def _pronoun(np: NP) -> str:
    if np.pronoun == "they":
        return "它们" if not np.human else "她们" if np.gender == "f" else "他们"
    return "它" if np.pronoun == "it" else _PRONOUNS[np.pronoun]


def _adjectives(np: NP) -> str:
    """Short adjectives of things stand right before the noun, all others come first and take 的."""
    assert np.noun is not None
    human = np.noun.human
    with_de = [a.zh + "的" for a in np.adjectives if human or a.zh not in _BARE]
    bare = [a.zh for a in np.adjectives if not human and a.zh in _BARE]
    return "".join([*with_de, *bare])


def noun_phrase(np: NP) -> str:
    """The noun phrase in Chinese."""
    if np.parts:
        return "和".join(noun_phrase(part) for part in np.parts)
    if np.pronoun:
        return _pronoun(np)
    if np.name:
        return np.name.zh
    assert np.noun is not None
    noun, human = np.noun, np.noun.human
    core = _adjectives(np) + noun.zh
    owner = ""
    if np.owner:
        owner = noun_phrase(np.owner) + "的"
    elif np.det in _POSSESSIVE:
        owner = _POSSESSIVE[np.det]
    relative = f"{_clause(np.relative)}的" if np.relative else ""
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


def _where(pp: PP) -> str:
    return noun_phrase(pp.np) + pp.zh_suffix


def _particles(clause: Clause) -> tuple[str, bool]:
    """Words before the verb for tense and negation, and whether 了 follows the verb."""
    verb, tense = clause.verb, clause.tense
    assert verb is not None
    stative = "s" in verb.flags
    if tense in lexicon.MODALS:
        return ("不" if clause.negated else "") + lexicon.MODALS[tense].zh, False
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


def _clause(clause: Clause) -> str:
    if clause.weather:
        return clause.weather[-1]
    verb = clause.verb
    assert verb is not None and clause.subject is not None
    subject = "" if clause.gap == "subject" else noun_phrase(clause.subject)
    time = clause.time.zh if clause.time else ""
    start = f"{time}，{subject}" if clause.front and clause.time else subject + time
    if clause.frequency:
        start += clause.frequency.zh
    if clause.predicate:
        if clause.tense == "fut":
            return start + "会" + clause.predicate.zh.removeprefix("很")
        return start + (clause.negated_zh if clause.negated else clause.predicate.zh)
    if verb is lexicon.COST:
        assert clause.price is not None
        return f"{start}的价格是{clause.price.zh}"
    particles, done = _particles(clause)
    start += particles
    for phrase in (clause.manner, clause.means, clause.price):
        if phrase:
            start += phrase.zh
    aspect = "了" if done else ""
    place = f"在{_where(clause.place)}" if clause.place else ""
    obj = clause.obj if clause.gap != "object" else None
    if obj and clause.negated and obj.det == "indef":
        obj = replace(obj, det="bare")
    direct = noun_phrase(obj) if obj else ""
    if "o" in verb.flags:
        return start + verb.zh.replace("@", "") + place
    start += place
    if clause.direction and verb in lexicon.PUT:
        return f"{start}把{direct}放在{aspect}" + _where(clause.direction)
    other = noun_phrase(clause.recipient) if clause.recipient else direct
    text = start + verb.zh.replace("@", aspect)
    if "{}" in text:
        text = text.replace("{}", other) + (direct if clause.recipient else "")
    else:
        text += direct
    if clause.direction:
        text += _where(clause.direction)
    if clause.content:
        text += _clause(clause.content)
    return text


def write(sentence: Sentence) -> str:
    """The sentence in Chinese, without spaces."""
    if isinstance(sentence, Clause):
        return _clause(sentence) + "。"
    main, other = _clause(sentence.main), _clause(sentence.other)
    if sentence.link == ".":
        return f"{main}。{other}。"
    if sentence.link in lexicon.COORDINATORS:
        return lexicon.COORDINATORS[sentence.link].zh.format(main, other) + "。"
    link = lexicon.SUBORDINATORS[sentence.link]
    return (link.zh_first.format(other, main) if sentence.first else link.zh.format(main, other)) + "。"
