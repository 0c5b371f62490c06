"""The oracle: every prompt's best route, searched with its reference in hand: the ceiling of what routers can reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from firstlab.methods.base import FixedCount, Prompts

_WORST = torch.finfo(torch.float32).max


@dataclass
class Oracle(FixedCount):
    """k skipped layers per prompt: greedy elimination on the loss of the prompt's own reference, then swaps.

    In each of `swap_rounds`, every prompt may exchange a skipped layer for a running one, the best exchange. The search
    sees the model without LoRA; LoRA is trained, and evaluated, under the routes found.
    """

    name: ClassVar[str] = "oracle"
    least: ClassVar[Mapping[str, float]] = {"swap_rounds": 0}
    swap_rounds: int = 1

    @property
    def per_prompt(self) -> bool:
        return True

    def routes(self, prompts: Prompts) -> Tensor:
        layers, count = prompts.num_layers, self.skipped_layers(prompts.num_layers)
        free = torch.zeros(layers, dtype=torch.bool)
        free[list(self.free_layers(layers))] = True
        routes = torch.ones(len(prompts), layers, dtype=torch.bool)
        losses = torch.full([len(prompts)], torch.inf)
        for _ in range(count):
            closable = _layers(routes & free)
            closed = (routes.scatter(1, layer, False) for layer in closable)
            losses, routes = _best(prompts, closed, torch.full_like(losses, torch.inf), routes)
        for _ in range(self.swap_rounds):
            pairs = product(_layers(~routes), _layers(routes & free))
            swapped = (routes.scatter(1, opened, True).scatter(1, closed, False) for opened, closed in pairs)
            new_losses, new_routes = _best(prompts, swapped, losses, routes)
            if torch.equal(new_routes, routes):
                break
            losses, routes = new_losses, new_routes
        return routes


def _layers(chosen: Tensor) -> list[Tensor]:
    """The m-th chosen layer of every prompt, [N, 1], for each m; every row of [N, L] chooses equally many."""
    return list(chosen.nonzero()[:, 1].view(len(chosen), -1).T.unsqueeze(-1))


def _best(prompts: Prompts, candidates: Iterable[Tensor], losses: Tensor, routes: Tensor) -> tuple[Tensor, Tensor]:
    """Each prompt's least loss [N] and its route [N, L], among what it has and the candidates [N, L]."""
    for candidate in candidates:
        # Even a loss that is infinite, or no number, is better than none.
        tried = prompts.losses(candidate).nan_to_num(_WORST, posinf=_WORST)
        better = tried < losses
        losses, routes = torch.where(better, tried, losses), torch.where(better[:, None], candidate, routes)
    return losses, routes
