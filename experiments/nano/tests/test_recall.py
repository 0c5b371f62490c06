"""The drills of subjects and values that the bundled model learns to bind with."""

from __future__ import annotations

from typing import Any

import pytest

from firstlab.data.mini_qa import MiniQA
from firstlab.data.prompts import qa_prompt
from recipe.recall import Recall


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
