"""Find a few routes, each good for some kind of prompts, and fit routers that choose among them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from firstlab.methods.base import Prompts, check_count, routes_without
from firstlab.training.calibration import rms_normed, router_input
from firstlab.training.prompt_set import Batch, PromptSet, check_finite

_KMEANS_ROUNDS = 20
# No kind of prompt skips more than so many times the mean.
_DEPTH = 2
_FIT_STEPS = 150
_FIT_RATE = 0.02


def cluster(points: Tensor, size: int) -> Tensor:
    """[K, F] centres of [N, F] points by k-means, from far-apart points: the same for every seed.

    K is `size`, or less where points are alike: every centre has points.
    """
    if size > len(points):
        raise ValueError(
            f"method.codebook_size={size} is more than the {len(points)} training prompts to calibrate on: lower it, "
            "or raise method.calibration_prompts and data.train_size"
        )
    centres = points.mean(0, keepdim=True)
    for _ in range(size):
        farthest = torch.cdist(points, centres).min(1).values.argmax()
        centres = torch.cat([centres, points[farthest, None]])
    centres = centres[1:]
    for _ in range(_KMEANS_ROUNDS):
        chosen = nearest(points, centres)
        kept = [points[chosen == k].mean(0) if (chosen == k).any() else centres[k] for k in range(size)]
        centres = torch.stack(kept)
    return centres[nearest(points, centres).unique()]


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """[N], which of [K, F] centres is nearest to each of [N, F] points."""
    return torch.cdist(points, centres).argmin(1)


def greedy_orders(prompts: Prompts, chosen: Tensor, size: int, depth: int) -> list[list[int]]:
    """For each of K = `size` clusters, `depth` layers in the order in which they hurt its prompts least (SLEB).

    All clusters are searched in the same passes; `chosen` [N] is the cluster of each prompt. The first and the last
    layer stay.
    """
    layers = prompts.num_layers
    orders: list[list[int]] = [[] for _ in range(size)]
    between = range(1, layers - 1)
    title = "search layers to skip for each kind of prompts"
    total, shown = depth * len(between), prompts.progress_bar
    bar = tqdm(total=total, desc=title, unit="pass", disable=not shown, leave=False)
    for _ in range(depth):
        harm = torch.full((size, layers), torch.inf)
        for layer in between:
            routes = torch.stack([routes_without(layers, [*order, layer]) for order in orders])
            harm[:, layer] = _means(prompts.losses(routes[chosen]), chosen, size)
            bar.update()
        for cluster_harm, order in zip(harm, orders, strict=True):
            cluster_harm[order] = torch.inf
            order.append(int(cluster_harm.argmin()))
    bar.close()
    return orders


def loss_curves(prompts: Prompts, chosen: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """[K, depth + 1]: the mean loss of each cluster's prompts without the first 0, 1, ... layers of its order.

    The prompts must be other ones than the orders were found on, or what is best by chance looks harmless.
    """
    layers, depth = prompts.num_layers, len(orders[0])
    curves = []
    title = "measure what skipping costs"
    for count in tqdm(range(depth + 1), desc=title, unit="pass", disable=not prompts.progress_bar, leave=False):
        routes = torch.stack([routes_without(layers, order[:count]) for order in orders])
        curves.append(_means(prompts.losses(routes[chosen]), chosen, len(orders)))
    return torch.stack(curves, dim=1)


def allocate(curves: Tensor, shares: Tensor, budget: float) -> list[int]:
    """How many layers each cluster skips: where that costs least, `budget` on average over prompts.

    Steps of one or several layers are taken in the order of what a layer of them costs, by the `curves` of
    `loss_curves`; `shares` [K] are those of the prompts. The budget is missed by at most half of what a layer less in
    the smallest cluster would change.
    """
    counts, used = [0] * len(curves), 0.0
    slack = float(shares[shares > 0].min()) / 2
    while True:
        steps = [
            (float(curve[count + more] - curve[count]) / more, k, more)
            for k, (curve, count) in enumerate(zip(curves, counts, strict=True))
            for more in range(1, len(curve) - count)
            if shares[k] > 0 and used + more * float(shares[k]) <= budget + slack
        ]
        if not steps or used >= budget - slack:
            return counts
        _, k, more = min(steps)
        counts[k] += more
        used += more * float(shares[k])


def _means(losses: Tensor, chosen: Tensor, size: int) -> Tensor:
    """[K], the mean over each cluster's prompts; 0 without any."""
    counts = torch.bincount(chosen, minlength=size).clamp_min(1)
    return torch.zeros(size).index_add(0, chosen, losses.float()) / counts


def find_codebook(prompts: Prompts, chosen: Tensor, others: Prompts, measured: Tensor, skip_rate: float) -> Tensor:
    """A route for each of K clusters of prompts, [K, L], `skip_rate` on average; easy kinds of prompts skip more.

    Each cluster gets its own greedy order of layers from `prompts`, whose clusters are `chosen` [N]; the layers to skip
    are spent where `others`, whose clusters are `measured`, lose least.
    """
    layers, budget = prompts.num_layers, skip_rate * prompts.num_layers
    check_count(math.ceil(budget), layers, 1, 1)
    size = int(max(chosen.max(), measured.max())) + 1
    orders = greedy_orders(prompts, chosen, size, min(layers - 2, math.ceil(_DEPTH * budget)))
    shares = torch.bincount(measured, minlength=size) / len(measured)
    counts = allocate(loss_curves(others, measured, orders), shares, budget)
    return torch.stack([routes_without(layers, order[:count]) for order, count in zip(orders, counts, strict=True)])


def pooled_states(prompts: PromptSet) -> Tensor:
    """Mean state of each prompt in front of every layer, [N, L · D] fp32; tokens have a root mean square of 1."""
    found: list[list[Tensor]] = [[] for _ in range(prompts.num_layers)]

    def pool(batch: Batch, index: int, hidden: Tensor) -> None:
        mask = batch["prompt_mask"].bool().to(hidden.device)
        states = rms_normed(hidden.float()).masked_fill(~mask.unsqueeze(-1), 0)
        found[index].append((states.sum(1) / mask.sum(1, keepdim=True)).cpu())

    prompts.observe(pool, "read prompts")
    states = torch.cat([torch.cat(parts) for parts in found], dim=1)
    check_finite(states, "mean states of prompts")
    return states


def fit_to_routes(prompts: PromptSet, wanted: Tensor, *, margin: float, trained: int) -> Tensor:
    """Train the routers to give each prompt its route [N, L], rho at least `margin` on the right side of the threshold.

    The loss is the squared hinge of rho's distance from the threshold; it needs the states of all prompt tokens,
    tokens · L · D · 4 bytes. The first `trained` prompts are fitted, the others test it.

    Returns:
        [L], the share of right decisions on the prompts that were not fitted.
    """
    routers = prompts.model.layer_routers
    found: list[list[Tensor]] = [[] for _ in range(prompts.num_layers)]

    def keep(batch: Batch, index: int, hidden: Tensor) -> None:
        states = hidden[batch["prompt_mask"].bool().to(hidden.device)]
        found[index].append(router_input(states, routers.settings.input_norm).cpu())

    prompts.observe(keep, "read prompts")
    lengths = torch.cat([batch["prompt_mask"].sum(1) for batch in prompts.batches]).cpu()
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    threshold, sign = routers.settings.threshold, wanted.float() * 2 - 1
    accuracy = torch.ones(prompts.num_layers)
    bar = tqdm(found, desc="fit routers", unit="layer", disable=not prompts.progress_bar, leave=False)
    for index, parts in enumerate(bar):
        states = torch.cat(parts)
        seen = owner < trained
        weight = _fit_one(states[seen], owner[seen], lengths[:trained], sign[:trained, index], margin, threshold)
        routers.weight.data[index] = weight.to(routers.weight)
        rho = _rho(states, owner, lengths, weight)
        right = (rho >= threshold) == wanted[:, index]
        accuracy[index] = right[trained:].float().mean()
    return accuracy


def constant_accuracy(wanted: Tensor, trained: int) -> Tensor:
    """[L], what the decision that is right for most fitted prompts gets right on the others: the bar for a router."""
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
