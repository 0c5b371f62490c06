"""The decode engine in a thread of its own, and what the event loop knows of its requests."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from firstlab.engine.batching import Request
from firstlab.engine.engine import DecodeEngine, EngineOutput
from firstlab.serve.metrics import Metrics
from firstlab.serve.protocol import ApiError

log = logging.getLogger("firstlab.serve")


class Job:
    """A request, and its tokens on their way from the engine's thread."""

    def __init__(self, request: Request) -> None:
        self.request, self.begun = request, time.perf_counter()
        self.first_token: float | None = None
        self.output: EngineOutput | None = None
        self._news: asyncio.Queue[int | EngineOutput | Exception] = asyncio.Queue()

    def put(self, news: int | EngineOutput | Exception) -> None:
        """A token, or the last news."""
        self._news.put_nowait(news)

    async def tokens(self) -> AsyncIterator[int]:
        """Each token as soon as it is there; then `output` is."""
        while self.output is None:
            news = await self._news.get()
            if isinstance(news, Exception):
                raise ApiError(500, "the engine failed on this request; send it again") from news
            if isinstance(news, int):
                yield news
            else:
                self.output = news


class Worker:
    """Hands requests to the engine and tokens back. All but `_run` belongs to the event loop.

    Args:
        engine: Nobody else may use it meanwhile.
        most_waiting: Requests beyond those that decode, at most.
        metrics: Told of every token.
    """

    def __init__(self, engine: DecodeEngine, most_waiting: int, metrics: Metrics) -> None:
        self.engine, self.most = engine, engine.max_batch_size + most_waiting
        self.jobs: dict[Request, Job] = {}
        self._metrics = metrics
        self._orders: queue.SimpleQueue[tuple[str, Request] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="decode engine", daemon=True)

    def start(self) -> None:
        """Begin to decode; call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests will be answered."""
        return self._thread.is_alive()

    async def stop(self) -> None:
        """End the thread after its present step."""
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join)

    def submit(self, prompt: list[int], max_new_tokens: int, **asked: Any) -> Job:
        """Queue a request, with the arguments of `DecodeEngine.request`; ApiError if too many wait."""
        if len(self.jobs) >= self.most:
            message = f"{len(self.jobs)} requests are being answered or wait, the most allowed: send it again later"
            raise ApiError(429, message, code="queue_full")
        job = Job(self.engine.request(prompt, max_new_tokens, **asked))
        self.jobs[job.request] = job
        self._orders.put(("add", job.request))
        return job

    def cancel(self, job: Job) -> None:
        """Stop a request that nobody waits for any more; its output up to now comes as its last news."""
        if job.request in self.jobs:
            self._orders.put(("cancel", job.request))

    # -- in the engine's thread --

    def _run(self) -> None:
        batch, inside = self.engine.batch(), set[Request]()
        while True:
            cancelled = []
            for order in self._taken(wait=not batch.busy):
                if order is None:
                    return
                action, request = order
                if action == "add":
                    batch.add(request)
                    inside.add(request)
                elif request in inside:
                    batch.cancel(request)
                    cancelled.append(request)
            steps, layers = batch.steps, batch.layers_read
            ended: dict[Request, EngineOutput | Exception]
            try:
                tokens, complete = batch.advance()
                ended = {request: self.engine.output(request) for request in (*complete, *cancelled)}
            except Exception as error:  # of whatever kind: nobody may wait for ever
                log.exception("the engine failed; every request in it is refused")
                ended, tokens = dict.fromkeys(inside, error), {}
                batch = self.engine.batch()
                steps = layers = 0
            inside -= ended.keys()
            done = (batch.steps - steps, batch.layers_read - layers, len(batch.active))
            self._loop.call_soon_threadsafe(self._deliver, tokens, ended, *done)

    def _taken(self, wait: bool) -> list[tuple[str, Request] | None]:
        """The orders that have come; one at least with `wait`."""
        taken = [self._orders.get()] if wait else []
        while not self._orders.empty():
            taken.append(self._orders.get())
        return taken

    # -- in the event loop --

    def _deliver(
        self,
        tokens: dict[Request, int],
        ended: dict[Request, EngineOutput | Exception],
        steps: int,
        layers: int,
        active: int,
    ) -> None:
        now = time.perf_counter()
        for request, token in tokens.items():
            job = self.jobs[request]
            if job.first_token is None:
                job.first_token = now
                self._metrics.first_token.observe(now - job.begun)
            job.put(token)
        for request, output in ended.items():
            job = self.jobs.pop(request)
            if isinstance(output, EngineOutput) and job.first_token is not None:
                self._metrics.end(output, now - job.first_token)
            job.put(output)
        self._metrics.turn(len(tokens), steps, layers, active, len(self.jobs) - active)
