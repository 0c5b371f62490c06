"""FiRST: routers read the prompt and decide; in the paper's form and in ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from firstlab.methods.base import RoutedMethod, check_count
from firstlab.methods.objective import RouterStart, RoutingObjective
from firstlab.model.teacher_forcing import GATES, OBJECTIVES, POOLED_TOKENS

# Chosen on validation prompts: without it LoRA scatters the routes of prompts near the threshold.
_HOLD = 10.0


@dataclass
class First(RoutedMethod):
    """Input-adaptive routing (§4)."""

    name: ClassVar[str] = "first"
    least: ClassVar[Mapping[str, float]] = {
        "alpha": 0, "beta": 0, "lam": 0, "dual_rate": 0, "tolerance": 0, "hold_routes": 0,
        "calibration_prompts": 1, "codebook_size": 1, "fit_prompts": 4, "search_width": 1,
    }  # fmt: skip
    most: ClassVar[Mapping[str, float]] = {"search_width": 64}
    choices: ClassVar[Mapping[str, Sequence[str]]] = {
        "objective": OBJECTIVES, "gate": GATES, "lora_gate": GATES, "pooled_tokens": POOLED_TOKENS,
        "start": ("random", "dense", "static", "codebook"),
    }  # fmt: skip
    alpha: float = 0.0  # α of the non-skip penalty, or its starting value when there is a target
    beta: float | None = None  # β of phase 2; None is α / 3 (A.4)
    lam: float = 0.01  # λ of the router regulariser
    objective: str = "decode_consistent"  # of the training pass, see `TeacherForcedPass`, as the next three
    gate: str = "hard"
    lora_gate: str = "hard"  # in phase 2
    pooled_tokens: str = "prompt"
    # "random" (paper: rho near 0.5), "dense" (every rho at threshold + start_margin), "static" (at threshold ±
    # start_margin according to the SLEB set at the target) or "codebook" (such a set for every kind of prompts, more
    # layers for kinds that need less of them, and routers fitted to tell the kinds apart).
    start: str = "static"
    start_margin: float = 0.1
    dual_rate: float = 0.1  # step size of the dual ascent on α and β towards target_skip
    tolerance: float = 0.02  # distance to the target that model selection forgives
    calibration_prompts: int = 128
    search_width: int = 1  # of the search for the static set, see `SLEB`; 1 is greedy
    codebook_size: int = 4  # K, the number of kinds of prompts (clusters of their states); 1 is the static start
    # Further training prompts for a codebook: they measure what skipping costs each kind, and the routers are fitted to
    # three quarters of them; the last quarter measures the fit.
    fit_prompts: int = 256
    # Weight in phase 2 of the squared distance of rho from what it is without LoRA, so that prompts keep the routes of
    # phase 1 while LoRA changes the states that the routers read. None: 10 where phase 1 decides routes as inference
    # does, else 0.
    hold_routes: float | None = None
    calibrate_rate: bool = False  # after phase 1, move the threshold so that validation prompts skip target_skip
    # Phase 1 only puts the routers at their start; they are trained together with LoRA, for the steps of phase 2 and
    # with both learning rates.
    one_phase: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.start_margin < 0.5:
            raise ValueError(f"method.start_margin={self.start_margin} must lie between 0 and 0.5")
        if self.start in ("static", "codebook") and self.target_skip is None:
            raise ValueError(
                f"method.start={self.start} needs method.target_skip; or choose method.start=random or dense"
            )
        if self.calibrate_rate and self.target_skip is None:
            raise ValueError("method.calibrate_rate=true needs method.target_skip")
        if self.calibrate_rate and self.one_phase:
            raise ValueError(
                "method.calibrate_rate=true moves the threshold after phase 1, and method.one_phase=true trains the "
                "routers after it: drop one of them"
            )
        if self.hold_routes and not self._decides_before_lora:
            raise ValueError(
                f"method.hold_routes={self.hold_routes} holds routes of a phase 1 with "
                "method.objective=decode_consistent and method.one_phase=false: set these, or method.hold_routes=0"
            )
        if self.search_width > 1 and self.start != "static":
            raise ValueError(
                f"method.search_width={self.search_width} searches the static set, and method.start={self.start}: "
                "set method.start=static, or method.search_width=1"
            )
        if self.start == "codebook" and self.codebook_size > self.calibration_prompts:
            raise ValueError(
                f"method.codebook_size={self.codebook_size} exceeds method.calibration_prompts="
                f"{self.calibration_prompts}: lower the one or raise the other"
            )

    @property
    def _decides_before_lora(self) -> bool:
        return self.objective == "decode_consistent" and not self.one_phase

    @property
    def label(self) -> str:
        level = f"a{self.alpha:g}" if self.target_skip is None else f"skip{self.target_skip:g}"
        form = "first" if self.objective == "decode_consistent" else "first_soft"
        return f"{form}-{level}"

    @property
    def level(self) -> str:
        return super().level or f"α = {self.alpha:g}"

    @property
    def threshold_skip(self) -> float | None:
        return self.target_skip if self.calibrate_rate else None

    def rounding(self, num_layers: int) -> None:
        """Nothing is rounded, but a start from layers to skip must leave the first and the last."""
        if (start := self.router_start()) is not None:
            check_count(math.ceil(start.skip_rate * num_layers), num_layers, 1, 1)

    def router_start(self) -> RouterStart | None:
        if self.start == "random":
            return None
        several = self.start == "codebook" and self.codebook_size > 1  # of one route it is the static start
        return RouterStart(
            margin=self.start_margin,
            skip_rate=0.0 if self.start == "dense" else self.target_skip or 0.0,
            calibration_prompts=self.calibration_prompts,
            search_width=self.search_width,
            codebook_size=self.codebook_size if several else 1,
            fit_prompts=self.fit_prompts if several else 0,
        )

    def training_objective(self, phase: str, reached: float | None = None) -> RoutingObjective:
        """α prices the layers that run in phase 1 (§4.1), β in phase 2 (§4.2); both follow the target, if any."""
        in_phase_1 = phase == "router"
        alpha = self.alpha if in_phase_1 or self.target_skip is None or reached is None else reached
        beta = alpha / 3 if self.beta is None else self.beta
        usual = _HOLD if self._decides_before_lora else 0.0
        hold = usual if self.hold_routes is None else self.hold_routes
        return RoutingObjective(
            objective=self.objective,
            gate=self.gate if in_phase_1 else self.lora_gate,
            pooled_tokens=self.pooled_tokens,
            multiplier=alpha if in_phase_1 else beta,
            target_skip=self.target_skip,
            dual_rate=self.dual_rate,
            tolerance=self.tolerance,
            lam=self.lam,
            hold_routes=0.0 if in_phase_1 else hold,
        )
