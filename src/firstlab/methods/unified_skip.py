"""Unified layer skipping (Liu et al. 2024, arXiv 2404.06954): one set of layers, from the wanted speed-up alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from firstlab.methods.base import FixedCount, Prompts, check_count, routes_without


@dataclass
class UnifiedSkip(FixedCount):
    """Layers at a fixed distance run; the first and the last one always do.

    The "official" `rule` is that of the public training script, which at small skip rates drops one block below the
    last layer; "even" spreads the skipped layers, as the paper says.
    """

    name: ClassVar[str] = "unified_skip"
    choices: ClassVar[Mapping[str, Sequence[str]]] = {"rule": ("official", "even")}
    rule: str = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.protect_first, self.protect_last) != (1, 1):
            raise ValueError("method.protect_first and method.protect_last are 1 in unified_skip; leave them out")

    @property
    def label(self) -> str:
        return super().label if self.rule == "official" else f"{super().label}-{self.rule}"

    def routes(self, prompts: Prompts) -> Tensor:
        layers = prompts.num_layers
        count = self.skipped_layers(layers)
        if self.rule == "even":  # each in the middle of its share of the layers 1 to L - 2
            return routes_without(layers, [1 + (2 * i + 1) * (layers - 2) // (2 * count) for i in range(count)])
        # From below, the multiples of int(L / (n - 1)) run until there are n layers with the ends.
        running = layers - count
        interval = layers // (running - 1)
        between = [index for index in range(1, layers - 1) if index % interval == 0][: running - 2]
        return routes_without(layers, [index for index in range(1, layers - 1) if index not in between])

    def skipped_layers(self, num_layers: int) -> int:
        """L - int(L / v) with v = 1 / (1 - s) for the official rule, else round(s · L)."""
        if self.rule == "even":
            return super().skipped_layers(num_layers)
        speedup = 1 / (1 - self.target_skip)
        running = int(num_layers / speedup + 1e-9)  # 16 / (1 / 0.75) is 12, whatever its last bit
        return check_count(num_layers - running, num_layers, 1, 1)
