"""LoRA through PEFT, injected in place so that the wrapped model stays a plain transformers model (§4.2)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from firstlab.model.layers import find_decoder
from firstlab.model.quantization import is_quantized
from firstlab.model.settings import LoraSettings


def check_lora(model: PreTrainedModel | PretrainedConfig, settings: LoraSettings) -> list[str]:
    """Full names of the linear maps that get LoRA, of a model or, without loading it, of its config."""
    lm: Any = model
    if isinstance(model, PretrainedConfig):
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(model, trust_remote_code=False, attn_implementation="eager")
    shapes = {name: list(lm.get_parameter(f"{name}.weight").shape) for name in linear_names(lm)}
    known = dict.fromkeys(name.rpartition(".")[2] for name in shapes)
    targets = known if settings.target_modules is None else settings.target_modules
    if unknown := [each for each in targets if each not in known]:
        raise ValueError(
            f"lora.target_modules={list(targets)}: the decoder layers of {type(lm).__name__} have no linear map "
            f"{', '.join(unknown)}; choose from {', '.join(known)}"
        )
    names = [name for name in shapes if name.rpartition(".")[2] in targets]
    if narrow := [name for name in names if min(shapes[name]) < settings.rank]:
        side = min(shapes[narrow[0]])
        warnings.warn(
            f"lora.rank={settings.rank} is above the smaller side of {len(narrow)} linear map(s), such as {narrow[0]} "
            f"{shapes[narrow[0]]}: more than {side} adds nothing there",
            stacklevel=3,
        )
    return names


def linear_names(model: PreTrainedModel) -> list[str]:
    """Full names of all linear maps inside the decoder layers, but for those that give more than their product."""
    _, layers = find_decoder(model)
    inside = {id(m) for m in layers.modules() if isinstance(m, nn.Linear | Conv1D) and _gives_a_tensor(m)}
    return [name for name, module in model.named_modules() if id(module) in inside]


def _gives_a_tensor(linear: nn.Linear | Conv1D) -> bool:
    # Some routers of experts in transformers are linear maps that give a tuple.
    kind = type(linear)
    if kind.forward in (nn.Linear.forward, Conv1D.forward) or not kind.__module__.startswith("transformers.models."):
        return True
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        return isinstance(linear(linear.weight.new_zeros(1, linear.in_features)), Tensor)


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Inject fresh LoRA layers; ValueError for a model or settings that cannot have them."""
    if has_lora(model):
        raise ValueError("the model already has LoRA layers; merge_and_unload() them first")
    if is_quantized(model):
        raise ValueError("the model is quantized, which is for decoding alone; add LoRA to the model before")
    names = check_lora(model, settings)
    if not names:
        raise ValueError(f"the decoder layers of {type(model).__name__} have no linear map for LoRA")
    _, layers = find_decoder(model)
    path = next(name for name, module in model.named_modules() if module is layers)
    inside = sorted({name.removeprefix(f"{path}.").partition(".")[2] for name in names})
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.dropout,
        target_modules=rf"{re.escape(path)}\.\d+\.({'|'.join(map(re.escape, inside))})",  # these maps and no others
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
        base_model_name_or_path=model.config._name_or_path or None,
    )
    try:
        inject_lora(model, config)
    except ValueError as error:
        if settings.dropout and "lora_dropout" in str(error):
            raise ValueError(
                f"lora.dropout={settings.dropout}: PEFT adapts the stacked experts of {type(model).__name__} as well, "
                "and can do that without dropout only; set lora.dropout=0"
            ) from error
        raise


def inject_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Add LoRA layers with weights in float32, as PEFT itself trains them, whatever the type of the base."""
    inject_adapter_in_model(config, model, "default")
    cast_adapter_dtype(model, "default")


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def has_lora(model: nn.Module) -> bool:
    return any(True for _ in lora_layers(model))


@contextmanager
def lora_disabled(model: PreTrainedModel) -> Iterator[None]:
    # Not PEFT's `enable_adapters`, which also goes through all parameters to flip requires_grad.
    layers = list(lora_layers(model))
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge_lora(model: PreTrainedModel) -> None:
    """Add every adapter to its base weight and put the base layer back in its place."""
    # From the inside out: stacked experts stand in as many adapters, one in another, as they have weights.
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
        # Where transformers itself has loaded the adapter, it would still save the model as one.
        model._hf_peft_config_loaded = False
        model._weight_conversions = [  # type: ignore[assignment]
            each
            for each in getattr(model, "_weight_conversions", None) or []
            if not any("lora_" in x or x.startswith("base_model.") for x in each.source_patterns)
        ]
        # No folder or hub id holds these weights any more; saving asks for them.
        model.config._name_or_path = ""
