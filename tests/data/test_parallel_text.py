import re

import pytest

from firstlab.data.parallel_text import ParallelText
from support.texts import write_parallel


def test_texts_are_joined_in_order(tmp_path):
    write_parallel(tmp_path, "a", [("one", "eins"), ("two", "zwei")])
    write_parallel(tmp_path, "b", [("three", "drei")])
    write_parallel(tmp_path, "val", [("four", "vier")])
    write_parallel(tmp_path, "test", [("five", "fünf")])
    task = ParallelText("en", "de", str(tmp_path), train=["a", "b"], validation="val", test="test")
    assert [example.id for example in task.train_pool()] == ["a:1", "a:2", "b:1"]
    assert [example.references for example in task.train_pool()] == [("eins",), ("zwei",), ("drei",)]
    assert [example.source for example in task.validation()] == ["four"]
    assert [example.source for example in task.test()] == ["five"]
    assert task.kind == "translation" and task.target_language == "de"


def test_pairs_without_one_side_can_be_left_out(tmp_path, capsys):
    write_parallel(tmp_path, "test", [("one", "eins"), ("", "zwei"), ("three", "drei")])
    with pytest.raises(ValueError, match=r"test\.en, line 2: .* is empty; .*data\.task\.drop_empty=true"):
        ParallelText("en", "de", str(tmp_path), test="test").test()
    examples = ParallelText("en", "de", str(tmp_path), test="test", drop_empty=True).test()
    assert [example.id for example in examples] == ["test:1", "test:3"]
    assert "left out 1 of 3 pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "target", "names"),
    [
        ("en-GB", "pt_BR", "from English to Portuguese"),
        ("ZH-Hant-TW", "ja", "from Chinese to Japanese"),
        ("th", "zh-CN", "from Thai to Chinese"),
    ],
)
def test_tags_say_more_than_the_language(tmp_path, source, target, names):
    write_parallel(tmp_path, "test", [("one", "two")], source=source, target=target)
    task = ParallelText(source, target, str(tmp_path), test="test")
    assert names in task.prompt(task.test()[0]) and task.target_language == target


def test_prompt_names_the_languages(tmp_path):
    write_parallel(tmp_path, "test", [("five", "五")], target="zh")
    task = ParallelText("en", "zh", str(tmp_path), test="test")
    (example,) = task.test()
    assert task.prompt(example) == (
        "### Instruction:\nTranslate the following sentences from English to Chinese.\n\n"
        "### Input:\nfive\n\n### Response:\n"
    )
    assert "### Input:\n\n\n" in task.prompt(example, "")
    assert task.validation() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_language": "xx"}, "data.task.source_language=xx is unknown: choose one of ar, bg, bo"),
        ({"target_language": "German"}, "data.task.target_language=German is unknown"),
        ({"train": []}, "data.task.train=[] names no training text"),
        ({"train": ["a", "a"]}, "data.task.train=a and data.task.train=a are the same text"),
        ({"train": "test"}, "data.task.train=test and data.task.test=test are the same text"),
        ({"validation": "train"}, "data.task.train=train and data.task.validation=train are the same text"),
        ({"test": "./train"}, "data.task.train=train and data.task.test=./train are the same text"),
        ({"validation": "../r/test"}, "data.task.test=test and data.task.validation=../r/test are the same text"),
    ],
)
def test_impossible_options(options, message):
    defaults = {"source_language": "en", "target_language": "de", "root": "r", "test": "test"}
    with pytest.raises(ValueError, match=re.escape(message)):
        ParallelText(**{**defaults, **options})


def test_links_to_one_file_are_one_text(tmp_path):
    write_parallel(tmp_path, "a", [("one", "eins")])
    (tmp_path / "b.en").symlink_to("a.en")
    with pytest.raises(ValueError, match=r"data\.task\.train=a and data\.task\.test=b are the same text"):
        ParallelText("en", "de", str(tmp_path), train="a", test="b")


def test_every_missing_file_is_named_at_once(tmp_path):
    write_parallel(tmp_path, "a", [("one", "eins")])
    with pytest.raises(ValueError, match=r"lacks b\.en, b\.de, c\.en, c\.de of the expected a\.en, a\.de, b\.en"):
        ParallelText("en", "de", str(tmp_path), train=["a", "b", "c"]).train_pool()


def test_an_unset_root_is_named():
    with pytest.raises(ValueError, match=r"data\.root is not set: .* holds t\.en, t\.de"):
        ParallelText("en", "de", None, test="t").test()


@pytest.mark.parametrize("target", ["de", "de-AT"])
def test_one_language_twice(target):
    message = f"data.task.source_language=de and data.task.target_language={target} are both German: change one"
    with pytest.raises(ValueError, match=message):
        ParallelText("de", target, "folder")
