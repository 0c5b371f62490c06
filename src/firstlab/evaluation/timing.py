"""Measure time per output token, dense and routed in turn in one process, so that the ratio is fair."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from firstlab.data.datamodule import PromptDataModule
from firstlab.data.encoding import PromptRows
from firstlab.engine.engine import DecodeEngine, engine_for
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import FixedRoutes, Routes


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch(LogitsProcessor):
    """Notes when the logits of each token are there. It starts when it is made, with a device that has nothing to do.

    Between tokens neither the host nor a GPU waits for it: a GPU notes its own time.
    """

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
        """Something is on the host now."""
        self._host.append(time.perf_counter() - self._start)

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def times(self) -> list[float]:
        """Seconds since the start."""
        if self._events:
            synchronize(self._device)
        return self._host + [self._began.elapsed_time(event) / 1000 for event in self._events]


def time_generation(
    decoder: RouterAugmentedLM | DecodeEngine, prompt: Sequence[int], routes: Routes, tokens: int
) -> tuple[float, float]:
    """(TTFT, TPOT) in seconds of one greedy generation of exactly `tokens` tokens; TPOT is the median decode step.

    Args:
        decoder: The model, which decodes through transformers' `generate`, or the engine.
        prompt: Token ids.
        routes: What decode runs.
        tokens: New tokens, at least 2.
    """
    if isinstance(decoder, DecodeEngine):
        watch = Stopwatch(decoder.model.device)
        decoder.generate([prompt], tokens, routes, eos=(), on_step=lambda _: watch.note())
    else:
        ids = torch.tensor([prompt], device=decoder.device)
        watch = Stopwatch(decoder.device)
        decoder.generate(
            ids,
            torch.ones_like(ids),
            routes=routes,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([watch]),
        )
    times = watch.times
    return times[0], float(np.median(np.diff(times)))


def measure_tpot(
    model: RouterAugmentedLM,
    data: PromptDataModule,
    routes: Sequence[Routes],
    prompts: int,
    tokens: int,
    repetitions: int,
    engine: bool = False,
) -> dict[str, Any]:
    """TPOT ratio routed ÷ dense at batch size 1.

    Each prompt is decoded with every layer and with the route it got, one right after the other, after a warm-up.

    Args:
        model: The model.
        data: Gives the test prompts.
        routes: What each prompt runs.
        prompts: How many, evenly spread.
        tokens: New tokens each.
        repetitions: Times each is repeated.
        engine: Through the decode engine instead of transformers' `generate`.

    Returns:
        Medians in seconds, the median ratio and its quartiles.
    """
    indices = np.unique(np.linspace(0, len(routes) - 1, min(prompts, len(routes))).astype(int))
    rows = PromptRows(data.task, data.test, data.tokenizer, data.max_prompt_length)
    chosen = [rows[int(index)].prompt for index in indices]
    decoder: RouterAugmentedLM | DecodeEngine = model
    if engine:
        decoder = engine_for(model, max(map(len, chosen)) + tokens, 1)
    dense = FixedRoutes(torch.ones(model.num_layers, dtype=torch.bool, device=model.device))
    dense_times, routed_times = [], []
    for place, (index, prompt) in enumerate(zip(indices, chosen, strict=True)):
        routed = routes[int(index)].to(model.device)
        for repetition in range(repetitions + (place == 0)):
            times = [time_generation(decoder, prompt, each, tokens) for each in (dense, routed)]
            if place or repetition:  # the first pair is a warm-up
                dense_times.append(times[0])
                routed_times.append(times[1])
    dense_ttft, dense_tpot = np.array(dense_times).T
    routed_ttft, routed_tpot = np.array(routed_times).T
    ratios = routed_tpot / dense_tpot
    return {
        "decoder": "engine" if engine else "generate",
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
