"""What a task is: where its examples come from and how a prompt is written.

A new data set is one file with one subclass of `Task` and one YAML in `conf/data/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Example:
    """One input with its references."""

    id: str  # stable, the same on every machine
    source: str  # the text that is shortened when a prompt is too long: sentence, article or passage
    references: tuple[str, ...]  # accepted answers; the first one is the training target
    question: str = ""  # extractive QA only
    difficulty: int = 0  # 1 (easy) and up for generated tasks, 0 where nobody knows
    part: str = ""  # the task of a mixture that it comes from, else empty
    max_new_tokens: int | None = None  # of its response, where that is less than in other parts of a mixture


class Task(ABC):
    """Loads examples and writes prompts. Splits, tokenisation and batches are the data module's."""

    #: Which metrics apply: "translation", "summarization" or "qa"; those of its parts for a "mixture".
    kind: ClassVar[str]
    #: Target language of a translation task (BLEU is per character for "zh"); None elsewhere.
    target_language: str | None = None
    #: Whether names of special tokens in a prompt stand for them, as in chat markup. If not, and in responses always,
    #: `</s>` is text like any other.
    markup: bool = False
    #: The tasks that a mixture consists of, by name; examples say which they come from.
    parts: Mapping[str, Task] = MappingProxyType({})

    @abstractmethod
    def train_pool(self) -> list[Example]:
        """Examples that training and validation are drawn from, in a fixed order."""

    @abstractmethod
    def test(self) -> list[Example]:
        """The held-out test set, in its published order."""

    @abstractmethod
    def prompt(self, example: Example, source: str | None = None) -> str:
        """The prompt (A.6), ending in `### Response:` and a newline; `source` is a shortened `example.source`."""
