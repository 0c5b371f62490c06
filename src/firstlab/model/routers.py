"""Routers: one linear map per layer, and the paper's equations around it (§4.1, §4.3).

Shapes: B batch, T tokens, D hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from firstlab.model.settings import RouterSettings


def token_readings(hidden: Tensor, weight: Tensor, input_norm: str = "none") -> tuple[Tensor, ...]:
    """(h · r,) of hidden [B, T, D] and a router [D], and with "rms" also ||h||; [B, T] fp32 each, in any dtype.

    "none" is the paper's; "rms" divides h by its root mean square, so the router's size does not depend on that of h.
    """
    kind = hidden.device.type
    # Asked first: entering the context costs more than the product.
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        hidden = hidden.float()
        product = hidden @ weight.to(hidden.device)
        # The norm is one kernel without a [B, T, D] temporary, which the mean of squares needs.
        return (product,) if input_norm == "none" else (product, torch.linalg.vector_norm(hidden, dim=-1))


def probabilities_of(readings: Sequence[Tensor], hidden_size: int) -> Tensor:
    """p = sigmoid(h · r) per token (§4.1), of `token_readings`, tensors of any one shape."""
    logits = readings[0]
    if len(readings) == 2:
        logits = logits * torch.rsqrt(readings[1].square() / hidden_size + 1e-6)
    return torch.sigmoid(logits)


def pool(probabilities: Tensor, pooled_tokens: Tensor) -> Tensor:
    """rho [B] = mean of p [B, T] over the pooled tokens [B, T] boolean (§4.1); 0 for a row without any."""
    # Filled, not multiplied: attention may leave NaN at padding.
    total = probabilities.masked_fill(~pooled_tokens, 0).sum(-1)
    return total / pooled_tokens.sum(-1).clamp_min(1)


def decide(rho: Tensor, threshold: float = 0.5) -> Tensor:
    """route = (rho >= threshold), true where the layer runs in decode (§4.3). Any shape."""
    return rho >= threshold


def straight_through(rho: Tensor, decision: Tensor) -> Tensor:
    """The hard decision in the forward pass with the gradient of rho. Any shape."""
    return decision.to(rho.dtype) + (rho - rho.detach())


def mix(hidden: Tensor, output: Tensor, gate: Tensor) -> Tensor:
    """h + g · phi(h), exact at g = 0 and g = 1, of a layer's input h and output h + phi(h) [B, T, D]; gate [B, T]."""
    return torch.lerp(hidden, output, gate.to(output.dtype).unsqueeze(-1).expand_as(output))


@contextmanager
def float32_kept(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it, these float32 parameters may change their device, and keep their type and values."""
    before = [(parameter, parameter.data) for parameter in parameters if parameter.dtype == torch.float32]
    yield
    for parameter, data in before:
        if parameter.dtype != torch.float32:
            parameter.data = data.to(parameter.device)


class Routers(nn.Module):
    """One router r_i in R^D per layer, without bias, kept in fp32 on whatever device the model is."""

    def __init__(self, num_layers: int, hidden_size: int, settings: RouterSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or RouterSettings()
        bound = hidden_size**-0.5  # as a standard linear layer, which puts every rho near 0.5
        self.weight = nn.Parameter(torch.empty(num_layers, hidden_size).uniform_(-bound, bound))

    @property
    def num_layers(self) -> int:
        return self.weight.shape[0]

    def probabilities(self, hidden: Tensor, layer_index: int) -> Tensor:
        """p of one layer, [B, T, D] -> [B, T] fp32."""
        return probabilities_of(self.readings(hidden, layer_index), hidden.shape[-1])

    def rho_of_constant(self, hidden: Tensor, pooled_tokens: Tensor, layer_index: int) -> Tensor:
        """rho [B] of hidden states [B, T, D] that need no gradient, with the gradient of the router.

        Backward through `pool(probabilities(...))` would keep the states of all tokens; this keeps a [B, D] derivative.
        """
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            probabilities = self.probabilities(hidden, layer_index)
            states = hidden.float().masked_fill(~pooled_tokens.unsqueeze(-1), 0)
            slope = probabilities * (1 - probabilities)
            if self.settings.input_norm == "rms":
                slope = slope * torch.rsqrt(states.square().mean(-1) + 1e-6)
            slope = slope.masked_fill(~pooled_tokens, 0) / pooled_tokens.sum(-1, keepdim=True).clamp_min(1)
            derivative = (slope.unsqueeze(1) @ states).squeeze(1)
            rho = pool(probabilities, pooled_tokens)
        with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
            weight = self.weight[layer_index].to(hidden.device)
            return rho + derivative @ (weight - weight.detach())

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def readings(self, hidden: Tensor, layer_index: int, pooled_tokens: Tensor | None = None) -> tuple[Tensor, ...]:
        """`token_readings` of one layer, [B, T, D] -> [B, T] fp32 each."""
        return token_readings(hidden, self.weight[layer_index], self.settings.input_norm)

    def sums(self, readings: Sequence[Sequence[Tensor]], pooled_tokens: Tensor) -> Tensor:
        """[B, L] fp32 on the first layer's device: sums of p over the pooled tokens [B, T], from all readings."""
        device = readings[0][0].device
        stacked = [torch.stack([x.to(device) for x in each], dim=1) for each in zip(*readings, strict=True)]
        probabilities = probabilities_of(stacked, self.weight.shape[1])
        # Filled, not multiplied: attention may leave NaN at padding.
        return probabilities.masked_fill(~pooled_tokens.to(device).unsqueeze(1), 0).sum(-1)

    def decision(self, means: Tensor, skip_rate: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """rho [B, L], which is the mean that was measured, and the routes [B, L] that follow from it."""
        return means, self.decide(means)

    def checked_rate(self, skip_rate: float | Tensor | None, rows: int | None = None) -> None:
        """Raises ValueError if a rate is asked for: it was fixed in training."""
        if skip_rate is not None:
            raise ValueError(
                f"skip_rate={skip_rate} needs router.kind=routes; routers per layer skip at the rate they learned"
            )

    def decide(self, rho: Tensor) -> Tensor:
        """Routes from rho, any shape."""
        return decide(rho, self.settings.threshold)

    def squared_norm(self) -> Tensor:
        """Regularisation loss of §4.1: sum over layers of ||r_i||², a scalar."""
        return self.weight.square().sum()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Routers:
        # Follow the model to its device, never to its dtype.
        with float32_kept([self.weight]):
            super()._apply(fn, recurse)
        return self
