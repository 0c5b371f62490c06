"""Time several ways of decoding on one workload, in turn, so that drift hits all alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CompileConfig, LogitsProcessorList, StaticCache

from firstlab.bench.energy import joules_counter
from firstlab.bench.models import Models
from firstlab.bench.workload import Workload, in_turn, read_bytes, seconds_of
from firstlab.engine.engine import DecodeEngine
from firstlab.engine.graphs import Graphs
from firstlab.evaluation.timing import Stopwatch
from firstlab.store import machine

#: Decoders of the plain model: no layer can be skipped.
PLAIN = ("transformers", "transformers_static")
#: Decoders that are `DecodeEngine`, and their mode.
ENGINES = {"engine": "auto", "engine_eager": "eager"}


@dataclass(eq=False)
class Variant:
    """A way of decoding at a skip rate, and what was measured, a value per repetition."""

    decoder: str  # see `BenchmarkConfig`
    skip_rate: float  # as asked for
    route: Tensor  # [L] boolean, or of each row [B, L]
    quantization: str | None = None
    ttft_s: list[float] = field(default_factory=list)  # until the first token's logits are there
    steps_s: list[np.ndarray] = field(default_factory=list)  # of each decode step
    # CPU time of the main thread ÷ wall time; well below 1 where other processes had the CPU.
    cpu_share: list[float] = field(default_factory=list)
    kv_bytes: int = 0  # kept at the end
    peak_memory_bytes: int = 0  # of the device, without what other engines hold; on a CPU, of the process
    joules: list[float] = field(default_factory=list)  # of prefill and decode; empty where the device reports none

    @property
    def way(self) -> tuple[str, str | None]:
        return self.decoder, self.quantization

    @property
    def tpot_s(self) -> np.ndarray:
        """Mean decode step of each repetition: the median would jump when other processes take every second turn."""
        return np.array([steps.mean() for steps in self.steps_s])


def compile_everywhere() -> Any:
    """transformers' compiled decoding, which it otherwise keeps to accelerators."""
    chosen: Any = CompileConfig()
    chosen._compile_all_devices = True
    return chosen


class Cell:
    """All variants on one workload, by models of each quantization."""

    def __init__(self, models: Mapping[str | None, Models], variants: Sequence[Variant], workload: Workload) -> None:
        self.models, self.variants, self.workload = models, variants, workload
        generator = torch.Generator().manual_seed(workload.config.seed)
        self.some = next(iter(models.values()))  # for what does not depend on the weights
        ids = torch.randint(0, self.some.vocabulary, (workload.batch_size, workload.prompt_length), generator=generator)
        self.ids, self.prompts = ids.to(self.some.routed.device), ids.tolist()
        self.router_s: list[float] = []
        self.joules = joules_counter(self.some.routed.device)
        if any(variant.decoder == "transformers_static" for variant in variants):
            torch.compiler.reset()  # shapes of an earlier cell would make what is compiled now general, and slower
        self.static: dict[str | None, StaticCache] = {}
        self.engines: dict[tuple[str, str | None], DecodeEngine] = {}
        for key in dict.fromkeys(variant.way for variant in variants if variant.decoder in ENGINES):
            routed, mode = models[key[1]].for_engine, ENGINES[key[0]]
            try:
                longest = workload.prompt_length + workload.config.tokens
                self.engines[key] = DecodeEngine(routed, longest, workload.batch_size, mode)
            except ValueError as error:
                raise ValueError(f"decoders: {error}, so leave engine out: decoders=[transformers,generate]") from error

    def measure(self, warmup: int, repetitions: int) -> None:
        """Run every variant once per repetition."""
        for repetition in range(-warmup, repetitions):
            for variant in in_turn(self.variants, repetition):
                self._run(variant, repetition >= 0)
            seconds = self._time_routers()
            if repetition >= 0:
                self.router_s.append(seconds)

    def _run(self, variant: Variant, keep: bool) -> None:
        device, engine = self.ids.device, self.engines.get(variant.way)
        for static in self.static.values():
            static.reset()
        machine.reset_peak_memory(device)
        joules = self.joules() if self.joules else 0.0
        watch = Stopwatch(device)
        start, cpu = time.perf_counter(), time.thread_time()
        if engine is not None:
            given = self.prompts, self.workload.config.tokens, variant.route
            on_step, sampling = lambda _: watch.note(), self.workload.sampling
            kv_bytes = engine.generate(*given, eos=(), on_step=on_step, sampling=sampling).kv_bytes
        else:
            kv_bytes = self._generate(variant, watch)
        if not keep:
            return
        times = watch.times
        variant.ttft_s.append(times[0])
        variant.steps_s.append(np.diff(times))
        variant.cpu_share.append((time.thread_time() - cpu) / (time.perf_counter() - start))
        if self.joules:
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
                length = self.workload.prompt_length + self.workload.config.tokens - 1  # the last token is not read
                self.static[variant.quantization] = StaticCache(config=models.plain.config, max_cache_len=length)
            given = {"past_key_values": self.static[variant.quantization], "compile_config": compile_everywhere()}
        given |= {"logits_processor": LogitsProcessorList([watch]), "return_dict_in_generate": True}
        out = model.generate(self.ids, attention_mask=torch.ones_like(self.ids), **given, **self.workload.options)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)

    @torch.no_grad()
    def _time_routers(self) -> float:
        """Seconds that the routers of all layers take for the prompts: dot products, means, decision."""
        routers, weight = self.some.routed.layer_routers, self.some.plain.get_input_embeddings().weight
        hidden = torch.randn(*self.ids.shape, routers.weight.shape[1], device=self.ids.device)
        hidden = hidden.to(weight.dtype)  # type: ignore[arg-type]
        pooled = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)

        def route() -> None:
            readings = [routers.readings(hidden, layer) for layer in range(routers.num_layers)]
            routers.decide(routers.sums(readings, pooled) / self.workload.prompt_length)

        # On a GPU as one graph: in a prefill, the work of the layers hides how long the host takes to start these.
        replay = Graphs(hidden.device)("routers", route)
        replay()
        return seconds_of(replay, hidden.device)

    def summary(self, bandwidth: float) -> dict[str, Any]:
        """Everything measured, with the limits at `bandwidth` bytes per second.

        Ratios are medians over repetitions of ratios of mean decode steps, to the same weights without skipping.
        """
        dense = {variant.way: variant for variant in self.variants if variant.route.all()}
        unquantized = {(each.decoder, each.skip_rate): each for each in self.variants if each.quantization is None}
        batch_size, length = self.workload.batch_size, self.workload.attended
        new_tokens, rows = batch_size * self.workload.config.tokens, []
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
                    "joules_per_token": float(np.median(each.joules)) / new_tokens if each.joules else None,
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
