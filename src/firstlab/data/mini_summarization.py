"""Mini summarization: bundled news with highlights, a stand-in for CNN/DM without a network."""

from __future__ import annotations

from firstlab.data.bundled import BundledTask
from firstlab.data.prompts import Summarization


class MiniSummarization(Summarization, BundledTask):
    """News with highlights that follow by rule: who did what, the key figure, the outcome.

    Levels 1 to 5 add adjectives and distractors, move the lead and the figure back, join figure and outcome, and
    correct the figure.
    """

    name = "mini-summarization"
