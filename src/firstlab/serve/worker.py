"""Decode the requests of an event loop with the engine, in a thread of its own, and count for Prometheus what comes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from firstlab.engine.batching import ContinuousBatch, Request
from firstlab.engine.engine import DecodeEngine, EngineOutput
from firstlab.serve.protocol import ApiError

log = logging.getLogger("firstlab.serve")

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters and times of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "firstlab_requests", "Requests; 499: the client left early", ("endpoint", "status"), registry=own
        )
        self.prompt_tokens = Counter("firstlab_prompt_tokens", "Tokens of accepted prompts", registry=own)
        self.tokens = Counter("firstlab_generated_tokens", "Tokens of responses", registry=own)
        self.layers = Counter("firstlab_layers", "Layers of decoded tokens, run and skipped", ("state",), registry=own)
        self.steps = Counter("firstlab_decode_steps", "Decode steps of the batch", registry=own)
        self.union = Counter("firstlab_union_layers", "Layers that some row of a step ran, summed up", registry=own)
        self.running = Gauge("firstlab_requests_running", "Requests that decode", registry=own)
        self.waiting = Gauge("firstlab_requests_waiting", "Requests without a place", registry=own)
        self.first_token = Histogram("firstlab_ttft_seconds", "To the first token", buckets=_SECONDS, registry=own)
        tenths = [seconds / 10 for seconds in _SECONDS]
        self.per_token = Histogram("firstlab_tpot_seconds", "Per token after the first", buckets=tenths, registry=own)


class Job:
    """A request, and its tokens on their way to the client."""

    def __init__(self, request: Request) -> None:
        self.request, self.begun = request, time.perf_counter()
        self.first_token: float | None = None
        self.output: EngineOutput | None = None
        self.news: asyncio.Queue[int | EngineOutput | ApiError] = asyncio.Queue()

    async def tokens(self) -> AsyncIterator[int]:
        """Each token as soon as it is there; then `output` is."""
        while self.output is None:
            news = await self.news.get()
            if isinstance(news, ApiError):
                raise news
            if isinstance(news, int):
                yield news
            else:
                self.output = news


class Worker:
    """Hands requests to the engine and tokens back.

    Only the engine's steps run in the thread: between two of them the event loop adds and cancels requests.

    Args:
        engine: Nobody else may use it meanwhile.
        most_waiting: Requests beyond those that decode, at most.
    """

    def __init__(self, engine: DecodeEngine, most_waiting: int) -> None:
        self.engine, self.most, self.metrics = engine, engine.max_batch_size + most_waiting, Metrics()
        self.jobs: dict[Request, Job] = {}
        self._new: list[Request] = []  # to be added before the next step
        self._left: list[Request] = []  # to be cancelled then
        self._wake = asyncio.Event()
        self.alive = True

    def submit(self, prompt: list[int], max_new_tokens: int, **asked: Any) -> Job:
        """Queue a request, with the arguments of `DecodeEngine.request`; ApiError if too many wait."""
        if not self.alive:
            raise ApiError(503, "the server has stopped; send it again")
        if len(self.jobs) >= self.most:
            message = f"{len(self.jobs)} requests are being answered or wait, the most allowed: send it again later"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        job = Job(self.engine.request(prompt, max_new_tokens, **asked))
        self.jobs[job.request] = job
        self._new.append(job.request)
        self._wake.set()
        self.metrics.prompt_tokens.inc(len(prompt))
        return job

    def cancel(self, job: Job) -> None:
        """Stop a request that nobody waits for any more; its output up to now comes as its last news."""
        if job.request in self.jobs:
            self._left.append(job.request)
            self._wake.set()

    def give_up(self) -> None:
        """Refuse what is here and what will come."""
        self.alive = False
        for job in self.jobs.values():
            job.news.put_nowait(ApiError(503, "the server has stopped; send it again"))
            self.cancel(job)

    async def run(self) -> None:
        """Decode until cancelled; then nobody waits any more."""
        batch = self.engine.batch()
        try:
            with ThreadPoolExecutor(1, "decode engine") as thread:
                while True:
                    if not batch.busy:
                        await self._wake.wait()
                    self._wake.clear()
                    try:
                        self._take_orders(batch)
                        await self._turn(batch, thread)
                    except Exception:  # of whatever kind
                        log.exception("the engine failed; every request in it is refused")
                        for request in self.jobs.keys() - set(self._new):
                            self.jobs.pop(request).news.put_nowait(ApiError(500, "the engine failed; send it again"))
                        batch = self.engine.batch()
        finally:
            self.give_up()

    def _take_orders(self, batch: ContinuousBatch) -> None:
        new, left, self._new, self._left = self._new, self._left, [], []
        for request in new:
            batch.add(request)
        for request in left:
            if request in self.jobs:
                batch.cancel(request)
                self._end(request, self.engine.output(request))

    async def _turn(self, batch: ContinuousBatch, thread: ThreadPoolExecutor) -> None:
        steps, layers = batch.steps, batch.layers_read
        tokens, ended = await asyncio.get_running_loop().run_in_executor(thread, batch.advance)
        self.metrics.tokens.inc(len(tokens))
        self.metrics.steps.inc(batch.steps - steps)
        self.metrics.union.inc(batch.layers_read - layers)
        self.metrics.running.set(len(batch.active))
        self.metrics.waiting.set(len(batch.waiting) + len(batch.ready) + len(self._new))
        for request, token in tokens.items():
            self._deliver(self.jobs[request], token)
        for request in ended:
            self._end(request, self.engine.output(request))

    def _deliver(self, job: Job, token: int) -> None:
        if job.first_token is None:
            job.first_token = time.perf_counter()
            self.metrics.first_token.observe(job.first_token - job.begun)
        job.news.put_nowait(token)

    def _end(self, request: Request, output: EngineOutput) -> None:
        job = self.jobs.pop(request)
        if job.first_token is not None and (decoded := len(output.tokens[0]) - 1):
            self.metrics.per_token.observe((time.perf_counter() - job.first_token) / decoded)
            skipped = float(output.layer_skips.sum()) * decoded
            self.metrics.layers.labels("skipped").inc(skipped)
            self.metrics.layers.labels("run").inc(output.layer_skips.numel() * decoded - skipped)
        job.news.put_nowait(output)
