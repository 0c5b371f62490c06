"""Prompts whose losses are a given function of the routes: methods can be tested without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from firstlab.methods.base import Observer


@dataclass
class FakePrompts:
    """`loss_of(prompt, skipped layers)` is the loss of one prompt."""

    num_layers: int
    texts: Sequence[str] = ("a", "b", "c")
    loss_of: Callable[[str, tuple[int, ...]], float] = lambda text, skipped: 0.0
    max_new_tokens: int = 8
    states: list[list[Tensor]] = field(default_factory=list)
    choices: Tensor | None = None
    progress_bar: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, count: int) -> FakePrompts:
        return replace(self, texts=self.texts[:count])

    def losses(self, routes: Tensor) -> Tensor:
        rows = routes.expand(len(self), -1)
        skipped = [tuple((~row).nonzero()[:, 0].tolist()) for row in rows]
        return torch.tensor([self.loss_of(text, each) for text, each in zip(self.texts, skipped, strict=True)])

    def loss(self, routes: Tensor) -> float:
        return float(self.losses(routes).mean())

    def select(self, index: Sequence[int]) -> FakePrompts:
        return replace(self, texts=[self.texts[i] for i in index])

    def mean_losses(self, routes: Tensor, title: str = "") -> list[float]:
        return [self.loss(each) for each in routes]

    def observe(self, see: Observer, title: str) -> None:
        for states in self.states:
            batch = {"attention_mask": torch.ones(len(states[0]))}
            for index, (before, after) in enumerate(pairwise(states)):
                see(batch, index, before, after)

    def routed(self) -> Tensor:
        assert self.choices is not None
        return self.choices[: len(self)]


def skipped(routes: Tensor) -> list[int]:
    """Layers that an [L] route leaves out."""
    return (~routes).nonzero()[:, 0].tolist()
