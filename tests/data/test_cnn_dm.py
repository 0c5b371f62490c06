import json
import re

import pytest
from datasets import Dataset

from firstlab.data.cnn_dm import CnnDailyMail
from firstlab.data.files import spread


def article(number, **changes):
    row = {"id": f"i{number}", "article": f"(CNN) News {number}.\nMore.", "highlights": f"News {number} .\nMore ."}
    return {**row, **changes}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_reads_both_splits(tmp_path):
    write(tmp_path / "train.jsonl", [article(number) for number in range(6)])
    write(tmp_path / "test.jsonl", [article(9)])
    task = CnnDailyMail(str(tmp_path))
    assert [example.id for example in task.train_pool()] == ["i0", "i1", "i2", "i3", "i4", "i5"]
    (example,) = task.test()
    assert (example.source, example.references) == ("(CNN) News 9.\nMore.", ("News 9 .\nMore .",))
    assert task.prompt(example).startswith("### Instruction:\nSummarize the news article")
    assert task.prompt(example, "Short").endswith("### Input:\nShort\n\n### Response:\n")
    assert [example.id for example in CnnDailyMail(str(tmp_path), pool_size=3).train_pool()] == [
        f"i{number}" for number in spread(range(6), 3)
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (article(1, article=" "), "line 2: the article is empty"),
        (article(1, highlights=""), "line 2: the highlights is empty"),
        (article(1, id=["x"]), "line 2: the id is list, not text"),
        (article(1, id=True), "line 2: the id is bool, not text"),
        (article(1, id=" "), "line 2: the id is empty"),
        (article(1, highlights=None), "line 2: the highlights is NoneType, not text"),
        ({"id": "1", "article": "a"}, "line 2: missing highlights (present: id, article)"),
        (
            {"text": "a", "summary": "b"},
            "line 2: missing article, highlights (present: text, summary)",
        ),
        (["a"], "line 2: expected an object with article, highlights, found list"),
    ],
)
def test_faulty_lines(tmp_path, row, message):
    write(tmp_path / "test.jsonl", [article(0), row])
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'test.jsonl'}, {message}")):
        CnnDailyMail(str(tmp_path)).test()


def test_missing_file(tmp_path):
    write(tmp_path / "train.jsonl", [article(0)])
    with pytest.raises(ValueError, match=r"lacks test\.jsonl .* holds train\.jsonl"):
        CnnDailyMail(str(tmp_path)).test()


def test_hub(monkeypatch, capsys):
    asked = []

    def load_dataset(*args, split):
        asked.append((*args, split))
        return Dataset.from_list([article(0), article(1, article=""), article(2), article(3)])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert [example.id for example in CnnDailyMail().train_pool()] == ["i0", "i2", "i3"]
    assert "left out 1 articles" in capsys.readouterr().err
    assert [example.id for example in CnnDailyMail(pool_size=2).train_pool()] == [
        f"i{number}" for number in spread(range(4), 2) if number != 1
    ]
    with pytest.raises(ValueError, match="test, i1: the article is empty"):
        CnnDailyMail().test()
    assert asked[0] == ("abisee/cnn_dailymail", "3.0.0", "train") and asked[-1][-1] == "test"


def test_impossible_pool_size():
    with pytest.raises(ValueError, match="data.task.pool_size=0 must be at least 1"):
        CnnDailyMail(pool_size=0)


def test_articles_without_an_id_are_numbered(tmp_path):
    write(tmp_path / "test.jsonl", [{"article": "a", "highlights": "b"}, article(7), article(8, id=None)])
    assert [example.id for example in CnnDailyMail(str(tmp_path)).test()] == ["test:1", "i7", "test:3"]


def test_ids_may_be_numbers(tmp_path):
    write(tmp_path / "test.jsonl", [article(1, id=5), article(2, id=0)])
    assert [example.id for example in CnnDailyMail(str(tmp_path)).test()] == ["5", "0"]
