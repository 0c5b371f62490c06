"""Go on with smaller batches where memory runs out and no result depends on how rows stand in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from firstlab.data.files import warn

Result = TypeVar("Result")


class Room:
    """How many rows fit into one pass: half as many from the time that memory ran out."""

    def __init__(self) -> None:
        self.most: int | None = None

    def passes(self, rows: Sequence[int], run: Callable[[Sequence[int]], Result]) -> Iterator[Result]:
        """`run(rows)`, in several passes if need be; with memory for not even one row, its OutOfMemoryError."""
        done = 0
        while done < len(rows):
            part = rows[done : done + (self.most or len(rows))]
            try:
                found = run(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self.most = len(part) // 2
            else:
                done += len(part)
                yield found
                continue
            go_on_with(self.most)  # here the failed pass has let go of its tensors


def go_on_with(rows: int) -> None:
    """Give memory back to the device and say what the next passes read."""
    torch.cuda.empty_cache()
    warn(f"out of memory: going on with {rows} rows in a pass")
