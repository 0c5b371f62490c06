"""Speed of decoding at several skip rates, also of batches and queues whose prompts differ in routes or lengths."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from firstlab.bench.cell import PLAIN, Cell, Variant
from firstlab.bench.config import BenchmarkConfig
from firstlab.bench.models import Models, load_models
from firstlab.bench.workload import (
    Workload,
    chosen_routes,
    copy_bandwidth,
    distinct_routes,
    in_turn,
    read_bytes,
    seconds_of,
    spread_route,
)  # fmt: skip
from firstlab.engine.engine import DecodeEngine
from firstlab.store import machine


def measure(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure every variant at every batch size and prompt length; the record of benchmark.json."""
    lengths = f"prompt_lengths={config.prompt_lengths} with tokens={config.tokens}"
    loaded = load_models(config, max(config.prompt_lengths) + config.tokens, lengths)
    device = loaded.routed.device
    routes = chosen_routes(config, loaded.routed.num_layers)
    models = {name: loaded.quantized(name) for name in config.quantizations}
    # Made before anything is measured: there may be too few different routes.
    pairs = list(product(config.prompt_lengths, models.items()))
    mixed = [MixedRoutes(config, each, name, length) for length, (name, each) in pairs] if config.mixed_routes else []
    queues = [Queue(config, each, name, length) for length, (name, each) in pairs] if config.queue else []
    bandwidth = copy_bandwidth(device, config.copy_mib << 20)
    cells = []
    for batch_size, prompt_length in product(config.batch_sizes, config.prompt_lengths):
        every = product(models, config.decoders, routes.items())
        chosen = [each for each in every if each[1] not in PLAIN or each[2][0] == 0]
        variants = [Variant(decoder, rate, route, name) for name, decoder, (rate, route) in chosen]
        cell = Cell(models, variants, Workload(config, batch_size, prompt_length))
        cell.measure(config.warmup, config.repetitions)
        cells.append(cell.summary(bandwidth))
    return {
        "model": config.model.name,
        "layers": loaded.routed.num_layers,
        "parameters": sum(each.numel() for each in loaded.plain.parameters()),
        "settings": asdict(config),
        "copy_bandwidth_bytes_per_s": bandwidth,
        "cells": cells,
        "mixed_routes": [row for each in mixed for row in each.measure(config.warmup, config.repetitions)],
        "queues": [row for each in queues for row in each.measure(config.warmup, config.repetitions)],
        **machine.provenance(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else machine.processor_name(),
    }


class MixedRoutes:
    """Rows of different routes in one batch of the engine, beside the same rows with one route of as many layers."""

    def __init__(self, config: BenchmarkConfig, models: Models, quantization: str | None, prompt_length: int) -> None:
        workload = Workload(config, config.mixed_batch_size, prompt_length)
        layers, rows = models.routed.num_layers, torch.arange(workload.batch_size)
        self.pairs: list[tuple[int, Variant, Variant]] = []
        skipping = sorted({rate for rate in config.skip_rates if round(rate * layers)})
        if not skipping:
            given = f"skip_rates={list(config.skip_rates)}"
            raise ValueError(f"mixed_routes: {given} skip none of {layers} layers; give larger ones")
        for rate in skipping:
            shared = Variant("engine", rate, spread_route(layers, rate), quantization)
            for count in config.mixed_routes:
                routes = distinct_routes(layers, rate, count, config.seed)[rows % count]
                self.pairs.append((count, Variant("engine", rate, routes, quantization), shared))
        variants = dict.fromkeys(each for _, mixed, shared in self.pairs for each in (shared, mixed))
        self.cell = Cell({quantization: models}, list(variants), workload)

    def measure(self, warmup: int, repetitions: int) -> list[dict[str, Any]]:
        """A record per skip rate and number of routes. Rows of different routes read the weights of more layers."""
        lm, size, length = self.cell.some.plain, self.cell.workload.batch_size, self.cell.workload.attended
        self.cell.measure(warmup, repetitions)
        return [
            {
                "batch_size": size,
                "prompt_length": self.cell.workload.prompt_length,
                "routes": count,
                "quantization": mixed.quantization,
                "skip_rate_asked": mixed.skip_rate,
                "skip_rate": 1 - mixed.route.float().mean().item(),
                "tokens_per_s": size / float(np.median(mixed.tpot_s)),
                "tokens_per_s_shared": size / float(np.median(shared.tpot_s)),
                "throughput_ratio": float(np.median(shared.tpot_s / mixed.tpot_s)),
                "limit_ratio": read_bytes(lm, shared.route, size, length) / read_bytes(lm, mixed.route, size, length),
                "throughput_ratio_of_repetitions": (shared.tpot_s / mixed.tpot_s).tolist(),
                "cpu_share": float(np.median([*mixed.cpu_share, *shared.cpu_share])),
            }
            for count, mixed, shared in self.pairs
        ]


class Queue:
    """Prompts and responses of different lengths, more than the batch has rows; all share a route.

    `generate` takes them batch by batch, padded to the longest; in the engine a prompt that waits takes the place of
    one that has ended. Lengths are drawn evenly from a quarter of the longest up to it.
    """

    def __init__(self, config: BenchmarkConfig, models: Models, quantization: str | None, prompt_length: int) -> None:
        workload = Workload(config, config.queue_batch_size, prompt_length)
        generator = torch.Generator().manual_seed(config.seed)

        def lengths(longest: int) -> list[int]:
            return torch.randint(-(-longest // 4), longest + 1, (config.queue,), generator=generator).tolist()

        self.models, self.quantization, self.workload = models, quantization, workload
        drawn = (torch.randint(0, models.vocabulary, (size,), generator=generator) for size in lengths(prompt_length))
        self.prompts: list[list[int]] = [each.tolist() for each in drawn]
        self.limits = lengths(config.tokens)
        rates = sorted({0.0, *config.skip_rates})
        self.routes = {rate: spread_route(models.routed.num_layers, rate) for rate in rates}
        try:
            longest = prompt_length + config.tokens
            self.engine = DecodeEngine(models.for_engine, longest, workload.batch_size)
        except ValueError as error:
            raise ValueError(f"queue: {error}, so set queue=0") from error

    def measure(self, warmup: int, repetitions: int) -> list[dict[str, Any]]:
        """A record per skip rate, both ways in turn; tokens beyond a response's length do not count."""
        ways, device = (self._by_generate, self._by_engine), self.models.routed.device
        seconds = np.zeros((len(self.routes), len(ways), warmup + repetitions))
        for repetition in range(-warmup, repetitions):
            for of_route, route in zip(seconds, self.routes.values(), strict=True):
                for way in in_turn(range(len(ways)), repetition):
                    of_route[way, warmup + repetition] = seconds_of(partial(ways[way], route), device)
        return [
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
            for (rate, route), (slow, fast) in zip(self.routes.items(), seconds[:, :, warmup:], strict=True)
        ]

    def _by_engine(self, route: Tensor) -> None:
        self.engine.generate(self.prompts, self.limits, route, eos=(), sampling=self.workload.sampling)

    def _by_generate(self, route: Tensor) -> None:
        model, size = self.models.routed, self.workload.batch_size
        for start in range(0, len(self.prompts), size):
            batch, limits = self.prompts[start : start + size], self.limits[start : start + size]
            rows = [torch.tensor(prompt) for prompt in batch]
            padded = partial(pad_sequence, batch_first=True, padding_side="left")
            ids, mask = padded(rows), padded([torch.ones_like(row) for row in rows])
            options = self.workload.options | {"max_new_tokens": max(limits)}
            model.generate(ids.to(model.device), mask.to(model.device), routes=route.to(model.device), **options)
