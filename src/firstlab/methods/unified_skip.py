"""Unified layer skipping (Liu et al. 2024, arXiv 2404.06954): one set of layers, from the wanted speed-up alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from firstlab.methods.base import FixedCount, Prompts, check_count, routes_without


@dataclass
class UnifiedSkip(FixedCount):
    """Layers at a fixed distance run; the first and the last one always do.

    Attributes:
        rule: "official" is the rule of the public training script, which at small skip rates drops one block below
            the last layer; "even" spreads the skipped layers, as the paper's words have it.
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
        """Names the rule when it is not the official one."""
        return super().label if self.rule == "official" else f"{super().label}-{self.rule}"

    def routes(self, prompts: Prompts) -> Tensor:
        """[L]."""
        layers = prompts.num_layers
        count = self.skipped_layers(layers)
        if self.rule == "even":
            return routes_without(layers, evenly_skipped(layers, count))
        routes = torch.zeros(layers, dtype=torch.bool)
        routes[official_layers(layers, layers - count)] = True
        return routes

    def skipped_layers(self, num_layers: int) -> int:
        """L - int(L / v) with v = 1 / (1 - s) for the official rule, else round(s · L).

        Raises:
            ValueError: Not even the first and the last layer would run.
        """
        if self.rule == "even":
            return super().skipped_layers(num_layers)
        assert self.target_skip is not None
        return check_count(num_layers - layers_at_speedup(num_layers, 1 / (1 - self.target_skip)), num_layers, 1, 1)


def layers_at_speedup(num_layers: int, speedup: float) -> int:
    """n = int(L / v), layers that run."""
    return int(num_layers / speedup + 1e-9)  # 16 / (1 / 0.75) is 12, whatever its last bit


def official_layers(num_layers: int, running: int) -> list[int]:
    """Layers that run: the ends, and from below the multiples of int(L / (n - 1)) until there are n.

    Args:
        num_layers: L.
        running: n, at least 2.
    """
    interval = num_layers // (running - 1)
    between = [index for index in range(1, num_layers - 1) if index % interval == 0]
    return [0, *between[: running - 2], num_layers - 1]


def evenly_skipped(num_layers: int, count: int) -> list[int]:
    """`count` skipped layers, each in the middle of its share of the layers 1 to L - 2."""
    return [1 + (2 * i + 1) * (num_layers - 2) // (2 * count) for i in range(count)]
