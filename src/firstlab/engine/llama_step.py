"""One decode step of Llama-like models over static keys and values, without the transformers module stack.

Rows of one step may have different routes: a layer computes the rows that run it and no others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstlab.model.quantization import Int8Linear, is_quantized, stored_tensors
from firstlab.model.routes import EarlyExit

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the angles of the others depend on the length of the text


def check_supported(lm: nn.Module) -> None:
    """Raises ValueError for a model whose step is not the one written here."""
    name, config = type(lm).__name__, getattr(lm, "config", None)
    way_out = "decode it with RouterAugmentedLM.generate"
    if name not in SUPPORTED:
        raise ValueError(f"{name}: the decode engine knows {', '.join(SUPPORTED)}; {way_out}")
    windows = getattr(config, "layer_types", None) or ["full_attention"]
    if not name.startswith("Qwen") and getattr(config, "sliding_window", None) is not None:
        windows = ["sliding_attention"]
    if set(windows) != {"full_attention"}:
        raise ValueError(f"{name} with a sliding window: the decode engine keeps no windows; {way_out}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        raise ValueError(f"{name} with rope_type={rope['rope_type']!r}: angles must not change with length; {way_out}")
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1:
        raise ValueError(f"{name} with partial_rotary_factor={share}: the decode engine turns whole heads; {way_out}")


def orders_anew(lm: nn.Module) -> bool:
    """Whether a step keeps the weights of this model column by column: a CPU reads float32 up to a third faster so."""
    weight = next(lm.parameters())
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not is_quantized(lm)


def _fuse(linears: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """One weight for several maps of one input; the modules become views of it. See `orders_anew`."""
    weights = [linear.weight.data for linear in linears]
    by_column = weights[0].device.type == "cpu" and weights[0].dtype == torch.float32
    if _is_fused(weights, by_column):  # by an earlier step
        rows = sum(len(weight) for weight in weights)
        weight = weights[0].as_strided((rows, weights[0].shape[1]), weights[0].stride())
    else:
        weight = torch.cat(weights).contiguous()
        if by_column:
            weight = weight.t().contiguous().t()
        for linear, part in zip(linears, weight.split([len(each) for each in weights]), strict=True):
            linear.weight.data = part
            if by_column:
                linear.register_state_dict_post_hook(_save_by_row)
    return weight, None if linears[0].bias is None else _fuse_vectors([linear.bias for linear in linears])


def _fuse_vectors(parameters: Sequence[Tensor]) -> Tensor:
    """One vector of several, which become views of it."""
    columns = [each.data.unsqueeze(1) for each in parameters]
    if _is_fused(columns, False):
        return columns[0].as_strided((sum(map(len, columns)),), (1,))
    whole = torch.cat(columns).squeeze(1)
    for each, part in zip(parameters, whole.split([len(each) for each in columns]), strict=True):
        each.data = part
    return whole


@dataclass
class Maps:
    """Linear maps of one input, side by side."""

    linears: Sequence[Any]
    weight: Tensor | None = None  # of all; None where only the modules can read theirs
    bias: Tensor | None = None
    scale: Tensor | None = None  # of each output, where the weights are 8-bit integers

    @classmethod
    def of(cls, linears: Sequence[Any], plain: bool) -> Maps:
        """Fuse plain weights or 8-bit ones, of which the modules become views; other quantized ones stay apart."""
        if plain:
            return cls(linears, *_fuse(linears))
        if not all(isinstance(each, Int8Linear) for each in linears):
            return cls(linears)
        return cls(linears, *_fuse(linears), _fuse_vectors([linear.scale for linear in linears]))

    def without_first(self, width: int) -> Maps:
        """The same but for the first map, of this width; all of a single map that cannot be split."""
        if self.weight is None or self.scale is not None:
            return Maps(self.linears[1:] or self.linears)
        return Maps(self.linears[1:], self.weight[width:], None if self.bias is None else self.bias[width:])

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is not None and self.scale is None:
            return F.linear(x, self.weight, self.bias)
        return self.linears[0](x) if len(self.linears) == 1 else torch.cat([linear(x) for linear in self.linears], -1)


def _save_by_row(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Files hold weights row by row, and what writes them asks for that."""
    weight = state[prefix + "weight"]
    if not weight.is_contiguous():
        state[prefix + "weight"] = weight.contiguous()


def _is_fused(weights: Sequence[Tensor], by_column: bool) -> bool:
    """Whether the weights stand one behind the other in one storage, in the order that is wanted."""
    strides = {weight.stride() for weight in weights}
    wanted = (1, sum(map(len, weights))) if by_column else (weights[0].shape[1], 1)
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    ends = [weight.data_ptr() + len(weight) * weight.stride(0) * weight.element_size() for weight in weights]
    return strides == {wanted} and len(storages) == 1 and [weight.data_ptr() for weight in weights[1:]] == ends[:-1]


def _parts(module: Any, fused: str, apart: Sequence[str]) -> list[Any]:
    """The linear maps of one input."""
    return [getattr(module, name) for name in ([fused] if hasattr(module, fused) else apart)]


class _RMSNorm:
    """RMS norm with the weight of a module."""

    def __init__(self, norm: Any) -> None:
        self.weight: Tensor = norm.weight.data
        self.eps: float = norm.variance_epsilon
        self.size = len(self.weight)
        # On a CPU torch's own is ten operations, each of which takes longer to start than to run.
        self.is_slow = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        self._zero = torch.zeros_like(self.weight[:1])
        self._least = torch.full_like(self._zero, math.sqrt(self.size * self.eps))

    def __call__(self, x: Tensor) -> Tensor:
        if not self.is_slow:
            return F.rms_norm(x, (self.size,), self.weight, self.eps)
        length = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._least)
        return torch.addcdiv(self._zero, x, length, value=math.sqrt(self.size)).mul_(self.weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn queries or keys [n, heads, head dim] in place, by angles [n or 1, 1, head dim]."""
    rolled = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(rolled, sin)


class Layer:
    """What a decoder layer of transformers does before and after attention."""

    def __init__(self, layer: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        plain = not is_quantized(layer)
        # Phi-3 has them in one map already.
        self.qkv = Maps.of(_parts(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")), plain)
        self.gate_up = Maps.of(_parts(mlp, "gate_up_proj", ("gate_proj", "up_proj")), plain)
        # Not fused with anything, but read like the others: calling a module takes longer than a small product.
        self.out, self.down = Maps.of([attention.o_proj], plain), Maps.of([mlp.down_proj], plain)
        self.act = getattr(mlp, "act_fn", None) or mlp.activation_fn
        self.norm_1, self.norm_2 = _RMSNorm(layer.input_layernorm), _RMSNorm(layer.post_attention_layernorm)
        query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.query_norm = None if query_norm is None else _RMSNorm(query_norm)
        self.key_norm = None if key_norm is None else _RMSNorm(key_norm)
        self._watched = [layer.input_layernorm, self.qkv.linears[0], self.gate_up.linears[0]]
        self._read = self._stored()  # kept, so that nothing else gets their addresses

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, normed: Tensor | None = None) -> Tensor:
        """Queries, keys, values [n, heads + 2 · kv heads, head dim] of the layer's input x [n, D], the former turned.

        Angles are [n or 1, 1, head dim]; `normed` is the normed x where that is known.
        """
        qkv = self.qkv(self.norm_1(x) if normed is None else normed).view(len(x), -1, self.head_dim)
        if self.query_norm is not None:
            queries = qkv[:, : self.heads]
            queries.copy_(self.query_norm(queries))
        self._norm_keys(qkv[:, self.heads : self.heads + self.kv_heads])
        _rotate(qkv[:, : self.heads + self.kv_heads], cos, sin)
        return qkv

    def project_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The keys and values [n, 2 · kv heads, head dim] of `project` alone."""
        found = self.qkv.without_first(self.heads * self.head_dim)(self.norm_1(x))
        # A single quantized map gives queries as well.
        keys_values = found[:, -2 * self.kv_heads * self.head_dim :].unflatten(1, (-1, self.head_dim))
        keys = keys_values[:, : self.kv_heads]
        self._norm_keys(keys)
        _rotate(keys, cos, sin)
        return keys_values

    def _norm_keys(self, keys: Tensor) -> None:
        if self.key_norm is not None:
            keys.copy_(self.key_norm(keys))

    def gate(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """From the layer's input x [n, D] and what attention read [n, heads · head dim]: x behind attention, and the
        gated numbers that `finish` takes."""
        after = x + self.out(mixed)
        gate, up = self.gate_up(self.norm_2(after)).chunk(2, -1)
        return after, self.act(gate) * up

    def finish(self, after: Tensor, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """The layer's output [n, D], in `out` if that is given."""
        return torch.add(after, self.down(hidden), out=out)

    def is_current(self) -> bool:
        return [each.data_ptr() for each in self._stored()] == [each.data_ptr() for each in self._read]

    def _stored(self) -> list[Tensor]:
        # The norm as well: conversion leaves the integers of quantized maps where they are.
        return [each for part in self._watched for each in stored_tensors(part.weight)]


@dataclass
class Plan:
    """What the steps of one set of rows have in common."""

    at: Tensor  # [N], where the next token goes: of all rows, then of each different subset that some layer runs
    sizes: list[int]  # rows of each of these sets; they add up to N
    layers: list[tuple[int, int, Tensor | None]]  # (layer, set, rows) of each that runs; rows None: all in their order


@dataclass
class Positions:
    """Of the rows that a layer runs: where their token goes, its angles, and what attention sees."""

    at: Tensor | slice  # [n], or a slice of one place that all rows share
    cos: Tensor  # [n or 1, 1, head dim]
    sin: Tensor
    end: int  # attention sees the places below
    mask: Tensor | None  # [n, 1, 1, end], added to the scores; None where every row sees them all


class LlamaStep:
    """Keys, values and the step over them. A row holds its tokens at 0 … length - 1, without padding.

    A layer keeps the rows that run it one behind the other, so that attention reads a plain slice: a row that leaves
    gives its slot to the last one.

    Attributes:
        lengths: Tokens that each row holds.
        kv: [rows, 2 · kv heads, max_length, head dim] of each layer, keys before values; None until a row runs it.
    """

    def __init__(self, lm: Any, max_batch_size: int, max_length: int) -> None:
        check_supported(lm)
        config, decoder = lm.config, lm.model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.embedding, self.norm, self.head = decoder.embed_tokens.weight, _RMSNorm(decoder.norm), lm.lm_head
        self.layers = [Layer(each, self.heads, self.kv_heads, self.head_dim) for each in decoder.layers]
        self.kv: list[Tensor | None] = [None] * len(self.layers)
        self._shape = (max_batch_size, 2 * self.kv_heads, max_length, self.head_dim)
        places = torch.arange(max_length, device=self.embedding.device)
        cos, sin = decoder.rotary_emb(self.embedding[:1], places.unsqueeze(0))
        # rotate_half is a roll by half a head with the sign of the first half turned: the sign moves into the sine.
        sign = torch.ones_like(sin[0, 0])
        sign[: self.head_dim // 2] = -1
        self.cos, self.sin = cos[0].unsqueeze(1), (sin[0] * sign).unsqueeze(1)
        self._places, self._rows = places, torch.arange(max_batch_size, device=places.device)
        self.clear()

    @property
    def bytes_per_token(self) -> int:
        """Of one layer's keys and values."""
        return 2 * self.kv_heads * self.head_dim * self.embedding.element_size()

    def is_current(self) -> bool:
        """Whether the model still has the weights that were fused: false after `to`, or another fusion elsewhere."""
        return all(layer.is_current() for layer in self.layers)

    def allocated_bytes(self) -> int:
        """What the static keys and values take now."""
        return sum(kv.numel() * kv.element_size() for kv in self.kv if kv is not None)

    # -- rows --

    def clear(self) -> None:
        """Forget all rows."""
        self.lengths: list[int] = []
        self._slots: list[list[int]] = [[] for _ in self.layers]  # of each layer: the rows that run it
        self._plan: Plan | None = None

    def join(self, kv: Mapping[int, Tensor], length: int) -> None:
        """Add a row, numbered behind the others; kv: [2, kv heads, length, head dim] of each layer of its route."""
        for layer, given in kv.items():
            slots = self._slots[layer]
            self._reserve(layer)[len(slots), :, :length] = given.flatten(0, 1)
            slots.append(len(self.lengths))
        self.lengths.append(length)
        self._plan = None

    def leave(self, row: int) -> None:
        """Take a row out; the last row gets its number."""
        self.drop(row, (layer for layer, slots in enumerate(self._slots) if row in slots))
        last = len(self.lengths) - 1
        self._slots = [[row if each == last else each for each in slots] for slots in self._slots]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def drop(self, row: int, layers: Iterable[int]) -> None:
        """Forget the keys and values of a row in some layers, which it runs no more."""
        for layer in layers:
            slots, kv = self._slots[layer], self._reserve(layer)
            slot, last = slots.index(row), slots.pop()
            if last != row:
                length = self.lengths[last]
                kv[slot, :, :length] = kv[len(slots), :, :length]
                slots[slot] = last
        self._plan = None

    def _reserve(self, layer: int) -> Tensor:
        kv = self.kv[layer]
        if kv is None:
            # Zeros: masked places must not hold NaN.
            kv = self.kv[layer] = torch.zeros(self._shape, dtype=self.embedding.dtype, device=self.embedding.device)
        return kv

    def _make_plan(self) -> Plan:
        everyone = tuple(range(len(self.lengths)))
        sets, layers = {everyone: 0}, []
        tensors: dict[tuple[int, ...], Tensor | None] = {everyone: None}
        for layer, slots in enumerate(self._slots):
            rows = tuple(slots)
            if not rows:
                continue
            if rows not in sets:
                sets[rows] = len(sets)
                tensors[rows] = torch.tensor(rows, device=self._places.device)
            layers.append((layer, sets[rows], tensors[rows]))
        at = torch.tensor([self.lengths[row] for rows in sets for row in rows], device=self._places.device)
        return Plan(at, [len(rows) for rows in sets], layers)

    # -- steps --

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after one more token [B] in every row."""
        plan, positions = self._begin()
        x = F.embedding(tokens, self.embedding)
        for index, which, rows in plan.layers:
            layer = self.layers[index]
            here = positions[which]
            some = x if rows is None else x.index_select(0, rows)
            some = layer.finish(*layer.gate(some, self._attend(index, layer.project(some, here.cos, here.sin), here)))
            x = some if rows is None else x.index_copy_(0, rows, some)
        self._end(plan)
        return self._logits(x)

    @torch.no_grad()
    def exit_early(self, tokens: Tensor, rule: EarlyExit, steps: Tensor) -> tuple[Tensor, Tensor]:
        """One more token [B] in every row at its step [B]; logits [B, V], and how many layers each row ran [B].

        A row, which must have joined with every layer, leaves at the first layer that is sure enough; the layers above
        keep keys and values of its exit state. The host waits for the device after each layer, to ask which rows go on.
        """
        plan, positions = self._begin()
        x, here = F.embedding(tokens, self.embedding), positions[0]
        rows, thresholds = self._rows[: len(tokens)], rule.thresholds(steps)
        depth = torch.full_like(rows, len(self.layers))
        for index, layer in enumerate(self.layers):
            if not len(rows):
                self._pass_on(index, x, here)
                continue
            mixed = self._attend(index, layer.project(x, here.cos, here.sin), here)
            if len(rows) < len(x):
                mixed = mixed[rows]
            before = x[rows]
            after = layer.finish(*layer.gate(before, mixed))
            x = x.index_copy(0, rows, after)
            if rule.min_layers <= index + 1 < len(self.layers):
                leaves = rule.confidence_of(before, after, self._logits) >= thresholds[rows]
                depth[rows[leaves]] = index + 1
                rows = rows[~leaves]
        self._end(plan)
        return self._logits(x), depth

    def _begin(self) -> tuple[Plan, list[Positions]]:
        plan = self._plan = self._plan or self._make_plan()
        end = max(self.lengths) + 1
        if min(self.lengths) + 1 == end:
            place = slice(end - 1, end)
            return plan, [Positions(place, self.cos[place], self.sin[place], end, None)] * len(plan.sizes)
        hidden = (self._places[:end] > plan.at.unsqueeze(1)).view(-1, 1, 1, end)
        # Added, not boolean: attention would turn it into this at every layer.
        scores = torch.zeros_like(hidden, dtype=self.embedding.dtype).masked_fill_(hidden, float("-inf"))
        of_all = (plan.at, self.cos[plan.at], self.sin[plan.at], scores)
        at, cos, sin, mask = (each.split(plan.sizes) for each in of_all)
        return plan, [Positions(at[i], cos[i], sin[i], end, mask[i]) for i in range(len(plan.sizes))]

    def _end(self, plan: Plan) -> None:
        plan.at += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def _attend(self, index: int, qkv: Tensor, here: Positions) -> Tensor:
        """Take the keys and values of a projection in, and give what its queries read [n, heads · head dim]."""
        kv, rows = self.kv[index], len(qkv)
        assert kv is not None
        queries, new = qkv.split([self.heads, 2 * self.kv_heads], 1)
        self._write(kv, new, here)
        # The query heads of a group stand where query positions would: grouped attention without repeated keys.
        queries = queries.reshape(rows, self.kv_heads, -1, self.head_dim)
        keys, values = kv[:rows, :, : here.end].chunk(2, 1)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=here.mask).reshape(rows, -1)

    def _pass_on(self, index: int, x: Tensor, here: Positions) -> None:
        """Take the keys and values of x [n, D] in, for later tokens."""
        kv = self.kv[index]
        assert kv is not None
        self._write(kv, self.layers[index].project_keys_values(x, here.cos, here.sin), here)

    def _write(self, kv: Tensor, new: Tensor, here: Positions) -> None:
        """Keys and values [n, 2 · kv heads, head dim] go to their places."""
        rows = len(new)
        if isinstance(here.at, slice):
            kv[:rows, :, here.at.start] = new
        else:
            kv[self._rows[:rows], :, here.at] = new
