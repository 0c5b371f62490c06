"""The typed configuration: every key that `conf/` may set, with its meaning and its range.

`firstlab.config.compose` fills it with what Hydra composed, or with what a run saved.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from firstlab.config import instantiate
from firstlab.model.settings import LoraSettings, RouterSettings

PHASES = ("router", "lora", "evaluate")
ATTENTION = ("sdpa", "eager", "flash_attention_2")
#: Below this the largest score decides alone, and smaller values overflow.
LEAST_TEMPERATURE = 1e-3
PRECISIONS = ("32-true", "bf16-true", "bf16-mixed", "16-mixed")


def _require(condition: bool, option: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{option}={value!r} is not allowed: {allowed}")


def check_sampling(temperature: float, top_k: int, prefix: str = "") -> None:
    """Raises ValueError for a temperature by which no score can be divided, or a negative top_k."""
    fits = LEAST_TEMPERATURE <= temperature < math.inf
    allowed = f"finite and greater than 0, at least {LEAST_TEMPERATURE}; do_sample=false is greedy"
    _require(fits, f"{prefix}temperature", temperature, allowed)
    _require(top_k >= 0, f"{prefix}top_k", top_k, "at least 0, which keeps all tokens")


def _require_plain(option: str, value: str) -> None:
    """A part of the name of a run directory."""
    plain = value == MISSING or re.fullmatch(r"[\w.=+-]+", value) is not None
    _require(plain, option, value, "letters, digits and . = + - _")


def _require_least(node: Any, name: str, least: dict[str, int]) -> None:
    """Whole numbers of a part of the configuration that must not be smaller than given; null is none."""
    for key, lowest in least.items():
        value = getattr(node, key)
        _require(value is None or value >= lowest, f"{name}.{key}", value, f"at least {lowest}")


def training_routers() -> RouterSettings:
    """Routers as a run has them by default; the library's default is the paper's."""
    return RouterSettings(input_norm="rms")


@dataclass
class ModelConfig:
    """The base model.

    Attributes:
        name: Short name for run directories and tables.
        path: Hub id or folder; `bundled:nano` is the model inside this package.
        dtype: float32, bfloat16, float16 or auto.
        revision: Hub revision.
        attn_implementation: sdpa, eager, flash_attention_2, or null for transformers' choice.
        quantization: int8 or int4 for decoder layers with such weights, in evaluate alone, or null. The benchmark has
            `quantizations` instead.
    """

    name: str = MISSING
    path: str = MISSING
    dtype: str = "float32"
    revision: str | None = None
    attn_implementation: str | None = None
    quantization: str | None = None

    def __post_init__(self) -> None:
        allowed = ("float32", "bfloat16", "float16", "auto")
        _require(self.dtype in allowed, "model.dtype", self.dtype, f"choose one of {', '.join(allowed)}")
        _require(bool(self.path), "model.path", self.path, "a hub id or a folder")
        _require_plain("model.name", self.name)
        known = self.attn_implementation is None or self.attn_implementation in ATTENTION
        allowed_text = f"choose one of {', '.join(ATTENTION)}, or null"
        _require(known, "model.attn_implementation", self.attn_implementation, allowed_text)
        if self.quantization is not None:
            from firstlab.model.quantization import check_quantization

            check_quantization(self.quantization)

    def check_trainable(self) -> None:
        """Raises ValueError if the weights would be quantized."""
        if self.quantization is not None:
            raise ValueError(
                f"model.quantization={self.quantization!r} is for decoding, and this trains: leave it null, then run "
                f"python -m firstlab.evaluate run=DIR model.quantization={self.quantization}"
            )


@dataclass
class SpeedModelConfig(ModelConfig):
    """A base model of which the architecture may do.

    Attributes:
        random_init: Take the model's config only and draw its weights; speed does not depend on them. Configs of the
            paper's models are bundled.
    """

    random_init: bool = False


@dataclass
class DataConfig:
    """A task and how much of it is used; see `firstlab.data.datamodule.PromptDataModule`.

    Attributes:
        name: Short name for run directories and tables.
        task: `_target_` of a `firstlab.data.task.Task` and its arguments.
        root: Folder of plain files, or null for the hub.
        max_length_router, max_length_lora: Tokens of prompt and response in phase 1 and phase 2 (A.4).
        max_prompt_length: Tokens of a prompt in generation.
        max_new_tokens: Tokens that generation adds.
        bucket: Training batches whose examples are sorted by length together, so that less is padded; 1 is off.
    """

    name: str = MISSING
    task: dict[str, Any] = MISSING
    root: str | None = None
    train_size: int | None = None
    val_size: int = 128
    test_size: int | None = None
    split_seed: int = 0
    max_length_router: int = 256
    max_length_lora: int = 256
    max_prompt_length: int = 512
    max_new_tokens: int = 80
    bucket: int = 1
    num_workers: int = 0

    def __post_init__(self) -> None:
        _require(self.root != "", "data.root", self.root, "a folder, or null")
        _require_plain("data.name", self.name)
        least = {"train_size": 1, "val_size": 0, "test_size": 1, "max_length_router": 2, "max_length_lora": 2}
        least |= {"max_prompt_length": 1, "max_new_tokens": 1, "bucket": 1, "num_workers": 0, "split_seed": 0}
        _require_least(self, "data", least)
        _require(self.num_workers <= 128, "data.num_workers", self.num_workers, "at most 128, each is a process")


@dataclass
class PhaseConfig:
    """One training phase.

    Attributes:
        batch_size: Rows of a micro-batch over all processes together.
        accumulate: Micro-batches per optimizer step; their mean losses weigh alike.
        epochs: Passes over the training examples.
        max_steps: Cap on optimizer steps, or null.
        learning_rate: Peak; cosine decay to zero.
        validate_every, checkpoint_every: In optimizer steps.
        patience: Validations without improvement before training stops, or null.
        loss_on: "all" tokens or "response" tokens.
        distill: Weight of KL(dense model || routed model) on the label tokens, beside the cross-entropy.
    """

    batch_size: int = 16
    accumulate: int = 1
    epochs: int = 1
    max_steps: int | None = None
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    warmup_fraction: float = 0.05
    gradient_clip: float | None = 1.0
    validate_every: int = 20
    checkpoint_every: int = 20
    patience: int | None = 4
    loss_on: str = "response"
    distill: float = 0.0

    def check(self, name: str) -> None:
        """Raises ValueError with the option's full name."""
        for key in ("batch_size", "accumulate", "epochs", "validate_every", "checkpoint_every"):
            _require(getattr(self, key) >= 1, f"{name}.{key}", getattr(self, key), "at least 1")
        for key in ("max_steps", "patience"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"{name}.{key}", value, "at least 1, or null")
        rate, clip = self.learning_rate, self.gradient_clip
        _require(0 < rate < 1e30, f"{name}.learning_rate", rate, "greater than 0, and a number that float32 holds")
        _require(clip is None or 0 < clip < math.inf, f"{name}.gradient_clip", clip, "greater than 0, or null")
        _require(0 <= self.warmup_fraction < 1, f"{name}.warmup_fraction", self.warmup_fraction, "in [0, 1)")
        for key in ("weight_decay", "distill"):
            value = getattr(self, key)
            _require(0 <= value < math.inf, f"{name}.{key}", value, "at least 0")
        _require(self.loss_on in ("all", "response"), f"{name}.loss_on", self.loss_on, "choose one of all, response")


@dataclass
class BertScoreConfig:
    """BERTScore of summaries. path: hub id or folder of the encoder; null leaves the metric out."""

    path: str | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        _require_least(self, "evaluation.bertscore", {"num_layers": 1})


@dataclass
class CometConfig:
    """COMET of translations, through its own environment (`make comet`). model: null leaves the metric out."""

    model: str | None = None
    command: str = ".venv-comet/bin/comet-score"
    batch_size: int = 8
    gpus: int = 0

    def __post_init__(self) -> None:
        _require_least(self, "evaluation.comet", {"batch_size": 1, "gpus": 0})


@dataclass
class EvaluationConfig:
    """How a trained model is evaluated.

    Attributes:
        limit: Test examples to use (evenly spread), or null for all.
        batch_size: Rows generated together.
        decoder: "generate" (transformers') or "engine" (the decode engine): what writes the responses and is timed. In
            float32 both write the same, greedy; drawn tokens differ.
        do_sample, temperature, top_k: Sampling as in the paper (0.8, top-k 10; 0 keeps all tokens), or greedy.
        num_beams: Beam search when greater than 1.
        confidence, resamples: Of the bootstrap intervals.
        perplexity: Also measure response perplexity under the routes.
        tpot_prompts: Prompts timed one by one, dense and routed in turn; 0 leaves timing out.
        tpot_tokens: New tokens per timed prompt.
        tpot_repetitions: Times every prompt is timed.
    """

    limit: int | None = None
    batch_size: int = 32
    decoder: str = "generate"
    do_sample: bool = False
    temperature: float = 0.8
    top_k: int = 10
    num_beams: int = 1
    confidence: float = 0.95
    resamples: int = 1000
    perplexity: bool = True
    tpot_prompts: int = 8
    tpot_tokens: int = 16
    tpot_repetitions: int = 2
    bertscore: BertScoreConfig = field(default_factory=BertScoreConfig)
    comet: CometConfig = field(default_factory=CometConfig)

    def __post_init__(self) -> None:
        _require(self.limit is None or self.limit >= 1, "evaluation.limit", self.limit, "at least 1, or null for all")
        decoders = ("generate", "engine")
        _require(self.decoder in decoders, "evaluation.decoder", self.decoder, f"choose one of {', '.join(decoders)}")
        fits = self.decoder == "generate" or self.num_beams == 1
        _require(fits, "evaluation.num_beams", self.num_beams, "1 with evaluation.decoder=engine; generate has beams")
        check_sampling(self.temperature, self.top_k, "evaluation.")
        _require(0 < self.confidence < 1, "evaluation.confidence", self.confidence, "between 0 and 1")
        least = {"batch_size": 1, "num_beams": 1, "resamples": 100}
        least |= {"tpot_prompts": 0, "tpot_tokens": 2, "tpot_repetitions": 1}
        _require_least(self, "evaluation", least)


@dataclass
class TrainerConfig:
    """Where and how training runs.

    Attributes:
        accelerator: "cpu" or "gpu".
        devices: Processes per node.
        strategy: "auto", "ddp" or "fsdp".
        precision: Lightning precision.
        gradient_checkpointing: Recompute layer activations in the backward pass.
        loss_chunk: Positions whose logits exist at a time; fewer need less memory.
        prompt_cache_mib: Keys and values of prompts that calibration may keep, so that it reads each prompt once.
        progress_bar: Show progress.
    """

    accelerator: str = "cpu"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    gradient_checkpointing: bool = False
    loss_chunk: int = 1024
    prompt_cache_mib: int = 2048
    progress_bar: bool = True

    def __post_init__(self) -> None:
        _require(self.accelerator in ("cpu", "gpu"), "trainer.accelerator", self.accelerator, "choose one of cpu, gpu")
        _require(
            self.strategy in ("auto", "ddp", "fsdp"), "trainer.strategy", self.strategy, "choose one of auto, ddp, fsdp"
        )
        _require(
            self.precision in PRECISIONS, "trainer.precision", self.precision, f"choose one of {', '.join(PRECISIONS)}"
        )
        _require_least(self, "trainer", {"devices": 1, "num_nodes": 1, "loss_chunk": 1, "prompt_cache_mib": 0})
        if self.precision == "16-mixed" and self.accelerator == "cpu":
            raise ValueError("trainer.precision='16-mixed' needs trainer.accelerator=gpu; on CPU use bf16-mixed")
        if self.strategy == "auto" and self.devices * self.num_nodes > 1:
            raise ValueError(
                f"trainer.devices={self.devices} needs trainer.strategy=ddp or fsdp; or choose trainer=ddp"
            )
        if self.strategy == "fsdp" and self.accelerator != "gpu":
            raise ValueError("trainer.strategy='fsdp' needs trainer.accelerator=gpu; on CPU use trainer=ddp")


@dataclass
class SweepConfig:
    """The sweep that a run belongs to; see `firstlab.run.sweep`.

    Attributes:
        name: Name of the sweep file; groups its runs in W&B.
        tables: Tables and figures of the paper that the runs fill; tags in W&B.
        recorded: Folder of recorded results that count as finished, or null.
        collect: Folder whose records.jsonl.xz gets every finished run's record, to be committed; or null.
        plan_only: Print the plan and stop.
        optional: Keys, as method.calibration_prompts, that hold only for the runs whose method has them.
    """

    name: str | None = None
    tables: list[str] = field(default_factory=list)
    recorded: str | None = "experiments"
    collect: str | None = None
    plan_only: bool = False
    optional: list[str] = field(default_factory=list)


@dataclass
class ExperimentConfig:
    """One run: one method at one skip level on one model, task and seed.

    Attributes:
        method: `_target_` of a `firstlab.methods.base.Method` and its arguments.
        logger: `_target_` of a Lightning logger and its arguments, or null.
        run_dir: Where everything goes; null derives it from data, model, method, note and seed.
        note: Added to the name of the run directory, for runs that differ in anything else.
        runs: Folder of all run directories.
        phases: Which of router, lora, evaluate to run.
        init_from: Saved model to start phase 2 or evaluation from, instead of this run's own phase 1.
        compare_with_base: Also run `method=none` on the same settings (once), for the table.
        ckpt: "last" goes on where the run was; "none" starts its phases again.
        overwrite: Delete what the run directory holds.
        sweep: Set by the files of conf/sweep.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: Any = MISSING
    router: RouterSettings = field(default_factory=training_routers)
    lora: LoraSettings = field(default_factory=LoraSettings)
    router_phase: PhaseConfig = field(default_factory=PhaseConfig)
    lora_phase: PhaseConfig = field(default_factory=PhaseConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: Any = None
    seed: int = 0
    run_dir: str | None = None
    note: str | None = None
    runs: str = "runs"
    phases: list[str] = field(default_factory=lambda: list(PHASES))
    init_from: str | None = None
    compare_with_base: bool = True
    ckpt: str = "last"
    overwrite: bool = False
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        self.router_phase.check("router_phase")
        self.lora_phase.check("lora_phase")
        unknown = [p for p in self.phases if p not in PHASES]
        _require(not unknown and bool(self.phases), "phases", self.phases, f"choose from {', '.join(PHASES)}")
        _require(self.ckpt in ("last", "none"), "ckpt", self.ckpt, "choose one of last, none")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "at least 0 and below 2**32")
        if self.note is not None:
            _require_plain("note", self.note)
        for key in ("run_dir", "runs", "init_from"):
            _require(getattr(self, key) != "", key, "", "a folder")

    def directory(self, label: str) -> Path:
        """The run directory of a method of this label."""
        if self.run_dir is not None:
            return Path(self.run_dir)
        name = label if self.note is None else f"{label}-{self.note}"
        return Path(self.runs) / f"{self.data.name}-{self.model.name}" / f"{name}-seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, as written to config.yaml."""
        return asdict(self)

    def located(self) -> ExperimentConfig:
        """With the absolute folders of models on disk, which can be found from anywhere."""

        def absolute(path: str) -> str:
            return str(Path(path).resolve()) if Path(path).is_dir() else path

        initial = self.init_from and absolute(self.init_from)
        return replace(self, model=replace(self.model, path=absolute(self.model.path)), init_from=initial)

    def identity(self) -> dict[str, Any]:
        """What decides the run's numbers: everything but where it runs, where it writes and how it is started."""
        config = self.to_dict()
        config["method"] = instantiate.with_defaults(self.method, "method")
        for key in ("logger", "run_dir", "note", "runs", "phases", "compare_with_base", "ckpt", "overwrite", "sweep"):
            del config[key]
        del config["data"]["num_workers"]
        # Of the trainer, only precision moves the numbers beyond rounding.
        config["trainer"] = {"precision": self.trainer.precision}
        if self.init_from is None:
            del config["init_from"]
        return config

    def hash(self) -> str:
        """Short hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:12]
