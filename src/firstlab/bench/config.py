"""Settings of `python -m firstlab.benchmark`, for decoding and for training. Imports no torch, so that help is fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from omegaconf import DictConfig

from firstlab.config.compose import settings, store_schema
from firstlab.config.schema import SpeedModelConfig, training_routers
from firstlab.model.settings import LoraSettings, RouterSettings

DECODERS = ("transformers", "transformers_static", "generate", "engine", "engine_eager")
ROUTES = ("spread", "paper")


@dataclass
class SpeedConfig:
    """What both measurements take."""

    model: SpeedModelConfig = field(default_factory=SpeedModelConfig)  # speed does not depend on its weights
    router: RouterSettings = field(default_factory=training_routers)
    device: str = "auto"  # "cpu", "cuda", or "auto" for CUDA where there is one
    warmup: int = 1  # rounds (decoding) or first steps of each round (training) that do not count
    repetitions: int = 5  # rounds that count; in each, all variants take their turn
    seed: int = 0  # of all that is drawn: tokens, routes, weights
    out: str = "runs/benchmark"  # folder of the record

    def require(self, condition: bool, option: str, allowed: str) -> None:
        """Raises ValueError with the option, its value and what is allowed."""
        if not condition:
            raise ValueError(f"{option}={getattr(self, option)!r} is not allowed: {allowed}")

    def require_one_of(self, option: str, allowed: tuple[str, ...]) -> None:
        """Raises ValueError for an option with another value."""
        self.require(getattr(self, option) in allowed, option, f"choose one of {', '.join(allowed)}")

    def require_least(self, **least: float) -> None:
        """Raises ValueError for an option below the value given for it."""
        for option, lowest in least.items():
            self.require(getattr(self, option) >= lowest, option, f"at least {lowest}")

    def check(self) -> None:
        """Raises ValueError with the option, its value and what is allowed."""
        self.require_one_of("device", ("auto", "cpu", "cuda"))
        self.require_least(warmup=0, repetitions=1)


@dataclass
class BenchmarkConfig(SpeedConfig):
    """What the measurement of decoding takes besides.

    Decoders: transformers (`generate` of the plain model), transformers_static (the same with its static cache,
    compiled: slow to start), generate (`RouterAugmentedLM.generate`), engine (`DecodeEngine`: CUDA graphs on a GPU)
    and engine_eager (without graphs).
    """

    decoders: list[str] = field(default_factory=lambda: ["transformers", "generate", "engine"])
    quantizations: list[str | None] = field(default_factory=lambda: [None])  # of the layers; null for none, int8, int4
    routes: str = "spread"  # layers skipped: spread evenly, or those that most prompts skip in the paper's Table 15
    skip_rates: list[float] = field(default_factory=lambda: [0.15, 0.25, 0.35])  # 0 is always measured too
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    prompt_lengths: list[int] = field(default_factory=lambda: [128])  # with each of batch_sizes
    # Numbers of different routes in one batch of the engine, compared with one route that all rows share.
    mixed_routes: list[int] = field(default_factory=list)
    mixed_batch_size: int = 32
    queue: int = 0  # prompts and responses of different lengths that wait for a place in a batch; 0 for none
    queue_batch_size: int = 8
    tokens: int = 32  # new ones, per row
    do_sample: bool = False  # draw tokens, as in the paper, instead of greedy decoding
    temperature: float = 0.8
    top_k: int = 10
    least_cpu_share: float = 0.9  # a variant that got less of the CPU than this share of its time is warned of
    copy_mib: int = 256  # size of the copy that measures the memory's bandwidth; larger than any cache

    def check(self) -> None:
        """See `SpeedConfig.check`."""
        super().check()
        known = bool(self.decoders) and set(self.decoders) <= set(DECODERS)
        self.require(known, "decoders", f"choose from {', '.join(DECODERS)}")
        self.require(bool(self.quantizations), "quantizations", "one or more, null for none")
        for name in filter(None, self.quantizations):
            from firstlab.model.quantization import check_quantization

            check_quantization(name)
        if self.model.quantization is not None:
            given = self.model.quantization
            raise ValueError(f"model.quantization={given!r} is not for the benchmark; use quantizations=[null,{given}]")
        self.require_one_of("routes", ROUTES)
        self.require(all(0 <= rate < 1 for rate in self.skip_rates), "skip_rates", "each at least 0 and below 1")
        for option in ("batch_sizes", "prompt_lengths"):
            values = getattr(self, option)
            self.require(bool(values) and min(values) >= 1, option, "one value or more, each at least 1")
        self.require_least(mixed_batch_size=2, queue=0, queue_batch_size=1, copy_mib=1, top_k=0)
        fits = all(2 <= count <= self.mixed_batch_size for count in self.mixed_routes)
        self.require(fits, "mixed_routes", f"each from 2 to mixed_batch_size={self.mixed_batch_size}")
        needs = f"they run on the engine, which decoders={self.decoders} leaves out; add it"
        self.require(not self.mixed_routes or "engine" in self.decoders, "mixed_routes", needs)
        self.require(self.tokens >= 2, "tokens", "at least 2, one from prefill and one from decode")
        self.require(0 < self.temperature < math.inf, "temperature", "above 0; do_sample=false decodes greedily")
        self.require(0 <= self.least_cpu_share <= 1, "least_cpu_share", "between 0 and 1")


@dataclass
class TrainingSpeedConfig(SpeedConfig):
    """What the measurement of training takes besides; tokens are drawn at random, responses are labelled."""

    lora: LoraSettings = field(default_factory=LoraSettings)  # of phase 2 and of the plain step
    objective: str = "decode_consistent"  # of both phases, as the gate; see `TeacherForcedPass`
    gate: str = "hard"
    hold_routes: float = 10.0  # of phase 2, if decode-consistent; above 0 it reads the prompts once more
    batch_size: int = 8
    prompt_length: int = 128
    response_length: int = 64
    gradient_checkpointing: bool = False  # in all variants
    compile: bool = False  # the decoder layer of both phases
    loss_chunk: int = 1024  # positions whose logits exist at a time; the plain step knows no such thing
    learning_rate: float = 3e-4
    gradient_clip: float = 1.0
    warmup: int = 2
    steps: int = 5  # of each round, that count
    repetitions: int = 3
    out: str = "runs/training_speed"

    def check(self) -> None:
        """See `SpeedConfig.check`."""
        from firstlab.model.teacher_forcing import GATES, OBJECTIVES

        super().check()
        self.model.check_trainable()
        self.require_one_of("objective", tuple(OBJECTIVES))
        self.require_one_of("gate", tuple(GATES))
        self.require_least(batch_size=1, prompt_length=1, response_length=1, loss_chunk=1, steps=1, hold_routes=0)
        for option in ("learning_rate", "gradient_clip"):
            self.require(getattr(self, option) > 0, option, "greater than 0")


store_schema("benchmark_schema", BenchmarkConfig)
store_schema("training_speed_schema", TrainingSpeedConfig)


def load(composed: DictConfig) -> SpeedConfig:
    """The checked settings of either measurement. Raises ValueError with the option, its value and what is allowed."""
    config = settings(composed, SpeedConfig)
    config.check()
    return config
