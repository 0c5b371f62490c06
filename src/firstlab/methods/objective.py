"""How a method wants its routers started and trained: plain data, which `firstlab.training` carries out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RoutingObjective:
    """How a training pass is routed (see `TeacherForcedPass`), and what drives the skip rate (see `First`).

    `multiplier` is α in phase 1 and β in phase 2, its starting value when there is a `target_skip`.
    """

    objective: str = "soft"
    gate: str = "soft"
    pooled_tokens: str = "sequence"
    multiplier: float = 0.0
    target_skip: float | None = None
    dual_rate: float = 0.0
    tolerance: float = 0.02
    lam: float = 0.01
    hold_routes: float = 0.0


@dataclass(frozen=True)
class RouterStart:
    """Routers calibrated on training prompts before any gradient step; see `First`.

    A `skip_rate` of 0 is dense. The `fit_prompts` come behind the first `calibration_prompts`.
    """

    margin: float
    skip_rate: float
    calibration_prompts: int
    search_width: int = 1
    codebook_size: int = 1
    fit_prompts: int = 0

    def check(self, threshold: float) -> None:
        """Refuse a threshold from which routers cannot keep their margin within the probabilities."""
        if not self.margin < threshold < 1 - self.margin:
            raise ValueError(
                f"method.start_margin={self.margin} on both sides of router.threshold={threshold} leaves the "
                "probabilities between 0 and 1; lower the margin, or choose method.start=random"
            )


@dataclass(kw_only=True)
class RouteFit:
    """How a router over whole routes is fitted; see `firstlab.training.route_fit`."""

    target_skip: float  # the rate over tokens where none is named
    # What the largest sets of the codebook skip: room above the wanted rates, without which there is nothing left to
    # allocate.
    highest_skip: float = 0.45
    sizes: int = 4  # of sets, evenly spread up to the highest
    swaps: int = 8  # further routes of every size that differ from its set by one exchange
    calibration_prompts: int = 192  # training prompts that sets are searched on
    fit_prompts: int = 2000  # training prompts that are measured under every route, a quarter of them held out
    grow_rounds: int = 1  # how often sets for the prompts that still lose most are added
    any_speed: bool = True  # train one LoRA under routes of all rates, instead of those of the wanted rate
    # These are the highest times u ** draw_power, u even in [0, 1]: 0.5 favours high ones. None: 1 on a mixture of
    # tasks, whose prompts share the skipping unevenly anyway, and 0.5 within one.
    draw_power: float | None = None

    def check_rates(self, rates: Sequence[float]) -> None:
        """Raises ValueError for rates at which a model is to be evaluated, and that it will not reach."""
        if above := [rate for rate in rates if rate > self.highest_skip]:
            raise ValueError(
                f"evaluation.skip_rates={above} must lie between 0 and method.highest_skip={self.highest_skip}, what "
                "the largest sets of the codebook skip: lower the one or raise the other"
            )
