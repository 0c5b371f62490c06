"""No skipping: the base model, and the base model with LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from firstlab.methods.base import Method


@dataclass
class Dense(Method):
    """Every layer runs for every token."""

    name: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        if self.target_skip is not None:
            raise ValueError(f"method.target_skip={self.target_skip} has no meaning with method=none; leave it out")

    def fixed_routes(self, num_layers: int, loss_of: Callable[[Tensor], float]) -> Tensor:
        """All true."""
        return torch.ones(num_layers, dtype=torch.bool)
