"""The three prompts of the FiRST paper (A.6); the answer starts in the line after `### Response:`."""

from __future__ import annotations


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
