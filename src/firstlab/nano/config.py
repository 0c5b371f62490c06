"""The settings of nano's recipe and their checks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from omegaconf import MISSING


@dataclass(kw_only=True)
class TaskConfig:
    """One source of text."""

    task: Any = MISSING
    """A Hydra `_target_` that gives a `firstlab.data.task.Task`."""
    weight: float = 1.0
    """Share of this task in the training examples, relative to the other tasks."""
    count: int = 0
    """Generated tasks: how many different examples. 0: the task's own train pool."""


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes of the Llama. `vocab_size` is an upper bound: a small text gives fewer merges."""

    vocab_size: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    max_position_embeddings: int = MISSING
    initializer_range: float = MISSING


@dataclass(kw_only=True)
class TrainingConfig:
    """One run of `steps` steps, each `batches_per_step` batches of at most `tokens_per_batch` padded tokens."""

    steps: int = MISSING
    tokens_per_batch: int = MISSING
    batches_per_step: int = MISSING
    window: int = MISSING
    """Examples that are sorted by length together: more give less padding, fewer mix better."""
    max_length: int = MISSING
    """Longer examples are left out."""
    prompt_weight: float = MISSING
    """Loss weight of the prompt, relative to the response."""
    prompt_steps: int = MISSING
    """First steps in which prompts count at all: they teach the words, later they only cost time."""
    matrix_lr: float = MISSING
    """Peak learning rate of Muon, for the matrices inside the layers."""
    vector_lr: float = MISSING
    """Peak learning rate of AdamW, for embeddings and norms."""
    weight_decay: float = MISSING
    warmup_steps: int = MISSING
    decay_fraction: float = MISSING
    """Last part of the run, in which the learning rates fall linearly to zero."""
    clip_norm: float = MISSING
    checkpoint_every: int = MISSING
    log_every: int = MISSING


@dataclass(kw_only=True)
class EvaluationConfig:
    """Greedy generation on the held-out test sets."""

    examples: int = MISSING
    """Of each task; 0: all."""
    batch_size: int = MISSING
    max_new_tokens: int = MISSING


@dataclass(kw_only=True)
class NanoConfig:
    """Everything that `conf/nano.yaml` sets."""

    seed: int = MISSING
    output_dir: str = MISSING
    """Where the finished model goes."""
    work_dir: str = MISSING
    """Where prepared data and checkpoints are until then."""
    data_root: str | None = None
    """For use in the tasks, as `${data_root}`."""
    device: str = MISSING
    """cpu, cuda, or auto: cuda where there is one."""
    processes: int = MISSING
    """How many processes share a step on the CPU; cuda uses one."""
    threads: int = MISSING
    """Torch threads of each process."""
    tokenizer_examples: int = MISSING
    """Examples of each task that the tokenizer learns from."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def check(config: NanoConfig) -> None:
    """Raises ValueError on impossible settings, before anything is generated or loaded."""
    training, model = config.training, config.model
    positive = {
        "processes": config.processes,
        "threads": config.threads,
        "tokenizer_examples": config.tokenizer_examples,
        "training.steps": training.steps,
        "training.batches_per_step": training.batches_per_step,
        "training.window": training.window,
        "training.checkpoint_every": training.checkpoint_every,
        "training.log_every": training.log_every,
    }
    for option, value in positive.items():
        if value < 1:
            raise ValueError(f"{option}={value} must be at least 1")
    if training.batches_per_step % config.processes:
        raise ValueError(
            f"training.batches_per_step={training.batches_per_step} must be a multiple of processes={config.processes}"
        )
    if not config.tasks:
        raise ValueError("tasks is empty: give at least one task to train on")
    for name, task in config.tasks.items():
        if task.weight <= 0:
            raise ValueError(f"tasks.{name}.weight={task.weight} must be above 0; delete the task to leave it out")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={config.device} must be auto, cpu or cuda")
    if training.max_length > min(training.tokens_per_batch, model.max_position_embeddings):
        raise ValueError(
            f"training.max_length={training.max_length} must not exceed training.tokens_per_batch="
            f"{training.tokens_per_batch} and model.max_position_embeddings={model.max_position_embeddings}"
        )
    if not 0 <= training.decay_fraction <= 1:
        raise ValueError(f"training.decay_fraction={training.decay_fraction} must be between 0 and 1")


def device_of(config: NanoConfig) -> torch.device:
    """Where training runs."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def recipe(config: NanoConfig) -> dict[str, Any]:
    """The settings that decide about the weights."""
    chosen = asdict(config)
    for option in ("checkpoint_every", "log_every"):
        del chosen["training"][option]
    return {name: chosen[name] for name in ("seed", "tokenizer_examples", "tasks", "model", "training")}
