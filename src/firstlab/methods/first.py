"""FiRST: routers read the prompt and decide; in the paper's form and in ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from firstlab.methods.base import Method

STARTS = ("random", "dense", "static")


@dataclass
class First(Method):
    """Input-adaptive routing (§4).

    Attributes:
        alpha: α of the non-skip penalty, or its starting value when there is a target.
        beta: β of phase 2; None is α / 3 (A.4).
        lam: λ of the router regulariser.
        objective, gate, pooled_tokens: The training pass, see `TeacherForcedPass`.
        lora_gate: Gate of phase 2.
        start: "random" (paper: rho near 0.5), "dense" (every rho at 0.5 + start_margin) or "static" (rho at
            0.5 ± start_margin according to the SLEB set at the target).
        start_margin: Distance of the calibrated start from the threshold.
        dual_rate: Step size of the dual ascent on α and β towards target_skip.
        tolerance: Distance to the target that model selection forgives.
        calibration_prompts: Training prompts for a calibrated start.
    """

    name: ClassVar[str] = "first"
    trains_routers: ClassVar[bool] = True
    alpha: float = 0.0
    beta: float | None = None
    lam: float = 0.01
    objective: str = "decode_consistent"
    gate: str = "hard"
    lora_gate: str = "hard"
    pooled_tokens: str = "prompt"
    start: str = "static"
    start_margin: float = 0.1
    dual_rate: float = 0.1
    tolerance: float = 0.02
    calibration_prompts: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("alpha", "beta", "lam", "dual_rate", "tolerance"):
            value = getattr(self, option)
            if value is not None and value < 0:
                raise ValueError(f"method.{option}={value} must not be negative")
        for option, allowed in (
            ("objective", ("soft", "decode_consistent")),
            ("gate", ("soft", "hard", "bernoulli")),
            ("lora_gate", ("soft", "hard", "bernoulli")),
            ("pooled_tokens", ("sequence", "prompt")),
            ("start", STARTS),
        ):
            if getattr(self, option) not in allowed:
                raise ValueError(f"method.{option}={getattr(self, option)!r}: choose one of {', '.join(allowed)}")
        if not 0 < self.start_margin < 0.5:
            raise ValueError(f"method.start_margin={self.start_margin} must lie between 0 and 0.5")
        if self.start == "static" and self.target_skip is None:
            raise ValueError("method.start=static needs method.target_skip; or choose method.start=random or dense")

    @property
    def label(self) -> str:
        """Skip level by target or by α; the objective when it is the paper's."""
        level = f"a{self.alpha:g}" if self.target_skip is None else f"skip{self.target_skip:g}"
        form = "first" if self.objective == "decode_consistent" else "first_soft"
        return f"{form}-{level}"

    def fixed_routes(self, num_layers: int, loss_of: Callable[[Tensor], float]) -> None:
        """The routers decide."""
        return None
