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
        order = greedy_order(num_layers, count, loss_of, self.protect_first, self.protect_last)
        return routes_without(num_layers, order)


def routes_without(num_layers: int, skipped: list[int]) -> Tensor:
    """[L] boolean routes that run every layer but `skipped`."""
    routes = torch.ones(num_layers, dtype=torch.bool)
    routes[skipped] = False
    return routes


def greedy_order(
    num_layers: int, count: int, loss_of: Callable[[Tensor], float], protect_first: int = 1, protect_last: int = 1
) -> list[int]:
    """`count` layers in the order in which they are switched off for good, each the one with the least loss.

    Raises:
        ValueError: More layers to remove than may be removed.
    """
    free = range(protect_first, num_layers - protect_last)
    if count > len(free):
        raise ValueError(
            f"cannot skip {count} of {num_layers} layers while the first {protect_first} and the last "
            f"{protect_last} are kept: lower method.target_skip"
        )
    order: list[int] = []
    for _ in range(count):
        losses = {i: loss_of(routes_without(num_layers, [*order, i])) for i in free if i not in order}
        order.append(min(losses, key=losses.__getitem__))
    return order
