"""How fast decoding is at several skip rates, beside transformers and the memory's limit.

python -m firstlab.benchmark [model=hf model.path=ID_OR_FOLDER model.name=NAME] [skip_rates=[0.25]] [out=FOLDER]
python -m firstlab.benchmark model=llama3_8b model.random_init=true model.dtype=bfloat16 routes=paper
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from firstlab.config.compose import settings, store_schema
from firstlab.config.schema import SpeedModelConfig, training_routers
from firstlab.model.settings import RouterSettings

DECODERS = ("transformers", "transformers_static", "generate", "engine", "engine_eager", "engine_compiled")
ROUTES = ("spread", "paper")


@dataclass
class BenchmarkConfig:
    """What `python -m firstlab.benchmark` takes.

    Attributes:
        model: The base model.
        router: How the routers read hidden states; only for their own time, as routes are forced.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        decoders: Of transformers (`generate` of the plain model), transformers_static (the same with its static cache,
            compiled), generate (`RouterAugmentedLM.generate`), engine (`DecodeEngine`: CUDA graphs on a GPU),
            engine_eager (the same without graphs) and engine_compiled (the same with compiled layers).
        quantizations: Of the decoder layers' weights, all measured in turn: null for none, int8, int4.
        routes: Which layers are skipped: spread evenly at each of `skip_rates`, or those that most prompts skip in the
            paper's Table 15 (of a model with 32 layers).
        skip_rates: Shares of layers to skip; 0 is always measured too.
        batch_sizes, prompt_lengths: All pairs are measured.
        mixed_routes: Numbers of different routes in one batch of the engine, compared with one route that all rows
            share; empty for none.
        mixed_batch_size: Rows of such a batch.
        queue: Prompts of different lengths, with responses of different lengths, that wait for a place in a batch:
            throughput of the engine beside `generate` batch by batch; 0 for none.
        queue_batch_size: Rows of such a batch.
        tokens: New tokens per row.
        do_sample: Draw tokens instead of greedy decoding.
        temperature, top_k: Of drawn tokens; see `firstlab.engine.sampling.Sampling`.
        warmup: Rounds of all variants before the first that counts.
        repetitions: Rounds that count.
        least_cpu_share: A warning is printed if a variant got less of the CPU than this share of its time.
        copy_mib: Size of the copy that measures the memory's bandwidth.
        seed: Of prompts and random weights.
        out: Folder of benchmark.json and benchmark.png.
    """

    model: SpeedModelConfig = field(default_factory=SpeedModelConfig)
    router: RouterSettings = field(default_factory=training_routers)
    device: str = "auto"
    decoders: list[str] = field(default_factory=lambda: ["transformers", "generate", "engine"])
    quantizations: list[str | None] = field(default_factory=lambda: [None])
    routes: str = "spread"
    skip_rates: list[float] = field(default_factory=lambda: [0.15, 0.25, 0.35])
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    prompt_lengths: list[int] = field(default_factory=lambda: [128])
    mixed_routes: list[int] = field(default_factory=list)
    mixed_batch_size: int = 32
    queue: int = 0
    queue_batch_size: int = 8
    tokens: int = 32
    do_sample: bool = False
    temperature: float = 0.8
    top_k: int = 10
    warmup: int = 1
    repetitions: int = 5
    least_cpu_share: float = 0.9
    copy_mib: int = 256
    seed: int = 0
    out: str = "runs/benchmark"

    def check(self) -> None:
        """Raises ValueError with the option, its value and what is allowed."""

        def require(condition: bool, option: str, allowed: str) -> None:
            if not condition:
                raise ValueError(f"{option}={getattr(self, option)!r} is not allowed: {allowed}")

        require(self.device in ("auto", "cpu", "cuda"), "device", "choose one of auto, cpu, cuda")
        known = bool(self.decoders) and set(self.decoders) <= set(DECODERS)
        require(known, "decoders", f"choose from {', '.join(DECODERS)}")
        require(bool(self.quantizations), "quantizations", "one or more, null for none")
        for name in self.quantizations:
            if name is not None:
                from firstlab.model.quantization import check_quantization

                check_quantization(name)
        if self.model.quantization is not None:
            given = self.model.quantization
            raise ValueError(f"model.quantization={given!r} is not for the benchmark; use quantizations=[null,{given}]")
        require(self.routes in ROUTES, "routes", f"choose one of {', '.join(ROUTES)}")
        require(all(0 <= rate < 1 for rate in self.skip_rates), "skip_rates", "each at least 0 and below 1")
        for option in ("batch_sizes", "prompt_lengths"):
            values = getattr(self, option)
            require(bool(values) and min(values) >= 1, option, "one value or more, each at least 1")
        require(self.mixed_batch_size >= 2, "mixed_batch_size", "at least 2")
        fits = all(2 <= count <= self.mixed_batch_size for count in self.mixed_routes)
        require(fits, "mixed_routes", f"each from 2 to mixed_batch_size={self.mixed_batch_size}")
        needs = not self.mixed_routes or "engine" in self.decoders
        require(needs, "mixed_routes", f"they run on the engine, which decoders={self.decoders} leaves out; add it")
        require(self.queue >= 0, "queue", "at least 1, or 0 for none")
        require(self.queue_batch_size >= 1, "queue_batch_size", "at least 1")
        require(self.tokens >= 2, "tokens", "at least 2, one from prefill and one from decode")
        require(0 < self.temperature < math.inf, "temperature", "above 0; do_sample=false decodes greedily")
        require(self.top_k >= 0, "top_k", "at least 0, which keeps all tokens")
        require(0 <= self.least_cpu_share <= 1, "least_cpu_share", "between 0 and 1")
        require(self.warmup >= 0, "warmup", "at least 0")
        for option in ("repetitions", "copy_mib"):
            require(getattr(self, option) >= 1, option, "at least 1")


store_schema("benchmark_schema", BenchmarkConfig)


def load(composed: DictConfig) -> BenchmarkConfig:
    """The checked settings.

    Raises:
        ValueError: One message with the option, its value and what is allowed.
    """
    config = settings(composed, BenchmarkConfig)
    config.check()
    return config


def chosen_routes(config: BenchmarkConfig, num_layers: int) -> dict[float, Any]:
    """Skip rate to route [L], dense first.

    Raises:
        ValueError: A rate or the paper's layers do not fit the model.
    """
    import torch

    from firstlab.bench.decoding import spread_route
    from firstlab.store import paper

    if config.routes == "spread":
        return {rate: spread_route(num_layers, rate) for rate in sorted({0.0, *config.skip_rates})}
    table = paper.read()["per_layer"]
    if num_layers != table["layers"]:
        raise ValueError(
            f"routes=paper: Table 15 is about a model of {table['layers']} layers, and model={config.model.name} has "
            f"{num_layers}; use routes=spread"
        )
    routes = {0.0: torch.ones(num_layers, dtype=torch.bool)}
    for column in table["columns"]:
        if column["variant"] == "router_lora":
            route = torch.tensor(paper.per_layer_shares(column, num_layers)) < 50
            routes[1 - route.float().mean().item()] = route
    return routes


def measure(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure every variant at every batch size and prompt length; the record of benchmark.json.

    Raises:
        ValueError: A setting that this model or device does not fit.
    """
    import torch

    from firstlab.bench.decoding import PLAIN, Cell, Models, Variant, Workload, copy_bandwidth
    from firstlab.bench.throughput import MixedRoutes, Queue
    from firstlab.config.build import model_path
    from firstlab.engine.sampling import Sampling
    from firstlab.store import machine

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' is not allowed: torch finds no CUDA device; use device=cpu")
    name = "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device.replace("auto", "cpu")
    device = torch.device(name)
    torch.manual_seed(config.seed)
    settings = config.router
    options = {"dtype": config.model.dtype, "revision": config.model.revision}
    options |= {"attn_implementation": config.model.attn_implementation}
    given = {key: value for key, value in options.items() if value is not None}
    loaded = Models.load(
        model_path(config.model.path, config.model.random_init), settings, config.model.random_init, device, **given
    )
    longest = max(config.prompt_lengths) + config.tokens
    allowed = getattr(loaded.plain.config, "max_position_embeddings", longest)
    if longest > allowed:
        raise ValueError(
            f"prompt_lengths={config.prompt_lengths} with tokens={config.tokens} needs {longest} positions, and "
            f"model={config.model.name} has {allowed}; shorten one of them"
        )
    routes = chosen_routes(config, loaded.routed.num_layers)
    models = {name: loaded.quantized(name) for name in config.quantizations}
    sampling = Sampling(config.temperature, config.top_k, seed=config.seed) if config.do_sample else None

    def workload(batch_size: int, prompt_length: int) -> Workload:
        return Workload(batch_size, prompt_length, config.tokens, sampling, config.seed)

    # Made before anything is measured: there may be too few different routes.
    mixed = [
        MixedRoutes(*(each, name, config.mixed_routes, config.skip_rates), workload(config.mixed_batch_size, length))
        for length in (config.prompt_lengths if config.mixed_routes else [])
        for name, each in models.items()
    ]
    queues = [
        Queue(each, name, config.skip_rates, config.queue, workload(config.queue_batch_size, length))
        for length in (config.prompt_lengths if config.queue else [])
        for name, each in models.items()
    ]
    bandwidth = copy_bandwidth(device, config.copy_mib << 20)
    cells = []
    for batch_size, prompt_length in product(config.batch_sizes, config.prompt_lengths):
        variants = [
            Variant(decoder, rate, route, name)
            for name in models
            for decoder in config.decoders
            for rate, route in routes.items()
            if decoder not in PLAIN or rate == 0
        ]
        cell = Cell(models, variants, workload(batch_size, prompt_length))
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
        "device": torch.cuda.get_device_name() if name == "cuda" else machine.processor_name(),
    }


def way_of(row: dict[str, Any]) -> str:
    """Decoder and quantization of a row of the record."""
    return " ".join(filter(None, (row["decoder"], row["quantization"])))


def print_tables(record: dict[str, Any]) -> None:
    """One table per batch size and prompt length."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    for cell in record["cells"]:
        title = f"{record['model']}, batch {cell['batch_size']}, prompt of {cell['prompt_length']} tokens"
        view = Table(title=title, title_justify="left")
        view.add_column("", no_wrap=True)
        columns = ["skipped", "TTFT ms", "TPOT ms", "median", "p95", "tokens/s", "speed-up", "TPOT ratio", "limit"]
        smaller = any(row["quantization"] for row in cell["variants"])
        energy = any(row["joules_per_token"] is not None for row in cell["variants"])
        columns += ["× plain weights"] if smaller else []
        for name in (*columns, "KV MiB", "saved", "peak MiB", "CPU", *(["J/token"] if energy else [])):
            view.add_column(name, justify="right")
        for row in cell["variants"]:
            faster, saved = row["speedup_over_transformers"], row["kv_bytes_saved"]
            larger = row["speedup_over_unquantized"]
            view.add_row(
                way_of(row),
                f"{100 * row['skip_rate']:.1f} %",
                f"{1000 * row['ttft_s']:.1f}",
                f"{1000 * row['tpot_mean_s']:.2f}",
                f"{1000 * row['tpot_s']:.2f}",
                f"{1000 * row['tpot_p95_s']:.2f}",
                f"{row['tokens_per_s']:.0f}",
                "-" if faster is None else f"{faster:.2f}",
                f"{row['tpot_ratio']:.2f}x",
                f"{row['limit_ratio']:.2f}x",
                *(["-" if larger is None else f"{larger:.2f}"] if smaller else []),
                f"{row['kv_bytes'] / 2**20:.2f}",
                f"{100 * saved / (row['kv_bytes'] + saved):.0f} %",
                f"{row['peak_memory_bytes'] / 2**20:.0f}",
                f"{100 * row['cpu_share']:.0f} %",
                *([f"{row['joules_per_token']:.3g}"] if energy else []),
            )
        console.print(view)
        least = {row["quantization"]: row["limit_tpot_s"] for row in cell["variants"] if row["skip_rate"] == 0}
        limits = (f"{1000 * seconds:.2f} ms" + (f" ({name})" if name else "") for name, seconds in least.items())
        print(
            f"routers: {1000 * cell['router_s']:.2f} ms, {100 * cell['router_share_of_prefill']:.2f} % of prefill; "
            f"TPOT of the bytes read without skipping: {', '.join(limits)} "
            f"(copies run at {record['copy_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s)"
        )
    for row in record["mixed_routes"]:
        routes = ", ".join(filter(None, (f"{row['routes']} routes", row["quantization"])))
        print(
            f"mixed routes: {100 * row['throughput_ratio']:.0f} % of the throughput of one shared route "
            f"({routes}, batch {row['batch_size']}, prompt of {row['prompt_length']} tokens, "
            f"{100 * row['skip_rate']:.1f} % skipped, {row['tokens_per_s']:.0f} tokens/s; "
            f"by the bytes read {100 * row['limit_ratio']:.0f} %)"
        )
    for row in record["queues"]:
        weights = f", {row['quantization']}" if row["quantization"] else ""
        print(
            f"queue of {row['prompts']} prompts of up to {row['prompt_length']} tokens, "
            f"batch {row['batch_size']}{weights}, {100 * row['skip_rate']:.1f} % skipped: "
            f"{row['tokens_per_s']:.0f} tokens/s, "
            f"{row['speedup_over_generate']:.2f} times those of generate, batch by batch "
            f"({row['tokens_per_s_generate']:.0f})"
        )
    share = min(row["cpu_share"] for cell in record["cells"] for row in cell["variants"])
    if share < record["settings"]["least_cpu_share"]:
        print(
            f"warning: other processes had the CPU for up to {100 * (1 - share):.0f} % of a run: times are too long, "
            "and medians mislead; measure on a quiet machine",
            file=sys.stderr,
        )


def run(config: BenchmarkConfig) -> None:
    """Measure, print, write, draw."""
    from firstlab.bench import figure
    from firstlab.store import paper
    from firstlab.store.files import check_writable, write_atomically

    check_writable(Path(config.out), "out")
    record = measure(config)
    print_tables(record)
    out = Path(config.out)
    write_atomically(out / "benchmark.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    figure.tpot_against_skip(record, paper.read()["tpot"]["5"]["tasks"]["wmt_ende"], out / "benchmark.png")
    print(f"record:  {out / 'benchmark.json'}\npicture: {out / 'benchmark.png'}")
