"""FiRST without its adaptivity: the routers' most frequent route, applied to every prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from firstlab.methods.base import Prompts
from firstlab.methods.first import First


@dataclass
class StaticFirst(First):
    """Phase 1 as in `First`; what its routers choose most often on `vote_prompts` training prompts is the route of all.

    Beside `First` it tells what choosing by prompt is worth. Its skip rate is that of one route, so it may miss the
    rate that the routers reach on average.
    """

    name: ClassVar[str] = "static_first"
    least: ClassVar[Mapping[str, float]] = {"vote_prompts": 1}
    vote_prompts: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.one_phase:
            raise ValueError(
                "method.one_phase=true trains the routers after static_first has taken its route from them: "
                "leave it out"
            )

    @property
    def label(self) -> str:
        return f"static_{super().label}"

    def routes(self, prompts: Prompts) -> Tensor:
        return most_frequent(prompts.take(self.vote_prompts).routed())


def most_frequent(routes: Tensor) -> Tensor:
    """The most frequent row of [N, L]; among equally frequent ones that which agrees best with all rows."""
    unique, counts = routes.unique(dim=0, return_counts=True)
    tied = unique[counts == counts.max()]
    agreement = (tied[:, None] == routes[None]).sum((1, 2))
    return tied[agreement.argmax()]
