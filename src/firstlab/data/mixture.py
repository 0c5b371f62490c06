"""Mix several tasks into one, for routers that should tell tasks apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from firstlab.data.files import spread
from firstlab.data.task import Example, Task


@dataclass(frozen=True)
class Part:
    """One task of a mixture; `max_new_tokens` limits its responses, None leaves that to `data.max_new_tokens`."""

    task: Task
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"data.task.parts: max_new_tokens={self.max_new_tokens} must be at least 1")


class Mixture(Task):
    """As many examples of every part as the smallest one has; the data module draws its splits evenly from them.

    Each part keeps its prompts, difficulties and metrics. Validation comes from the training pools, also where a part
    has a validation set of its own.
    """

    kind = "mixture"

    def __init__(self, parts: Mapping[str, Part]) -> None:
        if len(parts) < 2:
            raise ValueError(f"data.task.parts={list(parts)}: a mixture needs at least two tasks")
        self._parts = dict(parts)
        self.parts = {name: part.task for name, part in parts.items()}
        self.markup = any(task.markup for task in self.parts.values())

    def train_pool(self) -> list[Example]:
        return self._join({name: task.train_pool() for name, task in self.parts.items()})

    def test(self) -> list[Example]:
        return self._join({name: task.test() for name, task in self.parts.items()})

    def _join(self, pools: dict[str, list[Example]]) -> list[Example]:
        size = min(map(len, pools.values()))
        return [
            replace(example, id=f"{name}/{example.id}", part=name, max_new_tokens=self._parts[name].max_new_tokens)
            for name, pool in pools.items()
            for example in spread(pool, size)
        ]

    def prompt(self, example: Example, source: str | None = None) -> str:
        if example.part not in self.parts:
            raise ValueError(f"part={example.part!r} is not in this mixture; choose one of {', '.join(self.parts)}")
        return self.parts[example.part].prompt(example, source)
