import json
import re

import pytest
from datasets import Dataset

from firstlab.data.squad import Squad


def question(number, *answers):
    return {
        "id": f"q{number}",
        "question": f" Who is {number}?",
        "answers": [{"text": answer, "answer_start": 0} for answer in answers],
    }


def write(path, *questions, context="Ada met Bob."):
    path.write_text(
        json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": context, "qas": list(questions)}]}]}),
        encoding="utf-8",
    )


def test_reads_both_splits(tmp_path):
    write(tmp_path / "train-v1.1.json", question(1, "Ada"), question(2, "Bob"))
    write(tmp_path / "dev-v1.1.json", question(3, "Ada", "Ada met", "Ada"))
    task = Squad(str(tmp_path))
    assert [(example.id, example.question) for example in task.train_pool()] == [
        ("q1", "Who is 1?"),
        ("q2", "Who is 2?"),
    ]
    (example,) = task.test()
    assert example.references == ("Ada", "Ada met")
    assert task.prompt(example).endswith("### Passage:\nAda met Bob.\n\n### Question:\nWho is 3?\n\n### Response:\n")
    assert "### Passage:\nAda\n" in task.prompt(example, "Ada")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], ": expected an object with data, found list"),
        ({"data": {}}, ": 'data' is dict, not a list"),
        ({"data": [{}]}, ", article 1: missing paragraphs"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, ", article 1, paragraph 1: missing context"),
        (
            {"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "x", "question": "q"}]}]}]},
            ", question 'x': missing answers",
        ),
        (
            {"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "x", "answers": []}]}]}]},
            ", question 'x': missing question",
        ),
    ],
)
def test_faulty_structure(tmp_path, data, message):
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'dev-v1.1.json'}{message}")):
        Squad(str(tmp_path)).test()


def test_faulty_questions(tmp_path):
    path = tmp_path / "dev-v1.1.json"
    write(path, question(1, "Ada"), question(2))
    with pytest.raises(ValueError, match=re.escape(f"{path}, question 'q2' has no answer: unanswerable")):
        Squad(str(tmp_path)).test()
    write(path, question(1, "Ada", " "))
    with pytest.raises(ValueError, match="question 'q1': the answer is empty"):
        Squad(str(tmp_path)).test()
    write(path, question(1, "Ada"), context="")
    with pytest.raises(ValueError, match="question 'q1': the context is empty"):
        Squad(str(tmp_path)).test()


def test_ids_may_be_numbers(tmp_path):
    write(tmp_path / "dev-v1.1.json", {**question(1, "Ada"), "id": 17})
    (example,) = Squad(str(tmp_path)).test()
    assert example.id == "17"
    write(tmp_path / "dev-v1.1.json", {**question(1, "Ada"), "id": None})
    with pytest.raises(ValueError, match="paragraph 1: the question id is NoneType, not text"):
        Squad(str(tmp_path)).test()


def test_broken_and_missing_file(tmp_path):
    (tmp_path / "dev-v1.1.json").write_text('{"data":\n[', encoding="utf-8")
    with pytest.raises(ValueError, match=r"dev-v1\.1\.json, line 2: invalid JSON"):
        Squad(str(tmp_path)).test()
    with pytest.raises(ValueError, match=r"lacks train-v1\.1\.json .* holds dev-v1\.1\.json"):
        Squad(str(tmp_path)).train_pool()


def test_hub(monkeypatch):
    def load_dataset(*args, split):
        assert args == ("rajpurkar/squad", None) and split == "validation"
        answers = {"text": ["Ada", "Ada"], "answer_start": [0, 0]}
        return Dataset.from_list([{"id": "q", "context": "Ada.", "question": "Who?", "answers": answers}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (example,) = Squad().test()
    assert (example.id, example.source, example.question, example.references) == ("q", "Ada.", "Who?", ("Ada",))


@pytest.mark.parametrize("data", [[], [{"title": "t", "paragraphs": []}]])
def test_a_file_without_questions_is_named(tmp_path, data):
    (tmp_path / "dev-v1.1.json").write_text(json.dumps({"data": data}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"dev-v1\.1\.json: no article has a question"):
        Squad(str(tmp_path)).test()
