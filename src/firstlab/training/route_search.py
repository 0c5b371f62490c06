"""Search the codebook of a `RouteRouter`: greedy sets of several sizes, their swaps, and more for those who lose."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from firstlab.methods.base import check_count, routes_without
from firstlab.methods.objective import RouteFit
from firstlab.methods.sleb import elimination
from firstlab.model.route_router import RouteRouter
from firstlab.store.files import read_own, write_atomically
from firstlab.store.ranks import barrier, rank
from firstlab.training.prompt_set import PromptSet
from firstlab.training.route_fit import Measured

CODEBOOK = "codebook.json"
Parsed = TypeVar("Parsed")


def searched_once(file: Path, search: Callable[[], Any], parse: Callable[[Any], Parsed]) -> Parsed:
    """What a search has found: made by one process, kept in the run directory, and read from there."""
    if not file.is_file() and rank()[0] == 0:
        write_atomically(file, json.dumps(search()) + "\n")
    barrier()
    return read_own(file, parse)


def find_codebook(prompts: PromptSet, fit: RouteFit) -> Tensor:
    """[K, L] routes, the dense one first: greedy sets of several sizes, and their best swaps.

    Sets are searched on all prompts and on each part of a mixture by itself; ValueError where that is more layers to
    skip than may be skipped.
    """
    layers, sizes = prompts.num_layers, wanted_sizes(prompts.num_layers, fit)
    parts = [example.part for example in prompts.examples]
    several = sorted(set(parts)) if len(set(parts)) > 1 else []
    of_parts = [prompts.select(i for i, part in enumerate(parts) if part == each) for each in several]
    routes = [routes_without(layers, [])]
    for group in (prompts, *of_parts):
        order = elimination(layers, max(sizes), group.mean_losses)
        # Of all prompts sets of every size, to fall back on.
        routes += [routes_without(layers, order[:n]) for n in (range(max(sizes) + 1) if group is prompts else sizes)]
        swaps = math.ceil(fit.swaps * (len(group) / len(prompts)))
        routes += [swapped for size in sizes for swapped in _best_swaps(group, order[:size], swaps)]
    found = {tuple(route.tolist()) for route in routes}
    return torch.tensor(sorted(found, key=lambda route: (-sum(route), route)))


def wanted_sizes(num_layers: int, fit: RouteFit) -> list[int]:
    """Numbers of skipped layers, evenly spread up to the highest rate, with those next to the method's own rate."""
    most = math.ceil(round(fit.highest_skip * num_layers, 9))  # 0.55 · 20 is a little more than 11
    check_count(most, num_layers, 1, 1)
    spread = {round(most * step / fit.sizes) for step in range(1, fit.sizes + 1)}
    own = round(fit.target_skip * num_layers, 9)
    return sorted({size for size in spread | {math.floor(own), math.ceil(own)} if 0 < size <= most})


def _best_swaps(prompts: PromptSet, skipped: Sequence[int], count: int) -> list[Tensor]:
    """The `count` best routes that skip another layer in the place of one of the `skipped`."""
    layers = prompts.num_layers
    others = [layer for layer in range(1, layers - 1) if layer not in skipped]
    swapped = [routes_without(layers, [*({*skipped} - {opened}), x]) for opened in sorted(skipped) for x in others]
    if count == 0 or not swapped:
        return []
    losses = prompts.mean_losses(torch.stack(swapped), f"swap one of {len(skipped)} layers")
    return [swapped[place] for place in sorted(range(len(losses)), key=losses.__getitem__)[:count]]


def saved_codebook(directory: Path, prompts: PromptSet, fit: RouteFit) -> Tensor:
    """The codebook of a run."""

    def parse(saved: Any) -> Tensor:
        found = torch.tensor(saved["routes"])
        if found.dtype != torch.bool or found.ndim != 2 or found.shape[1] != prompts.num_layers or not found[0].all():
            raise ValueError("it holds no routes of this model")
        return found

    return searched_once(directory / CODEBOOK, lambda: {"routes": find_codebook(prompts, fit).tolist()}, parse)


def grown(measured: Measured, router: RouteRouter, prompts: PromptSet, fit: RouteFit) -> Tensor:
    """[M, L] more routes for the prompts that lose most under the routes they get: greedy sets of these alone."""
    layers, sizes = prompts.num_layers, wanted_sizes(prompts.num_layers, fit)
    chosen = router.choose(measured.means.to(router.device)).cpu()
    lost = measured.harm.gather(1, chosen[:, None])[:, 0]
    worst = lost.argsort(descending=True)[: fit.calibration_prompts].sort().values.tolist()
    order = elimination(layers, max(sizes), prompts.select(worst).mean_losses)
    sets, known = [routes_without(layers, order[:size]).tolist() for size in sizes], measured.routes.tolist()
    new = [each for each in sets if each not in known]
    return torch.tensor(new, dtype=torch.bool).reshape(len(new), layers)
