"""The subjects and relations that generated passages tell of."""

from __future__ import annotations

import random

import pytest

from recipe.facts import KINDS, draw_entities, say, settle

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
