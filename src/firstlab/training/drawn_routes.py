"""Routes that are drawn anew for every prompt and step, so that one LoRA learns every speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from firstlab.model.route_router import RouteRouter
from firstlab.model.routes import FixedRoutes, Routes
from firstlab.store.ranks import gather, rank


@dataclass(frozen=True, eq=False)
class DrawnRoutes(Routes):
    """Each prompt of a batch gets the route that the router chooses for it at a rate of its own.

    The rates of a global batch reach from dense to the highest one and are dealt out at random, so that every step sees
    all speeds, and the same ones for any number of processes. The seed is that of the step.
    """

    router: RouteRouter
    means: Tensor  # [N, F], what it read in the prompts
    power: float = 1.0  # of the shares of the highest rate, which are even at 1; less favours high rates

    def check(self, num_layers: int, prompts: int | None = None) -> None:
        if prompts is not None and prompts != len(self.means):
            raise ValueError(f"routes are drawn for {len(self.means)} prompts, not {prompts}")

    def first(self, num_layers: int) -> Tensor:
        return torch.ones(1, num_layers, dtype=torch.bool)

    def gates(self, steps: Tensor) -> Tensor | None:
        raise ValueError("DrawnRoutes are drawn for the rows of a batch: take rows() first")

    def rows(self, index: Sequence[int]) -> FixedRoutes:
        """Routes drawn for these prompts, the rank's own of the global batch."""
        my_rank, world = rank()
        sizes = gather(len(index))
        count, start = max(2, sum(sizes)), sum(sizes[:my_rank])
        # A step seeds rank r of w with w · number + r.
        order = torch.randperm(count, generator=torch.Generator().manual_seed(torch.initial_seed() // world))
        rates = self.router.highest_rate * torch.linspace(0, 1, count)[order] ** self.power
        return self.at(index, rates[start : start + len(index)])

    def at(self, index: Sequence[int], rates: Tensor | float | None) -> FixedRoutes:
        """The routes of these prompts at given rates."""
        means = self.means[list(index)].to(self.router.device)
        return FixedRoutes(self.router.decision(means, rates)[1].cpu())

    def to_json(self) -> Any:
        return {"drawn": len(self.means)}
