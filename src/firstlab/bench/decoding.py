"""Speed of decoding, way by way, and what the device's memory allows at best.

Every token reads the weights of the layers that run once, and the keys and values of every row: at small batches no
decoder is faster than these bytes over the memory's bandwidth.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
)

from firstlab.bench.energy import joules_counter
from firstlab.engine.engine import DecodeEngine
from firstlab.engine.graphs import Graphs
from firstlab.engine.llama_step import orders_anew
from firstlab.engine.sampling import Sampling
from firstlab.evaluation.timing import Stopwatch, synchronize
from firstlab.model import RouterAugmentedLM, RouterSettings
from firstlab.model.layers import find_decoder
from firstlab.model.quantization import quantize, stored_bytes
from firstlab.model.storage import load_base
from firstlab.store import machine


def spread_route(num_layers: int, skip_rate: float) -> Tensor:
    """[L] boolean: round(skip rate · L) layers skipped, evenly spread, the first and the last kept.

    Raises:
        ValueError: More layers to skip than stand between the first and the last.
    """
    skipped, between = round(skip_rate * num_layers), num_layers - 2
    if skipped > between:
        raise ValueError(
            f"skip_rates: {skip_rate} skips {skipped} of {num_layers} layers, but the first and the last are kept; "
            f"give at most {between / num_layers:.3g}"
        )
    route = torch.ones(num_layers, dtype=torch.bool)
    route[[1 + int((place + 0.5) * between / skipped) for place in range(skipped)]] = False
    return route


def distinct_routes(num_layers: int, skip_rate: float, count: int, seed: int) -> Tensor:
    """[count, L] boolean, all different: round(skip rate · L) random layers skipped, the first and the last kept.

    Raises:
        ValueError: There are fewer such routes, or more layers to skip than stand between the first and the last.
    """
    skipped = int((~spread_route(num_layers, skip_rate)).sum())
    possible = math.comb(num_layers - 2, skipped)
    if possible < count:
        raise ValueError(
            f"mixed_routes: {count} different routes at skip rate {skip_rate}, but only {possible} skip {skipped} of "
            f"{num_layers} layers and keep the first and the last; give at most {possible}, or another skip rate"
        )
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, ...], None] = {}  # in the order drawn
    while len(found) < count:
        drawn = 1 + torch.randperm(num_layers - 2, generator=generator)[:skipped]
        found[tuple(sorted(drawn.tolist()))] = None
    routes = torch.ones(count, num_layers, dtype=torch.bool)
    for route, layers in zip(routes, found, strict=True):
        route[list(layers)] = False
    return routes


def read_bytes(lm: PreTrainedModel, route: Tensor, batch_size: int, length: float) -> float:
    """Bytes that one decode step must read.

    Args:
        lm: The base model.
        route: [L] boolean, or of each row [B, L].
        batch_size: Rows.
        length: Tokens per row that attention reads, the new one included.

    Returns:
        Weights of the layers that some row runs, of the final norm and of the output head, and keys and values of the
        layers that each row runs. Rows of the input embedding are left out: one per row.
    """
    config: Any = lm.config.get_text_config(decoder=True)
    layers = find_decoder(lm)[1]
    embedding: Any = lm.get_input_embeddings()
    head: Any = lm.get_output_embeddings()
    elsewhere = {id(parameter) for parameter in layers.parameters()}
    if head.weight is not embedding.weight:
        elsewhere.add(id(embedding.weight))
    weights = sum(stored_bytes(each) for each in lm.parameters() if id(each) not in elsewhere)
    routes = route.expand(batch_size, -1)
    weights += sum(
        stored_bytes(each)
        for layer, runs in zip(layers, routes.any(0).tolist(), strict=True)
        if runs
        for each in layer.parameters()
    )
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * kv_heads * head_dim * embedding.weight.element_size()
    return weights + int(routes.sum()) * length * kv


def copy_bandwidth(device: torch.device, size: int, repetitions: int = 5) -> float:
    """Bytes per second of the best of several copies of `size` bytes; a copy reads and writes each."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    # A GPU needs microseconds to start and to report, and a copy not many more: several, one right behind the other.
    copies = 10 if device.type == "cuda" else 1
    times = []
    for _ in range(repetitions + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        synchronize(device)
        times.append((time.perf_counter() - start) / copies)
    return 2 * size / min(times[1:])


#: Decoders of the plain model: no layer can be skipped.
PLAIN = ("transformers", "transformers_static")
#: Decoders that are `DecodeEngine`, and their mode.
ENGINES = {"engine": "auto", "engine_eager": "eager", "engine_compiled": "compiled"}
COMPILED = ("transformers_static", "engine_compiled")


@dataclass(frozen=True)
class Models:
    """The same weights twice: plain, as transformers has them, and wrapped."""

    plain: PreTrainedModel
    routed: RouterAugmentedLM

    @classmethod
    def load(
        cls,
        path: str,
        settings: RouterSettings,
        random_init: bool,
        device: torch.device,
        **options: Any,
    ) -> Models:
        """Load, or with `random_init` make from the config alone.

        Raises:
            ValueError: Nothing can be loaded from `path`, or random weights do not fit into the device's memory.
        """
        if random_init:
            try:
                config = AutoConfig.from_pretrained(path, revision=options.pop("revision", None))
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(f"model.path={path!r} has no config that transformers can read: {error}") from error
            if options.get("dtype") == "auto":
                options["dtype"] = config.dtype or torch.float32
            check_memory(config, device, **options)
            with device:
                lm = AutoModelForCausalLM.from_config(config, **options)
        else:
            lm = load_base(path, **options)
        lm = lm.to(device).eval()
        # Random prompts: a row must not end before the others, and no setting of the model's own may change scores.
        lm.generation_config = GenerationConfig()
        return cls(_twin(lm), RouterAugmentedLM(lm, settings))

    @cached_property
    def for_engine(self) -> RouterAugmentedLM:
        """`routed`, with weights of its own where the engine orders them anew: the ways beside it keep theirs."""
        if not orders_anew(self.plain):
            return self.routed
        return RouterAugmentedLM(deepcopy(self.plain), self.routed.routers.settings)

    def quantized(self, name: str | None) -> Models:
        """These models for None, else others with weights of `QUANTIZATIONS`, which share what is not quantized.

        Raises:
            ValueError: The model cannot be quantized.
        """
        if name is None:
            return self
        lm = _twin(self.plain)
        quantize(lm, name)
        return Models(_twin(lm), RouterAugmentedLM(lm, self.routed.routers.settings))


def _twin(lm: PreTrainedModel) -> PreTrainedModel:
    """Other modules with the same weights."""
    return deepcopy(lm, {id(parameter): parameter for parameter in lm.parameters()})


def check_memory(config: Any, device: torch.device, **options: Any) -> None:
    """Raises ValueError if the weights of a config are larger than the device's whole memory."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, **options)
    needed = sum(each.nbytes for each in lm.parameters())
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[1]
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise ValueError(
            f"model.random_init=true: the weights take {needed / 2**30:.1f} GiB in {lm.dtype}, {device.type} has "
            f"{available / 2**30:.1f} GiB; use model.dtype=bfloat16, a smaller model or a larger device"
        )


@dataclass(frozen=True)
class Workload:
    """What is decoded: random prompts, each to the same number of tokens.

    Attributes:
        batch_size: Rows.
        prompt_length: Tokens of each prompt.
        tokens: New tokens of each row.
        sampling: How tokens are drawn; None for greedy decoding.
        seed: Of the prompts, and of routes that are drawn.
    """

    batch_size: int
    prompt_length: int
    tokens: int
    sampling: Sampling | None = None
    seed: int = 0

    @property
    def attended(self) -> float:
        """Tokens of a row that attention reads in a decode step, on average.

        The first step attends to the prompt and one token more, the last to all but the last token.
        """
        return self.prompt_length + self.tokens / 2

    @property
    def options(self) -> dict[str, Any]:
        """For transformers' `generate`: exactly `tokens` tokens of each row."""
        chosen: dict[str, Any] = {"max_new_tokens": self.tokens, "do_sample": self.sampling is not None}
        if self.sampling is not None:
            chosen |= {name: getattr(self.sampling, name) for name in ("temperature", "top_k", "top_p")}
        return chosen | {"pad_token_id": 0}


@dataclass(eq=False)
class Variant:
    """A way of decoding at a skip rate, and what was measured, a value per repetition.

    Attributes:
        decoder: transformers (`generate` of the plain model), transformers_static (the same with a static cache,
            compiled), generate (`RouterAugmentedLM.generate`) or one of `ENGINES`.
        skip_rate: As asked for.
        route: [L] boolean, or of each row [B, L].
        quantization: One of `QUANTIZATIONS`, or None.
        ttft_s: Until the first token's logits are there.
        steps_s: Each decode step.
        cpu_share: CPU time of the main thread ÷ wall time; well below 1 where other processes had the CPU.
        kv_bytes: Keys and values kept at the end.
        peak_memory_bytes: Of the device, without the keys and values of the engines beside; or of the process on a CPU.
        joules: Energy of prefill and decode, per repetition; empty where the device does not report it.
    """

    decoder: str
    skip_rate: float
    route: Tensor
    quantization: str | None = None
    ttft_s: list[float] = field(default_factory=list)
    steps_s: list[np.ndarray] = field(default_factory=list)
    cpu_share: list[float] = field(default_factory=list)
    kv_bytes: int = 0
    peak_memory_bytes: int = 0
    joules: list[float] = field(default_factory=list)

    @property
    def way(self) -> tuple[str, str | None]:
        """Decoder and quantization."""
        return self.decoder, self.quantization

    @property
    def tpot_s(self) -> np.ndarray:
        """Mean decode step of each repetition.

        Not the median: where other processes take turns on the CPU, a step either meets such a turn or does not, and
        the median jumps when half of them do. The mean grows in proportion, so that ratios keep.
        """
        return np.array([steps.mean() for steps in self.steps_s])


def compile_everywhere() -> Any:
    """transformers' compiled decoding, which it otherwise keeps to accelerators."""
    chosen: Any = CompileConfig()
    chosen._compile_all_devices = True
    return chosen


class Cell:
    """All variants on one workload.

    Args:
        models: What decodes, by quantization.
        variants: To be measured, in turn.
        workload: What they decode.

    Raises:
        ValueError: The engine does not know the model.
    """

    def __init__(self, models: Mapping[str | None, Models], variants: Sequence[Variant], workload: Workload) -> None:
        self.models, self.variants, self.workload = models, variants, workload
        generator = torch.Generator().manual_seed(workload.seed)
        self.some = next(iter(models.values()))  # for what does not depend on the weights
        vocabulary = self.some.plain.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(0, vocabulary, (workload.batch_size, workload.prompt_length), generator=generator)
        self.ids, self.prompts = ids.to(self.some.routed.device), ids.tolist()
        self.router_s: list[float] = []
        self.joules = joules_counter(self.some.routed.device)
        if any(variant.decoder in COMPILED for variant in variants):
            torch.compiler.reset()  # shapes of an earlier cell would make what is compiled now general, and slower
        self.static: dict[str | None, StaticCache] = {}
        self.engines: dict[tuple[str, str | None], DecodeEngine] = {}
        for key in dict.fromkeys(variant.way for variant in variants if variant.decoder in ENGINES):
            routed, mode = models[key[1]].for_engine, ENGINES[key[0]]
            try:
                longest = workload.prompt_length + workload.tokens
                self.engines[key] = DecodeEngine(routed, longest, workload.batch_size, mode)
            except ValueError as error:
                raise ValueError(f"decoders: {error}, so leave engine out: decoders=[transformers,generate]") from error

    def measure(self, warmup: int, repetitions: int) -> None:
        """Run every variant once per repetition, forwards and backwards in turn, so that drift hits all alike."""
        for repetition in range(-warmup, repetitions):
            for variant in self.variants[:: 1 if repetition % 2 == 0 else -1]:
                self._run(variant, repetition >= 0)
            seconds = self._time_routers()
            if repetition >= 0:
                self.router_s.append(seconds)

    def _run(self, variant: Variant, keep: bool) -> None:
        device, engine = self.ids.device, self.engines.get(variant.way)
        for static in self.static.values():
            static.reset()
        machine.reset_peak_memory(device)
        joules = None if self.joules is None else self.joules()
        watch = Stopwatch(device)
        start, cpu = time.perf_counter(), time.thread_time()
        if engine is not None:
            out = engine.generate(
                *(self.prompts, self.workload.tokens, variant.route),
                eos=(),
                on_step=lambda _: watch.note(),
                sampling=self.workload.sampling,
            )
            kv_bytes = out.kv_bytes
        else:
            kv_bytes = self._generate(variant, watch)
        if keep:
            times = watch.times
            variant.ttft_s.append(times[0])
            variant.steps_s.append(np.diff(times))
            variant.cpu_share.append((time.thread_time() - cpu) / (time.perf_counter() - start))
            if self.joules is not None and joules is not None:
                variant.joules.append(self.joules() - joules)
            variant.kv_bytes = kv_bytes
            peak = machine.peak_memory_bytes(device)
            if device.type == "cuda":
                peak -= sum(each.step.allocated_bytes() for each in self.engines.values() if each is not engine)
            variant.peak_memory_bytes = max(variant.peak_memory_bytes, peak)

    def _generate(self, variant: Variant, watch: Stopwatch) -> int:
        """Bytes of keys and values in the cache at the end."""
        plain, models = variant.decoder in PLAIN, self.models[variant.quantization]
        model: Any = models.plain if plain else models.routed
        given: dict[str, Any] = {} if plain else {"routes": variant.route.to(self.ids.device)}
        if variant.decoder == "transformers_static":
            if variant.quantization not in self.static:
                # One for all repetitions: its compiled graphs know the addresses of keys and values.
                length = self.workload.prompt_length + self.workload.tokens - 1  # the last token is not read
                self.static[variant.quantization] = StaticCache(config=models.plain.config, max_cache_len=length)
            given = {
                "past_key_values": self.static[variant.quantization],
                "compile_config": compile_everywhere(),
            }
        out = model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            logits_processor=LogitsProcessorList([watch]),
            return_dict_in_generate=True,
            **self.workload.options,
            **given,
        )
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)

    @torch.no_grad()
    def _time_routers(self) -> float:
        """Seconds that the routers of all layers take for the prompts: dot products, means, decision."""
        routers, weight = self.some.routed.routers, self.some.plain.get_input_embeddings().weight
        hidden = torch.randn(*self.ids.shape, routers.weight.shape[1], device=self.ids.device)
        hidden = hidden.to(weight.dtype)  # type: ignore[arg-type]
        pooled = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)

        def route() -> None:
            readings = [routers.readings(hidden, layer) for layer in range(routers.num_layers)]
            routers.decide(routers.sums(readings, pooled) / self.workload.prompt_length)

        # On a GPU as one graph: in a prefill, the work of the layers hides how long the host takes to start these.
        replay = Graphs(hidden.device)("routers", route)
        replay()
        synchronize(hidden.device)
        start = time.perf_counter()
        replay()
        synchronize(hidden.device)
        return time.perf_counter() - start

    def summary(self, bandwidth: float) -> dict[str, Any]:
        """Everything measured, with the limits at `bandwidth` bytes per second.

        Ratios are medians over the repetitions; each compares the mean decode steps of one repetition. `tpot_ratio` is
        to the same weights without skipping, `speedup_over_unquantized` over the same route with plain weights: where
        quantization and skipping multiply, the latter is the same at every route.
        """
        dense = {variant.way: variant for variant in self.variants if variant.route.all()}
        unquantized = {
            (variant.decoder, variant.skip_rate): variant for variant in self.variants if variant.quantization is None
        }
        batch_size, length = self.workload.batch_size, self.workload.attended
        rows = []
        for each in self.variants:
            steps, whole, lm = np.concatenate(each.steps_s), dense[each.way], self.models[each.quantization].plain
            needed, least = (read_bytes(lm, route, batch_size, length) for route in (each.route, whole.route))
            transformers = dense.get(("transformers", each.quantization))
            larger = unquantized.get((each.decoder, each.skip_rate))
            rows.append(
                {
                    "decoder": each.decoder,
                    "quantization": each.quantization,
                    "skip_rate_asked": each.skip_rate,
                    "skip_rate": 1 - each.route.float().mean().item(),
                    "skipped_layers": (~each.route).nonzero().flatten().tolist(),
                    "ttft_s": float(np.median(each.ttft_s)),
                    "tpot_s": float(np.median(steps)),
                    "tpot_mean_s": float(steps.mean()),
                    "tpot_p95_s": float(np.quantile(steps, 0.95)),
                    "tpot_mean_s_of_repetitions": each.tpot_s.tolist(),
                    "tokens_per_s": float(batch_size / steps.mean()),
                    "tpot_ratio": float(np.median(each.tpot_s / whole.tpot_s)),
                    "tpot_ratio_of_medians": float(np.median(steps) / np.median(np.concatenate(whole.steps_s))),
                    "limit_ratio": needed / least,
                    "bytes_per_step": needed,
                    "limit_tpot_s": needed / bandwidth,
                    "speedup_over_transformers": _speedup(each, transformers),
                    "speedup_over_unquantized": _speedup(each, larger),
                    "kv_bytes": each.kv_bytes,
                    "kv_bytes_saved": whole.kv_bytes - each.kv_bytes,
                    "peak_memory_bytes": each.peak_memory_bytes,
                    "joules_per_token": (
                        float(np.median(each.joules)) / (batch_size * self.workload.tokens) if each.joules else None
                    ),
                    "cpu_share": float(np.median(each.cpu_share)),
                }
            )
        prefill = float(np.median([seconds for each in self.variants for seconds in each.ttft_s]))
        router = float(np.median(self.router_s))
        return {
            "batch_size": batch_size,
            "prompt_length": self.workload.prompt_length,
            "prefill_s": prefill,
            "router_s": router,
            "router_share_of_prefill": router / prefill,
            "variants": rows,
        }


def _speedup(variant: Variant, other: Variant | None) -> float | None:
    return None if other is None else float(np.median(other.tpot_s / variant.tpot_s))
