"""Extractive question answering on passages generated from small worlds of people, firms and landmarks.

A world is a few entities of one kind with a value per relation (`recipe.facts`). The passage states every
value once, so a question about (entity, relation) has one answer, and the answer is a span of the passage. Difficulty:

1. the passage is about one subject, and a sentence answers in the question's own words;
2. so does one about another subject, which has another value;
3. the question is a paraphrase, or asks whom a fact is about; two or three subjects;
4. the sentence that answers has a pronoun for a subject;
5. the subject is described by another of its facts ("the woman who repairs clocks"), or found by comparing or by
   exclusion ("the one who paid less", "who does not live in Tarn").
"""

from __future__ import annotations

import random
from typing import NamedTuple

from firstlab.data.mini_qa import MiniQA
from recipe.facts import FIRM, KINDS, LIFE, Entity, Relation, Value, draw_entities, say, settle
from recipe.generated import Built, GeneratedTask, Split, capitalized

OPENINGS = (
    "it was a quiet spring in the valley", "the old notebook tells us a good deal",
    "the local paper wrote about this",
    "not much is left from that time", "here is what the records say",
    "many stories are told in this part of the country",
    "the weather was fine and the roads were dry", "this is a short report from the coast",
    "a guide prepared these notes for visitors", "some details are easily mixed up",
    "the river was high that year",
    "everyone had something to say", "our reporter spoke to several people", "letters from that year survive",
)  # fmt: skip
FILLERS = (
    "nobody was surprised by this", "some people still talk about it", "the rest is soon told",
    "that is all we know for certain",
    "it rained for most of the week", "the neighbours did not mind", "there was music in the square",
    "much has changed since then", "it was not always easy", "a photograph on the wall shows it",
    "the streets were full of people",
    "others had different plans", "nothing else was written down", "there is little more to add",
    "children played by the water",
    "this was the talk of the day", "the evenings were long and warm", "few had expected that",
)  # fmt: skip
LEADS = (
    "people say that", "the diary notes that", "it is well known that", "a friend recalls that",
    "according to a letter,",
    "as many remember,", "we also read that", "as far as anyone knows,", "the records show that",
    "it seems that",
)  # fmt: skip
PAIRS = (
    "{a} and {b} have known each other for years", "{a} and {b} are cousins", "{a} met {b} at a wedding",
    "{a} and {b} are old friends", "{a} sat next to {b} at school", "{a} and {b} like to compare notes",
    "{a} often talks to {b}", "{a} and {b} could hardly be more different",
)  # fmt: skip


def _statement(rng: random.Random, relation: Relation) -> str:
    return rng.choice(relation.statements + tuple(pair[0] for pair in relation.direct))


def _paragraph(
    rng: random.Random,
    entity: Entity,
    relations: list[Relation],
    pronouns: float,
    fixed: dict[str, tuple[str, bool]],
) -> list[str]:
    """Sentences about one entity: the first names it, later ones may use a pronoun.

    Args:
        rng: The random stream.
        entity: Its facts are told.
        relations: In this order.
        pronouns: Chance of a pronoun where one is clear.
        fixed: Relation name -> (statement template, pronoun wanted), for the fact that is asked for.
    """
    entity.told += relations
    sentences: list[str] = []
    clear = False  # whether a pronoun would point at the entity
    leading = False  # whether the entity was the subject of the last clause
    for relation in relations:
        template, wanted = fixed.get(relation.name, (_statement(rng, relation), rng.random() < pronouns))
        short = clear and wanted and _takes_pronoun(template)
        subject = entity.pronoun if short else entity.name
        if not sentences and rng.random() < 0.35:
            subject = entity.full_name
        text = say(template, entity, relation, subject)
        if short and leading and " and " not in sentences[-1] and rng.random() < 0.25:
            text = f"{sentences.pop()} and {text.removeprefix(subject + ' ')}"
        elif rng.random() < 0.15:
            text = f"{rng.choice(LEADS)} {text}"
        sentences.append(text)
        clear = not relation.names_person
        leading = _takes_pronoun(template)
    return sentences


def _takes_pronoun(template: str) -> bool:
    """Whether the subject stands where "he", "she" or "it" can stand, and nobody else is named before it."""
    return template.startswith("{s} ")


def _passage(rng: random.Random, paragraphs: list[list[str]], fillers: int) -> str:
    """Joins paragraphs, with an opening and fillers that state no fact of the world."""
    paragraphs = [list(sentences) for sentences in paragraphs]
    for filler in rng.sample(FILLERS, fillers):
        rng.choice(paragraphs).append(filler)
    if rng.random() < 0.6:
        paragraphs[0].insert(0, rng.choice(OPENINGS))
    return "\n".join(" ".join(f"{capitalized(text)}." for text in sentences) for sentences in paragraphs)


def _who(entities: list[Entity], clause: str) -> str:
    """A question for a name: "Who lives in Tarn?"."""
    return f"{'Who' if entities[0].pronoun != 'it' else 'Which ' + entities[0].noun} {clause}?"


def _the_one(entity: Entity, clause: str, noun: str = "") -> str:
    """A description: "the woman who lives in Tarn"."""
    return f"the {noun or entity.noun} {'that' if entity.pronoun == 'it' else 'who'} {clause}"


def _accepted(value: Value) -> tuple[str, ...]:
    return (value.text, *value.others)


def _names(entity: Entity, source: str) -> tuple[str, ...]:
    name = capitalized(entity.name) if entity.name not in source else entity.name
    others = (entity.full_name, entity.name.removeprefix("the "))
    return tuple(dict.fromkeys((name, *others)))


class Draft(NamedTuple):
    """A passage with its question, its answers, and those whom it is about, kind by kind."""

    source: str
    question: str
    references: tuple[str, ...]
    about: tuple[list[Entity], ...]


def _lookup(rng: random.Random, subjects: int, facts: int, paraphrased: bool) -> Draft:
    """One fact is asked for, of `facts` that are told of each of `subjects`; every sentence names its subject."""
    kind = rng.choice(KINDS)
    entities = draw_entities(rng, kind, subjects)
    asked, *others = rng.sample(kind, facts)
    target = rng.choice(entities)
    statement, question = rng.choice(asked.direct)
    paragraphs = []
    for relation in (asked, *others):
        settle(rng, entities, relation)
    for entity in entities:
        told = rng.sample((asked, *others), facts)
        fixed = {asked.name: (rng.choice(asked.statements) if paraphrased else statement, False)}
        paragraphs.append(_paragraph(rng, entity, told, 0.0, fixed))
    source = _passage(rng, paragraphs, 1)
    if paraphrased:
        question = rng.choice(asked.questions)
    if paraphrased and rng.random() < 0.2:
        return Draft(source, _who(entities, say(asked.clause, target, asked, "")), _names(target, source), (entities,))
    return Draft(source, question.format(s=target.name), _accepted(target.facts[asked.name]), (entities,))


def _one_subject(rng: random.Random) -> Draft:
    return _lookup(rng, subjects=1, facts=4, paraphrased=False)


def _two_subjects(rng: random.Random) -> Draft:
    return _lookup(rng, subjects=2, facts=3, paraphrased=False)


def _paraphrase(rng: random.Random) -> Draft:
    return _lookup(rng, subjects=rng.choice((2, 3)), facts=2, paraphrased=True)


def _pronoun(rng: random.Random) -> Draft:
    kind = rng.choice(KINDS)
    entities = draw_entities(rng, kind, 2, mixed=True)
    relations = rng.sample([relation for relation in kind if not relation.names_person], 3)
    asked, target = relations[0], rng.choice(entities)
    for relation in relations:
        settle(rng, entities, relation)
    plain = {r.name: [t for t in (*r.statements, *(p[0] for p in r.direct)) if _takes_pronoun(t)] for r in relations}
    if entities[0].pronoun != "it" and rng.random() < 0.6:
        # Both are named once; after that only "he" and "she" tell them apart.
        for entity in entities:
            entity.told += relations
        sentences = [rng.choice(PAIRS).format(a=entities[0].full_name, b=entities[1].name)]
        rng.shuffle(relations)
        for relation in relations:
            order = rng.sample(entities, 2)
            said = [say(rng.choice(plain[relation.name]), e, relation, e.pronoun) for e in order]
            joined = rng.random() < 0.4
            sentences += [f"{said[0]}, {rng.choice(('while', 'and', 'but'))} {said[1]}"] if joined else said
        cut = rng.randint(2, len(sentences) - 1)
        paragraphs = [sentences[:cut], sentences[cut:]]
        source = _passage(rng, paragraphs[: 1 + bool(paragraphs[1])], 1)
    else:
        paragraphs = []
        for entity in entities:
            told = [*relations[1:]]
            told.insert(rng.randint(1, 2), asked)
            fixed = {asked.name: (rng.choice(plain[asked.name]), True)}
            paragraphs.append(_paragraph(rng, entity, told, 0.6, fixed))
        source = _passage(rng, paragraphs, 1)
    questions = asked.questions + tuple(pair[1] for pair in asked.direct)
    return Draft(source, rng.choice(questions).format(s=target.name), _accepted(target.facts[asked.name]), (entities,))


def _two_hops(rng: random.Random) -> Draft:
    if rng.random() < 0.25:
        return _through_firm(rng)
    kind = rng.choice(KINDS)
    entities = draw_entities(rng, kind, 3)
    known, asked = rng.sample(kind, 2)
    spare = rng.choice([relation for relation in kind if relation not in (known, asked)])
    target = rng.choice(entities)
    for relation in (known, asked, spare):
        settle(rng, entities, relation)
    paragraphs = []
    for entity in entities:
        told = [known, asked, spare] if rng.random() < 0.4 else [known, asked]
        rng.shuffle(told)
        paragraphs.append(_paragraph(rng, entity, told, 0.7, {}))
    subject = _the_one(target, say(known.clause, target, known, ""))
    questions = asked.questions + tuple(pair[1] for pair in asked.direct)
    question = rng.choice(questions).format(s=subject)
    return Draft(_passage(rng, paragraphs, 1), question, _accepted(target.facts[asked.name]), (entities,))


def _through_firm(rng: random.Random) -> Draft:
    """Person -> employer -> a fact of the employer."""
    employer = next(relation for relation in LIFE if relation.name == "employer")
    people, firms = draw_entities(rng, LIFE, 2), draw_entities(rng, FIRM, 2)
    asked, spare = rng.sample(FIRM, 2)
    other = rng.choice([relation for relation in LIFE if relation is not employer])
    settle(rng, people, other)
    for relation in (asked, spare):
        settle(rng, firms, relation)
    for person, firm in zip(people, firms, strict=True):
        person.facts[employer.name] = Value(firm.name)
    about_people = [s for p in people for s in _paragraph(rng, p, rng.sample((other, employer), 2), 0.7, {})]
    order = rng.sample(firms, 2)
    told = rng.sample((asked, spare), 2)
    about_firms = [s for firm in order for s in _paragraph(rng, firm, told, 0.7, {})]
    index = rng.randrange(2)
    subject = rng.choice(("the firm that {} works for", "the company that employs {}", "the firm that pays {}"))
    questions = asked.questions + tuple(pair[1] for pair in asked.direct)
    question = rng.choice(questions).format(s=subject.format(people[index].name))
    source = _passage(rng, [about_people, about_firms], 0)
    return Draft(source, question, _accepted(firms[index].facts[asked.name]), (people, firms))


def _comparison(rng: random.Random) -> Draft:
    kind = rng.choice(KINDS)
    if rng.random() < 0.4:
        denied = [relation for relation in kind if relation.negated]
        return _exclusion(rng, kind, rng.choice(denied))
    sized = [relation for relation in kind if relation.more]
    compared = rng.choice(sized)
    hop = rng.random() < 0.5
    entities = draw_entities(rng, kind, 2 if hop else rng.choice((2, 3)))
    asked, spare = rng.sample([relation for relation in kind if relation is not compared], 2)
    for relation in (compared, asked, spare):
        settle(rng, entities, relation)
    paragraphs = []
    for entity in entities:
        told = [compared, asked] if len(entities) == 3 and rng.random() < 0.6 else [compared, asked, spare]
        rng.shuffle(told)
        paragraphs.append(_paragraph(rng, entity, told, 0.6, {}))
    source = _passage(rng, paragraphs, 1)
    first, second = rng.sample(entities, 2)
    more = rng.random() < 0.5
    clause = compared.more if more else compared.less
    larger = first if first.facts[compared.name].size > second.facts[compared.name].size else second
    target = larger if more else (second if larger is first else first)
    if not hop:
        question = _who(entities, clause).removesuffix("?")
        return Draft(source, f"{question}, {first.name} or {second.name}?", _names(target, source), (entities,))
    noun = "person" if target.pronoun != "it" else target.noun
    subject = _the_one(target, clause, noun)
    questions = asked.questions + tuple(pair[1] for pair in asked.direct)
    return Draft(source, rng.choice(questions).format(s=subject), _accepted(target.facts[asked.name]), (entities,))


def _exclusion(rng: random.Random, kind: tuple[Relation, ...], shared: Relation) -> Draft:
    """Three entities of which two share a value; the question is about the third."""
    entities = draw_entities(rng, kind, 3)
    asked, spare = rng.sample([relation for relation in kind if relation is not shared], 2)
    for relation in (shared, asked, spare):
        settle(rng, entities, relation)
    target, one, two = rng.sample(entities, 3)
    two.facts[shared.name] = one.facts[shared.name]
    paragraphs = []
    for entity in entities:
        told = [shared, asked, spare] if rng.random() < 0.4 else [shared, asked]
        rng.shuffle(told)
        paragraphs.append(_paragraph(rng, entity, told, 0.6, {}))
    source = _passage(rng, paragraphs, 1)
    clause = say(shared.negated, one, shared, "")
    if rng.random() < 0.5:
        return Draft(source, _who(entities, clause), _names(target, source), (entities,))
    noun = "person" if target.pronoun != "it" else target.noun
    questions = asked.questions + tuple(pair[1] for pair in asked.direct)
    question = rng.choice(questions).format(s=_the_one(target, clause, noun))
    return Draft(source, question, _accepted(target.facts[asked.name]), (entities,))


def _reasoning(rng: random.Random) -> Draft:
    return rng.choice((_two_hops, _comparison))(rng)


_LEVELS = (_one_subject, _two_subjects, _paraphrase, _pronoun, _reasoning)


def _as_written(source: str, references: tuple[str, ...]) -> tuple[str, ...]:
    """The accepted answers, the first as it stands in the passage: a value may open its sentence."""
    return references if references[0] in source else (capitalized(references[0]), *references)


def _another_question(rng: random.Random, source: str, entities: list[Entity]) -> tuple[str, str]:
    """Any question that the passage answers about one of its entities, and its answer."""
    target = rng.choice(entities)
    asked, *others = rng.sample(target.told, len(target.told))
    unique = [
        relation
        for relation in others
        if all(e is target or e.facts.get(relation.name) != target.facts[relation.name] for e in entities)
    ]
    form = rng.random()
    if unique and form < 0.2:
        question, references = _who(entities, say(unique[0].clause, target, unique[0], "")), _names(target, source)
    elif form < 0.3 and (rivals := [e for e in entities if e is not target and asked.more and asked in e.told]):
        rival = rng.choice(rivals)
        larger = target.facts[asked.name].size > rival.facts[asked.name].size
        first, second = rng.sample((target, rival), 2)
        clause = _who(entities, asked.more if larger else asked.less).removesuffix("?")
        question, references = f"{clause}, {first.name} or {second.name}?", _names(target, source)
    else:
        subject = target.name
        if unique and form > 0.8:
            subject = _the_one(target, say(unique[0].clause, target, unique[0], ""))
        question = rng.choice(asked.questions + tuple(pair[1] for pair in asked.direct)).format(s=subject)
        references = _accepted(target.facts[asked.name])
    return question, _as_written(source, references)[0]


class GeneratedQA(GeneratedTask, MiniQA):
    """`MiniQA` from its generator.

    Args:
        pool_size: Examples in `train_pool`.
        test_size: Examples in `test`: the first of one fixed list, whatever the seed.
        seed: Chooses the training pool.
        more_questions: Up to so many further questions on each passage that `generate` makes.

    Raises:
        ValueError: a size is smaller than 1.
    """

    def __init__(self, pool_size: int = 6000, test_size: int = 500, seed: int = 0, more_questions: int = 0) -> None:
        super().__init__(pool_size, test_size, seed)
        self.more_questions = more_questions

    def build(self, rng: random.Random, level: int, split: Split) -> Built:
        """A passage with its question; with `more_questions` on it in what `generate` makes."""
        source, question, references, about = _LEVELS[level - 1](rng)
        count = self.more_questions if split in ("extra", "held-out") else 0
        more = tuple(_another_question(rng, source, rng.choice(about)) for _ in range(count))
        return Built(source, question, _as_written(source, references), tuple(dict.fromkeys(more)))
