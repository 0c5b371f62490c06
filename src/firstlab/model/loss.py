"""Compute losses over large vocabularies: logits only where they predict a label, and in chunks.

Shapes: B batch, T tokens, N positions that predict a label, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast


def predicting(labels: Tensor, attended: Tensor) -> Tensor:
    """[N], the places among B · T whose next token is labelled (not -100); padding predicts nothing."""
    wanted = (labels[:, 1:] != -100) & attended[:, :-1]
    return F.pad(wanted, (0, 1)).flatten().nonzero().squeeze(1)


class OutputHead:
    """What a model does to the output of its module named `decoder`, [N, D] -> [N, V], with gradient.

    It is the model itself around a decoder that returns its input, so projections, biases, scales and caps are its own.
    """

    def __init__(self, model: PreTrainedModel, decoder: str) -> None:
        self._model: Any = _with_module(model, decoder, _Identity())

    def __call__(self, states: Tensor) -> Tensor:
        # Not `self._model(...)`: hooks are the whole model's business.
        return type(self._model).forward(self._model, inputs_embeds=states[None], use_cache=False).logits[0]


@dataclass
class _DecoderOutput(MoeModelOutputWithPast):
    """Every field that a language model reads from its decoder's output."""

    cross_attentions: Any = None
    shared_kv_states: Any = None


class _Identity(nn.Module):
    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=inputs_embeds)  # type: ignore[arg-type]


def _with_module(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """A shallow copy of `root` with another module at `name`; `root` stays as it is."""
    shell = copy(root)
    shell.__dict__.pop("forward", None)  # a hook of accelerate, which would call `root`
    first, _, rest = name.partition(".")
    inner = _with_module(root.get_submodule(first), rest, module) if rest else module
    shell._modules = {**root._modules, first: inner}
    return shell


def labelled_losses(
    found: Tensor,
    head: Callable[[Tensor], Tensor] | None,
    labels: Tensor,
    attended: Tensor,
    chunk: int,
    kernel: str = "torch",
) -> dict[str, Tensor | None]:
    """`loss`, `token_losses`, `states` of a `RouterAugmentedOutput`, and the number `count` of label tokens.

    `found` is [B, T, D] states, or [B, T, V] logits where there is no head; the logits of `chunk` positions exist at a
    time, and `kernel` ("torch" or "liger") computes the cross-entropy. Nothing waits for the device of `found` if
    labels and mask are on the host.
    """
    places = predicting(labels, attended)
    count = torch.full((), len(places), device=found.device)
    given = places, labels.flatten()[places + 1]
    places, targets = (each.to(found.device, non_blocking=True) for each in given)
    states = found.flatten(0, 1).index_select(0, places)
    losses = token_cross_entropy(head or nn.Identity(), states, targets, chunk, kernel)
    token_losses = losses.new_zeros(labels.numel()).index_copy(0, places + 1, losses.detach()).view(labels.shape)
    loss = losses.sum() / count.clamp_min(1)
    return {"loss": loss, "token_losses": token_losses, "states": None if head is None else states, "count": count}


def in_chunks(function: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, which treats every row by itself, applied to `size` rows at a time.

    With a gradient, several chunks are computed again in the backward pass: only one chunk's logits exist at a time.
    """
    chunks = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
    if len(chunks) == 1:
        return function(*chunks[0])
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])


def token_cross_entropy(
    head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, chunk: int, kernel: str = "torch"
) -> Tensor:
    """[N] fp32 cross-entropy of `targets` [N] by `head` on `states` [N, D], `chunk` positions at a time."""

    def losses(states: Tensor, targets: Tensor) -> Tensor:
        logits = head(states)
        targets = targets.to(logits.device)
        if kernel == "liger":
            # A copy, in whose place the kernel puts the gradient.
            return liger_cross_entropy(logits.to(torch.float32, copy=True), targets)
        return F.cross_entropy(logits.float(), targets, reduction="none")

    return in_chunks(losses, chunk, states, targets)


def liger_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[N] cross-entropy of logits [N, V], which it overwrites, and its gradient in one kernel."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    losses: Tensor = LigerCrossEntropyFunction.apply(logits, targets, None, -100, 0.0, 0.0, "none")[0]
    return losses
