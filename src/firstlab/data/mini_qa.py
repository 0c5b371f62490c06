"""Mini QA: bundled passages with questions and answers, a stand-in for SQuAD without a network."""

from __future__ import annotations

from firstlab.data.bundled import BundledTask
from firstlab.data.prompts import QuestionAnswering


class MiniQA(QuestionAnswering, BundledTask):
    """Extractive question answering.

    Level 1 asks about the only subject of a passage, in its own words; 2 has a second subject; 3 paraphrases the
    question; 4 puts pronouns for names; 5 needs two facts or a comparison.
    """

    name = "mini-qa"
