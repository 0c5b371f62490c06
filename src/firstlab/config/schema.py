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
from firstlab.metrics.comet import CometConfig
from firstlab.metrics.summarization import BertScoreConfig
from firstlab.model.settings import LATER, LoraSettings, RouterSettings

#: The steps of a run that train, in their order: tune a dense LoRA, so that routes are chosen on a model that knows the
#: task; train or fit the routers; train LoRA under their routes; fit the routers again under the trained LoRA.
TRAINED = ("tune", "router", "lora", "refit")
PHASES = (*TRAINED, "evaluate")
PAPER_ORDER = ("router", "lora", "evaluate")  # the paper's
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
    """The base model."""

    name: str = option(plain=True)  # short, for run directories and tables
    path: str = option(filled="a hub id or a folder")  # bundled:nano is the model inside this package
    dtype: str = option("float32", choices="float32, bfloat16, float16, auto")
    revision: str | None = None
    attn_implementation: str | None = option(None, choices="sdpa, eager, flash_attention_2")  # null: transformers' own
    quantization: str | None = None  # int8 or int4 decoder layers, in evaluate alone; the benchmark has `quantizations`
    gguf_file: str | None = option(None, filled="a file name", **LATER)  # in the folder; becomes plain weights

    def __post_init__(self) -> None:
        check_options(self, "model.")
        if self.gguf_file is not None and find_spec("gguf") is None:
            raise ValueError(f"model.gguf_file={self.gguf_file!r} needs the package gguf: pip install 'firstlab[gguf]'")
        if self.quantization is not None:
            from firstlab.model.quantization import check_quantization

            check_quantization(self.quantization)

    def check_trainable(self) -> None:
        """Raises ValueError if the weights would be quantized."""
        if (kind := self.quantization) is not None:
            raise ValueError(f"model.quantization={kind!r} is for decoding, and this trains; give it to evaluate")


@dataclass
class SpeedModelConfig(ModelConfig):
    """A base model for timing; with `random_init` its config is enough, as bundled for the paper's models."""

    random_init: bool = False


@dataclass
class DataConfig:
    """A task and how much of it is used; see `firstlab.data.datamodule.PromptDataModule`."""

    name: str = option(plain=True)  # short, for run directories and tables
    task: dict[str, Any] = MISSING  # `_target_` of a `firstlab.data.task.Task` and its arguments
    root: str | None = option(None, filled="a folder")  # of plain files; null for the hub
    train_size: int | None = option(None, least=1)
    val_size: int = option(128, least=0)
    test_size: int | None = option(None, least=1)
    split_seed: int = option(0, least=0)
    max_length_router: int = option(256, least=2)  # tokens of prompt and response in phase 1 (A.4)
    max_length_lora: int = option(256, least=2)  # and in phase 2
    max_prompt_length: int = option(512, least=1)  # tokens of a prompt in generation
    max_new_tokens: int = option(80, least=1)
    bucket: int = option(1, least=1)  # training batches sorted by length together, so that less is padded; 1 is off
    num_workers: int = option(0, least=0, most=128)

    def __post_init__(self) -> None:
        check_options(self, "data.")


@dataclass
class PhaseConfig:
    """One training phase."""

    batch_size: int = option(16, least=1)  # rows of a micro-batch over all processes together
    accumulate: int = option(1, least=1)  # micro-batches per optimizer step; their mean losses weigh alike
    epochs: int = option(1, least=1)
    max_steps: int | None = option(None, least=1)  # cap on optimizer steps
    learning_rate: float = option(3e-4, above=0, below=1e30)  # peak, in float32; cosine decay to zero
    weight_decay: float = option(0.0, least=0)
    warmup_fraction: float = option(0.05, least=0, below=1)
    gradient_clip: float | None = option(1.0, above=0)
    validate_every: int = option(20, least=1)  # optimizer steps
    checkpoint_every: int = option(20, least=1)
    patience: int | None = option(4, least=1)  # validations without improvement before training stops
    loss_on: str = option("response", choices="all, response")  # tokens
    distill: float = option(0.0, least=0)  # weight of KL(dense || routed) on the label tokens, beside cross-entropy


@dataclass
class EvaluationConfig:
    """How a trained model is evaluated."""

    limit: int | None = option(None, least=1)  # test examples to use, evenly spread
    batch_size: int = option(32, least=1)  # rows generated together
    # What writes the responses and is timed. In float32 both write the same greedy text; drawn tokens differ.
    decoder: str = option("generate", choices=DECODERS)
    do_sample: bool = False  # with temperature and top_k as in the paper; else greedy
    temperature: float = option(0.8, least=LEAST_TEMPERATURE)
    top_k: int = option(10, least=0)  # 0 keeps all tokens
    num_beams: int = option(1, least=1)
    confidence: float = option(0.95, above=0, below=1)  # of the bootstrap intervals
    resamples: int = option(1000, least=100)
    skip_rates: list[float] = field(default_factory=list, metadata=LATER)  # besides the own one; router.kind=routes
    perplexity: bool = True  # of the references, under the routes
    tpot_prompts: int = option(8, least=0)  # timed one by one, dense and routed in turn; 0 leaves timing out
    tpot_tokens: int = option(16, least=2)  # new tokens per timed prompt
    tpot_repetitions: int = option(2, least=1)  # of every prompt
    bertscore: BertScoreConfig = field(default_factory=BertScoreConfig)
    comet: CometConfig = field(default_factory=CometConfig)

    def __post_init__(self) -> None:
        check_options(self, "evaluation.")
        if not all(0 <= rate < 1 for rate in self.skip_rates):
            raise ValueError(f"evaluation.skip_rates={self.skip_rates}: each must be at least 0 and below 1")
        if self.decoder == "engine" and self.num_beams > 1:
            raise ValueError(f"evaluation.num_beams={self.num_beams} needs evaluation.decoder=generate")


@dataclass
class GenerateConfig:
    """Options of `python -m firstlab.generate`.

    Attributes:
        run: Run directory of firstlab.train, or a folder written by save_pretrained.
        variant: "router_lora", "router", or "base" (every layer runs); the most trained one by default.
        prompt: "task" puts the text into the run's prompt, "raw" takes it as it is.
        question, part: The question, for QA runs; which task of a mixture the text is for.
        max_new_tokens: Length limit; the run's own by default.
        decoder: "generate" (transformers'), or "engine": the same text, greedy in float32, and faster.
        quantization: int8 or int4 for such weights in the decoder layers, or null.
        do_sample, temperature, top_k, seed: Sampling instead of greedy decoding.
        skip_rate: How much to skip, for models of any rate (router.kind=routes); their default otherwise.
        lossless: The route only drafts, and the text is the dense model's own; LoRA takes part in the draft alone.
        trust: Package of your own whose classes the run's saved configuration may name.
    """

    run: str = ""
    variant: str | None = None
    prompt: str = option("task", choices="task, raw")
    question: str = ""
    part: str = ""
    max_new_tokens: int | None = option(None, least=1)
    decoder: str = option("generate", choices=DECODERS)
    quantization: str | None = None
    do_sample: bool = False
    temperature: float = option(0.8, least=LEAST_TEMPERATURE)
    top_k: int = option(10, least=0)
    seed: int = 0
    skip_rate: float | None = option(None, least=0, below=1)
    lossless: bool = False
    trust: str | None = None


@dataclass
class TrainerConfig:
    """Where and how training runs."""

    accelerator: str = option("cpu", choices="cpu, gpu")
    devices: int = option(1, least=1)  # processes per node
    num_nodes: int = option(1, least=1)
    strategy: str = option("auto", choices="auto, ddp, fsdp")
    precision: str = option("32-true", choices="32-true, bf16-true, bf16-mixed, 16-mixed")
    gradient_checkpointing: bool = False
    loss_chunk: int = option(1024, least=1)  # positions whose logits exist at a time; fewer need less memory
    # Room for keys and values, so that calibration reads a prompt once; on a GPU at most half of what is free.
    prompt_cache_mib: int = option(2048, least=0)
    # Rows in a pass where no result depends on it (validation at a target, calibration, greedy evaluation), halved
    # where memory runs out; null is evaluation.batch_size.
    read_batch_size: int | None = option(None, least=1)
    tf32: bool = False  # let a GPU multiply float32 on its tensor cores: much faster, 10 bits of mantissa
    compile: bool = False  # the decoder layer in training, once for all layers, where prompts are not read apart
    cross_entropy: str = option("torch", choices="torch, liger")  # Liger's fused kernel: GPU, the extra `liger`
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
    """The sweep that a run belongs to; see `firstlab.run.sweep`."""

    name: str | None = None  # of the sweep file; groups its runs in W&B
    tables: list[str] = field(default_factory=list)  # of the paper, that the runs fill; tags in W&B
    recorded: str | None = "experiments"  # folder of recorded results that count as finished
    collect: str | None = None  # folder whose records.jsonl.xz gets every finished run's record, to be committed
    plan_only: bool = False
    optional: list[str] = field(default_factory=list)  # keys that hold only for the runs whose method has them


@dataclass
class ExperimentConfig:
    """One run: one method at one skip level on one model, task and seed."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: Any = MISSING  # `_target_` of a `firstlab.methods.base.Method` and its arguments
    router: RouterSettings = field(default_factory=training_routers)
    lora: LoraSettings = field(default_factory=LoraSettings)
    router_phase: PhaseConfig = field(default_factory=PhaseConfig)
    lora_phase: PhaseConfig = field(default_factory=PhaseConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: Any = None  # `_target_` of a Lightning logger and its arguments
    seed: int = option(0, least=0, below=2**32)
    run_dir: str | None = option(None, filled="a folder")  # null derives it from data, model, method, note and seed
    note: str | None = option(None, plain=True)  # ends the name of the directory of a run that differs in anything else
    runs: str = option("runs", filled="a folder")  # of all run directories
    phases: list[str] = field(default_factory=list)  # of PHASES, or choose for router; [] takes `Method.steps`
    lora_start: str = option("scratch", choices="scratch, continue", **LATER)  # after tune: a fresh LoRA, or the tuned
    init_from: str | None = option(None, filled="a folder")  # saved model to start from instead of an own phase 1
    compare_with_base: bool = True  # also run method=none on the same settings, once, for the table
    ckpt: str = option("last", choices="last, none")  # go on where the run was, or start its phases again
    overwrite: bool = False  # delete what the run directory holds
    sweep: SweepConfig = field(default_factory=SweepConfig)  # set by the files of conf/sweep

    def __post_init__(self) -> None:
        check_options(self)
        check_options(self.router_phase, "router_phase.")
        check_options(self.lora_phase, "lora_phase.")
        self.phases = ["router" if each == "choose" else each for each in self.phases]
        if not set(self.phases) <= set(PHASES):
            raise ValueError(f"phases={self.phases!r} is not allowed: choose from {', '.join(PHASES)}")
        if self.phases != (ordered := [each for each in PHASES if each in self.phases]):
            raise ValueError(f"phases={self.phases!r} are not in the order in which they run, each once: {ordered}")
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
