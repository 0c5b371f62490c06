"""SLEB (Song et al. 2024): layers are switched off one by one, each time the one that hurts least.

Layers that hurt least alone need not hurt least together: a beam keeps several sets of every size. And the set that
hurts least need not be the one that LoRA repairs best: a few steps of LoRA under each of the beam's sets tell.
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
        repair_steps: LoRA steps under each of the sets that the search ends with, after which the one with the least
            loss is taken; 0 takes the one with the least loss without LoRA.
    """

    name: ClassVar[str] = "sleb"
    search_width: int = 1
    repair_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_search(self.search_width, self.repair_steps)

    def routes(self, prompts: Prompts) -> Tensor | PrunedRoutes:
        """[L], k layers switched off, each set measured as it is to be skipped."""
        layers, measured = prompts.num_layers, prompts.take(self.calibration_prompts)
        found = elimination(
            layers,
            self.skipped_layers(layers),
            lambda routes: measured.loss(self.applied(routes)),
            self.protect_first,
            self.protect_last,
            width=self.search_width,
        )
        order = (
            most_repairable(
                layers, found, lambda routes: measured.repaired_loss(self.applied(routes), self.repair_steps)
            )
            if self.repair_steps
            else found[0]
        )
        return self.applied(routes_without(layers, order))


def check_search(width: int, repair_steps: int) -> None:
    """Raises ValueError for a search that keeps no set, or one whose only set is to be compared with others."""
    for option, value, least in (("search_width", width, 1), ("repair_steps", repair_steps, 0)):
        if value < least:
            raise ValueError(f"method.{option}={value} must be at least {least}")
    if repair_steps and width == 1:
        raise ValueError(
            f"method.repair_steps={repair_steps} compares the sets that the search ends with, and "
            "method.search_width=1 leaves one: set method.search_width=8, say, or method.repair_steps=0"
        )


def most_repairable(
    num_layers: int, orders: Sequence[list[int]], repaired_loss_of: Callable[[Tensor], float]
) -> list[int]:
    """The set of layers that LoRA repairs best.

    Args:
        num_layers: L.
        orders: The sets, each in the order in which its layers were switched off.
        repaired_loss_of: Of routes [L], after some steps of LoRA under them.
    """
    losses = [repaired_loss_of(routes_without(num_layers, order)) for order in orders]
    for order, loss in zip(orders, losses, strict=True):
        print(f"without layers {', '.join(map(str, sorted(order)))}, repaired: {loss:.4f}", flush=True)
    return orders[losses.index(min(losses))]


def elimination(
    num_layers: int,
    count: int,
    loss_of: Callable[[Tensor], float],
    protect_first: int = 1,
    protect_last: int = 1,
    width: int = 1,
    first: Sequence[int] = (),
) -> list[list[int]]:
    """Sets of `count` layers, each in the order in which they are switched off for good: a beam search by the loss.

    Args:
        num_layers: L.
        count: Layers to switch off.
        loss_of: Of routes [L].
        protect_first, protect_last: Layers at the ends that stay.
        width: Sets kept at every size, those with the least loss; 1 switches off the layer with the least loss each
            time.
        first: Layers that are off already; the others follow.

    Returns:
        At most `width` sets, the one with the least loss first.

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
    return kept
