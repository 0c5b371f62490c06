"""What `routes=` may be: one decision for the whole response, one that changes from decode step to decode step, or one
that the prompt follows too.

True means that the layer runs. Decode step t, counted from 0, is the pass over the response token with index t; the
first response token comes out of prefill, which runs every layer unless `PrunedRoutes` say otherwise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from firstlab.model.exit_rule import EarlyExit


@dataclass(frozen=True, eq=False)
class StepRoutes:
    """A schedule shared by all rows: decode step t runs `schedule[min(t, S - 1)]`, as in SkipDecode.

    The sets must be nested, S(t + 1) ⊆ S(t): a layer that once passed by a token has no keys and values of it, so that
    no later token could run that layer exactly.

    Attributes:
        schedule: [S, L] boolean.

    Raises:
        ValueError: Not boolean [S, L] with S >= 1, or not nested.
    """

    schedule: Tensor

    def __post_init__(self) -> None:
        schedule = self.schedule
        if schedule.dtype != torch.bool or schedule.ndim != 2 or not len(schedule):
            raise ValueError(
                f"StepRoutes needs a boolean schedule [steps, layers] with at least one step; "
                f"got {schedule.dtype} {list(schedule.shape)}"
            )
        object.__setattr__(self, "schedule", schedule.detach().cpu())
        returns = (self.schedule[1:] & ~self.schedule[:-1]).nonzero()
        if len(returns):
            step, layer = returns[0].tolist()
            raise ValueError(
                f"StepRoutes: layer {layer} is skipped at step {step} but runs at step {step + 1}, where it would miss "
                "the keys and values of the tokens that passed it by; later steps may only skip more (nested sets)"
            )

    @property
    def num_layers(self) -> int:
        """L."""
        return self.schedule.shape[1]

    def window(self, start: int, steps: int) -> Tensor:
        """[steps, L], what steps start … start + steps - 1 run."""
        return self.schedule[torch.arange(start, start + steps).clamp_max(len(self.schedule) - 1)]

    def gates(self, steps: Tensor) -> Tensor:
        """Which layers each token runs: [...] step indices, negative for tokens of the prompt -> [..., L] boolean."""
        schedule = self.schedule.to(steps.device)
        return schedule[steps.clamp(0, len(schedule) - 1)] | (steps < 0).unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class PrunedRoutes:
    """Layers that no token runs, those of the prompt included: as if the other layers were the whole model.

    Attributes:
        ran: [L] boolean, shared by all rows.

    Raises:
        ValueError: Not boolean [L], or without any layer.
    """

    ran: Tensor

    def __post_init__(self) -> None:
        ran = self.ran
        if ran.dtype != torch.bool or ran.ndim != 1 or not ran.any():
            raise ValueError(
                f"PrunedRoutes needs a boolean tensor [layers] that runs one layer at least; "
                f"got {ran.dtype} {list(ran.shape)}"
            )
        object.__setattr__(self, "ran", ran.detach().cpu())

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.ran)

    def gates(self, steps: Tensor) -> Tensor:
        """Which layers each token runs: [...] step indices -> [..., L] boolean, the same everywhere."""
        return self.ran.to(steps.device).expand(*steps.shape, -1)


Routes = Tensor | StepRoutes | EarlyExit | PrunedRoutes


def check_routes(routes: Routes, num_layers: int) -> None:
    """Validate forced routes.

    Raises:
        ValueError: Not boolean [L] or [B, L], or a rule that does not fit the number of layers.
    """
    if isinstance(routes, EarlyExit):
        if routes.min_layers > num_layers:
            raise ValueError(f"EarlyExit: min_layers={routes.min_layers} but the model has {num_layers} layers")
        return
    if isinstance(routes, StepRoutes):
        if routes.num_layers != num_layers:
            raise ValueError(f"StepRoutes has a schedule of {routes.num_layers} layers; the model has {num_layers}")
        return
    if isinstance(routes, PrunedRoutes):
        if routes.num_layers != num_layers:
            raise ValueError(f"PrunedRoutes names {routes.num_layers} layers; the model has {num_layers}")
        return
    if not isinstance(routes, Tensor):
        raise ValueError(
            f"routes must be a boolean tensor, StepRoutes, EarlyExit or PrunedRoutes; got {type(routes).__name__}"
        )
    if routes.dtype != torch.bool or routes.ndim not in (1, 2) or routes.shape[-1] != num_layers:
        raise ValueError(
            f"routes must be a boolean tensor [{num_layers}] or [batch, {num_layers}] (true = the layer runs); "
            f"got {routes.dtype} {list(routes.shape)}"
        )


def decode_steps(response: Tensor, start: Tensor | int = 0) -> Tensor:
    """Number the decode steps of every row.

    Args:
        response: [B, T] boolean, true on tokens of the response.
        start: Step of a row's first response token, a number or [B].

    Returns:
        [B, T], the decode step whose input the token is, -1 on prompt and padding.
    """
    first = start.unsqueeze(1) if isinstance(start, Tensor) else start
    return torch.where(response, response.long().cumsum(1) - 1 + first, -1)


def layer_skips(ran: Tensor, counted: Tensor) -> Tensor:
    """How often each layer was skipped.

    Args:
        ran: [B, T, L] boolean, true where the layer ran.
        counted: [B, T] boolean, the tokens that count.

    Returns:
        [B, L] in [0, 1], the share of the counted tokens that skipped the layer; 0 in a row where nothing counts.
    """
    skipped = ((~ran) & counted.unsqueeze(-1)).sum(1)
    return skipped / counted.sum(1, keepdim=True).clamp_min(1)


def routes_to_json(routes: Routes) -> Any:
    """Forced routes as plain JSON values: nested lists for a tensor, else an object."""
    if isinstance(routes, EarlyExit):
        return {"early_exit": asdict(routes)}
    if isinstance(routes, StepRoutes):
        return {"schedule": routes.schedule.tolist()}
    if isinstance(routes, PrunedRoutes):
        return {"pruned": routes.ran.tolist()}
    return routes.tolist()


def routes_from_json(saved: Any) -> Routes:
    """Undo `routes_to_json`."""
    if isinstance(saved, list):
        return torch.tensor(saved, dtype=torch.bool)
    if "early_exit" in saved:
        return EarlyExit(**saved["early_exit"])
    if "pruned" in saved:
        return PrunedRoutes(torch.tensor(saved["pruned"], dtype=torch.bool))
    return StepRoutes(torch.tensor(saved["schedule"], dtype=torch.bool))
