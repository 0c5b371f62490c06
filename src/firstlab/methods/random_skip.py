"""Random skip (FiRST §5.1): k layers drawn at random, once per run or once per prompt."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from firstlab.methods.base import FixedCount, Prompts, routes_without


@dataclass
class RandomSkip(FixedCount):
    """k = round(s · L) of the unprotected layers, uniformly.

    A prompt's own draw depends on the seed and the prompt's text alone, never on its place or its batch.
    """

    name: ClassVar[str] = "random_skip"
    choices: ClassVar[Mapping[str, Sequence[str]]] = {"draw": ("run", "prompt")}
    seed: int = 0  # report at least three
    draw: str = "run"  # one set for all prompts; or "prompt"

    @property
    def label(self) -> str:
        return super().label if self.draw == "run" else f"{super().label}-per_prompt"

    @property
    def per_prompt(self) -> bool:
        return self.draw == "prompt"

    def routes(self, prompts: Prompts) -> Tensor:
        layers = prompts.num_layers
        if not self.per_prompt:
            return self._draw(layers, str(self.seed))
        return torch.stack([self._draw(layers, f"{self.seed}:{text}") for text in prompts.texts])

    def _draw(self, num_layers: int, key: str) -> Tensor:
        # A generator seeded with text hashes it: the same draw in every process and on every machine.
        drawn = random.Random(key).sample(self.free_layers(num_layers), self.skipped_layers(num_layers))
        return routes_without(num_layers, drawn)
