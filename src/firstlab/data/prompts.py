"""The three prompts of the FiRST paper (A.6), and the kinds of tasks that use them."""

from __future__ import annotations

from typing import ClassVar

from firstlab.data.task import Example, Task


def translation_prompt(text: str, source_language: str, target_language: str) -> str:
    """Prompt for machine translation; languages are written out, e.g. "English" and "German"."""
    return (
        "### Instruction:\n"
        f"Translate the following sentences from {source_language} to {target_language}.\n\n"
        f"### Input:\n{text}\n\n"
        "### Response:\n"
    )


def summarization_prompt(article: str) -> str:
    """Prompt for summarizing a news article."""
    return (
        "### Instruction:\nSummarize the news article in around 100-200 words.\n\n"
        f"### Input:\n{article}\n\n"
        "### Response:\n"
    )


def qa_prompt(passage: str, question: str) -> str:
    """Prompt for extractive question answering."""
    return (
        "### Instruction:\nAnswer the question based on the given passage.\n\n"
        f"### Passage:\n{passage}\n\n"
        f"### Question:\n{question}\n\n"
        "### Response:\n"
    )


class Translation(Task):
    """Writes the prompt of translation from and to the languages of these names."""

    kind: ClassVar[str] = "translation"
    language_names: tuple[str, str]

    def prompt(self, example: Example, source: str | None = None) -> str:
        return translation_prompt(example.source if source is None else source, *self.language_names)


class Summarization(Task):
    """Writes the prompt of summarization."""

    kind: ClassVar[str] = "summarization"

    def prompt(self, example: Example, source: str | None = None) -> str:
        return summarization_prompt(example.source if source is None else source)


class QuestionAnswering(Task):
    """Writes the prompt of extractive question answering."""

    kind: ClassVar[str] = "qa"

    def prompt(self, example: Example, source: str | None = None) -> str:
        return qa_prompt(example.source if source is None else source, example.question)
