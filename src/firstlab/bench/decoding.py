"""Speed of decoding at several skip rates, beside transformers and the memory's limit."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from firstlab.bench.cell import PLAIN, Cell, Variant
from firstlab.bench.config import BenchmarkConfig
from firstlab.bench.models import load_models
from firstlab.bench.throughput import MixedRoutes, Queue
from firstlab.bench.workload import Workload, chosen_routes, copy_bandwidth
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
