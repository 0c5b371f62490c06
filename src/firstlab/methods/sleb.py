"""SLEB (Song et al. 2024), decode-only: layers are switched off one by one, each time the one that hurts least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from firstlab.methods.base import FixedCount, Prompts, check_count, routes_without


@dataclass
class SLEB(FixedCount):
    """A static set of skipped layers, found greedily on training prompts; one layer at either end stays by default.

    Attributes:
        calibration_prompts: Training prompts whose loss decides (128 in the original).
    """

    name: ClassVar[str] = "sleb"
    calibration_prompts: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration_prompts < 1:
            raise ValueError(f"method.calibration_prompts={self.calibration_prompts} must be at least 1")

    def routes(self, prompts: Prompts) -> Tensor:
        """Greedy elimination of k layers."""
        layers = prompts.num_layers
        loss_of = prompts.take(self.calibration_prompts).loss
        order = greedy_order(layers, self.skipped_layers(layers), loss_of, self.protect_first, self.protect_last)
        return routes_without(layers, order)


def greedy_order(
    num_layers: int, count: int, loss_of: Callable[[Tensor], float], protect_first: int = 1, protect_last: int = 1
) -> list[int]:
    """`count` layers in the order in which they are switched off for good, each the one with the least loss.

    Raises:
        ValueError: More layers to remove than may be removed.
    """
    check_count(count, num_layers, protect_first, protect_last)
    free = range(protect_first, num_layers - protect_last)
    order: list[int] = []
    for _ in range(count):
        losses = {i: loss_of(routes_without(num_layers, [*order, i])) for i in free if i not in order}
        order.append(min(losses, key=losses.__getitem__))
    return order
