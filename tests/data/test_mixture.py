"""A mixture of tasks: even shares, prompts of the parts, and metrics by part."""

from __future__ import annotations

from collections import Counter

import pytest

from firstlab.config.schema import EvaluationConfig
from firstlab.data.datamodule import PromptDataModule, by_part, interleaved
from firstlab.data.mini_qa import MiniQA
from firstlab.data.mini_translation import MiniTranslation
from firstlab.data.mixture import Mixture, Part
from firstlab.data.task import Example
from firstlab.evaluation.scoring import mean_score, score_texts
from firstlab.metrics import evaluate_predictions
from support.texts import tiny_tokenizer
from support.tiny_run import composed


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    german, questions = MiniTranslation(pair="en-de", pool_size=40, test_size=20), MiniQA(pool_size=30, test_size=12)
    return Mixture({"de": Part(german, 64), "qa": Part(questions)})


def data_of(mixture: Mixture, **options: int) -> PromptDataModule:
    return PromptDataModule(mixture, tiny_tokenizer(), train_size=32, max_length=2000, max_new_tokens=9, **options)


def test_examples_keep_what_their_part_gave_them(mixture: Mixture):
    originals = {f"{name}/{e.id}": e for name, task in mixture.parts.items() for e in task.train_pool()}
    pool = mixture.train_pool()
    assert Counter(e.part for e in pool) == {"de": 30, "qa": 30}
    for example in pool:
        original = originals[example.id]
        assert mixture.prompt(example) == mixture.parts[example.part].prompt(original)
        assert mixture.prompt(example, "x") == mixture.parts[example.part].prompt(original, "x")
        assert (example.references, example.difficulty) == (original.references, original.difficulty)
        assert example.max_new_tokens == {"de": 64, "qa": None}[example.part]


@pytest.mark.parametrize("test_size", [8, 7, 3, 2, 1, None])
def test_every_split_has_the_parts_in_turn(mixture: Mixture, test_size: int | None):
    data = data_of(mixture, val_size=8, test_size=test_size)
    assert len(data.test) == (test_size or 24)
    for split in (data.train, data.val, data.test):
        assert [e.part for e in split] == ["de" if i % 2 == 0 else "qa" for i in range(len(split))]
    assert not {e.id for e in data.train} & {e.id for e in data.val}
    again = data_of(mixture, val_size=8, test_size=test_size)
    assert (again.train, again.val, again.test) == (data.train, data.val, data.test)


def test_a_part_that_runs_out_leaves_its_turns_to_the_others():
    examples = [Example(str(i), "", (), part="a" if i < 3 else "b") for i in range(4)]
    assert [e.id for e in interleaved(by_part(examples))] == ["0", "3", "1", "2"]


def test_each_part_is_scored_by_its_own_metrics(mixture: Mixture):
    examples = interleaved(by_part(mixture.test()))
    texts = [e.references[0] if i % 3 else "der Hund" for i, e in enumerate(examples)]
    found = score_texts(mixture, examples, texts, EvaluationConfig(resamples=100))
    for name, kind, language in (("de", "translation", "de"), ("qa", "qa", None)):
        own = [i for i, e in enumerate(examples) if e.part == name]
        alone = evaluate_predictions(
            kind, [texts[i] for i in own], [examples[i].references for i in own], [], language, resamples=100
        )
        assert {key: found[f"{name}/{key}"] for key in alone} == alone
    headline = [found["de/bleu"], found["qa/f1"]]
    assert found["mean"].value == pytest.approx(sum(h.value for h in headline) / 2)
    assert found["mean"] == mean_score(headline)


def test_one_example_of_a_mixture_is_scored(mixture: Mixture):
    (example,) = data_of(mixture, val_size=8, test_size=1).test
    found = score_texts(mixture, [example], [example.references[0]], EvaluationConfig(resamples=100))
    assert found["mean"].value == pytest.approx(100.0) and not any(key.startswith("qa/") for key in found)


def test_half_widths_of_independent_intervals_add_in_squares(mixture: Mixture):
    low, high = mean_score([_result(10, 7, 14), _result(20, 16, 23)]), _result(15, 12.5, 17.5)
    assert (low.value, low.low, low.high, low.n) == (high.value, high.low, high.high, 10)


def _result(value: float, low: float, high: float):
    from firstlab.metrics import MetricResult

    return MetricResult(value, low, high, 5)


def test_mistakes_are_named(mixture: Mixture):
    with pytest.raises(ValueError, match="at least two tasks"):
        Mixture({"qa": Part(MiniQA())})
    with pytest.raises(ValueError, match="part='fr' is not in this mixture; choose one of de, qa"):
        mixture.prompt(Example("x", "text", (), part="fr"))
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        Part(MiniQA(), 0)


def test_the_bundled_mixture_is_composed():
    from firstlab.config.build import build_task

    config, _ = composed("data=mini_mixture")
    task = build_task(config)
    assert set(task.parts) == {"mini_ende", "mini_enzh", "mini_summarization", "mini_qa"}
    assert {part.kind for part in task.parts.values()} == {"translation", "summarization", "qa"}
