"""LoRA through PEFT, injected in place so that the wrapped model stays a plain transformers model (§4.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from firstlab.model.layers import find_decoder
from firstlab.model.quantization import is_quantized


@dataclass(frozen=True)
class LoraSettings:
    """LoRA hyper-parameters; the defaults are the paper's (A.4).

    Attributes:
        rank: r.
        lora_alpha: Scaling; the update is multiplied by lora_alpha / rank.
        dropout: On the input of the adapter.
        target_modules: Module names, or None for every linear map of the decoder layers (q, k, v, o, gate, up, down,
            or the architecture's equivalents).
    """

    rank: int = 8
    lora_alpha: int = 32
    dropout: float = 0.1
    target_modules: tuple[str, ...] | None = None


def linear_names(model: PreTrainedModel) -> list[str]:
    """Full names of all linear maps inside the decoder layers."""
    _, layers = find_decoder(model)
    inside = {id(m) for m in layers.modules() if isinstance(m, nn.Linear | Conv1D)}
    return [name for name, module in model.named_modules() if id(module) in inside]


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Inject fresh LoRA layers.

    Raises:
        ValueError: There are LoRA layers already, the weights are quantized, or `target_modules` matches nothing.
    """
    if any(True for _ in lora_layers(model)):
        raise ValueError("the model already has LoRA layers; merge_and_unload() them first")
    if is_quantized(model):
        raise ValueError("the model is quantized, which is for decoding alone; add LoRA to the model before")
    names = linear_names(model)
    if settings.target_modules is not None:
        names = [name for name in names if name.rpartition(".")[2] in settings.target_modules]
    if not names:
        raise ValueError(f"lora.target_modules={settings.target_modules} matches no linear map of the decoder layers")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in names}),
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
        base_model_name_or_path=model.config._name_or_path or None,
    )
    inject_adapter_in_model(config, model, "default")


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    """Every LoRA layer of the model."""
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def merge_lora(model: PreTrainedModel) -> None:
    """Add every adapter to its base weight and put the base layer back in its place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
        # No folder or hub id holds these weights any more; saving asks for them.
        model.config._name_or_path = ""
