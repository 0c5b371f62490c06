"""Measure the engine's throughput when the prompts of a batch differ in their routes or lengths."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firstlab.bench.cell import Cell, Variant
from firstlab.bench.config import BenchmarkConfig
from firstlab.bench.models import Models
from firstlab.bench.workload import Workload, distinct_routes, read_bytes, spread_route
from firstlab.engine.engine import DecodeEngine
from firstlab.evaluation.timing import synchronize


class MixedRoutes:
    """Rows of different routes in one batch of the engine, beside the same rows with one route of as many layers.

    Args:
        config: Numbers of different routes, which the rows share evenly; rates that skip no layer are left out.
        models: What decodes.
        quantization: Of its weights.
        prompt_length: Tokens of each prompt.

    Raises:
        ValueError: Fewer different routes exist than asked for, no rate skips a layer, or the engine does not know the
            model.
    """

    def __init__(self, config: BenchmarkConfig, models: Models, quantization: str | None, prompt_length: int) -> None:
        workload = Workload.of(config, config.mixed_batch_size, prompt_length)
        layers, rows = models.routed.num_layers, torch.arange(workload.batch_size)
        self.pairs: list[tuple[int, Variant, Variant]] = []
        variants = []
        skipping = sorted({rate for rate in config.skip_rates if round(rate * layers)})
        if not skipping:
            raise ValueError(
                f"mixed_routes: skip_rates={list(config.skip_rates)} skip none of {layers} layers; give larger ones"
            )
        for rate in skipping:
            shared = Variant("engine", rate, spread_route(layers, rate), quantization)
            variants.append(shared)
            for count in config.mixed_routes:
                routes = distinct_routes(layers, rate, count, workload.seed)[rows % count]
                mixed = Variant("engine", rate, routes, quantization)
                variants.append(mixed)
                self.pairs.append((count, mixed, shared))
        self.cell = Cell({quantization: models}, variants, workload)

    def measure(self, warmup: int, repetitions: int) -> list[dict[str, Any]]:
        """A record per skip rate and number of routes; the ratio is the median over the repetitions.

        Its limit is that of the bytes read: rows of different routes need the weights of more layers.
        """
        cell, lm, workload = self.cell, self.cell.some.plain, self.cell.workload
        cell.measure(warmup, repetitions)

        def needed(variant: Variant) -> float:
            return read_bytes(lm, variant.route, workload.batch_size, workload.attended)

        return [
            {
                "batch_size": workload.batch_size,
                "prompt_length": workload.prompt_length,
                "routes": count,
                "quantization": mixed.quantization,
                "skip_rate_asked": mixed.skip_rate,
                "skip_rate": 1 - mixed.route.float().mean().item(),
                "tokens_per_s": workload.batch_size / float(np.median(mixed.tpot_s)),
                "tokens_per_s_shared": workload.batch_size / float(np.median(shared.tpot_s)),
                "throughput_ratio": float(np.median(shared.tpot_s / mixed.tpot_s)),
                "limit_ratio": needed(shared) / needed(mixed),
                "throughput_ratio_of_repetitions": (shared.tpot_s / mixed.tpot_s).tolist(),
                "cpu_share": float(np.median([*mixed.cpu_share, *shared.cpu_share])),
            }
            for count, mixed, shared in self.pairs
        ]


class Queue:
    """Prompts and responses of different lengths, more of them than the batch has rows.

    `generate` takes them batch by batch, each padded to its longest prompt and decoded to its longest response; in the
    engine a prompt that waits takes the place of one that has ended. Lengths are drawn evenly from a quarter of the
    longest up to it.

    Args:
        config: Numbers of prompts and rows; all prompts share a route.
        models: What decodes.
        quantization: Of its weights.
        prompt_length: The longest prompt.

    Raises:
        ValueError: The engine does not know the model.
    """

    def __init__(self, config: BenchmarkConfig, models: Models, quantization: str | None, prompt_length: int) -> None:
        workload = Workload.of(config, config.queue_batch_size, prompt_length)
        generator = torch.Generator().manual_seed(workload.seed)

        def lengths(longest: int) -> list[int]:
            return torch.randint(-(-longest // 4), longest + 1, (config.queue,), generator=generator).tolist()

        self.models, self.quantization, self.workload = models, quantization, workload
        self.prompts = [
            torch.randint(0, models.vocabulary, (length,), generator=generator).tolist()
            for length in lengths(workload.prompt_length)
        ]
        self.limits = lengths(workload.tokens)
        layers = models.routed.num_layers
        self.routes = {rate: spread_route(layers, rate) for rate in sorted({0.0, *config.skip_rates})}
        try:
            longest = workload.prompt_length + workload.tokens
            self.engine = DecodeEngine(models.for_engine, longest, workload.batch_size)
        except ValueError as error:
            raise ValueError(f"queue: {error}, so set queue=0") from error

    def measure(self, warmup: int, repetitions: int) -> list[dict[str, Any]]:
        """A record per skip rate, both ways in turn; tokens beyond a response's length do not count."""
        ways = {"generate": self._by_generate, "engine": self._by_engine}
        seconds: dict[tuple[float, str], list[float]] = {(rate, way): [] for rate in self.routes for way in ways}
        device = self.models.routed.device
        for repetition in range(-warmup, repetitions):
            for rate, route in self.routes.items():
                for way in list(ways)[:: 1 if repetition % 2 == 0 else -1]:
                    synchronize(device)
                    start = time.perf_counter()
                    ways[way](route)
                    synchronize(device)
                    if repetition >= 0:
                        seconds[rate, way].append(time.perf_counter() - start)
        found = []
        for rate, route in self.routes.items():
            slow, fast = (np.array(seconds[rate, way]) for way in ways)
            found.append(
                {
                    "prompts": len(self.prompts),
                    "batch_size": self.workload.batch_size,
                    "prompt_length": self.workload.prompt_length,
                    "prompt_tokens": sum(map(len, self.prompts)),
                    "new_tokens": sum(self.limits),
                    "quantization": self.quantization,
                    "skip_rate_asked": rate,
                    "skip_rate": 1 - route.float().mean().item(),
                    "tokens_per_s": sum(self.limits) / float(np.median(fast)),
                    "tokens_per_s_generate": sum(self.limits) / float(np.median(slow)),
                    "speedup_over_generate": float(np.median(slow / fast)),
                    "speedup_of_repetitions": (slow / fast).tolist(),
                }
            )
        return found

    def _by_engine(self, route: Tensor) -> None:
        self.engine.generate(self.prompts, self.limits, route, eos=(), sampling=self.workload.sampling)

    def _by_generate(self, route: Tensor) -> None:
        model, size = self.models.routed, self.workload.batch_size
        for start in range(0, len(self.prompts), size):
            batch, limits = self.prompts[start : start + size], self.limits[start : start + size]
            width = max(map(len, batch))
            ids, mask = torch.zeros(2, len(batch), width, dtype=torch.long)
            for row, prompt in enumerate(batch):
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            model.generate(
                ids.to(model.device),
                mask.to(model.device),
                routes=route.to(model.device),
                **self.workload.options | {"max_new_tokens": max(limits)},
            )
