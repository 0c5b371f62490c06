"""Calibration on training prompts: the loss under given routes, and routers that start from given routes.

A linear map without bias has no constant to set, so a router that says "run" or "skip" for every prompt is fitted to
the hidden states: a ridge regression, in closed form, of the wanted logit on the prompt tokens' states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from firstlab.model import RouterAugmentedLM
from firstlab.model.layers import routing

Batch = dict[str, Tensor]


@torch.no_grad()
def loss_under_routes(model: RouterAugmentedLM, batches: Sequence[Batch], routes: Tensor) -> float:
    """Mean response cross-entropy when decode runs exactly `routes`.

    Args:
        model: The model.
        batches: Teacher-forced batches.
        routes: [L] boolean.
    """
    total, count = 0.0, 0
    for batch in batches:
        labels = batch["labels"].masked_fill(batch["prompt_mask"].bool(), -100)
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            prompt_mask=batch["prompt_mask"],
            labels=labels,
            objective="decode_consistent",
            routes=routes.to(labels.device),
        )
        tokens = int(out.loss_terms["token_count"])
        total += float(out.loss) * tokens
        count += tokens
    return total / count


class _Moments:
    """Routing that runs every layer and sums h hᵀ and h over prompt tokens, as the router sees them."""

    def __init__(self, model: RouterAugmentedLM) -> None:
        layers, size = model.routers.weight.shape
        self.input_norm = model.routers.settings.input_norm
        self.second = torch.zeros(layers, size, size, dtype=torch.float64)
        self.first = torch.zeros(layers, size, dtype=torch.float64)
        self.count = 0
        self.prompt_mask = torch.empty(0)

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        states = hidden[self.prompt_mask.to(hidden.device)].float()
        if self.input_norm == "rms":
            states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)
        self.second[index] += (states.T @ states).cpu().double()
        self.first[index] += states.sum(0).cpu().double()
        return run()


@torch.no_grad()
def start_routers(
    model: RouterAugmentedLM, batches: Sequence[Batch], routes: Tensor, margin: float, ridge: float = 1e-3
) -> None:
    """Set the routers so that rho is about 0.5 + margin where `routes` is true and 0.5 - margin where it is false.

    Args:
        model: Its routers are overwritten.
        batches: Teacher-forced batches; only their prompts are read.
        routes: [L] boolean.
        margin: Distance of rho from the threshold, in (0, 0.5).
        ridge: Regularisation relative to the mean squared state.
    """
    moments = _Moments(model)
    for batch in batches:
        moments.prompt_mask = batch["prompt_mask"].bool()
        moments.count += int(moments.prompt_mask.sum())
        with routing(moments):
            model.lm.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logit = math.log((0.5 + margin) / (0.5 - margin))
    size = model.routers.weight.shape[1]
    for index in range(model.num_layers):
        target = logit if routes[index] else -logit
        second = moments.second[index] / moments.count
        second += ridge * second.diagonal().mean() * torch.eye(size, dtype=torch.float64)
        weight = torch.linalg.solve(second, target * moments.first[index] / moments.count)
        model.routers.weight[index] = weight.to(model.routers.weight)
