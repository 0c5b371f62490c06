"""The endpoints: chat, completions, models, health, metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from firstlab.config.schema import LEAST_TEMPERATURE
from firstlab.engine.engine import DecodeEngine
from firstlab.engine.sampling import Sampling
from firstlab.hub.source import Source
from firstlab.model.generation_options import pinned_generation, stop_tokens
from firstlab.model.routes import FixedRoutes
from firstlab.serve.metrics import Metrics
from firstlab.serve.protocol import ApiError, Asked, Chat, Completion, Json, Reply, parse
from firstlab.serve.text import TextStream, prompt_of
from firstlab.serve.worker import Job, Worker

_HUNG_UP = 499  # nginx's name for a client that left


@dataclass(frozen=True)
class Limits:
    """What one client may ask for."""

    waiting: int = 64  # requests beyond those that decode
    new_tokens: int = 512  # of a response; also where a request names no limit
    body: int = 256 * 1024  # bytes


class Server:
    """Answers requests with one model.

    Args:
        source: The model, merged, with its tokenizer.
        engine: Decodes it, and nothing else meanwhile.
        name: The model's name for clients.
        api_key: What clients must send; None: nothing.
    """

    def __init__(self, source: Source, engine: DecodeEngine, name: str, limits: Limits, api_key: str | None) -> None:
        self.source, self.name, self.limits, self.api_key = source, name, limits, api_key
        self.metrics = Metrics()
        self.worker = Worker(engine, limits.waiting, self.metrics)
        self.ends = stop_tokens(source.model.routed.lm, source.tokenizer)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.prometheus),
        ]
        handlers: Any = {ApiError: _refusal, HTTPException: _not_found, Exception: _failure}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        with pinned_generation(self.source.model.routed.lm):  # requests alone say how tokens are chosen
            self.worker.start()
            yield
            await self.worker.stop()

    # -- endpoints --

    async def health(self, request: Request) -> Response:
        """200 while requests are answered, else 503."""
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "dead", "model": self.name}, 200 if alive else 503)

    async def prometheus(self, request: Request) -> Response:
        """Text for Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """The one model, and what may be asked of it."""
        self._authorize(request)
        routed, engine = self.source.model.routed, self.worker.engine
        facts = {
            "max_length": engine.max_length,
            "num_layers": routed.num_layers,
            "highest_skip_rate": getattr(routed.routers, "highest_rate", None) if self.source.routes is None else None,
        }
        return JSONResponse(
            {"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "firstlab", **facts}]}
        )

    async def chat(self, request: Request) -> Response:
        """See OpenAI's `chat.completions`."""
        return await self._counted(request, Chat)

    async def completions(self, request: Request) -> Response:
        """See OpenAI's `completions`."""
        return await self._counted(request, Completion)

    # -- one request --

    async def _counted(self, request: Request, kind: type[Asked]) -> Response:
        status = 500
        try:
            response = await self._answer(request, kind)
            status = response.status_code
            return response
        except ApiError as error:
            status = error.status
            raise
        except ClientDisconnect:  # while it sent
            status = _HUNG_UP
            return Response(status_code=status)
        finally:
            self.metrics.requests.labels(request.url.path, str(status)).inc()

    async def _answer(self, request: Request, kind: type[Asked]) -> Response:
        self._authorize(request)
        asked = parse(kind, await self._body(request))
        job = self._submit(asked)
        text = TextStream(self.source.tokenizer, self.ends, asked.stops)
        reply = Reply(isinstance(asked, Chat), self.name)
        if asked.stream:
            events = self._events(job, text, reply, asked.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await _unless_gone(request, self._whole(job, text, reply))

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self.api_key is not None and not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        content = request.headers.get("content-type", "")
        # A page in a browser can send other types to this machine without asking.
        if content.partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, f"Content-Type={content!r}: send application/json")
        body, size, most = b"", 0, self.limits.body
        async for chunk in request.stream():
            size += len(chunk)
            if size <= most:
                body += chunk
            elif size > 16 * most:
                break  # less is read to its end: the client would not see an answer while it sends
        if size > most:
            raise ApiError(413, f"the body has more than {most} bytes, the most allowed: send a shorter prompt")
        return body

    def _submit(self, asked: Asked) -> Job:
        if asked.model not in ("", self.name):
            message = f"model={asked.model!r} is not served here; ask for {self.name!r}, or leave it out"
            raise ApiError(404, message, "model", "model_not_found")
        prompt, most, (field, limit) = prompt_of(self.source, asked), self.limits.new_tokens, asked.limit
        if limit is not None and limit > most:
            raise ApiError(400, f"{field}={limit}: this server gives at most {most}; ask for fewer", field)
        longest = self.worker.engine.max_length
        room = longest - len(prompt)
        if room < (limit or 1):
            message = f"the prompt has {len(prompt)} tokens and {field}={limit or 1}, but there is room for {longest}"
            raise ApiError(400, f"{message}: shorten the prompt or lower {field}", field, "context_length_exceeded")
        sampling = None
        if asked.temperature >= LEAST_TEMPERATURE:
            seed = torch.seed() % 2**63 if asked.seed is None else asked.seed
            sampling = Sampling(asked.temperature, asked.top_k, asked.top_p, seed)
        routes, rate = self.source.routes, asked.skip_rate
        if rate == 0:
            routes, rate = FixedRoutes(torch.ones(self.source.model.routed.num_layers, dtype=torch.bool)), None
        elif rate is not None and routes is not None:
            message = f"skip_rate={rate}: the layers of this model are fixed; leave it out, or 0: every layer"
            raise ApiError(400, message, "skip_rate")
        asked_for: dict[str, Any] = {"routes": routes, "skip_rate": rate, "eos": self.ends, "sampling": sampling}
        try:
            job = self.worker.submit(prompt, limit or min(most, room), **asked_for)
        except ValueError as error:  # of a rate that the routers do not reach
            raise ApiError(400, str(error), "skip_rate" if rate is not None else None) from error
        self.metrics.prompt_tokens.inc(len(prompt))
        return job

    async def _pieces(self, job: Job, text: TextStream) -> AsyncIterator[str]:
        """The text as it comes; a request whose reader leaves is cancelled."""
        try:
            async for token in job.tokens():
                if text.stopped:
                    continue  # on the way when the stop came
                yield text.feed(token)
                if text.stopped:
                    self.worker.cancel(job)
            if not text.stopped:
                yield text.feed(None)
        finally:
            self.worker.cancel(job)

    def _end(self, job: Job, text: TextStream) -> tuple[str, Json]:
        """Why a response ended, and what it used."""
        assert job.output is not None
        tokens, skips = job.output.tokens[0], job.output.layer_skips[0]
        reason = "stop" if text.stopped or tokens[-1] in self.ends else "length"
        usage = {
            "prompt_tokens": len(job.request.prompt),
            "completion_tokens": len(tokens),
            "total_tokens": len(job.request.prompt) + len(tokens),
            "layers_run": (skips < 1).nonzero().flatten().tolist(),
            "skip_rate": float(skips.mean()),
        }
        return reason, usage

    async def _whole(self, job: Job, text: TextStream, reply: Reply) -> Response:
        async with aclosing(self._pieces(job, text)) as pieces:  # type: ignore[type-var]
            said = "".join([piece async for piece in pieces])
        return JSONResponse(reply.whole(said, *self._end(job, text)))

    async def _events(self, job: Job, text: TextStream, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
        try:
            if reply.chat:
                yield _event(reply.piece(""))
            async with aclosing(self._pieces(job, text)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    if piece:
                        yield _event(reply.piece(piece))
            reason, usage = self._end(job, text)
            yield _event(reply.piece("", reason))
            if with_usage:
                yield _event(reply.usage(usage))
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status has gone out
            yield _event(error.body)
        finally:
            self.worker.cancel(job)


def _event(body: Json) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The answer, or an empty one as soon as the client has hung up."""
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # the body has been read: only the end can come
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=_HUNG_UP)
    finally:
        answer.cancel()
        gone.cancel()


async def _refusal(request: Request, error: ApiError) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.body, error.status, headers)


async def _not_found(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}; try POST /v1/chat/completions or /v1/completions"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server failed on this request; its log says why").body, 500)
