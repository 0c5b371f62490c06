"""Early exit by confidence (CALM, Schuster et al. 2022), with a threshold calibrated to a skip rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from firstlab.methods.base import NO_STEPS, Method, Prompts
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import EarlyExit, layer_skips


@dataclass
class ConfidenceExit(Method):
    """Every token leaves at the first layer that is sure enough; settings as in `EarlyExit`."""

    name: ClassVar[str] = "early_exit"
    least: ClassVar[Mapping[str, float]] = {"bisections": 1, "calibration_prompts": 1}
    target_skip: float | None = 0.15
    confidence: str = "softmax"
    threshold: float | None = None  # used as it is when target_skip is null; else found on training prompts
    min_layers: int = 1
    decay: float | None = None
    calibration_prompts: int = 128  # on which the skip rate is measured, teacher-forced
    bisections: int = 16  # of the threshold's range

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.target_skip is None) == (self.threshold is None):
            raise ValueError(
                f"method.target_skip={self.target_skip} and method.threshold={self.threshold}: give one of them"
            )
        self.rule(0.5, 1)

    @property
    def label(self) -> str:
        return super().label if self.confidence == "softmax" else f"{super().label}-{self.confidence}"

    def routes(self, prompts: Prompts) -> EarlyExit:
        limit, threshold = prompts.max_new_tokens, self.threshold
        if threshold is None:
            assert self.target_skip is not None
            chosen = prompts.take(self.calibration_prompts)
            threshold = calibrate_threshold(
                lambda tried: chosen.skip_rate(self.rule(tried, limit)), self.target_skip, self.bisections
            )
        return self.rule(threshold, limit)

    def rule(self, threshold: float, max_new_tokens: int) -> EarlyExit:
        """The exit rule at a threshold, checked."""
        return EarlyExit(threshold, self.confidence, self.min_layers, self.decay, max_new_tokens)


def calibrate_threshold(skip_rate: Callable[[float], float], target_skip: float, bisections: int = 16) -> float:
    """The threshold in [0, 1] whose measured skip rate comes nearest to the target.

    A higher threshold skips less, but not strictly so, because exits change the states of later tokens; therefore the
    best of all thresholds tried is kept, not the last.
    """
    most = skip_rate(0.0)
    if math.isnan(most):
        raise ValueError(NO_STEPS)
    if most < target_skip:
        raise ValueError(
            f"method.target_skip={target_skip} cannot be reached: threshold 0 skips {most:.3f}; lower it or "
            "method.min_layers"
        )
    low, high, tried = 0.0, 1.0, [(abs(most - target_skip), 0.0)]
    for _ in range(bisections):
        middle = (low + high) / 2
        rate = skip_rate(middle)
        tried.append((abs(rate - target_skip), middle))
        low, high = (middle, high) if rate > target_skip else (low, middle)
    return min(tried)[1]


@torch.no_grad()
def teacher_forced_skip_rates(model: RouterAugmentedLM, batch: dict[str, Tensor], rule: EarlyExit) -> Tensor:
    """[B] skip rate of every row over the decode steps that predict a label; NaN for a response of one token.

    `batch` has input_ids, attention_mask, labels and prompt_mask [B, T].
    """
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "prompt_mask")}
    labels, prompt = batch["labels"], batch["prompt_mask"].bool()
    out = model(**inputs, labels=labels, objective="decode_consistent", gate="hard", routes=rule, keep_logits=False)
    counted = torch.zeros_like(prompt)
    counted[:, :-1] = (labels[:, 1:] != -100) & ~prompt[:, :-1]
    rates = layer_skips(out.ran, counted).mean(1)
    return rates.masked_fill(~counted.any(1), float("nan"))
