"""Drills that teach a small model to bind values to names, before it reads passages: told once, asked many times.

    Ada lives in Tarn. Boris Calder. Mira in Porto.
    Boris in
    Calder
    ...

What stands between a name and its value is drawn anew for every sentence. Words between from none to some are what
makes this learnable within minutes: with none, the attention head that finds a name's last mention is enough, and
with some, each of the heads that look for the nearest name helps on its own; with the same words everywhere,
both would have to come at once, and do not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from firstlab.data.prompts import qa_prompt
from firstlab.data.task import Example
from recipe.facts import KINDS, Entity, draw_entities, say, settle
from recipe.generated import Built, GeneratedTask, Split, capitalized


class Recall(GeneratedTask):
    """Subjects with a value each of one relation, and the sentences' beginnings to be completed: a training text.

    Args:
        relations: Names of the relations of `recipe.facts` to draw from; None: all.
        subjects: Subjects of a text: two to so many.
        words: Words between a subject and its value where it is told: none to so many.
        words_asked: The same where it is asked for.
        questions: How many times a subject is asked for, subjects drawn anew each time.
        whole: Whole sentences, and whole questions in the form of `MiniQA`, instead of beginnings; `words` are not
            counted then.
        pool_size: Examples in `train_pool`.
        test_size: Examples in `test`.
        seed: Chooses the training pool.

    Raises:
        ValueError: an argument is out of its range.
    """

    kind = "qa"
    name = "mini-recall"

    def __init__(
        self,
        relations: Sequence[str] | None = None,
        subjects: int = 4,
        words: int = 3,
        words_asked: int = 3,
        questions: int = 24,
        whole: bool = False,
        pool_size: int = 6000,
        test_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(pool_size, test_size, seed)
        for option, value, low in (
            ("subjects", subjects, 2),
            ("words", words, 0),
            ("words_asked", words_asked, 0),
            ("questions", questions, 1),
        ):
            if value < low:
                raise ValueError(f"{option}={value} must be at least {low}")
        if subjects > 8:
            raise ValueError(f"subjects={subjects} must be at most 8: some relations have few values")
        known = {relation.name for kind in KINDS for relation in kind}
        if relations is not None and (not relations or set(relations) - known):
            raise ValueError(f"relations={list(relations)}: name some of {', '.join(sorted(known))}, or null for all")
        self.relations = [
            (kind, relation) for kind in KINDS for relation in kind if relations is None or relation.name in relations
        ]
        self.subjects, self.words, self.words_asked = subjects, words, words_asked
        self.questions, self.whole = questions, whole

    def build(self, rng: random.Random, level: int, split: Split) -> Built:
        """A text and what is asked about it."""
        kind, relation = rng.choice(self.relations)
        entities = draw_entities(rng, kind, rng.randint(2, self.subjects))
        settle(rng, entities, relation)

        def value(entity: Entity) -> str:
            return entity.facts[relation.name].text

        def begin(entity: Entity, words: int) -> str:
            statement, _ = rng.choice(relation.direct)
            between = statement.partition("{s}")[2].partition("{v}")[0].split()
            kept = rng.randint(0, min(words, len(between)))
            return capitalized(" ".join((entity.name, *between[len(between) - kept :])))

        asked = rng.choices(entities, k=self.questions)
        if self.whole:
            statement, question = rng.choice(relation.direct)
            told = [capitalized(say(statement, entity, relation, entity.name)) + "." for entity in entities]
            turns = [(question.format(s=entity.name), value(entity)) for entity in asked]
        else:
            told = [f"{begin(entity, self.words)} {value(entity)}." for entity in entities]
            turns = [(begin(entity, self.words_asked), value(entity)) for entity in asked]
        return Built(" ".join(told), turns[0][0], (turns[0][1],), tuple(turns[1:]))

    def prompt(self, example: Example, source: str | None = None) -> str:
        """The text and the beginning to be completed, each on a line, or the prompt of a whole question."""
        text = example.source if source is None else source
        return qa_prompt(text, example.question) if self.whole else f"{text}\n{example.question}"
