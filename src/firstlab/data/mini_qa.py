"""Mini QA: bundled passages with questions and answers, a stand-in for SQuAD without a network."""

from __future__ import annotations

from firstlab.data.bundled import BundledTask
from firstlab.data.prompts import qa_prompt
from firstlab.data.task import Example


class MiniQA(BundledTask):
    """Extractive question answering.

    Level 1 asks about the only subject of a passage, in its own words; 2 has a second subject; 3 paraphrases the
    question; 4 puts pronouns for names; 5 needs two facts or a comparison.
    """

    kind = "qa"
    name = "mini-qa"

    def prompt(self, example: Example, source: str | None = None) -> str:
        return qa_prompt(example.source if source is None else source, example.question)
