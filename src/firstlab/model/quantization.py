"""Weight-only quantization of the decoder layers with torch's own kernels; to decode only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from firstlab.model.layers import find_decoder
from firstlab.model.routers import float32_kept

QUANTIZATIONS = ("int8", "int4")
# The CPU kernel of 8-bit weights reads blocks of this size, even past a row's end; that of 4-bit weights computes
# blocks of this many outputs.
_BLOCK = 16
# Numbers of a row that share a scale and a zero in 4-bit weights.
_GROUP = 32
# Blocks of the GPU's kernel of 4-bit weights.
_CUDA_INPUTS, _CUDA_OUTPUTS = 128, 8


def check_quantization(name: str | None) -> None:
    """Raises ValueError if `name` is neither None nor known."""
    if name not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantization={name!r} is unknown: choose one of {', '.join(QUANTIZATIONS)}, or null")


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
    if name == "int8":
        _exchange(layers, Int8Linear, lambda linear: True)
    else:
        _to_int4(layers, linears[0].weight)


def _is_plain(module: nn.Module, name: str = "") -> TypeGuard[nn.Linear]:
    # Some routers of experts are linear maps that give more than their product.
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _to_int4(layers: nn.Module, one: Tensor) -> None:
    """Maps whose sizes do not fit stay as they are."""
    on_cpu = one.device.type == "cpu"
    if not on_cpu and one.dtype != torch.bfloat16:
        raise ValueError(f"quantization='int4' on {one.device.type} is for bfloat16, not {one.dtype}; set model.dtype")
    inputs, outputs = (_GROUP, _BLOCK) if on_cpu else (_CUDA_INPUTS, _CUDA_OUTPUTS)
    _exchange(layers, Int4Linear, lambda linear: not (linear.in_features % inputs or linear.out_features % outputs))
    if not any(isinstance(module, Int4Linear) for module in layers.modules()):
        raise ValueError(
            f"quantization='int4': no linear map has inputs in groups of {inputs} and outputs in blocks of "
            f"{outputs}; use int8, or leave it null"
        )


def _exchange(layers: nn.Module, kind: Callable[[nn.Linear], nn.Module], fits: Callable[[nn.Linear], bool]) -> None:
    for parent in list(layers.modules()):
        for child, module in parent.named_children():
            if _is_plain(module) and fits(module):
                parent.set_submodule(child, kind(module))


class Int8Linear(nn.Module):
    """`linear` with 8-bit integers, and one float32 scale for each output, which no conversion changes.

    On a CPU, if its inputs are a multiple of 16, x is rounded to bfloat16, and so is its product with the integers,
    which is summed in float32.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        integers, scale = to_int8(linear.weight.detach())
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # The kernel takes scales in bfloat16, whose rounding would cost up to half a step of the integers. Therefore
        # it gets these, and the scales come after it. No buffer: `to` must not convert them.
        self._ones = torch.ones(len(integers), dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.in_features % _BLOCK:
            # Compiled, a product with a single row reads the integers as they are.
            whole = F.linear(x, self.weight.to(x.dtype)).float() * self.scale
            return whole.to(x.dtype) if self.bias is None else (whole + self.bias).to(x.dtype)
        # With many rows of float32, expanding the weights would be faster, but a prompt's numbers would depend on how
        # many prompts are beside it.
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        out = torch._weight_int8pack_mm(rows, self.weight, self._ones) * self.scale
        out = out.to(x.dtype).view(*x.shape[:-1], len(self._ones))
        return out if self.bias is None else out + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        with float32_kept([self.scale]):
            super()._apply(fn, recurse)
        return self


class Int4Linear(nn.Module):
    """`linear` with 4-bit weights, 32 of which share a scale and a zero; of sizes that the device's kernel takes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        integers, scales_and_zeros = to_int4(linear.weight.detach())
        pack = torch.ops.aten
        if integers.device.type == "cpu":
            packed = pack._convert_weight_to_int4pack_for_cpu(integers, 1)
        else:
            packed = pack._convert_weight_to_int4pack((integers[:, ::2] << 4 | integers[:, 1::2]).to(torch.uint8), 8)
        self.weight = nn.Parameter(packed, requires_grad=False)  # two numbers a byte
        self.scales_and_zeros = nn.Parameter(scales_and_zeros, requires_grad=False)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        on_cpu = x.device.type == "cpu"
        product = torch.ops.aten._weight_int4pack_mm_for_cpu if on_cpu else torch.ops.aten._weight_int4pack_mm
        out = product(rows, self.weight, _GROUP, self.scales_and_zeros).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [N, K] and scales [N] in float32 of a weight: ±127.5 steps to the largest number of a row."""
    largest = weight.abs().amax(1) / 127.5
    scale = largest.clamp_min(torch.finfo(torch.float32).eps).float()
    integers = (weight * (1 / scale).unsqueeze(1)).round().clamp(-128, 127).to(torch.int8)
    return integers, scale


def to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [N, K] from 0 to 15, and scales and zeros [K ÷ 32, N, 2] of a weight, in groups of 32 inputs.

    A number is (q - 8) · scale + zero: 16 steps from the least to the largest number of its group.
    """
    groups = weight.view(len(weight), -1, _GROUP)
    least, largest = groups.amin(-1), groups.amax(-1)
    scale = ((largest - least) / 15).clamp_min(1e-6)
    zero = least + scale * 8
    start = (zero - scale * 8).unsqueeze(-1)
    integers = ((groups - start) / scale.unsqueeze(-1)).round().clamp(0, 15).to(torch.int32)
    return integers.view_as(weight), torch.stack([scale, zero], -1).transpose(0, 1).contiguous()


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
