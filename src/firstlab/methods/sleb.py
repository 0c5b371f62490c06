"""SLEB (Song et al. 2024): layers are switched off one by one, each time the one that hurts least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from tqdm import tqdm

from firstlab.methods.base import CalibratedSet, Prompts, check_count, routes_without
from firstlab.model.routes import Routes


@dataclass
class SLEB(CalibratedSet):
    """Found by the loss of the calibration prompts; `search_width` sets are kept at every size, 1 as published."""

    name: ClassVar[str] = "sleb"
    least: ClassVar[Mapping[str, float]] = {"search_width": 1}
    most: ClassVar[Mapping[str, float]] = {"search_width": 64}
    search_width: int = 1

    def routes(self, prompts: Prompts) -> Tensor | Routes:
        layers, measured = prompts.num_layers, prompts.take(self.calibration_prompts)

        def loss_of(routes: Tensor) -> float:  # measured as the layers are to be skipped
            return measured.loss(self.applied(routes))

        ends, count = (self.protect_first, self.protect_last), self.skipped_layers(layers)
        shown = prompts.progress_bar
        order = elimination(layers, count, loss_of, *ends, width=self.search_width, progress_bar=shown)
        return self.applied(routes_without(layers, order))


def elimination(
    num_layers: int,
    count: int,
    loss_of: Callable[[Tensor], float],
    protect_first: int = 1,
    protect_last: int = 1,
    width: int = 1,
    first: Sequence[int] = (),
    progress_bar: bool = False,
) -> list[int]:
    """`count` layers in the order in which they are switched off for good: a beam search by the loss of routes [L].

    Layers that hurt least alone need not hurt least together, so the `width` best sets of every size are kept. Layers
    of `first` are off already; the others follow.
    """
    check_count(count, num_layers, protect_first, protect_last)
    free = range(protect_first, num_layers - protect_last)
    kept = [list(first)]
    sizes = range(len(first), count)
    # An upper bound in a wide search: sets that are found twice are measured once.
    total = sum((1 if size == len(first) else width) * (len(free) - size) for size in sizes)
    bar = tqdm(total=total, desc="search layers to skip", unit="set", disable=not progress_bar, leave=False)
    for _ in sizes:
        orders = {frozenset([*order, i]): [*order, i] for order in kept for i in free if i not in order}
        losses = {}
        for each, order in orders.items():
            losses[each] = loss_of(routes_without(num_layers, order))
            bar.update()
        kept = [orders[each] for each in sorted(losses, key=losses.__getitem__)[:width]]
    bar.close()
    return kept[0]
