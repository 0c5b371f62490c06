"""No skipping: the base model, and the base model with LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from firstlab.methods.base import Method, Prompts, routes_without


@dataclass
class Dense(Method):
    """Every layer runs for every token."""

    name: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        if self.target_skip is not None:
            raise ValueError(f"method.target_skip={self.target_skip} has no meaning with method=none; leave it out")

    def routes(self, prompts: Prompts) -> Tensor:
        return routes_without(prompts.num_layers, [])
