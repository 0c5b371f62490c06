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
    """How tokens are drawn, as by transformers' `generate` with `do_sample=True`.

    All prompts of one call draw from one generator, so that a prompt's tokens depend on the prompts and places beside
    it. `DecodeEngine.request` gives a prompt a generator of its own.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0 for all
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


def most_likely(logits: Tensor) -> Tensor:
    """Next tokens [B] of logits [B, V], greedily."""
    return logits.argmax(-1)


def chooser(sampling: Sampling | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Next tokens [B] of logits [B, V]; None: the most likely ones."""
    if sampling is None:
        return most_likely
    warpers, generator = LogitsProcessorList(), torch.Generator(device).manual_seed(sampling.seed)
    if sampling.temperature != 1:  # in the order of transformers
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))

    def draw(logits: Tensor) -> Tensor:
        no_ids: Tensor = torch.empty(len(logits), 0, dtype=torch.long)  # these warpers read scores only
        probabilities = warpers(no_ids, logits.float()).softmax(-1)  # type: ignore[arg-type]
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    return draw
