"""Speed of decoding at several skip rates, also of batches and queues whose prompts differ in routes or lengths."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
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
from firstlab.config.build import model_path
from firstlab.data.encoding import Row, collate_training, pad_id, prompt_ids
from firstlab.data.mini_qa import MiniQA
from firstlab.data.mini_summarization import MiniSummarization
from firstlab.data.mini_translation import MiniTranslation
from firstlab.engine.engine import DecodeEngine
from firstlab.methods.base import routes_without
from firstlab.methods.sleb import elimination, one_by_one
from firstlab.model.generation_options import stop_tokens
from firstlab.model.storage import load_tokenizer
from firstlab.store import machine
from firstlab.training.prompt_set import losses_under_routes, read_prompts

# Further prompts that drafting routes are searched on, and the most tokens that prompt lookup proposes.
_SEARCHED, _LOOKED_UP = 16, 10


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
    lossless = [Lossless(config, loaded)] if config.lossless else []
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
        "lossless": [row for each in lossless for row in each.measure(config.warmup, config.repetitions)],
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


class Lossless:
    """Ways to the dense model's greedy text, prompt by prompt: without drafts, from those of routes, transformers' own.

    Prompts are real text, as drafts are right or wrong by it. Each route is the greedy set of its size that keeps the
    dense text of further prompts most likely.
    """

    def __init__(self, config: BenchmarkConfig, models: Models) -> None:
        tokenizer = load_tokenizer(model_path(config.model.path), config.model.revision, config.model.gguf_file)
        self.ends, self.limit, self.models = stop_tokens(models.plain, tokenizer), config.tokens, models
        self.pad, device = pad_id(tokenizer), models.routed.device
        texts = _real_prompts(config.lossless_prompts, config.lossless + _SEARCHED)
        ids = [torch.tensor([prompt_ids(tokenizer, text)], device=device) for text in texts]
        longest = max(each.shape[1] for each in ids) + config.tokens
        self.prompts, searched = ids[: config.lossless], ids[config.lossless :]
        engine = DecodeEngine(models.for_engine, longest, 1) if "engine" in config.decoders else None
        # What each way calls, by decoder and skip rate.
        self.ways: dict[tuple[str, float | None], Callable[[Tensor], Any]] = {
            ("transformers", None): self._plain(),
            ("prompt_lookup", None): self._plain(prompt_lookup_num_tokens=_LOOKED_UP),
        }
        layers = models.routed.num_layers
        dense = torch.ones(layers, dtype=torch.bool)
        if "generate" in config.decoders:
            self.ways["generate", None] = self._routed(dense)
        if engine is not None:
            self.ways["engine", None] = lambda prompt: engine.generate(prompt.tolist(), self.limit, dense, self.ends)
        counts = {rate: count for rate in config.skip_rates if 0 < (count := round(rate * layers)) < layers - 1}
        order = self._searched(searched, max(counts.values(), default=0))
        for rate, count in counts.items():
            self.ways["early_exit", rate] = self._plain(assistant_early_exit=layers - count)
            self.ways["lossless", rate] = self._routed(routes_without(layers, order[:count]), lossless=True)

    def _plain(self, **more: Any) -> Callable[[Tensor], Any]:
        return partial(self._generate, self.models.plain, **more)

    def _routed(self, route: Tensor, **more: Any) -> Callable[[Tensor], Any]:
        return partial(self._generate, self.models.routed, routes=route.to(self.models.routed.device), **more)

    def _generate(self, model: Any, prompt: Tensor, **more: Any) -> Any:
        more |= {"max_new_tokens": self.limit, "do_sample": False, "return_dict_in_generate": True}
        mask = torch.ones_like(prompt)
        return model.generate(
            prompt, attention_mask=mask, eos_token_id=self.ends or None, pad_token_id=self.pad, **more
        )

    def _searched(self, prompts: list[Tensor], count: int) -> list[int]:
        """The layers that drafts skip, those that hurt least first."""
        dense, rows = self.ways["transformers", None], []
        for place, prompt in enumerate(prompts):
            said = dense(prompt).sequences[0, prompt.shape[1] :].tolist()
            rows.append(Row(place, prompt[0].tolist(), said))
        model, batch = self.models.routed, collate_training(rows, pad=self.pad, loss_on="response")
        batches = [{key: value.to(model.device) for key, value in batch.items()}]
        readings = list(read_prompts(model, batches))

        def loss_of(route: Tensor) -> float:
            return float(losses_under_routes(model, batches, route, readings)[0].sum())

        with torch.no_grad():
            return elimination(model.num_layers, count, one_by_one(loss_of))

    def measure(self, warmup: int, repetitions: int) -> list[dict[str, Any]]:
        """A record per way, all of them in turn for each prompt; seconds are those of whole responses with prefill."""
        said, counts = self._said()
        seconds, device = np.zeros((len(self.ways), warmup + repetitions)), self.models.routed.device
        calls = list(self.ways.values())
        for repetition in range(-warmup, repetitions):
            for prompt in self.prompts:
                for way in in_turn(range(len(calls)), repetition):
                    seconds[way, warmup + repetition] += seconds_of(partial(calls[way], prompt), device)
        seconds, dense = seconds[:, warmup:], said["transformers", None]
        tokens = sum(map(len, dense))
        return [
            {
                "decoder": decoder,
                "skip_rate_asked": rate,
                "prompts": len(self.prompts),
                "tokens": tokens,
                "seconds_per_token": float(np.median(own)) / tokens,
                "speedup_over_transformers": float(np.median(seconds[0] / own)),
                "speedup_of_repetitions": (seconds[0] / own).tolist(),
                "same_text": float(np.mean([a == b for a, b in zip(said[decoder, rate], dense, strict=True)])),
                **counts.get((decoder, rate), {}),
            }
            for (decoder, rate), own in zip(self.ways, seconds, strict=True)
        ]

    def _said(self) -> tuple[dict[Any, list[list[int]]], dict[Any, dict[str, Any]]]:
        """What each way answers; of drafts, how many tokens stood, and how often a warning said that none pay."""
        said, counts = {}, {}
        for key, call in self.ways.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = [call(prompt) for prompt in self.prompts]
            if key[0] == "engine":
                said[key] = [out.tokens[0] for out in found]
            else:
                pairs = zip(self.prompts, found, strict=True)
                said[key] = [out.sequences[0, prompt.shape[1] :].tolist() for prompt, out in pairs]
            if key[0] == "lossless":
                drafted, accepted, passes = (
                    sum(getattr(out, name)[0] for out in found) for name in ("drafted", "accepted", "dense_passes")
                )
                warned = sum("lossless=True will not be faster" in str(each.message) for each in caught)
                counts[key] = {"drafted": drafted, "accepted": accepted, "dense_passes": passes, "warned": warned}
                counts[key] |= {"skipped_layers": (~found[0].routes[0]).nonzero().flatten().tolist()}
        return said, counts


def _real_prompts(file: str | None, count: int) -> list[str]:
    """Prompts of a file, a line each, or of the bundled tasks in turn."""
    if file is None:
        tasks = (MiniTranslation("en-de"), MiniTranslation("en-zh"), MiniSummarization(), MiniQA())
        prompts = [
            task.prompt(each)
            for examples in zip(*(task.test() for task in tasks), strict=False)
            for task, each in zip(tasks, examples, strict=True)
        ]
    elif Path(file).is_file():
        prompts = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        raise ValueError(f"lossless_prompts={file!r} is no file; give one with a prompt a line")
    if len(prompts) < count:
        where = "the bundled tasks hold" if file is None else f"lossless_prompts={file!r} holds"
        raise ValueError(f"{where} {len(prompts)} prompts, and lossless={count - _SEARCHED} needs {count}: give fewer")
    return prompts[:count]
