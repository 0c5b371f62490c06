"""Separate prompts from responses in teacher-forced rows, for passes whose prompt path needs no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True)
class Layout:
    """Where the tokens of each row go: prompts padded on the left, responses right behind them, padded on the right.

    Made on the host, it costs no wait for the device.
    """

    columns: Tensor  # [B, P + R], the column each token comes from
    real: Tensor  # [B, P + R] boolean, false on padding
    prompt_length: int  # P

    @classmethod
    def of(cls, prompt: Tensor, response: Tensor) -> Layout | None:
        """Of tokens [B, T] boolean each; None if one side is empty or a prompt token stands behind a response."""
        longest, room = int(prompt.sum(1).max()), int(response.sum(1).max())
        if 0 in (longest, room) or (prompt & (response.cumsum(1) > 0)).any():
            return None
        before = prompt.long().argsort(dim=1, stable=True)[:, prompt.shape[1] - longest :]
        behind = response.long().argsort(dim=1, descending=True, stable=True)[:, :room]
        real = torch.cat([prompt.gather(1, before), response.gather(1, behind)], 1)
        return cls(torch.cat([before, behind], 1), real, longest)

    def take(self, values: Tensor) -> Tensor:
        """[B, T] -> [B, P + R]; whatever stands there on padding."""
        return values.gather(1, self.columns.to(values.device, non_blocking=True))

    def put_back(self, values: Tensor, length: int) -> Tensor:
        """[B, P + R] -> [B, `length`], 0 where no token came from."""
        columns, real = (each.to(values.device, non_blocking=True) for each in (self.columns, self.real))
        return values.new_zeros(len(values), length).scatter_add(1, columns, values.masked_fill(~real, 0))


class PromptCache(DynamicCache):
    """Keys and values of prompts. Once `frozen`, later tokens attend to them and leave nothing behind.

    So a layer may run any number of times on the same tokens, which gradient checkpointing does. Every layer keeps the
    whole prompt; windows are a matter of the mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)


@dataclass(frozen=True)
class PromptReading:
    """All that responses need of their prompts: reading it once serves any number of passes over the responses."""

    layout: Layout
    ids: Tensor  # [B, P + R]
    cache: PromptCache  # frozen
    states: Tensor  # [B, P, D], the decoder's output on the prompts
    rho: Tensor  # [B, L], with the routers' gradient where there is one

    @property
    def num_bytes(self) -> int:
        layers: list[Any] = self.cache.layers
        return self.states.nbytes + sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
