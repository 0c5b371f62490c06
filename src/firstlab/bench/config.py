"""Settings of `python -m firstlab.benchmark`, for decoding and for training. Imports no torch, so that help is fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from omegaconf import DictConfig

from firstlab.config.compose import settings, store_schema
from firstlab.config.schema import SpeedModelConfig, check_options, option, training_routers
from firstlab.model.settings import LoraSettings, RouterSettings, check_choice

DECODERS = ("transformers", "transformers_static", "generate", "engine", "engine_eager")


@dataclass
class SpeedConfig:
    """What both measurements take."""

    model: SpeedModelConfig = field(default_factory=SpeedModelConfig)  # speed does not depend on its weights
    router: RouterSettings = field(default_factory=training_routers)
    device: str = option("auto", choices="auto, cpu, cuda")  # auto is CUDA where there is one
    warmup: int = option(1, least=0)  # rounds (decoding) or first steps of each round (training) that do not count
    repetitions: int = option(5, least=1)  # rounds that count; in each, all variants take their turn
    seed: int = 0  # of all that is drawn: tokens, routes, weights
    out: str = "runs/benchmark"  # folder of the record

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class BenchmarkConfig(SpeedConfig):
    """What the measurement of decoding takes besides.

    Decoders: transformers (`generate` of the plain model), transformers_static (the same with its static cache,
    compiled: slow to start), generate (`RouterAugmentedLM.generate`), engine (`DecodeEngine`: CUDA graphs on a GPU)
    and engine_eager (without graphs).
    """

    decoders: list[str] = field(default_factory=lambda: ["transformers", "generate", "engine"])
    quantizations: list[str | None] = field(default_factory=lambda: [None])  # of the layers; null for none, int8, int4
    # Layers skipped: spread evenly, or those that most prompts skip in the paper's Table 15.
    routes: str = option("spread", choices="spread, paper")
    skip_rates: list[float] = field(default_factory=lambda: [0.15, 0.25, 0.35])  # 0 is always measured too
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    prompt_lengths: list[int] = field(default_factory=lambda: [128])  # with each of batch_sizes
    # Numbers of different routes in one batch of the engine, compared with one route that all rows share.
    mixed_routes: list[int] = field(default_factory=list)
    mixed_batch_size: int = option(32, least=2)
    queue: int = option(0, least=0)  # prompts and responses of different lengths that wait for a place; 0 for none
    queue_batch_size: int = option(8, least=1)
    # Prompts whose greedy text is decoded one by one: densely, from drafts of routes (lossless=True), and by two ways
    # of transformers' assisted decoding, prompt lookup and early exit; 0 for none.
    lossless: int = option(0, least=0)
    lossless_prompts: str | None = option(None, filled="a text file, a prompt a line")  # null: those of bundled tasks
    tokens: int = option(32, least=2)  # new ones, per row: one from prefill, the others from decode
    do_sample: bool = False  # draw tokens, as in the paper, instead of greedy decoding
    temperature: float = 0.8
    top_k: int = option(10, least=0)
    # A variant that got less of the CPU than this share of its time is warned of.
    least_cpu_share: float = option(0.9, least=0, most=1)
    copy_mib: int = option(256, least=1)  # size of the copy that measures the memory's bandwidth; above any cache's

    def __post_init__(self) -> None:
        from firstlab.model.quantization import check_quantization

        super().__post_init__()
        for name in filter(None, self.quantizations):
            check_quantization(name)
        if self.model.quantization is not None:
            given = self.model.quantization
            raise ValueError(f"model.quantization={given!r} is not for the benchmark; use quantizations=[null,{given}]")
        without_engine = self.mixed_routes and "engine" not in self.decoders
        fits = all(2 <= count <= self.mixed_batch_size for count in self.mixed_routes)
        for name, holds, allowed in (
            ("decoders", self.decoders and set(self.decoders) <= set(DECODERS), f"choose from {', '.join(DECODERS)}"),
            ("quantizations", self.quantizations, "one or more, null for none"),
            ("temperature", 0 < self.temperature < math.inf, "above 0; do_sample=false decodes greedily"),
            ("skip_rates", all(0 <= rate < 1 for rate in self.skip_rates), "each at least 0 and below 1"),
            ("batch_sizes", min(self.batch_sizes, default=0) >= 1, "one value or more, each at least 1"),
            ("prompt_lengths", min(self.prompt_lengths, default=0) >= 1, "one value or more, each at least 1"),
            ("mixed_routes", fits, f"each from 2 to mixed_batch_size={self.mixed_batch_size}"),
            ("lossless", not (self.lossless and self.model.random_init), "it needs weights; model.random_init=false"),
            ("mixed_routes", not without_engine, f"they run on the engine; add it to decoders={self.decoders}"),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: {allowed}")


@dataclass
class TrainingSpeedConfig(SpeedConfig):
    """What the measurement of training takes besides; tokens are drawn at random, responses are labelled."""

    lora: LoraSettings = field(default_factory=LoraSettings)  # of phase 2 and of the plain step
    objective: str = "decode_consistent"  # of both phases, as the gate; see `TeacherForcedPass`
    gate: str = "hard"
    hold_routes: float = option(
        10.0, least=0
    )  # of phase 2, if decode-consistent; on a CPU it reads the prompts once more
    batch_size: int = option(8, least=1)
    prompt_length: int = option(128, least=1)
    response_length: int = option(64, least=1)
    gradient_checkpointing: bool = False  # in all variants
    compile: bool = False  # the decoder layer of both phases
    loss_chunk: int = option(1024, least=1)  # positions whose logits exist at a time; the plain step has all
    learning_rate: float = option(3e-4, above=0)
    gradient_clip: float = option(1.0, above=0)
    warmup: int = option(2, least=0)
    steps: int = option(5, least=1)  # of each round, that count
    repetitions: int = option(3, least=1)
    out: str = "runs/training_speed"

    def __post_init__(self) -> None:
        from firstlab.model.teacher_forcing import GATES, OBJECTIVES

        super().__post_init__()
        self.model.check_trainable()
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("gate", self.gate, GATES)


store_schema("benchmark_schema", BenchmarkConfig)
store_schema("training_speed_schema", TrainingSpeedConfig)


def load(composed: DictConfig) -> SpeedConfig:
    """The settings of either measurement. Raises ValueError with the option, its value and what is allowed."""
    return settings(composed, SpeedConfig)
