"""How fast the two training phases are, beside a plain LoRA step of transformers' Trainer and PEFT.

python -m firstlab.training_speed [model=hf model.path=ID_OR_FOLDER model.name=NAME] [device=cuda] [out=FOLDER]
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from firstlab.config.command_line import command
from firstlab.config.compose import settings, store_schema
from firstlab.config.schema import SpeedModelConfig, training_routers
from firstlab.model.settings import LoraSettings, RouterSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

# The first is what the others are compared with.
VARIANTS = {
    "plain": "transformers Trainer + PEFT LoRA",
    "phase_1": "firstlab phase 1 (routers)",
    "phase_2": "firstlab phase 2 (LoRA)",
}


@dataclass
class TrainingSpeedConfig:
    """What `python -m firstlab.training_speed` takes.

    Attributes:
        model: The base model; its dtype is that of all variants.
        router: How the routers read hidden states.
        lora: Of phase 2 and of the plain step.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        objective, gate: Of both phases; see `firstlab.model.teacher_forcing.TeacherForcedPass`.
        hold_routes: Of phase 2 under the decode-consistent objective; above 0 it reads the prompts once more.
        batch_size: Rows of a step.
        prompt_length, response_length: Tokens of each row, drawn at random; responses are labelled.
        gradient_checkpointing: In all variants.
        loss_chunk: Positions whose logits exist at a time; the plain step knows no such thing.
        learning_rate, gradient_clip: Of all variants.
        warmup: First steps of each round that do not count.
        steps: Steps of each round that count.
        repetitions: Rounds; in each, all variants take their turn.
        seed: Of rows, routers, LoRA and random weights.
        out: Folder of training_speed.json.
    """

    model: SpeedModelConfig = field(default_factory=SpeedModelConfig)
    router: RouterSettings = field(default_factory=training_routers)
    lora: LoraSettings = field(default_factory=LoraSettings)
    device: str = "auto"
    objective: str = "decode_consistent"
    gate: str = "hard"
    hold_routes: float = 10.0
    batch_size: int = 8
    prompt_length: int = 128
    response_length: int = 64
    gradient_checkpointing: bool = False
    loss_chunk: int = 1024
    learning_rate: float = 3e-4
    gradient_clip: float = 1.0
    warmup: int = 2
    steps: int = 5
    repetitions: int = 3
    seed: int = 0
    out: str = "runs/training_speed"

    def check(self) -> None:
        """Raises ValueError with the option, its value and what is allowed."""

        def require(condition: bool, option: str, allowed: str) -> None:
            if not condition:
                raise ValueError(f"{option}={getattr(self, option)!r} is not allowed: {allowed}")

        require(self.device in ("auto", "cpu", "cuda"), "device", "choose one of auto, cpu, cuda")
        objectives = ("soft", "decode_consistent")
        require(self.objective in objectives, "objective", f"choose one of {', '.join(objectives)}")
        gates = ("soft", "hard", "bernoulli")
        require(self.gate in gates, "gate", f"choose one of {', '.join(gates)}")
        for option in ("batch_size", "prompt_length", "response_length", "loss_chunk", "steps", "repetitions"):
            require(getattr(self, option) >= 1, option, "at least 1")
        for option in ("learning_rate", "gradient_clip"):
            require(getattr(self, option) > 0, option, "greater than 0")
        for option in ("hold_routes", "warmup"):
            require(getattr(self, option) >= 0, option, "at least 0")


store_schema("training_speed_schema", TrainingSpeedConfig)


def load(composed: DictConfig) -> TrainingSpeedConfig:
    """The checked settings.

    Raises:
        ValueError: One message with the option, its value and what is allowed.
    """
    config = settings(composed, TrainingSpeedConfig)
    config.check()
    return config


def measure(config: TrainingSpeedConfig) -> dict[str, Any]:
    """Measure all variants, in turn and in one process; the record of training_speed.json.

    Frozen weights are there once, shared by all. Peak memory is measured on CUDA only: a process on a CPU gives memory
    back to the system as it pleases.

    Raises:
        ValueError: A setting that this model or device does not fit.
    """
    import numpy as np
    import torch

    from firstlab.bench.decoding import Models
    from firstlab.config.build import model_path
    from firstlab.store import machine

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' is not allowed: torch finds no CUDA device; use device=cpu")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    torch.manual_seed(config.seed)
    settings = config.router
    config.model.check_trainable()
    options = {"dtype": config.model.dtype, "revision": config.model.revision}
    options |= {"attn_implementation": config.model.attn_implementation}
    given = {key: value for key, value in options.items() if value is not None}
    device = torch.device("cuda" if on_gpu else "cpu")
    models = Models.load(
        model_path(config.model.path, config.model.random_init), settings, config.model.random_init, device, **given
    )
    text = models.plain.config.get_text_config(decoder=True)
    length = config.prompt_length + config.response_length
    allowed = getattr(text, "max_position_embeddings", length)
    if length > allowed:
        raise ValueError(
            f"prompt_length={config.prompt_length} with response_length={config.response_length} needs {length} "
            f"positions, and model={config.model.name} has {allowed}; shorten one of them"
        )
    rows = random_rows(config, text.vocab_size)
    variants, trainable = _variants(config, models)
    seconds: dict[str, list[list[float]]] = {name: [] for name in variants}
    peaks: dict[str, int | None] = dict.fromkeys(variants)
    for repetition in range(config.repetitions):
        # Forwards and backwards in turn, so that drift hits all alike.
        for name in list(variants)[:: 1 if repetition % 2 == 0 else -1]:
            if on_gpu:
                torch.cuda.empty_cache()
            machine.reset_peak_memory()
            seconds[name].append(variants[name](rows)[config.warmup :])
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
                "trainable_parameters": trainable[name],
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


def random_rows(config: TrainingSpeedConfig, vocabulary: int) -> list[dict[str, Tensor]]:
    """The rows of one round, as both trainers take them: [T] each; only the last tokens, the response, are labelled."""
    import torch

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


def _variants(
    config: TrainingSpeedConfig, models: Any
) -> tuple[dict[str, Callable[[Sequence[dict[str, Tensor]]], list[float]]], dict[str, int]]:
    """What takes the steps of one round and gives their seconds, by name; and how many parameters each trains."""
    from copy import deepcopy

    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    from firstlab.bench.timed_training import firstlab_steps, transformers_steps
    from firstlab.model import RouterAugmentedLM
    from firstlab.training.modules import LoRACompensationModule, OptimizerSettings, RouterModule, RoutingObjective

    lora = config.lora
    base: Any = deepcopy(models.plain, {id(parameter): parameter for parameter in models.plain.parameters()})
    second = RouterAugmentedLM(base, models.routed.routers.settings)
    second.add_lora(lora)
    chosen: Any = base.peft_config["default"]
    peft_config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.dropout,
        target_modules=chosen.target_modules,
        fan_in_fan_out=chosen.fan_in_fan_out,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        # Adapters in the dtype of the model, as in phase 2.
        plain = get_peft_model(models.plain, peft_config, autocast_adapter_dtype=False)
    objective = RoutingObjective(config.objective, config.gate, "prompt", multiplier=0.01)
    held = config.hold_routes if config.objective == "decode_consistent" else 0.0
    total = config.warmup + config.steps
    optimizer = OptimizerSettings(config.learning_rate, 0.0, 0.0, total)
    modules: dict[str, RouterModule | LoRACompensationModule] = {
        "phase_1": RouterModule(models.routed, objective, optimizer, config.seed),
        "phase_2": LoRACompensationModule(second, replace(objective, hold_routes=held), optimizer, config.seed),
    }
    for module in modules.values():
        module.model.gradient_checkpointing = config.gradient_checkpointing
        module.model.loss_chunk = config.loss_chunk

    def plain_steps(rows: Sequence[dict[str, Tensor]]) -> list[float]:
        names = ("input_ids", "attention_mask", "labels")
        given = [{name: row[name] for name in names} for row in rows]
        checkpointing = config.gradient_checkpointing
        return transformers_steps(
            plain, given, config.batch_size, config.gradient_clip, config.learning_rate, checkpointing
        )

    def steps_of(name: str) -> Callable[[Sequence[dict[str, Tensor]]], list[float]]:
        return lambda rows: firstlab_steps(modules[name].train(), rows, config.batch_size, config.gradient_clip)

    def trained(module: torch.nn.Module) -> int:
        return sum(each.numel() for each in module.parameters() if each.requires_grad)

    counts = {"plain": trained(plain)} | {name: trained(module) for name, module in modules.items()}
    return {"plain": plain_steps} | {name: steps_of(name) for name in modules}, counts


def print_table(record: dict[str, Any]) -> None:
    """One row per variant."""
    from rich.console import Console
    from rich.table import Table

    given = record["settings"]
    title = (
        f"{record['model']}, batch {given['batch_size']}, prompts of {given['prompt_length']} and responses of "
        f"{given['response_length']} tokens, {given['model']['dtype']}, {record['device']}"
    )
    view = Table(title=title, title_justify="left")
    view.add_column("", no_wrap=True)
    for name in ("trained parameters", "step ms", "tokens/s", "speed-up", "peak MiB"):
        view.add_column(name, justify="right")
    for row in record["variants"]:
        peak = row["peak_memory_bytes"]
        view.add_row(
            VARIANTS[row["variant"]],
            f"{row['trainable_parameters']:,}",
            f"{1000 * row['step_s']:.1f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['speedup_over_plain']:.2f}",
            "-" if peak is None else f"{peak / 2**20:.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(view)
    if all(row["peak_memory_bytes"] is None for row in record["variants"]):
        print("peak memory is measured on CUDA devices only")


def run(config: TrainingSpeedConfig) -> None:
    """Measure, print, write."""
    from firstlab.store.files import check_writable, write_atomically

    check_writable(Path(config.out), "out")
    record = measure(config)
    print_table(record)
    file = Path(config.out) / "training_speed.json"
    write_atomically(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(f"record: {file}")


def main(composed: DictConfig) -> None:
    """The settings, then the measurement."""
    run(load(composed))


if __name__ == "__main__":
    command("training_speed", main, resumes=False)
