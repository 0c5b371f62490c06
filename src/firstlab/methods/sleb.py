"""SLEB (Song et al. 2024): layers are switched off one by one, each time the one that hurts least.

Layers that hurt least alone need not hurt least together: a beam keeps several sets of every size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from firstlab.methods.base import CalibratedSet, Prompts, check_count, routes_without
from firstlab.model import PrunedRoutes


@dataclass
class SLEB(CalibratedSet):
    """Found by the loss of the calibration prompts; one layer at either end stays by default.

    Attributes:
        search_width: Sets kept at every size; 1 is greedy elimination, as published.
    """

    name: ClassVar[str] = "sleb"
    search_width: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width(self.search_width)

    def routes(self, prompts: Prompts) -> Tensor | PrunedRoutes:
        """[L], k layers switched off, each set measured as it is to be skipped."""
        layers, measured = prompts.num_layers, prompts.take(self.calibration_prompts)

        def loss_of(routes: Tensor) -> float:
            return measured.loss(self.applied(routes))

        ends = self.protect_first, self.protect_last
        order = elimination(layers, self.skipped_layers(layers), loss_of, *ends, width=self.search_width)
        return self.applied(routes_without(layers, order))


def check_width(width: int) -> None:
    """Raises ValueError for a search that keeps no set, or so many that it would not end."""
    if not 1 <= width <= 64:
        raise ValueError(f"method.search_width={width} must be at least 1 and at most 64")


def elimination(
    num_layers: int,
    count: int,
    loss_of: Callable[[Tensor], float],
    protect_first: int = 1,
    protect_last: int = 1,
    width: int = 1,
    first: Sequence[int] = (),
) -> list[int]:
    """`count` layers in the order in which they are switched off for good: a beam search by the loss.

    Args:
        num_layers: L.
        count: Layers to switch off.
        loss_of: Of routes [L].
        protect_first, protect_last: Layers at the ends that stay.
        width: Sets kept at every size, those with the least loss; 1 switches off the layer with the least loss each
            time.
        first: Layers that are off already; the others follow.

    Raises:
        ValueError: More layers to remove than may be removed.
    """
    check_count(count, num_layers, protect_first, protect_last)
    free = range(protect_first, num_layers - protect_last)
    kept = [list(first)]
    for _ in range(count - len(first)):
        orders = {frozenset([*order, i]): [*order, i] for order in kept for i in free if i not in order}
        losses = {each: loss_of(routes_without(num_layers, order)) for each, order in orders.items()}
        kept = [orders[each] for each in sorted(losses, key=losses.__getitem__)[:width]]
    return kept[0]
