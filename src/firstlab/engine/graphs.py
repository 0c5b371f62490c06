"""Capture functions on fixed memory as CUDA graphs and replay them; without a GPU, just call them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

Body = Callable[[], None]
#: Layers that stand captured at most, in all replays together.
LIMIT = 2048


class Graphs:
    """Keeps one replay for every key, and forgets those that were not asked for longest.

    A body reads and writes tensors that live as long as the graphs, never waits for the device, and does the same
    whatever those tensors hold. Bodies share the memory that they allocate, so none may hand such memory to another.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._replays: dict[Hashable, tuple[Body, int]] = {}  # the last asked for stands last
        if device.type == "cuda":
            self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._replays

    def __len__(self) -> int:
        return len(self._replays)

    def __call__(self, key: Hashable, body: Body, size: int = 1) -> Body:
        """What does the body's work, which is as large as `size` layers; only the first body of a key counts."""
        kept = self._replays.pop(key, None) or (self.make(body), size)
        self._replays[key] = kept
        while sum(each for _, each in self._replays.values()) > LIMIT and len(self._replays) > 1:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # it may be running
            del self._replays[next(iter(self._replays))]
        return kept[0]

    def make(self, body: Body) -> Body:
        """What does the work of a body without a key."""
        return _Replay(body, self._stream, self._pool) if self._device.type == "cuda" else body


class _Replay:
    """Runs a body once, which warms it up, then captures it; later calls replay what was captured."""

    def __init__(self, body: Body, stream: torch.cuda.Stream, pool: Any) -> None:
        self._body: Body | None = body  # forgotten after capture: it holds what holds the graphs
        self._stream, self._pool, self._graph = stream, pool, torch.cuda.CUDAGraph()

    def __call__(self) -> None:
        if self._body is None:
            self._graph.replay()
            return
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._body()
        current.wait_stream(self._stream)
        # Other threads may use the device meanwhile: those of a server check their requests.
        mode = "thread_local"
        with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
            self._body()  # recorded, not run
        self._body = None
