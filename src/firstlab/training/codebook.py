"""Find a few routes, each good for some kind of prompts, and fit routers that choose among them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from firstlab.methods.base import check_count, routes_without
from firstlab.methods.sleb import elimination
from firstlab.training.calibration import router_input
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


def allocate(curves: Tensor, shares: Tensor, budget: float) -> list[int]:
    """How many layers each cluster skips: where that costs least, `budget` on average over prompts.

    Steps of one or several layers are taken in the order of what a layer of them costs, by the `curves` [K, depth + 1]
    of mean losses without 0, 1, ... layers; `shares` [K] are those of the prompts. The budget is missed by at most half
    of what a layer less in the smallest cluster would change.
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


def find_codebook(prompts: PromptSet, chosen: Tensor, others: PromptSet, measured: Tensor, skip_rate: float) -> Tensor:
    """A route for each of K clusters of prompts, [K, L], `skip_rate` on average; easy kinds of prompts skip more.

    Each cluster gets its own greedy order of layers from `prompts`, whose clusters are `chosen` [N]; the layers to skip
    are spent where `others`, whose clusters are `measured`, lose least: on the same prompts, what is best by chance
    would look harmless. The first and the last layer stay.
    """
    layers, budget = prompts.num_layers, skip_rate * prompts.num_layers
    check_count(math.ceil(budget), layers, 1, 1)
    depth = min(layers - 2, math.ceil(_DEPTH * budget))
    shares = torch.bincount(measured, minlength=int(chosen.max()) + 1) / len(measured)
    nested, curves = [], torch.zeros(len(shares), depth + 1)
    for kind, share in enumerate(shares):
        order = elimination(layers, depth, prompts.select((chosen == kind).nonzero()[:, 0].tolist()).mean_losses)
        nested.append(torch.stack([routes_without(layers, order[:count]) for count in range(depth + 1)]))
        if share > 0:
            of_kind = others.select((measured == kind).nonzero()[:, 0].tolist())
            curves[kind] = torch.tensor(of_kind.mean_losses(nested[-1], "measure what skipping costs"))
    return torch.stack([routes[count] for routes, count in zip(nested, allocate(curves, shares, budget), strict=True)])


def pooled_states(prompts: PromptSet) -> Tensor:
    """Mean state of each prompt in front of every layer, [N, L · D] fp32; tokens have a root mean square of 1."""
    found: list[list[Tensor]] = [[] for _ in range(prompts.num_layers)]

    def pool(batch: Batch, index: int, hidden: Tensor, output: Tensor) -> None:
        mask = batch["prompt_mask"].bool().to(hidden.device)
        states = router_input(hidden, "rms").masked_fill(~mask.unsqueeze(-1), 0)
        found[index].append((states.sum(1) / mask.sum(1, keepdim=True)).cpu())

    prompts.observe(pool, "read prompts")
    states = torch.cat([torch.cat(parts) for parts in found], dim=1)
    check_finite(states, "mean states of prompts")
    return states


def fit_to_routes(prompts: PromptSet, wanted: Tensor, *, margin: float, trained: int) -> Tensor:
    """Train the routers to give each prompt its route [N, L], rho at least `margin` on the right side of the threshold.

    The loss is the squared hinge of rho's distance from the threshold; it needs the states of all prompt tokens,
    tokens · L · D · 4 bytes. The first `trained` prompts are fitted. Returns [L], the share of right decisions on the
    others.
    """
    routers = prompts.model.layer_routers
    found: list[list[Tensor]] = [[] for _ in range(prompts.num_layers)]

    def keep(batch: Batch, index: int, hidden: Tensor, output: Tensor) -> None:
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
        right = (_rho(states, owner, lengths, weight) >= threshold) == wanted[:, index]
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
