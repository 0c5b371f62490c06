"""Run the step of `LlamaStep` as few graph replays: one per run of consecutive layers, one before and one after them.

All tensors between them stand at fixed addresses and have fixed shapes. A route that skips k layers is at most k + 1
runs, which routes share; each is captured when it is first needed. What has been run `OFTEN` times gets a replay of its
own, in which the device does not wait between runs. Two things change their shape: how many rows they
compute, rounded up to a power of two, and, without our kernels, how many places attention sees, rounded up to one of
four sizes per doubling.

Rows of different routes: a layer computes the rows that run it, gathered and rounded up to the most in its run. What
rounding up adds is computed on a spare row of one token and in free places, where nobody reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlab.engine.graphs import Body, Graphs
from firstlab.engine.llama_step import LlamaStep, Maps, Plan, Positions
from firstlab.engine.prefill import Prefill, Prompts, bucket_of
from firstlab.model.quantization import stored_tensors
from firstlab.model.route_router import RouteRouter
from firstlab.model.routers import Routers
from firstlab.model.routes import EarlyExit, Routes

if TYPE_CHECKING:
    from firstlab.engine.kernels.layers import FusedLayers

SMALLEST_WINDOW = 64
#: Steps after which the whole of a route is captured as one.
OFTEN = 64
#: Wholes whose steps are counted.
_COUNTED = 4096


def size_of(rows: int, most: int) -> int:
    """The smallest power of two that holds `rows`, at most `most`."""
    return min(1 << (rows - 1).bit_length(), most)


def runs_of(layers: Sequence[int]) -> list[list[int]]:
    """Ascending layers, cut where one is left out."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


class GraphStep(LlamaStep):
    """`LlamaStep` from replays. `exit_early`, which asks after each layer which rows go on, stays as it is there.

    Args:
        lm, max_batch_size, max_length: See `LlamaStep`.
        graphs: Makes the replays.
        kernels: Whether layers that fit our kernels run through them; None: on CUDA, where Triton is there.
    """

    def __init__(
        self, lm: Any, max_batch_size: int, max_length: int, graphs: Graphs, kernels: bool | None = None
    ) -> None:
        # Fast attention wants rows of masks aligned to 8.
        super().__init__(lm, max_batch_size, -(-max_length // 8) * 8)
        self._lm, self._graphs = lm, graphs
        self._addresses = self._current_addresses()
        device, weight = self.embedding.device, self.embedding
        self._fused: FusedLayers | None = None
        if kernels or (kernels is None and device.type == "cuda" and find_spec("triton") is not None):
            from firstlab.engine.kernels.layers import FusedLayers, fits

            self._fused = FusedLayers(self.layers, self.cos, self.sin, max_batch_size) if fits(self.layers) else None
        # Line 0 of what follows is about all rows in their order, line 1 + i about the rows of layer i in its order.
        # With one row they are the same.
        lines = 1 if max_batch_size == 1 else 1 + len(self.layers)
        self._spare, window = max_batch_size, 0 if self._fused else len(self._places)
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
        self._taken: Counter[Hashable] = Counter()  # steps of wholes that are not captured
        self._counted: Hashable = None  # the current one, None where it is captured
        self._prefill = Prefill(self, self._fused, max_batch_size)

    def read(self, prompts: Sequence[Sequence[int]], routers: Routers | RouteRouter, rule: Routes | None) -> Prompts:
        """What `join` takes of prompts, and their first logits; the rule must let a prompt run every layer."""
        return self._prefill(prompts, routers, rule, self._graphs)

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
        window = 0 if self._fused else bucket_of(max(self.lengths) + 1, len(self._places), SMALLEST_WINDOW)
        if self._replays is None or self._replays[0] != window or self._taken[self._counted] >= OFTEN:
            self._replays = window, self._list_replays(self._plan, window)
        if self._counted is not None:
            self._taken[self._counted] += 1
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
        filled = torch.zeros(2, len(self._filled), dtype=torch.long)
        filled[0, :rows], filled[1, :rows] = torch.tensor(self.lengths), 1
        for there, here in ((self._order, lines), (self._filled, filled[0]), (self._grows, filled[1])):
            there.copy_(here, non_blocking=True)

    def _list_replays(self, plan: Plan, window: int) -> list[Body]:
        if len(self._taken) > _COUNTED:
            self._taken.clear()
        size = size_of(len(self.lengths), self._spare)
        apart = {index for index, _, rows in plan.layers if rows is not None}
        parts: list[tuple[Hashable, Body, int]] = [
            (("begin", window, bool(apart)), partial(self._start, window, bool(apart)), 1)
        ]
        for run in runs_of([index for index, _, _ in plan.layers]):
            some, mixed = size_of(max(len(self._slots[each]) for each in run), self._spare), not apart.isdisjoint(run)
            body = partial(self._run, run, window, some, mixed)
            parts.append(((run[0], run[-1], window, some, mixed), body, len(run)))
        parts.append((("end", size), partial(self._finish_step, size), 1))
        whole = tuple(key for key, _, _ in parts)
        if whole in self._graphs or self._taken[whole] >= OFTEN:
            del self._taken[whole]  # forgotten by the graphs, it has to earn its place again
            self._counted = None
            return [self._graphs(whole, partial(_all, [body for _, body, _ in parts]), len(plan.layers) + 2)]
        self._counted = whole
        return [self._graphs(*part) for part in parts]

    # -- what is captured: fixed memory in, fixed memory out --

    def _start(self, window: int, mixed: bool) -> None:
        """Positions, angles and masks of this step, and the tokens' embeddings."""
        lines = slice(None if mixed else 1)
        at = self._filled[self._order[lines]]
        self._at[lines] = at
        self._x.copy_(F.embedding(self._tokens, self.embedding))
        if not window:
            return
        self._cos[lines] = self.cos[at]
        self._sin[lines] = self.sin[at]
        mask = self._mask[lines, ..., :window]
        hidden = self._places[:window] > at.view(*at.shape, 1, 1, 1)
        mask.zero_().masked_fill_(hidden, float("-inf"))

    def _run(self, layers: Sequence[int], window: int, rows: int, mixed: bool) -> None:
        """Layers, each for all rows or for its own, gathered."""
        for index in layers:
            line = 1 + index if mixed else 0
            order = self._order[line, :rows]
            x = self._x.index_select(0, order) if mixed else self._x[:rows]
            self._run_layer(index, x, line, window)
            if mixed:
                self._x.index_copy_(0, order, x)

    def _run_layer(self, index: int, x: Tensor, line: int, window: int) -> None:
        """x [n, D] becomes the output of the layer."""
        layer, kv, rows = self.layers[index], self.kv[index], len(x)
        at, cos, sin = self._at[line, :rows], self._cos[line, :rows], self._sin[line, :rows]
        assert kv is not None
        if self._fused is not None:
            self._fused(index, x, kv, at)
            return
        here = Positions(at, cos, sin, window, self._mask[line, :rows, ..., :window])
        layer.finish(*layer.gate(x, self._attend(index, layer.project(x, cos, sin), here)), out=x)

    def _finish_step(self, rows: int) -> None:
        """Logits, and the rows are one token longer."""
        x, scores = self._x[:rows], self._scores[:rows]
        if self._fused is not None:
            self._fused.product(x, Maps([self.head], self.head.weight, self.head.bias), self.norm, scores)
        else:
            scores.copy_(self._logits(x))
        self._filled += self._grows


def _all(bodies: Sequence[Body]) -> None:
    for body in bodies:
        body()
