"""Make the prompts and routes that a benchmark decodes, and count the bytes that a step must read: the limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from firstlab.bench.config import BenchmarkConfig
from firstlab.engine.sampling import Sampling
from firstlab.evaluation.timing import synchronize
from firstlab.model.layers import find_decoder
from firstlab.model.quantization import stored_bytes
from firstlab.store import paper

T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    """What is decoded: random prompts of one length, each to the same number of tokens."""

    config: BenchmarkConfig
    batch_size: int
    prompt_length: int

    @property
    def sampling(self) -> Sampling | None:
        """How tokens are drawn; None for greedy decoding."""
        given = self.config
        return Sampling(temperature=given.temperature, top_k=given.top_k, seed=given.seed) if given.do_sample else None

    @property
    def attended(self) -> float:
        """Tokens of a row that attention reads in a decode step, on average over the steps after prefill."""
        return self.prompt_length + self.config.tokens / 2

    @property
    def options(self) -> dict[str, Any]:
        """For transformers' `generate`: exactly as many tokens of each row."""
        drawn = {name: getattr(self.sampling, name) for name in ("temperature", "top_k", "top_p") if self.sampling}
        return {"max_new_tokens": self.config.tokens, "do_sample": self.config.do_sample, "pad_token_id": 0, **drawn}


def in_turn(items: Iterable[T], repetition: int) -> list[T]:
    """Forwards and backwards in turn, so that drift hits all alike."""
    return list(items)[:: 1 if repetition % 2 == 0 else -1]


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that a device needs for some work, alone."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def spread_route(num_layers: int, skip_rate: float) -> Tensor:
    """[L] boolean: round(skip rate · L) layers skipped, evenly spread, the first and the last kept, or ValueError."""
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
    """[count, L] boolean: different routes of round(skip rate · L) random skipped layers, the first and last kept."""
    skipped = int((~spread_route(num_layers, skip_rate)).sum())
    possible = math.comb(num_layers - 2, skipped)
    if possible < count:
        raise ValueError(
            f"mixed_routes: {count} different routes at skip rate {skip_rate}, but only {possible} skip {skipped} of "
            f"{num_layers} layers and keep the first and the last; give at most {possible}, or another skip rate"
        )
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[bool, ...], None] = {}  # in the order drawn
    while len(found) < count:
        route = torch.ones(num_layers, dtype=torch.bool)
        route[1 + torch.randperm(num_layers - 2, generator=generator)[:skipped]] = False
        found[tuple(route.tolist())] = None
    return torch.tensor(list(found))


def chosen_routes(config: BenchmarkConfig, num_layers: int) -> dict[float, Tensor]:
    """Skip rate to route [L], dense first. Raises ValueError if a rate or the paper's layers do not fit the model."""
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


def read_bytes(lm: PreTrainedModel, route: Tensor, batch_size: int, length: float) -> float:
    """Bytes that one decode step must read, `length` tokens of each row by attention; `route` is [L] or [B, L].

    Weights of the layers that some row runs, of the final norm and of the output head, and keys and values of the
    layers that each row runs. The input embedding is left out: one row of it per row.
    """
    config: Any = lm.config.get_text_config(decoder=True)
    embedding: Any = lm.get_input_embeddings()
    head: Any = lm.get_output_embeddings()
    routes = route.expand(batch_size, -1)
    skipped = [layer for layer, runs in zip(find_decoder(lm)[1], routes.any(0), strict=True) if not runs]
    unread = {id(weight) for layer in skipped for weight in layer.parameters()}
    if head.weight is not embedding.weight:
        unread.add(id(embedding.weight))
    weights = sum(stored_bytes(each) for each in lm.parameters() if id(each) not in unread)
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
    times = [seconds_of(lambda: [target.copy_(source) for _ in range(copies)], device) for _ in range(repetitions + 1)]
    return 2 * size * copies / min(times[1:])
