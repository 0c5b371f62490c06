"""ShortGPT (Men et al. 2024): the layers that change the hidden state least are skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlab.methods.base import CalibratedSet, Prompts, routes_without
from firstlab.model.routes import Routes


@dataclass
class ShortGPT(CalibratedSet):
    """The k layers of least block influence on prompts and responses; the original protects none."""

    name: ClassVar[str] = "shortgpt"
    protect_first: int = 0
    protect_last: int = 0

    def routes(self, prompts: Prompts) -> Tensor | Routes:
        layers = prompts.num_layers
        influence = block_influence(prompts.take(self.calibration_prompts)).tolist()
        ranked = sorted(self.free_layers(layers), key=influence.__getitem__)
        return self.applied(routes_without(layers, ranked[: self.skipped_layers(layers)]))


def block_influence(prompts: Prompts) -> Tensor:
    """BI of every layer, [L]: the mean over tokens of 1 - cos(input, output)."""
    total, tokens = torch.zeros(prompts.num_layers, dtype=torch.float64), 0

    def add(batch: dict[str, Tensor], index: int, before: Tensor, after: Tensor) -> None:
        nonlocal tokens
        real = batch["attention_mask"].bool().to(before.device)
        change = 1 - F.cosine_similarity(before[real].float(), after[real].float(), dim=-1)
        total[index] += change.double().sum().cpu()
        tokens += int(real.sum()) if index == 0 else 0

    prompts.observe(add, "measure what layers change")
    return total / tokens
