"""Weight-only quantization of the decoder layers through torchao, for decoding alone.

A decode step at a small batch takes the time of reading the weights, so smaller weights and skipped layers multiply.
On a GPU torchao's own products are for compiled layers. On a CPU they expand the weights at every call, so torch's
kernel for such weights takes their place; the weights stay torchao's.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from firstlab.model.layers import find_decoder

QUANTIZATIONS = ("int8",)
#: The CPU kernel reads blocks of as many numbers, also behind the end of a row.
_BLOCK = 16


def check_quantization(name: str | None) -> None:
    """Raises ValueError if `name` is neither None nor known, or torchao is not installed."""
    if name is None:
        return
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantization={name!r} is unknown: choose one of {', '.join(QUANTIZATIONS)}, or null")
    if find_spec("torchao") is None:
        raise ValueError(f"quantization={name!r} needs torchao: pip install 'firstlab[quantization]'")


def quantize(lm: PreTrainedModel, name: str | None) -> None:
    """Quantize every linear map of the decoder layers in place; embeddings, head, norms and routers stay as they are.

    Args:
        lm: Without unmerged LoRA.
        name: One of `QUANTIZATIONS`; None leaves everything as it is.

    Raises:
        ValueError: As `check_quantization`, unmerged LoRA, or layers without `nn.Linear`.
    """
    check_quantization(name)
    if name is None:
        return
    if any("lora_" in each for each, _ in lm.named_parameters()):
        raise ValueError(f"quantization={name!r} is for merged weights: call merge_and_unload() first")
    _, layers = find_decoder(lm)
    if not any(isinstance(module, nn.Linear) for module in layers.modules()):
        raise ValueError(f"quantization={name!r}: the layers of {type(lm).__name__} have no nn.Linear; leave it null")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for module in layers.modules():
        if isinstance(module, nn.Linear) and not module.weight.is_contiguous():  # ordered anew by a decode engine
            module.weight = nn.Parameter(module.weight.detach().contiguous(), requires_grad=False)
    quantize_(layers, Int8WeightOnlyConfig())
    for parent in list(layers.modules()):
        for child, module in parent.named_children():
            if isinstance(module, nn.Linear) and module.weight.device.type == "cpu" and not module.in_features % _BLOCK:
                parent.set_submodule(child, Int8Linear(module))


class Int8Linear(nn.Module):
    """A linear map with torchao's 8-bit weight, which on a CPU is read as it is.

    There x is rounded to bfloat16, and so is its product with the integers, which is summed in float32.

    Args:
        linear: Quantized already, with a scale per row and zero points of zero; its inputs are a multiple of 16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        # The kernel takes scales in bfloat16, whose rounding would cost up to half a step of the integers. Therefore
        # it gets these, and the scales come after it. No buffer: `to` must not convert them.
        self._ones = torch.ones(len(linear.weight), dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] of [..., K], in the type of x."""
        stored: Any = self.weight
        if x.device.type != "cpu":
            return F.linear(x, stored, self.bias)
        # With many rows of float32, expanding the weights would be faster, but a prompt's numbers would depend on how
        # many prompts are beside it.
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        out = torch._weight_int8pack_mm(rows, stored.qdata, self._ones) * stored.scale.view(-1)
        out = out.to(x.dtype).view(*x.shape[:-1], len(self._ones))
        return out if self.bias is None else out + self.bias


def is_quantized(module: nn.Module) -> bool:
    """Whether some weight is not a plain tensor."""
    return any(hasattr(each, "__tensor_flatten__") for each in module.parameters())


def stored_tensors(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight consists of: itself, or integers and scales."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight.data]
    names, _ = weight.__tensor_flatten__()
    return [each for name in names for each in stored_tensors(getattr(weight, name))]


def stored_bytes(weight: Tensor) -> int:
    """What a weight takes in memory; `nbytes` of a quantized one is that of the shape it stands for."""
    return sum(each.nbytes for each in stored_tensors(weight))
