"""The endpoints: chat, completions, models, health, metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvicorn
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
from firstlab.serve import ServeOptions
from firstlab.serve.protocol import ApiError, Asked, Chat, Completion, Json, Reply, parse
from firstlab.serve.text import TextStream, prompt_of
from firstlab.serve.worker import Job, Worker

ENDPOINTS: dict[str, type[Asked]] = {"/v1/chat/completions": Chat, "/v1/completions": Completion}
_HUNG_UP = 499  # nginx's name for a client that left


class Server:
    """Answers requests with one merged model, which the engine decodes; with an API key, only to those who send it."""

    def __init__(self, source: Source, engine: DecodeEngine, options: ServeOptions, api_key: str | None) -> None:
        self.source, self.options, self.api_key = source, options, api_key
        self.name = options.name or Path(options.run).resolve().name
        self.created = int(time.time())
        self.worker = Worker(engine, options.waiting)
        self.ends = stop_tokens(source.model.routed.lm, source.tokenizer)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            *(Route(path, partial(self.answer, kind), methods=["POST"]) for path, kind in ENDPOINTS.items()),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/health", self.health),
            Route("/metrics", self.prometheus),
        ]
        handlers: Any = dict.fromkeys((HTTPException, ClientDisconnect, Exception), self._refused)
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        with pinned_generation(self.source.model.routed.lm):  # requests alone say how tokens are chosen
            decoding = asyncio.create_task(self.worker.run())
            yield
            decoding.cancel()
            await asyncio.wait([decoding])

    # -- endpoints --

    async def health(self, request: Request) -> Response:
        """200 while requests are answered, else 503."""
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "dead", "model": self.name}, 200 if alive else 503)

    async def prometheus(self, request: Request) -> Response:
        """Text for Prometheus."""
        return Response(generate_latest(self.worker.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """The one model, alone by its name or in a list, and what may be asked of it."""
        self._authorize(request)
        routed = self.source.model.routed
        model = {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "firstlab",
            "max_length": self.worker.engine.max_length,
            "num_layers": routed.num_layers,
            "highest_skip_rate": getattr(routed.routers, "highest_rate", None) if self.source.routes is None else None,
        }
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [model]})
        self._check_name(name)
        return JSONResponse(model)

    async def answer(self, kind: type[Asked], request: Request) -> Response:
        """See OpenAI's `chat.completions` and `completions`."""
        self._authorize(request)
        asked = parse(kind, await self._body(request))
        job, reply = self._submit(asked), Reply(kind is Chat, self.name)
        text = TextStream(self.source.tokenizer, self.ends, asked.stops)
        if asked.stream:
            events = self._events(job, text, reply, asked.stream_options.include_usage)
            response: Response = StreamingResponse(events, 200, {"Cache-Control": "no-cache"}, "text/event-stream")
        else:
            response = await self._whole(request, job, text, reply)
        self._count(request, response.status_code)
        return response

    async def _refused(self, request: Request, error: Exception) -> Response:
        """The answer to a request that failed, as OpenAI's API gives it."""
        if isinstance(error, ClientDisconnect):
            error = ApiError(_HUNG_UP, "the client left while it sent")
        elif not isinstance(error, HTTPException):
            error = ApiError(500, "the server failed on this request; its log says why")
        elif not isinstance(error, ApiError):
            message = f"{request.method} {request.url.path}: {error.detail}; try POST {' or '.join(ENDPOINTS)}"
            error = ApiError(error.status_code, message, headers=error.headers)
        self._count(request, error.status_code)
        return JSONResponse(error.body, error.status_code, error.headers)

    def _count(self, request: Request, status: int) -> None:
        if (path := request.url.path) in ENDPOINTS:
            self.worker.metrics.requests.labels(path, str(status)).inc()

    # -- from a request to its tokens --

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self.api_key is not None and not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_name(self, name: str) -> None:
        if name != self.name:
            message = f"model={name!r} is not served here; ask for {self.name!r}, or leave it out"
            raise ApiError(404, message, "model", "model_not_found")

    async def _body(self, request: Request) -> bytes:
        content = request.headers.get("content-type", "")
        # A page in a browser can send other types to this machine without asking.
        if content.partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, f"Content-Type={content!r}: send application/json")
        body, size, most = b"", 0, self.options.max_body
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
        self._check_name(asked.model or self.name)
        prompt, limit, longest = prompt_of(self.source, asked), asked.max_tokens, self.worker.engine.max_length
        room, most = longest - len(prompt), min(self.options.max_new_tokens, longest - 1)
        if limit is not None and limit > most:
            raise ApiError(400, f"max_tokens={limit}: this server gives at most {most}; ask for fewer", "max_tokens")
        if room < (limit or 1):
            message = f"the prompt has {len(prompt)} tokens and max_tokens={limit or 1}, but there is room for "
            message += f"{longest}: shorten the prompt or lower max_tokens"
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
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
        try:
            return self.worker.submit(
                prompt, limit or min(most, room), routes=routes, skip_rate=rate, eos=self.ends, sampling=sampling
            )
        except ValueError as error:  # of a rate that the routers do not reach
            raise ApiError(400, str(error), "skip_rate" if rate is not None else None) from error

    # -- from tokens to an answer --

    async def _whole(self, request: Request, job: Job, text: TextStream, reply: Reply) -> Response:
        """The answer at once, or an empty one as soon as the client has hung up."""
        gone = asyncio.ensure_future(request.receive())  # the body has been read: only the end can come
        gone.add_done_callback(lambda _: self.worker.cancel(job))
        try:
            said = "".join([piece async for piece in self._pieces(job, text)])
        finally:
            gone.cancel()
        if gone.done():
            return Response(status_code=_HUNG_UP)
        reason, usage = self._end(job, text)
        return JSONResponse({**reply.json(said, reason, whole=True), "usage": usage})

    async def _events(self, job: Job, text: TextStream, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events; Starlette ends this where the client has hung up."""
        try:
            if reply.chat:
                yield _event(reply.json(""))
            async for piece in self._pieces(job, text):
                if piece:
                    yield _event(reply.json(piece))
            reason, usage = self._end(job, text)
            yield _event(reply.json("", reason))
            if with_usage:
                yield _event({**reply.json(""), "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status has gone out
            yield _event(error.body)
        finally:
            self.worker.cancel(job)

    async def _pieces(self, job: Job, text: TextStream) -> AsyncIterator[str]:
        """The text as it comes; then the job has its output."""
        async for token in job.tokens():
            if text.stopped:
                continue  # on the way when the stop came
            yield text.feed(token)
            if text.stopped:
                self.worker.cancel(job)
        if not text.stopped:
            yield text.feed(None)

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


class Process(uvicorn.Server):
    """Serves until SIGTERM or Ctrl-C; requests that still run when the grace is over are told so, not cut off."""

    def __init__(self, server: Server) -> None:
        self._worker, self._grace = server.worker, server.options.grace
        last = self._grace + 5  # then uvicorn cuts off what is left
        super().__init__(uvicorn.Config(server.app(), log_level="warning", timeout_graceful_shutdown=last))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._grace, self._worker.give_up)
        await super().shutdown(sockets)


def _event(body: Json) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
