"""Weight-only quantization of the decoder layers through torchao, on a CPU with torch's own kernels; to decode only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from firstlab.model.layers import find_decoder

QUANTIZATIONS = ("int8", "int4")
# The CPU kernel of 8-bit weights reads blocks of this size, even past a row's end; that of 4-bit weights computes
# blocks of this many outputs.
_BLOCK = 16
# Numbers of a row that share a scale and a zero in 4-bit weights.
_GROUP = 32


def check_quantization(name: str | None) -> None:
    """Raises ValueError if `name` is neither None nor known, or torchao is not installed."""
    if name not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantization={name!r} is unknown: choose one of {', '.join(QUANTIZATIONS)}, or null")
    if name is not None and find_spec("torchao") is None:
        raise ValueError(f"quantization={name!r} needs torchao: pip install 'firstlab[quantization]'")


def quantize(lm: PreTrainedModel, name: str | None) -> None:
    """Quantize every `nn.Linear` of the decoder layers in place; stacked weights of experts stay, with a warning."""
    check_quantization(name)
    if name is None:
        return
    if any("lora_" in each for each, _ in lm.named_parameters()):
        raise ValueError(f"quantization={name!r} is for merged weights: call merge_and_unload() first")
    _, layers = find_decoder(lm)
    linears = [module for module in layers.modules() if _is_plain(module)]
    if not linears:
        raise ValueError(f"quantization={name!r}: the layers of {type(lm).__name__} have no nn.Linear; leave it null")
    for module in linears:
        if not module.weight.is_contiguous():  # ordered anew by a decode engine
            module.weight = nn.Parameter(module.weight.detach().contiguous(), requires_grad=False)
    if stacked := [each.numel() for each in layers.parameters() if each.ndim > 2]:
        share = sum(stacked) / sum(each.numel() for each in layers.parameters())
        warnings.warn(
            f"quantization={name!r}: {len(stacked)} stacked weights of experts, {share:.0%} of the layers' numbers, "
            "stay as they are; only nn.Linear is quantized",
            stacklevel=2,
        )
    (_to_int8 if name == "int8" else _to_int4)(layers, linears[0].weight)


def _is_plain(module: nn.Module, name: str = "") -> TypeGuard[nn.Linear]:
    # Some routers of experts are linear maps that give more than their product.
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _to_int8(layers: nn.Module, one: Tensor) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layers, Int8WeightOnlyConfig(), _is_plain)
    if one.device.type == "cpu":
        _exchange(layers, Int8Linear, lambda linear: not linear.in_features % _BLOCK)


def _to_int4(layers: nn.Module, one: Tensor) -> None:
    """Maps whose sizes do not fit stay as they are."""
    if one.device.type == "cpu":
        _exchange(layers, Int4Linear, lambda linear: not (linear.in_features % _GROUP or linear.out_features % _BLOCK))
        if not any(isinstance(module, Int4Linear) for module in layers.modules()):
            raise ValueError(
                f"quantization='int4': no linear map has inputs in groups of {_GROUP} and outputs in blocks of "
                f"{_BLOCK}; use int8, or leave it null"
            )
        return
    if one.dtype != torch.bfloat16:
        raise ValueError(f"quantization='int4' on {one.device.type} is for bfloat16, not {one.dtype}; set model.dtype")
    from torchao.quantization import Int4WeightOnlyConfig, quantize_
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    chosen = Int4WeightOnlyConfig(group_size=_GROUP, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)
    quantize_(layers, chosen, _is_plain)


def _exchange(layers: nn.Module, kind: Callable[[nn.Linear], nn.Module], fits: Callable[[nn.Linear], bool]) -> None:
    for parent in list(layers.modules()):
        for child, module in parent.named_children():
            if _is_plain(module) and fits(module):
                parent.set_submodule(child, kind(module))


class Int8Linear(nn.Module):
    """A linear map with torchao's 8-bit weight, which on a CPU is read as it is.

    There x is rounded to bfloat16, and so is its product with the integers, which is summed in float32. `linear` is
    quantized already, with a scale per row and zero points of zero; its inputs are a multiple of 16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        # The kernel takes scales in bfloat16, whose rounding would cost up to half a step of the integers. Therefore
        # it gets these, and the scales come after it. No buffer: `to` must not convert them.
        self._ones = torch.ones(len(linear.weight), dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        stored: Any = self.weight
        if x.device.type != "cpu":
            return F.linear(x, stored, self.bias)
        # With many rows of float32, expanding the weights would be faster, but a prompt's numbers would depend on how
        # many prompts are beside it.
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        out = torch._weight_int8pack_mm(rows, stored.qdata, self._ones) * stored.scale.view(-1)
        out = out.to(x.dtype).view(*x.shape[:-1], len(self._ones))
        return out if self.bias is None else out + self.bias


class Int4Linear(nn.Module):
    """`linear`, whose inputs are a multiple of 32 and outputs of 16, with 4-bit weights on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        from torchao.quantization.utils import groupwise_affine_quantize_tensor

        old = linear.weight.detach()
        integers, scales_and_zeros = groupwise_affine_quantize_tensor(old, 4, _GROUP, old.dtype)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)  # two numbers a byte
        self.scales_and_zeros = nn.Parameter(scales_and_zeros, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, _GROUP, self.scales_and_zeros)
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out if self.bias is None else out + self.bias


def is_quantized(module: nn.Module) -> bool:
    """Whether some weight is not a plain tensor of floating-point numbers."""
    return any(hasattr(each, "__tensor_flatten__") or not each.is_floating_point() for each in module.parameters())


def stored_tensors(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight consists of: itself, or integers and scales."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight.data]
    names, _ = weight.__tensor_flatten__()
    return [each for name in names for each in stored_tensors(getattr(weight, name))]


def stored_bytes(weight: Tensor) -> int:
    """What a weight takes in memory; `nbytes` of a quantized one is that of the shape it stands for."""
    return sum(each.nbytes for each in stored_tensors(weight))
