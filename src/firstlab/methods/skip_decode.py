"""SkipDecode (Del Corro et al. 2023, arXiv 2307.02628): a budget of layers that shrinks with the decode step.

No code of it is public. Here t counts from the first decoded token, and the warm-up layers are part of the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from firstlab.methods.base import NO_STEPS, Method, Prompts
from firstlab.model.routes import StepRoutes


@dataclass
class SkipDecode(Method):
    """One budget per decode step for the whole batch: the warm-up layers and the topmost ones run."""

    name: ClassVar[str] = "skip_decode"
    least: ClassVar[Mapping[str, float]] = {
        "num_warmup_layers": 0, "tolerance": 0, "horizon": 1, "calibration_prompts": 1,
    }  # fmt: skip
    target_skip: float | None = 0.15
    # The budget at the horizon and at the first step; both null: found on the lengths of training responses so that the
    # measured skip rate meets target_skip.
    min_exit_layer: int | None = None
    max_exit_layer: int | None = None
    num_warmup_layers: int = 1  # w, lowest layers that always run
    horizon: int | None = None  # T, the step at which the budget stops shrinking; null is the maximal response length
    tolerance: float = 0.005  # distance to target_skip within which the steepest schedule is taken
    calibration_prompts: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        given = (self.min_exit_layer, self.max_exit_layer)
        if (self.target_skip is None) != (None not in given) or given.count(None) == 1:
            raise ValueError(
                f"method.target_skip={self.target_skip} with method.min_exit_layer={given[0]} and "
                f"method.max_exit_layer={given[1]}: give either the skip rate or both layers"
            )

    def routes(self, prompts: Prompts) -> StepRoutes:
        layers, horizon = prompts.num_layers, self.horizon or prompts.max_new_tokens
        least, most = self.min_exit_layer, self.max_exit_layer
        if least is None or most is None:
            assert self.target_skip is not None
            lengths = prompts.take(self.calibration_prompts).new_tokens()
            least, most, _ = calibrate_skip_decode(
                layers, self.target_skip, lengths, horizon, self.num_warmup_layers, self.tolerance
            )
        return skip_decode_schedule(layers, least, most, horizon, self.num_warmup_layers)


def budget(step: int, horizon: int, min_layers: int, max_layers: int) -> int:
    """n(t) = round(max - (max - min) · clip(t / T, 0, 1)), halves up."""
    return int(max_layers - (max_layers - min_layers) * min(step / horizon, 1.0) + 0.5)


def skip_decode_schedule(
    num_layers: int, min_layers: int, max_layers: int, horizon: int, warmup_layers: int = 1
) -> StepRoutes:
    """Step t runs the first w layers and the top n(t) - w; the budget is `max_layers` first, `min_layers` at step T."""
    if not max(warmup_layers, 1) <= min_layers <= max_layers <= num_layers:
        raise ValueError(
            f"method.min_exit_layer={min_layers} and method.max_exit_layer={max_layers} must satisfy "
            f"{max(warmup_layers, 1)} (method.num_warmup_layers) <= min <= max <= {num_layers} (layers of the model)"
        )
    layers = torch.arange(num_layers)
    budgets = torch.tensor([budget(t, horizon, min_layers, max_layers) for t in range(horizon + 1)])[:, None]
    return StepRoutes((layers < warmup_layers) | (layers >= num_layers - (budgets - warmup_layers)))


def schedule_skip_rate(routes: StepRoutes, new_tokens: Sequence[int]) -> float:
    """Skip rate of responses of these lengths: the mean over responses of the mean over their decode steps.

    A response of n tokens takes n - 1 decode steps; one without any does not count.
    """
    steps = torch.tensor([n - 1 for n in new_tokens if n > 1])
    if not len(steps):
        raise ValueError(NO_STEPS)
    skipped = 1 - routes.window(0, int(steps.max())).double().mean(1)
    return float((skipped.cumsum(0)[steps - 1] / steps).mean())


def calibrate_skip_decode(
    num_layers: int,
    target_skip: float,
    new_tokens: Sequence[int],
    horizon: int,
    warmup_layers: int = 1,
    tolerance: float = 0.005,
) -> tuple[int, int, float]:
    """(min, max, skip rate) of the budget whose rate on responses of these lengths meets the target.

    Of all pairs within the tolerance the one with the widest range, for a shrinking budget is what the method is; if
    no pair is as near, the nearest one.
    """
    found = []
    for least in range(max(warmup_layers, 1), num_layers + 1):
        for most in range(least, num_layers + 1):
            routes = skip_decode_schedule(num_layers, least, most, horizon, warmup_layers)
            rate = schedule_skip_rate(routes, new_tokens)
            error = abs(rate - target_skip)
            rank = (0, least - most, error) if error <= tolerance else (1, error, least - most)
            found.append((rank, (least, most, rate)))
    return min(found)[1]
