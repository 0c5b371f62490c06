"""What `routes=` may be: `Routes`, one subclass per way to say which layers the tokens of a response run.

True means that the layer runs. Decode step t, counted from 0, is the pass over the response token with index t; the
first response token comes out of prefill, which runs every layer unless the routes skip layers of the prompt as well.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlab.model.settings import check_choice

CONFIDENCES = ("softmax", "gap", "cosine")


class Routes(ABC):
    """Which layers the tokens of a response run."""

    #: Whether the layers of a row change from decode step to decode step.
    decides_each_step: ClassVar[bool] = False
    #: Whether tokens of the prompt skip layers, too.
    skips_prompt: ClassVar[bool] = False

    @abstractmethod
    def check(self, num_layers: int, prompts: int | None = None) -> None:
        """Raises ValueError if the routes do not fit the number of layers or of prompts."""

    def first(self, num_layers: int) -> Tensor:
        """[R, L], the layers that the first decode step may run; R is 1 where all rows share them."""
        return torch.ones(1, num_layers, dtype=torch.bool)

    def gates(self, steps: Tensor) -> Tensor | None:
        """Layers of tokens at steps [B, T] (-1: no response), as [B or 1, T or 1, L]; None where states decide."""
        return None

    def window(self, start: int, steps: int) -> Tensor | None:
        """[steps, L], what all rows run at steps start … start + steps - 1; None where no schedule says it."""
        return None

    def drops(self) -> dict[int, list[int]]:
        """Decode step -> the layers that the step before still ran, where a schedule says it."""
        return {}

    @property
    def exit_rule(self) -> EarlyExit | None:
        """The rule, where each token's own states decide how far up it goes."""
        return None

    def rows(self, index: Sequence[int]) -> Routes:
        """The routes of these prompts."""
        return self

    def to(self, device: torch.device) -> Routes:
        """The same, where the rows are of use to a device."""
        return self

    @abstractmethod
    def to_json(self) -> Any:
        """Plain JSON values: nested lists for a fixed tensor, else an object."""


def _require(valid: bool, wanted: str, given: Tensor) -> None:
    if not valid or given.dtype != torch.bool:
        raise ValueError(f"{wanted}; got {given.dtype} {list(given.shape)}")


@dataclass(frozen=True, eq=False)
class RoutersDecide(Routes):
    """The routers read each prompt and decide, which they also do where no routes are given."""

    skip_rate: float | Tensor | None = None  # that a `RouteRouter` aims at: one for all prompts or [B]; None: its own

    def check(self, num_layers: int, prompts: int | None = None) -> None:
        """Routes that are still to be decided fit; the routers check the rate (`checked_rate`)."""

    def rows(self, index: Sequence[int]) -> Routes:
        rate = self.skip_rate
        return RoutersDecide(rate[list(index)]) if isinstance(rate, Tensor) and rate.ndim else self

    def to_json(self) -> Any:
        return {"routers": self.skip_rate.tolist() if isinstance(self.skip_rate, Tensor) else self.skip_rate}


@dataclass(frozen=True, eq=False)
class FixedRoutes(Routes):
    """One decision for the whole response: `ran` is boolean, [L] for every prompt or [B, L]."""

    ran: Tensor

    def __post_init__(self) -> None:
        wanted = "routes must be a boolean tensor [layers] or [batch, layers] (true = the layer runs)"
        _require(self.ran.ndim in (1, 2), wanted, self.ran)

    def check(self, num_layers: int, prompts: int | None = None) -> None:
        if self.ran.shape[-1] != num_layers:
            raise ValueError(
                f"routes must be a boolean tensor [{num_layers}] or [batch, {num_layers}] (true = the layer runs); "
                f"got {list(self.ran.shape)}"
            )
        if prompts is not None and self.ran.ndim == 2 and len(self.ran) != prompts:
            raise ValueError(f"routes has {len(self.ran)} rows for {prompts} prompts; give one row per prompt")

    def first(self, num_layers: int) -> Tensor:
        return self.ran.reshape(-1, num_layers)

    def gates(self, steps: Tensor) -> Tensor:
        return self.ran.to(steps.device).reshape(-1, 1, self.ran.shape[-1])

    def rows(self, index: Sequence[int]) -> Routes:
        return replace(self, ran=self.ran[list(index)]) if self.ran.ndim == 2 else self

    def to(self, device: torch.device) -> Routes:
        return replace(self, ran=self.ran.to(device, non_blocking=device.type != "cpu"))

    def to_json(self) -> Any:
        return self.ran.tolist()


class PrunedRoutes(FixedRoutes):
    """Layers that no token runs, those of the prompt included; `ran` is boolean [L], shared by all rows."""

    skips_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        valid = self.ran.ndim == 1 and bool(self.ran.any())
        _require(valid, "PrunedRoutes needs a boolean tensor [layers] that runs one layer at least", self.ran)

    def to_json(self) -> Any:
        return {"pruned": self.ran.tolist()}


@dataclass(frozen=True, eq=False)
class StepRoutes(Routes):
    """A schedule [S, L] shared by all rows: decode step t runs `schedule[min(t, S - 1)]`, as in SkipDecode.

    The sets must be nested: a layer that a token once skipped has no keys and values of it for later tokens.
    """

    schedule: Tensor
    decides_each_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        valid = self.schedule.ndim == 2 and len(self.schedule) > 0
        _require(valid, "StepRoutes needs a boolean schedule [steps, layers] with at least one step", self.schedule)
        object.__setattr__(self, "schedule", self.schedule.detach().cpu())
        returns = (self.schedule[1:] & ~self.schedule[:-1]).nonzero()
        if len(returns):
            step, layer = returns[0].tolist()
            raise ValueError(
                f"StepRoutes: layer {layer} is skipped at step {step} but runs at step {step + 1}, where it would miss "
                "the keys and values of the tokens that passed it by; later steps may only skip more (nested sets)"
            )

    def check(self, num_layers: int, prompts: int | None = None) -> None:
        layers = self.schedule.shape[1]
        if layers != num_layers:
            raise ValueError(f"StepRoutes has a schedule of {layers} layers; the model has {num_layers}")

    def first(self, num_layers: int) -> Tensor:
        return self.schedule[:1]

    def gates(self, steps: Tensor) -> Tensor:
        schedule = self.schedule.to(steps.device)
        return schedule[steps.clamp(0, len(schedule) - 1)] | (steps < 0).unsqueeze(-1)

    def window(self, start: int, steps: int) -> Tensor:
        return self.schedule[torch.arange(start, start + steps).clamp_max(len(self.schedule) - 1)]

    def drops(self) -> dict[int, list[int]]:
        ends = self.schedule[:-1] & ~self.schedule[1:]
        return {step + 1: layers.nonzero().flatten().tolist() for step, layers in enumerate(ends) if layers.any()}

    def to_json(self) -> Any:
        return {"schedule": self.schedule.tolist()}


@dataclass(frozen=True)
class EarlyExit(Routes):
    """Early exit with state propagation (CALM, Schuster et al. 2022): each row, each token by itself.

    A token leaves at the first layer whose confidence reaches the threshold; its state goes unchanged to the final norm
    and the LM head. The layers above keep keys and values of that state, so that a later token may go deeper.
    `generate` computes those layers in full and shows only the quality; the decode engine also saves the time.
    """

    threshold: float
    # "softmax" (top-1 probability of the LM head on the layer's output), "gap" (top-1 minus top-2 probability, CALM's
    # softmax response) or "cosine" (of the layer's input and output, CALM's state saturation).
    confidence: str = "softmax"
    min_layers: int = 1  # that every token runs
    # τ of CALM's threshold at decode step t, clip(0.9 · threshold + 0.1 · exp(-τ · t / horizon), 0, 1).
    decay: float | None = None
    horizon: int | None = None  # the maximal response length
    decides_each_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("EarlyExit: confidence", self.confidence, CONFIDENCES)
        if not math.isfinite(self.threshold):
            raise ValueError(f"EarlyExit: threshold={self.threshold} must be a finite number")
        if self.min_layers < 1:
            raise ValueError(f"EarlyExit: min_layers={self.min_layers} must be at least 1")
        if self.decay is not None and (self.decay < 0 or self.horizon is None or self.horizon < 1):
            raise ValueError(
                f"EarlyExit: decay={self.decay} must not be negative and needs horizon >= 1 (the maximal response "
                f"length); got horizon={self.horizon}"
            )

    def check(self, num_layers: int, prompts: int | None = None) -> None:
        if self.min_layers > num_layers:
            raise ValueError(f"EarlyExit: min_layers={self.min_layers} but the model has {num_layers} layers")

    @property
    def exit_rule(self) -> EarlyExit:
        return self

    def to_json(self) -> Any:
        return {"early_exit": asdict(self)}

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
            return F.cosine_similarity(before.float(), after.float(), dim=-1)
        top = head(after).float().softmax(-1).topk(2, dim=-1).values
        return top[:, 0] if self.confidence == "softmax" else top[:, 0] - top[:, 1]


class ExitPass:
    """Which tokens of one forward pass have not left yet.

    `head` gives logits [N, V] of states [N, D]; `steps` [B, T] is -1 on tokens that run every layer (prompt, padding).
    """

    def __init__(self, rule: EarlyExit, head: Callable[[Tensor], Tensor], steps: Tensor, num_layers: int) -> None:
        self._rule, self._head, self._steps, self._last = rule, head, steps, num_layers - 1
        self._ran: list[Tensor] = []
        self._active = torch.ones_like(steps, dtype=torch.bool)

    @property
    def ran(self) -> Tensor:
        """[B, T, L] boolean, after the pass."""
        return torch.stack([x.to(self._ran[0].device) for x in self._ran], dim=-1)

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any]) -> Any:
        """Run the layer for everyone, keep its output for the tokens that have not left, and let some of them leave."""
        output = run()
        computed = output[0] if isinstance(output, tuple) else output
        active, steps = self._active.to(computed.device), self._steps.to(computed.device)
        state = torch.where(active.unsqueeze(-1), computed, hidden)
        self._ran.append(active)
        asked = active & (steps >= 0)
        if self._rule.min_layers <= index + 1 <= self._last and asked.any():
            before, after = hidden.detach()[asked], state.detach()[asked]
            confidence = self._rule.confidence_of(before, after, self._head).to(after.device)
            active = active.masked_scatter(asked, ~(confidence >= self._rule.thresholds(steps[asked])))
        self._active = active
        return with_state(output, state)


def with_state(output: Any, state: Tensor) -> Any:
    """A layer's output, which older architectures give as a tuple, with another hidden state."""
    return (state, *output[1:]) if isinstance(output, tuple) else state


def as_routes(given: Routes | Tensor) -> Routes:
    """Routes as they are, or those of a boolean tensor [L] or [B, L]; ValueError for anything else."""
    if isinstance(given, Tensor):
        return FixedRoutes(given)
    if isinstance(given, Routes):
        return given
    kind = type(given).__name__
    raise ValueError(f"routes must be a boolean tensor, StepRoutes, EarlyExit or PrunedRoutes; got {kind}")


def as_asked(routes: Routes | Tensor | None, skip_rate: float | Tensor | None) -> Routes | None:
    """What the arguments `routes` and `skip_rate` of a decoder say together; None leaves all to the routers."""
    if skip_rate is None:
        return None if routes is None else as_routes(routes)
    if routes is not None:
        raise ValueError("routes= says which layers run, and skip_rate= lets the routers say it; drop one")
    return RoutersDecide(skip_rate)


def decode_steps(response: Tensor) -> Tensor:
    """[B, T], the decode step whose input each token is, -1 where `response` [B, T] is false (prompt and padding)."""
    return torch.where(response, response.long().cumsum(1) - 1, -1)


def layer_skips(ran: Tensor, counted: Tensor) -> Tensor:
    """[B, L], the share of the `counted` [B, T] tokens that skipped each layer by `ran` [B, T, L]; 0 if none count."""
    skipped = ((~ran) & counted.unsqueeze(-1)).sum(1)
    return skipped / counted.sum(1, keepdim=True).clamp_min(1)


def routes_from_json(saved: Any) -> Routes:
    """Undo `Routes.to_json` of forced routes; ValueError for what it does not write."""
    try:
        if isinstance(saved, list):
            return FixedRoutes(_booleans(saved))
        [(kind, value)] = saved.items()
        if kind == "early_exit":
            return EarlyExit(**value)
        return {"pruned": PrunedRoutes, "schedule": StepRoutes}[kind](_booleans(value))
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"these are no saved routes ({type(error).__name__}: {error}): {str(saved)[:80]}") from error


def _booleans(rows: list[Any]) -> Tensor:
    found = torch.tensor(rows)
    if found.dtype != torch.bool:
        raise ValueError(f"expected true and false, got {found.dtype}")
    return found
