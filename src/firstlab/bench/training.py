"""Speed of both training phases beside a plain LoRA step of transformers and PEFT."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from firstlab.bench.config import TrainingSpeedConfig
from firstlab.bench.models import Models, load_models, twin
from firstlab.bench.workload import in_turn
from firstlab.config.schema import PhaseConfig
from firstlab.evaluation.timing import synchronize
from firstlab.model.layers import compiled, find_decoder
from firstlab.model.lm import RouterAugmentedLM
from firstlab.store import machine
from firstlab.training.modules import LoRACompensationModule, Phase, RouterModule, RoutingObjective

Row = dict[str, Tensor]
Steps = Callable[[Sequence[Row]], list[float]]


def measure(config: TrainingSpeedConfig) -> dict[str, Any]:
    """Measure all variants, in turn and in one process; the record of training_speed.json."""
    length = config.prompt_length + config.response_length
    lengths = f"prompt_length={config.prompt_length} with response_length={config.response_length}"
    models = load_models(config, length, lengths)
    on_gpu = models.routed.device.type == "cuda"
    rows = random_rows(config, models.vocabulary)
    variants = _variants(config, models)
    seconds: dict[str, list[list[float]]] = {name: [] for name in variants}
    # On CUDA only: a process on a CPU gives memory back to the system as it pleases.
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
    prompt = torch.arange(length).expand(count, -1) < config.prompt_length
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(prompt, -100)}
    rows |= {"prompt_mask": prompt.long(), "index": torch.arange(count)}
    return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]


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
        # PEFT's own adapters at the same places, of the same sizes and in float32, as in phase 2.
        adapters = PeftConfig(**{name: getattr(ours, name) for name in shared}, task_type="CAUSAL_LM")
        plain: torch.nn.Module = get_peft_model(models.plain, adapters)
    objective = RoutingObjective(objective=config.objective, gate=config.gate, pooled_tokens="prompt", multiplier=0.01)
    held = config.hold_routes if config.objective == "decode_consistent" else 0.0
    phase = PhaseConfig(learning_rate=config.learning_rate, warmup_fraction=0.0, gradient_clip=config.gradient_clip)
    given: dict[str, Any] = {"phase": phase, "seed": config.seed}
    # On a GPU a run reads what `hold_routes` compares with before it trains, rather than beside each step.
    rows, on_gpu = config.batch_size * (config.warmup + config.steps), models.routed.device.type == "cuda"
    read = torch.full((rows, models.routed.num_layers), 0.5) if on_gpu else None
    phases: dict[str, Phase] = {
        "phase_1": RouterModule(models.routed, objective=objective, **given),
        "phase_2": LoRACompensationModule(
            second, objective=replace(objective, hold_routes=held), held_rho=read, **given
        ),
    }
    found: dict[str, tuple[Steps, int]] = {"plain": (partial(transformers_steps, plain, config), _trained(plain))}
    for name, module in phases.items():
        module.model.gradient_checkpointing = config.gradient_checkpointing
        module.model.loss_chunk = config.loss_chunk
        found[name] = partial(firstlab_steps, module, config), _trained(module)
    return found


def _trained(module: torch.nn.Module) -> int:
    return sum(each.numel() for each in module.parameters() if each.requires_grad)


class Watch(Callback, TrainerCallback):
    """Seconds of each step, from a loaded batch to updated weights, of Lightning's trainer or transformers'."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.steps.append(time.perf_counter() - self._start)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Take what either trainer passes."""

    on_train_batch_start, on_train_batch_end = on_step_begin, on_step_end


def firstlab_steps(module: Phase, config: TrainingSpeedConfig, rows: Sequence[Row]) -> list[float]:
    """Seconds of each step of one phase over `rows`, on the device where its model is."""
    device = module.model.device
    watch = Watch(device)
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        max_steps=len(rows) // config.batch_size,
        gradient_clip_val=config.gradient_clip,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lists are datasets to torch, whatever its types say.
    loader: Any = DataLoader(rows, config.batch_size, collate_fn=default_data_collator)  # type: ignore[arg-type]
    layers = compiled(find_decoder(module.model.lm)[1]) if config.compile else nullcontext()
    with warnings.catch_warnings(), layers:
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`.*")
        trainer.fit(module.train(), loader)
    return watch.steps


def transformers_steps(model: torch.nn.Module, config: TrainingSpeedConfig, rows: Sequence[Row]) -> list[float]:
    """Seconds of each step of transformers' own trainer over `rows`, on the device where the model is."""
    device = next(model.parameters()).device
    watch = Watch(device)
    names = ("input_ids", "attention_mask", "labels")
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        # The options' newer names are unknown to the oldest transformers we run with.
        warnings.simplefilter("ignore", FutureWarning)
        arguments = TrainingArguments(
            directory,
            per_device_train_batch_size=config.batch_size,
            num_train_epochs=1,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            max_grad_norm=config.gradient_clip,
            optim="adamw_torch",
            gradient_checkpointing=config.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        arguments._n_gpu = 1  # else a step takes a batch on every GPU there is
        trainer = Trainer(
            model,
            arguments,
            train_dataset=[{name: row[name] for name in names} for row in rows],  # type: ignore[arg-type]
            data_collator=default_data_collator,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch.steps
