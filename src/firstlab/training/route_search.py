"""Search the codebook of a `RouteRouter`: greedy sets of several sizes, their swaps, and more for those who lose."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firstlab.methods.base import check_count, routes_without
from firstlab.methods.objective import RouteFit
from firstlab.model.route_router import RouteRouter
from firstlab.store.files import read_own, write_atomically
from firstlab.store.ranks import barrier, rank
from firstlab.training.prompt_set import PromptSet
from firstlab.training.route_fit import Measured

CODEBOOK = "codebook.json"


def find_codebook(prompts: PromptSet, fit: RouteFit) -> Tensor:
    """[K, L] routes, the dense one first: greedy sets of several sizes, and their best swaps.

    Sets are searched on all prompts and on each part of a mixture by itself.

    Args:
        prompts: Training prompts to search on, of all parts.
        fit: The method's.

    Raises:
        ValueError: More layers to skip than may be skipped.
    """
    layers = prompts.num_layers
    sizes = wanted_sizes(layers, fit)
    found = {tuple([True] * layers)}
    for group in _groups(prompts):
        sets = _greedy_sets(group, max(sizes))
        share = 1.0 if len(group) == len(prompts) else len(group) / len(prompts)
        if len(group) == len(prompts):  # of every size, to fall back on
            found.update(tuple(each.tolist()) for each in sets)
        for size in sizes:
            found.add(tuple(sets[size].tolist()))
            swaps = math.ceil(fit.swaps * share)
            found.update(tuple(route.tolist()) for route in _best_swaps(group, sets[size], swaps))
    return torch.tensor(sorted(found, key=lambda route: (-sum(route), route)))


def wanted_sizes(num_layers: int, fit: RouteFit) -> list[int]:
    """Numbers of skipped layers, evenly spread up to the highest rate, with those next to the method's own rate."""
    most = math.ceil(fit.highest_skip * num_layers)
    check_count(most, num_layers, 1, 1)
    spread = {round(most * step / fit.sizes) for step in range(1, fit.sizes + 1)}
    own = fit.skip_rate * num_layers
    return sorted({size for size in spread | {math.floor(own), math.ceil(own)} if 0 < size <= most})


def _groups(prompts: PromptSet) -> list[PromptSet]:
    """All prompts, then those of each part of a mixture."""
    parts = sorted({example.part for example in prompts.examples})
    rows = [[i for i, example in enumerate(prompts.examples) if example.part == part] for part in parts]
    return [prompts, *(prompts.select(each) for each in rows if len(parts) > 1)]


def _greedy_sets(prompts: PromptSet, depth: int) -> list[Tensor]:
    """[L] routes without 0 … `depth` layers, switched off one by one where the loss rises least (SLEB)."""
    layers = prompts.num_layers
    routes = [routes_without(layers, [])]
    for size in range(1, depth + 1):
        route = routes[-1]
        candidates = torch.stack([route & (torch.arange(layers) != i) for i in _free(route)])
        routes.append(candidates[int(_mean_losses(prompts, candidates, f"search {size} of {depth} layers").argmin())])
    return routes


def _best_swaps(prompts: PromptSet, route: Tensor, count: int) -> list[Tensor]:
    """The `count` best routes that run one skipped layer of `route` in the place of one that it runs."""
    swapped = []
    for opened in (~route).nonzero()[:, 0].tolist():
        for closed in _free(route):
            other = route.clone()
            other[opened], other[closed] = True, False
            swapped.append(other)
    if count == 0 or not swapped:
        return []
    candidates = torch.stack(swapped)
    order = _mean_losses(prompts, candidates, f"swap one of {int((~route).sum())} layers").argsort()
    return list(candidates[order[:count]])


def _free(route: Tensor) -> list[int]:
    """Layers that a route runs and may skip."""
    return [i for i in range(1, len(route) - 1) if route[i]]


def _mean_losses(prompts: PromptSet, routes: Tensor, title: str) -> Tensor:
    """[K], the mean over prompts: every prompt counts, however long its response."""
    return prompts.losses_each(routes, title).mean(0)


def saved_codebook(directory: Path, prompts: PromptSet, fit: RouteFit) -> Tensor:
    """The codebook of a run: searched once, by one process, and kept in its directory."""
    file = directory / CODEBOOK
    if not file.is_file() and rank()[0] == 0:
        write_atomically(file, json.dumps({"routes": find_codebook(prompts, fit).tolist()}) + "\n")
    barrier()

    def parse(saved: Any) -> Tensor:
        found = torch.tensor(saved["routes"])
        if found.dtype != torch.bool or found.ndim != 2 or found.shape[1] != prompts.num_layers or not found[0].all():
            raise ValueError("it holds no routes of this model")
        return found

    return read_own(file, parse)


def grown(measured: Measured, router: RouteRouter, prompts: PromptSet, fit: RouteFit) -> Tensor:
    """[M, L] more routes for the prompts that lose most under the routes they get: greedy sets of these alone."""
    chosen = router.choose(measured.means.to(router.device)).cpu()
    lost = measured.harm.gather(1, chosen[:, None])[:, 0]
    worst = lost.argsort(descending=True)[: fit.calibration_prompts].sort().values.tolist()
    sizes = wanted_sizes(prompts.num_layers, fit)
    known = {tuple(route) for route in measured.routes.tolist()}
    sets = _greedy_sets(prompts.select(worst), max(sizes))
    new = [sets[size].tolist() for size in sizes if tuple(sets[size].tolist()) not in known]
    return torch.tensor(new, dtype=torch.bool).reshape(len(new), prompts.num_layers)
