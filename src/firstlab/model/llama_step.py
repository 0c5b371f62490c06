"""One decode step of Llama-like models over static keys and values, without the transformers module stack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the angles of the others depend on the length of the text


def check_supported(lm: nn.Module) -> None:
    """Raises ValueError for a model whose step is not the one written here."""
    name, config = type(lm).__name__, getattr(lm, "config", None)
    way_out = "decode it with RouterAugmentedLM.generate"
    if name not in SUPPORTED:
        raise ValueError(f"{name}: the decode engine knows {', '.join(SUPPORTED)}; {way_out}")
    windows = getattr(config, "layer_types", None) or ["full_attention"]
    if name != "Qwen2ForCausalLM" and getattr(config, "sliding_window", None) is not None:
        windows = ["sliding_attention"]
    if set(windows) != {"full_attention"}:
        raise ValueError(f"{name} with a sliding window: the decode engine keeps no windows; {way_out}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        raise ValueError(f"{name} with rope_type={rope['rope_type']!r}: angles must not change with length; {way_out}")


def _fuse(linears: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """One weight for several maps of one input. The modules become views of it, so nothing is stored twice."""
    weights = [linear.weight.data for linear in linears]
    if _is_fused(weights):  # by an earlier step
        rows = sum(len(weight) for weight in weights)
        weight = weights[0].as_strided((rows, weights[0].shape[1]), weights[0].stride())
    else:
        weight = torch.cat(weights)
        for linear, part in zip(linears, weight.split([len(each) for each in weights]), strict=True):
            linear.weight.data = part
    bias = None if linears[0].bias is None else torch.cat([linear.bias.data for linear in linears])
    return weight, bias


def _is_fused(weights: Sequence[Tensor]) -> bool:
    """Whether the weights stand one behind the other in one storage."""
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    return len(storages) == 1 and [weight.data_ptr() for weight in weights[1:]] == ends[:-1]


class _Layer:
    """Weights of one layer, by name."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.query, self.gate = attention.q_proj, mlp.gate_proj
        self.qkv, self.qkv_bias = _fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up, self.gate_up_bias = _fuse([mlp.gate_proj, mlp.up_proj])
        self.out, self.down, self.act = attention.o_proj, mlp.down_proj, mlp.act_fn
        self.norm_1, self.norm_2 = layer.input_layernorm, layer.post_attention_layernorm

    def is_current(self) -> bool:
        pairs = ((self.query, self.qkv), (self.gate, self.gate_up))
        return all(linear.weight.data_ptr() == fused.data_ptr() for linear, fused in pairs)


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


class LlamaStep:
    """Keys, values and the step over them. Row b holds its tokens at 0 … length - 1, without padding.

    Args:
        lm: Transformers model. Its query, key, value and its gate, up weights become views of fused ones.
        max_batch_size: Rows.
        max_length: Tokens of a row, prompt and response.

    Raises:
        ValueError: Not a supported model.
    """

    def __init__(self, lm: Any, max_batch_size: int, max_length: int) -> None:
        check_supported(lm)
        config, decoder = lm.config, lm.model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.embedding, self.norm, self.head = decoder.embed_tokens.weight, decoder.norm, lm.lm_head
        self.layers = [_Layer(layer) for layer in decoder.layers]
        self.kv: list[Tensor | None] = [None] * len(self.layers)
        self._shape = (2, max_batch_size, self.kv_heads, max_length, self.head_dim)
        places = torch.arange(max_length, device=self.embedding.device)
        cos, sin = decoder.rotary_emb(self.embedding[:1], places.unsqueeze(0))
        # rotate_half is a roll by half a head with the sign of the first half turned: the sign moves into the sine.
        sign = torch.ones_like(sin[0, 0])
        sign[: self.head_dim // 2] = -1
        self.cos, self.sin = cos[0].unsqueeze(1), (sin[0] * sign).unsqueeze(1)
        self._places, self._rows = places, torch.arange(max_batch_size, device=places.device)

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

    def reserve(self, layer: int) -> Tensor:
        """Keys and values [2, B, kv heads, length, head dim] of a layer; made at its first use, then kept."""
        kv = self.kv[layer]
        if kv is None:
            # Zeros: masked places must not hold NaN.
            kv = self.kv[layer] = torch.zeros(self._shape, dtype=self.embedding.dtype, device=self.embedding.device)
        return kv

    def move(self, source: int, target: int, length: int, layers: Iterable[int]) -> None:
        """Copy a row's keys and values to another row."""
        for layer in layers:
            kv = self.reserve(layer)
            kv[:, target, :, :length] = kv[:, source, :, :length]

    @torch.no_grad()
    def __call__(self, tokens: Tensor, lengths: list[int], layers: Iterable[int]) -> Tensor:
        """Logits [B, V] after one more token per row.

        Args:
            tokens: [B].
            lengths: Tokens each row holds already; the new one goes there.
            layers: The layers to run, ascending.
        """
        rows, end = len(lengths), max(lengths) + 1
        mask = None
        if rows == 1:
            place = slice(lengths[0], end)
            cos, sin = self.cos[place], self.sin[place]
        else:
            at = torch.tensor(lengths, device=tokens.device)
            cos, sin = self.cos[at], self.sin[at]
            row = self._rows[:rows]
            if min(lengths) + 1 < end:
                mask = (self._places[:end] <= at.unsqueeze(1)).view(rows, 1, 1, end)
        x = F.embedding(tokens, self.embedding)
        rotated, half = self.heads + self.kv_heads, self.head_dim // 2
        for index in layers:
            layer, kv = self.layers[index], self.kv[index]
            assert kv is not None
            qkv = F.linear(_norm(x, layer.norm_1), layer.qkv, layer.qkv_bias).view(rows, -1, self.head_dim)
            qk, value = qkv[:, :rotated], qkv[:, rotated:]
            qk = qk * cos + qk.roll(half, -1) * sin
            if rows == 1:
                kv[0, 0, :, lengths[0]] = qk[0, self.heads :]
                kv[1, 0, :, lengths[0]] = value[0]
            else:
                kv[0][row, :, at] = qk[:, self.heads :]
                kv[1][row, :, at] = value
            # The query heads of a group stand where query positions would: grouped attention without repeated keys.
            query = qk[:, : self.heads].reshape(rows, self.kv_heads, -1, self.head_dim)
            mixed = F.scaled_dot_product_attention(query, kv[0, :rows, :, :end], kv[1, :rows, :, :end], attn_mask=mask)
            x = x + layer.out(mixed.reshape(rows, -1))
            gate, up = F.linear(_norm(x, layer.norm_2), layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            x = x + layer.down(layer.act(gate) * up)
        return self.head(_norm(x, self.norm))
