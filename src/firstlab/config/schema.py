"""Declare every key that `conf/` may set, with its meaning and its range."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
from collections.abc import Callable
from dataclasses import MISSING as MISSING_DEFAULT
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from firstlab.config import instantiate
from firstlab.metrics.settings import BertScoreConfig, CometConfig
from firstlab.model.settings import LATER, LoraSettings, RouterSettings

#: The steps of a run, in their order; `phases` says which of them.
PHASES = ("tune", "router", "lora", "refit", "evaluate")
#: The paper's.
PAPER_ORDER = ("router", "lora", "evaluate")
DECODERS = "generate, engine"
#: Below it the largest score decides alone and smaller ones overflow; do_sample=false is greedy.
LEAST_TEMPERATURE = 1e-3

_RANGES: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "choices": ("choose one of {}", lambda value, choices: value in choices.split(", ")),
    "least": ("at least {}", operator.ge),
    "above": ("greater than {}", operator.gt),
    "most": ("at most {}", operator.le),
    "below": ("below {}", operator.lt),
    "plain": ("letters, digits and . = + - _", lambda value, _: re.fullmatch(r"[\w.=+-]+", value) is not None),
    "filled": ("{}", lambda value, _: value != ""),
}


def option(default: Any = MISSING, **ranges: Any) -> Any:
    """A field of a configuration with its range; see `_RANGES`."""
    return field(default=default, metadata=ranges)


def check_options(config: Any, prefix: str = "") -> None:
    """Raises ValueError for the first field of a configuration that is outside its range, or infinite."""
    for each in fields(config):
        value = getattr(config, each.name)
        ranges = {key: limit for key, limit in each.metadata.items() if key in _RANGES}
        if value is None or value == MISSING or not ranges:
            continue
        finite = not isinstance(value, float) or math.isfinite(value)
        if not (finite and all(_RANGES[key][1](value, limit) for key, limit in ranges.items())):
            allowed = " and ".join(_RANGES[key][0].format(limit) for key, limit in ranges.items())
            null = ", or null" if "None" in str(each.type) else ""
            raise ValueError(f"{prefix}{each.name}={value!r} is not allowed: {allowed}{null}")


def training_routers() -> RouterSettings:
    """Routers as a run has them by default; the library's default is the paper's."""
    return RouterSettings(input_norm="rms")


@dataclass
class ModelConfig:
    """The base model.

    Attributes:
        name: Short name for run directories and tables.
        path: Hub id or folder; `bundled:nano` is the model inside this package.
        attn_implementation: Null for transformers' choice.
        gguf_file: File of the folder in GGUF form, which transformers turns into plain weights; or null.
        quantization: int8 or int4 for decoder layers with such weights, in evaluate alone, or null. The benchmark has
            `quantizations` instead.
    """

    name: str = option(plain=True)
    path: str = option(filled="a hub id or a folder")
    dtype: str = option("float32", choices="float32, bfloat16, float16, auto")
    revision: str | None = None
    attn_implementation: str | None = option(None, choices="sdpa, eager, flash_attention_2")
    quantization: str | None = None
    gguf_file: str | None = option(None, filled="a file name", **LATER)

    def __post_init__(self) -> None:
        check_options(self, "model.")
        if self.gguf_file is not None and find_spec("gguf") is None:
            raise ValueError(f"model.gguf_file={self.gguf_file!r} needs the package gguf: pip install 'firstlab[gguf]'")
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
    """A base model for timing; with `random_init` its config is enough, as bundled for the paper's models."""

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

    name: str = option(plain=True)
    task: dict[str, Any] = MISSING
    root: str | None = option(None, filled="a folder")
    train_size: int | None = option(None, least=1)
    val_size: int = option(128, least=0)
    test_size: int | None = option(None, least=1)
    split_seed: int = option(0, least=0)
    max_length_router: int = option(256, least=2)
    max_length_lora: int = option(256, least=2)
    max_prompt_length: int = option(512, least=1)
    max_new_tokens: int = option(80, least=1)
    bucket: int = option(1, least=1)
    num_workers: int = option(0, least=0, most=128)

    def __post_init__(self) -> None:
        check_options(self, "data.")


@dataclass
class PhaseConfig:
    """One training phase.

    Attributes:
        batch_size: Rows of a micro-batch over all processes together.
        accumulate: Micro-batches per optimizer step; their mean losses weigh alike.
        max_steps: Cap on optimizer steps.
        learning_rate: Peak; cosine decay to zero.
        validate_every, checkpoint_every: In optimizer steps.
        patience: Validations without improvement before training stops.
        loss_on: "all" tokens or "response" tokens.
        distill: Weight of KL(dense model || routed model) on the label tokens, beside the cross-entropy.
    """

    batch_size: int = option(16, least=1)
    accumulate: int = option(1, least=1)
    epochs: int = option(1, least=1)
    max_steps: int | None = option(None, least=1)
    learning_rate: float = option(3e-4, above=0, below=1e30)  # what float32 holds
    weight_decay: float = option(0.0, least=0)
    warmup_fraction: float = option(0.05, least=0, below=1)
    gradient_clip: float | None = option(1.0, above=0)
    validate_every: int = option(20, least=1)
    checkpoint_every: int = option(20, least=1)
    patience: int | None = option(4, least=1)
    loss_on: str = option("response", choices="all, response")
    distill: float = option(0.0, least=0)


@dataclass
class EvaluationConfig:
    """How a trained model is evaluated.

    Attributes:
        limit: Test examples to use (evenly spread), or null for all.
        batch_size: Rows generated together.
        decoder: "generate" (transformers') or "engine" (the decode engine): what writes the responses and is timed. In
            float32 both write the same, greedy; drawn tokens differ.
        do_sample, temperature, top_k: Sampling as in the paper (0.8, top-k 10; 0 keeps all tokens), or greedy.
        confidence, resamples: Of the bootstrap intervals.
        skip_rates: Where routers know any rate (`router.kind=routes`): evaluate at each of these, besides the method's
            own rate.
        perplexity: Also measure response perplexity under the routes.
        tpot_prompts: Prompts timed one by one, dense and routed in turn; 0 leaves timing out.
        tpot_tokens: New tokens per timed prompt.
        tpot_repetitions: Times every prompt is timed.
    """

    limit: int | None = option(None, least=1)
    batch_size: int = option(32, least=1)
    decoder: str = option("generate", choices=DECODERS)
    do_sample: bool = False
    temperature: float = option(0.8, least=LEAST_TEMPERATURE)
    top_k: int = option(10, least=0)
    num_beams: int = option(1, least=1)
    confidence: float = option(0.95, above=0, below=1)
    resamples: int = option(1000, least=100)
    skip_rates: list[float] = field(default_factory=list, metadata=LATER)
    perplexity: bool = True
    tpot_prompts: int = option(8, least=0)
    tpot_tokens: int = option(16, least=2)
    tpot_repetitions: int = option(2, least=1)
    bertscore: BertScoreConfig = field(default_factory=BertScoreConfig)
    comet: CometConfig = field(default_factory=CometConfig)

    def __post_init__(self) -> None:
        check_options(self, "evaluation.")
        for rate in self.skip_rates:
            if not 0 <= rate < 1:
                raise ValueError(f"evaluation.skip_rates={self.skip_rates}: {rate} must be at least 0 and below 1")
        if self.decoder == "engine" and self.num_beams > 1:
            raise ValueError(
                f"evaluation.num_beams={self.num_beams} needs evaluation.decoder=generate; the engine has no beams"
            )


@dataclass
class TrainerConfig:
    """Where and how training runs.

    Attributes:
        devices: Processes per node.
        loss_chunk: Positions whose logits exist at a time; fewer need less memory.
        prompt_cache_mib: Keys and values of prompts that calibration may keep, so that it reads each prompt once; on a
            GPU at most half of what is free.
        read_batch_size: Rows in a pass where no result depends on it (validation at a target, calibration, greedy
            evaluation), halved where memory runs out; null is evaluation.batch_size.
        tf32: Let a GPU multiply float32 on its tensor cores: much faster, 10 bits of mantissa.
        compile: Compile the decoder layer in training, once for all layers, where prompts are not read apart.
        cross_entropy: "torch", or "liger" for Liger's fused kernel (GPU, the extra `liger`).
    """

    accelerator: str = option("cpu", choices="cpu, gpu")
    devices: int = option(1, least=1)
    num_nodes: int = option(1, least=1)
    strategy: str = option("auto", choices="auto, ddp, fsdp")
    precision: str = option("32-true", choices="32-true, bf16-true, bf16-mixed, 16-mixed")
    gradient_checkpointing: bool = False
    loss_chunk: int = option(1024, least=1)
    prompt_cache_mib: int = option(2048, least=0)
    read_batch_size: int | None = option(None, least=1)
    tf32: bool = False
    compile: bool = False
    cross_entropy: str = option("torch", choices="torch, liger")
    progress_bar: bool = True

    def __post_init__(self) -> None:
        check_options(self, "trainer.")
        if self.precision == "16-mixed" and self.accelerator == "cpu":
            raise ValueError("trainer.precision='16-mixed' needs trainer.accelerator=gpu; on CPU use bf16-mixed")
        if self.strategy == "auto" and self.devices * self.num_nodes > 1:
            raise ValueError(
                f"trainer.devices={self.devices} needs trainer.strategy=ddp or fsdp; or choose trainer=ddp"
            )
        if self.cross_entropy == "liger":
            if self.accelerator == "cpu":
                raise ValueError("trainer.cross_entropy='liger' needs trainer.accelerator=gpu; on CPU use torch")
            if find_spec("liger_kernel") is None:
                raise ValueError(
                    "trainer.cross_entropy='liger' needs the package liger-kernel: pip install 'firstlab[liger]'"
                )
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise ValueError("trainer.precision='16-mixed' needs another strategy than fsdp, which takes bf16-mixed")


@dataclass
class SweepConfig:
    """The sweep that a run belongs to; see `firstlab.run.sweep`.

    Attributes:
        name: Of the sweep file; groups its runs in W&B.
        tables: Tables and figures of the paper that the runs fill; tags in W&B.
        recorded: Folder of recorded results that count as finished, or null.
        collect: Folder whose records.jsonl.xz gets every finished run's record, to be committed; or null.
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
        phases: Which steps to run, of tune (dense LoRA, so that routes are chosen on a model that knows the task),
            router or choose (train or fit the routers), lora, refit (fit the routers again under the trained LoRA) and
            evaluate. The paper's are router, lora, evaluate; none named takes the method's own (`Method.steps`).
        lora_start: After tune, phase 2 trains a LoRA from "scratch", or goes on with the tuned one ("continue").
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
    seed: int = option(0, least=0, below=2**32)
    run_dir: str | None = option(None, filled="a folder")
    note: str | None = option(None, plain=True)
    runs: str = option("runs", filled="a folder")
    phases: list[str] = field(default_factory=list)
    lora_start: str = option("scratch", choices="scratch, continue", **LATER)
    init_from: str | None = option(None, filled="a folder")
    compare_with_base: bool = True
    ckpt: str = option("last", choices="last, none")
    overwrite: bool = False
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        check_options(self)
        check_options(self.router_phase, "router_phase.")
        check_options(self.lora_phase, "lora_phase.")
        self.phases = ["router" if each == "choose" else each for each in self.phases]
        if not set(self.phases) <= set(PHASES):
            raise ValueError(f"phases={self.phases!r} is not allowed: choose from {', '.join(PHASES)}")
        if "tune" in self.phases and self.init_from is not None:
            raise ValueError(f"init_from={self.init_from!r} brings a trained model: leave tune out of phases")

    @property
    def read_batch_size(self) -> int:
        """Rows in a pass where no result depends on it."""
        return self.trainer.read_batch_size or self.evaluation.batch_size

    def evaluated(self) -> EvaluationConfig:
        """How to evaluate: `evaluation`, where greedy responses do not depend on the batch, in larger ones."""
        whole = self.evaluation.do_sample or self.evaluation.decoder == "engine"
        return self.evaluation if whole else replace(self.evaluation, batch_size=self.read_batch_size)

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
        _drop_later(self, config)
        # The paper's order goes without saying.
        if steps := [each for each in ("tune", "refit") if each in self.phases]:
            config["steps"] = steps
        return config

    def hash(self) -> str:
        """Short hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:12]


def _drop_later(config: Any, node: dict[str, Any]) -> None:
    """Leave out options that came after the first records and are at their default."""
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value) and isinstance(node.get(each.name), dict):
            _drop_later(value, node[each.name])
        default = each.default if each.default_factory is MISSING_DEFAULT else each.default_factory()
        if each.metadata.get("later") and value == default:
            node.pop(each.name, None)
