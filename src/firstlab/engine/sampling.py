"""How the decode engine chooses tokens: the most likely one, or drawn at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """Tokens are drawn, as transformers' `generate` draws them with `do_sample=True`.

    Attributes:
        temperature: Scores are divided by it.
        top_k: Only this many of the most likely tokens; 0 for all.
        top_p: Only the most likely tokens that together reach this probability; 1 for all.
        seed: Of the generator that one call of `DecodeEngine.generate` draws from. All rows draw from it, so that the
            tokens of a prompt depend on the prompts and places beside it.

    Raises:
        ValueError: A value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("temperature", 0 < self.temperature < math.inf, "above 0; leave sampling out for greedy decoding"),
            ("top_k", self.top_k >= 0, "at least 0, which keeps all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1, which keeps all tokens"),
        ):
            if not fits:
                raise ValueError(f"Sampling: {name}={getattr(self, name)} must be {allowed}")

    def warpers(self) -> LogitsProcessorList:
        """transformers' own, in its order."""
        warpers = LogitsProcessorList()
        if self.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


def chooser(sampling: Sampling | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Next tokens [B] of logits [B, V]; None: the most likely ones."""
    if sampling is None:
        return lambda logits: logits.argmax(-1)
    warpers, generator = sampling.warpers(), torch.Generator(device).manual_seed(sampling.seed)

    def draw(logits: Tensor) -> Tensor:
        no_ids: Tensor = torch.empty(len(logits), 0, dtype=torch.long)  # these warpers read scores only
        probabilities = warpers(no_ids, logits.float()).softmax(-1)  # type: ignore[arg-type]
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    return draw
