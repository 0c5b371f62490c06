"""A skipping method answers one question: given the prompt, or nothing, which layers does each decode step run?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from firstlab.methods.objective import RouteFit, RouterStart, RoutingObjective
from firstlab.model.routes import EarlyExit, PrunedRoutes, Routes, as_routes

#: Sees a batch, the index of a layer, and the layer's input and output, [B, T, D] each.
Observer = Callable[[dict[str, Tensor], int, Tensor, Tensor], None]


class Prompts(Protocol):
    """N prompts with their references and the model that reads them: all that a method may look at.

    Losses are response cross-entropy per token.
    """

    texts: Sequence[str]
    progress_bar: bool
    num_layers: int
    max_new_tokens: int  # of the longest response there will be

    def __len__(self) -> int: ...
    def take(self, count: int) -> Prompts: ...  # the first of them
    def losses(self, routes: Tensor) -> Tensor: ...  # [N], of every prompt when decode runs routes [L] or [N, L]
    def loss(self, routes: Tensor | Routes) -> float: ...  # over the tokens of all prompts, under routes [L]
    def new_tokens(self) -> list[int]: ...  # [N] lengths of the references in tokens, as far as generation goes
    def routed(self) -> Tensor: ...  # [N, L], the decisions of the model's own routers

    def skip_rate(self, rule: EarlyExit) -> float:
        """Mean skip rate when the references' tokens, as far as generation goes, are decoded under the rule.

        NaN if no prompt takes a decode step.
        """

    def observe(self, see: Observer, title: str) -> None:
        """Show every layer's input and output when all layers run, batch by batch."""


@dataclass
class Method(ABC):
    """One file with one subclass and one YAML in `conf/method/` per method; each has `routes`."""

    name: ClassVar[str]  # in tables
    trains_routers: ClassVar[bool] = False  # whether there is a phase 1
    router_kind: ClassVar[str] = "layers"  # the `router.kind` that it needs
    chooses_on_prompts: ClassVar[bool] = False  # whether what it skips depends on what the model does with prompts
    # What a class's own settings must at least and at most be, where they are not null, and what others may be.
    least: ClassVar[Mapping[str, float]] = {}
    most: ClassVar[Mapping[str, float]] = {}
    choices: ClassVar[Mapping[str, Sequence[str]]] = {}
    target_skip: float | None = None  # wanted skip rate in (0, 1)

    def __post_init__(self) -> None:
        kinds = [vars(kind) for kind in type(self).__mro__]
        least, most, choices = (ChainMap(*(k.get(each, {}) for k in kinds)) for each in ("least", "most", "choices"))
        for option in [*least, *most, *choices]:
            value = getattr(self, option)
            if value is not None and value < least.get(option, value):
                raise ValueError(f"method.{option}={value} must be at least {least[option]}")
            if value is not None and value > most.get(option, value):
                raise ValueError(f"method.{option}={value} must be at most {most[option]}")
            if value not in choices.get(option, [value]):
                raise ValueError(f"method.{option}={value!r}: choose one of {', '.join(choices[option])}")
        if self.target_skip is not None and not 0 < self.target_skip < 1:
            raise ValueError(f"method.target_skip={self.target_skip} must lie strictly between 0 and 1, e.g. 0.15")

    @property
    def label(self) -> str:
        """Name and level, for run directories."""
        return self.name if self.target_skip is None else f"{self.name}-skip{self.target_skip:g}"

    @property
    def level(self) -> str:
        """The skip level as tables print it."""
        return "" if self.target_skip is None else f"target {100 * self.target_skip:g} %"

    @property
    def per_prompt(self) -> bool:
        """Whether `routes` answers for the very prompts it is given, not for all prompts."""
        return False

    @property
    def one_phase(self) -> bool:
        """Whether phase 1 only puts routers at their start, to be trained together with LoRA in phase 2."""
        return False

    @property
    def threshold_skip(self) -> float | None:
        """The skip rate on validation prompts at which the threshold is put after phase 1; None leaves it."""
        return None

    def router_start(self) -> RouterStart | None:
        """How routers are calibrated before phase 1; None starts them at random."""
        return None

    @property
    def steps(self) -> list[str]:
        """The steps of a run that names none: what chooses on prompts does so on a model that was tuned first."""
        if not self.chooses_on_prompts or self.one_phase:
            return ["router", "lora", "evaluate"]
        return ["tune", "router", "lora", *(["refit"] if self.trains_routers else []), "evaluate"]

    def route_fit(self) -> RouteFit | None:
        """How a router over whole routes is fitted, which is then all of phase 1; None trains routers per layer."""
        return None

    def training_objective(self, phase: str, reached: float | None = None) -> RoutingObjective:
        """What phase "router" or "lora" minimises; `reached` is the multiplier that phase 1 ended with, if any."""
        return RoutingObjective(objective="decode_consistent")

    def rounding(self, num_layers: int) -> str | None:
        """How the wanted rate becomes whole layers, where it does; a ValueError if the model cannot skip at it."""
        return None

    @abstractmethod
    def routes(self, prompts: Prompts) -> Tensor | Routes | None:
        """The method's decision for training prompts to calibrate on, or where `per_prompt` for the prompts to route.

        It is a boolean tensor, true = the layer runs: [L] for every prompt alike, or where `per_prompt` [N, L]; or any
        other `Routes`; None lets the trained routers decide.
        """


@dataclass
class RoutedMethod(Method):
    """A method whose routers are trained, and then decide."""

    trains_routers: ClassVar[bool] = True
    chooses_on_prompts: ClassVar[bool] = True

    def routes(self, prompts: Prompts) -> Tensor | None:
        return None


@dataclass
class FixedCount(Method):
    """A method that skips the same number of layers for every prompt, and none of the protected ones at the ends."""

    least: ClassVar[Mapping[str, float]] = {"protect_first": 0, "protect_last": 0}
    target_skip: float = 0.15
    protect_first: int = 1
    protect_last: int = 1

    def skipped_layers(self, num_layers: int) -> int:
        """k = round(s · L), refused where fewer may be skipped."""
        return check_count(round(self.target_skip * num_layers), num_layers, self.protect_first, self.protect_last)

    def rounding(self, num_layers: int) -> str:
        count = self.skipped_layers(num_layers)
        if count == 0:
            raise ValueError(
                f"method.target_skip={self.target_skip} of {num_layers} layers rounds to none: one layer is "
                f"{1 / num_layers:.3g}; raise it, or choose method=none"
            )
        return f"{count} of {num_layers} layers = {100 * count / num_layers:.1f} % for {100 * self.target_skip:g} %"

    def free_layers(self, num_layers: int) -> range:
        return range(self.protect_first, num_layers - self.protect_last)


@dataclass
class CalibratedSet(FixedCount):
    """A static set of layers found on `calibration_prompts` training prompts (128 in SLEB's original).

    Originals delete these layers. Here prefill runs every layer, as for every other method, unless `skip_prefill` lets
    prompt tokens pass by them, too.
    """

    least: ClassVar[Mapping[str, float]] = {"calibration_prompts": 1}
    chooses_on_prompts: ClassVar[bool] = True
    calibration_prompts: int = 128
    skip_prefill: bool = False

    @property
    def label(self) -> str:
        return f"{super().label}-prefill" if self.skip_prefill else super().label

    def applied(self, routes: Tensor) -> Tensor | Routes:
        return PrunedRoutes(routes) if self.skip_prefill else routes


#: What a method says that decides by decode steps.
NO_STEPS = (
    "no response has a second token, so that nothing is decoded: raise method.calibration_prompts or "
    "data.max_new_tokens"
)


def check_count(count: int, num_layers: int, protect_first: int, protect_last: int) -> int:
    """`count`, if so many of the unprotected layers can be skipped, else a ValueError."""
    most = num_layers - protect_first - protect_last
    if count > most:
        remedy = f"lower method.target_skip, to skip at most {most}" if most > 0 else "choose method=none"
        raise ValueError(
            f"cannot skip {count} of {num_layers} layers while the first {protect_first} and the last {protect_last} "
            f"are kept: {remedy}"
        )
    return count


def routes_without(num_layers: int, skipped: Sequence[int]) -> Tensor:
    """[L] boolean routes that run every layer but `skipped`."""
    routes = torch.ones(num_layers, dtype=torch.bool)
    routes[list(skipped)] = False
    return routes


def rows_of(routes: Tensor | Routes | None, index: Sequence[int], device: torch.device) -> Routes | None:
    """What these prompts, by position, get."""
    return None if routes is None else as_routes(routes).rows(index).to(device)
