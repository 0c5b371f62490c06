"""Speed of both training phases beside a plain LoRA step of transformers and PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from firstlab.bench.config import TrainingSpeedConfig
from firstlab.bench.models import Models, load_models, twin
from firstlab.bench.steps import Row, firstlab_steps, transformers_steps
from firstlab.bench.workload import in_turn
from firstlab.config.schema import PhaseConfig
from firstlab.model.lm import RouterAugmentedLM
from firstlab.store import machine
from firstlab.training.modules import LoRACompensationModule, Phase, RouterModule, RoutingObjective

Steps = Callable[[Sequence[Row]], list[float]]


def measure(config: TrainingSpeedConfig) -> dict[str, Any]:
    """Measure all variants, in turn and in one process; the record of training_speed.json.

    Frozen weights are there once. Peak memory is measured on CUDA only: a process on a CPU gives memory back to the
    system as it pleases. Raises ValueError for a setting that this model or device does not fit.
    """
    length = config.prompt_length + config.response_length
    lengths = f"prompt_length={config.prompt_length} with response_length={config.response_length}"
    models = load_models(config, length, lengths)
    on_gpu = models.routed.device.type == "cuda"
    rows = random_rows(config, models.vocabulary)
    variants = _variants(config, models)
    seconds: dict[str, list[list[float]]] = {name: [] for name in variants}
    peaks: dict[str, int | None] = dict.fromkeys(variants)
    for repetition in range(config.repetitions):
        for name in in_turn(variants, repetition):
            if on_gpu:
                torch.cuda.empty_cache()
            machine.reset_peak_memory()
            seconds[name].append(variants[name][0](rows)[config.warmup :])
            if on_gpu:
                peaks[name] = max(peaks[name] or 0, torch.cuda.max_memory_allocated())
    medians = {name: np.median(np.array(rounds), 1) for name, rounds in seconds.items()}
    tokens = config.batch_size * length
    return {
        "model": config.model.name,
        "layers": models.routed.num_layers,
        "parameters": sum(each.numel() for each in models.plain.parameters() if not each.requires_grad),
        "tokens_per_step": tokens,
        "labels_per_step": config.batch_size * config.response_length,
        "settings": asdict(config),
        "variants": [
            {
                "variant": name,
                "trainable_parameters": variants[name][1],
                "step_s": float(np.median(rounds)),
                "tokens_per_s": float(tokens / np.median(rounds)),
                "speedup_over_plain": float(np.median(medians["plain"] / medians[name])),
                "peak_memory_bytes": peaks[name],
                "step_s_of_rounds": rounds,
            }
            for name, rounds in seconds.items()
        ],
        **machine.provenance(),
        "device": torch.cuda.get_device_name() if on_gpu else machine.processor_name(),
    }


def random_rows(config: TrainingSpeedConfig, vocabulary: int) -> list[Row]:
    """The rows of one round, as both trainers take them: [T] each; only the last tokens, the response, are labelled."""
    generator = torch.Generator().manual_seed(config.seed)
    count, length = config.batch_size * (config.warmup + config.steps), config.prompt_length + config.response_length
    ids = torch.randint(0, vocabulary, (count, length), generator=generator)
    prompt = torch.arange(length) < config.prompt_length
    return [
        {
            "input_ids": row,
            "attention_mask": torch.ones_like(row),
            "labels": row.masked_fill(prompt, -100),
            "prompt_mask": prompt.long(),
            "index": torch.tensor(index),
        }
        for index, row in enumerate(ids)
    ]


def _variants(config: TrainingSpeedConfig, models: Models) -> dict[str, tuple[Steps, int]]:
    """What takes the steps of one round and gives their seconds, by name; and how many parameters it trains."""
    # Phase 2 has the weights of the others, and modules of its own; PEFT wraps those of `plain` in place.
    base: Any = twin(models.plain)
    second = RouterAugmentedLM(base, models.routed.routers.settings)
    second.add_lora(config.lora)
    ours = base.peft_config["default"]
    shared = ("r", "lora_alpha", "lora_dropout", "target_modules", "fan_in_fan_out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        # PEFT's own adapters at the same places, of the same sizes and in the dtype of the model, as in phase 2.
        adapters = PeftConfig(**{name: getattr(ours, name) for name in shared}, task_type="CAUSAL_LM")
        plain: torch.nn.Module = get_peft_model(models.plain, adapters, autocast_adapter_dtype=False)
    objective = RoutingObjective(objective=config.objective, gate=config.gate, pooled_tokens="prompt", multiplier=0.01)
    held = config.hold_routes if config.objective == "decode_consistent" else 0.0
    phase = PhaseConfig(learning_rate=config.learning_rate, warmup_fraction=0.0, gradient_clip=config.gradient_clip)
    holding = replace(objective, hold_routes=held)
    first = RouterModule(models.routed, objective=objective, phase=phase, seed=config.seed)
    phases: list[Phase] = [first, LoRACompensationModule(second, objective=holding, phase=phase, seed=config.seed)]
    found: dict[str, tuple[Steps, int]] = {"plain": (partial(transformers_steps, plain, config), _trained(plain))}
    for number, module in enumerate(phases, 1):
        module.model.gradient_checkpointing = config.gradient_checkpointing
        module.model.loss_chunk = config.loss_chunk
        found[f"phase_{number}"] = partial(firstlab_steps, module, config), _trained(module)
    return found


def _trained(module: torch.nn.Module) -> int:
    return sum(each.numel() for each in module.parameters() if each.requires_grad)
