"""A router over whole routes: predict what each route of a codebook costs this prompt, and take the best bargain.

Shapes: B batch, T tokens, D hidden size, L layers, K routes, F = 5 · D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from firstlab.model.settings import RouterSettings

# exp of a predicted log length stays finite, whatever the prompt.
_LONGEST_LOG_LENGTH = 12.0


def read_layers(num_layers: int) -> list[int]:
    """The layers whose input is read: 1, L/4, L/2, 3L/4 and L - 1, as far as they differ."""
    wanted = (1, num_layers // 4, num_layers // 2, 3 * num_layers // 4, num_layers - 1)
    return sorted({min(max(layer, 0), num_layers - 1) for layer in wanted})


class RouteRouter(nn.Module):
    """Choose a whole route for a prompt, at any skip rate, from one closed-form fit.

    z(x) [F] is the mean over the prompt's tokens of the hidden states in front of a few layers, each state divided by
    its root mean square. Of K routes, route k skips the share skip(k) of the layers, and

        harm_k(x) = w_k · z(x) + b_k          predicted rise of the response's loss per token above dense
        n(x)      = exp(v · z(x) + c)         predicted length of the response in tokens
        route(x)  = argmin_k harm_k(x) - μ · n(x) · skip(k)

    μ, the price of time, follows from the wanted skip rate by a table that was solved over tokens on held-out prompts.
    Scores count prompts and time counts tokens, hence n(x); with `price="tokens"` it is left out. `price="size"` has no
    price at all: the least harm among the routes of one size, the rule of PuDDing (Wee et al., ICML 2025), whose router
    is a text encoder of its own.

    `firstlab.training.route_fit` fits it. A fresh one knows the dense route alone.
    """

    codebook: Tensor  # [K, L], 1 where the layer runs; the first route is dense
    harm_weight: Tensor  # w, [K, F]
    harm_bias: Tensor  # b, [K]
    length_weight: Tensor  # v, [F]
    length_bias: Tensor  # c, []
    rates: Tensor  # [M], ascending: skip rates over tokens
    prices: Tensor  # [M], the μ that makes each
    default_rate: Tensor  # [], where no rate is named

    def __init__(self, num_layers: int, hidden_size: int, settings: RouterSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or RouterSettings(kind="routes")
        self.hidden_size = hidden_size
        self.read_layers = read_layers(num_layers)
        features = len(self.read_layers) * hidden_size
        self.set_fit(length_weight=torch.zeros(features), length_bias=torch.zeros(()), default_rate=torch.zeros(()))
        self._set_sizes(routes=1, num_layers=num_layers, prices=1)

    def _set_sizes(self, routes: int, num_layers: int, prices: int) -> None:
        self.set_fit(
            codebook=torch.ones(routes, num_layers),
            harm_weight=torch.zeros(routes, len(self.length_weight)),
            harm_bias=torch.zeros(routes),
            rates=torch.zeros(prices),
            prices=torch.zeros(prices),
        )

    def set_fit(self, **tensors: Tensor) -> None:
        """Replace buffers by tensors of a fit, kept in fp32 on the router's device."""
        device = next(self.buffers(), torch.empty(0)).device
        for name, value in tensors.items():
            self.register_buffer(name, value.detach().to(device, torch.float32).contiguous())

    def make_room(self, found: Mapping[str, Tensor]) -> None:
        """Take the number of routes and of prices from saved tensors, whose values are copied afterwards."""
        codebook, rates = found.get("codebook"), found.get("rates")
        if codebook is None or rates is None or codebook.ndim != 2 or rates.ndim != 1 or not len(codebook):
            raise ValueError("holds no codebook [routes, layers] and no rates [prices]")
        if not ((codebook == 0) | (codebook == 1)).all() or not codebook[0].all():
            raise ValueError("codebook must hold 0 and 1, and begin with the dense route")
        if not len(rates) or (rates.diff() < 0).any():
            raise ValueError("rates must ascend")
        self._set_sizes(len(codebook), self.num_layers, len(rates))

    @property
    def num_layers(self) -> int:
        return self.codebook.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codebook.device

    @property
    def skips(self) -> Tensor:
        """[K], the share of layers that each route skips."""
        return 1 - self.codebook.mean(1)

    @property
    def highest_rate(self) -> float:
        """The highest that can be asked for."""
        return float(self.rates[-1])

    # -- what the cache and the passes ask, as of `Routers` --

    def readings(self, hidden: Tensor, layer_index: int, pooled_tokens: Tensor | None = None) -> tuple[Tensor, ...]:
        """(Σ over pooled tokens of h / rms(h),), [B, D] fp32, in front of a layer that is read; else nothing."""
        if layer_index not in self.read_layers:
            return ()
        hidden = hidden.float()
        scale = torch.rsqrt(hidden.square().mean(-1) + 1e-6)
        if pooled_tokens is not None:
            pooled_tokens = pooled_tokens.to(hidden.device)
            # Filled, not multiplied: attention may leave NaN at padding.
            hidden = hidden.masked_fill(~pooled_tokens.unsqueeze(-1), 0)
            scale = scale.masked_fill(~pooled_tokens, 0)
        return ((scale.unsqueeze(1) @ hidden).squeeze(1),)

    def sums(self, readings: Sequence[Sequence[Tensor]], pooled_tokens: Tensor) -> Tensor:
        """[B, F], the readings of all layers side by side."""
        return torch.cat([part.to(self.device) for each in readings for part in each], dim=1)

    def decision(self, means: Tensor, skip_rate: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The decision for prompts with features [B, F], as rho [B, L] in {0, 1} and as routes [B, L]."""
        route = self.codebook[self.choose(means, skip_rate)]
        return route, route > 0.5

    def decide(self, rho: Tensor) -> Tensor:
        """Routes from rho, any shape."""
        return rho > 0.5

    def squared_norm(self) -> Tensor:
        """No regularisation loss: nothing here is trained by a gradient."""
        return self.harm_bias.new_zeros(())

    # -- the rule --

    def predicted_harm(self, means: Tensor) -> Tensor:
        """[B, K], the predicted rise of each prompt's loss per token under each route."""
        return means.float() @ self.harm_weight.T + self.harm_bias

    def predicted_length(self, means: Tensor) -> Tensor:
        """[B], the predicted number of response tokens."""
        return (means.float() @ self.length_weight + self.length_bias).clamp_max(_LONGEST_LOG_LENGTH).exp()

    def choose(self, means: Tensor, skip_rate: float | Tensor | None = None) -> Tensor:
        """[B], the place in the codebook of each prompt's route; z [B, F], one rate or [B], None for the default.

        A rate of 0 is dense decoding, also of prompts for which a shorter route promises less than no harm.
        """
        rate = self.checked_rate(skip_rate).to(means.device)
        chosen = self.cheapest(self.predicted_harm(means), self.predicted_length(means), rate, self.price(rate))
        return chosen.masked_fill(rate == 0, 0)

    def cheapest(self, harm: Tensor, length: Tensor, rate: Tensor, price: Tensor) -> Tensor:
        """[B], the place of each prompt's route, from what is predicted: harm [B, K] and length [B].

        `price="size"` chooses by the wanted rate, [] or [B]; the others by the price μ, [] or [B].
        """
        if self.settings.max_harm is not None:
            too_much = harm > self.settings.max_harm
            too_much[:, 0] = False
            harm = harm.masked_fill(too_much, torch.inf)
        if self.settings.price == "size":
            # The routes of the size nearest to the wanted one.
            distance = (self.skips - rate.reshape(-1, 1)).abs()
            other = distance > distance.min(1, keepdim=True).values + 1e-6
            cost = harm.masked_fill(other, torch.inf)
            cost[:, 0] = cost[:, 0].nan_to_num(posinf=torch.finfo(cost.dtype).max)  # where the floor forbids them
        else:
            paid = price * length if self.settings.price == "length" else price
            cost = harm - paid.reshape(-1, 1) * self.skips
        return cost.argmin(1)

    def price(self, skip_rate: Tensor) -> Tensor:
        """μ for skip rates of any shape, linear between the table's entries."""
        if len(self.rates) == 1:
            return self.prices[0].expand(skip_rate.shape)
        rates, prices = self.rates, self.prices
        above = torch.searchsorted(rates, skip_rate.contiguous()).clamp(1, len(rates) - 1)
        share = (skip_rate - rates[above - 1]) / (rates[above] - rates[above - 1]).clamp_min(1e-9)
        return torch.lerp(prices[above - 1], prices[above], share.clamp(0, 1))

    def checked_rate(self, skip_rate: float | Tensor | None, rows: int | None = None) -> Tensor:
        """The wanted rate as a tensor, [] or [B]; ValueError for one out of range, or not one per row."""
        if skip_rate is None:
            return self.default_rate
        try:
            rate = torch.as_tensor(skip_rate, dtype=torch.float32, device=self.device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"skip_rate={skip_rate!r} must be a number, or a tensor of one per prompt") from error
        if rate.ndim > 1 or (rows is not None and rate.ndim == 1 and len(rate) != rows):
            raise ValueError(
                f"skip_rate has shape {list(rate.shape)} for {rows} prompts; give one rate, or one per prompt"
            )
        highest = self.highest_rate
        if not bool(((rate >= 0) & (rate <= highest + 1e-6)).all()):
            raise ValueError(
                f"skip_rate={rate.tolist() if rate.ndim else skip_rate} must lie between 0 and {highest:.3g}, the "
                "highest rate that this model's codebook of routes reaches"
            )
        return rate

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RouteRouter:
        # Follow the model to its device, never to its dtype.
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, after in list(self.named_buffers()):
            if after.dtype != torch.float32:
                self._buffers[name] = before[name].to(after.device)
        return self
