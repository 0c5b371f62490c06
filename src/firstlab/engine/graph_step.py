"""Run the step of `LlamaStep` as a list of graph replays: one per layer, one before and one after them.

All tensors between them have fixed addresses and shapes, so any route is a list of graphs that exist already. Two sizes
change, rarely: the rows that a layer computes, rounded up to a power of two, and the places that attention sees,
rounded up to one of four sizes per doubling. Each pair has its own graphs, made when it is first needed.

A layer computes the rows that run it, gathered and rounded up. What rounding up adds is computed on a spare row and in
free places, where nobody reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlab.engine.graphs import Body, Graphs
from firstlab.engine.llama_step import Layer, LlamaStep, Plan, Positions
from firstlab.model.quantization import stored_tensors
from firstlab.model.routes import EarlyExit

SMALLEST_WINDOW = 64


def window_of(length: int, longest: int) -> int:
    """The smallest of 64, 80, 96, 112, 128, 160, … that holds `length` places, at most `longest`."""
    window = SMALLEST_WINDOW
    while window < length:
        # A quarter of the power of two below.
        window += 1 << (window.bit_length() - 3)
    return min(window, longest)


def size_of(rows: int, most: int) -> int:
    """The smallest power of two that holds `rows`, at most `most`."""
    return min(1 << (rows - 1).bit_length(), most)


_copies = itertools.count()


def _own(function: Any) -> FunctionType:
    """The function under a name of its own: models of other sizes or types in one process must not meet.

    torch compiles few variants of one function, and makes sizes that differ between them general, which is slower.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_copies)}")
    return FunctionType(code, function.__globals__, argdefs=function.__defaults__)


class GraphStep(LlamaStep):
    """`LlamaStep` from replays. `exit_early`, which asks after each layer which rows go on, stays as it is there.

    `compiled` fuses the many small kernels before and after attention, which takes a minute at the first tokens.
    """

    def __init__(self, lm: Any, max_batch_size: int, max_length: int, graphs: Graphs, compiled: bool = False) -> None:
        # Fast attention wants rows of masks aligned to 8.
        super().__init__(lm, max_batch_size, -(-max_length // 8) * 8)
        self._lm, self._graphs = lm, graphs
        self._addresses = self._current_addresses()
        self._project: Callable[..., Tensor] = Layer.project
        self._finish: Callable[..., Tensor] = Layer.finish
        device, weight = self.embedding.device, self.embedding
        if compiled:
            # Fused into one kernel with what stands around it, a product with a single row reads at full speed.
            options: dict[str, Any] = {"coordinate_descent_tuning": True} if device.type == "cuda" else {}
            self._project = torch.compile(_own(Layer.project), fullgraph=True, options=options)
            self._finish = torch.compile(_own(Layer.finish), fullgraph=True, options=options)
        # Line 0 of what follows is about all rows in their order, line 1 + i about the rows of layer i in its order.
        # With one row they are the same.
        lines = 1 if max_batch_size == 1 else 1 + len(self.layers)
        self._spare, window = max_batch_size, len(self._places)
        whole = {"dtype": torch.long, "device": device}
        self._tokens = torch.zeros(max_batch_size + 1, **whole)
        self._filled, self._grows = torch.zeros_like(self._tokens), torch.zeros_like(self._tokens)
        self._order = torch.full((lines, max_batch_size), self._spare, **whole)
        self._at = torch.zeros(lines, max_batch_size, **whole)
        self._cos = torch.zeros(lines, max_batch_size, 1, self.head_dim, dtype=self.cos.dtype, device=device)
        self._sin = torch.zeros_like(self._cos)
        self._mask = torch.zeros(lines, max_batch_size, 1, 1, window, dtype=weight.dtype, device=device)
        self._x = torch.zeros(max_batch_size + 1, weight.shape[1], dtype=weight.dtype, device=device)
        self._scores = torch.zeros(max_batch_size, len(self.embedding), dtype=weight.dtype, device=device)
        self._replays: tuple[int, list[Body]] | None = None

    def is_current(self) -> bool:
        """Whether all weights still are where the graphs read them."""
        return super().is_current() and self._current_addresses() == self._addresses

    def _current_addresses(self) -> list[int]:
        return [each.data_ptr() for parameter in self._lm.parameters() for each in stored_tensors(parameter)]

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after one more token [B] in every row; the next step overwrites them."""
        if self._plan is None:
            self._plan = self._make_plan()
            self._place(self._plan)
            self._replays = None
        window = window_of(max(self.lengths) + 1, len(self._places))
        if self._replays is None or self._replays[0] != window:
            self._replays = window, self._list_replays(self._plan, window)
        self._tokens[: len(tokens)] = tokens
        for replay in self._replays[1]:
            replay()
        self.lengths = [length + 1 for length in self.lengths]
        return self._scores[: len(tokens)]

    def exit_early(self, tokens: Tensor, rule: EarlyExit, steps: Tensor) -> tuple[Tensor, Tensor]:
        """See `LlamaStep`."""
        self._plan = None  # its positions have not followed the replays, nor will theirs follow it
        found = super().exit_early(tokens, rule, steps)
        self._plan = None
        return found

    def _place(self, plan: Plan) -> None:
        """Tell the device where the rows stand."""
        rows, lines = len(self.lengths), torch.full(self._order.shape, self._spare)
        lines[0, :rows] = torch.arange(rows)
        if len(lines) > 1:
            for layer, _, _ in plan.layers:
                slots = self._slots[layer]
                lines[1 + layer, : len(slots)] = torch.tensor(slots)
        self._order.copy_(lines)
        filled = torch.zeros(2, len(self._filled), dtype=torch.long)
        filled[0, :rows], filled[1, :rows] = torch.tensor(self.lengths), 1
        self._filled.copy_(filled[0])
        self._grows.copy_(filled[1])

    def _list_replays(self, plan: Plan, window: int) -> list[Body]:
        size = size_of(len(self.lengths), self._spare)
        mixed = any(rows is not None for _, _, rows in plan.layers)
        graphs = [self._graphs(("begin", window, mixed), partial(self._start, window, mixed))]
        for index, _, rows in plan.layers:
            line = 0 if rows is None else 1 + index
            some = size_of(len(self._slots[index]), self._spare)
            graphs.append(self._graphs((index, window, some, line), partial(self._run, index, window, some, line)))
        return [*graphs, self._graphs(("end", size), partial(self._finish_step, size))]

    # -- what is captured: fixed memory in, fixed memory out --

    def _start(self, window: int, mixed: bool) -> None:
        """Positions, angles and masks of this step, and the tokens' embeddings."""
        lines = slice(None if mixed else 1)
        at = self._filled[self._order[lines]]
        self._at[lines] = at
        self._cos[lines] = self.cos[at]
        self._sin[lines] = self.sin[at]
        mask = self._mask[lines, ..., :window]
        hidden = self._places[:window] > at.view(*at.shape, 1, 1, 1)
        mask.zero_().masked_fill_(hidden, float("-inf"))
        self._x.copy_(F.embedding(self._tokens, self.embedding))

    def _run(self, index: int, window: int, rows: int, line: int) -> None:
        """One layer, for all rows (line 0) or for its own."""
        cos, sin = self._cos[line, :rows], self._sin[line, :rows]
        here = Positions(self._at[line, :rows], cos, sin, window, self._mask[line, :rows, ..., :window])
        layer, order = self.layers[index], self._order[line, :rows]
        x = self._x[:rows] if line == 0 else self._x.index_select(0, order)
        mixed = self._attend(index, self._project(layer, x, cos, sin), here)
        if line == 0:
            self._finish(layer, x, mixed, out=x)
        else:
            self._x.index_copy_(0, order, self._finish(layer, x, mixed))

    def _finish_step(self, rows: int) -> None:
        """Logits, and the rows are one token longer."""
        self._scores[:rows] = self._logits(self._x[:rows])
        self._filled += self._grows
