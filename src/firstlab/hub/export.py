"""Write a plain, smaller model without the layers that a run removes from prompts and responses alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from firstlab.hub.card import write_card
from firstlab.hub.source import Source
from firstlab.model.layers import find_decoder
from firstlab.model.routes import FixedRoutes, PrunedRoutes


def export(source: Source, out: Path) -> list[int]:
    """Merge LoRA, remove the layers, save; returns the layers removed. The source's model is used up.

    A plain model runs the same layers on prompts and responses. Routes that skip in decode alone are therefore refused:
    without the layers, prefill would give other keys, values and first tokens than those that were measured.

    Raises:
        ValueError: Routes that a plain model cannot follow, or a folder that is not empty.
    """
    routes = source.routes
    if not isinstance(routes, PrunedRoutes):
        if isinstance(routes, FixedRoutes) and bool(routes.ran.all()):
            why = "this variant runs every layer: save it with model.merge_and_unload().save_pretrained"
        elif isinstance(routes, FixedRoutes):
            why = (
                "its prefill runs every layer and only decode skips, so a model without these layers would read "
                "prompts differently and have another quality; train with method.skip_prefill=true (sleb, shortgpt)"
            )
        else:
            why = "its routes change from prompt to prompt or from step to step, a plain model has one set of layers"
        raise ValueError(f"run={source.run.directory if source.run else ''} has no plain form: {why}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} is not an empty folder; choose another")
    layers = len(routes.ran)
    removed = (~routes.ran).nonzero()[:, 0].tolist()
    lm = without_layers(source.model.routed.merge_and_unload().unwrap(), removed)
    out.mkdir(parents=True, exist_ok=True)
    lm.save_pretrained(out)
    source.tokenizer.save_pretrained(out)
    assert source.run is not None
    trained = "router" if source.run.variant == "router" else "lora"
    write_card(out, layers, source.run.directory / trained, removed)
    return removed


def without_layers(lm: PreTrainedModel, removed: list[int]) -> PreTrainedModel:
    """The model without these layers, in place, with the numbers that its config and its layers go by."""
    decoder, layers = find_decoder(lm)
    kept = [index for index in range(len(layers)) if index not in removed]
    name = next(name for name, module in decoder.named_children() if module is layers)
    setattr(decoder, name, nn.ModuleList(layers[index] for index in kept))
    for index, each in enumerate(kept):
        module: Any
        for module in layers[each].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    config = lm.config.get_text_config(decoder=True)
    count = len(layers)
    for key, value in copy.copy(vars(config)).items():
        if isinstance(value, list) and len(value) == count:  # one entry per layer, such as layer_types
            setattr(config, key, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
    return lm
