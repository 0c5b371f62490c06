"""The bundled tasks: the frozen files are the published ones, and are read as they were generated."""

from __future__ import annotations

import hashlib
import lzma
from collections import Counter
from typing import Any

import pytest

from firstlab.data.bundled import FOLDER, LARGEST, BundledTask
from firstlab.data.mini_qa import MiniQA
from firstlab.data.mini_summarization import MiniSummarization
from firstlab.data.mini_translation import MiniTranslation
from firstlab.data.task import Example

TASKS = (
    MiniTranslation(pair="en-de", **LARGEST),
    MiniTranslation(pair="en-zh", **LARGEST),
    MiniSummarization(**LARGEST),
    MiniQA(**LARGEST),
)
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("mini-ende", "e2789dd1e059ce9ae70e7943e3e55f16ef26148339ef65f97d854387085d06de"),
        ("mini-enzh", "fb8a791a1fe1c1b8b58a4ca1d43644a5c5405b1ffab5d27a7f39a6adc7b67b52"),
        ("mini-summarization", "34c073e8b41cebec25e7b7b23741573807b1d9d439b34e5d5fb07e22c0903a80"),
        ("mini-qa", "25571432662ee085679a05a63cd59b962104c51fc17c6d3d7a3cb475b7450fb8"),
    ],
)
def test_frozen_files_are_the_published_ones(name: str, sha256: str) -> None:
    assert hashlib.sha256(lzma.decompress((FOLDER / f"{name}.jsonl.xz").read_bytes())).hexdigest() == sha256


@pytest.mark.parametrize("task", TASKS[:2], ids=lambda task: task.name)
def test_sentences_are_read_in_the_order_in_which_runs_used_them(task: BundledTask) -> None:
    assert [(e.id, e.source, e.difficulty) for e in (task.train_pool()[0], task.test()[499])] == [
        (f"{task.name}-train-000000", "I thought that the bakery is famous.", 4),
        (f"{task.name}-test-000499", "This woman photographed the colleague.", 1),
    ]


def test_examples_are_read_whole() -> None:
    assert TASKS[1].test()[0] == Example(
        "mini-enzh-test-000000", "An actor is not happy.", ("一位男演员不高兴。",), difficulty=3
    )
    assert MiniQA().test()[-1] == Example(
        "mini-qa-test-000499",
        "A friend recalls that it cost Dario 84 coins. In September Dario looked around the stalls. We also read that "
        "he went to the stall of Amara Meyer. Few had expected that.\nBoris left 66 coins on the table. Boris went "
        "shopping in June. He dealt with Igor Kaya.",
        ("In September", "in September", "September"),
        "When did the person who paid more come to the market?",
        5,
    )
    assert MiniSummarization().train_pool()[-1].references == (
        "Calder will get a cycle path, Min. Abbas said on Wednesday.\n8300 passengers a day are expected and residents "
        "want a vote.",
    )


@each_task
def test_splits_are_disjoint_unique_and_cover_all_levels(task: BundledTask) -> None:
    pool, test = task.train_pool(), task.test()
    assert not {e.source for e in pool} & {e.source for e in test}
    for split, size, examples in (("train", LARGEST["pool_size"], pool), ("test", LARGEST["test_size"], test)):
        assert [e.id for e in examples] == [f"{task.name}-{split}-{i:06d}" for i in range(size)]
        assert len({(e.source, e.question) for e in examples}) == size
        levels = Counter(e.difficulty for e in examples)
        assert sorted(levels) == [1, 2, 3, 4, 5] and min(levels.values()) > 0.18 * size


@each_task
def test_a_smaller_size_takes_the_first_examples(task: BundledTask) -> None:
    options = {"pair": task.pair} if isinstance(task, MiniTranslation) else {}
    small = type(task)(**options, pool_size=50, test_size=20)
    assert (small.train_pool(), small.test()) == (task.train_pool()[:50], task.test()[:20])
    usual = type(task)(**options)
    assert (len(usual.train_pool()), len(usual.test())) == (6000, 500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_size": 0}, "pool_size=0 must be from 1 to 6000"),
        ({"test_size": 2001}, "test_size=2001 must be from 1 to 2000"),
        ({"pair": "en-fr"}, "pair='en-fr' is unknown; choose one of en-de, en-zh"),
    ],
)
def test_what_is_not_bundled_is_refused_before_anything_is_read(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lzma, "open", None)
    MiniTranslation()
    with pytest.raises(ValueError, match=message):
        MiniTranslation(**options)


@each_task
def test_prompts_take_a_shortened_text(task: BundledTask) -> None:
    example = task.test()[0]
    assert example.source in task.prompt(example) and example.question in task.prompt(example)
    assert task.prompt(example, "Short.") == task.prompt(example).replace(example.source, "Short.")
    assert task.prompt(example).endswith("### Response:\n")


def test_translation_prompts_name_the_language() -> None:
    task = TASKS[1]
    start = "### Instruction:\nTranslate the following sentences from English to Chinese.\n\n### Input:\n"
    assert task.prompt(task.test()[0]) == f"{start}An actor is not happy.\n\n### Response:\n"
    assert (task.kind, task.target_language) == ("translation", "zh")
