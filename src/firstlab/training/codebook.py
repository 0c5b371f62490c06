"""A start that tells prompts apart: a few routes, each good for some prompts, and routers that choose among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlab.methods.base import Prompts, check_count, routes_without
from firstlab.model import RouterAugmentedLM
from firstlab.model.layers import routing
from firstlab.training.calibration import Batch

_KMEANS_ROUNDS = 20
_FIT_STEPS = 150
_FIT_RATE = 0.02


def loss_profiles(prompts: Prompts) -> Tensor:
    """[N, L]: change of each prompt's loss when decode skips that one layer."""
    layers = prompts.num_layers
    dense = prompts.losses(routes_without(layers, []))
    return torch.stack([prompts.losses(routes_without(layers, [i])) - dense for i in range(layers)], dim=1)


def cluster(points: Tensor, size: int) -> Tensor:
    """[N] cluster of each of [N, F] points by k-means, from far-apart points: the same for every seed."""
    centres = points.mean(0, keepdim=True)
    for _ in range(size):
        farthest = torch.cdist(points, centres).min(1).values.argmax()
        centres = torch.cat([centres, points[farthest, None]])
    centres = centres[1:]
    for _ in range(_KMEANS_ROUNDS):
        chosen = torch.cdist(points, centres).argmin(1)
        kept = [points[chosen == k].mean(0) if (chosen == k).any() else centres[k] for k in range(size)]
        centres = torch.stack(kept)
    return torch.cdist(points, centres).argmin(1)


def greedy_routes(prompts: Prompts, chosen: Tensor, size: int, count: int) -> Tensor:
    """[K, L]: for each cluster the layers switched off one by one, each time the one that hurts its prompts least.

    All clusters are searched in the same passes. The first and the last layer stay.

    Args:
        prompts: N prompts.
        chosen: [N], the cluster of each.
        size: K.
        count: Layers that every route skips.
    """
    layers = prompts.num_layers
    check_count(count, layers, 1, 1)
    routes = torch.ones(size, layers, dtype=torch.bool)
    for _ in range(count):
        harm = torch.full((size, layers), torch.inf)
        for layer in range(1, layers - 1):
            tried = routes.clone()
            tried[:, layer] = False
            sums = torch.zeros(size).index_add(0, chosen, prompts.losses(tried[chosen]).float())
            harm[:, layer] = sums.masked_fill(~routes[:, layer], torch.inf)
        routes[torch.arange(size), harm.argmin(1)] = False
    return routes


def find_codebook(prompts: Prompts, size: int, count: int, rounds: int) -> Tensor:
    """K routes [K, L] of `count` skipped layers, found in turn with the prompts that each is for.

    Prompts are clustered by their loss profiles first; each round finds every cluster's route and gives each prompt
    to the route with its lowest loss. With K = 1 it is the greedy static set (SLEB).

    Args:
        prompts: Training prompts.
        size: K.
        count: Layers that every route skips.
        rounds: At least 1.

    Raises:
        ValueError: Fewer prompts than routes, or more layers to skip than may be skipped.
    """
    if size > len(prompts):
        raise ValueError(
            f"method.codebook_size={size} is more than the {len(prompts)} training prompts to calibrate on: lower it, "
            "or raise method.calibration_prompts and data.train_size"
        )
    if size == 1:
        return greedy_routes(prompts, torch.zeros(len(prompts), dtype=torch.long), 1, count)
    profiles = loss_profiles(prompts)
    scale = profiles.std(0, keepdim=True).clamp_min(1e-6)
    chosen = cluster((profiles - profiles.mean(0)) / scale, size)
    for step in range(rounds):
        routes = greedy_routes(prompts, chosen, size, count)
        if step + 1 < rounds:
            chosen = best_of(prompts, routes)
    return routes


def best_of(prompts: Prompts, routes: Tensor) -> Tensor:
    """[N]: which of the [K, L] routes costs each prompt least."""
    return torch.stack([prompts.losses(route) for route in routes]).argmin(0)


class _PromptStates:
    """Routing that runs every layer and keeps the prompt tokens' states as the router sees them."""

    def __init__(self, model: RouterAugmentedLM) -> None:
        self.input_norm = model.routers.settings.input_norm
        self.states: list[list[Tensor]] = [[] for _ in range(model.num_layers)]
        self.prompt_mask = torch.empty(0)

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        states = hidden[self.prompt_mask.to(hidden.device)].float()
        if self.input_norm == "rms":
            states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)
        self.states[index].append(states.cpu())
        return run()


def fit_to_routes(
    model: RouterAugmentedLM, batches: Sequence[Batch], wanted: Tensor, margin: float, trained: int
) -> Tensor:
    """Train the routers to give each prompt its route, rho at least `margin` on the right side of the threshold.

    The loss is the squared hinge of rho's distance from the threshold; it needs the states of all prompt tokens,
    tokens · L · D · 4 bytes.

    Args:
        model: Its routers are overwritten.
        batches: N prompts in all.
        wanted: [N, L], their routes.
        margin: In (0, 0.5).
        trained: The first so many prompts are fitted, the others test it.

    Returns:
        [L], the share of right decisions on the prompts that were not fitted.
    """
    with torch.no_grad():
        cache = _PromptStates(model)
        for batch in batches:
            cache.prompt_mask = batch["prompt_mask"].bool()
            with routing(cache):
                model.lm.base_model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                )
    lengths = torch.cat([batch["prompt_mask"].sum(1) for batch in batches]).cpu()
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    threshold, sign = model.routers.settings.threshold, wanted.float() * 2 - 1
    accuracy = torch.ones(model.num_layers)
    for index, parts in enumerate(cache.states):
        states = torch.cat(parts)
        seen = owner < trained
        weight = _fit_one(states[seen], owner[seen], lengths[:trained], sign[:trained, index], margin, threshold)
        model.routers.weight.data[index] = weight.to(model.routers.weight)
        rho = _rho(states, owner, lengths, weight)
        right = (rho >= threshold) == wanted[:, index]
        accuracy[index] = right[trained:].float().mean()
    return accuracy


def constant_accuracy(wanted: Tensor, trained: int) -> Tensor:
    """[L], what the decision that is right for most fitted prompts gets right on the others: the bar for a router.

    Args:
        wanted: [N, L], the routes of all prompts.
        trained: The first so many prompts are fitted.
    """
    usual = wanted[:trained].float().mean(0) >= 0.5
    return (wanted[trained:] == usual).float().mean(0)


def _rho(states: Tensor, owner: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
    return torch.zeros(len(lengths)).index_add(0, owner, torch.sigmoid(states @ weight)) / lengths


def _fit_one(states: Tensor, owner: Tensor, lengths: Tensor, sign: Tensor, margin: float, threshold: float) -> Tensor:
    weight = torch.zeros(states.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=_FIT_RATE)
    for _ in range(_FIT_STEPS):
        short = F.relu(margin - sign * (_rho(states, owner, lengths, weight) - threshold))
        if not bool(short.any()):
            break
        optimizer.zero_grad()
        torch.autograd.backward([short.square().mean()])
        optimizer.step()
    return weight.detach()


def threshold_at(rho: Tensor, skip_rate: float) -> float:
    """The threshold below which round(skip_rate · N · L) of the rho [N, L] lie: one offset for all layers."""
    ordered = rho.flatten().sort().values.double()
    count = round(skip_rate * len(ordered))
    low = ordered[count - 1] if count > 0 else torch.tensor(0.0)
    high = ordered[count] if count < len(ordered) else torch.tensor(1.0)
    return float((low + high) / 2)
