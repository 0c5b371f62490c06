"""Route router: one router over whole routes reads the prompt, at any skip rate, without a gradient step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from firstlab.methods.base import Method, Prompts
from firstlab.methods.objective import RouteFit


@dataclass
class RouteChoice(Method):
    """A codebook of routes, and the prompt's predicted harm under each; see `RouteRouter`.

    Attributes:
        target_skip: The rate over tokens where none is named; a trained model takes any up to `highest_skip`.
        highest_skip: What the largest sets of the codebook skip, above all rates that will be asked for.
        sizes: Sizes of sets in the codebook, evenly spread up to the highest.
        swaps: Routes of every size that differ from its best set by one exchange.
        calibration_prompts: Training prompts on which sets are searched.
        fit_prompts: Training prompts that are measured under every route, a quarter of them held out.
        grow_rounds: How often sets for the prompts that still lose most are added.
        any_speed: LoRA is trained under routes of all rates, so that one adapter serves each of them; else under those
            of target_skip.
    """

    name: ClassVar[str] = "routes"
    trains_routers: ClassVar[bool] = True
    chooses_on_prompts: ClassVar[bool] = True
    router_kind: ClassVar[str] = "routes"
    least: ClassVar[Mapping[str, float]] = {
        "sizes": 1, "swaps": 0, "calibration_prompts": 1, "fit_prompts": 8, "grow_rounds": 0,
    }  # fmt: skip
    target_skip: float | None = 0.25
    highest_skip: float = 0.45
    sizes: int = 4
    swaps: int = 4
    calibration_prompts: int = 192
    fit_prompts: int = 2000
    grow_rounds: int = 1
    any_speed: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_skip is None:
            raise ValueError("method.target_skip=null: routes needs the rate that holds where none is named, e.g. 0.25")
        if not self.target_skip <= self.highest_skip < 1:
            raise ValueError(
                f"method.highest_skip={self.highest_skip} must be at least method.target_skip={self.target_skip} and "
                "below 1; room above the wanted rates is what prompts are told apart by"
            )

    def route_fit(self) -> RouteFit:
        """See the attributes."""
        assert self.target_skip is not None
        return RouteFit(
            skip_rate=self.target_skip,
            highest_skip=self.highest_skip,
            sizes=self.sizes,
            swaps=self.swaps,
            calibration_prompts=self.calibration_prompts,
            fit_prompts=self.fit_prompts,
            grow_rounds=self.grow_rounds,
            any_speed=self.any_speed,
        )

    def routes(self, prompts: Prompts) -> None:
        """The router decides."""
        return None
