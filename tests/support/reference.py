"""An independent, slow reference of the inference rule: full recompute, no cache, plain forward hooks."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The longest ModuleList of the model."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def without_layers(model: PreTrainedModel, ran: Tensor) -> PreTrainedModel:
    """A copy whose other layers are deleted, and the rest renumbered in modules and config."""
    model = deepcopy(model)
    layers, config = decoder_layers(model), model.config
    for index in (~ran).nonzero().flatten().flip(0).tolist():
        del layers[index]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [kind for kind, runs in zip(config.layer_types, ran.tolist(), strict=True) if runs]
    return model


def gated_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, gates: Tensor) -> Tensor:
    """Logits of one full pass in which layer l maps token t of row b to its input wherever gates[b, t, l] is false."""
    inputs: dict[int, Tensor] = {}

    def before(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    def after(index: int) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            keep = gates[:, :, index].unsqueeze(-1)
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = torch.where(keep, hidden, inputs[index])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    hooks = []
    for i, layer in enumerate(decoder_layers(model)):
        hooks.append(layer.register_forward_pre_hook(before(i), with_kwargs=True))
        hooks.append(layer.register_forward_hook(after(i)))
    extra = {}
    if "position_ids" in signature(model.forward).parameters:
        extra["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits
    for hook in hooks:
        hook.remove()
    return logits


def slow_generate(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, routes: Tensor, new_tokens: int, eos: int = 2, pad: int = 0
) -> Tensor:
    """Greedy decoding: prompt tokens run every layer, new tokens only those of `routes` [B, L]; left-padded prompts."""
    prompt = ids.shape[1]
    finished = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(new_tokens):
        gates = routes[:, None, :].expand(-1, ids.shape[1], -1).clone()
        gates[:, :prompt] = True
        token = gated_logits(model, ids, mask, gates)[:, -1].argmax(-1)
        token = torch.where(finished, pad, token)
        ids = torch.cat([ids, token[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(token)[:, None]], dim=1)
        finished |= token == eos
        if finished.all():
            break
    return ids


def decode_gates(prompt_length: int, total: int, routes: Tensor) -> Tensor:
    """[B, total, L]: prompt tokens run every layer, later ones those of `routes` [B, L]."""
    gates = routes[:, None, :].expand(-1, total, -1).clone()
    gates[:, :prompt_length] = True
    return gates


def step_logits(model: PreTrainedModel, sequences: Tensor, mask: Tensor, routes: Tensor) -> Tensor:
    """Logits [B, new, V] from which each new token of `sequences` was chosen, by one full pass without a cache.

    `mask` [B, prompt] covers the left-padded prompt.
    """
    prompt_length = mask.shape[1]
    new = sequences.shape[1] - prompt_length
    full = torch.cat([mask, mask.new_ones(len(mask), new)], dim=1)
    logits = gated_logits(model, sequences, full, decode_gates(prompt_length, sequences.shape[1], routes))
    return logits[:, prompt_length - 1 : -1]


def prompt_rho(model: PreTrainedModel, weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """rho [B, L] row by row, without padding, from the inputs of the layers of an unskipped pass."""
    rows = []
    for row_ids, row_mask in zip(ids, mask, strict=True):
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seen: list[Tensor] = seen) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder_layers(model)]
        with torch.no_grad():
            model(input_ids=row_ids[row_mask.bool()][None], use_cache=False)
        for hook in hooks:
            hook.remove()
        rows.append(torch.stack([(h[0] @ r).sigmoid().mean() for h, r in zip(seen, weight, strict=True)]))
    return torch.stack(rows).detach()


def slow_scheduled(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, schedule: Tensor, new_tokens: int
) -> tuple[Tensor, Tensor]:
    """Greedy decoding in which the response's t-th token runs `schedule[min(t, S - 1)]`; left-padded prompts, no EOS.

    Returns (sequences, logits [B, new, V]).
    """
    prompt, logits = ids.shape[1], []
    for _ in range(new_tokens):
        gates = torch.ones(len(ids), ids.shape[1], schedule.shape[1], dtype=torch.bool)
        for t in range(ids.shape[1] - prompt):
            gates[:, prompt + t] = schedule[min(t, len(schedule) - 1)]
        logits.append(gated_logits(model, ids, mask, gates)[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids, torch.stack(logits, dim=1)


def layer_cosines(model: PreTrainedModel, index: int, run: Any) -> Tensor:
    """[B] cosine of input and output of one layer at the last position, in the pass that `run` makes."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = (args[0] if args else kwargs["hidden_states"])[:, -1]
        after = (output[0] if isinstance(output, tuple) else output)[:, -1]
        found.append((before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1))

    handle = decoder_layers(model)[index].register_forward_hook(hook, with_kwargs=True)
    run()
    handle.remove()
    return found[0]


def slow_early_exit(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, confidence: str, thresholds: list[float], min_layers: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy decoding of len(thresholds) + 1 tokens with early exit, for every depth a full pass; no EOS.

    What the head says after d layers is what the model says when the newest token passes by all layers from d on.
    Returns (sequences, logits [B, new, V], ran [B, new - 1, L]).
    """
    rows, prompt, layers = len(ids), ids.shape[1], len(decoder_layers(model))
    gates = torch.ones(rows, prompt, layers, dtype=torch.bool)
    logits = [gated_logits(model, ids, mask, gates)[:, -1]]
    for threshold in thresholds:
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
        depth = torch.full((rows,), layers)
        for d in range(layers - 1, min_layers - 1, -1):
            newest = (torch.arange(layers) < d).expand(rows, 1, -1)
            tried = torch.cat([gates, newest], dim=1)
            if confidence == "cosine":
                sure = layer_cosines(model, d - 1, partial(gated_logits, model, ids, mask, tried))
            else:
                best = gated_logits(model, ids, mask, tried)[:, -1].softmax(-1).sort(-1, descending=True).values
                sure = best[:, 0] - (best[:, 1] if confidence == "gap" else 0)
            depth = torch.where(sure >= threshold, d, depth)
        gates = torch.cat([gates, (torch.arange(layers) < depth[:, None])[:, None]], dim=1)
        logits.append(gated_logits(model, ids, mask, gates)[:, -1])
    sequences = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return sequences, torch.stack(logits, dim=1), gates[:, prompt:]
