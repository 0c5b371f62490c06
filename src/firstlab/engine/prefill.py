"""Read prompts for the decode engine: short ones as replays by length, so that the host does not set the time, long
ones in chunks; or through the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING
from weakref import proxy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from firstlab.engine.graphs import Graphs
from firstlab.engine.llama_step import LlamaStep
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.route_router import RouteRouter
from firstlab.model.routers import Routers
from firstlab.model.routes import RoutersDecide, Routes

if TYPE_CHECKING:
    from firstlab.engine.kernels.layers import FusedLayers

#: Tokens, with padding, up to which a pass is rounded up and replayed. Beyond, the device takes longer than the host.
REPLAYED = 1024
#: Tokens of one pass at most: longer prompts come in chunks, more prompts in turn.
MOST = 4096


@dataclass
class Prompts:
    """What was read."""

    logits: Tensor  # [B, V] behind the last token of each
    routes: Tensor  # [B, L] boolean, the layers of the first decode step
    keys_values: Callable[[int, int], Tensor]  # of a prompt and layer of its route: [2, kv heads, length, head dim]


def bucket_of(length: int, longest: int, smallest: int = 16) -> int:
    """The smallest of 16, 20, 24, 28, 32, 40, … that holds `length` tokens, at most `longest`."""
    size = smallest
    while size < length:
        size += 1 << (size.bit_length() - 3)  # a quarter of the power of two below
    return min(size, longest)


def read_through_model(model: RouterAugmentedLM, prompts: Sequence[Sequence[int]], rule: Routes | None) -> Prompts:
    """All prompts in one pass of the model, padded to the longest."""
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, prompt in enumerate(prompts):
        ids[place, -len(prompt) :] = torch.as_tensor(prompt)
        mask[place, -len(prompt) :] = 1
    cache = model.new_cache(routes=rule)
    out = model(ids.to(model.device), mask.to(model.device), past_key_values=cache, logits_to_keep=1)
    assert cache.routes is not None

    def keys_values(place: int, layer: int) -> Tensor:
        length, cached = len(prompts[place]), cache.layers[layer]
        return torch.stack([cached.keys[place, :, -length:], cached.values[place, :, -length:]])

    return Prompts(out.logits[:, -1], cache.routes, keys_values)


class Prefill:
    """Passes over prompts that stand row by row with padding behind them, which no token sees and no router counts.

    Args:
        step: Whose layers, angles and head are used.
        fused: Our kernels, where they compute these layers.
        max_batch_size: Prompts read together at most.
    """

    def __init__(self, step: LlamaStep, fused: FusedLayers | None, max_batch_size: int) -> None:
        # Weak: the step has this, and a cycle would keep keys, values and graphs alive.
        self._step: LlamaStep = proxy(step)  # type: ignore[assignment]
        self._fused = fused
        self._reads_in_norm = fused is not None or (step.embedding.is_cuda and find_spec("triton") is not None)
        self._longest, device = len(step.cos), step.embedding.device
        room = min(REPLAYED, max_batch_size * self._longest)
        self._ids = torch.zeros(room, dtype=torch.long, device=device)
        self._kept = torch.zeros(room, dtype=torch.bool, device=device)
        self._ends = torch.zeros(max_batch_size, dtype=torch.long, device=device)
        self._logits = step.embedding.new_zeros(max_batch_size, len(step.head.weight))
        self._kv: Tensor | None = None  # [L, room, 2 · kv heads, head dim], when the first pass is replayed
        self._sums: dict[int, Tensor] = {}  # of routers that pool so many numbers

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Sequence[int]], routers: Routers | RouteRouter, rule: Routes | None, graphs: Graphs
    ) -> Prompts:
        """Read all prompts, of similar length together; the rule must let the prompt run every layer."""
        measuring = routers if rule is None or isinstance(rule, RoutersDecide) else None
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        logits: list[Tensor] = []
        sums: list[Tensor | None] = []
        kv: list[Tensor] = []
        while len(kv) < len(order):
            longest = len(prompts[order[len(kv)]])
            some = order[len(kv) : len(kv) + max(1, MOST // longest)]
            found = self._read([prompts[place] for place in some], measuring, graphs)
            logits.append(found[0])
            sums.append(found[1])
            kv += [found[2][:, row, : len(prompts[place])] for row, place in enumerate(some)]
        places, device = torch.tensor(order).argsort(), self._ids.device
        back, of_prompt = places.to(device, non_blocking=True), places.tolist()
        if measuring is None:
            assert rule is not None
            routes = rule.first(len(self._step.layers)).to(device).expand(len(prompts), -1)
        else:
            lengths = torch.tensor([[len(prompt)] for prompt in prompts]).to(device, non_blocking=True)
            rate = rule.skip_rate if isinstance(rule, RoutersDecide) else None
            means = torch.cat([each for each in sums if each is not None])[back] / lengths
            routes = routers.decision(means, rate)[1]
        heads = (2, self._step.kv_heads)

        def keys_values(place: int, layer: int) -> Tensor:
            return kv[of_prompt[place]][layer].unflatten(1, heads).permute(1, 2, 0, 3)

        return Prompts(torch.cat(logits)[back], routes, keys_values)

    def _read(
        self, prompts: Sequence[Sequence[int]], routers: Routers | RouteRouter | None, graphs: Graphs
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits [R, V], sums of what the routers pool, keys and values [L, R, tokens, 2 · kv heads, head dim]."""
        rows, longest = len(prompts), len(prompts[0])
        size, width = min(1 << (rows - 1).bit_length(), len(self._ends)), bucket_of(longest, self._longest)
        if size * width <= len(self._ids):
            return self._replay(prompts, size, width, routers, graphs)
        ids, kept, ends = (each.to(self._ids.device) for each in _padded(prompts, rows, longest))
        kv = self._empty(rows * longest).unflatten(1, (rows, longest))
        sums: Tensor | None = None
        for start in range(0, longest, MOST):
            part = slice(start, start + MOST)
            logits, more = self._run(ids[:, part], kept[:, part], ends - start, kv, start, routers)
            sums = more if sums is None or more is None else sums + more
        return logits, sums, kv

    def _replay(
        self,
        prompts: Sequence[Sequence[int]],
        rows: int,
        width: int,
        routers: Routers | RouteRouter | None,
        graphs: Graphs,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `_read`, by a replay for so many rows and tokens."""
        tokens, real = rows * width, len(prompts)
        if self._kv is None:
            self._kv = self._empty(len(self._ids))
        ids, kept, ends = _padded(prompts, rows, width)
        self._ids[:tokens].copy_(ids.view(-1), non_blocking=True)
        self._kept[:tokens].copy_(kept.view(-1), non_blocking=True)
        self._ends[:rows].copy_(ends, non_blocking=True)
        pooled = None
        key: tuple[object, ...] = ("prefill", rows, width)
        if routers is not None:
            pooled = self._sums_of(routers)
            where = [each.data_ptr() for each in (*routers.parameters(), *routers.buffers())]
            key += (type(routers), routers.settings.input_norm, *where)
        graphs(key, partial(self._body, rows, width, routers, pooled), len(self._step.layers))()
        kv = self._kv[:, :tokens].unflatten(1, (rows, width))[:, :real].clone()  # the next prompts overwrite it
        return self._logits[:real].clone(), None if pooled is None else pooled[:real].clone(), kv

    def _body(self, rows: int, width: int, routers: Routers | RouteRouter | None, pooled: Tensor | None) -> None:
        """What is captured: fixed memory in, fixed memory out."""
        assert self._kv is not None
        ids, kept = (each[: rows * width].view(rows, width) for each in (self._ids, self._kept))
        kv = self._kv[:, : rows * width].unflatten(1, (rows, width))
        logits, sums = self._run(ids, kept, self._ends[:rows], kv, 0, routers)
        self._logits[:rows] = logits
        if pooled is not None:
            assert sums is not None
            pooled[:rows] = sums

    def _sums_of(self, routers: Routers | RouteRouter) -> Tensor:
        width = routers.num_layers if isinstance(routers, Routers) else len(routers.length_weight)
        if width not in self._sums:
            self._sums[width] = torch.zeros(len(self._ends), width, device=self._ids.device)
        return self._sums[width]

    def _empty(self, places: int) -> Tensor:
        step = self._step
        return step.embedding.new_empty(len(step.layers), places, 2 * step.kv_heads, step.head_dim)

    def _run(
        self, ids: Tensor, kept: Tensor, ends: Tensor, kv: Tensor, start: int, routers: Routers | RouteRouter | None
    ) -> tuple[Tensor, Tensor | None]:
        """One pass over the tokens [R, T] from place `start` on: logits [R, V], and sums of what the routers pool.

        `ends` [R] is the last token of each row in this pass, below 0 for none, whose logits mean nothing. Keys and
        values go to kv [L, R, places, 2 · kv heads, head dim].
        """
        step, (rows, tokens) = self._step, ids.shape
        x = F.embedding(ids, step.embedding).flatten(0, 1)
        cos, sin = (each[start : start + tokens].repeat(rows, 1, 1) for each in (step.cos, step.sin))
        readings: list[tuple[Tensor, ...]] = []
        for index, layer in enumerate(step.layers):
            normed = None
            if routers is not None:
                if self._reads_in_norm and isinstance(routers, Routers):
                    normed, reading = self._norm_and_read(x, index, routers)
                    readings.append(tuple(each.view(rows, tokens) for each in reading))
                else:
                    readings.append(routers.readings(x.view(rows, tokens, -1), index, kept))
            qkv = layer.project(x, cos, sin, normed)
            mixed = self._attend(qkv.unflatten(0, (rows, tokens)), kv[index], start)
            if self._fused is None:
                x = layer.finish(*layer.gate(x, mixed))
            else:
                self._fused.finish(layer, x, mixed)
        places = torch.arange(rows, device=ids.device) * tokens + ends.clamp(0, tokens - 1)
        sums = None if routers is None else routers.sums(readings, kept)
        return step._logits(x.index_select(0, places)), sums

    def _norm_and_read(self, x: Tensor, index: int, routers: Routers) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer's normed input, and what `Routers.readings` gives, [n] each, in one pass over the states."""
        from firstlab.engine.kernels.pointwise import rms_norm_and_reading

        norm = self._step.layers[index].norm_1
        normed, products, lengths = rms_norm_and_reading(x, norm.weight, norm.eps, routers.weight[index])
        return normed, (products,) if routers.settings.input_norm == "none" else (products, lengths)

    def _attend(self, qkv: Tensor, kv: Tensor, start: int) -> Tensor:
        """What the queries of qkv [R, T, heads + 2 · kv heads, head dim] read, [R · T, heads · head dim]."""
        step, tokens = self._step, qkv.shape[1]
        end = start + tokens
        kv[:, start:end] = qkv[:, :, step.heads :]
        keys, values = kv[:, :end].transpose(1, 2).chunk(2, 1)
        mask = causal_lower_right(tokens, end) if start else None
        grouped = step.heads != step.kv_heads
        read = F.scaled_dot_product_attention(
            qkv[:, :, : step.heads].transpose(1, 2), keys, values, mask, is_causal=not start, enable_gqa=grouped
        )
        return read.transpose(1, 2).flatten(0, 1).flatten(1)


def _padded(prompts: Sequence[Sequence[int]], rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and what is no padding [rows, width], and each last place [rows]; rows without a prompt are padding."""
    ids, kept = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.as_tensor(prompt)
        kept[row, : len(prompt)] = True
    return ids, kept, kept.sum(1) - 1
