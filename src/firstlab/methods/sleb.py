"""SLEB (Song et al. 2024): layers are switched off one by one, each time the one that hurts least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from firstlab.methods.base import CalibratedSet, Prompts, check_count, routes_without
from firstlab.model import PrunedRoutes


@dataclass
class SLEB(CalibratedSet):
    """Found greedily, by the loss of the calibration prompts; one layer at either end stays by default."""

    name: ClassVar[str] = "sleb"

    def routes(self, prompts: Prompts) -> Tensor | PrunedRoutes:
        """[L], greedy elimination of k layers, each measured as it is to be skipped."""
        layers, measured = prompts.num_layers, prompts.take(self.calibration_prompts)

        def loss_of(routes: Tensor) -> float:
            return measured.loss(self.applied(routes))

        order = greedy_order(layers, self.skipped_layers(layers), loss_of, self.protect_first, self.protect_last)
        return self.applied(routes_without(layers, order))


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
