"""Start routers from a good static set of layers: a ridge regression of the logit that each prompt should get.

A linear map without bias has no constant to set, so it is fitted to the prompt tokens' hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from firstlab.methods.base import routes_without
from firstlab.model.routers import pool, probabilities_of, token_readings
from firstlab.training.prompt_set import Batch, PromptSet, check_finite, losses_under_routes

# Rounds of bisection that place a partly skipped layer at its rate.
_BISECTIONS = 12


def router_input(states: Tensor, input_norm: str) -> Tensor:
    """Hidden states [..., D] as a router sees them, fp32: with "rms" scaled to a root mean square of 1."""
    states = states.float()
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6) if input_norm == "rms" else states


@torch.no_grad()
def fit_routers(prompts: PromptSet, logits: Tensor, ridge: float = 1e-3) -> Tensor:
    """Fit every router of the prompts' model so that h · r is about `logits` [N, L] on the tokens of each prompt.

    `ridge` is relative to the mean squared state. Returns [L, D], the directions that give every prompt a logit of
    about 1: adding them shifts a router.
    """
    routers = prompts.model.layer_routers
    layers, size = routers.weight.shape
    second = torch.zeros(layers, size, size, dtype=torch.float64)  # Σ h hᵀ
    first, wanted = torch.zeros(2, layers, size, dtype=torch.float64)  # Σ h and Σ logit · h

    def add(batch: Batch, index: int, hidden: Tensor, output: Tensor) -> None:
        mask = batch["prompt_mask"].bool().to(hidden.device)
        states = router_input(hidden, routers.settings.input_norm)
        # Every prompt weighs the same, however long it is.
        weighted = states * (mask / mask.sum(1, keepdim=True)).unsqueeze(-1)
        second[index] += (weighted.flatten(0, 1).T @ states.flatten(0, 1)).cpu().double()
        means = weighted.sum(1).cpu().double()
        first[index] += means.sum(0)
        wanted[index] += (means * logits[batch["index"].cpu(), index, None].double()).sum(0)

    prompts.observe(add, "fit routers")
    check_finite(second, "products of hidden states")
    shifts = torch.empty_like(routers.weight)
    for index, products in enumerate(second):
        regular = products + ridge * products.diagonal().mean() * torch.eye(size, dtype=torch.float64)
        weight, shift = torch.linalg.solve(regular, torch.stack([wanted[index], first[index]], dim=1)).unbind(1)
        routers.weight[index], shifts[index] = weight.to(routers.weight), shift.to(shifts)
    return shifts


@torch.no_grad()
def start_routers(prompts: PromptSet, order: Sequence[int], *, skip_rate: float, margin: float) -> None:
    """Start the routers from a static set, at exactly the wanted skip rate.

    The first layers of `order`, best skipped first, are skipped for every prompt (rho about threshold - margin), the
    others run (threshold + margin). Where skip_rate · L is not whole, one more layer is skipped for a share of the
    prompts: for those whose measured loss it changes least, as far as the router can tell them apart.
    """
    layers, threshold = prompts.num_layers, prompts.model.layer_routers.settings.threshold
    whole = math.floor(skip_rate * layers + 1e-9)
    share = skip_rate * layers - whole
    runs, skips = _logit(threshold + margin), _logit(threshold - margin)
    always = list(order[:whole])
    logits = torch.where(routes_without(layers, always), runs, skips).repeat(len(prompts), 1)
    if share < 1 / len(prompts):
        fit_routers(prompts, logits)
        return
    partly = order[whole]
    kept, tokens = losses_under_routes(prompts.model, prompts.batches, routes_without(layers, always))
    dropped, _ = losses_under_routes(prompts.model, prompts.batches, routes_without(layers, [*always, partly]))
    harm = (dropped - kept) / tokens
    check_finite(harm, "changes of a prompt's loss")
    harm = (harm - harm.quantile(share)) / harm.std().clamp_min(1e-6)
    logits[:, partly] = (runs + skips) / 2 + (runs - skips) / 2 * harm.clamp(-2, 2)
    _place(prompts, partly, fit_routers(prompts, logits)[partly], share)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _place(prompts: PromptSet, layer: int, shift: Tensor, share: float) -> None:
    """Move one router along `shift` until `share` of the prompts skip its layer."""
    routers = prompts.model.layer_routers
    start = routers.weight[layer].clone()
    # h · (start + x · shift) is linear in x, so the prompts are read once for all x.
    found: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]] = []

    def read(batch: Batch, index: int, hidden: Tensor, output: Tensor) -> None:
        if index == layer:
            at, along = (token_readings(hidden, weight, routers.settings.input_norm) for weight in (start, shift))
            found.append((at, along, batch["prompt_mask"].bool().to(hidden.device)))

    prompts.observe(read, "meet the skip rate", attention_mask="prompt_mask")
    low, high = -4.0, 4.0  # logits
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        moved = (((at[0] + middle * along[0], *at[1:]), mask) for at, along, mask in found)
        rho = torch.cat([pool(probabilities_of(readings, len(start)), mask) for readings, mask in moved])
        skipped = float((~routers.decide(rho)).float().mean())
        low, high = (middle, high) if skipped > share else (low, middle)
    routers.weight[layer] = start + high * shift


@torch.no_grad()
def fit_to_decisions(prompts: PromptSet, decided: Tensor, margin: float = 0.1) -> float:
    """Fit per-layer routers anew so that prompts keep their routes `decided` [N, L], where the states have changed.

    `margin` is the distance of rho from the threshold that is aimed at. Returns the share of decisions kept.
    """
    threshold = prompts.model.layer_routers.settings.threshold
    fit_routers(prompts, torch.where(decided, _logit(threshold + margin), _logit(threshold - margin)))
    return float((prompts.routed() == decided).float().mean())
