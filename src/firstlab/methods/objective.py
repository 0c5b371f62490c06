"""How a method wants its routers started and trained: plain data, which `firstlab.training` carries out."""

from __future__ import annotations

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
