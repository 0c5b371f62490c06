"""A skipping method answers one question: given the prompt, or nothing, which layers does decode run?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass
class Method(ABC):
    """One file with one subclass and one YAML in `conf/method/` per method.

    A method either lets trained routers decide (`trains_routers`) or gives fixed routes.

    Attributes:
        name: Name in tables.
        trains_routers: Whether there is a phase 1.
        target_skip: Wanted skip rate in (0, 1), or None.
    """

    name: ClassVar[str]
    trains_routers: ClassVar[bool] = False
    target_skip: float | None = None

    def __post_init__(self) -> None:
        if self.target_skip is not None and not 0 < self.target_skip < 1:
            raise ValueError(f"method.target_skip={self.target_skip} must lie strictly between 0 and 1, e.g. 0.15")

    @property
    def label(self) -> str:
        """Name and level, for run directories."""
        return self.name if self.target_skip is None else f"{self.name}-skip{self.target_skip:g}"

    @abstractmethod
    def fixed_routes(self, num_layers: int, loss_of: Callable[[Tensor], float]) -> Tensor | None:
        """[L] boolean routes, true where the layer runs, or None if routers decide.

        Args:
            num_layers: L.
            loss_of: Calibration loss of the model on training prompts under given [L] routes.
        """
