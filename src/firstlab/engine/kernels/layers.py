"""Run decoder layers and the head behind them through our kernels and, where that is faster, the library's products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firstlab.engine.kernels.attention import attend
from firstlab.engine.kernels.pointwise import rms_norm, silu_times_up
from firstlab.engine.kernels.product import gated, product
from firstlab.engine.kernels.tiles import Tile, Tiles

if TYPE_CHECKING:
    from firstlab.engine.llama_step import Layer, Maps

#: Parts of a row's length that attention computes apart, at most.
_MOST_SPLITS = 64


def fits(layers: Sequence[Layer]) -> bool:
    """Whether the kernels compute these layers: numbers of 16 or 32 bits, and SiLU gates."""
    types, some = (torch.float32, torch.bfloat16, torch.float16), torch.linspace(-3, 3, 9)
    return all(layer.norm_1.weight.dtype in types and torch.allclose(layer.act(some), F.silu(some)) for layer in layers)


class FusedLayers:
    """Layers as few launches each, on memory that may be fixed.

    Args:
        layers: See `fits`.
        cos, sin: Angles [places, 1, head dim], see `LlamaStep`.
        max_batch_size: Rows at most.
    """

    def __init__(self, layers: Sequence[Layer], cos: Tensor, sin: Tensor, max_batch_size: int) -> None:
        self._layers, self._cos, self._sin = layers, cos, sin
        most = max_batch_size * max(layer.kv_heads for layer in layers)
        self._ended = torch.zeros(most, dtype=torch.int32, device=cos.device)
        self._tiles = Tiles(cos.device)
        self._processors, shared = 4, 1 << 16
        if cos.device.type == "cuda":
            properties = torch.cuda.get_device_properties(cos.device)
            self._processors = properties.multi_processor_count
            shared = getattr(properties, "shared_memory_per_block_optin", shared)
        # Places of keys and values that attention reads at a time: two readings of both must fit beside the queries.
        most = max(16, shared // (6 * cos.shape[-1] * cos.element_size()))
        self._places = min(64, 1 << (most.bit_length() - 1))

    def __call__(self, index: int, x: Tensor, kv: Tensor, at: Tensor) -> None:
        """x [n, D] becomes the layer's output; its keys and values go to the places `at` [n] of kv."""
        layer: Any = self._layers[index]
        self.finish(layer, x, self._attend(layer, self.product(x, layer.qkv, layer.norm_1), kv, at))

    def finish(self, layer: Any, x: Tensor, mixed: Tensor) -> None:
        """The layer's input x [n, D] becomes its output, from what attention read [n, heads · head dim]."""
        self.product(mixed, layer.out, out=x, add=True)
        self.product(self._gate(x, layer.gate_up, layer.norm_2), layer.down, out=x, add=True)

    def product(self, x: Tensor, maps: Maps, norm: Any = None, out: Tensor | None = None, add: bool = False) -> Tensor:
        """The maps of norm(x) side by side, in `out` if that is given, or added to it."""
        weight, bias = maps.weight, maps.bias
        scale, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        width = sum(each.out_features for each in maps.linears)
        found = x.new_empty(len(x), width) if out is None else out

        def run(tile: Tile | None, into: Tensor) -> None:
            if tile is not None:
                product(x, weight, maps.scale, bias, scale, eps, add, into, list(tile))
                return
            given = x if scale is None else rms_norm(x, scale, eps)
            if weight is None or maps.scale is not None:
                into.add_(maps(given)) if add else into.copy_(maps(given))
                return
            torch.addmm(into, given, weight.t(), beta=int(add), out=into)
            if bias is not None:
                into += bias

        kind = "product" if norm is None else "norm_product"
        run(self._tile(kind, x, maps, lambda tile: run(tile, torch.empty_like(found))), found)
        return found

    def _gate(self, x: Tensor, maps: Maps, norm: Any) -> Tensor:
        """silu(gate) · up of the normed x, [n, N]."""
        weight: Any = maps.weight  # none where there is no tile

        def run(tile: Tile | None) -> Tensor:
            if tile is None:
                return silu_times_up(maps(rms_norm(x, norm.weight, norm.eps)))
            out = x.new_empty(len(x), len(weight) // 2)
            gated(x, weight, maps.scale, maps.bias, norm.weight, norm.eps, out, list(tile))
            return out

        return run(self._tile("gated", x, maps, run))

    def _tile(self, kind: str, x: Tensor, maps: Maps, run: Callable[[Tile | None], object]) -> Tile | None:
        """How our kernel multiplies x by these maps; None: the library does."""
        if maps.weight is None:
            return None
        n, k = maps.weight.shape
        shape = (n // 2 if kind == "gated" else n, k)
        return self._tiles(kind if maps.scale is None else f"int8_{kind}", len(x), shape, x.dtype, run)

    def _attend(self, layer: Layer, qkv: Tensor, kv: Tensor, at: Tensor) -> Tensor:
        query_norm, key_norm = layer.query_norm, layer.key_norm
        programs, splits = len(qkv) * layer.kv_heads, 1
        # A program for every processor, but no part shorter than one reading.
        while splits < _MOST_SPLITS and splits * programs < self._processors and splits * self._places < kv.shape[2]:
            splits *= 2
        return attend(
            qkv.view(len(qkv), -1, layer.head_dim),
            kv,
            at,
            self._cos,
            self._sin,
            None if query_norm is None else query_norm.weight,
            None if key_norm is None else key_norm.weight,
            0.0 if query_norm is None else query_norm.eps,
            0.0 if key_norm is None else key_norm.eps,
            layer.head_dim**-0.5,
            splits,
            self._places,
            self._ended,
        )
