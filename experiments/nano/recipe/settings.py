"""The settings of the recipe and their checks."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from omegaconf import MISSING


@dataclass(kw_only=True)
class TaskConfig:
    """One source of text."""

    task: Any = MISSING
    """A Hydra `_target_` that gives a `firstlab.data.task.Task`."""
    count: int = 0
    """Generated tasks: how many different examples. 0: the task's own train pool."""
    scored: bool = True
    """Whether the finished model answers its test set."""


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
class StageConfig:
    """A part of the run with its own mixture of tasks and its own schedule."""

    steps: int = MISSING
    layers: int | None = None
    """Only so many layers, from the first, run and learn: the others, which start as the identity, join in a later
    stage. None: all."""
    tokens_per_batch: int | None = None
    """Instead of the run's."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each task in the examples, relative to the others; tasks without one do not take part."""
    prompt_steps: int = MISSING
    """First steps in which prompts count at all: they teach the words, later they only cost time."""
    matrix_lr: float = MISSING
    """Peak learning rate of Muon, for the matrices inside the layers."""
    vector_lr: float = MISSING
    """Peak learning rate of AdamW, for embeddings and norms."""
    warmup_steps: int = MISSING
    decay_fraction: float = MISSING
    """Last part of the stage, in which the learning rates fall linearly to zero."""


@dataclass(kw_only=True)
class TrainingConfig:
    """One run of all stages; a step is `batches_per_step` batches of at most `tokens_per_batch` padded tokens."""

    tokens_per_batch: int = MISSING
    batches_per_step: int = MISSING
    window: int = MISSING
    """Examples that are sorted by length together: more give less padding, fewer mix better."""
    max_length: int = MISSING
    """Longer examples are left out."""
    prompt_weight: float = MISSING
    """Loss weight of the prompt, relative to the response."""
    weight_decay: float = MISSING
    clip_norm: float = MISSING
    checkpoint_every: int = MISSING
    log_every: int = MISSING
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """In the order in which they run."""

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages.values())


@dataclass(kw_only=True)
class EvaluationConfig:
    """Greedy generation on the held-out test sets."""

    examples: int = MISSING
    """Of each task; 0: all."""
    batch_size: int = MISSING
    max_new_tokens: int = MISSING


@dataclass(kw_only=True)
class RecipeConfig:
    """Everything that a file of `conf` sets."""

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
    precision: str = MISSING
    """Of the matrix products: fp32, bf16, or auto: bf16 on CUDA and on a CPU that has matrix instructions for it."""
    compile: bool = MISSING
    """Fuse the layers with torch.compile, which needs a C++ compiler."""
    tokenizer_examples: int = MISSING
    """Examples of each scored task that the tokenizer learns from."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def check(config: RecipeConfig) -> None:
    """Raises ValueError on impossible settings, before anything is generated or loaded."""
    training, model = config.training, config.model
    positive = {
        "processes": config.processes,
        "threads": config.threads,
        "tokenizer_examples": config.tokenizer_examples,
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
    if not training.stages:
        raise ValueError("training.stages is empty: give at least one stage")
    for name, stage in training.stages.items():
        _check_stage(f"training.stages.{name}", stage, config.tasks)
        if stage.layers is not None and not 1 <= stage.layers <= model.num_hidden_layers:
            raise ValueError(
                f"training.stages.{name}.layers={stage.layers} must be from 1 to model.num_hidden_layers="
                f"{model.num_hidden_layers}, or null for all"
            )
    if not any(task.scored for task in config.tasks.values()):
        raise ValueError("tasks: none of them is scored, so that the tokenizer has nothing to learn from")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={config.device} must be auto, cpu or cuda")
    if config.precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision={config.precision} must be auto, fp32 or bf16")
    smallest = min([training.tokens_per_batch, *(s.tokens_per_batch or math.inf for s in training.stages.values())])
    if training.max_length > min(smallest, model.max_position_embeddings):
        raise ValueError(
            f"training.max_length={training.max_length} must not exceed training.tokens_per_batch={smallest} (of the "
            f"run or of a stage) and model.max_position_embeddings={model.max_position_embeddings}"
        )
    if config.compile and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise ValueError("compile=true needs a C++ compiler: install g++, or pass compile=false (half the speed)")


def _check_stage(option: str, stage: StageConfig, tasks: Collection[str]) -> None:
    if stage.steps < 1:
        raise ValueError(f"{option}.steps={stage.steps} must be at least 1")
    if not 0 <= stage.decay_fraction <= 1:
        raise ValueError(f"{option}.decay_fraction={stage.decay_fraction} must be between 0 and 1")
    if not stage.weights:
        raise ValueError(f"{option}.weights is empty: give at least one of tasks={list(tasks)} a weight")
    for task, weight in stage.weights.items():
        if task not in tasks:
            raise ValueError(f"{option}.weights.{task} is for none of tasks={list(tasks)}")
        if weight <= 0:
            raise ValueError(f"{option}.weights.{task}={weight} must be above 0; delete it to leave the task out")


def device_of(config: RecipeConfig) -> torch.device:
    """Where training runs."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def uses_bf16(config: RecipeConfig) -> bool:
    """Whether matrix products are in bfloat16."""
    if config.precision == "auto":
        return device_of(config).type == "cuda" or bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return config.precision == "bf16"


def weight_settings(config: RecipeConfig) -> dict[str, Any]:
    """The settings that decide about the weights."""
    chosen = asdict(config)
    for option in ("checkpoint_every", "log_every"):
        del chosen["training"][option]
    return {name: chosen[name] for name in ("seed", "tokenizer_examples", "tasks", "model", "training")}
