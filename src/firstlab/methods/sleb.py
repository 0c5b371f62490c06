"""SLEB (Song et al. 2024): layers are switched off one by one, each time the one that hurts least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
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
        # Measured as the layers are to be skipped.
        losses_of = one_by_one(lambda routes: measured.loss(self.applied(routes)), prompts.progress_bar)
        ends, count = (self.protect_first, self.protect_last), self.skipped_layers(layers)
        order = elimination(layers, count, losses_of, *ends, width=self.search_width)
        return self.applied(routes_without(layers, order))


def one_by_one(loss_of: Callable[[Tensor], float], progress_bar: bool = False) -> Callable[[Tensor], list[float]]:
    """The losses of several routes [C, L], from a function of one."""

    def losses_of(routes: Tensor) -> list[float]:
        bar = tqdm(routes, desc="search layers to skip", unit="set", disable=not progress_bar, leave=False)
        return [loss_of(route) for route in bar]

    return losses_of


def elimination(
    num_layers: int,
    count: int,
    losses_of: Callable[[Tensor], Sequence[float]],
    protect_first: int = 1,
    protect_last: int = 1,
    width: int = 1,
    first: Sequence[int] = (),
) -> list[int]:
    """`count` layers in the order in which they are switched off for good: a beam search by losses of routes [C, L].

    Layers that hurt least alone need not hurt least together, so the `width` best sets of every size are kept. Layers
    of `first` are off already; the others follow.
    """
    check_count(count, num_layers, protect_first, protect_last)
    free = range(protect_first, num_layers - protect_last)
    kept = [list(first)]
    for _ in range(len(first), count):
        # Sets that are found twice are measured once.
        orders = list({frozenset([*order, i]): [*order, i] for order in kept for i in free if i not in order}.values())
        losses = losses_of(torch.stack([routes_without(num_layers, order) for order in orders]))
        kept = [orders[each] for each in sorted(range(len(orders)), key=losses.__getitem__)[:width]]
    return kept[0]
