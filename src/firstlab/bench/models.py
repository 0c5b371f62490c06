"""Load the model to measure, once as transformers has it and once wrapped."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from firstlab.bench.config import SpeedConfig
from firstlab.config.build import model_path
from firstlab.engine.llama_step import orders_anew
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.quantization import quantize
from firstlab.model.settings import RouterSettings
from firstlab.model.storage import load_base, load_base_config


@dataclass(frozen=True)
class Models:
    """The same weights twice."""

    plain: PreTrainedModel
    routed: RouterAugmentedLM

    @classmethod
    def load(
        cls, path: str, settings: RouterSettings, *, random_init: bool, device: torch.device, **options: Any
    ) -> Models:
        """Load, or with `random_init` make from the config alone."""
        if random_init:
            config = load_base_config(path, options.pop("revision", None), options.get("attn_implementation"))
            if options.get("dtype") == "auto":
                options["dtype"] = config.dtype or torch.float32
            check_memory(config, device, **options)
            with device:
                lm = AutoModelForCausalLM.from_config(config, **options)
        else:
            lm = load_base(path, **options)
        lm = lm.to(device).eval()
        # Random prompts: a row must not end before the others, and no setting of the model's own may change scores.
        lm.generation_config = GenerationConfig()
        return cls(twin(lm), RouterAugmentedLM(lm, settings))

    @cached_property
    def for_engine(self) -> RouterAugmentedLM:
        """`routed`, with weights of its own where the engine orders them anew: the ways beside it keep theirs."""
        return self._wrap(deepcopy(self.plain)) if orders_anew(self.plain) else self.routed

    @property
    def vocabulary(self) -> int:
        return self.plain.config.get_text_config(decoder=True).vocab_size

    def quantized(self, name: str | None) -> Models:
        """These models for None, else others with weights of `QUANTIZATIONS`, which share what is not quantized."""
        if name is None:
            return self
        lm = twin(self.plain)
        quantize(lm, name)
        return Models(twin(lm), self._wrap(lm))

    def _wrap(self, lm: PreTrainedModel) -> RouterAugmentedLM:
        return RouterAugmentedLM(lm, self.routed.routers.settings)


def load_models(config: SpeedConfig, length: int, lengths: str) -> Models:
    """The model of a configuration; the options in the text `lengths` make its longest sequence, `length` tokens."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' is not allowed: torch finds no CUDA device; use device=cpu")
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    given = config.model
    if given.random_init and given.gguf_file is not None:
        raise ValueError(f"model.gguf_file={given.gguf_file!r} holds weights, which model.random_init=true leaves out")
    names = ("dtype", "revision", "attn_implementation", "gguf_file")
    options = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    settings = RouterSettings(input_norm=config.router.input_norm, threshold=config.router.threshold)
    path = model_path(given.path, given.random_init)
    models = Models.load(path, settings, random_init=given.random_init, device=device, **options)
    most = getattr(models.plain.config.get_text_config(decoder=True), "max_position_embeddings", length)
    if length > most:
        raise ValueError(f"{lengths} needs {length} positions, and model={given.name} has {most}; shorten one of them")
    return models


def twin(lm: PreTrainedModel) -> PreTrainedModel:
    """Other modules with the same weights."""
    return deepcopy(lm, {id(parameter): parameter for parameter in lm.parameters()})


def check_memory(config: Any, device: torch.device, **options: Any) -> None:
    """Raises ValueError if the weights of a config are larger than the device's whole memory."""
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, **options)
    except Exception as error:  # a damaged config breaks its readers in many ways
        raise ValueError(f"model.random_init=true: its config.json makes no model ({error})") from error
    needed = sum(each.nbytes for each in lm.parameters())
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[1]
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise ValueError(
            f"model.random_init=true: the weights take {needed / 2**30:.1f} GiB in {lm.dtype}, {device.type} has "
            f"{available / 2**30:.1f} GiB; use model.dtype=bfloat16, a smaller model or a larger device"
        )
