"""Generated questions: the same everywhere, never leaking, and one answer per question."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from firstlab.data.mini_qa import MiniQA
from firstlab.data.prompts import qa_prompt
from firstlab.data.task import Example
from recipe import qa
from recipe.facts import KINDS, draw_entities, say, settle
from recipe.generated import is_held_out
from recipe.qa import GeneratedQA
from recipe.recall import Recall

TASK = GeneratedQA(pool_size=400, test_size=100)
TRAIN, TEST = TASK.train_pool(), TASK.test()


def digest(examples: list[Example]) -> str:
    lines = ("|".join((e.id, e.source, e.question, *e.references, str(e.difficulty))) for e in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_the_test_set_is_the_published_one() -> None:
    assert digest(TEST) == "4c4c1385feac9220"
    assert GeneratedQA(pool_size=1, test_size=20, seed=9).test() == TEST[:20]


def test_the_pool_follows_its_seed() -> None:
    assert GeneratedQA(pool_size=50).train_pool() == TRAIN[:50]
    assert GeneratedQA(pool_size=50, seed=1).train_pool() != TRAIN[:50]


def test_no_passage_is_on_both_sides() -> None:
    extra = TASK.generate(300, seed=3)
    assert not {e.source for e in TEST} & {e.source for e in TRAIN + extra}
    assert all(is_held_out(e.source) for e in TEST + TASK.generate(20, seed=3, held_out=True))
    assert not any(is_held_out(e.source) for e in TRAIN + extra)


def test_examples_are_unique_and_named_in_order() -> None:
    assert len({(e.source, e.question) for e in TRAIN}) == len(TRAIN)
    assert [e.id for e in TEST[:2]] == ["mini-qa-test-000000", "mini-qa-test-000001"]


def test_every_answer_is_a_short_span_of_its_passage() -> None:
    for example in TRAIN + TEST:
        assert example.references[0] in example.source
        assert 1 <= len(example.references[0].split()) <= 6
        assert len(set(example.references)) == len(example.references)
        assert example.question.endswith("?")


def test_passages_are_short_and_levels_even() -> None:
    assert Counter(e.difficulty for e in TRAIN) == dict.fromkeys(range(1, 6), 80)
    lengths = [len(e.source.split()) for e in TRAIN]
    assert min(lengths) >= 25
    assert max(lengths) <= 120
    assert not any(re.search(r"[{}]|\n\n|  ", e.source + e.question) for e in TRAIN)


def matches(template: str, subject: str) -> re.Pattern[str]:
    """A statement about a named subject, wherever it stands, with a group for the value."""
    pattern = re.escape(template).replace(r"\{v\}", r"(?P<v>.+)").replace(r"\{his\}", r"\w+")
    name = re.escape(subject).removeprefix("the\\ ") + r"(?: \w+)?"
    return re.compile(pattern.replace(r"\{s\}", rf"(?:[Tt]he )?{name}"), re.IGNORECASE)


def solve(example: Example) -> set[str]:
    """All values that sentences with the question's own words give (difficulties 1 and 2)."""
    found = set()
    for relation in (r for kind in set(KINDS) for r in kind):
        for statement, question in relation.direct:
            asked = re.fullmatch(re.escape(question).replace(r"\{s\}", "(.+)"), example.question)
            if asked is None:
                continue
            for line in re.split(r"\.(?:\s|$)| and (?=[a-z])", example.source):
                hit = matches(statement, asked[1]).search(line)
                found |= {hit["v"]} if hit else set()
    return found


def test_a_rule_of_the_level_solves_direct_questions() -> None:
    easy = [e for e in TRAIN if e.difficulty in (1, 2)]
    # A reader that knows nothing of the world: it only matches words, so some merged sentences escape it.
    solved = sum(any(e.references[0] in value for value in solve(e)) for e in easy)
    assert solved >= 0.9 * len(easy)


def test_levels_have_their_number_of_subjects() -> None:
    paragraphs = {level: {e.source.count("\n") + 1 for e in TRAIN if e.difficulty == level} for level in (1, 2, 3)}
    assert paragraphs == {1: {1}, 2: {2}, 3: {2, 3}}


def test_another_subject_has_another_value_of_what_is_asked() -> None:
    # Whoever knows the relation but not the name has to guess.
    rng = random.Random(2)
    for _ in range(50):
        draft = qa._two_subjects(rng)
        [people] = draft.about
        asked = [r.name for r in people[0].told if any(e.facts[r.name].text == draft.references[0] for e in people)]
        assert len({e.facts[asked[0]].text for e in people}) == 2


def test_the_larger_number_decides_a_comparison() -> None:
    rng = random.Random(1)
    compared = 0
    more = {r.more: r for kind in KINDS for r in kind if r.more}
    while compared < 60:
        source, question, references, _ = qa._comparison(rng)
        asked = re.fullmatch(r"Who (is older|is younger), (\w+) or (\w+)\?", question)
        if asked is None:
            continue
        compared += 1
        assert references[0] in asked.groups()[1:]
        ages = {}
        name = ""
        for line in source.split("\n"):
            numbers = re.findall(r"\b\d\d\b", line)
            name = next((n for n in asked.groups()[1:] if re.search(rf"\b{n}\b", line)), "")
            if name and len(numbers) == 1:
                ages[name] = int(numbers[0])
        assert len(ages) == 2
        wanted = max if asked[1] in more else min
        assert references[0] == wanted(ages, key=lambda n: ages[n])


def test_more_questions_have_one_answer_each_in_the_passage() -> None:
    examples = GeneratedQA(more_questions=6).generate(200, seed=5)
    plain = GeneratedQA().generate(1, seed=5)[0]
    assert replace(examples[0], more=()) == plain
    assert sum(len(e.more) for e in examples) > 5 * len(examples)
    for example in examples:
        answers: dict[str, str] = {}
        for question, answer in ((example.question, example.references[0]), *example.more):
            assert question.endswith("?") and answer in example.source
            assert answers.setdefault(question, answer).lower() == answer.lower()


@pytest.mark.parametrize("option", ["pool_size", "test_size"])
def test_empty_splits_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}=0"):
        GeneratedQA(**{option: 0})


def test_an_empty_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="count=0"):
        TASK.generate(0, seed=0)


RELATIONS = {relation.name: (kind, relation) for kind in KINDS for relation in kind}


def test_names_and_values_of_a_relation_never_repeat() -> None:
    rng = random.Random(0)
    for kind in KINDS:
        for _ in range(30):
            entities = draw_entities(rng, kind, 3)
            assert len({e.name for e in entities}) == 3
            for relation in kind:
                settle(rng, entities, relation)
                values = [e.facts[relation.name] for e in entities]
                assert len({v.text for v in values}) == 3
                sizes = [v.size for v in values]
                assert len(set(sizes)) == 3 or not relation.more


@pytest.mark.parametrize("name", RELATIONS)
def test_every_statement_tells_subject_and_value(name: str) -> None:
    kind, relation = RELATIONS[name]
    rng = random.Random(0)
    [entity] = draw_entities(rng, kind, 1)
    settle(rng, [entity], relation)
    for statement in (*relation.statements, *(pair[0] for pair in relation.direct)):
        text = say(statement, entity, relation, entity.name)
        assert entity.name in text and entity.facts[name].text in text and "{" not in text
    for question in (*relation.questions, *(pair[1] for pair in relation.direct)):
        assert "{s}" in question and "{v}" not in question and question.endswith("?")


@pytest.mark.parametrize(("words", "words_asked"), [(0, 0), (0, 3), (3, 3)])
def test_every_question_has_the_value_that_was_told_with_its_name(words: int, words_asked: int) -> None:
    # Names and towns are one word each, so that a reader needs no knowledge of the templates.
    task = Recall(["home", "birthplace"], subjects=4, words=words, words_asked=words_asked, questions=9)
    counts, told_words, asked_words = set(), set(), set()
    for example in task.generate(200, seed=3):
        told = {}
        for sentence in example.source.removesuffix(".").split(". "):
            name, *between, town = sentence.split()
            told[name] = town
            told_words.add(len(between))
        counts.add(len(told))
        assert len(set(told.values())) == len(told)
        turns = [(example.question, example.references[0]), *example.more]
        assert len(turns) == 9
        for question, answer in turns:
            name, *between = question.split()
            assert answer == told[name]
            asked_words.add(len(between))
        assert task.prompt(example) == f"{example.source}\n{example.question}"
    assert counts == {2, 3, 4}
    assert told_words == set(range(words + 1)) and asked_words == set(range(words_asked + 1))


def test_all_relations_take_part_and_every_answer_stands_in_its_text() -> None:
    examples = Recall().generate(600, seed=0)
    assert all(answer in e.source for e in examples for answer in (e.references[0], *(a for _, a in e.more)))
    for value in ("the violin", "metres", " and Sons", "on Monday", "coins"):
        assert any(value in e.source + e.question for e in examples), value


def test_whole_questions_have_the_form_of_the_task_that_they_prepare_for() -> None:
    task = Recall(whole=True, questions=5)
    for example in task.generate(50, seed=1):
        prompt = task.prompt(example)
        assert prompt == qa_prompt(example.source, example.question) == MiniQA().prompt(example)
        for question, answer in [(example.question, example.references[0]), *example.more]:
            assert question.endswith("?") and answer in example.source


def test_training_and_test_share_no_text() -> None:
    task = Recall(pool_size=300, test_size=50)
    assert not {e.source for e in task.train_pool()} & {e.source for e in task.test()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subjects": 1}, "subjects=1 must be at least 2"),
        ({"subjects": 9}, "subjects=9 must be at most 8"),
        ({"words": -1}, "words=-1 must be at least 0"),
        ({"words_asked": -1}, "words_asked=-1"),
        ({"questions": 0}, "questions=0 must be at least 1"),
        ({"relations": []}, "name some of age, architect, birthplace"),
        ({"relations": ["hobby"]}, "hobby"),
    ],
)
def test_impossible_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recall(**changes)
