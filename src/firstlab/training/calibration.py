"""Calibration on training prompts: losses under given routes, and routers that start from a good static set.

A linear map without bias has no constant to set, so routers are fitted to the prompt tokens' hidden states: a ridge
regression, in closed form, of the logit that each prompt should get.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from firstlab.methods.base import routes_without, rows_of
from firstlab.model import PromptReading, RouterAugmentedLM, Routes, as_routes
from firstlab.model.layers import routing
from firstlab.model.routers import pool, probabilities_of, token_readings

Batch = dict[str, Tensor]
# Rounds of bisection that place a partly skipped layer at its rate.
_BISECTIONS = 12


@torch.no_grad()
def losses_under_routes(
    model: RouterAugmentedLM,
    batches: Sequence[Batch],
    routes: Tensor | Routes,
    readings: Iterable[PromptReading | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Response cross-entropy of every prompt when decode runs exactly `routes`.

    Args:
        model: The model.
        batches: Teacher-forced batches, N rows in all.
        routes: [L] boolean, or [N, L] with one row per prompt; or layers that the prompts do not run either.
        readings: The prompts of each batch as the model read them earlier, with every layer; by default they are read
            here. Of no use where prompts skip layers, too.

    Returns:
        (summed over response tokens [N], number of response tokens [N]), on the CPU.
    """
    sums, counts, seen = [], [], 0
    if as_routes(routes).skips_prompt:
        readings = [None] * len(batches)
    elif readings is None:
        readings = read_prompts(model, batches)
    for batch, reading in zip(batches, readings, strict=True):
        rows = range(seen, seen + len(batch["input_ids"]))
        seen = rows.stop
        labels = batch["labels"].masked_fill(batch["prompt_mask"].bool(), -100)
        forced = rows_of(routes, rows, labels.device)
        if reading is not None:
            out = model.respond(reading, labels, routes=forced)
        else:
            out = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=labels,
                prompt_mask=batch["prompt_mask"],
                objective="decode_consistent",
                routes=forced,
                keep_logits=False,
            )
        assert out.token_losses is not None
        sums.append(out.token_losses.sum(1).cpu())
        counts.append((labels[:, 1:] != -100).sum(1).cpu())
    return torch.cat(sums), torch.cat(counts)


@torch.no_grad()
def read_prompts(model: RouterAugmentedLM, batches: Iterable[Batch]) -> Iterator[PromptReading | None]:
    """The prompts of each batch, read when they are asked for; None where they cannot be read alone."""
    for batch in batches:
        yield model.read_prompts(batch["input_ids"], batch["attention_mask"], batch["prompt_mask"])


def rms_normed(states: Tensor) -> Tensor:
    """States [..., D] scaled to a root mean square of 1, as routers with `input_norm="rms"` read them."""
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)


class _Moments:
    """Routing that runs every layer and sums h hᵀ and t · h over prompt tokens, as the router sees them."""

    def __init__(self, model: RouterAugmentedLM) -> None:
        layers, size = model.routers.weight.shape
        self.input_norm = model.routers.settings.input_norm
        self.second = torch.zeros(layers, size, size, dtype=torch.float64)
        self.first = torch.zeros(layers, size, dtype=torch.float64)
        self.wanted = torch.zeros(layers, size, dtype=torch.float64)
        self.prompt_mask = torch.empty(0)
        self.logits = torch.empty(0)

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        mask = self.prompt_mask.to(hidden.device)
        states = hidden.float()
        if self.input_norm == "rms":
            states = rms_normed(states)
        # Every prompt weighs the same, however long it is.
        weights = mask / mask.sum(1, keepdim=True)
        weighted = states * weights.unsqueeze(-1)
        self.second[index] += (weighted.flatten(0, 1).T @ states.flatten(0, 1)).cpu().double()
        means = weighted.sum(1).cpu().double()
        self.first[index] += means.sum(0)
        self.wanted[index] += (means * self.logits[:, index : index + 1]).sum(0)
        return run()


@torch.no_grad()
def fit_routers(model: RouterAugmentedLM, batches: Sequence[Batch], logits: Tensor, ridge: float = 1e-3) -> Tensor:
    """Fit every router so that h · r is about `logits` on the tokens of each prompt.

    Args:
        model: Its routers are overwritten.
        batches: Batches of N prompts in all.
        logits: [N, L], wanted for each prompt and layer.
        ridge: Regularisation relative to the mean squared state.

    Returns:
        [L, D], the directions that give every prompt a logit of about 1: adding them shifts a router.
    """
    moments = _Moments(model)
    seen = 0
    for batch in batches:
        rows = len(batch["input_ids"])
        moments.prompt_mask = batch["prompt_mask"].bool()
        moments.logits = logits[seen : seen + rows].double()
        seen += rows
        with routing(moments):
            model.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    size = model.routers.weight.shape[1]
    shifts = torch.empty_like(model.routers.weight)
    for index in range(model.num_layers):
        second = moments.second[index]
        second = second + ridge * second.diagonal().mean() * torch.eye(size, dtype=torch.float64)
        both = torch.stack([moments.wanted[index], moments.first[index]], dim=1)
        weight, shift = torch.linalg.solve(second, both).unbind(1)
        model.routers.weight[index] = weight.to(model.routers.weight)
        shifts[index] = shift.to(shifts)
    return shifts


@torch.no_grad()
def start_routers(
    model: RouterAugmentedLM, batches: Sequence[Batch], order: Sequence[int], skip_rate: float, margin: float
) -> None:
    """Start the routers from a static set, at exactly the wanted skip rate.

    The first layers of `order` are skipped for every prompt (rho about threshold - margin), the others run
    (threshold + margin).
    Where skip_rate · L is not whole, one more layer is skipped for a share of the prompts: for those whose measured
    loss it changes least, as far as the router can tell them apart.

    Args:
        model: Its routers are overwritten.
        batches: Teacher-forced batches of training prompts.
        order: Layers in the order in which they are best skipped, at least ceil(skip_rate · L).
        skip_rate: In [0, 1).
        margin: Distance of rho from the threshold; both must lie in (0, 1).
    """
    layers, threshold = model.num_layers, model.routers.settings.threshold
    whole = math.floor(skip_rate * layers + 1e-9)
    share = skip_rate * layers - whole
    prompts = sum(len(batch["input_ids"]) for batch in batches)
    runs, skips = _logit(threshold + margin), _logit(threshold - margin)
    always = list(order[:whole])
    logits = torch.where(routes_without(layers, always), runs, skips).repeat(prompts, 1)
    if share < 1 / prompts:
        fit_routers(model, batches, logits)
        return
    partly = order[whole]
    kept, tokens = losses_under_routes(model, batches, routes_without(layers, always))
    dropped, _ = losses_under_routes(model, batches, routes_without(layers, [*always, partly]))
    harm = (dropped - kept) / tokens
    harm = (harm - harm.quantile(share)) / harm.std().clamp_min(1e-6)
    logits[:, partly] = (runs + skips) / 2 + (runs - skips) / 2 * harm.clamp(-2, 2)
    shift = fit_routers(model, batches, logits)[partly]
    _place(model, batches, partly, shift, share)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _place(model: RouterAugmentedLM, batches: Sequence[Batch], layer: int, shift: Tensor, share: float) -> None:
    """Move one router along `shift` until `share` of the prompts skip its layer."""
    start = model.routers.weight[layer].clone()
    # h · (start + x · shift) is linear in x, so the prompts are read once for all x.
    watch = _Readings(layer, (start, shift), model.routers.settings.input_norm)
    for batch in batches:
        with routing(watch):
            model.backbone(input_ids=batch["input_ids"], attention_mask=batch["prompt_mask"], use_cache=False)
    masks = [batch["prompt_mask"].bool() for batch in batches]
    low, high = -4.0, 4.0  # logits
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        rho = torch.cat(
            [
                pool(probabilities_of((at[0] + middle * along[0], *at[1:]), len(start)), mask.to(at[0].device))
                for (at, along), mask in zip(watch.readings, masks, strict=True)
            ]
        )
        if float((~model.routers.decide(rho)).float().mean()) > share:
            low = middle
        else:
            high = middle
    model.routers.weight[layer] = start + high * shift


class _Readings:
    """Routing that runs every layer and keeps what some weights read on the tokens in front of one of them."""

    def __init__(self, layer: int, weights: Sequence[Tensor], input_norm: str) -> None:
        self.layer, self.weights, self.input_norm = layer, weights, input_norm
        self.readings: list[list[tuple[Tensor, ...]]] = []

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        if index == self.layer:
            self.readings.append([token_readings(hidden, weight, self.input_norm) for weight in self.weights])
        return run()
