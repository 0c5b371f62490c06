"""SQuAD v1.1 extractive question answering; the development set is the test set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firstlab.data.files import clean_text, data_files, entries, identifier, load_hub_split, members, read_json
from firstlab.data.prompts import QuestionAnswering
from firstlab.data.task import Example

HUB_ID = "rajpurkar/squad"
FILES = {"train": "train-v1.1.json", "validation": "dev-v1.1.json"}


class Squad(QuestionAnswering):
    """Questions on a passage, each with every accepted answer (paper, section 5).

    `root` has train-v1.1.json and dev-v1.1.json in SQuAD's own format; None takes the hub's data set.
    """

    def __init__(self, root: str | None = None) -> None:
        self.root = root

    def train_pool(self) -> list[Example]:
        return self._read("train")

    def test(self) -> list[Example]:
        return self._read("validation")

    def _read(self, split: str) -> list[Example]:
        if self.root is not None:
            (path,) = data_files(self.root, [FILES[split]])
            examples = list(_examples_of_file(path))
            if not examples:
                raise ValueError(f"{path}: no article has a question; download or create the file again")
            return examples
        rows = load_hub_split(HUB_ID, None, split, list(FILES.values()))
        return [
            _example(row["id"], row["context"], row["question"], row["answers"]["text"], f"{HUB_ID} {split}")
            for row in rows
        ]


def _examples_of_file(path: Path) -> Iterator[Example]:
    for article_number, article in enumerate(entries(read_json(path), "data", str(path)), start=1):
        of_article = f"{path}, article {article_number}"
        for paragraph_number, paragraph in enumerate(entries(article, "paragraphs", of_article), start=1):
            where = f"{of_article}, paragraph {paragraph_number}"
            [context] = members(paragraph, ["context"], where)
            for qa in entries(paragraph, "qas", where):
                question_id = identifier(members(qa, ["id"], where)[0], where, "question id")
                of_question = f"{path}, question '{question_id}'"
                [question] = members(qa, ["question"], of_question)
                answers = [members(each, ["text"], of_question)[0] for each in entries(qa, "answers", of_question)]
                yield _example(question_id, context, question, answers, str(path))


def _example(question_id: str, context: Any, question: Any, answers: list[Any], where: str) -> Example:
    of_question = f"{where}, question '{question_id}'"
    if not answers:
        raise ValueError(
            f"{of_question} has no answer: unanswerable questions (SQuAD v2) are not supported; use v1.1 or remove it"
        )
    texts = [clean_text(answer, of_question, "answer") for answer in answers]
    return Example(
        id=question_id,
        source=clean_text(context, of_question, "context"),
        references=tuple(dict.fromkeys(texts)),
        question=clean_text(question, of_question, "question"),
    )
