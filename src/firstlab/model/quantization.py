"""Weight-only quantization of the decoder layers through torchao, for decoding alone.

A decode step at a small batch takes the time of reading the weights, so smaller weights and skipped layers multiply.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor, nn
from transformers import PreTrainedModel

from firstlab.model.layers import find_decoder

QUANTIZATIONS = ("int8",)


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

    quantize_(layers, Int8WeightOnlyConfig())


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
