"""Generated articles: the same everywhere, never leaking, and highlights that follow from the article."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from firstlab.data.task import Example
from recipe import summarization
from recipe.generated import capitalized, is_held_out, with_article
from recipe.summarization import ABBREVIATIONS, EVENTS, GeneratedSummarization

TASK = GeneratedSummarization(pool_size=400, test_size=100)
TRAIN, TEST = TASK.train_pool(), TASK.test()


def digest(examples: list[Example]) -> str:
    lines = ("|".join((e.id, e.source, *e.references, str(e.difficulty))) for e in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_the_test_set_is_the_published_one() -> None:
    assert digest(TEST) == "b0cc88f49aeca7f6"
    assert GeneratedSummarization(pool_size=1, test_size=20, seed=9).test() == TEST[:20]


def test_the_pool_follows_its_seed() -> None:
    assert GeneratedSummarization(pool_size=50).train_pool() == TRAIN[:50]
    assert GeneratedSummarization(pool_size=50, seed=1).train_pool() != TRAIN[:50]


def test_no_article_is_on_both_sides() -> None:
    extra = TASK.generate(300, seed=3)
    assert not {e.source for e in TEST} & {e.source for e in TRAIN + extra}
    assert all(is_held_out(e.source) for e in TEST + TASK.generate(20, seed=3, held_out=True))
    assert not any(is_held_out(e.source) for e in TRAIN + extra)


def test_articles_are_unique_and_named_in_order() -> None:
    assert len({e.source for e in TRAIN}) == len(TRAIN)
    assert [e.id for e in TEST[:2]] == ["mini-summarization-test-000000", "mini-summarization-test-000001"]


def test_sizes_and_levels() -> None:
    assert Counter(e.difficulty for e in TRAIN) == dict.fromkeys(range(1, 6), 80)
    means = []
    for level in range(1, 6):
        lengths = [len(e.source.split()) for e in TRAIN if e.difficulty == level]
        means.append(sum(lengths) / len(lengths))
    assert means == sorted(means)
    for example in TRAIN:
        assert 25 <= len(example.source.split()) <= 140
        assert 12 <= len(example.references[0].split()) <= 35
        assert not re.search(r"[{}]|\n\n|  ", example.source + example.references[0])


def summarize(article: str) -> set[str]:
    """Highlights by rule, from the article alone; more than one would mean that the article is ambiguous."""
    lines = [line for part in article.split("\n") for line in re.split(r"(?<=[.\"])\s+(?=[A-Z0-9\"])", part)]
    found = set()
    for event in EVENTS:
        things = "|".join(event.things)
        slots = {
            "who": rf"(?P<title>{'|'.join(ABBREVIATIONS)}) \w+ (?P<surname>\w+)(?: of [a-z ]+?)?",
            "thing": rf"an? (?:[a-z, -]+ )?(?P<thing>{things})",
            "town": r"(?P<town>\w+)",
            "day": r"(?P<day>\w+day)",
        }
        lead = next((hit for hit in (match(event.leads, slots, line) for line in lines) if hit), None)
        if lead is None:
            continue
        number = {"n": r"(?P<n>\d+)"}
        figures = [hit["n"] for hit in (match(event.figures, number, line) for line in lines) if hit]
        for told, outcome in event.outcomes:
            endings = tuple(f"{text}.".lower() for text in told)
            ending = next((line for line in lines if line.lower().endswith(endings)), None)
            if ending is None:
                continue
            who = f"{ABBREVIATIONS[lead['title']]} {lead['surname']}"
            thing = with_article(lead["thing"])
            first = event.lead.format(who=who, thing=thing, town=lead["town"], day=lead["day"])
            second = capitalized(event.figure.format(n=figures[-1]))
            joined = ending.lower().startswith(summarization.RESULT)
            rest = [f"{second} and {outcome}."] if joined else [f"{second}.", f"{capitalized(outcome)}."]
            found.add("\n".join([capitalized(first), *rest]))
    return found


def match(templates: tuple[str, ...], slots: dict[str, str], line: str) -> re.Match[str] | None:
    for template in templates:
        hit = re.search(template.format(**slots) + r"\.$", line, re.IGNORECASE)
        if hit:
            return hit
    return None


@pytest.mark.parametrize("level", range(1, 6))
def test_the_rules_lead_from_every_article_to_its_highlights(level: int) -> None:
    for example in (e for e in TRAIN + TEST if e.difficulty == level):
        assert summarize(example.source) == {example.references[0]}, example.source


def test_a_corrected_figure_replaces_the_first_one() -> None:
    corrected = [e for e in TRAIN if "later this was corrected" in e.source.lower()]
    assert {e.difficulty for e in corrected} == {5}
    for example in corrected:
        early = re.search(r"At first it was said that .*?(\d+)", example.source)
        assert early is not None
        assert not re.search(rf"\b{early[1]}\b", example.references[0])


@pytest.mark.parametrize("option", ["pool_size", "test_size"])
def test_empty_splits_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}=0"):
        GeneratedSummarization(**{option: 0})


def test_an_empty_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="count=0"):
        TASK.generate(0, seed=0)
