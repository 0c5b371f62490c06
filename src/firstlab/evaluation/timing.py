"""Measure time per output token, dense and routed in turn in one process, so that the ratio is fair."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from firstlab.config.schema import EvaluationConfig
from firstlab.engine.engine import DecodeEngine, engine_for
from firstlab.evaluation.decoding import Decoder
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import FixedRoutes, Routes


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch(LogitsProcessor):
    """Notes when the logits of each token are there, from its making on; a GPU notes its own time, so nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: list[float] = []
        self._events: list[torch.cuda.Event] = []
        synchronize(device)
        if device.type == "cuda":
            self._began = self._mark()
        self._start = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._device.type == "cuda":
            self._events.append(self._mark())
        else:
            self.note()
        return scores

    def note(self) -> None:
        """Note the host's time."""
        self._host.append(time.perf_counter() - self._start)

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def times(self) -> list[float]:
        if self._events:
            synchronize(self._device)
        return self._host + [self._began.elapsed_time(event) / 1000 for event in self._events]


def time_generation(
    decoder: RouterAugmentedLM | DecodeEngine, prompt: Sequence[int], routes: Routes, tokens: int
) -> tuple[float, float]:
    """(TTFT, TPOT) in seconds of one greedy generation of exactly `tokens` tokens; TPOT is the median decode step."""
    if isinstance(decoder, DecodeEngine):
        watch = Stopwatch(decoder.model.device)
        decoder.generate([prompt], tokens, routes, eos=(), on_step=lambda _: watch.note())
    else:
        ids = torch.tensor([prompt], device=decoder.device)
        watch = Stopwatch(decoder.device)
        options: dict[str, Any] = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        options["logits_processor"] = LogitsProcessorList([watch])
        decoder.generate(ids, torch.ones_like(ids), routes=routes, **options)
    times = watch.times
    return times[0], float(np.median(np.diff(times)))


def measure_tpot(decoder: Decoder, routes: Sequence[Routes], config: EvaluationConfig) -> dict[str, Any]:
    """Times (TTFT, TPOT) at batch size 1 of evenly spread test prompts, dense and routed: medians, ratio, quartiles."""
    model, rows, tokens = decoder.model, decoder.rows, config.tpot_tokens
    indices = np.unique(np.linspace(0, len(routes) - 1, min(config.tpot_prompts, len(routes))).astype(int))
    chosen = [rows[int(index)].prompt for index in indices]
    engine = engine_for(model, max(map(len, chosen)) + tokens, 1) if config.decoder == "engine" else None
    dense = FixedRoutes(torch.ones(model.num_layers, dtype=torch.bool, device=model.device))
    pairs = []
    for place, (index, prompt) in enumerate(zip(indices, chosen, strict=True)):
        routed = routes[int(index)].to(model.device)
        for _ in range(config.tpot_repetitions + (place == 0)):
            pairs.append([time_generation(engine or model, prompt, each, tokens) for each in (dense, routed)])
    # [dense or routed, measurements] each; the first pair is a warm-up.
    (dense_ttft, routed_ttft), (dense_tpot, routed_tpot) = np.array(pairs[1:]).transpose(2, 1, 0)
    ratios = routed_tpot / dense_tpot
    return {
        "decoder": config.decoder,
        "batch_size": 1,
        "tokens": tokens,
        "measurements": len(ratios),
        "ttft_dense_s": float(np.median(dense_ttft)),
        "ttft_s": float(np.median(routed_ttft)),
        "tpot_dense_s": float(np.median(dense_tpot)),
        "tpot_s": float(np.median(routed_tpot)),
        "tpot_ratio": float(np.median(ratios)),
        "tpot_ratio_quartiles": [float(np.quantile(ratios, q)) for q in (0.25, 0.75)],
    }
