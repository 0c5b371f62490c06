"""How a method wants its routers started and trained: plain data, which `firstlab.training` carries out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RoutingObjective:
    """How a training pass is routed, and what drives the skip rate; see `TeacherForcedPass` and §4.1.

    Attributes:
        objective: "soft" (paper) or "decode_consistent".
        gate: "soft", "hard" or "bernoulli".
        pooled_tokens: "sequence" (paper) or "prompt".
        multiplier: α in phase 1, β in phase 2; the starting value when there is a target.
        target_skip: Wanted skip rate in (0, 1), or None to keep the multiplier fixed.
        dual_rate: Step size of the dual ascent on the multiplier.
        tolerance: Distance to the target that "best by validation" forgives.
        lam: λ of the router regulariser.
        hold_routes: Phase 2: weight of the squared distance between rho with and without LoRA, summed over layers.
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
    """Routers calibrated on training prompts before any gradient step.

    Attributes:
        margin: Distance of every rho from the threshold.
        skip_rate: Share of layers skipped at the start; 0 is dense.
        calibration_prompts: The first so many training prompts are used.
        search_width: Of the search for the static set to skip; 1 is greedy.
        codebook_size: Kinds of prompts with a set of their own; 1 is one set for all.
        fit_prompts: Training prompts behind the first ones that a codebook is measured and fitted on.
    """

    margin: float
    skip_rate: float
    calibration_prompts: int
    search_width: int = 1
    codebook_size: int = 1
    fit_prompts: int = 0

    def check(self, threshold: float) -> None:
        """Raises ValueError if routers with this threshold would have to start at no probability."""
        if not self.margin < threshold < 1 - self.margin:
            raise ValueError(
                f"method.start_margin={self.margin} on both sides of router.threshold={threshold} leaves the "
                "probabilities between 0 and 1; lower the margin, or choose method.start=random"
            )


@dataclass(frozen=True, kw_only=True)
class RouteFit:
    """How a router over whole routes is fitted; see `firstlab.training.route_fit`.

    Attributes:
        skip_rate: The rate over tokens that is wanted where none is named.
        highest_skip: The largest sets of the codebook: room above the wanted rates, without which there is nothing left
            to allocate.
        sizes: Sizes of sets, evenly spread up to the highest.
        swaps: Further routes of every size that differ from its set by one exchange.
        calibration_prompts: Training prompts that sets are searched on.
        fit_prompts: Training prompts that are measured under every route.
        grow_rounds: How often sets for the prompts that lose most are added.
        any_speed: Train one LoRA under routes of all rates, instead of those of the wanted rate.
    """

    skip_rate: float
    highest_skip: float
    sizes: int
    swaps: int
    calibration_prompts: int
    fit_prompts: int
    grow_rounds: int
    any_speed: bool
