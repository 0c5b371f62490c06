"""Route router: one router over whole routes reads the prompt, at any skip rate, without a gradient step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from firstlab.methods.base import RoutedMethod
from firstlab.methods.objective import RouteFit


@dataclass
class RouteChoice(RouteFit, RoutedMethod):
    """A codebook of routes, and the prompt's predicted harm under each; see `RouteRouter`."""

    name: ClassVar[str] = "routes"
    router_kind: ClassVar[str] = "routes"
    least: ClassVar[Mapping[str, float]] = {
        "sizes": 1, "swaps": 0, "calibration_prompts": 1, "fit_prompts": 8, "grow_rounds": 0, "draw_power": 0.01,
    }  # fmt: skip
    target_skip: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_skip <= self.highest_skip < 1:
            raise ValueError(
                f"method.highest_skip={self.highest_skip} must be at least method.target_skip={self.target_skip} and "
                "below 1; room above the wanted rates is what prompts are told apart by"
            )

    def rounding(self, num_layers: int) -> None:
        """Nothing is rounded, but the largest sets must leave the first and the last layer."""
        largest, most = math.ceil(round(self.highest_skip * num_layers, 9)), num_layers - 2
        if largest > most:
            remedy = f"give at most {math.floor(1e3 * most / num_layers) / 1e3:g}" if most > 0 else "choose method=none"
            raise ValueError(
                f"method.highest_skip={self.highest_skip} of {num_layers} layers is {largest}, but the first and the "
                f"last are kept: {remedy}"
            )

    def route_fit(self) -> RouteFit:
        return self
