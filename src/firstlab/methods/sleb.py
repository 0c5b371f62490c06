"""SLEB (Song et al. 2024), decode-only: layers are switched off one by one, each time the one that hurts least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from firstlab.methods.base import Method


@dataclass
class SLEB(Method):
    """A static set of skipped layers, found greedily on training prompts.

    Attributes:
        protect_first, protect_last: Layers at either end that are never switched off (1 and 1 in the original).
        calibration_prompts: Training prompts whose loss decides (128 in the original).
    """

    name: ClassVar[str] = "sleb"
    target_skip: float | None = 0.15
    protect_first: int = 1
    protect_last: int = 1
    calibration_prompts: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_skip is None:
            raise ValueError("method.target_skip=null: sleb needs a skip rate, e.g. 0.15")

    def fixed_routes(self, num_layers: int, loss_of: Callable[[Tensor], float]) -> Tensor:
        """Greedy elimination of round(target_skip · L) layers."""
        assert self.target_skip is not None
        count = round(self.target_skip * num_layers)
        return greedy_static_routes(num_layers, count, loss_of, self.protect_first, self.protect_last)


def greedy_static_routes(
    num_layers: int, count: int, loss_of: Callable[[Tensor], float], protect_first: int = 1, protect_last: int = 1
) -> Tensor:
    """[L] boolean routes with `count` layers off; each step removes for good the layer with the least loss.

    Raises:
        ValueError: More layers to remove than may be removed.
    """
    free = range(protect_first, num_layers - protect_last)
    if count > len(free):
        raise ValueError(
            f"cannot skip {count} of {num_layers} layers while the first {protect_first} and the last "
            f"{protect_last} are kept: lower method.target_skip"
        )
    routes = torch.ones(num_layers, dtype=torch.bool)
    for _ in range(count):
        losses = {}
        for layer in free:
            if routes[layer]:
                routes[layer] = False
                losses[layer] = loss_of(routes)
                routes[layer] = True
        routes[min(losses, key=losses.__getitem__)] = False
    return routes
