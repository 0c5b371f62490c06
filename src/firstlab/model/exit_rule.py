"""Early exit with state propagation (CALM, Schuster et al. 2022).

A token leaves at the first layer whose confidence passes the threshold; its state goes unchanged to the final norm and
the LM head. The keys and values that the layers above have of it are projections of that exit state, so that a later
token may go deeper.

That is exactly what a layer computes when it is called on the exit state and its output is thrown away, in every
architecture. It is also the price: `generate` runs every layer in full and asks the LM head after each one, so it says
what early exit does to quality and how many layers it needs, and nothing about its speed. The decode engine computes
only keys and values above the exit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CONFIDENCES = ("softmax", "gap", "cosine")


@dataclass(frozen=True)
class EarlyExit:
    """When a decoded token exits; each row, each token by itself.

    Attributes:
        threshold: A token exits at the first layer whose confidence is at least this.
        confidence: "softmax" (top-1 probability of the LM head on the layer's output), "gap" (top-1 minus top-2
            probability, CALM's softmax response) or "cosine" (of the layer's input and output, CALM's state
            saturation).
        min_layers: Layers that every token runs.
        decay: τ of CALM's decaying threshold clip(0.9 · threshold + 0.1 · exp(-τ · t / horizon), 0, 1) at decode step
            t; None keeps it constant.
        horizon: N of that formula, the maximal response length.

    Raises:
        ValueError: A value outside its range.
    """

    threshold: float
    confidence: str = "softmax"
    min_layers: int = 1
    decay: float | None = None
    horizon: int | None = None

    def __post_init__(self) -> None:
        if self.confidence not in CONFIDENCES:
            raise ValueError(
                f"EarlyExit: confidence={self.confidence!r} is unknown; choose one of {', '.join(CONFIDENCES)}"
            )
        if not math.isfinite(self.threshold):
            raise ValueError(f"EarlyExit: threshold={self.threshold} must be a finite number")
        if self.min_layers < 1:
            raise ValueError(f"EarlyExit: min_layers={self.min_layers} must be at least 1")
        if self.decay is not None and (self.decay < 0 or self.horizon is None or self.horizon < 1):
            raise ValueError(
                f"EarlyExit: decay={self.decay} must not be negative and needs horizon >= 1 (the maximal response "
                f"length); got horizon={self.horizon}"
            )

    def thresholds(self, steps: Tensor) -> Tensor:
        """Threshold in force at decode steps of any shape, fp32."""
        if self.decay is None:
            return torch.full_like(steps, self.threshold, dtype=torch.float32)
        assert self.horizon is not None
        decayed = 0.9 * self.threshold + 0.1 * torch.exp(-self.decay * steps.float() / self.horizon)
        return decayed.clamp(0, 1)

    def confidence_of(self, before: Tensor, after: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Confidence [N] fp32 of tokens whose layer took `before` and gave `after` [N, D]; head: logits of a state."""
        if self.confidence == "cosine":
            return cosine_confidence(before, after)
        logits = head(after)
        return softmax_confidence(logits) if self.confidence == "softmax" else gap_confidence(logits)


def softmax_confidence(logits: Tensor) -> Tensor:
    """Top-1 probability, [..., V] -> [...] fp32."""
    return logits.float().softmax(-1).amax(-1)


def gap_confidence(logits: Tensor) -> Tensor:
    """Top-1 minus top-2 probability, [..., V] -> [...] fp32."""
    top = logits.float().softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def cosine_confidence(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of a layer's input and output, [..., D] each -> [...] fp32."""
    return F.cosine_similarity(before.float(), after.float(), dim=-1)


class ExitPass:
    """Which tokens of one forward pass are still on their way up.

    Args:
        rule: When to exit.
        head: Logits [N, V] of intermediate states [N, D].
        steps: [B, T] decode steps, -1 on tokens that run every layer (prompt and padding).
        num_layers: L.
    """

    def __init__(self, rule: EarlyExit, head: Callable[[Tensor], Tensor], steps: Tensor, num_layers: int) -> None:
        self._rule = rule
        self._head = head
        self._steps = steps
        self._last = num_layers - 1
        self._ran: list[Tensor] = []
        self._active = torch.ones_like(steps, dtype=torch.bool)

    @property
    def ran(self) -> Tensor:
        """[B, T, L] boolean, after the pass."""
        return torch.stack([x.to(self._ran[0].device) for x in self._ran], dim=-1)

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any]) -> Any:
        """Run the layer for everyone, keep its output for the tokens that have not left, and let some of them leave."""
        output = run()
        state = output[0] if isinstance(output, tuple) else output
        active = self._active.to(state.device)
        state = torch.where(active.unsqueeze(-1), state, hidden)
        self._ran.append(active)
        if self._rule.min_layers <= index + 1 <= self._last:
            self._active = active & ~self._leaves(active, hidden.detach(), state.detach())
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def _leaves(self, active: Tensor, before: Tensor, after: Tensor) -> Tensor:
        steps = self._steps.to(after.device)
        asked = active & (steps >= 0)
        leaves = torch.zeros_like(asked)
        if asked.any():
            confidence = self._rule.confidence_of(before[asked], after[asked], self._head).to(after.device)
            leaves[asked] = confidence >= self._rule.thresholds(steps[asked])
        return leaves
